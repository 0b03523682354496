"""Weights in Hugging Face's layout: logits of PyTorch models, both ways bit for bit, and every refusal.

The folders in golden/models were written by transformers; see golden/make_models.py.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrec.config import UserError
from jaxrec.models.causal import Causal, CausalConfig
from jaxrec.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, bart_config
from jaxrec.models.huggingface import (
    load,
    load_bart,
    load_qwen2,
    load_qwen3,
    load_t5,
    save_bart,
    save_qwen2,
    save_qwen3,
    save_t5,
)
from jaxrec.models.vocabulary import ContextTokens, level_logits

GOLDEN = Path(__file__).parent / "golden" / "models"
T5, GATED, MT5, QWEN2, QWEN3, BART = (
    "t5_relu_tied", "t5_gated_untied", "mt5_untied", "qwen2_tied", "qwen3_untied", "bart_tied"
)  # fmt: skip
LOADERS = {T5: load_t5, GATED: load_t5, MT5: load_t5, QWEN2: load_qwen2, QWEN3: load_qwen3, BART: load_bart}
SAVERS = {T5: save_t5, GATED: save_t5, MT5: save_t5, QWEN2: save_qwen2, QWEN3: save_qwen3, BART: save_bart}
CAUSAL = (QWEN2, QWEN3)
FIRST = "decoder.block.0.layer.0.SelfAttention.q.weight"


@pytest.fixture
def folder(tmp_path):
    """Copies a golden model: folder(name) -> Path."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return copy


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not ...}))


def edit_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    """Splits a model's file as large models are; returns the map from tensors to files."""
    tensors = load_file(folder / "model.safetensors")
    where = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in where if where[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def assert_same(one: dict, other: dict) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def refused(name: str, folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        LOADERS[name](folder)
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"
    assert str(folder) in str(error.value)


# ---- the same function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADERS)
def test_logits_are_those_of_transformers(name):
    config, params = LOADERS[name](GOLDEN / name)
    golden = load_file(GOLDEN / name / "golden.safetensors")
    model = (Causal if name in CAUSAL else EncoderDecoder)(config)

    def logits_of(module, states):
        bias = None if name in CAUSAL else module._bias()
        return level_logits(module._table(), states, 0, None, True, bias=bias)[0]

    def run(module, tokens, mask, targets):
        context = module.prefill(ContextTokens(tokens, mask))
        found = {"logits": logits_of(module, module.score(context, targets).states)}
        return found | ({"context": logits_of(module, context.states)} if name in CAUSAL else {})

    arrays = golden["tokens"], golden["mask"].astype(bool), golden["targets"]
    found = jax.jit(lambda params, *arrays: model.apply({"params": params}, *arrays, method=run))(params, *arrays)
    assert golden["mask"].min() == 0, "one context is padded"
    assert golden["logits"].std() > 1, "the logits say something"
    np.testing.assert_allclose(found["logits"], golden["logits"], atol=2e-5)
    if name in CAUSAL:
        real = arrays[1]
        np.testing.assert_allclose(found["context"][real], golden["context"][real], atol=2e-5)


def test_configurations_are_read():
    assert load_t5(GOLDEN / T5)[0] == EncoderDecoderConfig(
        vocabulary=40, width=16, heads=3, head_dim=8, hidden=24, encoder_layers=2, layers=3, buckets=8,
        max_distance=20, dropout=0.1,
    )  # fmt: skip
    gated = load_t5(GOLDEN / GATED)[0]
    assert (gated.activation, gated.gated, gated.tied, gated.scale_head) == ("gelu", True, False, False)
    assert load_bart(GOLDEN / BART)[0] == bart_config(
        vocabulary=40, width=16, heads=2, head_dim=8, hidden=24, encoder_layers=2, layers=3, max_positions=26
    )
    mt5 = load_t5(GOLDEN / MT5)[0]
    assert (mt5.activation, mt5.gated, mt5.tied, mt5.scale_head) == ("gelu", True, False, False)
    assert load_qwen3(GOLDEN / QWEN3)[0] == CausalConfig(
        vocabulary=40, width=16, heads=4, groups=2, head_dim=6, hidden=24, layers=2, rotary_base=1000.0, tied=False,
        bias=False, head_norm=True,
    )  # fmt: skip
    assert load_qwen2(GOLDEN / QWEN2)[0] == CausalConfig(
        vocabulary=40, width=16, heads=4, groups=2, head_dim=4, hidden=24, layers=2, rotary_base=1000.0
    )


@pytest.mark.parametrize(
    ("rope", "base"),
    [({"rope_theta": 5e4}, 5e4), ({}, 1e4), ({"rope_theta": 7.0, "rope_scaling": None}, 7.0)],
)
def test_older_ways_to_say_the_rotary_base(folder, rope, base):
    copy = folder(QWEN2)
    edit_config(copy, rope_parameters=..., **rope)
    assert load_qwen2(copy)[0].rotary_base == base


@pytest.mark.parametrize(("tied", "scaled"), [(True, True), (False, False)])
def test_older_t5_files_scale_the_head_where_it_is_tied(folder, tied, scaled):
    copy = folder(T5 if tied else GATED)
    edit_config(copy, scale_decoder_outputs=..., tie_word_embeddings=tied)
    config, params = load_t5(copy)
    assert (config.tied, config.scale_head) == (tied, scaled)
    assert ("head" in params) != tied


def test_a_decoder_without_a_number_of_layers_has_the_encoders(folder):
    copy = folder(T5)
    edit_config(copy, num_decoder_layers=None)
    edit_tensors(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if "decoder.block.2" in name])
    assert load_t5(copy)[0].layers == 2


def test_a_bart_that_was_saved_without_its_head_has_no_bias_of_the_logits(folder):
    copy = folder(BART)

    def bare(tensors):
        del tensors["final_logits_bias"]
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]

    edit_tensors(copy, bare)
    params, expected = load_bart(copy)[1], load_bart(GOLDEN / BART)[1]
    assert not params["logits_bias"].any()
    assert_same(params | {"logits_bias": expected["logits_bias"]}, expected)


