"""Measuring a model while it is trained: the same ranking and metrics as at the end, on fewer users."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from jaxrec.config import UserError
from jaxrec.console import console
from jaxrec.data.examples import Records
from jaxrec.evaluation import Cases, make_cases, ranking_metrics
from jaxrec.evaluation.metrics import METRICS, mean
from jaxrec.systems.comparison import EvaluationConfig, cases_of, draw
from jaxrec.systems.recommender import Assembly, DecodingConfig, GenerativeRecommender, Reader
from jaxrec.text.finetune import FinetuneConfig
from jaxrec.training.loop import TrainState

CUTOFFS = (5, 10)
MONITORED = tuple(f"{name}@{cutoff}" for name in METRICS for cutoff in CUTOFFS)
"""What is measured of rankings while training."""


def make_validation(
    assembly: Assembly, features: Reader, decoding: DecodingConfig, config: EvaluationConfig
) -> Callable[[TrainState], dict[str, float]]:
    """evaluate(state) -> {"recall@10": ..., "ndcg@10": ..., ...}, for `jaxrec.training.loop.fit`.

    All items are ranked, those of the history too unless `config.exclude_history`. The same users every time:
    `config.max_users` of the split `config.split`, drawn by the seed. Their histories end before that split, which
    is not trained on. Without a user who has a session in it, {}. The users are read at the first call.

    decoding: the beam search, `validation_decoding` of the configuration.

    Raises:
      UserError: `decoding` does not fit the targets, or no trie can be built of them.
    """
    decoding.check(assembly.space, "validation_decoding")
    model = GenerativeRecommender(assembly, {}, features, decoding)
    _ = model.trie  # before the first step, if it can't be built
    drawn = cache(lambda: measured_cases(cases_of(assembly, config.split), config))

    def measure(state: TrainState) -> dict[str, float]:
        cases = drawn()
        if not len(cases):
            return {}
        served = model.served_with({"params": state.params, **state.extra})
        ranked, _ = model.recommend(cases.histories, max(CUTOFFS), config.exclude_history, served=served)
        return validation_metrics(ranked, cases, config)

    return measure


def validation_cases(records: Records, target_behaviors: Sequence[int], config: EvaluationConfig) -> Cases:
    """The cases of items that are measured; where there are none, a line says so."""
    return measured_cases(make_cases(records, target_behaviors, config.split), config)


def measured_cases(cases: Cases, config: EvaluationConfig) -> Cases:
    """The cases that `config` draws; where there are none, a line says so."""
    cases = draw(cases, config)
    if not len(cases):
        console.print("no user has a session to validate on: training goes on to its last step", markup=False)
    return cases


def check_training(config: Any, alignment: bool = True, metrics: Sequence[str] = MONITORED) -> None:
    """What only the whole configuration of a system shows of its trainings, before any work is done.

    config: with the fields optim, training, align, validation and evaluation; `alignment`: whether `align` is used;
    metrics: what is measured while training.

    Raises:
      UserError: parts of it contradict one another.
    """
    config.optim.check_steps(config.training.steps)
    config.training.check_monitor(metrics)
    if alignment and isinstance(config.align, FinetuneConfig):
        config.align.optim.check_steps(config.align.training.steps, "align.optim")
    if config.evaluation.exclude_history:
        raise UserError(
            "configuration key 'evaluation.exclude_history': the final evaluation always measures both ways; set it in "
            "validation, to have the best state chosen by it"
        )


def validation_metrics(ranked: np.ndarray, cases: Cases, config: EvaluationConfig) -> dict[str, float]:
    """The metrics of rankings int32 [U, k] of all cases, which left the history out if `config.exclude_history`."""
    where = cases.new if config.exclude_history else cases.where
    return {name: mean(pair) for name, pair in ranking_metrics(ranked, cases.targets, where, CUTOFFS).items()}
