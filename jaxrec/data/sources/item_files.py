"""A file of items: its columns, their checks, and the text of an item that has none of its own."""

from pathlib import Path
from typing import NamedTuple

import ibis
from ibis.backends import BaseBackend

from jaxrec.config import UserError
from jaxrec.data.sources.checks import Check, as_number, as_text, check_words, choice, refuse
from jaxrec.data.sources.formats import Wanted
from jaxrec.data.tables import count_rows, store

SCENARIOS = ("product_card", "short_video", "live_stream")

ITEMS = Wanted(
    ("item_id", "title", "category", "brand", "price", "text", "scenario", "product_ids", "embedding"),
    required=("item_id", "title"),
    ids=("item_id", "product_ids"),
    vectors=("embedding",),
    numbers=("price",),
    further=True,
)


class TypedItems(NamedTuple):
    """The checked items of a file."""

    table: ibis.Table
    """item_id, title, text, category, brand, price and the further columns of the file"""
    dropped: dict[str, int]
    """rows that are left out, by reason: without an id, or of an item that an earlier row has"""
    untitled: int
    """items without a title, whose id stands for it"""


def typed_items(engine: BaseBackend, path: Path, table: ibis.Table, flags: bool = False) -> TypedItems:
    """The checked items of a file.

    Args:
      engine: where the tables are kept.
      path: the file, for messages.
      table: its rows, as `jaxrec.data.sources.reading.read_table` gives them.
      flags: whether messages may name the flags of a folder (`--data.columns`).

    Raises:
      UserError: a value is mistyped, or no row has an id.
    """
    for name in table.columns:
        if name.lower() in _MADE:
            flag = f" with --data.columns NAME={name}, or leave it out with {name}=" if flags else ""
            raise UserError(f"{path}: the column {name!r} has the name of {_MADE[name.lower()]}; rename it{flag}")
    check_words(path, table, ("title", "category", "brand", "text", "scenario"), ITEMS.ids)
    table, dropped = _first_rows(engine, path, table, flags)
    columns, checks = _typed_columns(table, flags)
    refuse(path, table, checks)
    words = [columns[name] for name in ("title", "category", "brand")]
    joined = ibis.literal(". ").join([word.nullif("") for word in words]).nullif("").coalesce(columns["item_id"])
    columns["text"] = as_text(table.text).coalesce(joined) if "text" in table.columns else joined
    untitled = count_rows(table.filter(columns["title"].isnull()))
    columns["title"] = columns["title"].coalesce(columns["item_id"])
    if "product_ids" in table.columns:
        columns["product_ids"] = _product_ids(engine, path, table)
    if "embedding" in table.columns:
        columns["embedding"] = _embedding(path, table)
    further = [name for name in table.columns if name not in columns and not name.startswith("_")]
    order = ["item_id", "title", "text", "category", "brand", "price"]
    order += [name for name in columns if name not in order]
    # What filters and attributes compare are numbers, not decimals.
    more = {name: table[name].cast("float64") if table[name].type().is_decimal() else table[name] for name in further}
    chosen = table.select(**{name: columns[name] for name in order}, **more)
    return TypedItems(store(engine, chosen), dropped, untitled)


def items_of_events(engine: BaseBackend, path: Path, table: ibis.Table) -> TypedItems:
    """The items of a log without a table of items: what the latest event of each says of it.

    Args:
      engine: where the tables are kept.
      path: the file of events, for messages.
      table: item_id, timestamp int64 seconds, _row, and any of title, text, category, brand, price.
    """
    latest = ibis.row_number().over(group_by="item_id", order_by=[ibis.desc("timestamp"), ibis.desc("_row")])
    table = store(engine, table.mutate(_latest=latest))
    rows = table.filter(table._latest == 0).drop("_latest", "timestamp")
    if "title" not in rows.columns:
        rows = rows.mutate(title=ibis.null("string"))
    return typed_items(engine, path, store(engine, rows, instead_of=table), flags=True)


def _first_rows(engine: BaseBackend, path: Path, table: ibis.Table, flags: bool) -> tuple[ibis.Table, dict[str, int]]:
    """The first row of every item, and the numbers of the others."""
    copies = ibis.row_number().over(group_by=as_text(table.item_id), order_by=table._row)
    table, size = store(engine, table.mutate(_copy=copies)), count_rows(table)
    named = store(engine, table.filter(as_text(table.item_id).notnull()), instead_of=table)
    known = count_rows(named)
    if not known:
        flag = ", or say which column has it with --data.columns item_id=..." if flags else ""
        raise UserError(f"{path}, column 'item_id': is empty in all rows; fill it in{flag}")
    first = store(engine, named.filter(named._copy == 0), instead_of=named)
    dropped = {"row without an id": size - known, "row of an item that was listed before": known - count_rows(first)}
    return first, {reason: count for reason, count in dropped.items() if count}


def _typed_columns(table: ibis.Table, flags: bool) -> tuple[dict[str, ibis.Value], list[Check]]:
    """The columns of one value a row, and their checks; a title may be null."""
    checks: list[Check] = []
    columns = {name: as_text(table[name]) for name in ("item_id", "title")}
    for name in ("category", "brand"):
        columns[name] = as_text(table[name]).fill_null("") if name in table.columns else ibis.literal("")
    columns["price"] = ibis.null("float64")
    if "price" in table.columns:
        more = "; --data.decimal , reads 12,50, and --data.columns price= leaves the column out" if flags else ""
        checks += as_number(table, "price", more).checks
        columns["price"] = as_number(table, "price").value
    if "scenario" in table.columns:
        more = ", or leave the column out with --data.columns scenario=" if flags else ""
        checks += choice(table, "scenario", SCENARIOS, f"use one of these{more}")
        columns["scenario"] = as_text(table.scenario)
    return columns, checks


_MADE = {"count": "a column that preparation makes, the purchases of an item in training"}
"""Columns of the prepared items that no file can bring."""


def _product_ids(engine: BaseBackend, path: Path, table: ibis.Table) -> ibis.expr.types.ArrayValue:
    products = table.product_ids
    if products.type().is_string():
        products = products.nullif("").split("|")
    if not products.type().is_array():
        raise UserError(
            f"{path}, column 'product_ids': holds {products.type()}; write a list of item ids (in CSV, split by |)"
        )
    products = products.cast("array<string>")
    sold = table.select(product=products.unnest(), _row=table._row)
    known = table.select(product=as_text(table.item_id))
    missing = sold.anti_join(known, "product").order_by(["_row", "product"]).limit(1).to_pyarrow().to_pylist()
    if missing:
        raise UserError(
            f"{path}, column 'product_ids', row {missing[0]['_row']}: there is no item {missing[0]['product']!r}; "
            f"add it to {path.name}, or take it out of the list"
        )
    return products


def _embedding(path: Path, table: ibis.Table) -> ibis.expr.types.ArrayValue:
    if not (table.embedding.type().is_array() and table.embedding.type().value_type.is_numeric()):
        raise UserError(
            f"{path}, column 'embedding': holds {table.embedding.type()}; write lists of numbers, in parquet or JSONL"
        )
    first = table.order_by("_row").limit(1).select("_row", width=table.embedding.length()).to_pyarrow().to_pylist()[0]
    row, width = first["_row"], first["width"]
    if not width:
        raise UserError(
            f"{path}, column 'embedding', row {row}: is empty; give every item an embedding, or drop the column"
        )
    differs = (table.embedding.length() != width) | table.embedding.isnull()
    message = f"has not the width {width} of row {row}; give all items one width"
    refuse(path, table, [Check("embedding", differs, message, show=False)])
    return table.embedding.cast("array<float32>")
