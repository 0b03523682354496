"""RankGR's model: a causal backbone over a history, packed targets after it, and a rank head inside the beam.

    history ──▶ read ──▶ RankContext ─┬─ at(last): each target sees the history up to its own place (Eq. 2)
                                      ├─ score:    log-probabilities [B, L, M] and states [B, L, M, D] (Eq. 3-7)
                                      ├─ extend:   one more code for every beam
                                      └─ rank:     the rank head's scores of candidate codes (Eq. 12-15)

The history is one position an item (`context="item"`: a vector of the item's own, the sum of its codes' embeddings and,
if asked for, what the codes were made of) or one position a code (`context="codes"`, as published). Behavior and the
time since the event before are added to either.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxrec.config import UserError, check_heads, check_least
from jaxrec.models.causal import Causal, CausalConfig, CausalContext
from jaxrec.models.pointer import PointerHead, Points
from jaxrec.models.prior import Prior
from jaxrec.models.vocabulary import to_tokens
from jaxrec.nn.attention import KeyValue, TargetAttention
from jaxrec.nn.geometry import unit
from jaxrec.nn.layers import Embedding, FeedForward, Projection, RMSNorm


@dataclass(frozen=True)
class RankConfig:
    """The refined scoring phase."""

    loss: Literal["none", "bce", "softmax"] = "bce"
    """bce: target attention and an MLP score every code of an ID (RankGR Eq. 12-18). softmax: the last level is scored
    by the item itself, as SASRec would among all items; codes above it by their likelihood. none: no rank head"""
    heads: int = 4
    """heads of the target attention"""
    hidden: int = 128
    """width of the MLP"""
    candidates: int = 32
    """codes of highest probability that each target's level learns to tell from the true one (lambda in training)"""
    targets: int = 8
    """targets a context that the head of "bce" learns from in a step, drawn anew every step from those that it looks
    for: the session's, then the history's. Their candidates are labelled from all of them"""
    likelihood: bool = True
    """the head's logit begins as the code's log-probability and learns what to add; off, as published, without it"""
    match: bool = True
    """the head's logit also has the product of the candidate with what it attended to and with the state that predicts
    it; off, as published, the MLP alone tells whether they fit, which small models hardly learn"""
    temperature: float = 0.0
    """of "softmax": what the cosine of history and item is divided by to be a score; 0: their product is"""

    def __post_init__(self):
        check_least(self, "model.rank", heads=1, hidden=1, candidates=1, targets=1, temperature=0)


@dataclass(frozen=True)
class RankGRConfig:
    """Sizes and parts of the model."""

    backbone: CausalConfig = field(default_factory=CausalConfig)
    """the decoder; its vocabulary and levels follow from the semantic IDs"""
    context: Literal["item", "codes"] = "item"
    """a history's positions: one an item, or one a code (RankGR Eq. 6)"""
    behaviors: bool = True
    """histories say what the user did with an item"""
    gaps: bool = True
    """histories say how long after the event before"""
    embeddings: bool = False
    """what IDs were made of is part of the items' vectors too, as few events say little of an item"""
    prior: bool = False
    """the decoder begins with how popular each ID is among those that begin as it does, and learns what to add; off, as
    published, it learns this too"""
    pointer: bool = False
    """a distribution over the history's own items is mixed in, for logs where people come back to what they had; off,
    as published, the decoder has to copy them code by code"""
    rank: RankConfig = field(default_factory=RankConfig)
    """the rank head"""

    def __post_init__(self):
        if self.rank.loss == "bce":
            check_heads(self.backbone.width, self.rank.heads, "model.rank.heads")
        if self.prior and not self.backbone.restrict:
            raise UserError(
                "configuration key 'model.prior': it is of a level's codes alone; set model.backbone.restrict as well"
            )


@struct.dataclass
class RankContext:
    """B read histories.

    own: as the backbone reads on; states [B, S, D]: of all positions, for the rank head; codes int32 [B, S, M]: of the
    history's items; prior: the catalogue's, if the decoder begins with it.
    """

    own: CausalContext
    states: jax.Array
    codes: jax.Array
    prior: Prior | None = None


