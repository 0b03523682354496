"""The searches and suggestions of a user's own folder: reading, checks, and the links from events to searches.

Columns (a star marks what must be there):

    searches     user_id* timestamp* query*, session_id, search_id
    suggestions  user_id* timestamp* prefix* query* feedback*, session_id

An event names the search that led to it by `search_id`, or by `query`: then it is the user's latest search with this
query that is not after the event. Without a file of searches, the searches are made from the events' queries.
"""

from dataclasses import dataclass
from pathlib import Path

import ibis
from ibis import _
from ibis.backends import BaseBackend

from jaxrec.config import UserError
from jaxrec.data.sources.checks import (
    AS_IT_STANDS,
    Check,
    TimeForm,
    as_seconds,
    as_text,
    check_words,
    choice,
    not_null,
    refuse,
)
from jaxrec.data.sources.formats import Wanted
from jaxrec.data.tables import FEEDBACK, count_rows, store

SEARCHES = Wanted(
    ("user_id", "timestamp", "query", "session_id", "search_id"),
    required=("user_id", "timestamp", "query"),
    ids=("user_id", "session_id", "search_id"),
)
SUGGESTIONS = Wanted(
    ("user_id", "timestamp", "prefix", "query", "feedback", "session_id"),
    required=("user_id", "timestamp", "prefix", "query", "feedback"),
    ids=("user_id", "session_id"),
)

_VISIBLE = r"[^\s\p{Z}\p{Cc}\x{AD}\x{200B}\x{200E}\x{200F}\x{202A}-\x{202E}\x{2060}\x{2066}-\x{2069}\x{FEFF}]"
"""Matches a text that is more than blanks, those of any script, and characters that can't be seen: one of which
`jaxrec.data.words.normalised` leaves something."""


@dataclass(frozen=True)
class Linked:
    """Events with `search_id`, the searches, and the number of events that named an unknown search."""

    events: ibis.Table
    searches: ibis.Table | None
    unknown: int = 0


def typed_searches(engine: BaseBackend, path: Path, table: ibis.Table, times: TimeForm = AS_IT_STANDS) -> ibis.Table:
    """The checked searches: search_id, user_id, timestamp, query, session_id or null, _row, _made.

    A search without a search_id gets one that no other search has; `_made` marks these.
    """
    check_words(path, table, ("query",), SEARCHES.ids)
    seconds = as_seconds(table, "timestamp", times)
    search_id = as_text(table.search_id) if "search_id" in table.columns else ibis.null("string")
    copies = ibis.row_number().over(group_by=search_id, order_by=table._row)
    table = store(engine, table.mutate(_id=search_id, _copy=copies, _seconds=seconds.value), instead_of=table)
    checks = [*not_null(table, "user_id"), *as_seconds(table, "timestamp", times).checks, *not_blank(table, "query")]
    if "search_id" in table.columns:
        twice = table._id.notnull() & (table._copy > 0)
        checks.append(Check("search_id", twice, "occurs twice; give every search an id of its own"))
    refuse(path, table, checks)
    made = _free_prefix(table) + table._row.cast("string")
    return store(
        engine,
        table.select(
            search_id=table._id.coalesce(made),
            user_id=as_text(table.user_id),
            timestamp=table._seconds,
            query=as_text(table["query"]),
            session_id=as_text(table.session_id) if "session_id" in table.columns else ibis.null("string"),
            _row=table._row,
            _made=table._id.isnull(),
        ),
        instead_of=table,
    )


