"""How often things were taken before each period of a log: what was known of them at any time (NumPy; no model here).

    counts = counts_by_period(keys, timestamps, size, PeriodConfig(days=1))
    counts.total[counts.periods.of(day)]    # float32 [size]: events before the period that holds the day

Only events before a period's first day are in its counts, so that no training example sees itself or its future. A
server that is asked after the log's end has all of it: the last period begins behind the last event.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from jaxrec.config import UserError, check_least
from jaxrec.data.popularity import DAY

SMOOTHING = 10.0
"""events at the mean rate that are added to those of every item, in a rate of two behaviors"""
LARGEST = 1 << 26
"""numbers that counts of all periods may hold"""


@dataclass(frozen=True)
class PeriodConfig:
    """How often counts are made anew."""

    days: int = 1
    """length of a period in days"""
    decay_days: float = 14.0
    """of late: an event counts exp(-age / decay_days)"""

    def __post_init__(self):
        check_least(self, "ranking.counts", days=1, decay_days=1e-3)


@dataclass(frozen=True)
class Periods:
    """P periods of a log; the last one begins behind the last event."""

    count: int
    """P"""
    first_day: int
    """the day of period 0, since 1970"""
    days: int
    """length of a period"""

    def of(self, day):
        """The period of a day (since 1970, an array of NumPy or JAX), clipped to those there are."""
        return ((day - self.first_day) // self.days).clip(0, self.count - 1)


@dataclass(frozen=True, eq=False)
class PeriodCounts:
    """Events of each of n things before the start of each of P periods."""

    total: np.ndarray
    """float32 [P, n]"""
    recent: np.ndarray
    """float32 [P, n], of late"""
    periods: Periods


def counts_by_period(
    keys: np.ndarray,
    timestamps: np.ndarray,
    size: int,
    config: PeriodConfig,
    *,
    since: tuple[int, int] | None = None,
) -> PeriodCounts:
    """From events: keys int [m] below `size`, and timestamps int64 [m] in seconds.

    since: the first and the last timestamp of the log, where these events are a part of it; None: theirs.

    Raises:
      UserError: the periods are too many to be kept.
    """
    begin, end = since or ((int(timestamps.min()), int(timestamps.max())) if len(timestamps) else (0, 0))
    first = begin // DAY
    periods = (end // DAY - first) // config.days + 2
    if periods * size > LARGEST:
        raise UserError(
            f"configuration key 'ranking.counts.days' is {config.days}: {periods:,} periods of {size:,} counts don't "
            "fit into memory; give longer periods"
        )
    total, recent = np.zeros((2, periods, size), np.float32)
    fade, place = np.exp(-config.days / config.decay_days), (timestamps // DAY - first) // config.days
    order = np.argsort(place, kind="stable")
    bounds = np.searchsorted(place[order], np.arange(periods))
    for period in range(1, periods):
        inside = order[bounds[period - 1] : bounds[period]]
        age = first + period * config.days - timestamps[inside] / DAY
        total[period] = total[period - 1] + np.bincount(keys[inside], minlength=size)
        lately = np.bincount(keys[inside], np.exp(-age / config.decay_days), minlength=size)
        recent[period] = fade * recent[period - 1] + lately
    return PeriodCounts(total, recent, Periods(int(periods), int(first), config.days))


def item_features(
    items: np.ndarray, behavior: np.ndarray, timestamps: np.ndarray, shape: tuple[int, int], config: PeriodConfig
) -> tuple[np.ndarray, Periods]:
    """What was known of each item before each period: float32 [P, I, F]; and the periods.

    Args:
      items, behavior: int [m], of training events.
      shape: (items I, behaviors).

    Of every behavior the log of the count of all time and of late, each standardised over the items of its period, so
    that a number means the same at the log's beginning and end; of every behavior but the weakest the log of its rate
    per event of the next weaker one, against the mean rate.
    """
    size, behaviors = shape
    since = (int(timestamps.min()), int(timestamps.max())) if len(timestamps) else (0, 0)
    counts = []
    for each in range(behaviors):
        mine = behavior == each
        counts.append(counts_by_period(items[mine], timestamps[mine], size, config, since=since))
    columns = [_standardised(np.log1p(of)) for each in counts for of in (each.total, each.recent)]
    columns += [_log_rate(weak.total, strong.total) for weak, strong in itertools.pairwise(counts)]
    return np.stack(columns, axis=-1), counts[0].periods


def _standardised(values: np.ndarray) -> np.ndarray:
    """Rows of mean 0 and deviation 1; of equal values zeros."""
    centred = values - values.mean(1, keepdims=True)
    return (centred / np.maximum(values.std(1, keepdims=True), 1e-3)).astype(np.float32)


def _log_rate(weak: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """log of (strong + a mean) / (weak + a) against the mean, per period; 0 where either behavior never happened."""
    sums = weak.sum(1, keepdims=True), strong.sum(1, keepdims=True)
    mean = sums[1] / np.maximum(sums[0], 1)
    rate = (strong + SMOOTHING * mean) / (weak + SMOOTHING)
    known = (sums[0] > 0) & (sums[1] > 0)
    return np.where(known, np.log(np.where(known, rate, 1.0) / np.where(known, mean, 1.0)), 0.0).astype(np.float32)
