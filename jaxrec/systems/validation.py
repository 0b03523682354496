"""Measuring a generative model while it is trained: the same beam search and metrics as at the end, on fewer users."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxrec.data.examples import Records
from jaxrec.decoding.trie import build_trie
from jaxrec.evaluation import Cases, make_cases, ranking_metrics
from jaxrec.evaluation.metrics import mean
from jaxrec.run import console
from jaxrec.systems.comparison import EvaluationConfig, draw
from jaxrec.systems.recommender import Assembly, DecodingConfig, GenerativeRecommender, Reader
from jaxrec.training.loop import TrainState

CUTOFFS = (5, 10)


def make_validation(
    assembly: Assembly, features: Reader, decoding: DecodingConfig, config: EvaluationConfig
) -> Callable[[TrainState], dict[str, float]]:
    """evaluate(state) -> {"recall@10": ..., "ndcg@10": ..., ...}, for `jaxrec.training.loop.fit`.

    All items are ranked, those of the history too unless `config.exclude_history`. The same users every time:
    `config.max_users` of the split `config.split`, drawn by the seed. Their histories end before that split, of which
    training sees nothing. Where nobody has a session in it, {}. Nothing is read before the first call.
    """
    made: dict[str, Any] = {}

    def measure(state: TrainState) -> dict[str, float]:
        if not made:
            records, space = Records(assembly.examples, config.split), assembly.space
            made["cases"] = draw(make_cases(records, assembly.target_behaviors, config.split), config)
            if not len(made["cases"]):
                console.print("no user has a session to validate on: training goes on to its last step", markup=False)
            made["trie"] = build_trie(space.codes, space.codebook_sizes, order=space.popularity)
            made["model"] = GenerativeRecommender(assembly, {}, features, decoding)
        if not len(made["cases"]):
            return {}
        served = {**assembly.serve({"params": state.params, **state.extra}), "trie": made["trie"]}
        cases = made["cases"]
        ranked, _ = made["model"].recommend(cases.histories, max(CUTOFFS), config.exclude_history, served=served)
        return validation_metrics(ranked, cases, config)

    return measure


def validation_metrics(ranked: np.ndarray, cases: Cases, config: EvaluationConfig) -> dict[str, float]:
    """The metrics of rankings int32 [U, k] of all cases, which left the history out if `config.exclude_history`."""
    where = cases.new if config.exclude_history else cases.where
    return {name: mean(pair) for name, pair in ranking_metrics(ranked, cases.targets, where, CUTOFFS).items()}
