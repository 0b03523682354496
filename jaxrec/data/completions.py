"""The queries of training that complete a prefix, the most popular first (NumPy; no model here).

    known = completions(run.tables)
    rows, share, recent = known.top("red s", 10, day)      known.texts[rows[0]] == "red shoes"

A query counts once for each training session that it was searched for in: paging through its results, or one search
typed key by key, is no further demand. Where the tables hold no searches, the suggested queries that somebody chose
count. `without` takes one session from a query: a training example must not see its own answer among the completions,
which no prefix at serving can. Shares of late are those of the periods before the day (`jaxrec.data.popularity`); in
the log's first period, before which nothing is known, they are the shares of all time.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.config import UserError
from jaxrec.data.popularity import PopularityByPeriod, PopularityConfig, popularity_by_period
from jaxrec.data.tables import CHOSEN
from jaxrec.data.words import distinct, normalised, typed

UNKNOWN = -1
"""The number of a text that nobody searched for in training."""
REMEMBERED = 1 << 16
"""lists of best completions that are kept, of prefixes and periods"""
DEPTH = 64
"""completions in the shortest of these lists; a longer one has twice as many, and so on"""


@dataclass(frozen=True)
class CompletionsConfig:
    """What is counted of the queries of training."""

    recent: PopularityConfig = field(default_factory=lambda: PopularityConfig(days=7, decay_days=20.0, floor=0.0))
    """how shares of late are made; with a floor a training example would see its own answer in it"""

    def __post_init__(self):
        if self.recent.floor:
            raise UserError(
                f"configuration key 'completions.recent.floor' is {self.recent.floor}: a training example would see "
                "its own answer in it; give 0"
            )


class Top(NamedTuple):
    """Some completions of a prefix, best first."""

    rows: np.ndarray
    """int64 [n], numbers of texts"""
    share: np.ndarray
    """float32 [n], of the sessions with any completion of the prefix"""
    recent: np.ndarray
    """float32 [n], the same of late; 0 where no completion was searched for"""
    sessions: int
    """with any completion of the prefix"""


class _Best(NamedTuple):
    """The best completions of a prefix, nothing left out, with the sums over all of its completions."""

    rows: np.ndarray
    weight: np.ndarray
    total: int
    total_weight: float


@dataclass(frozen=True, eq=False)
class Completions:
    """Q distinct queries of training in alphabetical order, so that the completions of a prefix are a slice."""

    texts: tuple[str, ...]
    """[Q], normalised"""
    count: np.ndarray
    """int64 [Q], above 0: sessions"""
    recent: PopularityByPeriod
    """of the queries, float32"""
    numbers: dict[str, int]
    """by text"""
    place: np.ndarray
    """uint64 [Q], from 0: the place of a query among all by falling count, then in alphabetical order"""
    kept: dict = field(default_factory=dict, repr=False)
    """lists found so far"""

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [n]: the numbers of texts in any writing, UNKNOWN for others."""
        return np.array([self.numbers.get(normalised(text), UNKNOWN) for text in texts], np.int64)

    def of(self, prefix: str) -> slice:
        """The numbers of the completions of a prefix in any writing; all for an empty one.

        A space at its end counts: "red " is completed by "red shoes", not by "redwood".
        """
        begins = typed(prefix)
        start = bisect_left(self.texts, begins)
        return slice(start, bisect_right(self.texts, begins, start, key=lambda text: text[: len(begins)]))

    def top(
        self, prefix: str, k: int, day: int | None = None, without: Sequence[int] = (), *, late: bool = False
    ) -> Top:
        """The most popular k completions of a prefix, fewer if there are no more; equal ones in alphabetical order.

        Args:
          day: days since 1970, for the shares of late; None: they are the shares of all time.
          without: distinct queries that are counted in one session less; one is not there if that was its only one.
          late: the most popular of late come first, equal ones by their popularity.
        """
        span = self.of(prefix)
        period = 0 if day is None else int(self.recent.period(np.int64(day)))
        without = [row for row in without if span.start <= row < span.stop]
        rows, weight, total, total_weight = self._best(span, period, late, k + len(without))
        count = self.count[rows]
        if without:
            total -= len(without)
            count = count - np.isin(rows, without)
            # The list is longer than k: a query that falls from it or to its end is none of the best k.
            order = np.lexsort((rows, -count, -weight if late and period else np.zeros(len(rows))))
            order = order[count[order] > 0]
            rows, count, weight = rows[order], count[order], weight[order]
        share = (count[:k] / max(total, 1)).astype(np.float32)
        recent = weight[:k] / np.float32(total_weight) if period and total_weight else np.zeros_like(share)
        return Top(rows[:k], share, recent if period else share, total)

    def _best(self, span: slice, period: int, late: bool, k: int) -> _Best:
        """More than k of the completions in a slice, or all."""
        depth = DEPTH
        while depth <= k:
            depth *= 2
        key = span.start, span.stop, period, late and period > 0, depth
        if key not in self.kept:
            if len(self.kept) >= REMEMBERED:
                self.kept.clear()
            self.kept[key] = self._rank(*key)
        return self.kept[key]

    def _rank(self, start: int, stop: int, period: int, late: bool, depth: int) -> _Best:
        weight = self.recent.weights[period, start:stop]
        # Weights are not below 0, so their bits sort like they do; no two places are equal.
        key = np.uint64(0xFFFFFFFF) - self.place[start:stop]
        if late:
            key |= np.ascontiguousarray(weight).view(np.uint32).astype(np.uint64) << np.uint64(32)
        best = np.arange(len(key)) if len(key) <= depth else np.argpartition(key, -depth)[-depth:]
        best = best[np.argsort(key[best])[::-1]]
        rows = start + best.astype(np.int64)
        rows.flags.writeable = False  # handed out again and again
        return _Best(rows, weight[best], int(self.count[start:stop].sum()), float(weight.sum(dtype=np.float64)))


