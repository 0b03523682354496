"""What a user's past says of each distinct thing in it: how often it was taken, and how long ago (NumPy)."""

import numpy as np

from jaxrec.data.popularity import DAY

MONTH = 30 * DAY


def habits_of(
    inverse: np.ndarray, size: int, ordered: np.ndarray, times: np.ndarray, now: int, session: np.ndarray, sessions: int
) -> np.ndarray:
    """Of each of `size` distinct things float32 [size, 6]: times taken, log days since, log sessions since, times taken
    in a session since the first, log count of late, times looked at.

    Args:
      inverse: int [n], the thing of each event; events are in order of time, and each thing has one or more.
      ordered: bool [n], True = taken, False = looked at.
      times: int64 [n], seconds; now: the time of the question.
      session: int [n], the session of each event, of so many `sessions` from 0 on in order of time.
    """
    count = np.bincount(inverse, ordered, size)
    clicks = np.bincount(inverse, ~ordered, size)
    last, first = np.zeros(size, np.int64), np.zeros(size, np.int64)
    last[inverse] = np.arange(len(inverse))  # of several assignments the last one stays
    first[inverse[::-1]] = np.arange(len(inverse))[::-1]
    lately = np.bincount(inverse, ordered * np.exp(-np.maximum(now - times, 0) / MONTH), size)
    columns = [
        count,
        np.log1p(np.maximum(now - times[last], 0) / DAY),
        np.log1p(sessions - 1 - session[last]),
        count / (sessions - session[first]),
        np.log1p(lately),
        clicks,
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def places_among(sorted_items: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The place of each wanted number among sorted distinct ones, -1 where it is not: int64 [n]."""
    if not len(sorted_items):
        return np.full(len(wanted), -1)
    place = np.minimum(np.searchsorted(sorted_items, wanted), len(sorted_items) - 1)
    return np.where(sorted_items[place] == wanted, place, -1)
