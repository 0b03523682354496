"""SIM: a search in a long history, then exact attention over what was found.

Pi et al. 2020, "Search-based User Interest Modeling with Lifelong Sequential Behavior Data":

    general search unit   the k events of the candidate's category (hard search), the newest first, or of the largest
                          products of the two vectors (soft search, Eq. 1)
    exact search unit     attention of several heads over these k, told when each happened (Eq. 6-7)

Beside them stands DIN's attention over the latest events. The soft search's vectors learn from a tower of their own
(`search`), which predicts the click from the whole history weighted by the products: the choice of the largest has no
gradient. The exact attention's cost depends on k, not on the length of the history.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxrec.config import UserError, check_choice, check_least, check_shares
from jaxrec.models.ranking.din import Interest, Network
from jaxrec.models.ranking.inputs import Inputs
from jaxrec.nn.attention import masked_softmax
from jaxrec.nn.layers import Projection


@dataclass(frozen=True)
class SimConfig:
    """A search in the whole history, attention over what it found, and DIN over the latest events."""

    search: Literal["category", "product"] = "category"
    """what is found: events of the candidate's category, the newest; or those of the largest products with it"""
    found: int = 32
    """events k that are found"""
    heads: int = 2
    """heads N of the attention over them"""
    head_dim: int = 16
    """width H of a head"""
    length: int = 32
    """latest events that DIN's attention reads"""
    unit: int = 16
    """width of its activation unit's hidden layer"""
    hidden: tuple[int, ...] = (128, 64)
    """widths of the network behind both"""
    dropout: float = 0.1
    """dropout of hidden layers in training"""

    def __post_init__(self):
        check_choice(self, "ranking.model", "search", ("category", "product"))
        check_least(self, "ranking.model", found=1, heads=1, head_dim=1, length=1, unit=1, hidden=1)
        check_shares(self, "ranking.model", "dropout")


class ProductSearch(nn.Module):
    """Products of candidates and events, and what they say of a click.

    Returns float32 [B, L, S], and [B, L, D]: the events' sum weighted by them (SIM Eq. 1-2).
    """

    @nn.compact
    def __call__(self, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        width = inputs.candidates.shape[-1]
        query = Projection(width, ("embed", None), name="candidate")(inputs.candidates)
        key = Projection(width, ("embed", None), name="event")(inputs.events)
        products = jnp.einsum("BLD,BSD->BLS", query, key) * width**-0.5
        weights = masked_softmax(products, inputs.mask[:, None])
        return products, jnp.einsum("BLS,BSD->BLD", weights, inputs.events)


def latest_of_category(inputs: Inputs) -> jax.Array:
    """Scores float32 [B, L, S] of the hard search: the newest event of the candidate's category first, others last.

    Raises:
      UserError: items have no attribute.
    """
    if inputs.same_category is None:
        raise UserError(
            "configuration key 'ranking.model.search' is 'category', and the first of 'attributes' is the category: "
            "name it there, or search by product"
        )
    length = inputs.mask.shape[1]
    return jnp.where(inputs.same_category, -jnp.arange(length, dtype=jnp.float32), -jnp.inf)


class FoundAttention(nn.Module):
    """Attention of candidates over the k events of the highest scores: float32 [B, L, N * H] (SIM Eq. 6-7)."""

    found: int
    heads: int
    head_dim: int

    @nn.compact
    def __call__(self, inputs: Inputs, scores: jax.Array) -> jax.Array:
        """scores [B, L, S]: of the search; what has -inf is never found. Events know when they happened already."""
        scores = jnp.where(inputs.mask[:, None], jax.lax.stop_gradient(scores), -jnp.inf)
        best, place = jax.lax.top_k(scores, min(self.found, scores.shape[-1]))
        shape, axes = (self.heads, self.head_dim), ("embed", "heads", "head_dim")
        query = Projection(shape, axes, name="query")(inputs.candidates)
        # Projected before they are picked: a context's events are fewer than all that its candidates pick.
        key, value = (Projection(shape, axes, name=name)(inputs.events) for name in ("key", "value"))
        key, value = (jax.vmap(jnp.take, (0, 0, None))(each, place, 0) for each in (key, value))  # [B, L, k, N, H]
        logits = jnp.einsum("BLNH,BLkNH->BLNk", query, key) * self.head_dim**-0.5
        weights = masked_softmax(logits, (best > -jnp.inf)[:, :, None])
        attended = jnp.einsum("BLNk,BLkNH->BLNH", weights, value)
        return attended.reshape(*attended.shape[:2], -1)


class Sim(nn.Module):
    """States float32 [B, L, F] of candidates, and the logits [B, L] of the soft search (None of the hard one)."""

    config: SimConfig

    @nn.compact
    def __call__(self, inputs: Inputs, train: bool = False) -> tuple[jax.Array, jax.Array | None]:
        config, own, searched = self.config, inputs.candidates, None
        if config.search == "product":
            scores, whole = ProductSearch(name="search")(inputs)
            pair = jnp.concatenate([own, whole, own * whole], axis=-1)
            searched = Projection(1, ("embed", None), bias=True, name="searched")(pair)[..., 0]
        else:
            scores = latest_of_category(inputs)
        long = FoundAttention(config.found, config.heads, config.head_dim, name="found")(inputs, scores)
        short = Interest(config.length, config.unit, name="interest")(inputs)
        parts = [own, short, own * short, long, inputs.plain]
        return Network(config.hidden, config.dropout)(jnp.concatenate(parts, axis=-1), train), searched
