"""Stages: trained in order, killed in either they end in the same bits, stopped at one, alone, changed, refused.

The system: a classifier of tokens. Its stage `likelihood` fits labels; `preference` starts from the best state of
`likelihood`, fits other labels, and pays for the distance from the log-probabilities of that state.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from jaxrec.config import UserError
from jaxrec.run import Run
from jaxrec.training import checkpoint
from jaxrec.training import stages as stages_module
from jaxrec.training.log import TIMING_FIELDS
from jaxrec.training.loop import LoopConfig, TrainState
from jaxrec.training.optim import OptimConfig, make_optimizer
from jaxrec.training.sharding import MeshConfig, init_sharded
from jaxrec.training.stages import Stage, Task, best_variables, minimise, run_stages
from jaxrec.training.step import bind, make_state, make_step

ROOT = Path(__file__).parent.parent
WIDTH, CLASSES, ROWS = 37, 5, 8
SCALE = jnp.linspace(0.5, 1.5, WIDTH)


@dataclasses.dataclass(frozen=True)
class ToyTraining:
    """The fields that `minimise` reads."""

    training: LoopConfig
    optim: OptimConfig = OptimConfig(learning_rate=0.1, warmup=1)  # noqa: RUF009
    seed: int = 0
    mesh: MeshConfig = MeshConfig()  # noqa: RUF009


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    likelihood: ToyTraining = ToyTraining(
        LoopConfig(steps=6, log_every=2, checkpoint_every=2, evaluate_every=2, monitor="value")
    )
    preference: ToyTraining = ToyTraining(LoopConfig(steps=9, log_every=3, checkpoint_every=3))
    weight: float = 0.5
    system: str = "toy"


class ToyBatches:
    """Batches that depend on the position alone."""

    def __init__(self, labels: int):
        self.position, self.labels = 0, labels

    def __iter__(self):
        return self

    def __next__(self):
        rng = np.random.default_rng([self.labels, self.position])
        self.position += 1
        x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
        return {"x": x, "label": (x[:, : CLASSES - self.labels].argmax(1) + self.labels).astype(np.int32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def init(seed: int, mesh) -> dict:
    def make() -> dict:
        return {"params": {"kernel": 0.1 * jax.random.normal(jax.random.key(seed), (WIDTH, CLASSES))}}

    return init_sharded(make, mesh)


def log_probs(scale, params, batch):
    return jax.nn.log_softmax(batch["x"] * scale @ params["kernel"])


def likelihood(scale, params, extra, batch, key):
    value = -log_probs(scale, params, batch)[jnp.arange(ROWS), batch["label"]].sum()
    return value / ROWS, ({"loss": (value, ROWS)}, extra)


def preference(weight, scale, frozen, params, extra, batch, key):
    mean, (metrics, extra) = likelihood(scale, params, extra, batch, key)
    reference = log_probs(scale, frozen["likelihood"]["params"], batch)
    distance = (jnp.exp(reference) * (reference - log_probs(scale, params, batch))).sum()
    return mean + weight * distance / ROWS, (metrics | {"distance": (distance, ROWS)}, extra)


def evaluate(state) -> dict[str, float]:
    """The best state is not the last one."""
    return {"value": float(state.step == 4)}


def toy_stages(config: ToyConfig, run: Run, stop_after: int = 0) -> tuple[Stage, ...]:
    def data() -> tuple[str, ...]:
        return (run.phase("tables", "t", lambda folder: (folder / "items.txt").write_text("1 2 3")),)

    def train_likelihood(task: Task) -> None:
        loss = Partial(likelihood, SCALE)
        minimise(loss, init, ToyBatches(0), config.likelihood, task, evaluate=evaluate)

    def train_preference(task: Task) -> None:
        loss = Partial(partial(preference, config.weight), SCALE)
        minimise(loss, init, ToyBatches(1), config.preference, task)

    return (
        Stage("likelihood", config.likelihood, data, train_likelihood),
        Stage(
            "preference",
            (config.preference, config.weight),
            data,
            train_preference,
            start="likelihood",
            frozen=("likelihood",),
        ),
    )


def go(path: Path, config: ToyConfig | None = None, replace: bool = False, **options: str) -> Run:
    config = config or ToyConfig()
    run = Run.open(path, config, replace)
    go.trained = run_stages(run, toy_stages(config, run), **options)
    return run


def longer(config: ToyTraining, steps: int) -> ToyTraining:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps))


LATE = ToyConfig(weight=2.0)
EARLY = dataclasses.replace(ToyConfig(), likelihood=longer(ToyConfig().likelihood, 8))


def lines(path: Path) -> list[dict]:
    read = [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING_FIELDS} for line in read]


def state_of(path: Path, stage: str) -> dict:
    return checkpoint.load_parts(path / "stages" / stage, "params", "opt_state", "step")


def assert_same(a: Path, b: Path, stages: tuple[str, ...] = ("likelihood", "preference")) -> None:
    for stage in stages:
        jax.tree.map(np.testing.assert_array_equal, state_of(a, stage), state_of(b, stage))
        assert [line for line in lines(a) if line["stage"] == stage] == [
            line for line in lines(b) if line["stage"] == stage
        ]


def differ(a: Path, b: Path, stage: str) -> bool:
    return not np.array_equal(state_of(a, stage)["params"]["kernel"], state_of(b, stage)["params"]["kernel"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    path = tmp_path_factory.mktemp("whole")
    go(path)
    return path


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    """An uninterrupted run of the configuration whose late stage is another."""
    path = tmp_path_factory.mktemp("late")
    go(path, LATE)
    return path


def test_both_stages_are_the_plain_loops(whole):
    """The second from the best state of the first, which is not its last, and against that state."""
    config = ToyConfig()
    optimizer = make_optimizer(config.likelihood.optim, 6)
    states = [make_state(init(0, None), optimizer)]
    for batch, _ in zip(ToyBatches(0), range(6)):
        states.append(jax.jit(make_step(Partial(likelihood, SCALE), optimizer, 0))(states[-1], batch)[0])
    best, optimizer = states[4].params, make_optimizer(config.preference.optim, 9)
    state, distances = TrainState(jnp.int32(0), best, optimizer.init(best)), []
    for batch, _ in zip(ToyBatches(1), range(9)):

        def loss(params, batch=batch):
            return preference(0.5, SCALE, {"likelihood": {"params": best}}, params, {}, batch, None)

        gradient, (metrics, _) = jax.grad(loss, has_aux=True)(state.params)
        distances.append(float(metrics["distance"][0]) / ROWS)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        state = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
    jax.tree.map(np.testing.assert_array_equal, best_variables(whole / "stages/likelihood"), {"params": best})
    trained = state_of(whole, "preference")["params"]["kernel"]
    np.testing.assert_allclose(trained, state.params["kernel"], rtol=1e-4, atol=1e-6)
    assert distances[0] == 0 and distances[-1] > 1e-3
    logged = [line["distance"] for line in lines(whole) if "distance" in line]
    np.testing.assert_allclose(logged, np.array(distances).reshape(3, 3).mean(1), rtol=1e-3)


def test_every_line_and_every_event_says_its_stage(whole):
    assert [(line["stage"], line["step"]) for line in lines(whole) if "loss" in line] == [
        *(("likelihood", step) for step in (2, 4, 6)),
        *(("preference", step) for step in (3, 6, 9)),
    ]
    for stage in ("likelihood", "preference"):
        assert list((whole / "tensorboard" / stage).glob("events.*"))


PROGRAM = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from test_training_stages import go
go(Path(sys.argv[1]))
"""


