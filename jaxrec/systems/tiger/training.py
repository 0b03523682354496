"""Training TIGER: the codes of the next item, for every prefix of every user's sequence.

Two ways to make contexts of the prefixes:

- each by itself, as published: a prefix is encoded, and its next item, or its next few, are the targets of the context;
- all at once, with a causal encoder (`model.causal`): a sequence is encoded once, and each of its items is a target
  that sees the part before it. The encoder then reads several times fewer tokens.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.data import item_sequences
from jaxrec.losses.likelihood import next_token
from jaxrec.run import Run
from jaxrec.systems.generative import context_batches, mean_of, supervised, train_model, training_cuts
from jaxrec.systems.tiger.config import TigerConfig
from jaxrec.systems.tiger.model import TigerAssembly, TigerCatalogue, assemble
from jaxrec.training.stages import Stage, Task


def stages(run: Run, config: TigerConfig) -> tuple[Stage, ...]:
    """One supervised stage."""

    def train(task: Task) -> None:
        assembly = assemble(run, config)
        train_model(assembly, config, mean_loss, training_batches(assembly, config), task)

    return supervised(run, config, train)


def losses(
    assembly: TigerAssembly,
    config: TigerConfig,
    catalogue: TigerCatalogue,
    variables: dict,
    batch: dict,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the targets' negative log-likelihoods (labels smoothed), and the sum of the weights."""
    apply = partial(assembly.model.apply, variables, rngs={"dropout": key})
    inputs = assembly.inputs(catalogue, batch)
    targets, where = catalogue.codes[batch["target"]], (batch["target_rank"] >= 0) & batch["where"][:, None]
    context = apply(inputs, True, method="prefill")
    if assembly.model.config.causal:
        # Each target sees the user and the items before it.
        context = context.at(assembly.before(batch["before"]) - 1)
    scored = apply(context, targets, where, True, method="score")
    smoothing = config.objective.smoothing
    loss = next_token(scored.log_probs, where, mean_log_probs=scored.mean_log_probs, smoothing=smoothing)
    weight = jnp.where(where, config.objective.later_weight ** jnp.maximum(batch["target_rank"], 0), 0.0)
    return (weight * loss).sum(), weight.sum()


mean_loss = mean_of(losses)
"""As `jaxrec.training.step.Loss`; a batch is what `training_batches` yields."""


def training_batches(assembly: TigerAssembly, config: TigerConfig) -> Iterator[dict]:
    """Batches of contexts with their targets, without end, in an order that the seed decides."""
    wanted, features, lengths = assembly.wanted, config.features, None
    records, cuts = training_cuts(assembly)
    if config.model.causal:
        cuts = item_sequences.overlapping_windows(item_sequences.counts_of(records, wanted), features)
        lengths = np.minimum(cuts[:, 1] - 1, features.buckets[-1])

    def example(record: dict, place: int, rng: np.random.Generator) -> dict:
        # Users that aren't known are served too, so that some are trained on.
        if rng.random() < config.objective.without_user:
            record = {**record, "user": item_sequences.NOBODY}
        if config.model.causal:
            return item_sequences.whole(record, place, features, wanted=wanted)
        context = features.cut(record, place, behaviors=len(assembly.behaviors), wanted=wanted)
        return context | item_sequences.following(record, place, config.objective.targets, wanted=wanted)

    return context_batches(records, cuts, example, config, lengths)
