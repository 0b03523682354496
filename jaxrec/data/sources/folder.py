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
Rows are numbered from 1 in messages, a header not counted; in JSONL the row is the line.
"""

from dataclasses import dataclass
from pathlib import Path

import ibis
from ibis.backends import BaseBackend

from jaxrec.config import UserError, fingerprint
from jaxrec.console import console
from jaxrec.data.sources.checks import Check, as_number, as_seconds, as_text, check_words, choice, not_null, refuse
from jaxrec.data.sources.files import digest
from jaxrec.data.sources.formats import SUFFIXES, Wanted
from jaxrec.data.sources.item_files import ITEMS, SCENARIOS, typed_items
from jaxrec.data.sources.judgment_files import GradeColumns, read_judgments, refuse_strangers
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

FILES = ("items", "events", "searches", "suggestions", "judgments", "users")

EVENTS = Wanted(
    ("user_id", "item_id", "timestamp", "behavior", "session_id", "scenario", "query", "watch_seconds", "search_id"),
    required=("user_id", "item_id", "timestamp", "behavior"),
    ids=("user_id", "item_id", "session_id", "search_id"),
)
USERS = Wanted(("user_id",), required=("user_id",), ids=("user_id",), further=True)


@dataclass(frozen=True)
class Folder:
    """A folder of tables. Faults are refused with file, column and row; events of unknown items are counted."""

    path: Path
    """The folder with items.*, events.* and, optionally, searches.*, suggestions.*, judgments.* and users.*."""
    behaviors: tuple[str, ...] = ("pseudo_exposure", "exposure", "click", "cart", "purchase")
    """All behaviors in the log, from weak to strong."""
    target_behaviors: tuple[str, ...] = ("purchase",)
    """The behaviors that are predicted."""
    split: Split = "last_session"
    """How validation and test are held out."""
    session_gap_seconds: int = 1800
    """Without session_id, a longer pause begins a new session."""
    grades: tuple[float, float] = (0.0, 4.0)
    """The scale of the grades of judgments.*: the lowest and the highest."""

    def fingerprint(self) -> str:
        """Of the files' contents and this configuration, the place of the folder left out."""
        found = {name: path for name in FILES if (path := _find(Path(self.path), name))}
        files = [digest(path) if name in ("items", "events") else (name, digest(path)) for name, path in found.items()]
        config = (self.behaviors, self.target_behaviors, self.split, self.session_gap_seconds)
        judged = (self.grades,) if "judgments" in found else ()
        return fingerprint("folder", files, *config, *judged)

    def load(self) -> RawTables:
        """Reads and checks the files.

        Raises:
          UserError: a required file or column is missing, a value is mistyped, or two values contradict each other.
        """
        if not self.target_behaviors or set(self.target_behaviors) - set(self.behaviors):
            raise UserError(
                f"target_behaviors {list(self.target_behaviors)} must be some of behaviors {list(self.behaviors)}; "
                "change either"
            )
        folder, engine = Path(self.path), connect()
        if not folder.is_dir():
            raise UserError(
                f"there is no folder {folder}; give the folder with items.* and events.* as the source's path"
            )
        if old := _find(folder, "queries"):
            raise UserError(f"{old} has the earlier name of suggestions{old.suffix}; rename it")
        items = typed_items(engine, *_read(engine, folder, "items", ITEMS))
        searches, suggestions = (
            typed(engine, *_read(engine, folder, name, wanted)) if _find(folder, name) else None
            for name, wanted, typed in (
                ("searches", SEARCHES, typed_searches),
                ("suggestions", SUGGESTIONS, typed_suggestions),
            )
        )
        path, events, unknown = self._events(engine, folder, items, searches is not None)
        dropped = {"event of an unknown item": unknown}
        if "search_id" in events.columns:
            linked = link(engine, path, events, searches, self.session_gap_seconds)
            events, searches, dropped["link to an unknown search"] = linked.events, linked.searches, linked.unknown
        tables = fill_sessions(engine, self.session_gap_seconds, events, searches, suggestions)
        judgments = self._judgments(engine, folder, items, searches)
        profiles = _profiles(engine, *_read(engine, folder, "users", USERS)) if _find(folder, "users") else None
        return RawTables(engine, items, *tables, judgments=judgments, profiles=profiles, dropped=dropped)

    def _judgments(
        self, engine: BaseBackend, folder: Path, items: ibis.Table, searches: ibis.Table | None
    ) -> ibis.Table | None:
        """The judgments, where there is a file of them; those of queries that nobody searched for are dropped later."""
        path = _find(folder, "judgments")
        if path is None:
            return None
        if searches is None:
            message = f"{path} needs searches, since a query has the split of its searches; add a file of searches"
            raise UserError(message)
        judged = read_judgments(engine, path, GradeColumns(), self.grades)
        mend = "is no item of the items file; add it there, or leave the row out"
        refuse_strangers(path, judged, items, "item_id", mend)
        return judged.drop("_row")

    def _events(
        self, engine: BaseBackend, folder: Path, items: ibis.Table, searched: bool
    ) -> tuple[Path, ibis.Table, int]:
        """The file, its events of known items with `_row`, and the number of events of unknown items.

        Where an event can name a search, the events have `search_id` and `query`, null where not given.
        """
        path, table = _read(engine, folder, "events", EVENTS)
        check_words(path, table, ("behavior", "scenario", "query"), EVENTS.ids)
        if "search_id" in table.columns and not searched and "query" not in table.columns:
            console.print(f"{path.name}: search_id is not used: there is no file of searches", markup=False)
            table = table.drop("search_id")
        seconds = as_seconds(table, "timestamp")
        refuse(path, table, [
            *not_null(table, "user_id"),
            *not_null(table, "item_id"),
            *seconds.checks,
            *choice(table, "behavior", self.behaviors, "rename it, or list all in the source's `behaviors`"),
            *(choice(table, "scenario", SCENARIOS, "use one of these") if "scenario" in table.columns else []),
            *(as_number(table, "watch_seconds").checks if "watch_seconds" in table.columns else []),
        ])  # fmt: skip
        columns = {name: as_text(table[name]) for name in ("user_id", "item_id", "behavior")}
        columns |= {name: as_text(table[name]) for name in ("scenario",) if name in table.columns}
        names = ("search_id", "query")
        if any(name in table.columns for name in names):
            columns |= {name: as_text(table[name]) if name in table.columns else ibis.null("string") for name in names}
        if "watch_seconds" in table.columns:
            columns["watch_seconds"] = as_number(table, "watch_seconds").value
        session = as_text(table.session_id) if "session_id" in table.columns else ibis.null("string")
        typed = table.select(**columns, timestamp=seconds.value, session_id=session, _row=table._row)
        typed = store(engine, typed, instead_of=table)
        strangers = typed.anti_join(items, "item_id")
        unknown, size = count_rows(strangers), count_rows(typed)
        if 2 * unknown > size:
            row = strangers.order_by("_row").limit(1).to_pyarrow().to_pylist()[0]
            raise UserError(
                f"{path}, column 'item_id': {unknown} of {size} events are of items that the items file lacks, "
                f"the first in row {row['_row']} ({row['item_id']!r}); "
                f"write the ids the same way in both files, or add the items"
            )
        return path, typed.semi_join(items, "item_id"), unknown


