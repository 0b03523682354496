"""Qwen2 in Hugging Face's layout."""

from collections.abc import Iterable
from pathlib import Path

from jaxrec.config import UserError
from jaxrec.models.causal import CausalConfig
from jaxrec.models.huggingface.config_json import CONFIG_FILE, flag_of, make_config, number_of, read_config, size_of
from jaxrec.models.huggingface.tensors import Parameter, Tensors, matrix, same, save_model


def load_qwen2(folder: str | Path) -> tuple[CausalConfig, dict]:
    """The configuration and the parameters (float32) of a Qwen2 in a folder, for `Causal`.

    Raises:
      UserError: as for `load_t5`; also a Qwen2 with a sliding window or with scaled rotary embeddings.
    """
    folder = Path(folder)
    config = _qwen2_config(folder / CONFIG_FILE, read_config(folder, "qwen2"))
    with Tensors(folder) as tensors:
        twins = {"lm_head.weight": "model.embed_tokens.weight"} if config.tied else {}
        return config, tensors.read(_qwen2_plan(config), twins)


def save_qwen2(folder: str | Path, config: CausalConfig, params: dict) -> None:
    """Writes config.json and model.safetensors (float32), which `load_qwen2` and Hugging Face's transformers read.

    Raises:
      UserError: the parameters don't fit the configuration, or the folder can't be written.
    """
    if not config.bias:
        raise UserError("a Qwen2 has biases: model.bias=False can't be saved in Hugging Face's layout")
    raw = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
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
    save_model(folder, config, raw, _qwen2_plan(config), params)


def _qwen2_config(path: Path, raw: dict) -> CausalConfig:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters is {rope!r}; a JSON object was expected")
    kind = rope.get("rope_type", rope.get("type", "default"))
    for name, value, wanted in (
        ("rope_type", kind, "default"),
        ("use_sliding_window", flag_of(path, raw, "use_sliding_window", False), False),
        ("hidden_act", raw.get("hidden_act", "silu"), "silu"),
    ):
        if value != wanted:
            raise UserError(f"{path}: {name}={value!r} is not supported; use a model with {wanted!r}")
    heads, width = size_of(path, raw, "num_attention_heads"), size_of(path, raw, "hidden_size")
    return make_config(
        path,
        CausalConfig,
        raw,
        vocabulary=size_of(path, raw, "vocab_size"),
        width=width,
        heads=heads,
        groups=size_of(path, raw, "num_key_value_heads", heads),
        head_dim=size_of(path, raw, "head_dim", width // heads),
        hidden=size_of(path, raw, "intermediate_size"),
        layers=size_of(path, raw, "num_hidden_layers"),
        tied=flag_of(path, raw, "tie_word_embeddings", False),
        rotary_base=number_of(path, rope if "rope_theta" in rope else raw, "rope_theta", 1e4),
        epsilon=number_of(path, raw, "rms_norm_eps", 1e-6),
    )


def _qwen2_plan(config: CausalConfig) -> list[Parameter]:
    width, hidden, unit = config.width, config.hidden, config.head_dim
    heads = {"query": config.heads, "key": config.groups, "value": config.groups}

    def layer(path: str, name: str) -> Iterable[Parameter]:
        yield same(f"{path}/attention/norm/scale", f"{name}.input_layernorm.weight", width)
        for part, count in heads.items():
            ours, theirs = f"{path}/attention/{part}", f"{name}.self_attn.{part[0]}_proj"
            yield matrix(f"{ours}/weight", f"{theirs}.weight", width, count, unit)
            if config.bias:
                yield Parameter(f"{ours}/bias", f"{theirs}.bias", (count * unit,), (count, unit))
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
