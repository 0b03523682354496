"""Which items the same users take: what a user's past says of items that the user never took (NumPy; no model here).

    neighbours = item_neighbours(users, items, num_items, NeighbourConfig())
    neighbours.scores(candidates, [past])    # float32 [1, n]: sums of cosines of user sets (Deshpande & Karypis 2004)

The counts of a log hold the future of a training example's own user, which no server knows. `ahead` names the items
that the user takes only later: the user is left out of their counts, alone and with others, as if the log ended before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy import sparse

from jaxrec.config import UserError, check_least

AT_ONCE = 256
"""items whose neighbours are found together"""


@dataclass(frozen=True)
class NeighbourConfig:
    """The neighbours of every item."""

    kept: int = 400
    """nearest items that are kept of each; 0: no neighbours"""

    def __post_init__(self):
        check_least(self, "neighbours", kept=0)


@dataclass(frozen=True, eq=False)
class ItemNeighbours:
    """The K nearest items of each of I items."""

    other: np.ndarray
    """int32 [I, K], -1 for none"""
    count: np.ndarray
    """int32 [I, K]: users who took both"""
    users: np.ndarray
    """int32 [I]: users who took an item"""
    edge: np.ndarray
    """float64 [I]: how near the first item is that is not kept, 0 where all are"""
    edge_item: np.ndarray
    """int32 [I]: that item"""

    def scores(
        self,
        items: np.ndarray,
        pasts: Sequence[np.ndarray],
        taken: Sequence[int] = (),
        ahead: Sequence[int] = (),
    ) -> np.ndarray:
        """The sum over distinct items of each past of the cosine with each of some distinct items: float32 [pasts, n].

        Items that came after the log have none. An item is not compared with itself.

        Args:
          pasts: may hold items that the user only looked at.
          ahead: items that the user of a training example takes later, of which those that it had `taken` before count.
        """
        known = items < len(self.users)
        rows = np.where(known, items, 0)
        inside, neighbours = [self._flags(past) for past in pasts], self.other[rows]
        # The neighbours that are of a past are few of the many: pairs (place, other) of these alone.
        place, column = np.nonzero(np.logical_or.reduce(inside)[neighbours])
        other, count = neighbours[place, column], self.count[rows][place, column]
        near, alone = count / self._roots[other], self.users[rows]
        if len(ahead):
            had, later = self._flags(taken), self._flags(ahead)
            later &= ~had
            some = np.flatnonzero(later[rows][place] | later[other])
            near[some] = self._before(rows[place[some]], other[some], count[some], had | later, later)
            alone = alone - later[rows]
        sums = [np.bincount(place, near * flags[other], len(rows)) for flags in inside]
        return np.where(known, sums / np.sqrt(np.maximum(alone, 1)), 0.0).astype(np.float32)

    def _before(
        self, item: np.ndarray, other: np.ndarray, count: np.ndarray, ends: np.ndarray, later: np.ndarray
    ) -> np.ndarray:
        """How near pairs are, of which one is `later`, by a log that ends before: float64 [n].

        ends, later: bool [I + 1], what the user has taken when the log ends, and what of it came later.
        """
        # Of the users who took both the user is one if the log ends so, but was none before one of the two came.
        less = ends[item] & ends[other]
        near = (count - less) / np.sqrt(np.maximum(self.users[other] - later[other], 1))
        # One user may be what brought an item among the nearest: without that user another one is there.
        kept = ~less | (near > self.edge[item]) | ((near == self.edge[item]) & (other < self.edge_item[item]))
        return near * kept

    @cached_property
    def _roots(self) -> np.ndarray:
        """float64 [I]: square roots of the numbers of users."""
        return np.sqrt(np.maximum(self.users, 1))

    def _flags(self, items: Sequence[int]) -> np.ndarray:
        """bool [I + 1]; the last one is that of no neighbour."""
        flags, items = np.zeros(len(self.users) + 1, bool), np.asarray(items, np.int64)
        flags[items[items < len(self.users)]] = True
        return flags

    def save(self, path: Path) -> None:
        """Writes a safetensors file."""
        save_file({each.name: np.ascontiguousarray(getattr(self, each.name)) for each in fields(self)}, path)


def load_neighbours(path: Path) -> ItemNeighbours:
    """What `ItemNeighbours.save` wrote.

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        return ItemNeighbours(**load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise UserError(
            f"{path} holds no neighbours of items ({error}); delete {path.parent} to have it made again"
        ) from error


def item_neighbours(users: np.ndarray, items: np.ndarray, num_items: int, config: NeighbourConfig) -> ItemNeighbours:
    """From events of training: users int [n] from 0 and items int [n]."""
    kept = min(config.kept, num_items - 1)
    shape = (int(users.max(initial=-1)) + 1, num_items)
    taken = sparse.csr_array((np.ones(len(users), np.float32), (users, items)), shape=shape)
    taken.sum_duplicates()
    taken.data[:] = 1
    of_item = np.asarray(taken.sum(0)).ravel().astype(np.int32)
    root, by_item = np.sqrt(np.maximum(of_item, 1)), taken.T.tocsr()
    other, count = np.full((num_items, kept), -1, np.int32), np.zeros((num_items, kept), np.int32)
    edge, edge_item = np.zeros(num_items), np.zeros(num_items, np.int32)
    for start in range(0, num_items, AT_ONCE):
        rows = np.arange(start, min(start + AT_ONCE, num_items))
        both = (by_item[rows] @ taken).toarray()
        both[np.arange(len(rows)), rows] = 0
        # Of equally near ones the first: the same neighbours whatever the order of the events.
        order = np.argsort(-both / root, axis=1, kind="stable")
        near, left = order[:, :kept], order[:, kept : kept + 1]
        if left.shape[1]:
            edge[rows] = (np.take_along_axis(both, left, axis=1) / root[left])[:, 0]
            edge_item[rows] = left[:, 0]
        count[rows] = np.take_along_axis(both, near, axis=1)
        other[rows] = np.where(count[rows] > 0, near, -1)
    return ItemNeighbours(other, count, of_item, edge, edge_item)
