"""What ranking models read: items, a history, a query, the time, and how a candidate crosses with them.

    candidates int32 [B, L] ─▶ vectors [B, L, D] ─┐
    history [B, S] ─▶ vectors [B, S, D] ──────────┼─▶ features [B, L, X]
    counts before the question, price, query ─────┘

The inputs are those of the generators: embeddings of texts, semantic IDs, attributes, histories. Everything of a
context is computed once for all of its candidates.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxrec.config import check_least, check_shares
from jaxrec.nn.geometry import unit
from jaxrec.nn.layers import Dropout, Embedding, Projection

SCALE = 0.1
"""standard deviation of fresh vectors' numbers: far from the size of the other features, so that a rare item's vector
says little until it has learned something"""


@dataclass(frozen=True)
class InputConfig:
    """What a ranking model reads of items and histories."""

    width: int = 32
    """width D of items' and events' vectors"""
    ids: bool = True
    """a vector of each item's own"""
    texts: bool = True
    """a projection of the items' embeddings"""
    codes: bool = True
    """vectors of the codes of semantic IDs"""
    crosses: bool = True
    """how often and how lately the candidate, and its category, are in the history, by behavior"""
    counts: bool = True
    """how often the candidate was taken before the question, of all time and of late, by behavior"""
    price: bool = True
    """the candidate's price, and the same against the prices of the history"""
    users: int = 0
    """rows of a table of users, which share rows by their number; 0: users are known by their history alone"""
    dropout: float = 0.1
    """dropout of vectors in training"""

    def __post_init__(self):
        check_least(self, "ranking.inputs", width=1, users=0)
        check_shares(self, "ranking.inputs", "dropout")


@struct.dataclass
class RankedItems:
    """What is known of all I items; a pytree, which is an argument of compiled functions.

    embeddings: float32 [I, E] of unit length. codes: int32 [I, M]. attributes: int32 [I, A], 0 for a missing value; the
    first one is the category. log_price: float32 [I], NaN for an unknown price. counts: float32 [P, I, F], of
    `jaxrec.data.period_counts.item_features`.
    """

    embeddings: jax.Array
    codes: jax.Array
    attributes: jax.Array
    log_price: jax.Array
    counts: jax.Array


@struct.dataclass
class RankingContext:
    """B contexts: arrays of `jaxrec.data.ranking_features`.

    item, behavior, age: int32 [B, S], the newest event first; mask: bool [B, S]; period: int32 [B]; user: int32 [B], -1
    for an unknown one. With queries: query float32 [B, E], asked bool [B], led_item int32 [B, C], led float32
    [B, C, 4].
    """

    item: jax.Array
    behavior: jax.Array
    age: jax.Array
    mask: jax.Array
    period: jax.Array
    user: jax.Array
    query: jax.Array | None = None
    asked: jax.Array | None = None
    led_item: jax.Array | None = None
    led: jax.Array | None = None


@dataclass(frozen=True)
class ItemSizes:
    """Sizes that a model is fitted to."""

    items: int
    codebooks: tuple[int, ...]
    attributes: tuple[int, ...]
    """values of each attribute"""
    behaviors: int
    ages: int
    price: tuple[float, float] = (0.0, 1.0)
    """mean and standard deviation of the known log prices"""


@struct.dataclass
class Inputs:
    """What the three models have in common: candidates [B, L, D], events [B, S, D], mask [B, S], plain [B, L, X].

    same_category: bool [B, L, S]; None without attributes. age int32 [B, S], of the events.
    """

    candidates: jax.Array
    events: jax.Array
    mask: jax.Array
    age: jax.Array
    plain: jax.Array
    same_category: jax.Array | None


class ItemVectors(nn.Module):
    """Vectors float32 [..., D] of items int [...]: the sum of what the configuration names."""

    config: InputConfig
    sizes: ItemSizes

    @nn.compact
    def __call__(self, items: RankedItems, rows: jax.Array) -> jax.Array:
        width, parts = self.config.width, []
        if self.config.ids:
            parts.append(Embedding(self.sizes.items, width, scale=SCALE, name="item")(rows))
        if self.config.texts:
            # Numbers of a vector of unit length, scaled to a variance of about one.
            text = items.embeddings[rows] * items.embeddings.shape[-1] ** 0.5
            parts.append(Projection(width, (None, "embed"), gain=0.5, name="text")(text))
        if self.config.codes:
            codes = items.codes[rows]
            parts += [
                Embedding(size, width, scale=SCALE, name=f"code_{level}")(codes[..., level])
                for level, size in enumerate(self.sizes.codebooks)
            ]
        attributes = items.attributes[rows]
        parts += [
            Embedding(size, width, scale=SCALE, name=f"attribute_{place}")(attributes[..., place])
            for place, size in enumerate(self.sizes.attributes)
        ]
        return sum(parts) if parts else jnp.zeros((*rows.shape, width))


