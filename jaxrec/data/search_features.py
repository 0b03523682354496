"""A search and its user's past as the fixed-shape arrays that a model reads (NumPy; no model and no tokenizer here).

    history, as an assembly's `read_texts` leaves it      cut
      tokens [t], query_codes [M]                           tokens [T], query_codes [M]
      recent_codes [n, M], profile_tokens [t]               recent_codes [R, M], profile [P]
      events: item, behavior, timestamp, session            recent_item, short_item, long_item [..]
      shown: items of the short sequences, of a sample
        that the sliding window cuts; else all
      same bool [T]: events that searches for               click_item, order_item, related_item [L]
        the same query led to                               candidate [C], habits [C, F], user [U]
      led_to: what the query led to in training
      neighbours: which items the same users take

Indices of items, -1 in the padding; sequences are aligned left, the oldest first, and candidates the likeliest first.

**Search-relevant items** (OneSearch's search relevant unit) are those of the past that the query led somebody to in
training, or this user before.
"""

from dataclasses import dataclass

import numpy as np

from jaxrec.config import UserError, check_least
from jaxrec.data.habits import habits_of, places_among
from jaxrec.data.item_sequences import user_of
from jaxrec.data.padding import bucket, check_buckets, padded
from jaxrec.data.search_statistics import LedTo

NONE = -1
HABITS = 14
"""numbers told of each candidate: log weight to begin with; taken by this user; log count; log days since; log searches
since; rate; share of the user's; log count of late; log share among all; the same of late; the ratio of the two; log
clicks; logs of how near the item is to the user's past, and to the search-relevant part of it"""
USER = 4
"""numbers told of the user: logs of events, of search-relevant events and items, of the query's searches"""
NOTHING = LedTo(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32), 0.0)


