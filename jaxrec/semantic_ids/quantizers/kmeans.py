"""k-means in JAX: k-means++ start, growing samples, rows in chunks, empty clusters re-seeded, stop at a tolerance.

Three things make it fast. Most iterations run on samples: k-means++ and the first Lloyd iterations read a few rows a
cluster; each larger sample starts from the centroids of the smaller one, and ends as soon as the centroids move less
than its sampling error. Every iteration moves a centroid beyond the mean of its rows (see STEP). And no more rows are
read than a centroid's position depends on (`rows_per_cluster`).

With few rows a cluster (see FEW), samples carry no information, and Lloyd's algorithm stops near its start. There the
dimensions can grow instead (`axes_iterations`): the rows are first clustered along their first principal axis alone;
then axes are added, starting from the centroids found so far, with the mean along the new axes. With many clusters both
ways are run, and the result of lower error is kept.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrec.semantic_ids.quantizers.rows import Rows, place

DISTANCES_AT_ONCE = 1 << 19
"""Distances computed at once: a chunk of this many stays in the processor's cache."""
ASSIGNED_AT_ONCE = 1 << 14
"""Rows sent to the device at once to be assigned."""
GROUP = 8
"""Centroids in a group; see `nearest`."""
MANY, FEW, WIDE = 1024, 32, 32
"""`axes_iterations` applies from WIDE dimensions on: with fewer than FEW rows a cluster instead of k-means++, and from
MANY clusters on in addition to it."""
STEP = 1.5
"""Step of a centroid towards the mean of its rows; 1 reaches it. The inertia under a given assignment is quadratic in
the centroid and falls for any step below 2, so the iterations still descend. Centroids move in one direction for many
iterations; this step takes about half as many."""


@dataclass(frozen=True)
class KMeansConfig:
    """How k-means is run; the number of clusters is given with the data."""

    iterations: int = 50
    """The most Lloyd iterations over all rows, and over each sample."""
    tolerance: float = 4e-4
    """Stop when the mean squared move of the centroids is below this share of the data's variance, a coordinate."""
    start_rows: tuple[int, int] = (16384, 32768)
    """Bounds on the rows that k-means++ reads: an eighth of all, within these, and at least four a cluster."""
    growth: int = 4
    """Ratio of the sizes of successive samples. The first has 128 rows a cluster; fewer give a higher final error. 0:
    no samples between k-means++ and all rows."""
    rows_per_cluster: int = 256
    """Fit to at most this many rows a cluster, a random sample; 0: to all rows."""
    axes_iterations: int = 0
    """The most Lloyd iterations at each number of principal axes, with few rows a cluster or many clusters. With 10 the
    error is up to nine percent lower, in two to three times the time. 0: all dimensions at once."""


class KMeans(NamedTuple):
    """A fitted k-means: centroids f32 [K, D], assignment int32 [I], inertia f32 [] (sum of squared distances)."""

    centroids: jax.Array
    assignment: jax.Array
    inertia: jax.Array


def kmeans(key: jax.Array, x: np.ndarray | jax.Array | Rows, k: int, config: KMeansConfig = KMeansConfig()) -> KMeans:
    """Cluster rows x f32 [I, D] into k clusters.

    Rows that are split over a mesh (`rows.place`) give the centroids of one device up to rounding; their assignment
    stays split, [I'], and is K for padding rows.

    Raises:
      UserError: fewer rows than clusters, or a row with NaN or infinity.
    """
    rows = x if isinstance(x, Rows) else place(x, at_least=k)
    centroids = fit(key, rows, k, config)
    return KMeans(centroids, *assign_rows(rows, centroids))


