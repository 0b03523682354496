"""A training as an ordered list of named stages, each in its own folder `stages/<name>/` of the run directory.

    stages = (
        Stage("likelihood", settings, data, train_likelihood),
        Stage("preference", settings, data, train_preference, start="likelihood", frozen=("likelihood",)),
    )
    run_stages(run, stages)                       # trains those that are not trained yet
    run_stages(run, stages, only="preference")

A stage is trained when its fingerprint is the one that its folder was marked with. The fingerprint holds those of the
stages that it starts from, reads frozen or needs, so that a stage is trained anew when one of these was, and earlier
stages stay as they are when a later one changes. Each goes on from its own checkpoints after a stop, to the same bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrec.config import UserError, fingerprint
from jaxrec.run import Run, stage_path
from jaxrec.training import checkpoint
from jaxrec.training.flops import step_flops
from jaxrec.training.loop import LoopConfig, TrainState, fit
from jaxrec.training.optim import OptimConfig, make_optimizer, path_name
from jaxrec.training.prefetch import BatchIterator
from jaxrec.training.sharding import MeshConfig, make_mesh
from jaxrec.training.step import Loss, bind, make_state, make_step


@dataclass(frozen=True)
class Task:
    """The arguments of the function that trains a stage."""

    name: str
    """The stage's name in log lines and on the progress bar."""
    folder: Path
    """The folder of its checkpoints."""
    metrics_path: Path
    """The metrics.jsonl of its log lines."""
    start: dict | None = None
    """The initial variables {"params", ...}: the best state of the stage named in `Stage.start`."""
    frozen: dict[str, dict] = field(default_factory=dict)
    """The variables of the best state of each frozen stage, by name."""


@dataclass(frozen=True)
class Stage:
    """One training of a system."""

    name: str
    """Name of the stage and of its folder."""
    settings: Any
    """Configuration values that determine its result: loss, optimiser, number of steps, seed; for the fingerprint."""
    data: Callable[[], Sequence[Any]]
    """Runs the phases of its data; returns their fingerprints, and those of weights read from other folders."""
    train: Callable[[Task], Any]
    """Trains to the end, from the newest checkpoint in the task's folder if any; usually calls `minimise`."""
    start: str = ""
    """The earlier stage whose best state initialises this one; empty: `train` initialises it."""
    frozen: tuple[str, ...] = ()
    """The earlier stages whose best state the loss reads and never changes: a reference policy, a reward model."""
    needs: tuple[str, ...] = ()
    """Further earlier stages, whose results the phases of `data` read. A phase is made anew by its own inputs alone, so
    the settings of these stages belong to the inputs of those phases."""

    @property
    def earlier(self) -> tuple[str, ...]:
        """The stages that must be trained before this one."""
        return tuple(dict.fromkeys([*([self.start] if self.start else []), *self.frozen, *self.needs]))


class TrainingFields(Protocol):
    """The configuration fields of one training."""

    seed: int
    optim: OptimConfig
    training: LoopConfig
    mesh: MeshConfig


def check_names(stages: Sequence[Stage], until: str = "", only: str = "") -> None:
    """Checks the stage names given to `run_stages`.

    Raises:
      UserError: there is no such stage, or both names are given.
    """
    names = [stage.name for stage in stages]
    for option, given in (("--until", until), ("--only", only)):
        if given and given not in names:
            raise UserError(f"{option} {given}: there is no such stage; there are {', '.join(names)}")
    if until and only:
        raise UserError("--until and --only exclude each other; give one of them")


def run_stages(run: Run, stages: Sequence[Stage], *, until: str = "", only: str = "") -> str | None:
    """Trains the stages that are not trained yet, in their order.

    Args:
      until: the last stage to train; empty for all.
      only: the single stage to train; its earlier stages must be trained.

    Returns:
      The fingerprint of the system's last stage; None if it was not reached.

    Raises:
      UserError: as `check_names` or `Run.stage`; or a stage that `only` depends on is not trained.
    """
    by_name = _check(stages)
    check_names(stages, until, only)
    run.stage_names = tuple(by_name)
    closure = _earlier(by_name, only) if only else set()
    results: dict[str, str] = {}
    for stage in stages:
        if only and stage.name not in {only, *closure}:
            continue
        inputs = fingerprint(*stage.data(), stage.settings, *(results[name] for name in stage.earlier))
        path = stage_path(stage.name)
        if stage.name in closure and not run.is_trained(path, inputs):
            raise UserError(
                f"--only {only}: the stage {stage.name}, which it is trained from, is not trained with this "
                f"configuration in {run.path}; train it with --until {stage.name}, or leave --only out"
            )
        needed = {stage_path(name) for name in _earlier(by_name, stage.name)}
        results[stage.name] = run.stage(path, inputs, lambda folder, stage=stage: _train(run, stage, folder), needed)
        if stage.name in (until, only):
            break
    return results.get(stages[-1].name)


