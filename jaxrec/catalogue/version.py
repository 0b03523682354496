"""One version of a served catalogue: items, codes, active items, and the arrays derived from them.

A request reads one version from its start to its end. `live.LiveCatalogue` makes versions; their arrays have the same
shapes until the capacity grows.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from jaxrec.catalogue.predicates import Column, Where, check_kind, index_column, parse_where
from jaxrec.config import UserError
from jaxrec.decoding.filters import Allowed, ItemOrder, Mask
from jaxrec.decoding.trie import Trie

MASKS = 64
"""Number of masks that a version keeps, those used last; each takes 1/8 byte an item."""

Predicate = Where | Callable[[pa.Table], np.ndarray]


@dataclass(frozen=True, eq=False, repr=False)
class Version:
    """One immutable state of the catalogue."""

    number: int
    parent: int | None
    action: str
    """the change made to the parent"""
    items: pa.Table
    """row = item; `item_id` and any columns"""
    codes: np.ndarray
    """int32 [I, M]"""
    active: np.ndarray
    """bool [I]: can be recommended"""
    popularity: np.ndarray
    """float64 [I]: the order of items under one ID, and of popular items"""
    embeddings: np.ndarray
    """float32 [I - first, D], of the items added after the first version; NaN where none was given"""
    capacity: int
    """number of items that the arrays have room for"""
    rows: dict[str, int]
    """item_id -> row; later versions may have added rows, which `row` ignores"""
    columns: dict[str, Column]
    """indexed columns of `items`, those that filters have used"""
    trie: Trie | None = None
    order: ItemOrder | None = None
    """the order of items in the trie"""
    popular: np.ndarray | None = None
    """int64 [active items], the most popular first, ties by row"""
    served: Any = None
    """the model's arrays for this version"""
    texts: Any = None
    """the target space of a model that answers with texts, and its list; None where items are answers"""
    masks: "OrderedDict[Predicate, Mask]" = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        """The number of rows, including those of removed items."""
        return len(self.codes)

    def row(self, item_id: str) -> int | None:
        """The row of an item, active or removed; None if this version doesn't have it."""
        row = self.rows.get(item_id)
        return row if row is not None and row < len(self) else None

    def mask(self, predicate: Mapping | Predicate | np.ndarray) -> Mask:
        """The active items that a predicate allows: a filter as in `predicates`, a function of `items`, or bool [I].

        Masks of filters and functions are cached; pass the same function object for every request.

        Raises:
          UserError: an unknown column, a value of another type than the column's, a mask of a wrong type or length.
        """
        if isinstance(predicate, np.ndarray | jax.Array):
            return self.order.mask(self._checked(np.asarray(predicate)))
        key = parse_where(predicate) if isinstance(predicate, Mapping) else predicate
        with self.lock:
            if key in self.masks:
                self.masks.move_to_end(key)
                return self.masks[key]
        mask = self._combined(key) if isinstance(key, tuple) else self.order.mask(self._checked(key(self.items)))
        with self.lock:
            self.masks[key] = mask
            while len(self.masks) > MASKS:
                self.masks.popitem(last=False)
        return mask

    def allowed(
        self,
        predicate: Mapping | Predicate | np.ndarray | None = None,
        *,
        blocked: Sequence[int] = (),
        only: Sequence[int] | None = None,
    ) -> Allowed:
        """The allowed items of a request: those of the predicate (None = all) without `blocked`, within `only`
        (rows)."""
        mask = None if predicate is None else self.mask(predicate)
        return self.order.allowed(mask, blocked=blocked, only=only)

    def most_popular(self, k: int, allowed: Allowed | None = None) -> np.ndarray:
        """The k most popular allowed rows, or fewer if fewer are allowed."""
        if allowed is None:
            return self.popular[:k]
        found, start, size = [], 0, 8 * k
        while start < len(self.popular) and sum(map(len, found)) < k:
            some = self.popular[start : start + size]
            found.append(some[allowed.holds(self.order.positions[some])])
            start, size = start + size, 2 * size
        return np.concatenate([np.zeros(0, np.int64), *found])[:k]

    def _combined(self, where: Where) -> Mask:
        """The conjunction of one mask a column; filters share the masks of columns."""
        mask = self.order.all
        for condition in where:
            mask = mask & (self.mask((condition,)) if len(where) > 1 else self._one(*condition))
        return mask

    def _one(self, name: str, condition: Any) -> Mask:
        column = self.column(name)
        check_kind(name, column, condition)
        return self.order.mask(column.matches(condition))

    def column(self, name: str) -> Column:
        """A column of `items`, indexed at its first use.

        Raises:
          UserError: there is no such column, or its type has no filters.
        """
        if name not in self.items.column_names:
            known = ", ".join(sorted(self.items.column_names))
            raise UserError(f"filter.{name}: the items have no such column; they have {known}")
        with self.lock:
            column = self.columns.get(name)
        if column is None:
            column = index_column(name, self.items[name])
            with self.lock:
                self.columns[name] = column
        return column

    def _checked(self, allowed: np.ndarray) -> np.ndarray:
        allowed = np.asarray(allowed)
        if allowed.dtype != bool or allowed.shape != (len(self),):
            raise UserError(
                f"a mask of items is {allowed.dtype}{list(allowed.shape)}, but version {self.number} of the catalogue "
                f"has {len(self)} rows: give bool [{len(self)}], or a function of the items table"
            )
        return allowed
