"""From a loss and batches to a trained state: what every system's training does between the two."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import jax
from jax.sharding import Mesh

from jaxrec.training.flops import step_flops
from jaxrec.training.loop import LoopConfig, TrainState, fit
from jaxrec.training.optim import OptimConfig, make_optimizer
from jaxrec.training.prefetch import BatchIterator
from jaxrec.training.sharding import MeshConfig, make_mesh
from jaxrec.training.step import Loss, make_state, make_step


class TrainingFields(Protocol):
    """What a run's configuration says of its training."""

    seed: int
    optim: OptimConfig
    training: LoopConfig
    mesh: MeshConfig


def minimise(
    loss: Loss,
    init: Callable[[int, Mesh | None], dict],
    batches: BatchIterator,
    config: TrainingFields,
    folder: Path,
    metrics_path: Path,
    *,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    counted: Loss | None = None,
) -> TrainState:
    """Trains to the end, or until validation gets no better, from the newest checkpoint in `folder` if there is one.

    Args:
      init: fresh variables from a seed, laid out over the mesh if there is one.
      evaluate: as for `jaxrec.training.loop.fit`.
      counted: the same loss as it is taken for the model's FLOPs, where `loss` computes others as well.
    """
    mesh = make_mesh(config.mesh) if jax.device_count() > 1 else None
    optimizer = make_optimizer(config.optim, config.training.steps)
    variables = init(config.seed, mesh)
    return fit(
        make_step(loss, optimizer, config.seed),
        make_state(variables, optimizer, mesh),
        batches,
        config=config.training,
        folder=folder,
        metrics_path=metrics_path,
        mesh=mesh,
        flops_per_step=step_flops(counted or loss, variables),
        evaluate=evaluate,
    )
