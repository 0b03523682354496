"""Which file of a folder holds which table, and how it is written.

A table is in the file of its name, `items.csv`, or in that which `--data.files` names: `items=products.csv`. The two
tables that every log has are also found by their columns, where one file alone has them.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jaxrec.config import UserError
from jaxrec.data.sources.column_names import FLAG, hints
from jaxrec.data.sources.csv_records import NoTableError
from jaxrec.data.sources.formats import SUFFIXES, Wanted, header_of, is_table

FILES_FLAG = "--data.files"


@dataclass(frozen=True)
class Writing:
    """How the files of a folder are written."""

    delimiter: str = ""
    """What separates fields of CSV; empty: the header decides."""
    encoding: str = "utf-8"
    """The encoding of CSV."""
    decimal: str = ""
    """What stands before decimals in CSV; empty: as the values show."""
    header: tuple[str, ...] = ()
    """The columns of a file of events in CSV that has no header."""
    whole_ids: bool = False
    """Whether identifiers that are written as 12.0 are read as 12."""
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """{table: {ours: theirs}}, "" for all tables."""

    def of(self, table: str, wanted: Wanted) -> Wanted:
        """What is wanted of a table's file, with the names of its columns there."""
        names = self.columns.get(table, self.columns.get("", {}))
        of_file = {name: getattr(self, name) for name in ("delimiter", "encoding", "decimal", "whole_ids")}
        header = self.header if table == "events" else ()
        return replace(wanted, **of_file, of_folder=True, renamed=tuple(names.items()), columns=header)


def find_files(path: Path, given: Sequence[str], wanted: Mapping[str, Wanted]) -> dict[str, Path]:
    """The file of every table that there is.

    Args:
      path: the folder, or a file of events alone.
      given: the pairs TABLE=FILE of `--data.files`; an empty FILE says that there is no such table.
      wanted: of every table, its columns as they are called in the files. The first is that of the events.

    Raises:
      UserError: no file, or several, hold a table that must be there; or a file that was named is missing.
    """
    if path.is_file():
        return {"events": path}
    if not path.is_dir():
        raise UserError(
            f"there is no folder {path}; give the folder with items.* and events.*, or a file of events, with "
            "--data.path"
        )
    stated = _stated(path, given, wanted)
    found = {name: stated[name] if name in stated else _by_name(path, name) for name in wanted}
    found = {name: file for name, file in found.items() if file is not None}
    for name in ("events", "items"):
        if name not in found and name not in stated and (file := _by_columns(path, name, found, wanted)):
            found[name] = file
    unknown = [name for name in ("events", "items") if name not in found and name not in stated]
    doubtful = bool(_others(path, found, wanted["items"]) or _problems(path, wanted))
    if unknown and (unknown[0] == "events" or doubtful):
        raise UserError(_none_fits(path, unknown, found, wanted))
    return {name: found[name] for name in wanted if name in found}


def _stated(path: Path, given: Sequence[str], wanted: Mapping[str, Wanted]) -> dict[str, Path | None]:
    stated: dict[str, Path | None] = {}
    for pair in given:
        name, mark, file = pair.partition("=")
        if not mark or name not in wanted:
            raise UserError(f"{FILES_FLAG} {shlex.quote(pair)}: write TABLE=FILE; tables are {', '.join(wanted)}")
        stated[name] = path / file if file else None
        if file and not (path / file).is_file():
            there = ", ".join(sorted(each.name for each in path.iterdir() if is_table(each)))
            raise UserError(f"{FILES_FLAG} {shlex.quote(pair)}: {path} has no such file; it has {there}")
    if "events" in stated and stated["events"] is None:
        raise UserError(f"{FILES_FLAG} events=: nothing can be learned without events; name their file")
    return stated


def _by_name(folder: Path, name: str) -> Path | None:
    """The one file with the name of a table."""
    found = [path for suffix in SUFFIXES if (path := folder / f"{name}.{suffix}").is_file()]
    if len(found) > 1:
        raise UserError(
            f"{folder} holds both {found[0].name} and {found[1].name}; keep one of them, or say which counts with "
            f"{FILES_FLAG} {name}={found[0].name}"
        )
    return found[0] if found else None


