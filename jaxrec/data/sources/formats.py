"""A user's parquet, CSV or JSONL file as a table: every record of it, and every value as it is written.

Nothing is guessed. CSV: fields are quoted by `"`, which is doubled inside quotes; there are no comments and no escapes.
The header decides whether commas, tabs, semicolons or bars separate fields, where the source does not say. CSV and
JSONL are UTF-8, with or without a byte order mark, and CSV is UTF-16 if its mark says so; a source may name another
encoding of its CSV, and other names of columns. Names in .tsv and .txt are CSV too, and .gz is unpacked.
Identifiers and texts are strings, also where JSON has numbers: `007`, `1.0`, `1e5` and `true` stay so.
"""

import codecs
import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import duckdb
import ibis
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ibis.backends import BaseBackend

from jaxrec.config import UserError
from jaxrec.data.sources import csv_records
from jaxrec.data.sources.checks import FLOAT_ID, WHOLE_FLOAT
from jaxrec.data.sources.csv_records import chunks, dialect_of
from jaxrec.data.sources.files import Real, Whole, as_written, json_lines, kind_of, opened, written
from jaxrec.data.tables import store

SUFFIXES = ("parquet", "csv", "jsonl")
_CSV = (".csv", ".tsv", ".txt", ".log", ".dat", ".data")

WHOLE = r"^-?(0|[1-9][0-9]*)$"
NUMBER = r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?$"
"""Of JSON. `007` and `+1` are no numbers: they are codes, whose zeros and signs count."""

COMMA_NUMBER = r"^-?([0-9]+|[0-9]{1,3}(\.[0-9]{3})+)(,[0-9]+)?$"
"""With a decimal comma, and points between thousands."""
SURE_COMMA = r",([0-9]{1,2}|[0-9]{4,})$"
"""The decimals of a number that has no other reading; three digits may be thousands."""

WHOLE_IDS = "; or give --data.whole-ids True, which reads 12.0 as 12"
"""The end of the message about a floating-point identifier, where the source has that flag."""

VECTORS = pa.list_(pa.float64())


@dataclass(frozen=True)
class Wanted:
    """The columns that are read of a file."""

    names: tuple[str, ...]
    """Columns that jaxrec knows. Upper and lower case are the same in their names."""
    required: tuple[str, ...]
    """Those of them that must be there."""
    ids: tuple[str, ...] = ()
    """Those of them that hold identifiers, or lists of identifiers."""
    vectors: tuple[str, ...] = ()
    """Those of them that hold lists of numbers."""
    numbers: tuple[str, ...] = ()
    """Those of them that hold numbers."""
    whole_ids: bool = False
    """Whether identifiers that are written as 12.0 are read as 12."""
    further: bool = False
    """Whether other columns are read too. Those whose names begin with `_` never are."""
    encoding: str = "utf-8"
    """The encoding of CSV."""
    columns: tuple[str, ...] = ()
    """The names of all columns of CSV without a header, in their order; empty: the first line names them."""
    quoted: bool = True
    """Whether `"` quotes fields of CSV; if not, it is a character like any other."""
    decimal: str = ""
    """What stands before the decimals of numbers in CSV, `.` or `,`; empty: a comma in columns whose values can be read
    in no other way."""
    of_folder: bool = False
    """Whether messages may name the flags of a folder."""
    delimiter: str = ""
    """What separates fields of CSV; empty: the header decides."""
    renamed: tuple[tuple[str, str], ...] = ()
    """(name in the table, name in the file) of columns; a file without the latter has none. An empty name in the file
    leaves the column out."""

    @property
    def known(self) -> tuple[str, ...]:
        """The names by which the file may have columns that are known."""
        return (*self.names, *(theirs for _, theirs in self.renamed if theirs))


