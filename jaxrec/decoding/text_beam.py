"""Beam search over texts: token sequences of different lengths, those of the catalogue or any.

The steps are unrolled up to `max_length`, and every text that ends is kept: at each step the ends of all W beams are
set aside with their scores, and the W best unended prefixes continue. Ended and unended texts never compete for a beam,
so a short text with the best length-normalised score can't be lost to longer prefixes. The results are the best of all
ended texts.

The search stops early once no prefix can change the results: a log-probability only falls, so the best prefix bounds
all texts that begin with one of the beams. The steps behind that are skipped, each by a condition of its own.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import UserError
from jaxrec.decoding.filters import ItemFilter
from jaxrec.decoding.step import (
    Beams,
    Extend,
    Grid,
    as_filter,
    children_grid,
    extended,
    filled,
    find_child,
    free_grid,
    grown,
    has_allowed,
    reorder,
    root,
    summed,
    top_free,
)
from jaxrec.decoding.top import top
from jaxrec.decoding.trie import Trie
from jaxrec.decoding.typed import TypedText

ROUNDING = 1e-4
"""Sum of what the logarithms of probabilities may exceed 0 by, so that a text's may rise by it."""


@flax.struct.dataclass
class TextResult:
    """The W best texts of each of B requests, best first; ties by length, then by tokens."""

    tokens: jax.Array
    """int32 [B, W, M], the end token included, -1 after it and where there is no text."""
    lengths: jax.Array
    """int32 [B, W], number of tokens, the end token included; 0 where there is no text."""
    log_probs: jax.Array
    """float32 [B, W], of the whole text; -inf where there is none."""
    scores: jax.Array
    """float32 [B, W], log_probs / lengths ** length_penalty, falling; -inf where there is no text."""
    valid: jax.Array
    """bool [B, W], True = an ended text that is allowed and, with a trie, in the trie."""
    leaf: jax.Array
    """int32 [B, W], the text's rank among the trie's sorted texts; -1 if it is not one of them."""
    nan: jax.Array
    """bool [B], the model gave NaN or +inf for this request, which then has no valid result; callers report it."""


def text_search(
    extend: Extend,
    cache: Any,
    *,
    batch: int,
    beam_width: int,
    eos: int,
    max_length: int,
    length_penalty: float = 0.0,
    trie: Trie | None = None,
    allowed: jax.Array | ItemFilter | None = None,
    constrained: bool = True,
    results: int | None = None,
    typed: TypedText | None = None,
) -> TextResult:
    """The best texts by log-probability / length ** length_penalty, length in tokens with the end token (as in HF
    generate).

    Exact unless a prefix of one of them is not among the W best of its length. A text that has not ended after
    `max_length` tokens is no result.

    Args:
        extend: as in `beam_search`, over the vocabulary V at every level.
        cache: as in `beam_search`.
        batch: B.
        beam_width: W, prefixes that continue at every step.
        eos: the token that ends a text.
        max_length: M, tokens of the longest text with its end token.
        length_penalty: 0 ranks by log-probability, 1 by its mean over the tokens; above 0 favours long texts.
        trie: from `build_text_trie`; only its texts are found.
        allowed: as in `beam_search`, over the trie's items; needs the trie.
        constrained: False searches all texts and uses the trie only to mark the valid ones.
        results: number of returned texts, W by default.
        typed: only texts that begin with it are found, however their tokens are cut.

    Raises:
        UserError: a width, length or number of results below 1, a trie of IDs or with another end token, `allowed`
            without a trie, log_probs of a wrong shape.
    """
    results = beam_width if results is None else results
    for name, value in (("beam_width", beam_width), ("max_length", max_length), ("results", results)):
        if value < 1:
            raise UserError(f"{name} is {value}: give at least 1.")
    if trie is not None and trie.eos != eos:
        raise UserError(f"the trie's texts end in {trie.eos}, the search's in {eos}: build it with build_text_trie.")
    if trie is None and allowed is not None:
        raise UserError("`allowed` names items of a trie: give the trie too.")
    if trie is not None and constrained:
        max_length = min(max_length, trie.levels)
    item_filter = None if trie is None else as_filter(trie, allowed, batch)
    search = _Search(extend, eos, beam_width, max_length, trie, constrained, item_filter, typed)
    penalty = np.arange(1, max_length + 1, dtype=np.float32) ** np.float32(length_penalty)
    state = _State(root(trie, batch), cache, None if typed is None else typed.begun())
    best, ended = jnp.full((batch, results), -jnp.inf), []
    for level in range(max_length):
        state, ends = search.step(state, level) if level == 0 else search.step_unless_done(state, level, best, penalty)
        ended.append(ends)
        if 0 < level + 1 < max_length:
            best, _ = top(jnp.concatenate([best, ends.log_probs / penalty[level]], axis=1), results)
    return _best_texts(ended, state.beams.bad, trie, results, penalty)


