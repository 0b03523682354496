"""T5 as a model of generative retrieval: the encoder reads the context once, the decoder scores many short targets.

    tokens ──▶ prefill ──▶ EncodedContext: per decoder layer K/V of the encoder's output; the start token, decoded
                              │
               targets ──▶ score:  [B, L, M] log-probabilities, all targets against the one context
               beams   ──▶ extend: one more token for every beam, its cache is [B, W, t, N, H] a layer

Every target begins with the same start token, so it belongs to the context: it is decoded once, and a target of M codes
costs M - 1 tokens. Both T5 1.0 (ReLU, tied head) and 1.1 (gated GELU, untied head) and what lies between; weights as
Hugging Face has them are read by `jaxrec.models.huggingface`. T5 doesn't scale attention scores; positions enter
through a bias that all layers of a side share.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from jaxrec.config import UserError, check_choice, check_least, check_shares
from jaxrec.models.prior import Prior
from jaxrec.models.vocabulary import Levels, check_levels, level_log_probs, target_log_probs, to_tokens
from jaxrec.nn.attention import KeyValue
from jaxrec.nn.layers import DTYPES, Embedding, RMSNorm
from jaxrec.nn.transformer import Activation, CrossAttention, FeedForwardBlock, RelativeBias, SelfAttention, dropped


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Sizes and parts of a T5."""

    vocabulary: int = 1100
    """tokens V"""
    width: int = 128
    """model width D"""
    heads: int = 6
    """attention heads N"""
    head_dim: int = 64
    """head width H; heads * head_dim need not be the width"""
    hidden: int = 1024
    """feed-forward width F"""
    encoder_layers: int = 4
    """layers of the encoder"""
    layers: int = 4
    """layers of the decoder"""
    activation: Activation = "relu"
    """of the feed-forward; gelu is its tanh approximation"""
    gated: bool = False
    """the feed-forward has a gate (T5 1.1)"""
    tied: bool = True
    """the head is the embedding table"""
    scale_head: bool = True
    """states are multiplied by width**-0.5 before the head (T5 1.0); off, a tied head is as small at first, which makes
    it learn as many times faster"""
    buckets: int = 32
    """buckets of relative positions"""
    max_distance: int = 128
    """distance from which on all share the last bucket"""
    epsilon: float = 1e-6
    """of the norms"""
    start_token: int = 0
    """the decoder's first input"""
    levels: Levels | None = None
    """(offset, size) of every level's slice of the vocabulary; None: targets are tokens of the whole vocabulary"""
    restrict: bool = True
    """normalise a level over its slice alone; off, over the whole vocabulary, which is what generic decoders do: then
    a level's probabilities sum to less than one"""
    dropout: float = 0.0
    """dropout on embeddings, on what each layer adds and on the last states, in training"""
    decoder_dropout: float | None = None
    """the same in the decoder, if another rate: a context is easily learnt by heart, which ID follows is not"""
    dtype: str = "float32"
    """type of activations"""
    causal: bool = False
    """a token of the context looks at itself and at those before it, so that one pass serves all of its prefixes
    (`score_prefixes`); no T5, whose encoder looks both ways. Such an encoder can't tell where a prefix ends, nor can
    cross-attention, which knows no places; so the start token is added to what the encoder says of the last place"""

    @property
    def head_scale(self) -> float:
        """Standard deviation of the head at first: logits begin with unit variance, from states of unit variance."""
        return 1.0 if self.scale_head else self.width**-0.5

    @property
    def embed_scale(self) -> float:
        """Standard deviation of the embeddings at first, and of what a block adds to them."""
        return self.head_scale if self.tied else 1.0

    def __post_init__(self):
        least = {"width": 1, "heads": 1, "head_dim": 1, "hidden": 1, "encoder_layers": 1, "layers": 1, "epsilon": 0}
        check_least(self, "model", **least)
        check_shares(self, "model", "dropout", "decoder_dropout")
        check_choice(self, "model", "dtype", DTYPES)
        check_levels(self.levels, self.vocabulary)
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise UserError(
                f"model.buckets is {self.buckets} and model.max_distance {self.max_distance}: give at least 4 buckets "
                "and a distance above half of them"
            )


@struct.dataclass
class EncodedContext:
    """A prefilled context. Never copied per target.

    cross: per decoder layer K/V [B, S, N, H] of the encoder's output; mask bool [B, S]; start: per decoder layer the
    start token's own K/V [B, 1, N, H]; state [B, D]: what predicts the first code; prior: what logits begin with, if
    not with zero.
    """

    cross: tuple[KeyValue, ...]
    mask: jax.Array
    start: tuple[KeyValue, ...]
    state: jax.Array
    prior: Prior | None = None


class EncoderLayer(nn.Module):
    """Self-attention over the whole context and a feed-forward."""

    config: EncoderDecoderConfig

    def setup(self):
        self.attention = _self_attention(self.config)
        self.feed_forward = _feed_forward(self.config)

    def __call__(self, x: jax.Array, mask: jax.Array, bias: jax.Array) -> jax.Array:
        x = nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed"))
        x, _ = self.attention.sequence(x, mask, bias)
        return self.feed_forward(x)


