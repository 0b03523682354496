"""Measuring a generative model while it is trained: the same beam search and metrics as at the end, on fewer users."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrec.data.examples import Records
from jaxrec.evaluation import make_cases
from jaxrec.evaluation.comparison import evaluate_full
from jaxrec.systems.comparison import EvaluationConfig, draw
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender
from jaxrec.training.loop import TrainState


def make_validation(
    assembly: Any, features: Any, decoding: DecodingConfig, config: EvaluationConfig
) -> Callable[[TrainState], dict[str, float]]:
    """evaluate(state) -> {"recall@10": ..., "ndcg@10": ..., ...} of the full ranking, for `jaxrec.training.loop.fit`.

    The same users every time: `config.max_users` of the split `config.split`, drawn by the seed. Nothing is read before
    the first call.
    """
    made: dict[str, Any] = {}

    def measure(state: TrainState) -> dict[str, float]:
        if not made:
            records = Records(assembly.examples, config.split)
            made["cases"] = draw(make_cases(records, assembly.target_behaviors, config.split), config)
            made["model"] = GenerativeRecommender(assembly, {}, features, decoding)
        served = made["model"].serve({"params": state.params, **state.extra})
        return evaluate_full(lambda *asked: made["model"].recommend(*asked, served=served), made["cases"])

    return measure