def fit(key: jax.Array, rows: Rows, k: int, config: KMeansConfig) -> jax.Array:
    """The centroids f32 [K, D] of placed rows: k-means++, Lloyd on samples that grow, then on all rows; or by axes."""
    sample_key, start_key = jax.random.split(key)
    by_axes = config.axes_iterations and rows.x.shape[1] >= WIDE
    if by_axes and len(rows) < FEW * k:
        return fit_by_axes(start_key, rows, k, config)
    most = min(len(rows), config.rows_per_cluster * k or len(rows))
    sizes = sample_sizes(most, k, config)
    order = np.arange(len(rows))
    if most < len(rows):
        rows = subset(rows, drawn(sample_key, len(rows), most))
    elif sizes[-1] < most:
        # Growing samples need a random order; all rows at once need none.
        order = drawn(sample_key, most, sizes[-1])
    sample = take(rows, order[: sizes[-1]])
    first = sample[: sizes[0]]
    centroids = plus_plus(start_key, first, k)
    for size in sizes[1:]:
        centroids = lloyd(sample[:size], jnp.ones(size, bool), centroids, first, config, sampled=True)
    centroids = lloyd(rows.x, rows.where, centroids, first, config, rows.mesh)
    if not by_axes or k < MANY:
        return centroids
    # Which of the two is better depends on the data: k-means++ for rows in heavy clusters, axes for rows without any.
    both = (centroids, fit_by_axes(start_key, rows, k, config))
    return min(both, key=lambda each: float(assign_rows(rows, each)[1]))


def fit_by_axes(key: jax.Array, rows: Rows, k: int, config: KMeansConfig) -> jax.Array:
    """The centroids f32 [K, D] of placed rows: Lloyd along 1, 2, 4 .. of their principal axes."""
    sample_key, start_key = jax.random.split(key)
    everywhere = None if rows.mesh is None else NamedSharding(rows.mesh, PartitionSpec())
    mean, squares = jax.jit(moments, out_shardings=everywhere)(rows.x, rows.where)
    axes = jnp.asarray(np.linalg.eigh(np.asarray(squares, np.float64))[1][:, ::-1], jnp.float32)
    rotated = jax.jit(lambda x: (x - mean) @ axes)(rows.x)
    first = sample_sizes(len(rows), k, config)[0]
    sample = take(dataclasses.replace(rows, x=rotated), drawn(sample_key, len(rows), first))
    few = dataclasses.replace(config, iterations=config.axes_iterations)
    centroids = plus_plus(start_key, sample[:, :1], k)
    for count in [2**power for power in range(len(axes).bit_length()) if 2**power < len(axes)]:
        centroids = lloyd(rotated[:, :count], rows.where, centroids, sample[:, :count], few, rows.mesh)
        # All rows are centred, so that the mean along the added axes is zero.
        centroids = jnp.pad(centroids, ((0, 0), (0, min(2 * count, len(axes)) - count)))
    return lloyd(rotated, rows.where, centroids, sample, config, rows.mesh) @ axes.T + mean