def minimise(
    loss: Loss,
    init: Callable[[int, Mesh | None], dict],
    batches: BatchIterator,
    config: TrainingFields,
    task: Task,
    *,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    evaluates_start: bool = False,
    ends: Callable[[dict[str, float]], str] | None = None,
    counted: Loss | None = None,
) -> TrainState:
    """Trains a stage to the end, or until validation stops improving, from its newest checkpoint if any.

    Args:
      loss: loss(params, extra, batch, key); where the task has frozen stages, loss(frozen, params, extra, batch, key)
        with their variables by name. They are arguments of the compiled step, not constants in it.
      init: fresh variables from a seed, laid out over the mesh if there is one.
      evaluate, evaluates_start, ends: as for `jaxrec.training.loop.fit`.
      counted: the loss whose FLOPs are logged, if `loss` also computes values that the model does not need.

    Raises:
      UserError: as `jaxrec.training.loop.fit`; or the initial state has other shapes.
    """
    mesh = make_mesh(config.mesh) if jax.device_count() > 1 else None
    optimizer = make_optimizer(config.optim, config.training.steps)
    variables = init(config.seed, mesh)
    if task.start is not None:
        variables = _started(task, variables)
    if task.frozen:
        frozen = {name: _like(each, variables) for name, each in task.frozen.items()}
        loss, counted = bind(loss, frozen), counted and bind(counted, frozen)
    return fit(
        make_step(loss, optimizer, config.seed),
        make_state(variables, optimizer, mesh),
        batches,
        config=config.training,
        folder=task.folder,
        metrics_path=task.metrics_path,
        stage=task.name,
        mesh=mesh,
        flops_per_step=step_flops(counted or loss, variables),
        evaluate=evaluate,
        evaluates_start=evaluates_start,
        ends=ends,
    )


def best_variables(folder: Path) -> dict:
    """The variables {"params", ...} of a stage's best state, or of its last state if it was not evaluated."""
    best = checkpoint.load_best(folder, "params", "extra")
    return {"params": best["params"], **best["extra"]}


def _train(run: Run, stage: Stage, folder: Path) -> None:
    def best(name: str) -> dict:
        return best_variables(run.place(stage_path(name)))

    # The state is donated, so a stage that is also read frozen is loaded twice.
    start, frozen = best(stage.start) if stage.start else None, {name: best(name) for name in stage.frozen}
    stage.train(Task(stage.name, folder, run.log_of(stage_path(stage.name)), start, frozen))


def _check(stages: Sequence[Stage]) -> dict[str, Stage]:
    """The stages by name; checks that each depends on earlier stages only."""
    by_name: dict[str, Stage] = {}
    for stage in stages:
        if missing := [name for name in stage.earlier if name not in by_name]:
            raise ValueError(f"stage {stage.name} is trained from {missing[0]}, which is no stage before it")
        if stage.name in by_name:
            raise ValueError(f"two stages are called {stage.name}")
        by_name[stage.name] = stage
    return by_name


def _earlier(by_name: dict[str, Stage], name: str) -> set[str]:
    """All stages that a stage depends on, directly or indirectly."""
    direct = by_name[name].earlier
    return set(direct).union(*(_earlier(by_name, each) for each in direct))


def _started(task: Task, fresh: dict) -> dict:
    """The initial variables of the stage, sharded like the fresh ones."""
    wanted, given = (_shapes(tree) for tree in (fresh, task.start))
    for name in [*wanted, *given]:
        if wanted.get(name) != given.get(name):
            raise UserError(
                f"stage {task.name}: {name} is {given.get(name, 'missing')} in the stage that it starts from and "
                f"{wanted.get(name, 'missing')} here; give both stages the same model"
            )
    return _like(task.start, fresh)


def _like(variables: dict, fresh: dict) -> dict:
    """Variables sharded like the fresh ones; those of another model stay where they are."""
    if _shapes(variables) != _shapes(fresh):
        return variables
    # Through the host: each of several processes holds the whole value here.
    return jax.tree.map(lambda value, like: jax.device_put(np.asarray(value), like.sharding), variables, fresh)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
