"""Checks of the arguments of a change, and their merge into the catalogue; errors name the item or the column."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from jaxrec.config import UserError


def item_ids_of(items: pa.Table) -> list[str]:
    """The item_id of every row of `items`; UserError names the row."""
    if "item_id" not in items.column_names:
        raise UserError(f"the items have no column item_id; they have {', '.join(items.column_names)}")
    return checked_ids(items["item_id"].to_pylist())


def checked_ids(item_ids: Sequence[str]) -> list[str]:
    """The ids as a list; UserError if there are none, or one is not text or is listed twice."""
    item_ids = list(item_ids)
    if not item_ids:
        raise UserError("there are no items: give at least one item_id")
    seen: set[str] = set()
    for row, item in enumerate(item_ids):
        if not isinstance(item, str) or not item:
            raise UserError(f"row {row} of the items has item_id {item!r}: give every item its own text")
        if item in seen:
            raise UserError(f"item_id {item!r} is listed twice: keep one row an item")
        seen.add(item)
    return item_ids


def checked_numbers(name: str, values: np.ndarray | None, count: int) -> np.ndarray:
    """float64 [count], zeros for None; UserError if the shape or the type is wrong."""
    if values is None:
        return np.zeros(count)
    values = np.asarray(values, np.float64)
    if values.shape != (count,) or np.isnan(values).any():
        raise UserError(f"{name} of shape {values.shape} does not fit {count} items: give each one number, not NaN")
    return values


def checked_embeddings(values: np.ndarray | None, count: int, width: int) -> np.ndarray | None:
    """float32 [count, width], None for None; UserError if the shape or the type is wrong. width 0: any."""
    if values is None:
        return None
    values = np.asarray(values, np.float32)
    width = width or values.shape[-1]
    if values.shape != (count, width) or not np.isfinite(values).all():
        raise UserError(
            f"embeddings of shape {values.shape} do not fit: give {count} items {width} finite numbers each"
        )
    return values


def appended_embeddings(before: np.ndarray, embeddings: np.ndarray | None, count: int) -> np.ndarray:
    """`before` with `count` rows appended, NaN if none are given."""
    width = before.shape[1] if embeddings is None else embeddings.shape[1]
    if before.shape[1] != width:
        before = np.full((len(before), width), np.nan, np.float32)
    added = np.full((count, width), np.nan, np.float32) if embeddings is None else embeddings
    return np.concatenate([before, added])


def column_of(table: pa.Table, name: str, action: str) -> pa.ChunkedArray:
    """A column of the catalogue; UserError if it does not exist."""
    if name not in table.column_names:
        raise UserError(
            f"{action}: the catalogue has no column {name!r}; it has {', '.join(sorted(table.column_names))}"
        )
    return table[name]


def given_column(items: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    """A column of `items` in the catalogue's type; null if `items` lacks it."""
    if name not in items.column_names:
        return pa.chunked_array([pa.nulls(len(items), kind)], kind)
    return _cast(name, items[name], kind)


def replaced(table: pa.Table, rows: np.ndarray, items: pa.Table, action: str) -> pa.Table:
    """The table with new values at some rows, in the columns of `items`."""
    index = np.arange(len(table))
    index[rows] = len(table) + np.arange(len(rows))
    for name in items.column_names:
        old = column_of(table, name, action)
        new = pa.chunked_array([*old.chunks, *_cast(name, items[name], old.type).chunks], old.type)
        table = table.set_column(table.column_names.index(name), name, new.take(pa.array(index)))
    return table


def _cast(name: str, column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    try:
        if pa.types.is_string(column.type) != pa.types.is_string(kind) and not pa.types.is_null(column.type):
            raise pa.ArrowInvalid("text is not converted")
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"column {name!r} holds {column.type}, but the catalogue's holds {kind} ({error})") from error
