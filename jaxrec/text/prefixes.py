"""Prefixes of queries: their completions, and their embeddings (OneSug §3.2.1).

A short prefix is ambiguous. So its embedding is mixed with those of its most frequent completions (Eq. 2). The same log
gives the pairs on which the encoder is aligned before that (Eq. 1): the term `p2q` of `jaxrec.text.finetune`.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxrec.config import UserError
from jaxrec.text.pair_batches import TextPairs

ROWS_AT_ONCE = 4096
"""Prefixes whose queries' vectors are held at once."""


@dataclass(frozen=True)
class PrefixConfig:
    """Enrichment of prefixes with their completions."""

    weight: float = 0.5
    """Weight of the completions in a prefix's embedding, the w of OneSug Eq. 2; above 0 and below 1."""
    queries: int = 10
    """Number of most frequent completions used for a prefix: the k of OneSug Eq. 2."""
    min_count: int = 1
    """Least count of a completion; rarer ones are dropped."""
    feedback: tuple[str, ...] = ("order", "item_click", "click")
    """Feedback that makes a suggested query count as a completion."""


@dataclass(frozen=True)
class CoOccurrence:
    """The queries of each prefix, most frequent first."""

    prefixes: list[str]
    """P distinct prefixes, sorted."""
    queries: list[str]
    """Distinct queries, sorted."""
    table: np.ndarray
    """int32 [P, k], rows of `queries`, padded with -1."""
    count: np.ndarray
    """int64 [P, k], the count of each completion; 0 in the padding."""

    def pairs(self) -> tuple[list[str], TextPairs]:
        """Texts (prefixes, then queries) and pairs over them for the term `p2q`: prefix as trigger, query as target."""
        row, place = np.nonzero(self.table >= 0)
        return self.prefixes + self.queries, TextPairs(row, len(self.prefixes) + self.table[row, place])


def most_frequent(
    table: np.ndarray, count: np.ndarray, queries: int, min_count: int = 1, without: np.ndarray | None = None
) -> np.ndarray:
    """The most frequent completions of prefixes, int32 [P, queries], rows of queries padded with -1.

    Args:
      table: int [P, k], a prefix's completions in the order of a `CoOccurrence`, padded with -1.
      count: int [P, k], their counts.
      queries: how many; with `without` exact if k is larger than that.
      min_count: least count.
      without: int [P], the completion of each prefix that is counted once less, -1 for none: the query of an example
        that the log holds.
    """
    count = np.where(table >= 0, count, 0)
    if without is not None:
        count = count - ((table == without[:, None]) & (without >= 0)[:, None])
    # Ties in the order of the rows, as in `co_occurrence`.
    order = np.lexsort((table, -count), axis=1)[:, :queries]
    table, count = np.take_along_axis(table, order, axis=1), np.take_along_axis(count, order, axis=1)
    found = np.full((len(table), queries), -1, np.int32)
    found[:, : table.shape[1]] = np.where(count >= max(min_count, 1), table, -1)
    return found


def co_occurrence(log: pa.Table, config: PrefixConfig = PrefixConfig()) -> CoOccurrence:
    """Counts the completions of each prefix.

    Args:
      log: prefix str, query str, feedback str, one row a suggestion: the train rows of suggestions.parquet. Rows
        without a prefix or a query are left out. A prefix without a counted query is kept, with an empty row.

    Raises:
      UserError: a column is missing, or no query of the log has the wanted feedback.
    """
    if missing := [name for name in ("prefix", "query", "feedback") if name not in log.column_names]:
        raise UserError(f"the log of queries has no column {missing[0]!r}: give it prefix, query and feedback")
    if config.queries < 1:
        raise UserError(f"prefixes.queries={config.queries}: give at least 1 query a prefix")
    log = log.select(["prefix", "query", "feedback"])
    log = log.filter(pc.and_(pc.greater(pc.utf8_length(log["prefix"]), 0), pc.greater(pc.utf8_length(log["query"]), 0)))
    taken = log.filter(pc.is_in(log["feedback"], pa.array(config.feedback, pa.string())))
    if not len(taken):
        raise UserError(
            f"no query of the log has feedback {', '.join(config.feedback)} (it has "
            f"{', '.join(map(repr, sorted(set(log['feedback'].to_pylist()), key=str))) or 'no rows'}): "
            "set prefixes.feedback"
        )
    prefixes, queries = sorted(log["prefix"].unique().to_pylist()), sorted(taken["query"].unique().to_pylist())
    row, column = (
        pc.index_in(taken[name], pa.array(known, pa.string())).to_numpy().astype(np.int64)
        for name, known in (("prefix", prefixes), ("query", queries))
    )
    key, count = np.unique(row * len(queries) + column, return_counts=True)
    key, count = key[count >= config.min_count], count[count >= config.min_count]
    row, column = np.divmod(key, len(queries))
    order = np.lexsort((column, -count, row))  # ties in alphabetical order of the query
    row, column, count = row[order], column[order], count[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    kept = place < config.queries
    table = np.full((len(prefixes), config.queries), -1, np.int32)
    counts = np.zeros((len(prefixes), config.queries), np.int64)
    table[row[kept], place[kept]], counts[row[kept], place[kept]] = column[kept], count[kept]
    return CoOccurrence(prefixes, queries, table, counts)


def augment(prefixes: np.ndarray, queries: np.ndarray, table: np.ndarray, weight: float = 0.5) -> np.ndarray:
    """Prefix embeddings mixed with the mean of their queries', f32 [P, D] (OneSug Eq. 2).

        e* = (1 - w) e_p + w mean of the queries' e_q;   e* = e_p for a prefix without queries

    As in the paper, the result is not normalised: the more prefix and queries differ, the shorter it is.

    Args:
      prefixes: f32 [P, D], from the aligned encoder.
      queries: f32 [n, D], from the same encoder.
      table: int [P, k], rows of `queries`, padded with -1.
      weight: w, above 0 and below 1.

    Raises:
      UserError: the weight is not between 0 and 1.
    """
    if not 0 < weight < 1:
        raise UserError(f"prefixes.weight={weight} must be above 0 and below 1, such as 0.5")
    mixed = np.array(prefixes, np.float32)
    for start in range(0, len(mixed), ROWS_AT_ONCE):
        some = table[start : start + ROWS_AT_ONCE]
        where = (some >= 0)[..., None]
        count = where.sum(1)
        mean = np.where(where, queries[some], 0).sum(1) / np.maximum(count, 1)
        own = mixed[start : start + ROWS_AT_ONCE]
        own[:] = np.where(count > 0, (1 - weight) * own + weight * mean, own)
    return mixed
