"""One vocabulary for words and for the codes of semantic IDs, of which every level has a slice of its own.

A model that was made for text has one embedding table. A semantic ID's level m takes the tokens [offset, offset + size)
of it, so the same code is another token at every level. Targets and beams speak of codes 0 ... size - 1, contexts of
tokens. Without levels, codes are tokens and every step is over the whole vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrec.config import UserError
from jaxrec.models.contract import pick
from jaxrec.models.prior import Prior
from jaxrec.nn.layers import project

Levels = tuple[tuple[int, int], ...]


@struct.dataclass
class ContextTokens:
    """Contexts of tokens: tokens int32 [B, S] with mask bool [B, S], True = a token.

    Tokens may be [B, S, M] as well: a position is then the sum of its tokens' embeddings, -1 standing for none.
    prior: a distribution over the targets' IDs that is added to the decoder's logits, or None.
    soft, soft_mask: [B, Q, D] and bool [B, Q], embeddings of positions in front of the tokens that are no tokens of the
      vocabulary, or None; in front, so that padding behind the tokens does not move them.
    """

    tokens: jax.Array
    mask: jax.Array
    prior: Prior | None = None
    soft: jax.Array | None = None
    soft_mask: jax.Array | None = None

    @property
    def seen(self) -> jax.Array:
        """bool [B, Q + S]: the mask of all positions."""
        return self.mask if self.soft is None else jnp.concatenate([self.soft_mask, self.mask], axis=1)

    def vectors(self, embed: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """[B, Q + S, D] of all positions; `embed` gives the embeddings of tokens."""
        tokens = self.tokens
        if tokens.ndim == 2:
            x = embed(jnp.maximum(tokens, 0))
        else:  # one after the other: the embeddings [B, S, M, D] of all tokens are never made
            each = (tokens[..., place] for place in range(tokens.shape[-1]))
            x = sum(jnp.where(token[..., None] >= 0, embed(jnp.maximum(token, 0)), 0.0) for token in each)
        return x if self.soft is None else jnp.concatenate([self.soft.astype(x.dtype), x], axis=1)


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
    table: jax.Array,
    state: jax.Array,
    level: int,
    levels: Levels | None,
    restrict: bool,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Logits float32 [..., K] of a level's codes from states [..., D], and the log of their normaliser [...].

    `table` [V, D] is the head, with a bias [V] or none. The normaliser is over the level's slice when `restrict`, else
    over the vocabulary.
    """
    table, state = table.astype(jnp.float32), state.astype(jnp.float32)

    def logits_of(tokens: slice) -> jax.Array:
        logits = project(state, table[tokens].T)
        return logits if bias is None else logits + bias[tokens]

    if levels is None:
        logits = logits_of(slice(None))
        return logits, jax.nn.logsumexp(logits, axis=-1)
    if level >= len(levels):
        raise UserError(f"level {level} is asked for, but model.levels names {len(levels)}: give a level for each code")
    offset, size = levels[level]
    if restrict:
        logits = logits_of(slice(offset, offset + size))
        return logits, jax.nn.logsumexp(logits, axis=-1)
    logits = logits_of(slice(None))
    return logits[..., offset : offset + size], jax.nn.logsumexp(logits, axis=-1)


def level_log_probs(
    table: jax.Array,
    state: jax.Array,
    level: int,
    levels: Levels | None,
    restrict: bool,
    prior: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Log-probabilities float32 [..., K] of the level's codes; arguments as for `level_logits`.

    prior: float32 [..., K], added to the logits of a level that is normalised by itself (`restrict`).
    """
    logits, log_z = level_logits(table, state, level, levels, restrict, bias)
    if prior is None:
        return logits - log_z[..., None]
    return jax.nn.log_softmax(logits + prior, axis=-1)


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
    return pick(logits, tokens) - log_z


GROWN = "embed", "head"
"""the tables [V, D] that have a row for every token"""


def grow_vocabulary(config: Any, params: dict, more: int, key: jax.Array, spread: float = 0.1) -> tuple[Any, dict]:
    """The configuration and parameters of a model with `more` tokens behind its own, such as the codes of every level.

    Args:
      config: of an `EncoderDecoder` or a `Causal`.
      params: its parameters, as the loaders give them; left as they are.
      more: tokens, at least 0.
      key: of the new rows.
      spread: new rows of the embedding table and of an untied head are drawn around the mean of the old rows, with so
        many of their standard deviations in each column. A new token's logit is then close to the mean logit.

    A bias of the logits gets zeros. `config.levels` stays; it may now name the new tokens.
    """
    if more < 0:
        raise ValueError(f"more is {more}; give 0 or more tokens")
    grown = dict(params)
    for name, each in zip(GROWN, jax.random.split(key, len(GROWN)), strict=True):
        if name in params:
            table = np.asarray(params[name]["table"])
            noise = np.asarray(jax.random.normal(each, (more, table.shape[1]), table.dtype))
            rows = table.mean(0) + spread * table.std(0) * noise
            grown[name] = params[name] | {"table": np.concatenate([table, rows.astype(table.dtype)])}
    if "logits_bias" in params:
        grown["logits_bias"] = np.pad(np.asarray(params["logits_bias"]), (0, more))
    return replace(config, vocabulary=config.vocabulary + more), grown
