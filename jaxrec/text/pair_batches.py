"""Typed pairs of texts, and their batches, on which an encoder is aligned.

Each term of the loss has its own pairs: left and right ends as rows of one list of texts, and for some terms a value.
The contrastive terms differ only in the kinds of texts they pair; `rank` has queries and items with the level of a
behavior, `relevance` pairs with a score. A batch has pairs of every term, the texts of both ends, and the arrays of the
losses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxrec.config import UserError
from jaxrec.text.align import honest_negatives

Name = Literal["q2q", "i2i", "q2i", "p2q", "rank", "relevance"]

# Both ends of these terms are of one kind, so either may be on the left.
SYMMETRIC = ("q2q", "i2i")
CONTRASTIVE = (*SYMMETRIC, "q2i", "p2q")
TERMS = (*CONTRASTIVE, "rank", "relevance")


@dataclass(frozen=True)
class TermConfig:
    """One term of the alignment loss (OneSearch Eq. 1)."""

    weight: float = 1.0
    """Weight of the term (the lambda of OneSearch Eq. 1); 0 leaves it out."""
    batch_size: int = 32
    """Pairs in a step; for `rank`, queries."""
    min_cosine: float = 0.6
    """Pairs whose cosine under the initial encoder is not larger are dropped (OneSearch §3.1.1); -1 keeps all."""


@dataclass(frozen=True)
class TermsConfig:
    """The terms of the alignment loss; terms without pairs are left out."""

    i2i: TermConfig = field(default_factory=TermConfig)
    """Pairs of related items (OneMall §3.1.1-2, OneSearch L_i2i)."""
    q2q: TermConfig = field(default_factory=TermConfig)
    """Pairs of related queries (OneSearch L_q2q, OneSug Eq. 1)."""
    q2i: TermConfig = field(default_factory=TermConfig)
    """Queries and the items chosen after them (OneSearch L_q2i)."""
    p2q: TermConfig = field(default_factory=lambda: TermConfig(min_cosine=-1.0))
    """Prefixes and their completions (OneSug Eq. 1)."""
    rank: TermConfig = field(default_factory=lambda: TermConfig(batch_size=16))
    """Queries and items with several levels of behavior (OneSearch L_rank)."""
    relevance: TermConfig = field(default_factory=TermConfig)
    """Queries and items with a given relevance score (OneSearch L_rel)."""


@dataclass(frozen=True)
class TextPairs:
    """Pairs of one term, as rows of a list of texts."""

    left: np.ndarray
    """int [n]: the trigger; in pairs with items, the query."""
    right: np.ndarray
    """int [n]: the target."""
    value: np.ndarray | None = None
    """[n]; for `rank` the level of the behavior, see `levels`; for `relevance` the score, on the cosine's scale."""


def levels(behaviors: Sequence[str], order: Sequence[str] = ("show", "click", "order")) -> np.ndarray:
    """The position of each behavior in a list from weak to strong, int64 [n].

    Raises:
      UserError: a behavior is not in the list.
    """
    place = {name: level for level, name in enumerate(order)}
    unknown = [(row, name) for row, name in enumerate(behaviors) if name not in place]
    if unknown:
        row, name = unknown[0]
        raise UserError(
            f"behavior {name!r} in row {row} is none of {', '.join(order)}: add it to the order, or drop it"
        )
    return np.array([place[name] for name in behaviors], np.int64)


def check_pairs(pairs: Mapping[str, TextPairs], texts: int) -> None:
    """UserError for a term that doesn't exist, ends that are no rows of the texts, or invalid values."""
    for name, of_term in pairs.items():
        if name not in TERMS:
            raise UserError(f"there is no alignment term {name!r}: use one of {', '.join(TERMS)}")
        for side in ("left", "right"):
            ends = getattr(of_term, side)
            if len(bad := np.flatnonzero((ends < 0) | (ends >= texts))):
                raise UserError(
                    f"{name} pairs, row {bad[0]}: {side} is text {ends[bad[0]]}, but there are {texts} texts: "
                    f"give rows from 0 to {texts - 1}"
                )
        if len(of_term.left) != len(of_term.right):
            raise UserError(
                f"{name} pairs: {len(of_term.left)} left and {len(of_term.right)} right ends: give one of each a pair"
            )
        if name in ("rank", "relevance"):
            _check_values(name, of_term)


def _check_values(name: str, pairs: TextPairs) -> None:
    wanted = {"rank": "the level of its behavior, 0 or higher", "relevance": "a relevance between -1 and 1"}[name]
    if pairs.value is None or len(pairs.value) != len(pairs.left):
        raise UserError(f"{name} pairs have no value for each pair: give every pair {wanted}")
    value = np.asarray(pairs.value, np.float64)
    right = (value >= 0) & (value % 1 == 0) if name == "rank" else np.abs(value) <= 1
    if len(bad := np.flatnonzero(~right)):
        raise UserError(f"{name} pairs, row {bad[0]}: the value is {value[bad[0]]}: give {wanted}")


