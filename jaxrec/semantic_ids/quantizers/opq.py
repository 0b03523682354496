"""Optimized product quantization (Ge et al. 2013): a rotation, then one independent codebook in each sub-space.

OneSearch §3.1.3 quantizes the residual of the last k-means level with it (2 x 256), so that the last codes of an ID
describe an item's own features, in parallel and not as a hierarchy.

The rotation starts at the principal components, assigned to the sub-spaces so that each has as much variance as its
codebook can encode. Then rotation and codebooks are updated in turn: with the codes fixed, the best rotation solves an
orthogonal Procrustes problem; with the rotation fixed, each codebook takes a Lloyd step. This runs on a sample of the
rows; the codebooks are then finished on a larger one.
"""

from dataclasses import dataclass, field
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import UserError
from jaxrec.console import track
from jaxrec.nn.geometry import principal_axes
from jaxrec.semantic_ids.quantizers.kmeans import KMeansConfig, assign, drawn, kmeans, lloyd, update
from jaxrec.semantic_ids.quantizers.rows import check_enough, check_rows, check_width

Books = tuple[jax.Array, ...]


@dataclass(frozen=True)
class OpqConfig:
    """How a product quantizer is fitted."""

    sizes: tuple[int, ...] = (256, 256)
    """Codes in each sub-space; the number of sub-spaces must divide the width of the vectors."""
    rotations: int = 20
    """Updates of the rotation; 0 leaves the principal components."""
    start: KMeansConfig = field(default_factory=partial(KMeansConfig, iterations=5))
    """The k-means that gives each sub-space its first codebook."""
    sample_rows: int = 128
    """Sampled rows, a code of the largest codebook, on which the rotation is fitted."""
    finish_rows: int = 1024
    """Sampled rows, a code of the largest codebook, on which the codebooks are finished."""
    finish: KMeansConfig = field(default_factory=partial(KMeansConfig, iterations=20))
    """The Lloyd iterations that finish the codebooks under the last rotation."""


