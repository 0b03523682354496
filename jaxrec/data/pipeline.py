"""The input pipeline: cuts of histories, and batches of them.

A **cut** is (record, session): the history is all events before the session, the targets are in the session. Features
are computed when a cut is read, so storage grows with events and not with windows. Batches hold cuts of one
length bucket each, in an order that depends on (seed, epoch) alone. They come from a grain dataset whose element is a
whole batch: grain's iterator keeps the position (`get_state`, `set_state`), and takes no time per example.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from jaxrec.config import UserError
from jaxrec.console import console
from jaxrec.data.examples import Record, Records
from jaxrec.data.tables import SPLITS

Features = dict[str, np.ndarray]
CutToFeatures = Callable[[Record, int, np.random.Generator], Features]
MakeBatch = Callable[[int, np.ndarray], Features]
"""(epoch, rows) -> a batch"""


def cut_index(
    records: Records, targets: Sequence[str], *, min_history: int = 1, max_per_record: int | None = None
) -> np.ndarray:
    """The cuts of a split: int32 [n, 2] of (record, session), sorted.

    For train: every session that holds a target behavior and has at least `min_history` events before it. For valid and
    test: the first such session of that split, one a record (all later events are of that split too).

    Args:
      targets: names of the behaviors that make a session a target.
      max_per_record: keep only the last so many of a record.

    Raises:
      UserError: a target is no behavior of these records.
    """
    if unknown := [name for name in targets if name not in records.behaviors]:
        raise UserError(f"target behavior {unknown[0]!r} is unknown; the data has {', '.join(records.behaviors)}")
    wanted = np.uint64(sum(1 << records.behaviors.index(name) for name in set(targets)))
    sessions, split = records.sessions, SPLITS.index(records.split)
    keep = (sessions["behaviors"] & wanted != 0) & (sessions["start"] >= min_history) & (sessions["split"] == split)
    cuts = np.stack([sessions["record"][keep], sessions["session"][keep]], axis=1).astype(np.int32)
    if split > 0:
        return cuts[np.unique(cuts[:, 0], return_index=True)[1]]
    if max_per_record is not None:
        from_last = _run_ends(cuts[:, 0]) - np.arange(len(cuts))
        cuts = cuts[from_last <= max_per_record]
    return cuts


def batches(
    records: Sequence[Record],
    cuts: np.ndarray,
    cut_to_features: CutToFeatures,
    *,
    batch_size: int,
    seed: int = 0,
    buckets: np.ndarray | None = None,
    epochs: int | None = None,
    shuffle: bool = True,
    drop_remainder: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Features]:
    """An iterator over batches, with `get_state()` and `set_state(state)` to resume with the same bits.

    Args:
      cuts: int [n, 2] of (record, session).
      cut_to_features: (record, session, rng) -> named arrays, of one shape inside a bucket. The rng depends on the
        seed, the epoch and the cut alone.
      batch_size: of all processes together; each gets an equal slice of every batch.
      buckets: int [n], the length bucket of each cut; None for one bucket.
      epochs: passes over the cuts; None for no end.
      shuffle: the order of cuts and batches; without it buckets follow one another and cuts keep their order.
      drop_remainder: drop the last, smaller batch of each bucket (training), or fill it up (evaluation).

    Yields:
      The stacked features [B / processes, ...], with `cut` int32 [B] (row in `cuts`) and `where` bool [B] (False where
      a batch was filled up).

    Raises:
      UserError: there are fewer cuts than a batch needs, or the batch doesn't split over the processes.
    """
    cuts = np.asarray(cuts)

    def example(epoch: int, row: int) -> Features:
        record, session = cuts[row]
        return cut_to_features(records[record], int(session), np.random.default_rng([seed, epoch, row]))

    def make(epoch: int, rows: np.ndarray) -> Features:
        return _stack([example(epoch, row) for row in rows])

    groups = np.zeros(len(cuts), np.int32) if buckets is None else np.asarray(buckets)
    plan = _Plan(groups, batch_size, seed, shuffle, drop_remainder)
    return _iterate(make, plan, epochs, process_index, process_count)


def array_batches(
    take: Callable[[np.ndarray], Features],
    buckets: np.ndarray,
    *,
    batch_size: int,
    seed: int = 0,
    epochs: int | None = None,
    shuffle: bool = True,
    drop_remainder: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Features]:
    """Like `batches`, for batches that can be taken out of arrays at once, without Python code per example.

    Args:
      take: rows int64 [B / processes], all of one bucket -> named arrays with that many rows.
      buckets: int [n], the length bucket of each row.
    """
    plan = _Plan(np.asarray(buckets), batch_size, seed, shuffle, drop_remainder)
    return _iterate(lambda _, rows: take(rows), plan, epochs, process_index, process_count)


def merge_small(buckets: np.ndarray, least: int) -> np.ndarray:
    """Buckets int [n], rising in length; buckets of fewer rows than `least` are merged into longer buckets.

    Rows of a short bucket fit into a longer one: a small log has more padding, and no row is left out.
    """
    counts = np.bincount(buckets)
    joined, into, rows = np.zeros(len(counts), np.int64), len(counts) - 1, 0
    for bucket in reversed(range(len(counts))):
        joined[bucket] = into
        rows += counts[bucket]
        # The shortest ones stay together with those above them if they are too few by themselves.
        if rows >= least and counts[:bucket].sum() >= least:
            into, rows = bucket - 1, 0
    return joined[buckets]


def _iterate(
    make: MakeBatch, plan: "_Plan", epochs: int | None, process_index: int, process_count: int
) -> Iterator[Features]:
    if plan.batch_size % process_count:
        raise UserError(
            f"a batch of {plan.batch_size} doesn't split over {process_count} processes; make it a multiple"
        )
    if not len(plan):
        count = len(plan.groups)
        if not count:
            raise UserError(
                "no session can be trained on: a training example is a session that holds a predicted behavior and has "
                "an earlier event of the same user; users of one session have none, so use a longer log"
            )
        raise UserError(f"{count} cuts give no batch of {plan.batch_size}; make batch_size smaller or use more data")
    source = _Batches(make, plan, epochs, process_index, process_count)
    # No threads inside grain: the training loop makes batches ahead of time itself.
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.source(source).to_iter_dataset(reading))


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """The cuts of every batch of every epoch."""

    groups: np.ndarray
    batch_size: int
    seed: int
    shuffle: bool
    drop_remainder: bool

    def __post_init__(self) -> None:
        sizes = np.bincount(self.groups)
        if self.drop_remainder and len(self) and any(lost := (sizes > 0) & (sizes < self.batch_size)):
            count = f"{sizes[lost].sum()} of {len(self.groups)} cuts"
            console.print(f"{count} are in length buckets smaller than a batch: never used", markup=False)

    def __len__(self) -> int:
        """Batches in an epoch."""
        sizes = np.bincount(self.groups, minlength=1)
        return int((sizes // self.batch_size if self.drop_remainder else -(-sizes // self.batch_size)).sum())

    def epoch(self, epoch: int) -> np.ndarray:
        """The cuts of every batch of an epoch: int64 [batches, batch_size], -1 where a batch is filled up."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.groups)) if self.shuffle else np.arange(len(self.groups))
        order = order[np.argsort(self.groups[order], kind="stable")]
        rows = []
        for group in np.split(order, np.cumsum(np.bincount(self.groups))[:-1]):
            whole = len(group) // self.batch_size * self.batch_size
            if self.drop_remainder:
                group = group[:whole]
            elif whole < len(group):
                group = np.concatenate([group, np.full(whole + self.batch_size - len(group), -1)])
            rows.append(group.reshape(-1, self.batch_size))
        rows = np.concatenate(rows)
        return rows[rng.permutation(len(rows))] if self.shuffle else rows