def check_encoding(name: str) -> None:
    """Raises UserError if Python knows no such encoding of texts, or one whose commas and line ends are not ASCII's and
    that is not UTF-16."""
    try:
        readable = ",\n".encode(name) == b",\n" or codecs.lookup(name).name.startswith("utf-16")
    except LookupError:
        readable = False
    if not readable:
        raise UserError(f"encoding={name!r} can't be read; give one such as utf-8 or cp1252, or save the file as UTF-8")


def read_file(engine: BaseBackend, path: Path, wanted: Wanted) -> tuple[ibis.Table, list[str]]:
    """A file as a table, with its rows numbered in `_row`, and the names of the columns that are left out.

    Rows count from 1, without the header; in JSONL the row is the line. Columns of CSV are strings, of JSONL strings,
    lists of strings or vectors; further ones that hold numbers or booleans alone are of that type. Parquet keeps its
    types. An empty field of CSV is null.

    Raises:
      UserError: the file can't be read, a row doesn't fit the header, two columns have one name, or an identifier is a
        floating-point number in JSON.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; correct the path")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; it needs the columns {', '.join(wanted.required)}")
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl} | dict.fromkeys(_CSV, _read_csv)
    kind = path.suffix if path.suffix == ".parquet" else kind_of(path)
    if kind not in readers:
        raise UserError(
            f"{path} is no table that can be read; write {', '.join(readers)}; all but .parquet may be packed as .gz"
        )
    try:
        return readers[kind](engine, path, wanted)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} can't be unpacked ({error}); write it again, or unpack it") from error


def header_of(path: Path, wanted: Wanted) -> list[str]:
    """The names of a file's columns; of JSONL those of its first rows.

    Raises:
      UserError: the file can't be read.
    """
    kind = path.suffix if path.suffix == ".parquet" else kind_of(path)
    if kind == ".parquet":
        try:
            return pq.read_schema(path).names
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} can't be read as parquet: {str(error).splitlines()[0]}") from error
    if kind == ".jsonl":
        rows = (row for _, row in islice(json_lines(path, as_written), 100))
        return list(dict.fromkeys(chain.from_iterable(rows)))
    wanted = _marked(path, wanted)
    names = _dialect(path, wanted).names
    _strings(path, "header", names, [0] * len(names), encoding=wanted.encoding)
    return names


def is_table(path: Path) -> bool:
    """Whether a file's name is that of a table that can be read."""
    return path.is_file() and (path.suffix == ".parquet" or kind_of(path) in (".jsonl", *_CSV))


def _places(path: Path, names: Sequence[str], wanted: Wanted) -> dict[str, str]:
    """The columns that are read, from their names in the file to those in the table."""
    known, places, taken = {name.lower(): name for name in wanted.names}, {}, {}
    here = {name.strip().lower() for name in names}
    renamed = {theirs.lower(): ours for ours, theirs in wanted.renamed if theirs.lower() in here}
    # Of a column that another one stands for, or that is left out.
    unread = {ours.lower() for ours, theirs in wanted.renamed if not theirs or theirs.lower() in here}
    if bad := [name for name in names if any(each == "\0" or "\ud800" <= each <= "\udfff" for each in name)]:
        raise UserError(f"{path}: the column {bad[0]!r} has a character that no name can have; rename it")
    for name in names:
        stripped = name.strip()
        place = known.get(stripped.lower(), stripped if wanted.further else "")
        place = "" if stripped.lower() in unread else place
        place = renamed.get(stripped.lower(), place)
        if not place or place.startswith("_"):
            continue
        # DuckDB doesn't tell upper from lower case in names.
        if (other := taken.setdefault(place.lower(), name)) != name or name in places:
            both = f"{other!r} and {name!r}" if other != name else f"two columns {name!r}"
            raise UserError(f"{path} has {both}, which are one name; rename one of them")
        places[name] = place
    return places


# ---- parquet ---------------------------------------------------------------------------------------------------------


