"""The target space of items: the tokens of a target are the codes of a semantic ID."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrec.config import UserError
from jaxrec.decoding.beam import BeamResult, Rescore, beam_search, expand_items
from jaxrec.decoding.filters import ItemFilter
from jaxrec.decoding.step import Extend
from jaxrec.decoding.trie import Trie, build_trie
from jaxrec.decoding.typed import TypedText
from jaxrec.semantic_ids.table.space import SemanticIds
from jaxrec.targets.space import NONE, Constrained, Found

MEANINGS = {
    "items": "line of items.jsonl from 0, best first; -1 = none",
    "scores": "log-probability of the item's semantic ID, or what a rank head made of it; -inf = none",
    "valid": "whether there is an item",
    "nan": "the model gave NaN for this request, which has no valid item then: weights or inputs are damaged",
}


@dataclass(frozen=True, eq=False)
class SemanticIdSpace(SemanticIds):
    """The items of a catalogue by their semantic IDs; an answer is the index of an item."""

    kind = "items"

    @classmethod
    def of(cls, ids: SemanticIds) -> "SemanticIdSpace":
        """The space of a table of IDs."""
        return cls(ids.codes, ids.codebook_sizes, ids.popularity)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def item_codes(self) -> tuple[np.ndarray, tuple[int, ...]]:
        """Codes int32 [I, M] and codebook sizes."""
        return self.codes, self.codebook_sizes

    def build_trie(self) -> Trie:
        """The trie of all IDs; the items of one ID stand in falling popularity."""
        return build_trie(self.codes, self.codebook_sizes, order=self.popularity)

    def search(
        self,
        extend: Extend,
        trie: Trie,
        *,
        batch: int,
        width: int | tuple[int, ...],
        k: int,
        allowed: jax.Array | ItemFilter | None = None,
        rescore: Rescore | None = None,
        candidates: tuple[int, ...] = (),
        constrained: Constrained = "listed",
        typed: TypedText | None = None,
    ) -> BeamResult:
        """`jaxrec.decoding.beam_search`; never fewer candidates than beams. An ID stands for one item at least."""
        if constrained == "mixed" or typed is not None:
            raise UserError("an item is a listed answer and no text: leave out answers of any kind and what was typed")
        pools = None
        if rescore is not None and candidates:
            widths = (width,) * trie.levels if isinstance(width, int) else width
            pools = tuple(map(max, candidates, widths))
        options = {"allowed": allowed, "rescore": rescore, "candidates": pools}
        listed = constrained == "listed"
        return beam_search(extend, None, trie, batch=batch, beam_width=width, constrained=listed, **options)

    def expand(self, trie: Trie, result: BeamResult, *, k: int, allowed: jax.Array | ItemFilter | None = None) -> Found:
        """The items of the IDs, in beam order; those of one ID have its score."""
        return Found(*expand_items(trie, result, k=k, allowed=allowed), result.nan)

    def read(self, found: Found, k: int, typed: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray]:
        """The items and scores as they are."""
        return np.asarray(found.answers)[:, :k], np.asarray(found.scores)[:, :k]

    def show(self, answers: Iterable[int], titles: Sequence[str]) -> list[str]:
        """The items' titles."""
        return show_items(answers, titles)

    def truths(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Item indices are their own numbers."""
        return padded_truths([list(dict.fromkeys(map(int, row))) for row in rows])

    def tokens(self, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The codes of items, all of them real."""
        codes = self.codes[answers].astype(np.int32)
        return codes, np.ones_like(codes, bool)

    def held(self, history: dict[str, np.ndarray], wanted: np.ndarray) -> np.ndarray:
        """The history's items of the wanted behaviors."""
        return held_items(history, wanted)

    def outputs(self, found: Found) -> dict[str, jax.Array]:
        """Items, scores, which are valid, and whether the model gave NaN."""
        return {"items": found.answers, "scores": found.scores, "valid": found.answers >= 0, "nan": found.nan}

    @property
    def meanings(self) -> dict[str, str]:
        """A sentence for each of `outputs`."""
        return MEANINGS

    def describe(self, item_ids: Sequence[str]) -> dict[str, Any]:
        """Items, levels, codebook sizes; the fingerprint changes with the items, their order or their IDs."""
        if len(item_ids) != len(self):
            raise UserError(f"there are {len(item_ids)} item ids for {len(self)} items with semantic IDs; give all")
        digest = hashlib.sha256(json.dumps(list(item_ids)).encode())
        digest.update(np.ascontiguousarray(self.codes, np.int32).tobytes())
        return {
            "fingerprint": digest.hexdigest()[:16],
            "items": len(item_ids),
            "levels": self.levels,
            "codebook_sizes": list(self.codebook_sizes),
        }

    def save(self, folder: Path) -> None:
        """Writes nothing: items are shown by their ids and titles."""


def show_items(items: Iterable[int], titles: Sequence[str]) -> list[str]:
    """The titles of items."""
    return [titles[item] for item in items]


def held_items(history: dict[str, np.ndarray], wanted: np.ndarray) -> np.ndarray:
    """The history's items of the behaviors `wanted` bool [behaviors], in order, each as often as it came."""
    return history["item"][wanted[history["behavior"]]]


def padded_truths(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of numbers as int32 [U, L], padded with -1, and where bool [U, L]; L is 1 at least."""
    lengths = np.array([len(row) for row in rows], np.int64)
    where = np.arange(lengths.max(initial=1)) < lengths[:, None]
    numbers = np.full(where.shape, NONE, np.int32)
    numbers[where] = [number for row in rows for number in row]
    return numbers, where
