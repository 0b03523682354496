"""BERT weights between the layouts of Hugging Face and `encoder.Bert`: both ways, bit for bit."""

import jax
import numpy as np


def from_huggingface(tensors: dict[str, np.ndarray], layers: int) -> dict:
    """Hugging Face BERT tensors as the parameters of `Bert`; query, key and value become one matrix."""

    def dense(*names: str) -> dict:
        kernel = np.concatenate([tensors[f"{name}.weight"] for name in names]).T
        return {
            "kernel": np.ascontiguousarray(kernel, np.float32),
            "bias": np.concatenate([tensors[f"{name}.bias"] for name in names]).astype(np.float32),
        }

    def norm(name: str) -> dict:
        return {
            "scale": tensors[f"{name}.weight"].astype(np.float32),
            "bias": tensors[f"{name}.bias"].astype(np.float32),
        }

    def table(name: str) -> dict:
        return {"embedding": tensors[f"embeddings.{name}_embeddings.weight"].astype(np.float32)}

    def layer(prefix: str) -> dict:
        return {
            "qkv": dense(*(f"{prefix}.attention.self.{part}" for part in ("query", "key", "value"))),
            "attention_out": dense(f"{prefix}.attention.output.dense"),
            "attention_norm": norm(f"{prefix}.attention.output.LayerNorm"),
            "up": dense(f"{prefix}.intermediate.dense"),
            "down": dense(f"{prefix}.output.dense"),
            "feed_forward_norm": norm(f"{prefix}.output.LayerNorm"),
        }

    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""
    tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    params = {f"layer_{i}": layer(f"encoder.layer.{i}") for i in range(layers)}
    return params | {
        "words": table("word"),
        "positions": table("position"),
        "types": table("token_type"),
        "norm": norm("embeddings.LayerNorm"),
    }


def to_huggingface(params: dict) -> dict[str, np.ndarray]:
    """The parameters of `Bert` as Hugging Face BERT tensors, float32, with the same bits.

    The pooler is left out: a sentence encoder with mean pooling doesn't use it.
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