def _read_parquet(engine: BaseBackend, path: Path, wanted: Wanted) -> tuple[ibis.Table, list[str]]:
    try:
        schema = pq.read_schema(path)
        # Old writers don't mark texts as such; binary columns that jaxrec doesn't know may be anything.
        unmarked = {field.name for field in schema if pa.types.is_binary(field.type)}
        places = _places(path, schema.names, wanted)
        places = {name: place for name, place in places.items() if place in wanted.names or name not in unmarked}
        table = engine.read_parquet(path, binary_as_string=True)
        columns = {place: table[name] for name, place in places.items()}
        table = store(engine, table.select(**columns, _row=ibis.row_number() + 1))
    except (duckdb.Error, pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} can't be read as parquet: {str(error).splitlines()[0]}") from error
    return table, [name for name in schema.names if name not in places]


# ---- CSV -------------------------------------------------------------------------------------------------------------


def _read_csv(engine: BaseBackend, path: Path, wanted: Wanted) -> tuple[ibis.Table, list[str]]:
    wanted = _marked(path, wanted)
    dialect = _dialect(path, wanted)
    header = dialect.names
    _strings(path, "header", header, [0] * len(header))
    places = _places(path, header, wanted)
    growing, row = _Growing(engine), 1
    for chunk in chunks(path, dialect):
        columns = dict(zip(header, zip(*chunk, strict=True), strict=True))
        rows = range(row, row + len(chunk))
        texts = {
            place: _strings(path, name, columns[name], rows, encoding=wanted.encoding) for name, place in places.items()
        }
        growing.add({place: pc.if_else(pc.equal(text, ""), None, text) for place, text in texts.items()}, rows)
        row += len(chunk)
    table = growing.table(places.values())
    further = [place for place in places.values() if place not in wanted.names]
    numbers = [place for place in places.values() if place in wanted.numbers]
    table = _with_points(table, [*further, *numbers], wanted.decimal)
    return _with_numbers(table, further), [name for name in header if name not in places]


def _dialect(path: Path, wanted: Wanted) -> csv_records.Dialect:
    return dialect_of(
        path, wanted.known, wanted.required, wanted.columns, wanted.quoted, wanted.encoding, wanted.delimiter
    )


def _marked(path: Path, wanted: Wanted) -> Wanted:
    """In UTF-16 where the file begins with its mark; UserError where it seems to be UTF-16 without one."""
    if wanted.encoding != "utf-8":
        return wanted
    with opened(path) as file:
        start = file.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return replace(wanted, encoding="utf-16")
    if b"\0" in start:
        order = "be" if start[:1] == b"\0" else "le"
        raise UserError(
            f"{path}, row 1: this is UTF-16; give --data.encoding utf-16-{order}, or save the file as UTF-8"
        )
    return wanted


# ---- JSONL -----------------------------------------------------------------------------------------------------------


def _read_jsonl(engine: BaseBackend, path: Path, wanted: Wanted) -> tuple[ibis.Table, list[str]]:
    _check_utf8(path)
    growing, columns = _Growing(engine), _JsonColumns(path, wanted)
    lines = json_lines(path, as_written)
    while chunk := list(islice(lines, csv_records.CHUNK_ROWS)):
        rows, records = zip(*chunk, strict=True)
        growing.add(columns.arrays(records, rows), rows)
    if not columns.names:
        raise UserError(f"{path} has no rows; it needs the columns {', '.join(wanted.required)}")
    table = growing.table(columns.places.values(), vectors=wanted.vectors)
    further = {place: columns.kinds.get(place, set()) for place in columns.places.values() if place not in wanted.names}
    table = table.mutate(**{place: table[place].cast("boolean") for place, kinds in further.items() if kinds == {bool}})
    numbers = [place for place, kinds in further.items() if kinds and kinds <= {Whole, Real}]
    return _with_numbers(table, numbers), [name for name in columns.names if name not in columns.places]


