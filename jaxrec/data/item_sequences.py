"""A user's items in order, as fixed-shape arrays: for models that read one sequence (NumPy; no model here).

    record  a b c d e      buckets (2, 4)

    cut before d      item [a b c -]  mask [1 1 1 0]      the past of one target: `ItemSequenceConfig.cut`
    whole             item [a b c d]  target [b c d e]    every item after the first is a target: `whole`
                                      before [1 2 3 4]    the number of items that each target sees

Only events of the target behaviors are read. Sequences are aligned left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxrec.data.padding import bucket, check_buckets, padded

NOBODY = -1
"""The user of a history without a known user."""


@dataclass(frozen=True)
class ItemSequenceConfig:
    """Length buckets of the sequences that a model reads."""

    buckets: tuple[int, ...] = (4, 8, 12, 20)
    """lengths that sequences are padded to; a batch holds sequences of one bucket; the last is also the longest
    sequence that is read (TIGER: 20)"""

    def __post_init__(self):
        check_buckets(self.buckets)

    def cut(self, record: dict, session: int, *, behaviors: int, wanted: np.ndarray) -> dict[str, np.ndarray]:
        """The last items before `session`: item int32 [S], mask bool [S], user int32 [] (NOBODY where unknown).

        S is `bucket_of` the cut; `wanted` bool [behaviors] marks the target behaviors.
        """
        size, stop = self.bucket_of(record, session), int(np.searchsorted(record["session"], session))
        items = record["item"][:stop][wanted[record["behavior"][:stop]]][-size:]
        return {"item": padded(items, size), "mask": np.arange(size) < len(items), "user": user_of(record)}

    def bucket_of(self, record: dict, session: int) -> int:
        """The length that a cut is padded to: the smallest bucket that holds all events before `session`."""
        return bucket(self.buckets, int(np.searchsorted(record["session"], session)))


def following(record: dict, session: int, count: int, *, wanted: np.ndarray) -> dict[str, np.ndarray]:
    """The first `count` items from `session` on: target int32 [L], and target_rank int32 [L], -1 where there is none.

    The rank of the items of `session` is 0, that of the items of the next session with targets 1, and so on.
    """
    start = int(np.searchsorted(record["session"], session))
    keep = wanted[record["behavior"][start:]]
    items, sessions = record["item"][start:][keep][:count], record["session"][start:][keep][:count]
    rank = np.full(count, -1, np.int32)
    rank[: len(items)] = np.unique(sessions, return_inverse=True)[1]
    return {"target": padded(items, count), "target_rank": rank}


def overlapping_windows(counts: np.ndarray, config: ItemSequenceConfig) -> np.ndarray:
    """The windows that cover whole sequences of `counts` [n] items: int32 [m, 2] of (sequence, end of the window).

    A window holds one item more than the last bucket. Longer sequences take several windows that overlap by half. Each
    target is in one window alone, with at least half a window before it.
    """
    size = config.buckets[-1]
    more = np.maximum(-(-(counts - size - 1) // _step(size)), 0)
    sequence = np.repeat(np.arange(len(counts)), np.where(counts > 1, 1 + more, 0))
    place = np.arange(len(sequence)) - np.searchsorted(sequence, sequence)
    ends = np.minimum(counts[sequence], size + 1 + place * _step(size))
    return np.stack([sequence, ends], axis=1).astype(np.int32)


def whole(record: dict, end: int, config: ItemSequenceConfig, *, wanted: np.ndarray) -> dict[str, np.ndarray]:
    """The window of a record that ends before its item number `end`, for models that read it once for all targets.

    Returns item int32 [S], mask bool [S], user int32 []; target int32 [S], before int32 [S]: how many of the items came
    in earlier sessions than the target; target_rank int32 [S]: 0, or -1 where there is no target. Items whose
    `before` is 0 are no targets.
    """
    keep = np.flatnonzero(wanted[record["behavior"]])[:end]
    items, sessions = record["item"][keep], record["session"][keep]
    limit = config.buckets[-1]
    start = max(end - limit - 1, 0)
    first = 1 if end <= limit + 1 else limit + 1 + (end - limit - 2) // _step(limit) * _step(limit)
    size = bucket(config.buckets, end - 1 - start)
    before = np.searchsorted(sessions, sessions[first:]) - start
    rank = np.full(size, -1, np.int32)
    rank[: end - first] = np.where(before > 0, 0, -1)
    return {
        "item": padded(items[start : end - 1], size),
        "mask": np.arange(size) < end - 1 - start,
        "user": user_of(record),
        "target": padded(items[first:], size),
        "before": padded(before, size),
        "target_rank": rank,
    }


def counts_of(records: Sequence[dict], wanted: np.ndarray) -> np.ndarray:
    """Items of the target behaviors in each record: int64 [n]."""
    return np.array([int(wanted[record["behavior"]].sum()) for record in records], np.int64)


def user_of(record: dict) -> np.ndarray:
    """The user of a record or history as int32 []."""
    return np.int32(record.get("user", NOBODY))


def _step(size: int) -> int:
    return max(size // 2, 1)