@pytest.mark.parametrize("name", LOADERS)
def test_any_family_is_read_by_the_type_that_it_names(name):
    config, params = LOADERS[name](GOLDEN / name)
    found, read = load(GOLDEN / name)
    assert found == config
    assert_same(read, params)


def test_a_family_that_we_do_not_have_is_refused(folder):
    copy = folder(BART)
    edit_config(copy, model_type="bert")
    with pytest.raises(UserError, match="'bert', expected 'bart' or 'mt5' or 'qwen2' or 'qwen3' or 't5'"):
        load(copy)


# ---- both ways -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADERS)
def test_a_saved_model_is_the_same_bit_for_bit(name, tmp_path):
    config, params = LOADERS[name](GOLDEN / name)
    SAVERS[name](tmp_path / "saved", config, params)
    again, read = LOADERS[name](tmp_path / "saved")
    assert again == config
    assert_same(read, params)
    assert_same(load_file(tmp_path / "saved" / "model.safetensors"), load_file(GOLDEN / name / "model.safetensors"))
    saved, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "saved", GOLDEN / name))
    # Of what both say, only how the head is tied is said in another way, and an mT5 is a T5 that doesn't scale.
    different = {key for key in saved.keys() & theirs.keys() if saved[key] != theirs[key]}
    others = {GATED: {"tie_word_embeddings"}, MT5: {"tie_word_embeddings", "model_type", "architectures"}}
    assert different <= others.get(name, {"eos_token_id"})


