"""A file of judged pairs: how relevant an item is to a query, as a grade on a given scale."""

from dataclasses import dataclass
from pathlib import Path

import ibis
from ibis.backends import BaseBackend

from jaxrec.data.sources.checks import Check, as_number, as_text, check_words, not_null, refuse
from jaxrec.data.sources.formats import Wanted
from jaxrec.data.sources.query_files import not_blank
from jaxrec.data.sources.reading import read_table
from jaxrec.data.tables import store


@dataclass(frozen=True)
class GradeColumns:
    """The columns of a file of judged pairs."""

    query: str = "query"
    item: str = "item_id"
    grade: str = "grade"


JUDGMENTS = Wanted(("query", "item_id", "grade"), ("query", "item_id", "grade"), ("item_id",), numbers=("grade",))
"""The columns of a folder's file of judged pairs."""


def read_judgments(
    engine: BaseBackend, path: Path, columns: GradeColumns, grades: tuple[float, float], wanted: Wanted
) -> ibis.Table:
    """The checked pairs: query, item_id, grade, _row.

    wanted: the three columns, and how the file is written.

    Raises:
      UserError: a value is missing, a grade is no number or outside of the scale `grades`, or a pair occurs twice.
    """
    table = read_table(engine, path, wanted)
    check_words(path, table, (columns.query,), (columns.item,))
    copies = ibis.row_number().over(group_by=[table[columns.query], as_text(table[columns.item])], order_by=table._row)
    table = store(engine, table.mutate(_copy=copies), instead_of=table)
    grade, (low, high) = as_number(table, columns.grade), grades
    outside = (grade.value < low) | (grade.value > high)
    mend = f"is outside of the scale from {low:g} to {high:g}; correct it, or the source's `grades`"
    refuse(path, table, [
        *not_blank(table, columns.query),
        *not_null(table, columns.item),
        *grade.checks,
        Check(columns.grade, grade.value.isnull(), "is empty; grade the pair, or leave the row out", show=False),
        Check(columns.grade, outside, mend),
        Check(columns.item, table._copy > 0, "was judged for this query before; keep one of the rows"),
    ])  # fmt: skip
    texts = {"query": as_text(table[columns.query]), "item_id": as_text(table[columns.item])}
    return store(engine, table.select(**texts, grade=grade.value, _row=table._row), instead_of=table)


def refuse_strangers(path: Path, judged: ibis.Table, items: ibis.Table, column: str, mend: str) -> None:
    """Raises UserError for the first pair whose item is not in `items`; `column` is that of the item in the file."""
    strangers = judged.anti_join(items, "item_id")
    shown = strangers.rename({column: "item_id"}) if column != "item_id" else strangers
    refuse(path, shown, [Check(column, shown._row.notnull(), mend)])
