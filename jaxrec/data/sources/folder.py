"""A user's own logs: a folder with `items.*`, `events.*` and, where there are any, `searches.*`, `suggestions.*`,
`judgments.*` and `users.*`.

Each file is parquet, CSV or JSONL. Columns (a star marks what must be there):

    items        item_id* title*, category, brand, price, text, scenario, product_ids, embedding, any further attributes
    events       user_id* item_id* timestamp* behavior*, session_id, scenario, watch_seconds, search_id, query
    searches     user_id* timestamp* query*, session_id, search_id
    suggestions  user_id* timestamp* prefix* query* feedback*, session_id
    judgments    query* item_id* grade*
    users        user_id*, any columns that describe users

The `search_id` of an event, or else its `query`, names the search that led to it (`jaxrec.data.sources.query_files`).
In CSV, product_ids are separated by `|`. Ids and texts are taken as they are written (`jaxrec.data.sources.formats`).
Files and columns may have other names (`folder_files`, `column_names`), and behaviors other words (`behavior_names`). A
log may be one file of events: then its items are those of the events, with the title, category, brand and price that
the events tell. Where all events are of one behavior, as in a file of ratings, there needs be no column of it.
Rows are numbered from 1 in messages, a header not counted; in JSONL the row is the line.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import ibis
from ibis.backends import BaseBackend

from jaxrec.config import UserError, fingerprint
from jaxrec.console import console
from jaxrec.data.sources.behavior_names import BEHAVIORS, parse_behaviors
from jaxrec.data.sources.checks import Check, TimeForm, TimeUnit, as_text, check_form, check_words, not_null, refuse
from jaxrec.data.sources.column_names import FLAG, parse_columns
from jaxrec.data.sources.event_files import EVENTS, OF_ITEMS, EventForm, known_events, typed_events
from jaxrec.data.sources.files import digest
from jaxrec.data.sources.folder_files import Writing, find_files
from jaxrec.data.sources.formats import Wanted, check_encoding, header_of
from jaxrec.data.sources.item_files import ITEMS, TypedItems, items_of_events, typed_items
from jaxrec.data.sources.judgment_files import JUDGMENTS, GradeColumns, read_judgments, refuse_strangers
from jaxrec.data.sources.query_files import (
    SEARCHES,
    SUGGESTIONS,
    fill_sessions,
    link,
    typed_searches,
    typed_suggestions,
)
from jaxrec.data.sources.reading import read_table
from jaxrec.data.tables import RawTables, Split, connect, count_rows, store

USERS = Wanted(("user_id",), required=("user_id",), ids=("user_id",), further=True)
TABLES = {
    "items": ITEMS,
    "events": EVENTS,
    "searches": SEARCHES,
    "suggestions": SUGGESTIONS,
    "judgments": JUDGMENTS,
    "users": USERS,
}
"""The columns of every table that a folder may have."""
_KNOWN = {name: wanted.names for name, wanted in TABLES.items()} | {"events": (*EVENTS.names, *OF_ITEMS)}


@dataclass(frozen=True)
class Folder:
    """A shop's own tables, in a folder or a file. Faults are refused with file, column, row and the flag that mends
    them; rows that say nothing of a user and an item are counted."""

    path: Path
    """The folder with items.*, events.* and, optionally, searches.*, suggestions.*, judgments.* and users.*; or one
    file of events."""
    behaviors: tuple[str, ...] = BEHAVIORS
    """All behaviors in the log, from weak to strong; or what its words for them mean, as in view=click buy=purchase."""
    target_behaviors: tuple[str, ...] = ("purchase",)
    """The behaviors that are predicted."""
    split: Split = "last_session"
    """How validation and test are held out."""
    session_gap_seconds: int = 1800
    """Without session_id, a longer pause begins a new session."""
    grades: tuple[float, float] = (0.0, 4.0)
    """The scale of the grades of judgments.*: the lowest and the highest."""
    columns: tuple[str, ...] = ()
    """What the columns are called in the files, as in item_id="Product ID" events.timestamp=created_at. An empty name
    leaves a column out."""
    words: tuple[str, ...] = ()
    """The log's own words for behaviors, WORD=BEHAVIOR; `behaviors` in that form sets them."""
    files: tuple[str, ...] = ()
    """The files of tables, where names and columns don't tell, as in items=products.csv; an empty name: no table."""
    delimiter: str | None = None
    """What separates fields of CSV, of one character or more; None: what the header is separated by."""
    encoding: str | None = None
    """The encoding of CSV, such as cp1252; None: UTF-8, or UTF-16 where a mark says so."""
    decimal: Literal[".", ","] | None = None
    """What stands before the decimals of numbers in CSV; None: what the values of a column allow alone."""
    header: tuple[str, ...] = ()
    """The columns of a file of events in CSV that has no header, in their order."""
    time_format: str | None = None
    """The form of times, as strptime's, such as %d.%m.%Y %H:%M; None: ISO 8601, or whole numbers."""
    time_unit: TimeUnit | None = None
    """The unit of times that are whole numbers; None: seconds."""
    whole_ids: bool | None = None
    """Whether ids that a tool wrote as 12.0, beside missing ones, are read as 12; None: they are refused."""
    least_rating: float | None = None
    """Events with a lower rating, in a column `rating`, are left out; None: none."""

    def __post_init__(self):
        behaviors, words = parse_behaviors(self.behaviors, self.words)
        object.__setattr__(self, "behaviors", behaviors)
        object.__setattr__(self, "words", words)
        parse_columns(self.columns, _KNOWN)

    def fingerprint(self) -> str:
        """Of the files' contents and this configuration, the place of the folder left out."""
        found = self.find()
        files = [digest(path) if name in ("items", "events") else (name, digest(path)) for name, path in found.items()]
        config = (self.behaviors, self.target_behaviors, self.split, self.session_gap_seconds)
        judged = (self.grades,) if "judgments" in found else ()
        # Fields that came later count where they say something.
        told = {name: getattr(self, name) for name in _LATER if getattr(self, name) != getattr(type(self), name)}
        return fingerprint("folder", files, *config, *judged, *([told] if told else []))

    def find(self) -> dict[str, Path]:
        """The file of every table that there is.

        Raises:
          UserError: as `jaxrec.data.sources.folder_files.find_files`; or no file has a column that was named.
        """
        if self.encoding is not None:
            check_encoding(self.encoding)
        path, wanted = Path(self.path), self._wanted()
        if path.is_dir() and (old := next(iter(sorted(path.glob("queries.*"))), None)):
            raise UserError(f"{old} has the earlier name of suggestions{old.suffix}; rename it")
        found = find_files(path, self.files, wanted)
        _check_named(parse_columns(self.columns, _KNOWN), found, wanted)
        return found

    def _wanted(self) -> dict[str, Wanted]:
        """What is wanted of every table, and how it is written."""
        columns = parse_columns(self.columns, _KNOWN)
        writing = Writing(
            self.delimiter or "",
            self.encoding or "utf-8",
            self.decimal or "",
            self.header,
            bool(self.whole_ids),
            columns,
        )
        wanted = {name: writing.of(name, each) for name, each in TABLES.items()}
        if len(self.behaviors) == 1:
            required = tuple(name for name in EVENTS.required if name != "behavior")
            wanted["events"] = replace(wanted["events"], required=required)
        return wanted

    def load(self) -> RawTables:
        """Reads and checks the files.

        Raises:
          UserError: a required file or column is missing, a value is mistyped, or two values contradict each other.
        """
        if not self.target_behaviors or set(self.target_behaviors) - set(self.behaviors):
            raise UserError(
                f"target_behaviors {list(self.target_behaviors)} must be some of behaviors {list(self.behaviors)}; "
                f"change either, as with --data.target-behaviors {self.behaviors[-1]}"
            )
        engine = connect()
        files = _Files(
            engine,
            self.find(),
            self._wanted(),
            TimeForm(self.time_format or "", self.time_unit or "seconds", flags=True),
        )
        if self.time_format:
            check_form(engine, self.time_format)
        path, table = files.read("events")
        if "search_id" in table.columns and "searches" not in files.found and "query" not in table.columns:
            console.print(f"{path.name}: search_id is not used: there is no file of searches", markup=False)
            table = table.drop("search_id")
        form = EventForm(self.behaviors, self.words, files.times, self.least_rating)
        typed = typed_events(engine, path, table, form)
        items = files.items(typed.told)
        events, unknown = known_events(engine, path, typed.table, items.table)
        dropped = {**items.dropped, **typed.dropped, "event of an unknown item": unknown}
        searches = typed_searches(engine, *files.read("searches"), files.times) if "searches" in files.found else None
        suggestions = None
        if "suggestions" in files.found:
            suggestions = typed_suggestions(engine, *files.read("suggestions"), files.times)
        if "search_id" in events.columns:
            linked = link(engine, path, events, searches, self.session_gap_seconds)
            events, searches, dropped["link to an unknown search"] = linked.events, linked.searches, linked.unknown
        tables = fill_sessions(engine, self.session_gap_seconds, events, searches, suggestions)
        judgments = self._judgments(files, items.table, searches)
        profiles = _profiles(engine, *files.read("users")) if "users" in files.found else None
        facts = {"rows_read": files.rows} | ({"items_without_title": items.untitled} if items.untitled else {})
        return RawTables(
            engine, items.table, *tables, judgments=judgments, profiles=profiles, dropped=dropped, facts=facts
        )

    def _judgments(self, files: "_Files", items: ibis.Table, searches: ibis.Table | None) -> ibis.Table | None:
        """The judgments, where there is a file of them; those of queries that nobody searched for are dropped later."""
        path = files.found.get("judgments")
        if path is None:
            return None
        if searches is None:
            message = f"{path} needs searches, since a query has the split of its searches; add a file of searches"
            raise UserError(message)
        judged = read_judgments(files.engine, path, GradeColumns(), self.grades, files.wanted["judgments"])
        mend = "is no item of the items file; add it there, or leave the row out"
        refuse_strangers(path, judged, items, "item_id", mend)
        return judged.drop("_row")


