"""How large a model, its IDs and its training should be for a log: one function of three counts.

    quantity            grows with    from         to        rule
    codes in a level    items         4            2,048     the power of two nearest to 1.25 sqrt(items), two levels
    digits of FSQ       items         3            12        one more than the bits of a level
    width               purchases     64           256       64 at 10,000, 128 at 100,000, 256 at 1,000,000
    experts             purchases     1            8         dense below 20,000, 4 below 200,000
    batch               purchases     16           128       the power of two nearest to sqrt(purchases) / 2.5
    steps               purchases     60           20,000    about two passes: 5 sqrt(purchases) from 1,600 to 100,000
    dropout             purchases     0.3          0         falls with the logarithm, 0 from 1,000,000 on
    history             per user      32           128       four times the purchases of a user, a power of two

A small log is learned by heart after few passes: the model is small, drops out much, and has no vector for an item that
few people bought. Validation ten times a training keeps the best state.
"""

import math
from dataclasses import dataclass

from jaxrec.config import UserError


@dataclass(frozen=True)
class Sizes:
    """The sizes for a log; see the module's table."""

    codes: int
    """Codes K in each of two levels of residual k-means."""
    digits: int
    """Binary digits of the last level (FSQ)."""
    width: int
    """Model width D."""
    heads: int
    """Attention heads N, of width 32 each."""
    experts: int
    """Experts E of a layer; 1 for a dense one."""
    queries: int
    """Learned queries Q of a history's Query-Former."""
    batch: int
    """Contexts B of a step."""
    steps: int
    """Training steps."""
    warmup: int
    """Steps of them in which the learning rate rises."""
    dropout: float
    """Dropout of the decoder's blocks."""
    context_dropout: float
    """Dropout of the items of a history."""
    history: int
    """Most recent purchases that are read; twice and four times as many of the two weaker behaviors."""
    buckets: tuple[int, ...]
    """Lengths that histories are padded to."""
    item_vectors: bool
    """Whether every item has a vector of its own beside its codes and attributes."""


def sizes_of(items: int, users: int, purchases: int) -> Sizes:
    """The sizes for a log.

    Args:
      items: items of the catalogue.
      users: users with an event.
      purchases: events of the target behaviors in training.

    Raises:
      UserError: a count is too small to learn from.
    """
    for what, count, least in (("items", items, 16), ("users", users, 1), ("purchases to train on", purchases, 10)):
        if count < least:
            raise UserError(
                f"the log has {count:,} {what}, and at least {least} are needed: give more data, or predict a more "
                "frequent behavior with --data.target-behaviors"
            )
    bits = _between(round(math.log2(1.25 * math.sqrt(items))), 2, 11)
    magnitude = math.log10(purchases)
    width = 32 * round(_between(2 ** (magnitude + 2), 64, 256) / 32)
    contexts = _between(math.sqrt(purchases) / 2.5, 16, 128)
    steps = 10 * math.ceil(_between(2 * purchases / contexts, 60, 20_000) / 10)
    history = 2 ** round(math.log2(_between(4 * purchases / users, 32, 128)))
    dropout = round(_between(0.1 * (6 - magnitude), 0.0, 0.3), 2)
    return Sizes(
        codes=2**bits,
        digits=_between(bits + 1, 3, 12),
        width=width,
        heads=width // 32,
        experts=1 if purchases < 20_000 else 4 if purchases < 200_000 else 8,
        queries=8 if purchases < 20_000 else 16,
        batch=2 ** round(math.log2(contexts)),
        steps=steps,
        warmup=max(5, steps // 10),
        dropout=dropout,
        context_dropout=round(dropout / 2, 2),
        history=history,
        buckets=(history, 2 * history, 4 * history),
        item_vectors=purchases >= 20 * items,
    )


def _between(value, low, high):
    return max(low, min(value, high))
