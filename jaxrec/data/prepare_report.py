"""What preparation read, dropped and kept of a log, and why so many users are tested: a table on the screen."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from jaxrec.console import console

WHY = {
    "event of an unknown item": "the table of items lacks it",
    "repeat inside a session": "the same user, item and behavior again",
    "after the last target": "nothing that is predicted follows, so that nothing can be learned or tested",
    "rare item or user": "below the limits of prepare.k_core",
    "row of an item that was listed before": "the first row of an item counts",
}
"""What the reasons that preparation counts by mean, where their names don't say it."""


def print_report(statistics: dict[str, Any]) -> None:
    """Prints the counts of statistics.json, or of `jaxrec.data.prepare.survey`."""
    table = Table("", "rows", "", box=None, pad_edge=False, header_style="bold")
    table.columns[1].justify = "right"
    for what, count, why in report_rows(statistics):
        table.add_row(what, count, why)
    console.print(table, markup=False)


def report_rows(statistics: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(read, dropped, kept or tested; the number; of what and why) in the order of the table."""
    for file, rows in statistics.get("rows_read", {}).items():
        yield "read", f"{rows:,}", f"rows of {file}"
    for reason, rows in statistics["dropped"].items():
        yield "dropped", f"{rows:,}", f"{reason}: {WHY[reason]}" if reason in WHY else reason
    behaviors = ", ".join(f"{name} {count:,}" for name, count in statistics["events_by_behavior"].items() if count)
    yield "kept", f"{statistics['events']:,}", f"events: {behaviors}" if behaviors else "events"
    untitled = statistics.get("items_without_title", 0)
    called = f", of which {untitled:,} without a title are called by their ids" if untitled else ""
    yield "kept", f"{statistics['items']:,}", f"items{called}"
    yield "kept", f"{statistics['users']:,}", "users"
    splits = ", ".join(f"{name} {count:,}" for name, count in statistics["events_by_split"].items())
    yield "", "", f"events by split: {splits}"
    if statistics["target_behaviors"]:
        yield "tested", f"{statistics['test_users']:,}", f"of {statistics['users']:,} users: {tested(statistics)}"


def tested(statistics: dict[str, Any]) -> str:
    """Why so many users are tested."""
    names, by = " or ".join(statistics["target_behaviors"]), statistics.get("users_by_target_sessions", {})
    if statistics["split"] == "time":
        return f"those with a {names} in the period of the test (prepare.time_split)"
    if statistics["split"] == "given":
        return "as the log itself says"
    unit = "events" if statistics["split"] == "leave_one_out" else "sessions"
    fewer = ", ".join(f"{count:,} have {number}" for number, count in by.items() if number != "3 or more" and count)
    rest = f"; of the others, whose {unit} are all for training, {fewer}" if fewer else ""
    return f"those with 3 or more {unit} with a {names}: the last is tested, the one before it validates{rest}"
