"""JD micro-behaviours: text files whose lines are shopping sessions, browse by browse.

    3176424+5+753+14+9 298082+5+753+13+19 298082+6+753+11+19 ...

A token is one event: item + kind + category + seconds until the next event + seconds that the page was looked at. The
kinds are ways to a product's page (1 home, 2 list of a shop, 3 sale, 4 cart page, 5 search results), what was read on
it (6 comments, 7 specification, 8 the rest), 9 added to the cart, 10 ordered.

The layout knows no users, no titles and no dates, and this source makes up as little as it can: a line is a user of its
own, named by file and line; an item is titled by its number; times are seconds since the line began, so they can be
compared inside a line alone.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxrec.config import UserError, fingerprint
from jaxrec.data.sources.files import digest
from jaxrec.data.tables import RawTables, Split, connect, store

KINDS = (
    "home",
    "shop_list",
    "sale",
    "cart_page",
    "search",
    "comments",
    "specification",
    "bottom",
    "cart",
    "order",
)
"""Names of the kinds 1 to 10."""

# Up to eighteen digits: what a signed 64-bit integer holds.
_TOKEN = re.compile(r"\d{1,18}\+(?:[1-9]|10)\+\d{1,18}\+\d{1,18}\+\d{1,18}", re.ASCII)
_LINE = re.compile(rf"(?:{_TOKEN.pattern})(?:\s+{_TOKEN.pattern})*", re.ASCII)


@dataclass(frozen=True)
class JdMicro:
    """Files of the layout of JD's micro-behaviours; a line that is there twice, in any files, counts once."""

    behaviors: ClassVar[tuple[str, ...]] = ("click", "detail", "cart", "purchase")
    target_behaviors: ClassVar[tuple[str, ...]] = ("cart", "purchase")

    path: Path
    """A file, or a folder of files."""
    pattern: str = "*.txt"
    """Which files of a folder are read."""
    split: Split = "leave_one_out"
    """How validation and test are held out, inside each line; "time" can't be, since there are no dates."""
    session_gap_seconds: int = 1800
    """A pause longer than this begins a new visit: a session of the split last_session."""

    def fingerprint(self) -> str:
        """Of the files' contents and this configuration, the place of the files left out."""
        return fingerprint("jd_micro", [digest(path) for path in self._files()], self.split, self.session_gap_seconds)

    def load(self) -> RawTables:
        """Reads the files.

        Raises:
          UserError: there are no files, a line is no list of events, or the split is by time.
        """
        if self.split == "time":
            raise UserError(
                "JdMicro can't be split by time: its files hold no dates; "
                'set split to "leave_one_out" or "last_session"'
            )
        seen: set[str] = set()
        users, lengths, numbers, repeats, repeated_events = [], [], [], 0, 0
        for path in self._files():
            # Not without its ending or folder: two files may have the rest in common.
            name = path.relative_to(self.path).as_posix() if path != Path(self.path) else path.name
            for number, line in _lines(path):
                if line in seen:
                    repeats, repeated_events = repeats + 1, repeated_events + line.count(" ") + 1
                    continue
                seen.add(line)
                events = np.array([token.split("+") for token in line.split(" ")]).astype(np.int64)
                users.append(f"{name}:{number}")
                lengths.append(len(events))
                numbers.append(events)
        if not users:
            raise UserError(f"{self.path} holds no sessions; {_MEND}")
        item, kind, category, pause, dwell = np.concatenate(numbers).T
        starts = np.cumsum(lengths) - lengths
        events = pa.table(
            {
                "user_id": pa.array(users).take(pa.array(np.repeat(np.arange(len(users)), lengths))),
                "item_id": pa.array(item).cast(pa.string()),
                "timestamp": _since_start(pause, starts, lengths),
                "behavior": pa.array(_BEHAVIOR).take(pa.array(kind - 1)),
                "session_id": _visits(pause, starts, lengths, self.session_gap_seconds),
                "kind": pa.array(KINDS).take(pa.array(kind - 1)),
                "dwell_seconds": dwell,
            }
        )
        engine = connect()
        return RawTables(
            engine,
            store(engine, _items(item, category)),
            store(engine, events),
            dropped={"event of a repeated line": repeated_events},
            facts={"lines": len(users), "repeated_lines": repeats},
        )

    def _files(self) -> list[Path]:
        """The files to read, by name."""
        path = Path(self.path)
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise UserError(f"there is no {path}; give a file of sessions, or a folder of such files")
        files = sorted(file for file in path.glob(self.pattern) if file.is_file())
        if not files:
            raise UserError(f"{path} has no file {self.pattern}; give another folder, or set the source's `pattern`")
        return files


# Every way to a product's page is a click on it; reading on is more than that.
_BEHAVIOR = ("click",) * 5 + ("detail",) * 3 + ("cart", "purchase")
_MEND = "write a session a line, its events as item+kind+category+pause+dwell with blanks between them"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with single blanks) of every line that is not empty."""
    # A byte that is no text becomes a character that no token holds, so that its line is named as any bad one is.
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if not line:
                continue
            if not _LINE.fullmatch(line):
                raise UserError(f"{path}, line {number}: {_fault(line)}")
            yield number, " ".join(line.split())


def _fault(line: str) -> str:
    """The fault of the first bad event of a line."""
    position, token = next((n, token) for n, token in enumerate(line.split(), 1) if not _TOKEN.fullmatch(token))
    shown = token if len(token) <= 60 else token[:60] + "..."
    fields = token.split("+")
    if len(fields) != 5:
        return f"event {position}, {shown!r}, has {len(fields)} fields, not 5; {_MEND}"
    names = ("item", "kind", "category", "pause", "dwell")
    for name, value in zip(names, fields, strict=True):
        if not re.fullmatch(r"\d{1,18}", value, re.ASCII):
            return f"event {position}, {shown!r}: its {name} {value[:60]!r} is no whole number from 0 on; {_MEND}"
    return f"event {position}, {shown!r}: there is no kind {fields[1]}; kinds are 1 to {len(KINDS)}"


def _since_start(pause: np.ndarray, starts: np.ndarray, lengths: list[int]) -> np.ndarray:
    """Seconds between the beginning of its line and each event, int64 [events]: the pauses before it, added up."""
    before = np.cumsum(pause) - pause
    return before - np.repeat(before[starts], lengths)


def _visits(pause: np.ndarray, starts: np.ndarray, lengths: list[int], gap: int) -> pa.Array:
    """The visit of every event: a number that rises after each pause of more than `gap` seconds."""
    long = (pause > gap).astype(np.int64)
    return pc.utf8_lpad(pa.array(_since_start(long, starts, lengths)).cast(pa.string()), 6, "0")


def _items(item: np.ndarray, category: np.ndarray) -> pa.Table:
    """One row an item; with the first of its categories. Nothing but its number is known of an item."""
    distinct, first = np.unique(item, return_index=True)
    ids, categories = pa.array(distinct).cast(pa.string()), pa.array(category[first]).cast(pa.string())
    join = pc.binary_join_element_wise
    return pa.table(
        {
            "item_id": ids,
            "title": join("Product", ids, " "),
            "text": join("Category", categories, " "),
            "category": categories,
            "brand": pa.array([""] * len(distinct)),
            "price": pa.nulls(len(distinct), pa.float64()),
        }
    )
