"""What is typed and the user's past as the fixed-shape arrays that a suggestion model reads (NumPy; no tokenizer here).

    history, as an assembly's `read_texts` leaves it          cut
      typed_tokens, related, earlier, profile_tokens            tokens [S]: the prompt of OneSug Eq. 5
      own: the past searches that begin with what is typed      candidate [C, M]: tokens of whole queries, with their
      top: the most popular completions                           end
      near: related queries                                     habits [C, F], user [U]
      texts: the tokens and lengths of queries by number

-1 in the padding; candidates are the likeliest first. Queries are numbers: rows of the completions of training, and
behind these the user's own queries that training does not know.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np

from jaxrec.config import check_least
from jaxrec.data.habits import habits_of, places_among
from jaxrec.data.padding import bucket, check_buckets, padded

NONE = -1
CLS, SEP, NEXT, START = range(4)
"""special tokens of prompts, counted from `SuggestionFeatureConfig.specials`; START begins what is written"""
SPECIALS = 4
HABITS = 15
"""numbers told of each candidate: log weight to begin with; searched for by this user; log count; log days since; log
sessions since; rate; share of the user's matching searches; log count of late; log share among all completions; the
same of late; the ratio of the two; whether it begins with what is typed; nearness among the related queries; the part
of it that is typed; log of how near it is to the user's past"""
USER = 6
"""numbers told of the user and the prefix: logs of past searches, of those and of the distinct queries that begin with
what is typed, of known completions and their sessions, of the characters typed"""


class Own(NamedTuple):
    """The past searches that begin with what is typed, in order of time."""

    query: np.ndarray
    """int64 [n], numbers"""
    timestamp: np.ndarray
    """int64 [n]"""
    session: np.ndarray
    """int64 [n], from 0 on among all sessions of the past with a search"""
    sessions: int
    """of the past with a search"""
    searches: int
    """of the whole past, whatever they begin with"""


