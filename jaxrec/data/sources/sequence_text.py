"""Sequence text files, the layout that papers on sequential recommendation share.

sequences.txt      `user item item ...`, one user a line, oldest first
items.jsonl        {"id": 1, "title": "...", "categories": [["Beauty", "Makeup"]]}; other fields are passed over
timestamps.jsonl   optional: {"u": 1, "t": [1318896000, null, ...]}, Unix seconds in the order of the sequence, or null

Nobody typed a query. `queries` derives them by the protocol of product search on these logs (Van Gysel et al. 2016; Ai
et al. 2017): the query that leads to an item is its category path without the root, in lower case, without punctuation,
each word once. There an item of several paths has several queries, here it has that of the first (in Amazon Beauty 12
of 12,101 items have more), since one search leads to an event. Every event has a search of its own, at its time and in
its session. So the history of a search is the sequence up to its item, also where a log tells days alone.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxrec.config import UserError, fingerprint
from jaxrec.data.sources.checks import FLOAT_ID
from jaxrec.data.sources.files import Real, Whole, as_written, digest, json_lines, require, text_lines, written
from jaxrec.data.tables import RawTables, Split, connect, store


@dataclass(frozen=True)
class SequenceText:
    """One sequence of items a user; every event is its own session and a purchase."""

    behaviors: ClassVar[tuple[str, ...]] = ("purchase",)
    target_behaviors: ClassVar[tuple[str, ...]] = ("purchase",)

    path: Path
    """The folder with the files."""
    shuffle_ties: bool = False
    """Put a user's events of equal time in a random order before the split; the stored order may be learnable."""
    split: Split = "leave_one_out"
    """How validation and test are held out."""
    seed: int = 0
    """Seed of the order of ties."""
    queries: Literal["none", "category"] = "none"
    """The words of the items that derived queries consist of; none: no searches. The other logs do not depend on it."""

    def fingerprint(self) -> str:
        """Of the files' contents and this configuration, the place of the folder left out."""
        files = [digest(path) for path in sorted(Path(self.path).glob("*")) if path.name in _FILES]
        derived = () if self.queries == "none" else (self.queries,)
        return fingerprint("sequence_text", files, self.shuffle_ties, self.split, self.seed, *derived)

    def load(self) -> RawTables:
        """Reads the files.

        Raises:
          UserError: a file is missing or malformed, an item of a sequence is not in items.jsonl, or ties are to be
            shuffled without times.
        """
        folder, engine = Path(self.path), connect()
        items, queries = _items(
            require(folder / "items.jsonl", 'items as {"id", "title", "categories"}, one JSON object a line')
        )
        sequences = require(folder / "sequences.txt", "`user item item ...`, one user a line")
        times_file = folder / "timestamps.jsonl"
        if self.shuffle_ties and not times_file.is_file():
            raise UserError(
                f"{times_file} is missing: without times there are no ties to shuffle; set shuffle_ties to False"
            )
        times = _times(times_file) if times_file.is_file() else {}
        columns: dict[str, list[Any]] = {name: [] for name in ("user_id", "item_id", "timestamp", "session_id")}
        rng = np.random.default_rng(self.seed)
        for number, user, sequence in _sequences(sequences, set(items["item_id"].to_pylist())):
            if user in times and len(times[user]) != len(sequence):
                raise UserError(
                    f"{times_file}: user {user} has {len(times[user])} times but {len(sequence)} items "
                    f"in line {number} of {sequences.name}; give one time (or null) an item"
                )
            seconds = monotone(times.get(user, [None] * len(sequence)))
            if self.shuffle_ties:
                # Sorting by (time, random) moves only events of equal time, since the times are monotone.
                sequence = [sequence[place] for place in np.lexsort((rng.random(len(sequence)), seconds))]
            columns["user_id"] += [user] * len(sequence)
            columns["item_id"] += sequence
            columns["timestamp"] += seconds
            columns["session_id"] += [f"{place:06d}" for place in range(len(sequence))]
        if times and times.keys().isdisjoint(columns["user_id"]):
            raise UserError(
                f"{times_file}: no user of it is in {sequences.name} ({next(iter(times))!r} isn't); write them as there"
            )
        events = pa.table({**columns, "behavior": ["purchase"] * len(columns["user_id"])})
        searches, facts = None, {"shuffle_ties": self.shuffle_ties}
        if self.queries != "none":
            events, searches = _searched(events, queries)
            searches, facts = store(engine, searches), facts | {"queries_derived_from": self.queries}
        return RawTables(engine, store(engine, items), store(engine, events), searches, facts=facts)


_FILES = ("sequences.txt", "items.jsonl", "timestamps.jsonl")


def monotone(times: list[int | None]) -> list[int]:
    """Times that never fall: a null or an earlier time becomes the one before it; leading nulls become the first known.

    Without any known time the positions themselves are the times.
    """
    known = [time for time in times if time is not None]
    if not known:
        return list(range(len(times)))
    result, last = [], known[0]
    for time in times:
        last = max(last, time) if time is not None else last
        result.append(last)
    return result