@dataclass(frozen=True)
class SearchFeatureConfig:
    """How much of a search and of the past is read."""

    buckets: tuple[int, ...] = (8, 16)
    """lengths in tokens that queries are padded to; of a longer query the first tokens are read"""
    levels: int = 0
    """levels M of the semantic IDs of queries; set by the system"""
    recent_queries: int = 5
    """last queries whose IDs are in the prompt; 0 for none"""
    recent_items: int = 5
    """last items whose IDs are in the prompt; 0 for none"""
    user_items: int = 100
    """last ordered items that the user ID of the long behavior is made of (Eq. 3)"""
    long_length: int = 256
    """last clicked, ordered and search-relevant items that are read implicitly (Eq. 4)"""
    related: int = 64
    """search-relevant items of the past that may be copied; 0 for none"""
    popular: int = 64
    """items that the query led to in training that may be copied; 0 for none"""
    short_items: int = 10
    """last clicked items that the user ID of the short behavior is made of (Eq. 3)"""
    profile: int = 16
    """tokens of the user's profile that are read, where the system reads one; 0 for none"""
    weakest: int | None = None
    """index of the weakest behavior that counts as a click; None: target behaviors alone do"""

    def __post_init__(self):
        check_buckets(self.buckets)
        least = dict.fromkeys(("recent_queries", "recent_items", "related", "popular", "profile"), 0)
        check_least(self, "features", user_items=1, short_items=1, long_length=1, **least)
        if self.weakest is not None and self.weakest < 0:
            raise UserError(f"configuration key 'features.weakest' is {self.weakest}; give the index of a behavior")

    @property
    def candidates(self) -> int:
        """Items C that may be copied."""
        return self.related + self.popular

    def bucket_of(self, record: dict, session: int) -> int:
        """The length that the query is padded to."""
        return bucket(self.buckets, len(record.get("tokens", ())))

    def cut(self, record: dict, session: int, *, behaviors: int, wanted: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of a history, all of which is read; `wanted` bool [behaviors] marks the target behaviors."""
        order = np.argsort(record["timestamp"], kind="stable")
        item, behavior, times, sessions = (record[name][order] for name in ("item", "behavior", "timestamp", "session"))
        ordered = wanted[behavior] if len(item) else np.zeros(0, bool)
        clicked = ordered if self.weakest is None else behavior >= self.weakest
        found = record.get("led_to", NOTHING)
        led = np.isin(item, found.item, kind="table")
        related = clicked & (led | record.get("same", np.zeros(len(item), bool))[order])
        now = int(record.get("now", times[-1] if len(times) else 0))
        clicks, orders = item[clicked], item[ordered]
        short = _last(clicks, record.get("shown", len(clicks)))
        user_short, user_long = (
            # Of the default the most taken one is last, where the weights are largest.
            _last(values if len(values) else found.item[:size][::-1], size)
            for values, size in ((short, self.short_items), (orders, self.user_items))
        )
        candidate, habits, known = self._candidates(
            *(each[related] for each in (item, ordered, times, sessions)), found, now
        )
        if "neighbours" in record:
            near = candidate[candidate >= 0]
            habits[: len(near), 12:] = _nearness(record, near, orders, item[related])
        codes = record.get("recent_codes", np.zeros((0, self.levels), np.int32))
        user = [len(orders), *known, found.searches]
        return {
            "tokens": padded(record.get("tokens", ())[: self.buckets[-1]], self.bucket_of(record, session), NONE),
            "query_codes": record.get("query_codes", np.full(self.levels, NONE, np.int32)),
            "profile": padded(record.get("profile_tokens", ())[: self.profile], self.profile, NONE),
            "recent_codes": padded(_last(codes, self.recent_queries), self.recent_queries, NONE),
            "recent_item": padded(_last(short, self.recent_items), self.recent_items, NONE),
            "short_item": padded(user_short, self.short_items, NONE),
            "long_item": padded(user_long, self.user_items, NONE),
            "click_item": padded(_last(clicks, self.long_length), self.long_length, NONE),
            "order_item": padded(_last(orders, self.long_length), self.long_length, NONE),
            "related_item": padded(_last(item[related], self.long_length), self.long_length, NONE),
            "candidate": candidate,
            "habits": habits,
            "user": np.log1p(np.array(user, np.float32)),
            "who": user_of(record),
        }

    def _candidates(
        self,
        item: np.ndarray,
        ordered: np.ndarray,
        times: np.ndarray,
        sessions: np.ndarray,
        found: LedTo,
        now: int,
    ) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        """Items int32 [C] that may be copied, their habits float32 [C, F], and how many events and items are relevant.

        First the items of the relevant events, the ones taken most often first, then those of the query's most taken
        that are not among them.
        """
        distinct, inverse = np.unique(item, return_inverse=True)
        told = np.zeros((len(distinct), 6), np.float32)
        if len(distinct):
            session = np.unique(sessions, return_inverse=True)[1]
            told = habits_of(inverse, len(distinct), ordered, times, now, session, session.max() + 1)
        taken = found.item
        mine = places_among(distinct, taken)
        share, recent = np.zeros((2, len(distinct)), np.float32)
        share[mine[mine >= 0]], recent[mine[mine >= 0]] = found.share[mine >= 0], found.recent[mine >= 0]
        others = np.flatnonzero(mine < 0)[: self.popular]
        best = np.lexsort((-share, -told[:, 0]))[: self.related]
        both = np.concatenate([distinct[best], taken[others]])
        told = np.concatenate([told[best], np.zeros((len(others), 6), np.float32)])
        share = np.concatenate([share[best], found.share[others]])
        recent = np.concatenate([recent[best], found.recent[others]])
        count, clicks = told[:, 0], told[:, 5]
        log_share, log_recent = np.log(share + 1e-4), np.log(recent + 1e-4)
        columns = [
            np.log(count + 0.1 * clicks + share + 1e-4),
            np.arange(len(both)) < len(best),
            np.log1p(count),
            *told[:, 1:4].T,
            count / max(ordered.sum(), 1),
            told[:, 4],
            log_share,
            log_recent,
            log_recent - log_share,
            np.log1p(clicks),
        ]
        habits = np.zeros((self.candidates, HABITS), np.float32)
        habits[: len(both), : len(columns)] = np.stack(columns, axis=1)
        return padded(both, self.candidates, NONE), habits, (len(item), len(distinct))


def _nearness(record: dict, items: np.ndarray, orders: np.ndarray, related: np.ndarray) -> np.ndarray:
    """float32 [n, 2]: logs of how near items are to what was taken and to the relevant past."""
    # Of both parts: an item that was looked at and is taken later is ahead, though it is of the past.
    whole, relevant = record["neighbours"].scores(items, (orders, related), orders, record.get("ahead", ()))
    distinct = np.count_nonzero(np.bincount(orders))
    return np.log(np.stack([whole / max(distinct, 1) ** 0.5, relevant], axis=1) + 0.01)


def _last(values: np.ndarray, count: int) -> np.ndarray:
    return values[max(len(values) - count, 0) :]
