"""Prefixes of queries: their completions, and their embeddings (OneSug §3.2.1).

A short prefix is ambiguous. So its embedding is mixed with those of its most frequent completions (Eq. 2). The same log
gives the pairs on which the encoder is aligned before that (Eq. 1): the term `p2q` of `jaxrec.text.finetune`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxrec.config import UserError
from jaxrec.text.pair_batches import TextPairs


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


def augment(prefixes: jax.Array, queries: jax.Array, table: jax.Array, weight: float = 0.5) -> jax.Array:
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
    where = (table >= 0)[..., None]
    count = where.sum(1)
    mean = jnp.where(where, queries[jnp.maximum(table, 0)], 0.0).sum(1) / jnp.maximum(count, 1)
    return jnp.where(count > 0, (1 - weight) * prefixes + weight * mean, prefixes)
