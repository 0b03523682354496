"""What a frozen model says of training examples: computed before the first step, and kept in files beside the stage.

Examples that every epoch repeats need it once: the reference's scores of packed targets, the answers of a beam search.
A file holds the rows of `AT_ONCE` examples, so that a stopped stage goes on with the next file.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxrec.console import track
from jaxrec.data.examples import Record, Records
from jaxrec.data.pipeline import Features, batches
from jaxrec.training.prefetch import BatchIterator

AT_ONCE = 4096
"""examples in a file"""


class FixedExamples(Protocol):
    """Examples whose arrays depend on their record and place alone, not on the epoch."""

    records: Records
    cuts: np.ndarray
    """int64 [n, 2]: record, and place in it"""
    lengths: Sequence[int]
    """[n]: which of `config.features.buckets` each is padded to"""
    config: Any
    """with `batch_size` and `features`"""

    def __call__(self, record: Record, place: int, rng: np.random.Generator) -> Features:
        """The arrays of one example."""
        ...


Compute = Callable[[Features], Mapping[str, Any]]
"""a batch -> {name: array [B, ...]}"""


def seen_again(examples: FixedExamples, steps: int) -> bool:
    """Whether a training of so many steps sees examples more than once, so that it pays to store what is said of them.

    Of several processes each has its own part of every batch, and would have to compute all rows: never.
    """
    return steps * examples.config.batch_size > len(examples.cuts) and jax.process_count() == 1


def stored_rows(folder: Path, examples: FixedExamples, compute: Compute, name: str) -> dict[str, np.ndarray]:
    """What `compute` says of all examples, {name: [n, ...]}, a row for each of `cuts`; made where missing.

    name: on the progress bar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buckets = np.searchsorted(examples.config.features.buckets, examples.lengths)
    order = np.argsort(buckets, kind="stable")  # few shapes in a file
    found: dict[str, np.ndarray] = {}
    for start in track(range(0, len(order), AT_ONCE), name):
        rows, path = order[start : start + AT_ONCE], folder / f"{start // AT_ONCE:06d}.npz"
        if not path.is_file():
            save_rows(path, computed_rows(compute, examples, rows, buckets[rows]))
        with np.load(path) as kept:
            for key, values in kept.items():
                found.setdefault(key, np.zeros((len(order), *values.shape[1:]), values.dtype))[rows] = values
    return found


def computed_rows(
    compute: Compute, examples: FixedExamples, rows: np.ndarray, buckets: np.ndarray
) -> dict[str, np.ndarray]:
    """Of some of the examples, in order: {name: [len(rows), ...]}; buckets int [len(rows)]: of their lengths."""
    size = examples.config.batch_size
    options = {"batch_size": size, "buckets": buckets, "epochs": 1, "shuffle": False, "drop_remainder": False}
    found: dict[str, np.ndarray] = {}
    for batch in batches(examples.records, examples.cuts[rows], examples, **options):
        for key, values in jax.device_get(compute(batch)).items():
            kept = found.setdefault(key, np.zeros((len(rows), *values.shape[1:]), values.dtype))
            kept[batch["cut"][batch["where"]]] = values[batch["where"]]
    return found


def save_rows(path: Path, found: Mapping[str, np.ndarray]) -> None:
    """Writes a file that is there whole or not at all."""
    partial_path = path.with_suffix(f".partial{jax.process_index()}")
    with partial_path.open("wb") as file:
        np.savez(file, **found)
        file.flush()
        os.fsync(file.fileno())
    partial_path.rename(path)


class WithStored:
    """Batches with the rows of `stored_rows` behind their own arrays; a `BatchIterator`."""

    def __init__(self, iterator: BatchIterator, rows: Mapping[str, np.ndarray]):
        self.iterator, self.rows = iterator, rows

    def __next__(self) -> Features:
        batch = next(self.iterator)
        return batch | {name: values[batch["cut"]] for name, values in self.rows.items()}

    def get_state(self) -> dict[str, Any]:
        """As `jaxrec.training.prefetch.BatchIterator`."""
        return self.iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """As `jaxrec.training.prefetch.BatchIterator`."""
        self.iterator.set_state(state)
