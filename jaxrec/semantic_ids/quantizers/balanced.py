"""Balanced k-means: clusters of about equal size, at the scale of a catalogue.

Each cluster has a price, which is added to the squared distance to its centroid; every row belongs to the cluster of
least cost. Prices of oversized clusters rise and those of undersized clusters fall until the sizes are within a bound.
These prices are the dual variables of the transport problem, so the assignment has the least squared error among all
with its cluster sizes. Centroids and prices are updated in turn, as in Lloyd's algorithm. Prices are first fitted with
soft assignments at a falling temperature (Sinkhorn's algorithm): with hard assignments a price would have to pass many
rows of a dense region before one of them moves. A new row is encoded by itself, under the same prices.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.semantic_ids.quantizers.kmeans import STEP, by_chunk, chunk_rows, drawn, nearest, take
from jaxrec.semantic_ids.quantizers.rows import Rows, place

HOT, COLD = 1.0, 0.01
"""First and last temperature of the soft assignments, in units of the mean squared distance of a row to the mean."""
SETTLING, SHARES = 5, 10
"""Updates of the centroids at the last temperature, and updates of the prices before each; at the falling temperatures
two."""
BINS = 64
"""Bins of the margins: the largest is 2^16 times the smallest that is resolved."""


@dataclass(frozen=True)
class BalancedConfig:
    """Balance of the cluster sizes, and how it is fitted."""

    slack: float = 0.1
    """Largest deviation of a cluster's size from the mean size, as a share of it, rounded up to a whole row."""
    iterations: int = 40
    """Updates of the centroids under soft assignments, at a falling temperature."""
    whole_iterations: int = 6
    """Further updates of the centroids, under hard assignments."""
    rounds: int = 10
    """The most updates of the prices before each update under hard assignments; twice as many at the end."""
    rows: int = 1 << 17
    """Rows to fit to (at least 128 a cluster); more are sampled down."""


class Balanced(NamedTuple):
    """A fitted balanced k-means: centroids f32 [K, D], prices f32 [K] in units of squared distance."""

    centroids: jax.Array
    prices: jax.Array


def fit(
    key: jax.Array, x: np.ndarray | jax.Array | Rows, k: int, config: BalancedConfig = BalancedConfig()
) -> Balanced:
    """Fit k clusters of about equal size to x f32 [I, D].

    Raises:
      UserError: fewer rows than clusters, or a row with NaN or infinity.
    """
    rows = x if isinstance(x, Rows) else place(x, at_least=k)
    # In random order: the first k rows initialise the centroids, so that dense regions get many, as balance needs.
    sample = take(rows, drawn(key, len(rows), min(len(rows), max(config.rows, 128 * k))))
    return _alternate(sample, sample[:k], config)


@partial(jax.jit, static_argnames="config")
def _alternate(x: jax.Array, centroids: jax.Array, config: BalancedConfig) -> Balanced:
    """Alternates prices and centroids f32 [K, D]: at falling temperatures, at the last one, with hard assignments."""
    spread = _spread(x)
    temperatures = spread * jnp.geomspace(HOT, COLD, config.iterations)

    def move_shared(changes, state, temperature):
        centroids, prices = state
        prices = share(x, centroids, prices, temperature, config.slack, changes)
        return _means(x, by_chunk(nearest(centroids, prices), x, chunk_rows(len(centroids))), centroids), prices

    def move_whole(_, state):
        centroids, prices = state
        prices, codes = find_prices(x, centroids, prices, config.slack, config.rounds)
        return _means(x, codes, centroids), prices

    state = (centroids, jnp.zeros(len(centroids)))
    state = jax.lax.fori_loop(0, config.iterations, lambda i, state: move_shared(2, state, temperatures[i]), state)
    state = jax.lax.fori_loop(0, SETTLING, lambda _, state: move_shared(SHARES, state, spread * COLD), state)
    centroids, prices = jax.lax.fori_loop(0, config.whole_iterations, move_whole, state)
    prices = share(x, centroids, prices, spread * COLD, config.slack, SHARES)
    return Balanced(centroids, find_prices(x, centroids, prices, config.slack, 2 * config.rounds)[0])


