"""T5 and mT5 in Hugging Face's layout."""

import math
from collections.abc import Iterable
from pathlib import Path

from jaxrec.config import UserError
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.models.huggingface.config_json import CONFIG_FILE, flag_of, make_config, number_of, read_config, size_of
from jaxrec.models.huggingface.tensors import Parameter, Tensors, check_saved, matrix, same, save_model

T5_ACTIVATIONS = {"relu": ("relu", False), "gated-gelu": ("gelu", True), "gated-silu": ("silu", True)}


def load_t5(folder: str | Path) -> tuple[EncoderDecoderConfig, dict]:
    """The configuration and the parameters (float32) of a T5 or mT5 in a folder, for `EncoderDecoder`.

    Raises:
      UserError: a file is missing or damaged, it is another architecture, a tensor is missing, unknown, of a wrong
        shape, or holds NaN or infinity.
    """
    folder = Path(folder)
    raw = read_config(folder, "t5", "mt5")
    with Tensors(folder) as tensors:
        config = _t5_config(folder, raw, tensors)
        twins = {name: "shared.weight" for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")}
        return config, tensors.read(
            _t5_plan(config), twins | ({"lm_head.weight": "shared.weight"} if config.tied else {})
        )


def save_t5(folder: str | Path, config: EncoderDecoderConfig, params: dict) -> None:
    """Writes config.json and model.safetensors (float32), which `load_t5` and Hugging Face's transformers read.

    Raises:
      UserError: the parameters don't fit the configuration, or the folder can't be written.
    """
    check_saved("a T5", config, {"style": "t5", "causal": False})
    names = {(activation, gated): name for name, (activation, gated) in T5_ACTIVATIONS.items()}
    if (config.activation, config.gated) not in names:
        raise UserError(
            f"Hugging Face has no T5 with activation={config.activation!r} and gated={config.gated}: use one of "
            f"{', '.join(T5_ACTIVATIONS)}"
        )
    raw = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocabulary,
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.hidden,
        "num_heads": config.heads,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.layers,
        "feed_forward_proj": names[config.activation, config.gated],
        "tie_word_embeddings": config.tied,
        "scale_decoder_outputs": config.scale_head,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.epsilon,
        "dropout_rate": config.dropout,
        "decoder_start_token_id": config.start_token,
        "pad_token_id": config.start_token,
        "eos_token_id": 1,
    }
    save_model(folder, config, raw, _t5_plan(config), params)


def _t5_config(folder: Path, raw: dict, tensors: "Tensors") -> EncoderDecoderConfig:
    path = folder / CONFIG_FILE
    activation = raw.get("feed_forward_proj", "relu")
    if activation not in T5_ACTIVATIONS:
        raise UserError(
            f"{path}: feed_forward_proj={activation!r} is not supported; use one of {', '.join(T5_ACTIVATIONS)}"
        )
    tied, newer = flag_of(path, raw, "tie_word_embeddings", True), "scale_decoder_outputs" in raw
    scale_head = flag_of(path, raw, "scale_decoder_outputs", tied)
    if raw["model_type"] == "mt5":
        newer, scale_head = True, False
    if tied and newer and "lm_head.weight" in tensors:
        # Newer writers say `tie_word_embeddings` of every model, and store a head only where it is another matrix.
        tied = tensors.equal("lm_head.weight", "shared.weight")
    return make_config(
        path,
        EncoderDecoderConfig,
        raw,
        vocabulary=size_of(path, raw, "vocab_size"),
        width=size_of(path, raw, "d_model"),
        heads=size_of(path, raw, "num_heads"),
        head_dim=size_of(path, raw, "d_kv"),
        hidden=size_of(path, raw, "d_ff"),
        encoder_layers=size_of(path, raw, "num_layers"),
        layers=size_of(path, raw, "num_decoder_layers" if raw.get("num_decoder_layers") is not None else "num_layers"),
        activation=T5_ACTIVATIONS[activation][0],
        gated=T5_ACTIVATIONS[activation][1],
        tied=tied,
        scale_head=scale_head,
        buckets=size_of(path, raw, "relative_attention_num_buckets", 32),
        max_distance=size_of(path, raw, "relative_attention_max_distance", 128),
        epsilon=number_of(path, raw, "layer_norm_epsilon", 1e-6),
        start_token=int(number_of(path, raw, "decoder_start_token_id", 0)),
        dropout=number_of(path, raw, "dropout_rate", 0.1),
    )


def _t5_plan(config: EncoderDecoderConfig) -> list[Parameter]:
    width, hidden, heads = config.width, config.hidden, (config.heads, config.head_dim)

    def attention(path: str, name: str, norm: str) -> Iterable[Parameter]:
        yield same(f"{path}/norm/scale", f"{norm}.weight", width)
        for part in ("query", "key", "value"):
            yield matrix(f"{path}/{part}/weight", f"{name}.{part[0]}.weight", width, *heads)
        yield matrix(f"{path}/out/weight", f"{name}.o.weight", math.prod(heads), width)

    def feed_forward(path: str, name: str) -> Iterable[Parameter]:
        yield same(f"{path}/norm/scale", f"{name}.layer_norm.weight", width)
        for ours, theirs in {"gate": "wi_0", "up": "wi_1"}.items() if config.gated else [("up", "wi")]:
            yield matrix(f"{path}/{ours}/weight", f"{name}.DenseReluDense.{theirs}.weight", width, hidden)
        yield matrix(f"{path}/down/weight", f"{name}.DenseReluDense.wo.weight", hidden, width)

    def side(name: str, layers: int) -> Iterable[Parameter]:
        bias = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield same(f"{name}_bias/table", bias, config.buckets, config.heads)
        yield same(f"{name}_norm/scale", f"{name}.final_layer_norm.weight", width)
        for i in range(layers):
            path, block = f"{name}_{i}", f"{name}.block.{i}.layer"
            yield from attention(f"{path}/attention", f"{block}.0.SelfAttention", f"{block}.0.layer_norm")
            if name == "decoder":
                yield from attention(f"{path}/cross", f"{block}.1.EncDecAttention", f"{block}.1.layer_norm")
            yield from feed_forward(f"{path}/feed_forward", f"{block}.{2 if name == 'decoder' else 1}")

    plan = [same("embed/table", "shared.weight", config.vocabulary, width)]
    if not config.tied:
        plan.append(same("head/table", "lm_head.weight", config.vocabulary, width))
    return [*plan, *side("encoder", config.encoder_layers), *side("decoder", config.layers)]
