"""Typed pairs of texts, and the batches of them that align an encoder.

A term of the loss has pairs of its own: left and right ends as rows of one list of texts, and for some a value. The
contrastive terms differ in what they pair alone; `rank` holds queries and items with the level of a behavior,
`relevance` pairs with a score. A batch holds some pairs of every term, each end's text once, and what the losses need.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxrec.config import UserError
from jaxrec.text.align import honest_negatives

Name = Literal["q2q", "i2i", "q2i", "p2q", "rank", "relevance"]

# Both ends of these are of one kind, so that either may stand on the left.
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
    """Pairs whose cosine is not larger under the encoder as it was are left out (OneSearch §3.1.1); -1 keeps all."""


@dataclass(frozen=True)
class TermsConfig:
    """The terms of the alignment loss; those without pairs take no part."""

    i2i: TermConfig = field(default_factory=TermConfig)
    """Items that go together (OneMall §3.1.1-2, OneSearch L_i2i)."""
    q2q: TermConfig = field(default_factory=TermConfig)
    """Queries that go together (OneSearch L_q2q, OneSug Eq. 1)."""
    q2i: TermConfig = field(default_factory=TermConfig)
    """Queries and the items that were chosen after them (OneSearch L_q2i)."""
    p2q: TermConfig = field(default_factory=lambda: TermConfig(min_cosine=-1.0))
    """Prefixes and the queries they were completed to (OneSug Eq. 1)."""
    rank: TermConfig = field(default_factory=lambda: TermConfig(batch_size=16))
    """Queries and items at several levels of behavior (OneSearch L_rank)."""
    relevance: TermConfig = field(default_factory=TermConfig)
    """Queries and items with a relevance that was given from outside (OneSearch L_rel)."""


@dataclass(frozen=True)
class TextPairs:
    """Pairs of one term, as rows of a list of texts."""

    left: np.ndarray
    """int [n]: the trigger; the query, where the other is an item."""
    right: np.ndarray
    """int [n]: the target."""
    value: np.ndarray | None = None
    """[n]; for `rank` the level of the behavior, see `levels`; for `relevance` the score, on the cosine's scale."""


def levels(behaviors: Sequence[str], order: Sequence[str] = ("show", "click", "order")) -> np.ndarray:
    """The place of each behavior in a list from weak to strong, int64 [n].

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
    """Raises UserError for a term that doesn't exist, ends that are no rows of the texts, or values that can't be."""
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

    Of equal pairs with several values the largest counts: the strongest behavior. Returns the distinct texts in use,
    sorted, the pairs over them, and how many pairs each term was given.
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
    # The last of equal pairs is kept, which is the one with the largest value.
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
    """The pairs of queries whose items have two levels or more; the others have nothing to rank."""
    if not len(pairs.left):
        return pairs
    rows = int(pairs.left.max()) + 1
    lowest, highest = np.full(rows, np.inf), np.full(rows, -np.inf)
    np.minimum.at(lowest, pairs.left, pairs.value)
    np.maximum.at(highest, pairs.left, pairs.value)
    return select(pairs, (highest > lowest)[pairs.left])


def most_levels(pairs: TextPairs) -> int:
    """How many levels of behavior the query with most of them has."""
    distinct = np.unique(np.stack([pairs.left, pairs.value.astype(np.int64)]), axis=1)
    return int(np.bincount(distinct[0]).max(initial=0))


def split(
    pairs: TextPairs, name: str, queries: np.ndarray, share: float, seed: Sequence[int]
) -> tuple[TextPairs, TextPairs]:
    """The pairs for training and the held-out ones.

    Of SYMMETRIC terms a share of the pairs is held out, drawn by the seed; of the others all pairs of the `queries`
    (bool [T]: of which texts), in all terms the same: what one term is measured on, none of them is trained on.
    """
    if name in SYMMETRIC:
        held_out = np.random.default_rng(seed).random(len(pairs.left)) < share
    else:
        held_out = queries[pairs.left]
    return select(pairs, ~held_out), select(pairs, held_out)


def rank_lists(pairs: TextPairs, items: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each query with up to `items` of its items, the levels as even as can be.

    Items are drawn in rounds, in each round one of every level that has some left, the strongest first. Returns
    queries int [n], items int [n, items] (-1 where there are fewer) and their levels int [n, items].
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
    """0, 1, 2, ... from every True on."""
    begin = np.flatnonzero(new)
    return np.arange(len(new)) - np.repeat(begin, np.diff(np.append(begin, len(new))))


class TermBatches:
    """The pairs of one term, a batch for every number 0, 1, ...; whole passes, each in its own order."""

    def __init__(self, name: str, pairs: TextPairs, texts: int, batch_size: int, rank_items: int, seed: Sequence[int]):
        self.name, self.pairs, self.texts, self.rank_items, self.seed = name, pairs, texts, rank_items, list(seed)
        self.size = len(np.unique(pairs.left)) if name == "rank" else len(pairs.left)
        self.batch_size = min(batch_size, self.size)
        # A pass drops what doesn't fill a batch, another part each time.
        self.per_pass = self.size // self.batch_size
        self.pass_number, self.ends = -1, ()
        if name in CONTRASTIVE:
            self.known = np.unique(pairs.left * texts + pairs.right)
            left, right = (np.bincount(side, minlength=texts) for side in (pairs.left, pairs.right))
            counts = np.stack([left + right] * 2) / 2 if name in SYMMETRIC else np.stack([left, right])
            self.log_q = np.log(np.maximum(counts / self.size, 1e-12)).astype(np.float32)

    def __call__(self, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The texts' rows int [n] and the arrays for the loss, see `finetune.losses`."""
        number, place = divmod(number, self.per_pass)
        if number != self.pass_number:
            self.pass_number, self.ends = number, self._ends(np.random.default_rng([*self.seed, number]))
        left, right, value = (x[place * self.batch_size : (place + 1) * self.batch_size] for x in self.ends)
        if self.name == "rank":
            where = right >= 0
            # A place without an item gets the query's own text, which is masked.
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
    """An endless iterator of batches of all terms; its position is a number, so that it can go on anywhere.

    A batch is {"inputs": ..., "terms": {name: arrays}}; `inputs` is what `make_inputs(rows)` gives for the texts of all
    terms, one after the other.
    """

    def __init__(self, terms: Mapping[str, TermBatches], make_inputs: Any, origin: str, folder: Path):
        """origin: a digest of all that the training depends on; folder: of the training, for the message."""
        self.terms, self.make_inputs, self.position = terms, make_inputs, 0
        self.origin, self.folder = origin, folder

    def __next__(self) -> dict[str, Any]:
        # In the order of their names, which is the one that a compiled function sees.
        made = {name: self.terms[name](self.position) for name in sorted(self.terms)}
        self.position += 1
        rows = np.concatenate([rows for rows, _ in made.values()])
        return {"inputs": self.make_inputs(rows), "terms": {name: arrays for name, (_, arrays) in made.items()}}

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position, "origin": self.origin}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises UserError for the state of a training on something else."""
        if state.get("origin") != self.origin:
            raise UserError(
                f"the checkpoints in {self.folder} are of an alignment with other texts, pairs, seed, encoder or "
                "configuration: delete that folder, or give another one"
            )
        self.position = state["position"]
