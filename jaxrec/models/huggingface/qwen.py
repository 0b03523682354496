"""Qwen2 and Qwen3 in Hugging Face's layout. Qwen3 normalises each head's query and key; Qwen2 has biases there."""

from collections.abc import Iterable
from pathlib import Path

from jaxrec.config import UserError
from jaxrec.models.causal import CausalConfig
from jaxrec.models.huggingface.config_json import CONFIG_FILE, flag_of, make_config, number_of, read_config, size_of
from jaxrec.models.huggingface.tensors import Parameter, Tensors, check_saved, matrix, same, save_model


def load_qwen2(folder: str | Path) -> tuple[CausalConfig, dict]:
    """The configuration and the parameters (float32) of a Qwen2 in a folder, for `Causal`.

    Raises:
      UserError: as for `load_t5`; also a Qwen2 with a sliding window or with scaled rotary embeddings.
    """
    return _load(Path(folder), "qwen2")


def save_qwen2(folder: str | Path, config: CausalConfig, params: dict) -> None:
    """Writes config.json and model.safetensors (float32), which `load_qwen2` and Hugging Face's transformers read.

    Raises:
      UserError: the parameters don't fit the configuration, or the folder can't be written.
    """
    _save(folder, config, "qwen2", params)


def load_qwen3(folder: str | Path) -> tuple[CausalConfig, dict]:
    """As `load_qwen2`, of a Qwen3; one with biases is refused."""
    return _load(Path(folder), "qwen3")


def save_qwen3(folder: str | Path, config: CausalConfig, params: dict) -> None:
    """As `save_qwen2`, of a Qwen3."""
    _save(folder, config, "qwen3", params)


def _load(folder: Path, kind: str) -> tuple[CausalConfig, dict]:
    config = _config(folder / CONFIG_FILE, read_config(folder, kind))
    with Tensors(folder) as tensors:
        twins = {"lm_head.weight": "model.embed_tokens.weight"} if config.tied else {}
        return config, tensors.read(_plan(config), twins)


def _save(folder: str | Path, config: CausalConfig, kind: str, params: dict) -> None:
    check_saved(f"a {kind.capitalize()}", config, {"bias": kind == "qwen2", "head_norm": kind == "qwen3"})
    raw = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.epsilon,
        "rope_theta": config.rotary_base,
        "tie_word_embeddings": config.tied,
        "use_sliding_window": False,
    }
    save_model(folder, config, raw, _plan(config), params)


def _config(path: Path, raw: dict) -> CausalConfig:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters is {rope!r}; a JSON object was expected")
    kind = raw["model_type"]
    for name, value, wanted in (
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("attention_bias", flag_of(path, raw, "attention_bias", kind == "qwen2"), kind == "qwen2"),
        ("use_sliding_window", flag_of(path, raw, "use_sliding_window", False), False),
        ("hidden_act", raw.get("hidden_act", "silu"), "silu"),
    ):
        if value != wanted:
            raise UserError(f"{path}: {name}={value!r} is not supported; use a model with {wanted!r}")
    heads, width, newer = size_of(path, raw, "num_attention_heads"), size_of(path, raw, "hidden_size"), kind == "qwen3"
    return make_config(
        path,
        CausalConfig,
        raw,
        vocabulary=size_of(path, raw, "vocab_size"),
        width=width,
        heads=heads,
        groups=size_of(path, raw, "num_key_value_heads", heads),
        head_dim=size_of(path, raw, "head_dim", 128 if newer else width // heads),
        hidden=size_of(path, raw, "intermediate_size"),
        layers=size_of(path, raw, "num_hidden_layers"),
        bias=not newer,
        head_norm=newer,
        tied=flag_of(path, raw, "tie_word_embeddings", False),
        rotary_base=number_of(path, rope if "rope_theta" in rope else raw, "rope_theta", 1e4),
        epsilon=number_of(path, raw, "rms_norm_eps", 1e-6),
    )


def _plan(config: CausalConfig) -> list[Parameter]:
    width, hidden, unit = config.width, config.hidden, config.head_dim
    heads = {"query": config.heads, "key": config.groups, "value": config.groups}

    def layer(path: str, name: str) -> Iterable[Parameter]:
        yield same(f"{path}/attention/norm/scale", f"{name}.input_layernorm.weight", width)
        for part, count in heads.items():
            ours, theirs = f"{path}/attention/{part}", f"{name}.self_attn.{part[0]}_proj"
            yield matrix(f"{ours}/weight", f"{theirs}.weight", width, count, unit)
            if config.bias:
                yield Parameter(f"{ours}/bias", f"{theirs}.bias", (count * unit,), (count, unit))
            if config.head_norm and part != "value":
                yield same(f"{ours}_norm/scale", f"{name}.self_attn.{part[0]}_norm.weight", unit)
        yield matrix(f"{path}/attention/out/weight", f"{name}.self_attn.o_proj.weight", config.heads * unit, width)
        yield same(f"{path}/feed_forward/norm/scale", f"{name}.post_attention_layernorm.weight", width)
        for part in ("gate", "up"):
            yield matrix(f"{path}/feed_forward/{part}/weight", f"{name}.mlp.{part}_proj.weight", width, hidden)
        yield matrix(f"{path}/feed_forward/down/weight", f"{name}.mlp.down_proj.weight", hidden, width)

    plan = [
        same("embed/table", "model.embed_tokens.weight", config.vocabulary, width),
        same("norm/scale", "model.norm.weight", width),
    ]
    if not config.tied:
        plan.append(same("head/table", "lm_head.weight", config.vocabulary, width))
    return plan + [entry for i in range(config.layers) for entry in layer(f"layers_{i}", f"model.layers.{i}")]
