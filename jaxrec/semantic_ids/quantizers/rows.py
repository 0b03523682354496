"""Rows to be quantized: checked embeddings in memory, on one device or split over the devices of all hosts.

rows = place(x)                    # one device
rows = place(x_of_this_host, mesh) # every host gives its own rows; the hosts' rows follow each other
"""

from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrec.config import UserError

CHECKED_AT_ONCE = 65_536
LARGEST, LEAST = 1e13, 1e-12
"""Bounds on the largest absolute number of a catalogue's embeddings: above, sums of squares over many rows overflow in
float32; below, squares underflow to zero."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Checked rows on the devices.

    x: f32 [I', D], I' >= I rows, padded with zeros so that they split evenly; without a mesh as given, so that no copy
    is made where a sample is enough. where: bool [I'], True for a real row. valid: int64 [I], the positions of the real
    rows. mesh: the rows are split over its devices; None for one device.
    """

    x: np.ndarray | jax.Array
    where: jax.Array
    valid: np.ndarray
    mesh: Mesh | None = None

    def __len__(self) -> int:
        """The number of real rows on all hosts, I."""
        return len(self.valid)

    def local(self, values: jax.Array) -> np.ndarray:
        """The values [I', ...] of this host's own rows, as NumPy."""
        mine = np.concatenate([np.asarray(shard.data) for shard in _in_order(values)])
        return mine[np.concatenate([np.asarray(shard.data) for shard in _in_order(self.where)])]


def check_rows(x: np.ndarray | jax.Array, k: int) -> np.ndarray | jax.Array:
    """x [I, D] as float32 (half, double and integer numbers are converted), checked for k clusters.

    Raises:
      UserError: no matrix, no numbers, width 0, fewer than k rows, or a row with NaN, infinity or a number beyond
        `LARGEST`; also a double too large for float32, which becomes infinite.
    """
    x = to_matrix(x)
    check_enough(len(x), k)
    bad = unusable(x)
    if len(bad):
        what, mend = complaint(np.asarray(x[bad[0]]))
        raise UserError(f"row {bad[0]} of the embeddings holds {what} ({len(bad)} such rows): {mend}")
    return x


def unusable(x: np.ndarray | jax.Array) -> np.ndarray:
    """The rows of a matrix x [I, D] with NaN, infinity or numbers beyond `LARGEST`, in rising order, int64 [n]."""
    bad = [start + _unusable(x, start) for start in range(0, len(x), CHECKED_AT_ONCE)]
    return np.concatenate([np.zeros(0, np.int64), *bad])


def complaint(row: np.ndarray) -> tuple[str, str]:
    """The defect of an unusable row [D], and the mend."""
    if not np.isfinite(row).all():
        return "NaN or infinity", "mend them first"
    worst = row[np.abs(row).argmax()]
    return (
        f"{worst:.3g}, but squares overflow beyond {LARGEST:.0e}",
        "mend them, or divide all embeddings by one number",
    )


def check_scale(x: np.ndarray | jax.Array) -> None:
    """UserError where all numbers of a catalogue x [I, D] are so small that their squares underflow; all zeros pass."""
    largest = max((float(np.abs(np.asarray(x[s : s + CHECKED_AT_ONCE])).max())
                   for s in range(0, len(x), CHECKED_AT_ONCE)), default=0.0)  # fmt: skip
    if 0 < largest < LEAST:
        raise UserError(
            f"the largest number of the embeddings is {largest:.3g}, and squares vanish below {LEAST:.0e}: multiply "
            "all embeddings by one number"
        )


def to_matrix(x: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """x [I, D] as float32, with the errors of `check_rows` except for the number and the content of rows."""
    try:
        x = x if isinstance(x, jax.Array) else np.asarray(x)
    except ValueError as error:
        raise UserError(f"the embeddings are no matrix [items, width]: {_odd_row(x) or error}") from error
    if x.ndim != 2 or x.shape[1] == 0:
        raise UserError(
            f"embeddings must be a matrix [items, width], but have shape {x.shape}: stack vectors of one width"
        )
    if not (jax.dtypes.issubdtype(x.dtype, np.floating) or jax.dtypes.issubdtype(x.dtype, np.integer)):
        raise UserError(
            f"embeddings are of type {x.dtype}, which are no numbers: give float32 vectors of one width, a row an item"
        )
    if x.dtype != np.float32:
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
    return x


def check_enough(rows: int, k: int) -> None:
    """UserError when there are fewer rows than codes."""
    if rows < k:
        raise UserError(f"{rows} rows cannot fill a codebook of {k} codes: choose smaller codebooks, or give more rows")


def check_width(x: np.ndarray | jax.Array, width: int) -> None:
    """UserError when x [I, D] has another width than the codebooks were fitted to."""
    if x.shape[1] != width:
        raise UserError(
            f"embeddings are {x.shape[1]} wide, but the codebooks were fitted to a width of "
            f"{width}: encode with the embeddings they were made for"
        )


def place(x: np.ndarray | jax.Array, mesh: Mesh | None = None, at_least: int = 1) -> Rows:
    """Check rows x [I, D] and put them on the device; with a mesh, split over all of its devices.

    On several hosts each gives its own rows; UserError as in `check_rows`, for `at_least` rows in all.
    """
    x = check_rows(x, 0)
    if mesh is None:
        check_enough(len(x), at_least)
        return Rows(x, jax.numpy.ones(len(x), bool), np.arange(len(x)), None)
    counts = np.atleast_1d(multihost_utils.process_allgather(np.int64(len(x))))
    check_enough(int(counts.sum()), at_least)
    devices = mesh.size // len(counts)
    each = -(-int(counts.max()) // devices) * devices
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    padded = np.pad(np.asarray(x), ((0, each - len(x)), (0, 0)))
    valid = np.concatenate([host * each + np.arange(count) for host, count in enumerate(counts)])
    return Rows(
        jax.make_array_from_process_local_data(sharding, padded),
        jax.make_array_from_process_local_data(sharding, np.arange(each) < len(x)),
        valid,
        mesh,
    )


def _unusable(x: np.ndarray | jax.Array, start: int) -> np.ndarray:
    """The unusable rows among those from `start` on, counted from there."""
    some = np.asarray(x[start : start + CHECKED_AT_ONCE])
    # Two reductions instead of a test of each number: five times as fast. NaN propagates and fails the comparison.
    if not some.size or (some.max() <= LARGEST and some.min() >= -LARGEST):
        return np.zeros(0, int)
    return np.flatnonzero(~(np.abs(some) <= LARGEST).all(axis=1))


def _odd_row(x: list) -> str:
    """A message that names the first list of another length than the first; "" when all lengths agree."""
    widths = [len(row) if hasattr(row, "__len__") else 0 for row in x]
    odd = next((row for row, width in enumerate(widths) if width != widths[0]), None)
    return "" if odd is None else f"row {odd} is of another width ({widths[odd]}) than row 0 ({widths[0]})"


def _in_order(values: jax.Array) -> list:
    """This host's pieces of an array that is split over its first axis, in the order of the rows; each piece once."""
    pieces = {shard.index[0].start or 0: shard for shard in values.addressable_shards}
    return [pieces[start] for start in sorted(pieces)]
