"""What a policy is worth: the reward it learns from, the true one where it is known, and what it may lose meanwhile.

Of held-out users, each with the list that the policy recommends:

    reward@k, true_reward@k   mean of the first k items by the learned and by the true reward (OneMall Table 4)
    spent@10                  what the held-out basket spends on items of the first ten
    distinct@10               items among all first tens, as a share of the catalogue's
    kl                        divergence from the supervised stage, from rollouts of the policy
    kept_reward@10            reward@10, but no more than at the start where too much of the hit rate is lost

and the ranking metrics, the accuracy of the IDs' codes and the share of valid IDs without the trie.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.console import console
from jaxrec.decoding.rollout import rollout
from jaxrec.evaluation import Cases, ranking_metrics
from jaxrec.evaluation.metrics import hit_matrix, mean
from jaxrec.evaluation.proxies import has_split
from jaxrec.losses.likelihood import log_likelihood
from jaxrec.run import Run
from jaxrec.systems.comparison import cases_of
from jaxrec.systems.onemall.config import OneMallConfig, RewardWeights
from jaxrec.systems.onemall.model import OneMallAssembly
from jaxrec.systems.onemall.rewards import EnvironmentReward, Reward, environment, fuse, is_environment, known_prices
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender
from jaxrec.systems.validation import measured_cases
from jaxrec.training.loop import TrainState

CUTOFFS = (10, 50, 100)
BATCH = 64
SAMPLES = 64
"""Rollouts of each user, of which the divergence is estimated."""


class RewardMeasure:
    """Measures policies of a run: on users of its validation split, the same ones every time, or on given cases.

    decoding: the beam search; None: that of the validation.
    """

    def __init__(
        self,
        run: Run,
        assembly: OneMallAssembly,
        config: OneMallConfig,
        reward: Reward,
        decoding: DecodingConfig | None = None,
    ):
        self.assembly, self.config, self.own = assembly, config, config.reinforcement
        self.reward, self.truth = reward, None
        if is_environment(config.data):
            self.truth = EnvironmentReward(environment(run, config))
        self.prices = None if run is None else known_prices(run)
        self.model = GenerativeRecommender(assembly, {}, config.features, decoding or config.validation_decoding)
        self.trie = self.model.trie
        self._start: dict[str, float] | None = None
        self._named = False
        self._kl = jax.jit(self._divergences)

    @functools.cached_property
    def cases(self) -> Cases:
        """Users of the validation split."""
        return measured_cases(cases_of(self.assembly, self.config.validation.split), self.config.validation)

    def evaluate(self, reference: dict, state: TrainState) -> dict[str, float]:
        """As `jaxrec.training.loop.fit` calls it; reference: the variables of the supervised stage."""
        if not len(self.cases):
            return {}
        if self._start is None:
            self._start = self.measure(reference, reference, self.cases)
        variables = {"params": state.params, **{k: v for k, v in state.extra.items() if k in reference}}
        found = self._start if int(state.step) == 0 else self.measure(variables, reference, self.cases)
        return found | {"kept_reward@10": self.kept(found)}

    def kept(self, found: dict[str, float]) -> float:
        """reward@10 of what keeps its hit rate; of the others what is left of the start's, so that none is better."""
        least = (1 - self.own.lost_hits) * self._start["hr@50"]
        if found["hr@50"] >= least:
            return found["reward@10"]
        lost = 1 - found["hr@50"] / least
        return self._start["reward@10"] - lost * abs(self._start["reward@10"])

    def ends(self, found: dict[str, float]) -> str:
        """Why training stops: the reward has risen and the truth has fallen, if that is to stop it; else ""."""
        return has_split(self._start, found, self.own.lost_truth) if self.own.stop else ""

    def measure(self, variables: dict, reference: dict, cases: Cases) -> dict[str, float]:
        """All values of the policy with these variables."""
        served = self.model.served_with(variables)
        ranked, _ = self.model.recommend(cases.histories, max(CUTOFFS), served=served)
        ranking = ranking_metrics(ranked, cases.targets, cases.where, (5, *CUTOFFS))
        values = {name: mean(pair) for name, pair in ranking.items()}
        values |= {name: mean(pair) for name, pair in self.model.diagnose(cases, served).items()}
        values |= self.worth(ranked, cases)
        return values | {"kl": self.divergence(served, reference, cases)}

    def worth(self, ranked: np.ndarray, cases: Cases) -> dict[str, float]:
        """The values of rankings int32 [U, k] alone, whoever made them."""
        values = {"distinct@10": len(np.unique(ranked[:, :10][ranked[:, :10] >= 0])) / len(self.assembly.space.codes)}
        learned = self.rewards(self.reward, self.own.weights, ranked, cases)
        values |= {f"reward@{k}": _mean_of(learned[:, :k]) for k in (10, 100)}
        if self.truth is not None:
            true = self.rewards(self.truth, self.own.truth, ranked, cases)
            values |= {f"true_reward@{k}": _mean_of(true[:, :k]) for k in (10, 100)}
        if self.prices is not None:
            hits = hit_matrix(ranked[:, :10], cases.targets, cases.where)
            paid = np.nan_to_num(self.prices)[np.maximum(ranked[:, :10], 0)]
            values["spent@10"] = float((hits * paid).sum(1).mean())
        return values

    def rewards(self, reward: Reward, weights: RewardWeights, ranked: np.ndarray, cases: Cases) -> np.ndarray:
        """float32 [U, k], NaN where there is no item or the reward isn't finite; what isn't is named once."""
        out = np.full(ranked.shape, np.nan, np.float32)
        for start in range(0, len(cases), BATCH):
            rows = np.arange(start, min(start + BATCH, len(cases)))
            arrays = [self._read(reward, cases, row) for row in np.resize(rows, BATCH)]
            stacked = {name: np.stack([each[name] for each in arrays]) for name in arrays[0]}
            items = np.maximum(np.resize(ranked[rows], (BATCH, ranked.shape[1])), 0)
            found, terms = _reward_of(reward.terms, weights)(reward.state, stacked, items)
            out[rows] = np.where(ranked[rows] >= 0, np.asarray(found)[: len(rows)], np.nan)
            self._name(reward, {n: np.asarray(v)[: len(rows)] for n, v in terms.items()}, ranked[rows])
        return np.where(np.isfinite(out), out, np.nan)

    def divergence(self, served: Any, reference: dict, cases: Cases) -> float:
        """KL(policy | supervised stage) in nats, the mean over users."""
        other, total, count = self.assembly.serve(reference), 0.0, 0
        for rows, arrays in self.model.batches(cases.histories):
            found = np.asarray(self._kl(served, other, arrays, jax.random.key(self.config.validation.seed)))
            total, count = total + float(found[: len(rows)].sum()), count + len(rows)
        return total / max(count, 1)

    def _divergences(self, served: Any, reference: Any, arrays: dict, key: jax.Array) -> jax.Array:
        """float32 [B]: sum of weight * log(policy / reference) over draws without replacement (Kool et al. Eq. 8)."""
        context, other = (self.assembly.context(each, arrays) for each in (served, reference))
        batch = len(next(iter(arrays.values())))
        extend = functools.partial(self.assembly.extend, served, context)
        drawn = rollout(extend, None, served.trie, key, batch=batch, samples=SAMPLES)
        codes = jnp.maximum(drawn.codes, 0)
        scored = self.assembly.model.apply(reference.variables, other, codes, drawn.valid, method="score")
        ratio = jnp.where(drawn.valid, drawn.log_probs - log_likelihood(scored.log_probs, drawn.valid), 0.0)
        weight = jnp.where(drawn.valid, jnp.exp(drawn.sampling_log_probs - drawn.inclusion_log_probs()), 0.0)
        return (weight * ratio).sum(-1)

    def _read(self, reward: Reward, cases: Cases, row: int) -> dict[str, np.ndarray]:
        history = cases.histories[row]
        end = int(history["session"][-1]) + 1 if len(history["session"]) else 0
        return reward.read(history, end, cases.targets[row][cases.where[row]])

    def _name(self, reward: Reward, terms: dict[str, np.ndarray], ranked: np.ndarray) -> None:
        """Says once which term of which item isn't finite."""
        for name, values in terms.items():
            bad = ~np.isfinite(values) & (ranked >= 0)
            if self._named or reward is not self.reward or not bad.any():
                continue
            self._named, item = True, int(ranked[bad][0])
            console.print(
                f"reinforcement: {name} of item {item} is not a finite number, nor are {bad.sum() - 1} more of "
                f"{bad.size} in a batch; such candidates are left out, skipped_rewards in metrics.jsonl counts them",
                markup=False,
            )


@functools.lru_cache(maxsize=8)
def _reward_of(terms_of: Callable, weights: RewardWeights) -> Callable:
    """(state, arrays, items) -> (rewards [B, L], their terms), jitted."""

    @jax.jit
    def found(state: Any, arrays: dict, items: jax.Array) -> tuple[jax.Array, dict]:
        terms = terms_of(state, arrays, items)
        return fuse(terms, weights), terms

    return found


def _mean_of(values: np.ndarray) -> float:
    """The mean over users of the mean of a row, NaN left out; 0 for a row without a value."""
    there = np.isfinite(values)
    return float((np.where(there, values, 0).sum(1) / np.maximum(there.sum(1), 1)).mean())