def _means(x: jax.Array, codes: jax.Array, centroids: jax.Array) -> jax.Array:
    """The mean of each cluster's rows f32 [K, D]; an empty cluster keeps its centroid."""
    counts = jax.ops.segment_sum(jnp.ones(len(x)), codes, len(centroids))
    sums = jax.ops.segment_sum(x, codes, len(centroids))
    return jnp.where((counts == 0)[:, None], centroids, sums / jnp.maximum(counts, 1)[:, None])


def share(
    x: jax.Array, centroids: jax.Array, prices: jax.Array, temperature: jax.Array, slack: float, steps: int
) -> jax.Array:
    """Prices f32 [K] after steps of Sinkhorn's algorithm.

    Every row is assigned to the clusters by the softmax of its negative costs at the temperature; a price rises by the
    temperature times the logarithm of its cluster's size over its target size.
    """
    least, most = bounds(len(x), len(centroids), slack)

    def step(_, prices):
        sizes = shared_sizes(x, centroids, prices, temperature)
        excess = jnp.log(jnp.maximum(sizes, 1e-3) / jnp.maximum(_wanted(prices, sizes, least, most), 1e-3))
        return _up_to_zero(prices, STEP * temperature * excess)

    return jax.lax.fori_loop(0, steps, step, prices)


def _spread(x: jax.Array) -> jax.Array:
    """The mean squared distance of rows to their mean, the unit of temperatures; above zero if all rows are equal."""
    return jnp.maximum(jnp.mean(jnp.sum((x - x.mean(0)) ** 2, axis=-1)), 1e-30)


def shared_sizes(x: jax.Array, centroids: jax.Array, prices: jax.Array, temperature: jax.Array) -> jax.Array:
    """The cluster sizes f32 [K] under soft assignments of x f32 [I, D]."""
    chunk = min(chunk_rows(len(centroids)), len(x))
    # The last chunk overlaps rows that are counted already: padding it would copy all rows.
    begins = np.arange(0, len(x), chunk)
    starts = np.minimum(begins, len(x) - chunk)
    fresh = starts[:, None] + np.arange(chunk) >= begins[:, None]
    centre = centroids.mean(0)
    moved = centroids - centre
    offsets = (jnp.sum(moved * moved, axis=-1) + prices)[:, None]

    def of_chunk(part):
        start, fresh = part
        rows = jax.lax.dynamic_slice_in_dim(x, start, chunk)
        logits = ((2 * moved) @ (rows - centre).T - offsets) / temperature
        shares = jnp.exp(logits - logits.max(0))
        return shares @ (fresh / shares.sum(0))

    return jax.lax.map(of_chunk, (jnp.asarray(starts), jnp.asarray(fresh))).sum(0)


def _wanted(prices: jax.Array, sizes: jax.Array, least: int, most: int) -> jax.Array:
    """Target sizes: the upper bound where the price is above zero, the lower bound where it is below."""
    return jnp.where(prices > 0, most, jnp.where(prices < 0, least, jnp.clip(sizes, least, most)))


def _up_to_zero(prices: jax.Array, change: jax.Array) -> jax.Array:
    """Updated prices, stopped at zero, where the other bound becomes the target."""
    moved = prices + change
    # By signs, as products of small prices vanish.
    return jnp.where(jnp.sign(moved) * jnp.sign(prices) < 0, 0, moved)


def bounds(rows: int, k: int, slack: float) -> tuple[int, int]:
    """The least and the largest size of a cluster: the mean minus and plus the slack, rounded outwards."""
    # 50 * 1.1 is a little more than 55, which is no reason to allow 56.
    mean, rounding = rows / k, 1e-9 * rows
    return int(np.floor(mean * (1 - slack) + rounding)), int(np.ceil(mean * (1 + slack) - rounding))


