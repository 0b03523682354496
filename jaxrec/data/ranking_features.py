"""A history as the arrays that a ranking model reads, and what followed as labels (NumPy; no model here).

    seen_item, seen_behavior, seen_age int32 [S], seen_mask bool [S]    the latest events, the newest first
    asked_day int32 []                                                  when the question is asked, for counts
    asking_user int32 []                                                who asks, -1 where that is unknown
    query_vector float32 [E], asked bool []                             the query's embedding, where there is a query
    led_item int32 [C], led float32 [C, 4]                              what the query had led to (`QueryItems`)

The newest come first, so that a prefix of the arrays is the latest past: a model may attend to the first few and search
in all. Items and labels of a session or of a search are its impressions: one context, many candidates.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from jaxrec.config import UserError, check_least
from jaxrec.data.examples import Record
from jaxrec.data.item_sequences import user_of
from jaxrec.data.padding import bucket, check_buckets, padded
from jaxrec.data.popularity import DAY
from jaxrec.data.query_items import TOLD

AGES = 32
"""buckets of an event's age: powers of two of seconds, up to 68 years"""
NONE = -1


@dataclass(frozen=True)
class RankingFeatureConfig:
    """How much of a history is read."""

    buckets: tuple[int, ...] = (32, 128)
    """lengths that histories are padded to; of a longer one the latest events are read"""
    weakest: int | None = None
    """index of the weakest behavior that is read; None: target behaviors alone are"""
    led: int = 64
    """items that the query had led to, most taken first; read where there are queries"""

    def __post_init__(self):
        check_buckets(self.buckets, "ranking.features.buckets")
        check_least(self, "ranking.features", led=1)
        if self.weakest is not None and self.weakest < 0:
            raise UserError(
                f"configuration key 'ranking.features.weakest' is {self.weakest}; give the index of a behavior"
            )

    def kept(self, history: Record, wanted: np.ndarray) -> np.ndarray:
        """bool [T]: the events of a history that are read; `wanted` bool [behaviors] marks the target behaviors."""
        behavior = history["behavior"]
        return wanted[behavior] if self.weakest is None else behavior >= self.weakest

    def bucket_of(self, history: Record, wanted: np.ndarray) -> int:
        """The length that a history is padded to."""
        return bucket(self.buckets, int(self.kept(history, wanted).sum()))

    def read(self, history: Record, wanted: np.ndarray, size: int | None = None) -> dict[str, np.ndarray]:
        """The arrays of a history, all of which was before the question, without those of a query.

        size: the length S; None: `bucket_of` it.
        """
        kept = np.flatnonzero(self.kept(history, wanted))
        times = history["timestamp"]
        # Sessions may overlap in time, and events are stored by session.
        kept = kept[np.argsort(times[kept], kind="stable")]
        size = bucket(self.buckets, len(kept)) if size is None else size
        kept = kept[::-1][:size]
        now = int(history.get("now", times.max(initial=0)))
        age = np.log2(1.0 + np.maximum(now - times[kept], 0)).astype(np.int32)
        return {
            "seen_item": padded(history["item"][kept], size),
            "seen_behavior": padded(history["behavior"][kept], size),
            "seen_age": padded(np.minimum(age, AGES - 1), size),
            "seen_mask": np.arange(size) < len(kept),
            "asked_day": np.int32(now // DAY),
            "asking_user": user_of(history),
        }

    def of_query(self, vector: np.ndarray | None, items: np.ndarray, told: np.ndarray, width: int) -> dict:
        """The arrays of a query: its embedding float32 [width], or None without a query, and `QueryItems.before`."""
        return {
            "query_vector": np.zeros(width, np.float32) if vector is None else vector.astype(np.float32),
            "asked": np.bool_(vector is not None),
            "led_item": padded(items, self.led, NONE),
            "led": padded(told, self.led, dtype=np.float32) if len(told) else np.zeros((self.led, TOLD), np.float32),
        }


@dataclass(frozen=True)
class LabelConfig:
    """What was shown and what followed, by the names of behaviors."""

    exposure: str = "exposure"
    """the weakest behavior of an item that was shown; one that the log doesn't have: items that were not taken are
    drawn in place of those that were shown"""
    click: str = "click"
    """the weakest behavior of an item that was clicked"""
    purchase: str = "purchase"
    """the weakest behavior of an item that was bought"""
    candidates: int = 32
    """candidates L of a context; of more, so many are drawn"""
    sampled: int | None = None
    """candidates of a context that are drawn and count as shown and not clicked; None: half of them where the log has
    no exposures, else none"""
    sampled_power: float = 0.5
    """they are drawn by their popularity to this power; 0 for all alike"""
    sessions: int = 0
    """only so many last sessions of each user, or searches, are trained on; 0 for all"""

    def __post_init__(self):
        check_least(self, "ranking.labels", candidates=1, sampled_power=0, sessions=0)
        if self.sampled is not None and not 0 <= self.sampled < self.candidates:
            raise UserError(
                f"configuration key 'ranking.labels.sampled' is {self.sampled}; give 0 or more, below "
                f"ranking.labels.candidates, {self.candidates}"
            )


@dataclass(frozen=True)
class Labels:
    """`LabelConfig` in a log with these behaviors; an index is None where the log doesn't have the behavior."""

    exposure: int | None
    click: int | None
    purchase: int | None
    candidates: int
    sampled: int
    """candidates that are drawn"""

    @classmethod
    def of(cls, config: LabelConfig, behaviors: tuple[str, ...]) -> "Labels":
        """The indices of the behaviors.

        Raises:
          UserError: the log has neither clicks nor purchases, or they are out of order.
        """
        found = {
            name: behaviors.index(getattr(config, name)) if getattr(config, name) in behaviors else None
            for name in ("exposure", "click", "purchase")
        }
        known = ", ".join(behaviors)
        if found["click"] is None and found["purchase"] is None:
            raise UserError(
                f"configuration keys 'ranking.labels.click' and 'ranking.labels.purchase' are {config.click!r} and "
                f"{config.purchase!r}, and the log has neither; it has {known}"
            )
        order = [(name, place) for name, place in found.items() if place is not None]
        for (weaker, low), (stronger, high) in itertools.pairwise(order):
            if low >= high:
                raise UserError(
                    f"configuration key 'ranking.labels.{stronger}' is {behaviors[high]!r}, which is not stronger than "
                    f"ranking.labels.{weaker}, {behaviors[low]!r}; the behaviors from weak to strong are {known}"
                )
        sampled = config.sampled
        if sampled is None:
            sampled = config.candidates // 2 if found["exposure"] is None else 0
        return cls(**found, candidates=config.candidates, sampled=sampled)

    @property
    def weakest(self) -> int:
        """The weakest behavior of an impression, or of what was taken where there are no exposures."""
        return min(each for each in (self.exposure, self.click, self.purchase) if each is not None)

    def impressions(self, record: Record, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The distinct items int32 [n] of the events in `where` bool [T] that are impressions, and the strongest
        behavior with each, int8 [n]."""
        shown = where & (record["behavior"] >= self.weakest)
        items, place = np.unique(record["item"][shown], return_inverse=True)
        strongest = np.zeros(len(items), np.int8)
        np.maximum.at(strongest, place, record["behavior"][shown])
        return items.astype(np.int32), strongest

    def example(
        self, items: np.ndarray, strongest: np.ndarray, drawn: np.ndarray, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """candidate int32 [L], candidate_behavior int32 [L] (-1: drawn) and candidate_where bool [L].

        items, strongest: `impressions`; of more than fit, some are drawn evenly, so that shares of clicks stay as they
        are. drawn int32 [n]: items drawn in place of what was shown; those among the impressions are left out.
        """
        room = self.candidates - self.sampled
        if len(items) > room:
            some = np.sort(rng.permutation(len(items))[:room])
            taken, behavior = items[some], strongest[some]
        else:
            taken, behavior = items, strongest
        others = drawn[~np.isin(drawn, items)]
        both = np.concatenate([taken, others])
        return {
            "candidate": padded(both, self.candidates),
            "candidate_behavior": padded(np.concatenate([behavior, np.full(len(others), NONE)]), self.candidates, NONE),
            "candidate_where": np.arange(self.candidates) < len(both),
        }
