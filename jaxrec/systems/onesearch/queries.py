"""The queries of a run as the model reads them: tokens, semantic IDs, and the numbers of distinct texts.

The phase `prompts` of a run holds the tokenizer and the items' neighbours. Texts are compared after
`jaxrec.data.words.normalised`: two writings of a query are one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxrec.data.queries import table_texts
from jaxrec.data.search_statistics import REMEMBERED, REMEMBERED_LENGTH, UNKNOWN
from jaxrec.data.words import distinct, normalised
from jaxrec.evaluation.subsets import query_counts
from jaxrec.run import Run
from jaxrec.semantic_ids.embeddings import encodes_texts
from jaxrec.semantic_ids.queries import QueryIds, load_query_ids
from jaxrec.text.tokenizer import TextTokenizer, TokenizerConfig, load_tokenizer, save_tokenizer, train_tokenizer

PROMPTS, NEIGHBOURS = "prompts", "neighbours.safetensors"
NO_CODE = -1


@dataclass(frozen=True, eq=False)
class KnownQueries:
    """Q distinct queries of the log, numbered in the order of their texts, and what becomes of other texts."""

    texts: tuple[str, ...]
    """[Q], normalised"""
    of_row: np.ndarray
    """int64 [rows of queries.parquet]: their numbers"""
    levels: int
    """levels M of the items' IDs; those that only tell items apart have no code of a query"""
    tokenizer: TextTokenizer
    ids: QueryIds | None
    """IDs of texts; None where the items' embeddings were not made of texts"""
    code_table: np.ndarray = field(init=False, repr=False)
    """int32 [Q, M], NO_CODE where there is none"""
    tokens: tuple[np.ndarray, ...] = field(init=False, repr=False)
    """of each query"""
    number: dict[str, int] = field(init=False, repr=False)
    """of each query, by its text"""
    others: dict = field(init=False, repr=False)
    """what is remembered of short texts outside the log, and of other writings"""

    def __post_init__(self):
        rows = self.tokenizer.encode(list(self.texts))
        object.__setattr__(self, "tokens", tuple(np.array(row, np.int32) for row in rows))
        object.__setattr__(self, "number", {text: number for number, text in enumerate(self.texts)})
        object.__setattr__(self, "others", {})
        object.__setattr__(self, "code_table", self._codes(self.texts))

    def numbers(self, queries: Sequence[str] | np.ndarray) -> np.ndarray:
        """int64 [n] of texts, UNKNOWN for those not in the log, or of rows of queries.parquet."""
        if isinstance(queries, np.ndarray) and queries.dtype != object:
            return self.of_row[queries]
        return np.array([self._number(text) for text in queries], np.int64)

    def codes_of(self, text: str) -> np.ndarray:
        """int32 [M] of any text."""
        number = self._number(text)
        if number >= 0:
            return self.code_table[number]
        text = normalised(text)
        return self._remembered("codes", text, lambda: self._codes([text])[0])

    def tokens_of(self, text: str) -> np.ndarray:
        """int32 [t] of any text."""
        number = self._number(text)
        return self.tokens[number] if number >= 0 else np.array(self.tokenizer.encode([normalised(text)])[0], np.int32)

    def _codes(self, texts: Sequence[str]) -> np.ndarray:
        found = np.full((len(texts), self.levels), NO_CODE, np.int32)
        if self.ids is not None and len(texts):
            there = self.ids.has_id(texts)
            found[there, : self.ids.levels] = self.ids.codes(texts)[there]
        return found

    def _number(self, text: str) -> int:
        found = self.number.get(text)
        if found is None:
            found = self._remembered("number", text, lambda: self.number.get(normalised(text), UNKNOWN))
        return found

    def _remembered(self, kind: str, text: str, make: Callable[[], Any]) -> Any:
        if len(text) > REMEMBERED_LENGTH:
            return make()
        if (kind, text) not in self.others:
            if len(self.others) >= REMEMBERED:
                self.others.clear()
            self.others[kind, text] = make()
        return self.others[kind, text]


def trained_queries(tables: Path) -> list[str]:
    """The distinct normalised queries that were searched for in training, in alphabetical order.

    queries.parquet holds those of validation and test as well, which nothing is trained on.
    """
    return sorted(text for text, count in query_counts(tables).items() if count)


def make_tokenizer(run: Run, folder: Path, config: TokenizerConfig, texts: Sequence[str]) -> None:
    """Trains the tokenizer of training queries and `texts` and writes it into the folder of the phase `prompts`."""
    save_tokenizer(train_tokenizer([*trained_queries(run.tables), *texts], config), folder)


def load_queries(run: Run, levels: int) -> KnownQueries:
    """The queries of a run whose items' IDs have so many levels.

    Raises:
      UserError: a file is missing or damaged.
    """
    ids = load_query_ids(run.semantic_ids) if encodes_texts(run.semantic_ids) else None
    return KnownQueries(*distinct(table_texts(run.tables, "queries")), levels, load_tokenizer(run.place(PROMPTS)), ids)