@struct.dataclass
class RankPrefixes:
    """L prefixes of IDs as the rank head sees them, once for all candidates that may follow.

    own: key and value [B, L, T, N, H] of the states of the prefix, the last of which predicts the candidates; wanted
    [B, L, D], if heads match: what that state looks for.
    """

    own: KeyValue
    wanted: jax.Array | None = None


class RankHead(nn.Module):
    """Target attention of candidate codes over the history's and the ID's states, and an MLP (RankGR Eq. 13-15)."""

    config: RankConfig
    width: int
    dtype: jnp.dtype

    def setup(self):
        self.attention = TargetAttention(self.config.heads, self.width // self.config.heads, self.dtype)
        self.norm, self.states_norm = RMSNorm(), RMSNorm()
        self.feed_forward = FeedForward(self.config.hidden, self.dtype)
        # Small at first: with `likelihood` an untrained head then ranks as the decoder does.
        self.out = Projection(1, ("embed", None), self.dtype, bias=True, gain=0.01)
        if self.config.likelihood:
            self.share = self.param("share", nn.initializers.ones, ())
        if self.config.match:
            self.query_norm, self.found_norm = RMSNorm(), RMSNorm()
            self.by_found = Projection(self.width, ("embed", "mlp"), self.dtype, gain=0.01)
            self.by_state = Projection(self.width, ("embed", "mlp"), self.dtype, gain=0.01)

    def memory(self, states: jax.Array) -> KeyValue:
        """Key and value of states [..., D]: [..., N, H]."""
        normed = self.states_norm(states)
        return self.attention.key(normed), self.attention.value(normed)

    def prefixes(self, states: jax.Array) -> RankPrefixes:
        """L prefixes with states [B, L, T, D]."""
        wanted = self.by_state(self.states_norm(states[:, :, -1])) if self.config.match else None
        return RankPrefixes(self.memory(states), wanted)

    def __call__(self, query, context: KeyValue, mask, prefixes: RankPrefixes, log_probs: jax.Array) -> jax.Array:
        """Logits float32 [B, L, C] of candidates query [B, L, C, D].

        context: of `memory` [B, S, N, H] with mask [B, S] or [B, L, S]; prefixes: L of them; log_probs [B, L, C] of the
        candidates, no gradient flows into them.
        """
        x = self.attention(query, context, mask, prefixes.own, causal=False)
        x = x + self.feed_forward(self.norm(x))
        logits = self.out(x)[..., 0].astype(jnp.float32)
        if self.config.match:
            wanted = self.by_found(self.found_norm(x)) + prefixes.wanted[:, :, None]
            logits += (wanted * self.query_norm(query)).astype(jnp.float32).sum(-1)
        if self.config.likelihood:
            logits += self.share * jnp.maximum(jax.lax.stop_gradient(log_probs), -30.0)
        return logits


class RankGR(nn.Module):
    """The model of a catalogue of `items` whose IDs have the levels of `config.backbone`."""

    config: RankGRConfig
    items: int
    behaviors: int
    gaps: int

    def setup(self):
        cfg = self.config
        width, dtype = cfg.backbone.width, jnp.dtype(cfg.backbone.dtype)
        self.backbone = Causal(cfg.backbone)
        scale = width**-0.5
        self.item = Embedding(self.items, width, dtype, scale) if self.has_items else None
        self.behavior = Embedding(self.behaviors, width, dtype, scale) if cfg.behaviors else None
        self.gap = Embedding(self.gaps, width, dtype, scale) if cfg.gaps else None
        self.rank_head = RankHead(cfg.rank, width, dtype) if cfg.rank.loss == "bce" else None
        self.query = Projection(width, ("embed", "mlp"), dtype) if cfg.rank.loss == "softmax" else None
        self.known = Projection(width, (None, "embed"), dtype, gain=scale) if cfg.embeddings else None
        self.pointer = PointerHead(width) if cfg.pointer else None

    @property
    def has_items(self) -> bool:
        """Whether every item has a vector of its own."""
        return self.config.context == "item" or self.config.rank.loss == "softmax"

    def item_table(self, codes: jax.Array, embeddings: jax.Array | None = None) -> jax.Array:
        """The vector of every item, [I, D], from its codes int32 [I, M] and, if the model reads them, embeddings."""
        table = self.backbone.embed(to_tokens(codes, self.config.backbone.levels)).sum(-2)
        if self.known is not None:
            # Of unit length as they come; so each of their numbers has a variance of about one.
            table += self.known(embeddings * embeddings.shape[-1] ** 0.5)
        return table + self.item.table.astype(table.dtype) if self.has_items else table

    def read(
        self, arrays: dict, codes: jax.Array, table: jax.Array, train: bool = False, prior: Prior | None = None
    ) -> RankContext:
        """Read B histories once: item, behavior, gap int32 [B, S] and mask bool [B, S], left-aligned.

        codes int32 [I, M] and table [I, D] (`item_table`) are those of all items, and so is the prior, of one period.
        """
        item, mask = arrays["item"], arrays["mask"]
        if self.config.context == "item":
            x = table[item][:, :, None]
        else:
            x = self.backbone.embed(to_tokens(codes[item], self.config.backbone.levels))
        if self.behavior is not None:
            x = x + self.behavior(arrays["behavior"])[:, :, None]
        if self.gap is not None:
            x = x + self.gap(arrays["gap"])[:, :, None]
        # A history that holds nothing is read from its first place, where there is no item.
        x = jnp.where(mask[..., None, None], x, 0.0)
        own, states = self.backbone.read(
            x.reshape(x.shape[0], -1, x.shape[-1]), jnp.repeat(mask, self.each, axis=1), train
        )
        return RankContext(own, states, codes[item], prior)

    @property
    def each(self) -> int:
        """Positions of an item of the history."""
        return 1 if self.config.context == "item" else len(self.config.backbone.levels)

    def at(self, context: RankContext, last: jax.Array) -> RankContext:
        """The context as L targets see it, each up to the item at its place: last int32 [B, L]."""
        return context.replace(own=context.own.at(context.states, (last + 1) * self.each - 1))

    def score(self, context: RankContext, targets: jax.Array, train: bool = False, smoothing: float = 0.0):
        """(log-probabilities, the same with smoothed labels, states that predict the codes) of targets int32 [B, L, M].

        float32 [B, L, M] twice, the first sums to pi of RankGR Eq. 5; states [B, L, M, D] are h_1 ... h_M of Eq. 3.
        """
        first, own = context.own.state, self.backbone.states(context.own, targets[..., :-1], train)
        priors = None if context.prior is None else context.prior.along(targets)
        log_probs = self.backbone.log_probs(first, own, targets, 0.0, priors)
        smoothed = self.backbone.log_probs(first, own, targets, smoothing, priors) if smoothing else log_probs
        if self.pointer is not None:
            mixed = self._points(context).along(log_probs, targets, context.codes)
            log_probs, smoothed = mixed, smoothed + mixed - log_probs
        first = first if first.ndim == 3 else first[:, None]
        first = jnp.broadcast_to(first, (*targets.shape[:2], first.shape[-1]))
        return log_probs, smoothed, jnp.concatenate([first[:, :, None], own], axis=2)

    def next_codes(self, context: RankContext, states: jax.Array, tokens: jax.Array | None, before: dict, level: int):
        """Log-probabilities float32 [B, L, K] of a level's codes after L prefixes, and what is known of these.

        states [B, L, D] predict the codes; tokens int32 [B, L] are those of level - 1, and `before` is what was known
        of the prefixes without them: with a prior the node int32 [B, L] in it that they lead to, with a pointer how
        they are copied, and the decoder's own log-probabilities. At level 0 there are no tokens.
        """
        known, prior = {}, None
        if context.prior is not None:
            known["node"] = jnp.zeros(states.shape[:2], jnp.int32)
            if level:
                known["node"], _ = context.prior.step(level - 1, before["node"], tokens)
            prior = context.prior.logits(level, known["node"])
        own = self.backbone.level_log_probs(states, level, prior)
        if self.pointer is None:
            return own, known
        if level:
            known["copied"] = before["copied"].after(tokens, context.codes[..., level - 1], before["own"])
        else:
            known["copied"] = self._points(context).begin()
        return known["copied"].mix(own, context.codes[..., level]), known | {"own": own}

    def _points(self, context: RankContext) -> Points:
        """Where the readers of the histories point: one each, or L of them (`at`)."""
        state, last = context.own.state, slice(self.each - 1, None, self.each)
        seen = context.own.mask[..., last]
        state, seen = (state, seen) if state.ndim == 3 else (state[:, None], seen[:, None])
        return self.pointer(state, context.states[:, last], seen)

    def extend(self, context: RankContext, tokens: jax.Array | None, cache: dict | None, level: int):
        """One more code for every beam: codes int32 [B, W] of level - 1 -> (log-probabilities [B, W, K], cache).

        The cache holds the backbone's, the states [B, W, level + 1, D] that the rank head reads, and what is known of
        the prefixes (`next_codes`).
        """
        before = {} if cache is None else cache
        state, own = self.backbone.extend_state(context.own, tokens, before.get("backbone"), level)
        states = state[:, :, None]
        if level:
            states = jnp.concatenate([before["states"], states], axis=2)
        log_probs, known = self.next_codes(context, state, tokens, before.get("known"), level)
        return log_probs, {"backbone": own, "states": states, "known": known}

    def memory(self, context: RankContext) -> KeyValue:
        """The history as the rank head attends to it; once for all levels."""
        return self.rank_head.memory(context.states)

    def prefixes(self, states: jax.Array) -> RankPrefixes:
        """L prefixes as the rank head sees them: states [B, L, level + 1, D], the last of which predicts the code."""
        return self.rank_head.prefixes(states)

    def rank(self, context: RankContext, memory: KeyValue, prefixes, codes, log_probs, level: int) -> jax.Array:
        """The rank head's logits float32 [B, L, C] of candidate codes int32 [B, L, C] of a level (RankGR Eq. 14-15).

        prefixes: L of them, of `prefixes`.
        """
        x = self.backbone.embed(to_tokens(codes[..., None], self.config.backbone.levels, level)[..., 0])
        # The state of the last place is h_1, the first of the ID's own: it is there once (Eq. 13).
        mask = context.own.mask
        before = mask & (jnp.cumsum(mask, axis=-1) < mask.sum(-1, keepdims=True))
        return self.rank_head(x, memory, before, prefixes, log_probs)

    def item_query(self, states: jax.Array) -> jax.Array:
        """What histories with states [..., D] look for, [..., D]: items' scores are products with `item_vectors`."""
        query, temperature = self.query(states), self.config.rank.temperature
        return unit(query) / temperature if temperature else query

    def item_vectors(self, table: jax.Array) -> jax.Array:
        """Items as `item_query` is compared with them: [I, D], of all vectors of `item_table`."""
        return unit(table) if self.config.rank.temperature else table

    def __call__(self, arrays: dict, codes: jax.Array, targets: jax.Array, embeddings=None) -> jax.Array:
        """Touches every part once; for `init`."""
        context = self.read(arrays, codes, self.item_table(codes, embeddings))
        log_probs, _, states = self.score(context, targets)
        if self.rank_head is not None:
            memory, prefixes = self.memory(context), self.prefixes(states[:, :, :1])
            log_probs += self.rank(context, memory, prefixes, targets[..., :1], log_probs[..., :1], 0)
        if self.query is not None:
            log_probs += self.query(states).sum(-1)
        return log_probs
