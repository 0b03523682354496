"""A user's events of several behaviors as one sequence, and the items of a session with their levels (NumPy only).

    history    click a, cart a, purchase a, click b   ──▶  a (purchase), b (click)     an item once a session
    session    purchase c, click d, exposure e        ──▶  c 3, d 2, e 1 (target_level)  the strongest first

Histories keep their latest items. Sequences are aligned left.
"""

from dataclasses import dataclass

import numpy as np

from jaxrec.config import check_least
from jaxrec.data.features import AGES
from jaxrec.data.padding import bucket, check_buckets, padded
from jaxrec.data.popularity import DAY


@dataclass(frozen=True)
class LeveledSessionConfig:
    """Lengths of the histories that a model reads, and the targets of a training example."""

    buckets: tuple[int, ...] = (4, 8, 16, 50)
    """lengths that histories are padded to; a batch holds those of one bucket; the last is also the longest history"""
    weakest: int = 0
    """the weakest behavior that histories hold, counted from 0 in the source's order; sessions hold them all"""
    targets: int = 16
    """items of a session that are targets, L; of more, the strongest"""
    next_items: int = 0
    """items of the history that are targets too, each after those before it (RankGR Eq. 2), drawn anew every epoch; as
    many as the last bucket: all of them"""
    sampled: int = 0
    """items drawn as pseudo-exposures of a session, for logs that have none: a level below all others"""

    def __post_init__(self):
        check_buckets(self.buckets)
        check_least(self, "features", weakest=0, targets=1, next_items=0, sampled=0)

    def cut(self, record: dict, session: int, *, behaviors: int, wanted: np.ndarray) -> dict[str, np.ndarray]:
        """The history before `session`: item, behavior, gap int32 [S] and mask bool [S], S its bucket.

        gap: the time since the event before, in half powers of two of days; it leaks nothing of later events.
        """
        index = self._read(record, session)
        size = bucket(self.buckets, len(index))
        index = index[-size:]
        days = np.maximum(np.diff(record["timestamp"][index], prepend=record["timestamp"][index[:1]]), 0) / DAY
        gap = np.minimum(2 * np.log2(1 + days), AGES - 1)
        return {
            "item": padded(record["item"][index], size),
            "behavior": padded(record["behavior"][index], size),
            "gap": padded(gap, size),
            "mask": np.arange(size) < len(index),
        }

    def bucket_of(self, record: dict, session: int) -> int:
        """The length that a cut is padded to: the smallest bucket that holds the history."""
        return bucket(self.buckets, len(self._read(record, session)))

    def _read(self, record: dict, session: int) -> np.ndarray:
        """Rows of the events in a history, rising: of an item's events in a session the strongest (or last) alone."""
        stop = int(np.searchsorted(record["session"], session))
        index = np.flatnonzero(record["behavior"][:stop] >= self.weakest)
        # An item's events are neighbours in this order, the one to keep the last of them.
        order = np.lexsort((index, record["behavior"][index], record["item"][index], record["session"][index]))
        sessions, items = record["session"][index][order], record["item"][index][order]
        last = np.ones(len(order), bool)
        last[:-1] = (sessions[1:] != sessions[:-1]) | (items[1:] != items[:-1])
        return np.sort(index[order[last]])


def targets(
    record: dict,
    session: int,
    config: LeveledSessionConfig,
    *,
    level_of: np.ndarray,
    rng: np.random.Generator,
    popular: np.ndarray | None = None,
    positive: int = 0,
    room: int = 0,
) -> dict[str, np.ndarray]:
    """The items of a session by falling level: target int32 [L + n], target_level int32 [L + n] (-1 = no target).

    level_of: int [behaviors], the level of each, from 0. More than L are left out from the weakest up, by chance inside
    a level; `left_out` int32 [] says how many, `left_out_item` int32 [room] (-1 = none) which of level `positive` or
    above (there are `positives_left_out`). The last n = `config.sampled` places are drawn items that the session
    doesn't hold, at level 0; real levels then begin at 1. popular: float64 [I] that rises from 0 to 1, the cumulative
    distribution they are drawn from.
    """
    held, level = _levels(record, session, level_of)
    order = np.lexsort((rng.random(len(held)), -level))
    kept, left = order[: config.targets], order[config.targets :]
    left_out_item = np.full(room, -1, np.int32)
    positives = held[left][level[left] >= positive][:room]
    left_out_item[: len(positives)] = positives
    item, levels = padded(held[kept], config.targets), np.full(config.targets, -1, np.int32)
    levels[: len(kept)] = level[kept]
    if config.sampled:
        drawn = np.searchsorted(popular, rng.random(config.sampled), side="right").astype(np.int32)
        new = np.zeros(config.sampled, bool)
        new[np.unique(drawn, return_index=True)[1]] = True
        new &= ~np.isin(drawn, held)
        item, levels = np.concatenate([item, drawn]), np.where(levels < 0, -1, levels + 1)
        levels = np.concatenate([levels, np.where(new, 0, -1).astype(np.int32)])
    return {
        "target": item,
        "target_level": levels,
        "left_out": np.int32(len(left)),
        "left_out_item": left_out_item,
    }


def positives_left_out(
    record: dict, session: int, config: LeveledSessionConfig, level_of: np.ndarray, positive: int
) -> int:
    """The number of items of a session at level `positive` or above that are left out of its targets."""
    _, level = _levels(record, session, level_of)
    return max(int((level >= positive).sum()) - config.targets, 0)


def _levels(record: dict, session: int, level_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct items of a session, rising, and the level of each: int32 [n] twice."""
    start, stop = np.searchsorted(record["session"], [session, session + 1])
    held, inverse = np.unique(record["item"][start:stop], return_inverse=True)
    level = np.zeros(len(held), np.int32)
    np.maximum.at(level, inverse, level_of[record["behavior"][start:stop]].astype(np.int32))
    return held, level


def next_items(cut: dict[str, np.ndarray], config: LeveledSessionConfig, rng: np.random.Generator) -> dict:
    """Places of a history whose next item is a target: next_after int32 [N], next_where bool [N].

    N is `config.next_items`, or all places that have a next one if those are fewer.
    """
    most = len(cut["item"]) - 1
    places = np.arange(max(int(cut["mask"].sum()) - 1, 0))
    if len(places) > config.next_items:
        places = np.sort(rng.permutation(places)[: config.next_items])
    count = min(config.next_items, most)
    return {"next_after": padded(places, count), "next_where": np.arange(count) < len(places)}
