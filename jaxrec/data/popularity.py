"""Popularity by period: counts of the events before each period, mixed with the popularity over the whole log.

The mixed-in share (`floor`) and the first period count later events too, as a popularity over all training events does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

DAY = 86_400


@dataclass(frozen=True)
class PopularityConfig:
    """How popularity changes with time."""

    days: int = 0
    """length of a period in days; 0 for one popularity over all training events"""
    decay_days: float = 10.0
    """an event counts exp(-age / decay_days)"""
    floor: float = 0.3
    """share of the popularity over all training events in every period, so that no item is impossible"""


@dataclass(frozen=True)
class PopularityByPeriod:
    """weights float64 [P, I], rows sum to 1: the popularity at the start of period p; first_day: day of period 0."""

    weights: np.ndarray
    first_day: int
    days: int

    def period(self, day):
        """The period of a day (days since 1970, an integer array of NumPy or JAX), clipped to those there are."""
        if not self.days:
            return day * 0
        return ((day - self.first_day) // self.days).clip(0, len(self.weights) - 1)


def popularity_by_period(
    items: np.ndarray, timestamps: np.ndarray, num_items: int, config: PopularityConfig
) -> PopularityByPeriod:
    """From training events: items int [n] and timestamps int64 [n] in seconds.

    The last period begins after the last event: later days get the popularity at the end of the log.
    """
    overall = np.bincount(items, minlength=num_items) + 1.0
    overall /= overall.sum()
    if not config.days or not len(items):
        return PopularityByPeriod(overall[None], 0, 0)
    day = timestamps // DAY
    first = int(day.min())
    of_event = (day - first) // config.days
    periods = int(of_event.max()) + 2
    weights, recent = np.empty((periods, num_items)), np.zeros(num_items)
    for period in range(periods):
        weights[period] = config.floor * overall + (1 - config.floor) * recent / max(recent.sum(), 1e-9)
        age = first + (period + 1) * config.days - timestamps / DAY
        inside = of_event == period
        added = np.bincount(items[inside], np.exp(-age[inside] / config.decay_days), minlength=num_items)
        recent = recent * np.exp(-config.days / config.decay_days) + added
    # Before the first event nothing is known but the whole.
    weights[0] = overall
    return PopularityByPeriod(weights / weights.sum(1, keepdims=True), first, config.days)


def read_popularity(
    tables: Path, num_items: int, behaviors: Sequence[str], config: PopularityConfig
) -> PopularityByPeriod:
    """The popularity of a run's train events of some behaviors."""
    events = pq.read_table(tables / "events.parquet", columns=["item", "timestamp", "behavior", "split"])
    wanted = pc.and_(pc.equal(events["split"], "train"), pc.is_in(events["behavior"], pa.array(list(behaviors))))
    events = events.filter(wanted)
    return popularity_by_period(events["item"].to_numpy(), events["timestamp"].to_numpy(), num_items, config)
