"""Weights of T5 and Qwen2 as Hugging Face lays them out, read into our models and written back, bit for bit.

A *plan* names, for every parameter of ours, the tensor that it is. The same plan says which tensors a folder must hold
and of what shape, reads them, and writes them. Names, types and shapes of all tensors are checked before any
of them is read, so that nothing is half loaded.

    config, params = load_t5("folder")          # config.json and model.safetensors, whole or in shards
    EncoderDecoder(config).apply({"params": params}, ContextTokens(tokens, mask), method="prefill")
    save_t5("other", config, params)
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jaxrec.config import UserError
from jaxrec.models.causal import CausalConfig
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.nn.finite import check_finite
from jaxrec.text.cache import write_files

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
T5_ACTIVATIONS = {"relu": ("relu", False), "gated-gelu": ("gelu", True), "gated-silu": ("silu", True)}
# What some files hold beside the weights: never read by the model.
UNUSED = ("EncDecAttention.relative_attention_bias.weight", "rotary_emb.inv_freq")


@dataclass(frozen=True)
class Parameter:
    """One parameter of ours and the tensor of theirs that it is.

    Matrices of theirs are [outputs, inputs], ours [inputs, outputs], where a side may be split in two: heads and their
    width. A bias of ours may be split as well. `shape` is theirs, `ours` ours.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    ours: tuple[int, ...]
    turned: bool = False

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """Ours from theirs."""
        return np.ascontiguousarray(tensor.T if self.turned else tensor).reshape(self.ours)

    def write(self, value: np.ndarray) -> np.ndarray:
        """Theirs from ours."""
        return np.ascontiguousarray(value.reshape(self.shape[::-1]).T if self.turned else value.reshape(self.shape))


def _same(path: str, name: str, *shape: int) -> Parameter:
    return Parameter(path, name, shape, shape)


def _matrix(path: str, name: str, inputs: int, *outputs: int) -> Parameter:
    return Parameter(path, name, (math.prod(outputs), inputs), (inputs, *outputs), turned=True)


# ---- the two families ------------------------------------------------------------------------------------------------


def load_t5(folder: str | Path) -> tuple[EncoderDecoderConfig, dict]:
    """The configuration and the parameters (float32) of a T5 in a folder, for `EncoderDecoder`.

    Raises:
      UserError: a file is missing or damaged, it is another architecture, a tensor is missing, unknown, of a wrong
        shape, or holds NaN or infinity.
    """
    folder = Path(folder)
    raw = _read_config(folder, "t5")
    with _Tensors(folder) as tensors:
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
    if config.causal:
        raise UserError("a T5 reads its context both ways: model.causal=True can't be saved in Hugging Face's layout")
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
    _save(folder, config, raw, _t5_plan(config), params)


def load_qwen2(folder: str | Path) -> tuple[CausalConfig, dict]:
    """The configuration and the parameters (float32) of a Qwen2 in a folder, for `Causal`.

    Raises:
      UserError: as for `load_t5`; also a Qwen2 with a sliding window or with scaled rotary embeddings.
    """
    folder = Path(folder)
    config = _qwen2_config(folder / CONFIG_FILE, _read_config(folder, "qwen2"))
    with _Tensors(folder) as tensors:
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
    _save(folder, config, raw, _qwen2_plan(config), params)


