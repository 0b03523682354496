"""What a prepared log tells of queries and items: clicks, related queries, related items, levels, judgments.

Everything is of the train split. An event counts for the query of the search that led to it.

    q2q, i2i   ItemCF and Swing (`jaxrec.data.pairs`) with items as the users of queries, and the other way round
    q2i        the items that were clicked for a query
    rank       the items of a query by their strongest behavior: shown, clicked, ordered
    relevance  judgments.parquet, its grades scaled to [0, 1]
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.config import UserError, check_least
from jaxrec.data.judgments import FILE, graded_pairs
from jaxrec.data.pairs import PairConfig, build_pairs
from jaxrec.data.tables import connect, store
from jaxrec.files import read_json

SHOWN, CLICKED, ORDERED = range(3)
KINDS = ("itemcf", "swing")


def _check_kinds(config: Any, *names: str) -> None:
    for name in names:
        for kind in getattr(config, name):
            if kind not in KINDS:
                raise UserError(f"configuration key 'queries.{name}' names {kind!r}; give some of {', '.join(KINDS)}")


@dataclass(frozen=True)
class QueryPairConfig:
    """Pairs of queries and items."""

    q2q: tuple[str, ...] = KINDS
    """Kinds of pairs of queries that were clicked for the same items."""
    i2i: tuple[str, ...] = KINDS
    """Kinds of pairs of items that were clicked for the same queries."""
    least_clicks: int = 1
    """Pairs of a query and an item with fewer clicks are dropped."""
    shown: tuple[str, ...] = ("exposure",)
    """Behaviors that are weaker than a click."""
    unseen: tuple[str, ...] = ("pseudo_exposure",)
    """Behaviors that do not count at all."""
    limits: PairConfig = field(default_factory=lambda: PairConfig(itemcf_within="user"))
    """Limits of q2q and i2i."""

    def __post_init__(self):
        check_least(self, "queries", least_clicks=1)
        _check_kinds(self, "q2q", "i2i")


@dataclass(frozen=True)
class AskedPairConfig:
    """Pairs of queries that were asked together."""

    q2q: tuple[str, ...] = KINDS
    """Kinds of pairs: itemcf, of queries of one session (or user, as `limits.itemcf_within` says); swing, of queries
    that users who share few other queries both asked."""
    limits: PairConfig = field(default_factory=PairConfig)
    """Limits of the pairs."""

    def __post_init__(self):
        _check_kinds(self, "q2q")


def has_searches(tables: Path) -> bool:
    """Whether a tables folder has searches."""
    return (Path(tables) / "searches.parquet").is_file()


def searched_items(tables: Path, config: QueryPairConfig = QueryPairConfig()) -> pa.Table:
    """The items that searches of the train split led to.

    Returns:
      query int32, item int32; level int8: the strongest behavior, SHOWN, CLICKED or ORDERED (a target behavior); clicks
      int64: events from CLICKED on. Sorted by (query, item).

    Raises:
      UserError: the folder has no searches.
    """
    if not has_searches(tables):
        raise UserError(f"{tables} has no searches.parquet: pairs of queries need a log with searches")
    statistics = read_json(Path(tables) / "statistics.json")
    levels = {name: CLICKED for name in statistics["behaviors"]}
    levels |= dict.fromkeys(statistics["target_behaviors"], ORDERED) | dict.fromkeys(config.shown, SHOWN)
    names = [name for name in levels if name not in config.unseen]
    wanted = (pc.field("split") == "train") & (pc.field("search") >= 0) & pc.field("behavior").isin(names)
    events = pq.read_table(Path(tables) / "events.parquet", columns=["item", "behavior", "search"], filters=wanted)
    query = pq.read_table(Path(tables) / "searches.parquet", columns=["query_index"])["query_index"].to_numpy()
    level = np.array([levels[name] for name in names], np.int8)
    level = level[pc.index_in(events["behavior"], pa.array(names, pa.string())).to_numpy()]
    rows = pa.table(
        {
            "query": query[events["search"].to_numpy()].astype(np.int32),
            "item": events["item"],
            "level": level,
            "clicks": (level >= CLICKED).astype(np.int64),
        }
    )
    pairs = rows.group_by(["query", "item"]).aggregate([("level", "max"), ("clicks", "sum")])
    pairs = pairs.rename_columns({"level_max": "level", "clicks_sum": "clicks"})
    return pairs.select(["query", "item", "level", "clicks"]).sort_by([("query", "ascending"), ("item", "ascending")])


def clicked(pairs: pa.Table, least_clicks: int = 1) -> pa.Table:
    """The rows of `searched_items` with at least so many clicks."""
    return pairs.filter(pc.greater_equal(pairs["clicks"], least_clicks))


def query_pairs(tables: Path, config: QueryPairConfig = QueryPairConfig()) -> dict[str, tuple[np.ndarray, ...]]:
    """The pairs of each term of the alignment (OneSearch §3.1.1): left int [n], right int [n], value [n] of some.

    Queries are rows of queries.parquet, items of items.parquet. `rank` has the levels of queries with more than one
    level, `relevance` the judged pairs where judgments.parquet exists. Terms without pairs are empty.

    Raises:
      UserError: as `searched_items`, or judgments.parquet can't be used.
    """
    pairs = searched_items(tables, config)
    clicks = clicked(pairs, config.least_clicks)
    found = {
        "q2q": related(clicks, "query", "item", config.q2q, config.limits),
        "i2i": related(clicks, "item", "query", config.i2i, config.limits),
        "q2i": (clicks["query"].to_numpy(), clicks["item"].to_numpy()),
        "rank": _levels(pairs),
    }
    return found | {"relevance": relevance(Path(tables))}


def related(
    clicks: pa.Table, of: str, by: str, kinds: tuple[str, ...], limits: PairConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of the values of column `of` that share values of column `by`, int32 [n] each; of each pair one is kept."""
    # To `build_pairs`, what is shared are users of one session each.
    return _pairs(pa.table({"user": clicks[by], "session": clicks[by], "item": clicks[of]}), kinds, limits)


