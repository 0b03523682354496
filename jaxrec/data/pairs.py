"""Pairs of items that belong together: ItemCF and Swing (the Item2Item data of OneMall §3.1.1).

Counting is ibis, so that DuckDB, Spark or a warehouse can do it; only the greedy cap at the end, sequential by nature,
is a loop. Counts and sums are of integers, and what else makes a score (one product, one root, one quotient) is rounded
as IEEE 754 says: scores depend on neither the order in which threads add nor the engine.
"""

from dataclasses import dataclass
from typing import Literal

import ibis
import numpy as np
import pyarrow as pa
from ibis import _
from ibis.backends import BaseBackend

from jaxrec.data.tables import mix, scratch, store

# Swing adds weights of at most 1 / alpha as integers of this unit: exact, and far from overflow for 10^9 user pairs.
_UNIT = 1 << 30


@dataclass(frozen=True)
class PairConfig:
    """Limits on the pairs that are kept, and on the work for frequent items."""

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
    """ItemCF and Swing pairs of a log. Equal on every engine, bit for bit.

    Args:
      engine: where intermediate results are kept, and freed.
      events: the target events of the train split, with int32 columns user, session and item.
      config: limits.

    Returns:
      item int32 < other int32, score float32, kind str ("itemcf", "swing"), sorted by (kind, item, other).
    """
    with scratch(engine) as keep:
        events = keep(events.select("user", "session", "item").distinct())
        within = config.itemcf_within
        if within == "auto":
            sizes = events.group_by(["user", "session"]).agg(n=_.count())
            within = "session" if (sizes.n.max().to_pyarrow().as_py() or 0) > 1 else "user"
        group = ["user", "session"] if within == "session" else ["user"]
        itemcf = keep(itemcf_scores(engine, events, group, config))
        swing = keep(swing_scores(engine, events, itemcf, config))
        parts = [
            _as_pairs(cap_pairs(table.order_by("item", "other").to_pyarrow(), config.max_pairs_per_item), kind)
            for kind, table in (("itemcf", itemcf), ("swing", swing))
        ]
    return pa.concat_tables(parts)


def itemcf_scores(engine: BaseBackend, events: ibis.Table, group: list[str], config: PairConfig) -> ibis.Table:
    """Cosine-normalised co-occurrence, n(i, j) / sqrt(n(i) n(j)), of each item's nearest items.

    Args:
      engine: where the result is kept.
      events: distinct user, session, item.
      group: the columns whose equal values make two items co-occur.
      config: limits.

    Returns:
      item, other (item < other), score float64, common int64.
    """
    with scratch(engine) as keep:
        rows = events.select(*group, "item").distinct()
        order = [mix(config.seed, _.item, *(_[column] for column in group)), "item"]
        rows = rows.mutate(place=ibis.row_number().over(group_by=group, order_by=order))
        rows = keep(rows.filter(_.place < config.max_items_per_group).drop("place"))
        both = rows.inner_join(rows.rename(other="item"), group).filter(_.item < _.other)
        common = both.group_by(["item", "other"]).agg(common=_.count()).filter(_.common >= config.min_common)
        scored = _with_counts(common, rows).mutate(score=_.common / (_.n * _.n_other).cast("float64").sqrt())
        scored = keep(scored.select("item", "other", "score", "common"))
        return store(engine, nearest(scored, config.candidates_per_item))


def nearest(pairs: ibis.Table, count: int) -> ibis.Table:
    """Pairs that are among the `count` best of at least one of their two items; ties by the other item's index."""
    ends = pairs.select("item", "other", "score").union(pairs.select(item="other", other="item", score="score"))
    ends = ends.mutate(place=ibis.row_number().over(group_by="item", order_by=[ibis.desc("score"), "other"]))
    best = ends.filter(_.place < count)
    keys = best.select(item=ibis.least(_.item, _.other), other=ibis.greatest(_.item, _.other)).distinct()
    return pairs.semi_join(keys, ["item", "other"])


def swing_scores(engine: BaseBackend, events: ibis.Table, candidates: ibis.Table, config: PairConfig) -> ibis.Table:
    """Swing: two items are close if users who share few other items share both.

        s(i, j) = sum over user pairs u < v of U_i and U_j of  w_u w_v / (alpha + |I_u and I_v|),  w_u = 1 / sqrt(|I_u|)

    The intersection is of the users' whole item sets (the train split). Only `candidates` are scored, and at most
    `max_users_per_pair` common users of each.

    Args:
      engine: where the result is kept.
      events: distinct user, session, item.
      candidates: item, other.
      config: limits.

    Returns:
      item, other (item < other), score float64.
    """
    with scratch(engine) as keep:
        users = keep(events.select("user", "item").distinct())
        sizes = keep(users.group_by("user").agg(size=_.count()))
        common = common_users(users, candidates.select("item", "other"))
        order = [mix(config.seed, _.user, _.item, _.other), "user"]
        common = common.mutate(place=ibis.row_number().over(group_by=["item", "other"], order_by=order))
        common = keep(common.filter(_.place < config.max_users_per_pair).drop("place"))
        swings = common.inner_join(common.rename(partner="user"), ["item", "other"]).filter(_.user < _.partner)
        swings = keep(swings.select("item", "other", "user", "partner"))
        wanted = keep(_with_sizes(swings.select("user", "partner").distinct(), sizes))
        overlap = _with_sizes(user_overlap(users, wanted), sizes)
        root = (_.size * _.size_partner).cast("float64").sqrt()
        weight = (_UNIT / (root * (config.swing_alpha + _.overlap))).round().cast("int64")
        weights = keep(overlap.select("user", "partner", weight=weight))
        scored = swings.inner_join(weights, ["user", "partner"]).group_by(["item", "other"]).agg(total=_.weight.sum())
        return store(engine, scored.select("item", "other", score=_.total.cast("float64") / _UNIT))


