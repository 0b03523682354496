"""The ranking model: inputs, DIN or DCN-v2 or SIM, and a tower for everything that is predicted.

    ctr      P(click | shown)
    cvr      P(purchase | click)
    ctcvr    P(purchase | shown): a tower of its own, or without one the product of the two (ESMM)
    price    log of the price of a purchase

One call scores all candidates of a context: the history, the query and their vectors are computed once.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxrec.models.ranking.dcn import Dcn, DcnConfig
from jaxrec.models.ranking.din import Din, DinConfig
from jaxrec.models.ranking.inputs import InputConfig, ItemSizes, RankedItems, RankingContext, RankingInputs
from jaxrec.models.ranking.sim import Sim, SimConfig
from jaxrec.nn.layers import Projection

RankerConfig = DinConfig | DcnConfig | SimConfig
TOWERS = ("ctr", "cvr", "ctcvr", "price")
SEARCH = "search"
"""The logit with which SIM's soft search learns; it predicts what the first tower does."""
TOWER_WIDTH = 32


class RankingModel(nn.Module):
    """Logits of each candidate for every tower."""

    config: RankerConfig
    inputs: InputConfig
    sizes: ItemSizes
    towers: tuple[str, ...] = TOWERS

    @nn.compact
    def __call__(
        self, items: RankedItems, context: RankingContext, candidates: jax.Array, train: bool = False
    ) -> dict[str, jax.Array]:
        """{tower: float32 [B, L]} of candidates int32 [B, L]; with SIM's soft search also `SEARCH`."""
        inputs = RankingInputs(self.inputs, self.sizes, name="inputs")(items, context, candidates, train)
        body = {DinConfig: Din, DcnConfig: Dcn, SimConfig: Sim}[type(self.config)](self.config, name="body")
        states, searched = body(inputs, train)
        logits = {}
        for name in self.towers:
            tower = Projection(TOWER_WIDTH, ("mlp", None), bias=True, gain=2**0.5, name=f"{name}_tower")
            logits[name] = Projection(1, (None, None), bias=True, name=f"{name}_logit")(nn.gelu(tower(states)))[..., 0]
        return logits if searched is None else logits | {SEARCH: searched}


def probabilities(logits: Mapping[str, jax.Array], price: tuple[float, float] = (0.0, 1.0)) -> dict[str, jax.Array]:
    """What the logits [..., L] say: ctr, cvr, ctcvr in [0, 1] and price in the currency of the items, float32 [..., L].

    ctcvr is ctr * cvr where it has no tower of its own. price: mean and standard deviation by which log prices were
    scaled. What neither a tower nor a product gives is left out.

    >>> found = probabilities({"ctr": jnp.zeros(1), "cvr": jnp.zeros(1), "price": jnp.zeros(1)}, (jnp.log(9.0), 1.0))
    >>> {name: float(value[0].round(2)) for name, value in found.items()}
    {'ctr': 0.5, 'cvr': 0.5, 'ctcvr': 0.25, 'price': 9.0}
    """
    found = {name: jax.nn.sigmoid(logits[name]) for name in ("ctr", "cvr", "ctcvr") if name in logits}
    if "ctcvr" not in found and {"ctr", "cvr"} <= set(found):
        found["ctcvr"] = found["ctr"] * found["cvr"]
    if "price" in logits:
        mean, deviation = price
        found["price"] = jnp.exp(mean + deviation * logits["price"])
    return found