def _by_columns(folder: Path, name: str, found: Mapping[str, Path], wanted: Mapping[str, Wanted]) -> Path | None:
    """The one of the other files that has all columns of a table."""
    others = _others(folder, found, wanted[name])
    fitting = [file for file, header in others.items() if not missing_of(header, wanted[name])]
    if len(fitting) > 1:
        names = " and ".join(file.name for file in fitting)
        raise UserError(
            f"{folder}: {names} have the columns of {name}; say which it is with {FILES_FLAG} {name}={fitting[0].name}"
        )
    return fitting[0] if fitting else None


def _others(folder: Path, found: Mapping[str, Path], wanted: Wanted) -> dict[Path, list[str]]:
    """The headers of the files that are not found to hold a table."""
    headers = {file: _header(file, wanted) for file in sorted(folder.iterdir()) if is_table(file)}
    return {file: header for file, header in headers.items() if file not in found.values() and header}


def _header(file: Path, wanted: Wanted) -> list[str]:
    """The names of a file's columns; none where it can't be read, so that it is no candidate."""
    try:
        return header_of(file, wanted)
    except UserError:
        return []


def missing_of(header: Sequence[str], wanted: Wanted) -> list[str]:
    """The columns of a table that a file with this header lacks."""
    names = {each.strip().lower() for each in header}
    theirs = {ours: column.lower() for ours, column in wanted.renamed if column and column.lower() in names}
    return [ours for ours in wanted.required if theirs.get(ours, ours.lower()) not in names]


def _none_fits(folder: Path, unknown: Sequence[str], found: Mapping[str, Path], wanted: Mapping[str, Wanted]) -> str:
    """The sentence where no file has all columns of a table: the files that are nearest, and one flag for all columns
    that those and the files that were found by name lack."""
    found, hinted, told = dict(found), dict(found), []
    for name in unknown:
        others, needed = _others(folder, hinted, wanted[name]), ", ".join(wanted[name].required)
        what = f"{folder} has no {name}.parquet, {name}.csv or {name}.jsonl, and no other file with {needed}"
        lacking = {file: missing_of(header, wanted[name]) for file, header in others.items()}
        left = {file: len(hints(lacking[file], header)[1]) for file, header in others.items()}
        near = min(others, key=lambda file: (left[file], len(lacking[file])), default=None)
        if near is None or left[near] == len(wanted[name].required):
            told.append(f"{what}; add one, or name it with {FILES_FLAG} {name}=FILE")
        else:
            hinted[name] = near
            told.append(f"{what}; {near.name} seems to be it")
    known, asked = [], []
    for name in ("events", "items"):
        if name in hinted:
            header = _header(hinted[name], wanted[name])
            pairs, rest = hints(missing_of(header, wanted[name]), header)
            known += pairs
            asked += [f"{ours}=... ({hinted[name].name} has {', '.join(header)})" for ours in rest]
    given = [f"{ours}={shlex.quote(theirs)}" for ours, theirs in wanted["events"].renamed]
    flag = " ".join(dict.fromkeys([*given, *known, *asked]))
    none = f"; if there are no items but those of the events, give {FILES_FLAG} items=" if "items" in unknown else ""
    columns = f": say which columns are which with {FLAG} {flag}" if len(hinted) > len(found) else ""
    return f"{', and '.join(told)}{columns}{none}{''.join(f'; {each}' for each in _problems(folder, wanted))}"


def _problems(folder: Path, wanted: Mapping[str, Wanted]) -> list[str]:
    """Why the headers of tables can't be read; texts that are no tables are passed over."""
    problems = []
    for file in sorted(folder.iterdir()):
        try:
            if is_table(file):
                header_of(file, wanted["events"])
        except NoTableError:
            continue
        except UserError as error:
            problems.append(str(error))
    return problems