@dataclass
class _Files:
    """The files of a folder while they are read."""

    engine: BaseBackend
    found: dict[str, Path]
    """by table"""
    wanted: dict[str, Wanted]
    """by table"""
    times: TimeForm

    def __post_init__(self):
        self.rows: dict[str, int] = {}
        if "items" not in self.found:
            events = self.wanted["events"]
            self.wanted["events"] = replace(events, names=(*events.names, *OF_ITEMS))

    def read(self, name: str) -> tuple[Path, ibis.Table]:
        """The file of a table, and `read_table` of it; its rows are counted in `rows`."""
        path = self.found[name]
        table = read_table(self.engine, path, self.wanted[name], name)
        self.rows[path.name] = count_rows(table)
        return path, table

    def items(self, told: ibis.Table) -> TypedItems:
        """The items of their file; without one, those of the events, of which `told` has what events tell of items."""
        if "items" in self.found:
            return typed_items(self.engine, *self.read("items"), flags=True)
        path = self.found["events"]
        console.print(f"{path.name}: there is no table of items, so they are those of the events", markup=False)
        return items_of_events(self.engine, path, told)


_LATER = ("columns", "words", "files", "delimiter", "encoding", "decimal", "header", "time_format", "time_unit",
          "whole_ids", "least_rating")  # fmt: skip


