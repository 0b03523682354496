"""A file with required columns as a table; one line on the screen says what was read of it."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import ibis
from ibis.backends import BaseBackend

from jaxrec.config import UserError
from jaxrec.console import console
from jaxrec.data.sources.checks import WHOLE_FLOAT, check_words
from jaxrec.data.sources.column_names import FLAG, flag_of, hints
from jaxrec.data.sources.formats import WHOLE_IDS, Wanted, header_of, read_file
from jaxrec.data.tables import count_rows, store


def read_table(engine: BaseBackend, path: Path, wanted: Wanted, table_name: str = "") -> ibis.Table:
    """A file as a table with a column `_row`, numbered from 1; prints the type read for each column.

    table_name: the table that it is of a folder, whose columns `--data.columns` can name; empty: of no folder.

    Raises:
      UserError: the file is missing, is empty, lacks a column, or is refused by `read_file`.
    """
    table, unused = read_file(engine, path, wanted)
    names = header_of(path, wanted)
    missing = [column for column in wanted.required if column not in table.columns]
    if missing:
        listed = ", ".join(map(repr, missing))
        what = f"the column {listed} is missing" if len(missing) == 1 else f"the columns {listed} are missing"
        near = difflib.get_close_matches(missing[0], names, n=1, cutoff=0.8)
        mend = f"rename {near[0]!r}" if near else f"it has {', '.join(names)}"
        mend = flag_of(missing, names, wanted.renamed) if table_name else mend
        raise UserError(f"{path}: {what}; {mend}")
    if count_rows(table) == 0:
        raise UserError(f"{path} has no rows; it needs at least one")
    ids = [name for name in wanted.ids if name in table.columns and not table[name].type().is_array()]
    table = _with_whole_ids(engine, table, ids) if wanted.whole_ids else table
    if table_name:
        check_words(path, table, (), ids, WHOLE_IDS)
    of = f" ({table_name})" if table_name and table_name != path.stem else ""
    console.print(f"{path.name}{of}: {_described(table, wanted, names, unused)}", markup=False)
    if table_name:
        _hint(path, table, wanted, names)
    return table


def _with_whole_ids(engine: BaseBackend, table: ibis.Table, ids: Sequence[str]) -> ibis.Table:
    """Ids that are written as 12.0 as 12; a column with any other number stays as it is."""
    for name in (name for name in ids if table[name].type().is_floating()):
        value = ibis.ifelse(table[name].isnan(), None, table[name])
        if (
            table.aggregate(odd=((value != value.floor()) | (value.abs() >= 2**53)).any())
            .to_pyarrow()["odd"][0]
            .as_py()
        ):
            continue
        table = store(engine, table.mutate(**{name: value.cast("int64")}))
    texts = {name: table[name].re_replace(WHOLE_FLOAT, r"\1") for name in ids if table[name].type().is_string()}
    return table.mutate(**texts) if texts else table


def _hint(path: Path, table: ibis.Table, wanted: Wanted, names: list[str]) -> None:
    """Says which columns of a file could be those that jaxrec knows and the file seems to lack."""
    taken = {theirs.lower() for _, theirs in wanted.renamed} | {name.lower() for name in wanted.names}
    left_out = {ours for ours, theirs in wanted.renamed if not theirs}
    lacking = [name for name in wanted.names if name not in table.columns and name not in left_out]
    known, _ = hints(lacking, [name for name in names if name.strip().lower() not in taken])
    if known:
        console.print(f"{path.name}: perhaps {FLAG} {' '.join(known)} too", markup=False)


def _described(table: ibis.Table, wanted: Wanted, names: list[str], unused: list[str]) -> str:
    """The types read for the columns of a file, in one line."""
    groups: dict[str, list[str]] = {}
    here = {name.strip().lower() for name in names}
    renamed = {ours: theirs for ours, theirs in wanted.renamed if theirs.lower() in here and theirs.lower() != ours}
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
        groups.setdefault(what, []).append(f"{name} ({renamed[name]})" if name in renamed else name)
    groups |= {"not used": [name or "a column without a name" for name in unused]} if unused else {}
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in groups.items())
