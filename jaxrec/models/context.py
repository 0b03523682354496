"""What goes into a model and what `prefill` makes of it: plain pytrees of arrays."""

import jax
from flax import struct

from jaxrec.models.prior import Prior
from jaxrec.nn.attention import KeyValue


@struct.dataclass
class CatalogueArrays:
    """What the model knows of items: codes int32 [I, M], attributes int32 [I, A], embeddings float32 [I, d].

    `log_q` float32 [I] is the log-probability that an item is drawn as a target; `prior` is the distribution over IDs
    that the decoder starts from, or None.
    """

    codes: jax.Array
    attributes: jax.Array
    embeddings: jax.Array
    log_q: jax.Array
    prior: Prior | None = None


@struct.dataclass
class EventSequence:
    """Some of a user's events: item int32 [B, S], age int32 [B, S] (bucket), mask bool [B, S]."""

    item: jax.Array
    age: jax.Array
    mask: jax.Array


@struct.dataclass
class ContextFeatures:
    """A context, as arrays: history {behavior: EventSequence}, the distinct items of the past, and the moment.

    past: the distinct target items, the most recent first; habit float32 [B, S, 4]: how often, how long ago, ... each
    was taken (jaxrec/data/features.py); user float32 [B, 4]: how much is known of the user;
    period int32 [B]: the period of the prior at the moment of the context.
    """

    history: dict[str, EventSequence]
    past: EventSequence
    habit: jax.Array
    user: jax.Array
    period: jax.Array


@struct.dataclass
class Context:
    """A prefilled context. Never copied per target.

    cross, bos: per layer K/V [B, S, N, H] and [B, 1, N, H]; mask bool [B, S]; state [B, D] of BOS, from which the first
    level is predicted; habit_codes int32 [B, S, M], habit_weights float32 [B, S], share float32 [B]: the distribution
    over the past's distinct items, and its part in the mixture; prior: the catalogue's.
    """

    cross: tuple[KeyValue, ...]
    bos: tuple[KeyValue, ...]
    mask: jax.Array
    state: jax.Array
    habit_codes: jax.Array
    habit_weights: jax.Array
    share: jax.Array
    period: jax.Array
    prior: Prior | None
