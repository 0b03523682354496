"""The files of the versions of an ID table: what a version is, and reading and writing it whole.

`jaxrec.semantic_ids.table.versions` describes the folder, and says what a run does with its versions.
"""

import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxrec.config import UserError, fingerprint, from_json, to_json
from jaxrec.files import fault_point, read_json, sync, write_json, writing
from jaxrec.semantic_ids.table.collisions import CollisionConfig
from jaxrec.semantic_ids.table.quality import collisions, independent_coding_rate, prefix_use
from jaxrec.semantic_ids.table.space import ItemIds, SemanticIds, as_strings, rows_in

BOOKS = "codebooks.safetensors"


@dataclass(frozen=True, eq=False)
class IdTable:
    """The IDs of one version, including inactive items; rows are in the order in which items were first added.

    item_ids: string [I]. codes: int32 [I, M], the IDs. encoded: int32 [I, m], the codes before collisions were
    resolved. active: bool [I]. sizes: codes in each of the M levels. record: the content of version.json.
    """

    item_ids: pa.Array
    codes: np.ndarray
    encoded: np.ndarray
    active: np.ndarray
    sizes: tuple[int, ...]
    record: dict

    @property
    def version(self) -> int:
        """The number of the version."""
        return self.record["version"]

    @property
    def collisions(self) -> CollisionConfig:
        """The collision policy for new items."""
        return from_json(CollisionConfig, self.record["collisions"])

    @property
    def active_ids(self) -> pa.Array:
        """The items that are in the catalogue, string [n]."""
        return self.item_ids.filter(pa.array(self.active))

    def rows(self, item_ids: ItemIds) -> np.ndarray:
        """The row of each of some items [n], int64 [n]; -1 where there is none."""
        return rows_in(item_ids, self.item_ids)

    def space(self, item_ids: ItemIds | None = None, popularity: np.ndarray | None = None) -> SemanticIds:
        """The IDs of a catalogue's items in its order; None: of all active items.

        Raises:
          UserError: an item has no ID in this version, or is inactive.
        """
        if item_ids is None:
            return SemanticIds(self.codes[self.active], self.sizes, popularity)
        rows = self.rows(item_ids)
        missing = np.flatnonzero((rows < 0) | ~self.active[rows])
        if len(missing):
            raise UserError(
                f"version {self.version} of the semantic IDs has no active item_id "
                f"{as_strings(item_ids)[missing[0]].as_py()!r} ({len(missing)} such items): append them, or take the "
                "version that belongs to these tables"
            )
        return SemanticIds(self.codes[rows], self.sizes, popularity)


@dataclass(frozen=True, eq=False)
class IdChanges:
    """The rows that a version adds or replaces; the fields are those of an `IdTable`."""

    item_ids: pa.Array
    codes: np.ndarray
    encoded: np.ndarray
    active: np.ndarray


def read_version(folder: Path, version: int | None = None) -> IdTable:
    """The IDs of a version, by default of the current one; the files of all its ancestors are checked.

    Raises:
      UserError: there are no versions or not this one, a file is damaged, or the version was made with other codebooks
        than those in the folder.
    """
    folder = Path(folder)
    lineage = read_lineage(folder, version)
    _check_books(folder, lineage)
    parts = [_read_changes(folder, record) for record in lineage]
    return _stack(parts, lineage[-1])


def read_lineage(folder: Path, version: int | None = None) -> list[dict]:
    """version.json of a version (by default the current one) and of its ancestors, the oldest first.

    Raises:
      UserError: there are no versions or not this one, or a file is damaged.
    """
    folder = Path(folder)
    if version is None:
        version = current_number(folder)
    check_number(folder, version)
    lineage = []
    while version:
        lineage.append(_read_record(folder, version))
        version = lineage[-1]["parent"]
    return lineage[::-1]


def list_versions(folder: Path) -> list[dict]:
    """version.json of every version, including those that a roll-back left, with the flag `current`.

    Raises:
      UserError: one of these files is damaged.
    """
    folder = Path(folder)
    if not (found := numbers(folder)):
        return []
    pointer = versions(folder) / "current.json"
    current = current_number(folder) if pointer.exists() else None
    return [_read_record(folder, number) | {"current": number == current} for number in found]


