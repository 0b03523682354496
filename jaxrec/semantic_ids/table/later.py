"""The rows of items added after a run's tables were made, in the columns of its items.parquet.

    <run>/tables/items.parquet              the items that the model was trained on; never changed
    <run>/semantic_ids/later_items.parquet  item_id and the other columns of appended items

A semantic_ids folder outside a run has no such rows.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.config import UserError
from jaxrec.files import fault_point, sync, writing
from jaxrec.semantic_ids.files.items import read_table
from jaxrec.semantic_ids.table.space import ItemIds, as_strings, rows_in

LATER = "later_items.parquet"


def items_of_run(folder: Path) -> Path | None:
    """items.parquet of the run that contains a semantic_ids folder; None outside a run."""
    path = Path(folder).absolute().parent / "tables" / "items.parquet"
    return path if path.is_file() else None


def read_rows(folder: Path, path: Path) -> pa.Table | None:
    """The items of a parquet file, or of a folder of them, in the columns that the file shares with the run.

    None outside a run.

    Raises:
      UserError: a column is of another type than that of the run, or as `files.read_table`.
    """
    if (there := items_of_run(folder)) is None:
        return None
    schema = pq.read_schema(there)
    table = read_table(path, ["item_id"], schema.names)
    return pa.table({field.name: _cast(path, table, field) for field in schema if field.name in table.column_names})


def keep_rows(folder: Path, rows: pa.Table) -> None:
    """Keep the rows of items that the run doesn't list; the caller holds the lock of the versions.

    Newer rows replace older ones. Columns that `rows` lack keep their values for items kept before, else are null.
    The file is written whole or not at all. Fault point: `partial:later`, before the rename.
    """
    path, partial = Path(folder) / LATER, Path(folder) / f".{LATER}.partial"
    there = items_of_run(folder)
    listed, schema = pq.read_table(there, columns=["item_id"])["item_id"], pq.read_schema(there)
    rows = rows.filter(pa.array(rows_in(rows["item_id"], listed) < 0))
    if not len(rows):
        return
    schema = pa.schema([(field.name, field.type) for field in schema])
    earlier = pq.read_table(path).cast(schema) if path.exists() else schema.empty_table()
    places = rows_in(rows["item_id"], earlier["item_id"])
    before = earlier.take(pa.array(places, mask=places < 0))
    columns = [(rows if name in rows.column_names else before)[name] for name in schema.names]
    others = earlier.filter(pc.invert(pc.is_in(earlier["item_id"], rows["item_id"].combine_chunks())))
    rows = pa.concat_tables([others, pa.table(columns, names=schema.names).cast(schema)])
    with writing(path):
        pq.write_table(rows, partial)
        sync(partial)
        fault_point("partial:later")
        partial.rename(path)
        sync(path.parent)


def read_later(folder: Path) -> pa.Table | None:
    """The rows of all later items; None if there are none."""
    path = Path(folder) / LATER
    return pq.read_table(path) if path.is_file() else None


def check_known(folder: Path, item_ids: ItemIds) -> None:
    """UserError if the folder is in a run that lacks a row of one of these items: `serve.py` could not start."""
    if (there := items_of_run(folder)) is None:
        return
    listed, later = pq.read_table(there, columns=["item_id"])["item_id"], read_later(folder)
    unknown = rows_in(item_ids, listed) < 0
    if later is not None:
        unknown &= rows_in(item_ids, later["item_id"]) < 0
    for row in np.flatnonzero(unknown)[:1]:
        raise UserError(
            f"item_id {as_strings(item_ids)[row].as_py()!r} is in neither {there} nor {Path(folder) / LATER} "
            f"({int(unknown.sum())} such items): append it once more with python -m jaxrec.semantic_ids append, from a "
            "file with its title and what else the run knows of items"
        )


def count_untitled(folder: Path, item_ids: ItemIds) -> int:
    """The number of these items that have a later row without a title."""
    later = read_later(folder)
    if later is None or "title" not in later.column_names:
        return 0
    return later.filter(pa.array(rows_in(later["item_id"], item_ids) >= 0))["title"].null_count


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type holds text."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _cast(path: Path, table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    column = table[field.name]
    try:
        if is_text(column.type) != is_text(field.type) and not pa.types.is_null(column.type):
            raise pa.ArrowInvalid("text is not converted")
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        # A popularity may have any numeric type.
        return column.cast(field.type, safe=field.name != "count")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(
            f"{path}: column {field.name!r} is {column.type}, but the run's items.parquet has {field.type} ({error})"
        ) from error
