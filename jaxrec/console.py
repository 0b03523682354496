"""What a command prints: messages, progress bars with an ETA, and the errors of a user as one sentence."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxrec.config import UserError

Item = TypeVar("Item")

console = Console(highlight=False, soft_wrap=True)


def report_user_errors(main: Callable[[], int | None]) -> int:
    """Runs a command's `main`; a UserError is printed without a traceback and gives the exit status 2, Ctrl-C 130.

    A closed pipe (`--help | head`) gives status 141, as if SIGPIPE had ended the program.
    """
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python would fail to flush the rest of the buffer at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def progress(*columns: str) -> "Progress | PlainProgress":
    """A progress display, used as a context manager: rich bars on a terminal, else a line now and then.

    Args:
      columns: rich templates shown before the time, e.g. "loss {task.fields[loss]:.3f}".
    """
    if not console.is_terminal:
        return PlainProgress(columns)
    texts = [TextColumn(column) for column in columns]
    head = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*head, *texts, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def track(iterable: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yields from `iterable` under a progress bar with the remaining time."""
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    with progress() as bars:
        task = bars.add_task(description, total=total)
        for item in iterable:
            yield item
            bars.advance(task)


class PlainTask:
    """State of one task of a PlainProgress; `fields` are the extra values of its columns."""

    def __init__(self, description: str, total: float | None, completed: float, fields: dict[str, Any]):
        self.description, self.total, self.completed, self.fields = description, total, completed, fields
        self.started = self.printed = time.monotonic()
        self.first = completed


class PlainProgress:
    """The few methods of rich's Progress that jaxrec uses, as plain lines at most every `interval` seconds."""

    def __init__(self, columns: tuple[str, ...] = (), interval: float = 20.0):
        self.columns, self.interval = columns, interval
        self.tasks: list[PlainTask] = []

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, *_: object) -> None:
        for task in self.tasks:
            # No line for tasks that took no time.
            if time.monotonic() - task.started > 2:
                self._print(task)

    def add_task(self, description: str, total: float | None = None, completed: float = 0, **fields: Any) -> int:
        self.tasks.append(PlainTask(description, total, completed, fields))
        return len(self.tasks) - 1

    def advance(self, task_id: int, advance: float = 1) -> None:
        self.update(task_id, advance=advance)

    def update(
        self,
        task_id: int,
        *,
        advance: float = 0,
        completed: float | None = None,
        total: float | None = None,
        description: str | None = None,
        **fields: Any,
    ) -> None:
        task = self.tasks[task_id]
        task.completed = task.completed + advance if completed is None else completed
        task.total = task.total if total is None else total
        task.description = description or task.description
        task.fields.update(fields)
        if time.monotonic() - task.printed >= self.interval:
            self._print(task)

    def _print(self, task: PlainTask) -> None:
        task.printed = now = time.monotonic()
        seconds, done = now - task.started, task.completed - task.first
        parts = [f"{task.completed:,.0f}" + (f"/{task.total:,.0f}" if task.total else "")]
        parts += [column.format(task=task) for column in self.columns]
        parts.append(f"{seconds:.0f} s")
        if task.total and done and task.completed < task.total:
            parts.append(f"{(task.total - task.completed) * seconds / done:.0f} s left")
        console.print(f"{task.description}: {', '.join(parts)}", markup=False)
