"""The baselines of product search: they rank items for a query, and some for the user too.

    popularity in query           counts of training events that the same query led to
    recent popularity in query    the same of the last 30 days before the request
    <baseline> in query           a baseline of `jaxrec.evaluation.baselines`, such as the user's own frequency, over
                                  the items that the query led to in training; then popularity in the query
    personal frequency,           the user's own frequency over these items; then recent popularity in the query
      then recent in query
    bm25                          words of the query in the items' texts (Robertson & Zaragoza, 2009, by `bm25s`)
    <name> encoder                cosine of the query's and the items' embeddings

Queries are compared after `jaxrec.data.words.normalised`. What a baseline gives no score is ranked by popularity over
all training events: of the counting ones, every item for a query that was not searched for in training.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy import sparse

from jaxrec.data.popularity import DAY
from jaxrec.data.tables import training_events
from jaxrec.data.words import distinct, normalised, words
from jaxrec.evaluation.baselines import Popularity, PurchaseLog, Recommender, count_matrix, recommend_best

logging.getLogger("bm25s").setLevel(logging.WARNING)  # importing it sets DEBUG
RECENT_DAYS, FLOOR = 30, 0.02
"""The window of recent popularity, and the weight of the popularity of all time in it."""
NEIGHBORS = 400
"""of each item, for ItemKNN in a query: of 100 in the whole catalogue, few are items of the query"""


@dataclass(frozen=True, eq=False)
class QueryTexts:
    """Numbers of query texts; two writings of one text have one number."""

    numbers: dict[str, int]
    """by normalised text"""
    of_row: np.ndarray
    """int64 [rows of queries.parquet]"""

    @classmethod
    def of(cls, texts: Sequence[str]) -> "QueryTexts":
        """The numbers of the texts of queries.parquet, in its order."""
        known, of_row = distinct(texts)
        return cls({text: number for number, text in enumerate(known)}, of_row)

    def __len__(self) -> int:
        return len(self.numbers)

    def find(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [n]: the number of each text, len(self) for an unknown one."""
        known: dict[str, int] = {}
        for text in texts:
            if text not in known:
                known[text] = self.numbers.get(normalised(text), len(self.numbers))
        return np.array([known[text] for text in texts], np.int64)


@dataclass(frozen=True, eq=False)
class QueryLog:
    """Training events with the query that led to them, by query and then by time."""

    texts: QueryTexts
    query: np.ndarray
    """int64 [events], numbers of `texts`, rising"""
    item: np.ndarray
    """int64 [events]"""
    timestamp: np.ndarray
    """int64 [events], in seconds, rising within a query"""
    counts: sparse.csr_array
    """f32 [queries + 1, I]: events by query and item; the last row, for unknown queries, is empty"""

    @classmethod
    def of(
        cls, texts: QueryTexts, query: np.ndarray, item: np.ndarray, timestamp: np.ndarray, num_items: int
    ) -> "QueryLog":
        """From events int [n] in any order; query: numbers of `texts`."""
        order = np.lexsort((item, timestamp, query))
        query, item, timestamp = (np.asarray(column, np.int64)[order] for column in (query, item, timestamp))
        counts = count_matrix(query, item, (len(texts) + 1, num_items))
        counts.sum_duplicates()
        return cls(texts, query, item, timestamp, counts)

    @classmethod
    def read(cls, tables: Path, behaviors: Sequence[str], num_items: int) -> "QueryLog":
        """The train events of these behaviors that a search led to, of a run's tables with searches."""
        queries = pq.read_table(tables / "queries.parquet", columns=["query"])["query"].to_pylist()
        searched = pq.read_table(tables / "searches.parquet", columns=["query_index"])["query_index"].to_numpy()
        events = training_events(tables, behaviors, ["item", "timestamp", "search"])
        events = events.filter(pc.greater_equal(events["search"], 0))
        texts = QueryTexts.of(queries)
        query = texts.of_row[searched[events["search"].to_numpy()]]
        return cls.of(texts, query, events["item"].to_numpy(), events["timestamp"].to_numpy(), num_items)

    def counts_for(self, queries: Sequence[str]) -> sparse.csr_array:
        """f32 [B, I]: how often each query led to each item."""
        return self.counts[self.texts.find(queries)]

    def recent_for(self, queries: Sequence[str], now: np.ndarray, days: int) -> sparse.csr_array:
        """f32 [B, I]: the same, of the events in the `days` before `now` int64 [B] (Unix seconds), strictly before."""
        number, first = self.texts.find(queries), self.timestamp.min(initial=0)
        span = self.timestamp.max(initial=0) - first + 2
        place = self.query * span + self.timestamp - first  # rising

        def before(moment: np.ndarray) -> np.ndarray:
            return np.searchsorted(place, number * span + np.clip(moment - first, 0, span - 1))

        start, end = before(now - days * DAY), before(now)
        row = np.repeat(np.arange(len(queries)), end - start)
        within = np.arange(len(row)) - np.repeat(np.cumsum(end - start) - (end - start), end - start)
        return count_matrix(row, self.item[start[row] + within], (len(queries), self.counts.shape[1]))


