"""Core keywords of items and queries, and the embeddings that they enhance (OneSearch §3.1.2).

A keyword is a value of an attribute, such as a brand, or a part of one that shoppers type. Of every attribute the
keywords with the most page views are kept. Queries and items are searched for them by an Aho-Corasick automaton:

    keywords = mine(items, views, clicks, KeywordConfig(attributes=("brand", "category")))
    found = keywords.match_many(["red Acme running shoes"])       # [[rows of `acme`, `running shoes`]]
    vectors = enhance(vectors, keyword_vectors, found)            # Eq. 2

Keywords are whole words of the normalised text (`jaxrec.data.words`). Of overlapping ones the longest counts, of
equally long ones the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise

import ahocorasick
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxrec.config import UserError, check_least
from jaxrec.data.words import normalised, words

Matches = Sequence[Sequence[int]]
"""The keywords of each text, as their rows, in the order of their places in the text."""
ROWS = 1 << 14
"""Texts that are searched, and vectors that are enhanced, at once."""
_ASCII_SPACES = {code: " " for code in range(128) if not chr(code).isalnum() and chr(code) != "\n"}


@dataclass(frozen=True)
class KeywordConfig:
    """Which keywords are kept."""

    attributes: tuple[str, ...] = ("category", "brand")
    """Columns of the items whose values are keywords. A text that several of them have counts for the first."""
    ngrams: int = 3
    """Longest run of words, shared by a query and an attribute of an item that was clicked for it, that is a keyword
    too; 0: whole values alone."""
    most: int = 10_000
    """Keywords of an attribute that are kept, those with the most page views."""
    least_views: int = 5
    """Keywords with fewer page views are dropped."""

    def __post_init__(self):
        check_least(self, "keywords", ngrams=0, most=1, least_views=0)


@dataclass(frozen=True, eq=False)
class Keywords:
    """The kept keywords: by attribute, and of one attribute by falling page views."""

    texts: list[str]
    """[n] distinct: the words of each, with single spaces between them"""
    attributes: list[str]
    """[n]: the attribute of each"""
    views: np.ndarray
    """int64 [n]: the page views of the items that have it"""

    def match_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The keywords in each text, as rows, in the order of their places."""
        if not self.texts:
            return [[] for _ in texts]
        parts = (self._match(texts[start : start + ROWS]) for start in range(0, len(texts), ROWS))
        return list(chain.from_iterable(parts))

    def of_items(self, items: pa.Table) -> list[list[int]]:
        """The keywords of items, as rows: in their attributes, then in their text; each once.

        items: the attributes and `text`, str; columns that are missing have no keywords.
        """
        columns = [name for name in (*dict.fromkeys(self.attributes), "text") if name in items.column_names]
        if not columns:
            return [[] for _ in range(len(items))]
        found = zip(*(self._of_column(items[name]) for name in columns))
        return [list(dict.fromkeys(chain(*of_item))) for of_item in found]

    def _of_column(self, column: pa.ChunkedArray) -> list[list[int]]:
        """The keywords of each value; each distinct value is searched once."""
        encoded = column.combine_chunks().cast(pa.string()).fill_null("").dictionary_encode()
        matched = self.match_many(encoded.dictionary.to_pylist())
        return [matched[row] for row in encoded.indices.to_pylist()]

    def _match(self, texts: Sequence[str]) -> list[list[int]]:
        # One search of all texts, a line each: a call for every text would take longer than its search.
        lines = one_line_each(texts)
        matches = np.array(list(self._automaton.iter(lines)), np.int64).reshape(-1, 2)
        end, row = matches.T
        begin = end - self._lengths[row]
        breaks = np.flatnonzero(np.frombuffer(lines.encode("utf-32-le"), np.uint32) == ord("\n"))
        return without_overlaps(np.searchsorted(breaks, end), begin, end, row, len(texts))

    @cached_property
    def _automaton(self) -> ahocorasick.Automaton:
        return _automaton(self.texts)

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(text) for text in self.texts], np.int64)


def mine(
    items: pa.Table, views: np.ndarray, clicks: tuple[Sequence[str], np.ndarray], config: KeywordConfig
) -> Keywords:
    """The core keywords of a catalogue.

    Args:
      items: with the columns `config.attributes`, str.
      views: int [I], the page views of each item.
      clicks: texts of queries [n], and the item int [n] that was clicked for each; of pairs that are listed twice, one
        counts.

    Raises:
      UserError: an attribute is no column of the items, or no column of texts.
    """
    check_attributes(items, config)
    taken: dict[str, tuple[str, int]] = {}
    for name in config.attributes:
        column = pc.fill_null(items[name].combine_chunks().cast(pa.string()), "")
        encoded = column.dictionary_encode()
        values = [" ".join(words(normalised(value))) for value in encoded.dictionary.to_pylist()]
        rows = encoded.indices.to_numpy()
        value_views = np.bincount(rows, views, len(values)).astype(np.int64)
        candidates = {value for value in values if value}
        if config.ngrams:
            candidates |= _shared_ngrams(clicks[0], [values[row] for row in rows[clicks[1]]], config.ngrams)
        for keyword, count in _most_viewed(sorted(candidates), values, value_views, config):
            taken.setdefault(keyword, (name, count))
    attributes, counts = [name for name, _ in taken.values()], [count for _, count in taken.values()]
    return Keywords(list(taken), attributes, np.array(counts, np.int64))