@flax.struct.dataclass
class Opq:
    """A fitted quantizer: rotation f32 [D, D], orthonormal, and for each sub-space a codebook f32 [K, D / parts]."""

    rotation: jax.Array
    codebooks: Books

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes in each sub-space."""
        return tuple(len(codebook) for codebook in self.codebooks)

    @property
    def width(self) -> int:
        """Width of the vectors that it encodes."""
        return len(self.rotation)


def fit(key: jax.Array, x: np.ndarray | jax.Array, config: OpqConfig = OpqConfig()) -> Opq:
    """Fit a rotation and codebooks to x f32 [I, D].

    Raises:
      UserError: no sub-space, a codebook of fewer than two codes, a width that does not divide by the number of
        sub-spaces, fewer rows than codes, or a row with NaN or infinity.
    """
    x = jnp.asarray(check_rows(x, 0))
    check(config, x.shape)
    most = max(config.sizes)
    start_key, sample_key, finish_key = jax.random.split(key, 3)
    mean = x.mean(0)
    sample = subsample(sample_key, x, config.sample_rows * most) - mean
    rotation = jnp.asarray(principal_rotation(np.asarray(sample), config.sizes), jnp.float32)
    books = tuple(
        kmeans(jax.random.fold_in(start_key, j), part, k, config.start).centroids
        for j, (part, k) in enumerate(zip(parts(sample @ rotation, len(config.sizes)), config.sizes, strict=True))
    )
    for _ in track(range(config.rotations), "Rotating sub-spaces"):
        rotation, books = alternate(sample, rotation, books)
    rotation = jnp.asarray(nearest_rotation(np.asarray(rotation, np.float64)), jnp.float32)
    books = _finish(subsample(finish_key, x, config.finish_rows * most) - mean, sample, rotation, books, config.finish)
    shifts = parts(mean @ rotation, len(books))
    return Opq(rotation, tuple(book + shift for book, shift in zip(books, shifts, strict=True)))


def check(config: OpqConfig, shape: tuple[int, ...]) -> None:
    """UserError when the configuration is invalid, or does not fit rows of a shape [I, D]."""
    (rows, width), sizes = shape, config.sizes
    if not sizes or min(sizes) < 2:
        raise UserError(f"OPQ sizes={sizes}: give at least one sub-space, each of 2 codes or more")
    if width % len(sizes):
        dividing = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise UserError(
            f"OPQ sizes={sizes} cut the width into {len(sizes)} equal parts, but {width} does not divide by "
            f"{len(sizes)}: give as many sizes as one of {dividing}"
        )
    check_enough(rows, max(sizes))


def encode(opq: Opq, x: np.ndarray | jax.Array) -> jax.Array:
    """The nearest code of each sub-space for x f32 [I, D], int32 [I, parts].

    Raises:
      UserError: another width than the fitted one, or a row with NaN or infinity.
    """
    x = jnp.asarray(check_rows(x, 0))
    check_width(x, opq.width)
    return _encode(opq, x)


def decode(opq: Opq, codes: np.ndarray | jax.Array) -> jax.Array:
    """The vectors f32 [I, D] of codes int32 [I, m]; sub-spaces beyond the first m give the mean of their codebook."""
    codes = jnp.asarray(codes)
    known = [codebook[codes[:, j]] for j, codebook in enumerate(opq.codebooks[: codes.shape[1]])]
    rest = [jnp.tile(codebook.mean(0), (len(codes), 1)) for codebook in opq.codebooks[codes.shape[1] :]]
    return jnp.concatenate(known + rest, axis=1) @ opq.rotation.T


def centroids(opq: Opq) -> list[np.ndarray]:
    """The codes of each sub-space as vectors f32 [K, D], zero in the other sub-spaces: a code of each adds up."""
    axes = parts(opq.rotation, len(opq.codebooks))
    return [np.asarray(codebook @ of_part.T) for codebook, of_part in zip(opq.codebooks, axes, strict=True)]


def principal_rotation(x: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Principal directions of centred x [I, D] assigned to the sub-spaces, orthonormal f64 [D, D] (Ge et al. §3.2).

    In order of falling variance, each direction goes to the sub-space with room whose variances have the least product
    for its number of codes. For Gaussian data no rotation has a lower bound of the error.
    """
    values, directions = principal_axes(x)
    # Relative to the least variance, so that every direction increases the product of its sub-space.
    floor = max(values[0] * 1e-9, np.finfo(np.float64).tiny)
    spread = np.log(np.maximum(values, floor))
    spread -= spread[-1]
    load = -2 * np.log(np.asarray(sizes, np.float64))
    members: list[list[int]] = [[] for _ in sizes]
    for i in range(len(values)):
        open_parts = [j for j in range(len(sizes)) if len(members[j]) < len(values) // len(sizes)]
        j = min(open_parts, key=lambda j: load[j])
        members[j].append(i)
        load[j] += spread[i]
    return directions[:, np.concatenate(members)]


def nearest_rotation(matrix: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """The orthonormal matrix nearest to `matrix` [D, D]: for x.T @ y, the one that best turns x into y (Procrustes)."""
    numpy = np if isinstance(matrix, np.ndarray) else jnp
    left, _, right = numpy.linalg.svd(matrix)
    return left @ right


def parts(x: jax.Array, count: int) -> list[jax.Array]:
    """The equal parts of the last axis."""
    return jnp.split(x, count, axis=-1)


def subsample(key: jax.Array, x: jax.Array, most: int) -> jax.Array:
    """At most `most` rows of x, without repeats, in their order."""
    return x if len(x) <= most else x[np.sort(drawn(key, len(x), most))]


@jax.jit
def alternate(x: jax.Array, rotation: jax.Array, books: Books) -> tuple[jax.Array, Books]:
    """One Lloyd step of each codebook for x f32 [I, D], then the rotation f32 [D, D] that best fits the same codes."""
    moved, agreement = [], []
    turned = parts(x @ rotation, len(books))
    for part, axes, book in zip(turned, parts(rotation, len(books)), books, strict=True):
        codes, _ = assign(part, book)
        # Both steps need only the sum of the rows of each code, before the rotation.
        sums = jax.ops.segment_sum(x, codes, len(book))
        counts = jax.ops.segment_sum(jnp.ones(len(x)), codes, len(book))
        moved.append(update(book, sums @ axes, counts, part)[0])
        agreement.append(sums.T @ moved[-1])
    return nearest_rotation(jnp.concatenate(agreement, axis=1)), tuple(moved)


@partial(jax.jit, static_argnames="config")
def _finish(x, sample, rotation, books, config):
    where = jnp.ones(len(x), bool)
    rotated, samples = parts(x @ rotation, len(books)), parts(sample @ rotation, len(books))
    return tuple(
        lloyd(part, where, book, some, config) for part, some, book in zip(rotated, samples, books, strict=True)
    )


@jax.jit
def _encode(opq, x):
    rotated = parts(x @ opq.rotation, len(opq.codebooks))
    return jnp.stack([assign(part, book)[0] for part, book in zip(rotated, opq.codebooks, strict=True)], axis=1)
