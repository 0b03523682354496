"""Items in files, read block by block, so that they need not fit in memory.

    items = open_items(Path("items.parquet"))           # or a matrix in a .npy file, or a folder of either
    len(items), items.width
    for block in items.blocks(): ...                    # block.x is f32 [n, D], block.item_ids its items
    x = items.sample(np.random.default_rng(0), 10_000)  # uniform, in one pass

A parquet file has `item_id` and `embedding` (a list of numbers), and may have `count`, the popularity. A `.npy` file
has no item ids: row numbers from 0 on are used. The parts of a folder, all of one kind, are read in the order of their
names, with continuous row numbers; other files in it are ignored.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.config import UserError
from jaxrec.console import progress
from jaxrec.semantic_ids.quantizers.rows import LARGEST, complaint, unusable

BLOCK_ROWS = 1 << 16
BUFFER_BYTES = 1 << 20
"""Bytes of parquet read at once; pyarrow's default is a whole column of a row group, which may be the file."""


class Block(NamedTuple):
    """Some items in the order of the file: item_ids string [n], x f32 [n, D], counts f64 [n] or None."""

    item_ids: pa.Array
    x: np.ndarray
    counts: np.ndarray | None


class Scan(NamedTuple):
    """The result of one pass over items: item_ids string [I] and counts f64 [I] (or None) of all, embeddings of some.

    rows: int64 [n], the rows of the embeddings, rising. x: f32 [n, D].
    """

    item_ids: pa.ChunkedArray
    counts: np.ndarray | None
    rows: np.ndarray
    x: np.ndarray


@dataclass(frozen=True)
class Matrix:
    """A `.npy` file [rows, D] whose first row has the number `first` among all items."""

    path: Path
    rows: int
    first: int

    def blocks(self, rows: int, width: int | None = None) -> Iterator[Block]:
        """Its items, at most `rows` at once."""
        for start in range(0, self.rows, rows):
            # Mapped anew each time: the pages of a lasting mapping would count as this process's memory.
            x = as_floats(load_matrix(self.path)[start : start + rows])
            if width not in (None, x.shape[1]):
                raise UserError(f"{self.path} is {x.shape[1]} wide, the parts before it {width}: give all one width")
            _check_finite(x, self.path, start)
            numbers = np.arange(self.first + start, self.first + start + len(x))
            yield Block(pa.array(numbers).cast(pa.string()), x, None)


@dataclass(frozen=True)
class Table:
    """A parquet file with these columns."""

    path: Path
    rows: int
    names: tuple[str, ...]

    def blocks(self, rows: int, width: int | None = None) -> Iterator[Block]:
        """Its items, at most `rows` at once."""
        start = 0
        for batch in read_batches(self.path, rows, self.names):
            ids = check_ids(batch["item_id"], self.path, start)
            x = _vectors(batch["embedding"], ids, self.path, start, width)
            _check_finite(x, self.path, start, ids)
            yield Block(ids, x, counts_of(batch, self.path, start))
            start, width = start + len(ids), x.shape[1]


