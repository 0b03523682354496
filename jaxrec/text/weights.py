"""Writing a text encoder: the inverse of `encoder.from_huggingface`, and the folder that `text.model` accepts."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save
from tokenizers import Tokenizer

from jaxrec.config import UserError
from jaxrec.run import disk_full
from jaxrec.text.cache import write_atomically
from jaxrec.text.encoder import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, BertConfig, TextEncoder, load_encoder


def to_huggingface(params: dict) -> dict[str, np.ndarray]:
    """The parameters of `Bert` as Hugging Face BERT tensors, float32; the same bits, laid out anew.

    The pooler, which a sentence encoder with mean pooling doesn't use, is not among them.
    """
    params = jax.tree.map(np.asarray, params)
    tensors = {}

    def put(name: str, value: np.ndarray) -> None:
        tensors[name] = np.ascontiguousarray(value, np.float32)

    def dense(part: dict, *names: str) -> None:
        kernels, biases = (np.split(part[key], len(names), axis=-1) for key in ("kernel", "bias"))
        for name, kernel, bias in zip(names, kernels, biases):
            put(f"{name}.weight", kernel.T)
            put(f"{name}.bias", bias)

    def norm(part: dict, name: str) -> None:
        put(f"{name}.weight", part["scale"])
        put(f"{name}.bias", part["bias"])

    for ours, theirs in (("words", "word"), ("positions", "position"), ("types", "token_type")):
        put(f"embeddings.{theirs}_embeddings.weight", params[ours]["embedding"])
    norm(params["norm"], "embeddings.LayerNorm")
    for i in range(sum(name.startswith("layer_") for name in params)):
        layer, prefix = params[f"layer_{i}"], f"encoder.layer.{i}"
        dense(layer["qkv"], *(f"{prefix}.attention.self.{part}" for part in ("query", "key", "value")))
        dense(layer["attention_out"], f"{prefix}.attention.output.dense")
        norm(layer["attention_norm"], f"{prefix}.attention.output.LayerNorm")
        dense(layer["up"], f"{prefix}.intermediate.dense")
        dense(layer["down"], f"{prefix}.output.dense")
        norm(layer["feed_forward_norm"], f"{prefix}.output.LayerNorm")
    return tensors


def config_json(config: BertConfig) -> str:
    """The config.json that `encoder.read_config` and other readers of BERT understand."""
    fixed = {"model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu"}
    return json.dumps(fixed | {"position_embedding_type": "absolute"} | dataclasses.asdict(config), indent=2) + "\n"


def with_params(encoder: TextEncoder, params: dict) -> TextEncoder:
    """The encoder with other weights, and the fingerprint that `load_encoder` gives to it when it is saved."""
    digest = hashlib.sha256(save(to_huggingface(params))).hexdigest()
    fingerprint = hashlib.sha256(digest.encode() + _tokenizer_json(encoder)).hexdigest()
    return dataclasses.replace(encoder, params=params, fingerprint=fingerprint)


def save_encoder(encoder: TextEncoder, folder: Path) -> None:
    """Writes model.safetensors, tokenizer.json and config.json into a folder, which `text.model` then accepts.

    Raises:
      UserError: the folder can't be written.
    """
    files = {
        TOKENIZER_FILE: _tokenizer_json(encoder),
        CONFIG_FILE: config_json(encoder.config).encode(),
        WEIGHTS_FILE: save(to_huggingface(encoder.params)),
    }
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, raw in files.items():
            write_atomically(Path(folder) / name, raw)
    except OSError as error:
        mend = "free some space" if disk_full(error) else "choose a folder that can be written"
        raise UserError(f"the text encoder can't be saved in {folder} ({error.strerror}): {mend}") from error
    # It remembers encoders by folder, and this one may have been another.
    load_encoder.cache_clear()


def _tokenizer_json(encoder: TextEncoder) -> bytes:
    # Encoding sets truncation on the tokenizer, which must not end up in the file.
    clean = Tokenizer.from_str(encoder.tokenizer.to_str())
    clean.no_truncation()
    clean.no_padding()
    return clean.to_str(pretty=True).encode()
