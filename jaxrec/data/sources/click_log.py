"""A log of clicks on search results: one file with `user, time, query, item` and, where there are several, `behavior`.

    user  query_time               click_time               sku      query
    1     2011-08-11 05:02:07.564  2011-08-11 05:02:55.937  1973042  troy

A search is a user, a time and a query; its rows are the events that it led to. Queries are kept as they were typed.
Where the items have no texts, the queries that led to an item in training are its text (`jaxrec.data.item_texts`).
"""

from dataclasses import dataclass
from pathlib import Path

import ibis
from ibis import _
from ibis.backends import BaseBackend

from jaxrec.config import UserError, fingerprint
from jaxrec.data.sources.checks import Check, as_seconds, as_text, check_words, choice, not_null, refuse
from jaxrec.data.sources.files import digest
from jaxrec.data.sources.formats import Wanted, check_encoding
from jaxrec.data.sources.item_files import ITEMS, typed_items
from jaxrec.data.sources.query_files import fill_sessions, not_blank
from jaxrec.data.sources.reading import read_table
from jaxrec.data.tables import RawTables, Split, connect, store


@dataclass(frozen=True)
class ClickLog:
    """Clicks on search results, in a file of CSV, TSV, JSONL or parquet; CSV, TSV and JSONL may be packed (.gz)."""

    path: Path
    """The file of clicks."""
    items: Path | None = None
    """A file of items (item_id, title and further columns); None: the items of the log, without texts."""
    user: str = "user"
    """The column of the user."""
    time: str = "time"
    """The column of the time of the search."""
    query: str = "query"
    """The column of the query."""
    item: str = "item"
    """The column of the item."""
    behavior: str = "behavior"
    """The column of the behavior; a file without it holds rows of the strongest behavior alone."""
    event_time: str = ""
    """The column of the time of the event; without one it is that of the search."""
    behaviors: tuple[str, ...] = ("click",)
    """All behaviors in the log, from weak to strong."""
    target_behaviors: tuple[str, ...] = ("click",)
    """The behaviors that are predicted."""
    query_texts: int = 5
    """How many training queries make the text of an item without one."""
    split: Split = "time"
    """How validation and test are held out."""
    session_gap_seconds: int = 1800
    """A longer pause of a user begins a new session."""
    encoding: str = "utf-8"
    """The encoding of CSV and TSV, such as cp1252."""

    def fingerprint(self) -> str:
        """Of the files' contents and this configuration, their places left out."""
        files = [digest(Path(path)) for path in (self.path, self.items) if path is not None and Path(path).is_file()]
        names = (self.user, self.time, self.query, self.item, self.behavior, self.event_time, self.encoding)
        config = (self.behaviors, self.target_behaviors, self.query_texts, self.split, self.session_gap_seconds)
        return fingerprint("click_log", files, names, *config)

    def load(self) -> RawTables:
        """Reads and checks the files.

        Raises:
          UserError: a file or a column is missing, or a value is.
        """
        self._check()
        path, engine = Path(self.path), connect()
        clicks = self._clicks(engine, path)
        group = ["user_id", "asked", "query"]
        clicks = clicks.mutate(search_id=_._row.min().over(ibis.window(group_by=group)).cast("string"))
        clicks = store(engine, clicks.mutate(session_id=ibis.null("string")))
        searches = clicks.filter(_._row.cast("string") == _.search_id)
        searches = searches.select("search_id", "user_id", "query", "session_id", "_row", timestamp=_.asked)
        columns = ("user_id", "item_id", "timestamp", "behavior", "session_id", "search_id", "_row")
        events, searches, _none = fill_sessions(
            engine, self.session_gap_seconds, clicks.select(*columns), store(engine, searches), None
        )
        if self.items is None:
            items, texts, dropped = _items_of(engine, events), self.query_texts, {}
        else:
            wanted = Wanted(**{**vars(ITEMS), "encoding": self.encoding})
            typed = typed_items(engine, Path(self.items), read_table(engine, Path(self.items), wanted))
            items, texts, dropped = typed.table, 0, typed.dropped
        return RawTables(engine, items, events, searches, query_texts=texts, dropped=dropped)

    def _clicks(self, engine: BaseBackend, path: Path) -> ibis.Table:
        """The checked rows: user_id, asked (the time of the search), query, item_id, timestamp, behavior, _row."""
        required = (self.user, self.time, self.query, self.item, *((self.event_time,) if self.event_time else ()))
        ids = (self.user, self.item)
        table = read_table(engine, path, Wanted((*required, self.behavior), required, ids, encoding=self.encoding))
        check_words(path, table, (self.query, self.behavior), ids)
        asked = as_seconds(table, self.time)
        when = as_seconds(table, self.event_time or self.time)
        early = when.value < asked.value
        checks = [*not_null(table, self.user), *asked.checks, *when.checks, *not_blank(table, self.query)]
        checks += not_null(table, self.item)
        mend = "is before its search; correct the time, or leave the row out"
        checks.append(Check(self.event_time or self.time, early, mend))
        behavior = ibis.literal(self.behaviors[-1])
        if self.behavior in table.columns:
            checks += choice(table, self.behavior, self.behaviors, "rename it, or list all in the source's `behaviors`")
            behavior = as_text(table[self.behavior])
        refuse(path, table, checks)
        texts = {"user_id": self.user, "query": self.query, "item_id": self.item}
        columns = {name: as_text(table[column]) for name, column in texts.items()}
        times = {"asked": asked.value, "timestamp": when.value}
        return store(engine, table.select(**columns, **times, behavior=behavior, _row=table._row), instead_of=table)

    def _check(self) -> None:
        if not self.target_behaviors or set(self.target_behaviors) - set(self.behaviors):
            raise UserError(
                f"target_behaviors {list(self.target_behaviors)} must be some of behaviors {list(self.behaviors)}; "
                "change either"
            )
        check_encoding(self.encoding)
        if self.query_texts < 1:
            raise UserError(f"query_texts={self.query_texts}: an item's text is at least one query; give 1 or more")


def _items_of(engine: BaseBackend, events: ibis.Table) -> ibis.Table:
    """The items of a log, without titles and texts."""
    nothing = {"title": ibis.null("string"), "text": ibis.null("string")}
    further = {"category": ibis.literal(""), "brand": ibis.literal(""), "price": ibis.null("float64")}
    return store(engine, events.select("item_id").distinct().mutate(**nothing, **further))