@dataclass(frozen=True, eq=False)
class Items:
    """The items of a file, or of the parts of a folder. width: D. named: whether they have ids of their own."""

    path: Path
    parts: tuple[Matrix | Table, ...]
    width: int

    def __len__(self) -> int:
        """The number of items, I."""
        return sum(part.rows for part in self.parts)

    @property
    def named(self) -> bool:
        """Whether the items have ids of their own; those of a `.npy` file have row numbers only."""
        return isinstance(self.parts[0], Table)

    def blocks(self, rows: int = BLOCK_ROWS) -> Iterator[Block]:
        """All items in order, `rows` at once, fewer in the last block alone.

        Raises:
          UserError: a file is damaged, an item_id is missing, or an embedding is missing or of another width than those
            before it, or an embedding or a count is NaN or infinity; file, row and column are named.
        """
        return _even((block for part in self.parts for block in part.blocks(rows, self.width)), rows)

    def sample(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        """The embeddings of `rows` items, f32 [n, D]; see `scan`."""
        return self.scan(rng, rows).x

    def scan(self, rng: np.random.Generator | None = None, rows: int | None = None) -> Scan:
        """One pass over all items that keeps the embeddings of `rows` of them, drawn uniformly, each at most once.

        All embeddings if `rows` is None or not below I. UserError as for `blocks`.
        """
        kept = np.arange(len(self))
        if rows is not None and rows < len(self):
            kept = np.sort(rng.choice(len(self), rows, replace=False, shuffle=False))
        x = np.empty((len(kept), self.width), np.float32)
        ids, counts, start = [], [], 0
        for block in tracked(self.blocks(), "Reading items", len(self)):
            begin, end = np.searchsorted(kept, (start, start + len(block.x)))
            x[begin:end] = block.x[kept[begin:end] - start]
            ids.append(block.item_ids)
            counts.append(block.counts)
            start += len(block.x)
        return Scan(pa.chunked_array(ids), None if counts[0] is None else np.concatenate(counts), kept, x)

    def column(self, name: str) -> list[str | None] | None:
        """Another column of all items as texts, [I]; None when there is none."""
        values: list = []
        for part in self.parts if self.named else ():
            file = _open(part.path)
            if name not in file.schema_arrow.names:
                return None
            values += [value if value is None else str(value) for value in file.read([name])[name].to_pylist()]
        return values or None


def open_items(path: Path) -> Items:
    """The items of a parquet file, a `.npy` file, or a folder of either.

    Raises:
      UserError: there are no items, a file is of another kind, a column is missing or mistyped, or the parts differ.
    """
    parts: list[Matrix | Table] = []
    for part in parts_of(path):
        if part.suffix == ".npy":
            parts.append(Matrix(part, len(load_matrix(part)), sum(each.rows for each in parts)))
        else:
            parts.append(_open_table(part, parts[0].names if parts else ()))
    filled = [part for part in parts if part.rows]
    if not filled:
        raise UserError(f"{path} has no rows: give at least one item")
    width = next(filled[0].blocks(1)).x.shape[1]
    if not width:
        raise UserError(f"{filled[0].path}: the embedding in row 0 is empty: give every item a vector")
    return Items(Path(path), tuple(parts), width)


def parts_of(path: Path) -> list[Path]:
    """The path of a file, or those of the parts of a folder; UserError when it has none, or parts of both kinds."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    parts = sorted(part for part in path.iterdir() if part.suffix in (".npy", ".parquet"))
    if not parts:
        raise UserError(f"the folder {path} has no .npy or .parquet files: give one with items")
    if len({part.suffix for part in parts}) > 1:
        raise UserError(f"the folder {path} mixes .npy and .parquet files: keep one kind in it")
    return parts


def tracked(blocks: Iterable[Block], what: str, total: int) -> Iterator[Block]:
    """Blocks under a progress bar with the remaining time, when there are many."""
    if total <= 8 * BLOCK_ROWS:
        yield from blocks
        return
    with progress() as bars:
        task = bars.add_task(what, total=total)
        for block in blocks:
            yield block
            bars.advance(task, len(block.x))


def read_batches(path: Path, rows: int, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Columns of a parquet file, at most `rows` rows at once; UserError when it cannot be read."""
    file = _open(path)
    _check_columns(path, file.schema_arrow, names)
    try:
        yield from file.iter_batches(rows, columns=list(names))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} is damaged ({error}): restore it from a copy") from error


def read_table(path: Path, names: Sequence[str], wanted: Sequence[str] = ()) -> pa.Table:
    """Columns `names` of a parquet file, or of a folder of them, and those columns of `wanted` that exist.

    `item_id`, one of `names`, is returned as distinct strings. A column that a part lacks is null in its rows.

    Raises:
      UserError: a file cannot be read, a column of `names` is missing, parts have columns of different types, there are
        no rows, an item_id is missing or listed twice, or a `count` is no number, NaN or infinity.
    """
    tables = []
    for part in parts_of(path):
        file = _open(part)
        found = [name for name in file.schema_arrow.names if name in (*names, *wanted)]
        _check_columns(part, file.schema_arrow, (*names, *(["count"] if "count" in found else [])))
        try:
            table = file.read(found)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{part} is damaged ({error}): restore it from a copy") from error
        counts_of(table, part)
        ids = check_ids(table["item_id"], part)
        tables.append(table.set_column(table.column_names.index("item_id"), "item_id", ids))
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"the parts of {path} do not fit each other ({error}): give a column one type") from error
    if not len(table):
        raise UserError(f"{path} has no rows: give at least one item")
    check_distinct(table["item_id"], path)
    return table


def counts_of(table: pa.Table | pa.RecordBatch, path: Path, start: int = 0) -> np.ndarray | None:
    """The column `count`, f64 [n], a missing one as 0; None when there is no such column.

    UserError when one is NaN or infinity; rows are counted from `start`.
    """
    if "count" not in table.schema.names:
        return None
    counts = table["count"].fill_null(0).to_numpy(zero_copy_only=False).astype(np.float64)
    for row in np.flatnonzero(~np.isfinite(counts))[:1]:
        raise UserError(f"{path}: count of row {start + row} is {counts[row]}: give a number, or leave it empty for 0")
    return counts


def check_ids(column: pa.Array | pa.ChunkedArray, path: Path, start: int = 0) -> pa.Array | pa.ChunkedArray:
    """A column item_id as strings [n]; UserError when its type is wrong, or an id is missing or empty.

    Rows are counted from `start`. Integers are converted; floating-point numbers have no unique text and are refused.
    """
    kind = column.type
    if pa.types.is_floating(kind) or (pa.types.is_decimal(kind) and kind.scale):
        first = next((value for value in column.to_pylist() if value is not None), None)
        mend = "write ids as strings or whole numbers"
        raise UserError(f"{path}: column 'item_id' holds floating-point numbers ({kind}, such as {first!r}): {mend}")
    try:
        ids = column.cast(pa.string())
        ids.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        kind = f"is {column.type}, but must be UTF-8 text"
        raise UserError(f"{path}: column 'item_id' {kind} ({error}): write it anew as strings") from error
    for row in np.flatnonzero(pc.fill_null(pc.equal(ids, ""), True).to_numpy(zero_copy_only=False))[:1]:
        raise UserError(f"{path}: row {start + row} has no item_id: give every item its own")
    return ids