def commit(
    folder: Path,
    parent: IdTable,
    changes: IdChanges,
    errors: np.ndarray,
    config: CollisionConfig,
    action: str,
    counts: dict[str, int],
    report: dict | None = None,
) -> IdTable:
    """Write the next version and make it the current one; the caller holds the lock.

    Args:
      parent: the current table; without rows when there is none.
      changes: its changed and added rows.
      errors: f32 [n], squared errors of the items encoded by this version; NaN where unknown.
      config: the collision policy of later versions.
      action: the kind of change; counts: numbers of items; report: further values for version.json.

    Fault points: `partial:version` before the rename, `done:version` after it, `current:version` once it is current.
    """
    number = max(numbers(folder), default=0) + 1
    final, partial = version_folder(folder, number), versions(folder) / f"{number:06d}.partial"
    record = {
        "version": number,
        "parent": parent.record.get("version"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "action": action,
        "counts": counts,
        "codebooks_sha256": sha256(folder / BOOKS),
        "codebook_sizes": list(parent.sizes),
        "collisions": to_json(config),
    }
    table = _stack([_changes_of(parent), changes], record)
    if not table.active.any():
        raise UserError(f"{folder}: no item would be left in the catalogue: keep at least one")
    record |= {"figures": figures(table, errors), "report": report or {}}
    with writing(final):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write_changes(partial / "changes.parquet", changes)
        record["changes_sha256"] = sha256(partial / "changes.parquet")
        record["fingerprint"] = fingerprint(record)
        write_json(partial / "version.json", record)
        sync(partial)
        fault_point("partial:version")
        partial.rename(final)
        sync(final.parent)
        fault_point("done:version")
        point_at(folder, number)
        fault_point("current:version")
    return table


def figures(table: IdTable, errors: np.ndarray) -> dict:
    """Collision figures of the active IDs, and the mean of the known squared errors f32 [n]."""
    space = table.space()
    known = errors[np.isfinite(errors)]
    shared = collisions(space.counts)
    return {
        "items": len(space.codes),
        "inactive": int((~table.active).sum()),
        "distinct_ids": len(space.ids),
        "utilization": [row["utilization"] for row in prefix_use(space)],
        "independent_coding_rate": independent_coding_rate(space.counts),
        "conflict_rate": shared["conflict_rate"],
        "largest_bucket": shared["largest_bucket"],
        "error": float(known.mean(dtype=np.float64)) if len(known) else None,
    }


def versions(folder: Path) -> Path:
    """The folder of the versions."""
    return Path(folder) / "versions"


def numbers(folder: Path) -> list[int]:
    """The numbers of the versions, rising."""
    return sorted(int(path.name) for path in versions(folder).glob("[0-9]*") if path.name.isdigit())


def check_number(folder: Path, version: int) -> None:
    """UserError when there is no such version."""
    if version not in (there := numbers(folder)):
        listed = f"there are {', '.join(map(str, there))}" if there else "there are none yet; append makes the first"
        raise UserError(f"{versions(folder)} has no version {version}: {listed}")


def current_number(folder: Path) -> int:
    """The number of the current version; UserError when there is none, or current.json is damaged."""
    path, there = versions(folder) / "current.json", numbers(folder)
    back = f"roll back to one of {', '.join(map(str, there))}"
    if not path.exists():
        raise UserError(f"{path.parent} has no current version: {back if there else 'append makes the first'}")
    pointer = read_json(path)
    if not isinstance(pointer, dict) or pointer.get("version") not in there:
        raise UserError(f"{path} is damaged: it names none of the versions that are there; {back}")
    return pointer["version"]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the versions of a folder for this process; UserError when another holds the lock, or there are no IDs."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the semantic_ids folder of a run")
    if not (folder / BOOKS).is_file():
        raise UserError(f"{folder} holds no {BOOKS}: give the semantic_ids folder of a run, or restore the file")
    versions(folder).mkdir(exist_ok=True)
    with (versions(folder) / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process is changing {versions(folder)}; wait for it, and run this again"
            ) from error
        yield


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal; UserError when it is missing."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: restore it, or run the tokenize phase again") from error


def version_folder(folder: Path, number: int) -> Path:
    """The folder of a version."""
    return versions(folder) / f"{number:06d}"


def point_at(folder: Path, number: int) -> None:
    """Makes a version the current one; the caller holds the lock."""
    write_json(versions(folder) / "current.json", {"version": number})


def _read_record(folder: Path, number: int) -> dict:
    """version.json without its fingerprint, which is checked."""
    path = version_folder(folder, number) / "version.json"
    if not path.exists():
        raise UserError(f"{path} is missing: restore it from a copy, or roll back to a version that does without it")
    record = read_json(path)
    if not isinstance(record, dict) or record.pop("fingerprint", None) != fingerprint(record):
        raise UserError(f"{path} is damaged (it is not what its fingerprint says): restore it from a copy")
    return record


def _check_books(folder: Path, lineage: list[dict]) -> None:
    books = sha256(folder / BOOKS)
    for record in lineage:
        if record["codebooks_sha256"] != books:
            raise UserError(
                f"version {record['version']} of {versions(folder)} was made with other codebooks "
                f"({record['codebooks_sha256'][:16]}...) than {folder / BOOKS} ({books[:16]}...): its IDs mean "
                "something else; restore those codebooks, or tokenize again into a new run"
            )


def _changes_of(table: IdTable) -> IdChanges:
    return IdChanges(table.item_ids, table.codes, table.encoded, table.active)


def _stack(parts: list[IdChanges], record: dict) -> IdTable:
    """Applies IdChanges in order: the last row of an item counts, at the position of its first."""
    coded = pa.concat_arrays([part.item_ids for part in parts]).dictionary_encode()
    last = np.empty(len(coded.dictionary), np.int64)
    last[coded.indices.to_numpy()] = np.arange(len(coded))  # Of equal indices the last assignment stays.
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts])[last] for name in ("codes", "encoded", "active")
    }
    return IdTable(coded.dictionary, **columns, sizes=tuple(record["codebook_sizes"]), record=record)


def _write_changes(path: Path, changes: IdChanges) -> None:
    columns = {"item_id": changes.item_ids}
    for letter, codes in (("c", changes.codes), ("e", changes.encoded)):
        columns |= {f"{letter}{level + 1}": pa.array(codes[:, level], pa.int32()) for level in range(codes.shape[1])}
    columns["active"] = pa.array(changes.active)
    pq.write_table(pa.table(columns), path)
    sync(path)


def _read_changes(folder: Path, record: dict) -> IdChanges:
    path = version_folder(folder, record["version"]) / "changes.parquet"
    if sha256(path) != record["changes_sha256"]:
        raise UserError(f"{path} is damaged (its SHA-256 is not what version.json says): restore it from a copy")
    table = pq.read_table(path)

    def levels(letter: str) -> np.ndarray:
        names = [name for name in table.column_names if name[0] == letter and name[1:].isdigit()]
        return np.stack([table[name].to_numpy() for name in names], axis=1)

    return IdChanges(table["item_id"].combine_chunks(), levels("c"), levels("e"), table["active"].to_numpy())
