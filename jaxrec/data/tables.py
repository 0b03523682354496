"""Tables: the raw tables of a source, the engine that computes on tables, and the prepared folder.

A source reads logs into a `RawTables`: ibis tables on one engine (DuckDB by default; nothing below is DuckDB's own
except `connect`, and `jaxrec.data.spark` connects to Spark). `jaxrec.data.prepare` cleans, splits and indexes them and
writes the folder that `Tables` reads:

    items.parquet        sorted by item_id; the row number is the item index used everywhere later
    events.parquet       sorted by (user, session, timestamp, strength of the behavior, item)
    users.parquet        sorted by user_id; the row number is the user index; with a source's columns of profiles
    pairs.parquet        item pairs that belong together, see `jaxrec.data.pairs`
    statistics.json      counts of the tables, and the rows that were dropped, by reason

Where the source has searches or suggestions (`jaxrec.data.queries`):

    searches.parquet     sorted by (user, timestamp); the row number is the column `search` of events.parquet
    suggestions.parquet  sorted by (user, timestamp, prefix)
    queries.parquet      the distinct queries, sorted; the row number is the index of a query
    prefixes.parquet     the distinct prefixes, sorted; the row number is the index of a prefix

A search has user, user_id, session, split, timestamp, search_id, query (text) and query_index. An event that a search
led to has its row in `search`; a search may have led to no event. Where queries were judged for relevance:

    judgments.parquet    query_index int32, item int32, grade float64, split; sorted by (query_index, item)

Further tables of a source (`RawTables.extra`) are written under their own names: live_streams.parquet.
"""

import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import ibis
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ibis.backends import BaseBackend
from ibis.expr.operations import DatabaseTable

from jaxrec.config import UserError
from jaxrec.data.spark import store_rows

SPLITS = ("train", "valid", "test")
Split = Literal["leave_one_out", "last_session", "time", "given"]

FEEDBACK = ("order", "item_click", "click", "show", "not_show", "random")
"""The feedback on a suggested query, strongest first (OneSug Table 1): an item bought through the query; an item
clicked through it; the query clicked; shown; recalled and not shown; drawn at random from the candidates."""
CHOSEN = FEEDBACK[:3]
"""The feedback on a suggested query that the user chose."""

# In the names of tables that `store` makes, and in no other.
_STORED = "jaxrec"
_PRIME = 2_147_483_647


@dataclass(frozen=True)
class RawTables:
    """A source's tables before cleaning. All ibis tables live on `engine`."""

    engine: BaseBackend
    """The ibis backend that holds the tables."""
    items: ibis.Table
    """item_id str, title str, text str, category str, brand str, price float64 and any further attributes. Title and
    text are null in items without a text, where `query_texts` is not 0."""
    events: ibis.Table
    """user_id str, item_id str, timestamp int64 seconds, behavior str, session_id str; no nulls; optional further
    columns. `search_id` str is the search that led to the event, null for none. `given_split` str, of SPLITS, is for
    split "given", in events and in searches."""
    searches: ibis.Table | None = None
    """search_id str (unique), user_id str, timestamp int64 seconds, query str, session_id str; no nulls. A session_id
    names one session of the user in all three tables."""
    suggestions: ibis.Table | None = None
    """user_id str, timestamp int64 seconds, prefix str, query str, feedback str (of FEEDBACK), session_id str; no
    nulls. The rows of one (user_id, timestamp, prefix) are the queries suggested for one typed prefix."""
    judgments: ibis.Table | None = None
    """query str (of a search), item_id str, grade float64: how relevant an item is to a query; one row a pair."""
    profiles: ibis.Table | None = None
    """user_id str (unique) and any columns that describe users."""
    query_texts: int = 0
    """How many of the queries that led to an item in training make its text, where it has none."""
    extra: dict[str, ibis.Table] = field(default_factory=dict)
    """Further tables, by the name of their file in the prepared folder."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows that the source itself left out, by reason."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Entries that the source adds to statistics.json."""


class Source(Protocol):
    """A place that logs come from: a frozen dataclass whose fields are its configuration."""

    split: Split

    @property
    def behaviors(self) -> tuple[str, ...]:
        """All behaviors, from weak to strong."""

    @property
    def target_behaviors(self) -> tuple[str, ...]:
        """The behaviors that are predicted; none where the log has no events: then its searches are, or suggestions."""

    def load(self) -> RawTables:
        """Reads the logs. Raises UserError where they can't be used."""

    def fingerprint(self) -> str:
        """Changes when the logs or the configuration do."""


@dataclass(frozen=True)
class Tables:
    """The tables of a run directory, in memory."""

    items: pa.Table
    events: pa.Table
    users: pa.Table
    pairs: pa.Table
    statistics: dict[str, Any]
    folder: Path

    @classmethod
    def read(cls, folder: Path, event_columns: Sequence[str] | None = None) -> "Tables":
        """Reads a prepared folder; `event_columns` are the columns read of events.parquet, the largest file.

        Raises:
          UserError: the folder holds no prepared tables.
        """
        folder = Path(folder)
        if not (folder / "statistics.json").is_file():
            raise UserError(f"{folder} holds no prepared tables (no statistics.json); run train.py to prepare them")
        names = ("items", "events", "users", "pairs")
        columns = {"events": list(event_columns) if event_columns else None}
        read = {name: pq.read_table(folder / f"{name}.parquet", columns=columns.get(name)) for name in names}
        return cls(**read, statistics=json.loads((folder / "statistics.json").read_text()), folder=folder)