def find_prices(
    x: jax.Array, centroids: jax.Array, prices: jax.Array, slack: float, rounds: int
) -> tuple[jax.Array, jax.Array]:
    """Prices f32 [K] under which the sizes are within the bounds, or as close as `rounds` updates bring them; and the
    codes int32 [I] under the best prices found.

    A row's margin is the cost of its second cheapest cluster minus that of the cheapest. A cluster with e rows too many
    loses e of them when its price rises by the e-th smallest margin of its own rows. A cluster with e rows too few
    gains e when its price falls by the e-th smallest margin of the rows for which it is second. Since all prices are
    updated at once, each update is a fraction of that, and the fraction shrinks whenever a price overshoots.
    """
    k = len(centroids)
    least, most = bounds(len(x), k, slack)

    def measure(prices):
        codes, second, margin = cheapest(x, centroids, prices)
        counts = jax.ops.segment_sum(jnp.ones(len(x), jnp.int32), codes, k)
        off = jnp.sum(jnp.maximum(counts - most, 0) + jnp.maximum(least - counts, 0))
        excess = counts - _wanted(prices, counts, least, most)
        return {"codes": codes, "second": second, "margin": margin, "excess": excess, "off": off}

    def iterate(state):
        number, prices, rate, now, best = state
        excess = now["excess"]
        rise = smallest(now["margin"], now["codes"], excess, k)
        fall = smallest(now["margin"], now["second"], -excess, k)
        prices = _up_to_zero(prices, rate * jnp.where(excess > 0, rise, jnp.where(excess < 0, -fall, 0)))
        now = measure(prices)
        turned = jnp.sign(now["excess"]) * jnp.sign(excess) < 0
        rate = jnp.clip(jnp.where(turned, rate * 0.6, rate * 1.05), 0.05, 0.4)
        return number + 1, prices, rate, now, keep_better(best, (now["off"], prices, now["codes"]))

    def keep_better(best, new):
        return jax.tree.map(lambda old, found: jnp.where(new[0] < best[0], found, old), best, new)

    now = measure(prices)
    state = (0, prices, jnp.full(k, 0.3), now, (now["off"], prices, now["codes"]))
    *_, (_, prices, codes) = jax.lax.while_loop(lambda s: (s[0] < rounds) & (s[-1][0] > 0), iterate, state)
    return prices, codes


def smallest(margin: jax.Array, group: jax.Array, rank: jax.Array, k: int) -> jax.Array:
    """About the margin of the given rank f32 [K] (from 0, at most the last) among the rows of each group, f32 [K].

    It is read from a histogram of the margins' logarithms, with bins a quarter of an octave wide, and rounded up to the
    end of its bin. A group without rows gets the mean of all margins.
    """
    largest = jnp.maximum(margin.max(), jnp.finfo(margin.dtype).tiny)
    places = jnp.floor(BINS + 4 * jnp.log2(margin / largest))
    places = jnp.clip(places, 0, BINS - 1).astype(jnp.int32)
    counts = jax.ops.segment_sum(jnp.ones(len(group), jnp.int32), group * BINS + places, k * BINS).reshape(k, BINS)
    reached = jnp.cumsum(counts, axis=1)
    wanted = jnp.clip(rank, 0, jnp.maximum(reached[:, -1] - 1, 0))
    place = jnp.sum(reached <= wanted[:, None], axis=1)
    return jnp.where(reached[:, -1] > 0, largest * 2 ** ((place + 1 - BINS) / 4), margin.mean())