class _JsonColumns:
    """The columns of JSON objects as arrays, chunk by chunk, and which types of values each held so far."""

    def __init__(self, path: Path, wanted: Wanted):
        self.path, self.wanted = path, wanted
        self.names: list[str] = []
        self.places: dict[str, str] = {}
        self.kinds: dict[str, set[type]] = {}

    def arrays(self, records: Sequence[dict[str, Any]], rows: Sequence[int]) -> dict[str, pa.Array]:
        """The columns of some objects; those that hold nothing but nulls are left out."""
        here = dict.fromkeys(chain.from_iterable(records))
        if new := [name for name in here if name not in self.names]:
            self.names += new
            self.places = _places(self.path, self.names, self.wanted)
        columns = {}
        for name in here:
            values = [record.get(name) for record in records]
            if name in self.places and any(value is not None for value in values):
                columns[self.places[name]] = self._array(self.places[name], values, rows)
        return columns

    def _array(self, name: str, values: list[Any], rows: Sequence[int]) -> pa.Array:
        kinds, new = self.kinds.setdefault(name, set()), set(map(type, values)) - {type(None)}
        lists = name in self.wanted.vectors or list in kinds
        if not kinds:
            lists |= isinstance(next(value for value in values if value is not None), list)
        if new != {list} if lists else list in new:
            what = "no list" if lists else "a list"
            message = f"holds {what}; give all rows a list, or none"
            self._refuse(name, values, rows, lambda value: isinstance(value, list) != lists, message)
        kinds |= new
        if name in self.wanted.vectors:
            self._refuse(name, values, rows, _is_no_vector, "holds something else than numbers; write lists of numbers")
            numbers = [value and [None if x is None else float(x) for x in value] for value in values]
            return pa.array(numbers, VECTORS)
        if name in self.wanted.ids and not kinds <= {str, Whole}:
            self._refuse(name, values, rows, _holds_fraction if self.wanted.whole_ids else _holds_real, FLOAT_ID)
            self._refuse(
                name, values, rows, lambda value: isinstance(value, dict), "holds an object; write ids as text"
            )
        if lists:
            values = [value and [written(each) for each in value] for value in values]
        elif not kinds <= {str, Whole, Real}:
            values = [written(value) for value in values]
        return _strings(self.path, name, values, rows, lists=lists)

    def _refuse(
        self, name: str, values: list[Any], rows: Sequence[int], bad: Callable[[Any], bool], message: str
    ) -> None:
        for row, value in zip(rows, values, strict=True):
            if value is not None and bad(value):
                shown = f"{value if isinstance(value, str) else written(value)} " if message is FLOAT_ID else ""
                more = WHOLE_IDS if message is FLOAT_ID and self.wanted.of_folder else ""
                raise UserError(f"{self.path}, column {name!r}, row {row}: {shown}{message}{more}")


def _is_no_vector(value: Any) -> bool:
    return not isinstance(value, list) or not set(map(type, value)) <= {Whole, Real, type(None)}


def _holds_fraction(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(each, Real) and not re.fullmatch(WHOLE_FLOAT, each) for each in values)


def _holds_real(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, list) and any(isinstance(each, Real) for each in value))


# ---- both ------------------------------------------------------------------------------------------------------------


def _check_utf8(path: Path) -> None:
    with opened(path) as file:
        start = file.read(1024)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or (b"\0" in start[:4]):
        raise UserError(f"{path}, row 1: this is UTF-16; save the file as UTF-8")


def _strings(
    path: Path, name: str, values: Sequence[Any], rows: Sequence[int], *, lists: bool = False, encoding: str = "utf-8"
) -> pa.Array:
    """Texts, or lists of texts, as an array; UserError for the first that has a byte of no character."""
    kind = pa.list_(pa.string()) if lists else pa.string()
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        pass
    for row, value in zip(rows, values, strict=True):
        try:
            pa.array([value], kind)
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            # Python escapes a byte that is no UTF-8 as the code 0xdc00 + byte.
            what = (
                f"the byte 0x{code - 0xDC00:02x}" if kind_of(path) != ".jsonl" else f"half a character, \\u{code:04x},"
            )
            other = "" if kind_of(path) == ".jsonl" else ", or give its own encoding, such as --data.encoding cp1252"
            raise UserError(
                f"{path}, column {name!r}, row {row}: {what} is no {encoding.upper()}; save the file as UTF-8{other}"
            ) from error
    raise AssertionError("an array of its parts' type can be made of them")


