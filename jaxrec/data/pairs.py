"""Pairs of items that belong together: ItemCF and Swing (the Item2Item data of OneMall §3.1.1).

Counting is ibis, so that a warehouse can do it; only the greedy cap at the end, sequential by nature, is a loop.
Scores are put together from integers, so they don't depend on the order in which threads add.
"""

from dataclasses import dataclass
from typing import Literal

import ibis
import numpy as np
import pyarrow as pa
from ibis import _
from ibis.backends import BaseBackend

from jaxrec.data.tables import mix, store

# Swing adds weights of at most 1 / alpha as integers of this unit: exact, and far from overflow for 10^9 user pairs.
_UNIT = 1 << 30


@dataclass(frozen=True)
class PairConfig:
    """Which pairs are kept, and how much work is spent on frequent items."""

    max_pairs_per_item: int = 40
    """An item is in at most this many pairs of a kind, counting both ends (OneMall §3.1.1)."""
    itemcf_within: Literal["session", "user", "auto"] = "auto"
    """What two items must share to count as co-occurring; auto: the session, or the user if sessions hold one event."""
    min_common: int = 2
    """Pairs that share fewer sessions (or users) are dropped."""
    candidates_per_item: int = 48
    """Nearest items by ItemCF (within users, for Swing) that take part in the cap and, for Swing, are scored at all."""
    swing_alpha: float = 1.0
    """Smoothing in Swing's 1 / (alpha + common items)."""
    max_items_per_group: int = 200
    """Items of one session or user that are counted; where there are more, a fixed pseudo-random part."""
    max_users_per_pair: int = 12
    """Common users of two items that Swing compares; where there are more, a fixed pseudo-random part."""
    seed: int = 0
    """Seed of the pseudo-random parts."""


def build_pairs(engine: BaseBackend, events: ibis.Table, config: PairConfig) -> pa.Table:
    """ItemCF and Swing pairs of a log.

    Args:
      engine: where intermediate results are kept.
      events: the target events of the train split, with int32 columns user, session and item.
      config: limits.

    Returns:
      item int32 < other int32, score float32, kind str ("itemcf", "swing"), sorted by (kind, item, other).
    """
    events = store(engine, events.select("user", "session", "item").distinct())
    within = config.itemcf_within
    if within == "auto":
        sizes = events.group_by(["user", "session"]).agg(n=_.count())
        within = "session" if (sizes.n.max().to_pyarrow().as_py() or 0) > 1 else "user"
    itemcf = itemcf_scores(engine, events, ["user", "session"] if within == "session" else ["user"], config)
    swing = swing_scores(engine, events, itemcf, config)
    parts = [
        _as_pairs(cap_pairs(table.to_pyarrow(), config.max_pairs_per_item), kind)
        for kind, table in (("itemcf", itemcf), ("swing", swing))
    ]
    return pa.concat_tables(parts)


def itemcf_scores(engine: BaseBackend, events: ibis.Table, group: list[str], config: PairConfig) -> ibis.Table:
    """Cosine-normalised co-occurrence, n(i, j) / sqrt(n(i) n(j)), of each item's nearest items.

    Args:
      engine: where intermediate results are kept.
      events: distinct user, session, item.
      group: the columns that say what two items have in common.
      config: limits.

    Returns:
      item, other (item < other), score float64, common int64.
    """
    rows = events.select(*group, "item").distinct()
    order = [mix(config.seed, _.item, *(_[column] for column in group)), "item"]
    rows = rows.mutate(place=ibis.row_number().over(group_by=group, order_by=order))
    rows = store(engine, rows.filter(_.place < config.max_items_per_group).drop("place"))
    counts = rows.group_by("item").agg(n=_.count())
    right = rows.rename(other="item")
    both = rows.inner_join(right, group).filter(_.item < _.other)
    common = both.group_by(["item", "other"]).agg(common=_.count()).filter(_.common >= config.min_common)
    scored = common.inner_join(counts, "item").inner_join(counts.rename(other="item", n_other="n"), "other")
    scored = scored.mutate(score=_.common / (_.n * _.n_other).cast("float64").sqrt())
    return store(engine, nearest(engine, scored.select("item", "other", "score", "common"), config.candidates_per_item))


