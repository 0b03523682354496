"""Exact beam search over a trie of semantic IDs, jitted as one function with no host step inside.

Every level reads only the children of its beams: their log-probabilities are gathered (after normalising over the whole
codebook, so scores are the model's own), and one top-k over all of them chooses the next beams. The width grows from 1
with the number of prefixes, so it may exceed a codebook.

A second model may rescore candidates (`rescore`, RankGR §3.3.2): it gets the best candidates by the first model's
log-probability, and the beams are the best of these by its scores.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxrec.config import UserError
from jaxrec.decoding.filters import ItemFilter
from jaxrec.decoding.step import (
    Beams,
    Extend,
    Grid,
    as_filter,
    children_grid,
    choose,
    extended,
    filled,
    free_grid,
    grown,
    reorder,
    root,
    top_free,
)
from jaxrec.decoding.top import capped, top, top_capped
from jaxrec.decoding.trie import Trie

__all__ = ["BeamResult", "Candidates", "Rescore", "beam_search", "expand_items", "reorder"]


@flax.struct.dataclass
class BeamResult:
    """The W best IDs of each of B requests, best first; ties by ID."""

    codes: jax.Array
    """int32 [B, W, M], -1 where not valid."""
    log_probs: jax.Array
    """float32 [B, W], the model's, falling unless `rescore` reorders; -inf where not valid."""
    scores: jax.Array
    """float32 [B, W], falling: the scores of `rescore`, without it log_probs; -inf where not valid."""
    valid: jax.Array
    """bool [B, W], True = an ID of the catalogue with an allowed item."""
    leaf: jax.Array
    """int32 [B, W], the ID's rank among the catalogue's sorted IDs; -1 where not valid."""
    nan: jax.Array
    """bool [B], the model or `rescore` gave NaN or +inf for this request, which then has no valid result; callers
    report it."""

    def invalid_rate(self) -> jax.Array:
        """float32 [B], the share of invalid IDs among those found; above 0 only if `constrained` is False."""
        found = self.log_probs > -jnp.inf
        return (found & ~self.valid).sum(1) / jnp.maximum(found.sum(1), 1)


@flax.struct.dataclass
class Candidates:
    """The input of `rescore`: C extended prefixes of each of B requests, in ID order."""

    codes: jax.Array
    """int32 [B, C, level + 1], -1 where dead."""
    nodes: jax.Array
    """int32 [B, C], the prefix's node in the trie's `level`, -1 where dead or not in the catalogue."""
    parents: jax.Array
    """int32 [B, C], the parent beam of each: the index of its state in the cache."""
    log_probs: jax.Array
    """float32 [B, C], the model's, summed over the prefix; -inf where dead."""
    parent_log_probs: jax.Array
    """float32 [B, C], the model's for the prefix one code shorter; 0 at level 0."""
    parent_scores: jax.Array
    """float32 [B, C], the score by `rescore` of the prefix one code shorter; 0 at level 0."""
    level: int = flax.struct.field(pytree_node=False)
    """The level of the last code, from 0."""


Rescore = Callable[[Candidates, Any], jax.Array]


