"""The retriever: a run directory that answers requests.

It knows the catalogue and everything each user did up to the end of the log (the test sessions are history by now).
Whoever it knows nothing about gets the most popular items, marked as such.
"""

import threading
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.config import UserError
from jaxrec.evaluation.baselines import Recommender
from jaxrec.evaluation.cases import History
from jaxrec.run import Run, read_json
from jaxrec.serving.schema import MAX_K, Answer, Event, Item, Request

BATCH_SIZES = (1, 8, 64)
DEPTHS = (10, 50, 100, MAX_K)
"""Batches are padded to one of these sizes, and ranked to one of these depths, so that nothing recompiles."""


class Retriever:
    """Answers requests, many at once; safe to call from several threads."""

    def __init__(self, run_path: Path, recommender: Recommender | None = None):
        """Loads the run; `recommender` replaces the trained model, for tests and for baselines.

        Raises:
          UserError: there is no run at `run_path`, or it is not finished, or its system is not known.
        """
        self.run, config = Run.load(Path(run_path))
        self.system = str(config.get("system"))
        for name in ("items.parquet", "users.parquet", "events.parquet", "statistics.json"):
            if not (self.run.tables / name).exists():
                raise UserError(f"{self.run.tables / name} is missing; run train.py again with --run {self.run.path}")
        items = pq.read_table(self.run.tables / "items.parquet", columns=["item_id", "title", "count"])
        self.item_ids, self.titles = items["item_id"].to_pylist(), items["title"].to_pylist()
        self.counts = items["count"].fill_null(0).to_numpy()
        self.popular = np.argsort(-self.counts, kind="stable")
        self.item_index = {item_id: row for row, item_id in enumerate(self.item_ids)}
        users = pq.read_table(self.run.tables / "users.parquet")["user_id"].to_pylist()
        self.user_index = {user_id: row for row, user_id in enumerate(users)}
        statistics = read_json(self.run.tables / "statistics.json")
        self.behaviors: list[str] = statistics["behaviors"]
        self.target_behaviors = [self.behaviors.index(name) for name in statistics["target_behaviors"]]
        self._read_events(len(users))
        self.recommender = recommender or self._load_recommender(config)
        self._lock = threading.Lock()

    def _read_events(self, num_users: int) -> None:
        """All events as flat columns; the rows of user u are offsets[u]:offsets[u + 1]."""
        columns = ["user", "item", "behavior", "timestamp", "session"]
        events = pq.read_table(self.run.tables / "events.parquet", columns=columns, read_dictionary=["behavior"])
        behavior = pc.index_in(events["behavior"].cast(pa.string()), value_set=pa.array(self.behaviors))
        self.events = {name: events[name].to_numpy() for name in ("item", "timestamp", "session")}
        self.events["behavior"] = behavior.to_numpy().astype(np.int8)
        self.offsets = np.searchsorted(events["user"].to_numpy(), np.arange(num_users + 1))
        self.latest = int(self.events["timestamp"].max(initial=0))

    def _load_recommender(self, config: dict) -> Recommender:
        # Imported here: a system brings JAX along, and a wrong run directory should be refused before that.
        from jaxrec.systems import SYSTEMS

        if self.system not in SYSTEMS:
            raise UserError(f"{self.run.config_file}: unknown system {self.system!r}; known are {', '.join(SYSTEMS)}")
        return SYSTEMS[self.system].load_recommender(self.run)

    def answer(self, requests: Sequence[Request], at_once: int = BATCH_SIZES[-1]) -> list[Answer | UserError]:
        """One answer a request, in order; for a request that can't be answered, the UserError that says why.

        The model is given `at_once` histories of one depth in a call: many, and it can fill its own batches with
        histories of one length.
        """
        answers: list[Answer | UserError | None] = [None] * len(requests)
        known: list[tuple[int, History]] = []
        ignored: dict[int, list[str]] = {}
        for row, request in enumerate(requests):
            try:
                history, ignored[row] = self.history(request)
            except UserError as error:
                answers[row] = error
                continue
            if len(history["item"]):
                known.append((row, history))
            else:
                answers[row] = self._popular(request.k, ignored[row])

        def call(pair: tuple[int, History]) -> tuple[bool, int]:
            request = requests[pair[0]]
            return request.exclude_seen, next(depth for depth in DEPTHS if depth >= request.k)

        # Requests that differ in what they exclude, or in how deep the beam goes, are different calls of the model.
        known.sort(key=call)
        for (exclude_seen, depth), group in groupby(known, key=call):
            pairs = list(group)
            for start in range(0, len(pairs), at_once):
                rows, histories = zip(*pairs[start : start + at_once], strict=True)
                ranked = self._recommend(list(histories), depth, exclude_seen)
                for row, items, scores in zip(rows, *ranked, strict=True):
                    answers[row] = self._answer(items[: requests[row].k], scores, "model", ignored[row])
        return answers

    def history(self, request: Request) -> tuple[History, list[str]]:
        """(what the request's user did, item ids that are not in the catalogue); an empty history if nothing is known.

        Raises:
          UserError: an unknown behavior.
        """
        if request.history is None:
            user = self.user_index.get(request.user_id)
            rows = slice(0, 0) if user is None else slice(self.offsets[user], self.offsets[user + 1])
            history, ignored = {name: column[rows] for name, column in self.events.items()}, []
        else:
            history = self._inline([event for event in request.history if event.item_id in self.item_index])
            ignored = [event.item_id for event in request.history if event.item_id not in self.item_index]
        now = max(self.latest, history["timestamp"].max(initial=0)) if request.now is None else request.now
        return {**history, "now": np.int64(now)}, ignored

    def _inline(self, events: list[Event]) -> History:
        """A history given in the request, in order of time. Without times, each event is a session, just happened."""
        times = [self.latest if event.timestamp is None else event.timestamp for event in events]
        order = np.argsort(times, kind="stable")
        timestamp = np.array(times, np.int64)[order]
        starts = np.diff(timestamp) > 0 if any(event.timestamp is not None for event in events) else 1
        session = np.zeros(len(events), np.int32)
        session[1:] = np.cumsum(np.broadcast_to(starts, max(len(events) - 1, 0)))
        return {
            "item": np.array([self.item_index[event.item_id] for event in events], np.int32)[order],
            "behavior": np.array([self._behavior(event.behavior) for event in events], np.int8)[order],
            "timestamp": timestamp,
            "session": session,
        }

    def _behavior(self, name: str | None) -> int:
        if name is None:
            return min(self.target_behaviors)
        if name not in self.behaviors:
            raise UserError(f"unknown behavior {name!r} in the history; known are {', '.join(self.behaviors)}")
        return self.behaviors.index(name)

    def _recommend(self, histories: list[History], depth: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        """The model, one call at a time, on a batch padded to one of BATCH_SIZES unless it is larger than all."""
        size = next((size for size in BATCH_SIZES if size >= len(histories)), len(histories))
        padded = histories + histories[-1:] * (size - len(histories))
        with self._lock:
            items, scores = self.recommender.recommend(padded, depth, exclude_seen)
        return items[: len(histories)], scores[: len(histories)]

    def _popular(self, k: int, ignored: list[str]) -> Answer:
        items = self.popular[:k]
        return self._answer(items, self.counts[items], "popular", ignored)

    def _answer(self, items: np.ndarray, scores: np.ndarray, source: str, ignored: list[str]) -> Answer:
        pairs = [(int(item), float(score)) for item, score in zip(items, scores, strict=False) if item >= 0]
        listed = [
            Item(item_id=self.item_ids[item], title=self.titles[item] or "", score=score) for item, score in pairs
        ]
        return Answer(items=listed, source=source, ignored=ignored or None)

    def warm_up(self) -> None:
        """Compiles what a single request of the default depth needs, so that the first user need not wait for it."""
        if len(self.item_ids):
            request = {"history": [{"item_id": self.item_ids[self.popular[0]]}]}
            self.answer([Request.model_validate(request)])
