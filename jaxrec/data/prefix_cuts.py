"""Suggestions for logs of whole queries: prefixes cut from the searches, once the splits are known.

    search      u1 12:00:00  "Xbox 360"                    led to a purchase
    suggestions u1 11:59:59  "xbo"  "Xbox 360"   order     of the search itself
                u1 11:59:59  "xbo"  "xbox live"  show      what the most popular completion would have shown
                u1 11:59:59  "xbo"  "xbox kinect" not_show
                u1 11:59:59  "xbo"  "halo"       random

Nobody typed these prefixes and nobody saw these lists. The normalised query is cut (`jaxrec.data.words`), so that every
prefix begins what it was cut from. Only training has queries that were not chosen, and only the searches of training
are counted for them: validation and test hold the chosen query alone.
"""

import zlib
from dataclasses import dataclass
from typing import Literal

import ibis
import pyarrow as pa
from ibis import _
from ibis.backends import BaseBackend

from jaxrec.config import UserError, check_choice, check_least
from jaxrec.data.queries import EVENT, SEARCH, part_of
from jaxrec.data.tables import CHOSEN, RawTables, count_rows, mix, scratch, store
from jaxrec.data.words import normalised

LEAST = 2
"""Characters of the shortest prefix."""
TYPED_BEFORE = 1
"""Seconds from a prefix to its search."""
_SPARE = 4
"""Further draws for each random query, in place of those that are in the list already."""
_LIST = ["user_id", "session", "timestamp", "prefix"]


@dataclass(frozen=True)
class PrefixCutConfig:
    """How suggestions are derived from whole queries."""

    cut: Literal["random", "keystrokes"] = "random"
    """random: one prefix a search, of 2 characters up to all but one; keystrokes: every such prefix."""
    shown: int = 4
    """Most popular completions of a training prefix with feedback `show`."""
    not_shown: int = 2
    """The next completions, with feedback `not_show`."""
    random: int = 1
    """Other training queries of a training prefix with feedback `random`, drawn uniformly."""
    last_sessions: int = 0
    """Sessions of each user that get prefixes, the last ones with a search; 0 for all."""
    orders: tuple[str, ...] = ("purchase", "coupon_purchase")
    """Behaviors that make a search's feedback `order`."""
    exposures: tuple[str, ...] = ("pseudo_exposure", "exposure")
    """Behaviors that say nothing of the user's reaction; any other one makes the feedback `item_click`."""
    seed: int = 0
    """Seed of the cuts and of the random queries."""

    def __post_init__(self):
        place = "prepare.suggestions"
        check_choice(self, place, "cut", ("random", "keystrokes"))
        check_least(self, place, shown=0, not_shown=0, random=0, last_sessions=0, seed=0)


def check_can_cut(source: str, raw: RawTables) -> None:
    """UserError where a log has no searches to cut, or brings suggestions of its own."""
    if raw.suggestions is not None:
        raise UserError(
            f"{source} has suggestions of its own, which are not replaced by derived ones; set prepare.suggestions to "
            "None"
        )
    if raw.searches is None:
        raise UserError(
            f"{source} has no searches that prepare.suggestions could cut; give it searches, or set it to None"
        )


def cut_prefixes(
    engine: BaseBackend, activity: ibis.Table, config: PrefixCutConfig, dropped: dict[str, int]
) -> ibis.Table:
    """The derived suggestions: user_id, session, split, timestamp, prefix, query, feedback.

    The result depends on the rows alone, not on their order. A query is written as it was typed, one that was not
    chosen as it was typed most often in training.

    Args:
      engine: where intermediate results are kept.
      activity: the result of `jaxrec.data.queries.join_activity` with the columns `session` and `split`.
      config: how prefixes are cut.
      dropped: searches that are too short are counted here.

    Raises:
      UserError: no search is long enough.
    """
    with scratch(engine) as keep:
        searches = part_of(activity, SEARCH, ["user_id", "session", "split", "timestamp", "query", "search_id"])
        queries = keep(_texts_of(engine, searches))
        cut = _last_sessions(searches, config.last_sessions)
        cut = keep(_with_feedback(cut.inner_join(queries, "query"), activity, config))
        cuts = _cut(cut.inner_join(keep(_hashed_users(engine, cut)), "user_id"), config)
        keys = ["user_id", "session", "split", "timestamp", "prefix", "query"]
        # A query that was searched twice in one second is one choice, with its stronger feedback.
        chosen = keep(cuts.group_by(keys).agg(level=_.level.min(), text=_.text.min(), chance=_.chance.min()))
        dropped["search too short for a prefix"] = count_rows(cut.filter(_.text.length() <= LEAST))
        if not count_rows(chosen):
            raise UserError(
                f"no search has more than {LEAST} characters, so prepare.suggestions has nothing to cut; "
                "set it to None, or use another log"
            )
        feedback = ibis.cases(*((_.level == level, name) for level, name in enumerate(CHOSEN)), else_="")
        parts = [chosen.mutate(feedback=feedback).select(*keys, "feedback")]
        train = keep(chosen.filter(_.split == "train"))
        known = keep(_known(searches.filter(_.split == "train").inner_join(queries, "query")))
        lists = keep(train.group_by(_LIST).agg(chance=_.chance.min(), size=_.text.nunique()))
        recalled = keep(_recalled(lists, train, known, config))
        others = [recalled, _drawn(lists, train, recalled, known, config)] if config.random else [recalled]
        parts += [part.mutate(split=ibis.literal("train")).select(*keys, "feedback") for part in others]
        return store(engine, ibis.union(*parts))


