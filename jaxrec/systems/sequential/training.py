"""Training an item-level sequence model on whole histories: every place that a model may learn from, in one pass."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxrec.config import UserError
from jaxrec.data.examples import Records
from jaxrec.data.pipeline import Features, array_batches, merge_small
from jaxrec.losses.likelihood import binary, full_softmax, sampled_softmax
from jaxrec.models.sequential import Bert4RecConfig, ItemFacts
from jaxrec.run import TRAINING, Run
from jaxrec.systems.generative import mean_of
from jaxrec.systems.phases import ALIGNMENT, alignment, prepare_examples, prepare_tables, prepare_with_embeddings
from jaxrec.systems.sequential.config import FullSoftmax, Objective, SampledSoftmax, SequentialConfig
from jaxrec.systems.sequential.model import (
    Histories,
    SequentialAssembly,
    SequentialRecommender,
    assemble,
    disjoint_windows,
)
from jaxrec.systems.validation import CUTOFFS, validation_cases, validation_metrics
from jaxrec.training.loop import TrainState
from jaxrec.training.stages import Stage, Task, minimise
from jaxrec.training.step import Loss

TRIES = 4
"""Draws of a negative that the user doesn't have."""


def stages(run: Run, config: SequentialConfig) -> tuple[Stage, ...]:
    """One supervised stage, behind that of the text encoder where the model reads text embeddings."""
    embeddings = config.model.embeddings
    before = alignment(run, config, with_ids=False) if embeddings else ()

    def data() -> tuple[str, ...]:
        if embeddings:
            return prepare_with_embeddings(run, config)
        return (prepare_examples(run, config, prepare_tables(run, config)),)

    def train(task: Task) -> None:
        assembly = assemble(run, config)
        evaluate = validation(assembly, config) if config.training.evaluate_every else None
        loss, counted = (bound_loss(assembly, each) for each in (config.objective, at_once(config.objective)))
        batches = training_batches(assembly, config)
        minimise(loss, assembly.init, batches, config, task, evaluate=evaluate, counted=counted)

    needs = (ALIGNMENT,) if before else ()
    return *before, Stage(TRAINING, config.training_inputs(), data, train, needs=needs)


def bound_loss(assembly: SequentialAssembly, objective: Objective) -> Loss:
    """`mean_loss` of a training."""
    return Partial(partial(mean_loss, assembly, objective), assembly.facts)


def at_once(objective: Objective) -> Objective:
    """The objective as its FLOPs are counted: how many chunks there are to work through, only the data decide."""
    return replace(objective, rows=0) if isinstance(objective, FullSoftmax) else objective


