"""The baselines of every comparison.

For items: popularity, recent popularity, personal frequency, Markov chain, ItemKNN. For texts: popularity; those of
searches and of suggestions are `search_baselines` and `suggestion_baselines`.

Each is fitted on the train split's events of the target behaviors, and ranks from a user's history alone. All compute a
dense row of scores per user and return the best k, with ties broken by popularity, then by item index. So items of
score 0 are ranked by popularity: the usual popularity fill.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow.parquet as pq
from scipy import sparse

from jaxrec.data.examples import Record
from jaxrec.data.popularity import DAY, PopularityByPeriod, PopularityConfig, popularity_by_period
from jaxrec.data.tables import SPLITS, training_events
from jaxrec.evaluation.cases import History
from jaxrec.targets import TextSpace

USERS_AT_ONCE = 256


class Recommender(Protocol):
    """A model that ranks items for histories: a generative model, a baseline, a stub in tests."""

    def recommend(
        self, histories: list[History], k: int, exclude_history: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """items int32 [B, k] (-1 = none), scores f32 [B, k] (falling, -inf = none)."""
        ...


@dataclass(frozen=True)
class PurchaseLog:
    """Events of many users as flat arrays, the input of the baselines."""

    user: np.ndarray
    """int64 [events], rising."""
    item: np.ndarray
    """int64 [events]."""
    timestamp: np.ndarray
    """int64 [events], seconds."""
    session: np.ndarray
    """int64 [events]: numbered 0, 1, 2.. over all users without gaps, rising with (user, time)."""
    num_users: int
    now: np.ndarray
    """int64 [users]: the time of the request, in seconds."""
    query: tuple[str, ...] = ()
    """[users]: the query of the request, "" without one; empty where no request has one."""

    @property
    def day(self) -> np.ndarray:
        """int64 [users]: the time of the request, in days since 1970."""
        return self.now // DAY

    @classmethod
    def of(cls, histories: Sequence[History], target_behaviors: Sequence[int]) -> "PurchaseLog":
        """Flattens histories, keeping the events of the target behaviors; an empty history is a user without events."""
        lengths = [len(history["item"]) for history in histories]
        user = np.repeat(np.arange(len(histories)), lengths)
        item, behavior, timestamp, session = (
            np.concatenate([np.zeros(0, np.int64), *(history[name] for history in histories)])
            for name in ("item", "behavior", "timestamp", "session")
        )
        keep = np.isin(behavior, target_behaviors)
        user, item, session = user[keep], item[keep].astype(np.int64), session[keep].astype(np.int64)
        last = [int(history["timestamp"][-1]) if len(history["timestamp"]) else 0 for history in histories]
        now = [int(history.get("now", time)) for history, time in zip(histories, last, strict=True)]
        query = tuple(str(history.get("query", "")) for history in histories)
        session = _numbered(user, session)
        return cls(user, item, timestamp[keep], session, len(histories), np.array(now, np.int64), query)

    @classmethod
    def read(cls, tables: Path, behaviors: Sequence[str]) -> "PurchaseLog":
        """The train events of these behaviors in events.parquet, to fit baselines on; there are no requests."""
        columns = ["user", "item", "timestamp", "session"]
        events = training_events(tables, behaviors, columns)
        user, item, timestamp, session = (events[name].to_numpy().astype(np.int64) for name in columns)
        users = pq.read_metadata(tables / "users.parquet").num_rows
        return cls(user, item, timestamp, _numbered(user, session), users, np.zeros(users, np.int64))

    def session_users(self) -> np.ndarray:
        """int64 [sessions]: the user of each session."""
        users = np.zeros(self.session.max(initial=-1) + 1, np.int64)
        users[self.session] = self.user
        return users


@dataclass(frozen=True)
class Popularity:
    """Ranks by the number of train events; the fallback of every other baseline."""

    counts: np.ndarray
    """int64 [I]: events of the target behaviors in the train split."""
    target_behaviors: tuple[int, ...]
    order: np.ndarray = field(init=False)
    """int64 [I]: items by falling count, then rising index; the tie order of every baseline."""

    def __post_init__(self):
        object.__setattr__(self, "order", np.argsort(-self.counts, kind="stable"))

    @classmethod
    def fit(cls, log: PurchaseLog, num_items: int, target_behaviors: Sequence[int]) -> "Popularity":
        return cls(np.bincount(log.item, minlength=num_items), tuple(target_behaviors))

    def recommend(self, histories, k, exclude_history=False):
        return recommend_best(self, histories, k, exclude_history, self.scores)

    def scores(self, log: PurchaseLog) -> np.ndarray:
        return np.broadcast_to(self.counts.astype(np.float32), (log.num_users, len(self.counts)))


@dataclass(frozen=True)
class RecentPopularity:
    """Ranks by sales in the weeks before the request's week; overall popularity has a weight of 2%."""

    popularity: Popularity
    by_week: PopularityByPeriod

    def recommend(self, histories, k, exclude_history=False):
        return recommend_best(self.popularity, histories, k, exclude_history, self.scores)

    def scores(self, log: PurchaseLog) -> np.ndarray:
        return self.by_week.weights[self.by_week.period(log.day)].astype(np.float32)