def test_an_initialised_model_is_saved_and_read(tmp_path):
    """Parameters as `init` gives them, boxed with their axes; levels survive."""
    config = CausalConfig(vocabulary=12, width=8, heads=2, groups=1, head_dim=4, hidden=6, layers=1, tied=False)
    config = dataclasses.replace(config, levels=((2, 4), (6, 5)), restrict=False)
    context = ContextTokens(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    arrays = context, jnp.zeros((1, 1, 2), jnp.int32)
    variables = Causal(config).init(jax.random.key(0), *arrays)
    save_qwen2(tmp_path, config, variables["params"])
    again, params = load_qwen2(tmp_path)
    assert again == config
    expected = Causal(config).apply(variables, *arrays)
    np.testing.assert_array_equal(Causal(config).apply({"params": params}, *arrays), expected)


def test_shards_are_read_as_one(folder):
    copy = folder(GATED)
    shard(copy)
    assert_same(load_t5(copy)[1], load_t5(GOLDEN / GATED)[1])


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_become_float32(folder, kind):
    copy = folder(QWEN2)
    tensors = load_file(copy / "model.safetensors")
    from safetensors.flax import save_file as save_any  # the NumPy writer knows no bfloat16

    if kind is np.float64:
        edit_tensors(copy, lambda tensors: tensors.update({k: v.astype(kind) for k, v in tensors.items()}))
    else:
        save_any({name: jnp.asarray(value.astype(kind)) for name, value in tensors.items()}, copy / "model.safetensors")
    _, params = load_qwen2(copy)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    expected = tensors["model.embed_tokens.weight"].astype(kind).astype(np.float32)
    np.testing.assert_array_equal(params["embed"]["table"], expected)


# ---- duplicates ------------------------------------------------------------------------------------------------------


def test_copies_and_leftovers_that_older_files_hold_are_accepted(folder):
    copy = folder(T5)

    def add(tensors):
        shared = tensors["shared.weight"]
        tensors |= {f"{side}.embed_tokens.weight": shared for side in ("encoder", "decoder")}
        tensors["lm_head.weight"] = shared
        tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.zeros((8, 3), np.float32)

    edit_tensors(copy, add)
    config, params = load_t5(copy)
    assert config.tied
    assert_same(params, load_t5(GOLDEN / T5)[1])


def test_a_copied_head_of_qwen2_is_accepted(folder):
    copy = folder(QWEN2)
    edit_tensors(copy, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert_same(load_qwen2(copy)[1], load_qwen2(GOLDEN / QWEN2)[1])


@pytest.mark.parametrize(
    ("name", "twin", "source"),
    [
        (T5, "encoder.embed_tokens.weight", "shared.weight"),
        (QWEN2, "lm_head.weight", "model.embed_tokens.weight"),
        (BART, "model.decoder.embed_tokens.weight", "model.shared.weight"),
        (BART, "lm_head.weight", "model.shared.weight"),
    ],
)
def test_a_copy_that_differs_is_refused(folder, name, twin, source):
    copy = folder(name)
    edit_tensors(copy, lambda tensors: tensors.update({twin: tensors[source] + 1}))
    refused(name, copy, "model.safetensors", twin, f"differs from {source}")


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, file):
    copy = folder(T5)
    (copy / file).unlink()
    refused(T5, copy, f"there is no {copy / file}")


def test_a_missing_folder_is_named(tmp_path):
    refused(T5, tmp_path / "nowhere", "there is no", "config.json")


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_damaged_config_is_refused(folder, content):
    copy = folder(T5)
    (copy / "config.json").write_text(content)
    refused(T5, copy, "config.json", "JSON")


@pytest.mark.parametrize("keep", [0, 7, 400, -100])
def test_a_truncated_file_is_refused(folder, keep):
    copy = folder(T5)
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:keep])
    refused(T5, copy, "model.safetensors", "copy it anew")


