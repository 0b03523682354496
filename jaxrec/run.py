"""The run directory: phases that are skipped if their inputs are unchanged and can be killed at any moment.

    run = Run.open("runs/a", config)
    tables = run.phase("tables", fingerprint(config.data), make_tables)        # make_tables(folder) writes files there
    examples = run.phase("examples", fingerprint(tables), make_examples)
    run.stage("stages/train", fingerprint(examples, config.training), train)  # train(folder) resumes from it

A phase writes into `<name>.partial`, which is fsynced and renamed to `<name>` when complete: a folder without the
suffix is always complete. A stage keeps its own checkpoints, so it works in its final folder and is marked when done.
A run has one stage or several (`run.stage_names`, `jaxrec.training.stages`); the last one is served.

A training is never lost by accident: where a phase or stage would be made anew and a training depends on it, the run
is refused. With `Run.open(..., replace=True)` what changed is made beside the old, in `next/`, and takes its place when
the new training is finished. Until then the old one is served; `Run.check_trained` tells whether there is one. What is
made from a phase or stage in `next/` is made there too. Going back to the old one gives the new one up: it is removed
from `next/`. Only stages that the process does not visit (`train.py --only`) stay there.

Fault injection, for the tests: with JAXREC_KILL_AT=<point> in the environment the process kills itself (SIGKILL) at
that point (`jaxrec.files.fault_point`). Points: `phase:<name>` before the work of a phase or stage, `partial:<name>`
after it and before the rename (or the mark of a stage), `done:<name>` after that, `step:<n>` when training step n is
finished, and `swap:<name>` when a new folder has replaced the old one.
"""

import fcntl
import json
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from jaxrec.config import UserError, differences, fingerprint, to_json
from jaxrec.files import fault_point, read_json, sync, write_json, writing

TRAINING = "train"
"""The only stage of most systems, and the last one if the run directory names no stages."""
STAGES = "stages.json"
"""The file with the stage names of the served training."""
EVALUATION = "evaluation"
"""The phase that evaluates the training; it may be repeated at any time."""
NEXT = "next"
"""The folder of new phases and stages until they replace the old ones."""
MANIFEST = "manifest.json"
"""The file in a checkpoint's folder that marks it as complete."""
RESULTS = ("evaluation.json", "examples_shown.json", "report.html")
"""The files of an evaluation in the run directory."""

_OPENING = threading.Lock()
_HELD: weakref.WeakValueDictionary[tuple[int, int], TextIO] = weakref.WeakValueDictionary()
"""The lock files of run directories, by device and inode, shared by all `Run`s of one directory in this process."""


