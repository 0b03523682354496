"""Preparation of searches and suggestions: their users, sessions and splits are those of the events.

    searches.parquet     user, user_id, session, split, timestamp, search_id, query (text), query_index
    suggestions.parquet  user, user_id, session, split, timestamp, prefix, query (texts), prefix_index, query_index,
                         feedback
    queries.parquet      query; count: its searches in training; chosen: suggestions in training that chose the query
    prefixes.parquet     prefix; count: its suggestions in training
    judgments.parquet    query_index, item, grade, split: the relevance of items to queries, where the source tells it

queries.parquet and prefixes.parquet hold the texts of all splits in alphabetical order, so that the index of a text
tells nothing of its split. The counts are of training alone: a text whose counts are 0 was not seen in training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _
from ibis.backends import BaseBackend

from jaxrec.config import UserError
from jaxrec.data.tables import CHOSEN, SPLITS, RawTables, count_rows, store

EVENT, SEARCH, SUGGESTION = "event", "search", "suggestion"


@dataclass(frozen=True)
class QueryTables:
    """The prepared tables of searches and suggestions, in memory."""

    searches: pa.Table | None
    suggestions: pa.Table | None
    queries: pa.Table
    prefixes: pa.Table | None

    def files(self) -> dict[str, pa.Table]:
        """The tables by the names of their files."""
        return {name: table for name, table in vars(self).items() if table is not None}


def has_queries(raw: RawTables) -> bool:
    """Whether the source brought searches or suggestions."""
    return raw.searches is not None or raw.suggestions is not None


def join_activity(raw: RawTables, events: ibis.Table, users: ibis.Table | None) -> ibis.Table:
    """Events, searches and suggestions as one table, with null in the columns that a kind of row does not have.

    So sessions are numbered and split over all that a user did. `_kind` tells the kinds apart; the behavior of searches
    and suggestions is the empty text, which is no behavior.

    Args:
      raw: its searches and suggestions are read.
      events: the cleaned events.
      users: the only users (user_id) whose searches and suggestions are kept; None for all.
    """
    parts = {EVENT: events, SEARCH: raw.searches, SUGGESTION: raw.suggestions}
    parts = {kind: table for kind, table in parts.items() if table is not None}
    if users is not None:
        parts |= {kind: table.semi_join(users, "user_id") for kind, table in parts.items() if kind != EVENT}
    types = {name: kind for table in parts.values() for name, kind in table.schema().items()}
    rows = []
    for kind, table in parts.items():
        missing = {name: ibis.null(of) for name, of in types.items() if name not in table.columns}
        if kind != EVENT:
            missing["behavior"] = ibis.literal("")
        rows.append(table.mutate(**missing, _kind=ibis.literal(kind)).select(*types, "_kind"))
    return ibis.union(*rows) if len(rows) > 1 else rows[0]


def part_of(activity: ibis.Table, kind: str, columns: list[str]) -> ibis.Table:
    """The rows of one kind of `join_activity`, with these columns."""
    return activity.filter(_._kind == kind).select(*columns)


def query_tables(
    engine: BaseBackend, raw: RawTables, activity: ibis.Table, users: pa.Table, cuts: ibis.Table | None = None
) -> QueryTables:
    """The prepared tables of searches and suggestions.

    Args:
      engine: where intermediate results are kept.
      raw: which of the two tables there are.
      activity: the result of `join_activity` with the columns `session` and `split`.
      users: user_id; the row number is the index of a user.
      cuts: suggestions derived from the searches, the result of `jaxrec.data.prefix_cuts.cut_prefixes`.
    """
    user = store(engine, _indexed(users, "user_id", "user"))
    common = ["user_id", "session", "split", "timestamp", "query"]
    searches = suggestions = None
    if raw.searches is not None:
        searches = store(engine, part_of(activity, SEARCH, [*common, "search_id"]).inner_join(user, "user_id"))
    columns = [*common, "prefix", "feedback"]
    if raw.suggestions is not None:
        suggestions = store(engine, part_of(activity, SUGGESTION, columns).inner_join(user, "user_id"))
    elif cuts is not None:
        suggestions = store(engine, cuts.select(columns).inner_join(user, "user_id"))
    queries = _queries(searches, suggestions)
    query = store(engine, _indexed(queries, "query", "query_index"))
    columns, order = ["user", "user_id", "session", "split", "timestamp"], ["user", "timestamp"]
    if searches is not None:
        searches = searches.inner_join(query, "query").order_by([*order, "session", "search_id"])
        searches = _narrow(searches.select(*columns, "search_id", "query", "query_index").to_pyarrow())
    prefixes = None
    if suggestions is not None:
        prefixes = suggestions.group_by("prefix").agg(count=(_.split == "train").cast("int64").sum())
        prefixes = prefixes.order_by("prefix").to_pyarrow()
        prefix = store(engine, _indexed(prefixes, "prefix", "prefix_index"))
        suggestions = suggestions.inner_join(query, "query").inner_join(prefix, "prefix")
        suggestions = suggestions.order_by([*order, "session", "prefix", "query", "feedback"])
        texts = ["prefix", "query", "prefix_index", "query_index", "feedback"]
        suggestions = _narrow(suggestions.select(*columns, *texts).to_pyarrow())
    return QueryTables(searches, suggestions, queries, prefixes)


def judgment_table(
    engine: BaseBackend, raw: RawTables, queries: QueryTables, items: pa.Table, dropped: dict[str, int]
) -> pa.Table:
    """The judgments by the indices of their query and item, with the split of the query's searches, the latest of them.

    Judgments of a query or an item that preparation dropped are counted in `dropped`.
    """
    rank = ibis.cases(*((_.split == name, rank) for rank, name in enumerate(SPLITS)), else_=0)
    searches = store(engine, queries.searches.select(["query_index", "query", "split"]))
    known = searches.mutate(rank=rank).group_by(["query_index", "query"]).agg(rank=_["rank"].max())
    split = ibis.cases(*((_["rank"] == rank, name) for rank, name in enumerate(SPLITS)), else_="")
    item = store(engine, _indexed(items, "item_id", "item"))
    table = raw.judgments.inner_join(known, "query").inner_join(item, "item_id").mutate(split=split)
    table = table.order_by(["query_index", "item"]).select("query_index", "item", "grade", "split").to_pyarrow()
    dropped["judgment of a dropped query or item"] = count_rows(raw.judgments) - table.num_rows
    return table


def search_rows(engine: BaseBackend, events: ibis.Table, searches: pa.Table | None) -> ibis.Table:
    """The events with `search` int32 in place of search_id: the row in searches.parquet of the search that led to them.

    -1 where there is none, or where that search was dropped. Without searches the events have neither column.
    """
    if searches is None:
        return events.drop("search_id") if "search_id" in events.columns else events
    if "search_id" not in events.columns:
        return events.mutate(search=ibis.literal(-1, "int32"))
    rows = store(engine, _indexed(searches, "search_id", "search"))
    events = events.left_join(rows, "search_id")
    return events.mutate(search=_.search.fill_null(-1)).drop("search_id", *_right(events, "search_id"))


def count_kinds(activity: ibis.Table) -> dict[str, int]:
    """Rows of each kind; a table without kinds holds events."""
    if "_kind" not in activity.columns:
        return {EVENT: count_rows(activity)}
    rows = activity.group_by("_kind").agg(n=_.count()).order_by("_kind").to_pyarrow().to_pylist()
    return {row["_kind"]: row["n"] for row in rows}


def table_texts(tables: Path, name: Literal["queries", "prefixes"]) -> np.ndarray:
    """The texts of queries.parquet or prefixes.parquet, object [rows].

    Raises:
      UserError: there is no such table.
    """
    path = tables / f"{name}.parquet"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: use data with a table of searches or suggestions, or with searches that prefixes are "
            "cut from (prepare.suggestions)"
        )
    column = {"queries": "query", "prefixes": "prefix"}[name]
    return np.array(pq.read_table(path, columns=[column])[column].to_pylist(), object)


def _queries(searches: ibis.Table | None, suggestions: ibis.Table | None) -> pa.Table:
    parts = []
    if searches is not None:
        trained = (_.split == "train").cast("int64")
        parts.append(searches.select("query", count=trained, chosen=ibis.literal(0, "int64")))
    if suggestions is not None:
        chosen = ((_.split == "train") & _.feedback.isin(CHOSEN)).cast("int64")
        parts.append(suggestions.select("query", count=ibis.literal(0, "int64"), chosen=chosen))
    rows = ibis.union(*parts) if len(parts) > 1 else parts[0]
    return rows.group_by("query").agg(count=_["count"].sum(), chosen=_.chosen.sum()).order_by("query").to_pyarrow()


def _indexed(table: pa.Table, key: str, name: str) -> pa.Table:
    return pa.table({key: table[key], name: pa.array(range(table.num_rows), pa.int32())})


def _narrow(table: pa.Table) -> pa.Table:
    """`session` as int32, as in events.parquet."""
    return table.set_column(table.column_names.index("session"), "session", table["session"].cast(pa.int32()))


def _right(events: ibis.Table, key: str) -> list[str]:
    return [f"{key}_right"] if f"{key}_right" in events.columns else []
