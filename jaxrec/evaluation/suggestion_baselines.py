"""The baselines of query suggestion: whole queries for a prefix, and some for the user too.

    popular completion            queries of training that begin with what was typed, by their number of sessions:
                                  most popular completion (Bar-Yossef & Kraus, 2011)
    recent popular completion     the same by popularity of late
    own searches, then popular    the user's own searches that begin with it, the most frequent first, equal ones by how
                                  late they were; then popular completion
    own searches, then recent     the same, then recent popular completion
    co-occurrence, then popular   what users searched for after the user's last search; then popular completion

Texts are compared after `jaxrec.data.words.normalised`. An answer begins with what was typed: for a prefix that nobody
completed there is none, and nothing is filled in.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from scipy import sparse

from jaxrec.data.completions import UNKNOWN, Completions
from jaxrec.data.popularity import DAY
from jaxrec.data.words import normalised, typed
from jaxrec.evaluation.baselines import Recommender, count_matrix
from jaxrec.evaluation.cases import History
from jaxrec.targets import TextSpace

REACH = 10
"""Searches that are followed by a later one of their session lie at most so many places before it."""
OF_A_SESSION = 100
"""Last queries of a session that are followed by the first ones of the next session, at most."""

First = Callable[[History, str], Sequence[int]]
"""Numbers of texts that begin with what was typed, best first."""


@dataclass(frozen=True, eq=False)
class NumberedCompletions:
    """The queries of training with their numbers in a space of texts."""

    known: Completions
    space: TextSpace
    numbers: np.ndarray = field(init=False)
    """int32 [Q], of the completions"""
    read: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    """normalised texts of searches"""

    def __post_init__(self):
        numbers = [self.space.numbers.of(text, for_good=True) for text in self.known.texts]
        object.__setattr__(self, "numbers", np.array(numbers, np.int32))

    def searched(self, history: History) -> list[str]:
        """The normalised texts of a history's searches, in their order."""
        queries = history.get("search_query", ())
        for query in queries:
            if query not in self.read:
                self.read[query] = normalised(query)
        return [self.read[query] for query in queries]

    def number(self, text: str) -> int:
        """The number of a normalised text."""
        return self.space.numbers.of(text)


@dataclass(frozen=True, eq=False)
class Completing:
    """What `first` gives, then the most popular completions of what was typed, of all time or of late."""

    texts: NumberedCompletions
    late: bool = False
    first: First | None = None

    def recommend(self, histories, k, exclude_history=False):
        """As `Recommender.recommend`; n answers have the scores n, n - 1, ... 1."""
        answers, scores = np.full((len(histories), k), -1, np.int32), np.full((len(histories), k), -np.inf, np.float32)
        for row, history in enumerate(histories):
            begins = typed(history.get("prefix", ""))
            best = list(self.first(history, begins)) if self.first else []
            own = {text for text in self.texts.searched(history) if text.startswith(begins)} if exclude_history else ()
            held = {self.texts.number(text) for text in own}
            more = self.texts.known.top(begins, k + len(best) + len(held), day_of(history), late=self.late)
            best = dict.fromkeys([*best, *self.texts.numbers[more.rows].tolist()])
            kept = [number for number in best if number not in held][:k]
            answers[row, : len(kept)], scores[row, : len(kept)] = kept, np.arange(len(kept), 0, -1)
        return answers, scores


@dataclass(frozen=True, eq=False)
class OwnSearches:
    """The user's own searches that begin with what was typed, by how often; equal ones by how late."""

    texts: NumberedCompletions

    def __call__(self, history: History, begins: str) -> list[int]:
        own = [text for text in self.texts.searched(history) if text and text.startswith(begins)]
        counts, last = Counter(own), {text: place for place, text in enumerate(own)}
        return [self.texts.number(text) for text in sorted(last, key=lambda text: (-counts[text], -last[text]))]