def asked_together(asked: pa.Table, config: AskedPairConfig) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of queries that users asked in the same sessions, or that the same users asked, int32 [n] each.

    asked: int32 user, session and item, the number of a query; distinct.
    """
    return _pairs(asked, config.q2q, config.limits)


def _pairs(log: pa.Table, kinds: tuple[str, ...], limits: PairConfig) -> tuple[np.ndarray, np.ndarray]:
    if not kinds or not log.num_rows:
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    engine = connect()
    pairs = build_pairs(engine, store(engine, log), limits)
    pairs = pairs.filter(pc.is_in(pairs["kind"], pa.array(kinds))).select(["item", "other"])
    pairs = pairs.group_by(["item", "other"]).aggregate([]).sort_by([("item", "ascending"), ("other", "ascending")])
    return pairs["item"].to_numpy(), pairs["other"].to_numpy()


def relevance(tables: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The judged pairs of the train split: query, item, and the grade scaled to [0, 1]; none where there are none.

    The lowest and the highest grade of all splits are 0 and 1.

    Raises:
      UserError: a grade is missing or no number, or all grades are equal.
    """
    judged = graded_pairs(tables, "train")
    if judged is None:
        return np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
    if judged.lowest == judged.highest:
        raise UserError(
            f"{tables / FILE}: all grades are {judged.lowest:g}: relevance needs at least two different grades"
        )
    scaled = (judged.grade - judged.lowest) / (judged.highest - judged.lowest)
    return judged.query, judged.item, scaled.astype(np.float32)


def _levels(pairs: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """query, item, level of the queries with items at two levels or more."""
    query, item, level = (pairs[name].to_numpy() for name in ("query", "item", "level"))
    size = int(query.max(initial=-1)) + 1
    lowest, highest = np.full(size, ORDERED), np.full(size, SHOWN)
    np.minimum.at(lowest, query, level)
    np.maximum.at(highest, query, level)
    keep = (highest > lowest)[query]
    return query[keep], item[keep], level[keep]