def cheapest(x: jax.Array, centroids: jax.Array, prices: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The cheapest and the second cheapest cluster of each row, int32 [I], and how much more that costs, f32 [I]."""
    k = len(centroids)
    centre = centroids.mean(0)
    moved = centroids - centre
    offsets = (jnp.sum(moved * moved, axis=-1) + prices)[:, None]
    number = jnp.arange(k, dtype=jnp.int32)[:, None]

    def of_rows(rows):
        costs = (-2 * moved) @ (rows - centre).T + offsets
        least = costs.min(0)
        first = jnp.minimum(jnp.where(costs == least, number, k).min(0), k - 1)
        others = jnp.where(number == first, jnp.inf, costs)
        next_least = others.min(0)
        second = jnp.minimum(jnp.where(others == next_least, number, k).min(0), k - 1)
        return first, second, next_least - least

    return by_chunk(of_rows, x, chunk_rows(k))


def assign_within(x: np.ndarray | jax.Array, centroids: jax.Array, prices: jax.Array, slack: float) -> np.ndarray:
    """Codes int32 [I] of rows x f32 [I, D] whose cluster sizes are strictly within the bounds.

    Prices are first fitted to these rows. Then each cluster above the upper bound gives its surplus rows, those of
    highest cost first, to the cheapest cluster with room, and each cluster below the lower bound takes the rows whose
    cost rises least.
    """
    k = len(centroids)
    least, most = bounds(len(x), k, slack)
    prices, codes = _find_prices(jnp.asarray(x), centroids, prices, slack)
    x, centroids, prices, codes = np.asarray(x), np.asarray(centroids), np.asarray(prices), np.array(codes)
    counts = np.bincount(codes, minlength=k)
    for cluster in np.flatnonzero(counts > most):
        _give_away(x, centroids, prices, codes, counts, cluster, most)
    for cluster in np.flatnonzero(counts < least):
        _take_in(x, centroids, prices, codes, counts, cluster, least)
    return codes


@partial(jax.jit, static_argnames="slack")
def _find_prices(x, centroids, prices, slack):
    prices = share(x, centroids, prices, _spread(x) * COLD / 4, slack, SHARES)
    return find_prices(x, centroids, prices, slack, rounds=48)


def _give_away(x, centroids, prices, codes, counts, cluster: int, most: int) -> None:
    """Moves the rows beyond `most` of a cluster to clusters with room; changes codes and counts."""
    rows = np.flatnonzero(codes == cluster)
    costs = _costs(x[rows], centroids, prices)
    own = costs[:, cluster].copy()
    while counts[cluster] > most:
        costs[:, counts >= most] = np.inf
        target = costs.argmin(1)
        loss = costs[np.arange(len(rows)), target] - own
        room = most - counts
        for row in np.argsort(loss, kind="stable")[: counts[cluster] - most]:
            if room[target[row]] > 0:
                room[target[row]] -= 1
                codes[rows[row]] = target[row]
                counts[cluster] -= 1
                counts[target[row]] += 1
        stay = codes[rows] == cluster
        rows, costs, own = rows[stay], costs[stay], own[stay]


def _take_in(x, centroids, prices, codes, counts, cluster: int, least: int) -> None:
    """Moves rows of clusters that can spare them into a cluster with fewer than `least`; changes codes and counts."""
    gain = _loss_of_moving(x, centroids, prices, codes, cluster)
    for row in np.argsort(gain, kind="stable"):
        if counts[cluster] >= least:
            return
        if codes[row] != cluster and counts[codes[row]] > least:
            counts[codes[row]] -= 1
            counts[cluster] += 1
            codes[row] = cluster


def _costs(x: np.ndarray, centroids: np.ndarray, prices: np.ndarray) -> np.ndarray:
    centre = centroids.mean(0)  # Far from zero, the products lose the digits that distinguish clusters.
    moved = centroids - centre
    return np.sum(moved * moved, axis=-1) + prices - 2 * (x - centre) @ moved.T


def _loss_of_moving(x, centroids, prices, codes, cluster: int) -> np.ndarray:
    """Cost of each row in a cluster minus that in its own, f32 [I]."""
    own = np.sum((x - centroids[codes]) ** 2, axis=-1) + prices[codes]
    return np.sum((x - centroids[cluster]) ** 2, axis=-1) + prices[cluster] - own