def nearest(engine: BaseBackend, pairs: ibis.Table, count: int) -> ibis.Table:
    """Pairs that are among the `count` best of at least one of their two items; ties by the other item's index."""
    pairs = store(engine, pairs)
    ends = pairs.select("item", "other", "score").union(pairs.select(item="other", other="item", score="score"))
    ends = ends.mutate(place=ibis.row_number().over(group_by="item", order_by=[ibis.desc("score"), "other"]))
    best = ends.filter(_.place < count)
    keys = best.select(item=ibis.least(_.item, _.other), other=ibis.greatest(_.item, _.other)).distinct()
    return pairs.semi_join(keys, ["item", "other"])


def swing_scores(engine: BaseBackend, events: ibis.Table, candidates: ibis.Table, config: PairConfig) -> ibis.Table:
    """Swing: two items are close when users who share little else share both.

        s(i, j) = sum over user pairs u < v of U_i and U_j of  w_u w_v / (alpha + |I_u and I_v|),  w_u = 1 / sqrt(|I_u|)

    The intersection is of the users' whole item sets (the train split). Only `candidates` are scored, and at most
    `max_users_per_pair` common users of each.

    Args:
      engine: where intermediate results are kept.
      events: distinct user, session, item.
      candidates: item, other.
      config: limits.

    Returns:
      item, other (item < other), score float64.
    """
    users = store(engine, events.select("user", "item").distinct())
    sizes = users.group_by("user").agg(size=_.count())
    common = candidates.select("item", "other").inner_join(users, "item")
    common = common.semi_join(users.rename(other="item"), ["user", "other"])
    order = [mix(config.seed, _.user, _.item, _.other), "user"]
    common = common.mutate(place=ibis.row_number().over(group_by=["item", "other"], order_by=order))
    common = store(engine, common.filter(_.place < config.max_users_per_pair).drop("place"))
    swings = common.inner_join(common.rename(partner="user"), ["item", "other"]).filter(_.user < _.partner)
    swings = store(engine, swings.select("item", "other", "user", "partner"))
    overlap = user_overlap(engine, users, swings.select("user", "partner").distinct())
    weights = overlap.inner_join(sizes, "user").inner_join(sizes.rename(partner="user", size_partner="size"), "partner")
    weights = weights.mutate(
        weight=(_UNIT / ((_.size * _.size_partner).cast("float64").sqrt() * (config.swing_alpha + _.overlap)))
        .round()
        .cast("int64")
    ).select("user", "partner", "weight")
    scored = (
        swings.inner_join(store(engine, weights), ["user", "partner"])
        .group_by(["item", "other"])
        .agg(total=_.weight.sum())
    )
    return store(engine, scored.select("item", "other", score=_.total.cast("float64") / _UNIT))


def user_overlap(engine: BaseBackend, users: ibis.Table, wanted: ibis.Table) -> ibis.Table:
    """The number of items that two users share (user, partner, overlap) for the wanted pairs, which all share some."""
    both = users.inner_join(users.rename(partner="user"), "item").filter(_.user < _.partner)
    counted = both.group_by(["user", "partner"]).agg(overlap=_.count())
    return store(engine, counted.semi_join(wanted, ["user", "partner"]))


def cap_pairs(pairs: pa.Table, limit: int) -> pa.Table:
    """Takes pairs from the best score down while both items are in fewer than `limit`; ties by (item, other).

    Args:
      pairs: item, other, score.
      limit: how often an item may occur, counting both ends.

    Returns:
      The pairs taken, sorted by (item, other).
    """
    item, other, score = (pairs[name].to_numpy() for name in ("item", "other", "score"))
    order = np.lexsort((other, item, -score))
    used = [0] * (int(max(item.max(), other.max())) + 1 if len(item) else 0)
    taken = []
    for index, left, right in zip(order.tolist(), item[order].tolist(), other[order].tolist(), strict=True):
        if used[left] < limit and used[right] < limit:
            used[left] += 1
            used[right] += 1
            taken.append(index)
    taken = np.asarray(taken, np.int64)
    taken = taken[np.lexsort((other[taken], item[taken]))]
    return pa.table({"item": item[taken], "other": other[taken], "score": score[taken]})


def _as_pairs(pairs: pa.Table, kind: str) -> pa.Table:
    types = {"item": pa.int32(), "other": pa.int32(), "score": pa.float32()}
    columns = {name: pairs[name].cast(of) for name, of in types.items()}
    return pa.table({**columns, "kind": pa.array([kind] * pairs.num_rows, pa.string())})