@flax.struct.dataclass
class _State:
    """What one step of the search hands to the next."""

    beams: Beams
    cache: Any
    written: jax.Array | None  # int32 [B, W], bytes of what was typed that each beam has written


@dataclass(frozen=True)
class _Search:
    """The steps of a search; fields as the arguments of `text_search`."""

    extend: Extend
    eos: int
    beam_width: int
    max_length: int
    trie: Trie | None
    constrained: bool
    item_filter: ItemFilter | None
    typed: TypedText | None

    def step(self, state: _State, level: int) -> tuple[_State, "_Ended"]:
        """One more token for every beam, and the texts that end in it; in the last step no prefix continues."""
        trie, beams = self.trie, state.beams
        known = trie if trie is not None and level < trie.levels else None
        size = None if trie is None else trie.codebook_sizes[0]
        log_probs, cache = extended(self.extend, beams, state.cache, level, size)
        if trie is not None and self.constrained:
            grid, end, best, index = self._of_trie(log_probs, beams, state.written, level)
        else:
            grid, end, best, index = self._of_all(log_probs, beams, state.written, known, level)
        ends = _ends(beams, end, known, level, self.eos, self.item_filter, self.constrained)
        if level == self.max_length - 1:
            return _State(beams.replace(bad=beams.bad | grid.bad), None, None), ends
        beams, parents = grown(beams, known, level, grid, best, index, in_order=True)
        written = state.written
        if self.typed is not None:
            written = self.typed.after(jnp.take_along_axis(written, parents, axis=1), beams.tokens)
        return _State(beams, reorder(cache, parents), written), ends

    def _of_trie(
        self, log_probs: jax.Array, beams: Beams, written: jax.Array | None, level: int
    ) -> tuple[Grid, jax.Array, jax.Array, jax.Array]:
        """The children of the beams, the log-probability [B, W] of the end after each, and the best of the others."""
        grid = children_grid(log_probs, beams, self.trie, level, self.item_filter)
        if self.typed is not None:
            grid = grid.where(self.typed.may_follow(written, grid.tokens))
        is_end = grid.tokens == self.eos
        end = jnp.where(is_end, grid.log_probs, -jnp.inf).max(-1)  # at most one child of a beam is the end token
        going_on = summed(grid.where(~is_end), beams)
        return grid, end, *top(going_on, min(self.beam_width, going_on.shape[1]))

    def _of_all(
        self, log_probs: jax.Array, beams: Beams, written: jax.Array | None, trie: Trie | None, level: int
    ) -> tuple[Grid, jax.Array, jax.Array, jax.Array]:
        """The same of all tokens."""
        if self.typed is not None:
            log_probs = jnp.where(self.typed.may_follow(written, None), log_probs, -jnp.inf)
        end = log_probs[..., self.eos]
        going_on = jnp.where(jnp.arange(log_probs.shape[2]) == self.eos, -jnp.inf, log_probs)
        best, index, bad = top_free(going_on, beams, self.beam_width)
        sound = end < jnp.inf
        bad |= ((beams.log_probs > -jnp.inf) & ~sound).any(1)
        grid = replace(free_grid(log_probs, beams, trie, level), bad=bad)
        return grid, jnp.where(sound, end, -jnp.inf), best, index

    def step_unless_done(
        self, state: _State, level: int, best: jax.Array, penalty: np.ndarray
    ) -> tuple[_State, "_Ended"]:
        """The same, but without a beam if no text that goes on can be among the `best` float32 [B, k], falling."""
        step = partial(self.step, level=level)
        bound = state.beams.log_probs.max(1) / penalty[level:].max()
        done = (bound == -jnp.inf) | (bound < best[:, -1] - ROUNDING)

        def skip(state: _State) -> tuple[_State, "_Ended"]:
            after, ends = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(step, state))
            dead = jnp.full(after.beams.log_probs.shape, -jnp.inf)
            beams = after.beams.replace(log_probs=dead, bad=state.beams.bad)
            return after.replace(beams=beams), ends.replace(log_probs=jnp.full(ends.log_probs.shape, -jnp.inf))

        return jax.lax.cond(done.all(), skip, step, state)