def _check_named(
    columns: Mapping[str, Mapping[str, str]], found: Mapping[str, Path], wanted: Mapping[str, Wanted]
) -> None:
    """UserError where no file has a column that was named."""
    headers = {name: header_of(path, wanted[name]) for name, path in found.items()}
    for table, pairs in columns.items():
        files = [name for name in headers if name == table or (not table and name not in columns)]
        there = {each.strip().lower() for name in files for each in headers[name]}
        for ours, theirs in pairs.items() if files else ():
            general = columns.get("", {}).get(ours) == theirs and table
            if theirs and theirs.lower() not in there and not general:
                listed = "; ".join(f"{found[name].name} has {', '.join(headers[name])}" for name in files)
                raise UserError(f"{FLAG} {ours}={theirs!r}: there is no column {theirs!r}; {listed}")


def _profiles(engine: BaseBackend, path: Path, table: ibis.Table) -> ibis.Table:
    """The users with all columns as text; those without an event are left out later."""
    further = [name for name in table.columns if name != "user_id" and not name.startswith("_")]
    check_words(path, table, further, USERS.ids)
    copies = ibis.row_number().over(group_by=as_text(table.user_id), order_by=table._row)
    table = store(engine, table.mutate(_copy=copies), instead_of=table)
    twice = Check("user_id", table._copy > 0, "occurs twice; give every user one row")
    refuse(path, table, [*not_null(table, "user_id"), twice])
    return store(engine, table.select(**{name: as_text(table[name]) for name in ("user_id", *further)}))