def typed_suggestions(engine: BaseBackend, path: Path, table: ibis.Table, times: TimeForm = AS_IT_STANDS) -> ibis.Table:
    """The checked suggestions: user_id, timestamp, prefix, query, feedback, session_id or null, _row."""
    check_words(path, table, ("prefix", "query", "feedback"), SUGGESTIONS.ids)
    seconds = as_seconds(table, "timestamp", times)
    checks = [*not_null(table, "user_id"), *seconds.checks, *not_blank(table, "prefix"), *not_blank(table, "query")]
    mend = "use one of these, or leave the row out"
    refuse(path, table, [*checks, *choice(table, "feedback", FEEDBACK, mend)])
    columns = {name: as_text(table[name]) for name in ("user_id", "prefix", "query", "feedback")}
    session = as_text(table.session_id) if "session_id" in table.columns else ibis.null("string")
    typed = table.select(**columns, timestamp=seconds.value, session_id=session, _row=table._row)
    return store(engine, typed, instead_of=table)


def not_blank(table: ibis.Table, column: str) -> list[Check]:
    """A query or a prefix has a visible character."""
    return [Check(column, ~visible(table, column), "is empty; fill it in or leave the row out", show=False)]


def visible(table: ibis.Table, column: str) -> ibis.expr.types.BooleanValue:
    """Where a query or a prefix has a visible character."""
    return as_text(table[column]).fill_null("").re_search(_VISIBLE)


def link(engine: BaseBackend, path: Path, events: ibis.Table, searches: ibis.Table | None, gap: int) -> Linked:
    """Links events to searches.

    Args:
      engine: where intermediate results are kept.
      path: the file of the events.
      events: with `search_id`, `query` and `session_id`, null where not given, and `_row`.
      searches: the result of `typed_searches`; None where there is no file of searches.
      gap: seconds of a pause after which a new session begins.

    Raises:
      UserError: an event contradicts the search that it names, or most of the named searches are unknown.
    """
    if searches is None:
        return _searches_of_events(engine, path, events, gap)
    named = events.select("search_id", "user_id", "timestamp", "query", "_row").filter(_.search_id.notnull())
    by_id = searches.filter(~_._made).select("search_id", of=_.user_id, at=_.timestamp, searched=_["query"])
    _check_links(path, store(engine, named.inner_join(by_id, "search_id")))
    events = store(engine, events.mutate(_named=_.search_id.notnull() | _["query"].notnull()), instead_of=events)
    by_query = _latest(events.filter(_.search_id.isnull() & _["query"].notnull()), searches)
    known = ibis.union(
        named.semi_join(by_id, "search_id").select("_row", found=_.search_id), by_query.select("_row", "found")
    )
    linked = events.left_join(store(engine, known), "_row")
    linked = linked.select(*[name for name in events.columns if name not in ("search_id", "query")], search_id=_.found)
    linked = store(engine, linked, instead_of=events)
    lost = linked.filter(_._named & _.search_id.isnull())
    unknown, size = count_rows(lost), count_rows(linked.filter(_._named))
    if 2 * unknown > size:
        row = lost.order_by("_row").limit(1).to_pyarrow().to_pylist()[0]["_row"]
        raise UserError(
            f"{path}, column 'search_id' or 'query': {unknown} of {size} events name a search that the searches file "
            f"lacks, the first in row {row}; write ids and queries the same way in both files, or add the searches"
        )
    return Linked(linked.drop("_named"), searches, unknown)


def _check_links(path: Path, links: ibis.Table) -> None:
    other, late = links["query"].notnull() & (links["query"] != links.searched), links.timestamp < links["at"]
    refuse(path, links, [
        Check("search_id", links.user_id != links.of, "is a search of another user; name one of this user's searches"),
        Check("query", other, "is not the query of the search that search_id names; correct one, or drop the column"),
        Check("timestamp", late, "is before the search that search_id names; correct the time, or leave the id empty"),
    ])  # fmt: skip


def _latest(events: ibis.Table, searches: ibis.Table) -> ibis.Table:
    """For events that name a query: the user's latest search with it that is not after the event (_row, found)."""
    asked = events.select("_row", "user_id", "query", when=_.timestamp)
    known = searches.select("user_id", "query", found=_.search_id, at=_.timestamp, number=_._row)
    pairs = asked.inner_join(known, ["user_id", "query"]).filter(_["at"] <= _.when)
    order = [ibis.desc("at"), ibis.desc("number")]
    last = ibis.row_number().over(group_by="_row", order_by=order)
    return pairs.mutate(_place=last).filter(_._place == 0).select("_row", "found")