def merge_equal_texts(
    texts: Sequence[str], pairs: Mapping[str, TextPairs]
) -> tuple[list[str], dict[str, TextPairs], dict[str, int]]:
    """Makes equal texts one row, and equal pairs one pair; drops pairs of a text with itself.

    Of equal pairs the largest value counts: the strongest behavior. Returns the distinct texts in use, sorted, the
    pairs over them, and the number of pairs given for each term.
    """
    used = np.zeros(len(texts), bool)
    for of_term in pairs.values():
        used[of_term.left] = used[of_term.right] = True
    distinct = sorted({texts[row] for row in np.flatnonzero(used)})
    place = {text: row for row, text in enumerate(distinct)}
    row_of = np.array([place[text] if is_used else -1 for text, is_used in zip(texts, used)], np.int64)
    merged = {name: _merge(name, row_of[p.left], row_of[p.right], p.value) for name, p in pairs.items()}
    return distinct, merged, {name: len(p.left) for name, p in pairs.items()}


def _merge(name: str, left: np.ndarray, right: np.ndarray, value: np.ndarray | None) -> TextPairs:
    if name in SYMMETRIC:
        left, right = np.minimum(left, right), np.maximum(left, right)
    value = np.zeros(len(left)) if value is None or name in CONTRASTIVE else np.asarray(value, np.float64)
    # The last of equal pairs is kept: it has the largest value.
    order = np.lexsort((value, right, left))
    left, right, value = left[order], right[order], value[order]
    last = np.append((left[1:] != left[:-1]) | (right[1:] != right[:-1]), True)[: len(left)]
    keep = last & (left != right)
    return TextPairs(left[keep], right[keep], value[keep])


def select(pairs: TextPairs, keep: np.ndarray) -> TextPairs:
    """Some of the pairs; keep bool [n], or int of any length."""
    return TextPairs(pairs.left[keep], pairs.right[keep], None if pairs.value is None else pairs.value[keep])


def similar(pairs: TextPairs, vectors: np.ndarray, min_cosine: float) -> TextPairs:
    """The pairs whose cosine is larger than `min_cosine`; vectors: unit f32 [T, D]."""
    if min_cosine <= -1:
        return pairs
    return select(pairs, np.einsum("nd,nd->n", vectors[pairs.left], vectors[pairs.right]) > min_cosine)


def comparable(pairs: TextPairs) -> TextPairs:
    """The pairs of queries whose items have at least two levels; the others have no preference."""
    if not len(pairs.left):
        return pairs
    rows = int(pairs.left.max()) + 1
    lowest, highest = np.full(rows, np.inf), np.full(rows, -np.inf)
    np.minimum.at(lowest, pairs.left, pairs.value)
    np.maximum.at(highest, pairs.left, pairs.value)
    return select(pairs, (highest > lowest)[pairs.left])


def most_levels(pairs: TextPairs) -> int:
    """The largest number of levels of behavior of a query."""
    distinct = np.unique(np.stack([pairs.left, pairs.value.astype(np.int64)]), axis=1)
    return int(np.bincount(distinct[0]).max(initial=0))


def split(
    pairs: TextPairs, name: str, queries: np.ndarray, share: float, seed: Sequence[int]
) -> tuple[TextPairs, TextPairs]:
    """The pairs for training and the held-out ones.

    SYMMETRIC terms hold out a share of the pairs, drawn by the seed. The other terms hold out all pairs of the same
    `queries` (bool [T], a mask of texts), so that no term is trained on the held-out pairs of another.
    """
    if name in SYMMETRIC:
        held_out = np.random.default_rng(seed).random(len(pairs.left)) < share
    else:
        held_out = queries[pairs.left]
    return select(pairs, ~held_out), select(pairs, held_out)


