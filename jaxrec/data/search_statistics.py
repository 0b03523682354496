"""What each query led to in training: how often, and how often lately (NumPy; no model here).

    statistics = read_search_statistics(tables, wanted, config)
    found = statistics.led_to(query, day, without=items)      item, share, recent: the best first

A count is a number of searches that led to an item. `without` leaves one search out: a training example must not see
its own answer among the counts, which no question at serving can. A query with few searches borrows from the queries
that it shares words with, so one that training doesn't know has items too. Shares of late are those of the periods
before the question (`jaxrec.data.popularity`); in the log's first period, before which nothing is known, they are the
shares of all time, the search left out there too.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.config import UserError, check_least
from jaxrec.data.popularity import PopularityByPeriod, PopularityConfig, popularity_by_period

UNKNOWN = -1
"""The number of a text that no search of the log has."""


@dataclass(frozen=True)
class SearchStatisticsConfig:
    """What is counted of the searches of training."""

    recent: PopularityConfig = field(default_factory=lambda: PopularityConfig(days=7, decay_days=20.0, floor=0.0))
    """how shares of late are made; with a floor a training example would see its own answer in it"""
    neighbours: int = 5
    """queries that a rare query borrows from"""
    borrow_below: int = 10
    """a query with fewer searches borrows"""
    borrowed: float = 3.0
    """searches that what is borrowed counts as"""

    def __post_init__(self):
        check_least(self, "statistics", neighbours=0, borrow_below=0, borrowed=0)
        if self.recent.floor:
            raise UserError(
                f"configuration key 'statistics.recent.floor' is {self.recent.floor}: a training example would see its "
                "own answer in it; give 0"
            )


class LedTo(NamedTuple):
    """The items of a query, the most taken first, and how many searches tell of them."""

    item: np.ndarray
    """int32 [E]"""
    share: np.ndarray
    """float32 [E], of the searches' items; sums to 1 over all E"""
    recent: np.ndarray
    """float32 [E], the same of late"""
    searches: float
    """searches of the query itself"""