@dataclass(frozen=True)
class PersonalFrequency:
    """Ranks by the user's number of earlier purchases of the item; ties by recency, then by popularity."""

    popularity: Popularity

    def recommend(self, histories, k, exclude_history=False):
        return recommend_best(self.popularity, histories, k, exclude_history, self.scores)

    def scores(self, log: PurchaseLog) -> np.ndarray:
        """count + (last session with the item, from 1) / (sessions + 1): recency only breaks ties."""
        shape = (log.num_users, len(self.popularity.counts))
        sessions = np.bincount(log.session_users(), minlength=log.num_users)
        start = np.cumsum(sessions) - sessions
        recency = np.zeros(shape, np.float32)
        # Events are in time order, so the latest of repeated assignments stays.
        recency[log.user, log.item] = (log.session - start[log.user] + 1) / (sessions + 1)[log.user]
        return count_matrix(log.user, log.item, shape).toarray() + recency


@dataclass(frozen=True)
class Markov:
    """First-order chain over sessions: P(item in the next session | item in this one), averaged over this session.

    With one item a session this is the chain from the last item to the next; with baskets the chain of FPMC (Rendle et
    al. 2010, Eq. 3-5) without its factorisation.
    """

    popularity: Popularity
    transitions: sparse.csr_array
    """f32 [I, I]: row i holds P(j in the next session | i in this one)."""

    @classmethod
    def fit(cls, log: PurchaseLog, popularity: Popularity) -> "Markov":
        users = log.session_users()
        baskets = _basket_matrix(log.session, log.item, (len(users), len(popularity.counts)))
        before = np.flatnonzero(users[:-1] == users[1:])
        followed = baskets[before]
        pairs = (followed.T @ baskets[before + 1]).tocsr()
        times = np.asarray(followed.sum(0)).ravel()
        return cls(popularity, (sparse.diags_array(1.0 / np.maximum(times, 1)) @ pairs).tocsr().astype(np.float32))

    def recommend(self, histories, k, exclude_history=False):
        return recommend_best(self.popularity, histories, k, exclude_history, self.scores)

    def scores(self, log: PurchaseLog) -> np.ndarray:
        last = np.full(log.num_users, -1)
        last[log.user] = log.session
        now = last[log.user] == log.session
        basket = _basket_matrix(log.user[now], log.item[now], (log.num_users, len(self.popularity.counts)))
        sizes = np.maximum(np.asarray(basket.sum(1)).ravel(), 1)
        return (basket @ self.transitions).toarray() / sizes[:, None].astype(np.float32)


@dataclass(frozen=True)
class ItemKNN:
    """Item-based collaborative filtering: cosine of the items' user sets, summed over the user's distinct items.

    Deshpande & Karypis 2004: binary user-item matrix, each item keeps its `neighbors` most similar items.
    """

    popularity: Popularity
    similarity: sparse.csr_array
    """f32 [I, I]: row i holds the cosines of i's nearest items; the diagonal is empty."""

    @classmethod
    def fit(cls, log: PurchaseLog, popularity: Popularity, neighbors: int = 100) -> "ItemKNN":
        num_items = len(popularity.counts)
        seen = _basket_matrix(log.user, log.item, (log.num_users, num_items))
        norms = np.sqrt(np.maximum(np.asarray(seen.sum(0)).ravel(), 1)).astype(np.float32)
        items, unit = seen.T.tocsr(), seen @ sparse.diags_array(1.0 / norms)
        rows = []
        for start in range(0, num_items, USERS_AT_ONCE):
            chosen = np.arange(start, min(start + USERS_AT_ONCE, num_items))
            cosine = (items[chosen] @ unit).toarray() / norms[chosen, None]
            cosine[np.arange(len(chosen)), chosen] = 0
            best, values = best_items(cosine, popularity.order, min(neighbors, num_items))
            rows.append(sparse.csr_array((values.ravel(), best.ravel(), np.arange(len(chosen) + 1) * best.shape[1]),
                                         shape=(len(chosen), num_items)))  # fmt: skip
        similarity = sparse.vstack(rows, format="csr")
        similarity.eliminate_zeros()
        return cls(popularity, similarity)

    def recommend(self, histories, k, exclude_history=False):
        return recommend_best(self.popularity, histories, k, exclude_history, self.scores)

    def scores(self, log: PurchaseLog) -> np.ndarray:
        seen = _basket_matrix(log.user, log.item, (log.num_users, len(self.popularity.counts)))
        return (seen @ self.similarity).toarray()


