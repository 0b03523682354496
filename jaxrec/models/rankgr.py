"""RankGR's model: a causal backbone over a history, packed targets after it, and a rank head inside the beam.

    history ──▶ prefill ──▶ RankContext ─┬─ at(last): a view in which each target sees the history up to an item (Eq. 2)
                                         ├─ score:    log-probabilities [B, L, M] and states [B, L, M, D] (Eq. 3-7)
                                         ├─ extend:   one more code for every beam
                                         └─ rank:     the rank head's scores of candidate codes (Eq. 12-15)

A history has one position an item (`context="item"`: the sum of the item's own vector, its codes' embeddings and, with
`embeddings`, a projection of the embedding that the codes were made of) or one position a code (`context="codes"`, as
published). Embeddings of the behavior and of the time since the event before are added to either.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxrec.config import UserError, check_heads, check_least
from jaxrec.models.causal import Causal, CausalConfig, CausalContext
from jaxrec.models.contract import Scored, pick
from jaxrec.models.copying import PointerHead, Points
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
    """targets of a context that the head of "bce" learns from in a step. They are drawn anew in every step from the
    positives: first from the session's, then from the history's. Candidates are labelled by all positives, drawn or
    not"""
    likelihood: bool = True
    """the code's log-probability, times a factor that is learned and initially 1, is added to the head's logit; off, as
    published, it is not"""
    match: bool = True
    """the products of the candidate with the attention's output and with the state that predicts it are added to the
    head's logit; off, as published, the MLP alone compares them, which small models hardly learn"""
    temperature: float = 0.0
    """of "softmax": scores are the cosine of history and item over this temperature; 0: their dot product"""

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
    """positions of a history have an embedding of the behavior"""
    gaps: bool = True
    """positions of a history have an embedding of the time since the event before"""
    embeddings: bool = False
    """a projection of the embeddings that IDs were made of is added to the items' vectors, as those of items with few
    events are poorly trained"""
    prior: bool = False
    """the log-probability of a code under popularity, given the codes before it, is added to the decoder's logits; off,
    as published, the decoder learns popularity too"""
    pointer: bool = False
    """a distribution over the history's own items is mixed in, for logs where people come back to earlier items; off,
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
class RankInputs:
    """What `RankGR.prefill` reads: histories, left-aligned, and the features of all items.

    item, behavior, gap int32 [B, S]; mask bool [B, S]; codes int32 [I, M]; embeddings float32 [I, E], if the model
    reads them; table [I, D]: the `item_table` of codes and embeddings, for callers that make it once for many requests;
    prior: a distribution over IDs, of one period, which is added to the decoder's logits.
    """

    item: jax.Array
    behavior: jax.Array
    gap: jax.Array
    mask: jax.Array
    codes: jax.Array
    embeddings: jax.Array | None = None
    table: jax.Array | None = None
    prior: Prior | None = None


@struct.dataclass
class RankContext:
    """B prefilled histories: the backbone's context, and the codes int32 [B, S, M] of the history's items."""

    own: CausalContext
    codes: jax.Array

    @property
    def each(self) -> int:
        """Positions of an item of the history."""
        return self.own.states.shape[1] // self.codes.shape[1]

    def at(self, last: jax.Array) -> "RankContext":
        """A view: target l sees the history up to the item at last int32 [B, L]."""
        return self.replace(own=self.own.at((last + 1) * self.each - 1))


@struct.dataclass
class RankPrefixes:
    """L prefixes of IDs as the rank head sees them, once for all candidates that may follow.

    own: key and value [B, L, T, N, H] of the states of the prefix, the last of which predicts the candidates; query
    [B, L, D], with `RankConfig.match`: a projection of the last state, whose product with a candidate is a part of the
    logit.
    """

    own: KeyValue
    query: jax.Array | None = None


class RankHead(nn.Module):
    """Target attention of candidate codes over the history's and the ID's states, and an MLP (RankGR Eq. 13-15)."""

    config: RankConfig
    width: int
    dtype: jnp.dtype

    def setup(self):
        self.attention = TargetAttention(self.config.heads, self.width // self.config.heads, self.dtype)
        self.norm, self.states_norm = RMSNorm(), RMSNorm()
        self.feed_forward = FeedForward(self.config.hidden, self.dtype)
        # Initialised small: with `likelihood`, an untrained head ranks as the decoder does.
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
        query = self.by_state(self.states_norm(states[:, :, -1])) if self.config.match else None
        return RankPrefixes(self.memory(states), query)

    def __call__(self, query, context: KeyValue, mask, prefixes: RankPrefixes, log_probs: jax.Array) -> jax.Array:
        """Logits float32 [B, L, C] of candidates query [B, L, C, D].

        context: of `memory` [B, S, N, H] with mask [B, S] or [B, L, S]; prefixes: L of them; log_probs [B, L, C] of the
        candidates, no gradient flows into them.
        """
        x = self.attention(query, context, mask, prefixes.own, causal=False)
        x = x + self.feed_forward(self.norm(x))
        logits = self.out(x)[..., 0].astype(jnp.float32)
        if self.config.match:
            by_context = self.by_found(self.found_norm(x)) + prefixes.query[:, :, None]
            logits += (by_context * self.query_norm(query)).astype(jnp.float32).sum(-1)
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
            # Embeddings are of unit length; scaled, each of their components has a variance of about one.
            table += self.known(embeddings * embeddings.shape[-1] ** 0.5)
        return table + self.item.table.astype(table.dtype) if self.has_items else table

    def prefill(self, inputs: RankInputs, train: bool = False) -> RankContext:
        """Read B histories once."""
        levels, codes, mask = self.config.backbone.levels, inputs.codes[inputs.item], inputs.mask
        if self.config.context == "item":
            table = self.item_table(inputs.codes, inputs.embeddings) if inputs.table is None else inputs.table
            x = table[inputs.item][:, :, None]
        else:
            x = self.backbone.embed(to_tokens(codes, levels))
        if self.behavior is not None:
            x = x + self.behavior(inputs.behavior)[:, :, None]
        if self.gap is not None:
            x = x + self.gap(inputs.gap)[:, :, None]
        # An empty history is read from its first place, where there is no item.
        x = jnp.where(mask[..., None, None], x, 0.0)
        mask = jnp.repeat(mask, x.shape[2], axis=1)
        return RankContext(self.backbone.read(x.reshape(*mask.shape, -1), mask, train, inputs.prior), codes)

    def score(
        self, context: RankContext, targets: jax.Array, where: jax.Array | None = None, train: bool = False
    ) -> Scored:
        """Every code of targets int32 [B, L, M]; their states are h_1 ... h_M of Eq. 3."""
        scored = self.backbone.score(context.own, targets, where, train)
        if self.pointer is None:
            return scored
        return self._points(context).along(scored, targets, context.codes)

    def next_codes(self, context: RankContext, states: jax.Array, tokens: jax.Array | None, before: dict, level: int):
        """Log-probabilities float32 [B, L, K] of a level's codes after L prefixes, and a cache for the next level.

        states [B, L, D] predict the codes; tokens int32 [B, L] are those of level - 1, and `before` is the cache that
        came with their log-probabilities: with a prior the `node` int32 [B, L] of the prefix, with a pointer its
        `copied` part and the decoder's own `log_probs` [B, L, K]. At level 0 there are no tokens and `before` is {}.
        """
        log_probs, node = self.backbone.next_codes(context.own, states, tokens, before.get("node"), level)
        if self.pointer is None:
            return log_probs, {"node": node}
        if level:
            copied = before["copied"].after(tokens, context.codes[..., level - 1], pick(before["log_probs"], tokens))
        else:
            copied = self._points(context).begin()
        cache = {"node": node, "copied": copied, "log_probs": log_probs}
        return copied.mix(log_probs, context.codes[..., level]), cache

    def _points(self, context: RankContext) -> Points:
        """The pointer's distribution over the history's items: one of a context, or L of a view."""
        last = slice(context.each - 1, None, context.each)
        own = context.own
        return self.pointer(own.state, own.states[:, last], own.mask[..., last])

    def extend(self, context: RankContext, tokens: jax.Array | None, cache: dict | None, level: int):
        """One more code for every beam: codes int32 [B, W] of level - 1 -> (log-probabilities [B, W, K], cache).

        The cache holds the backbone's, the states [B, W, level + 1, D] that the rank head reads, and that of
        `next_codes`.
        """
        before = cache or {}
        state, own = self.backbone.extend_states(context.own, tokens, before.get("own"), level)
        states = state[:, :, None]
        if level:
            states = jnp.concatenate([before["states"], states], axis=2)
        log_probs, after = self.next_codes(context, state, tokens, before.get("next", {}), level)
        return log_probs, {"own": own, "states": states, "next": after}

    def memory(self, context: RankContext) -> KeyValue:
        """The history as the rank head attends to it; once for all levels."""
        return self.rank_head.memory(context.own.states)

    def prefixes(self, states: jax.Array) -> RankPrefixes:
        """L prefixes as the rank head sees them: states [B, L, level + 1, D], the last of which predicts the code."""
        return self.rank_head.prefixes(states)

    def rank(self, context: RankContext, memory: KeyValue, prefixes, codes, log_probs, level: int) -> jax.Array:
        """The rank head's logits float32 [B, L, C] of candidate codes int32 [B, L, C] of a level (RankGR Eq. 14-15).

        prefixes: L of them, of `prefixes`.
        """
        x = self.backbone.embed(to_tokens(codes[..., None], self.config.backbone.levels, level)[..., 0])
        # The state of the last position is h_1, which the ID's own states begin with: it enters once (Eq. 13).
        mask = context.own.mask
        before = mask & (jnp.cumsum(mask, axis=-1) < mask.sum(-1, keepdims=True))
        return self.rank_head(x, memory, before, prefixes, log_probs)

    def item_query(self, states: jax.Array) -> jax.Array:
        """Queries [..., D] of histories with states [..., D]: an item's score is its product with `item_vectors`."""
        query, temperature = self.query(states), self.config.rank.temperature
        return unit(query) / temperature if temperature else query

    def item_vectors(self, table: jax.Array) -> jax.Array:
        """Keys [I, D] of all items, from their vectors in `item_table`; an item's score is the product with a query."""
        return unit(table) if self.config.rank.temperature else table

    def __call__(self, inputs: RankInputs, targets: jax.Array) -> jax.Array:
        """Touches every part once; for `init`."""
        context = self.prefill(inputs.replace(table=self.item_table(inputs.codes, inputs.embeddings)))
        scored = self.score(context, targets)
        log_probs, states = scored.log_probs, scored.states
        if self.rank_head is not None:
            memory, prefixes = self.memory(context), self.prefixes(states[:, :, :1])
            log_probs += self.rank(context, memory, prefixes, targets[..., :1], log_probs[..., :1], 0)
        if self.query is not None:
            log_probs += self.query(states).sum(-1)
        return log_probs