class DecoderLayer(nn.Module):
    """Self-attention within each target, cross-attention to the context, and a feed-forward."""

    config: EncoderDecoderConfig

    def setup(self):
        cfg = self.config
        self.attention = _self_attention(cfg)
        self.cross = CrossAttention(
            cfg.width, cfg.heads, cfg.head_dim, 1.0, cfg.epsilon, jnp.dtype(cfg.dtype), cfg.embed_scale
        )
        self.feed_forward = _feed_forward(cfg)

    def __call__(self, x, cross: KeyValue, mask, bias, start: KeyValue | None, past: KeyValue | None):
        """x [B, L, M, D] -> x, and the targets' own K/V [B, L, t + M, N, H] with `past` [B, L, t, N, H] in front."""
        x = nn.with_logical_constraint(x, ("act_batch", "act_targets", None, "act_embed"))
        x, own = self.attention.targets(x, context=start, past=past, bias=bias)
        return self.feed_forward(self.cross(x, cross, mask)), own


def _self_attention(cfg: EncoderDecoderConfig) -> SelfAttention:
    return SelfAttention(
        cfg.width,
        cfg.heads,
        cfg.heads,
        cfg.head_dim,
        scale=1.0,
        epsilon=cfg.epsilon,
        dtype=jnp.dtype(cfg.dtype),
        out_gain=cfg.embed_scale,
    )


def _feed_forward(cfg: EncoderDecoderConfig) -> FeedForwardBlock:
    return FeedForwardBlock(cfg.hidden, cfg.activation, cfg.gated, cfg.epsilon, jnp.dtype(cfg.dtype), cfg.embed_scale)


