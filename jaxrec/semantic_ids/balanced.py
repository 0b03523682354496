"""Balanced k-means: clusters of about equal size, at the scale of a catalogue.

Each cluster has a price, added to the squared distance to its centroid, and every row takes the cheapest. Prices of
clusters that are too full rise and those of clusters that are too empty fall until the sizes are within a bound; these
prices are the dual variables of the transport problem, so the assignment is the cheapest one with its sizes. Centroids
and prices take turns, as in Lloyd's algorithm. A new row is encoded by the same prices, by itself.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.semantic_ids.kmeans import by_chunk, chunk_rows, drawn, take
from jaxrec.semantic_ids.rows import Rows, place


@dataclass(frozen=True)
class BalancedConfig:
    """How clusters are balanced."""

    slack: float = 0.1
    """No cluster is larger or smaller than the mean size by more than this share (and less than one row)."""
    iterations: int = 20
    """How often the centroids are moved."""
    rounds: int = 10
    """The most changes of the prices between two moves of the centroids; four times as many after the last."""
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
    # In random order, so that the first k rows are where the centroids start: dense regions get many, as balance asks.
    sample = take(rows, drawn(key, len(rows), min(len(rows), max(config.rows, 128 * k))))
    return _alternate(sample, sample[:k], config)


@partial(jax.jit, static_argnames="config")
def _alternate(x: jax.Array, centroids: jax.Array, config: BalancedConfig) -> Balanced:
    """Prices and centroids in turn; prices aim at half of the slack, since other rows will not fall quite the same."""

    def iterate(_, state):
        centroids, prices = state
        prices, codes = find_prices(x, centroids, prices, config.slack / 2, config.rounds)
        counts = jax.ops.segment_sum(jnp.ones(len(x)), codes, len(centroids))
        sums = jax.ops.segment_sum(x, codes, len(centroids))
        return jnp.where((counts == 0)[:, None], centroids, sums / jnp.maximum(counts, 1)[:, None]), prices

    state = (centroids, jnp.zeros(len(centroids)))
    centroids, prices = jax.lax.fori_loop(0, config.iterations, iterate, state)
    prices, _ = find_prices(x, centroids, prices, config.slack / 2, 4 * config.rounds)
    return Balanced(centroids, prices)


def bounds(rows: int, k: int, slack: float) -> tuple[int, int]:
    """The least and the greatest size of a cluster: the mean less and more the slack, rounded outwards."""
    mean = rows / k
    return int(np.floor(mean * (1 - slack))), int(np.ceil(mean * (1 + slack)))


def find_prices(
    x: jax.Array, centroids: jax.Array, prices: jax.Array, slack: float, rounds: int
) -> tuple[jax.Array, jax.Array]:
    """Prices f32 [K] under which the sizes are within the bounds, or as near as `rounds` changes bring them, with the
    codes int32 [I] under the best prices that were met.

    A row's margin is what the second cheapest cluster costs more than the cheapest. A cluster with e rows too many
    loses e of them when its price rises by the e-th smallest margin of its own rows; one with e too few gains e when
    its price falls by the e-th smallest margin of the rows that have it second. Neighbours move at the same time, so
    each goes a part of the way only, a smaller one whenever it went too far.
    """
    k = len(centroids)
    target = len(x) / k
    least, most = bounds(len(x), k, slack)

    def measure(prices):
        codes, second, margin = cheapest(x, centroids, prices)
        counts = jax.ops.segment_sum(jnp.ones(len(x), jnp.int32), codes, k)
        off = jnp.sum(jnp.maximum(counts - most, 0) + jnp.maximum(least - counts, 0))
        return {"codes": codes, "second": second, "margin": margin, "excess": counts - target, "off": off}

    def iterate(state):
        number, prices, rate, now, best = state
        excess = now["excess"]
        rise = smallest(now["margin"], now["codes"], excess, k)
        fall = smallest(now["margin"], now["second"], -excess, k)
        prices = prices + rate * jnp.where(excess > 0, rise, -fall)
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
    """The margin of the given rank f32 [K] (from 0, at most the last) among the rows of each group, f32 [K].

    A group without rows has no margin of its own and gets the mean of all.
    """
    sizes = jax.ops.segment_sum(jnp.ones(len(group), jnp.int32), group, k)
    first = jnp.cumsum(sizes) - sizes
    place = first + jnp.clip(rank.astype(jnp.int32), 0, jnp.maximum(sizes - 1, 0))
    order = jnp.lexsort((margin, group))
    return jnp.where(sizes > 0, margin[order[jnp.minimum(place, len(group) - 1)]], margin.mean())


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
    """Codes int32 [I] of rows x f32 [I, D] whose sizes are within the bounds to the letter.

    Prices are first set anew for these rows; what is still too much in a cluster goes, dearest rows first, to the
    cheapest cluster with room, and a cluster with too few takes the rows that lose least.
    """
    x = jnp.asarray(x)
    k = len(centroids)
    least, most = bounds(len(x), k, slack)
    prices, codes = _find_prices(x, centroids, prices, slack)
    codes = np.array(codes)
    counts = np.bincount(codes, minlength=k)
    for cluster in np.flatnonzero(counts > most):
        _give_away(x, centroids, prices, codes, counts, cluster, most)
    for cluster in np.flatnonzero(counts < least):
        _take_in(x, centroids, prices, codes, counts, cluster, least)
    return codes


_find_prices = jax.jit(partial(find_prices, rounds=48), static_argnames="slack")


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
    gain = np.asarray(_loss_of_moving(x, centroids, prices, codes, cluster))
    for row in np.argsort(gain, kind="stable"):
        if counts[cluster] >= least:
            return
        if codes[row] != cluster and counts[codes[row]] > least:
            counts[codes[row]] -= 1
            counts[cluster] += 1
            codes[row] = cluster


def _costs(x: jax.Array, centroids: jax.Array, prices: jax.Array) -> np.ndarray:
    squares = jnp.sum(centroids * centroids, axis=-1) + prices
    return np.array(squares - 2 * x @ centroids.T)


@jax.jit
def _loss_of_moving(x, centroids, prices, codes, cluster):
    own = jnp.sum((x - centroids[codes]) ** 2, axis=-1) + prices[codes]
    return jnp.sum((x - centroids[cluster]) ** 2, axis=-1) + prices[cluster] - own
