"""Item embeddings to semantic IDs: levels from coarse to fine, then a quantizer for their residual.

    OneMall §3.1.3     hierarchy=ResidualConfig((4096, 4096)), remainder=FsqConfig((2,) * 12)
    OneSearch §3.1.3   hierarchy=ResidualConfig((4096, 1024, 512), balanced=(3,)), remainder=OpqConfig((256, 256))
    OneSug Eq. 3       hierarchy=RqVaeConfig((512,) * 4), remainder=None

Each quantizer is a module with `fit(key, x, config)`, `encode(fitted, x)` and `decode(fitted, codes)`; here two of them
are chained under the same three names.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.struct
import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrec.config import UserError
from jaxrec.nn.finite import check_finite
from jaxrec.semantic_ids.quantizers import fsq, opq, residual, rqvae
from jaxrec.semantic_ids.quantizers.fsq import Fsq, FsqConfig
from jaxrec.semantic_ids.quantizers.opq import Opq, OpqConfig
from jaxrec.semantic_ids.quantizers.residual import Residual, ResidualConfig
from jaxrec.semantic_ids.quantizers.rows import check_enough, check_rows, check_scale, check_width, to_matrix, unusable
from jaxrec.semantic_ids.quantizers.rqvae import RqVae, RqVaeConfig

MODULES = {
    ResidualConfig: residual, RqVaeConfig: rqvae, FsqConfig: fsq, OpqConfig: opq,
    Residual: residual, RqVae: rqvae, Fsq: fsq, Opq: opq,
}  # fmt: skip
FITTED = {fitted.__name__: fitted for fitted in (Residual, RqVae, Fsq, Opq)}
ENCODED_AT_ONCE = 1 << 16
"""Rows; more are no faster, and embeddings may be thousands wide."""


@dataclass(frozen=True)
class SemanticIdConfig:
    """The levels of a semantic ID and how their codebooks are fitted."""

    hierarchy: ResidualConfig | RqVaeConfig | None = field(default_factory=ResidualConfig)
    """The levels from coarse to fine; None: only the remainder."""
    remainder: FsqConfig | OpqConfig | None = field(default_factory=FsqConfig)
    """The quantizer of the hierarchy's residual; None: none."""


