"""The queries of a run as the model reads and writes them: numbers, tokens, and what a prefix and a past say of them.

The phase `targets` of a run holds the tokenizer and the list of queries, the phase `query_neighbours` which of them the
same users search for. Texts are compared after `jaxrec.data.words.normalised`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrec.data.completions import UNKNOWN, Completions
from jaxrec.data.item_neighbours import ItemNeighbours
from jaxrec.data.padding import padded
from jaxrec.data.queries import table_texts
from jaxrec.data.suggestion_features import NONE
from jaxrec.data.words import normalised, typed
from jaxrec.semantic_ids.related_queries import RelatedQueries
from jaxrec.text.tokenizer import TextTokenizer

NEIGHBOURS = "query_neighbours"
REMEMBERED, REMEMBERED_LENGTH = 1 << 16, 200
"""texts outside the log that are remembered, and the longest of them in characters"""


class Seen(NamedTuple):
    """What a log tells of a training example, and must not tell the model."""

    session: np.ndarray = np.zeros(0, np.int64)
    """numbers of the queries of its session"""
    ahead: np.ndarray = np.zeros(0, np.int64)
    """numbers of the queries that the user searches for from then on"""
    answer: str = ""
    """the query that was chosen for exactly what is typed; empty: none"""


UNSEEN = Seen()


@dataclass(frozen=True, eq=False)
class RelatedOfPrefixes:
    """The related queries of prefixes (OneSug §3.2), as numbers."""

    found: RelatedQueries
    numbers: np.ndarray
    """int64 [rows of `found.texts`]: their numbers as in `Completions`"""

    def of(self, prefix: str, known: "KnownTexts", seen: Seen) -> np.ndarray:
        """int64 [n]: the related queries of a prefix, best first, without what only its session told."""
        texts = known.completions.texts
        (rows,) = self.found.related([prefix], [seen.answer], [[texts[at] for at in seen.session]])
        return self.numbers[rows[rows >= 0]]

    def remember(self, prefixes: Sequence[str]) -> None:
        """Looks many prefixes up at once, so that those of their examples are remembered."""
        self.found.related(sorted({typed(prefix) for prefix in prefixes}))


@dataclass(frozen=True, eq=False)
class KnownTexts:
    """Q distinct queries of training, numbered as in `Completions`, and what becomes of other texts."""

    completions: Completions
    tokenizer: TextTokenizer
    length: int
    """tokens M of a query with its end"""
    of_row: np.ndarray
    """int64 [rows of queries.parquet]: their numbers, UNKNOWN for none"""
    neighbours: ItemNeighbours | None = None
    """which queries the same users search for; None: it is not read"""
    read: tuple[np.ndarray, ...] = field(init=False, repr=False)
    """int32 tokens of each query"""
    written: np.ndarray = field(init=False, repr=False)
    """int32 [Q, M]: the tokens of each with their end, NONE behind it; of a longer one nothing"""
    characters: np.ndarray = field(init=False, repr=False)
    """int64 [Q]"""
    others: dict[str, int] = field(init=False, repr=False)
    """numbers of other writings, UNKNOWN for other texts"""

    def __post_init__(self):
        rows = tuple(np.array(row, np.int32) for row in self.tokenizer.encode(list(self.completions.texts)))
        object.__setattr__(self, "read", rows)
        object.__setattr__(self, "written", np.stack([self._ended(row) for row in rows]))
        object.__setattr__(self, "characters", np.array([len(text) for text in self.completions.texts], np.int64))
        object.__setattr__(self, "others", {})

    def numbers(self, queries: np.ndarray) -> np.ndarray:
        """int64 [n] of texts (object [n]) or of rows of queries.parquet; UNKNOWN for those not in training."""
        if queries.dtype != object:
            return self.of_row[queries]
        return np.array([self.number(text) for text in queries], np.int64)

    def number(self, text: str) -> int:
        """Of a text in any writing."""
        found = self.completions.numbers.get(text)
        if found is None:
            found = self.others.get(text)
        if found is None:
            found = self.completions.numbers.get(normalised(text), UNKNOWN)
            if len(text) <= REMEMBERED_LENGTH:
                if len(self.others) >= REMEMBERED:
                    self.others.clear()
                self.others[text] = found
        return found

    def encoded(self, text: str) -> np.ndarray:
        """int32 [t]: the tokens of a normalised text."""
        number = self.completions.numbers.get(text)
        return np.array(self.tokenizer.encode([text])[0], np.int32) if number is None else self.read[number]

    def _ended(self, tokens: Sequence[int]) -> np.ndarray:
        ended = [*tokens, self.tokenizer.end] if len(tokens) < self.length else []
        return padded(ended, self.length, NONE)


@dataclass(frozen=True, eq=False)
class QueriesOfUser:
    """As `jaxrec.data.suggestion_features.QueryTable`: known queries, and behind them the user's own other ones."""

    known: KnownTexts
    more: tuple[str, ...] = ()
    """normalised texts that training does not know"""
    past: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """numbers of known queries that the user searched for"""
    ahead: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """of a training example: those that the user searches for from then on"""

    def tokens(self, numbers: np.ndarray) -> np.ndarray:
        """int32 [n, M] with their end, NONE behind it."""
        count = len(self.known.written)
        if not self.more:
            return self.known.written[numbers]
        found = self.known.written[np.minimum(numbers, count - 1)]
        for place in np.flatnonzero(numbers >= count):
            found[place] = self.known._ended(self.known.encoded(self.more[numbers[place] - count]))
        return found

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Characters, int64 [n]."""
        return (
            np.concatenate([self.known.characters, [len(text) for text in self.more]])[numbers]
            if self.more
            else (self.known.characters[numbers])
        )

    def near(self, numbers: np.ndarray) -> np.ndarray:
        """How near they are to what this user searched for, float32 [n]; 0 for not at all."""
        if self.known.neighbours is None:
            return np.zeros(len(numbers), np.float32)
        (found,) = self.known.neighbours.scores(numbers, [self.past], self.past, self.ahead)
        return found / max(len(self.past), 1) ** 0.5


def query_rows(tables: Path, completions: Completions) -> np.ndarray:
    """int64: the number of every row of queries.parquet, UNKNOWN for those not in training."""
    return completions.rows(table_texts(tables, "queries"))
