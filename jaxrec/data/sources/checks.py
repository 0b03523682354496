"""Checks of a user's table: conditions evaluated together in one pass, and the message for the first bad row."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import duckdb
import ibis
import ibis.expr.datatypes as dt

from jaxrec.config import UserError

# Unix seconds stay below this until the year 5138; milliseconds passed it in 1973.
_LAST = 10**11
_THIS_CENTURY = 978_307_200
_NUMBER = r"^\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\s*$"
_DATE = r"^(19|20)[0-9]{2}(0[1-9]|1[0-2])(0[1-9]|[12][0-9]|3[01])(([01][0-9]|2[0-3])([0-5][0-9]([0-5][0-9])?)?)?$"
_DATE_DIGITS = "is a date without separators; write it as 2024-05-31 or 2024-05-31 18:00:00, or as Unix seconds"

TimeUnit = Literal["seconds", "milliseconds", "microseconds", "nanoseconds"]
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
"""Whole numbers of a unit in a second."""

WHOLE_FLOAT = r"^(-?[0-9]+)\.0+$"
"""A whole number that was written as a floating-point one."""
FLOAT_ID = "is a floating-point number; write ids as text or whole numbers"


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
    """A column converted to its type, with the checks that every value can be converted."""

    value: ibis.Value
    checks: list[Check]


def refuse(path: Path, table: ibis.Table, checks: Sequence[Check]) -> None:
    """Raises UserError for the first check that fails, naming the first bad row (`table` has a column `_row`)."""
    if not checks:
        return
    flags = table.aggregate(**{f"bad_{n}": check.bad.fill_null(False).any() for n, check in enumerate(checks)})
    flags = flags.to_pyarrow().to_pylist()[0]
    for n, check in enumerate(checks):
        if flags[f"bad_{n}"]:
            row = table.filter(check.bad).order_by("_row").limit(1).select("_row", value=table[check.column])
            first: dict[str, Any] = row.to_pyarrow().to_pylist()[0]
            value = f"{_shown(first['value'])} " if check.show else ""
            raise UserError(f"{path}, column {check.column!r}, row {first['_row']}: {value}{check.mend}")


def _shown(value: Any) -> str:
    """A value as a message quotes it: numbers without quotes, also those of a file of texts."""
    number = isinstance(value, Decimal) or (isinstance(value, str) and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value))
    return str(value) if number else repr(value)


def as_text(column: ibis.Value) -> ibis.expr.types.StringValue:
    """A column as text, the empty text as null."""
    return column.cast("string").nullif("")


def check_words(path: Path, table: ibis.Table, texts: Sequence[str], ids: Sequence[str], more: str = "") -> None:
    """Texts and ids are of types that have one way of being written; ids are no floating-point numbers.

    12.0 and '12' would be two users, and 123456789012 is 1.23456789012e+11. `more` ends the message about them.

    Raises:
      UserError: a column is of another type. Columns that the table lacks are skipped.
    """
    for name in (name for name in (*ids, *texts) if name in table.columns):
        kind = table[name].type()
        inner = kind.value_type if kind.is_array() and name == "product_ids" else kind
        if name in ids and (inner.is_floating() or (inner.is_decimal() and inner.scale)):
            first = table.filter(table[name].notnull()).order_by("_row").limit(1)
            for row in first.select("_row", value=table[name].cast("string")).to_pyarrow().to_pylist():
                raise UserError(f"{path}, column {name!r}, row {row['_row']}: {row['value']} {FLOAT_ID}{more}")
        if inner.is_binary() or inner.is_nested():
            raise UserError(f"{path}, column {name!r}: holds {kind}; write it as text")


def not_null(table: ibis.Table, column: str) -> list[Check]:
    """Ids and titles have a value."""
    return [Check(column, as_text(table[column]).isnull(), "is empty; fill it in or leave the row out", show=False)]


def choice(table: ibis.Table, column: str, allowed: Sequence[str], mend: str) -> list[Check]:
    """The column holds one of the allowed words."""
    bad = ~as_text(table[column]).isin(allowed) | as_text(table[column]).isnull()
    return [Check(column, bad, f"is none of {', '.join(allowed)}; {mend}")]


def as_number(table: ibis.Table, column: str, flags: str = "") -> Typed:
    """A column of finite numbers or nulls as float64; NaN is null, a missing number.

    flags: what the message adds, such as the flags of a source that mend it.
    """
    value = table[column]
    if value.type().is_floating():
        number = ibis.ifelse(value.isnan(), None, value.cast("float64"))
        bad = number.isinf()
    else:
        text = as_text(value)
        number = ibis.ifelse(text.re_search(_NUMBER), text, None).try_cast("float64")
        bad = text.notnull() & (number.isnull() | number.isinf())
    mend = f"is no number; write it with a decimal point and without a currency, or leave it empty{flags}"
    return Typed(number, [Check(column, bad, mend)])


@dataclass(frozen=True)
class TimeForm:
    """How a source says that its times are written; as it stands, by the values alone."""

    form: str = ""
    """As strptime's; empty: whole numbers, or times that begin with the year (ISO 8601)."""
    unit: TimeUnit = "seconds"
    """The unit of whole numbers."""
    flags: bool = False
    """Whether the source has the flags of these two, which messages then name."""


