"""The run directory: phases that are skipped when their inputs are unchanged and can be killed at any moment.

    run = Run.open("runs/a", config)
    tables = run.phase("tables", fingerprint(config.data), make_tables)        # make_tables(folder) writes files there
    examples = run.phase("examples", fingerprint(tables), make_examples)
    run.stage("stages/train", fingerprint(examples, config.training), train)  # train(folder) resumes what it finds

A phase writes into `<name>.partial`, which is fsynced and renamed to `<name>` when complete: a folder without the
suffix is always whole. A stage keeps its own checkpoints, so it works in its final folder and is marked when done.

Fault injection, for the tests: with JAXREC_KILL_AT=<point> in the environment the process kills itself (SIGKILL) at
that point. Points: `phase:<name>` before the work of a phase or stage, `partial:<name>` after it and before the rename
(or the mark of a stage), `done:<name>` after that, and `step:<n>` when training step n is finished.
"""

import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxrec.config import UserError, differences, fingerprint, places, to_json

Item = TypeVar("Item")

console = Console(highlight=False, soft_wrap=True)

_OPENING = threading.Lock()
_HELD: weakref.WeakValueDictionary[tuple[int, int], TextIO] = weakref.WeakValueDictionary()
"""The locked files of run directories, by device and inode: every `Run` of one directory in this process holds one."""


class Run:
    """A run directory. `path` is its folder; the folders of the phases are attributes (`run.tables`, ...)."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.tables = self.path / "tables"
        self.semantic_ids = self.path / "semantic_ids"
        self.examples = self.path / "examples"
        self.stages = self.path / "stages"
        self.export = self.path / "export"
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self._lock = None

    @classmethod
    def open(cls, path: Path, config: Any) -> "Run":
        """Creates the run directory, or opens the one of the same configuration, for this process alone.

        Raises:
          UserError: it holds a run of another configuration (but for places, such as `data.path`, which may change),
            is used by another process, or can't be written.
        """
        run = cls(path)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run directory {run.path} can't be created: {error.strerror}") from error
        run._take_lock()
        wanted = to_json(config)
        if run.config_file.exists():
            _check_same_config(run, wanted, set(places(config)))
        else:
            with writing(run.path):
                write_json(run.config_file, wanted)
        return run

    @classmethod
    def load(cls, path: Path) -> tuple["Run", dict[str, Any]]:
        """Opens an existing run directory for reading, with its configuration as JSON values.

        Raises:
          UserError: there is no run at `path`.
        """
        run = cls(path)
        if not run.config_file.exists():
            raise UserError(f"{run.path} holds no run (no config.json); make one with train.py CONFIG --run {run.path}")
        return run, read_json(run.config_file)

    def phase(self, name: str, inputs: str, make: Callable[[Path], None]) -> str:
        """Makes the folder `name` unless it was made from the same inputs.

        Args:
          name: the folder inside the run directory.
          inputs: fingerprint of all that the result depends on.
          make: writes the files into the folder that it is given.

        Returns:
          A fingerprint of the result, for the `inputs` of the next phase.

        Raises:
          UserError: the disk is full. Nothing half written is left.
        """
        folder, partial = self.path / name, self.path / f"{name}.partial"
        result = fingerprint(name, inputs)
        if _marked(folder, inputs):
            shutil.rmtree(partial, ignore_errors=True)
            return result
        fault_point(f"phase:{name}")
        _remove(partial)
        try:
            with writing(folder):
                partial.mkdir(parents=True)
                make(partial)
                write_json(partial / "fingerprint.json", {"inputs": inputs})
                _sync_tree(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        fault_point(f"partial:{name}")
        _remove(folder)
        partial.rename(folder)
        sync(folder.parent)
        fault_point(f"done:{name}")
        return result

    def stage(self, name: str, inputs: str, make: Callable[[Path], None]) -> str:
        """Like `phase`, for work that goes on from its own checkpoints: `make` gets the final folder, as it was left.

        A folder that was begun from other inputs is emptied first.
        """
        folder = self.path / name
        result = fingerprint(name, inputs)
        if _marked(folder, inputs):
            return result
        fault_point(f"phase:{name}")
        with writing(folder):
            begun = folder / "begun.json"
            if not begun.exists() or read_json(begun).get("inputs") != inputs:
                _remove(folder)
                folder.mkdir(parents=True)
                write_json(begun, {"inputs": inputs})
            make(folder)
            fault_point(f"partial:{name}")
            write_json(folder / "fingerprint.json", {"inputs": inputs})
        fault_point(f"done:{name}")
        return result

    def _take_lock(self) -> None:
        """Holds the directory for this process until its last `Run` of it is gone, or it ends, however it ends."""
        with _OPENING:
            file = (self.path / ".lock").open("w")
            status = os.fstat(file.fileno())
            self._lock = _HELD.get((status.st_dev, status.st_ino))
            if self._lock is not None:
                file.close()
                return
            try:
                # Not lockf, whose lock ends for the whole process as soon as any descriptor of the file is closed.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.close()
                raise UserError(
                    f"another process is working in {self.path}; wait for it, or give another --run"
                ) from error
            self._lock = _HELD[status.st_dev, status.st_ino] = file


def write_json(path: Path, value: Any) -> None:
    """Writes JSON values so that after a crash the file is either the old or the new one, whole."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync(path.parent)


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: the file is missing, damaged or no JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; run train.py again on this run directory") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: this is no JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it is no text ({error}); restore it from a copy") from error