def beam_search(
    extend: Extend,
    cache: Any,
    trie: Trie,
    *,
    batch: int,
    beam_width: int | tuple[int, ...],
    allowed: jax.Array | ItemFilter | None = None,
    constrained: bool = True,
    rescore: Rescore | None = None,
    candidates: int | tuple[int, ...] | None = None,
    per_prefix: int | None = None,
) -> BeamResult:
    """The `beam_width` IDs of highest summed log-probability; exact unless a prefix of one of them leaves the beam.

    Args:
        extend: `(tokens int32 [B, W] | None, cache, level) -> (log_probs [B, W, K], cache)`, normalised over the
            level's codebook (`jax.nn.log_softmax`). Logits would be summed unnormalised and compare prefixes wrongly;
            under `jax.jit`, where values are unknown, this is not checked. At level 0 tokens is None and W = 1. Beams
            without a valid prefix get token 0.
        cache: pytree of arrays [B, W, ...], at first [B, 1, ...]; re-ordered as beams are chosen.
        batch: B.
        beam_width: W, or one width for each level; the last is the number of results.
        allowed: bool [B, I], True = this request may return this item, or a filter built from it. None allows all.
        constrained: False searches all code sequences and uses the trie only to mark the valid ones. It measures how
            often the model leaves the catalogue: codes and log_probs of invalid IDs are kept, with valid False.
        rescore: `(candidates, cache) -> scores [B, C]`, by which beams are chosen and results ordered; the cache is
            that of `extend`, before it is re-ordered. RankGR Eq. 18 is `parent_scores + log(rank score)`. -inf drops
            a candidate; candidates excluded by the trie stay excluded.
        candidates: lambda, the number of candidates of highest log-probability that are rescored, or one number for
            each level (RankGR Eq. 12); at least the width, which is the default.
        per_prefix: the most beams at every level, and results, with the same first code.

    An ID of probability zero (log-probability -inf) is never valid.

    Raises:
        UserError: widths below 1 or not one a level, `candidates` below them or without `rescore`, `allowed`, log_probs
            or scores of a wrong shape; outside `jax.jit` also logits instead of log-probabilities.
    """
    if trie.eos is not None:
        raise UserError("the trie holds texts: use text_search, which knows where they end.")
    widths = _widths("beam_width", beam_width, trie.levels)
    pools = _pools(candidates, rescore, widths)
    if per_prefix is not None and per_prefix < 1:
        raise UserError(f"per_prefix is {per_prefix}: allow at least one result a first code.")
    item_filter = as_filter(trie, allowed, batch)
    beams = root(trie, batch)
    scores = beams.log_probs
    for level, (width, pool) in enumerate(zip(widths, pools, strict=True)):
        last = level == trie.levels - 1
        log_probs, cache = extended(extend, beams, cache, level, trie.codebook_sizes[level])
        above = beams.log_probs
        in_order = not last or rescore is not None
        cap = per_prefix if level else None
        if cap is not None and rescore is None:
            if constrained:
                grid = children_grid(log_probs, beams, trie, level, item_filter)
            else:
                grid = free_grid(log_probs, beams, trie, level)
            beams, parents = _choose_capped(grid, beams, trie, level, width, cap, in_order=in_order)
        elif constrained:
            beams, parents = choose(log_probs, beams, trie, level, pool, item_filter, in_order=in_order)
        else:
            beams, parents = _choose_freely(log_probs, beams, trie, level, pool, in_order=in_order)
        if rescore is None:
            scores = beams.log_probs
        else:
            beams, scores = _rescored(rescore, beams, parents, above, scores, cache, level)
            if cap is not None:
                scores = capped(scores, beams.codes[..., 0], cap)
            beams, parents, scores = _best(beams, parents, scores, width, in_order=not last)
        if not last:
            cache = reorder(cache, parents)
    return _result(beams, scores, trie, item_filter, widths[-1], constrained)


def expand_items(
    trie: Trie, result: BeamResult, *, k: int, allowed: jax.Array | ItemFilter | None = None
) -> tuple[jax.Array, jax.Array]:
    """The first k items of the valid IDs in beam order; items of one ID in the trie's order, with the ID's score.

    Returns (items int32 [B, k], -1 = none; scores float32 [B, k], -inf = none). `allowed` as in `beam_search`.

    Raises:
        UserError: k below 1, `allowed` of a wrong shape.
    """
    if k < 1:
        raise UserError(f"k is {k}: ask for at least one item.")
    first, end = trie.leaf_ranges(jnp.maximum(result.leaf, 0))
    item_filter = as_filter(trie, allowed, result.leaf.shape[0])
    if item_filter is not None:
        # Ranks among the allowed items instead of positions among all.
        first, end = item_filter.count_before(first), item_filter.count_before(end)
    counts = jnp.where(result.valid, end - first, 0)
    ends = jnp.cumsum(counts, axis=1)
    wanted = jnp.arange(k)
    beam = jax.vmap(lambda row: jnp.searchsorted(row, wanted, side="right"))(ends)
    found = wanted < ends[:, -1:]
    beam = jnp.where(found, beam, 0)
    position = jnp.take_along_axis(first - (ends - counts), beam, axis=1) + wanted
    if item_filter is not None:
        position = item_filter.select(position)
    items = jnp.where(found, trie.items.at[position].get(mode="clip"), -1)
    return items, jnp.where(found, jnp.take_along_axis(result.scores, beam, axis=1), -jnp.inf)


