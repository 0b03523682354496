"""Judged pairs: people who graded how relevant an item is to a query; nobody bought or clicked anything.

    query          item    grade        id      title
    angle bracket  100001  3            100001  Simpson Strong-Tie 12-Gauge Angle

Every query is one anonymous user with one search, which led to the items of the grade `relevant` or better. Queries are
split by the MD5 of their normalised text, so that a query has the same split in every file and in every writing. The
grades themselves are a table of their own, judgments.parquet. In training, titles of products are queries too, whose
users and behavior have names of their own.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import ibis
import numpy as np
import pyarrow as pa
from ibis.backends import BaseBackend

from jaxrec.config import UserError, fingerprint
from jaxrec.data.sources.files import digest
from jaxrec.data.sources.formats import Wanted, check_encoding
from jaxrec.data.sources.item_files import ITEMS, TypedItems, typed_items
from jaxrec.data.sources.judgment_files import GradeColumns, read_judgments, refuse_strangers
from jaxrec.data.sources.reading import read_table
from jaxrec.data.tables import SPLITS, RawTables, Split, connect, count_rows, store
from jaxrec.data.words import normalised

JUDGED, TITLE = "relevant", "title"
"""The behaviors: an item judged relevant, and one found by its own title."""


@dataclass(frozen=True)
class JudgedPairs:
    """A file of judged pairs and one of products: CSV, TSV, JSONL or parquet; all but parquet may be packed (.gz)."""

    behaviors: ClassVar[tuple[str, ...]] = (TITLE, JUDGED)
    target_behaviors: ClassVar[tuple[str, ...]] = (TITLE, JUDGED)

    pairs: Path
    """The file of judged pairs."""
    products: Path
    """The file of products, all of which are ranked."""
    query: str = "query"
    """The column of the query in `pairs`."""
    item: str = "item"
    """The column of the item in `pairs`."""
    grade: str = "grade"
    """The column of the grade in `pairs`, higher for more relevant."""
    product: str = "id"
    """The column of the item in `products`."""
    title: str = "title"
    """The column of the title in `products`."""
    grades: tuple[float, float] = (1.0, 3.0)
    """The scale of the grades: the lowest and the highest."""
    relevant: float = 2.33
    """Items of this grade or a higher one are what a query should find."""
    unknown_items: Literal["refuse", "drop"] = "refuse"
    """What becomes of pairs whose item is no product; dropped ones are counted."""
    titles_as_queries: bool = True
    """Whether the titles of all products, and parts of them, are queries in training."""
    title_parts: int = 1
    """Parts of each title that are queries too: some neighbouring words of it, drawn at random."""
    buckets: int = 10
    """A query is in the bucket md5(normalised(query)) % buckets, so that its writings have one split."""
    valid_buckets: tuple[int, ...] = (2,)
    """The buckets of the queries of validation."""
    test_buckets: tuple[int, ...] = (1,)
    """The buckets of the queries of test."""
    encoding: str = "utf-8"
    """The encoding of CSV and TSV, such as cp1252."""
    seed: int = 0
    """Seed of the parts of titles."""
    split: Split = "given"
    """How validation and test are held out: by query, since there are no users and no times."""

    def fingerprint(self) -> str:
        """Of the files' contents and this configuration, their places left out."""
        files = [digest(path) for path in map(Path, (self.pairs, self.products)) if path.is_file()]
        values = [value for name, value in vars(self).items() if name not in ("pairs", "products")]
        return fingerprint("judged_pairs", files, values)

    def load(self) -> RawTables:
        """Reads and checks the files.

        Raises:
          UserError: a file or a column is missing, a value is, a grade is outside of its scale, or a judged item is no
            product.
        """
        self._check()
        engine = connect()
        typed = self._products(engine)
        items = typed.table
        judged = self._judged(engine, items)
        size, judged = count_rows(judged), store(engine, judged.semi_join(items, "item_id"))
        rows = judged.order_by(["query", "item_id"]).to_pyarrow()
        queries = sorted(set(rows["query"].to_pylist()))
        splits = {query: self.split_of(query) for query in queries}
        named = {query: f"query: {query}" for query in queries}
        searches = [(named[query], query, splits[query]) for query in queries]
        pairs = zip(*(rows[name].to_pylist() for name in ("query", "item_id", "grade")), strict=True)
        led = [(named[query], item, JUDGED) for query, item, grade in pairs if grade >= self.relevant]
        if not led:
            raise UserError(f"{self.pairs}: no grade reaches relevant={self.relevant}; lower it, or correct the grades")
        if self.titles_as_queries:
            held_out = {normalised(query) for query, split in splits.items() if split != "train"}
            titles = items.select("item_id", "title").order_by("item_id").to_pyarrow()
            for user, query, item in self._titles(titles, held_out):
                searches.append((user, query, "train"))
                led.append((user, item, TITLE))
        split_of = {user: split for user, _query, split in searches}
        facts = {"judged_queries": {split: list(splits.values()).count(split) for split in SPLITS}}
        return RawTables(
            engine,
            items,
            store(engine, _events(led, split_of)),
            store(engine, _searches(searches)),
            judgments=judged,
            dropped={"judgment of an unknown item": size - rows.num_rows, **typed.dropped},
            facts={**facts, "relevant": self.relevant, "grades": list(self.grades)},
        )

    def split_of(self, query: str) -> str:
        """The split of a query, by the MD5 of its normalised text: two writings of a query have one split."""
        text = normalised(query).encode()
        bucket = int(hashlib.md5(text, usedforsecurity=False).hexdigest(), 16) % self.buckets
        return "test" if bucket in self.test_buckets else "valid" if bucket in self.valid_buckets else "train"

    def _products(self, engine: BaseBackend) -> TypedItems:
        names = {self.product: "item_id", self.title: "title"}
        known = tuple(name for name in ITEMS.names if name not in names.values())
        ids = (self.product, *(name for name in ITEMS.ids if name != "item_id"))
        wanted = Wanted((*names, *known), tuple(names), ids, ITEMS.vectors, further=True, encoding=self.encoding)
        table = read_table(engine, Path(self.products), wanted)
        for column, name in names.items():
            if column != name and name in table.columns:
                raise UserError(
                    f"{self.products} has both {column!r} and {name!r}, which are one column; drop one of them"
                )
        return typed_items(engine, Path(self.products), table.rename({name: column for column, name in names.items()}))

    def _judged(self, engine: BaseBackend, items: ibis.Table) -> ibis.Table:
        """The checked pairs: query, item_id, grade."""
        path, columns = Path(self.pairs), GradeColumns(self.query, self.item, self.grade)
        names = (columns.query, columns.item, columns.grade)
        wanted = Wanted(names, names, (columns.item,), encoding=self.encoding)
        judged = read_judgments(engine, path, columns, self.grades, wanted)
        if self.unknown_items == "refuse":
            mend = f"is no item of {Path(self.products).name}; add it there, or set unknown_items to drop"
            refuse_strangers(path, judged, items, self.item, mend)
        return judged.drop("_row")

    def _titles(self, items: pa.Table, held_out: set[str]) -> list[tuple[str, str, str]]:
        """(user, query, item) of the titles and their parts, but for the queries that are held out."""
        rng, found = np.random.default_rng(self.seed), []
        for item, title in zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True):
            queries = dict.fromkeys([title, *title_parts(rng, title, self.title_parts)])
            for number, query in enumerate(queries):
                if normalised(query) not in held_out:
                    found.append((f"title: {item}" + (f" ({number})" if number else ""), query, item))
        return found

    def _check(self) -> None:
        low, high = self.grades
        if not low < high or not low <= self.relevant <= high:
            raise UserError(
                f"relevant={self.relevant} must be within grades={self.grades}, the lowest and highest; change either"
            )
        for name in ("valid_buckets", "test_buckets"):
            if not all(0 <= bucket < self.buckets for bucket in getattr(self, name)):
                raise UserError(
                    f"{name}={getattr(self, name)} must be numbers from 0 to {self.buckets - 1}, below buckets"
                )
        if set(self.valid_buckets) & set(self.test_buckets):
            raise UserError(
                f"valid_buckets={self.valid_buckets} and test_buckets={self.test_buckets} share a bucket; change either"
            )
        if self.split != "given":
            raise UserError('JudgedPairs has no users and no times to split by; leave its split at "given"')
        check_encoding(self.encoding)