def _t5_config(folder: Path, raw: dict, tensors: "_Tensors") -> EncoderDecoderConfig:
    path = folder / CONFIG_FILE
    activation = raw.get("feed_forward_proj", "relu")
    if activation not in T5_ACTIVATIONS:
        raise UserError(
            f"{path}: feed_forward_proj={activation!r} is not supported; use one of {', '.join(T5_ACTIVATIONS)}"
        )
    tied = _flag(path, raw, "tie_word_embeddings", True)
    scale_head = _flag(path, raw, "scale_decoder_outputs", tied)
    if tied and "scale_decoder_outputs" in raw and "lm_head.weight" in tensors:
        # Newer writers say `tie_word_embeddings` of every T5, and store a head only where it is another matrix.
        tied = tensors.equal("lm_head.weight", "shared.weight")
    return _make(
        path,
        EncoderDecoderConfig,
        raw,
        vocabulary=_size(path, raw, "vocab_size"),
        width=_size(path, raw, "d_model"),
        heads=_size(path, raw, "num_heads"),
        head_dim=_size(path, raw, "d_kv"),
        hidden=_size(path, raw, "d_ff"),
        encoder_layers=_size(path, raw, "num_layers"),
        layers=_size(path, raw, "num_decoder_layers" if raw.get("num_decoder_layers") is not None else "num_layers"),
        activation=T5_ACTIVATIONS[activation][0],
        gated=T5_ACTIVATIONS[activation][1],
        tied=tied,
        scale_head=scale_head,
        buckets=_size(path, raw, "relative_attention_num_buckets", 32),
        max_distance=_size(path, raw, "relative_attention_max_distance", 128),
        epsilon=_number(path, raw, "layer_norm_epsilon", 1e-6),
        start_token=int(_number(path, raw, "decoder_start_token_id", 0)),
        dropout=_number(path, raw, "dropout_rate", 0.1),
    )


def _qwen2_config(path: Path, raw: dict) -> CausalConfig:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters is {rope!r}; a JSON object was expected")
    kind = rope.get("rope_type", rope.get("type", "default"))
    for name, value, wanted in (
        ("rope_type", kind, "default"),
        ("use_sliding_window", _flag(path, raw, "use_sliding_window", False), False),
        ("hidden_act", raw.get("hidden_act", "silu"), "silu"),
    ):
        if value != wanted:
            raise UserError(f"{path}: {name}={value!r} is not supported; use a model with {wanted!r}")
    heads, width = _size(path, raw, "num_attention_heads"), _size(path, raw, "hidden_size")
    return _make(
        path,
        CausalConfig,
        raw,
        vocabulary=_size(path, raw, "vocab_size"),
        width=width,
        heads=heads,
        groups=_size(path, raw, "num_key_value_heads", heads),
        head_dim=_size(path, raw, "head_dim", width // heads),
        hidden=_size(path, raw, "intermediate_size"),
        layers=_size(path, raw, "num_hidden_layers"),
        tied=_flag(path, raw, "tie_word_embeddings", False),
        rotary_base=_number(path, rope if "rope_theta" in rope else raw, "rope_theta", 1e4),
        epsilon=_number(path, raw, "rms_norm_eps", 1e-6),
    )


def _t5_plan(config: EncoderDecoderConfig) -> list[Parameter]:
    width, hidden, heads = config.width, config.hidden, (config.heads, config.head_dim)

    def attention(path: str, name: str, norm: str) -> Iterable[Parameter]:
        yield _same(f"{path}/norm/scale", f"{norm}.weight", width)
        for part in ("query", "key", "value"):
            yield _matrix(f"{path}/{part}/weight", f"{name}.{part[0]}.weight", width, *heads)
        yield _matrix(f"{path}/out/weight", f"{name}.o.weight", math.prod(heads), width)

    def feed_forward(path: str, name: str) -> Iterable[Parameter]:
        yield _same(f"{path}/norm/scale", f"{name}.layer_norm.weight", width)
        for ours, theirs in {"gate": "wi_0", "up": "wi_1"}.items() if config.gated else [("up", "wi")]:
            yield _matrix(f"{path}/{ours}/weight", f"{name}.DenseReluDense.{theirs}.weight", width, hidden)
        yield _matrix(f"{path}/down/weight", f"{name}.DenseReluDense.wo.weight", hidden, width)

    def side(name: str, layers: int) -> Iterable[Parameter]:
        bias = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield _same(f"{name}_bias/table", bias, config.buckets, config.heads)
        yield _same(f"{name}_norm/scale", f"{name}.final_layer_norm.weight", width)
        for i in range(layers):
            path, block = f"{name}_{i}", f"{name}.block.{i}.layer"
            yield from attention(f"{path}/attention", f"{block}.0.SelfAttention", f"{block}.0.layer_norm")
            if name == "decoder":
                yield from attention(f"{path}/cross", f"{block}.1.EncDecAttention", f"{block}.1.layer_norm")
            yield from feed_forward(f"{path}/feed_forward", f"{block}.{2 if name == 'decoder' else 1}")

    plan = [_same("embed/table", "shared.weight", config.vocabulary, width)]
    if not config.tied:
        plan.append(_same("head/table", "lm_head.weight", config.vocabulary, width))
    return [*plan, *side("encoder", config.encoder_layers), *side("decoder", config.layers)]


def _qwen2_plan(config: CausalConfig) -> list[Parameter]:
    width, hidden, unit = config.width, config.hidden, config.head_dim
    heads = {"query": config.heads, "key": config.groups, "value": config.groups}

    def layer(path: str, name: str) -> Iterable[Parameter]:
        yield _same(f"{path}/attention/norm/scale", f"{name}.input_layernorm.weight", width)
        for part, count in heads.items():
            ours, theirs = f"{path}/attention/{part}", f"{name}.self_attn.{part[0]}_proj"
            yield _matrix(f"{ours}/weight", f"{theirs}.weight", width, count, unit)
            if config.bias:
                yield Parameter(f"{ours}/bias", f"{theirs}.bias", (count * unit,), (count, unit))
        yield _matrix(f"{path}/attention/out/weight", f"{name}.self_attn.o_proj.weight", config.heads * unit, width)
        yield _same(f"{path}/feed_forward/norm/scale", f"{name}.post_attention_layernorm.weight", width)
        for part in ("gate", "up"):
            yield _matrix(f"{path}/feed_forward/{part}/weight", f"{name}.mlp.{part}_proj.weight", width, hidden)
        yield _matrix(f"{path}/feed_forward/down/weight", f"{name}.mlp.down_proj.weight", hidden, width)

    plan = [
        _same("embed/table", "model.embed_tokens.weight", config.vocabulary, width),
        _same("norm/scale", "model.norm.weight", width),
    ]
    if not config.tied:
        plan.append(_same("head/table", "lm_head.weight", config.vocabulary, width))
    return plan + [entry for i in range(config.layers) for entry in layer(f"layers_{i}", f"model.layers.{i}")]


# ---- config.json -----------------------------------------------------------------------------------------------------


def _read_config(folder: Path, model_type: str) -> dict:
    path = folder / CONFIG_FILE
    raw = _read_json(path, f"give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if raw.get("model_type") != model_type:
        raise UserError(f"{path} is of a model_type {raw.get('model_type')!r}, expected {model_type!r}: use its loader")
    return raw


def _read_json(path: Path, mend: str) -> dict:
    if not path.is_file():
        raise UserError(f"there is no {path}: {mend}")
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): copy the model anew") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object: copy the model anew")
    return raw


