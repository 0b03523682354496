"""Checks of a user's table: conditions evaluated together in one pass, and the message for the first bad row."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.datatypes as dt

from jaxrec.config import UserError

# Unix seconds stay below this until the year 5138; milliseconds passed it in 1973.
_MILLISECONDS = 10**11


@dataclass(frozen=True)
class Check:
    """A row is bad where `bad` is true; `mend` ends the sentence `FILE, column C, row N: VALUE ...`."""

    column: str
    bad: ibis.expr.types.BooleanValue
    mend: str
    show: bool = True
    """Whether the message quotes the value."""


@dataclass(frozen=True)
class Typed:
    """A column converted to the type that it should have, with the checks that it could be."""

    value: ibis.Value
    checks: list[Check]


def refuse(path: Path, table: ibis.Table, checks: Sequence[Check]) -> None:
    """Raises UserError for the first check that fails, naming the first bad row (`table` has a column `_row`)."""
    flags = table.aggregate(**{f"bad_{n}": check.bad.fill_null(False).any() for n, check in enumerate(checks)})
    flags = flags.to_pyarrow().to_pylist()[0]
    for n, check in enumerate(checks):
        if flags[f"bad_{n}"]:
            row = table.filter(check.bad).order_by("_row").limit(1).select("_row", value=table[check.column])
            first: dict[str, Any] = row.to_pyarrow().to_pylist()[0]
            shown = str(first["value"]) if isinstance(first["value"], Decimal) else repr(first["value"])
            value = f"{shown} " if check.show else ""
            raise UserError(f"{path}, column {check.column!r}, row {first['_row']}: {value}{check.mend}")


def as_text(column: ibis.Value) -> ibis.expr.types.StringValue:
    """A column as text, the empty text as null."""
    return column.cast("string").nullif("")


def not_null(table: ibis.Table, column: str) -> list[Check]:
    """Ids and titles have a value, and ids are no floating-point numbers (12.0 and '12' would be two users)."""
    if table[column].type().is_floating():
        return [
            Check(column, table[column].notnull(), "is a floating-point number; write ids as text or whole numbers")
        ]
    return [Check(column, as_text(table[column]).isnull(), "is empty; fill it in or leave the row out", show=False)]


def choice(table: ibis.Table, column: str, allowed: Sequence[str], mend: str) -> list[Check]:
    """The column holds one of the allowed words."""
    bad = ~as_text(table[column]).isin(allowed) | as_text(table[column]).isnull()
    return [Check(column, bad, f"is none of {', '.join(allowed)}; {mend}")]


def as_number(table: ibis.Table, column: str) -> Typed:
    """A column of finite numbers or nulls as float64."""
    text = as_text(table[column])
    number = text.try_cast("float64")
    bad = text.notnull() & (number.isnull() | number.isnan() | number.isinf())
    return Typed(number, [Check(column, bad, "is no number; write it with a decimal point and without a currency")])


def as_seconds(table: ibis.Table, column: str) -> Typed:
    """A column of Unix seconds, or of timestamps (UTC where no zone is given), as int64 seconds."""
    value = table[column]
    if value.type().is_timestamp() or value.type().is_date():
        seconds = value.cast("timestamp").epoch_seconds().cast("int64")
    elif value.type().is_integer():
        seconds = value.cast("int64")
    else:
        text = as_text(value)
        # DuckDB reads '1.5' as the integer 2, and '2024' as no time; only digits are seconds.
        whole = ibis.ifelse(text.re_search(r"^-?[0-9]+(\.0)?$"), text, ibis.null("string")).try_cast("int64")
        zoned = text.try_cast(dt.Timestamp(timezone="UTC"))
        seconds = whole.coalesce(zoned.epoch_seconds().cast("int64"))
    return Typed(seconds, [
        Check(column, seconds.isnull(), "is no time; write whole Unix seconds, or a time as 2024-05-31 18:00:00"),
        Check(column, seconds > _MILLISECONDS, "is in milliseconds; divide by 1000, times are in Unix seconds"),
        Check(column, seconds < 0, "is before 1970; write Unix seconds"),
    ])  # fmt: skip