def title_parts(rng: np.random.Generator, title: str, count: int) -> list[str]:
    """`count` runs of two to four neighbouring words of a title, shorter than it; none of fewer than three words."""
    words, parts = title.split(), []
    for _part in range(count if len(words) > 2 else 0):
        length = int(rng.integers(2, min(4, len(words) - 1) + 1))
        start = int(rng.integers(0, len(words) - length + 1))
        parts.append(" ".join(words[start : start + length]))
    return parts


def _events(led: list[tuple[str, str, str]], split_of: dict[str, str]) -> pa.Table:
    users, items, behaviors = zip(*led, strict=True)
    return pa.table(
        {
            "user_id": users,
            "item_id": items,
            "timestamp": pa.array(np.zeros(len(led), np.int64)),
            "behavior": behaviors,
            "session_id": ["0"] * len(led),
            "search_id": users,
            "given_split": [split_of[user] for user in users],
        }
    )


def _searches(searches: list[tuple[str, str, str]]) -> pa.Table:
    """A search has the name of its user, since it is the only one."""
    users, queries, splits = zip(*searches, strict=True)
    return pa.table(
        {
            "search_id": users,
            "user_id": users,
            "timestamp": pa.array(np.zeros(len(searches), np.int64)),
            "query": queries,
            "session_id": ["0"] * len(searches),
            "given_split": splits,
        }
    )
