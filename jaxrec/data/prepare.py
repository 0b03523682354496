"""Preparation: a source's raw tables become the cleaned, indexed and split tables of a run directory."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.compute as pc
from ibis import _

from jaxrec.config import UserError, to_json
from jaxrec.console import progress
from jaxrec.data.cleaning import KCore, drop_repeats, k_core
from jaxrec.data.item_texts import texts_from_queries
from jaxrec.data.pairs import PairConfig, build_pairs
from jaxrec.data.prefix_cuts import PrefixCutConfig, check_can_cut, cut_prefixes
from jaxrec.data.prepare_report import print_report
from jaxrec.data.queries import (
    EVENT,
    count_kinds,
    has_queries,
    join_activity,
    judgment_table,
    part_of,
    query_tables,
    search_rows,
)
from jaxrec.data.splits import TimeSplit, assign_splits, number_sessions
from jaxrec.data.tables import RawTables, Source, count_rows, spilling_into, store, write_table


@dataclass(frozen=True)
class PrepareConfig:
    """How raw tables are cleaned, split and paired."""

    k_core: KCore = field(default_factory=KCore)
    """Limits on rare items and users, in addition to the rows that the source drops."""
    time_split: TimeSplit = field(default_factory=TimeSplit)
    """Boundaries, for sources that are split by time."""
    pairs: PairConfig = field(default_factory=PairConfig)
    """Item pairs."""
    answer_time: bool | None = None
    """Whether models know the start time of the session that they predict, or only the time of the event before. None:
    True, since a server knows the time of a request, but False with leave_one_out: there the start time is the time of
    the predicted event itself, and events of one day say much about one another."""
    suggestions: PrefixCutConfig | None = None
    """How suggestions are derived from the searches of a log that has none; None: the log's own alone."""

    def inputs(self) -> dict[str, Any]:
        """What the tables depend on; `suggestions` counts where it is given, since earlier runs know no such field."""
        values = to_json(self)
        if self.suggestions is None:
            del values["suggestions"]
        return values


def tells_answer_time(source: Source, config: PrepareConfig) -> bool:
    """Whether models know the start time of the session that they predict (`PrepareConfig.answer_time`)."""
    return source.split != "leave_one_out" if config.answer_time is None else config.answer_time


def prepare(source: Source, config: PrepareConfig, folder: Path) -> dict[str, Any]:
    """Writes the tables of `source` into an existing folder; see `jaxrec.data.tables` for the files.

    At the end, a table on the screen says what was read, dropped and kept (`jaxrec.data.prepare_report`).

    Returns:
      The content of statistics.json.

    Raises:
      UserError: the source can't be read, or nothing is left of it.
    """
    with spilling_into(folder / ".duckdb"), progress() as bars:
        task = bars.add_task(f"Preparing {type(source).__name__}: reading", total=5)
        raw = source.load()
        if config.suggestions is not None:
            check_can_cut(type(source).__name__, raw)
        engine, dropped = raw.engine, dict(raw.dropped)
        # Large tables are freed as soon as the next one is made, so that two of them are the most there ever are.
        bars.update(task, advance=1, description="Preparing: cleaning and splitting")
        events = store(engine, _clean(raw, source, config, dropped), instead_of=raw.events)
        events, activity = _split(raw, events, source, config, dropped)
        bars.update(task, advance=1, description="Preparing: items and users")
        items = _items(raw, events, source, config)
        users = _users(raw, events if activity is None else activity)
        facts = dict(raw.facts)
        if raw.query_texts:
            items, facts["items_without_text"] = _with_texts(raw, items, events, source)
        cuts = None
        if config.suggestions is not None:
            cuts = cut_prefixes(engine, activity, config.suggestions, dropped)
            facts["suggestions_cut_from_searches"] = config.suggestions.cut
        queries = None if activity is None else query_tables(engine, raw, activity, users, cuts)
        events = store(engine, _index(raw, events, items, users), instead_of=events)
        train = events.filter((_.split == "train") & _.behavior.isin(source.target_behaviors))
        counts = train.group_by("item").agg(n=_.count()).to_pyarrow()
        counts = pa.array(_scatter(counts["item"], counts["n"], items.num_rows), pa.int64())
        items = items.append_column("count", counts)
        bars.update(task, advance=1, description="Preparing: pairs of items")
        pairs = build_pairs(engine, train, config.pairs)
        bars.update(task, advance=1, description="Preparing: writing")
        files = {} if queries is None else queries.files()
        if raw.judgments is not None:
            files["judgments"] = judgment_table(engine, raw, queries, items, dropped)
        statistics = _statistics(source, facts, events, items, users, pairs, {k: n for k, n in dropped.items() if n})
        statistics["answer_time"] = tells_answer_time(source, config)
        if queries is not None:
            statistics |= {name: table.num_rows for name, table in files.items()}
            events = search_rows(engine, events, queries.searches)
        _write(folder, raw, items=items, users=users, pairs=pairs, events=_sorted_events(events), **files)
        (folder / "statistics.json").write_text(json.dumps(statistics, indent=2) + "\n")
        bars.update(task, advance=1, description=f"Prepared {items.num_rows:,} items, {users.num_rows:,} users")
    print_report(statistics)
    return statistics