def common_users(users: ibis.Table, pairs: ibis.Table) -> ibis.Table:
    """The users who have both items of a pair (item, other, user).

    Reads the users of the rarer item only, so that the most frequent item costs no more than its partners.

    Args:
      users: distinct user, item.
      pairs: item, other.
    """
    first = _.n <= _.n_other
    pairs = _with_counts(pairs, users).mutate(
        rare=ibis.ifelse(first, _.item, _.other), frequent=ibis.ifelse(first, _.other, _.item)
    )
    common = pairs.select("item", "other", "rare", "frequent").inner_join(users.rename(rare="item"), "rare")
    return common.semi_join(users.rename(frequent="item"), ["user", "frequent"]).select("item", "other", "user")


def user_overlap(users: ibis.Table, wanted: ibis.Table) -> ibis.Table:
    """The number of items that two users share (user, partner, overlap), by the method that reads fewer rows.

    Args:
      users: distinct user, item.
      wanted: user, partner, size, size_partner of pairs that share some item; the sizes count their items.
    """
    by_item = users.group_by("item").agg(n=_.count()).agg(rows=(_.n * (_.n - 1)).sum())
    by_pair = wanted.agg(rows=ibis.least(_.size, _.size_partner).sum())
    by_item, by_pair = (table.rows.to_pyarrow()[0].as_py() or 0 for table in (by_item, by_pair))
    return overlap_by_item(users, wanted) if by_item // 2 < by_pair else overlap_by_pair(users, wanted)


def overlap_by_item(users: ibis.Table, wanted: ibis.Table) -> ibis.Table:
    """`user_overlap` by counting all pairs of users of every item: for few users with many items."""
    both = users.inner_join(users.rename(partner="user"), "item").filter(_.user < _.partner)
    counted = both.group_by(["user", "partner"]).agg(overlap=_.count())
    return counted.semi_join(wanted, ["user", "partner"])


def overlap_by_pair(users: ibis.Table, wanted: ibis.Table) -> ibis.Table:
    """`user_overlap` by looking up the items of one user at the other: one item with n users would cost n^2 above."""
    fewer = _.size <= _.size_partner
    pairs = wanted.select(
        "user", "partner", fewer=ibis.ifelse(fewer, _.user, _.partner), more=ibis.ifelse(fewer, _.partner, _.user)
    )
    both = pairs.inner_join(users.rename(fewer="user"), "fewer")
    both = both.semi_join(users.rename(more="user"), ["more", "item"])
    return both.group_by(["user", "partner"]).agg(overlap=_.count())


def _with_counts(pairs: ibis.Table, rows: ibis.Table) -> ibis.Table:
    """Adds n and n_other: how many of the rows each of the two items is in."""
    counts = rows.group_by("item").agg(n=_.count())
    return pairs.inner_join(counts, "item").inner_join(counts.rename(other="item", n_other="n"), "other")


def _with_sizes(pairs: ibis.Table, sizes: ibis.Table) -> ibis.Table:
    """Adds size and size_partner to pairs of users."""
    return pairs.inner_join(sizes, "user").inner_join(sizes.rename(partner="user", size_partner="size"), "partner")


def cap_pairs(pairs: pa.Table, limit: int) -> pa.Table:
    """Takes pairs from the best score down while both items are in fewer than `limit`; ties by (item, other).

    Args:
      pairs: item, other, score; fastest if sorted by (item, other).
      limit: how often an item may occur, counting both ends.

    Returns:
      The pairs taken, sorted by (item, other).
    """
    if pairs.num_rows == 0:
        return pairs.select(["item", "other", "score"])
    item, other, score = (pairs[name].to_numpy() for name in ("item", "other", "score"))
    key = item.astype(np.int64) * (int(other.max()) + 1) + other
    if not np.all(key[1:] > key[:-1]):
        order = np.argsort(key)
        item, other, score = item[order], other[order], score[order]
    size = int(max(item.max(), other.max())) + 1
    degree = np.bincount(item, minlength=size) + np.bincount(other, minlength=size)
    # An item in few pairs never meets the limit: pairs of two such are taken in any order, without the loop.
    taken = (degree[item] <= limit) & (degree[other] <= limit)
    rest = np.flatnonzero(~taken)
    rest = rest[np.argsort(-score[rest], kind="stable")]
    room = [limit] * size
    for index, left, right in zip(rest.tolist(), item[rest].tolist(), other[rest].tolist(), strict=True):
        if room[left] > 0 and room[right] > 0:
            room[left] -= 1
            room[right] -= 1
            taken[index] = True
    return pa.table({"item": item[taken], "other": other[taken], "score": score[taken]})


def _as_pairs(pairs: pa.Table, kind: str) -> pa.Table:
    types = {"item": pa.int32(), "other": pa.int32(), "score": pa.float32()}
    columns = {name: pairs[name].cast(of) for name, of in types.items()}
    return pa.table({**columns, "kind": pa.array([kind] * pairs.num_rows, pa.string())})