class QueryTable(Protocol):
    """Queries by number."""

    def tokens(self, numbers: np.ndarray) -> np.ndarray:
        """int32 [n, M] with their end, NONE behind it."""
        ...

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Characters, int64 [n]."""
        ...

    def near(self, numbers: np.ndarray) -> np.ndarray:
        """How near they are to what this user searched for, float32 [n]; 0 for not at all."""
        ...


NOBODY = Own(*np.zeros((3, 0), np.int64), 0, 0)


@dataclass(frozen=True)
class SuggestionFeatureConfig:
    """How much of what is typed and of the past is read."""

    buckets: tuple[int, ...] = (16, 32, 64, 128)
    """lengths in tokens that prompts are padded to; of a longer one the oldest queries are left out, then the related
    ones that are least near, then the end of what is typed"""
    typed: int = 24
    """tokens of what is typed that are read, the first ones"""
    related: int = 10
    """related queries in the prompt (OneSug: 10); 0 for none"""
    earlier: int = 10
    """last distinct queries of the user in the prompt, the newest first (OneSug: 10); 0 for none"""
    words: int = 12
    """tokens of each of these queries that are read"""
    profile: int = 16
    """tokens of the user's profile that are read, where the system reads one"""
    own: int = 16
    """the user's own matching queries that may be copied; 0 for none"""
    popular: int = 32
    """completions that may be copied, the most popular ones; 0 for none"""
    near: int = 0
    """related queries that may be copied; 0 for none"""
    length: int = 0
    """tokens M of a query with its end; set by the system"""
    specials: int = 0
    """the first of the special tokens; set by the system"""

    def __post_init__(self):
        check_buckets(self.buckets)
        least = dict.fromkeys(("related", "earlier", "profile", "own", "popular", "near"), 0)
        check_least(self, "features", typed=1, words=1, **least)

    @property
    def candidates(self) -> int:
        """Queries C that may be copied."""
        return self.own + self.popular + self.near

    def bucket_of(self, record: dict, session: int) -> int:
        """The length that the prompt is padded to."""
        return bucket(self.buckets, len(self.prompt(record)))

    def prompt(self, record: dict) -> list[int]:
        """CLS prefix SEP related SEP earlier SEP profile (OneSug Eq. 5); NEXT between queries.

        A part that is empty leaves its SEP in place, so that the others keep their number.
        """
        most = self.buckets[-1]
        typed = list(record.get("typed_tokens", ()))[: min(self.typed, most - 4)]
        profile = list(record.get("profile_tokens", ()))[: min(self.profile, most - 4 - len(typed))]
        room = most - 4 - len(typed) - len(profile)
        parts = []
        for name in ("related", "earlier"):
            queries = [list(query[: self.words]) for query in record.get(name, ())[: getattr(self, name)]]
            ends = np.cumsum([len(query) + 1 for query in queries], dtype=np.int64) - 1
            parts.append(queries[: int(np.searchsorted(ends, room, side="right"))])
            room -= int(ends[len(parts[-1]) - 1]) if parts[-1] else 0
        related, earlier = parts
        return [
            *[self.specials + CLS, *typed, self.specials + SEP, *self._joined(related)],
            *[self.specials + SEP, *self._joined(earlier), self.specials + SEP, *profile],
        ]

    def _joined(self, queries: Sequence[Sequence[int]]) -> list[int]:
        between = ([*query, self.specials + NEXT] for query in queries)
        return list(chain.from_iterable(between))[:-1]

    def cut(
        self, record: dict, session: int, *, behaviors: int, wanted: np.ndarray, size: int | None = None
    ) -> dict[str, np.ndarray]:
        """The arrays of a history, all of which is read.

        size: the length that the prompt is padded to, one of the buckets; None: the smallest that holds it.
        """
        prompt = self.prompt(record)
        found = {"tokens": padded(prompt, size or bucket(self.buckets, len(prompt)), NONE)}
        if not self.candidates:
            return found
        candidate = np.full((self.candidates, self.length), NONE, np.int32)
        habits = np.zeros((self.candidates, HABITS), np.float32)
        numbers, columns, user = self._candidates(record)
        if len(numbers):
            candidate[: len(numbers)] = record["texts"].tokens(numbers)
            habits[: len(numbers)] = columns
        return found | {"candidate": candidate, "habits": habits, "user": user}

    def _candidates(self, record: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers of candidates int64 [c], their habits float32 [c, HABITS], and the user's float32 [USER]."""
        own, top, near = record.get("own", NOBODY), record["top"], record.get("near", np.zeros(0, np.int64))
        distinct, inverse = np.unique(own.query, return_inverse=True)
        told = np.zeros((len(distinct), 6), np.float32)
        if len(distinct):
            taken = np.ones(len(inverse), bool)
            now = int(record.get("now", own.timestamp[-1]))
            told = habits_of(inverse, len(distinct), taken, own.timestamp, now, own.session, own.sessions)
        place = places_among(distinct, top.rows)
        share, recent = np.zeros((2, len(distinct)), np.float32)
        share[place[place >= 0]], recent[place[place >= 0]] = top.share[place >= 0], top.recent[place >= 0]
        best = np.lexsort((distinct, -share, -told[:, 0]))[: self.own]
        others = np.flatnonzero(place < 0)[: self.popular]
        known = np.concatenate([distinct[best], top.rows[others]])
        further = near[~np.isin(near, known)][: self.near]
        numbers = np.concatenate([known, further])
        blank = np.zeros(len(further), np.float32)
        share = np.concatenate([share[best], top.share[others], blank])
        recent = np.concatenate([recent[best], top.recent[others], blank])
        told = np.concatenate([told[best], np.zeros((len(others) + len(further), 6), np.float32)])
        count, log_share, log_recent = told[:, 0], np.log(share + 1e-4), np.log(recent + 1e-4)
        typed, start, stop = record["characters"], *record["span"]
        # Queries that training does not know are the user's own, which all begin so.
        begins = ((numbers >= start) & (numbers < stop)) | (np.arange(len(numbers)) < len(best))
        rank = np.full(len(numbers), np.inf)
        for at, number in enumerate(near.tolist()):
            rank[numbers == number] = at
        columns = [
            np.log(count + share + 1e-4),
            np.arange(len(numbers)) < len(best),
            np.log1p(count),
            *told[:, 1:4].T,
            count / max(len(own.query), 1),
            told[:, 4],
            log_share,
            log_recent,
            log_recent - log_share,
            begins,
            1 / (1 + rank),
            np.minimum(typed / np.maximum(record["texts"].lengths(numbers), 1), 1.0),
            np.log(record["texts"].near(numbers) + 0.01),
        ]
        user = [own.searches, len(own.query), len(distinct), top.texts, top.sessions, typed]
        return numbers, np.stack(columns, axis=1).astype(np.float32), np.log1p(np.array(user, np.float32))
