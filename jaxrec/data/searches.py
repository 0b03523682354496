"""The last searches and items of a user before a moment, as fixed-shape arrays (NumPy; no model and no tokenizer here).

    record  event     a     b   c d      recent_queries(record, 2, 25)   query [x y]  mask [1 1]
            search      x y     y        recent_items(record, 3, 25)     item  [a b c]  item_query [- y y]
            time      0 ... 10 20 30

Queries are rows of queries.parquet, -1 for none: a text or its tokens are looked up in an array by them. The history of
a request holds texts in place of rows, "" for none; `with_texts` brings a record's history into this form. Sequences
are aligned left, the oldest entry first. A record without searches has no query.
"""

import numpy as np

from jaxrec.data.examples import SEARCH_DTYPES, SUGGESTION_DTYPES, Record
from jaxrec.data.padding import padded

NO_QUERY = -1


def recent_queries(record: Record, count: int, moment: int | None = None) -> dict[str, np.ndarray]:
    """The last searches strictly before `moment` (Unix seconds; None: all of the record).

    Returns:
      query int32 [count], NO_QUERY in the padding, or texts (object [count]) where the record holds texts;
      query_timestamp int64 [count]; query_mask bool [count].
    """
    queries, times = _searches(record)
    index = np.flatnonzero(_before(times, moment))
    index = index[max(len(index) - count, 0) :]
    return {
        "query": padded(queries[index], count, _no_query(queries), queries.dtype),
        "query_timestamp": padded(times[index], count, dtype=np.int64),
        "query_mask": np.arange(count) < len(index),
    }


def recent_items(
    record: Record, count: int, moment: int | None = None, *, wanted: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The last events strictly before `moment` (Unix seconds; None: all of the record), in order of time.

    Args:
      wanted: bool [behaviors], the behaviors that are read, such as clicks; None for all.

    Returns:
      item int32 [count]; item_timestamp int64 [count]; item_query int32 [count], the query of the search that led to
      the event, NO_QUERY for none and in the padding, or texts as in `recent_queries`; item_mask bool [count].
    """
    query = query_of_events(record)
    keep = _before(record["timestamp"], moment)
    if wanted is not None:
        keep = keep & wanted[record["behavior"]]
    index = np.flatnonzero(keep)
    # Sessions may overlap in time, and events are stored by session.
    index = index[np.argsort(record["timestamp"][index], kind="stable")]
    index = index[max(len(index) - count, 0) :]
    return {
        "item": padded(record["item"][index], count),
        "item_timestamp": padded(record["timestamp"][index], count, dtype=np.int64),
        "item_query": padded(query[index], count, _no_query(query), query.dtype),
        "item_mask": np.arange(count) < len(index),
    }


def query_of_events(record: Record) -> np.ndarray:
    """The query of the search that led to each event: int32 [T], NO_QUERY for none, or texts as in `recent_queries`."""
    if "search" not in record:
        return np.full(len(record["item"]), NO_QUERY, np.int32)
    queries, _ = _searches(record)
    return np.append(queries, np.array(_no_query(queries), queries.dtype))[record["search"]]


def with_texts(history: Record, queries: np.ndarray, prefixes: np.ndarray | None = None) -> Record:
    """A history in the form of a request's: texts in place of the rows in `search_query`, `query` and `prefix`.

    Earlier suggestions, which no request holds, stay rows.

    Args:
      queries: object [n], the texts of queries.parquet.
      prefixes: object [n], the texts of prefixes.parquet; None where no history has a prefix.
    """
    tables = {"search_query": queries, "query": queries, "prefix": prefixes}
    return history | {name: texts[history[name]] for name, texts in tables.items() if name in history}


def led_to(record: Record, search: int, where: np.ndarray | None = None) -> np.ndarray:
    """The distinct items that one search (its place in the record) led to, of the events in `where` bool [T]."""
    led = record.get("search", np.full(len(record["item"]), -1)) == search
    return np.unique(record["item"][led if where is None else led & where])


def before_moment(record: Record, moment: int, session: int) -> Record:
    """The part of a record that was known at `moment` (Unix seconds) of `session`.

    Events and searches strictly before the moment, also those of the session. Suggestions of earlier sessions alone:
    the feedback on a suggestion comes after it, and how long after is not recorded.
    """
    part = {"events": record["timestamp"] < moment}
    if "search_query" in record:
        part["searches"] = record["search_timestamp"] < moment
    if "suggestion_query" in record:
        earlier = record["suggestion_session"] < session
        part["suggestions"] = earlier & (record["suggestion_timestamp"] < moment)
    return _select(record, **part)


def before_search(record: Record, search: int) -> Record:
    """The part of a record that was known when one of its searches (its place in the record) was made.

    As `before_moment`, with the events and searches of earlier sessions at the very moment too: a log may tell days
    alone, where most of the history would be lost. An event of the moment is left out if it comes of a search not known
    yet.
    """
    moment, session = record["search_timestamp"][search], record["search_session"][search]
    events, searches = (
        (record[f"{log}timestamp"] < moment)
        | ((record[f"{log}timestamp"] == moment) & (record[f"{log}session"] < session))
        for log in ("", "search_")
    )
    # The last entry is the cause of events without a search, whose place is -1.
    events &= (record["timestamp"] < moment) | np.append(searches, True)[record["search"]]
    part = {"events": events, "searches": searches}
    if "suggestion_query" in record:
        earlier = record["suggestion_session"] < session
        part["suggestions"] = earlier & (record["suggestion_timestamp"] < moment)
    return _select(record, **part)


def before_session(record: Record, session: int, moment: int) -> Record:
    """The part of a record in the sessions before `session`, which begins at `moment` (Unix seconds).

    Sessions may overlap in time: events after the moment are left out, and searches and suggestions at or after it. An
    event of an earlier session at the moment itself is kept: in a log that tells days alone, most events would be lost.
    """
    part = {"events": (record["session"] < session) & (record["timestamp"] <= moment)}
    if "search_query" in record:
        part["searches"] = (record["search_session"] < session) & (record["search_timestamp"] < moment)
    if "suggestion_query" in record:
        part["suggestions"] = (record["suggestion_session"] < session) & (record["suggestion_timestamp"] < moment)
    return _select(record, **part)


def _select(
    record: Record, events: np.ndarray, searches: np.ndarray | None = None, suggestions: np.ndarray | None = None
) -> Record:
    """The rows of a record where the masks are True. A search that is not kept led to no event."""
    part = {field: record[field][events] for field in ("item", "behavior", "timestamp", "session")}
    if searches is not None:
        place = np.append(np.where(searches, np.cumsum(searches) - 1, -1), -1)
        part["search"] = place[record["search"][events]].astype(np.int32)
        part |= {field: record[field][searches] for field in SEARCH_DTYPES if field != "search_split"}
    if suggestions is not None:
        part |= {field: record[field][suggestions] for field in SUGGESTION_DTYPES if field != "suggestion_split"}
    return part


def _searches(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """The queries and the times of the searches; none in a record without searches."""
    return record.get("search_query", np.zeros(0, np.int32)), record.get("search_timestamp", np.zeros(0, np.int64))


def _before(timestamps: np.ndarray, moment: int | None) -> np.ndarray:
    return np.ones(len(timestamps), bool) if moment is None else timestamps < moment


def _no_query(queries: np.ndarray) -> int | str:
    """What stands for no query among rows, or among texts."""
    return "" if queries.dtype == object else NO_QUERY
