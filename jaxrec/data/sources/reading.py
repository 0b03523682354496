"""A file with required columns as a table; one line on the screen says what was read of it."""

import difflib
from pathlib import Path

import ibis
from ibis.backends import BaseBackend

from jaxrec.config import UserError
from jaxrec.console import console
from jaxrec.data.sources.formats import Wanted, read_file
from jaxrec.data.tables import count_rows


def read_table(engine: BaseBackend, path: Path, wanted: Wanted) -> ibis.Table:
    """A file as a table with a column `_row`, numbered from 1; prints the type read for each column.

    Raises:
      UserError: the file is missing, is empty, lacks a column, or is refused by `read_file`.
    """
    table, unused = read_file(engine, path, wanted)
    names = [column for column in table.columns if column != "_row"] + unused
    for column in wanted.required:
        if column not in table.columns:
            near = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
            hint = f"rename {near[0]!r}" if near else f"it has {', '.join(names)}"
            raise UserError(f"{path}: the column {column!r} is missing; {hint}")
    if count_rows(table) == 0:
        raise UserError(f"{path} has no rows; it needs at least one")
    console.print(f"{path.name}: {_described(table, wanted, unused)}", markup=False)
    return table


def _described(table: ibis.Table, wanted: Wanted, unused: list[str]) -> str:
    """The types read for the columns of a file, in one line."""
    groups: dict[str, list[str]] = {}
    for name in (name for name in table.columns if name != "_row"):
        kind = table[name].type()
        if kind.is_array() or name == "product_ids":
            what = "lists"
        elif name == "timestamp":
            what = "times"
        elif name in ("price", "watch_seconds") or (kind.is_numeric() and name not in wanted.names):
            what = "numbers"
        else:
            what = "true or false" if kind.is_boolean() else "text"
        groups.setdefault(what, []).append(name)
    groups |= {"not used": [name or "a column without a name" for name in unused]} if unused else {}
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in groups.items())
