"""An item-level sequence model that recommends: histories in, the items of the highest scores out."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
from jax.sharding import Mesh

from jaxrec.data.prepare import tells_answer_time
from jaxrec.decoding.top import top
from jaxrec.evaluation.cases import History
from jaxrec.models.sequential import ItemFacts, SequentialModel
from jaxrec.run import Run
from jaxrec.semantic_ids.files.vectors import EMBEDDINGS, read_embeddings
from jaxrec.systems.recommender import repeated_item
from jaxrec.systems.sequential.config import SequentialConfig
from jaxrec.training.sharding import init_sharded, shapes_of

SIZES = 1, 8, 32, 128
"""Histories are ranked in batches of the last size; fewer of them are padded to one of the others."""


@dataclass(frozen=True, eq=False)
class SequentialAssembly:
    """The model, fitted to the items of a run."""

    model: SequentialModel
    lengths: tuple[int, ...]
    """what histories are padded to, rising"""
    facts: ItemFacts
    """what is known of all items before training"""
    examples: Any
    """folder of the example records"""
    wanted: np.ndarray
    """bool [behaviors]: the target behaviors, the only ones that are read"""

    @property
    def target_behaviors(self) -> list[int]:
        """Indices of the target behaviors."""
        return np.flatnonzero(self.wanted).tolist()

    def init(self, seed: int, mesh: Mesh | None = None) -> dict:
        """Fresh variables {"params"}: made on the devices where they stay, if there is a mesh."""
        facts = shapes_of(self.facts)

        def make():
            empty = jnp.zeros((1, self.lengths[0] + 1), jnp.int32)
            given = facts, empty, empty, jnp.zeros(1, jnp.int32)
            return self.model.lazy_init(jax.random.key(seed), *given, method="next")

        return init_sharded(make, mesh)


@dataclass(frozen=True)
class Histories:
    """What many users did, flat, in the target behaviors alone: from here a batch is one look-up."""

    item: np.ndarray
    """int32 [events]"""
    time: np.ndarray
    """int64 [events], seconds"""
    start: np.ndarray
    """int64 [R]: the first event of each history"""
    end: np.ndarray
    """int64 [R]: behind the last one"""
    now: np.ndarray
    """int64 [R]: when the next item is asked for"""

    @classmethod
    def of(cls, histories: Iterable[History], wanted: np.ndarray) -> "Histories":
        """Keeps the events of the behaviors that `wanted` bool [behaviors] marks."""
        items, times, now = [np.zeros(1, np.int32)], [np.zeros(1, np.int64)], []
        for history in histories:
            keep = wanted[history["behavior"]]
            items.append(history["item"][keep])
            times.append(history["timestamp"][keep])
            last = history["timestamp"][-1] if len(history["timestamp"]) else 0
            now.append(int(history.get("now", last)))
        # The first place holds no event: an empty history points there.
        end = np.cumsum([len(each) for each in items])
        return cls(np.concatenate(items), np.concatenate(times), end[:-1], end[1:], np.array(now, np.int64))

    def __len__(self) -> int:
        return len(self.start)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R]."""
        return self.end - self.start

    def take(self, rows: np.ndarray, size: int, latest: int, first: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The latest events of some histories: item and time int32 [n, size], length int32 [n].

        At most `latest` <= size events each, of all or of the `first` int64 [n]. Times are seconds since the first one
        that is taken; behind the last stands `now`.
        """
        end = self.end[rows] if first is None else self.start[rows] + first
        start = np.maximum(self.start[rows], end - latest)
        length = end - start
        there = np.arange(size) < length[:, None]
        index = np.where(there, start[:, None] + np.arange(size), 0)
        time = np.where(there, self.time[index], self.now[rows][:, None])
        since = np.clip(time - time[:, :1], 0, np.iinfo(np.int32).max)
        item = np.where(there, self.item[index], 0)
        return {"item": item, "time": since.astype(np.int32), "length": length.astype(np.int32)}


def disjoint_windows(lengths: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """How to read histories of `lengths` int64 [R], at most `most` items and one target more at a time.

    Returns int64 [n] and [n]: the history of each window, and how many events have happened at its end. From the latest
    backwards every event but the first is the target of one item before it exactly once.
    """
    count = np.where(lengths > 1, -(-(lengths - 1) // most), 0)
    rows = np.repeat(np.arange(len(lengths)), count)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
    return rows, lengths[rows] - place * most


class SequentialRecommender:
    """Ranks the whole catalogue by the products of a history's state with the items' vectors."""

    def __init__(self, assembly: SequentialAssembly, params: Any):
        self.assembly, self.params = assembly, params

    def recommend(
        self, histories: list[History], k: int, exclude_history: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best items of each history: items int32 [B, k] (-1 = none) and scores float32 [B, k] (-inf = none).

        Of a history longer than the model reads, the latest events count. Without any event of a target behavior it
        gets the most popular items. `exclude_history` leaves out all items of the history.
        """
        return self.rank(Histories.of(histories, self.assembly.wanted), k, exclude_history)

    def rank(self, histories: Histories, k: int, exclude_history: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """As `recommend`, of flat histories."""
        assembly, found = self.assembly, min(k, self.assembly.model.items)
        items = np.full((len(histories), k), -1, np.int32)
        scores = np.full((len(histories), k), -np.inf, np.float32)
        longest = assembly.lengths[-1]
        # Histories of about one length together; the last batch is filled up with copies of its first.
        order = np.argsort(histories.lengths, kind="stable")
        batch = next((size for size in SIZES if size >= len(order)), SIZES[-1])
        for begin in range(0, len(order), batch):
            rows = order[begin : begin + batch]
            filled = np.concatenate([rows, np.full(batch - len(rows), rows[0])])
            most = min(histories.lengths[rows].max(), longest)
            size = next(length for length in assembly.lengths if length >= most)
            arrays = histories.take(filled, size + 1, size)
            seen = _seen(histories, filled, assembly.model.items) if exclude_history else None
            best, values = jax.device_get(_rank(assembly.model, self.params, assembly.facts, arrays, seen, found))
            if np.isnan(values).any():
                raise FloatingPointError("the model gave NaN; its parameters are damaged, train it again")
            best = np.where(np.isfinite(values), best, -1)
            items[rows, :found], scores[rows, :found] = best[: len(rows)], values[: len(rows)]
        return items, scores

    def every_length(self) -> list[History]:
        """A history for each length that histories are padded to."""
        behavior = self.assembly.target_behaviors[0]
        return [repeated_item(length, behavior) for length in self.assembly.lengths]

    def with_params(self, params: Any) -> "SequentialRecommender":
        """The same with other parameters, such as those of a training that goes on; nothing is compiled again."""
        return SequentialRecommender(self.assembly, params)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _rank(model: SequentialModel, params: Any, facts: ItemFacts, arrays: dict, seen: jax.Array | None, k: int):
    # The model is its sizes; an assembly, with its arrays, would be kept alive by the compiled function.
    given = facts, arrays["item"], arrays["time"], arrays["length"]
    state, table = model.apply({"params": params}, *given, method="next")
    scores = jnp.where(arrays["length"][:, None] > 0, state @ table.T, facts.log_q)
    if seen is not None:
        scores = scores.at[jnp.arange(len(seen))[:, None], seen].set(-jnp.inf, mode="drop")
    values, items = top(scores, k)
    return items, values


def _seen(histories: Histories, rows: np.ndarray, nothing: int) -> np.ndarray:
    """All items of some histories, int32 [n, X], filled up with `nothing`; X is one of few sizes."""
    longest = max(int(histories.lengths[rows].max()), 1)
    seen = histories.take(rows, 16 * 2 ** max(0, (longest - 1).bit_length() - 4), longest)
    there = np.arange(seen["item"].shape[1]) < seen["length"][:, None]
    return np.where(there, seen["item"], nothing)


def assemble(run: Run, config: SequentialConfig) -> SequentialAssembly:
    """Shapes the model to the items of a run.

    Raises:
      UserError: the model reads text embeddings, and they are missing or of other items.
    """
    items = pq.read_table(run.tables / "items.parquet", columns=["item_id", "count"])
    counts, embeddings = items["count"].to_numpy(), None
    # One event more for everybody, so that an item nobody took in training has a finite log-probability.
    log_q = np.log((counts + 1) / (counts + 1).sum()).astype(np.float32)
    if config.model.embeddings:
        embeddings = jnp.asarray(read_embeddings(run.place("embeddings") / EMBEDDINGS, items["item_id"].to_pylist()))
    told = tells_answer_time(config.data, config.prepare)
    model = SequentialModel(config.model, len(counts), config.lengths[-1], told)
    wanted = np.isin(config.data.behaviors, config.data.target_behaviors)
    return SequentialAssembly(model, config.lengths, ItemFacts(jnp.asarray(log_q), embeddings), run.examples, wanted)


def recommender(assembly: SequentialAssembly, variables: dict, config: SequentialConfig) -> SequentialRecommender:
    """The trained model of a run, ready to recommend."""
    return SequentialRecommender(assembly, variables["params"])
