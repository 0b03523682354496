"""The look-up of related queries from fine to coarse, for many prefixes at once (OneSug §3.2.2).

    level M   queries with the ID of the prefix
    level d   queries that share its first d codes and no more
    level 0   all others

Queries lie in one order a level, grouped by their first d codes and by falling popularity inside a group, so that the
candidates of a level are one slice of it. NumPy: a request is small, and its number of candidates is its own.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ROWS_AT_ONCE = 64
"""Prefixes looked up together: the vectors of their candidates stay in cache."""
DIGITS = 5
"""Decimals of a cosine that count: what is equal up to rounding is ordered by popularity."""


class Screen(NamedTuple):
    """What is taken of the candidates."""

    count: int
    """Queries of a prefix, m."""
    candidates: int
    """Candidates of a level, the most popular ones."""
    min_cosine: float
    """Relevance: least cosine with the prefix."""
    max_cosine: float
    """Diversity: largest cosine with a query that was taken before."""


@dataclass(frozen=True, eq=False)
class QueryIndex:
    """Queries by their IDs, Q of them."""

    vectors: np.ndarray
    """unit f32 [Q, D]"""
    codes: np.ndarray
    """int32 [Q, M]"""
    order: tuple[np.ndarray, ...]
    """int32 [Q] a level from 0 to M: rows grouped by their first codes, the most popular of a group first."""
    groups: tuple[np.ndarray, ...]
    """int64 [G], sorted, a level from 1 to M: group of the level before * codes in this level + code."""
    starts: tuple[np.ndarray, ...]
    """int64 [G + 1] a level from 0 to M: where each group begins in `order`."""
    sizes: tuple[int, ...]
    """Codes in each level."""

    def search(
        self, codes: np.ndarray, vectors: np.ndarray, screen: Screen, without: np.ndarray | None = None
    ) -> np.ndarray:
        """The related queries of prefixes, best first, int32 [P, m], padded with -1.

        Finer levels come first, inside a level the larger cosine, of equal ones the more popular query. A query is
        taken if it is relevant and not too near to one taken before. No level is exempt.

        Args:
          codes: int32 [P, M], the IDs of the prefixes.
          vectors: f32 [P, D], their embeddings of any length; that of a zero vector is 0 to every query.
          screen: limits.
          without: int [P, A], queries that are no candidates, padded with -1.
        """
        without = np.full((len(codes), 0), -1) if without is None else without
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = vectors / np.where(length > 0, length, 1)
        parts = [np.zeros((0, screen.count), np.int32)]
        for start in range(0, len(codes), ROWS_AT_ONCE):
            some = slice(start, start + ROWS_AT_ONCE)
            parts.append(self._search(codes[some], unit[some], screen, without[some]))
        return np.concatenate(parts)

    def _search(self, codes: np.ndarray, unit: np.ndarray, screen: Screen, without: np.ndarray) -> np.ndarray:
        taken = np.full((len(codes), screen.count), -1, np.int32)
        filled = np.zeros(len(codes), np.int64)
        group_of = self.find(codes)
        for level in range(len(self.sizes), -1, -1):
            active = np.flatnonzero((filled < screen.count) & (group_of[:, level] >= 0))
            if not len(active):
                continue
            rows = self._candidates(level, group_of[active, level], screen.candidates)
            there = (rows >= 0) & (rows[:, :, None] != without[active, None, :]).all(-1)
            if level < len(self.sizes):  # those that share one code more were candidates of that level
                there &= self.codes[rows, level] != codes[active, level, None]
            _take(self.vectors, rows, there, unit[active], screen, taken, filled, active)
        return taken

    def find(self, codes: np.ndarray) -> np.ndarray:
        """The group of codes [P, M] in every level from 0 to M, int64 [P, M + 1]; -1 where no query shares so many."""
        found = np.zeros((len(codes), len(self.sizes) + 1), np.int64)
        for level, (groups, size) in enumerate(zip(self.groups, self.sizes, strict=True)):
            key = found[:, level] * size + codes[:, level]
            place = np.minimum(np.searchsorted(groups, key), len(groups) - 1)
            there = (found[:, level] >= 0) & (groups[place] == key)
            found[:, level + 1] = np.where(there, place, -1)
        return found

    def _candidates(self, level: int, group: np.ndarray, most: int) -> np.ndarray:
        """The most popular rows of groups [P] of a level, int32 [P, n], n <= most, padded with -1."""
        begin, end = self.starts[level][group], self.starts[level][group + 1]
        place = begin[:, None] + np.arange(min(most, int((end - begin).max())))
        inside = place < end[:, None]
        return np.where(inside, self.order[level][np.where(inside, place, 0)], -1)


def build_index(
    vectors: np.ndarray, codes: np.ndarray, sizes: tuple[int, ...], popularity: np.ndarray | None = None
) -> QueryIndex:
    """Indexes queries, at least one.

    Args:
      vectors: unit f32 [Q, D].
      codes: int32 [Q, M], below `sizes`.
      popularity: [Q]; equally popular queries are ordered by their rows.
    """
    falling = np.arange(len(codes)) if popularity is None else np.argsort(-np.asarray(popularity), kind="stable")
    group = np.zeros(len(codes), np.int64)
    order, groups, starts = [falling.astype(np.int32)], [], [np.array([0, len(codes)])]
    for level, size in enumerate(sizes):
        distinct, group = np.unique(group * size + codes[:, level], return_inverse=True)
        order.append(falling[np.argsort(group[falling], kind="stable")].astype(np.int32))
        groups.append(distinct)
        starts.append(np.concatenate([[0], np.cumsum(np.bincount(group, minlength=len(distinct)))]))
    return QueryIndex(vectors, codes, tuple(order), tuple(groups), tuple(starts), tuple(sizes))


def _take(
    vectors: np.ndarray,
    rows: np.ndarray,
    there: np.ndarray,
    unit: np.ndarray,
    screen: Screen,
    taken: np.ndarray,
    filled: np.ndarray,
    active: np.ndarray,
) -> None:
    """Greedily takes candidates int [A, n] of one level into `taken` [P, m], of which `filled` [P] are taken.

    there: bool [A, n], which candidates count. unit: f32 [A, D]. active: int [A], their places among the prefixes.
    """
    found = vectors[rows]
    cosine = np.round(np.matmul(found, unit[:, :, None])[..., 0], DIGITS)
    free = there & (cosine >= np.float32(screen.min_cosine))
    # Stable: of equally near ones the more popular stays first.
    by_cosine = np.argsort(np.where(free, -cosine, np.inf), axis=1, kind="stable")
    rows, free = (np.take_along_axis(each, by_cosine, axis=1) for each in (rows, free))
    found = np.take_along_axis(found, by_cosine[..., None], axis=1)
    before = taken[active]
    near = np.round(np.matmul(found, vectors[before].transpose(0, 2, 1)), DIGITS) > np.float32(screen.max_cosine)
    free &= ~(near & (before >= 0)[:, None, :]).any(-1)
    near = np.round(np.matmul(found, found.transpose(0, 2, 1)), DIGITS) > np.float32(screen.max_cosine)
    near |= np.eye(rows.shape[1], dtype=bool)
    while len(left := np.flatnonzero(free.any(1) & (filled[active] < screen.count))):
        first, place = free[left].argmax(1), active[left]
        taken[place, filled[place]] = rows[left, first]
        filled[place] += 1
        free[left] &= ~near[left, first]
