"""T5 and BART for generative retrieval: the encoder reads the context once, the decoder scores many short targets.

    tokens ──▶ prefill ──▶ EncodedContext: per decoder layer K/V of the encoder's output; the start token, decoded
                              ├─ at(last): with a causal encoder, a view in which each target sees a prefix
               targets ──▶ score:  [B, L, M] log-probabilities, all targets against the one context
               beams   ──▶ extend: one more token for every beam, its cache is [B, W, t, N, H] a layer

Every target begins with the same start token, so it belongs to the context: it is decoded once, and a target of M codes
costs M - 1 tokens. Both T5 1.0 (ReLU, tied head) and 1.1 (gated GELU, untied head) and what lies between; weights as
Hugging Face has them are read by `jaxrec.models.huggingface`. The two styles:

    t5    RMSNorm before each block; no biases; scores are not scaled; positions enter through a bias of the scores that
          all layers of a side share
    bart  LayerNorm after each block and of the embeddings (`nn/post_norm.py`); biases; scaled scores; a learned vector
          for each absolute position: of a context's real tokens, from 0 with or without soft tokens, whose positions
          follow theirs, and of every target from its start token on; a bias of the logits that is not trained
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from jaxrec.config import UserError, check_choice, check_least, check_shares
from jaxrec.models.contract import Scored, score_targets
from jaxrec.models.prior import Prior
from jaxrec.models.vocabulary import ContextTokens, Levels, check_levels, level_log_probs, level_logits, to_tokens
from jaxrec.nn.attention import KeyValue
from jaxrec.nn.layers import DTYPES, Dropout, Embedding, LayerNorm, RMSNorm, partitioned
from jaxrec.nn.post_norm import Keep, LearnedPositions, PostNormDecoderLayer, PostNormEncoderLayer
from jaxrec.nn.transformer import Activation, CrossAttention, FeedForwardBlock, RelativeBias, SelfAttention, dropped


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Sizes and parts of a T5 or a BART."""

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
    """of the feed-forward; gelu is its tanh approximation, gelu_erf the exact one"""
    gated: bool = False
    """the feed-forward has a gate (T5 1.1)"""
    tied: bool = True
    """the head is the embedding table"""
    scale_head: bool = True
    """states are multiplied by width**-0.5 before the head (T5 1.0). Without it, a tied table is initialised
    with a standard deviation of width**-0.5 in place of 1, so that Adam's steps are width**0.5 times larger relative to
    it"""
    buckets: int = 32
    """buckets of relative positions (t5)"""
    max_distance: int = 128
    """distance from which on all share the last bucket (t5)"""
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
    """the rate of the decoder; None: as `dropout`. Contexts are overfitted sooner than targets, so that a lower rate
    than the encoder's may help"""
    dtype: str = "float32"
    """type of activations"""
    causal: bool = False
    """encoder self-attention is causal, so that one pass encodes all prefixes of a context (`EncodedContext.at`). T5's
    encoder is bidirectional. Neither a causal encoder nor cross-attention, which has no positions, can tell where a
    prefix ends; so the encoder's state of the last position is added to the start token's embedding"""
    style: Literal["t5", "bart"] = "t5"
    """norms, biases, scale of the scores and kind of positions, as above; `bart_config` has BART's other values"""
    max_positions: int = 1024
    """learned positions, the most tokens of a context and of a target with its start token (bart)"""

    @property
    def head_scale(self) -> float:
        """Initial standard deviation of the head: logits have unit variance, from states of unit variance."""
        return 1.0 if self.scale_head else self.width**-0.5

    @property
    def embed_scale(self) -> float:
        """Initial standard deviation of the embeddings, and of what a block adds to them."""
        return self.head_scale if self.tied else 1.0

    def __post_init__(self):
        least = {"width": 1, "heads": 1, "head_dim": 1, "hidden": 1, "encoder_layers": 1, "layers": 1, "epsilon": 0}
        check_least(self, "model", **least, max_positions=1)
        check_shares(self, "model", "dropout", "decoder_dropout")
        check_choice(self, "model", "dtype", DTYPES)
        check_choice(self, "model", "style", ("t5", "bart"))
        check_levels(self.levels, self.vocabulary)
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise UserError(
                f"model.buckets is {self.buckets} and model.max_distance {self.max_distance}: give at least 4 buckets "
                "and a distance above half of them"
            )


