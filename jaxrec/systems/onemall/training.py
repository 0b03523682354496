"""Training OneMall's model (Eq. 7): next-token prediction and contrastive task, all targets of a context at once."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.data import features
from jaxrec.losses.contrastive import in_batch_softmax
from jaxrec.losses.likelihood import next_token
from jaxrec.models.cross_decoder import CatalogueArrays
from jaxrec.nn.moe import balance
from jaxrec.run import Run
from jaxrec.systems.generative import bound_loss, context_batches, supervised, train_model, training_cuts
from jaxrec.systems.onemall.config import OneMallConfig
from jaxrec.systems.onemall.model import OneMallAssembly, assemble
from jaxrec.training.stages import Stage, Task
from jaxrec.training.step import Loss


def supervised_stages(run: Run, config: OneMallConfig) -> tuple[Stage, ...]:
    """One supervised stage, behind that of the text encoder where it is fine-tuned."""

    def train(task: Task) -> None:
        assembly = assemble(run, config)
        batches, counted = training_batches(assembly, config), exact_loss(assembly, config)
        train_model(assembly, config, mean_loss, batches, task, counted=counted)

    return supervised(run, config, train, without=config.of_later)


def mean_loss(
    assembly: OneMallAssembly,
    config: OneMallConfig,
    catalogue: CatalogueArrays,
    params: Any,
    extra: dict,
    batch: dict,
    key: jax.Array,
):
    """As `jaxrec.training.step.Loss`; `extra` holds the biases of the routers, a batch is of `training_batches`."""
    sums, count, loads, _ = losses(assembly, config, catalogue, {"params": params, **extra}, batch, key)
    total = sums["next_token"] + config.objective.contrastive_weight * sums["contrastive"]
    metrics = {name: (value, count) for name, value in (sums | {"loss": total}).items()}
    return total / jnp.maximum(count, 1), (metrics, balanced(extra, loads, config))


def exact_loss(assembly: OneMallAssembly, config: OneMallConfig) -> Loss:
    """`mean_loss` without the empty rows of `run_blocked`, which are no model FLOPs."""
    exact = assembly.model.clone(config=dataclasses.replace(assembly.model.config, dispatch="ragged"))
    return bound_loss(mean_loss, dataclasses.replace(assembly, model=exact), config)


def losses(
    assembly: OneMallAssembly,
    config: OneMallConfig,
    catalogue: CatalogueArrays,
    variables: dict,
    batch: dict,
    key: jax.Array,
):
    """Sums over the batch's targets of each loss of Eq. 7, the number of targets, the experts' loads, the contexts.

    The loads are those of BOS and of the targets' tokens, in two trees; padding is in neither.
    The items of a session are L targets of one context: targets int32 [B, L] with mask [B, L].
    """
    model, rngs = assembly.model, {"dropout": key}
    target, where = batch["target"], batch["target_where"] & batch["where"][:, None]
    apply = partial(model.apply, variables, mutable=["balance"], rngs=rngs)
    context, of_bos = apply(assembly.inputs(catalogue, batch, where=batch["where"]), True, method="prefill")
    scored, of_targets = apply(context, catalogue.codes[target], where, True, method="score")
    sums = {"next_token": next_token(scored.log_probs, where).sum(), "contrastive": jnp.float32(0)}
    if config.objective.contrastive_weight:
        sums["contrastive"] = contrastive(assembly, catalogue, variables, scored.end, target, where).sum()
    return sums, where.sum(), tuple(each.get("balance", {}) for each in (of_bos, of_targets)), context


def contrastive(
    assembly: OneMallAssembly, catalogue: CatalogueArrays, variables: dict, state, target: jax.Array, where: jax.Array
):
    """In-batch contrastive loss [B * L] of s_M against the item tower (Eq. 7), with logQ correction.

    A context's own targets are all true, so that they aren't compared with one another, nor are copies of an item.
    """
    items, real = target.reshape(-1), where.reshape(-1)
    flat = state.reshape(len(items), -1)
    scores = assembly.model.apply(variables, flat, items, catalogue, method="contrast")
    owner = jnp.repeat(jnp.arange(len(target)), target.shape[1])
    others = (owner[:, None] != owner) & (items[:, None] != items) & real & real[:, None]
    log_q = catalogue.log_q[items]
    return in_batch_softmax(scores, positive=jnp.arange(len(items)), candidates=others, log_q=log_q)


def balanced(extra: dict, loads: tuple[dict, ...], config: OneMallConfig) -> dict:
    """`extra` after a step with these loads of the experts; unchanged for a model without experts."""
    if not all(loads):
        return extra
    return {**extra, "balance": move_biases(extra["balance"], loads, config.model.balance_rate)}


def move_biases(biases: dict, loads: Iterable[dict], rate: float) -> dict:
    """The routers' biases after a step (loss-free balancing), given the loads that the layers sowed in each pass."""

    def moved(layer: str) -> jax.Array:
        load = sum(each[layer]["moe"]["load"] for each in loads)
        return balance(biases[layer]["moe"]["bias"], load, rate)

    return {layer: {"moe": {"bias": moved(layer)}} for layer in biases}


def training_batches(
    assembly: OneMallAssembly, config: OneMallConfig, more: Callable[[dict, int], dict] | None = None
) -> Iterator[dict]:
    """Batches of contexts with their targets, without end, in an order that the seed decides.

    more: (record, session) -> further arrays of a context.
    """
    records, cuts = training_cuts(assembly, min_history=config.min_history)

    def example(record: dict, session: int, rng: np.random.Generator) -> dict:
        context = features.cut(
            record, session, config.features, behaviors=len(assembly.behaviors), wanted=assembly.wanted
        )
        context |= features.targets(record, session, config.features, wanted=assembly.wanted, rng=rng)
        return context if more is None else context | more(record, session)

    return context_batches(records, cuts, example, config)