class _Batches:
    """A grain data source whose element is a batch."""

    def __init__(self, make: MakeBatch, plan: _Plan, epochs: int | None, process_index: int, process_count: int):
        self.make, self.plan, self.epochs = make, plan, epochs
        local = plan.batch_size // process_count
        self.slice = slice(process_index * local, (process_index + 1) * local)
        self.epoch = functools.lru_cache(maxsize=2)(plan.epoch)

    def __len__(self) -> int:
        return sys.maxsize if self.epochs is None else len(self.plan) * self.epochs

    def __getitem__(self, index: int) -> Features:
        epoch, number = divmod(int(index), len(self.plan))
        whole = self.epoch(epoch)[number]
        rows = whole[self.slice]
        # A filled-up place repeats the first cut of the batch: real shapes and values, masked by `where`.
        filled = np.where(rows < 0, whole[0], rows)
        return {**self.make(epoch, filled), "cut": filled.astype(np.int32), "where": rows >= 0}


def _stack(examples: list[Features]) -> Features:
    batch = {}
    for name in examples[0]:
        try:
            batch[name] = np.stack([example[name] for example in examples])
        except ValueError as error:
            shapes = sorted({np.shape(example[name]) for example in examples})
            raise ValueError(f"feature {name!r} has the shapes {shapes} inside one length bucket") from error
    return batch


def _run_ends(sorted_values: np.ndarray) -> np.ndarray:
    """For each place of a sorted array, where the run of its value ends."""
    return np.searchsorted(sorted_values, sorted_values, side="right")
