"""The reward model of OneSearch (§3.4.2): a SIM with a tower each for CTR, CVR and CTCVR, and what it scores.

    Rscore = lambda_1 CTR + lambda_2 CVR + lambda_3 CTCVR + 10 lambda_4 S_Rel                              (Eq. 10)

Candidates of a training context are what its search showed. What the user clicked or bought without a search soon
after it, of a category of the search, are candidates as well: labels (1, 0, 0) and (1, 1, 1) of the three towers, a
click that is a negative of the conversion towers, and a purchase. S_Rel is (1 + cosine) / 2 of the embeddings of query
and item, of which the semantic IDs were made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import UserError
from jaxrec.data.behavior_levels import BehaviorLevels, behavior_levels
from jaxrec.data.ranking_features import Labels
from jaxrec.losses.rewards import predicted_reward
from jaxrec.nn.geometry import unit
from jaxrec.run import Run
from jaxrec.systems.onesearch.config import OneSearchConfig
from jaxrec.systems.onesearch.reward_config import RELEVANCE, REWARD_MODEL, RscoreWeights
from jaxrec.systems.ranking.model import Ranker, assemble_ranker
from jaxrec.systems.ranking.training import ranking_stage
from jaxrec.training.stages import Stage


def reward_model_stage(
    run: Run, config: OneSearchConfig, data: Callable[[], Sequence[Any]], needs: tuple[str, ...] = ()
) -> Stage:
    """The training of the reward model; data and needs: as of `Stage`."""
    own = config.rewards

    def further():
        return levels_of(run, config).clicked_elsewhere

    stage = ranking_stage(run, config, own.model, data, REWARD_MODEL, needs, further=further)
    return replace(stage, settings=(*stage.settings, own.levels.category, own.levels.elsewhere_days))


def levels_of(run: Run, config: OneSearchConfig) -> BehaviorLevels:
    """The levels of a run's log.

    Raises:
      UserError: its items have no category, or its behaviors are no levels.
    """
    own = config.rewards
    labels = Labels.of(own.model.labels, tuple(config.data.behaviors))
    return behavior_levels(run.tables, labels, own.levels)


@dataclass(frozen=True, eq=False)
class SearchReward:
    """The reward of items for a search, Eq. 10."""

    ranker: Ranker
    weights: RscoreWeights
    state: Any
    """{"params", "items"}, a pytree of arrays: an argument of compiled functions"""

    def read(self, history: dict) -> dict[str, np.ndarray]:
        """The arrays of one search with its history, in one shape: the longest of the ranking model's."""
        return self.ranker.read(history, self.ranker.features.buckets[-1])

    def scores(self, state: Any, arrays: dict[str, jax.Array], items: jax.Array) -> jax.Array:
        """Rscore float32 [B, L] of items int32 [B, L]; -1 where there is none, which gets a score of no meaning.

        state: as `self.state`; arrays: stacked ones of `read`.
        """
        items = jnp.maximum(items, 0)
        terms = self.ranker.rewards(state["params"], arrays, items, state["items"])
        terms[RELEVANCE] = relevance(arrays["query_vector"], state["items"].embeddings[items])
        return predicted_reward(terms, self.weights.given())


def relevance(queries: jax.Array, items: jax.Array) -> jax.Array:
    """S_Rel of Eq. 10: (1 + cosine) / 2 of queries [B, E] and items [B, L, E], float32 [B, L] in [0, 1].

    1/2 where either has a vector of zeros.

    >>> relevance(jnp.array([[1.0, 0.0]]), jnp.array([[[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]]))
    Array([[1. , 0.5, 0. ]], dtype=float32)
    """
    return (1 + jnp.einsum("BE,BLE->BL", unit(queries), unit(items))) / 2


def make_search_reward(run: Run, config: OneSearchConfig, variables: dict) -> SearchReward:
    """The reward of a run; variables: {"params"} of its stage `reward_model`.

    Raises:
      UserError: relevance has a weight, and the embeddings of its items were not made of texts.
    """
    own = config.rewards
    ranker = assemble_ranker(run, config, own.model)
    if own.weights.relevance and ranker.queries.ids is None:
        raise UserError(
            f"configuration key 'rewards.weights.relevance' is {own.weights.relevance}, but the embeddings of the "
            "items were not made of texts, so that none is near a query; set it to 0"
        )
    return SearchReward(ranker, own.weights, {"params": variables["params"], "items": ranker.items})


def rewarded_order(reward: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The order of answers by their reward: int64 [..., L], indices of answers, the first of the new order first.

    reward float [..., L]; where bool [..., L]: the answers that exist. An answer without a finite reward keeps its
    place; of equal rewards the earlier answer stays ahead (`jaxrec.losses.rewards.places_gained` counts the same).

    >>> rewarded_order(np.array([0.2, np.nan, 0.9]), np.ones(3, bool)).tolist()
    [2, 1, 0]
    """
    known = where & np.isfinite(reward)
    order = np.broadcast_to(np.arange(reward.shape[-1]), reward.shape).copy()
    best = np.argsort(np.where(known, -reward, np.inf), axis=-1, kind="stable")
    # The known ones come first in `best`, and take the known places in turn.
    order[known] = best[np.arange(reward.shape[-1]) < known.sum(-1, keepdims=True)]
    return order
