"""The suggested queries of a typed prefix as targets, with their feedback and rewards (NumPy; no model here).

asked = typed_prefixes(record)               one for each prefix for which a suggested query was chosen
shares = feedback_shares(suggestions, ...)   how often each <prefix, query> met each feedback, as shares
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.config import UserError
from jaxrec.data.examples import Record
from jaxrec.data.tables import CHOSEN, FEEDBACK

LEVELS = len(FEEDBACK)


class TypedPrefix(NamedTuple):
    """What was suggested for one typed prefix."""

    moment: int
    session: int
    prefix: int
    """row of prefixes.parquet"""
    rows: np.ndarray
    """int64 [n], places in the record's suggestions"""


def asked_rows(record: Record) -> np.ndarray:
    """The first suggestion of each typed prefix for which a suggested query was chosen: int64 [n], in order of time."""
    names = ("suggestion_timestamp", "suggestion_session", "suggestion_prefix")
    asked = np.stack([record[name].astype(np.int64) for name in names], axis=1)
    _, first, group = np.unique(asked, axis=0, return_index=True, return_inverse=True)
    chosen = np.zeros(len(first), bool)
    chosen[group.ravel()[record["suggestion_feedback"] < len(CHOSEN)]] = True
    return np.sort(first[chosen])


def typed_prefix(record: Record, row: int) -> TypedPrefix:
    """The typed prefix of a suggestion, with all that was suggested for it."""
    moment, session, prefix = (int(record[f"suggestion_{name}"][row]) for name in ("timestamp", "session", "prefix"))
    start, stop = np.searchsorted(record["suggestion_timestamp"], [moment, moment + 1])
    rows = np.arange(start, stop)
    same = (record["suggestion_session"][rows] == session) & (record["suggestion_prefix"][rows] == prefix)
    return TypedPrefix(moment, session, prefix, rows[same])


def strongest(query: np.ndarray, feedback: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct queries in rising order, and the strongest feedback on each."""
    distinct, place = np.unique(query, return_inverse=True)
    best = np.full(len(distinct), LEVELS, np.int64)
    np.minimum.at(best, place, feedback)
    return distinct, best


@dataclass(frozen=True, eq=False)
class FeedbackShares:
    """p of OneSug §3.4.1 of all triples of a prefix, a query and a feedback in training."""

    key: np.ndarray
    """int64 [n], rising"""
    share: np.ndarray
    """float32 [n]"""
    queries: int
    """numbers of queries"""

    def of(self, prefix: int, query: np.ndarray, feedback: np.ndarray) -> np.ndarray:
        """float32 [n] of queries of one prefix with their feedback; 0 for what the log lacks."""
        wanted = _key(prefix, query, feedback, self.queries)
        place = np.minimum(np.searchsorted(self.key, wanted), len(self.key) - 1)
        return np.where(self.key[place] == wanted, self.share[place], np.float32(0))


def feedback_shares(prefix: np.ndarray, query: np.ndarray, feedback: np.ndarray) -> FeedbackShares:
    """Of the rows of a log, int [n] each and n > 0: how often a pair met its feedback, among all that met it for the
    prefix."""
    queries = int(query.max()) + 1
    key, count = np.unique(_key(prefix, query, feedback, queries), return_counts=True)
    _, group = np.unique(key // queries, return_inverse=True)
    total = np.bincount(group, count)
    return FeedbackShares(key, (count / total[group]).astype(np.float32), queries)


def _key(prefix: np.ndarray | int, query: np.ndarray, feedback: np.ndarray, queries: int) -> np.ndarray:
    """One number a triple, the queries of a prefix and a feedback in one stretch; -1 for unknown queries."""
    key = (np.int64(prefix) * LEVELS + feedback.astype(np.int64)) * queries + query
    return np.where((query >= 0) & (query < queries), key, -1)


def training_shares(tables: Path, prefix_of_row: np.ndarray, query_of_row: np.ndarray) -> FeedbackShares:
    """Of the training rows of suggestions.parquet; numbers int64 of the rows of prefixes.parquet and queries.parquet.

    Raises:
      UserError: nothing was suggested in training.
    """
    path, columns = tables / "suggestions.parquet", ["prefix_index", "query_index", "feedback", "split"]
    table = pq.read_table(path, columns=columns)
    table = table.filter(pc.equal(table["split"], "train"))
    if not table.num_rows:
        raise UserError(f"{path} holds no row of training; give a longer log, or another split")
    feedback = pc.index_in(table["feedback"], pa.array(FEEDBACK)).to_numpy()
    prefix, query = (table[name].to_numpy() for name in columns[:2])
    return feedback_shares(prefix_of_row[prefix], query_of_row[query], feedback)
