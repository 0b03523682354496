"""The run directory: skipping, killing, locking, full disks; progress without a terminal."""

import errno
import functools
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from serving_run import NextInLine, write_run

from jaxrec.config import UserError
from jaxrec.data.sources import Folder
from jaxrec.files import read_json, write_json
from jaxrec.run import Run
from jaxrec.serving.retriever import Retriever

CONFIG = {"system": "onemall", "model": {"width": 8}}

PROGRAM = """
import sys
from pathlib import Path
from jaxrec.run import Run

def make_tables(folder):
    (folder / "items.txt").write_text("1 2 3")
    (folder / "deep").mkdir()
    (folder / "deep" / "events.txt").write_text("4 5 6")

def make_examples(folder):
    text = (run.tables / "items.txt").read_text() + (run.tables / "deep" / "events.txt").read_text()
    (folder / "examples.txt").write_text(text)

def train(folder):
    with (folder / "log.txt").open("a") as log:
        log.write("begun ")
    (folder / "model.txt").write_text((run.examples / "examples.txt").read_text())

run = Run.open(Path(sys.argv[1]), {"system": "onemall"})
tables = run.phase("tables", "t1", make_tables)
examples = run.phase("examples", tables, make_examples)
run.stage("stages/train", examples, train)
"""


def files(folder: Path) -> dict[str, str]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "log.txt")
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


def run_program(folder: Path, kill_at: str = "") -> int:
    environment = {**os.environ, "JAXREC_KILL_AT": kill_at, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], env=environment, check=False).returncode


def test_killed_anywhere_it_ends_the_same(tmp_path):
    assert run_program(tmp_path / "whole") == 0
    names = ("tables", "examples", "stages/train")
    for point in [f"{when}:{name}" for name in names for when in ("phase", "partial", "done")]:
        folder = tmp_path / point.replace("/", "_").replace(":", "_")
        assert run_program(folder, point) == -signal.SIGKILL, point
        assert run_program(folder) == 0
        assert files(folder) == files(tmp_path / "whole"), point


def count_calls(calls: list[str], name: str):
    def make(folder: Path) -> None:
        calls.append(name)
        (folder / "file").write_text(name)

    return make


def test_a_phase_is_skipped_while_its_inputs_are_the_same(tmp_path):
    run, calls = Run.open(tmp_path, CONFIG), []
    first = run.phase("tables", "a", count_calls(calls, "1"))
    assert run.phase("tables", "a", count_calls(calls, "2")) == first
    assert (calls, (run.tables / "file").read_text()) == (["1"], "1")
    assert run.phase("tables", "b", count_calls(calls, "3")) != first
    assert (run.tables / "file").read_text() == "3"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.json", "tables"]


