"""Subsets of cases: which truths of which cases count, and whether the ranking leaves out the history.

    all                     the full ranking against everything in the target session (repeat purchases count)
    new                     new items only: items of the user's history are removed from every ranking and the truths
    new_in_full_ranking     the ranking of `all` against the new truths only: discovery in a full ranking

Of searches also, in the full ranking:

    head_, torso_, tail_queries   queries by their number of training searches, each a third of all training searches
    unseen_queries                queries without a training search; they are part of the tail
    led_to_<behavior>             items by the strongest behavior that the search led to, such as a click or an order
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from jaxrec.data.words import normalised
from jaxrec.evaluation.cases import Cases

ALL, NEW, NEW_IN_FULL_RANKING = "all", "new", "new_in_full_ranking"
UNSEEN = "unseen_queries"
BY_FREQUENCY = ("head_queries", "torso_queries", "tail_queries")
LED_TO = "led_to_"


@dataclass(frozen=True, eq=False)
class Subset:
    """Truths that count; a case without any adds nothing to the mean."""

    name: str
    where: np.ndarray
    """bool [U, L], as `Cases.where`"""
    without_history: bool = False
    """whether the items of the history are left out of the ranking"""


def item_subsets(cases: Cases) -> tuple[Subset, ...]:
    """All truths, and those that are new to the user."""
    return Subset(ALL, cases.where), Subset(NEW, cases.new, True), Subset(NEW_IN_FULL_RANKING, cases.new)


def query_subsets(cases: Cases, counts: Mapping[str, int], behaviors: Sequence[str]) -> tuple[Subset, ...]:
    """Searches by how often their query was searched for in training, and truths by behavior.

    A query is head, torso or tail where less than one third, less than two thirds, or more of the training searches are
    for more frequent queries; so equally frequent queries are together.

    Args:
      cases: of searches, with texts.
      counts: training searches by normalised text, as `query_counts`.
      behaviors: names by index. Where only one led to truths, there is no subset of it.
    """
    of_case = np.array([counts.get(normalised(str(history["query"])), 0) for history in cases.histories], np.int64)
    third = thirds(of_case, counts)
    masks = {name: third == place for place, name in enumerate(BY_FREQUENCY)} | {UNSEEN: of_case == 0}
    subsets = [Subset(name, cases.where & mask[:, None]) for name, mask in masks.items()]
    led = np.unique(cases.behavior[cases.where]) if cases.behavior is not None else ()
    if len(led) > 1:
        subsets += [Subset(LED_TO + behaviors[each], cases.where & (cases.behavior == each)) for each in led[::-1]]
    return tuple(subsets)


def thirds(of_case: np.ndarray, counts: Mapping[str, int]) -> np.ndarray:
    """int64 [U]: 0, 1 or 2, the third of the whole of `counts` in which texts with the counts `of_case` int64 [U] lie.

    0 where less than one third of the whole is for more frequent texts, and so on; 2 where the count is 0.
    """
    values = np.sort(np.array([count for count in counts.values() if count], np.int64))
    total = values.sum()
    above = total - np.concatenate([[0], np.cumsum(values)])[np.searchsorted(values, of_case, side="right")]
    return np.where(of_case > 0, 3 * above // max(total, 1), 2)


def query_counts(tables: Path) -> dict[str, int]:
    """Training searches by normalised text, of a run's queries.parquet; two writings of a text are one query."""
    return text_counts(tables / "queries.parquet", "query")


def text_counts(path: Path, name: str, count: str = "count") -> dict[str, int]:
    """The sums of one column of a table by another's normalised texts."""
    table = pq.read_table(path, columns=[name, count])
    counts: dict[str, int] = {}
    for text, number in zip(table[name].to_pylist(), table[count].to_pylist(), strict=True):
        text = normalised(text)
        counts[text] = counts.get(text, 0) + number
    return counts


def is_of_queries(subset: str) -> bool:
    """Whether a subset is one of `query_subsets`."""
    return subset in (*BY_FREQUENCY, UNSEEN) or subset.startswith(LED_TO)
