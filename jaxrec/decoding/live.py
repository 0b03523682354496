"""A catalogue that changes while it is served.

    live = LiveCatalogue(items, codes, sizes, popularity=counts, model=recommender)
    version = live.current                       # one request: one version, from its start to its end
    live.update(pa.table({"item_id": ["7"], "in_stock": [False]}))
    live.add(new_items, new_codes); live.remove(["9"]); live.restore(["9"]); live.rollback(1)

A version never changes. A change builds new arrays beside those of the current version, in the same shapes, and ends in
the assignment of one reference: who reads never waits, and sees one version whole. Arrays have room for more items than
there are; when that is used up they grow, and what was compiled for the old shapes is compiled for the new ones before
anybody sees the version.

An item has its row for good: the number by which histories, masks and the model's tables know it. One that was removed
keeps its row (so it still counts in a history) but is no leaf of the trie, so it can't be recommended.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from jaxrec.config import UserError
from jaxrec.decoding.background import in_background
from jaxrec.decoding.filters import Allowed, ItemOrder, Mask
from jaxrec.decoding.predicates import Column, Where, check_kind, index_column, parse_where
from jaxrec.decoding.trie import Trie, build_trie

MASKS = 64
"""Masks that a version keeps, those used last; 1/8 byte an item each."""

Predicate = Where | Callable[[pa.Table], np.ndarray]


class ServedModel(Protocol):
    """A model that makes arrays of its own for every version of the catalogue."""

    def serve_version(self, version: "Version", before: "Version | None") -> Any:
        """A pytree of arrays for this version, in the shapes of `before.served` unless the capacity grew."""
        ...

    def warm_up(self, served: Any) -> None:
        """Compile for these shapes what was compiled for those before."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Version:
    """One state of the catalogue; it never changes."""

    number: int
    parent: int | None
    action: str
    """what was done to the parent"""
    items: pa.Table
    """row = item; `item_id` and any columns"""
    codes: np.ndarray
    """int32 [I, M]"""
    active: np.ndarray
    """bool [I]: can be recommended"""
    popularity: np.ndarray
    """float64 [I]: the order of items under one ID, and of popular items"""
    embeddings: np.ndarray
    """float32 [I - first, D], of the items that came after the first version; NaN where none was given"""
    capacity: int
    """items that the arrays have room for"""
    rows: dict[str, int]
    """item_id -> row; later versions may have put more rows into it, which `row` doesn't tell of"""
    columns: dict[str, Column]
    """those of `items` that filters have asked for"""
    trie: Trie | None = None
    order: ItemOrder | None = None
    """where items stand in the trie"""
    popular: np.ndarray | None = None
    """int64 [active items], the most popular first, equal ones by row"""
    served: Any = None
    """what the model made for this version"""
    masks: "OrderedDict[Predicate, Mask]" = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        """Rows, those of removed items among them."""
        return len(self.codes)

    def row(self, item_id: str) -> int | None:
        """The row of an item, also of a removed one; None where this version doesn't know it."""
        row = self.rows.get(item_id)
        return row if row is not None and row < len(self) else None

    def mask(self, predicate: Mapping | Predicate | np.ndarray) -> Mask:
        """The active items that a predicate allows: a filter as in `predicates`, a function of `items`, or bool [I].

        Masks of filters and functions are kept; give the same function, not one made anew for every request.

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
        """What a request may get: the items of the predicate (None = all) without `blocked` and among `only` (rows)."""
        mask = None if predicate is None else self.mask(predicate)
        return self.order.allowed(mask, blocked=blocked, only=only)

    def most_popular(self, k: int, allowed: Allowed | None = None) -> np.ndarray:
        """The k most popular rows that are allowed, fewer where there are fewer."""
        if allowed is None:
            return self.popular[:k]
        found, start, size = [], 0, 8 * k
        while start < len(self.popular) and sum(map(len, found)) < k:
            some = self.popular[start : start + size]
            found.append(some[allowed.holds(self.order.positions[some])])
            start, size = start + size, 2 * size
        return np.concatenate([np.zeros(0, np.int64), *found])[:k]

    def _combined(self, where: Where) -> Mask:
        """The conjunction of one mask a column, which other filters may share."""
        mask = self.order.all
        for condition in where:
            mask = mask & (self.mask((condition,)) if len(where) > 1 else self._one(*condition))
        return mask

    def _one(self, name: str, condition: Any) -> Mask:
        column = self.column(name)
        check_kind(name, column, condition)
        return self.order.mask(column.matches(condition))

    def column(self, name: str) -> Column:
        """A column of `items`, indexed when it is first asked for.

        Raises:
          UserError: there is no such column, or filters can't work on it.
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


