"""What each query led to in training: how often, and how often lately (NumPy; no model here).

    statistics = search_statistics(texts, query, search, item, timestamp, config)
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
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxrec.config import UserError, check_least
from jaxrec.data.popularity import PopularityByPeriod, PopularityConfig, popularity_by_period
from jaxrec.data.tables import training_events
from jaxrec.data.words import words

UNKNOWN = -1
"""The number of a text that no search of the log has."""
REMEMBERED, REMEMBERED_LENGTH = 1 << 16, 200
"""texts outside the log that are remembered, and the longest of them in characters"""


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
    word_count: np.ndarray
    """int64 [Q]: distinct words of a query"""
    searches: np.ndarray
    """int64 [Q + 1]: searches of a query that led to something, and all together"""
    texts: tuple[str, ...]
    """[Q], normalised"""
    config: SearchStatisticsConfig = SearchStatisticsConfig()
    kept: dict = field(default_factory=dict, repr=False)
    """neighbours found so far, of queries and of short texts"""

    @property
    def everything(self) -> int:
        """The row of all searches together."""
        return len(self.texts)

    def led_to(self, query: int, day: int, *, without: Sequence[int] = (), text: str = "") -> LedTo:
        """The items of a query (UNKNOWN: of `text`) asked on a day since 1970.

        without: the items of one search for the query that is left out.
        """
        item, count, recent = self._entries(query, day, without)
        searches = float(self.searches[query] - (len(without) > 0)) if query >= 0 else 0.0
        if query == self.everything or searches >= self.config.borrow_below or not self.config.neighbours:
            return _shares(item, count, recent, searches)
        near = self._near(query, self.texts[query] if query >= 0 else text)
        parts = [(item, searches * count / max(count.sum(), 1), searches * recent)]
        for other, weight in near:
            theirs, counts, lately = self._entries(other, day, ())
            weight *= self.config.borrowed
            parts.append((theirs, weight * counts / counts.sum(), weight * lately))
        items, inverse = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
        sums = [np.bincount(inverse, np.concatenate([part[at] for part in parts]), len(items)) for at in (1, 2)]
        order = np.argsort(-sums[0], kind="stable")
        return _shares(items[order].astype(np.int32), *(each[order] for each in sums), searches)

    def save(self, path: Path) -> None:
        """Writes a safetensors file; texts and configuration are the caller's to keep."""
        arrays = {"first": self.first, "item": self.item, "count": self.count, "searches": self.searches}
        arrays |= {"weights": self.recent.weights, "period": np.array([self.recent.first_day, self.recent.days])}
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)

    def _entries(self, query: int, day: int, without: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Items with their counts and shares of late; an item that only the search left out led to is not there."""
        if query < 0:
            return np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
        rows = slice(self.first[query], self.first[query + 1])
        item, count = self.item[rows], self.count[rows]
        period = int(self.recent.period(np.int64(day)))
        recent = self.recent.weights[period, rows]
        if len(without):
            count = count - np.isin(item, without, kind="table")
            order = np.lexsort((item, -count))
            order = order[count[order] > 0]
            item, count, recent = item[order], count[order], recent[order]
        if not period:  # its weights are of the whole log, and hold the search that is left out
            recent = count.astype(np.float32)
        return item, count, recent / max(recent.sum(), 1e-12)

    def _near(self, query: int, text: str) -> list[tuple[int, float]]:
        """The queries that share the most telling words with a text, with weights that sum to 1."""
        if query < 0 and len(text) > REMEMBERED_LENGTH:
            return self._nearest(query, text)
        key = query if query >= 0 else text
        if key not in self.kept:
            if len(self.kept) >= REMEMBERED:
                self.kept.clear()
            self.kept[key] = self._nearest(query, text)
        return self.kept[key]

    def _nearest(self, query: int, text: str) -> list[tuple[int, float]]:
        # Sorted: sums of floats depend on the order, and that of a set on the process.
        holders = [self.words[word] for word in sorted(set(words(text))) if word in self.words]
        if not holders:
            return []
        telling = [np.full(len(each), np.log1p(len(self.texts) / len(each))) for each in holders]
        others, place = np.unique(np.concatenate(holders), return_inverse=True)
        # Of queries with as many words in common, the shorter says less of something else.
        score = np.bincount(place, np.concatenate(telling)) / np.sqrt(self.word_count[others])
        others, score = others[others != query], score[others != query]
        best = np.argsort(-score, kind="stable")[: self.config.neighbours]
        weight = score[best] ** 2 / (score[best] ** 2).sum()
        return list(zip(others[best].tolist(), weight.tolist(), strict=True))


def _shares(item: np.ndarray, count: np.ndarray, recent: np.ndarray, searches: float) -> LedTo:
    shares = (values / max(values.sum(), 1e-12) for values in (count, recent))
    return LedTo(item, *(share.astype(np.float32) for share in shares), searches)


def search_statistics(
    texts: Sequence[str],
    query: np.ndarray,
    search: np.ndarray,
    item: np.ndarray,
    timestamp: np.ndarray,
    config: SearchStatisticsConfig,
) -> SearchStatistics:
    """Statistics of distinct pairs of a search and an item that it led to.

    Args:
      texts: [Q], the distinct queries, normalised.
      query: int [n], the query of each pair.
      search: int [n], its search.
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
    recent = PopularityByPeriod(recent.weights.astype(np.float32), recent.first_day, recent.days)
    of_search = query[np.unique(search, return_index=True)[1]]
    return SearchStatistics(
        first=first,
        item=(keys % size)[order].astype(np.int32),
        count=count[order].astype(np.int32),
        recent=recent,
        words=_holders(texts, np.unique(query)),
        word_count=_word_count(texts),
        searches=np.append(np.bincount(of_search, minlength=len(texts)), len(of_search)),
        texts=tuple(texts),
        config=config,
    )


def load_statistics(path: Path, texts: Sequence[str], config: SearchStatisticsConfig) -> SearchStatistics:
    """What `SearchStatistics.save` wrote, of these texts.

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        found = load_file(path)
        weights, (first_day, days) = found.pop("weights"), found.pop("period").tolist()
        return SearchStatistics(
            **found,
            recent=PopularityByPeriod(weights, first_day, days),
            words=_holders(texts, np.flatnonzero(np.diff(found["first"])[:-1])),
            word_count=_word_count(texts),
            texts=tuple(texts),
            config=config,
        )
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise UserError(f"{path} holds no statistics of searches ({error}); copy the folder again") from error


def _word_count(texts: Sequence[str]) -> np.ndarray:
    return np.array([len(set(words(text))) for text in texts], np.int64)


def _holders(texts: Sequence[str], numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Of some queries those that hold a word, by the word."""
    found: dict[str, list[int]] = defaultdict(list)
    for number in numbers.tolist():
        for word in set(words(texts[number])):
            found[word].append(number)
    return {word: np.array(holders, np.int64) for word, holders in found.items()}


def training_searches(tables: Path, wanted: Sequence[str]) -> pa.Table:
    """Distinct (search, item) of training, as search, item, timestamp and query_index, sorted.

    wanted: names of the target behaviors.

    Raises:
      UserError: the tables hold no searches.
    """
    if not (tables / "searches.parquet").is_file():
        raise UserError(f"{tables} holds no searches.parquet: a search system needs data with a table of searches")
    events = training_events(tables, wanted, ["item", "search"])
    events = events.filter(pc.greater_equal(events["search"], 0))
    pairs = np.unique(np.stack([events["search"].to_numpy(), events["item"].to_numpy()], 1), axis=0)
    searches = pq.read_table(tables / "searches.parquet", columns=["timestamp", "query_index"])
    of_pair = searches.take(pa.array(pairs[:, 0]))
    return pa.table({"search": pairs[:, 0], "item": pairs[:, 1]} | {n: of_pair[n] for n in of_pair.column_names})
