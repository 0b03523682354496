"""Six levels of what a user did with the items of a search, and how often items were taken of late (NumPy; no model).

    0 purchased   through the search                                          a positive
    1 elsewhere   purchased without a search, within days of it, of a         a positive
                  category of the search
    2 clicked     through the search, not purchased                           a positive
    3 exposed     shown by the search, not clicked
    4 unshown     not shown, of a category of the search: drawn
    5 other       of any other category: drawn

OneSearch §3.4.2, which has a base weight for each (`jaxrec.losses.rewards.BASE_WEIGHTS`). The categories of a search
are those of the items with the strongest behavior that it led to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.config import UserError, check_least
from jaxrec.data.attributes import attribute_indices
from jaxrec.data.examples import Record
from jaxrec.data.popularity import DAY
from jaxrec.data.ranking_features import Labels
from jaxrec.data.tables import training_events
from jaxrec.losses.rewards import BASE_WEIGHTS

LEVELS = ("purchased", "elsewhere", "clicked", "exposed", "unshown", "other")
PURCHASED, ELSEWHERE, CLICKED, EXPOSED, UNSHOWN, OTHER = range(len(LEVELS))
POSITIVES = CLICKED + 1
"""Levels below this one are positives."""


@dataclass(frozen=True)
class BehaviorLevelConfig:
    """What the levels of a search's items are told by, and what each is worth."""

    category: str = "category"
    """column of the items table that is an item's category"""
    elsewhere_days: int = 7
    """days after a search in which what its user takes without a search belongs to it, if it is of its category; 0:
    nothing does"""
    recent_days: int = 30
    """days before a search whose exposures, clicks and orders make an item's CTR and CVR (Eq. 6-7)"""
    base: tuple[float, ...] = BASE_WEIGHTS
    """base weight lambda of each level, strongest first"""

    def __post_init__(self):
        check_least(self, "rewards.levels", elsewhere_days=0, recent_days=1, base=0)
        if len(self.base) != len(LEVELS) or list(self.base) != sorted(self.base, reverse=True):
            raise UserError(
                f"configuration key 'rewards.levels.base' is {self.base}; give {len(LEVELS)} falling weights, one for "
                f"each of {', '.join(LEVELS)}"
            )