class EncoderDecoder(nn.Module):
    """T5 with the three verbs."""

    config: EncoderDecoderConfig

    def setup(self):
        cfg = self.config
        self.embed = Embedding(cfg.vocabulary, cfg.width, jnp.dtype(cfg.dtype), cfg.embed_scale)
        self.head = None if cfg.tied else Embedding(cfg.vocabulary, cfg.width, jnp.dtype(cfg.dtype), cfg.head_scale)
        self.encoder_bias = RelativeBias(cfg.heads, cfg.buckets, cfg.max_distance, both_sides=True)
        self.decoder_bias = RelativeBias(cfg.heads, cfg.buckets, cfg.max_distance, both_sides=False)
        self.encoder = [EncoderLayer(cfg) for _ in range(cfg.encoder_layers)]
        self.decoder = [DecoderLayer(cfg) for _ in range(cfg.layers)]
        self.encoder_norm, self.decoder_norm = RMSNorm(cfg.epsilon), RMSNorm(cfg.epsilon)
        self.drop = nn.Dropout(cfg.dropout)
        self.decoder_drop = nn.Dropout(cfg.dropout if cfg.decoder_dropout is None else cfg.decoder_dropout)

    def prefill(
        self, tokens: jax.Array, mask: jax.Array, train: bool = False, prior: Prior | None = None
    ) -> EncodedContext:
        """Encode B contexts once: tokens int32 [B, S], mask bool [B, S], True = a token, padding anywhere.

        Tokens may be [B, S, M] as well: a position is then the sum of its tokens' embeddings, -1 standing for none.
        """
        cross, memory = self._encode(tokens, mask, train)
        start = jnp.full((tokens.shape[0], 1, 1), self.config.start_token, jnp.int32)
        states, own = self._decode(start, cross, mask, None, None, train, self._ends(memory, mask[:, None]))
        start = tuple((key[:, 0], value[:, 0]) for key, value in own)
        return EncodedContext(cross, mask, start, states[:, 0, 0], prior)

    def score(
        self, context: EncodedContext, targets: jax.Array, train: bool = False, smoothing: float = 0.0
    ) -> jax.Array:
        """Log-probabilities float32 [B, L, M] of every code of targets int32 [B, L, M].

        `smoothing` as for `jaxrec.models.vocabulary.target_log_probs`.
        """
        states = self.states(context, targets[..., :-1], train)
        return self._log_probs(context.state, states, targets, smoothing, context.prior)

    def score_prefixes(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        seen: jax.Array,
        targets: jax.Array,
        train: bool = False,
        smoothing: float = 0.0,
        prior: Prior | None = None,
    ) -> jax.Array:
        """As `score`, where each target sees another prefix of its context: tokens int32 [B, S], seen bool [B, L, S].

        With a causal encoder this is what `prefill` of each prefix and `score` of its target give, from one pass.
        """
        start = jnp.full((*targets.shape[:2], 1), self.config.start_token, jnp.int32)
        entered = jnp.concatenate([start, to_tokens(targets[..., :-1], self.config.levels)], axis=-1)
        cross, memory = self._encode(tokens, mask, train)
        seen &= mask[:, None]
        states, _ = self._decode(entered, cross, seen, None, None, train, self._ends(memory, seen))
        return self._log_probs(states[:, :, 0], states[:, :, 1:], targets, smoothing, prior)

    def states(self, context: EncodedContext, codes: jax.Array, train: bool = False) -> jax.Array:
        """What the decoder makes of codes int32 [B, L, M]: [B, L, M, D], the m-th predicts the code after the m-th."""
        if codes.shape[-1] == 0:
            return jnp.zeros((*codes.shape, self.config.width), self.config.dtype)
        tokens = to_tokens(codes, self.config.levels)
        return self._decode(tokens, context.cross, context.mask, context.start, None, train)[0]

    def extend(self, context: EncodedContext, tokens: jax.Array | None, cache: dict | None, level: int):
        """One more code for every beam: codes int32 [B, W] of level - 1 -> (log-probabilities [B, W, K], cache).

        At level 0 there are no codes and W is 1. The cache holds, per layer, the K/V [B, W, t, N, H] of the codes so
        far, the start token's being the context's, and with a prior the node int32 [B, W] in it that the prefix leads
        to. K is the level's size, or V without levels.
        """
        before, prior = cache, None
        if level == 0:
            state, cache = context.state[:, None], {}
        else:
            past = before["own"] if level > 1 else None
            entered = to_tokens(tokens[..., None], self.config.levels, level - 1)
            states, own = self._decode(entered, context.cross, context.mask, context.start, past)
            state, cache = states[:, :, 0], {"own": own}
        if context.prior is not None:
            cache["node"] = jnp.zeros(state.shape[:2], jnp.int32)
            if level:
                cache["node"], _ = context.prior.step(level - 1, before["node"], tokens)
            prior = context.prior.logits(level, cache["node"])
        cfg = self.config
        return level_log_probs(self._table(), state, level, cfg.levels, cfg.restrict, prior), cache

    def _encode(self, tokens: jax.Array, mask: jax.Array, train: bool) -> tuple[tuple[KeyValue, ...], jax.Array]:
        """Per decoder layer K/V [B, S, N, H] of the encoder's output, and that itself, [B, S, D]."""
        x = self.embed(jnp.maximum(tokens, 0))
        if tokens.ndim == 3:
            x = jnp.where(tokens[..., None] >= 0, x, 0.0).sum(2)
        x = self.drop(x, deterministic=not train)
        positions = np.arange(tokens.shape[1])
        bias = self.encoder_bias(positions, positions)
        looked_at = mask[:, None] & (positions <= positions[:, None]) if self.config.causal else mask
        for layer in self.encoder:
            x = dropped(x, layer(x, looked_at, bias), self.drop, train)
        memory = self.drop(self.encoder_norm(x), deterministic=not train)
        return tuple(layer.cross.key_value(memory) for layer in self.decoder), memory

    def _ends(self, memory: jax.Array, seen: jax.Array) -> jax.Array | None:
        """What a causal encoder says, [B, L, D], of the last place that each target sees: seen bool [B, L, S]."""
        if not self.config.causal:
            return None
        last = jnp.max(jnp.where(seen, np.arange(seen.shape[-1]), 0), axis=-1)
        found = jnp.take_along_axis(memory, last[..., None], axis=1)
        return jnp.where(seen.any(-1, keepdims=True), found, 0.0) * self.config.embed_scale

    def _decode(self, tokens, cross, mask, start, past, train: bool = False, ends: jax.Array | None = None):
        """Tokens int32 [B, L, M] through the decoder -> (states [B, L, M, D] for the head, each layer's own K/V).

        ends [B, L, D] is added to the first token.
        """
        earlier = (0 if start is None else 1) + (0 if past is None else past[0][0].shape[2])
        keys = np.arange(earlier + tokens.shape[-1])
        bias = self.decoder_bias(keys[earlier:], keys)[:, None]  # [N, 1, M, positions]
        x, own = self.embed(tokens), []
        if ends is not None:
            x = x.at[:, :, 0].add(ends)
        x = self.decoder_drop(x, deterministic=not train)
        for index, layer in enumerate(self.decoder):
            before = None if start is None else start[index]
            out, kv = layer(x, cross[index], mask, bias, before, None if past is None else past[index])
            x = dropped(x, out, self.decoder_drop, train)
            own.append(kv)
        x = self.decoder_drop(self.decoder_norm(x), deterministic=not train)
        return x * self.config.width**-0.5 if self.config.scale_head else x, tuple(own)

    def _log_probs(self, first, states, targets, smoothing: float, prior: Prior | None) -> jax.Array:
        """As `target_log_probs` of this model's head, where logits begin with the prior."""
        cfg, priors = self.config, None if prior is None else prior.along(targets)
        return target_log_probs(self._table(), first, states, targets, cfg.levels, cfg.restrict, smoothing, priors)

    def _table(self) -> jax.Array:
        return (self.embed if self.head is None else self.head).table

    def __call__(self, tokens: jax.Array, mask: jax.Array, targets: jax.Array) -> jax.Array:
        """Touches every part once; for `init`."""
        return self.score(self.prefill(tokens, mask), targets)
