"""The loop: killed or stopped anywhere it ends in the same bits; its sums, its errors, its log."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrec.config import UserError
from jaxrec.training import checkpoint
from jaxrec.training.flops import Flops
from jaxrec.training.log import TIMING_FIELDS, measure_peak
from jaxrec.training.loop import LoopConfig, TrainState, fit

ROOT = Path(__file__).parent.parent
OPTIMIZER = optax.adam(0.05)


class Counter:
    """Batches that depend on the position alone; two lengths in turn, as with length buckets."""

    def __init__(self, end: int = 1000, delay: float = 0.0):
        self.position, self.end, self.delay = 0, end, delay

    def __next__(self):
        if self.position >= self.end:
            raise StopIteration
        time.sleep(self.delay)
        rng = np.random.default_rng(self.position)
        self.position += 1
        return {"x": rng.normal(size=(4, 3 + self.position % 2)).astype(np.float32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def new_state() -> TrainState:
    params = {"scale": jnp.ones(()), "bias": jnp.zeros(())}
    return TrainState(jnp.int32(0), params, OPTIMIZER.init(params))


def step_fn(state: TrainState, batch):
    def loss_fn(params):
        # Noise by step: a resumed step must see the same key.
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), state.step), batch["x"].shape)
        return jnp.sum((batch["x"] * params["scale"] + params["bias"] - noise) ** 2)

    loss, gradient = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = OPTIMIZER.update(gradient, state.opt_state)
    count = batch["x"].size
    metrics = {"loss": (loss, count), "width": (batch["x"].shape[1] * 4, 4)}
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


CONFIG = LoopConfig(steps=23, log_every=5, checkpoint_every=4)


def train(folder: Path, config: LoopConfig = CONFIG, iterator=None, **options):
    options = {"stage": "pretrain", **options}
    return fit(
        options.pop("step_fn", step_fn),
        new_state(),
        iterator or Counter(),
        config=config,
        folder=folder / "checkpoints",
        metrics_path=folder / "metrics.jsonl",
        **options,
    )


def lines(folder: Path) -> list[dict]:
    read = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING_FIELDS} for line in read]


def assert_same(a: TrainState, b: TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted training: its folder and last state."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder, evaluate=evaluate, **EVALUATE)


def evaluate(state) -> dict[str, float]:
    return {"scale": float(state.params["scale"])}


EVALUATE = {"config": LoopConfig(steps=23, log_every=5, checkpoint_every=4, evaluate_every=10, monitor="scale")}


def test_the_loop_is_the_plain_loop(whole):
    state, iterator, losses = new_state(), Counter(), []
    for _ in range(23):
        state, metrics = jax.jit(step_fn)(state, next(iterator))
        losses.append([float(value) for value in metrics["loss"]])
    assert_same(whole[1], state)
    logged = [line for line in lines(whole[0]) if "loss" in line]
    assert [line["step"] for line in logged] == [5, 10, 15, 20, 23]
    for line, first in zip(logged, [0, 5, 10, 15, 20], strict=True):
        total, count = np.sum(losses[first : line["step"]], axis=0)
        np.testing.assert_allclose(line["loss"], total / count, rtol=1e-6)
    np.testing.assert_allclose(logged[0]["width"], (4 + 3 + 4 + 3 + 4) / 5)
    assert [line["step"] for line in lines(whole[0]) if "valid/scale" in line] == [10, 20, 23]


PROGRAM = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from test_training_loop import *
train(Path(sys.argv[1]), iterator=Counter(delay=float(sys.argv[2])), evaluate=evaluate, **EVALUATE)
"""