@dataclass(frozen=True, eq=False)
class QueryPopularity:
    """Ranks by the number of training events that the query led to."""

    popularity: Popularity
    log: QueryLog

    def recommend(self, histories, k, exclude_history=False):
        return recommend_best(self.popularity, histories, k, exclude_history, self.scores)

    def scores(self, asked: PurchaseLog) -> np.ndarray:
        return self.log.counts_for(asked.query).toarray()


@dataclass(frozen=True, eq=False)
class RecentQueryPopularity:
    """Ranks by the share of the query's events in the last days; its share of all time has a weight of 2%."""

    popularity: Popularity
    log: QueryLog
    days: int = RECENT_DAYS

    def recommend(self, histories, k, exclude_history=False):
        return recommend_best(self.popularity, histories, k, exclude_history, self.scores)

    def scores(self, asked: PurchaseLog) -> np.ndarray:
        recent = _shares(self.log.recent_for(asked.query, asked.now, self.days))
        return (1 - FLOOR) * recent + FLOOR * _shares(self.log.counts_for(asked.query))


@dataclass(frozen=True, eq=False)
class WithinQuery:
    """The items that the query led to in training, by the scores of another baseline, equal ones by how often.

    `ties` has the scores by which equal ones are ranked instead.
    """

    within: Any
    """a baseline of `jaxrec.evaluation.baselines` with `popularity` and `scores`"""
    log: QueryLog
    ties: RecentQueryPopularity | None = None

    def recommend(self, histories, k, exclude_history=False):
        return recommend_best(self.within.popularity, histories, k, exclude_history, self.scores)

    def scores(self, asked: PurchaseLog) -> np.ndarray:
        """Of the n items of a row n for the first, 1 for the last; 0 for all others."""
        counts = self.log.counts_for(asked.query)
        row = np.repeat(np.arange(asked.num_users), np.diff(counts.indptr))
        item, place = counts.indices, np.argsort(self.within.popularity.order)
        own = self.within.scores(asked)[row, item]
        then = counts.data if self.ties is None else self.ties.scores(asked)[row, item]
        # The last key is the first to be sorted by; the row comes first, so positions within a row follow.
        order = np.lexsort((place[item], -then, -own, row))
        ranks = np.zeros((asked.num_users, counts.shape[1]), np.float32)
        ranks[row, item[order]] = counts.indptr[1:][row] - np.arange(len(row))
        return ranks