def sync(path: Path) -> None:
    """Has a file, or the entries of a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a full disk into a UserError that names the folder."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not disk_full(error):
            raise
        raise UserError(f"the disk is full: {folder} could not be written; free some space and run it again") from error


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says that there is no space left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # DuckDB and tensorstore raise their own types and only quote the system's message.
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def fault_point(point: str) -> None:
    """Kills this process if the tests ask for it at this point; see the module's docstring."""
    if os.environ.get("JAXREC_KILL_AT") == point:
        os.kill(os.getpid(), signal.SIGKILL)


def report_user_errors(main: Callable[[], int | None]) -> int:
    """Runs a command's `main`; a UserError is printed without a traceback and gives the exit status 2, Ctrl-C 130.

    Who reads only the first lines (`--help | head`) closes the pipe: status 141, as of a program that the signal ends.
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
        # What is still in the buffer has nowhere to go when Python flushes it at exit.
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
    """Yields from `iterable` under a progress bar with the time that is left."""
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    with progress() as bars:
        task = bars.add_task(description, total=total)
        for item in iterable:
            yield item
            bars.advance(task)


class PlainTask:
    """State of one task of a PlainProgress; `fields` are the extra values that its columns show."""

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
            # What took no time deserves no line.
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


def _check_same_config(run: Run, wanted: dict[str, Any], places: set[str]) -> None:
    """Places may differ, since the fingerprints of phases know the data by its content; the new ones are kept."""
    different = list(differences(read_json(run.config_file), wanted))
    changed = [f"{key} ({old!r} there, {new!r} now)" for key, old, new in different if key not in places]
    if changed:
        raise UserError(
            f"{run.path} holds a run of another configuration: {', '.join(changed)}; "
            f"give another --run, or delete the folder {run.path}"
        )
    if different:
        with writing(run.path):
            write_json(run.config_file, wanted)


def _marked(folder: Path, inputs: str) -> bool:
    mark = folder / "fingerprint.json"
    return mark.exists() and read_json(mark).get("inputs") == inputs


def _remove(folder: Path) -> None:
    """Removes a folder; killed in between, it leaves nothing under its name that looks whole."""
    if folder.exists():
        stale = folder.with_name(f"{folder.name}.stale")
        shutil.rmtree(stale, ignore_errors=True)
        folder.rename(stale)
        shutil.rmtree(stale)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)
