"""Item attributes as small integers, for embedding tables."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxrec.config import UserError

PRICE_STEPS = 16  # quantile buckets of a numeric attribute


def attribute_indices(items: pa.Table, columns: Sequence[str]) -> tuple[np.ndarray, tuple[int, ...]]:
    """The attributes of every item: int32 [I, A] and the number of values of each.

    0 stands for a missing value: null, or NaN. Words are numbered in alphabetical order. Numbers are cut into 16
    buckets of equal count.

    Raises:
      UserError: a column is missing or holds neither words nor numbers.
    """
    if unknown := [name for name in columns if name not in items.column_names]:
        known = ", ".join(name for name in items.column_names if name not in ("item_id", "title", "text"))
        raise UserError(f"attributes: items.parquet has no column {unknown[0]!r}; it has {known}")
    indices = later_attribute_indices(items, columns, items)
    return indices, tuple(int(index.max(initial=0)) + 1 for index in indices.T)


def later_attribute_indices(items: pa.Table, columns: Sequence[str], later: pa.Table) -> np.ndarray:
    """Attributes int32 [n, A] of later items, in the numbering of the attributes of `items`.

    A word that no earlier item has is 0, as a missing value is. A number goes to the bucket that it falls in.
    """
    indices = [_indices(name, items[name].combine_chunks(), later[name].combine_chunks()) for name in columns]
    return np.stack(indices, axis=1) if indices else np.zeros((len(later), 0), np.int32)


def _indices(name: str, known: pa.Array, column: pa.Array) -> np.ndarray:
    """The indices of a column in the numbering that `known` gives."""
    if pa.types.is_integer(known.type) or pa.types.is_floating(known.type):
        edges, values = _numbers(known), _numbers(column)
        edges, present = edges[~np.isnan(edges)], ~np.isnan(values)
        edges = np.unique(np.quantile(edges, np.linspace(0, 1, PRICE_STEPS + 1)[1:-1])) if len(edges) else []
        index = 1 + np.searchsorted(edges, values, side="right")
    elif pa.types.is_string(known.type) or pa.types.is_large_string(known.type):
        words = pc.drop_null(pc.unique(known)).sort()
        found = pc.index_in(column.cast(known.type), words)
        present = found.is_valid().to_numpy(zero_copy_only=False)
        index = 1 + found.fill_null(0).to_numpy(zero_copy_only=False)
    else:
        raise UserError(
            f"attributes: the column {name!r} of items.parquet is {known.type}; give one of words or numbers"
        )
    return np.where(present, index, 0).astype(np.int32)


def _numbers(column: pa.Array) -> np.ndarray:
    """f64, finite, or NaN where there is no number."""
    values = column.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)
    return np.nan_to_num(values, nan=np.nan)