def _searches_of_events(engine: BaseBackend, path: Path, events: ibis.Table, gap: int) -> Linked:
    """Searches made from the queries of events: one for each search_id or, without, for each query of a session.

    A search has the time of its first event. An event with a search_id alone is linked to the search whose query
    another event of this search_id names; without such an event, its search is unknown.
    """
    with_query = events.filter(_["query"].notnull())
    if not count_rows(with_query):
        unknown = count_rows(events.filter(_.search_id.notnull()))
        return Linked(events.drop("search_id", "query"), None, unknown)
    refuse(path, with_query, not_blank(with_query, "query"))
    rows = _sessions(
        _in_stretches(events.mutate(_kind=ibis.literal(0, "int64"), _given=_.session_id), gap), shared=True
    )
    # Which session it is decides what one search is; `fill_sessions`, which knows the suggestions too, fills it in.
    events = store(engine, rows.select(*events.columns, "_given", _session=_.session_id))
    events = events.drop("session_id").rename(session_id="_given")
    made = _free_prefix(events)
    group = ["user_id", "_session", "query"]
    first = _._row.min().over(ibis.window(group_by=group))
    keyed = events.filter(_.search_id.notnull() | _["query"].notnull())
    keyed = keyed.mutate(_id=_.search_id.coalesce(made + first.cast("string")))
    of = ibis.window(group_by="_id", order_by=[_["query"].isnull(), _._row])
    keyed = store(engine, keyed.mutate(_of=_.user_id.first().over(of), _searched=_["query"].first().over(of)))
    differs = (keyed.user_id != keyed._of) | (keyed["query"].notnull() & (keyed["query"] != keyed._searched))
    message = "names another user or query than another row; give every search an id of its own"
    refuse(path, keyed, [Check("search_id", differs, message)])
    unknown = count_rows(keyed.filter(_._searched.isnull()))
    keyed = keyed.filter(_._searched.notnull())
    in_order = ibis.row_number().over(group_by="_id", order_by=["timestamp", "_row"])
    searches = keyed.mutate(_place=in_order).filter(_._place == 0)
    searches = searches.select("user_id", "timestamp", "session_id", "_row", query=_._searched, search_id=_._id)
    linked = events.drop("search_id", "query", "_session").left_join(keyed.select("_row", search_id=_._id), "_row")
    linked = linked.drop("_row_right") if "_row_right" in linked.columns else linked
    return Linked(store(engine, linked), store(engine, searches), unknown)


def _free_prefix(table: ibis.Table) -> str:
    """The beginning of the ids that are made for searches without one; no given id begins so."""
    prefix, given = "row ", table.search_id if "search_id" in table.columns else None
    while given is not None and count_rows(table.filter(given.cast("string").startswith(prefix))):
        prefix = f"_{prefix}"
    return prefix