@dataclass(frozen=True, eq=False)
class SearchStatistics:
    """The items of Q distinct queries as compressed rows; row Q is that of all searches together."""

    first: np.ndarray
    """int64 [Q + 2]: where a query's entries begin"""
    item: np.ndarray
    """int32 [entries], in a row by falling count"""
    count: np.ndarray
    """int32 [entries]"""
    recent: PopularityByPeriod
    """of the entries"""
    words: dict[str, np.ndarray]
    """the queries with items that hold a word, int64 each"""
    texts: tuple[str, ...]
    """[Q]"""
    config: SearchStatisticsConfig = SearchStatisticsConfig()
    kept: dict = field(default_factory=dict, repr=False)
    """neighbours found so far"""

    @property
    def everything(self) -> int:
        """The row of all searches together."""
        return len(self.texts)

    def led_to(self, query: int, day: int, *, without: Sequence[int] = (), text: str = "") -> LedTo:
        """The items of a query (UNKNOWN: of `text`) asked on a day since 1970, without one search for some items."""
        item, count, recent = self._entries(query, day, without)
        total = float(count.sum())
        if query == self.everything or total >= self.config.borrow_below or not self.config.neighbours:
            return _shares(item, count, recent, total)
        near = self._near(query, self.texts[query] if query >= 0 else text)
        parts = [(item, count.astype(np.float64), recent * total)]
        for other, weight in near:
            theirs, counts, lately = self._entries(other, day, ())
            weight *= self.config.borrowed
            parts.append((theirs, weight * counts / counts.sum(), weight * lately))
        items, inverse = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
        sums = [np.bincount(inverse, np.concatenate([part[at] for part in parts]), len(items)) for at in (1, 2)]
        order = np.argsort(-sums[0], kind="stable")
        return _shares(items[order].astype(np.int32), *(each[order] for each in sums), total)

    def _entries(self, query: int, day: int, without: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Items with their counts and shares of late; an item that only the search left out led to is not there."""
        if query < 0:
            return np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
        rows = slice(self.first[query], self.first[query + 1])
        item, count = self.item[rows], self.count[rows]
        period = int(self.recent.period(np.int64(day)))
        recent = self.recent.weights[period, rows]
        if len(without):
            count = count - np.isin(item, without)
            order = np.lexsort((item, -count))
            order = order[count[order] > 0]
            item, count, recent = item[order], count[order], recent[order]
        if not period:  # its weights are of the whole log, and hold the search that is left out
            recent = count.astype(np.float32)
        return item, count, recent / max(recent.sum(), 1e-12)

    def _near(self, query: int, text: str) -> list[tuple[int, float]]:
        """The queries that share the most telling words with a text, with weights that sum to 1."""
        key = query if query >= 0 else text
        if key not in self.kept:
            if len(self.kept) > 1 << 16:
                self.kept.clear()
            self.kept[key] = self._nearest(query, text)
        return self.kept[key]

    def _nearest(self, query: int, text: str) -> list[tuple[int, float]]:
        scores: dict[int, float] = defaultdict(float)
        for word in set(text.split()):
            holders = self.words.get(word, ())
            for other in holders:
                scores[int(other)] += np.log1p(len(self.texts) / len(holders))
        scores.pop(query, None)
        # Of queries with as many words in common, the shorter says less of something else.
        cosine = {other: score / len(set(self.texts[other].split())) ** 0.5 for other, score in scores.items()}
        best = sorted(cosine.items(), key=lambda pair: (-pair[1], pair[0]))[: self.config.neighbours]
        total = sum(score**2 for _, score in best)
        return [(other, score**2 / total) for other, score in best]


def _shares(item: np.ndarray, count: np.ndarray, recent: np.ndarray, searches: float) -> LedTo:
    shares = (values / max(values.sum(), 1e-12) for values in (count, recent))
    return LedTo(item, *(share.astype(np.float32) for share in shares), searches)


def search_statistics(
    texts: Sequence[str],
    query: np.ndarray,
    item: np.ndarray,
    timestamp: np.ndarray,
    config: SearchStatisticsConfig,
) -> SearchStatistics:
    """Statistics of distinct pairs of a search and an item that it led to.

    Args:
      texts: [Q], the distinct queries.
      query: int [n], the query of each pair.
      item: int [n].
      timestamp: int64 [n], seconds.
    """
    whole = np.full(len(item), len(texts))
    rows, items = np.concatenate([query, whole]).astype(np.int64), np.concatenate([item, item]).astype(np.int64)
    size = int(items.max(initial=0)) + 1
    keys, entry, count = np.unique(rows * size + items, return_inverse=True, return_counts=True)
    order = np.lexsort((keys % size, -count, keys // size))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    recent = popularity_by_period(place[entry], np.tile(timestamp, 2), len(keys), config.recent)
    of_entry = (keys // size)[order]
    first = np.searchsorted(of_entry, np.arange(len(texts) + 2))
    words: dict[str, list[int]] = defaultdict(list)
    for number in np.unique(query).tolist():
        for word in set(texts[number].split()):
            words[word].append(number)
    recent = PopularityByPeriod(recent.weights.astype(np.float32), recent.first_day, recent.days)
    held = {word: np.array(numbers) for word, numbers in words.items()}
    return SearchStatistics(
        first, (keys % size)[order].astype(np.int32), count[order].astype(np.int32), recent, held, tuple(texts), config
    )


def training_searches(tables: Path, wanted: Sequence[str]) -> pa.Table:
    """Distinct (search, item) of training, as search, item, timestamp and query_index, sorted.

    wanted: names of the target behaviors.

    Raises:
      UserError: the tables hold no searches.
    """
    if not (tables / "searches.parquet").is_file():
        raise UserError(f"{tables} holds no searches.parquet: a search system needs data with a table of searches")
    events = pq.read_table(tables / "events.parquet", columns=["item", "behavior", "split", "search"])
    keep = pc.and_(pc.equal(events["split"], "train"), pc.is_in(events["behavior"], pa.array(list(wanted))))
    events = events.filter(pc.and_(keep, pc.greater_equal(events["search"], 0)))
    pairs = np.unique(np.stack([events["search"].to_numpy(), events["item"].to_numpy()], 1), axis=0)
    searches = pq.read_table(tables / "searches.parquet", columns=["timestamp", "query_index"])
    of_pair = searches.take(pa.array(pairs[:, 0]))
    return pa.table({"search": pairs[:, 0], "item": pairs[:, 1]} | {n: of_pair[n] for n in of_pair.column_names})