def losses(
    assembly: SequentialAssembly,
    objective: Objective,
    facts: ItemFacts,
    variables: dict,
    batch: dict,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The sum of the losses of a batch's targets, and their number.

    batch: item, time int32 [B, S + 1] and length int32 [B] of the events, at least two of them.
    """
    chance, drop, draw = jax.random.split(key, 3)
    prepare = hidden_places if isinstance(assembly.model.config, Bert4RecConfig) else next_places
    inputs, targets, where = prepare(assembly, batch, chance)
    states, table = assembly.model.apply(variables, facts, *inputs, True, rngs={"dropout": drop})
    where &= batch["where"][:, None]
    if isinstance(objective, FullSoftmax):
        values = full_softmax(
            states.reshape(-1, states.shape[-1]),
            table,
            targets.reshape(-1),
            where=where.reshape(-1),
            label_smoothing=objective.label_smoothing,
            rows=objective.rows,
        )
    elif isinstance(objective, SampledSoftmax):
        values = _sampled(objective, facts.log_q, states, table, targets, where, draw)
    else:
        negatives, candidates = unseen_items(batch, targets.shape, objective.negatives, len(table), draw)
        positive = (states * table[targets]).sum(-1)
        others = jnp.einsum("BSD,BSnD->BSn", states, table[negatives])
        values = binary(positive, others, candidates=candidates, where=where)
    return values.sum(), where.sum()


mean_loss = mean_of(losses)
"""As `jaxrec.training.step.Loss`; facts: of the assembly; a batch is what `training_batches` yields."""


def next_places(assembly: SequentialAssembly, batch: dict, chance: jax.Array):
    """(what the model reads, targets int32 [B, S], where bool [B, S]): each item is the target of the place before."""
    item, time, length = batch["item"], batch["time"], batch["length"]
    where = jnp.arange(item.shape[1] - 1) < length[:, None] - 1
    return (item[:, :-1], where, time[:, :-1], time[:, 1:]), item[:, 1:], where


def hidden_places(assembly: SequentialAssembly, batch: dict, chance: jax.Array):
    """As `next_places`, for BERT4Rec: items hidden at random are the targets of their own places.

    Of some histories the last item alone; no history is without a target.
    """
    config, item, length = assembly.model.config, batch["item"], batch["length"][:, None]
    place = jnp.arange(item.shape[1])
    few, rows = jax.random.split(chance)
    last = place == length - 1
    hidden = jax.random.uniform(few, item.shape) < config.masked
    only = jax.random.uniform(rows, (len(item), 1)) < config.last_only
    mask = place < length
    hidden = jnp.where(only | ~(hidden & mask).any(1, keepdims=True), last, hidden) & mask
    items = jnp.where(hidden, assembly.model.items, item)
    return (items, mask, batch["time"], batch["time"]), item, hidden


def _sampled(objective: SampledSoftmax, log_q: jax.Array, states, table, targets, where, key) -> jax.Array:
    log_p = jax.nn.log_softmax(objective.power * log_q)
    bounds = jnp.cumsum(jnp.exp(log_p))
    drawn = jnp.searchsorted(bounds, jax.random.uniform(key, (objective.negatives,)) * bounds[-1], side="right")
    drawn = jnp.minimum(drawn, len(log_p) - 1)
    return sampled_softmax(
        (states * table[targets]).sum(-1),
        states @ table[drawn].T,
        log_draws=log_p[drawn] + np.log(objective.negatives),
        candidates=drawn != targets[..., None],
        where=where,
    )


def unseen_items(batch: dict, shape: tuple[int, int], count: int, items: int, key: jax.Array):
    """Items drawn evenly of those that a history doesn't hold: int32 [B, S, count], and bool: whether one was found."""
    tries = jax.random.randint(key, (*shape, count, TRIES), 0, items)
    there = jnp.arange(batch["item"].shape[1]) < batch["length"][:, None]
    own = jnp.where(there, batch["item"], -1)
    fresh = (tries[..., None] != own[:, None, None, None]).all(-1)
    first = jnp.argmax(fresh, axis=-1, keepdims=True)
    return jnp.take_along_axis(tries, first, axis=-1)[..., 0], fresh.any(-1)


def training_batches(assembly: SequentialAssembly, config: SequentialConfig) -> Iterator[Features]:
    """Batches without end, in an order that the seed decides, each of one length bucket; long histories in windows.

    Raises:
      UserError: no history holds two events.
    """
    histories = Histories.of(Records(assembly.examples, "train"), assembly.wanted)
    rows, ends = disjoint_windows(histories.lengths, assembly.lengths[-1])
    if not len(rows):
        raise UserError("no user has two events of a target behavior to train on; use more data or another split")
    buckets = np.searchsorted(assembly.lengths, np.minimum(ends - 1, assembly.lengths[-1]))
    buckets = merge_small(buckets, config.batch_size)

    def take(chosen: np.ndarray) -> Features:
        size = assembly.lengths[buckets[chosen[0]]] + 1
        return histories.take(rows[chosen], size, size, ends[chosen])

    return array_batches(
        take,
        buckets,
        batch_size=config.batch_size,
        seed=config.seed,
        # A log of fewer histories than a batch is one batch, filled up.
        drop_remainder=len(rows) >= config.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def validation(assembly: SequentialAssembly, config: SequentialConfig) -> Callable[[TrainState], dict[str, float]]:
    """A function of the state: as `jaxrec.systems.validation.make_validation`, of items ranked by their scores."""
    rule = config.validation
    cases = validation_cases(Records(assembly.examples, rule.split), assembly.target_behaviors, rule)
    histories = Histories.of(cases.histories, assembly.wanted)

    def evaluate(state: TrainState) -> dict[str, float]:
        if not len(cases):
            return {}
        model = SequentialRecommender(assembly, state.params)
        ranked, _ = model.rank(histories, max(CUTOFFS), rule.exclude_history)
        return validation_metrics(ranked, cases, rule)

    return evaluate
