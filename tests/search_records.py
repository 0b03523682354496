"""A random record with searches and suggestions, for the tests that cut records."""

import numpy as np


def random_record(seed, *, links=True):
    """Events by session and time, searches and suggestions by time; sessions overlap in time."""
    rng = np.random.default_rng(seed)
    events, searches, suggestions = rng.integers(0, 30), rng.integers(0, 12), rng.integers(0, 20)
    session, timestamp = rng.integers(0, 6, events), rng.integers(0, 25, events)
    order = np.lexsort((timestamp, session))
    searched = np.sort(rng.integers(0, 25, searches))
    search = np.full(events, -1)
    for place, time in enumerate(timestamp[order]):
        earlier = np.flatnonzero(searched <= time)
        if links and len(earlier) and rng.random() < 0.6:
            search[place] = rng.choice(earlier)
    return {
        "user": seed, "answer_time": True,
        "item": rng.integers(0, 9, events).astype(np.int32), "behavior": rng.integers(0, 3, events).astype(np.int8),
        "timestamp": timestamp[order], "session": session[order].astype(np.int32),
        "split": (session[order] // 2).astype(np.int8), "search": search.astype(np.int32),
        "search_query": rng.integers(0, 7, searches).astype(np.int32), "search_timestamp": searched,
        "search_session": (found := rng.integers(0, 6, searches)).astype(np.int32),
        "search_split": (found // 2).astype(np.int8),
        "suggestion_prefix": rng.integers(0, 3, suggestions).astype(np.int32),
        "suggestion_query": rng.integers(0, 7, suggestions).astype(np.int32),
        "suggestion_feedback": rng.integers(0, 6, suggestions).astype(np.int8),
        "suggestion_timestamp": np.sort(rng.integers(0, 25, suggestions) // 4 * 4),
        "suggestion_session": (typed := rng.integers(0, 6, suggestions)).astype(np.int32),
        "suggestion_split": (typed // 2).astype(np.int8),
    }  # fmt: skip
