"""Item embeddings to semantic IDs: residual k-means levels, then a last FSQ level (OneMall §2.2, §3.1.3)."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrec.config import UserError
from jaxrec.semantic_ids import fsq, residual
from jaxrec.semantic_ids.fsq import Fsq, FsqConfig
from jaxrec.semantic_ids.kmeans import KMeansConfig, check_rows


@dataclass(frozen=True)
class SemanticIdConfig:
    """The levels of a semantic ID and how their codebooks are fitted."""

    levels: tuple[int, ...] = (128, 128)
    """Codes in each residual k-means level."""
    fsq: tuple[int, ...] = (2,) * 8
    """Steps in each coordinate of the last level (eight binary ones: 256 codes); empty for no such level."""
    kmeans: KMeansConfig = field(default_factory=KMeansConfig)
    """How the k-means levels are fitted."""
    fsq_fit: FsqConfig = field(default_factory=FsqConfig)
    """How the FSQ level is fitted."""


@flax.struct.dataclass
class Codebooks:
    """Fitted levels: one matrix f32 [K, D] for each k-means level, and the FSQ level or None."""

    centroids: tuple[jax.Array, ...]
    fsq: Fsq | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes in each level."""
        return tuple(len(codebook) for codebook in self.centroids) + ((self.fsq.size,) if self.fsq else ())

    @property
    def width(self) -> int:
        """Width of the embeddings that it encodes."""
        return self.centroids[0].shape[1] if self.centroids else self.fsq.params["linear"]["kernel"].shape[0]


def fit(key: jax.Array, x: np.ndarray | jax.Array, config: SemanticIdConfig = SemanticIdConfig()) -> Codebooks:
    """Fit every level to embeddings x f32 [I, D].

    Raises:
      UserError: no level, a level with fewer than two codes, fewer rows than codes, or a row with NaN or infinity.
    """
    sizes = (*config.levels, *config.fsq)
    if not sizes or min(sizes) < 2:
        raise UserError(f"ids.levels={config.levels}, ids.fsq={config.fsq}: give at least one level, each size >= 2")
    check_rows(x, max((1, *config.levels)))
    levels_key, fsq_key = jax.random.split(key)
    centroids = residual.fit(levels_key, x, config.levels, config.kmeans)
    if not config.fsq:
        return Codebooks(centroids, None)
    left_over = x - residual.decode(centroids, residual.encode(centroids, x))
    return Codebooks(centroids, fsq.fit(fsq_key, left_over, config.fsq, config.fsq_fit))


def encode(codebooks: Codebooks, x: np.ndarray | jax.Array) -> np.ndarray:
    """The semantic IDs of embeddings x f32 [I, D], int32 [I, M] (OneMall Eq. 2)."""
    check_rows(x, 0)
    if x.shape[1] != codebooks.width:
        raise UserError(
            f"embeddings are {x.shape[1]} wide, but the codebooks were fitted to a width of "
            f"{codebooks.width}: encode with the embeddings they were made for"
        )
    codes = residual.encode(codebooks.centroids, x)
    if codebooks.fsq is not None:
        last = fsq.encode(codebooks.fsq, x - residual.decode(codebooks.centroids, codes))
        codes = jnp.concatenate([codes, last[:, None]], axis=1)
    return np.asarray(codes)


def decode(codebooks: Codebooks, codes: np.ndarray) -> np.ndarray:
    """What IDs int32 [I, m] stand for, f32 [I, D]; m <= M levels of a prefix are enough."""
    x = residual.decode(codebooks.centroids, codes)
    if codebooks.fsq is not None and codes.shape[1] == len(codebooks.sizes):
        x = x + fsq.decode(codebooks.fsq, codes[:, -1])
    return np.asarray(x)


def save(codebooks: Codebooks, path: Path) -> None:
    """Write codebooks as one safetensors file."""
    tensors = {f"level_{i}": np.asarray(codebook) for i, codebook in enumerate(codebooks.centroids)}
    levels: tuple[int, ...] = ()
    if codebooks.fsq is not None:
        levels = codebooks.fsq.levels
        tensors |= {
            f"fsq.{name}": np.asarray(value) for name, value in flatten_dict(codebooks.fsq.params, sep=".").items()
        }
    save_file(tensors, path, metadata={"fsq_levels": json.dumps(levels)})


def load(path: Path) -> Codebooks:
    """Read what `save` wrote; UserError when the file is missing or is something else."""
    try:
        with safe_open(path, "np") as file:
            tensors = {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            levels = tuple(json.loads((file.metadata() or {})["fsq_levels"]))
        centroids = tuple(tensors[f"level_{i}"] for i in range(sum(name.startswith("level_") for name in tensors)))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} holds no codebooks ({error}): run the tokenize phase again") from error
    params = {name.removeprefix("fsq."): value for name, value in tensors.items() if name.startswith("fsq.")}
    return Codebooks(centroids, Fsq(unflatten_dict(params, sep="."), levels) if levels else None)