@flax.struct.dataclass
class _Ended:
    """Texts that end at one level, one a beam."""

    tokens: jax.Array  # int32 [B, W, level + 1]
    log_probs: jax.Array  # float32 [B, W], -inf = none
    valid: jax.Array  # bool [B, W]
    leaf: jax.Array  # int32 [B, W], -1 = not in the trie


def _ends(
    beams: Beams,
    end: jax.Array,
    trie: Trie | None,
    level: int,
    eos: int,
    item_filter: ItemFilter | None,
    constrained: bool,
) -> _Ended:
    """Each beam extended by the end token, whose log-probability is `end` float32 [B, W]."""
    total = beams.log_probs + end
    valid = total > -jnp.inf
    leaf = jnp.full(total.shape, -1, jnp.int32)
    if trie is not None:
        node = find_child(trie, level, beams.nodes, eos)
        leaf = jnp.searchsorted(trie.leaf_starts, trie.starts[level][jnp.maximum(node, 0)], side="right") - 1
        leaf = jnp.where(node >= 0, leaf, -1).astype(jnp.int32)
        if item_filter is not None and not constrained:
            own = jnp.broadcast_to(jnp.arange(node.shape[1], dtype=jnp.int32), node.shape)
            leaf = jnp.where(has_allowed(item_filter, trie, level, beams, own, node), leaf, -1)
    tokens = jnp.concatenate([beams.codes, jnp.full((*total.shape, 1), eos, jnp.int32)], axis=2)
    return _Ended(tokens, total, valid, leaf)


def _best_texts(
    ended: list[_Ended], bad: jax.Array, trie: Trie | None, results: int, penalty: np.ndarray
) -> TextResult:
    """The best of all ended texts; ties go to shorter ones, which were set aside earlier."""
    longest = len(ended)
    rows = [jnp.pad(e.tokens, ((0, 0), (0, 0), (0, longest - 1 - n)), constant_values=-1) for n, e in enumerate(ended)]
    tokens = jnp.concatenate(rows, axis=1)
    log_probs = jnp.concatenate([e.log_probs for e in ended], axis=1)
    leaf = jnp.concatenate([e.leaf for e in ended], axis=1)
    lengths = jnp.concatenate([jnp.full(e.leaf.shape[1], n + 1, jnp.int32) for n, e in enumerate(ended)])
    scores, index = top(log_probs / jnp.asarray(penalty)[lengths - 1], min(results, log_probs.shape[1]))
    found = (scores > -jnp.inf) & ~bad[:, None]

    def take(values: jax.Array, fill: float) -> jax.Array:
        at = index.reshape(*index.shape, *(1,) * (values.ndim - 2))
        return filled(jnp.take_along_axis(values, at, axis=1), found, results, fill)

    leaf = take(leaf, -1)
    return TextResult(
        tokens=take(tokens, -1),
        lengths=take(jnp.broadcast_to(lengths, log_probs.shape), 0),
        log_probs=take(log_probs, -jnp.inf),
        scores=filled(scores, found, results, -jnp.inf),
        valid=filled(found, found, results, False) & (True if trie is None else leaf >= 0),
        leaf=leaf,
        nan=bad,
    )
