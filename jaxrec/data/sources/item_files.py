"""A file of items: its columns, their checks, and the text of an item that has none of its own."""

from pathlib import Path

import ibis
from ibis.backends import BaseBackend

from jaxrec.config import UserError
from jaxrec.data.sources.checks import Check, as_number, as_text, check_words, choice, not_null, refuse
from jaxrec.data.sources.formats import Wanted
from jaxrec.data.tables import store

SCENARIOS = ("product_card", "short_video", "live_stream")

ITEMS = Wanted(
    ("item_id", "title", "category", "brand", "price", "text", "scenario", "product_ids", "embedding"),
    required=("item_id", "title"),
    ids=("item_id", "product_ids"),
    vectors=("embedding",),
    further=True,
)


def typed_items(engine: BaseBackend, path: Path, table: ibis.Table) -> ibis.Table:
    """The checked items: item_id, title, text, category, brand, price and the further columns of the file.

    Raises:
      UserError: a value is missing or mistyped, or an item occurs twice.
    """
    for name in table.columns:
        if name.lower() in _MADE:
            raise UserError(f"{path}: the column {name!r} has the name of {_MADE[name.lower()]}; rename it")
    check_words(path, table, ("title", "category", "brand", "text", "scenario"), ITEMS.ids)
    copies = ibis.row_number().over(group_by=as_text(table.item_id), order_by=table._row)
    table = store(engine, table.mutate(_copy=copies))
    checks = [*not_null(table, "item_id"), Check("item_id", table._copy > 0, "occurs twice; give every item one row")]
    checks += not_null(table, "title")
    columns = {name: as_text(table[name]) for name in ("item_id", "title")}
    for name in ("category", "brand"):
        columns[name] = as_text(table[name]).fill_null("") if name in table.columns else ibis.literal("")
    columns["price"] = ibis.null("float64")
    if "price" in table.columns:
        checks += as_number(table, "price").checks
        columns["price"] = as_number(table, "price").value
    if "scenario" in table.columns:
        checks += choice(table, "scenario", SCENARIOS, "use one of these")
        columns["scenario"] = as_text(table.scenario)
    refuse(path, table, checks)
    words = [columns[name] for name in ("title", "category", "brand")]
    joined = ibis.literal(". ").join([word.nullif("") for word in words])
    columns["text"] = as_text(table.text).coalesce(joined) if "text" in table.columns else joined
    if "product_ids" in table.columns:
        columns["product_ids"] = _product_ids(engine, path, table)
    if "embedding" in table.columns:
        columns["embedding"] = _embedding(path, table)
    further = [name for name in table.columns if name not in columns and not name.startswith("_")]
    order = ["item_id", "title", "text", "category", "brand", "price"]
    order += [name for name in columns if name not in order]
    return store(
        engine, table.select(**{name: columns[name] for name in order}, **{name: table[name] for name in further})
    )


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
