"""Declarative filters over the columns of a catalogue.

    {"category": ["shoes", "bags"], "price": {"min": 5, "max": 20}, "in_stock": true}

All columns must match; a list matches any of its values; bounds are inclusive; a missing value (null or NaN) never
matches. A column of lists of words matches if any of its words does.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxrec.config import UserError

MAX_VALUES = 10_000
"""The most values of one list: masks are cached with their filters as keys."""
KINDS = {"text": "text", "number": "numbers", "boolean": "true and false"}


@dataclass(frozen=True)
class OneOf:
    """The value is one of these."""

    kind: str
    """text, number or boolean; "" when there are no values, so that nothing matches"""
    values: tuple


@dataclass(frozen=True)
class Between:
    """The number is within these inclusive bounds; None = no bound."""

    min: float | None
    max: float | None


Where = tuple[tuple[str, OneOf | Between], ...]
"""(column, condition), sorted by column: equal filters are equal keys."""


def parse_where(conditions: Mapping[str, Any]) -> Where:
    """A filter from JSON values, each a value, a list of values or {"min": , "max": }.

    Raises:
      UserError: another form, more than MAX_VALUES values in one list or values of several types, bounds that are no
        numbers, min above max.
    """
    if not isinstance(conditions, Mapping):
        raise UserError(f'filter is {_shown(conditions)}: give an object such as {{"category": ["shoes"]}}')
    return tuple((str(column), _condition(str(column), conditions[column])) for column in sorted(conditions))


def _condition(column: str, value: Any) -> OneOf | Between:
    if isinstance(value, Mapping):
        return _between(column, value)
    values = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
    if len(values) > MAX_VALUES:
        raise UserError(
            f"filter.{column} lists {len(values)} values: give at most {MAX_VALUES}, or bounds; for items, `allowed`"
        )
    kinds = {_kind(column, each) for each in values}
    if len(kinds) > 1:
        raise UserError(f"filter.{column} lists {' and '.join(sorted(kinds))} values: give values of one type")
    return OneOf(kinds.pop() if kinds else "", tuple(sorted(set(values))))


def _between(column: str, bounds: Mapping) -> Between:
    if not bounds or set(bounds) - {"min", "max"}:
        raise UserError(f'filter.{column} is {_shown(bounds)}: bounds are {{"min": 5, "max": 20}}, or one of them')
    for name, bound in bounds.items():
        if bound is not None and _kind(f"{column}.{name}", bound) != "number":
            raise UserError(f"filter.{column}.{name} is {_shown(bound)}: give a number")
    low, high = bounds.get("min"), bounds.get("max")
    if low is not None and high is not None and low > high:
        raise UserError(f"filter.{column} has min {low} above max {high}: no item can match")
    return Between(low, high)


def _kind(column: str, value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "boolean"
    if isinstance(value, int | float | np.integer | np.floating) and _is_finite(column, value):
        return "number"
    if isinstance(value, str):
        return "text"
    raise UserError(f"filter.{column} has the value {_shown(value)}: give text, numbers, true or false")


def _is_finite(column: str, value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError as error:  # an integer beyond all floats
        raise UserError(f"filter.{column} has a number beyond {sys.float_info.max:.2}: give a smaller one") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


@dataclass(frozen=True, eq=False)
class Column:
    """A column in a form that is quick to compare: words as numbers, and a mask of the values present."""

    kind: str
    values: np.ndarray
    """numbers or bool [I]; for text the number of its word, int32 [I], -1 = missing; for lists those of all words"""
    present: np.ndarray | None
    """bool [I]; None for text"""
    words: dict[str, int] | None = None
    rows: np.ndarray | None = None
    """for lists: int64, the item of each word"""
    items: int = 0

    def matches(self, condition: OneOf | Between) -> np.ndarray:
        """bool [I]; the condition is of this column's kind."""
        if isinstance(condition, OneOf) and not condition.values:
            return np.zeros(self.items, bool)
        if self.words is not None:
            wanted = np.zeros(len(self.words) + 1, bool)
            wanted[[self.words[word] for word in condition.values if word in self.words]] = True
            hits = wanted[self.values]  # -1 is the last, which is never wanted
            return hits if self.rows is None else np.bincount(self.rows[hits], minlength=self.items) > 0
        if isinstance(condition, OneOf):
            return self.present & _among(self.values, condition.values)
        matches = self.present
        if condition.min is not None:
            matches = matches & (self.values >= condition.min)
        return matches if condition.max is None else matches & (self.values <= condition.max)


def _among(values: np.ndarray, wanted: Sequence[float]) -> np.ndarray:
    """bool [I]: which of numbers or booleans [I] are among the wanted ones, in one pass.

    Wanted numbers are converted to the column's type: integers are compared as integers, 0.1 is the 0.1 of float32.
    """
    if np.issubdtype(values.dtype, np.integer):
        info = np.iinfo(values.dtype)
        wanted = [int(each) for each in wanted if each == int(each) and info.min <= each <= info.max]
    with np.errstate(over="ignore"):
        given = np.array(wanted, values.dtype)
    given = np.unique(given[np.isfinite(given)])
    if not len(given):
        return np.zeros(len(values), bool)
    return given[np.minimum(np.searchsorted(given, values), len(given) - 1)] == values


def index_column(name: str, column: pa.ChunkedArray) -> Column:
    """A column of the items table, ready to be compared.

    Raises:
      UserError: it holds neither text, numbers nor booleans.
    """
    kind, items, rows = column.type, len(column), None
    array = column.combine_chunks()
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        rows = pc.list_parent_indices(array).to_numpy(zero_copy_only=False)
        array, kind = pc.list_flatten(array), kind.value_type
    if pa.types.is_dictionary(kind):
        array, kind = array.cast(kind.value_type), kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        encoded = array.dictionary_encode()
        words = {word: number for number, word in enumerate(encoded.dictionary.to_pylist())}
        numbers = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return Column("text", numbers, None, words, rows, items)
    if rows is None and pa.types.is_boolean(kind):
        return Column("boolean", _filled(array, False), _present(array), items=items)
    if rows is None and (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        array = array.cast(pa.float64()) if pa.types.is_decimal(kind) else array
        values, present = _filled(array, 0), _present(array)
        if pa.types.is_floating(array.type):
            present = present & ~np.isnan(values)
        return Column("number", values, present, items=items)
    raise UserError(f"filter.{name}: the column is {column.type}, and filters work on text, numbers and booleans")


def check_kind(name: str, column: Column, condition: OneOf | Between) -> None:
    """UserError when the condition is not of the column's kind."""
    asked = "number" if isinstance(condition, Between) else condition.kind
    if asked and asked != column.kind:
        shown = "bounds" if isinstance(condition, Between) else _shown(condition.values[0])
        raise UserError(f"filter.{name} is {shown}, but the column holds {KINDS[column.kind]}")


def _filled(array: pa.Array, value: Any) -> np.ndarray:
    return array.fill_null(value).to_numpy(zero_copy_only=False)


def _present(array: pa.Array) -> np.ndarray:
    return array.is_valid().to_numpy(zero_copy_only=False)