@flax.struct.dataclass
class Codebooks:
    """Two fitted quantizers in sequence; one of them may be None."""

    hierarchy: Residual | RqVae | None
    remainder: Fsq | Opq | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes in each level, M of them."""
        return tuple(size for part in self.parts for size in part.sizes)

    @property
    def width(self) -> int:
        """Width of the embeddings that it encodes."""
        return self.parts[0].width

    @property
    def parts(self) -> tuple[Residual | RqVae | Fsq | Opq, ...]:
        """The quantizers that are not None."""
        return tuple(part for part in (self.hierarchy, self.remainder) if part is not None)


def rq_opq(
    sizes: tuple[int, ...] = (4096, 1024, 512), parts: tuple[int, ...] = (256, 256), **of_levels: Any
) -> SemanticIdConfig:
    """OneSearch's RQ-OPQ (§3.1.3): residual k-means whose last level alone is balanced, then OPQ on the residual.

    Args:
      sizes: codes in each level of k-means; the paper has (4096, 1024, 512|256, 256). None may exceed the number of
        items; for ten thousand items about (256, 128, 64) and (64, 64).
      parts: codes in each sub-space of OPQ.
      of_levels: further fields of `ResidualConfig`.
    """
    hierarchy = ResidualConfig(sizes, balanced=(len(sizes),), **of_levels)
    return SemanticIdConfig(hierarchy, OpqConfig(parts))


def fit(key: jax.Array, x: np.ndarray | jax.Array, config: SemanticIdConfig = SemanticIdConfig()) -> Codebooks:
    """Fit every level to embeddings x f32 [I, D].

    Raises:
      UserError: no level, numbers too large or too small to be squared, or an error of the quantizers: fewer rows than
        codes, a row with NaN or infinity, sizes that do not fit the width.
    """
    x = to_matrix(x)  # The quantizers check for NaN.
    check(config, x.shape)
    check_scale(x)
    hierarchy_key, remainder_key = jax.random.split(key)
    hierarchy = remainder = None
    if config.hierarchy is not None:
        hierarchy = MODULES[type(config.hierarchy)].fit(hierarchy_key, x, config.hierarchy)
        if config.remainder is not None:
            x = left_over(hierarchy, x)
    if config.remainder is not None:
        remainder = MODULES[type(config.remainder)].fit(remainder_key, x, config.remainder)
    return Codebooks(hierarchy, remainder)


def check(config: SemanticIdConfig, shape: tuple[int, ...]) -> None:
    """UserError when the configuration is invalid, or does not fit rows of a shape [I, D]."""
    parts = [part for part in (config.hierarchy, config.remainder) if part is not None]
    if not parts:
        raise UserError("semantic_ids has neither a hierarchy nor a remainder: give at least one of them a quantizer")
    check_enough(shape[0], 1)
    for part in parts:
        MODULES[type(part)].check(part, shape)


def left_over(hierarchy: Residual | RqVae, x: np.ndarray | jax.Array) -> np.ndarray:
    """The residual of x f32 [I, D] under a fitted hierarchy, f32 [I, D]."""
    module = MODULES[type(hierarchy)]
    return np.concatenate(
        [rows - np.asarray(module.decode(hierarchy, module.encode(hierarchy, rows))) for rows in _blocks(x)]
    )


def encode(codebooks: Codebooks, x: np.ndarray | jax.Array) -> np.ndarray:
    """The semantic IDs of embeddings x f32 [I, D], int32 [I, M] (OneMall Eq. 2); rows are independent.

    Raises:
      UserError: a row with NaN or infinity, or a width that the codebooks were not fitted to.
    """
    x = to_matrix(x)
    check_width(x, codebooks.width)
    codes = [np.zeros((0, len(codebooks.sizes)), np.int32)]
    for rows in _blocks(x):
        if len(unusable(rows)):
            check_rows(x, 0)  # It names the row by its number among all.
        codes.append(_encode_block(codebooks, rows))
    return np.concatenate(codes)


def encode_catalogue(codebooks: Codebooks, x: np.ndarray | jax.Array, config: SemanticIdConfig) -> np.ndarray:
    """The IDs of a whole catalogue x f32 [I, D], int32 [I, M], in which balanced levels keep their bound strictly.

    Without balanced levels it is `encode`.
    """
    if not isinstance(config.hierarchy, ResidualConfig) or not config.hierarchy.balanced:
        return encode(codebooks, x)
    x = np.asarray(check_rows(x, 1))
    codes = np.asarray(residual.encode_together(codebooks.hierarchy, x, config.hierarchy.balance))
    if codebooks.remainder is None:
        return codes
    rest = x - np.asarray(residual.decode(codebooks.hierarchy, codes))
    return np.concatenate([codes, encode(Codebooks(None, codebooks.remainder), rest)], axis=1)


def decode(codebooks: Codebooks, codes: np.ndarray) -> np.ndarray:
    """The embeddings f32 [I, D] that IDs int32 [I, m] decode to; m <= M codes of a prefix are enough.

    The remainder is added only when all of its codes are given.
    """
    codes, total = np.asarray(codes), np.zeros((len(codes), codebooks.width), np.float32)
    start = 0
    for part in codebooks.parts:
        mine = codes[:, start : start + len(part.sizes)]
        start += len(part.sizes)
        if mine.shape[1] == len(part.sizes) or (part is codebooks.hierarchy and mine.shape[1]):
            total = total + np.asarray(MODULES[type(part)].decode(part, mine))
    return total


def has_centroids(codebooks: Codebooks) -> bool:
    """Whether the codes of every level stand for vectors in the space of the embeddings, as `centroids` gives them."""
    return all(isinstance(part, Residual | Opq) for part in codebooks.parts)


def centroids(codebooks: Codebooks) -> list[np.ndarray]:
    """The vectors that the codes of each level stand for, f32 [K, D] a level; those of an ID add up to its embedding.

    The centroids of residual k-means; those of an OPQ sub-space rotated back, with zeros in the other sub-spaces.

    Raises:
      UserError: a quantizer has no centroids in the space of the embeddings (FSQ, RQ-VAE).
    """
    levels = []
    for part in codebooks.parts:
        if isinstance(part, Residual):
            levels += [np.asarray(level) for level in part.centroids]
        elif isinstance(part, Opq):
            levels += opq.centroids(part)
        else:
            raise UserError(
                f"{type(part).__name__} has no centroids that could be looked up: use residual k-means for the "
                "hierarchy, and OPQ or nothing for the remainder"
            )
    return levels


def save(codebooks: Codebooks, path: Path) -> None:
    """Write codebooks as one safetensors file: the arrays, and their structure in its metadata."""
    tensors: dict[str, np.ndarray] = {}
    outline = {
        name: part and {"type": type(part).__name__, **_outline(part, name, tensors)}
        for name, part in (("hierarchy", codebooks.hierarchy), ("remainder", codebooks.remainder))
    }
    save_file(tensors, path, metadata={"codebooks": json.dumps(outline)})


def load(path: Path) -> Codebooks:
    """Read what `save` wrote; UserError when the file is missing, is not of this kind, or holds NaN or infinity."""
    try:
        with safe_open(path, "np") as file:
            outline = json.loads((file.metadata() or {})["codebooks"])
            parts = {name: part and _restore(part, file) for name, part in outline.items()}
        found = Codebooks(**parts)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no codebooks ({error}): run the tokenize phase again") from error
    check_finite(found, path, "run the tokenize phase again")
    return found


def _outline(part: Any, name: str, tensors: dict[str, np.ndarray]) -> dict:
    """The fields of a fitted quantizer as JSON, its arrays put into `tensors` and replaced by their names."""

    def of(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: of(inner, f"{name}.{key}") for key, inner in value.items()}
        if isinstance(value, tuple) and any(isinstance(inner, jax.Array | np.ndarray | None) for inner in value):
            return [of(inner, f"{name}.{index}") for index, inner in enumerate(value)]
        if isinstance(value, jax.Array | np.ndarray):
            tensors[name] = np.asarray(value)
            return {"tensor": name}
        return {"value": value}

    return {each.name: of(getattr(part, each.name), f"{name}.{each.name}") for each in dataclasses.fields(part)}


def _restore(outline: dict, file: Any) -> Residual | RqVae | Fsq | Opq:
    def of(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(of(inner) for inner in value)
        if set(value) == {"tensor"}:
            return jax.numpy.asarray(file.get_tensor(value["tensor"]))
        if set(value) == {"value"}:
            return tuple(value["value"]) if isinstance(value["value"], list) else value["value"]
        return {key: of(inner) for key, inner in value.items()}

    return FITTED[outline["type"]](**{name: of(value) for name, value in outline.items() if name != "type"})


def _encode_block(codebooks: Codebooks, x: np.ndarray | jax.Array) -> np.ndarray:
    codes = []
    for part in codebooks.parts:
        module = MODULES[type(part)]
        codes.append(np.asarray(module.encode(part, x)))
        if part is not codebooks.parts[-1]:
            x = x - np.asarray(module.decode(part, codes[-1]))
    return np.concatenate(codes, axis=1)


def _blocks(x: np.ndarray | jax.Array) -> Iterator[np.ndarray | jax.Array]:
    """Rows in blocks, so that memory does not grow with the catalogue."""
    for start in range(0, len(x), ENCODED_AT_ONCE):
        yield x[start : start + ENCODED_AT_ONCE]
