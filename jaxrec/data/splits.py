"""Sessions, and the split of a user's log into training, validation and test."""

from dataclasses import dataclass

import ibis
from ibis import _
from ibis.backends import BaseBackend

from jaxrec.config import UserError
from jaxrec.data.queries import EVENT
from jaxrec.data.tables import SPLITS, Source, store


@dataclass(frozen=True)
class TimeSplit:
    """Boundaries in time; those in seconds go before those in quantiles."""

    valid_quantile: float = 0.8
    """Validation begins after this share of the target events."""
    test_quantile: float = 0.9
    """Test begins after this share of the target events."""
    valid_from: int | None = None
    """Validation begins at this time (Unix seconds)."""
    test_from: int | None = None
    """Test begins at this time (Unix seconds)."""


def is_target(source: Source) -> ibis.Deferred:
    """Whether a row is predicted: events of the target behaviors are; without such behaviors, all rows."""
    return _.behavior.isin(source.target_behaviors) if source.target_behaviors else _.user_id.notnull()


def number_sessions(events: ibis.Table, source: Source) -> ibis.Table:
    """Adds `session` (0, 1, 2 .. inside a user, in time order) and `strength`, the rank of the behavior.

    The time of a session is that of its first event, since events are what is predicted; the time of a session of
    searches and suggestions alone is that of its first row.

    Leave-one-out holds out single events, so there a session is one target event with the weaker events before it.
    A log without events predicts its searches and suggestions: they count as the events do here and in `assign_splits`.
    """
    strength = ibis.literal(-1)
    if source.behaviors:
        strength = ibis.cases(*((_.behavior == name, rank) for rank, name in enumerate(source.behaviors)), else_=-1)
    events = events.mutate(strength=strength.cast("int32"))
    start = _.timestamp.min()
    if "_kind" in events.columns:
        start = _.timestamp.min(where=_._kind == EVENT).coalesce(start)
    starts = events.group_by(["user_id", "session_id"]).agg(start=start)
    order = ["start", "session_id"]
    starts = starts.mutate(session=ibis.row_number().over(group_by="user_id", order_by=order)).drop("start")
    events = events.inner_join(starts, ["user_id", "session_id"])
    if source.split != "leave_one_out":
        return events
    target = is_target(source).cast("int64")
    order = ["session", "timestamp", "strength", "item_id", *(["query"] if "query" in events.columns else [])]
    before = ibis.window(group_by="user_id", order_by=order, rows=(None, -1))
    return events.mutate(session=target.sum().over(before).fill_null(0))


def assign_splits(engine: BaseBackend, events: ibis.Table, source: Source, config: TimeSplit) -> ibis.Table:
    """Adds `split` in {train, valid, test}, a function of (user, session) that never falls along a user's sessions.

    - leave_one_out, last_session: the last session with a target event is test, the one before it valid. Sessions
      without a target event belong to the split of the next session with one; those after the last are dropped. All
      sessions of users with fewer than three sessions with targets are train.
    - time: a session is valid or test when it, or one before it, ended at or after the boundary. So no event of train
      happens after the boundary.
    - given: the latest split that the source gives (`given_split`) to a row of the session, or of one before it.

    Args:
      engine: where intermediate results are kept.
      events: the result of `number_sessions`.
      source: its target_behaviors and split are read.
      config: the boundaries of a split by time.

    Raises:
      UserError: the boundaries are out of order, or the source gives no splits.
    """
    targets = events.filter(is_target(source))
    if source.split == "given":
        if "given_split" not in events.columns:
            raise UserError(f'{type(source).__name__} gives no splits; set its split to something else than "given"')
        sessions = _split_as_given(events)
        events = events.drop("given_split")
        return events.inner_join(store(engine, sessions), ["user_id", "session"])
    sessions = events.mutate(target=is_target(source)).group_by(["user_id", "session"])
    sessions = store(engine, sessions.agg(end=_.timestamp.max(), target=_.target.any().cast("int64")))
    if source.split == "time":
        sessions = _split_by_time(targets, sessions, config)
    else:
        sessions = _split_last(sessions)
    return events.inner_join(sessions.select("user_id", "session", "split"), ["user_id", "session"])


def _split_last(sessions: ibis.Table) -> ibis.Table:
    so_far = ibis.window(group_by="user_id", order_by="session", rows=(None, 0))
    sessions = sessions.mutate(
        before=_.target.sum().over(so_far) - _.target, total=_.target.sum().over(ibis.window(group_by="user_id"))
    )
    split = ibis.cases(
        ((_.total < 3) | (_.before < _.total - 2), "train"),
        (_.before == _.total - 2, "valid"),
        (_.before == _.total - 1, "test"),
        else_="",
    )
    return sessions.mutate(split=split).filter(_.split != "")


def _split_as_given(events: ibis.Table) -> ibis.Table:
    """user_id, session, split: a user's sessions never fall back to an earlier split."""
    rank = ibis.cases(*((_.given_split == name, rank) for rank, name in enumerate(SPLITS)), else_=0)
    sessions = events.mutate(rank=rank).group_by(["user_id", "session"]).agg(rank=_.rank.max())
    so_far = ibis.window(group_by="user_id", order_by="session", rows=(None, 0))
    split = ibis.cases(*((_.latest == rank, name) for rank, name in enumerate(SPLITS)), else_="")
    sessions = sessions.mutate(latest=_.rank.max().over(so_far)).mutate(split=split)
    return sessions.select("user_id", "session", "split")


def _split_by_time(targets: ibis.Table, sessions: ibis.Table, config: TimeSplit) -> ibis.Table:
    valid_from, test_from = (
        given if given is not None else int(targets.timestamp.quantile(quantile).to_pyarrow().as_py())
        for given, quantile in ((config.valid_from, config.valid_quantile), (config.test_from, config.test_quantile))
    )
    if valid_from > test_from:
        raise UserError(
            f"time_split: validation begins at {valid_from}, after test at {test_from}; "
            "lower valid_from or valid_quantile"
        )
    so_far = ibis.window(group_by="user_id", order_by="session", rows=(None, 0))
    sessions = sessions.mutate(ended=_.end.max().over(so_far))
    return sessions.mutate(
        split=ibis.cases((_.ended >= test_from, "test"), (_.ended >= valid_from, "valid"), else_="train")
    )
