"""What the ablations of whole systems share: their flags, and the table of what they measured."""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxrec.config import UserError
from shared import results


def parse_variants(text: str, known: Collection[str]) -> list[str]:
    """Names with commas between, of those that are known; the first known one where there is none.

    Raises:
      UserError: one is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--variants: there is no {unknown[0]!r}; give some of {', '.join(known)}")
    return names or [next(iter(known))]


def with_files(config: Any, pairs: Sequence[str]) -> Any:
    """The configuration with other files in its source, given as FIELD=FILE.

    Raises:
      UserError: the source has no such field.
    """
    known = {each.name for each in dataclasses.fields(config.data)}
    given = dict(pair.partition("=")[::2] for pair in pairs)
    for name, value in given.items():
        if name not in known or not value:
            raise UserError(f"--data {name}={value}: give FIELD=FILE, with one of {', '.join(sorted(known))}")
    return replace(config, data=replace(config.data, **{name: Path(value) for name, value in given.items()}))


def table_of(entries: Sequence[dict[str, Any]], system: str, shown: Sequence[tuple[str, str]]) -> Table:
    """Test rows: mean and deviation over seeds of every variant, and of the baselines beside the first one.

    shown: (subset, metric) of each column; one without a value is left out.
    """
    found: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        for row in entry["rows"]:
            if row["split"] == "test" and (row["subset"], row["metric"]) in shown:
                own = row["model"] == system
                if own or entry["model"] == entries[0]["model"]:
                    name = entry["model"] if own else row["model"]
                    found[name][row["subset"], row["metric"]].append(row["value"])
    shown = [each for each in shown if any(values[each] for values in found.values())]
    table = Table("", *(f"{metric}, {subset.replace('_', ' ')}" for subset, metric in shown), title="test")
    for name, values in found.items():
        cells = [results.moments(values[each]) if values[each] else None for each in shown]
        table.add_row(name, *("" if cell is None else f"{cell[0]:.4f} ± {cell[1]:.4f}" for cell in cells))
    return table
