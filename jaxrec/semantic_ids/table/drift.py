"""Drift of a catalogue from its codebooks: use of the IDs, version by version (OneSearch §4.2 and Figure 6)."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from jaxrec.semantic_ids.table.version_files import read_lineage

OUTDATED = 1.5
"""New items are reported as a bad fit from this ratio of their error to that of the items of the fit."""
RISEN = 1.25
"""The same for the ratio to the error of the first later items, which is the fairer comparison: the items of the fit
have a lower error (on Amazon Beauty, 3 x 256 codes and 9,680 items, 1.21 times lower than items of the same kind)."""


def drift(folder: Path) -> list[dict]:
    """One row for each version from the first to the current one, as plain numbers for JSON.

    `cur`: distinct prefixes in use over all possible ones, for prefixes of 1, 2, ... M codes; `cur_total`: the same for
    whole IDs (OneSearch's CUR). `icr`: share of the IDs in use that belong to one item (ICR). `error_added`: mean
    squared error of the items that the version encoded, before collisions were resolved. `error_ratio`: its ratio to
    that of the first version with known errors. `error_rise`: its ratio to that of the first version that added or
    re-encoded items. Both are None where no item was encoded or there is no such version. `hint`: a sentence about
    `OUTDATED` or `RISEN` items, or empty.

    Raises:
      UserError: there are no versions, or one is damaged.
    """
    rows: list[dict] = []
    known: list[float] = []
    later: list[float] = []
    for record in read_lineage(folder):
        figures, counts = record["figures"], record["counts"]
        error = figures["error"]
        known += [] if error is None else [error]
        later += [] if error is None or record["action"] == "begin" else [error]
        ratio, rise = _times(error, known[:1]), _times(error, later[:1])
        rows.append(
            {
                "version": record["version"],
                "time": record["time"],
                "action": record["action"],
                **{name: counts.get(name, 0) for name in ("added", "returned", "changed", "removed")},
                "items": figures["items"],
                "cur_total": figures["utilization"][-1],
                "cur": figures["utilization"],
                "icr": figures["independent_coding_rate"],
                "conflict_rate": figures["conflict_rate"],
                "largest_bucket": figures["largest_bucket"],
                "error_added": error,
                "error_ratio": ratio,
                "error_rise": rise,
                "hint": _hint(record["version"], ratio, rise),
            }
        )
    return rows


def drift_table(rows: list[dict]) -> Table:
    """The rows of `drift` for a terminal; re-encoded items are marked ~."""
    title = "Versions of the IDs: CUR of prefixes, ICR, items that share, most items an ID, error of the new"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("v")
    table.add_column("action")
    prefixes = [f"CUR {level}" for level in range(1, len(rows[0]["cur"]))]
    for name in ("items", "+/-", *prefixes, "CUR", "ICR", "shared", "most", "error"):
        table.add_column(name, justify="right")
    for row in rows:
        came = row["added"] + row["returned"] - row["removed"]
        shares = [f"{100 * share:.3g}%" for share in (*row["cur"], row["icr"], row["conflict_rate"])]
        table.add_row(
            str(row["version"]),
            row["action"],
            f"{row['items']:,}",
            f"~{row['changed']:,}" if row["action"] == "reencode" else f"{came:+,}",
            *shares,
            f"{row['largest_bucket']:,}",
            "" if row["error_ratio"] is None else f"{row['error_ratio']:.2f}x",
        )
    return table


def _times(error: float | None, others: list[float]) -> float | None:
    return error / others[0] if error is not None and others and others[0] else None


def _hint(version: int, ratio: float | None, rise: float | None) -> str:
    compared = ((ratio, OUTDATED, "first ones"), (rise, RISEN, "first that came later"))
    for times, most, others in compared:
        if times is not None and times >= most:
            return (
                f"The items encoded in version {version} have {times:.2f} times the squared error of the {others}: "
                "the codebooks are outdated for them; fit new ones with the tokenize phase, and train on the new IDs."
            )
    return ""
