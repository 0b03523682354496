"""A catalogue that changes while it is served.

    live = LiveCatalogue(items, codes, sizes, popularity=counts, model=recommender)
    version = live.current                       # one request: one version, from its start to its end
    live.update(pa.table({"item_id": ["7"], "in_stock": [False]}))
    live.add(new_items, new_codes); live.remove(["9"]); live.restore(["9"]); live.rollback(1)
    live.relist(lambda space: changed(space, add=["rain boots"]))     # where answers are texts

A version is immutable. A change builds new arrays of the same shapes and then assigns one reference: requests never
wait, and each reads a single version. Arrays have room for more items; when they are full they grow, and programs are
compiled for the new shapes before the version becomes current.

An item keeps its row, the number that identifies it in histories, masks and the model's tables. A removed item keeps
its row, so it still counts in histories, but is no leaf of the trie, so it can't be recommended.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from jaxrec.catalogue.background import in_background
from jaxrec.catalogue.changes import (
    appended_embeddings,
    checked_embeddings,
    checked_ids,
    checked_numbers,
    column_of,
    given_column,
    item_ids_of,
    replaced,
)
from jaxrec.catalogue.version import Version
from jaxrec.config import UserError
from jaxrec.decoding.filters import ItemOrder
from jaxrec.decoding.trie import Trie, build_trie


class ServedModel(Protocol):
    """A model with its own arrays for every version of the catalogue."""

    def serve_version(self, version: Version, before: Version | None) -> Any:
        """A pytree of arrays for this version, in the shapes of `before.served` unless the capacity grew."""
        ...

    def warm_up(self, served: Any) -> None:
        """Compile the programs for these shapes."""
        ...


class LiveCatalogue:
    """The versions of a catalogue, one of them current. Thread-safe for reads and changes."""

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
        texts: Any = None,
    ):
        """Makes version 1.

        Args:
          items: a column `item_id`, and any others for filters.
          codes: int [I, M], row = item.
          popularity: [I]; None: items are in the given order.
          capacity: number of items to have room for; default: an eighth more than given.
          keep: number of kept versions, the current one included, to which a rollback is possible: the last current
            ones.
          model: computes its own arrays for every version.
          texts: the target space of a model that answers with texts.

        Raises:
          UserError: no items, an item_id that is not text or not unique, codes or popularity that don't fit.
        """
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        self.keep, self.model = keep, model
        self._building = threading.Lock()
        self._kept: dict[int, Version] = {}
        self._last = 0
        item_ids = item_ids_of(items)
        codes = self._codes(codes, item_ids)
        popularity = checked_numbers("popularity", popularity, len(item_ids))
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
            texts=texts,
        )
        self.current = self._finish(first, None)

    @property
    def versions(self) -> list[dict[str, Any]]:
        """The kept versions: number, parent, action, items, current."""
        current = self.current
        return [
            {
                "version": version.number,
                "parent": version.parent,
                "action": version.action,
                "items": int(version.active.sum()),
                "current": version is current,
            }
            for _, version in sorted(self._kept.items())
        ]

    def add(
        self,
        items: pa.Table,
        codes: np.ndarray,
        *,
        popularity: np.ndarray | None = None,
        embeddings: np.ndarray | None = None,
    ) -> Version:
        """Adds items: they are leaves of the trie from now on. Columns that `items` lacks are null.

        Args:
          items: `item_id` and columns of the catalogue.
          codes: int [n, M]; popularity: [n], None for 0; embeddings: float [n, D], for models that read them.

        Raises:
          UserError: an item that exists already (see `restore` and `update`) or is listed twice, a column that the
            catalogue doesn't have or of another type, codes outside the codebooks. Nothing is changed then.
        """
        with self._building:
            before = self.current
            item_ids = item_ids_of(items)
            for item in item_ids:
                row = before.row(item)
                if row is not None:
                    state = "there already; update" if before.active[row] else "removed; restore"
                    raise UserError(f"add: item_id {item!r} is {state} it instead")
            return self._publish(self._grown(before, items, codes, popularity, embeddings), before, "add")

    def remove(self, item_ids: Sequence[str]) -> Version:
        """Removes items from recommendation. They keep their rows, and so their place in histories.

        Raises:
          UserError: an item that is unknown, was removed before or is listed twice, or no item would remain.
        """
        return self._activate(item_ids, False, "remove")

    def restore(self, item_ids: Sequence[str]) -> Version:
        """Restores removed items unchanged.

        Raises:
          UserError: an item that is unknown, was not removed or is listed twice.
        """
        return self._activate(item_ids, True, "restore")

    def update(self, items: pa.Table) -> Version:
        """Sets new values of some columns for some items, such as prices or stock.

        Raises:
          UserError: an unknown item or one listed twice, an unknown column or one of another type.
        """
        with self._building:
            before = self.current
            rows = self._known(before, item_ids_of(items), "update")
            table = replaced(before.items, rows, items.drop_columns("item_id"), "update")
            changed = set(items.column_names)
            kept = {name: column for name, column in dict(before.columns).items() if name not in changed}
            return self._publish(replace(before, items=table, columns=kept), before, "update")

    def reorder(self, item_ids: Sequence[str], popularity: np.ndarray) -> Version:
        """Sets the popularity of some items: the order under one ID and of popular items; a model's scores stay.

        Raises:
          UserError: an unknown item or one listed twice, popularity that isn't one number an item.
        """
        with self._building:
            before = self.current
            rows = self._known(before, checked_ids(item_ids), "reorder")
            changed = before.popularity.copy()
            changed[rows] = checked_numbers("popularity", popularity, len(rows))
            return self._publish(replace(before, popularity=changed), before, "reorder")

    def swap(
        self,
        items: pa.Table,
        codes: np.ndarray,
        *,
        popularity: np.ndarray | None = None,
        embeddings: np.ndarray | None = None,
    ) -> Version:
        """Replaces the whole catalogue: items that are not given are removed, the others added or changed.

        Arguments and errors as for `add`, but items may exist already: their missing columns and their embeddings stay
        unchanged; embeddings are read for new items only.
        """
        with self._building:
            before = self.current
            item_ids = item_ids_of(items)
            codes = self._codes(codes, item_ids)
            popularity = checked_numbers("popularity", popularity, len(item_ids))
            embeddings = checked_embeddings(embeddings, len(item_ids), before.embeddings.shape[1])
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
            table = replaced(version.items, known, items.take(pa.array(old)), "swap")
            changed = {"codes": all_codes, "popularity": all_popularity, "active": active}
            return self._publish(replace(version, items=table, columns={}, **changed), before, "swap")

    def relist(self, change: Callable[[Any], Any]) -> Version:
        """Changes the list of texts that are answers: `change` makes the next target space of the current one.

        Raises:
          UserError: answers are items, or as `change`.
        """
        with self._building:
            before = self.current
            if before.texts is None:
                raise UserError("relist: the answers of this run are items, not texts: change its items instead")
            return self._publish(replace(before, texts=change(before.texts)), before, "relist")

    def rollback(self, number: int) -> Version:
        """Makes a kept version, earlier or later, the current one again, at once.

        Raises:
          UserError: there is no such version, or it is no longer kept.
        """
        with self._building:
            if number not in self._kept:
                raise UserError(
                    f"there is no version {number} of the catalogue to go back to: "
                    f"kept are {', '.join(map(str, sorted(self._kept)))}"
                )
            self.current = self._kept[number]
            self._keep(self.current)
            return self.current

    def _activate(self, item_ids: Sequence[str], active: bool, action: str) -> Version:
        with self._building:
            before, item_ids = self.current, checked_ids(item_ids)
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
        """`before` with new rows appended."""
        item_ids = item_ids_of(items)
        codes = self._codes(codes, item_ids)
        popularity = checked_numbers("popularity", popularity, len(item_ids))
        embeddings = checked_embeddings(embeddings, len(item_ids), before.embeddings.shape[1])
        for name in items.column_names:
            column_of(before.items, name, "add")
        columns = [
            pa.chunked_array([*old.chunks, *given_column(items, name, old.type).chunks], old.type)
            for name, old in zip(before.items.column_names, before.items.columns, strict=True)
        ]
        count = len(before) + len(item_ids)
        # Shared with earlier versions, unless a version that was rolled back has put other items there.
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
            embeddings=appended_embeddings(before.embeddings, embeddings, len(item_ids)),
            capacity=before.capacity if count <= before.capacity else _room(count),
            rows=rows,
            columns={},
        )

    def _publish(self, version: Version, before: Version, action: str) -> Version:
        """Finishes a version at low priority, then makes it the current one."""
        changed = replace(version, parent=before.number, action=action)
        version = in_background(lambda: self._finish(changed, before))
        self.current = version
        return version

    def _finish(self, version: Version, before: Version | None) -> Version:
        """The version with its derived arrays, kept but not yet current."""
        same = before is not None and all(
            getattr(version, name) is getattr(before, name) for name in ("codes", "active", "popularity")
        )
        if not same:
            rows = np.flatnonzero(version.active)
            trie = self._trie(version, rows, before)
            popular = rows[np.argsort(-version.popularity[rows], kind="stable")]
            version = replace(version, trie=trie, order=ItemOrder(trie), popular=popular)
        own = {"columns": dict(version.columns), "masks": OrderedDict(), "lock": threading.Lock()}
        # In one chunk: taking a few rows of a column of many chunks copies all of it.
        version = replace(version, number=self._last + 1, items=version.items.combine_chunks(), **own)
        if self.model is not None:
            version = replace(version, served=self.model.serve_version(version, before))
        if before is not None:
            self._carry_masks(before, version, same)
            if self.model is not None and _shapes(version.served) != _shapes(before.served):
                self.model.warm_up(version.served)
        self._last = version.number
        self._keep(version)
        return version

    def _keep(self, version: Version) -> None:
        """Marks the version as the last current one, and drops the one that was current the longest ago."""
        others = [each for each in self._kept.values() if each is not version]
        self._kept = {each.number: each for each in [*others, version][-self.keep :]}

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
        """Builds the masks that requests used last before the version becomes current."""
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