def moments(x: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean f32 [D] of the real rows of x f32 [I', D], and the sum of products of centred ones, f32 [D, D]."""
    mean = jnp.where(where[:, None], x, 0).sum(0) / jnp.maximum(where.sum(), 1)
    centred = jnp.where(where[:, None], x - mean, 0)
    return mean, centred.T @ centred


def sample_sizes(rows: int, k: int, config: KMeansConfig) -> list[int]:
    """Rows that k-means++ reads, then those of the growing samples, which are at most half of the rows."""
    first = min(rows, max(int(np.clip(rows // 8, *config.start_rows)), 4 * k))
    sizes, size = [first], max(first, 128 * k)
    while config.growth > 1 and size <= rows // 2:
        sizes.append(size)
        size *= config.growth
    return sizes


def drawn(key: jax.Array, rows: int, count: int) -> np.ndarray:
    """`count` of the numbers below `rows` in random order, each once, int64."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return rng.choice(rows, count, replace=False)


def take(rows: Rows, numbers: np.ndarray) -> jax.Array:
    """Real rows by their numbers in [0, I), f32 [n, D], on every device."""
    places = rows.valid[numbers]
    if rows.mesh is None:
        return jnp.asarray(rows.x[places])
    everywhere = NamedSharding(rows.mesh, PartitionSpec())
    return jax.jit(lambda x: x[places], out_shardings=everywhere)(rows.x)


def subset(rows: Rows, numbers: np.ndarray) -> Rows:
    """Real rows by their numbers in [0, I), in this order, split over the devices as `rows` are."""
    places = rows.valid[numbers]
    if rows.mesh is None:
        return Rows(jnp.asarray(rows.x[places]), jnp.ones(len(places), bool), np.arange(len(places)))
    places = np.pad(places, (0, -len(places) % rows.mesh.size))
    split = NamedSharding(rows.mesh, PartitionSpec(rows.mesh.axis_names))
    x, where = jax.jit(lambda x: (x[places], jnp.arange(len(places)) < len(numbers)), out_shardings=split)(rows.x)
    return Rows(x, where, np.arange(len(numbers)), rows.mesh)


@partial(jax.jit, static_argnums=2)
def plus_plus(key: jax.Array, x: jax.Array, k: int) -> jax.Array:
    """Greedy k-means++: each next centroid is the best of 2 + log k rows drawn by squared distance, f32 [k, D].

    The best candidate for a few rows need not be good for the others: with fewer than four rows a cluster and candidate
    there are fewer candidates, down to one, which is plain k-means++.
    """
    candidates = max(1, min(2 + int(np.log(k)), len(x) // (4 * k)))
    given, x = x, x - x.mean(0)
    squares = jnp.sum(x * x, axis=-1)
    first_key, key = jax.random.split(key)
    first = jax.random.randint(first_key, (), 0, len(x))

    def add(nearest, key):
        # Inverse of the cumulative sum: one uniform number a candidate; a categorical draw needs one a row.
        mass = jnp.cumsum(nearest)
        picked = jnp.searchsorted(mass, jax.random.uniform(key, (candidates,)) * mass[-1], side="right")
        picked = jnp.minimum(picked, len(x) - 1)
        rows = x[picked]
        distances = squares[:, None] - 2 * x @ rows.T + jnp.sum(rows * rows, axis=-1)
        reached = jnp.minimum(nearest[:, None], jnp.maximum(distances, 0))
        best = jnp.argmin(reached.sum(0))
        return reached[:, best], picked[best]

    nearest = jnp.sum((x - x[first]) ** 2, axis=-1)
    _, rest = jax.lax.scan(add, nearest, jax.random.split(key, k - 1))
    return given[jnp.concatenate([first[None], rest])]


@partial(jax.jit, static_argnames=("config", "mesh", "sampled"))
def lloyd(
    x: jax.Array,
    where: jax.Array,
    centroids: jax.Array,
    sample: jax.Array,
    config: KMeansConfig,
    mesh: Mesh | None = None,
    sampled: bool = False,
) -> jax.Array:
    """Lloyd iterations from given centroids f32 [K, D] to convergence, or config.iterations of them, f32 [K, D].

    Args:
      x: f32 [I', D]; where: bool [I'], the real rows.
      sample: f32 [n, D], rows at which empty clusters may be re-seeded.
      sampled: x is itself a sample: stop as soon as the centroids move less than their sampling error.
    """
    count = jnp.maximum(where.sum(), 1)
    limit = config.tolerance * _mean_variance(x, where, count)

    def going(state):
        iteration, _, _, moved, noise, seeded = state
        return (iteration < config.iterations) & ((moved > jnp.maximum(limit, noise)) | seeded)

    def iterate(state):
        iteration, centroids, *_ = state
        sums, counts, inertia = totals(x, where, centroids, mesh)
        means, seeded = update(centroids, sums, counts, sample)
        further = centroids + jnp.where(seeded[:, None], 1, STEP) * (means - centroids)
        moved = jnp.mean((further - centroids) ** 2)
        # A mean over n / K rows has the variance of a cluster divided by n / K; a tenth of that is small.
        noise = 0.1 * inertia / x.shape[1] / count * len(centroids) / count if sampled else 0.0
        return iteration + 1, further, means, moved, noise, seeded.any()

    # The last means are returned, so that a centroid is the mean of rows.
    return jax.lax.while_loop(going, iterate, (0, centroids, centroids, jnp.inf, 0.0, False))[2]


def update(centroids: jax.Array, sums: jax.Array, counts: jax.Array, sample: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A Lloyd step from `totals`: centroids f32 [K, D], and which of them were empty and re-seeded, bool [K].

    An empty cluster is re-seeded at the row of `sample` f32 [n, D] with the largest error. A row on a centroid is not
    used, so data with fewer distinct rows than clusters converge too.
    """
    empty = counts == 0
    updated = jnp.where(empty[:, None], centroids, sums / jnp.maximum(counts, 1)[:, None])

    def seed(updated):
        _, distances = assign(sample, updated)
        far, rows = jax.lax.top_k(distances, min(len(updated), len(sample)))
        rank = jnp.minimum(jnp.cumsum(empty) - 1, len(far) - 1)
        moved = empty & (far[rank] > 0)
        return jnp.where(moved[:, None], sample[rows[rank]], updated), moved

    return jax.lax.cond(empty.any(), seed, lambda c: (c, jnp.zeros(len(c), bool)), updated)


def totals(
    x: jax.Array, where: jax.Array, centroids: jax.Array, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the rows nearest to each centroid: sums f32 [K, D], counts f32 [K]; and the inertia, f32 []."""

    def of_device(x, where, centroids):
        k = len(centroids)
        codes, distances = assign(x, centroids)
        codes = jnp.where(where, codes, k)
        sums = jax.ops.segment_sum(x, codes, k)
        return sums, jax.ops.segment_sum(jnp.ones(len(x)), codes, k), jnp.where(where, distances, 0).sum()

    return over_devices(of_device, mesh, x, where, centroids)


def assign_rows(rows: Rows, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest centroid of each row, int32 [I'] (K where there is no row), and the inertia, f32 []."""
    if not isinstance(rows.x, np.ndarray):
        return assign_all(rows.x, rows.where, centroids, rows.mesh)
    # By blocks: rows in the host's memory are never copied to the device all at once.
    starts = range(0, len(rows.x), ASSIGNED_AT_ONCE)
    codes, distances = zip(*(assign(rows.x[s : s + ASSIGNED_AT_ONCE], centroids) for s in starts), strict=True)
    return jnp.concatenate(codes), sum(jnp.sum(each) for each in distances)


@partial(jax.jit, static_argnames="mesh")
def assign_all(
    x: jax.Array, where: jax.Array, centroids: jax.Array, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
    """The nearest centroid of each row, int32 [I'] (K where there is no row), and the inertia, f32 []."""
    codes, distances = row_by_row(assign, mesh, x, centroids)
    return jnp.where(where, codes, len(centroids)), jnp.where(where, distances, 0).sum()


def over_devices(of_device, mesh: Mesh | None, x: jax.Array, where: jax.Array, centroids: jax.Array):
    """of_device(x, where, centroids), its results summed over the devices that the rows are split over."""
    if mesh is None:
        return of_device(x, where, centroids)
    rows, everywhere = PartitionSpec(mesh.axis_names), PartitionSpec()
    summed = jax.shard_map(
        lambda *args: jax.lax.psum(of_device(*args), mesh.axis_names),
        mesh=mesh,
        in_specs=(rows, rows, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )
    return summed(x, where, centroids)


def row_by_row(of_device, mesh: Mesh | None, x: jax.Array, fitted):
    """of_device(x, fitted) -> pytree of [I', ...], each device on its own rows; the result lies as they do."""
    if mesh is None:
        return of_device(x, fitted)
    rows, everywhere = PartitionSpec(mesh.axis_names), PartitionSpec()
    split = jax.shard_map(of_device, mesh=mesh, in_specs=(rows, everywhere), out_specs=rows, check_vma=False)
    return split(x, fitted)


@jax.jit
def assign(x: jax.Array, centroids: jax.Array, prices: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The nearest centroid of each row, int32 [I], the first of equals, and its squared distance, f32 [I].

    prices: f32 [K], added to the squared distances before the least is taken (`quantizers.balanced`).
    """
    find = nearest(centroids, prices)

    def of_rows(rows):
        codes = find(rows)
        # Distances by difference: |x|^2 - 2xc + |c|^2 loses all digits for rows near their centroid.
        return codes, jnp.sum((rows - centroids[codes]) ** 2, axis=-1)

    return by_chunk(of_rows, x, chunk_rows(len(centroids)))


def chunk_rows(k: int) -> int:
    """Rows whose distances to k centroids are computed at once."""
    return max(64, DISTANCES_AT_ONCE // k)


def by_chunk(function, x: jax.Array, chunk: int):
    """function(rows [chunk, D]) -> pytree of [chunk, ...], each row by itself, over all rows x [I, D], as [I, ...]."""
    chunk = min(chunk, max(len(x), 1))
    if not len(x):
        x = jnp.zeros((1, x.shape[1]), x.dtype)
        return jax.tree.map(lambda found: found[:0], function(x))
    # The last chunk overlaps rows that are done: padding it would copy all rows.
    starts = np.minimum(np.arange(0, len(x), chunk), len(x) - chunk)
    found = jax.lax.map(lambda start: function(jax.lax.dynamic_slice_in_dim(x, start, chunk)), jnp.asarray(starts))
    last = len(x) - (len(starts) - 1) * chunk

    def joined(parts):
        return jnp.concatenate([parts[:-1].reshape(-1, *parts.shape[2:]), parts[-1, chunk - last :]])

    return jax.tree.map(joined, found)


def nearest(centroids: jax.Array, prices: jax.Array | None = None):
    """A function rows f32 [n, D] -> the code of each row's nearest centroid, int32 [n], the first of equals.

    On a CPU the minimum of the matrix product's result is almost free, but its argmin takes longer than the product. So
    the minimum of each GROUP of centroids is taken first; the argmin over groups, and then inside one group, reads an
    eighth of the numbers. Coordinates are taken relative to the centroids' mean, which keeps the digits of distances
    when all rows lie far from zero.
    """
    k = len(centroids)
    centre = centroids.mean(0)
    groups = -(-k // GROUP)
    moved = jnp.pad(centroids - centre, ((0, groups * GROUP - k), (0, 0)))
    offsets = jnp.sum(moved * moved, axis=-1) if prices is None else jnp.sum(moved * moved, axis=-1).at[:k].add(prices)
    offsets = offsets.at[k:].set(jnp.inf).reshape(groups, GROUP, 1)
    scaled = -2 * moved
    group_number = jnp.arange(groups, dtype=jnp.int32)[:, None]
    member_number = jnp.arange(GROUP, dtype=jnp.int32)[:, None]

    def of_rows(rows):
        distances = (scaled @ (rows - centre).T).reshape(groups, GROUP, -1) + offsets
        of_group = distances.min(1)
        least = of_group.min(0)
        group = jnp.where(of_group == least, group_number, groups).min(0)
        # NaN equals nothing: such rows get the last code, which is inside the codebook.
        group = jnp.minimum(group, groups - 1)
        members = jnp.take_along_axis(distances, group[None, None], axis=0)[0]
        member = jnp.where(members == least, member_number, GROUP).min(0)
        return jnp.minimum(group * GROUP + member, k - 1)

    return of_rows


def _mean_variance(x: jax.Array, where: jax.Array, count: jax.Array) -> jax.Array:
    kept = where[:, None]
    mean = jnp.where(kept, x, 0).sum(0) / count
    return jnp.where(kept, (x - mean) ** 2, 0).sum() / count / x.shape[1]