def _texts_of(engine: BaseBackend, searches: ibis.Table) -> ibis.Table:
    """query, text (normalised), number (an integer made of the text) of the distinct queries."""
    queries = searches.select("query").distinct().to_pyarrow()["query"].to_pylist()
    texts = [normalised(query) for query in queries]
    numbers = pa.array([zlib.crc32(text.encode()) for text in texts], pa.int64())
    return store(engine, pa.table({"query": queries, "text": texts, "number": numbers}))


def _hashed_users(engine: BaseBackend, rows: ibis.Table) -> ibis.Table:
    """user_id, user_number (an integer made of the id)."""
    users = rows.select("user_id").distinct().to_pyarrow()["user_id"].to_pylist()
    numbers = pa.array([zlib.crc32(user.encode()) for user in users], pa.int64())
    return store(engine, pa.table({"user_id": users, "user_number": numbers}))


def _last_sessions(searches: ibis.Table, count: int) -> ibis.Table:
    if not count:
        return searches
    place = ibis.dense_rank().over(group_by="user_id", order_by=ibis.desc("session"))
    return searches.mutate(_place=place).filter(_._place < count).drop("_place")


def _with_feedback(searches: ibis.Table, activity: ibis.Table, config: PrefixCutConfig) -> ibis.Table:
    """Adds `level`, the place in CHOSEN; of events of the search's own split, since a later one is not known yet."""
    reactions = part_of(activity, EVENT, ["search_id", "split", "behavior"])
    reactions = reactions.filter(_.search_id.notnull() & ~_.behavior.isin(config.exposures))
    weaker = ibis.ifelse(_.behavior.isin(config.orders), CHOSEN.index("order"), CHOSEN.index("item_click"))
    reactions = reactions.group_by(["search_id", "split"]).agg(level=weaker.min())
    joined = searches.left_join(reactions, ["search_id", "split"])
    return joined.mutate(level=_.level.fill_null(CHOSEN.index("click"))).select(*searches.columns, "level")


def _cut(searches: ibis.Table, config: PrefixCutConfig) -> ibis.Table:
    """One row a prefix: adds `prefix` and `chance`, an integer that is drawn for the search; moves the time."""
    searches = searches.mutate(chance=mix(config.seed, _.user_number, _.timestamp, _.number))
    searches = searches.filter(_.text.length() > LEAST)
    length = searches.text.length().cast("int64")
    if config.cut == "random":
        searches = searches.mutate(end=LEAST + searches.chance % (length - LEAST))
    else:
        searches = searches.mutate(end=ibis.range(LEAST, length).unnest())
    return searches.mutate(
        prefix=_.text.substr(0, _.end), timestamp=ibis.greatest(_.timestamp - TYPED_BEFORE, ibis.literal(0, "int64"))
    )


def _known(searches: ibis.Table) -> ibis.Table:
    """The texts of training: text, n (its sessions), query (its most frequent writing), place (by text, from 0).

    A session counts once, as in `jaxrec.data.completions`: paging through results is no further demand.
    """
    sessions = searches.select("text", "user_id", "session").distinct().group_by("text").agg(n=_.count())
    writings = searches.group_by(["text", "query"]).agg(times=_.count())
    first = ibis.row_number().over(group_by="text", order_by=[ibis.desc("times"), "query"])
    known = writings.mutate(first=first).filter(_["first"] == 0).inner_join(sessions, "text")
    return known.select("text", "query", "n", place=ibis.row_number().over(order_by="text"))


def _recalled(lists: ibis.Table, train: ibis.Table, known: ibis.Table, config: PrefixCutConfig) -> ibis.Table:
    """The most popular completions of every list, but for what was chosen: the list, text, query, feedback."""
    count = config.shown + config.not_shown
    most = count + int(lists["size"].max().to_pyarrow().as_py() or 0)
    begun = known.mutate(end=ibis.range(LEAST, known.text.length().cast("int64") + 1).unnest())
    begun = begun.mutate(prefix=_.text.substr(0, _.end)).semi_join(lists, "prefix")
    order = ibis.row_number().over(group_by="prefix", order_by=[ibis.desc("n"), "text"])
    completions = begun.mutate(order=order).filter(_.order < most).select("prefix", "text", "query", "order")
    rows = lists.inner_join(completions, "prefix").anti_join(train, [*_LIST, "text"])
    rows = rows.mutate(order=ibis.row_number().over(group_by=_LIST, order_by="order")).filter(_.order < count)
    feedback = ibis.ifelse(_.order < config.shown, "show", "not_show")
    return rows.select(*_LIST, "text", "query", feedback=feedback)


def _drawn(
    lists: ibis.Table, train: ibis.Table, recalled: ibis.Table, known: ibis.Table, config: PrefixCutConfig
) -> ibis.Table:
    """Training queries drawn for every list, but for what it holds: the list, query, feedback."""
    draws = ibis.range(0, config.random + _SPARE).unnest().name("draw").as_table()
    chance = mix(config.seed + 1, _.chance, _.prefix.length().cast("int64"), _.draw)
    rows = lists.cross_join(draws).mutate(place=chance % count_rows(known))
    rows = rows.group_by([*_LIST, "place"]).agg(draw=_.draw.min()).inner_join(known, "place")
    rows = rows.anti_join(train, [*_LIST, "text"]).anti_join(recalled, [*_LIST, "text"])
    rows = rows.mutate(order=ibis.row_number().over(group_by=_LIST, order_by="draw")).filter(_.order < config.random)
    return rows.select(*_LIST, "query", feedback=ibis.literal("random"))