def test_a_failed_phase_leaves_the_old_result(tmp_path):
    run = Run.open(tmp_path, CONFIG)
    run.phase("tables", "a", count_calls([], "old"))

    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise UserError("a bad row")

    with pytest.raises(UserError, match="a bad row"):
        run.phase("tables", "b", fail)
    assert (run.tables / "file").read_text() == "old"
    assert not (tmp_path / "tables.partial").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("IO Error: Could not write file: No space left on device"),
    ],
)
@pytest.mark.parametrize("kind", ["phase", "stage"])
def test_a_full_disk_is_named(tmp_path, error, kind):
    run = Run.open(tmp_path, CONFIG)

    def fill(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise error

    with pytest.raises(UserError, match=rf"the disk is full: {tmp_path}/tables could not be written"):
        getattr(run, kind)("tables", "a", fill)
    assert not (tmp_path / "tables.partial").exists()
    assert not (tmp_path / "tables" / "fingerprint.json").exists()


def test_other_errors_are_not_a_full_disk(tmp_path):
    def fail(folder: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        Run.open(tmp_path, CONFIG).phase("tables", "a", fail)


def test_a_stage_finds_what_it_left_unless_its_inputs_changed(tmp_path):
    run = Run.open(tmp_path, CONFIG)

    def stop(folder: Path) -> None:
        (folder / "checkpoint").write_text("7")
        raise SystemExit(130)

    with pytest.raises(SystemExit):
        run.stage("stages/a", "x", stop)
    found = []
    run.stage("stages/a", "x", lambda folder: found.append((folder / "checkpoint").exists()))
    run.stage("stages/a", "x", lambda folder: found.append("again"))
    assert found == [True]
    # Begun, and no checkpoint yet: nothing is lost.
    with pytest.raises(SystemExit):
        run.stage("stages/b", "x", stop)
    run.stage("stages/b", "y", lambda folder: found.append((folder / "checkpoint").exists()))
    assert found == [True, False]


# A run of one phase, a training and its evaluation; the training stops after its first checkpoint if that is asked for.
TRAINS = """
import json, sys
from pathlib import Path
from jaxrec.config import fingerprint
from jaxrec.run import Run

def go(path, data="d", width=8, users=5, replace=False, stop=False):
    config = {"system": "onemall", "model": {"width": width}, "evaluation": {"users": users}}
    run = Run.open(path, config, replace)
    tables = run.phase("tables", data, lambda folder: (folder / "items.txt").write_text(data))
    trained = run.stage("stages/train", fingerprint(tables, width), lambda folder: train(run, folder, width, stop))
    run.phase("evaluation", fingerprint(trained, users), lambda folder: evaluate(run, folder, users))
    (run.path / "evaluation.json").write_text((run.path / "evaluation" / "evaluation.json").read_text())

def train(run, folder, width, stop):
    state = folder / "00000001"
    with run.metrics_file.open("a") as log:
        did = "going on" if state.exists() else "beginning"
        print(json.dumps({"stage": "train", "did": did}), file=log)
    state.mkdir(exist_ok=True)
    (state / "manifest.json").write_text("{}")
    if stop:
        raise SystemExit(130)
    (folder / "model.txt").write_text(f"{(run.tables / 'items.txt').read_text()} {width}")

def evaluate(run, folder, users):
    run.check_trained()
    (folder / "evaluation.json").write_text((run.path / "stages/train/model.txt").read_text() + f" {users}")

if __name__ == "__main__":
    go(Path(sys.argv[1]), **json.loads(sys.argv[2]))
"""
trains: dict = {"__name__": "trains"}
exec(TRAINS, trains)
go = trains["go"]


def logged(path: Path) -> list[str]:
    return [json.loads(line)["did"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def stop_after_a_checkpoint(path: Path, **changed) -> None:
    with pytest.raises(SystemExit):
        go(path, stop=True, **changed)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"data": "e"}, "holds a training, and the data that .*/tables was made from have changed"),
        ({"width": 9}, r"holds a run of another configuration: model\.width \(8 there, 9 now\)"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_training_is_not_lost_to_other_data_or_another_configuration(tmp_path, changed, named, finished):
    go(tmp_path) if finished else stop_after_a_checkpoint(tmp_path)
    before = files(tmp_path)
    with pytest.raises(UserError, match=f"{named}; give another --run, or --replace"):
        go(tmp_path, **changed)
    assert files(tmp_path) == before
    go(tmp_path)
    assert (tmp_path / "evaluation.json").read_text() == "d 8 5"
    assert logged(tmp_path) == (["beginning"] if finished else ["beginning", "going on"])


def test_what_a_training_was_made_from_is_not_made_of_other_inputs_where_it_is_missing(tmp_path):
    go(tmp_path)
    (tmp_path / "tables").rename(tmp_path / "moved")
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"the data that .*/tables was made from have changed; give another --run"):
        go(tmp_path, data="e")
    assert files(tmp_path) == before
    go(tmp_path)  # Of the same inputs it is what the training was made from.
    Run(tmp_path).check_trained()
    assert files(tmp_path / "tables") == files(tmp_path / "moved")
    assert logged(tmp_path) == ["beginning"]


def test_a_missing_stage_of_other_inputs_is_made_beside_the_training_that_was_made_from_it(tmp_path):
    """As the fine-tuned text encoder, which was moved away."""

    def train(align: str, replace: bool = False) -> None:
        run = Run.open(tmp_path, CONFIG, replace)
        aligned = run.stage("stages/alignment", align, count_calls(made, align))
        run.stage("stages/train", aligned, count_calls(made, "train"))

    made: list[str] = []
    train("a")
    (tmp_path / "stages" / "alignment").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="stages/alignment was made from have changed"):
        train("b")
    assert made == ["a", "train"] and not (tmp_path / "stages" / "alignment").exists()
    train("b", replace=True)
    assert made == ["a", "train", "b", "train"]
    Run(tmp_path).check_trained()


def test_a_new_phase_is_made_beside_the_old_training_when_an_earlier_one_is(tmp_path):
    run = Run.open(tmp_path, CONFIG)
    run.stage("stages/train", run.phase("tables", "a", count_calls([], "a")), count_calls([], "train"))
    run = Run.open(tmp_path, CONFIG, replace=True)
    embeddings = run.phase("embeddings", run.phase("tables", "b", count_calls([], "b")), count_calls([], "b"))
    assert not (tmp_path / "embeddings").exists() and (run.place("embeddings") / "file").read_text() == "b"
    run.stage("stages/train", embeddings, count_calls([], "train"))
    assert (tmp_path / "embeddings" / "file").exists() and not (tmp_path / "next").exists()
    run.check_trained()


def test_what_came_while_the_new_training_ran_is_not_replaced(tmp_path):
    """By neither way: beside a training, and in its place where no training depends on it."""

    @contextmanager
    def replacing(folder: Path):
        if (folder / "later").exists():
            raise UserError(f"move {folder} away")
        yield

    def train(data: str, trained: bool, during: Callable[[], None] = lambda: None) -> None:
        def make(folder: Path) -> None:
            calls.append(data)
            during()

        run = Run.open(tmp_path, {**CONFIG, "data": data}, replace=True)
        tables = run.phase("tables", data, count_calls([], data) if trained else make, replacing)
        if trained:
            run.stage("stages/train", tables, make)

    def append() -> None:
        (tmp_path / "tables" / "later").write_text("an item")

    calls: list[str] = []
    train("a", trained=False)
    with pytest.raises(UserError, match=r"move .*/tables away"):
        train("b", trained=False, during=append)
    (tmp_path / "tables" / "later").unlink()
    train("a", trained=True)
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"move .*/tables away; what is to take its place is kept in .*/next, and the"):
        train("b", trained=True, during=append)
    there = files(tmp_path)
    assert {name: there.get(name) for name in before} == before and "tables/later" in there
    Run(tmp_path).check_trained()
    (tmp_path / "tables").rename(tmp_path / "moved")
    train("b", trained=True)
    assert calls == ["a", "b", "a", "b"] and (tmp_path / "tables" / "file").read_text() == "b"
    Run(tmp_path).check_trained()


