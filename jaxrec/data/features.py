"""A user's events as the fixed-shape arrays that a model reads (NumPy; no model here).

A record holds one user's events in order; a *cut* before a session turns the earlier part into a context and the
session into targets. Storage grows with events, not with cuts.
"""

from dataclasses import dataclass

import numpy as np

from jaxrec.config import UserError
from jaxrec.data.padding import bucket, padded

AGES = 24  # age buckets: half powers of two of days, up to 11 years
HABITS = 4  # numbers told of each item of the past, and of the user


@dataclass(frozen=True)
class FeatureConfig:
    """Lengths of the histories that a model reads, and the number of targets per context."""

    history_lengths: tuple[int, ...] = (500,)
    """most recent events of each behavior that the Query-Formers read (OneMall: 500), weakest behavior first; the last
    number holds for all stronger behaviors too"""
    past_length: int = 256
    """most recent distinct items of the past, for the uncompressed part and the habit head"""
    targets: int = 16
    """targets L per context"""
    target_sessions: int = 1
    """sessions after the cut whose items are targets in training; evaluation always takes the next one alone"""
    buckets: tuple[int, ...] = (128, 256, 500)
    """lengths that sequences are padded to; a batch holds contexts of one bucket"""

    def __post_init__(self):
        for name in ("history_lengths", "buckets"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise UserError(
                    f"configuration key 'features.{name}' is {getattr(self, name)}; give lengths of 1 or more"
                )

    def length(self, behavior: int) -> int:
        """The most events of a behavior that are read."""
        return self.history_lengths[min(behavior, len(self.history_lengths) - 1)]

    def cut(self, record: dict, session: int, *, behaviors: int, wanted: np.ndarray) -> dict[str, np.ndarray]:
        """As the function `cut`."""
        return cut(record, session, self, behaviors=behaviors, wanted=wanted)

    def bucket_of(self, record: dict, session: int) -> int:
        """As the function `bucket_of`."""
        return bucket_of(record, session, self)


def cut(record: dict, session: int, config: FeatureConfig, *, behaviors: int, wanted: np.ndarray) -> dict:
    """The context before `session` of a record, as arrays; `wanted` bool [behaviors] marks the target behaviors.

    Returns flat names (`history_0_item` int32 [S], ... `past_item`, `habit` float32 [S, 4], `user` float32 [4], `day`
    int32: of `asked_at`, counted from 1970) where S is the cut's bucket (`bucket_of`) or the sequence's own limit, if
    that is smaller.
    """
    stop = int(np.searchsorted(record["session"], session))
    size, now = bucket_of(record, session, config), asked_at(record, stop)
    out = {}
    for behavior in range(behaviors):
        length = min(size, config.length(behavior))
        index = np.flatnonzero(record["behavior"][:stop] == behavior)[-length:]
        out |= _sequence(f"history_{behavior}", record["item"][index], now - record["timestamp"][index], length)
    out |= _past(record, stop, wanted, now, min(size, config.past_length))
    return out | {"day": np.int32(now // 86400)}


def targets(record: dict, session: int, config: FeatureConfig, *, wanted: np.ndarray, rng: np.random.Generator) -> dict:
    """The distinct target items of the session(s) from `session` on: target int32 [L], target_where bool [L].

    Of more than L, a random subset of L is taken.
    """
    items = following(record, session, config, wanted=wanted)
    if len(items) > config.targets:
        items = rng.permutation(items)[: config.targets]
    return {"target": padded(items, config.targets), "target_where": np.arange(config.targets) < len(items)}


def following(record: dict, session: int, config: FeatureConfig, *, wanted: np.ndarray) -> np.ndarray:
    """The distinct target items int32 [n] of the session(s) from `session` on, in rising order."""
    start, stop = np.searchsorted(record["session"], [session, session + config.target_sessions])
    return np.unique(record["item"][start:stop][wanted[record["behavior"][start:stop]]])


def bucket_of(record: dict, session: int, config: FeatureConfig) -> int:
    """The padded length of a cut: the smallest bucket that holds the events that are read of every behavior."""
    stop = int(np.searchsorted(record["session"], session))
    counts = np.bincount(record["behavior"][:stop])
    longest = max((min(count, config.length(behavior)) for behavior, count in enumerate(counts)), default=0)
    return bucket(config.buckets, longest)


def _past(record: dict, stop: int, wanted: np.ndarray, now: int, size: int) -> dict:
    """The distinct target items before `stop`, most recent first, with the habit features of each."""
    index = np.flatnonzero(wanted[record["behavior"][:stop]])[::-1]
    items, sessions, times = record["item"][index], record["session"][index], record["timestamp"][index]
    distinct, first, inverse, counts = np.unique(items, return_index=True, return_inverse=True, return_counts=True)
    oldest = np.zeros(len(distinct), np.int64)
    oldest[inverse] = sessions  # written from the most recent to the oldest: the oldest stays
    order = np.argsort(first, kind="stable")[:size]
    last, counts = first[order], counts[order]
    following = record["session"][-1] + 1 if len(record["session"]) else 0
    current = record["session"][stop] if stop < len(record["session"]) else following
    days = (now - times[last]) / 86400
    habit = np.zeros((size, HABITS), np.float32)
    habit[: len(order)] = np.stack(
        [
            np.log(np.maximum(counts, 1)),
            np.log1p(np.maximum(days, 0)),
            np.log1p(np.maximum(current - sessions[last], 0)),
            counts / np.maximum(current - oldest[order], 1),
        ],
        axis=1,
    )
    visits = len(np.unique(sessions))
    recency = (now - times[0]) / 86400 if len(times) else 0.0
    repeats = 1 - len(distinct) / max(len(items), 1)
    user = np.array([np.log1p(visits), np.log1p(len(distinct)), repeats, np.log1p(max(recency, 0))], np.float32)
    return _sequence("past", items[last], now - times[last], size) | {"habit": habit, "user": user}


def _sequence(name: str, items: np.ndarray, seconds: np.ndarray, size: int) -> dict:
    """Left-aligned and padded to `size`."""
    age = np.minimum(2 * np.log2(1 + np.maximum(seconds, 0) / 86400), AGES - 1)
    return {
        f"{name}_item": padded(items, size),
        f"{name}_age": padded(age, size),
        f"{name}_mask": np.arange(size) < len(items),
    }


def asked_at(record: dict, stop: int) -> int:
    """The time of the question for the items from event `stop` of a record on, in Unix seconds.

    That is the time of event `stop` or, where `answer_time` of the record is False, the time of the event before. A
    history has no event `stop`: there it is `now`, if given, else the time of the last event.
    """
    times = record["timestamp"]
    if stop < len(times) and record.get("answer_time", True):
        return int(times[stop])
    before = int(times[max(stop - 1, 0)]) if len(times) else 0
    return before if stop < len(times) else int(record.get("now", before))
