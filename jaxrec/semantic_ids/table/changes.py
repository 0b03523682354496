"""Changes of a catalogue after its codebooks were fitted: items are added, removed, restored and re-encoded.

    append(folder, ["new-1", "new-2"], x)        # IDs by the frozen codebooks; earlier items keep theirs
    remove(folder, ["old-7"])                    # leaves the catalogue and keeps its ID
    reencode(folder, ["live-3"], x)              # a new embedding, and perhaps a new ID (OneMall §3.1.3)

`folder` is the semantic_ids folder of a run; each call that changes something writes a version (`versions`). Embeddings
are the codebooks' inputs: aligned ones in an aligned run. Every call can be repeated after a kill.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from jaxrec.config import UserError
from jaxrec.semantic_ids.files.vectors import keep_own
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.quantizers.rows import check_width, complaint, to_matrix, unusable
from jaxrec.semantic_ids.table.collisions import Resolved, describe, resolve, squared_errors
from jaxrec.semantic_ids.table.later import keep_rows
from jaxrec.semantic_ids.table.space import as_strings
from jaxrec.semantic_ids.table.version_files import BOOKS, IdChanges, IdTable, commit, locked
from jaxrec.semantic_ids.table.versions import begin_locked


def append(
    folder: Path,
    item_ids: Sequence[str],
    embeddings: np.ndarray,
    popularity: np.ndarray | None = None,
    own: np.ndarray | None = None,
    rows: pa.Table | None = None,
) -> dict:
    """Assign IDs to new items, under the collision policy of the first items.

    Args:
      item_ids: [n], embeddings: f32 [n, D]. An item of the catalogue keeps its ID whatever its embedding, and is
        counted as `known`; a removed item is restored with its ID.
      popularity: [n], the order of the new items under one ID; None: the given order.
      own: f32 [n, D'], with scenarios: the items' own embeddings, kept for those that sell them (`vectors.keep_own`).
      rows: [n], in a run: the items in the columns of its items.parquet, kept for serving (`later.keep_rows`).
    Returns:
      `version` (the current one if no item is new), `added`, `returned`, `known`; `collisions` if there are new items.
    Raises:
      UserError: no items, an item listed twice, an embedding of another width or with NaN or infinity, an extra level
        that is full, or as `version_files.read_version`.
    """
    folder = Path(folder)
    with locked(folder):
        books = codebooks.load(folder / BOOKS)
        x = check_items(item_ids, embeddings, books.width)
        check_popularity(popularity, len(item_ids))
        table = begin_locked(folder)
        places = table.rows(item_ids)
        new = np.flatnonzero(places < 0)
        back = places[places >= 0][~table.active[places[places >= 0]]]
        counts = {"added": len(new), "returned": len(back), "known": len(places) - len(new) - len(back)}
        encoded, codes, report = table.encoded[:0], table.codes[:0], {}
        if len(new):
            encoded = codebooks.encode(books, x[new])
            first = None if popularity is None else np.asarray(popularity)[new]
            resolved = resolve(encoded, books.sizes, table.collisions, x[new], books, first, table.codes)
            codes, report = resolved.codes, _told(resolved)
        # Before the version: after a kill in between, no item lacks its own embedding or its row.
        _keep(folder, item_ids, own)
        if rows is not None:
            keep_rows(folder, rows)
        if len(new) or len(back):
            errors = squared_errors(books, encoded, x[new])
            changes = _changes(table, back, True, [item_ids[row] for row in new], codes, encoded)
            table = commit(folder, table, changes, errors, table.collisions, "append", counts, report)
        return {"version": table.version, **counts, **report}


def remove(folder: Path, item_ids: Sequence[str]) -> dict:
    """Remove items from the catalogue. They stay in the table as inactive rows: under a policy of unique IDs no other
    item gets theirs, and `append` restores them with their IDs.

    Returns:
      `version` (the current one if no item was removed), `removed`, `known` (removed before).
    Raises:
      UserError: no items, an item listed twice or without an ID, or no item would remain.
    """
    folder = Path(folder)
    check_ids(item_ids)
    with locked(folder):
        table = begin_locked(folder)
        rows = _rows(table, item_ids, "remove only what is there")
        rows = rows[table.active[rows]]
        counts = {"removed": len(rows), "known": len(item_ids) - len(rows)}
        if len(rows):
            changes = _changes(table, rows, False)
            table = commit(folder, table, changes, np.zeros(0, np.float32), table.collisions, "remove", counts)
        return {"version": table.version, **counts}


def reencode(
    folder: Path,
    item_ids: Sequence[str],
    embeddings: np.ndarray,
    popularity: np.ndarray | None = None,
    own: np.ndarray | None = None,
) -> dict:
    """Re-encode items whose embeddings changed, such as live streams that sell other products now.

    An item with unchanged codes keeps its whole ID, its position among the items of that ID and its row. The others get
    new IDs as new items do; their old IDs become free.

    Returns:
      `version` (the current one if no code changed), `encoded` (items given), `changed`, `changed_share` (of the
      items), `changed_codes` (share of the items whose code changed, level by level), `changed_codes_mean`,
      `collisions`.
    Raises:
      UserError: an item without an ID or a removed one, or as `append`.
    """
    folder = Path(folder)
    with locked(folder):
        books = codebooks.load(folder / BOOKS)
        x = check_items(item_ids, embeddings, books.width)
        check_popularity(popularity, len(item_ids))
        table = begin_locked(folder)
        rows = _rows(table, item_ids, "append it first")
        if len(gone := np.flatnonzero(~table.active[rows])):
            raise UserError(
                f"item_id {item_ids[gone[0]]!r} has left the catalogue: append it again, then encode it anew"
            )
        encoded = codebooks.encode(books, x)
        moved = np.flatnonzero((encoded != table.encoded[rows]).any(axis=1))
        others = np.delete(table.codes, rows[moved], axis=0)
        first = None if popularity is None else np.asarray(popularity)[moved]
        resolved = resolve(encoded[moved], books.sizes, table.collisions, x[moved], books, first, others)
        _keep(folder, item_ids, own)
        codes = table.codes[rows].copy()
        codes[moved] = resolved.codes
        different = codes != table.codes[rows]
        counts = {"encoded": len(rows), "changed": int(different.any(axis=1).sum())}
        report = {
            "changed_share": float(different.any(axis=1).mean()),
            "changed_codes": different.mean(axis=0).tolist(),
            "changed_codes_mean": float(different.mean()),
            **_told(resolved),
        }
        if len(moved):
            errors = squared_errors(books, encoded, x)
            ids = as_strings([item_ids[row] for row in moved])
            changes = IdChanges(ids, resolved.codes, encoded[moved], np.ones(len(moved), bool))
            table = commit(folder, table, changes, errors, table.collisions, "reencode", counts, report)
        return {"version": table.version, **counts, **report}


def check_ids(item_ids: Sequence[str]) -> None:
    """UserError when there are no items, an id is not text or is empty, or one is listed twice."""
    if not len(item_ids):
        raise UserError("the table of items is empty: give at least one item_id")
    seen: dict[str, int] = {}
    for row, item in enumerate(item_ids):
        if not isinstance(item, str) or not item:
            raise UserError(f"row {row} of the items has item_id {item!r}: give every item its own text")
        if seen.setdefault(item, row) != row:
            raise UserError(f"item_id {item!r} is listed in row {seen[item]} and row {row}: keep one row an item")


def check_items(item_ids: Sequence[str], embeddings: np.ndarray, width: int) -> np.ndarray:
    """Embeddings as f32 [n, width]; UserError, which names the item, when they or the item ids are unusable."""
    check_ids(item_ids)
    x = np.asarray(to_matrix(embeddings))
    if len(x) != len(item_ids):
        raise UserError(f"{len(x)} embeddings do not fit {len(item_ids)} items: give one embedding an item")
    for row in unusable(x)[:1]:
        what, mend = complaint(x[row])
        raise UserError(f"the embedding of item_id {item_ids[row]!r} (row {row}) holds {what}: {mend}")
    check_width(x, width)
    return x


def check_popularity(popularity: np.ndarray | None, items: int) -> None:
    """UserError when popularity is given, but is not one number an item."""
    if popularity is None:
        return
    if np.shape(popularity) != (items,) or np.isnan(np.asarray(popularity, np.float64)).any():
        raise UserError(
            f"popularity of shape {np.shape(popularity)} does not fit {items} items: give each one number, and not NaN"
        )


def _keep(folder: Path, item_ids: Sequence[str], own: np.ndarray | None) -> None:
    if own is not None:
        keep_own(folder, list(item_ids), own)


def _rows(table: IdTable, item_ids: Sequence[str], mend: str) -> np.ndarray:
    rows = table.rows(item_ids)
    for row in np.flatnonzero(rows < 0)[:1]:
        raise UserError(f"item_id {item_ids[row]!r} has no semantic ID in version {table.version}: {mend}")
    return rows


def _told(resolved: Resolved) -> dict:
    return {"collisions": resolved.changed | {"text": describe(resolved.changed)}}


def _changes(
    table: IdTable,
    rows: np.ndarray,
    active: bool,
    new_ids: Sequence[str] = (),
    codes: np.ndarray | None = None,
    encoded: np.ndarray | None = None,
) -> IdChanges:
    """Rows of a table that become active or inactive, followed by new rows."""
    codes = table.codes[:0] if codes is None else codes
    return IdChanges(
        pa.concat_arrays([table.item_ids.take(pa.array(rows, pa.int64())), as_strings(new_ids)]),
        np.concatenate([table.codes[rows], codes]),
        np.concatenate([table.encoded[rows], table.encoded[:0] if encoded is None else encoded]),
        np.concatenate([np.full(len(rows), active), np.ones(len(codes), bool)]),
    )