def rank_lists(pairs: TextPairs, items: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each query with up to `items` of its items, balanced over the levels.

    Items are drawn in rounds: in each round one of every level with items left, the strongest first. Returns queries
    int [n], items int [n, items] (padded with -1) and their levels int [n, items].
    """
    shuffled = select(pairs, rng.permutation(len(pairs.left)))
    of_level = select(shuffled, np.lexsort((shuffled.value, shuffled.left)))
    new = np.append(True, (of_level.left[1:] != of_level.left[:-1]) | (of_level.value[1:] != of_level.value[:-1]))
    turn = _place_in_run(new[: len(of_level.left)])
    order = np.lexsort((-of_level.value, turn, of_level.left))
    drawn = select(of_level, order)
    place = _place_in_run(np.append(True, drawn.left[1:] != drawn.left[:-1])[: len(drawn.left)])
    queries, row = np.unique(drawn.left, return_inverse=True)
    table, level = (np.full((len(queries), items), -1, np.int64) for _ in range(2))
    inside = place < items
    table[row[inside], place[inside]] = drawn.right[inside]
    level[row[inside], place[inside]] = drawn.value[inside]
    return queries, table, level


def _place_in_run(new: np.ndarray) -> np.ndarray:
    """Counts 0, 1, 2, ... from every True on."""
    begin = np.flatnonzero(new)
    return np.arange(len(new)) - np.repeat(begin, np.diff(np.append(begin, len(new))))


class TermBatches:
    """The batches of one term, numbered 0, 1, ...; whole epochs, each in its own order."""

    def __init__(self, name: str, pairs: TextPairs, texts: int, batch_size: int, rank_items: int, seed: Sequence[int]):
        self.name, self.pairs, self.texts, self.rank_items, self.seed = name, pairs, texts, rank_items, list(seed)
        self.size = len(np.unique(pairs.left)) if name == "rank" else len(pairs.left)
        self.batch_size = min(batch_size, self.size)
        # An epoch drops the pairs that don't fill a batch; they differ from epoch to epoch.
        self.per_pass = self.size // self.batch_size
        self.pass_number, self.ends = -1, ()
        if name in CONTRASTIVE:
            self.known = np.unique(pairs.left * texts + pairs.right)
            left, right = (np.bincount(side, minlength=texts) for side in (pairs.left, pairs.right))
            counts = np.stack([left + right] * 2) / 2 if name in SYMMETRIC else np.stack([left, right])
            self.log_q = np.log(np.maximum(counts / self.size, 1e-12)).astype(np.float32)

    def __call__(self, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The rows of the texts, int [n], and the arrays of the loss; see `finetune.losses`."""
        number, place = divmod(number, self.per_pass)
        if number != self.pass_number:
            self.pass_number, self.ends = number, self._ends(np.random.default_rng([*self.seed, number]))
        left, right, value = (x[place * self.batch_size : (place + 1) * self.batch_size] for x in self.ends)
        if self.name == "rank":
            where = right >= 0
            # The padding gets the query's own text, and is masked.
            filled = np.where(where, right, left[:, None])
            return np.concatenate([left, filled.ravel()]), {"levels": value.astype(np.int32), "where": where}
        rows = np.concatenate([left, right])
        if self.name == "relevance":
            return rows, {"relevance": value.astype(np.float32)}
        return rows, {
            "where": honest_negatives(left, right, self._known(left, right)),
            "log_q": np.stack([self.log_q[0][left], self.log_q[1][right]]),
        }

    def _ends(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.name == "rank":
            ends = rank_lists(self.pairs, self.rank_items, rng)
            order = rng.permutation(self.size)
            return tuple(x[order] for x in ends)
        order = rng.permutation(self.size)
        left, right, value = self.pairs.left[order], self.pairs.right[order], self.pairs.value[order]
        if self.name in SYMMETRIC:
            turned = rng.random(self.size) < 0.5
            left, right = np.where(turned, right, left), np.where(turned, left, right)
        return left, right, value

    def _known(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        low, high = left[:, None], right[None, :]
        if self.name in SYMMETRIC:
            low, high = np.minimum(low, high), np.maximum(low, high)
        keys = low * self.texts + high
        return self.known[np.searchsorted(self.known, keys).clip(max=len(self.known) - 1)] == keys


class PairBatches:
    """An endless iterator of batches of all terms; its state is the number of the next batch.

    A batch is {"inputs": ..., "terms": {name: arrays}}; `inputs` is `make_inputs(rows)` of the concatenated texts of
    all terms.
    """

    def __init__(self, terms: Mapping[str, TermBatches], make_inputs: Any, origin: str, folder: Path):
        """origin: a digest of all inputs of the training; folder: that of the training, for error messages."""
        self.terms, self.make_inputs, self.position = terms, make_inputs, 0
        self.origin, self.folder = origin, folder

    def __next__(self) -> dict[str, Any]:
        # Sorted by name, as in a compiled function.
        made = {name: self.terms[name](self.position) for name in sorted(self.terms)}
        self.position += 1
        rows = np.concatenate([rows for rows, _ in made.values()])
        return {"inputs": self.make_inputs(rows), "terms": {name: arrays for name, (_, arrays) in made.items()}}

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position, "origin": self.origin}

    def set_state(self, state: dict[str, Any]) -> None:
        """UserError for the state of a training with other inputs."""
        if state.get("origin") != self.origin:
            raise UserError(
                f"the checkpoints in {self.folder} are of an alignment with other texts, pairs, seed, encoder or "
                "configuration: delete that folder, or give another one"
            )
        self.position = state["position"]
