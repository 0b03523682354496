"""A log of whole queries alone: one file with `user, time, query`. There are no items, and nothing tells what followed.

    2A9EABFB35F5B954  970916105432  +md foods +proteins
    BED75271605EBD0C  970916001949  yahoo chat

A search is a distinct (user, time, query). Queries are kept as they were typed; empty ones are dropped and counted. The
tables of items and events are empty, so such a log is for systems that answer with texts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import ibis
import pyarrow as pa
from ibis import _
from ibis.backends import BaseBackend

from jaxrec.config import UserError, fingerprint
from jaxrec.data.sources.checks import TimeForm, as_seconds, as_text, check_form, check_words, not_null, refuse
from jaxrec.data.sources.files import digest
from jaxrec.data.sources.formats import Wanted, check_encoding
from jaxrec.data.sources.query_files import fill_sessions, visible
from jaxrec.data.sources.reading import read_table
from jaxrec.data.tables import RawTables, Split, connect, count_rows, store


@dataclass(frozen=True)
class SearchLog:
    """Searches in a file of CSV, TSV, JSONL or parquet; all but parquet may be packed (.gz)."""

    behaviors: ClassVar[tuple[str, ...]] = ()
    target_behaviors: ClassVar[tuple[str, ...]] = ()

    path: Path
    """The file of searches."""
    user: str = "user"
    """The column of the user."""
    time: str = "time"
    """The column of the time of the search."""
    query: str = "query"
    """The column of the query."""
    columns: tuple[str, ...] = ()
    """Names for all columns of CSV or TSV without a header, in their order; empty: the first line names them."""
    quoted: bool = True
    """Whether `"` quotes fields of CSV and TSV; if not, it is a character like any other."""
    time_format: str = ""
    """How times are written, such as %y%m%d%H%M%S (as strptime's); empty: Unix seconds, or 2024-05-31 18:00:00."""
    split: Split = "time"
    """How validation and test are held out."""
    session_gap_seconds: int = 1800
    """A longer pause of a user begins a new session."""
    encoding: str = "utf-8"
    """The encoding of CSV and TSV, such as cp1252."""

    def fingerprint(self) -> str:
        """Of the file's content and this configuration, its place left out."""
        files = [digest(path) for path in (Path(self.path),) if path.is_file()]
        values = [value for name, value in vars(self).items() if name != "path"]
        return fingerprint("search_log", files, values)

    def load(self) -> RawTables:
        """Reads and checks the file.

        Raises:
          UserError: the file or a column is missing, a user or a time is, or no query is left.
        """
        self._check()
        path, engine = Path(self.path), connect()
        table = read_table(engine, path, self._wanted())
        check_words(path, table, (self.query,), (self.user,))
        size = count_rows(table)
        table = store(engine, table.filter(visible(table, self.query)), instead_of=table)
        queries = count_rows(table)
        if not queries:
            raise UserError(f"{path}, column {self.query!r}: all queries are empty; name the column of the queries")
        if self.time_format:
            check_form(engine, self.time_format)
        when = as_seconds(table, self.time, TimeForm(self.time_format))
        refuse(path, table, [*not_null(table, self.user), *when.checks])
        searches = table.select(
            user_id=as_text(table[self.user]), timestamp=when.value, query=as_text(table[self.query]), _row=table._row
        )
        searches = searches.group_by(["user_id", "timestamp", "query"]).agg(_row=_._row.min())
        searches = searches.mutate(search_id=_._row.cast("string"), session_id=ibis.null("string"))
        searches = store(engine, searches)
        repeats = queries - count_rows(searches)
        events, gap = no_events(engine, row=True), self.session_gap_seconds
        _none, searches, _nothing = fill_sessions(engine, gap, events, searches, None)
        dropped = {"search without a query": size - queries, "repeat of a search in its second": repeats}
        return RawTables(engine, no_items(engine), no_events(engine), searches, dropped=dropped)

    def _wanted(self) -> Wanted:
        names = (self.user, self.time, self.query)
        return Wanted(names, names, (self.user,), encoding=self.encoding, columns=self.columns, quoted=self.quoted)

    def _check(self) -> None:
        check_encoding(self.encoding)
        names = (self.user, self.time, self.query)
        if missing := [name for name in names if self.columns and name not in self.columns]:
            raise UserError(
                f"columns {list(self.columns)} lacks {missing[0]!r}; name the columns of user, time and query in it"
            )


def no_items(engine: BaseBackend) -> ibis.Table:
    """The table of items of a log that has none."""
    texts = ("item_id", "title", "text", "category", "brand")
    return store(engine, pa.schema([*((name, pa.string()) for name in texts), ("price", pa.float64())]).empty_table())


def no_events(engine: BaseBackend, row: bool = False) -> ibis.Table:
    """The table of events of a log that has none; `row` adds the number of a row of its file."""
    texts = ("user_id", "item_id", "behavior", "session_id", "search_id")
    schema = pa.schema([*((name, pa.string()) for name in texts), ("timestamp", pa.int64())])
    return store(engine, (schema.append(pa.field("_row", pa.int64())) if row else schema).empty_table())