def _size(path: Path, raw: dict, name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {name} is {value!r}, expected a whole number above 0")
    return value


def _number(path: Path, raw: dict, name: str, default: float) -> float:
    """A number of config.json; one that is missing or null is the default."""
    value = default if raw.get(name) is None else raw[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{path}: {name} is {value!r}; a number was expected")
    return float(value)


def _flag(path: Path, raw: dict, name: str, default: bool) -> bool:
    """As `_number`, of true and false."""
    value = default if raw.get(name) is None else raw[name]
    if not isinstance(value, bool):
        raise UserError(f"{path}: {name} is {value!r}; true or false was expected")
    return value


def _make(path: Path, kind: type, raw: dict, **fields: Any) -> Any:
    """The configuration, with what `save_*` wrote of ours, which Hugging Face has no name for."""
    ours = raw.get("jaxrec") or {}
    try:
        if ours.get("levels") is not None:
            fields["levels"] = tuple((int(offset), int(size)) for offset, size in ours["levels"])
        fields["restrict"] = bool(ours.get("restrict", True))
    except (AttributeError, TypeError, ValueError) as error:
        wanted = '{"levels": [[offset, size], ...], "restrict": true or false}'
        raise UserError(f"{path}: jaxrec is {ours!r}; {wanted} was expected") from error
    try:
        return kind(**fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


# ---- tensors ---------------------------------------------------------------------------------------------------------


class _Tensors:
    """The tensors of a folder, by name; files stay open while it is entered."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}

    def __enter__(self) -> "_Tensors":
        index = self.folder / INDEX_FILE
        if (self.folder / WEIGHTS_FILE).is_file() or not index.is_file():
            self._where = dict.fromkeys(self._open(WEIGHTS_FILE).keys(), WEIGHTS_FILE)
            return self
        where = _read_json(index, "").get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise UserError(f"{index} has no weight_map from tensors to files: copy the model anew")
        for file in sorted(set(where.values())):
            held = set(self._open(file).keys())
            for name in sorted(name for name in where if where[name] == file):
                if name not in held:
                    raise UserError(f"{self.folder / file} has no tensor {name}, which {INDEX_FILE} puts there")
        self._where = where
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def _open(self, file: str) -> Any:
        path = self.folder / file
        if not path.is_file():
            raise UserError(f"there is no {path}: give a folder with {CONFIG_FILE} and all files of the weights")
        try:
            # Its NumPy reader knows no bfloat16, JAX's does.
            self._files[file] = safe_open(path, "flax")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} can't be read ({error}): copy it anew") from error
        return self._files[file]

    def path(self, name: str) -> Path:
        return self.folder / self._where[name]

    def get(self, name: str) -> np.ndarray:
        with jax.default_device(jax.devices("cpu")[0]):
            return np.asarray(self._files[self._where[name]].get_tensor(name)).astype(np.float32)

    def equal(self, one: str, other: str) -> bool:
        for name in (one, other):
            if name not in self:
                raise UserError(f"{self.folder} has no tensor {name}: it is not a complete model")
        return self._shape(one) == self._shape(other) and np.array_equal(self.get(one), self.get(other))

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def read(self, plan: list[Parameter], twins: dict[str, str]) -> dict:
        """The parameters of a plan; `twins` are tensors that may be there as copies of others.

        Everything but their content is checked before anything is read.
        """
        self._check(plan, twins)
        flat = {}
        for entry in plan:
            tensor = self.get(entry.name)
            check_finite({f"tensor {entry.name}": tensor}, self.path(entry.name), "copy the model anew")
            flat[entry.path] = entry.read(tensor)
        return unflatten_dict(flat, sep="/")

    def _check(self, plan: list[Parameter], twins: dict[str, str]) -> None:
        expected = {entry.name: entry.shape for entry in plan}
        for name, shape in expected.items():
            if name not in self:
                files = ", ".join(sorted(set(self._where.values())))
                raise UserError(f"{self.folder / files} has no tensor {name}, which {CONFIG_FILE} asks for")
            kind = self._files[self._where[name]].get_slice(name).get_dtype()
            if kind not in FLOATS:
                raise UserError(f"{self.path(name)}: tensor {name} is {kind}, expected one of {', '.join(FLOATS)}")
            if self._shape(name) != shape:
                raise UserError(
                    f"{self.path(name)}: tensor {name} has shape {list(self._shape(name))}, but {CONFIG_FILE} asks for "
                    f"{list(shape)}"
                )
        for name in sorted(set(self._where) - set(expected)):
            if name.endswith(UNUSED):
                continue
            if name not in twins:
                raise UserError(
                    f"{self.path(name)} has a tensor {name} that this model doesn't have: see {CONFIG_FILE}"
                )
            if not self.equal(name, twins[name]):
                raise UserError(
                    f"{self.path(name)}: tensor {name} differs from {twins[name]}, though {CONFIG_FILE} says that they "
                    "are one"
                )


def _save(folder: str | Path, config: Any, raw: dict, plan: list[Parameter], params: dict) -> None:
    if config.levels is not None:
        raw["jaxrec"] = {"levels": config.levels, "restrict": config.restrict}
    tensors = _write(plan, params)
    files = {
        # The weights first: a folder with a config.json is whole.
        WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}),
        CONFIG_FILE: (json.dumps(raw, indent=2) + "\n").encode(),
    }
    write_files(Path(folder), files, "the model")


def _write(plan: list[Parameter], params: dict) -> dict[str, np.ndarray]:
    flat = {path: np.asarray(value, np.float32) for path, value in flatten_dict(nn.unbox(params), sep="/").items()}
    wanted = {entry.path: entry.ours for entry in plan}
    for path in sorted(set(flat) | set(wanted)):
        found, shape = flat[path].shape if path in flat else None, wanted.get(path)
        if found != shape:
            raise UserError(f"parameter {path} has shape {found}, but the configuration asks for {shape}")
    return {entry.name: entry.write(flat[entry.path]) for entry in plan}