def bart_config(**fields: Any) -> EncoderDecoderConfig:
    """A configuration in BART's style, with BART's values of the fields that are not given."""
    values = {"activation": "gelu_erf", "scale_head": False, "epsilon": 1e-5, "start_token": 2, "dropout": 0.1}
    return EncoderDecoderConfig(style="bart", **values | fields)


@struct.dataclass
class EncodedContext:
    """A prefilled context. Never copied per target. X is 1, or L in a view of which each target sees another prefix.

    cross: per decoder layer K/V [B, S, N, H] of the encoder's output; mask bool [B, X, S]; start: per decoder layer the
    start token's own K/V [B, 1, N, H]; state [B, 1, D] that predicts the first code; ends [B, X, D]: with a causal
    encoder, what is added to the start token; memory [B, S, D]: with a causal encoder, its output; prior: added to the
    logits of the codes. In a view, start and state are None: each target has a start token of its own.
    """

    cross: tuple[KeyValue, ...]
    mask: jax.Array
    start: tuple[KeyValue, ...] | None
    state: jax.Array | None
    memory: jax.Array | None = None
    ends: jax.Array | None = None
    prior: Prior | None = None

    def at(self, last: jax.Array) -> "EncodedContext":
        """A view: target l sees the positions up to last int32 [B, L]; none where that is -1. Of causal encoders."""
        if self.memory is None:
            raise ValueError("a prefix of a context that was read in both directions: set model.causal")
        mask = self.mask & (np.arange(self.mask.shape[-1]) <= last[..., None])
        return self.replace(mask=mask, start=None, state=None, ends=_ends(self.memory, mask))


def _ends(memory: jax.Array, seen: jax.Array) -> jax.Array:
    """The states [B, X, D] among memory [B, S, D] of the last positions that are seen, bool [B, X, S]; 0 for none."""
    last = jnp.max(jnp.where(seen, np.arange(seen.shape[-1]), 0), axis=-1)
    found = jnp.take_along_axis(memory, last[..., None], axis=1)
    return jnp.where(seen.any(-1, keepdims=True), found, 0.0)


class EncoderLayer(nn.Module):
    """Self-attention over the whole context and a feed-forward."""

    config: EncoderDecoderConfig

    def setup(self):
        self.attention = _self_attention(self.config)
        self.feed_forward = _feed_forward(self.config)

    def __call__(self, x: jax.Array, mask: jax.Array, bias: jax.Array, keep: Keep) -> jax.Array:
        x = nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed"))
        attended, _ = self.attention.sequence(x, mask, bias)
        return keep(x, self.feed_forward(attended))


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

    def __call__(self, x, cross: KeyValue, mask, bias, start: KeyValue | None, past: KeyValue | None, keep: Keep):
        """x [B, L, M, D] -> x, and the targets' own K/V [B, L, t + M, N, H] with `past` [B, L, t, N, H] in front."""
        x = nn.with_logical_constraint(x, ("act_batch", "act_targets", None, "act_embed"))
        attended, own = self.attention.targets(x, context=start, past=past, bias=bias)
        return keep(x, self.feed_forward(self.cross(attended, cross, mask))), own


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


def _layers(cfg: EncoderDecoderConfig) -> tuple[list[nn.Module], list[nn.Module]]:
    """Of the encoder and of the decoder."""
    encoder, decoder = partial(EncoderLayer, cfg), partial(DecoderLayer, cfg)
    if cfg.style == "bart":
        sizes = cfg.width, cfg.heads, cfg.head_dim, cfg.hidden, cfg.activation, cfg.gated, cfg.epsilon
        encoder, decoder = (
            partial(each, *sizes, jnp.dtype(cfg.dtype)) for each in (PostNormEncoderLayer, PostNormDecoderLayer)
        )
    return [encoder() for _ in range(cfg.encoder_layers)], [decoder() for _ in range(cfg.layers)]