AS_IT_STANDS = TimeForm()


def as_seconds(table: ibis.Table, column: str, written_as: TimeForm = AS_IT_STANDS) -> Typed:
    """A column of Unix times, or of timestamps (UTC where no zone is given), as int64 seconds."""
    value, unit = table[column], UNITS[written_as.unit]
    if written_as.form:
        return _formatted(table, column, written_as)
    compact: list[Check] = []
    if value.type().is_timestamp() or value.type().is_date():
        seconds = value.cast("timestamp").epoch_seconds().cast("int64")
        written = ibis.literal(True)
    else:
        text = as_text(value)
        # DuckDB reads '1.5' as the integer 2, and '2024' as no time; only digits are seconds.
        digits = ibis.ifelse(text.re_search(r"^-?[0-9]+(\.0)?$"), text.re_replace(r"\.0$", ""), None)
        # It reads 'epoch' and 'infinity' as times too.
        written = text.re_search(r"^[0-9]{4}[-/][0-9]{1,2}[-/][0-9]{1,2}([ T]|$)")
        zoned = ibis.ifelse(written, text, None).try_cast(dt.Timestamp(timezone="UTC"))
        whole = digits.try_cast("int64")
        seconds = (whole if unit == 1 else whole // unit).coalesce(zoned.epoch_seconds().cast("int64"))
        dates = f"{_DATE_DIGITS}; or give --data.time-format %Y%m%d" if written_as.flags else _DATE_DIGITS
        compact = [Check(column, _are_dates(table, digits), dates)] if unit == 1 else []
    mend = "is no time; write whole Unix seconds, or a time as 2024-05-31 18:00:00"
    if written_as.flags:
        mend += ", or give their form, such as --data.time-format '%d.%m.%Y %H:%M'"
    return Typed(seconds, [
        *compact,
        Check(column, seconds.isnull(), mend),
        *_large(column, seconds, written, written_as),
        Check(column, seconds < 0, "is before 1970; write Unix seconds, or a time as 2024-05-31 18:00:00"),
    ])  # fmt: skip


def _large(
    column: str, seconds: ibis.expr.types.IntegerValue, written: ibis.expr.types.BooleanValue, written_as: TimeForm
) -> list[Check]:
    """Times in a smaller unit than seconds, which would be far away as seconds, and times that are."""
    large = ~written & (seconds > _LAST)
    far = "is after the year 5138, which is no time of an event; leave the row out, or write the time"

    def mend(unit: str, times: int) -> str:
        flag = f", or give --data.time-unit {unit}" if written_as.flags else ""
        return f"is in {unit}; divide by {times:,}, times are in Unix seconds{flag}"

    return [
        *(Check(column, large & (seconds <= _LAST * 10 ** (power + 3)) & (seconds > _LAST * 10**power),
                mend(unit, 10 ** (power + 3)))
          for power, unit in ((0, "milliseconds"), (3, "microseconds"))),
        Check(column, large, mend("nanoseconds", 10**9)),
        Check(column, written & (seconds > _LAST), far),
    ]  # fmt: skip


@ibis.udf.scalar.builtin
def try_strptime(text: str, form: str) -> dt.timestamp:
    """DuckDB's: the time that a text writes in a form, null where it does not."""


def check_form(engine: Any, form: str) -> None:
    """UserError unless times can be read in a form."""
    try:
        engine.con.execute("SELECT try_strptime('', ?)", [form]).fetchall()
    except duckdb.Error as error:
        raise UserError(f"time_format={form!r} can't be read; write one as strptime's, such as %Y%m%d%H%M%S") from error


def _formatted(table: ibis.Table, column: str, written_as: TimeForm) -> Typed:
    """The times of a column in a form, as Unix seconds; UTC without a zone."""
    form = written_as.form
    seconds = try_strptime(as_text(table[column]).fill_null(""), form).epoch_seconds().cast("int64")
    return Typed(seconds, [
        Check(column, seconds.isnull(), f"is no time of the form {form}; correct it or time_format"),
        Check(column, seconds < 0, "is before 1970; correct the time, or leave the row out"),
    ])  # fmt: skip


def _are_dates(table: ibis.Table, digits: ibis.expr.types.StringValue) -> ibis.expr.types.BooleanValue:
    """Where whole numbers are dates without separators, such as 20240531 or 20240531180000.

    As seconds, eight digits are a day of 1970, and ten one of 2033 to 2036. A log whose times count from its own
    beginning may pass through some of them, but not through them alone, and not beside times of this century.
    """
    dates = digits.re_search(_DATE)
    longer = digits.length() > 10
    seconds = digits.try_cast("int64")
    facts = table.aggregate(
        others=(digits.notnull() & ~dates).any(), latest=ibis.ifelse(dates, None, seconds).max()
    ).to_pyarrow().to_pylist()[0]  # fmt: skip
    short = not facts["others"] or (facts["latest"] or 0) >= _THIS_CENTURY
    return dates & (longer | ibis.literal(short))