class Run:
    """A run directory. `path` is its folder; the folders of the phases are attributes (`run.tables`, ...)."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.stages = self.path / "stages"
        self.export = self.path / "export"
        self.config_file = self.path / "config.json"
        self.stage_names: tuple[str, ...] = ()  # in order, set by the training process
        self._lock = None
        self._replace = False
        self._config: dict[str, Any] | None = None  # of this process; config.json may still be an older one
        self._made: dict[str, str] = {}  # the inputs of every phase and stage that this process found or made
        self._beside: list[str] = []  # the names of those in `next/`
        self._replacing: dict[str, Callable[[Path], AbstractContextManager]] = {}  # by phase
        self._set_places()

    def place(self, name: str) -> Path:
        """The folder of a phase or stage; in `next/` while a new one is made there."""
        return (self.path / NEXT if name in self._beside else self.path) / name

    @property
    def training(self) -> str:
        """The served stage, as "stages/train"; config.json is its configuration."""
        return stage_path((self.stage_names or self.stages_there() or (TRAINING,))[-1])

    @property
    def metrics_file(self) -> Path:
        """The log of the served stage, and of the stages trained with it."""
        return self.log_of(self.training)

    def log_of(self, name: str) -> Path:
        """The metrics.jsonl with the lines of a stage; that in `next/` while a new one is trained there."""
        return (self.path / NEXT if name in self._beside else self.path) / "metrics.jsonl"

    def stages_there(self) -> tuple[str, ...]:
        """The stage names of the served training, in order; empty if the run doesn't record them."""
        there = self.path / STAGES
        return tuple(read_json(there)) if there.exists() else ()

    def _set_places(self) -> None:
        self.tables, self.semantic_ids, self.examples = map(self.place, ("tables", "semantic_ids", "examples"))

    def _go_beside(self, name: str) -> None:
        """Switches a phase or stage to its folder in `next/`."""
        if name not in self._beside:
            self._beside.append(name)
        self._set_places()

    @classmethod
    def open(cls, path: Path, config: Any, replace: bool = False) -> "Run":
        """Creates or opens the run directory, with an exclusive lock for this process.

        A configuration other than the recorded one is accepted if no training would be lost.

        Args:
          replace: replace a training that no longer fits the configuration or the data, once the new one is finished.

        Raises:
          UserError: another process uses the directory, or it can't be written.
        """
        run = cls(path)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run directory {run.path} can't be created: {error.strerror}") from error
        run._take_lock()
        run._replace, run._config = replace, to_json(config)
        # Stages stay with the configuration that they were trained with.
        if not any(map(_has_work, run.stages.glob("*"))):
            run._take_config()
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

    def phase(
        self,
        name: str,
        inputs: str,
        make: Callable[[Path], None],
        replacing: Callable[[Path], AbstractContextManager] = nullcontext,
    ) -> str:
        """Makes the folder `name` unless it was made from the same inputs.

        Args:
          name: the folder inside the run directory.
          inputs: fingerprint of all inputs of the result.
          make: writes the files into the given folder.
          replacing: replacing(folder) is entered before the old folder is removed, at once or when the new training is
            finished; a UserError keeps the old folder.

        Returns:
          A fingerprint of the result, for the `inputs` of the next phase.

        Raises:
          UserError: the disk is full (no partial folder is left); or a training depends on the existing folder, which
            was made from other inputs; or as `replacing`.
        """
        folder, partial = self.path / name, self.path / f"{name}.partial"
        result = fingerprint(name, inputs)
        self._made[name], self._replacing[name] = inputs, replacing
        if self._find(name, inputs):
            shutil.rmtree(partial, ignore_errors=True)
            return result
        if name == EVALUATION:
            self._drop_results()
        elif (lost := self._made_of(name, inputs, unknown=(name,) if folder.exists() else ())) or self._beside:
            if lost:
                self._check_replaceable(name)
            self._go_beside(name)
            folder = self.place(name)
            folder.parent.mkdir(exist_ok=True)
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
        with replacing(folder):
            _remove(folder)
            partial.rename(folder)
            sync(folder.parent)
        fault_point(f"done:{name}")
        return result

    def stage(self, name: str, inputs: str, make: Callable[[Path], None], needed: Iterable[str] | None = None) -> str:
        """As `phase`, for work that resumes from its own checkpoints: `make` gets the folder as it was left.

        A folder without checkpoints that was begun from other inputs is emptied first. A stage that is made from
        anything beside the old is trained there too. When the last of `stage_names` is finished, all that this process
        made or found beside the old takes its place.

        Args:
          name: the folder inside the run directory, as "stages/train".
          needed: the stages that this one depends on, by such names; None for all earlier ones.

        Raises:
          UserError: as `phase`; or the folder holds checkpoints or a result of other inputs.
        """
        result, last = fingerprint(name, inputs), name == self.training
        sources = self._sources(name, needed)
        self._made[name] = inputs
        if not self.is_trained(name, inputs):
            of_others = not _begun(self.path / name, inputs) and _has_work(self.path / name)
            if of_others or self._made_of(name, inputs):
                self._check_replaceable(name)
                self._go_beside(name)
            elif not sources.keys().isdisjoint(self._beside) or self._goes_on_beside(name, inputs):
                self._check_beside(name, inputs)
                self._go_beside(name)
            elif self._serves_another():
                # A stage was added: the served one stays until the new last one is finished.
                if last:
                    self._check_beside(name, inputs)
                    self._go_beside(name)
            elif last or not _has_work(self.path / self.training):
                if last:
                    self._drop_results()
                self._take_config()
            fault_point(f"phase:{name}")
            self._work(self.place(name), name, inputs, make, sources)
        if last:
            self._swap()
        return result

    def is_trained(self, name: str, inputs: str) -> bool:
        """Whether a stage is finished from these inputs, in its folder or in `next/`."""
        return self._find(name, inputs)

    def check_trained(self) -> None:
        """Checks that the training is finished and was made from the current tables and IDs.

        Raises:
          UserError: it is not.
        """
        folder, mend = self.path / self.training, f"run train.py again with --run {self.path}"
        if not (folder / "fingerprint.json").exists():
            raise UserError(f"{self.path} holds no finished training; {mend}")
        for name, inputs in _made_from(folder).items():
            if not _marked(self.path / name, inputs):
                raise UserError(f"{self.path / name} is not what the training there was made from; {mend}")

    @contextmanager
    def reading_trained(self) -> Iterator[None]:
        """A context for reading the finished training and its inputs.

        Raises:
          UserError: as `check_trained`; or they were replaced meanwhile, so that the files read may be of two
            trainings.
        """

        def training() -> bytes | None:
            try:
                return (self.path / self.training / "fingerprint.json").read_bytes()
            except FileNotFoundError:
                return None

        before, cause = training(), None
        self.check_trained()
        try:
            yield
        except Exception as error:
            if training() == before:
                raise
            cause = error
        if training() != before:
            raise UserError(f"the training in {self.path} was replaced while it was read; start again") from cause

    def _sources(self, name: str, needed: Iterable[str] | None) -> dict[str, str]:
        """The inputs of all phases and stages that a stage is made from, by name."""
        others = set() if needed is None else {stage_path(each) for each in self.stage_names} - set(needed)
        return {other: of for other, of in self._made.items() if other not in {name, *others}}

    def _work(
        self, folder: Path, name: str, inputs: str, make: Callable[[Path], None], sources: dict[str, str]
    ) -> None:
        """Begins a stage in `folder`, recording its inputs, or resumes it."""
        with writing(folder):
            if not _begun(folder, inputs):
                _remove(folder)
                _remove(_events(self.log_of(name), name))  # They are those of a training that was removed.
                folder.mkdir(parents=True)
                write_json(folder / "begun.json", {"inputs": inputs, "made": sources})
            make(folder)
            fault_point(f"partial:{name}")
            write_json(folder / "fingerprint.json", {"inputs": inputs})
        fault_point(f"done:{name}")

    def _find(self, name: str, inputs: str) -> bool:
        """Whether a phase or stage is made from these inputs, in its folder or in `next/`."""
        if _marked(self.path / name, inputs):
            return True
        if _marked(self.path / NEXT / name, inputs):
            self._go_beside(name)
            return True
        return False

    def _made_of(self, name: str, inputs: str, unknown: Iterable[str] = ()) -> bool:
        """Whether a stage with a result or a checkpoint was made from phase or stage `name` with other inputs than
        these.

        The folder of `name` may be missing: remade from other inputs, it would differ from the stage's inputs.
        """
        stages = (begun.parent for begun in self.stages.glob("*/begun.json"))
        return any(_has_work(stage) and _made_from(stage, unknown).get(name, inputs) != inputs for stage in stages)

    def _goes_on_beside(self, name: str, inputs: str) -> bool:
        """Whether a stage has work of these inputs in `next/`, and none in its place."""
        beside = self.path / NEXT / name
        return _begun(beside, inputs) and _has_work(beside) and not _has_work(self.path / name)

    def _check_beside(self, name: str, inputs: str) -> None:
        """Refuses to begin a stage anew in `next/` where work of other inputs would be lost."""
        beside = self.path / NEXT / name
        if _has_work(beside) and not _begun(beside, inputs) and not self._replace:
            raise UserError(
                f"{beside} holds a stage that is trained with another configuration or from other data; go back to "
                "those, give another --run, or --replace to have that stage trained anew"
            )

    def _check_replaceable(self, name: str) -> None:
        if self._replace:
            return
        there = read_json(self.config_file) if self.config_file.exists() else {}
        changed = [f"{key} ({old!r} there, {new!r} now)" for key, old, new in differences(there, self._config or there)]
        what = f"{self.path} holds a training, and the data that {self.path / name} was made from have changed"
        if changed:
            what = f"{self.path} holds a run of another configuration: {', '.join(changed)}"
        raise UserError(f"{what}; give another --run, or --replace to have that training replaced by a new one")

    def _swap(self) -> None:
        """Replaces the old folders by those in `next/`, after the training is finished.

        After a kill in between, the run is not served, and the next call continues here.

        Raises:
          UserError: as `replacing` of a phase; nothing is removed then.
        """
        with ExitStack() as held:
            for name in self._beside:
                try:
                    held.enter_context(self._replacing.get(name, nullcontext)(self.path / name))
                except UserError as error:
                    kept = f"what is to take its place is kept in {self.path / NEXT}, and the same command goes on"
                    raise UserError(f"{error}; {kept}") from error
            self._put_in_place()

    def _put_in_place(self) -> None:
        if self.training in self._beside:
            self._drop_results()
            (self.path / self.training / "fingerprint.json").unlink(missing_ok=True)
        trained = [name for name in self._beside if Path(name).parent.name == "stages"]
        self._replace_lines({Path(name).name for name in trained})
        for name in trained:
            events = _events(self.path / NEXT / "metrics.jsonl", name)
            if events.exists():
                _events(self.path / "metrics.jsonl", name).parent.mkdir(exist_ok=True)
                _replace(events, _events(self.path / "metrics.jsonl", name))
        self._take_config()
        for name in self._beside:
            _replace(self.path / NEXT / name, self.path / name)
            fault_point(f"swap:{name}")
        self._beside = []
        self._set_places()
        self._clear_next()

    def _clear_next(self) -> None:
        """Removes from `next/` what a training that was given up left there; stages that were not visited stay."""
        beside = self.path / NEXT
        unvisited = {name for name in self.stage_names if stage_path(name) not in self._made}
        waiting = {name for name in unvisited if _has_work(beside / stage_path(name))}
        if not waiting:
            _remove(beside)
            return
        log = beside / "metrics.jsonl"
        for name in self._made:
            _remove(beside / name)
            _remove(_events(log, name))
        _write_lines(log, [line for line in _lines(log) if _stage_of(line) in waiting])

    def _replace_lines(self, names: set[str]) -> None:
        """Puts the lines of stages that were trained beside the old ones in the place of those.

        They stay in the log in `next/` too until all have taken their places: killed in between, it is done again.
        """
        old, new = self.path / "metrics.jsonl", self.path / NEXT / "metrics.jsonl"
        if not (names and new.exists()):
            return
        kept = [line for line in _lines(old) if _stage_of(line) not in (None, *names)]
        _write_lines(old, kept + [line for line in _lines(new) if _stage_of(line) in names])

    def _serves_another(self) -> bool:
        """Whether the run directory serves another, finished stage."""
        there = self.stages_there()
        return bool(there) and stage_path(there[-1]) != self.training and _finished(self.path / stage_path(there[-1]))

    def _take_config(self) -> None:
        """Writes this process's configuration to config.json, and its stage names to stages.json."""
        names = list(self.stage_names) or None
        for file, value in ((self.path / STAGES, names), (self.config_file, self._config)):
            if value is not None and not (file.exists() and read_json(file) == value):
                with writing(self.path):
                    write_json(file, value)

    def _drop_results(self) -> None:
        """Removes the files of an evaluation, which do not belong to another training."""
        for name in RESULTS:
            (self.path / name).unlink(missing_ok=True)
        _remove(self.path / EVALUATION)

    def _take_lock(self) -> None:
        """Locks the directory for this process until its last `Run` is deleted or the process ends."""
        with _OPENING:
            file = (self.path / ".lock").open("w")
            status = os.fstat(file.fileno())
            self._lock = _HELD.get((status.st_dev, status.st_ino))
            if self._lock is not None:
                file.close()
                return
            try:
                # Not lockf, whose lock is released as soon as the process closes any descriptor of the file.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.close()
                raise UserError(
                    f"another process is working in {self.path}; wait for it, or give another --run"
                ) from error
            self._lock = _HELD[status.st_dev, status.st_ino] = file