def fit_baselines(records: Iterable[Record], num_items: int, target_behaviors: Sequence[int]) -> dict[str, Recommender]:
    """All baselines, fitted on the train-split events of `records` (whole records, with `split`), by printed name."""
    train = SPLITS.index("train")
    histories = [{key: record[key][record["split"] == train] for key in ("item", "behavior", "session", "timestamp")}
                 for record in records]  # fmt: skip
    return baselines_of(PurchaseLog.of(histories, target_behaviors), num_items, target_behaviors)


def baselines_of(
    log: PurchaseLog, num_items: int, target_behaviors: Sequence[int], neighbors: int = 100
) -> dict[str, Recommender]:
    """All baselines, fitted on a log of train events of the target behaviors, by printed name.

    neighbors: of each item, for ItemKNN.
    """
    popularity = Popularity.fit(log, num_items, target_behaviors)
    by_week = popularity_by_period(log.item, log.timestamp, num_items, PopularityConfig(days=7, floor=0.02))
    return {
        "popularity": popularity,
        "recent popularity": RecentPopularity(popularity, by_week),
        "personal frequency": PersonalFrequency(popularity),
        "markov": Markov.fit(log, popularity),
        "itemknn": ItemKNN.fit(log, popularity, neighbors),
    }


@dataclass(frozen=True, eq=False)
class PopularTexts:
    """Ranks the listed texts by popularity, equal ones as they stand."""

    space: TextSpace

    def recommend(self, histories, k, exclude_history=False):
        order = self.space.most_popular(len(self.space))
        counts = np.zeros(len(order)) if self.space.popularity is None else np.asarray(self.space.popularity)
        texts, scores = np.full((len(histories), k), -1, np.int32), np.full((len(histories), k), -np.inf, np.float32)
        for row, history in enumerate(histories):
            held = self.space.held(history, np.zeros(0, bool)) if exclude_history else ()
            best = order[~np.isin(order, held)][:k]
            texts[row, : len(best)], scores[row, : len(best)] = best, counts[best]
        return texts, scores


def text_baselines(space: TextSpace) -> dict[str, Recommender]:
    """The baselines of a list of texts, by printed name; none without a list."""
    return {"popularity": PopularTexts(space)} if len(space) else {}


def best_items(scores: np.ndarray, order: np.ndarray, k: int, excluded: np.ndarray | None = None):
    """The k best of `scores` f32 [B, I] >= 0: (items int32 [B, k], scores f32 [B, k]), ties by position in `order`.

    `excluded` bool [B, I] are never ranked; padded with -1 and -inf if fewer than k remain.
    """
    num_items = scores.shape[1]
    place = np.empty(num_items, np.uint64)
    place[order] = np.arange(num_items, 0, -1, dtype=np.uint64)
    # The bits of a float >= 0 sort like the float. Score in the high bits and place in the low bits give one distinct
    # integer per item, so a plain partition is exact without ties.
    keys = np.ascontiguousarray(scores, np.float32).view(np.uint32).astype(np.uint64) << np.uint64(32) | place
    if excluded is not None:
        keys[excluded] = 0
    kept = min(k, num_items)
    top = np.partition(keys, num_items - kept, axis=1)[:, num_items - kept :]
    top = np.sort(top, axis=1)[:, ::-1]
    items = np.full((len(scores), k), -1, np.int32)
    values = np.full((len(scores), k), -np.inf, np.float32)
    there = top > 0
    items[:, :kept][there] = order[num_items - (top[there] & np.uint64(0xFFFFFFFF)).astype(np.int64)]
    values[:, :kept][there] = (top[there] >> np.uint64(32)).astype(np.uint32).view(np.float32)
    return items, values


def recommend_best(
    popularity: Popularity,
    histories: list[History],
    k: int,
    exclude_history: bool,
    scores: Callable[[PurchaseLog], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of `scores(log)` f32 [B, I] >= 0, for a few users at a time, as `Recommender.recommend`."""
    items, values = np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
    parts = [(items, values)]
    for start in range(0, len(histories), USERS_AT_ONCE):
        log = PurchaseLog.of(histories[start : start + USERS_AT_ONCE], popularity.target_behaviors)
        excluded = None
        if exclude_history:
            excluded = np.zeros((log.num_users, len(popularity.counts)), bool)
            excluded[log.user, log.item] = True
        parts.append(best_items(scores(log), popularity.order, k, excluded))
    return np.concatenate([items for items, _ in parts]), np.concatenate([values for _, values in parts])


def _numbered(user: np.ndarray, session: np.ndarray) -> np.ndarray:
    """Sessions of single users, numbered over all users without gaps."""
    return np.unique(user * (session.max(initial=0) + 1) + session, return_inverse=True)[1]


def count_matrix(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    """How often each (row, column) comes, f32; repeated pairs are stored apart until they are summed."""
    return sparse.csr_array((np.ones(len(rows), np.float32), (rows, columns)), shape=shape)


def _basket_matrix(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    """0/1 matrix: whether a row contains a column, regardless of counts."""
    matrix = count_matrix(rows, columns, shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix
