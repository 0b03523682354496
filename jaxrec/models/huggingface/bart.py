"""BART in Hugging Face's layout."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jaxrec.config import UserError
from jaxrec.models.encoder_decoder import EncoderDecoderConfig, bart_config
from jaxrec.models.huggingface.config_json import CONFIG_FILE, flag_of, make_config, number_of, read_config, size_of
from jaxrec.models.huggingface.tensors import Parameter, Tensors, check_saved, matrix, same, save_model
from jaxrec.nn.post_norm import OFFSET

BART_ACTIVATIONS = {"gelu": "gelu_erf", "gelu_new": "gelu", "relu": "relu", "silu": "silu"}
LOGITS_BIAS = "final_logits_bias"
# What older files say of their architecture, and the only value that is BART's.
FLAGS = {
    "scale_embedding": False,
    "normalize_before": False,
    "add_final_layer_norm": False,
    "normalize_embedding": True,
    "static_position_embeddings": False,
}


def load_bart(folder: str | Path) -> tuple[EncoderDecoderConfig, dict]:
    """The configuration and the parameters (float32) of a BART in a folder, for `EncoderDecoder`.

    Files that were saved without the head, as the pretrained models are, name their tensors without `model.` and have
    no bias of the logits, which is then 0.

    Raises:
      UserError: as for `load_t5`; also sides of different sizes, or with norms before the blocks.
    """
    folder = Path(folder)
    config = _bart_config(folder / CONFIG_FILE, read_config(folder, "bart"))
    with Tensors(folder) as tensors:
        prefix = "" if "shared.weight" in tensors else "model."
        shared = f"{prefix}shared.weight"
        twins = [f"{prefix}{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
        plan = [entry for entry in _bart_plan(config, prefix) if entry.name != LOGITS_BIAS or LOGITS_BIAS in tensors]
        params = tensors.read(plan, dict.fromkeys(twins + ["lm_head.weight"] * config.tied, shared))
    return config, {"logits_bias": np.zeros(config.vocabulary, np.float32)} | params


def save_bart(folder: str | Path, config: EncoderDecoderConfig, params: dict) -> None:
    """Writes config.json and model.safetensors (float32), which `load_bart` and Hugging Face's transformers read.

    Raises:
      UserError: the parameters don't fit the configuration, or the folder can't be written.
    """
    names = {ours: theirs for theirs, ours in BART_ACTIVATIONS.items()}
    wanted = {"style": "bart", "causal": False, "gated": False, "scale_head": False, "epsilon": 1e-5}
    check_saved("a BART", config, wanted)
    if config.heads * config.head_dim != config.width:
        raise UserError(
            f"a BART's heads are together as wide as the model: {config.heads} heads of {config.head_dim} at a width "
            f"of {config.width} can't be saved in Hugging Face's layout"
        )
    raw = {
        "architectures": ["BartForConditionalGeneration"],
        "model_type": "bart",
        "is_encoder_decoder": True,
        "vocab_size": config.vocabulary,
        "d_model": config.width,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.layers,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.hidden,
        "decoder_ffn_dim": config.hidden,
        "activation_function": names[config.activation],
        "max_position_embeddings": config.max_positions,
        "scale_embedding": False,
        "tie_word_embeddings": config.tied,
        "dropout": config.dropout,
        "decoder_start_token_id": config.start_token,
    }
    save_model(folder, config, raw, _bart_plan(config, "model."), params)


def _bart_config(path: Path, raw: dict) -> EncoderDecoderConfig:
    for name, wanted in FLAGS.items():
        if flag_of(path, raw, name, wanted) != wanted:
            raise UserError(f"{path}: {name}={not wanted} is not supported; use a model with {wanted}")
    activation = raw.get("activation_function", "gelu")
    if activation not in BART_ACTIVATIONS:
        raise UserError(
            f"{path}: activation_function={activation!r} is not supported; use one of {', '.join(BART_ACTIVATIONS)}"
        )
    both = {name: size_of(path, raw, f"encoder_{name}") for name in ("attention_heads", "ffn_dim")}
    for name, size in both.items():
        if size_of(path, raw, f"decoder_{name}") != size:
            raise UserError(
                f"{path}: encoder_{name} is {size}, but decoder_{name} is {raw[f'decoder_{name}']}; use a model whose "
                "sides are of one size"
            )
    width, heads = size_of(path, raw, "d_model"), both["attention_heads"]
    if width % heads:
        raise UserError(f"{path}: d_model is {width}, which {heads} heads don't divide")
    return make_config(
        path,
        bart_config,
        raw,
        vocabulary=size_of(path, raw, "vocab_size"),
        width=width,
        heads=heads,
        head_dim=width // heads,
        hidden=both["ffn_dim"],
        encoder_layers=size_of(path, raw, "encoder_layers"),
        layers=size_of(path, raw, "decoder_layers"),
        activation=BART_ACTIVATIONS[activation],
        tied=flag_of(path, raw, "tie_word_embeddings", True),
        max_positions=size_of(path, raw, "max_position_embeddings", 1024),
        start_token=int(number_of(path, raw, "decoder_start_token_id", 2)),
        dropout=number_of(path, raw, "dropout", 0.1),
    )


def _bart_plan(config: EncoderDecoderConfig, prefix: str) -> list[Parameter]:
    width, hidden, heads = config.width, config.hidden, (config.heads, config.head_dim)

    def norm(path: str, name: str) -> Iterable[Parameter]:
        yield same(f"{path}/scale", f"{name}.weight", width)
        yield same(f"{path}/bias", f"{name}.bias", width)

    def linear(path: str, name: str, inputs: int, *outputs: int) -> Iterable[Parameter]:
        weight = matrix(f"{path}/weight", f"{name}.weight", inputs, *outputs)
        yield from (weight, Parameter(f"{path}/bias", f"{name}.bias", weight.shape[:1], outputs))

    def attention(path: str, name: str) -> Iterable[Parameter]:
        for part in ("query", "key", "value"):
            yield from linear(f"{path}/{part}", f"{name}.{part[0]}_proj", width, *heads)
        yield from linear(f"{path}/out", f"{name}.out_proj", width, width)

    def layer(path: str, name: str, cross: bool) -> Iterable[Parameter]:
        blocks = {"attention": "self_attn"} | ({"cross": "encoder_attn"} if cross else {})
        for ours, theirs in blocks.items():
            yield from attention(f"{path}/{ours}", f"{name}.{theirs}")
            yield from norm(f"{path}/{ours}_norm", f"{name}.{theirs}_layer_norm")
        yield from linear(f"{path}/feed_forward/up", f"{name}.fc1", width, hidden)
        yield from linear(f"{path}/feed_forward/down", f"{name}.fc2", hidden, width)
        yield from norm(f"{path}/feed_forward_norm", f"{name}.final_layer_norm")

    def side(name: str, layers: int) -> Iterable[Parameter]:
        theirs = f"{prefix}{name}"
        positions = config.max_positions + OFFSET, width
        yield same(f"{name}_positions/table", f"{theirs}.embed_positions.weight", *positions)
        yield from norm(f"{name}_norm", f"{theirs}.layernorm_embedding")
        for i in range(layers):
            yield from layer(f"{name}_{i}", f"{theirs}.layers.{i}", name == "decoder")

    vocabulary = config.vocabulary
    plan = [
        same("embed/table", f"{prefix}shared.weight", vocabulary, width),
        Parameter("logits_bias", LOGITS_BIAS, (1, vocabulary), (vocabulary,)),
    ]
    if not config.tied:
        plan.append(same("head/table", "lm_head.weight", vocabulary, width))
    return [*plan, *side("encoder", config.encoder_layers), *side("decoder", config.layers)]
