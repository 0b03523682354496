"""Reinforcement learning behind the supervised stage (OneMall §3.3): candidates, their rewards, DPO or GRPO.

A step draws candidates for some of its contexts by a search under the trie, scores them with the policy in one packed
pass over the same contexts that the supervised losses read, and minimises

    weight * L_RL + L_NTP + L_contrastive        (OneMall §3.3, below Eq. 10)

Candidates come from the *sampler*, a copy of the policy in the training state that is refreshed every n steps. They
are a function of the seed, the step and the sampler, so a resumed training draws the same ones. The search also gives
the candidates' log-likelihoods under the sampler, the denominator of the ratios: Eq. 10's reference, which is
"synchronized from the policy model periodically". The supervised stage is the frozen reference: the divergence from it
is measured, and weighs in the loss where it is asked to.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.tree_util import Partial

from jaxrec.config import UserError
from jaxrec.data.features import following
from jaxrec.decoding.beam import beam_search
from jaxrec.decoding.rollout import rollout
from jaxrec.decoding.trie import Trie
from jaxrec.losses.likelihood import log_likelihood
from jaxrec.losses.policy import advantages, best_against_worst, divergence, grpo
from jaxrec.models.cross_decoder import CatalogueArrays, CrossContext
from jaxrec.run import TRAINING, Run
from jaxrec.systems.onemall.config import OneMallConfig, ReinforcementConfig
from jaxrec.systems.onemall.model import OneMallAssembly, assemble
from jaxrec.systems.onemall.reward_measure import RewardMeasure
from jaxrec.systems.onemall.rewards import Reward, fuse, make_reward
from jaxrec.systems.onemall.training import balanced, losses, training_batches
from jaxrec.systems.ranking.config import RANKING
from jaxrec.systems.recommender import Served
from jaxrec.training.loop import Metrics, TrainState
from jaxrec.training.optim import path_name
from jaxrec.training.stages import Stage, Task, minimise

REINFORCEMENT = "reinforcement"
"""The stage."""
SAMPLER = "sampler"
"""The part of the training state that holds the policy that draws candidates."""


@struct.dataclass
class Known:
    """Arrays that a step reads and no step changes."""

    catalogue: CatalogueArrays
    trie: Trie
    reward: Any
    """the state of the reward (`jaxrec.systems.onemall.rewards`)"""


@struct.dataclass
class DrawnCandidates:
    """n candidates of each of R contexts, with their rewards; no gradient passes through them."""

    codes: jax.Array
    """int32 [R, n, M]"""
    items: jax.Array
    """int32 [R, n], the first item of each ID, 0 where there is none"""
    where: jax.Array
    """bool [R, n]"""
    sampled: jax.Array
    """float32 [R, n], log-likelihoods under the sampler; 0 where there is no candidate"""
    reward: jax.Array
    """float32 [R, n], may hold NaN"""
    advantage: jax.Array
    """float32 [R, n], of all n together"""

    def take(self, index: jax.Array) -> "DrawnCandidates":
        """Some of the candidates: index int32 [R, m]."""
        return jax.tree.map(
            lambda x: jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1), self
        )


def reinforcement_stage(run: Run, config: OneMallConfig, data: Callable[[], Sequence[Any]]) -> Stage:
    """The stage behind the supervised one, which it starts from and which is its frozen reference.

    data: as of `Stage`.
    """
    later = behind(config)

    def train(task: Task) -> None:
        assembly = assemble(run, later)
        check_reference(task, assembly)
        reward = make_reward(run, later, task.frozen.get(RANKING))
        fit(assembly, later, reward, RewardMeasure(run, assembly, later, reward), task)

    frozen = (TRAINING,) if config.reward_model is None else (TRAINING, RANKING)
    return Stage(REINFORCEMENT, later.training_inputs(), data, train, start=TRAINING, frozen=frozen)


def behind(config: OneMallConfig) -> OneMallConfig:
    """The configuration of the stage: a run's, with the batches, optimiser and length of `reinforcement`."""
    own = config.reinforcement
    return replace(config, batch_size=own.batch_size, optim=own.optim, training=own.training)


def fit(
    assembly: OneMallAssembly, config: OneMallConfig, reward: Reward, measure: RewardMeasure, task: Task
) -> TrainState:
    """Trains the stage, from its newest checkpoint if any; config as of `behind`."""

    def read(record: dict, session: int) -> dict:
        return reward.read(record, session, following(record, session, config.features, wanted=assembly.wanted))

    known = Known(assembly.catalogue, measure.trie, reward.state)
    return minimise(
        Partial(partial(mean_loss, assembly, config, reward), known),
        lambda seed, mesh: with_sampler(assembly.init(seed, mesh)),
        training_batches(assembly, config, read),
        config,
        replace(task, start=with_sampler(task.start)),
        evaluate=partial(measure.evaluate, task.frozen[TRAINING]),
        evaluates_start=True,
        ends=measure.ends,
    )