def test_another_evaluation_needs_no_other_training(tmp_path):
    go(tmp_path)
    go(tmp_path, users=6)
    assert (tmp_path / "evaluation.json").read_text() == "d 8 6"
    assert logged(tmp_path) == ["beginning"]
    assert Run.load(tmp_path)[1]["evaluation"] == {"users": 6}


def test_the_old_training_stays_until_the_one_that_replaces_it_is_finished(tmp_path):
    go(tmp_path)
    before = files(tmp_path)
    for changed in ({"data": "e"}, {"data": "e", "width": 9}):
        stop_after_a_checkpoint(tmp_path, replace=True, **changed)
        assert {name: text for name, text in files(tmp_path).items() if not name.startswith("next/")} == before
        Run(tmp_path).check_trained()
    go(tmp_path, data="e", width=9, replace=True)
    go(tmp_path / "fresh", data="e", width=9)
    assert logged(tmp_path) == ["beginning", "beginning", "going on"]
    for folder in (tmp_path, tmp_path / "fresh"):
        (folder / "metrics.jsonl").unlink()
    fresh = files(tmp_path / "fresh")
    assert {name: text for name, text in files(tmp_path).items() if not name.startswith("fresh/")} == fresh
    # And it is a training like any other.
    with pytest.raises(UserError, match="--replace"):
        go(tmp_path)


def test_what_a_training_that_was_given_up_left_is_removed(tmp_path):
    def train(width: int, stop: bool = False, replace: bool = True) -> Run:
        def make(folder: Path) -> None:
            events = run.metrics_file.parent / "tensorboard" / "train"
            events.mkdir(parents=True, exist_ok=True)
            (events / f"events.{width}").write_text("")
            (folder / "00000001").mkdir(exist_ok=True)
            (folder / "00000001" / "manifest.json").write_text("{}")
            if stop:
                raise SystemExit(130)

        run = Run.open(tmp_path, {**CONFIG, "model": {"width": width}}, replace)
        run.stage("stages/train", str(width), make)
        return run

    def events(folder: Path) -> list[str]:
        return sorted(path.name for path in folder.glob("tensorboard/train/*"))

    train(1)
    for width in (2, 3):
        with pytest.raises(SystemExit):
            train(width, stop=True)
        assert events(tmp_path / "next") == [f"events.{width}"]
    train(1, replace=False)  # Back to the one that is there.
    assert not (tmp_path / "next").exists() and events(tmp_path) == ["events.1"]
    with pytest.raises(SystemExit):
        train(2, stop=True)
    with pytest.raises(SystemExit):
        train(3, stop=True)
    train(3)
    assert not (tmp_path / "next").exists() and events(tmp_path) == ["events.3"]