def test_killed_in_either_stage_it_ends_in_the_same_bits(whole, tmp_path, capsys):
    for point, finished in (("step:5", {"likelihood": [2, 4]}), ("step:8", {"preference": [3, 6]})):
        environment = {**os.environ, "JAXREC_KILL_AT": point}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        for stage, steps in finished.items():
            assert checkpoint.steps(tmp_path / "stages" / stage) == steps
    go(tmp_path)
    assert capsys.readouterr().out == "preference: going on from step 6\n"
    assert_same(tmp_path, whole)
    assert lines(tmp_path) == lines(whole)


def test_on_two_devices_both_stages_are_those_of_one(whole, tmp_path, on_devices):
    on_devices(2, PROGRAM.replace("sys.argv[1]", repr(str(tmp_path))))
    for stage in ("likelihood", "preference"):
        one, two = (state_of(path, stage)["params"]["kernel"] for path in (whole, tmp_path))
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_until_stops_behind_a_stage_and_the_next_command_goes_on(whole, tmp_path):
    run = go(tmp_path, until="likelihood")
    assert go.trained is None and not (tmp_path / "stages" / "preference").exists()
    with pytest.raises(UserError, match="holds no finished training"):
        run.check_trained()
    go(tmp_path, until="preference").check_trained()
    assert go.trained is not None
    assert_same(tmp_path, whole)
    assert Run(tmp_path).training == "stages/preference"
    Run(tmp_path).check_trained()


