"""Files of KuaiSearch's schema: what each search showed, what was clicked and what was purchased.

    items.jsonl    {"item_id", "item_title", "brand_name", "seller_name", "category_level1_name" to "..level3_name"}
    recall.jsonl   {"user_id", "session_id", "query", "time_index", "impressed_item_ids", "clicked_item_ids",
                    "purchased_item_ids", "split"}
    users.jsonl    optional: {"user_id", "gender", "age_bucket", ...}: columns of users.parquet

A line of recall.jsonl is a search, and each item of its lists an event that it led to. `time_index` is taken for
seconds: it orders the searches, and is no date.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from jaxrec.config import UserError, fingerprint
from jaxrec.data.sources.checks import FLOAT_ID
from jaxrec.data.sources.files import Whole, as_written, digest, json_lines, require, written
from jaxrec.data.tables import SPLITS, RawTables, Split, connect, store

LISTS = {"exposure": "impressed_item_ids", "click": "clicked_item_ids", "purchase": "purchased_item_ids"}
"""Which field of a search lists the items of a behavior."""
FILES = ("items.jsonl", "recall.jsonl", "users.jsonl")
CATEGORIES = ("category_level3_name", "category_level2_name", "category_level1_name")
UNKNOWN = ("", "UNKNOWN")


@dataclass(frozen=True)
class KuaiSearch:
    """Searches with impressed, clicked and purchased items."""

    behaviors: ClassVar[tuple[str, ...]] = ("exposure", "click", "purchase")
    target_behaviors: ClassVar[tuple[str, ...]] = ("click", "purchase")

    path: Path
    """The folder with the files."""
    split: Split = "given"
    """How validation and test are held out; given: by the field `split` of recall.jsonl."""
    keep_unknown: bool = False
    """Keep items that items.jsonl lacks, with the training queries that led to them as their texts; else their events
    are dropped and counted."""
    query_texts: int = 5
    """How many queries make such a text."""

    def fingerprint(self) -> str:
        """Of the files' contents and this configuration, the place of the folder left out."""
        files = [digest(path) for path in sorted(Path(self.path).glob("*")) if path.name in FILES]
        return fingerprint("kuai_search", files, self.split, self.keep_unknown, self.query_texts)

    def load(self) -> RawTables:
        """Reads the files.

        Raises:
          UserError: a file is missing or malformed, or most of the listed items are unknown.
        """
        folder, engine = Path(self.path), connect()
        path = require(folder / "recall.jsonl", "the searches, one JSON object a line")
        items = _items(require(folder / "items.jsonl", "the items, one JSON object a line"))
        events, searches = _searches(path, self.split == "given")
        known = set(items["item_id"].to_pylist())
        unknown = [item for item in events["item_id"].to_pylist() if item not in known]
        if self.keep_unknown and unknown:
            items = pa.concat_tables([items, _nameless(sorted(set(unknown)), items.schema)])
        elif 2 * len(unknown) > events.num_rows:
            raise UserError(
                f"{path}: {len(unknown)} of {events.num_rows} listed items are not in items.jsonl, the first is "
                f"{unknown[0]!r}; add them there, or set keep_unknown to True"
            )
        profiles = _profiles(folder / "users.jsonl") if (folder / "users.jsonl").is_file() else None
        return RawTables(
            engine,
            store(engine, items),
            store(engine, events),
            store(engine, searches),
            profiles=None if profiles is None else store(engine, profiles),
            query_texts=self.query_texts if self.keep_unknown else 0,
        )


def _identifier(row: dict[str, Any], name: str, place: str) -> str:
    value = row.get(name)
    if value is None or value == "":
        raise UserError(f"{place}: the field {name!r} is missing; fill it in or leave the line out")
    return _id(value, f"{place}: {name!r}")


def _id(value: Any, place: str) -> str:
    if not isinstance(value, Whole) and (not isinstance(value, str) or type(value) is not str):
        raise UserError(f"{place} {written(value)} {FLOAT_ID}")
    return str(value)