def survey(source: Source, config: PrepareConfig) -> dict[str, Any]:
    """What `prepare` would count, without its pairs and its files: nothing is written.

    Returns:
      As statistics.json, and `item_columns`, {column: type} of the items; `train_targets`, `train_sessions`: events of
      the target behaviors in training, and the sessions that hold them; `attribute_values`: {column: distinct values}
      of the columns of words.

    Raises:
      UserError: as `prepare`.
    """
    raw = source.load()
    dropped = dict(raw.dropped)
    events = store(raw.engine, _clean(raw, source, config, dropped), instead_of=raw.events)
    events, activity = _split(raw, events, source, config, dropped)
    items = _items(raw, events, source, config)
    users = _users(raw, events if activity is None else activity)
    events = store(raw.engine, _index(raw, events, items, users), instead_of=events)
    statistics = _statistics(
        source, dict(raw.facts), events, items, users, None, {k: n for k, n in dropped.items() if n}
    )
    train = events.filter((_.split == "train") & _.behavior.isin(source.target_behaviors))
    words = [field.name for field in items.schema if pa.types.is_string(field.type)]
    return statistics | {
        "train_targets": count_rows(train),
        "train_sessions": count_rows(train.select("user", "session").distinct()),
        "item_columns": {field.name: str(field.type) for field in items.schema},
        "attribute_values": {name: pc.count_distinct(items[name]).as_py() for name in words},
    }


def _users(raw: RawTables, activity: ibis.Table) -> pa.Table:
    """user_id of all users in the order of their indices, with the columns of their profiles where there are any."""
    users = activity.select("user_id").distinct()
    if raw.profiles is not None:
        further = [name for name in raw.profiles.columns if name != "user_id"]
        users = users.left_join(raw.profiles, "user_id").select("user_id", *further)
    return users.order_by("user_id").to_pyarrow()


def _with_texts(raw: RawTables, items: pa.Table, events: ibis.Table, source: Source) -> tuple[pa.Table, int]:
    """Items with texts of their queries, and how many got none; of events that are predicted, in training."""
    clicked = events.filter((_.split == "train") & _.behavior.isin(source.target_behaviors) & _.search_id.notnull())
    return texts_from_queries(items, clicked.select("item_id", "search_id"), raw.searches, raw.query_texts)


def _write(folder: Path, raw: RawTables, **tables: pa.Table) -> None:
    extra = {name: table.order_by(table.columns[:2]).to_pyarrow() for name, table in raw.extra.items()}
    for name, table in {**tables, **extra}.items():
        write_table(table, folder / f"{name}.parquet")


def _split(
    raw: RawTables, events: ibis.Table, source: Source, config: PrepareConfig, dropped: dict[str, int]
) -> tuple[ibis.Table, ibis.Table | None]:
    """The events with `session`, `strength` and `split`; and all activity with these columns, where there are queries.

    Sessions are numbered and split over all activity (`jaxrec.data.queries.join_activity`), which holds the events too.
    """
    engine, names = raw.engine, [name for name in events.columns if name != "given_split"]
    rows = events
    if has_queries(raw):
        # The limits of the k-core are on users with target events; a user beyond them is dropped altogether.
        users = events.select("user_id").distinct() if config.k_core != KCore() else None
        rows = store(engine, join_activity(raw, events, users), instead_of=events)
    rows = store(engine, number_sessions(rows, source), instead_of=rows)
    before = count_kinds(rows)
    rows = store(engine, assign_splits(engine, rows, source, config.time_split), instead_of=rows)
    after = count_kinds(rows)
    for kind, count in before.items():
        of = "" if kind == EVENT else f"{kind} "
        dropped[f"{of}after the last target"] = count - after.get(kind, 0)
    if not has_queries(raw):
        return rows, None
    return store(engine, part_of(rows, EVENT, [*names, "session", "strength", "split"])), rows