def test_one_stage_alone_needs_what_it_is_trained_from(whole, tmp_path):
    message = r"--only preference: the stage likelihood, which it is trained from, is not trained .* --until likelihood"
    with pytest.raises(UserError, match=message):
        go(tmp_path, only="preference")
    assert not (tmp_path / "stages").exists()
    go(tmp_path, only="likelihood")
    assert go.trained is None and not (tmp_path / "stages" / "preference").exists()
    with pytest.raises(UserError, match=message):
        go(tmp_path, EARLY, only="preference")
    assert not (tmp_path / "stages" / "preference").exists()
    go(tmp_path, only="preference").check_trained()
    assert_same(tmp_path, whole)


def test_one_stage_alone_leaves_others_that_it_does_not_need(tmp_path):
    trained = []

    def stage(name: str, **from_others) -> Stage:
        return Stage(name, None, lambda: (), lambda task: trained.append(task.name), **from_others)

    run = Run.open(tmp_path, ToyConfig())
    listed = (stage("content"), stage("unrelated"), stage("last", needs=("content",)))
    run_stages(run, listed, only="content")
    run_stages(run, listed, only="last")
    assert trained == ["content", "last"]
    # Of what it was trained from, the unrelated stage is none: it may be trained later, and changed.
    run_stages(run, listed)
    run.check_trained()
    changed = dataclasses.replace(listed[1], settings="other")
    run_stages(Run.open(tmp_path, ToyConfig(), replace=True), (listed[0], changed, listed[2]))
    assert trained == ["content", "last", "unrelated", "unrelated"]
    Run(tmp_path).check_trained()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": "reward"}, "--until reward: there is no such stage; there are likelihood, preference"),
        ({"only": "train"}, "--only train: there is no such stage; there are likelihood, preference"),
        ({"only": "likelihood", "until": "preference"}, "--until and --only exclude each other; give one of them"),
    ],
)
def test_wrong_names_are_refused_before_anything_is_made(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        go(tmp_path, **options)
    assert not (tmp_path / "tables").exists()


def test_stages_that_cannot_be_are_refused(tmp_path):
    run = Run.open(tmp_path, ToyConfig())
    first, second = toy_stages(ToyConfig(), run)
    with pytest.raises(ValueError, match="preference is trained from likelihood, which is no stage before it"):
        run_stages(run, (second, first))
    with pytest.raises(ValueError, match="two stages are called likelihood"):
        run_stages(run, (first, first))


def marks(path: Path, stage: str) -> dict[str, int]:
    files = (file for file in sorted((path / "stages" / stage).rglob("*")) if file.is_file())
    return {str(file): file.stat().st_mtime_ns for file in files}


def test_a_changed_late_stage_keeps_the_early_one(whole, late, tmp_path):
    run = go(tmp_path)
    (tmp_path / "evaluation.json").write_text("[]")
    before = marks(tmp_path, "likelihood")
    with pytest.raises(UserError, match=r"another configuration: weight \(0\.5 there, 2\.0 now\); give another --run"):
        go(tmp_path, LATE)
    run.check_trained()
    assert_same(tmp_path, whole)
    go(tmp_path, LATE, replace=True).check_trained()
    assert marks(tmp_path, "likelihood") == before
    assert_same(tmp_path, late)
    assert differ(tmp_path, whole, "preference")
    assert json.loads((tmp_path / "config.json").read_text())["weight"] == 2.0
    assert not (tmp_path / "next").exists() and not (tmp_path / "evaluation.json").exists()
    assert len(list((tmp_path / "tensorboard" / "preference").glob("events.*"))) == 1
    assert list((tmp_path / "tensorboard" / "likelihood").glob("events.*"))


class KilledError(BaseException):
    """As if the process had ended."""


def test_a_changed_early_stage_is_trained_beside_the_old_with_all_that_is_trained_from_it(whole, tmp_path, monkeypatch):
    def die(point: str) -> None:
        if point == "swap:stages/likelihood":
            raise KilledError

    run = go(tmp_path)
    with pytest.raises(UserError, match=r"likelihood\.training\.steps \(6 there, 8 now\)"):
        go(tmp_path, EARLY)
    go(tmp_path, EARLY, replace=True, until="likelihood")
    # The old training is served until the last stage of the new one is finished.
    run.check_trained()
    assert_same(tmp_path, whole)
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr("jaxrec.run.fault_point", die)
        go(tmp_path, EARLY, replace=True)
    # Between two stages that take their places nothing is served; the same command goes on.
    with pytest.raises(UserError, match="holds no finished training"):
        run.check_trained()
    go(tmp_path, EARLY, replace=True)
    assert not (tmp_path / "next").exists()
    Run(tmp_path).check_trained()
    assert differ(tmp_path, whole, "likelihood")
    assert [(line["stage"], line["step"]) for line in lines(tmp_path) if "loss" in line] == [
        *(("likelihood", step) for step in (2, 4, 6, 8)),
        *(("preference", step) for step in (3, 6, 9)),
    ]


def test_an_early_stage_that_was_replaced_before_the_last_was_ever_trained_keeps_its_lines(whole, tmp_path):
    go(tmp_path, EARLY, until="likelihood")
    with pytest.raises(UserError, match=r"likelihood\.training\.steps \(8 there, 6 now\)"):
        go(tmp_path)
    go(tmp_path, replace=True, until="likelihood")
    go(tmp_path)
    assert_same(tmp_path, whole)
    assert not (tmp_path / "next").exists()


def test_a_stage_that_is_added_is_served_when_it_is_finished(whole, tmp_path):
    config = ToyConfig()

    def train(upto: int, fail: bool = False) -> None:
        run = Run.open(tmp_path, dataclasses.replace(config, weight=float(upto)))
        first, last = toy_stages(config, run)
        between = Stage("reward", None, lambda: (), lambda task: None)
        run_stages(run, (first, between, dataclasses.replace(last, train=stop) if fail else last)[:upto])

    def stop(task: Task) -> None:
        raise SystemExit(130)

    train(1)
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(SystemExit):
        train(3, fail=True)
    run = Run(tmp_path)
    run.check_trained()
    assert run.training == "stages/likelihood" and (tmp_path / "evaluation.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())["weight"] == 1
    train(3)
    run.check_trained()
    assert run.training == "stages/preference" and not (tmp_path / "evaluation.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())["weight"] == 3
    assert_same(tmp_path, whole)


class Plain:
    """Stages without a model: each leaves a checkpoint, a line of its settings and events; told to, it then stops."""

    def __init__(self, path: Path, needs: dict[str, tuple[str, ...]]):
        self.path, self.needs, self.trained = path, needs, []

    def go(self, replace: bool = False, stop: str = "", tables: int = 1, only: str = "", **settings: int) -> Run:
        run = Run.open(self.path, {"system": "plain", "tables": tables, **settings}, replace)

        def data() -> tuple[str, ...]:
            return (run.phase("tables", str(tables), lambda folder: (folder / "file").write_text(str(tables))),)

        def train(task: Task) -> None:
            self.trained.append(task.name)
            state = task.folder / "00000001"
            if not state.exists():
                events = task.metrics_path.parent / "tensorboard" / task.name
                for folder in (state, events):
                    folder.mkdir(parents=True)
                (state / "manifest.json").write_text("{}")
                (events / f"events.{settings[task.name]}").write_text("")
                with task.metrics_path.open("a") as log:
                    log.write(json.dumps({"stage": task.name, "settings": settings[task.name]}) + "\n")
            if task.name == stop:
                raise KilledError

        def needs(name: str) -> tuple[str, ...]:
            return tuple(each for each in self.needs.get(name, ()) if each in settings)

        listed = [Stage(name, value, data, train, needs=needs(name)) for name, value in settings.items()]
        if stop:
            with pytest.raises(KilledError):
                run_stages(run, listed, only=only)
        else:
            run_stages(run, listed, only=only)
        return run

    def lines(self, beside: bool = False) -> list[tuple[str, int]]:
        return [(line["stage"], line["settings"]) for line in lines(self.path / "next" if beside else self.path)]

    def events(self) -> list[str]:
        return sorted(str(file.relative_to(self.path)) for file in self.path.rglob("events.*"))


def test_going_back_to_the_old_training_leaves_the_lines_of_the_other_behind(tmp_path):
    plain = Plain(tmp_path, {"last": ("content",)})
    plain.go(content=1, last=1)
    plain.go(content=2, last=1, replace=True, stop="content")
    plain.go(content=1, last=1)
    assert plain.lines() == [("content", 1), ("last", 1)] and not (tmp_path / "next").exists()
    # Back to the old early stage alone, with another late one.
    plain.go(content=2, last=1, replace=True, stop="content")
    plain.go(content=1, last=3, replace=True)
    assert plain.lines() == [("content", 1), ("last", 3)]
    assert plain.events() == ["tensorboard/content/events.1", "tensorboard/last/events.3"]
    assert plain.trained == ["content", "last", "content", "content", "last"]


def test_lines_are_put_in_place_once_where_it_was_killed_in_between(tmp_path, monkeypatch):
    def die(point: str) -> None:
        if point == "swap:stages/content":
            raise KilledError

    plain = Plain(tmp_path, {"last": ("content",)})
    plain.go(content=1, last=1)
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr("jaxrec.run.fault_point", die)
        plain.go(content=2, last=1, replace=True)
    plain.go(content=2, last=1, replace=True)
    assert plain.lines() == [("content", 2), ("last", 1)] and not (tmp_path / "next").exists()


def test_a_stage_whose_needed_stage_was_trained_anew_is_trained_anew(tmp_path):
    plain = Plain(tmp_path, {"last": ("content",)})
    plain.go(content=1, unrelated=1, last=1)
    plain.go(content=2, unrelated=1, last=1, replace=True)
    assert plain.trained == ["content", "unrelated", "last", "content", "last"]


def test_one_stage_alone_keeps_what_another_was_trained_to_beside(tmp_path):
    plain = Plain(tmp_path, {"last": ("content",)})
    plain.go(content=1, unrelated=1, last=1)
    plain.go(content=1, unrelated=2, last=1, only="unrelated", replace=True)
    plain.go(content=1, unrelated=2, last=2, only="last", replace=True, stop="last")
    assert plain.lines(beside=True) == [("unrelated", 2), ("last", 2)]
    plain.go(content=1, unrelated=2, last=1, only="last")
    assert [folder.name for folder in (tmp_path / "next" / "stages").iterdir()] == ["unrelated"]
    assert plain.lines(beside=True) == [("unrelated", 2)]
    assert plain.lines() == [("content", 1), ("unrelated", 1), ("last", 1)]
    assert [name for name in plain.events() if "next" in name] == ["next/tensorboard/unrelated/events.2"]
    plain.trained.clear()
    plain.go(content=1, unrelated=2, last=1).check_trained()
    assert plain.trained == [] and plain.lines() == [("content", 1), ("last", 1), ("unrelated", 2)]
    assert not (tmp_path / "next").exists()
    assert plain.events() == [
        f"tensorboard/{each}" for each in ("content/events.1", "last/events.1", "unrelated/events.2")
    ]


def test_a_half_trained_stage_that_one_stage_alone_left_beside_goes_on_there(tmp_path):
    """Though the tables that it was trained from have taken their place since."""
    plain = Plain(tmp_path, {"last": ("content",)})
    plain.go(content=1, unrelated=1, last=1, only="content")
    plain.go(content=1, unrelated=1, last=1, only="last")
    plain.go(content=1, unrelated=1, last=1, only="unrelated", tables=2, replace=True, stop="unrelated")
    plain.go(content=1, unrelated=1, last=1, only="content", tables=2, replace=True)
    plain.go(content=1, unrelated=1, last=1, only="last", tables=2, replace=True).check_trained()
    assert plain.lines() == [("content", 1), ("last", 1)] and plain.lines(beside=True) == [("unrelated", 1)]
    (tmp_path / "next" / "stages" / "unrelated" / "00000001" / "state").write_text("half")
    plain.go(content=1, unrelated=1, last=1, tables=2)
    assert (tmp_path / "stages" / "unrelated" / "00000001" / "state").read_text() == "half"
    assert plain.lines() == [("content", 1), ("last", 1), ("unrelated", 1)]
    assert not (tmp_path / "next").exists()


def test_an_added_stage_is_not_trained_anew_without_replace(tmp_path):
    plain = Plain(tmp_path, {"preference": ("likelihood",)})
    plain.go(likelihood=1)
    plain.go(likelihood=1, preference=1, stop="preference")
    before = marks(tmp_path / "next", "preference")
    for changed in ({"preference": 2}, {"reward": 1, "preference": 2}):
        with pytest.raises(UserError, match=r"next/stages/preference holds a stage that is trained with another"):
            plain.go(likelihood=1, **changed)
        assert marks(tmp_path / "next", "preference") == before
    plain.go(likelihood=1, preference=1, stop="preference")
    assert plain.lines(beside=True) == [("preference", 1)]
    plain.go(likelihood=1, preference=2, replace=True).check_trained()
    assert ("preference", 2) in plain.lines() and not (tmp_path / "next").exists()


def test_a_new_early_stage_is_trained_beside_the_old_when_its_data_are(tmp_path):
    plain = Plain(tmp_path, {"train": ("alignment",)})
    plain.go(train=1)
    old = (tmp_path / "metrics.jsonl").read_text(), (tmp_path / "config.json").read_text()
    for _ in range(2):
        run = plain.go(alignment=1, train=1, tables=2, replace=True, stop="alignment")
        assert ((tmp_path / "metrics.jsonl").read_text(), (tmp_path / "config.json").read_text()) == old
        assert not (tmp_path / "stages" / "alignment").exists()
    run.check_trained()
    assert plain.lines(beside=True) == [("alignment", 1)]  # The second command went on.
    plain.go(train=1).check_trained()
    assert not (tmp_path / "next").exists() and plain.lines() == [("train", 1)]
    plain.go(alignment=1, train=1, tables=2, replace=True).check_trained()
    assert plain.lines() == [("alignment", 1), ("train", 1)] and (tmp_path / "tables" / "file").read_text() == "2"


def test_a_start_of_another_shape_is_named(tmp_path):
    task = Task("preference", tmp_path, tmp_path / "metrics.jsonl", {"params": {"kernel": jnp.zeros((3, 2))}})
    message = r"stage preference: params/kernel is \(3, 2\) in the stage that it starts from and \(37, 5\) here"
    with pytest.raises(UserError, match=message):
        minimise(Partial(likelihood, SCALE), init, ToyBatches(0), ToyConfig().likelihood, task)


def test_the_frozen_reference_is_an_argument_of_the_compiled_step(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(stages_module, "fit", lambda step, state, batches, **_: given.append((step, state)))
    reference = {"params": {"kernel": jnp.full((WIDTH, CLASSES), 0.123)}}
    task = Task("preference", tmp_path, tmp_path / "metrics.jsonl", init(1, None), {"likelihood": reference})
    minimise(Partial(partial(preference, 0.5), SCALE), init, ToyBatches(1), ToyConfig().preference, task)
    ((step, state),) = given
    np.testing.assert_array_equal(state.params["kernel"], init(1, None)["params"]["kernel"])
    batch = next(ToyBatches(1))

    # What the loop compiles: the step and what it is bound to come in as arguments.
    def text_of(function, *arguments) -> str:
        return jax.jit(function).lower(*arguments).as_text()

    compiled = text_of(lambda step, state, batch: step(state, batch), step, state, batch)
    assert any(np.array_equal(leaf, reference["params"]["kernel"]) for leaf in jax.tree.leaves(step))
    entry = next(line for line in compiled.splitlines() if "func.func public @main" in line)
    # The parameters, two moments of the optimiser, the reference.
    assert entry.split("->")[0].count(f"tensor<{WIDTH}x{CLASSES}xf32>") == 4
    assert "1.230000e-01" not in compiled
    # Bound by functools.partial, as any closure, the reference would be a constant.
    assert "1.230000e-01" in text_of(lambda state, batch: step(state, batch), state, batch)


def test_a_frozen_stage_may_have_another_model(tmp_path, monkeypatch):
    """As a reward model has."""
    given = []
    monkeypatch.setattr(stages_module, "fit", lambda step, state, batches, **_: given.append((step, state)))

    def rewarded(frozen, params, extra, batch, key):
        value = (frozen["reward"]["params"]["bias"] * params["kernel"]).sum()
        return value, ({"loss": (value, 1)}, extra)

    task = Task(
        "policy", tmp_path, tmp_path / "metrics.jsonl", None, {"reward": {"params": {"bias": jnp.full(5, 3.0)}}}
    )
    minimise(rewarded, init, ToyBatches(0), ToyConfig().likelihood, task)
    ((step, state),) = given
    _, metrics = step(state, next(ToyBatches(0)))
    np.testing.assert_allclose(metrics["loss"][0], 3 * init(0, None)["params"]["kernel"].sum(), rtol=1e-5)


def test_bound_arrays_come_behind_those_that_are_bound_already():
    loss = bind(bind(partial(lambda a, b, c, d: (a, b, c, d), "a"), jnp.array(1)), jnp.array(2))
    assert [int(leaf) for leaf in jax.tree.leaves(loss)] == [1, 2]
    a, b, c, d = loss("d")
    assert (a, int(b), int(c), d) == ("a", 1, 2, "d")
