"""The training loop: batches, steps, logs, checkpoints, evaluations, and an exact resume.

A step is a plain function `step_fn(state, batch) -> (state, metrics)` with metrics as {name: (sum, count)}; "loss" is
one of them, and its count is the number of targets. Arrays bound to the step with `jax.tree_util.Partial` are arguments
of the compiled program. The loop compiles it once per shape of batch, donates the state, sums the metrics on the device
and fetches them only to log. Checkpoints hold the state, the iterator's position after the last used batch, and the
sums since the last log line: resumed training ends in the same bits.
"""

import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from jaxrec.config import UserError, check_least
from jaxrec.console import console, progress
from jaxrec.files import fault_point
from jaxrec.training import checkpoint
from jaxrec.training.flops import Flops
from jaxrec.training.log import Log, Meter
from jaxrec.training.prefetch import BatchIterator, Prefetch
from jaxrec.training.sharding import place, shard_batch, use_mesh

# The name under which the totals carry the first step whose loss was not finite (0: none).
BAD_STEP = "_bad_step"

Metrics = dict[str, tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class TrainState:
    """The training state; a plain pytree."""

    step: jax.Array
    """int32 []: number of finished steps."""
    params: Any
    """The model's parameters."""
    opt_state: Any
    """The optimiser's state."""
    extra: Any = flax.struct.field(default_factory=dict)
    """Variables updated without a gradient, such as the router biases of mixture layers."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Length of the training, intervals of logs, checkpoints and evaluations, early stopping."""

    steps: int = 1000
    """Training steps."""
    log_every: int = 50
    """Steps between two log lines in metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = 2
    """Number of kept checkpoints."""
    evaluate_every: int | float = 0.1
    """Steps between two evaluations on validation cases; below 1 a share of `steps`, 0 for none."""
    patience: int = 5
    """Evaluations without improvement before training stops early; 0 for never. Early stopping cuts the learning rate
    schedule short, so by default half of the steps must pass without improvement."""
    monitor: str = "ndcg@10"
    """The metric by which the best state is chosen; higher is better."""

    def __post_init__(self):
        check_least(self, "training", steps=1, log_every=1, checkpoint_every=1, keep=1, evaluate_every=0, patience=0)
        if self.evaluate_every > 1 and self.evaluate_every % 1:
            raise UserError(
                f"configuration key 'training.evaluate_every' is {self.evaluate_every}; "
                "give a whole number of steps, or a share of them below 1"
            )

    @property
    def evaluation_steps(self) -> int:
        """Steps between two evaluations as a number of steps; 0 for none."""
        every = self.evaluate_every
        return max(1, round(every * self.steps)) if 0 < every < 1 else int(every)

    def check_monitor(self, names: Iterable[str]) -> None:
        """Checks that `monitor` is one of the evaluated metrics, if there are any.

        Raises:
          UserError: it is not.
        """
        known = list(names)
        if self.evaluate_every and self.monitor not in known:
            raise UserError(
                f"configuration key 'training.monitor': {self.monitor!r} is not evaluated; there are {', '.join(known)}"
            )


@dataclasses.dataclass(frozen=True)
class Watch:
    """The state of early stopping; kept in the notes of every checkpoint."""

    best: float | None = None
    """The best value of `LoopConfig.monitor`; None before the first evaluation."""
    step: int = 0
    """The step of the best value."""
    stale: int = 0
    """Evaluations since the best value."""
    ended: str = ""
    """Why an evaluation ended the training; empty if none did."""

    def add(self, value: float, step: int) -> "Watch":
        """The state after one more evaluation; NaN is no improvement.

        While every value is 0, a model without hits, the later state counts as better.
        """
        better = value > (-math.inf if self.best is None else self.best) or value == self.best == 0
        return Watch(value, step) if better else dataclasses.replace(self, stale=self.stale + 1)


def fit(
    step_fn: Callable[[Any, Any], tuple[Any, Metrics]],
    state: Any,
    iterator: BatchIterator,
    *,
    config: LoopConfig,
    folder: Path,
    metrics_path: Path,
    stage: str = "train",
    mesh: Mesh | None = None,
    flops_per_step: float | Callable[[Any], float | Flops] | None = None,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    evaluates_start: bool = False,
    ends: Callable[[dict[str, float]], str] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> Any:
    """Trains up to `config.steps`, from the newest checkpoint in `folder` if any.

    With evaluations, the best state's `params` and `extra` are saved in `folder`/best (`checkpoint.load_best`), and
    training stops early after `config.patience` evaluations in a row without improvement.

    Args:
      state: the first state; its buffers are donated.
      folder: the folder of this stage's checkpoints.
      metrics_path: the log file, with a JSON line for each log and evaluation; `tensorboard` is made beside it.
      stage: the name of this training in metrics.jsonl, in TensorBoard and on the progress bar.
      flops_per_step: model FLOPs of a step, or a function of the batch; for the share of the machine's peak. The log
        says if the count is a lower bound.
      evaluate: called with the state every `config.evaluation_steps` and at the end; its values, `config.monitor` among
        them, are logged under "valid/", after a line of the training so far. An empty dict (no validation cases) is
        ignored.
      evaluates_start: evaluate the first state too, as that of step 0, which may then be the best one.
      ends: called with the values of an evaluation; what it returns, if not empty, is why training stops there.
      on_log: called with every logged line.

    Returns:
      The state after the last step.

    Raises:
      UserError: the loss is not finite, the data ends early, the disk is full, no checkpoint can be read, or no
        evaluated metric is called `config.monitor`.
      SystemExit: status 130 after Ctrl-C or SIGTERM, once the state is saved.
    """
    step_fn, every = place(as_partial(step_fn), mesh), config.evaluation_steps
    state, totals, begun, watch = _resume(folder, place(state, mesh), iterator)
    totals = place(totals, mesh)
    log = Log(metrics_path, stage, begun, on_log)
    if begun >= config.steps or _gave_up(watch, config):
        return state
    if begun:
        console.print(f"{stage}: going on from step {begun}", markup=False)
    # With a mesh the state keeps its sharding: the compiler could choose another one after every step.
    kept = (jax.tree.map(lambda x: x.sharding, state), None, None) if mesh else None
    one_step, train = _programs()
    train = jax.jit(train, donate_argnums=(1, 2), out_shardings=kept)
    meter = Meter(flops_per_step)
    batches, bars = Prefetch(iterator), _bars(meter.peak)
    with use_mesh(mesh) if mesh else nullcontext(), _stop_signals() as stop, batches, bars, log:
        task = bars.add_task(stage, total=config.steps, completed=begun, loss="-", rate="-", share="-")
        in_flight = None

        def assess(step: int) -> Watch:
            if not (values := evaluate(state)):
                return watch
            log.write({"step": step, **{f"valid/{name}": value for name, value in values.items()}})
            found = watch.add(_monitored(values, config), step)
            if found.step == step:
                best = {"params": state.params, "extra": state.extra}
                checkpoint.save(folder / checkpoint.BEST, step, best, {"best": found.best}, keep=1)
            return dataclasses.replace(found, ended=ends(values) if ends else "")

        if evaluate and every and evaluates_start and not begun:
            with meter.paused():
                watch = assess(0)
        for step in range(begun + 1, config.steps + 1):
            batch = batches.get(step)
            totals = totals or place(_zeros(jax.eval_shape(one_step, step_fn, state, batch)[1]), mesh)
            meter.add(batch)
            batch = shard_batch(batch, mesh) if mesh else batch
            state, totals, done = train(step_fn, state, totals, batch, np.int32(step))
            # One step computes while the next batch is made; more would hold more batches in memory.
            jax.block_until_ready(in_flight)
            in_flight = done
            # Read once: a signal during saving counts for the next step.
            last, stopping = step == config.steps, bool(stop)
            evaluates = evaluate and every and (step % every == 0 or last)
            if step % config.log_every == 0 or last or evaluates:
                line = meter.read(_fetch(totals, stage, folder), step)
                totals = jax.tree.map(jnp.zeros_like, totals)
                log.write(line)
                bars.update(task, **_shown(line))
            bars.update(task, completed=step)
            with meter.paused():
                if evaluates:
                    watch = assess(step)
                    last = last or _gave_up(watch, config)
                if step % config.checkpoint_every == 0 or last or stopping:
                    totals_so_far = _fetch(totals, stage, folder)
                    notes = {"iterator": batches.position, "totals": totals_so_far, "watch": dataclasses.asdict(watch)}
                    log.sync()
                    checkpoint.save(folder, step, state, notes, keep=config.keep)
            fault_point(f"step:{step}")
            if stopping and not last:
                message = f"stopped after step {step} of {config.steps}, which is saved; run the same command to go on"
                console.print(f"{stage}: {message}", markup=False)
                raise SystemExit(130)
            if last:
                break
    if _gave_up(watch, config) and step < config.steps:
        why = watch.ended or f"nothing better than {config.monitor} {watch.best:.4f} of step {watch.step}"
        console.print(f"{stage}: stopped after step {step}: {why}", markup=False)
    return state


def _resume(folder: Path, state: Any, iterator: BatchIterator) -> tuple[Any, Metrics, int, Watch]:
    """The newest checkpoint: state, sums since the last log line, step, evaluations; sets the iterator's position."""
    found = checkpoint.restore(folder, state)
    if found is None:
        return state, {}, 0, Watch()
    state, notes, step = found
    iterator.set_state(notes["iterator"])
    totals = {name: tuple(jnp.float32(value) for value in pair) for name, pair in notes["totals"].items()}
    return state, totals, step, Watch(**notes.get("watch", {}))


def _gave_up(watch: Watch, config: LoopConfig) -> bool:
    return bool(watch.ended) or 0 < config.patience <= watch.stale


def _monitored(values: dict[str, float], config: LoopConfig) -> float:
    config.check_monitor(values)
    return float(values[config.monitor])


def as_partial(function: Callable) -> Partial:
    """The function as a pytree whose leaves are its bound arrays."""
    return function if isinstance(function, Partial) else Partial(function)


def _programs() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(one_step, train): the step alone, jitted; and the step with the running sums of its metrics, to be jitted.

    `train` calls `one_step` and records the first step whose loss is not finite. The metrics' names are read from
    `one_step` before the first batch, so that the step is traced once. Both are new for every training, so that their
    compiled programs are freed with it.
    """
    one_step = jax.jit(lambda step_fn, state, batch: step_fn(state, batch))

    def train(
        step_fn: Partial, state: Any, totals: Metrics, batch: Any, step: jax.Array
    ) -> tuple[Any, Metrics, jax.Array]:
        state, metrics = one_step(step_fn, state, batch)
        first, _ = totals[BAD_STEP]
        bad = ~jnp.isfinite(metrics["loss"][0]) & (first == 0)
        found = {BAD_STEP: (jnp.where(bad, jnp.float32(step), 0.0), 0.0), **metrics}
        totals = {name: tuple(jnp.float32(a) + b for a, b in zip(found[name], totals[name])) for name in found}
        return state, totals, step + 0

    return one_step, train


def _zeros(names: Iterable[str]) -> Metrics:
    return {name: (jnp.float32(0), jnp.float32(0)) for name in [*names, BAD_STEP]}


def _fetch(totals: Metrics, stage: str, folder: Path) -> dict[str, list[float]]:
    """The sums as Python numbers.

    Raises:
      UserError: a loss was not finite.
    """
    sums = {name: [float(value) for value in pair] for name, pair in jax.device_get(totals).items()}
    if bad := int(sums[BAD_STEP][0]):
        kept = checkpoint.steps(folder)
        mend = f"the checkpoint of step {kept[-1]} is kept" if kept else "there is no checkpoint yet"
        raise UserError(f"{stage}: the loss of step {bad} is not a finite number; lower optim.learning_rate ({mend})")
    return sums


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Yields a list that receives the first SIGINT or SIGTERM; the second one acts as usual."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def note(number: int, _: Any) -> None:
        received.append(number)
        restore()
        console.print("\nstopping after this step; once more to stop at once", markup=False)

    for number in usual:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


def _bars(peak: float | None) -> Any:
    columns = ["loss {task.fields[loss]}", "{task.fields[rate]} targets/s"]
    return progress(*columns, *(["{task.fields[share]} of peak"] if peak else []))


def _shown(line: dict[str, Any]) -> dict[str, str]:
    rate, share = line["targets_per_second"], line.get("peak_share", 0.0)
    return {"loss": f"{line['loss']:.4f}", "rate": f"{rate:,.0f}", "share": f"{share:.0%}"}