def check_distinct(item_ids: pa.ChunkedArray, path: Path) -> None:
    """UserError when an item_id is listed twice."""
    counted = pc.value_counts(item_ids)
    twice = counted.field("values").filter(pc.greater(counted.field("counts"), 1))
    if len(twice):
        raise UserError(f"{path}: item_id {twice[0].as_py()!r} is listed more than once; keep one row an item")


def load_matrix(path: Path) -> np.ndarray:
    """The matrix of a `.npy` file [I, D], memory-mapped; UserError when the file is of another kind."""
    try:
        x = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as .npy ({error}): save a matrix of numbers with numpy.save") from error
    shape, kind = getattr(x, "shape", None), getattr(x, "dtype", None)
    if shape is None or len(shape) != 2:
        raise UserError(f"{path} has shape {shape}, but must be a matrix [items, width]")
    if not (np.issubdtype(kind, np.floating) or np.issubdtype(kind, np.integer)):
        raise UserError(f"{path} is of type {kind}, which are no numbers: save it as float32")
    return x


def as_floats(values: np.ndarray) -> np.ndarray:
    """A copy as float32; a double too large for it becomes infinite and is refused later."""
    with np.errstate(over="ignore"):
        return np.array(values, np.float32, order="C")


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read as parquet ({error}): give a parquet file of items") from error


def _open_table(path: Path, names: tuple[str, ...]) -> Table:
    """A parquet file of items; names: the columns of the earlier parts, if any."""
    file = _open(path)
    found = file.schema_arrow.names
    names = names or ("item_id", "embedding", *(["count"] if "count" in found else []))
    _check_columns(path, file.schema_arrow, names)
    return Table(path, file.metadata.num_rows, names)


def _check_columns(path: Path, schema: pa.Schema, names: Sequence[str]) -> None:
    for name in names:
        if name not in schema.names:
            listed = ", ".join(schema.names)
            raise UserError(f"{path} has no column {name!r}; it needs {' and '.join(names)} (found {listed})")
    wanted: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
        "embedding": (lambda kind: _is_list(kind) and _is_number(kind.value_type), "a list of numbers"),
        "count": (_is_number, "numbers"),
    }
    for name, (fits, what) in wanted.items():
        if name in names and not fits(schema.field(name).type):
            raise UserError(f"{path}: column {name!r} is {schema.field(name).type}, but must be {what}")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _vectors(column: pa.Array, ids: pa.Array, path: Path, start: int, width: int | None) -> np.ndarray:
    """A column of lists as f32 [n, D]; width: their length D; None: that of the first."""
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    widths = column.value_lengths().to_numpy(zero_copy_only=False)
    width = widths[0] if width is None else width
    for row in np.flatnonzero(~(widths == width))[:1]:
        found = "missing" if np.isnan(widths[row]) else f"{widths[row]:.0f} wide, those before it {width:.0f}"
        raise UserError(
            f"{path}: the embedding of item_id {ids[row].as_py()!r} (row {start + row}) is {found}: "
            "give all the same width"
        )
    return as_floats(column.flatten().to_numpy(zero_copy_only=False)).reshape(len(ids), -1)


def _check_finite(x: np.ndarray, path: Path, start: int, ids: pa.Array | None = None) -> None:
    for row in unusable(x)[:1]:
        place = np.flatnonzero(~(np.abs(x[row]) <= LARGEST))[0]
        name = "" if ids is None else f" (item_id {ids[row].as_py()!r}, column 'embedding')"
        what, mend = ("NaN or infinity", "mend it first") if not np.isfinite(x[row]).all() else complaint(x[row])
        raise UserError(f"{path}: number {place} of row {start + row}{name} is {what}: {mend}")


def _even(blocks: Iterable[Block], rows: int) -> Iterator[Block]:
    """The same items, cut so that every block but the last has `rows` of them."""
    held, count = [], 0
    for block in blocks:
        while count + len(block.x) >= rows:
            cut = rows - count
            yield _joined([*held, _slice(block, 0, cut)])
            block, held, count = _slice(block, cut, None), [], 0
        if len(block.x):
            held.append(block)
            count += len(block.x)
    if held:
        yield _joined(held)


def _slice(block: Block, start: int, end: int | None) -> Block:
    return Block(*(part if part is None else part[start:end] for part in block))


def _joined(blocks: list[Block]) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    ids, x, counts = zip(*blocks, strict=True)
    return Block(pa.concat_arrays(ids), np.concatenate(x), None if counts[0] is None else np.concatenate(counts))