def _profiles(engine: BaseBackend, path: Path, table: ibis.Table) -> ibis.Table:
    """The users with all columns as text; those without an event are left out later."""
    further = [name for name in table.columns if name != "user_id" and not name.startswith("_")]
    check_words(path, table, further, USERS.ids)
    copies = ibis.row_number().over(group_by=as_text(table.user_id), order_by=table._row)
    table = store(engine, table.mutate(_copy=copies), instead_of=table)
    twice = Check("user_id", table._copy > 0, "occurs twice; give every user one row")
    refuse(path, table, [*not_null(table, "user_id"), twice])
    return store(engine, table.select(**{name: as_text(table[name]) for name in ("user_id", *further)}))


def _find(folder: Path, name: str) -> Path | None:
    """The one file that holds the table `name`."""
    found = [path for suffix in SUFFIXES if (path := folder / f"{name}.{suffix}").is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} holds both {found[0].name} and {found[1].name}; keep one of them")
    return found[0] if found else None


def _read(engine: BaseBackend, folder: Path, name: str, wanted: Wanted) -> tuple[Path, ibis.Table]:
    """The file of the table `name`, and `read_table` of it."""
    path = _find(folder, name)
    if path is None:
        raise UserError(
            f"{folder} has no {name}.parquet, {name}.csv or {name}.jsonl; "
            f"add one with the columns {', '.join(wanted.required)}"
        )
    return path, read_table(engine, path, wanted)