def mean_loss(
    assembly: OneMallAssembly,
    config: OneMallConfig,
    reward: Reward,
    known: Known,
    frozen: dict[str, dict],
    params: Any,
    extra: dict,
    batch: dict,
    key: jax.Array,
):
    """As `jaxrec.training.step.Loss`; `extra` holds the sampler too, and a batch what `reward.read` reads."""
    own, of_policy = config.reinforcement, of_model(extra)
    variables = jax.lax.stop_gradient({"params": params, **of_policy})
    sampler = refreshed(extra[SAMPLER], variables, own.refresh_every)
    few = {name: value[: own.contexts] for name, value in batch.items()}
    drawn = draw(assembly, own, reward, known, sampler["variables"], few, jax.random.fold_in(key, 0))
    group = drawn.take(selected(own, drawn, jax.random.fold_in(key, 1)))
    reference = None
    if own.reads_reference:
        # Once a rollout: every candidate is learned from in one step.
        contexts = read_contexts(assembly, known.catalogue, frozen[TRAINING], few)
        reference = jax.lax.stop_gradient(likelihoods(assembly, frozen[TRAINING], contexts, group))
    total, (metrics, of_policy) = joint_loss(
        assembly, config, known.catalogue, group, reference, params, of_policy, batch, key
    )
    return total, (metrics | of_rewards(drawn, few["where"]), {**of_policy, SAMPLER: sampler})


def joint_loss(
    assembly: OneMallAssembly,
    config: OneMallConfig,
    catalogue: CatalogueArrays,
    group: DrawnCandidates,
    reference: jax.Array | None,
    params: Any,
    extra: dict,
    batch: dict,
    key: jax.Array,
):
    """The loss of a step with its candidates given: as `jaxrec.training.step.Loss`, of the model alone.

    group: candidates of the first contexts of the batch; reference: as of `policy_loss`.
    """
    own, variables, drawing = config.reinforcement, {"params": params, **extra}, len(group.where)
    sums, count, loads, contexts = losses(assembly, config, catalogue, variables, batch, key)
    if config.model.dropout or config.model.context_dropout:
        # The ratio is that of the policy itself, not of one with dropped activations.
        contexts = read_contexts(assembly, catalogue, variables, {name: x[:drawing] for name, x in batch.items()})
    policy = likelihoods(assembly, variables, contexts.first(drawing), group)
    learned, notes = policy_loss(own, policy, group, reference)
    total = sums["next_token"] + config.objective.contrastive_weight * sums["contrastive"]
    total = total / jnp.maximum(count, 1) + learned
    metrics = {name: (value, count) for name, value in (sums | {"loss": total * count}).items()}
    return total, (metrics | notes, balanced(extra, loads, config))


def policy_loss(
    own: ReinforcementConfig, policy: jax.Array, group: DrawnCandidates, reference: jax.Array | None
) -> tuple[jax.Array, Metrics]:
    """(the weighted loss of the policy and its divergence, their metrics), over contexts with rewards that differ.

    policy, reference: log-likelihoods float32 [R, m] of the group, the latter of the frozen stage or None.
    """
    where = group.where
    below = reference if own.reference == "frozen" else group.sampled
    options = {"where": where, "delta": own.delta, "printed": own.printed}
    if own.loss == "dpo":
        values = best_against_worst(policy, below, group.reward, scale=own.scale, **options)
    else:
        values = grpo(policy, below, group.advantage, clip=own.clip, **options).sum(-1)
    compared = (group.advantage != 0).any(-1).sum()
    outside = where & (jnp.abs(jnp.expm1(policy - below)) > own.clip)
    notes = {"policy": (values.sum(), compared), "clipped": (outside.sum(), where.sum())}
    total = own.weight * values.sum() / jnp.maximum(compared, 1)
    if reference is not None:
        kl = divergence(policy, reference, where=where).sum()
        notes["kl"] = (kl, where.sum())
        total += own.kl_weight * kl / jnp.maximum(where.sum(), 1)
    return total, notes