class LiveCatalogue:
    """Versions of a catalogue, one of them current. Safe to read and to change from several threads."""

    def __init__(
        self,
        items: pa.Table,
        codes: np.ndarray,
        codebook_sizes: tuple[int, ...],
        *,
        popularity: np.ndarray | None = None,
        capacity: int | None = None,
        keep: int = 4,
        model: ServedModel | None = None,
    ):
        """Makes version 1.

        Args:
          items: a column `item_id`, and any others, for filters.
          codes: int [I, M], row = item.
          popularity: [I]; None: items stand in their order.
          capacity: items to have room for; default: an eighth more than there are.
          keep: versions that can be rolled back to, the current one among them.
          model: makes its own arrays for every version.

        Raises:
          UserError: no items, an item without a text of its own as item_id, codes or popularity that don't fit.
        """
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        self.keep, self.model = keep, model
        self._building = threading.Lock()
        self._kept: dict[int, Version] = {}
        self._last = 0
        item_ids = _item_ids(items)
        codes = self._codes(codes, item_ids)
        popularity = _numbers("popularity", popularity, len(item_ids))
        if capacity is not None and capacity < len(item_ids):
            raise UserError(f"capacity={capacity} has no room for {len(item_ids)} items: raise it")
        first = Version(
            number=0,
            parent=None,
            action="begin",
            items=items,
            codes=codes,
            active=np.ones(len(codes), bool),
            popularity=popularity,
            embeddings=np.zeros((0, 0), np.float32),
            capacity=capacity or _room(len(codes)),
            rows=dict(zip(item_ids, range(len(item_ids)), strict=True)),
            columns={},
        )
        self.current = self._finish(first, None)

    @property
    def versions(self) -> list[dict[str, Any]]:
        """The versions that are kept: number, parent, action, items, current."""
        current = self.current
        return [
            {
                "version": version.number,
                "parent": version.parent,
                "action": version.action,
                "items": int(version.active.sum()),
                "current": version is current,
            }
            for version in list(self._kept.values())
        ]

    def add(
        self,
        items: pa.Table,
        codes: np.ndarray,
        *,
        popularity: np.ndarray | None = None,
        embeddings: np.ndarray | None = None,
    ) -> Version:
        """New items: leaves of the trie from now on. Columns that they lack are missing values.

        Args:
          items: `item_id` and columns of the catalogue.
          codes: int [n, M]; popularity: [n], None for 0; embeddings: float [n, D], for models that read them.

        Raises:
          UserError: an item that is there already (`restore` and `update` are for those) or is listed twice, a column
            that the catalogue doesn't have or of another type, codes outside the codebooks. Nothing is changed then.
        """
        with self._building:
            before = self.current
            item_ids = _item_ids(items)
            for item in item_ids:
                row = before.row(item)
                if row is not None:
                    state = "there already; update" if before.active[row] else "removed; restore"
                    raise UserError(f"add: item_id {item!r} is {state} it instead")
            return self._publish(self._grown(before, items, codes, popularity, embeddings), before, "add")

    def remove(self, item_ids: Sequence[str]) -> Version:
        """Items that can't be recommended any more. They keep their rows, and so stay what they are in histories.

        Raises:
          UserError: an item that is not there, was removed before or is listed twice, or none would be left.
        """
        return self._activate(item_ids, False, "remove")

    def restore(self, item_ids: Sequence[str]) -> Version:
        """Removed items come back as they were.

        Raises:
          UserError: an item that is unknown, was not removed or is listed twice.
        """
        return self._activate(item_ids, True, "restore")

    def update(self, items: pa.Table) -> Version:
        """New values of some columns for some items, such as a price or whether it is in stock.

        Raises:
          UserError: an unknown item or one listed twice, a column that is not there or of another type.
        """
        with self._building:
            before = self.current
            rows = self._known(before, _item_ids(items), "update")
            table = _replaced(before.items, rows, items.drop_columns("item_id"), "update")
            changed = set(items.column_names)
            kept = {name: column for name, column in dict(before.columns).items() if name not in changed}
            return self._publish(replace(before, items=table, columns=kept), before, "update")

    def reorder(self, item_ids: Sequence[str], popularity: np.ndarray) -> Version:
        """New popularity of some items: the order under one ID, and of popular items; a model's scores stay.

        Raises:
          UserError: an unknown item or one listed twice, popularity that isn't one number an item.
        """
        with self._building:
            before = self.current
            rows = self._known(before, _checked_ids(item_ids), "reorder")
            changed = before.popularity.copy()
            changed[rows] = _numbers("popularity", popularity, len(rows))
            return self._publish(replace(before, popularity=changed), before, "reorder")

    def swap(
        self,
        items: pa.Table,
        codes: np.ndarray,
        *,
        popularity: np.ndarray | None = None,
        embeddings: np.ndarray | None = None,
    ) -> Version:
        """Another whole catalogue in place of this one: items that are not in it are removed, others added or changed.

        Arguments and errors as for `add`, but items may be there already; columns and embeddings that are not given for
        them stay as they were, and embeddings are taken of new items only.
        """
        with self._building:
            before = self.current
            item_ids = _item_ids(items)
            codes = self._codes(codes, item_ids)
            popularity = _numbers("popularity", popularity, len(item_ids))
            embeddings = _embeddings(embeddings, len(item_ids), before)
            rows = _rows(before, item_ids)
            new, old = np.flatnonzero(rows < 0), np.flatnonzero(rows >= 0)
            version = before
            if len(new):
                given = None if embeddings is None else embeddings[new]
                version = self._grown(before, items.take(pa.array(new)), codes[new], popularity[new], given)
            known = rows[old]
            active = np.zeros(len(version), bool)
            active[known] = True
            active[len(before) :] = True
            all_codes, all_popularity = version.codes.copy(), version.popularity.copy()
            all_codes[known], all_popularity[known] = codes[old], popularity[old]
            if np.array_equal(all_codes, before.codes):
                all_codes = before.codes
            table = _replaced(version.items, known, items.take(pa.array(old)), "swap")
            changed = {"codes": all_codes, "popularity": all_popularity, "active": active}
            return self._publish(replace(version, items=table, columns={}, **changed), before, "swap")

    def rollback(self, number: int) -> Version:
        """An earlier version (or a later one that was left) is current again, as it was, at once.

        Raises:
          UserError: there is no such version, or it is not kept any more.
        """
        with self._building:
            if number not in self._kept:
                raise UserError(
                    f"there is no version {number} of the catalogue to go back to: "
                    f"kept are {', '.join(map(str, self._kept))}"
                )
            self.current = self._kept[number]
            return self.current

    def _activate(self, item_ids: Sequence[str], active: bool, action: str) -> Version:
        with self._building:
            before, item_ids = self.current, _checked_ids(item_ids)
            rows = self._known(before, item_ids, action)
            wrong = np.flatnonzero(before.active[rows] == active)
            if len(wrong):
                state = "there already" if active else "removed already"
                raise UserError(f"{action}: item_id {item_ids[wrong[0]]!r} is {state}: leave it out")
            changed = before.active.copy()
            changed[rows] = active
            if not changed.any():
                raise UserError(f"{action}: no item would be left in the catalogue: keep at least one")
            return self._publish(replace(before, active=changed), before, action)

    def _grown(self, before: Version, items: pa.Table, codes, popularity, embeddings) -> Version:
        """`before` with new rows behind its own."""
        item_ids = _item_ids(items)
        codes = self._codes(codes, item_ids)
        popularity = _numbers("popularity", popularity, len(item_ids))
        embeddings = _embeddings(embeddings, len(item_ids), before)
        for name in items.column_names:
            _column(before.items, name, "add")
        columns = [
            pa.chunked_array([*old.chunks, *_given(items, name, old.type).chunks], old.type)
            for name, old in zip(before.items.column_names, before.items.columns, strict=True)
        ]
        count = len(before) + len(item_ids)
        # Shared with the versions before, unless one that was rolled back has put other items there.
        rows = before.rows
        if len(rows) != len(before):
            rows = {item: row for item, row in rows.items() if row < len(before)}
        rows.update(zip(item_ids, range(len(before), count), strict=True))
        return replace(
            before,
            items=pa.table(columns, names=before.items.column_names),
            codes=np.concatenate([before.codes, codes]),
            active=np.concatenate([before.active, np.ones(len(codes), bool)]),
            popularity=np.concatenate([before.popularity, popularity]),
            embeddings=_appended(before.embeddings, embeddings, len(item_ids)),
            capacity=before.capacity if count <= before.capacity else _room(count),
            rows=rows,
            columns={},
        )

    def _publish(self, version: Version, before: Version, action: str) -> Version:
        """Finishes a version beside the current one, in the time that requests leave, then makes it the current one."""
        changed = replace(version, parent=before.number, action=action)
        version = in_background(lambda: self._finish(changed, before))
        self.current = version
        return version

    def _finish(self, version: Version, before: Version | None) -> Version:
        """The version with all that is made of it, kept but not yet the current one."""
        same = before is not None and all(
            getattr(version, name) is getattr(before, name) for name in ("codes", "active", "popularity")
        )
        if not same:
            rows = np.flatnonzero(version.active)
            trie = self._trie(version, rows, before)
            popular = rows[np.argsort(-version.popularity[rows], kind="stable")]
            version = replace(version, trie=trie, order=ItemOrder(trie), popular=popular)
        own = {"columns": dict(version.columns), "masks": OrderedDict(), "lock": threading.Lock()}
        version = replace(version, number=self._last + 1, **own)
        if self.model is not None:
            version = replace(version, served=self.model.serve_version(version, before))
        if before is not None:
            self._carry_masks(before, version, same)
            if self.model is not None and _shapes(version.served) != _shapes(before.served):
                self.model.warm_up(version.served)
        self._last = version.number
        kept = [*self._kept.values(), version][-self.keep :]
        self._kept = {each.number: each for each in kept}
        return version

    def _trie(self, version: Version, rows: np.ndarray, before: Version | None) -> Trie:
        """The trie of the active rows, whose items are rows of the whole table."""
        trie = build_trie(
            version.codes[rows],
            self.codebook_sizes,
            order=version.popularity[rows],
            capacity=version.capacity,
            like=None if before is None else before.trie,
        )
        items = np.zeros(version.capacity, np.int32)
        items[: len(rows)] = rows[np.asarray(trie.items)[: len(rows)]]
        return trie.replace(items=jnp.asarray(items))

    def _carry_masks(self, before: Version, version: Version, same_trie: bool) -> None:
        """The masks that requests asked for last are there before the first request comes."""
        with before.lock:
            masks = list(before.masks.items())
        unchanged = set(version.columns) if same_trie else set()
        for key, mask in masks:
            if isinstance(key, tuple) and unchanged.issuperset(name for name, _ in key):
                version.masks[key] = mask
            else:
                version.mask(key)

    def _codes(self, codes: np.ndarray, item_ids: list[str]) -> np.ndarray:
        """int32 [n, M]; UserError that names the item."""
        codes = np.asarray(codes)
        if codes.shape != (len(item_ids), len(self.codebook_sizes)) or not np.issubdtype(codes.dtype, np.integer):
            raise UserError(
                f"the codes are {codes.dtype}{list(codes.shape)}: {len(item_ids)} items need integers "
                f"[{len(item_ids)}, {len(self.codebook_sizes)}], one for each of the codebooks {self.codebook_sizes}"
            )
        wrong = np.argwhere((codes < 0) | (codes >= np.array(self.codebook_sizes)))
        if len(wrong):
            row, level = wrong[0]
            raise UserError(
                f"item_id {item_ids[row]!r} has the code {codes[row, level]} at level {level + 1}, whose codebook is "
                f"0..{self.codebook_sizes[level] - 1}: give it the ID that these codebooks make"
            )
        return codes.astype(np.int32)

    def _known(self, version: Version, item_ids: list[str], action: str) -> np.ndarray:
        rows = _rows(version, item_ids)
        for unknown in np.flatnonzero(rows < 0)[:1]:
            raise UserError(f"{action}: item_id {item_ids[unknown]!r} is not in the catalogue: add it first")
        return rows