def _clean(raw: RawTables, source: Source, config: PrepareConfig, dropped: dict[str, int]) -> ibis.Table:
    """The events of known items, without repeats, inside the k-core; none of a log without events."""
    size = count_rows(raw.events)
    if not source.target_behaviors and has_queries(raw):
        if config.k_core != KCore():
            raise UserError(
                f"{type(source).__name__} has no events, by which prepare.k_core drops items and users; set its limits "
                "to 0"
            )
        return raw.events
    if size == 0:
        raise UserError(f"{type(source).__name__} gave no events; check its path and its limits")
    events = store(raw.engine, drop_repeats(raw.events.semi_join(raw.items, "item_id")))
    known = count_rows(raw.events.semi_join(raw.items, "item_id"))
    dropped["event of an unknown item"] = dropped.get("event of an unknown item", 0) + size - known
    clean = count_rows(events)
    dropped["repeat inside a session"] = known - clean
    targets = events.filter(_.behavior.isin(source.target_behaviors))
    if config.k_core != KCore():
        items, users = k_core(raw.engine, targets, config.k_core)
        left = events.semi_join(users, "user_id")
        if config.k_core.min_users_per_item:
            left = left.semi_join(items, "item_id")
        events = store(raw.engine, left, instead_of=events)
        dropped["rare item or user"] = clean - count_rows(events)
    if count_rows(events.filter(_.behavior.isin(source.target_behaviors))) == 0:
        raise UserError(
            f"the log holds no event of the behaviors that are predicted ({', '.join(source.target_behaviors)})"
        )
    return events


def _items(raw: RawTables, events: ibis.Table, source: Source, config: PrepareConfig) -> pa.Table:
    """The catalogue in the order of its indices; without a limit on users per item, it keeps items without events."""
    items = raw.items
    if config.k_core.min_users_per_item:
        items = items.semi_join(events.filter(_.behavior.isin(source.target_behaviors)), "item_id")
    return items.order_by("item_id").to_pyarrow()


def _index(raw: RawTables, events: ibis.Table, items: pa.Table, users: pa.Table) -> ibis.Table:
    """Adds the int32 columns user and item."""
    engine = raw.engine
    for key, name, table in (("user_id", "user", users), ("item_id", "item", items)):
        index = pa.table({key: table[key], name: pa.array(range(table.num_rows), pa.int32())})
        events = events.inner_join(store(engine, index), key)
    return events


def _sorted_events(events: ibis.Table) -> pa.Table:
    columns = ["user", "item", "user_id", "item_id", "timestamp", "behavior", "session", "split"]
    extra = sorted(set(events.columns) - {*columns, "session_id", "strength"})
    order = ["user", "session", "timestamp", "strength", "item"]
    table = events.order_by([*order, *extra]).select(*columns, *extra).to_pyarrow()
    return table.set_column(columns.index("session"), "session", table["session"].cast(pa.int32()))


def _scatter(index: pa.ChunkedArray, values: pa.ChunkedArray, size: int) -> list[int]:
    result = [0] * size
    for place, value in zip(index.to_pylist(), values.to_pylist(), strict=True):
        result[place] = value
    return result


def _statistics(
    source: Source,
    facts: dict[str, Any],
    events: ibis.Table,
    items: pa.Table,
    users: pa.Table,
    pairs: pa.Table | None,
    dropped: dict[str, int],
) -> dict[str, Any]:
    def counts(column: str) -> dict[str, int]:
        rows = events.group_by(column).agg(n=_.count()).to_pyarrow().to_pylist()
        return {row[column]: row["n"] for row in rows}

    targets = events.filter(_.behavior.isin(source.target_behaviors))
    by_behavior, by_split = counts("behavior"), counts("split")
    kinds = () if pairs is None else ("itemcf", "swing")
    sessions = targets.group_by("user").agg(n=_.session.nunique())
    sessions = sessions.group_by("n").agg(users=_.count()).order_by("n").to_pyarrow().to_pylist()
    with_targets = sum(row["users"] for row in sessions)
    few = {str(row["n"]): row["users"] for row in sessions if row["n"] < 3}
    return {
        "source": type(source).__name__,
        "behaviors": list(source.behaviors),
        "target_behaviors": list(source.target_behaviors),
        "split": source.split,
        "users": users.num_rows,
        "items": items.num_rows,
        "events": sum(by_behavior.values()),
        "target_events": count_rows(targets),
        "target_sessions": count_rows(targets.select("user", "session").distinct()),
        "test_users": count_rows(targets.filter(_.split == "test").select("user").distinct()),
        "events_by_behavior": {name: by_behavior.get(name, 0) for name in source.behaviors},
        "events_by_split": {name: by_split.get(name, 0) for name in ("train", "valid", "test")},
        "users_by_target_sessions": {
            "0": users.num_rows - with_targets,
            **few,
            "3 or more": with_targets - sum(few.values()),
        },
        "pairs_by_kind": {kind: pc.sum(pc.equal(pairs["kind"], kind)).as_py() or 0 for kind in kinds},
        "dropped": dropped,
        **facts,
    }
