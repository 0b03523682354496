"""The stages of a OneSearch run: the supervised ones; where they are configured, reward model and preferences.

The trained model of a run with rewards is measured in three forms: as it is, with its answers in the order of the
reward (OneSearch_RM), and as the stage `personalisation` that the preferences began with.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxrec.config import UserError
from jaxrec.decoding.filters import Allowed
from jaxrec.evaluation.cases import History
from jaxrec.run import Run, stage_path
from jaxrec.systems.generative import train_model
from jaxrec.systems.onesearch import model as onesearch_model
from jaxrec.systems.onesearch.config import CO_OCCURRENCE, CONTENT, PERSONALISATION, OneSearchConfig
from jaxrec.systems.onesearch.model import OneSearchAssembly, assemble, fitted
from jaxrec.systems.onesearch.preference import (
    SearchExamples,
    interaction_examples,
    preference_loss,
    referring_loss,
    target_scores,
)
from jaxrec.systems.onesearch.reordered import ANSWERS, reordered_examples
from jaxrec.systems.onesearch.reward_config import REORDERED, REWARD_MODEL
from jaxrec.systems.onesearch.reward_model import SearchReward, make_search_reward, reward_model_stage, rewarded_order
from jaxrec.systems.onesearch.training import prepare_searches, supervised_stages
from jaxrec.systems.phases import ALIGNMENT
from jaxrec.systems.ranking.model import stack
from jaxrec.systems.recommender import GenerativeRecommender, ReadHistory, Served, as_history
from jaxrec.systems.stored_rows import WithStored, seen_again, stored_rows
from jaxrec.targets import TargetSpace
from jaxrec.training.stages import Stage, Task, best_variables

REFERENCE = "reference"
"""The folder of the reference's scores inside a stage's."""


def stages(run: Run, config: OneSearchConfig) -> tuple[Stage, ...]:
    """The stages in their order; the last one is served.

    The supervised ones are those of a run without rewards, which can go on with them.
    """
    supervised = supervised_stages(run, config)
    if config.rewards is None:
        return supervised
    data = functools.partial(prepare_searches, run, config)
    needs = tuple(stage.name for stage in supervised if stage.name == ALIGNMENT)
    found, before = [*supervised, reward_model_stage(run, config, data, needs)], PERSONALISATION
    for name in config.rewards.phases:
        found.append(preference_stage(run, config, name, data, before))
        before = name
    return tuple(found)


# ---- preferences -----------------------------------------------------------------------------------------------------


def preference_stage(run: Run, config: OneSearchConfig, name: str, data: Any, start: str) -> Stage:
    """The stage of a phase, `reordered` or `interactions`; start: the stage that it begins with."""
    mine = behind(config, name)

    def train(task: Task) -> None:
        assembly = assemble(run, config)
        of_phase, reference = fitted(mine, assembly.space), {PERSONALISATION: task.frozen[PERSONALISATION]}
        if name == REORDERED:
            examples = reordered_examples(run, assembly, of_phase, task.frozen, task.folder / ANSWERS)
        else:
            examples = interaction_examples(run, assembly, of_phase)
        if not stores_reference(examples):
            train_model(assembly, of_phase, referring_loss, examples.batches(), replace(task, frozen=reference))
            return
        scores = stored_reference(task.folder / REFERENCE, examples, reference[PERSONALISATION])
        batches = WithStored(examples.batches(), scores)
        train_model(assembly, of_phase, preference_loss, batches, replace(task, frozen={}))

    # What is served reads the reward model, in whatever phase it was not trained on.
    frozen = (PERSONALISATION, REWARD_MODEL) if name == REORDERED else (PERSONALISATION,)
    needs = (REWARD_MODEL,) if start == PERSONALISATION and name != REORDERED else ()
    inputs = mine.training_inputs(CONTENT, CO_OCCURRENCE, "objective")
    return Stage(name, inputs, data, train, start=start, frozen=frozen, needs=needs)


def behind(config: OneSearchConfig, name: str) -> OneSearchConfig:
    """The configuration of a phase: a run's, with its batches, optimiser and length, and without later phases."""
    own, rewards = config.rewards.phases[name], config.rewards
    if name == REORDERED:
        rewards = replace(rewards, interactions=None)
    return replace(config, rewards=rewards, batch_size=own.batch_size, optim=own.optim, training=own.training)


def stores_reference(examples: SearchExamples) -> bool:
    """Whether the reference's scores are computed before the first step; else every step computes those of its own."""
    config = examples.config
    return config.rewards.stored_reference and seen_again(examples, config.training.steps)