def _rows(version: Version, item_ids: Sequence[str]) -> np.ndarray:
    """The row of each item, -1 = unknown."""
    rows = (version.row(item) for item in item_ids)
    return np.array([-1 if row is None else row for row in rows], np.int64)


def _room(count: int) -> int:
    """Room for an eighth more items, rounded up to an eighth of a power of two."""
    step = max(8, 2 ** (count.bit_length() - 4))
    return -(-(count + count // 8 + 1) // step) * step


def _shapes(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def _item_ids(items: pa.Table) -> list[str]:
    if "item_id" not in items.column_names:
        raise UserError(f"the items have no column item_id; they have {', '.join(items.column_names)}")
    return _checked_ids(items["item_id"].to_pylist())


def _checked_ids(item_ids: Sequence[str]) -> list[str]:
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


def _numbers(name: str, values: np.ndarray | None, count: int) -> np.ndarray:
    if values is None:
        return np.zeros(count)
    values = np.asarray(values, np.float64)
    if values.shape != (count,) or np.isnan(values).any():
        raise UserError(f"{name} of shape {values.shape} does not fit {count} items: give each one number, not NaN")
    return values


def _embeddings(values: np.ndarray | None, count: int, before: Version) -> np.ndarray | None:
    if values is None:
        return None
    values = np.asarray(values, np.float32)
    width = before.embeddings.shape[1] or values.shape[-1]
    if values.shape != (count, width) or not np.isfinite(values).all():
        raise UserError(
            f"embeddings of shape {values.shape} do not fit: give {count} items {width} finite numbers each"
        )
    return values


def _appended(before: np.ndarray, embeddings: np.ndarray | None, count: int) -> np.ndarray:
    width = before.shape[1] if embeddings is None else embeddings.shape[1]
    if before.shape[1] != width:
        before = np.full((len(before), width), np.nan, np.float32)
    added = np.full((count, width), np.nan, np.float32) if embeddings is None else embeddings
    return np.concatenate([before, added])


def _column(table: pa.Table, name: str, action: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise UserError(
            f"{action}: the catalogue has no column {name!r}; it has {', '.join(sorted(table.column_names))}"
        )
    return table[name]


def _given(items: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    if name not in items.column_names:
        return pa.chunked_array([pa.nulls(len(items), kind)], kind)
    return _cast(name, items[name], kind)


def _cast(name: str, column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    try:
        if pa.types.is_string(column.type) != pa.types.is_string(kind) and not pa.types.is_null(column.type):
            raise pa.ArrowInvalid("text is not converted")
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"column {name!r} holds {column.type}, but the catalogue's holds {kind} ({error})") from error


def _replaced(table: pa.Table, rows: np.ndarray, items: pa.Table, action: str) -> pa.Table:
    """The table with other values at some rows, in those columns that the items have."""
    index = np.arange(len(table))
    index[rows] = len(table) + np.arange(len(rows))
    for name in items.column_names:
        old = _column(table, name, action)
        new = pa.chunked_array([*old.chunks, *_cast(name, items[name], old.type).chunks], old.type)
        table = table.set_column(table.column_names.index(name), name, new.take(pa.array(index)))
    return table
