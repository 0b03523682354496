"""The history that a request gives inline, as arrays: what a model reads of a user whom nobody knows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxrec.config import UserError
from jaxrec.evaluation.cases import History
from jaxrec.serving.schema import Event
from jaxrec.serving.searches import inline_searches

NO_ITEM = -1
"""The item of a search in a history."""


@dataclass(frozen=True)
class InlineHistories:
    """Makes histories of events that requests give."""

    row: Callable[[str], int | None]
    """the index of an item id, None where the catalogue has none"""
    behaviors: Sequence[str]
    """names, weakest first"""
    target_behaviors: Sequence[int]
    """of an event without a behavior: the weakest of these"""
    latest: int
    """the time of an event without one: the end of the log, in seconds"""
    searches: bool
    """whether the history holds searches too"""

    def history(self, events: Sequence[Event]) -> tuple[History, list[str]]:
        """(the history in order of time, the item ids that the catalogue doesn't have).

        Without times, each event is a session at the latest time.

        Raises:
          UserError: an unknown behavior.
        """
        rows = {event.item_id: self.row(event.item_id) for event in events if event.item_id is not None}
        known = [event for event in events if event.item_id is None or rows[event.item_id] is not None]
        unknown = [event.item_id for event in events if event.item_id is not None and rows[event.item_id] is None]
        times = [self.latest if event.timestamp is None else event.timestamp for event in known]
        order = np.argsort(times, kind="stable")
        timestamp = np.array(times, np.int64)[order]
        starts = np.diff(timestamp) > 0 if any(event.timestamp is not None for event in known) else 1
        session = np.zeros(len(known), np.int32)
        session[1:] = np.cumsum(np.broadcast_to(starts, max(len(known) - 1, 0)))
        items = [NO_ITEM if event.item_id is None else rows[event.item_id] for event in known]
        columns = {
            "item": np.array(items, np.int32)[order],
            "behavior": np.array([self._behavior(event.behavior) for event in known], np.int8)[order],
            "timestamp": timestamp,
            "session": session,
        }
        history = {name: column[columns["item"] != NO_ITEM] for name, column in columns.items()}
        if self.searches:
            history |= inline_searches([known[row] for row in order], timestamp, session)
        return history, unknown

    def _behavior(self, name: str | None) -> int:
        if name is None:
            return min(self.target_behaviors)
        if name not in self.behaviors:
            raise UserError(f"unknown behavior {name!r} in the history; known are {', '.join(self.behaviors)}")
        return list(self.behaviors).index(name)


def moment_of(history: History, latest: int, now: int | None) -> int:
    """When a request is made: as it says (`now`), or the end of the log or of its history."""
    if now is not None:
        return now
    times = (history[name].max(initial=0) for name in ("timestamp", "search_timestamp") if name in history)
    return max(latest, *map(int, times))
