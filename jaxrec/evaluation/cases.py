"""Test cases cut from what users did: the history before a session, and the items that the session then held.

The order of events with equal timestamps is an accident of storage, yet a model can learn it (data sets stored in the
order of their item ids leak the answer). `shuffle_ties` makes the same data without that accident.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxrec.data.features import asked_at
from jaxrec.data.tables import SPLITS

History = dict[str, np.ndarray]
Record = dict[str, np.ndarray]

EVENT_FIELDS = ("item", "behavior", "timestamp", "session")


@dataclass(frozen=True)
class Cases:
    """U questions with their answers, as rectangles padded to the longest list of targets."""

    users: np.ndarray
    """int32 [U]."""
    histories: list[History]
    """One a case: item int32 [T], behavior int8 [T], timestamp int64 [T], session int32 [T], T >= 1; `user` int32;
    `now` int: when the target session begins or, where the record doesn't tell (`answer_time`), the last event's time.
    """
    targets: np.ndarray
    """int32 [U, L], distinct within a row, -1 where `where` is False."""
    where: np.ndarray
    """bool [U, L]."""
    new: np.ndarray
    """bool [U, L]: the targets that the user's history does not hold under a target behavior."""
    cold: int = 0
    """Users left out because nothing comes before their target session."""

    def __len__(self) -> int:
        return len(self.histories)

    def take(self, rows: Sequence[int]) -> "Cases":
        """The cases of these rows, e.g. `cases.take(range(256))` for a quick look during training."""
        rows = np.asarray(rows, np.int64)
        histories = [self.histories[row] for row in rows]
        return Cases(self.users[rows], histories, self.targets[rows], self.where[rows], self.new[rows])


def make_cases(records: Iterable[Record], target_behaviors: Sequence[int], split: str = "test") -> Cases:
    """Cases of one split: the targets are what `split` holds, the history is all that came before their first session.

    A record is one user's events in order with `split` int8 [T] (index into SPLITS). Only events whose behavior is one
    of `target_behaviors` are targets; sessions of the split that hold none and come before belong to the history. Users
    without a target are left out, users without a history too, and counted.
    """
    place = SPLITS.index(split)
    users, histories, targets, new, cold = [], [], [], [], 0
    for record in records:
        wanted = np.isin(record["behavior"], target_behaviors)
        asked = wanted & (record["split"] == place)
        if not asked.any():
            continue
        answer = np.unique(record["item"][asked])
        first = int(np.argmax(asked))
        before = record["session"] < record["session"][first]
        if not before.any():
            cold += 1
            continue
        now = asked_at(record, int(np.argmin(before)))
        users.append(int(record["user"]))
        history = {field: record[field][before] for field in EVENT_FIELDS}
        histories.append({**history, "now": now, "user": np.int32(record["user"])})
        targets.append(answer)
        new.append(~np.isin(answer, record["item"][wanted & before]))
    padded, where = _pad(targets, -1, np.int32)
    return Cases(np.array(users, np.int32), histories, padded, where, _pad(new, False, bool)[0], cold)


def _pad(rows: list[np.ndarray], fill: int | bool, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(row) for row in rows], np.int64)
    where = np.arange(lengths.max(initial=1)) < lengths[:, None]
    padded = np.full(where.shape, fill, dtype)
    if rows:
        padded[where] = np.concatenate(rows)
    return padded, where


def tied_fraction(records: Iterable[Record]) -> float:
    """Share of users whose last two events carry one timestamp, so that their order means nothing.

    0 wherever any session holds several events: the lines of a basket share their time by nature, and are one target.
    """
    tied = users = 0
    for record in records:
        if len(np.unique(record["session"])) < len(record["session"]):
            return 0.0
        users += 1
        tied += len(record["timestamp"]) > 1 and record["timestamp"][-1] == record["timestamp"][-2]
    return tied / users if users else 0.0


def shuffle_ties(record: Record, seed: int) -> Record:
    """The same events with those of equal timestamp in random order; `session` and `split` stay with the position.

    So the last event is still the test item, but which of the tied events that is, chance decides. Depends on `seed`
    and the user alone, never on the order of the records.
    """
    chance = np.random.default_rng([seed, int(record["user"])]).random(len(record["item"]))
    order = np.lexsort((chance, record["timestamp"]))
    return {**record, "item": record["item"][order], "behavior": record["behavior"][order]}