def training_events(folder: Path, behaviors: Sequence[str], columns: Sequence[str]) -> pa.Table:
    """These columns of the train split's events of some behaviors, in the order of events.parquet."""
    events = pq.read_table(folder / "events.parquet", columns=[*dict.fromkeys([*columns, "behavior", "split"])])
    wanted = pc.and_(pc.equal(events["split"], "train"), pc.is_in(events["behavior"], pa.array(list(behaviors))))
    return events.filter(wanted).select(list(columns))


def connect() -> BaseBackend:
    """A fresh embedded DuckDB. Results don't depend on its threads: wherever order matters, it is explicit.

    Results larger than its memory are spilled to the folder of `spilling_into`, else to the system's temporary files.
    The memory is $JAXREC_DUCKDB_MEMORY, such as 8GB, or half of the machine's.

    Raises:
      UserError: $JAXREC_DUCKDB_MEMORY is no size.
    """
    memory = os.environ.get("JAXREC_DUCKDB_MEMORY") or f"{machine_memory() // 2 // 2**20}MiB"
    if not re.fullmatch(r"[1-9][0-9]*(\.[0-9]+)? ?[KMGT]i?B", memory):
        raise UserError(f"the environment variable JAXREC_DUCKDB_MEMORY is {memory!r}; give a size such as 8GB")
    spill = _SPILL.get() or Path(tempfile.gettempdir()) / f"jaxrec-duckdb-{uuid.uuid4().hex}"
    engine = ibis.duckdb.connect()
    engine.raw_sql("SET TimeZone = 'UTC'")
    engine.raw_sql(f"SET memory_limit = '{memory}'")
    engine.con.execute("SET temp_directory = ?", [str(spill.absolute())])
    engine.raw_sql("SET enable_progress_bar = false")
    return engine


_SPILL: ContextVar[Path | None] = ContextVar("spill", default=None)


@contextmanager
def spilling_into(folder: Path) -> Iterator[None]:
    """Engines connected inside spill to `folder` what exceeds their memory; the folder is removed at the end."""
    token = _SPILL.set(folder)
    try:
        yield
    finally:
        _SPILL.reset(token)
        shutil.rmtree(folder, ignore_errors=True)


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: the machine's, or its container's where that has a smaller limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        # Version 1 has a tree for every controller, version 2 one for all. The limits of all groups above count too.
        mount, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            limit = root / "sys/fs/cgroup" / mount / folder / name
            if limit.is_file() and (text := limit.read_text().strip()).isdigit():
                limits.append(int(text))
    return min(limits)


def store(engine: BaseBackend, table: ibis.Table | pa.Table, instead_of: ibis.Table | None = None) -> ibis.Table:
    """Computes a table once and keeps it in the engine under a fresh name; frees the stored table `instead_of`."""
    name = ibis.util.gen_name(_STORED)
    if isinstance(table, pa.Table) and engine.name == "pyspark":
        stored = store_rows(engine, table, name)
    else:
        stored = engine.create_table(name, ibis.memtable(table) if isinstance(table, pa.Table) else table)
    if instead_of is not None:
        free(engine, instead_of)
    return stored


def free(engine: BaseBackend, table: ibis.Table) -> None:
    """Drops a table that `store` made. Any other is left alone: it may be the user's own."""
    if is_stored(table):
        # Plain SQL: ibis 12's own drop_table renders no name with the sqlglot that it installs.
        engine.raw_sql(f"DROP TABLE {table.op().name}")


def is_stored(table: ibis.Table) -> bool:
    """Whether `store` made this table; False for an expression or any other table."""
    operation = table.op()
    return isinstance(operation, DatabaseTable) and operation.name.startswith(f"ibis_{_STORED}_")


@contextmanager
def scratch(engine: BaseBackend) -> Iterator[Callable[[ibis.Table], ibis.Table]]:
    """Intermediate results: `with scratch(engine) as keep: stored = keep(table)`. They are freed at the end.

    `keep` stores a table, or takes over one that is stored already.
    """
    kept = []

    def keep(table: ibis.Table) -> ibis.Table:
        kept.append(table if is_stored(table) else store(engine, table))
        return kept[-1]

    try:
        yield keep
    finally:
        for table in kept:
            free(engine, table)


def count_rows(table: ibis.Table) -> int:
    """The number of rows of an ibis table."""
    return int(table.count().to_pyarrow().as_py())


def mix(seed: int, *columns: ibis.expr.types.IntegerValue) -> ibis.expr.types.IntegerValue:
    """A pseudo-random integer in [0, 2^31 - 1) for every row, the same on every engine and version.

    The square of a linear form modulo a prime: cheap, inside 64 bits, and unlike an engine's `hash`
    never changed by an upgrade.

    Args:
      seed: another seed, another order.
      columns: non-negative integers.
    """
    multipliers = (1_103_515_245, 1_299_709_327, 1_664_525_873, 1_812_433_253)
    linear = (seed * 69_621 + 12_345) % _PRIME
    for column, multiplier in zip(columns, multipliers, strict=False):
        linear = column.cast("int64") % _PRIME * multiplier % _PRIME + linear
    linear = linear % _PRIME
    return linear * linear % _PRIME


def write_table(table: pa.Table, path: Path) -> None:
    """Writes parquet whose bytes depend on nothing but the rows."""
    pq.write_table(table.combine_chunks(), path, compression="zstd", row_group_size=1 << 20)