def completions(tables: Path, config: CompletionsConfig = CompletionsConfig()) -> Completions:
    """The queries of a run's training, from its tables.

    Raises:
      UserError: nobody searched for anything in training, nor chose a suggested query.
    """
    texts, log = training_queries(tables)
    return completions_of(texts, log["query"].to_numpy(), log["timestamp"].to_numpy(), config)


def completions_of(
    texts: Sequence[str], query: np.ndarray, timestamp: np.ndarray, config: CompletionsConfig = CompletionsConfig()
) -> Completions:
    """Completions of a log, a row for each query of a session.

    Args:
      texts: [Q], distinct and normalised, in alphabetical order, each with a row in the log.
      query: int [n], places in `texts`.
      timestamp: int64 [n], seconds.
    """
    count = np.bincount(query, minlength=len(texts))
    place = np.empty(len(texts), np.uint64)
    place[np.argsort(-count, kind="stable")] = np.arange(len(texts), dtype=np.uint64)
    recent = popularity_by_period(query, timestamp, len(texts), config.recent)
    recent = PopularityByPeriod(recent.weights.astype(np.float32), recent.first_day, recent.days)
    return Completions(tuple(texts), count, recent, {text: row for row, text in enumerate(texts)}, place)


def training_queries(tables: Path) -> tuple[tuple[str, ...], pa.Table]:
    """The queries of training: distinct normalised texts, and user, session, timestamp, query (a place in the texts).

    One row for each query of a session, when it was first searched for, in order of users and time. Queries without any
    character that is read are left out.

    Raises:
      UserError: as for `completions`.
    """
    for name, columns in (("searches", []), ("suggestions", ["feedback"])):
        if not (tables / f"{name}.parquet").is_file():
            continue
        log = pq.read_table(
            tables / f"{name}.parquet", columns=["user", "session", "timestamp", "query", "split", *columns]
        )
        wanted = pc.equal(log["split"], "train")
        if columns:
            wanted = pc.and_(wanted, pc.is_in(log["feedback"], pa.array(CHOSEN)))
        texts, log = _once_a_session(log.filter(wanted))
        if texts:
            return texts, log
    raise UserError(
        f"{tables} holds no search and no chosen suggestion of training; suggestions need data with searches.parquet "
        "or suggestions.parquet"
    )


def _once_a_session(log: pa.Table) -> tuple[tuple[str, ...], pa.Table]:
    texts, query = distinct(log["query"].to_pylist())
    columns = {name: log[name].to_numpy().astype(np.int64) for name in ("user", "session", "timestamp")}
    if texts and not texts[0]:
        there = query > 0
        texts, query = texts[1:], query[there] - 1
        columns = {name: values[there] for name, values in columns.items()}
    user, session, timestamp = columns.values()
    order = np.lexsort((query, timestamp, session, user))
    same = np.stack([user, session, query], 1)[order]
    _, first = np.unique(same, axis=0, return_index=True)
    kept = order[np.sort(first)]
    kept = kept[np.lexsort((query[kept], session[kept], timestamp[kept], user[kept]))]
    return texts, pa.table({name: values[kept] for name, values in (columns | {"query": query}).items()})