def test_killed_while_it_is_replaced_it_is_the_old_run_or_none_and_goes_on(tmp_path):
    def command(folder: Path, kill_at: str = "") -> int:
        environment = {**os.environ, "JAXREC_KILL_AT": kill_at, "PYTHONPATH": str(Path(__file__).parent.parent)}
        arguments = [str(folder), json.dumps({"data": "e", "width": 9, "replace": True})]
        return subprocess.run([sys.executable, "-c", TRAINS, *arguments], env=environment, check=False).returncode

    go(tmp_path / "fresh", data="e", width=9)
    (tmp_path / "fresh" / "metrics.jsonl").unlink()
    for point in ("done:tables", "partial:stages/train", "done:stages/train", "swap:tables", "swap:stages/train"):
        folder = tmp_path / point.replace("/", "_").replace(":", "_")
        go(folder)
        assert command(folder, point) == -signal.SIGKILL, point
        if point.startswith("swap:tables"):
            with pytest.raises(UserError, match=r"holds no finished training; run train\.py again"):
                Run(folder).check_trained()
            assert not (folder / "evaluation.json").exists()
        else:
            Run(folder).check_trained()
            model = "e 9" if point == "swap:stages/train" else "d 8"
            assert (folder / "stages" / "train" / "model.txt").read_text() == model
            assert (folder / "evaluation.json").exists() == (model == "d 8")
        assert command(folder) == 0
        (folder / "metrics.jsonl").unlink()
        assert files(folder) == files(tmp_path / "fresh"), point


def test_only_a_finished_training_on_what_is_there_counts(tmp_path):
    with pytest.raises(UserError, match="holds no finished training"):
        Run(tmp_path).check_trained()
    stop_after_a_checkpoint(tmp_path)
    with pytest.raises(UserError, match="holds no finished training"):
        Run(tmp_path).check_trained()
    go(tmp_path)
    Run(tmp_path).check_trained()
    mark = tmp_path / "tables" / "fingerprint.json"
    write_json(mark, {"inputs": "others"})
    with pytest.raises(UserError, match="tables is not what the training there was made from"):
        Run(tmp_path).check_trained()
    # A run of before it was noted what a training was made from.
    begun = tmp_path / "stages" / "train" / "begun.json"
    write_json(begun, {"inputs": json.loads(begun.read_text())["inputs"]})
    Run(tmp_path).check_trained()


@pytest.mark.parametrize("missing", [True, False])
def test_what_is_read_while_the_training_is_replaced_is_not_taken_for_one(tmp_path, missing):
    """Whether the other training shows by a file that is gone, or only by what it was made from."""
    go(tmp_path)
    run = Run(tmp_path)
    with run.reading_trained():
        pass
    with pytest.raises(KeyError), run.reading_trained():  # Any other fault stays what it is.
        raise KeyError
    with pytest.raises(UserError, match="was replaced while it was read; start again"), run.reading_trained():
        go(tmp_path, data="e", replace=True)
        if missing:
            raise FileNotFoundError
    (tmp_path / "stages" / "train" / "fingerprint.json").unlink()
    with pytest.raises(UserError, match="holds no finished training"), run.reading_trained():
        pytest.fail("it was read")


@pytest.mark.parametrize("system", ["onemall", "sasrec"])
def test_an_unfinished_training_is_not_served(tmp_path, system):
    path = write_run(tmp_path / "run")
    write_json(path / "config.json", {"system": system})
    state = path / "stages" / "train" / "00000001"
    state.mkdir(parents=True)
    write_json(state / "manifest.json", {})
    # Before anything of it is read.
    (path / "tables" / "events.parquet").write_text("damaged")
    with pytest.raises(UserError, match=r"run holds no finished training; run train\.py again with --run"):
        Retriever(path)


