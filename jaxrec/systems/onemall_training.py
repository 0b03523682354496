"""Training OneMall's model (Eq. 7): next-token prediction and contrastive task, all targets of a context at once."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrec.data import features
from jaxrec.data.examples import Records
from jaxrec.data.pipeline import batches, cut_index
from jaxrec.losses.contrastive import in_batch_softmax
from jaxrec.losses.likelihood import next_token
from jaxrec.nn.moe import balance
from jaxrec.systems.onemall_model import Assembly
from jaxrec.training.flops import matmul_flops
from jaxrec.training.loop import TrainState, fit
from jaxrec.training.optim import make_optimizer
from jaxrec.training.sharding import like_params, make_mesh, use_mesh

if TYPE_CHECKING:
    from jaxrec.systems.onemall import OneMallConfig


def train_model(assembly: Assembly, config: "OneMallConfig", folder: Path, metrics_path: Path) -> TrainState:
    """Trains to the end, from the newest checkpoint in `folder` if there is one."""
    mesh = make_mesh(config.mesh) if jax.device_count() > 1 else None
    optimizer = make_optimizer(config.optim, config.training.steps)
    return fit(
        make_step(assembly, config, optimizer),
        make_state(assembly, config.seed, optimizer, mesh),
        training_batches(assembly, config),
        config=config.training,
        folder=folder,
        metrics_path=metrics_path,
        stage="pretrain",
        mesh=mesh,
        flops_per_step=flops_counter(assembly, config),
    )


def make_state(assembly: Assembly, seed: int, optimizer: optax.GradientTransformation, mesh=None) -> TrainState:
    """The state before the first step; `extra` holds the biases of the routers."""
    variables = assembly.init(seed, mesh)
    params, extra = variables["params"], {"balance": variables.get("balance", {})}
    if mesh is None:
        return TrainState(jnp.int32(0), params, optimizer.init(params), extra)
    with use_mesh(mesh):
        shapes = jax.eval_shape(optimizer.init, params)
        opt_state = jax.jit(optimizer.init, out_shardings=like_params(shapes, params, mesh))(params)
    return TrainState(jnp.int32(0), params, opt_state, extra)


def make_step(assembly: Assembly, config: "OneMallConfig", optimizer: optax.GradientTransformation) -> Callable:
    """step(state, batch) -> (state, metrics as (sum, count)), where batch is what `training_batches` yields."""

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def mean_loss(params):
            sums, count, load = losses(assembly, config, {"params": params, **state.extra}, batch, key)
            total = sums["next_token"] + config.objective.contrastive_weight * sums["contrastive"]
            return total / jnp.maximum(count, 1), (sums | {"loss": total}, count, load)

        gradients, (sums, count, load) = jax.grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        extra = {"balance": move_biases(state.extra["balance"], load, config.model.balance_rate)}
        metrics = {name: (value, count) for name, value in sums.items()}
        return TrainState(state.step + 1, params, opt_state, extra), metrics

    return step


def losses(assembly: Assembly, config: "OneMallConfig", variables: dict, batch: dict, key: jax.Array):
    """Sums over the batch's targets of each loss of Eq. 7, the number of targets, and the experts' load.

    The items of a session are L targets of one context: targets int32 [B, L] with mask [B, L].
    """
    model, catalogue, rngs = assembly.model, assembly.catalogue, {"dropout": key}
    target, where = batch["target"], batch["target_where"] & batch["where"][:, None]
    context = model.apply(variables, assembly.features(batch), catalogue, True, method="prefill", rngs=rngs)
    (log_probs, state), load = model.apply(
        variables, context, catalogue.codes[target], where, True, method="score", mutable=["balance"], rngs=rngs
    )
    sums = {"next_token": next_token(log_probs, where).sum(), "contrastive": jnp.float32(0)}
    if config.objective.contrastive_weight:
        sums["contrastive"] = contrastive(assembly, variables, state, target, where).sum()
    return sums, where.sum(), load.get("balance", {})


def contrastive(assembly: Assembly, variables: dict, state: jax.Array, target: jax.Array, where: jax.Array):
    """In-batch contrastive loss [B * L] of s_M against the item tower (Eq. 7), with logQ correction.

    A context's own targets are all true, so that they aren't compared with one another, nor are copies of an item.
    """
    items, real = target.reshape(-1), where.reshape(-1)
    flat = state.reshape(len(items), -1)
    scores = assembly.model.apply(variables, flat, items, assembly.catalogue, method="contrast")
    owner = jnp.repeat(jnp.arange(len(target)), target.shape[1])
    others = (owner[:, None] != owner) & (items[:, None] != items) & real & real[:, None]
    log_q = assembly.catalogue.log_q[items]
    return in_batch_softmax(scores, positive=jnp.arange(len(items)), candidates=others, log_q=log_q)


def move_biases(biases: dict, loads: dict, rate: float) -> dict:
    """The routers' biases after a step (loss-free balancing), given the loads that the layers sowed."""
    return {
        layer: {"moe": {"bias": balance(value["moe"]["bias"], loads[layer]["moe"]["load"], rate)}}
        for layer, value in biases.items()
    }


def training_batches(assembly: Assembly, config: "OneMallConfig"):
    """Batches of contexts with their targets, without end, in an order that the seed decides."""
    records = Records(assembly.examples, "train")
    names = [assembly.behaviors[index] for index in assembly.target_behaviors]
    cuts = cut_index(records, names, min_history=config.min_history)
    buckets = np.array([features.bucket_of(records[record], session, config.features) for record, session in cuts])

    def example(record: dict, session: int, rng: np.random.Generator) -> dict:
        context = features.cut(
            record, session, config.features, behaviors=len(assembly.behaviors), wanted=assembly.wanted
        )
        return context | features.targets(record, session, config.features, wanted=assembly.wanted, rng=rng)

    return batches(
        records,
        cuts,
        example,
        batch_size=config.batch_size,
        seed=config.seed,
        buckets=np.searchsorted(config.features.buckets, buckets),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def flops_counter(assembly: Assembly, config: "OneMallConfig") -> Callable[[dict], float]:
    """Model FLOPs of a training step on a batch: three times the matrix products of the forward pass.

    Counted with the experts run exactly (`ragged`): padding and dropped tokens of another dispatch are no model FLOPs.
    """
    counted: dict[int, float] = {}
    exact = assembly.model.clone(config=dataclasses.replace(assembly.model.config, dispatch="ragged"))
    twin = dataclasses.replace(assembly, model=exact)
    variables = jax.eval_shape(lambda: twin.init(0))

    def forward(variables, batch):
        sums, _, _ = losses(twin, config, variables, batch, jax.random.key(0))
        return sums

    def count(batch: dict) -> float:
        size = batch["past_item"].shape[1]
        if size not in counted:
            counted[size] = 3 * matmul_flops(forward, variables, batch)
        return counted[size]

    return count