def stage_path(name: str) -> str:
    """The folder of a stage inside the run directory."""
    return f"stages/{name}"


def _events(log: Path, stage: str) -> Path:
    """The folder of a stage's TensorBoard events, beside its log."""
    return log.parent / "tensorboard" / Path(stage).name


def _lines(log: Path) -> list[str]:
    """The lines of a metrics.jsonl with their ends; none where there is no such file."""
    return log.read_text().splitlines(keepends=True) if log.exists() else []


def _write_lines(log: Path, lines: list[str]) -> None:
    partial = log.with_name(f".{log.name}.partial")
    partial.write_text("".join(lines))
    partial.rename(log)


def _stage_of(line: str) -> str | None:
    """The stage of a line of metrics.jsonl; None if it names none or is incomplete."""
    try:
        return json.loads(line)["stage"]
    except (json.JSONDecodeError, TypeError, KeyError):
        return None


def _finished(folder: Path) -> bool:
    return (folder / "fingerprint.json").exists()


def _begun(folder: Path, inputs: str) -> bool:
    begun = folder / "begun.json"
    return begun.exists() and read_json(begun).get("inputs") == inputs


def _has_work(folder: Path) -> bool:
    """Whether a stage's folder holds a result or a checkpoint."""
    marks = (folder / "fingerprint.json", *folder.glob(f"*/{MANIFEST}"), *folder.glob(f"*/*/{MANIFEST}"))
    return any(mark.exists() for mark in marks)


def _made_from(folder: Path, unknown: Iterable[str] = ()) -> dict[str, str]:
    """The inputs of all phases and stages that a stage was made from, by name; `unknown` for older versions' stages."""
    return read_json(folder / "begun.json").get("made", dict.fromkeys(unknown, ""))


def _replace(new: Path, old: Path) -> None:
    """Replaces a file or folder by another, if there is a new one."""
    if new.is_dir():
        _remove(old)
    if new.exists():
        new.rename(old)
        sync(old.parent)


def _marked(folder: Path, inputs: str) -> bool:
    mark = folder / "fingerprint.json"
    return mark.exists() and read_json(mark).get("inputs") == inputs


def _remove(folder: Path) -> None:
    """Removes a folder; after a kill in between, no partial folder has its name."""
    if folder.exists():
        stale = folder.with_name(f"{folder.name}.stale")
        shutil.rmtree(stale, ignore_errors=True)
        folder.rename(stale)
        shutil.rmtree(stale)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)
