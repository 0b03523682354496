"""The ID tables of a changing catalogue: append-only versions, all made with the same codebooks.

    <semantic_ids>/versions/
      current.json            the current version, written last
      000001/                 the IDs of the tokenize phase
        changes.parquet       the rows that this version adds or replaces
        version.json          parent, time, action, the hashes of the codebooks and of the files here, figures
      000002/ ...

A version holds only the rows in which it differs from its parent, so a table is read by applying its ancestors in
order. An item keeps its row forever: a removed item is marked inactive, keeps its ID and is restored with it. A version
is written under a temporary name, fsynced and renamed, and only then does `current.json` name it. After a kill at any
moment the current version is the old or the new one, and both are complete.

`codes.parquet` of the run is unchanged until `publish` replaces it. A model of the run keeps the IDs that it was
trained on (`trained_space`); serving brings its catalogue to the published version. What the files of a version hold is
in `jaxrec.semantic_ids.table.version_files`; here is what a run does with versions.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxrec.config import UserError
from jaxrec.files import fault_point, read_json, sync, writing
from jaxrec.semantic_ids.files.vectors import EMBEDDINGS, read_embeddings
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.table.collisions import CollisionConfig, squared_errors
from jaxrec.semantic_ids.table.later import check_known, items_of_run
from jaxrec.semantic_ids.table.space import ItemIds, SemanticIds, as_strings, read_codes, rows_in, write_codes
from jaxrec.semantic_ids.table.version_files import (
    BOOKS,
    IdChanges,
    IdTable,
    check_number,
    commit,
    current_number,
    locked,
    numbers,
    point_at,
    read_version,
    version_folder,
    versions,
)

CODES, QUALITY = "codes.parquet", "quality.json"


def begin(folder: Path, config: CollisionConfig | None = None) -> IdTable:
    """Make version 1 from the output of the tokenize phase; if there are versions already, read the current one.

    Args:
      folder: the semantic_ids folder of a run: codebooks.safetensors, codes.parquet and, for the errors that later
        items are compared with, embeddings.safetensors with rows in the order of codes.parquet.
      config: the policy that made codes.parquet; None: that under "collisions" in quality.json (the report of
        `collisions.resolve`), else `keep`.
    Raises:
      UserError: a file is missing or damaged, or the IDs do not fit these codebooks and this policy.
    """
    folder = Path(folder)
    with locked(folder):
        return begin_locked(folder, config)


def begin_locked(folder: Path, config: CollisionConfig | None = None) -> IdTable:
    """`begin`; the caller holds the lock."""
    if existing := numbers(folder):
        if not (versions(folder) / "current.json").exists():
            _repair(folder, existing)
        return read_version(folder)
    books = codebooks.load(folder / BOOKS)
    config = config or _config_of(folder)
    ids, space = _item_ids(folder / CODES), read_codes(folder / CODES)
    extra = config.policy == "extra_level"
    if space.codebook_sizes[: space.levels - extra] != books.sizes:
        raise UserError(
            f"{folder / CODES} has levels of {space.codebook_sizes} codes, which do not come from codebooks of "
            f"{books.sizes} under collisions.policy={config.policy!r}: tokenize again"
        )
    encoded, errors = space.codes[:, : len(books.sizes)], np.full(len(ids), np.nan, np.float32)
    if (folder / EMBEDDINGS).exists():
        x = read_embeddings(folder / EMBEDDINGS, ids)
        encoded = codebooks.encode(books, x)
        errors = squared_errors(books, encoded, x)
    settled = CollisionConfig(config.policy, config.capacity, space.codebook_sizes[-1] if extra else 0)
    parent = IdTable(ids[:0], space.codes[:0], encoded[:0], np.zeros(0, bool), space.codebook_sizes, {})
    changes = IdChanges(ids, space.codes, encoded, np.ones(len(ids), bool))
    return commit(folder, parent, changes, errors, settled, "begin", {"added": len(ids)})


def roll_back(folder: Path, version: int) -> dict:
    """Make another version, earlier or later, the current one; nothing is deleted.

    Returns:
      Its version.json. The next version has this one as its parent, and the highest number plus one.

    Raises:
      UserError: there is no such version, it or an ancestor is damaged, or it was made with other codebooks.
    """
    folder = Path(folder)
    check_number(folder, version)
    with locked(folder):
        record = read_version(folder, version).record
        point_at(folder, version)
    return record


def publish(folder: Path, version: int | None = None) -> Path:
    """Replace codes.parquet by the active items of a version (by default the current one), in one step.

    embeddings.safetensors is not changed: reading it for another list of items is refused, and re-encoded items keep
    their old embeddings there.

    Raises:
      UserError: as `read_version`, or a run has no row of an item (`later.check_known`).
    """
    folder = Path(folder)
    path = folder / CODES
    partial = path.with_name(f".{path.name}.partial")
    with locked(folder), writing(folder):
        table = read_version(folder, version)
        check_known(folder, table.active_ids)
        write_codes(partial, table.active_ids, table.space())
        sync(partial)
        fault_point("partial:publish")
        partial.rename(path)
        sync(folder)
    return path


def check_publishable(folder: Path, changing: ItemIds = (), version: int | None = None) -> None:
    """UserError when `publish` would refuse a version (by default the current one).

    Items of `changing` are not checked: their rows are about to be written, or they are about to be removed.
    """
    folder = Path(folder)
    if items_of_run(folder) is None:
        return
    ids = read_version(folder, version).active_ids if version or numbers(folder) else first_ids(folder)
    check_known(folder, ids.filter(pa.array(rows_in(ids, as_strings(changing)) < 0)))


def trained_version(folder: Path) -> int | None:
    """The version that a model of the run was trained on, regardless of later publications; None without versions."""
    return 1 if 1 in numbers(folder) else None


def trained_space(folder: Path, item_ids: ItemIds, popularity: np.ndarray | None = None) -> SemanticIds:
    """The IDs that a model of a run was trained on, of the items [I] of its tables and in their order.

    They are read from codes.parquet, or from version 1 if a later version was published there.

    Raises:
      UserError: as `space.read_codes`, or a file of the first version is damaged.
    """
    folder = Path(folder)
    if trained_version(folder) and as_strings(item_ids).to_pylist() == first_ids(folder).to_pylist():
        return read_version(folder, 1).space(item_ids, popularity)
    return read_codes(folder / CODES, item_ids, popularity)


def first_ids(folder: Path) -> pa.Array:
    """The items of the tokenize phase in its order, string [I]; UserError when they cannot be read."""
    folder = Path(folder)
    first = version_folder(folder, 1) / "changes.parquet"
    return _item_ids(first if first.exists() else folder / CODES)


def check_replaceable(folder: Path, inputs: str) -> None:
    """UserError when a run would replace its IDs, from these inputs, though they have versions beyond the first."""
    made = folder / "fingerprint.json"
    if max(numbers(folder), default=0) > 1 and not (made.exists() and read_json(made).get("inputs") == inputs):
        raise UserError(
            f"what {folder} was made from has changed, but items were appended, removed or encoded anew in its "
            f"versions, which new IDs would replace: give another --run, or move {folder} away"
        )


@contextmanager
def replacing(folder: Path, inputs: str) -> Iterator[None]:
    """Locks the versions of a folder while a run replaces it by IDs of these inputs.

    Raises:
      UserError: versions were added since `check_replaceable`, or another process is changing them.
    """
    with locked(folder) if (folder / BOOKS).is_file() else nullcontext():
        check_replaceable(folder, inputs)
        yield


def _repair(folder: Path, existing: list[int]) -> None:
    """Points at version 1 if a kill left no current.json; UserError if there are several versions."""
    if existing != [1]:
        current_number(folder)
    read_version(folder, 1)
    point_at(folder, 1)


def _config_of(folder: Path) -> CollisionConfig:
    """The collision policy in quality.json."""
    path = folder / QUALITY
    told = (read_json(path) if path.exists() else {}).get("collisions") or {}
    names = ("policy", "capacity", "extra_size")
    return CollisionConfig(**{name: told[name] for name in names if name in told})


def _item_ids(path: Path) -> pa.Array:
    try:
        return pq.read_table(path, columns=["item_id"])["item_id"].cast(pa.string()).combine_chunks()
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise UserError(f"{path} has no readable column item_id ({error}): run the tokenize phase again") from error