def _sequences(path: Path, known: set[str]) -> Iterator[tuple[int, str, list[str]]]:
    seen: set[str] = set()
    for number, line in text_lines(path):
        user, *sequence = line.split() or [""]
        if not user:
            continue
        if not sequence:
            raise UserError(f"{path}, line {number}: user {user} has no items; write `user item item ...`")
        if user in seen:
            raise UserError(f"{path}, line {number}: user {user} occurs twice; put all their items in one line")
        if unknown := [item for item in sequence if item not in known]:
            raise UserError(
                f"{path}, line {number}: item {unknown[0]} is not in items.jsonl; add it there or leave it out"
            )
        seen.add(user)
        yield number, user, sequence
    if not seen:
        raise UserError(f"{path} is empty; write `user item item ...`, one user a line")


def _searched(events: pa.Table, queries: dict[str, str]) -> tuple[pa.Table, pa.Table]:
    """The events with `search_id`, null for items without a category, and a search for the query of every other."""
    query = pa.array([queries[item] or None for item in events["item_id"].to_pylist()], pa.string())
    names = [f"{user} {place}" for user, place in zip(*(events[n].to_pylist() for n in _PLACE), strict=True)]
    events = events.append_column("search_id", pc.if_else(pc.is_valid(query), pa.array(names, pa.string()), None))
    searches = events.append_column("query", query).filter(pc.is_valid(query))
    return events, searches.select(["search_id", "user_id", "timestamp", "query", "session_id"])


_PLACE = ("user_id", "session_id")


def category_query(path: list[str]) -> str:
    """The query for a category path: its words after the root, each once, in lower case; all of a root alone."""
    words = re.findall(r"[^\W_]+", " ".join(path[1:] or path).lower())
    return " ".join(dict.fromkeys(words))


def _items(path: Path) -> tuple[pa.Table, dict[str, str]]:
    """The items, and the query of each, "" where it has no category."""
    queries: dict[str, str] = {}
    columns: dict[str, list[Any]] = {name: [] for name in ("item_id", "title", "text", "category", "brand")}
    lines: dict[str, int] = {}
    for number, row in json_lines(path, as_written):
        for name in ("id", "title"):
            if row.get(name) is None:
                raise UserError(
                    f"{path}, line {number}: the field {name!r} is missing; every item needs an id and a title"
                )
        item = _identifier(row["id"], f"{path}, line {number}: 'id'")
        if item in lines:
            raise UserError(
                f"{path}, line {number}: item {item} was already in line {lines[item]}; give every item one line"
            )
        lines[item] = number
        paths = _category_paths(row.get("categories"), f"{path}, line {number}")
        title = written(row["title"]).strip() or f"Item {item}"
        words = list(dict.fromkeys(name for names in paths for name in names))
        columns["item_id"].append(item)
        columns["title"].append(title)
        columns["text"].append(f"{title}. {', '.join(words)}" if words else title)
        columns["category"].append(paths[0][-1] if paths and paths[0] else "")
        queries[item] = category_query(paths[0]) if paths else ""
        columns["brand"].append(written(row.get("brand")) or "")
    if not lines:
        raise UserError(f"{path} is empty; write one JSON object an item")
    size = len(columns["item_id"])
    return pa.table({**columns, "price": pa.nulls(size, pa.float64())}), queries


def _identifier(value: Any, place: str) -> str:
    """A user or an item as it is written."""
    if isinstance(value, float | Real):
        raise UserError(f"{place} {value} {FLOAT_ID}")
    if isinstance(value, dict | list):
        raise UserError(f"{place} is a {type(value).__name__}; write ids as text or whole numbers")
    return written(value)


def _category_paths(value: Any, place: str) -> list[list[str]]:
    """Categories as a list of paths; a flat list is one path, a string a path of one name."""
    number = isinstance(value, Whole | Real)
    value = [] if value is None else [value] if isinstance(value, str) and not number else value
    if not isinstance(value, list):
        kind = "number" if number else type(value).__name__
        raise UserError(f"{place}: 'categories' is a {kind}; write a list of names, or a list of such lists")
    if all(isinstance(name, str) for name in value):
        value = [value] if value else []
    if not all(isinstance(names, list) for names in value):
        raise UserError(f"{place}: 'categories' mixes names and lists; write a list of names, or a list of such lists")
    return [[written(name) or "" for name in names] for names in value]


def _times(path: Path) -> dict[str, list[int | None]]:
    times = {}
    for number, row in json_lines(path):
        values = row.get("t")
        if "u" in row and values is None:
            continue
        if "u" not in row or not isinstance(values, list):
            raise UserError(f'{path}, line {number}: expected {{"u": user, "t": [seconds, ...]}}')
        for value in values:
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise UserError(
                    f"{path}, line {number}: the time {value!r} is no whole number; write Unix seconds or null"
                )
            if value is not None and value > 10**11:
                raise UserError(
                    f"{path}, line {number}: the time {value} is in milliseconds; divide by 1000 to get Unix seconds"
                )
        if (user := _identifier(row["u"], f"{path}, line {number}: 'u'")) in times:
            raise UserError(f"{path}, line {number}: user {user} was there before; write one line a user")
        times[user] = values
    return times
