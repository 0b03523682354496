"""The semantic IDs of a catalogue: the ID of each item, and the items of each ID."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.config import UserError
from jaxrec.semantic_ids.files.items import check_distinct

SIZES_KEY = b"codebook_sizes"
NEW_IDS = "give these tables IDs of their own with train.py, in a new --run"
ItemIds = Sequence[str] | pa.Array | pa.ChunkedArray


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """The IDs of a catalogue; several items may share one, and are listed in a stated order.

    codes: int32 [I, M], row = item index. codebook_sizes: codes in each level. popularity: [I] or None; the items of an
    ID are listed by falling popularity, then by index.
    """

    codes: np.ndarray
    codebook_sizes: tuple[int, ...]
    popularity: np.ndarray | None = None

    def __post_init__(self):
        if self.codes.ndim != 2 or self.codes.shape[1] != len(self.codebook_sizes):
            raise UserError(
                f"codes of shape {self.codes.shape} do not fit {len(self.codebook_sizes)} levels "
                f"of {self.codebook_sizes} codes: tokenize again"
            )
        outside = (self.codes < 0) | (self.codes >= np.array(self.codebook_sizes))
        if outside.any():
            item, level = np.argwhere(outside)[0]
            raise UserError(
                f"item {item} has code {self.codes[item, level]} at level {level + 1}, which has codes "
                f"0 to {self.codebook_sizes[level] - 1}: tokenize again"
            )

    @property
    def levels(self) -> int:
        """Codes in an ID, M."""
        return len(self.codebook_sizes)

    @cached_property
    def ids(self) -> np.ndarray:
        """The distinct IDs in rising order, int32 [distinct, M]."""
        return self._grouped[0]

    @cached_property
    def leaf(self) -> np.ndarray:
        """The index in `ids` of each item's ID, int32 [I]."""
        return self._grouped[1]

    @cached_property
    def counts(self) -> np.ndarray:
        """The number of items of each of `ids`, int64 [distinct]."""
        return np.bincount(self.leaf, minlength=len(self.ids))

    def items(self, code: np.ndarray | tuple[int, ...]) -> np.ndarray:
        """The items of one ID [M], int32, most popular first; empty when no item has it."""
        leaf = self._leaf_of.get(tuple(int(c) for c in code))
        if leaf is None:
            return np.zeros(0, np.int32)
        end = self._ends[leaf]
        return self._order[end - self.counts[leaf] : end]

    def to_text(self, code: np.ndarray | tuple[int, ...]) -> str:
        """An ID, or a prefix of one, as text: <12,77,203>."""
        return "<" + ",".join(str(int(c)) for c in code) + ">"

    @cached_property
    def _grouped(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct rows in rising order, and the index of each row in them."""
        keys = _sort_keys(self.codes, self.codebook_sizes)
        order = np.lexsort(keys[::-1])
        new = np.ones(len(order), bool)
        new[1:] = np.logical_or.reduce([key[order[1:]] != key[order[:-1]] for key in keys])
        leaf = np.empty(len(order), np.int32)
        leaf[order] = np.cumsum(new) - 1
        return self.codes[order[new]], leaf

    @cached_property
    def _ends(self) -> np.ndarray:
        """The end in `_order` of the items of each of `ids`, int64 [distinct]."""
        return np.cumsum(self.counts)

    @cached_property
    def _leaf_of(self) -> dict[tuple[int, ...], int]:
        return {tuple(row): leaf for leaf, row in enumerate(self.ids.tolist())}

    @cached_property
    def _order(self) -> np.ndarray:
        """Items sorted by leaf, then falling popularity, then index, int32 [I]."""
        popularity = np.zeros(len(self.codes)) if self.popularity is None else np.asarray(self.popularity)
        return np.lexsort((np.arange(len(self.codes)), -popularity, self.leaf)).astype(np.int32)


def _sort_keys(codes: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Codes [I, M] as a few int64 [I], the most significant first: sorting by these keys sorts the rows.

    Neighbouring levels are packed into one number while they fit; ten times as fast as `np.unique` by rows.
    """
    keys, room = [codes[:, 0].astype(np.int64)], 2**63 // sizes[0]
    for level, size in enumerate(sizes[1:], start=1):
        if size <= room:
            keys[-1] = keys[-1] * size + codes[:, level]
            room //= size
        else:
            keys.append(codes[:, level].astype(np.int64))
            room = 2**63 // size
    return keys


def write_codes(path: Path, item_ids: ItemIds, space: SemanticIds) -> None:
    """Write codes.parquet: item_id, c1..cM int32; the codebook sizes are in the schema's metadata."""
    columns = {"item_id": as_strings(item_ids)}
    columns |= {f"c{level + 1}": pa.array(space.codes[:, level], pa.int32()) for level in range(space.levels)}
    sizes = ",".join(str(size) for size in space.codebook_sizes).encode()
    pq.write_table(pa.table(columns).replace_schema_metadata({SIZES_KEY: sizes}), path)


def read_codes(path: Path, item_ids: ItemIds | None = None, popularity: np.ndarray | None = None) -> SemanticIds:
    """Read codes.parquet in the order of item_ids [I]; None: of all items in the file's own order.

    Without codebook sizes in the metadata (a table made elsewhere), the size of a level is its largest code + 1.

    Raises:
      UserError: the file is no parquet file, a column is missing or mistyped, a code is missing, negative or too
        large, an item is listed twice, is not in the catalogue, or has no row.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read as parquet ({error}): run the tokenize phase again") from error
    levels = sum(name[:1] == "c" and name[1:].isdigit() for name in table.column_names)
    names = [f"c{level + 1}" for level in range(levels)]
    if missing := [name for name in ["item_id", *(names or ["c1"])] if name not in table.column_names]:
        raise UserError(
            f"{path} has no column {missing[0]!r}; it needs item_id and c1..cM (found {', '.join(table.column_names)})"
        )
    codes = np.stack([_code_column(path, table, name) for name in names], axis=1)
    listed = table["item_id"].cast(pa.string())
    check_distinct(listed, path)
    if item_ids is not None:
        codes = codes[_rows_of(path, listed, as_strings(item_ids))]
    sizes = (table.schema.metadata or {}).get(SIZES_KEY)
    found = tuple(int(s) for s in sizes.split(b",")) if sizes else tuple(int(size) for size in codes.max(0) + 1)
    try:
        return SemanticIds(codes, found, popularity)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _code_column(path: Path, table: pa.Table, name: str) -> np.ndarray:
    column = table[name]
    if not pa.types.is_integer(column.type):
        raise UserError(f"{path}: column {name!r} is {column.type}, but codes are int32")
    for row in np.flatnonzero(column.is_null().to_numpy())[:1]:
        raise UserError(f"{path}: row {row} has no {name!r}; give each item a code at each level")
    values = column.to_numpy()
    for row in np.flatnonzero((values < 0) | (values >= 2**31))[:1]:
        raise UserError(f"{path}: row {row} has {name}={values[row]}; codes are numbers from 0 that fit in int32")
    return values.astype(np.int32)


def as_strings(item_ids: ItemIds) -> pa.Array | pa.ChunkedArray:
    """Item ids as Arrow's strings [I]."""
    if isinstance(item_ids, pa.Array | pa.ChunkedArray):
        return item_ids.cast(pa.string())
    return pa.array(item_ids, pa.string())


def rows_in(item_ids: ItemIds, listed: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The row in `listed` [I] of each of item_ids [n], int64 [n]; -1 where there is none."""
    rows = pc.index_in(as_strings(item_ids), listed)
    return rows.fill_null(-1).to_numpy().astype(np.int64)


def _rows_of(path: Path, listed: pa.ChunkedArray, item_ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The row of each catalogue item, int64 [I]."""
    unknown = np.flatnonzero(rows_in(listed, item_ids) < 0)
    if len(unknown):
        raise UserError(
            f"{path}: item_id {listed[unknown[0]].as_py()!r} (row {unknown[0]}) is not in items.parquet "
            f"({len(unknown)} such items): {NEW_IDS}"
        )
    rows = rows_in(item_ids, listed)
    for row in np.flatnonzero(rows < 0)[:1]:
        raise UserError(f"{path}: item_id {item_ids[row].as_py()!r} of items.parquet has no row: {NEW_IDS}")
    return rows