class RankingInputs(nn.Module):
    """`Inputs` of B contexts and their candidates."""

    config: InputConfig
    sizes: ItemSizes

    @nn.compact
    def __call__(
        self, items: RankedItems, context: RankingContext, candidates: jax.Array, train: bool = False
    ) -> Inputs:
        config, sizes = self.config, self.sizes
        vectors, drop = ItemVectors(config, sizes, name="items"), Dropout(config.dropout)
        own = drop(vectors(items, candidates), deterministic=not train)
        events = vectors(items, context.item)
        events += Embedding(sizes.behaviors, config.width, scale=SCALE, name="behavior")(context.behavior)
        events += Embedding(sizes.ages, config.width, scale=SCALE, name="age")(context.age)
        events = jnp.where(context.mask[..., None], drop(events, deterministic=not train), 0.0)
        same = None
        if sizes.attributes:
            category = items.attributes[:, 0]
            same = _same(category[candidates], category[context.item], context.mask)
            same &= (category[candidates] > 0)[..., None]
        parts = [jnp.broadcast_to(each[:, None], (*candidates.shape, each.shape[-1])) for each in self._whole(context)]
        if config.counts:
            parts.append(items.counts[context.period[:, None], candidates])
        if config.crosses:
            matches = [_same(candidates, context.item, context.mask)] + ([] if same is None else [same])
            parts += [crosses(each, context.behavior, context.age, sizes.behaviors, sizes.ages) for each in matches]
        if config.price:
            parts.append(self._price(items, context, candidates))
        if config.users:
            row = jnp.where(context.user >= 0, context.user % config.users + 1, 0)
            user = Embedding(config.users + 1, config.width, scale=SCALE, name="user")(row)
            parts.append(jnp.broadcast_to(user[:, None], (*candidates.shape, config.width)))
        if context.query is not None:
            parts += self._query(items, context, candidates, own)
        plain = jnp.concatenate(parts, axis=-1)
        return Inputs(own, events, context.mask, context.age, plain, same)

    def _whole(self, context: RankingContext) -> list[jax.Array]:
        """What is told of a whole history: logs of the number of events by behavior."""
        of_behavior = jax.nn.one_hot(context.behavior, self.sizes.behaviors) * context.mask[..., None]
        return [jnp.log1p(of_behavior.sum(1))]

    def _price(self, items: RankedItems, context: RankingContext, candidates: jax.Array) -> jax.Array:
        """[B, L, 3]: whether the price is known, the price, the price against the mean of the history's."""
        mean, deviation = self.sizes.price
        scaled = (items.log_price - mean) / deviation
        price, seen = scaled[candidates], scaled[context.item]
        there = context.mask & jnp.isfinite(seen)
        usual = jnp.where(there, seen, 0.0).sum(1) / jnp.maximum(there.sum(1), 1)
        known = jnp.isfinite(price)
        price = jnp.where(known, price, 0.0)
        against = jnp.where(known & there.any(1)[:, None], price - usual[:, None], 0.0)
        return jnp.stack([known.astype(jnp.float32), price, against], axis=-1)

    def _query(self, items: RankedItems, context: RankingContext, candidates: jax.Array, own: jax.Array) -> list:
        """How near the candidate is to the query, by fixed embeddings and by a learned product, and what it led to."""
        cosine = jnp.einsum("BLE,BE->BL", unit(items.embeddings[candidates]), unit(context.query))
        scaled = context.query * context.query.shape[-1] ** 0.5
        query = Projection(self.config.width, (None, "embed"), gain=0.5, name="query")(scaled)
        found = candidates[..., None] == context.led_item[:, None]
        told = jnp.einsum("BLC,BCF->BLF", found.astype(jnp.float32), context.led)
        asked = context.asked[:, None, None].astype(jnp.float32)
        whole = jnp.broadcast_to(query[:, None], own.shape)
        near = jnp.stack([jnp.broadcast_to(context.asked[:, None], candidates.shape), cosine], axis=-1)
        return [near, told, asked * whole, asked * whole * own]


def crosses(match: jax.Array, behavior: jax.Array, age: jax.Array, behaviors: int, ages: int) -> jax.Array:
    """Of each candidate, log counts of the matching events by behavior, and how long ago the latest one was.

    match: bool [B, L, S]; behavior, age: int32 [B, S]. Returns float32 [B, L, behaviors + 1]; the last is 1 for an
    event of this second, 0 without any.
    """
    of_behavior = jax.nn.one_hot(behavior, behaviors)
    counts = jnp.einsum("BLS,BSn->BLn", match.astype(jnp.float32), of_behavior)
    latest = jnp.where(match, age[:, None], ages).min(-1)
    return jnp.concatenate([jnp.log1p(counts), 1 - latest[..., None] / ages], axis=-1)


def _same(candidates: jax.Array, seen: jax.Array, mask: jax.Array) -> jax.Array:
    """bool [B, L, S]: which events have the candidate's value."""
    return (candidates[..., None] == seen[:, None]) & mask[:, None]
