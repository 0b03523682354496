"""Judged pairs of a query and an item, and graded NDCG of models on them.

    judged       the full ranking: items without a judgment count as irrelevant
    judged_only  the ranking without them (`jaxrec.evaluation.metrics.condensed`)

Gains are the grades above the lowest one of the file, which is irrelevant, as an item without a judgment is; where
there is one grade alone, its gain is 1. The requests are queries of nobody: there is no history.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.console import progress
from jaxrec.data.judgments import graded_pairs
from jaxrec.evaluation.baselines import Recommender
from jaxrec.evaluation.cases import History
from jaxrec.evaluation.metrics import CUTOFFS, condensed, graded_ndcg_at

JUDGED, JUDGED_ONLY = "judged", "judged_only"


@dataclass(frozen=True, eq=False)
class Judgments:
    """U queries, each with an item of a gain above 0, padded to the longest list of items."""

    queries: tuple[str, ...]
    """[U]"""
    items: np.ndarray
    """int32 [U, L], -1 in the padding"""
    gains: np.ndarray
    """f32 [U, L], 0 in the padding"""
    now: int = 0
    """the time of the requests: the end of the log"""

    @classmethod
    def of(cls, queries: Sequence[str], rows: np.ndarray, items: np.ndarray, gains: np.ndarray, now: int = 0):
        """From n judgments: rows of `queries`, items, and gains; of a pair that is judged twice, the higher gain."""
        order = np.lexsort((-gains, items, rows))
        rows, items, gains = rows[order], items[order], gains[order]
        first = np.ones(len(rows), bool)
        first[1:] = (np.diff(rows) != 0) | (np.diff(items) != 0)
        rows, items, gains = rows[first], items[first], gains[first]
        useful = np.isin(rows, rows[gains > 0])
        rows, items, gains = rows[useful], items[useful], gains[useful]
        distinct, row, counts = np.unique(rows, return_inverse=True, return_counts=True)
        place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        shape = (len(distinct), counts.max(initial=1))
        padded, given = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        padded[row, place], given[row, place] = items, gains
        return cls(tuple(queries[each] for each in distinct), padded, given, now)

    def __len__(self) -> int:
        return len(self.queries)

    def requests(self) -> list[History]:
        """The histories of the requests, with texts."""
        empty = {"item": np.int32, "behavior": np.int8, "timestamp": np.int64, "session": np.int32, "search": np.int32}
        empty |= {"search_query": object, "search_timestamp": np.int64, "search_session": np.int32}
        history = {name: np.zeros(0, dtype) for name, dtype in empty.items()} | {"now": self.now}
        return [{**history, "query": query} for query in self.queries]


def read_judgments(tables: Path, split: str) -> Judgments | None:
    """The judgments of a split of a run's tables; None where there are none.

    Raises:
      UserError: a judged pair has no grade.
    """
    judged = graded_pairs(tables, split)
    if judged is None:
        return None
    gains = judged.grade - judged.lowest if judged.lowest < judged.highest else np.ones_like(judged.grade)
    queries = pq.read_table(tables / "queries.parquet", columns=["query"])["query"].to_pylist()
    now = pc.max(pq.read_table(tables / "events.parquet", columns=["timestamp"])["timestamp"]).as_py() or 0
    found = Judgments.of(queries, judged.query, judged.item, gains.astype(np.float32), int(now))
    return found if len(found) else None


def evaluate_judgments(
    models: Mapping[str, Recommender],
    judgments: Judgments,
    *,
    split: str = "test",
    cutoffs: Sequence[int] = CUTOFFS,
    batch_size: int = 512,
) -> list[dict]:
    """Rows of `ndcg@k`, as `jaxrec.evaluation.comparison.evaluate`, of the subsets `judged` and `judged_only`.

    Rankings are as long as the deepest cutoff; a judged item beyond it is not found.
    """
    rows, requests = [], judgments.requests()
    with progress() as bars:
        task = bars.add_task("judged queries", total=len(judgments) * len(models))
        for name, model in models.items():
            sums = {(subset, k): 0.0 for subset in (JUDGED, JUDGED_ONLY) for k in cutoffs}
            for start in range(0, len(judgments), batch_size):
                batch = slice(start, start + batch_size)
                items, gains = judgments.items[batch], judgments.gains[batch]
                ranked, _ = model.recommend(requests[batch], max(cutoffs))
                for subset, ranking in ((JUDGED, ranked), (JUDGED_ONLY, condensed(ranked, items))):
                    for k in cutoffs:
                        sums[subset, k] += float(graded_ndcg_at(ranking, items, gains, k).sum())
                bars.advance(task, len(ranked))
            found = {"model": name, "split": split, "count": len(judgments), "cases": "judged queries"}
            rows += [
                {**found, "subset": subset, "metric": f"ndcg@{k}", "value": total / len(judgments)}
                for (subset, k), total in sums.items()
            ]
    return rows