def check_attributes(items: pa.Table, config: KeywordConfig) -> None:
    """UserError for an attribute that is no column of the items, or no column of texts."""
    for name in config.attributes:
        if name not in items.column_names:
            known = ", ".join(each for each in items.column_names if each != "item_id")
            raise UserError(
                f"keywords.attributes names {name!r}, but items.parquet has no such column: name some of {known}"
            )
        kind = items[name].type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise UserError(
                f"keywords.attributes names {name!r}, but that column of items.parquet is {kind}: name columns of texts"
            )


def enhance(vectors: np.ndarray, keyword_vectors: np.ndarray, found: Matches) -> np.ndarray:
    """The mean of each vector and the mean of its keywords' vectors (OneSearch Eq. 2), f32 [n, D].

        e^o = 1/2 (e + 1/m sum_i e_k^i)

    A vector without keywords stays as it is.

    Args:
      vectors: f32 [n, D]; keyword_vectors: f32 [keywords, D]; found: the rows in `keyword_vectors` of each vector.
    """
    if len(found) != len(vectors):
        raise UserError(f"{len(found)} lists of keywords do not fit {len(vectors)} vectors: give one list a vector")
    result = np.array(vectors, np.float32)
    counts = np.array([len(rows) for rows in found], np.int64)
    having = np.flatnonzero(counts)
    for some in (having[start : start + ROWS] for start in range(0, len(having), ROWS)):
        rows = np.fromiter(chain.from_iterable(found[each] for each in some), np.int64)
        begin = np.cumsum(counts[some]) - counts[some]
        total = np.add.reduceat(keyword_vectors[rows].astype(np.float32), begin, axis=0)
        result[some] = (result[some] + total / counts[some, None].astype(np.float32)) / 2
    return result


def one_line_each(texts: Sequence[str]) -> str:
    """The words of each text on a line of its own, every word between single spaces."""
    if all(map(str.isascii, texts)) and not any("\n" in text for text in texts):
        lines = "\n".join(texts).lower().replace("\n", " \n ").translate(_ASCII_SPACES)
    else:
        lines = " \n ".join(" ".join(words(normalised(text))) for text in texts)
    lines = f" {lines} "
    while "  " in lines:
        lines = lines.replace("  ", " ")
    return lines


def without_overlaps(
    text: np.ndarray, begin: np.ndarray, end: np.ndarray, row: np.ndarray, texts: int
) -> list[list[int]]:
    """The matches of each text that do not overlap, as rows in order of place: the longest first, then the first.

    Args:
      text, begin, end, row: int [n]: the text of each match, rising; its place, the end outside it; its keyword.
      texts: number of texts.
    """
    order = np.lexsort((-end, begin))
    text, begin, end, row = text[order], begin[order], end[order], row[order]
    reached = np.maximum.accumulate(end) if len(end) else end
    before = np.concatenate([[-1], reached[:-1]])[: len(end)]
    inside = end <= before
    # Where all others lie inside one that overlaps none, it is the longest. Other texts are rare, and have their turn.
    crossed = np.unique(text[(begin < before) & ~inside])
    kept = ~inside & ~np.isin(text, crossed)
    bounds, rows = np.searchsorted(text[kept], np.arange(texts + 1)).tolist(), row[kept].tolist()
    result = [rows[low:high] for low, high in pairwise(bounds)]
    low, high = np.searchsorted(text, crossed), np.searchsorted(text, crossed, side="right")
    for place, some in zip(crossed.tolist(), map(slice, low.tolist(), high.tolist())):
        result[place] = _longest(list(zip(begin[some].tolist(), end[some].tolist(), row[some].tolist())))
    return result


def _longest(matches: list[tuple[int, int, int]]) -> list[int]:
    """`without_overlaps` of one text's matches (begin, end, row)."""
    kept: list[tuple[int, int, int]] = []
    for begin, end, row in sorted(matches, key=lambda match: (match[0] - match[1], match[0])):
        if all(begin >= other_end or end <= other_begin for other_begin, other_end, _ in kept):
            kept.append((begin, end, row))
    return [row for _, _, row in sorted(kept)]


def _automaton(texts: Sequence[str]) -> ahocorasick.Automaton:
    """Finds the row of each text where it stands between spaces: whole words alone."""
    automaton = ahocorasick.Automaton()
    for row, text in enumerate(texts):
        automaton.add_word(f" {text} ", row)
    automaton.make_automaton()
    return automaton


def _shared_ngrams(queries: Sequence[str], values: Sequence[str], longest: int) -> set[str]:
    """The runs of at most `longest` words of a query that its clicked item's value has too, as whole words."""
    found = set()
    for query, value in set(zip(queries, values)):
        if not value:
            continue
        typed, inside = words(normalised(query)), f" {value} "
        for begin in range(len(typed)):
            for end in range(begin + 1, min(begin + longest, len(typed)) + 1):
                if f" {' '.join(typed[begin:end])} " not in inside:
                    break
                found.add(" ".join(typed[begin:end]))
    return found


def _most_viewed(
    candidates: Sequence[str], values: Sequence[str], views: np.ndarray, config: KeywordConfig
) -> list[tuple[str, int]]:
    """The kept keywords of an attribute with their page views: those of all values that hold a keyword."""
    if not candidates:
        return []
    automaton, total = _automaton(candidates), np.zeros(len(candidates), np.int64)
    for value, count in zip(values, views.tolist()):
        for row in {row for _, row in automaton.iter(f" {value} ")}:
            total[row] += count
    order = np.argsort(-total, kind="stable")[: config.most]
    return [(candidates[row], int(total[row])) for row in order if total[row] >= config.least_views]