@dataclass(frozen=True, eq=False)
class WordMatch:
    """BM25 of the query's words in the items' texts (k1 1.5, b .75); no word is left out or stemmed."""

    popularity: Popularity
    index: bm25s.BM25

    @classmethod
    def fit(cls, popularity: Popularity, texts: Sequence[str]) -> "WordMatch":
        """texts: of the items; one of them at least holds a word."""
        index = bm25s.BM25()
        index.index([words(normalised(text)) for text in texts], show_progress=False)
        return cls(popularity, index)

    def recommend(self, histories, k, exclude_history=False):
        return recommend_best(self.popularity, histories, k, exclude_history, self.scores)

    def scores(self, asked: PurchaseLog) -> np.ndarray:
        distinct, row = np.unique(np.array(asked.query, object), return_inverse=True)
        scores = np.zeros((len(distinct), len(self.popularity.counts)), np.float32)
        for place, query in enumerate(distinct):
            if known := self.index.get_tokens_ids(words(normalised(query))):
                scores[place] = self.index.get_scores_from_ids(known)
        return scores[row]


@dataclass(frozen=True, eq=False)
class NearestItems:
    """Ranks by the cosine of the query's embedding and the items'; scores are (1 + cosine) / 2."""

    popularity: Popularity
    texts: QueryTexts
    queries: np.ndarray
    """f32 [queries + 1, D], unit vectors by the numbers of `texts`; zeros for unknown queries"""
    items: np.ndarray
    """f32 [I, D], unit vectors"""

    @classmethod
    def of(cls, popularity: Popularity, texts: QueryTexts, queries: np.ndarray, items: np.ndarray) -> "NearestItems":
        """From vectors of any length: of the rows of queries.parquet f32 [n, D], and of the items f32 [I, D]."""
        by_number = np.zeros((len(texts) + 1, queries.shape[1]), np.float32)
        by_number[texts.of_row] = _unit(queries)
        return cls(popularity, texts, by_number, _unit(items))

    def recommend(self, histories, k, exclude_history=False):
        return recommend_best(self.popularity, histories, k, exclude_history, self.scores)

    def scores(self, asked: PurchaseLog) -> np.ndarray:
        distinct, row = np.unique(self.texts.find(asked.query), return_inverse=True)
        return ((1 + np.clip(self.queries[distinct] @ self.items.T, -1, 1)) / 2)[row]


def search_baselines(
    log: QueryLog,
    baselines: Mapping[str, Any],
    item_texts: Sequence[str] | None = None,
    embeddings: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> dict[str, Recommender]:
    """The baselines of searches by printed name, and popularity without the query.

    Args:
      log: the training events with their queries.
      baselines: as `jaxrec.evaluation.baselines.baselines_of` fitted them: each is also measured within the query, but
        for the popularities, which have their own. ItemKNN should have `NEIGHBORS`.
      item_texts: [I], for BM25; None or without any word: BM25 is left out.
      embeddings: by name of the encoder, of the rows of queries.parquet [n, D] and of the items [I, D].
    """
    popularity = baselines["popularity"]
    recent = RecentQueryPopularity(popularity, log)
    models: dict[str, Recommender] = {
        "popularity": popularity,
        "popularity in query": QueryPopularity(popularity, log),
        "recent popularity in query": recent,
    }
    for name, baseline in baselines.items():
        if "popularity" not in name:
            models[f"{name} in query"] = WithinQuery(baseline, log)
    if personal := baselines.get("personal frequency"):
        models["personal frequency, then recent in query"] = WithinQuery(personal, log, recent)
    if any(words(normalised(text)) for text in item_texts or ()):
        models["bm25"] = WordMatch.fit(popularity, item_texts)
    for name, (queries, items) in (embeddings or {}).items():
        models[f"{name} encoder"] = NearestItems.of(popularity, log.texts, queries, items)
    return models


def _shares(counts: sparse.csr_array) -> np.ndarray:
    """Dense rows that sum to 1; zeros where a row is empty."""
    dense = counts.toarray()
    return dense / np.maximum(dense.sum(1, keepdims=True), 1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