@pytest.mark.parametrize(
    ("name", "kind"), [(T5, "qwen2"), (T5, "bert"), (QWEN2, "t5"), (QWEN2, None), (QWEN3, "qwen2"), (BART, "t5")]
)
def test_another_architecture_is_refused(folder, name, kind):
    copy = folder(name)
    edit_config(copy, model_type=kind)
    refused(name, copy, "config.json", repr(kind), repr(name.split("_")[0]))


def test_a_missing_tensor_of_bart_is_named(folder):
    copy = folder(BART)
    edit_tensors(copy, lambda tensors: tensors.pop("model.decoder.layernorm_embedding.bias"))
    refused(BART, copy, "no tensor model.decoder.layernorm_embedding.bias")


def test_a_missing_tensor_is_named(folder):
    copy = folder(T5)
    edit_tensors(copy, lambda tensors: tensors.pop(FIRST))
    refused(T5, copy, "model.safetensors", f"no tensor {FIRST}")


def test_a_missing_head_is_named(folder):
    copy = folder(T5)
    edit_config(copy, tie_word_embeddings=False)
    refused(T5, copy, "no tensor lm_head.weight")


def test_an_extra_tensor_is_named(folder):
    copy = folder(QWEN2)
    extra = "model.layers.2.mlp.up_proj.weight"
    edit_tensors(copy, lambda tensors: tensors.update({extra: np.ones((24, 16), np.float32)}))
    refused(QWEN2, copy, "model.safetensors", extra)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (T5, FIRST),
        (QWEN2, "model.layers.1.self_attn.k_proj.bias"),
        (T5, "shared.weight"),
        (QWEN3, "model.layers.1.self_attn.q_norm.weight"),
        (BART, "model.encoder.embed_positions.weight"),
        (BART, "model.decoder.layers.2.encoder_attn.v_proj.bias"),
    ],
)
def test_a_wrong_shape_is_named(folder, name, tensor):
    copy = folder(name)
    edit_tensors(copy, lambda tensors: tensors.update({tensor: tensors[tensor][:-1]}))
    refused(name, copy, "model.safetensors", tensor, "has shape", "config.json asks for")


def test_a_transposed_tensor_is_refused(folder):
    copy = folder(T5)
    edit_tensors(copy, lambda tensors: tensors.update({FIRST: tensors[FIRST].T}))
    refused(T5, copy, FIRST, "[16, 24]", "[24, 16]")


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (T5, "encoder.block.0.layer.0.SelfAttention.q.weight"),
        (QWEN2, "model.norm.weight"),
        (BART, "final_logits_bias"),
    ],
)
def test_not_a_number_is_refused_and_named(folder, name, tensor, kind):
    copy = folder(name)
    for poison in (np.nan, np.inf):

        def spoil(tensors, poison=poison):
            tensors[tensor] = tensors[tensor].astype(kind)
            tensors[tensor].flat[-1] = poison

        edit_tensors(copy, spoil)
        refused(name, copy, "model.safetensors", f"tensor {tensor} holds NaN or infinity: copy the model anew")


