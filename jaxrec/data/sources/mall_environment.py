"""The synthetic mall as an environment: the true rates and the price of every item, for every shopper and session.

A rate is that of the sessions which the log is drawn from, given the shopper's planted tastes and the taste that was
announced. A session shows its basket, its browsed items, what a recommender guesses and what searches find:

    ctcvr = P(bought) / P(shown)        ctr = P(bought or browsed) / P(shown)        cvr = ctcvr / ctr

So an item of another taste has ctr 0, and one that the shopper would find without being shown it has a ctr near 1.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrec.config import UserError
from jaxrec.data.popularity import DAY
from jaxrec.data.sources.mall_searches import RATES


@struct.dataclass
class MallEnvironment:
    """A mall with U shoppers, T sessions, I items and Z tastes; a pytree, so that a jitted function can take it."""

    taste_of_item: jax.Array
    """int32 [I]"""
    bought: jax.Array
    """float32 [I], P(the item is in a basket of its taste)"""
    browsed: jax.Array
    """float32 [I], P(the item is among the browsed items of its taste)"""
    found: jax.Array
    """float32 [I], P(the item is a result of a search for its taste)"""
    share_of_taste: jax.Array
    """float32 [I], P(the item is shown, in a place for its taste)"""
    price: jax.Array
    """float32 [I]"""
    weights: jax.Array
    """float32 [U, Z], the probability of each taste in an announcement and in a surprise"""
    announced: jax.Array
    """int32 [U, T], the taste announced for each session"""
    known_places: jax.Array
    """float32 [n + 1], P(so many of the n shown items are of the shopper's tastes); the others are of any"""
    searched: jax.Array
    """float32 [3], the probability of a search for the basket, for the browsed items and for a random taste"""
    surprise: jax.Array
    """float32 [], P(a session does not follow its announcement)"""
    of_any: float = struct.field(pytree_node=False)
    """P(the item is shown, in a place for any taste)"""
    first_day: int = struct.field(pytree_node=False)
    """The day of the first session, counted from 1970; every session is on a day of its own."""

    def rates(self, user: jax.Array, day: jax.Array, items: jax.Array) -> dict[str, jax.Array]:
        """{"ctr", "cvr", "ctcvr", "price"} float32 [B, L] of items int32 [B, L], as a ranking model predicts them.

        user int32 [B]; day int32 [B], of the session, counted from 1970. A rate whose denominator is 0 is 0.
        """
        bought, clicked, shown = self._chances(user, day, items)
        ctr, ctcvr = _ratio(clicked, shown), _ratio(bought, shown)
        return {"ctr": ctr, "cvr": _ratio(bought, clicked), "ctcvr": ctcvr, "price": self.price[items]}

    def revenue(self, user: jax.Array, day: jax.Array, items: jax.Array) -> jax.Array:
        """The expected revenue of the next basket from each item, float32 [B, L]: price * P(bought); as `rates`."""
        return self.price[items] * self._chances(user, day, items)[0]

    def _chances(self, user: jax.Array, day: jax.Array, items: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """P(bought), P(clicked) and P(shown) in the session, float32 [B, L] each."""
        session = jnp.clip(day - self.first_day, 0, self.announced.shape[1] - 1)
        taste = self.taste_of_item[items]
        weight = jnp.take_along_axis(self.weights[user], taste, axis=1)
        follows = taste == self.announced[user, session][:, None]
        belief = self.surprise * weight + (1 - self.surprise) * follows
        bought, browsed, found = self.bought[items], self.browsed[items], self.found[items]
        clicked = _either(belief * bought, weight * browsed)
        # What a search for the basket finds depends on the basket's taste, as the basket does.
        of_basket = belief * _either(bought, self.searched[0] * found)
        of_browsed = weight * _either(browsed, self.searched[1] * found)
        by_chance = self.searched[2] * found / self.weights.shape[1]
        of_browsing = _either(_either(of_basket, of_browsed), by_chance)
        return belief * bought, clicked, _either(of_browsing, self._guessed(items, weight))

    def _guessed(self, items: jax.Array, weight: jax.Array) -> jax.Array:
        """P(the item is among those that the recommender shows), float32 [B, L]."""
        of_tastes, known = weight * self.share_of_taste[items], jnp.arange(len(self.known_places))
        missed = (1 - of_tastes[..., None]) ** known * (1 - self.of_any) ** known[::-1]
        return 1 - missed @ self.known_places


def make_environment(
    config: Any,
    mall: Any,
    basket_sizes: Sequence[int],
    price: np.ndarray,
    start: int,
    users: np.ndarray,
    items: np.ndarray,
) -> MallEnvironment:
    """The environment of some of a mall's shoppers and items, in the order of a run.

    config: a `SyntheticMall`; mall: its planted truth (`Mall`); price: of all items; start: the midnight before the
    first session, Unix seconds; users, items: int, their numbers.
    """
    taste, tastes, places = mall.taste_of_item, config.tastes, config.exposures_per_session
    weights = np.zeros((config.users, tastes))
    np.put_along_axis(weights, mall.user_tastes, mall.user_weights, axis=1)
    count, n = np.bincount(taste, minlength=tastes)[taste], config.browsed_per_session
    bought, browsed = np.zeros(config.items), np.zeros(config.items)
    for each in range(tastes):
        inside = np.flatnonzero(taste == each)
        bought[inside] = np.mean([inclusion(mall.share[inside], size) for size in basket_sizes], axis=0)
        browsed[inside] = inclusion(mall.share[inside], n) if n else 0.0
    # Chosen items come in twice as many places as are seen, those of the shopper's tastes first.
    known = np.bincount(
        np.minimum(np.arange(2 * places + 1), places), _binomial(2 * places, config.recommended), places + 1
    )
    of_items = {
        "bought": bought,
        "browsed": browsed,
        "found": np.minimum(config.results_per_search / count, 1.0),
        "share_of_taste": 1 / count,
        "price": price,
    }
    searched = config.searched * np.array(RATES)
    return MallEnvironment(
        taste_of_item=jnp.asarray(taste[items], jnp.int32),
        **{name: jnp.asarray(values[items], jnp.float32) for name, values in of_items.items()},
        weights=jnp.asarray(weights[users], jnp.float32),
        announced=jnp.asarray(mall.announced[users], jnp.int32),
        known_places=jnp.asarray(known, jnp.float32),
        searched=jnp.asarray(searched if n else searched * (1, 0, 1), jnp.float32),
        surprise=jnp.float32(config.surprise),
        of_any=1 / config.items,
        first_day=start // DAY,
    )


def inclusion(share: np.ndarray, size: int) -> np.ndarray:
    """The probability of each item to be among `size` draws by share without replacement, float64 [I].

    By the first draw: it is the item, or it is another one and the item is among the rest.
    """
    if size == 1:
        return share
    total = share.copy()
    for first in np.flatnonzero(share):
        rest = np.where(np.arange(len(share)) == first, 0.0, share)
        total += share[first] * inclusion(rest / rest.sum(), size - 1)
    return total


def _binomial(n: int, p: float) -> np.ndarray:
    """P(k of n) for k from 0 to n, float64 [n + 1]."""
    return np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])


def places_of(kind: str, given: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """The places int64 of some identifiers among all of the mall's.

    Raises:
      UserError: the mall has no such user or item.
    """
    place = {name: number for number, name in enumerate(known)}
    missing = [name for name in given if name not in place]
    if missing:
        raise UserError(
            f"the mall has no {kind} {missing[0]!r}: the tables are of another mall; run train.py on this run again"
        )
    return np.array([place[name] for name in given], np.int64)


def _either(a: jax.Array, b: jax.Array) -> jax.Array:
    """The probability of one or both of two independent events."""
    return a + b - a * b


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), 0.0)
