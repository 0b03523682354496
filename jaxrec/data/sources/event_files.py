"""A file of events: its columns, their checks, and the rows of which nothing can be learned.

A row without a user, an item, a time or a behavior is left out and counted; a value that can't be read is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ibis
from ibis.backends import BaseBackend

from jaxrec.config import UserError
from jaxrec.data.sources.behavior_names import check_known, translated
from jaxrec.data.sources.checks import (
    AS_IT_STANDS,
    TimeForm,
    as_number,
    as_seconds,
    as_text,
    check_words,
    choice,
    refuse,
)
from jaxrec.data.sources.column_names import FLAG
from jaxrec.data.sources.formats import Wanted
from jaxrec.data.sources.item_files import SCENARIOS
from jaxrec.data.tables import count_rows, store

OF_ITEMS = ("title", "text", "category", "brand", "price")
"""What events may tell of their items, where there is no table of these."""
EVENTS = Wanted(
    ("user_id", "item_id", "timestamp", "behavior", "session_id", "scenario", "query", "watch_seconds", "search_id",
     "rating"),
    required=("user_id", "item_id", "timestamp", "behavior"),
    ids=("user_id", "item_id", "session_id", "search_id"),
    numbers=("watch_seconds", "rating", "price"),
)  # fmt: skip


@dataclass(frozen=True)
class EventForm:
    """How a log tells what happened."""

    behaviors: tuple[str, ...]
    """All behaviors, from weak to strong; without a column `behavior` all events are of the strongest."""
    words: tuple[str, ...] = ()
    """WORD=BEHAVIOR of every word of the column; empty: its words are the behaviors."""
    times: TimeForm = AS_IT_STANDS
    """How times are written."""
    least_rating: float | None = None
    """Events with a lower rating are left out; None: none."""


class TypedEvents(NamedTuple):
    """The checked events of a file."""

    table: ibis.Table
    """user_id, item_id, behavior, timestamp, session_id or null, `_row` and, where the file has them, scenario,
    watch_seconds, search_id, query"""
    told: ibis.Table
    """item_id, timestamp, `_row` and those of OF_ITEMS that the file has"""
    dropped: dict[str, int]
    """rows that are left out, by reason"""


def typed_events(engine: BaseBackend, path: Path, table: ibis.Table, form: EventForm) -> TypedEvents:
    """The checked events of a file.

    Raises:
      UserError: a value can't be read, a word is no behavior, or no row is left.
    """
    told = [name for name in OF_ITEMS if name in table.columns]
    check_words(path, table, ("behavior", "scenario", "query", *OF_ITEMS[:-1]), EVENTS.ids)
    table, dropped = _telling(engine, path, table, form)
    seconds = as_seconds(table, "timestamp", form.times)
    checks = list(seconds.checks)
    leave = f", or leave the column out with {FLAG}"
    if "scenario" in table.columns:
        checks += choice(table, "scenario", SCENARIOS, f"use one of these{leave} scenario=")
    if "watch_seconds" in table.columns:
        checks += as_number(table, "watch_seconds", f"{leave} watch_seconds=").checks
    refuse(path, table, checks)
    table = store(engine, table.mutate(timestamp=seconds.value), instead_of=table)
    columns = {name: as_text(table[name]) for name in ("user_id", "item_id", "behavior")}
    columns |= {name: as_text(table[name]) for name in ("scenario",) if name in table.columns}
    names = ("search_id", "query")
    if any(name in table.columns for name in names):
        columns |= {name: as_text(table[name]) if name in table.columns else ibis.null("string") for name in names}
    if "watch_seconds" in table.columns:
        columns["watch_seconds"] = as_number(table, "watch_seconds").value
    session = as_text(table.session_id) if "session_id" in table.columns else ibis.null("string")
    typed = table.select(**columns, timestamp=table.timestamp, session_id=session, _row=table._row)
    of_items = table.select("timestamp", "_row", *told, item_id=as_text(table.item_id))
    return TypedEvents(store(engine, typed), of_items, dropped)


def known_events(engine: BaseBackend, path: Path, events: ibis.Table, items: ibis.Table) -> tuple[ibis.Table, int]:
    """The events of items that there are, and the number of the others.

    Raises:
      UserError: the others are more than half.
    """
    strangers = events.anti_join(items, "item_id")
    unknown, size = count_rows(strangers), count_rows(events)
    if 2 * unknown > size:
        row = strangers.order_by("_row").limit(1).to_pyarrow().to_pylist()[0]
        raise UserError(
            f"{path}, column 'item_id': {unknown} of {size} events are of items that the items file lacks, "
            f"the first in row {row['_row']} ({row['item_id']!r}); write the ids the same way in both files, add the "
            f"items, or say which columns have the ids with {FLAG} items.item_id=... events.item_id=..."
        )
    return events.semi_join(items, "item_id"), unknown


def _telling(engine: BaseBackend, path: Path, table: ibis.Table, form: EventForm) -> tuple[ibis.Table, dict[str, int]]:
    """The rows of which something can be learned, with their behavior, and the numbers of the others by reason."""
    reasons = {
        f"event without a {what}": as_text(table[name]).isnull()
        for name, what in (("user_id", "user"), ("item_id", "item"), ("timestamp", "time"))
    }
    behavior = ibis.literal(form.behaviors[-1])
    if "behavior" in table.columns:
        check_known(path, table, form.behaviors, form.words)
        behavior = translated(table.behavior, form.words)
        reasons["event without a behavior"] = behavior.isnull()
        reasons["event of a behavior that is left out"] = behavior == ""
    if form.least_rating is not None:
        reasons[f"event with a rating below {form.least_rating:g}"] = _rating(path, table, form) < form.least_rating
    why = ibis.cases(*((bad, name) for name, bad in reasons.items()), else_="")
    table = store(engine, table.mutate(behavior=behavior, _why=why), instead_of=table)
    counts = table.group_by("_why").agg(n=table.count()).to_pyarrow().to_pylist()
    counts = {row["_why"]: row["n"] for row in counts}
    dropped = {name: counts[name] for name in reasons if name in counts}
    if "" not in counts:
        most = max(dropped, key=lambda name: dropped[name])
        raise UserError(
            f"{path}: no event is left; {dropped[most]:,} of {sum(counts.values()):,} rows are an {most}; say which "
            f"columns hold users, items and times with {FLAG}"
        )
    return store(engine, table.filter(table._why == "").drop("_why"), instead_of=table), dropped


def _rating(path: Path, table: ibis.Table, form: EventForm) -> ibis.expr.types.FloatingValue:
    """The column of ratings."""
    if "rating" not in table.columns:
        raise UserError(
            f"{path} has no column 'rating', but data.least_rating is {form.least_rating:g}; say which column has the "
            f"ratings with {FLAG} rating=..."
        )
    rating = as_number(table, "rating")
    refuse(path, table, rating.checks)
    return rating.value
