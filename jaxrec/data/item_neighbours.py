"""Which items the same users take: what a user's past says of items that the user never took (NumPy; no model here).

    neighbours = item_neighbours(users, items, num_items, NeighbourConfig())
    neighbours.scores(candidates, past)      # float32 [n]: sums of cosines of the user sets (Deshpande & Karypis 2004)

The counts of a log hold the future of a training example's own user, which no server knows. `ahead` names the items
that the user takes only later: the user is left out of their counts, alone and with others, as if the log ended before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
        self, items: np.ndarray, past: np.ndarray, taken: Sequence[int] = (), ahead: Sequence[int] = ()
    ) -> np.ndarray:
        """The sum over distinct items of the past of the cosine with each of some distinct items: float32 [n].

        Items that came after the log have none. An item is not compared with itself.

        Args:
          past: may hold items that the user only looked at.
          ahead: items that the user of a training example takes later, of which those that it had `taken` before count.
        """
        known = items < len(self.users)
        rows = np.where(known, items, 0)
        had, later = self._flags(taken), self._flags(ahead)
        later &= ~had
        other, ends = self.other[rows], had | later  # what the user has taken when the log ends
        # Of the users who took both the user is one if the log ends so, but was none if one of the two came later.
        less = ends[rows][:, None] & ends[other] & (later[rows][:, None] | later[other])
        both = self.count[rows] - less
        alone, of_other = (np.maximum(self.users[at] - later[at], 1) for at in (rows, other))
        near = both / np.sqrt(of_other)
        # One user may be what brought an item among the nearest: without that user another one is there.
        edge, edge_item = self.edge[rows][:, None], self.edge_item[rows][:, None]
        kept = ~less | (near > edge) | ((near == edge) & (other < edge_item))
        weight = self._flags(past)[other] * kept * near
        return np.where(known, weight.sum(1) / np.sqrt(alone), 0.0).astype(np.float32)

    def _flags(self, items: Sequence[int]) -> np.ndarray:
        """bool [I + 1]; the last one is that of no neighbour."""
        flags, items = np.zeros(len(self.users) + 1, bool), np.asarray(items, np.int64)
        flags[items[items < len(self.users)]] = True
        return flags

    def save(self, path: Path) -> None:
        """Writes a safetensors file."""
        save_file({name: np.ascontiguousarray(array) for name, array in vars(self).items()}, path)


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
