"""Where the rewards of candidates come from: a ranking model, the true rates of a source, what shoppers did buy next.

A reward reads of each context what it needs (`read`, NumPy) and predicts the terms of OneMall Eq. 8 for its candidates
(`terms`, jitted): ctr, cvr, ctcvr and price float32 [B, L]. `fuse` makes one number of them.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq

from jaxrec.config import UserError
from jaxrec.data.examples import Record, Records
from jaxrec.data.features import asked_at
from jaxrec.data.padding import padded
from jaxrec.data.popularity import DAY
from jaxrec.losses.rewards import predicted_reward
from jaxrec.run import Run, stage_path
from jaxrec.systems.onemall.config import OneMallConfig, RewardWeights
from jaxrec.systems.ranking.config import RANKING
from jaxrec.systems.ranking.model import Ranker, assemble_ranker
from jaxrec.training.stages import best_variables

Terms = dict[str, jax.Array]


class Reward(Protocol):
    """A reward model, whatever it is made of."""

    state: Any
    """a pytree of arrays: an argument of the compiled step"""

    def read(self, record: Record, session: int, answer: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of the context before `session`; answer int [n]: the items that were taken after it."""
        ...

    def terms(self, state: Any, arrays: dict[str, jax.Array], items: jax.Array) -> Terms:
        """{"ctr", "cvr", "ctcvr", "price"} float32 [B, L] of items int32 [B, L], some of them or all."""
        ...


@dataclass(frozen=True, eq=False)
class ModelReward:
    """The predictions of a ranking model."""

    ranker: Ranker
    state: Any
    """{"params", "items"} of the ranking model"""

    def read(self, record: Record, session: int, answer: np.ndarray) -> dict[str, np.ndarray]:
        """What the ranking model reads, padded to its longest history: a batch has one shape."""
        later = (record["session"] >= session).any()
        history = self.ranker.before_session(record, session) if later else record
        return self.ranker.read(history, self.ranker.features.buckets[-1])

    def terms(self, state: Any, arrays: dict[str, jax.Array], items: jax.Array) -> Terms:
        """As `Reward`."""
        return self.ranker.rewards(state["params"], arrays, items, state["items"])


@dataclass(frozen=True, eq=False)
class EnvironmentReward:
    """The true rates of a source that is an environment."""

    state: Any
    """with rates(user int32 [B], day int32 [B], items int32 [B, L])"""

    def read(self, record: Record, session: int, answer: np.ndarray) -> dict[str, np.ndarray]:
        """Who is asked, and on which day."""
        day = asked_at(record, int(np.searchsorted(record["session"], session))) // DAY
        return {"reward_user": np.int32(record["user"]), "reward_day": np.int32(day)}

    def terms(self, state: Any, arrays: dict[str, jax.Array], items: jax.Array) -> Terms:
        """As `Reward`."""
        return state.rates(arrays["reward_user"], arrays["reward_day"], items)


@dataclass(frozen=True, eq=False)
class SpendReward:
    """What was spent: the price of each candidate that was bought next. It predicts nothing."""

    state: jax.Array
    """float32 [I], prices"""
    most: int = field(default=1)
    """items that a context may have been followed by"""

    def read(self, record: Record, session: int, answer: np.ndarray) -> dict[str, np.ndarray]:
        """What was bought, padded with -1."""
        return {"reward_bought": padded(answer[: self.most], self.most, -1)}

    def terms(self, state: jax.Array, arrays: dict[str, jax.Array], items: jax.Array) -> Terms:
        """As `Reward`; ctr and ctcvr are 1 for what was bought, and the price is 0 for all else."""
        bought = (items[..., None] == arrays["reward_bought"][:, None]).any(-1)
        rate = bought.astype(jnp.float32)
        return {"ctr": rate, "cvr": rate, "ctcvr": rate, "price": jnp.where(bought, state[items], 0.0)}


def make_reward(run: Run, config: OneMallConfig, ranking: dict | None = None) -> Reward:
    """The reward that a run's policy learns from.

    ranking: the variables of the stage `ranking`; None: as they are in the run directory, if they are needed.

    Raises:
      UserError: the ranking model is of another catalogue, or the items have no prices.
    """
    kind = config.reinforcement.reward
    if kind == "environment":
        return EnvironmentReward(environment(run, config))
    if kind == "model":
        ranker = assemble_ranker(run, config, config.reward_model)
        variables = best_variables(run.path / stage_path(RANKING)) if ranking is None else ranking
        return ModelReward(ranker, {"params": variables["params"], "items": ranker.items})
    return SpendReward(jnp.asarray(prices(run), jnp.float32), _longest(run))


def is_environment(source: Any) -> bool:
    """Whether a source knows the true rates of its items."""
    return hasattr(source, "environment")


def environment(run: Run, config: OneMallConfig) -> Any:
    """The true rates of a run's items for its users.

    Raises:
      UserError: the tables are of another source.
    """
    users, items = (
        pq.read_table(run.tables / f"{name}s.parquet", columns=[f"{name}_id"])[f"{name}_id"].to_pylist()
        for name in ("user", "item")
    )
    return config.data.environment(users, items)


def known_prices(run: Run) -> np.ndarray | None:
    """float64 [I], NaN for items without a price; None where the table of items has no prices."""
    path = run.tables / "items.parquet"
    if "price" not in pq.read_schema(path).names:
        return None
    return pq.read_table(path, columns=["price"])["price"].cast("float64").to_numpy(zero_copy_only=False)


def prices(run: Run) -> np.ndarray:
    """As `known_prices`.

    Raises:
      UserError: the table of items has no prices.
    """
    found = known_prices(run)
    if found is None:
        raise UserError(
            f"configuration key 'reinforcement.reward' is 'spend', but {run.tables / 'items.parquet'} has no column "
            "'price'; give the items prices, or another reward"
        )
    return found


def fuse(terms: Terms, weights: RewardWeights) -> jax.Array:
    """r of OneMall Eq. 8, float32 [B, L]; EGPM is CTCVR times the price.

    Raises:
      UserError: a term has a weight and isn't predicted.
    """
    if "ctcvr" in terms and "price" in terms:
        terms = {**terms, "egpm": terms["ctcvr"] * terms["price"]}
    return predicted_reward(terms, weights.given())


def _longest(run: Run) -> int:
    """Events of the longest session that is trained or measured on."""
    return int(max(Records(run.examples, split).sessions["count"].max(initial=1) for split in ("train", "test")))
