"""Cleaning: repeats inside a session, and the k-core of a log."""

from dataclasses import dataclass

import ibis
from ibis import _
from ibis.backends import BaseBackend

from jaxrec.config import UserError
from jaxrec.data.tables import count_rows, store


@dataclass(frozen=True)
class KCore:
    """Which items and users have enough events to be learnt from. Zero sets no limit."""

    min_users_per_item: int = 0
    """Items with target events of fewer users are dropped."""
    min_sessions_per_user: int = 0
    """Users with fewer sessions that hold a target event are dropped."""
    rounds: int = 0
    """How often items, then users, are dropped; 0 until nothing changes."""


def drop_repeats(events: ibis.Table) -> ibis.Table:
    """Keeps the first of the events with equal (user_id, session_id, item_id, behavior) and, if known, search_id."""
    keys = ["user_id", "session_id", "item_id", "behavior", *(["search_id"] if "search_id" in events.columns else [])]
    # The columns that are not keys make the order of events at one time definite.
    further = sorted(set(events.columns) - {*keys, "timestamp"})
    if not further:
        return events.group_by(keys).agg(timestamp=_.timestamp.min())
    first = ibis.row_number().over(group_by=keys, order_by=["timestamp", *further])
    return events.mutate(_repeat=first).filter(_._repeat == 0).drop("_repeat")


def k_core(engine: BaseBackend, events: ibis.Table, config: KCore) -> tuple[ibis.Table, ibis.Table]:
    """The items and users that remain when those with too few target events are dropped, in turns.

    Args:
      engine: where intermediate results are kept.
      events: target events with user_id, item_id, session_id.
      config: the limits.

    Returns:
      Tables of one column each: item_id, user_id.

    Raises:
      UserError: nothing remains.
    """
    left = store(engine, events.select("user_id", "item_id", "session_id").distinct())
    size, turn = count_rows(left), 0
    while turn < config.rounds or config.rounds == 0:
        items = left.group_by("item_id").having(_.user_id.nunique() >= config.min_users_per_item).agg(n=_.count())
        left = store(engine, left.semi_join(items, "item_id"))
        users = left.group_by("user_id").having(_.session_id.nunique() >= config.min_sessions_per_user).agg(n=_.count())
        left = store(engine, left.semi_join(users, "user_id"))
        turn, before, size = turn + 1, size, count_rows(left)
        if size == before:
            break
    if size == 0:
        raise UserError(
            f"no event is left after dropping items with fewer than {config.min_users_per_item} users and users with "
            f"fewer than {config.min_sessions_per_user} sessions; lower min_users_per_item or min_sessions_per_user"
        )
    return left.select("item_id").distinct(), left.select("user_id").distinct()