def _items(path: Path) -> pa.Table:
    columns: dict[str, list[str]] = {name: [] for name in ("item_id", "title", "text", "category", "brand", "seller")}
    seen: dict[str, int] = {}
    for number, row in json_lines(path, as_written):
        place = f"{path}, line {number}"
        item, words = _identifier(row, "item_id", place), _words(row)
        title = _identifier(words, "item_title", place)
        if item in seen:
            raise UserError(f"{place}: item {item} was already in line {seen[item]}; give every item one line")
        seen[item] = number
        names = [words[name] for name in CATEGORIES if words.get(name, "") not in UNKNOWN]
        texts = [title, *reversed(names), words.get("brand_name", "")]
        columns["item_id"].append(item)
        columns["title"].append(title)
        columns["text"].append(". ".join(text for text in texts if text))
        columns["category"].append(names[0] if names else "")
        columns["brand"].append(words.get("brand_name", ""))
        columns["seller"].append(words.get("seller_name", ""))
    if not seen:
        raise UserError(f"{path} is empty; write one JSON object an item")
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    return table.add_column(5, "price", pa.nulls(len(seen), pa.float64()))


def _words(row: dict[str, Any]) -> dict[str, str]:
    """The fields of a line as texts, without those that are null."""
    return {name: written(value) for name, value in row.items() if value is not None}


def _nameless(items: list[str], schema: pa.Schema) -> pa.Table:
    """Items of which nothing but the id is known."""
    columns = {"item_id": pa.array(items, pa.string()), "title": pa.nulls(len(items), pa.string())}
    columns |= {"text": pa.nulls(len(items), pa.string()), "price": pa.nulls(len(items), pa.float64())}
    empty = pa.array([""] * len(items), pa.string())
    return pa.table({name: columns.get(name, empty) for name in schema.names})


def _searches(path: Path, given: bool) -> tuple[pa.Table, pa.Table]:
    """The events and the searches; `given_split` where the splits are given."""
    names = ("search_id", "user_id", "timestamp", "query", "session_id", *(("given_split",) if given else ()))
    searches: dict[str, list[Any]] = {name: [] for name in names}
    events: dict[str, list[Any]] = {name: [] for name in (*names, "item_id", "behavior") if name != "query"}
    for number, row in json_lines(path, as_written):
        search = _search(row, f"{path}, line {number}", number, given)
        for name in names:
            searches[name].append(search[name])
        for behavior, field in LISTS.items():
            listed = row.get(field) or []
            if not isinstance(listed, list):
                raise UserError(f"{path}, line {number}: {field!r} is no list; write a list of item ids")
            for item in listed:
                event = search | {"item_id": _id(item, f"{path}, line {number}: {field!r}"), "behavior": behavior}
                for name in events:
                    events[name].append(event[name])
    if not searches["query"]:
        raise UserError(f"{path} is empty; write one JSON object a search")
    return _typed(events), _typed(searches)


def _search(row: dict[str, Any], place: str, number: int, given: bool) -> dict[str, Any]:
    """The columns of one search."""
    query, time, split = row.get("query"), row.get("time_index"), row.get("split")
    if not isinstance(query, str) or not query.strip():
        raise UserError(f"{place}: the query is missing; fill it in or leave the line out")
    if not isinstance(time, Whole) or int(time) < 0:
        raise UserError(f"{place}: the time_index {time} is no whole number from 0 on; write one")
    if given and split not in SPLITS:
        raise UserError(
            f"{place}: the split {split!r} is none of {', '.join(SPLITS)}; correct it, or set split to time"
        )
    return {
        "search_id": str(number),
        "user_id": _identifier(row, "user_id", place),
        "timestamp": int(time),
        "query": str(query),
        "session_id": _identifier(row, "session_id", place),
        "given_split": split,
    }


def _typed(columns: dict[str, list[Any]]) -> pa.Table:
    return pa.table(
        {name: pa.array(values, pa.int64() if name == "timestamp" else pa.string()) for name, values in columns.items()}
    )


def _profiles(path: Path) -> pa.Table:
    """The users with every field of their lines as text, null where it is missing."""
    rows: dict[str, dict[str, str]] = {}
    for number, row in json_lines(path, as_written):
        user = _identifier(row, "user_id", f"{path}, line {number}")
        if user in rows:
            raise UserError(f"{path}, line {number}: user {user} was there before; write one line a user")
        rows[user] = _words(row) | {"user_id": user}
    names = dict.fromkeys(["user_id", *(name for row in rows.values() for name in row)])
    return pa.table({name: pa.array([row.get(name) for row in rows.values()], pa.string()) for name in names})
