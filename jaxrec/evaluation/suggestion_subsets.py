"""Subsets of prefixes and of the queries chosen for them, all in the full ranking.

    unseen_completions            chosen queries that nobody searched for or chose in training
    unseen_prefixes               prefixes for which training has no suggestion; they are part of the long tail
    typed_1, typed_2_3,           by the number of characters typed (`jaxrec.data.words.typed`); typed_0 is of empty
      typed_4_6, typed_7_up         prefixes
    top_, middle_,                prefixes by their number of training suggestions, each a third of all of them (the
      long_tail_prefixes            three kinds of OneSug Table 6)
    clicks, orders                chosen queries that were clicked, or led to an item that was; that led to an order

A subset without a case is left out. So are clicks and orders where there are not both.
"""

from collections.abc import Mapping, Set
from pathlib import Path

import numpy as np

from jaxrec.data.tables import FEEDBACK
from jaxrec.data.words import normalised, typed
from jaxrec.evaluation.cases import Cases
from jaxrec.evaluation.subsets import Subset, text_counts, thirds
from jaxrec.targets import TextSpace

UNSEEN_COMPLETIONS, UNSEEN_PREFIXES = "unseen_completions", "unseen_prefixes"
BY_LENGTH = {"typed_0": 0, "typed_1": 1, "typed_2_3": 2, "typed_4_6": 4, "typed_7_up": 7}
"""The fewest characters of each."""
BY_POPULARITY = ("top_prefixes", "middle_prefixes", "long_tail_prefixes")
CLICKS, ORDERS = "clicks", "orders"
GROUPS = {
    **dict.fromkeys(BY_LENGTH, "by characters typed"),
    **dict.fromkeys((*BY_POPULARITY, UNSEEN_PREFIXES), "by prefix"),
    **dict.fromkeys((UNSEEN_COMPLETIONS, CLICKS, ORDERS), "by chosen query"),
}
"""The subsets that stand together, by name."""


def suggestion_subsets(
    cases: Cases, space: TextSpace, queries: Set[str], prefixes: Mapping[str, int]
) -> tuple[Subset, ...]:
    """The subsets of `text_cases` with prefixes.

    Args:
      queries: normalised texts that training knows, as `known_queries`.
      prefixes: training suggestions by normalised text, as `prefix_counts`.
    """
    given = [history["prefix"] for history in cases.histories]
    return tuple(
        subset
        for subset in (*_of_prefixes(cases, given, prefixes), *_of_truths(cases, space, queries))
        if subset.where.any()
    )


def known_queries(tables: Path) -> set[str]:
    """The normalised queries that somebody searched for or chose in training, of a run's queries.parquet."""
    searched, chosen = (text_counts(tables / "queries.parquet", "query", column) for column in ("count", "chosen"))
    return {text for text in searched if searched[text] or chosen[text]}


def prefix_counts(tables: Path) -> dict[str, int]:
    """Training suggestions by normalised prefix, of a run's prefixes.parquet."""
    return text_counts(tables / "prefixes.parquet", "prefix")


def _of_prefixes(cases: Cases, prefixes: list[str], counts: Mapping[str, int]) -> list[Subset]:
    length = np.searchsorted([*BY_LENGTH.values()], [len(typed(prefix)) for prefix in prefixes], side="right") - 1
    masks = {name: length == place for place, name in enumerate(BY_LENGTH)}
    of_case = np.array([counts.get(normalised(prefix), 0) for prefix in prefixes], np.int64)
    third = thirds(of_case, counts)
    masks |= {name: third == place for place, name in enumerate(BY_POPULARITY)} | {UNSEEN_PREFIXES: of_case == 0}
    return [Subset(name, cases.where & mask[:, None]) for name, mask in masks.items()]


def _of_truths(cases: Cases, space: TextSpace, known: Set[str]) -> list[Subset]:
    unseen, truths = np.zeros_like(cases.where), cases.targets[cases.where].tolist()
    unseen[cases.where] = [normalised(text) not in known for text in space.show(truths)]
    subsets = [Subset(UNSEEN_COMPLETIONS, unseen)]
    if cases.feedback is not None:
        ordered = cases.where & (cases.feedback == FEEDBACK.index("order"))
        clicked = cases.where & ~ordered
        if ordered.any() and clicked.any():
            subsets += [Subset(CLICKS, clicked), Subset(ORDERS, ordered)]
    return subsets
