"""The log format of OneSug's authors: a line is a typed prefix, what was searched before, and what was suggested.

    prefix <tab> history <tab> related <tab> chosen <tab> rejected <tab> pos_score <tab> neg_score
    soap         towels,mats    soap bar      soap dish   soap,soup      1.5             0.46

Lists are separated by commas. There are no users, no times and no feedback, so these are derived:

- every line is a user of its own, `line 1`, whose history are searches of an earlier session, in the listed order, one
  a second from 0; the prefix comes a second after the last of them;
- feedback is the strongest level whose base weight (OneSug §3.4.1) the score reaches: of the chosen query 2 order,
  1.5 item_click, below it click; of the rejected ones 0.5 show, 0.2 not_show, below it random;
- the split is that of the prefix, by the MD5 of its normalised text.

Related queries and scores are kept as they are, in related_queries.parquet and scores.parquet, by the user_id.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from jaxrec.config import UserError, fingerprint
from jaxrec.data.sources.files import digest, require, text_lines
from jaxrec.data.sources.search_log import no_events, no_items
from jaxrec.data.tables import FEEDBACK, RawTables, Split, connect, store
from jaxrec.data.words import normalised

FIELDS = ("prefix", "history", "related", "chosen", "rejected", "pos_score", "neg_score")
WEIGHTS = dict(zip(FEEDBACK, (2.0, 1.5, 1.0, 0.5, 0.2, 0.0), strict=True))
"""The base weight of each level of feedback."""
_MEND = f"write {', '.join(FIELDS)} with tabs between them"


@dataclass(frozen=True)
class SuggestionLines:
    """A file of such lines, UTF-8 without a header; it may be packed (.gz)."""

    behaviors: ClassVar[tuple[str, ...]] = ()
    target_behaviors: ClassVar[tuple[str, ...]] = ()

    path: Path
    """The file of lines."""
    buckets: int = 10
    """A prefix is in the bucket md5(normalised(prefix)) % buckets."""
    valid_buckets: tuple[int, ...] = (2,)
    """The buckets of the prefixes of validation."""
    test_buckets: tuple[int, ...] = (1,)
    """The buckets of the prefixes of test."""
    split: Split = "given"
    """How validation and test are held out: by prefix, since there are no users and no times."""

    def fingerprint(self) -> str:
        """Of the file's content and this configuration, its place left out."""
        files = [digest(path) for path in (Path(self.path),) if path.is_file()]
        return fingerprint("suggestion_lines", files, [value for name, value in vars(self).items() if name != "path"])

    def load(self) -> RawTables:
        """Reads and checks the file.

        Raises:
          UserError: the file is missing or empty, or a line has other fields.
        """
        path = require(Path(self.path), "a prefix and its suggestions a line")
        if self.split != "given":
            raise UserError(f'SuggestionLines can only be split by prefix, not by {self.split!r}; set split to "given"')
        searches, suggestions, related, scores = [], [], [], []
        repeats = 0
        for number, line in _lines(path):
            user, history = f"line {number}", [query for query in line["history"] if normalised(query)]
            common = {"user_id": user, "given_split": self.split_of(line["prefix"])}
            for place, query in enumerate(history):
                search = {"search_id": f"{user}: {place}", "timestamp": place, "query": query}
                searches.append(common | search | {"session_id": "1 history"})
            prefix = {"timestamp": len(history), "prefix": line["prefix"], "session_id": "2 prefix"}
            rejected = list(dict.fromkeys(query for query in line["rejected"] if query != line["chosen"]))
            repeats += len(line["rejected"]) - len(rejected)
            for query, feedback in _levels(line, rejected):
                suggestions.append(common | prefix | {"query": query, "feedback": feedback})
            related += [{"user_id": user, "place": at, "query": query} for at, query in enumerate(line["related"])]
            scores.append({"user_id": user, **{name: line[name] for name in ("pos_score", "neg_score")}})
        if not suggestions:
            raise UserError(f"{path} is empty; {_MEND}")
        engine = connect()
        texts = ("user_id", "query", "session_id", "given_split")
        extra = {
            "related_queries": _table(related, ("user_id", "query"), place=pa.int64()).select([0, 2, 1]),
            "scores": _table(scores, ("user_id",), pos_score=pa.float64(), neg_score=pa.float64()),
        }
        return RawTables(
            engine,
            no_items(engine),
            no_events(engine),
            store(engine, _table(searches, (*texts, "search_id"), timestamp=pa.int64())),
            store(engine, _table(suggestions, (*texts, "prefix", "feedback"), timestamp=pa.int64())),
            extra={name: store(engine, table) for name, table in extra.items()},
            dropped={"rejected query that is chosen or repeated": repeats},
            facts={"derived": ["user", "timestamp", "feedback", "split"]},
        )

    def split_of(self, prefix: str) -> str:
        """The split of a prefix, by the MD5 of its normalised text."""
        bucket = int(hashlib.md5(normalised(prefix).encode(), usedforsecurity=False).hexdigest(), 16) % self.buckets
        return "test" if bucket in self.test_buckets else "valid" if bucket in self.valid_buckets else "train"


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, the checked fields) of every line that is not empty."""
    for number, text in text_lines(path):
        if not text.strip():
            continue
        place, values = f"{path}, line {number}", text.rstrip("\r\n").split("\t")
        if len(values) != len(FIELDS):
            raise UserError(f"{place}: has {len(values)} fields, not {len(FIELDS)}; {_MEND}")
        line: dict[str, Any] = dict(zip(FIELDS, values, strict=True))
        for name in ("prefix", "chosen"):
            if not normalised(line[name]):
                raise UserError(f"{place}: the field {name!r} is empty; fill it in or leave the line out")
        for name in ("history", "related", "rejected"):
            line[name] = [query for query in line[name].split(",") if normalised(query)]
        for name in ("pos_score", "neg_score"):
            line[name] = _number(line[name], f"{place}: the field {name!r}")
        yield number, line


def _number(text: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{place} is {text!r}, which is no number; write one")
    return value


def _levels(line: dict[str, Any], rejected: list[str]) -> Iterator[tuple[str, str]]:
    """(query, feedback) of the chosen query and the rejected ones."""
    yield line["chosen"], _level(line["pos_score"], FEEDBACK[:3])
    for query in rejected:
        yield query, _level(line["neg_score"], FEEDBACK[3:])


def _level(score: float, levels: tuple[str, ...]) -> str:
    """The strongest of some levels whose base weight a score reaches, else the weakest."""
    return next((level for level in levels if score >= WEIGHTS[level]), levels[-1])


def _table(rows: list[dict[str, Any]], texts: tuple[str, ...], **others: pa.DataType) -> pa.Table:
    return pa.Table.from_pylist(rows, pa.schema([*((name, pa.string()) for name in texts), *others.items()]))
