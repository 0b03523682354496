"""The records of a CSV file: its separator, its header, and a sentence for the first record that is malformed.

Fields are quoted by `"`, which is doubled inside quotes; there are no comments and no escapes. What separates fields is
stated, or the header decides between commas, tabs, semicolons and bars. A log may have no header, or no quotes: then
`"` is a character like any other, and no field holds a separator or a line end.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jaxrec.config import UserError
from jaxrec.data.sources.files import opened

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
CHUNK_ROWS = 1 << 14
"""Records that are read at once."""
_LONGEST_FIELD = 1 << 24


class NoTableError(UserError):
    """A file has no header of several columns."""


@dataclass(frozen=True)
class Dialect:
    """How a file of CSV is written."""

    delimiter: str
    """What separates fields."""
    names: list[str]
    """The names of the columns."""
    headed: bool
    """Whether the first record is these names."""
    quoted: bool
    """Whether `"` quotes fields."""
    encoding: str
    """The encoding of the file."""


def dialect_of(
    path: Path,
    known: Sequence[str],
    required: Sequence[str],
    columns: Sequence[str],
    quoted: bool,
    encoding: str,
    stated: str = "",
) -> Dialect:
    """The dialect whose header has the most known columns, then the most columns; `columns` stand for a header.

    stated: what separates fields, of one character or more; empty: the header decides.

    Raises:
      UserError: the file is empty, has one column, has a first record that is malformed or, without a header, has
        another number of fields than `columns`.
    """
    heads = {}
    for delimiter in [stated] if stated else DELIMITERS:
        try:
            with _records(path, Dialect(delimiter, [], False, quoted, encoding)) as records:
                heads[delimiter] = next((record for record in records if record), [])
        except csv.Error:
            continue
    if len(heads) < (1 if stated else len(DELIMITERS)) and all(len(head) <= 1 for head in heads.values()):
        raise UserError(f'{path}, line 1: a quote in the header is not closed; write `"` inside quotes twice')
    if columns:
        fitting = [delimiter for delimiter, head in heads.items() if len(head) == len(columns)]
        if not fitting:
            fields = max(map(len, heads.values()))
            raise UserError(
                f"{path}, row 1: has {fields} field{'s' * (fields != 1)}, but `columns` names {len(columns)} "
                f"({', '.join(columns)}); name every column of the file in its order"
            )
        return Dialect(fitting[0], list(columns), False, quoted, encoding)
    names = {name.lower() for name in known}
    found = {mark: (sum(name.strip().lower() in names for name in each), len(each)) for mark, each in heads.items()}
    delimiter = max(heads, key=lambda mark: found[mark])
    if not heads[delimiter]:
        raise NoTableError(f"{path} is empty; it needs the columns {', '.join(required)}")
    if len(heads[delimiter]) == 1:
        given = f" when {stated!r} separates fields" if stated else ""
        raise NoTableError(
            f"{path}: the header is one column{given}, {heads[delimiter][0][:80]!r}; separate columns by commas, tabs, "
            "semicolons or bars, or state what does with --data.delimiter"
        )
    return Dialect(delimiter, heads[delimiter], True, quoted, encoding)


def chunks(path: Path, dialect: Dialect) -> Iterator[list[list[str]]]:
    """The records behind the header, without blank lines, up to CHUNK_ROWS at once; each has all fields.

    Raises:
      UserError: a record is malformed, or has another number of fields than the header.
    """
    with _records(path, dialect) as records:
        if dialect.headed:
            next(record for record in records if record)
        while chunk := _chunk(path, records, dialect):
            yield chunk


@contextmanager
def _records(path: Path, dialect: Dialect) -> Iterator[Any]:
    """A reader of the records; a blank line is an empty record. Bytes of no character are escaped."""
    longest = csv.field_size_limit(_LONGEST_FIELD)
    encoding = "utf-8-sig" if dialect.encoding == "utf-8" else dialect.encoding
    quoting = csv.QUOTE_MINIMAL if dialect.quoted else csv.QUOTE_NONE
    try:
        with opened(path) as raw:
            file = io.TextIOWrapper(raw, newline="", encoding=encoding, errors="surrogateescape")
            if len(dialect.delimiter) > 1:
                yield _SplitLines(file, dialect.delimiter)
            else:
                yield csv.reader(file, delimiter=dialect.delimiter, strict=True, quoting=quoting)
    finally:
        csv.field_size_limit(longest)


class _SplitLines:
    """The records of lines whose separator has several characters, such as `::`; they have no quotes."""

    def __init__(self, file: io.TextIOWrapper, delimiter: str):
        self.file, self.delimiter, self.line_num = file, delimiter, 0

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        line = next(self.file).rstrip("\r\n")
        self.line_num += 1
        return line.split(self.delimiter) if line else []


def _chunk(path: Path, records: Iterator[list[str]], dialect: Dialect) -> list[list[str]]:
    """The next records, without blank lines; none at the end."""
    chunk: list[list[str]] = []
    try:
        while not chunk and (taken := list(islice(records, CHUNK_ROWS))):
            widths = set(map(len, taken))
            if widths - {0, len(dialect.names)}:
                _explain(path, dialect)
            chunk = [record for record in taken if record] if 0 in widths else taken
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is no {dialect.encoding}; give another --data.encoding, or save it as UTF-8"
        ) from error
    except csv.Error as error:
        _explain(path, dialect)
        raise UserError(f"{path} can't be read as csv: {error}") from error
    return chunk


def _explain(path: Path, dialect: Dialect) -> None:
    """Raises UserError for the first record that is malformed, or whose fields the header doesn't have."""
    mark, width = DELIMITERS.get(dialect.delimiter, dialect.delimiter), len(dialect.names)
    with _records(path, dialect) as records:
        row, line = -dialect.headed, 1
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                where = f"{path}, row {row + 1} (line {line})"
                if "field limit" in str(error):
                    what = f"a field has more than {_LONGEST_FIELD >> 20} MiB, or a quote is opened and not closed"
                    raise UserError(f"{where}: {what}; shorten it, or close the quote") from error
                if "expected after" in str(error):
                    raise UserError(f'{where}: text follows a closing quote; write `"` inside quotes twice') from error
                raise UserError(f"{where}: a quote is opened and not closed; close it, or write it twice") from error
            row += bool(record)
            if row > 0 and record and len(record) != width:
                of = "the header" if dialect.headed else "`columns`"
                what = f"has {len(record)} field{'s' * (len(record) != 1)}, {of} {width}"
                mend = f"fill it up with {mark}s" if len(record) < width else f"quote the field that holds a {mark}"
                raise UserError(f"{path}, row {row} (line {line}): {what}; {mend}")
            line = records.line_num + 1
