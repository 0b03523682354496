"""What each query had led to before any time of the log, as features of candidates (NumPy; no model here).

    found = query_items(texts, query, item, timestamp, PeriodConfig(days=7))
    items, told = found.before(query, day, 64)      # int32 [n], float32 [n, 4]: the most taken first

Unlike `jaxrec.data.search_statistics`, whose counts leave one search out, these hold what came before the question's
period alone. A ranking model compares what was taken with what was not: with counts from which only the taken items'
own search is left out, being one below the others would tell which they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxrec.data.period_counts import PeriodConfig, PeriodCounts, counts_by_period

TOLD = 4
"""numbers told of each item of a query: logs of the count of all time and of late, and their shares in the query"""


@dataclass(frozen=True, eq=False)
class QueryItems:
    """The items of Q distinct queries as compressed rows."""

    numbers: dict[str, int]
    """of normalised texts"""
    first: np.ndarray
    """int64 [Q + 1]: where a query's entries begin"""
    item: np.ndarray
    """int32 [entries]"""
    counts: PeriodCounts
    """of the entries"""

    def before(self, query: int, day: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Items int32 [n], n <= most, that a query (-1: an unknown one) had led to, and float32 [n, TOLD] of each."""
        if query < 0:
            return np.zeros(0, np.int32), np.zeros((0, TOLD), np.float32)
        rows, period = slice(self.first[query], self.first[query + 1]), int(self.counts.periods.of(np.int64(day)))
        count, recent = self.counts.total[period, rows], self.counts.recent[period, rows]
        best = np.argsort(-count, kind="stable")[:most]
        best = best[count[best] > 0]
        shares = [of[best] / max(of.sum(), 1e-9) for of in (count, recent)]
        told = [np.log1p(count[best]), np.log1p(recent[best]), *shares]
        return self.item[rows][best], np.stack(told, axis=1).astype(np.float32)


def query_items(
    texts: Sequence[str], query: np.ndarray, item: np.ndarray, timestamp: np.ndarray, config: PeriodConfig
) -> QueryItems:
    """From distinct pairs of a search and an item that it led to.

    texts: [Q], distinct and normalised; query int [m], the query of each pair, and item int [m]; timestamp int64 [m].
    """
    size = int(item.max(initial=0)) + 1
    keys, entry = np.unique(query.astype(np.int64) * size + item, return_inverse=True)
    counts = counts_by_period(entry, timestamp, len(keys), config)
    first = np.searchsorted(keys // size, np.arange(len(texts) + 1))
    return QueryItems({text: at for at, text in enumerate(texts)}, first, (keys % size).astype(np.int32), counts)