@dataclass(frozen=True, eq=False)
class BehaviorLevels:
    """Tells the levels of a record's searches."""

    labels: Labels
    """which behaviors are exposures, clicks and purchases"""
    category: np.ndarray
    """int32 [I], 0 for an item without one"""
    elsewhere_days: int

    def of(self, record: Record, search: int) -> tuple[np.ndarray, np.ndarray]:
        """The items that a search (its place in the record) met, distinct int32 [n], and their levels 0 to 3, int8 [n].

        Of the events of an item the strongest level counts.
        """
        through = record["search"] == search
        own = self._outcomes(record["behavior"])
        level = np.where(through, own, len(LEVELS))
        elsewhere = self.elsewhere(record, search) & (own == PURCHASED)
        return _strongest(record["item"], np.where(elsewhere, np.minimum(level, ELSEWHERE), level))

    def elsewhere(self, record: Record, search: int) -> np.ndarray:
        """bool [T]: events without a search, within `elsewhere_days` after one, of items of its category."""
        moment, times = record["search_timestamp"][search], record["timestamp"]
        near = (record["search"] < 0) & (times >= moment) & (times <= moment + self.elsewhere_days * DAY)
        if not self.elsewhere_days or not near.any():
            return np.zeros(len(times), bool)
        return near & np.isin(self.category[record["item"]], self.categories(record, search))

    def clicked_elsewhere(self, record: Record, search: int) -> np.ndarray:
        """bool [T]: those of `elsewhere` that are clicks or stronger, further samples of the reward model (§3.4.2)."""
        return self.elsewhere(record, search) & (self._outcomes(record["behavior"]) <= CLICKED)

    def categories(self, record: Record, search: int) -> np.ndarray:
        """The categories of a search, int32 [c]; none where no event of it, or none of a known category, is known."""
        own = np.where(record["search"] == search, self._outcomes(record["behavior"]), len(LEVELS))
        own[self.category[record["item"]] == 0] = len(LEVELS)
        best = own.min(initial=len(LEVELS))
        return np.unique(self.category[record["item"][own == best]]) if best < len(LEVELS) else np.zeros(0, np.int32)

    def unmet(self, items: np.ndarray, categories: np.ndarray) -> np.ndarray:
        """The level of items int [n] that a search of these categories did not meet: `UNSHOWN` or `OTHER`, int8 [n]."""
        return np.where(np.isin(self.category[items], categories), UNSHOWN, OTHER).astype(np.int8)

    def draw(self, categories: np.ndarray, counts: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Items of the categories and of others, distinct int32 [<= sum of counts], drawn evenly: counts of each."""
        inside = np.isin(self.category, categories)
        found = [
            _drawn(np.flatnonzero(side), count, rng) for side, count in zip((inside, ~inside), counts, strict=True)
        ]
        return np.concatenate(found).astype(np.int32)

    def _outcomes(self, behavior: np.ndarray) -> np.ndarray:
        """The level of events by their behavior alone, int8 [T]; `len(LEVELS)` for one that is not even an exposure."""
        level = np.full(len(behavior), len(LEVELS), np.int8)
        bounds = ((EXPOSED, self.labels.exposure), (CLICKED, self.labels.click), (PURCHASED, self.labels.purchase))
        for at, weakest in bounds:
            if weakest is not None:
                level[behavior >= weakest] = at
        return level


def behavior_levels(tables: Path, labels: Labels, config: BehaviorLevelConfig) -> BehaviorLevels:
    """The levels of a run's log.

    Raises:
      UserError: the items have no such category.
    """
    names = pq.read_schema(tables / "items.parquet").names
    if config.category not in names:
        raise UserError(
            f"configuration key 'rewards.levels.category': the items have no column {config.category!r}, so that no "
            f"level of a search's other items is known; name one of {', '.join(names)}"
        )
    indices, _ = attribute_indices(
        pq.read_table(tables / "items.parquet", columns=[config.category]), [config.category]
    )
    return BehaviorLevels(labels, indices[:, 0], config.elsewhere_days)


@dataclass(frozen=True, eq=False)
class RecentCounts:
    """Exposures, clicks and orders of every item in the days before any day of the training log.

    Each order counts as a click too and each click as an exposure, so that logs without clicks or exposures have rates.
    """

    keys: tuple[np.ndarray, np.ndarray, np.ndarray]
    """int64 [m] each, rising: item * span + day, of exposures, clicks and orders"""
    first_day: int
    """the first day of the log, since 1970"""
    span: int
    days: int
    """days that are counted"""

    def before(self, items: np.ndarray, day: int) -> np.ndarray:
        """Counts of items int [n] in the `days` days before a day (since 1970), float32 [n, 3]; of the day itself none.

        A training example so never sees its own events.
        """
        end, begin = (np.clip(each - self.first_day, 0, self.span - 1) for each in (day, day - self.days))
        base = items.astype(np.int64) * self.span
        counts = [np.searchsorted(keys, base + end) - np.searchsorted(keys, base + begin) for keys in self.keys]
        return np.stack(counts, axis=-1).astype(np.float32)


def recent_counts(
    items: np.ndarray, behavior: np.ndarray, timestamps: np.ndarray, labels: Labels, days: int
) -> RecentCounts:
    """From events: items and behavior int [m], timestamps int64 [m] in seconds."""
    day = timestamps // DAY
    first, last = (int(day.min()), int(day.max())) if len(day) else (0, 0)
    span = last - first + 2
    nothing, keys = np.iinfo(np.int64).max, []
    weakest = [nothing if each is None else each for each in (labels.exposure, labels.click, labels.purchase)]
    for at in range(3):
        mine = behavior >= min(weakest[at:])
        keys.append(np.sort(items[mine].astype(np.int64) * span + day[mine] - first))
    return RecentCounts(tuple(keys), first, span, days)


def read_recent_counts(tables: Path, behaviors: Sequence[str], labels: Labels, days: int) -> RecentCounts:
    """`recent_counts` of a run's training events; behaviors: of its log, weakest first."""
    events = training_events(tables, behaviors, ["item", "behavior", "timestamp"])
    behavior = pc.index_in(events["behavior"], pa.array(behaviors, events["behavior"].type)).to_numpy()
    return recent_counts(events["item"].to_numpy(), behavior, events["timestamp"].to_numpy(), labels, days)


def _strongest(items: np.ndarray, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct items with a level, and the strongest of each."""
    there = level < len(LEVELS)
    found, place = np.unique(items[there], return_inverse=True)
    best = np.full(len(found), len(LEVELS), np.int8)
    np.minimum.at(best, place, level[there].astype(np.int8))
    return found.astype(np.int32), best


def _drawn(items: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` distinct ones of some items, or all of them."""
    return items if len(items) <= count else rng.choice(items, count, replace=False)
