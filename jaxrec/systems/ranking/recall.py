"""Recall: the few hundred items that a cascade ranks at all, by the nearest embeddings or by a baseline.

Several channels take turns: the first item of each, then the second of each, whatever is new to the list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow.parquet as pq

from jaxrec.config import UserError
from jaxrec.evaluation.baselines import Popularity, PurchaseLog, Recommender, baselines_of, recommend_best
from jaxrec.evaluation.cases import History
from jaxrec.run import Run
from jaxrec.semantic_ids.files.vectors import EMBEDDINGS, read_embeddings
from jaxrec.systems.ranking.model import Ranker
from jaxrec.systems.searches import fit_search_baselines

ENCODER = "encoder"


@dataclass(frozen=True, eq=False)
class NearestToHistory:
    """Ranks by the largest cosine with any of the latest items; scores are (1 + cosine) / 2, 0 without a history."""

    popularity: Popularity
    items: np.ndarray
    """float32 [I, E], of any length"""
    seeds: int
    """latest events that items may be near to"""

    @cached_property
    def unit(self) -> np.ndarray:
        """float32 [I, E] of unit length."""
        return self.items / np.maximum(np.linalg.norm(self.items, axis=1, keepdims=True), 1e-12)

    def recommend(self, histories, k, exclude_history=False):
        return recommend_best(self.popularity, histories, k, exclude_history, self.scores)

    def scores(self, log: PurchaseLog) -> np.ndarray:
        """float32 [users, I]."""
        scores = np.zeros((log.num_users, len(self.items)), np.float32)
        ends = np.searchsorted(log.user, np.arange(log.num_users), side="right")
        starts = np.searchsorted(log.user, np.arange(log.num_users))
        for user, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if end > start:
                latest = np.unique(log.item[max(start, end - self.seeds) : end])
                cosine = (self.unit[latest] @ self.unit.T).max(0)
                scores[user] = (1 + np.clip(cosine, -1, 1)) / 2
        return scores


@dataclass(frozen=True, eq=False)
class InTurns:
    """Several recommenders, whose rankings take turns."""

    channels: tuple[Recommender, ...]

    def recommend(
        self, histories: list[History], k: int, exclude_history: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `Recommender.recommend`; the score of a place n, from 1, is 1 / n."""
        rankings = [channel.recommend(histories, k, exclude_history)[0] for channel in self.channels]
        turns = np.stack(rankings, axis=-1).reshape(len(histories), -1)
        items = np.full((len(histories), k), -1, np.int32)
        for row, mine in enumerate(turns):
            there = mine[mine >= 0]
            _, first = np.unique(there, return_index=True)
            merged = there[np.sort(first)][:k]
            items[row, : len(merged)] = merged
        return items, np.where(items >= 0, 1 / np.arange(1, k + 1), -np.inf).astype(np.float32)


def make_recall(run: Run, ranker: Ranker, channels: Sequence[str], seeds: int) -> InTurns:
    """The channels of a run: `encoder`, and baselines by their names in tables.

    Raises:
      UserError: there is no baseline of a name.
    """
    targets = ranker.target_behaviors
    names = [ranker.behaviors[index] for index in targets]
    found: dict[str, Recommender] = {}
    if ranker.queries is not None:
        known = fit_search_baselines(run, ranker)
        # Where items brought embeddings of their own, no query can be near to them.
        found = known | ({ENCODER: known["aligned encoder"]} if "aligned encoder" in known else {})
    else:
        log, size = PurchaseLog.read(run.tables, names), len(ranker.popularity)
        if set(channels) - {ENCODER}:
            found = dict(baselines_of(log, size, targets))
        item_ids = pq.read_table(run.tables / "items.parquet", columns=["item_id"])["item_id"].to_pylist()
        embeddings = read_embeddings(run.semantic_ids / EMBEDDINGS, item_ids)
        found[ENCODER] = NearestToHistory(Popularity.fit(log, size, targets), embeddings, seeds)
    if missing := [name for name in channels if name not in found]:
        raise UserError(
            f"configuration key 'recall.channels': nothing here is called {missing[0]!r}; there are {', '.join(found)}"
        )
    return InTurns(tuple(found[name] for name in channels))