@dataclass(frozen=True, eq=False)
class Followers:
    """What users searched for after the user's last search, by the share of its sessions, equal ones by popularity.

    Several searches of one last moment, such as those derived from a basket, are all last: their shares are summed.
    """

    texts: NumberedCompletions
    following: sparse.csr_array
    """f32 [Q, Q]: row q holds the sessions with q after which each query was searched for; rows sorted by column"""

    @classmethod
    def fit(cls, texts: NumberedCompletions, log: pa.Table) -> "Followers":
        """From `jaxrec.data.completions.training_queries`: later in the session, or in the user's next session."""
        user, session, time, query = (log[name].to_numpy() for name in ("user", "session", "timestamp", "query"))
        order = np.lexsort((query, time, session, user))
        # A user's sessions are numbered in order of their beginnings; they may overlap.
        visit = np.unique(np.stack([user, session], 1)[order], axis=0, return_inverse=True)[1].ravel()
        user, time, query = user[order], time[order], query[order]
        following = _later(visit, time, query, len(texts.known)) + _next(user, visit, query, len(texts.known))
        following = following.tocsr()
        following.sort_indices()
        return cls(texts, following)

    def __call__(self, history: History, begins: str) -> list[int]:
        known = self.texts.known
        span, own = known.of(begins), known.rows(self._last(history))
        found: Counter[int] = Counter()
        for row in own[own != UNKNOWN].tolist():
            start, stop = self.following.indptr[row : row + 2]
            columns = self.following.indices[start:stop]
            within = slice(*(start + np.searchsorted(columns, (span.start, span.stop))))
            shares = self.following.data[within] / known.count[row]
            found.update(dict(zip(self.following.indices[within].tolist(), shares.tolist(), strict=True)))
        best = sorted(found, key=lambda row: (-found[row], known.place[row]))
        return self.texts.numbers[best].tolist()

    def _last(self, history: History) -> list[str]:
        """The distinct searches of the last moment."""
        queries = self.texts.searched(history)
        times = np.asarray(history.get("search_timestamp", ()))
        if len(queries) and len(times) == len(queries):
            queries = [query for query, last in zip(queries, times == times[-1], strict=True) if last]
            return list(dict.fromkeys(queries))
        return queries[-1:]


def suggestion_baselines(space: TextSpace, known: Completions, log: pa.Table) -> dict[str, Recommender]:
    """The baselines of suggestions by printed name; they answer with numbers of the space, of listed texts or not.

    Args:
      known: the completions of training.
      log: the same as `jaxrec.data.completions.training_queries`.
    """
    texts = NumberedCompletions(known, space)
    own, followers = OwnSearches(texts), Followers.fit(texts, log)
    return {
        "popular completion": Completing(texts),
        "recent popular completion": Completing(texts, late=True),
        "own searches, then popular": Completing(texts, first=own),
        "own searches, then recent": Completing(texts, late=True, first=own),
        "co-occurrence, then popular": Completing(texts, first=followers),
    }


def day_of(history: History) -> int | None:
    """The day of a question since 1970: of `now`, or else of the history's last event or search; None without any."""
    times = [int(history["now"])] if "now" in history else []
    if not times:
        times = [int(history[name][-1]) for name in ("timestamp", "search_timestamp") if len(history.get(name, ()))]
    return max(times) // DAY if times else None


def _later(visit: np.ndarray, time: np.ndarray, query: np.ndarray, size: int) -> sparse.csr_array:
    """Sessions in which the column's query was searched for after the row's, at most REACH searches later."""
    found = sparse.csr_array((size, size), dtype=np.float32)
    for gap in range(1, min(REACH, len(query) - 1) + 1):
        same = (visit[:-gap] == visit[gap:]) & (time[:-gap] < time[gap:])
        found += count_matrix(query[:-gap][same], query[gap:][same], (size, size))
    return found


def _next(user: np.ndarray, visit: np.ndarray, query: np.ndarray, size: int) -> sparse.csr_array:
    """Sessions with the row's query, in whose user's next session the column's was searched for."""
    starts, row = np.flatnonzero(np.diff(visit, prepend=-1)), np.arange(len(visit))
    place, left = row - starts[visit], np.append(starts, len(visit))[visit + 1] - row
    goes_on = np.append(user[starts][1:] == user[starts][:-1], False)
    last = (left <= OF_A_SESSION) & goes_on[visit]
    first = (place < OF_A_SESSION) & np.append(False, goes_on[:-1])[visit]
    shape = (len(starts), size)
    before, after = count_matrix(visit[last], query[last], shape), count_matrix(visit[first] - 1, query[first], shape)
    return before.T @ after