def _widths(name: str, given: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    widths = (given,) * levels if isinstance(given, int) else tuple(given)
    if len(widths) != levels or min(widths) < 1:
        raise UserError(f"{name} is {given}: give a width of at least 1, or one for each of {levels} levels.")
    return widths


def _pools(candidates, rescore: Rescore | None, widths: tuple[int, ...]) -> tuple[int, ...]:
    if candidates is None:
        return widths
    if rescore is None:
        raise UserError(f"candidates is {candidates}, but without `rescore` nothing is rescored: leave it out.")
    pools = _widths("candidates", candidates, len(widths))
    for level, (pool, width) in enumerate(zip(pools, widths, strict=True)):
        if pool < width:
            raise UserError(
                f"candidates is {pool} at level {level}, whose beam is {width} wide: give at least {width}."
            )
    return pools


def _choose_freely(
    log_probs: jax.Array, beams: Beams, trie: Trie, level: int, width: int, *, in_order: bool
) -> tuple[Beams, jax.Array]:
    """As `choose` among all codes, in the catalogue or not; a filter is applied to the finished IDs."""
    best, index, bad = top_free(log_probs, beams, width)
    grid = replace(free_grid(log_probs, beams, trie, level), bad=bad)
    return grown(beams, trie, level, grid, best, index, in_order=in_order)


def _choose_capped(
    grid: Grid, beams: Beams, trie: Trie, level: int, width: int, cap: int, *, in_order: bool
) -> tuple[Beams, jax.Array]:
    """The best `width` of the grid, at most `cap` with the same first code."""
    scores = beams.log_probs[..., None] + grid.log_probs
    best, index = top_capped(scores, beams.codes[..., 0], cap, width)
    return grown(beams, trie, level, grid, best, index, in_order=in_order)


def _rescored(
    rescore: Rescore, beams: Beams, parents: jax.Array, above: jax.Array, scores: jax.Array, cache: Any, level: int
) -> tuple[Beams, jax.Array]:
    """The candidates and their new scores, -inf where they are dead; `above`, `scores`: of the beams before."""
    parent_scores = jnp.take_along_axis(scores, parents, axis=1)
    parent_log_probs = jnp.take_along_axis(above, parents, axis=1)
    asked = Candidates(beams.codes, beams.nodes, parents, beams.log_probs, parent_log_probs, parent_scores, level)
    given = rescore(asked, cache)
    if given.shape != parents.shape:
        raise UserError(f"rescore gave scores {given.shape} at level {level}: expected [B, C] = {parents.shape}.")
    alive = beams.log_probs > -jnp.inf
    sound = given < jnp.inf
    beams = beams.replace(bad=beams.bad | (alive & ~sound).any(1))
    return beams, jnp.where(alive & sound, given.astype(jnp.float32), -jnp.inf)


def _best(
    beams: Beams, parents: jax.Array, scores: jax.Array, width: int, *, in_order: bool
) -> tuple[Beams, jax.Array, jax.Array]:
    """The `width` beams of highest score, of beams in node order; best first unless `in_order`."""
    scores, index = top(scores, min(width, scores.shape[1]))
    if in_order:
        place = jax.lax.broadcasted_iota(jnp.int32, index.shape, 1)
        index, place = jax.lax.sort((index, place), dimension=1, num_keys=1)
        scores = jnp.take_along_axis(scores, place, axis=1)

    def take(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, index, axis=1)

    alive = scores > -jnp.inf
    beams = Beams(
        codes=jnp.where(alive[..., None], jnp.take_along_axis(beams.codes, index[..., None], axis=1), -1),
        log_probs=jnp.where(alive, take(beams.log_probs), -jnp.inf),
        nodes=jnp.where(alive, take(beams.nodes), -1),
        ends=take(beams.ends),
        bad=beams.bad,
    )
    return beams, take(parents), scores


def _result(
    beams: Beams, scores: jax.Array, trie: Trie, item_filter: ItemFilter | None, width: int, constrained: bool
) -> BeamResult:
    """Marks valid IDs, and pads to `width` if fewer IDs are possible."""
    shown = (beams.log_probs > -jnp.inf) & ~beams.bad[:, None]
    valid = shown & (beams.nodes >= 0)
    if item_filter is not None and not constrained:
        first, end = trie.leaf_ranges(jnp.maximum(beams.nodes, 0))
        valid &= item_filter.count_before(end) > item_filter.count_before(first)
    return BeamResult(
        codes=filled(beams.codes, shown, width, -1),
        log_probs=filled(beams.log_probs, shown, width, -jnp.inf),
        scores=filled(scores, shown, width, -jnp.inf),
        valid=filled(valid, shown, width, False),
        leaf=filled(beams.nodes, valid, width, -1),
        nan=beams.bad,
    )