def _with_points(table: ibis.Table, names: Sequence[str], decimal: str) -> ibis.Table:
    """Text columns of numbers with a decimal comma, such as `12,50` and `1.299,00`, with a point in its place.

    Where the source does not say, a column has decimal commas if all its values fit them and one fits nothing else:
    `1,234` alone may be a thousand.
    """
    if not names or decimal == ".":
        return table
    tests = {}
    for place, name in enumerate(names):
        text = table[name].fill_null("")
        tests[f"fits_{place}"] = (text.re_search(COMMA_NUMBER) | (text == "")).all()
        tests[f"sure_{place}"] = text.re_search("," if decimal else SURE_COMMA).any()
    found = table.aggregate(**tests).to_pyarrow().to_pylist()[0]
    commas = [name for place, name in enumerate(names) if found[f"fits_{place}"] and found[f"sure_{place}"]]
    return table.mutate(**{name: table[name].replace(".", "").replace(",", ".") for name in commas})


def _with_numbers(table: ibis.Table, names: Sequence[str]) -> ibis.Table:
    """Text columns that hold nothing but numbers, and nulls, as int64 or float64; the others stay text."""
    if not names:
        return table
    tests = {}
    for place, name in enumerate(names):
        text, whole = table[name], table[name].try_cast("int64").notnull()
        filled = text.notnull().any()
        tests[f"whole_{place}"] = (text.isnull() | (text.re_search(WHOLE) & whole)).all() & filled
        # Whole numbers beyond 64 bits are codes, of which a float would lose digits.
        number = text.re_search(NUMBER) & (whole | ~text.re_search(WHOLE))
        tests[f"real_{place}"] = (text.isnull() | (number & ~text.try_cast("float64").isinf())).all() & filled
    found = table.aggregate(**tests).to_pyarrow().to_pylist()[0]
    types = {name: "float64" for place, name in enumerate(names) if found[f"real_{place}"]}
    types |= {name: "int64" for place, name in enumerate(names) if found[f"whole_{place}"]}
    return table.mutate(**{name: table[name].cast(kind) for name, kind in types.items()})


class _Growing:
    """A table in the engine that is made of chunks. Later chunks may have further columns, null in those before."""

    def __init__(self, engine: BaseBackend):
        self.engine, self.name = engine, ""
        self.columns: list[str] = []

    def add(self, arrays: dict[str, pa.Array], rows: Sequence[int]) -> None:
        """Rows by the names of their columns, with their numbers."""
        chunk = pa.table({**arrays, "_row": pa.array(rows, pa.int64())})
        if not self.name:
            self.name = store(self.engine, chunk).op().name
            self.columns = chunk.column_names
            return
        for name in chunk.column_names:
            if name not in self.columns:
                self._widen(name, chunk[name].type)
        self.engine.con.register("chunk", chunk)
        self.engine.con.execute(f"INSERT INTO {self.name} BY NAME SELECT * FROM chunk")
        self.engine.con.unregister("chunk")

    def table(self, names: Iterable[str], vectors: Sequence[str] = ()) -> ibis.Table:
        """All rows; a column of `names` that no chunk had is null, text or one of the `vectors`."""
        if not self.name:
            self.add({}, [])
        for name in names:
            if name not in self.columns:
                self._widen(name, VECTORS if name in vectors else pa.string())
        return self.engine.table(self.name)

    def _widen(self, name: str, kind: pa.DataType) -> None:
        types = {pa.string(): "VARCHAR", pa.list_(pa.string()): "VARCHAR[]", VECTORS: "DOUBLE[]"}
        quoted = name.replace('"', '""')
        self.engine.raw_sql(f'ALTER TABLE {self.name} ADD COLUMN "{quoted}" {types[kind]}')
        self.columns.append(name)