def draw(
    assembly: OneMallAssembly,
    own: ReinforcementConfig,
    reward: Reward,
    known: Known,
    sampler: dict,
    few: dict[str, jax.Array],
    key: jax.Array,
) -> DrawnCandidates:
    """n candidates of the contexts `few` [R, ...] and their rewards; sampler: variables of the policy that draws."""
    context = read_contexts(assembly, known.catalogue, sampler, few)
    extend, batch = partial(assembly.extend, Served(variables=sampler), context), len(few["where"])
    if own.sampling == "beam":
        found = beam_search(extend, None, known.trie, batch=batch, beam_width=own.candidates)
    else:
        options = {"samples": own.candidates, "temperature": own.temperature}
        found = rollout(extend, None, known.trie, key, batch=batch, **options)
    where = found.valid & few["where"][:, None]
    first, _ = known.trie.leaf_ranges(jnp.maximum(found.leaf, 0))
    items = jnp.where(where, known.trie.items[first], 0)
    rewards = fuse(reward.terms(known.reward, few, items), own.weights)
    return jax.lax.stop_gradient(
        DrawnCandidates(
            codes=jnp.maximum(found.codes, 0),
            items=items,
            where=where,
            sampled=jnp.where(where, found.log_probs, 0.0),
            reward=rewards,
            advantage=advantages(rewards, where=where),
        )
    )


def selected(own: ReinforcementConfig, drawn: DrawnCandidates, key: jax.Array) -> jax.Array:
    """The candidates that the loss is computed of, int32 [R, m]: m of n drawn evenly, or the best and the worst."""
    if own.loss == "dpo":
        where = drawn.where & jnp.isfinite(drawn.reward)
        ends = [jnp.argmax(jnp.where(where, sign * drawn.reward, -jnp.inf), -1) for sign in (1, -1)]
        return jnp.stack(ends, -1)
    turn = jnp.where(drawn.where, jax.random.uniform(key, drawn.where.shape), 2.0)
    return jnp.argsort(turn, axis=-1)[:, : own.drawn]


def of_rewards(drawn: DrawnCandidates, real: jax.Array) -> Metrics:
    """The mean reward of the candidates, the share of groups without a difference and of rewards left out.

    real bool [R]: the contexts that exist.
    """
    finite = drawn.where & jnp.isfinite(drawn.reward)
    equal = real & ~(drawn.advantage != 0).any(-1)
    return {
        "reward": (jnp.where(finite, drawn.reward, 0.0).sum(), finite.sum()),
        "equal_rewards": (equal.sum(), real.sum()),
        "skipped_rewards": ((drawn.where & ~finite).sum(), drawn.where.sum()),
    }


def read_contexts(
    assembly: OneMallAssembly, catalogue: CatalogueArrays, variables: dict, few: dict[str, jax.Array]
) -> CrossContext:
    """R contexts, prefilled without dropout."""
    return assembly.model.apply(variables, assembly.inputs(catalogue, few, where=few["where"]), method="prefill")


def likelihoods(assembly: OneMallAssembly, variables: dict, context: CrossContext, group: DrawnCandidates) -> jax.Array:
    """log pi(o | q) float32 [R, m] of the candidates, in one packed pass."""
    scored = assembly.model.apply(variables, context, group.codes, group.where, method="score")
    return log_likelihood(scored.log_probs, group.where)


def refreshed(sampler: dict, variables: dict, every: int) -> dict:
    """The sampler of this step: the policy's variables every so many steps, from the first on, else as it was."""
    now = sampler["age"] % every == 0
    kept = jax.tree.map(lambda new, old: jnp.where(now, new, old), variables, sampler["variables"])
    return {"variables": kept, "age": sampler["age"] + 1}


def with_sampler(variables: dict) -> dict:
    """Variables of a model with a sampler behind them, which the first step refreshes."""
    # Not the same arrays: the state is donated.
    return {**variables, SAMPLER: {"variables": jax.tree.map(jnp.zeros_like, variables), "age": jnp.int32(0)}}


def of_model(variables: dict) -> dict:
    """Variables without the sampler."""
    return {name: value for name, value in variables.items() if name != SAMPLER}


def check_reference(task: Task, assembly: OneMallAssembly) -> None:
    """Whether the frozen reference is of the policy's sizes.

    Raises:
      UserError: it isn't.
    """
    wanted, given = (
        {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (jax.eval_shape(partial(assembly.init, 0)), task.frozen[TRAINING])
    )
    for name in [*wanted, *given]:
        if wanted.get(name) != given.get(name):
            raise UserError(
                f"stage {task.name}: {name} of the reference, stage {TRAINING}, is {given.get(name, 'missing')} and "
                f"{wanted.get(name, 'missing')} in the policy; give both the same model, or train {TRAINING} again"
            )