def test_a_start_while_the_training_is_replaced_is_refused(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run")

    def train(config: str) -> None:
        run = Run.open(path, {"system": config}, replace=True)
        run.stage("stages/train", config, count_calls([], config))

    def load(*_):
        train("other")
        return NextInLine()

    train("none")
    monkeypatch.setattr(Retriever, "_load_recommender", load)
    with pytest.raises(UserError, match=r"the training in .*run was replaced while it was read; start again"):
        Retriever(path)
    assert Retriever(path).system == "other"


def test_a_first_command_that_failed_is_no_hindrance(tmp_path):
    """Neither where it failed before anything was made, nor between the tables and the first checkpoint."""

    def fail(folder: Path) -> None:
        raise UserError("there is no such folder")

    with pytest.raises(UserError, match="no such folder"):
        Run.open(tmp_path, {"system": "onemall", "data": "wrong"}).phase("tables", "wrong", fail)
    run = Run.open(tmp_path, {"system": "onemall", "model": {"width": -1}})
    run.phase("tables", "d", count_calls([], "tables"))
    with pytest.raises(UserError, match="no such folder"):
        run.stage("stages/train", "wrong width", fail)
    go(tmp_path, data="e")
    assert (tmp_path / "evaluation.json").read_text() == "e 8 5"
    assert Run.load(tmp_path)[1]["model"] == {"width": 8}


@dataclass(frozen=True)
class FolderRun:
    data: Folder
    system: str = "onemall"


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_goes_on_when_its_data_were_moved_and_remembers_the_new_place(tmp_path, finished):
    """The fingerprint of data is that of their content."""

    def train(path: str, made: list[str], stop: bool = False) -> Run:
        run = Run.open(tmp_path, FolderRun(Folder(Path(path))))
        tables = run.phase("tables", "content", count_calls(made, "tables"))
        run.stage("stages/train", tables, functools.partial(checkpointed, stop))
        return run

    def checkpointed(stop: bool, folder: Path) -> None:
        (folder / "00000001").mkdir(exist_ok=True)
        write_json(folder / "00000001" / "manifest.json", {})
        if stop:
            raise SystemExit(130)

    made: list[str] = []
    if finished:
        train("old", made)
    else:
        with pytest.raises(SystemExit):
            train("old", made, stop=True)
    for path in ("new", "newer"):
        run = train(path, made)
        assert read_json(run.config_file)["data"]["path"] == path and made == ["tables"]
        run.check_trained()


def test_load_reads_what_open_wrote(tmp_path):
    Run.open(tmp_path, CONFIG)
    run, config = Run.load(tmp_path)
    assert (run.tables, config) == (tmp_path / "tables", CONFIG)
    with pytest.raises(UserError, match="holds no run"):
        Run.load(tmp_path / "other")
    run.config_file.write_text("{")
    with pytest.raises(UserError, match=r"config\.json, line 1: this is no JSON"):
        Run.load(tmp_path)
    run.config_file.write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(UserError, match=r"config\.json is damaged: it is no text .*restore it from a copy"):
        Run.load(tmp_path)


def test_two_processes_cannot_share_a_run(tmp_path):
    opened = f"run = Run.open({str(tmp_path)!r}, {CONFIG!r})"
    hold = f"from jaxrec.run import Run; {opened}; print('held', flush=True); input()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    other = subprocess.Popen(
        [sys.executable, "-c", hold], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process is working"):
        Run.open(tmp_path, CONFIG)
    other.kill()
    other.wait()
    Run.open(tmp_path, CONFIG)


def test_a_run_that_was_opened_twice_stays_locked_until_both_are_gone(tmp_path):
    opens = f"from jaxrec.run import Run; Run.open({str(tmp_path)!r}, {CONFIG!r})"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}

    def in_another_process() -> str:
        done = subprocess.run([sys.executable, "-c", opens], env=environment, capture_output=True, text=True)
        return "refused" if "another process is working" in done.stderr else done.stderr

    first, second = Run.open(tmp_path, CONFIG), Run.open(tmp_path, CONFIG)
    del second
    gc.collect()
    assert in_another_process() == "refused"
    del first
    gc.collect()
    assert in_another_process() == ""


def test_a_run_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be created"):
        Run.open(tmp_path / "file" / "run", CONFIG)
