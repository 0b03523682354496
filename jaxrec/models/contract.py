"""The contract of all models that score targets: three verbs with one signature, so that losses are written once.

    context          = model.prefill(inputs)                            read once, never copied per target
    scored           = model.score(context, targets)                    every token of targets int32 [B, L, M]
    log_probs, cache = model.extend(context, tokens, cache, level)      one more token for every beam

`inputs` is one pytree that each model defines. A token of a target sees the context and the earlier tokens of its own
target, and nothing else. Targets of unequal length are padded on the right to M tokens; padding changes no token before
it, and the loss masks it.

A model whose context can be cut gives contexts a method `at`: `context.at(last)` with last int32 [B, L] is a view of
the context in which target l sees the positions up to `last[b, l]` (for RankGR: the items). `score` and `extend` take
the view in the context's place, `extend` with W = L beams from the first level on. Nothing is copied.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from jaxrec.models.prior import Prior


@struct.dataclass
class Scored:
    """What `score` returns of targets int32 [B, L, M].

    log_probs: float32 [B, L, M], of every true token given the context and the tokens before it, with the prior and
      with the past's items mixed in where the model has them; their sum over M is pi of RankGR Eq. 5.
    mean_log_probs: float32 [B, L, M], the mean log-probability of all tokens of the level at that place, which a loss
      with smoothed labels takes. Where the past's items are mixed in it is still the decoder's own, so such models
      take no smoothed labels (`jaxrec.models.copying.check_labels`).
    states: [B, L, M, D], from which the tokens are predicted.
    end: [B, L, D], the state after the last token, in models that read whole targets (s_M of OneMall Eq. 7), else None.

    Under `jit`, fields that are not read cost nothing.
    """

    log_probs: jax.Array
    mean_log_probs: jax.Array
    states: jax.Array
    end: jax.Array | None = None


class TargetModel(Protocol):
    """A model with the three verbs, as seen from inside `apply` with a `method`."""

    def prefill(self, inputs: Any, train: bool = False) -> Any:
        """Read B contexts once. `inputs` holds all that the context is made of, a prior over the targets included."""
        ...

    def score(self, context: Any, targets: jax.Array, where: jax.Array | None = None, train: bool = False) -> Scored:
        """Score targets int32 [B, L, M] in parallel, teacher-forced.

        where bool [B, L]: the targets that exist. Models with experts keep all others out of them; no score depends on
        it.
        """
        ...

    def extend(self, context: Any, tokens: jax.Array | None, cache: Any, level: int) -> tuple[jax.Array, Any]:
        """One more token for every beam: tokens int32 [B, W] of level - 1 -> (log-probabilities [B, W, K], cache).

        At level 0 there are no tokens and no cache, and W is 1: all beams begin alike. Every leaf of the cache is
        [B, W, ...], so that a search can reorder beams. K is the number of tokens of the level.
        """
        ...


def score_targets(
    logits_of: Callable[[int, jax.Array], tuple[jax.Array, jax.Array]],
    first: jax.Array,
    rest: jax.Array,
    targets: jax.Array,
    prior: Prior | None = None,
    period: jax.Array | None = None,
) -> Scored:
    """What the `score` of every model comes to: `Scored` of targets int32 [B, L, M] from the states that predict them.

    Args:
      logits_of: (level, states [..., D]) -> (logits float32 [..., K], log of their normaliser [...]).
      first: [B, L, D], the state that predicts each target's first token, or [B, 1, D] where all targets share it; the
        first level's logits are then computed once.
      rest: [B, L, M - 1, D], the states that predict the other tokens.
      targets: int32 [B, L, M].
      prior: added to the logits of levels that are normalised by themselves.
      period: int32 [B], the prior's; the first by default.
    """
    priors = None if prior is None else prior.along(targets, period)
    log_probs, means = [], []
    for level in range(targets.shape[-1]):
        logits, log_z = logits_of(level, rest[:, :, level - 1] if level else first)
        if priors is not None:
            logits += priors[level]
            log_z = jax.nn.logsumexp(logits, axis=-1)
        every = jnp.broadcast_to(logits, (*targets.shape[:2], logits.shape[-1]))
        log_probs.append(pick(every, targets[..., level]) - log_z)
        means.append(jnp.broadcast_to(logits.mean(-1) - log_z, targets.shape[:2]))
    first = jnp.broadcast_to(first, (*targets.shape[:2], first.shape[-1]))
    states = jnp.concatenate([first[:, :, None], rest.astype(first.dtype)], axis=2)
    return Scored(jnp.stack(log_probs, axis=-1), jnp.stack(means, axis=-1), states)


def pick(values: jax.Array, tokens: jax.Array) -> jax.Array:
    """The values [...] of tokens int32 [...] among those of all tokens, [..., K]."""
    return jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]