def fill_sessions(
    engine: BaseBackend, gap: int, events: ibis.Table, searches: ibis.Table | None, suggestions: ibis.Table | None
) -> tuple[ibis.Table, ibis.Table | None, ibis.Table | None]:
    """Fills session_id where it is null: a pause of more than `gap` seconds begins a new session of a user.

    Searches, suggestions and events share their sessions. All that follows holds inside one stretch, which is what a
    user did between two such pauses: what lies in different stretches shares a session only where the log says so. A
    search takes the session of the first event that it led to, and an event the session of the search that led to it.
    Any other row takes the session of the user's nearest earlier row that has one, else of the nearest later row. A log
    of events alone shares nothing: each row without a session_id is in the session of its stretch.
    """
    parts = {"event": events, "search": searches, "suggestion": suggestions}
    parts = {kind: table for kind, table in parts.items() if table is not None}
    linked, rows = searches is not None and "search_id" in events.columns, []
    for place, (kind, table) in enumerate(parts.items()):
        link = table.search_id if linked and kind != "suggestion" else ibis.null("string")
        columns = ("user_id", "timestamp", "session_id", "_row")
        rows.append(table.select(*columns, _kind=ibis.literal(place, "int64"), _link=link))
    rows = store(engine, _in_stretches(ibis.union(*rows) if len(rows) > 1 else rows[0], gap))
    if linked:
        # The events are the first part, and the searches the second.
        rows = store(engine, _share(engine, rows, giving=0, taking=1), instead_of=rows)
        rows = store(engine, _share(engine, rows, giving=1, taking=0), instead_of=rows)
    rows = store(engine, _sessions(rows, shared=len(parts) > 1), instead_of=rows)
    filled = {}
    for place, (kind, table) in enumerate(parts.items()):
        mine = rows.filter(_._kind == place).select("_row", session=_.session_id)
        columns = [name for name in table.columns if name != "session_id" and not name.startswith("_")]
        joined = table.drop("session_id").inner_join(mine, "_row")
        filled[kind] = store(engine, joined.select(*columns, session_id=_.session))
    return filled["event"], filled.get("search"), filled.get("suggestion")


_ORDER = ("timestamp", "_kind", "_row")


def _in_stretches(rows: ibis.Table, gap: int) -> ibis.Table:
    """Adds `_stretch`, the number of a user's pauses of more than `gap` seconds up to the row."""
    in_order = ibis.window(group_by="user_id", order_by=_ORDER)
    so_far = ibis.window(group_by="user_id", order_by=_ORDER, rows=(None, 0))
    rows = rows.mutate(_pause=(_.timestamp - _.timestamp.lag().over(in_order)).fill_null(0) > gap)
    return rows.mutate(_stretch=_._pause.cast("int64").sum().over(so_far)).drop("_pause")


def _share(engine: BaseBackend, rows: ibis.Table, giving: int, taking: int) -> ibis.Table:
    """Rows of the kind `taking` get the session of the first row of the kind `giving` with their link and stretch."""
    given = rows.filter((_._kind == giving) & _._link.notnull() & _.session_id.notnull())
    first = ibis.row_number().over(group_by=["_link", "_stretch"], order_by=_ORDER)
    given = given.mutate(_place=first).filter(_._place == 0)
    given = store(
        engine, given.select(key=_._link, of=_._stretch, given=_.session_id, _to=ibis.literal(taking, "int64"))
    )
    joined = rows.left_join(given, [("_link", "key"), ("_stretch", "of"), ("_kind", "_to")])
    return joined.mutate(session_id=_.session_id.coalesce(_.given)).select(*rows.columns)


def _sessions(rows: ibis.Table, shared: bool = False) -> ibis.Table:
    """The rows of `_in_stretches` with session_id filled: of the nearest row if `shared`, else the stretch's number."""
    number = _._stretch.cast("string").lpad(9, "0")
    if not shared:
        return rows.mutate(session_id=_.session_id.coalesce(number))
    stretch = ["user_id", "_stretch"]
    given = _.session_id.notnull().cast("int64")
    rows = rows.mutate(
        _earlier=given.sum().over(ibis.window(group_by=stretch, order_by=_ORDER, rows=(None, 0))),
        _later=given.sum().over(ibis.window(group_by=stretch, order_by=_ORDER, rows=(0, None))),
    )
    # A group of rows that follow one given session holds that one alone, and so does a group of rows before one.
    rows = rows.mutate(
        _before=_.session_id.max().over(ibis.window(group_by=[*stretch, "_earlier"])),
        _after=_.session_id.max().over(ibis.window(group_by=[*stretch, "_later"])),
    )
    before = ibis.ifelse(_._earlier > 0, _._before, ibis.null("string"))
    return rows.mutate(session_id=_.session_id.coalesce(before, _._after, number))
