"""One vocabulary for words and for the codes of semantic IDs, of which every level has a slice of its own.

A model that was made for text has one embedding table. A semantic ID's level m takes the tokens [offset, offset + size)
of it, so the same code is another token at every level. Targets and beams speak of codes 0 ... size - 1, contexts of
tokens. Without levels, codes are tokens and every step is over the whole vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrec.config import UserError
from jaxrec.nn.layers import project

Levels = tuple[tuple[int, int], ...]


def check_levels(levels: Levels | None, vocabulary: int) -> None:
    """Raises UserError when a level's slice isn't inside the vocabulary."""
    for level, (offset, size) in enumerate(levels or ()):
        if offset < 0 or size < 1 or offset + size > vocabulary:
            raise UserError(
                f"model.levels: level {level} takes the tokens {offset} ... {offset + size - 1}, but the vocabulary is "
                f"0 ... {vocabulary - 1}: give (offset, size) inside it, or a larger model.vocabulary"
            )


def to_tokens(codes: jax.Array, levels: Levels | None, first: int = 0) -> jax.Array:
    """Tokens of codes int32 [..., M], of which the first is of level `first`; as int32 [..., M]."""
    if levels is None:
        return codes
    wanted = levels[first : first + codes.shape[-1]]
    if len(wanted) < codes.shape[-1]:
        raise UserError(
            f"a target has {first + codes.shape[-1]} codes, but model.levels names {len(levels)} levels: give a level "
            "for each code"
        )
    return codes + jnp.array([offset for offset, _ in wanted], jnp.int32)


def level_logits(
    table: jax.Array, state: jax.Array, level: int, levels: Levels | None, restrict: bool
) -> tuple[jax.Array, jax.Array]:
    """Logits float32 [..., K] of a level's codes from states [..., D], and the log of their normaliser [...].

    `table` [V, D] is the head. The normaliser is over the level's slice when `restrict`, else over the vocabulary.
    """
    table, state = table.astype(jnp.float32), state.astype(jnp.float32)
    if levels is None:
        logits = project(state, table.T)
        return logits, jax.nn.logsumexp(logits, axis=-1)
    if level >= len(levels):
        raise UserError(f"level {level} is asked for, but model.levels names {len(levels)}: give a level for each code")
    offset, size = levels[level]
    if restrict:
        logits = project(state, table[offset : offset + size].T)
        return logits, jax.nn.logsumexp(logits, axis=-1)
    logits = project(state, table.T)
    return logits[..., offset : offset + size], jax.nn.logsumexp(logits, axis=-1)


def level_log_probs(
    table: jax.Array,
    state: jax.Array,
    level: int,
    levels: Levels | None,
    restrict: bool,
    prior: jax.Array | None = None,
) -> jax.Array:
    """Log-probabilities float32 [..., K] of the level's codes; arguments as for `level_logits`.

    prior: float32 [..., K], added to the logits of a level that is normalised by itself (`restrict`).
    """
    logits, log_z = _with_prior(level_logits(table, state, level, levels, restrict), prior)
    return logits - log_z[..., None]


def target_log_probs(
    table: jax.Array,
    first: jax.Array,
    states: jax.Array,
    targets: jax.Array,
    levels: Levels | None,
    restrict: bool,
    smoothing: float = 0.0,
    priors: Sequence[jax.Array] | None = None,
) -> jax.Array:
    """Log-probabilities float32 [B, L, M] of the codes of targets int32 [B, L, M].

    first [B, D] is the state that predicts the first code of every target, so its logits are made once, or [B, L, D]
    where each target has its own; states [B, L, M - 1, D] predict the others. With `smoothing` s the value of a code is
    (1 - s) log p + s times the mean log-probability of its level: what a loss with smoothed labels takes. priors: as
    for `level_log_probs`, float32 [B, L, K] of every level.
    """
    first = first[:, None] if first.ndim == 2 else first
    found = []
    for level in range(targets.shape[-1]):
        state = states[:, :, level - 1] if level else first
        prior = None if priors is None else priors[level]
        logits, log_z = _with_prior(level_logits(table, state, level, levels, restrict), prior)
        value = _pick(jnp.broadcast_to(logits, (*targets.shape[:2], logits.shape[-1])), targets[..., level])
        if smoothing:
            value = (1 - smoothing) * value + smoothing * logits.mean(-1)
        found.append(value - log_z)
    return jnp.stack(found, axis=-1)


def token_log_probs(
    table: jax.Array, states: jax.Array, tokens: jax.Array, levels: Levels | None, restrict: bool
) -> jax.Array:
    """Log-probabilities float32 [...] of tokens int32 [...] of a context, from the states [..., D] that predict them.

    When `restrict`, a token of a level's slice is normalised over the slice, any other over the whole vocabulary.
    """
    logits = project(states.astype(jnp.float32), table.astype(jnp.float32).T)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    for offset, size in (levels or ()) if restrict else ():
        inside = (tokens >= offset) & (tokens < offset + size)
        log_z = jnp.where(inside, jax.nn.logsumexp(logits[..., offset : offset + size], axis=-1), log_z)
    return _pick(logits, tokens) - log_z


def _with_prior(found: tuple[jax.Array, jax.Array], prior: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    if prior is None:
        return found
    logits = found[0] + prior
    return logits, jax.nn.logsumexp(logits, axis=-1)


def _pick(logits: jax.Array, codes: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