class EncoderDecoder(nn.Module):
    """T5 or BART with the three verbs."""

    config: EncoderDecoderConfig

    def setup(self):
        cfg = self.config
        self.embed = Embedding(cfg.vocabulary, cfg.width, jnp.dtype(cfg.dtype), cfg.embed_scale)
        self.head = None if cfg.tied else Embedding(cfg.vocabulary, cfg.width, jnp.dtype(cfg.dtype), cfg.head_scale)
        self.encoder, self.decoder = _layers(cfg)
        if cfg.style == "bart":
            places = cfg.max_positions, cfg.width, jnp.dtype(cfg.dtype), cfg.embed_scale
            self.encoder_positions, self.decoder_positions = LearnedPositions(*places), LearnedPositions(*places)
            # Of the embeddings: the last block of a side is followed by its own norm.
            self.encoder_norm, self.decoder_norm = LayerNorm(cfg.epsilon), LayerNorm(cfg.epsilon)
            self.logits_bias = self.param("logits_bias", partitioned(nn.initializers.zeros, "vocab"), (cfg.vocabulary,))
        else:
            self.encoder_bias = RelativeBias(cfg.heads, cfg.buckets, cfg.max_distance, both_sides=True)
            self.decoder_bias = RelativeBias(cfg.heads, cfg.buckets, cfg.max_distance, both_sides=False)
            self.encoder_norm, self.decoder_norm = RMSNorm(cfg.epsilon), RMSNorm(cfg.epsilon)
        self.drop = Dropout(cfg.dropout)
        self.decoder_drop = Dropout(cfg.dropout if cfg.decoder_dropout is None else cfg.decoder_dropout)

    def prefill(self, inputs: ContextTokens, train: bool = False) -> EncodedContext:
        """Encode B contexts once; padding may stand anywhere."""
        memory, mask = self._encode(inputs, train), inputs.seen[:, None]
        cross = tuple(layer.cross.key_value(memory) for layer in self.decoder)
        memory = memory if self.config.causal else None
        ends = None if memory is None else _ends(memory, mask)
        context = EncodedContext(cross, mask, None, None, memory, ends, inputs.prior)
        states, own = self._decode(self._start_tokens(context, 1), context, None, train)
        start = tuple((key[:, 0], value[:, 0]) for key, value in own)
        return context.replace(start=start, state=states[:, :, 0])

    def score(
        self, context: EncodedContext, targets: jax.Array, where: jax.Array | None = None, train: bool = False
    ) -> Scored:
        """Every code of targets int32 [B, L, M]."""
        if context.start is None:
            tokens = to_tokens(targets[..., :-1], self.config.levels)
            entered = jnp.concatenate([self._start_tokens(context, targets.shape[1]), tokens], axis=-1)
            states, _ = self._decode(entered, context, None, train)
            first, rest = states[:, :, 0], states[:, :, 1:]
        else:
            first, rest = context.state, self.states(context, targets[..., :-1], train)
        return score_targets(self._level_logits, first, rest, targets, context.prior)

    def states(self, context: EncodedContext, codes: jax.Array, train: bool = False) -> jax.Array:
        """The decoder's states of codes int32 [B, L, M]: [B, L, M, D], the m-th predicts the code after the m-th."""
        if codes.shape[-1] == 0:
            return jnp.zeros((*codes.shape, self.config.width), self.config.dtype)
        return self._decode(to_tokens(codes, self.config.levels), context, None, train)[0]

    def extend(self, context: EncodedContext, tokens: jax.Array | None, cache: dict | None, level: int):
        """One more code for every beam: codes int32 [B, W] of level - 1 -> (log-probabilities [B, W, K], cache).

        The cache holds, per layer, the K/V [B, W, t, N, H] of the codes so far, the start token's being the context's,
        and with a prior the node int32 [B, W] of the prefix. K is the level's size, or V without levels.
        """
        before, cfg, prior = cache or {}, self.config, None
        if level or context.start is None:
            entered = self._start_tokens(context, context.mask.shape[1])
            if level:
                entered = to_tokens(tokens[..., None], cfg.levels, level - 1)
            states, own = self._decode(entered, context, before.get("own") or None)
            state = states[:, :, 0]
        else:
            state, own = context.state, ()
        node = before.get("node")
        if context.prior is not None:
            node, prior = context.prior.after(level, node, tokens, state.shape[:2])
        log_probs = level_log_probs(self._table(), state, level, cfg.levels, cfg.restrict, prior, self._bias())
        return log_probs, {"own": own, "node": node}

    def _start_tokens(self, context: EncodedContext, count: int) -> jax.Array:
        return jnp.full((context.mask.shape[0], count, 1), self.config.start_token, jnp.int32)

    def _encode(self, inputs: ContextTokens, train: bool) -> jax.Array:
        """The encoder's output, [B, Q + S, D]."""
        x, mask = inputs.vectors(self.embed), inputs.seen
        positions, bart = np.arange(mask.shape[1]), self.config.style == "bart"
        if bart:
            self._check_positions("a context", len(positions))
            x = self.encoder_norm(x + self.encoder_positions(_absolute_positions(inputs)))
        bias = None if bart else self.encoder_bias(positions, positions)
        x = self.drop(x, deterministic=not train)
        seen = mask[:, None] & (positions <= positions[:, None]) if self.config.causal else mask
        keep = partial(dropped, drop=self.drop, train=train)
        for layer in self.encoder:
            x = layer(x, seen, bias, keep)
        return x if bart else self.drop(self.encoder_norm(x), deterministic=not train)

    def _decode(self, tokens: jax.Array, context: EncodedContext, past: tuple | None, train: bool = False):
        """Tokens int32 [B, L, M] through the decoder -> (states [B, L, M, D] for the head, each layer's own K/V).

        Without a start token in the context and without a past, the first token is the start token.
        """
        earlier = (0 if context.start is None else 1) + (0 if past is None else past[0][0].shape[2])
        keys, bart = np.arange(earlier + tokens.shape[-1]), self.config.style == "bart"
        bias = None if bart else self.decoder_bias(keys[earlier:], keys)[:, None]  # [N, 1, M, positions]
        x, own = self.embed(tokens), []
        if context.ends is not None and not earlier:
            x = x.at[:, :, 0].add(context.ends * self.config.embed_scale)
        if bart:
            self._check_positions("a target with its start token", len(keys))
            x = self.decoder_norm(x + self.decoder_positions(keys[earlier:]))
        x, keep = self.decoder_drop(x, deterministic=not train), partial(dropped, drop=self.decoder_drop, train=train)
        for index, layer in enumerate(self.decoder):
            start = None if context.start is None else context.start[index]
            before = None if past is None else past[index]
            x, kv = layer(x, context.cross[index], context.mask, bias, start, before, keep)
            own.append(kv)
        if not bart:
            x = self.decoder_drop(self.decoder_norm(x), deterministic=not train)
        return x * self.config.width**-0.5 if self.config.scale_head else x, tuple(own)

    def _level_logits(self, level: int, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        return level_logits(self._table(), states, level, self.config.levels, self.config.restrict, self._bias())

    def _bias(self) -> jax.Array | None:
        """Of the logits. BART's files hold it, BART's training leaves it as it is."""
        return jax.lax.stop_gradient(self.logits_bias) if self.config.style == "bart" else None

    def _check_positions(self, what: str, tokens: int) -> None:
        if tokens > self.config.max_positions:
            raise UserError(
                f"{what} has {tokens} tokens, but model.max_positions is {self.config.max_positions}: cut it, or "
                "train a model with more positions"
            )

    def _table(self) -> jax.Array:
        return (self.embed if self.head is None else self.head).table

    def __call__(self, inputs: ContextTokens, targets: jax.Array) -> jax.Array:
        """Touches every part once; for `init`."""
        return self.score(self.prefill(inputs), targets).log_probs


def _absolute_positions(inputs: ContextTokens) -> jax.Array:
    """The absolute positions int32 [B, Q + S] of a context; of padding, any.

    Real tokens are counted alone, from 0, so that they have the positions that they had in a text, wherever padding
    stands and whatever stands in front. Soft tokens, although in front, are counted on from the last real token.
    """
    positions = jnp.maximum(jnp.cumsum(inputs.mask, axis=1) - 1, 0)
    if inputs.soft is None:
        return positions
    tokens = inputs.mask.sum(axis=1, keepdims=True)
    return jnp.concatenate([jnp.maximum(tokens + jnp.cumsum(inputs.soft_mask, axis=1) - 1, 0), positions], axis=1)