def stored_reference(folder: Any, examples: SearchExamples, variables: dict) -> dict[str, np.ndarray]:
    """reference float32 [n, L]: the log-likelihoods of all examples under the frozen stage; made where missing."""
    score = jax.jit(functools.partial(target_scores, examples.assembly))
    catalogue = examples.assembly.catalogue
    return stored_rows(folder, examples, lambda batch: {REFERENCE: score(catalogue, variables, batch)}, REFERENCE)


# ---- the trained model -----------------------------------------------------------------------------------------------


class RewardedRecommender(GenerativeRecommender):
    """The trained model of a run with rewards; with `reorder`, its answers are in the order of the reward (Eq. 10)."""

    def __init__(self, assembly: OneSearchAssembly, variables: dict, config: OneSearchConfig, reorder: int | None):
        super().__init__(assembly, variables, assembly.features, config.decoding)
        self.run_config, self.reorder = config, reorder
        self._rewards = jax.jit(lambda state, arrays, items: self.reward.scores(state, arrays, items))

    @functools.cached_property
    def reward(self) -> SearchReward:
        """The reward of the run.

        Raises:
          UserError: its reward model is not trained.
        """
        run = Run(self.assembly.folder)
        folder = run.path / stage_path(REWARD_MODEL)
        if not (folder / "fingerprint.json").is_file():
            raise UserError(
                f"{folder} holds no trained reward model to order answers by; run train.py again with --run {run.path}"
            )
        return make_search_reward(run, self.run_config, best_variables(folder))

    @property
    def variants(self) -> dict[str, GenerativeRecommender]:
        """The other forms of the model, by the names of their rows."""
        config, system = self.run_config, self.run_config.system
        before = best_variables(self.assembly.folder / stage_path(PERSONALISATION))
        forms = {
            f"{system} before rewards": GenerativeRecommender(self.assembly, before, self.feature_config, self.config)
        }
        if self.reorder is not None:
            forms[f"{system} without reordering"] = RewardedRecommender(self.assembly, self.variables, config, None)
        else:
            count = max(config.decoding.beam_width, max(config.evaluation.cutoffs))
            forms[f"{system}_rm"] = RewardedRecommender(self.assembly, self.variables, config, count)
        return forms

    def recommend(
        self,
        histories: Sequence[History | ReadHistory],
        k: int,
        exclude_history: bool = False,
        *,
        allowed: Sequence[Allowed] | None = None,
        served: Served | None = None,
        sizes: Sequence[int] | None = None,
        space: TargetSpace | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `GenerativeRecommender.recommend`; with `reorder`, the first so many answers by their reward.

        Scores stay the log-probabilities of the IDs, and then don't fall. An answer without a finite reward keeps its
        place: an item that came after the training, which the reward model does not know.
        """
        count = k if self.reorder is None else max(k, self.reorder)
        options = {"allowed": allowed, "served": served, "sizes": sizes, "space": space}
        answers, scores = super().recommend(histories, count, exclude_history, **options)
        if self.reorder is None:
            return answers, scores
        first = answers[:, : self.reorder]  # of any k, so that one answer does not depend on how many are asked for
        rewards = np.full(answers.shape, np.nan, np.float32)
        rewards[:, : self.reorder] = self.rewards_of(histories, first, sizes or (self.config.batch_size,))
        order = rewarded_order(rewards, answers >= 0)[:, :k]
        return tuple(np.take_along_axis(each, order, axis=1) for each in (answers, scores))

    def rewards_of(
        self, histories: Sequence[History | ReadHistory], answers: np.ndarray, sizes: Sequence[int]
    ) -> np.ndarray:
        """Rscore float32 [n, k] of answers int32 [n, k] to n searches, NaN for none and for items it doesn't know.

        sizes: rising; searches are scored in batches of the smallest of them that holds them all, or of the largest.
        """
        reward, size = self.reward, next((size for size in sizes if size >= len(histories)), sizes[-1])
        known = (answers >= 0) & (answers < reward.ranker.model.sizes.items)
        found = np.full(answers.shape, np.nan, np.float32)
        for start in range(0, len(histories), size):
            rows = np.arange(start, min(start + size, len(histories)))
            read, filled = [reward.read(as_history(histories[row])) for row in rows], np.resize(rows, size)
            arrays = stack([read[at % len(rows)] for at in range(size)])
            items = np.where(known[filled], answers[filled], 0)
            found[rows] = np.asarray(self._rewards(reward.state, arrays, items))[: len(rows)]
        return np.where(known, found, np.nan)


def recommender(assembly: OneSearchAssembly, variables: dict, config: OneSearchConfig) -> GenerativeRecommender:
    """The trained model of a run, ready to answer searches."""
    if config.rewards is None:
        return onesearch_model.recommender(assembly, variables, config)
    return RewardedRecommender(assembly, variables, config, config.reorder)