def start(folder: Path, kill_at: str = "", delay: float = 0.0) -> subprocess.Popen:
    environment = {**os.environ, "JAXREC_KILL_AT": kill_at}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(delay)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_twice_it_ends_in_the_same_bits(whole, tmp_path):
    for point in ("step:3", "step:18"):
        process = start(tmp_path, point)
        output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, output
    assert checkpoint.steps(tmp_path / "checkpoints") == [12, 16]
    assert_same(train(tmp_path, evaluate=evaluate, **EVALUATE), whole[1])
    assert lines(tmp_path) == lines(whole[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(whole, tmp_path, number):
    process = start(tmp_path, delay=0.05)
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").stat().st_size:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == 130, output
    stopped = checkpoint.steps(tmp_path / "checkpoints")[-1]
    assert f"stopped after step {stopped} of 23, which is saved; run the same command to go on" in output
    assert 5 <= stopped < 23
    assert_same(train(tmp_path, evaluate=evaluate, **EVALUATE), whole[1])
    assert lines(tmp_path) == lines(whole[0])


def test_going_on_runs_the_program_that_began(tmp_path, caplog):
    """Compiling takes minutes for a large model: once at the start, and then it comes from the cache."""

    def compiled() -> list[str]:
        found = [record.args for record in caplog.records if "XLA compilation of jit(train)" in record.getMessage()]
        caplog.clear()
        return found

    class OneLength(Counter):
        def __next__(self):
            return {"x": super().__next__()["x"][:, :3]}

    with jax.log_compiles(), caplog.at_level("WARNING"):
        train(tmp_path, LoopConfig(steps=6, log_every=4, checkpoint_every=4), OneLength())
        assert len(compiled()) == 1
        train(tmp_path, LoopConfig(steps=13, log_every=4, checkpoint_every=4), OneLength())
        assert len(compiled()) == 1


def test_a_damaged_checkpoint_costs_steps_and_no_bits(whole, tmp_path, capsys):
    train(tmp_path, LoopConfig(steps=12, log_every=5, checkpoint_every=4))
    next((tmp_path / "checkpoints" / "00000012" / "state" / "d").iterdir()).write_text("garbage")
    assert_same(train(tmp_path, evaluate=evaluate, **EVALUATE), whole[1])
    output = capsys.readouterr().out
    assert "step 12 is damaged" in output and "going on from the checkpoint of step 8" in output
    assert lines(tmp_path) == lines(whole[0])


def test_a_finished_training_is_not_repeated(whole):
    class Broken(Counter):
        def __next__(self):
            raise AssertionError

    before = (whole[0] / "metrics.jsonl").read_text()
    assert_same(train(whole[0], iterator=Broken()), whole[1])
    assert (whole[0] / "metrics.jsonl").read_text() == before


# Judged by these values at steps 3, 6, 9, ...: the best at 6, nothing better in the three that follow.
VALUES = (0.2, 0.5, 0.4, 0.5, float("nan"), 0.9, 1.0)
PATIENT = LoopConfig(steps=23, log_every=5, checkpoint_every=4, evaluate_every=3, patience=3, monitor="value")


def judge(state) -> dict[str, float]:
    return {"value": VALUES[int(state.step) // 3 - 1]}


def test_training_stops_when_nothing_gets_better_and_keeps_the_best(tmp_path, capsys):
    last = train(tmp_path, PATIENT, evaluate=judge)
    assert int(last.step) == 15
    assert checkpoint.steps(tmp_path / "checkpoints") == [12, 15]
    assert checkpoint.steps(tmp_path / "checkpoints" / checkpoint.BEST) == [6]
    assert "pretrain: stopped after step 15: nothing better than value 0.5000 of step 6" in capsys.readouterr().out
    best = checkpoint.load_best(tmp_path / "checkpoints", "params")["params"]
    jax.tree.map(np.testing.assert_array_equal, best, train(tmp_path / "six", LoopConfig(steps=6)).params)
    assert float(best["scale"]) != float(last.params["scale"])
    before = (tmp_path / "metrics.jsonl").read_text()
    assert_same(train(tmp_path, PATIENT, Counter(end=0), evaluate=judge), last)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    # A line of the training stands before every evaluation.
    logged = [line["step"] for line in lines(tmp_path) if "loss" in line]
    assert logged == [3, 5, 6, 9, 10, 12, 15]


def test_without_patience_it_trains_to_the_end_and_keeps_the_best(tmp_path):
    assert int(train(tmp_path, dataclasses.replace(PATIENT, steps=21, patience=0), evaluate=judge).step) == 21
    assert checkpoint.steps(tmp_path / "checkpoints" / checkpoint.BEST) == [21]


def test_the_first_state_may_be_the_best_one(tmp_path):
    """Evaluated as that of step 0, once, also where the training is begun again before its first checkpoint."""

    def judge(state) -> dict[str, float]:
        return {"value": 1.0 if int(state.step) == 0 else 0.5}

    (tmp_path / "metrics.jsonl").write_text('{"stage": "pretrain", "step": 0, "valid/value": 3.0}\n')
    config = dataclasses.replace(PATIENT, patience=0, steps=7)
    state = train(tmp_path, config, evaluate=judge, evaluates_start=True)
    assert [line["step"] for line in lines(tmp_path) if "valid/value" in line] == [0, 3, 6, 7]
    assert checkpoint.steps(tmp_path / "checkpoints" / checkpoint.BEST) == [0]
    best = checkpoint.load_best(tmp_path / "checkpoints", "params")["params"]
    jax.tree.map(np.testing.assert_array_equal, best, new_state().params)
    before = lines(tmp_path)
    assert_same(train(tmp_path, config, evaluate=judge, evaluates_start=True), state)
    assert lines(tmp_path) == before


def test_an_evaluation_may_end_the_training(tmp_path, capsys):
    def ends(values) -> str:
        return "the value is 0.4" if values["value"] == 0.4 else ""

    last = train(tmp_path, PATIENT, evaluate=judge, ends=ends)
    assert int(last.step) == 9 and checkpoint.steps(tmp_path / "checkpoints")[-1] == 9
    assert "pretrain: stopped after step 9: the value is 0.4" in capsys.readouterr().out
    assert checkpoint.steps(tmp_path / "checkpoints" / checkpoint.BEST) == [6]
    assert_same(train(tmp_path, PATIENT, Counter(end=0), evaluate=judge, ends=ends), last)


def test_killed_while_it_waits_it_stops_at_the_same_step_with_the_same_best(tmp_path):
    program = PROGRAM.replace("evaluate=evaluate, **EVALUATE", "config=PATIENT, evaluate=judge")
    for name, points in (("whole", ()), ("killed", ("step:7", "step:13", "step:15"))):
        for point in (*points, ""):
            environment = {**os.environ, "JAXREC_KILL_AT": point}
            command = [sys.executable, "-c", program, str(tmp_path / name), "0"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == (-signal.SIGKILL if point else 0), done.stderr
    folders = [tmp_path / name / "checkpoints" for name in ("whole", "killed")]
    for part in (folders, [folder / checkpoint.BEST for folder in folders]):
        (whole, notes, step), (killed, *rest) = (checkpoint.restore(folder, None, ("params",)) for folder in part)
        assert [notes, step] == rest
        jax.tree.map(np.testing.assert_array_equal, whole, killed)
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")
    assert notes == {"best": 0.5} and step == 6


def test_by_default_a_training_is_evaluated_stops_early_and_keeps_the_best(tmp_path):
    """The best of ten evaluations is the second; five without a better one follow."""

    def judge(state) -> dict[str, float]:
        return {"ndcg@10": 1.0 if int(state.step) == 8 else 0.5}

    assert int(train(tmp_path, LoopConfig(steps=40), evaluate=judge).step) == 28
    assert checkpoint.steps(tmp_path / "checkpoints" / checkpoint.BEST) == [8]
    assert [line["step"] for line in lines(tmp_path) if "valid/ndcg@10" in line] == [4, 8, 12, 16, 20, 24, 28]


def test_steps_between_evaluations_are_a_number_or_a_share():
    of = [LoopConfig(steps=42, evaluate_every=every).evaluation_steps for every in (0, 0.01, 0.1, 0.5, 1, 7)]
    assert of == [0, 1, 4, 21, 1, 7]
    with pytest.raises(UserError, match=r"'training.evaluate_every' is 1.5; give a whole number of steps, or a share"):
        LoopConfig(evaluate_every=1.5)


def test_where_nobody_can_be_measured_it_trains_to_the_end(tmp_path):
    assert int(train(tmp_path, LoopConfig(steps=20), evaluate=lambda state: {}).step) == 20
    assert checkpoint.steps(tmp_path / "checkpoints" / checkpoint.BEST) == []


def test_while_nothing_is_found_the_later_state_is_the_better_one(tmp_path):
    def judge(state) -> dict[str, float]:
        return {"ndcg@10": 0.1 if int(state.step) == 10 else 0.0}

    config = LoopConfig(steps=12, evaluate_every=1, patience=2)
    assert int(train(tmp_path, config, evaluate=judge).step) == 12
    assert checkpoint.steps(tmp_path / "checkpoints" / checkpoint.BEST) == [10]


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("log_every", 0), ("checkpoint_every", 0), ("patience", -1)])
def test_lengths_that_cant_be_are_named(name, value):
    with pytest.raises(UserError, match=rf"training\.{name}' is {value}; give"):
        LoopConfig(**{name: value})


def test_what_is_monitored_must_be_evaluated(tmp_path):
    config = LoopConfig(steps=2, evaluate_every=2)
    with pytest.raises(UserError, match=r"'training.monitor': 'ndcg@10' is not evaluated; there are scale"):
        train(tmp_path, config, evaluate=evaluate)


def test_a_stage_without_evaluation_has_its_newest_state_as_the_best(tmp_path):
    state = train(tmp_path, LoopConfig(steps=2))
    best = checkpoint.load_best(tmp_path / "checkpoints", "params")["params"]
    jax.tree.map(np.testing.assert_array_equal, best, state.params)


def test_other_stages_and_broken_last_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    other, own = {"stage": "align", "step": 90}, {"stage": "pretrain", "step": 90}
    path.write_text(f'{json.dumps(other)}\n{json.dumps(own)}\n{{"stage": "pre')
    train(tmp_path, LoopConfig(steps=1, log_every=1))
    assert [(line["stage"], line["step"]) for line in lines(tmp_path)] == [("align", 90), ("pretrain", 1)]


def test_a_loss_that_is_not_finite_names_the_step(tmp_path):
    def bad_step(state, batch):
        state, metrics = step_fn(state, batch)
        loss, count = metrics["loss"]
        return state, {**metrics, "loss": (jnp.where(state.step == 7, jnp.nan, loss), count)}

    with pytest.raises(UserError, match=r"pretrain: the loss of step 7 .*the checkpoint of step 4 is kept"):
        train(tmp_path, step_fn=bad_step)
    assert checkpoint.steps(tmp_path / "checkpoints") == [4]


def test_data_that_ends_early(tmp_path):
    with pytest.raises(UserError, match="the data ended before step 11"):
        train(tmp_path, iterator=Counter(end=10))


def test_an_error_while_making_batches_is_raised(tmp_path):
    class Broken(Counter):
        def __next__(self):
            if self.position == 3:
                raise KeyError("features")
            return super().__next__()

    with pytest.raises(KeyError, match="features"):
        train(tmp_path, iterator=Broken())


def test_speed_and_share_of_the_peak_are_logged(tmp_path):
    logged = []
    shapes = []

    def flops(batch) -> float:
        shapes.append(batch["x"].shape)
        return 1e6

    train(tmp_path, LoopConfig(steps=4, log_every=2), flops_per_step=flops, on_log=logged.append)
    assert shapes == [(4, 4), (4, 3), (4, 4), (4, 3)]
    for line in logged:
        assert line["stage"] == "pretrain" and line["targets_per_second"] > 0 and 0 <= line["peak_share"] < 1
    assert logged[1]["seconds"] > logged[0]["seconds"]
    assert list((tmp_path / "tensorboard" / "pretrain").glob("events.*"))
    # Between an old phone and the largest machines.
    assert 1e9 < measure_peak() < 1e19


def test_a_share_of_uncounted_products_says_so_once(tmp_path, capsys):
    logged = []

    def flops(batch) -> Flops:
        return Flops(1e6, exact=batch["x"].shape == (4, 4))

    train(tmp_path, LoopConfig(steps=6, log_every=1), flops_per_step=flops, on_log=logged.append)
    # Every second batch isn't counted whole.
    assert [line.get("peak_share_exact") for line in logged] == 3 * [None, False]
    assert all(line["peak_share"] >= 0 for line in logged)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("only the data decide how often it is run: they are not counted") == 1


def test_on_two_devices_stopped_and_resumed(on_devices, tmp_path):
    source = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}]
from test_training_loop import *
from jaxrec.training.sharding import MeshConfig, make_mesh
mesh = make_mesh(MeshConfig(data=2))
for steps in (3, 6):
    state = train(Path({str(tmp_path)!r}), LoopConfig(steps=steps, log_every=1), mesh=mesh)
assert len(state.params["scale"].sharding.device_set) == 2
print(float(state.params["scale"]))
"""
    alone = train(tmp_path / "alone", LoopConfig(steps=6, log_every=1))
    np.testing.assert_allclose(float(on_devices(2, source).split()[-1]), alone.params["scale"], rtol=1e-5)