def test_integers_are_refused(folder):
    copy = folder(T5)
    edit_tensors(copy, lambda tensors: tensors.update({FIRST: tensors[FIRST].astype(np.int32)}))
    refused(T5, copy, FIRST, "I32")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (T5, {"d_model": 0}, "d_model is 0"),
        (T5, {"d_ff": "24"}, "d_ff is '24'"),
        (T5, {"num_heads": ...}, "num_heads is None"),
        (T5, {"feed_forward_proj": "gelu"}, "feed_forward_proj='gelu'"),
        (T5, {"relative_attention_max_distance": 3}, "max_distance 3"),
        (QWEN2, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (QWEN3, {"attention_bias": True}, "attention_bias=True"),
        (BART, {"activation_function": "tanh"}, "activation_function='tanh'"),
        (BART, {"normalize_before": True}, "normalize_before=True"),
        (BART, {"scale_embedding": True}, "scale_embedding=True"),
        (BART, {"decoder_ffn_dim": 12}, "encoder_ffn_dim is 24, but decoder_ffn_dim is 12"),
        (BART, {"d_model": 15}, "d_model is 15, which 2 heads don't divide"),
        (QWEN2, {"use_sliding_window": True}, "use_sliding_window=True"),
        (QWEN2, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'"),
        (QWEN2, {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type='linear'"),
        (QWEN2, {"rope_parameters": None, "rope_scaling": "linear"}, "rope_parameters is 'linear'"),
        (QWEN2, {"rope_parameters": None, "rope_theta": "x"}, "rope_theta is 'x'; a number"),
        (QWEN2, {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; true or false"),
        (QWEN2, {"jaxrec": {"levels": [1]}}, "was expected"),
        (T5, {"layer_norm_epsilon": "x"}, "layer_norm_epsilon is 'x'; a number"),
        (QWEN2, {"num_key_value_heads": 3}, "give one that divides the 4 heads"),
    ],
)
def test_a_config_that_we_do_not_compute_is_refused(folder, name, changes, words):
    copy = folder(name)
    edit_config(copy, **changes)
    refused(name, copy, "config.json", words)


def test_a_missing_shard_is_named(folder):
    copy = folder(T5)
    file = shard(copy)[FIRST]
    (copy / file).unlink()
    refused(T5, copy, f"there is no {copy / file}")


def test_a_shard_without_its_tensor_is_named(folder):
    copy = folder(T5)
    where = shard(copy)
    file = where[FIRST]
    rest = load_file(copy / file)
    del rest[FIRST]
    save_file(rest, copy / file)
    refused(T5, copy, file, FIRST)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "x"])
def test_a_damaged_index_is_refused(folder, content):
    copy = folder(T5)
    shard(copy)
    (copy / "model.safetensors.index.json").write_text(content)
    refused(T5, copy, "model.safetensors.index.json")


def test_parameters_that_do_not_fit_are_not_saved(tmp_path):
    config, params = load_t5(GOLDEN / T5)
    wrong = params | {"embed": {"table": params["embed"]["table"][:-1]}}
    with pytest.raises(UserError, match="embed/table has shape"):
        save_t5(tmp_path / "a", config, wrong)
    with pytest.raises(UserError, match="encoder_norm/scale has shape None"):
        save_t5(tmp_path / "a", config, {name: value for name, value in params.items() if name != "encoder_norm"})
    with pytest.raises(UserError, match="more/x has shape"):
        save_t5(tmp_path / "a", config, params | {"more": {"x": np.zeros(3)}})
    assert not (tmp_path / "a").exists()


def test_what_has_no_name_in_their_layout_is_not_saved(tmp_path):
    config, params = load_t5(GOLDEN / T5)
    with pytest.raises(UserError, match="activation='silu' and gated=False"):
        save_t5(tmp_path, dataclasses.replace(config, activation="silu"), params)
    qwen, params = load_qwen2(GOLDEN / QWEN2)
    with pytest.raises(UserError, match=r"model\.bias"):
        save_qwen2(tmp_path, dataclasses.replace(qwen, bias=False), params)
    with pytest.raises(UserError, match=r"a Qwen3 has model\.bias=False"):
        save_qwen3(tmp_path, qwen, params)
    bart, params = load_bart(GOLDEN / BART)
    with pytest.raises(UserError, match=r"a T5 has model\.style='t5': 'bart'"):
        save_t5(tmp_path, bart, params)
    with pytest.raises(UserError, match=r"a BART has model\.causal=False: True"):
        save_bart(tmp_path, dataclasses.replace(bart, causal=True), params)
    with pytest.raises(UserError, match="2 heads of 4 at a width of 16"):
        save_bart(tmp_path, dataclasses.replace(bart, head_dim=4), params)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    config, params = load_t5(GOLDEN / T5)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be saved in"):
        save_t5(tmp_path / "file", config, params)
