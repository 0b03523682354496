"""The searches of a request's user as texts, for models that read them: a known user's, and those given inline."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from jaxrec.data.searches import NO_QUERY
from jaxrec.data.words import normalised, typed
from jaxrec.evaluation.cases import History
from jaxrec.serving.schema import Event


class UserSearches:
    """The searches of all users of a run, up to the end of the log."""

    def __init__(self, tables: Path, num_users: int):
        """Reads searches.parquet, and which search led to each event; a run without such a file has no searches."""
        path, user = tables / "searches.parquet", np.zeros(0, np.int32)
        self.query, self.timestamp, self.session = np.zeros(0, object), np.zeros(0, np.int64), np.zeros(0, np.int32)
        self.search = None
        """int32 [events], rows of searches.parquet, -1 for none; None where no event names a search"""
        if path.is_file():
            table = pq.read_table(path, columns=["user", "query", "timestamp", "session"])
            user, self.timestamp, self.session = (table[name].to_numpy() for name in ("user", "timestamp", "session"))
            self.query = np.array(table["query"].to_pylist(), object)
            self.search = pq.read_table(tables / "events.parquet", columns=["search"])["search"].to_numpy()
        self.offsets = np.searchsorted(user, np.arange(num_users + 1))
        self.latest = int(self.timestamp.max(initial=0))

    def of_user(self, user: int | None, events: slice) -> History:
        """The fields of a history that tell of searches; events: the user's rows of events.parquet. None: nobody."""
        mine = slice(0, 0) if user is None else slice(self.offsets[user], self.offsets[user + 1])
        if self.search is None:
            search = np.full(events.stop - events.start, NO_QUERY, np.int32)
        else:
            search = np.where(self.search[events] < 0, -1, self.search[events] - mine.start).astype(np.int32)
        fields = {"search_query": self.query, "search_timestamp": self.timestamp, "search_session": self.session}
        return {name: column[mine] for name, column in fields.items()} | {"search": search}


def own_searches(history: History, prefix: str, k: int) -> list[tuple[str, int]]:
    """The k searches of a history that begin with what was typed, normalised, and how often each was searched for.

    The most frequent come first, equal ones by how late they were.
    """
    begin = typed(prefix)
    found = [text for text in map(normalised, history.get("search_query", ())) if text and text.startswith(begin)]
    counts, last = Counter(found), {text: place for place, text in enumerate(found)}
    return [(text, counts[text]) for text in sorted(last, key=lambda text: (-counts[text], -last[text]))[:k]]


def inline_searches(entries: Sequence[Event], timestamp: np.ndarray, session: np.ndarray) -> History:
    """The same fields of a history given in a request: entries [n] in order of time, their timestamps and sessions.

    An event with a query belongs to the latest search for it, whatever its writing (`jaxrec.data.words.normalised`).
    Where there is none before it, it is a search as well.
    """
    latest: dict[str, int] = {}
    queries, places, search = [], [], []
    for place, entry in enumerate(entries):
        text = None if entry.query is None else normalised(entry.query)
        if entry.item_id is None or (text is not None and text not in latest):
            latest[text] = len(queries)
            queries.append(entry.query)
            places.append(place)
        if entry.item_id is not None:
            search.append(-1 if text is None else latest[text])
    return {
        "search_query": np.array(queries, object),
        "search_timestamp": timestamp[places],
        "search_session": session[places],
        "search": np.array(search, np.int32),
    }
