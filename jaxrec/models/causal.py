"""Qwen2 as a model of generative retrieval (RankGR): context and targets go through the same causal layers.

    tokens ──▶ prefill ──▶ CausalContext: per layer K/V of the context; the state of its last token
                              │         and, for training on every next item, the state of every position (RankGR Eq. 2)
                              ├─ at(positions): the same K/V, of which each target sees the part up to a position
               targets ──▶ score:  [B, L, M] log-probabilities under the mask of RankGR Eq. 7, which is never built
               beams   ──▶ extend: one more code for every beam, its cache is [B, W, t, N, H] a layer

The context's last token predicts the first code of every target, so a target of M codes costs M - 1 tokens. Positions
count real tokens only: padding on either side of a context changes nothing, and every target continues where its
context ends. Weights as Hugging Face has them are read by `jaxrec.models.huggingface`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxrec.config import UserError, check_choice, check_least, check_shares
from jaxrec.models.vocabulary import (
    Levels,
    check_levels,
    level_log_probs,
    target_log_probs,
    to_tokens,
    token_log_probs,
)
from jaxrec.nn.attention import KeyValue
from jaxrec.nn.layers import DTYPES, Embedding, RMSNorm
from jaxrec.nn.transformer import FeedForwardBlock, SelfAttention, dropped


@dataclass(frozen=True)
class CausalConfig:
    """Sizes and parts of a Qwen2 (Qwen2.5)."""

    vocabulary: int = 1100
    """tokens V"""
    width: int = 128
    """model width D"""
    heads: int = 4
    """heads N of the queries"""
    groups: int = 2
    """heads of keys and values; each serves heads / groups of the queries"""
    head_dim: int = 32
    """head width H, even"""
    hidden: int = 512
    """feed-forward width F"""
    layers: int = 4
    """layers"""
    bias: bool = True
    """query, key and value have a bias"""
    tied: bool = True
    """the head is the embedding table"""
    rotary_base: float = 1e6
    """base of the rotary embedding"""
    epsilon: float = 1e-6
    """of the norms"""
    levels: Levels | None = None
    """(offset, size) of every level's slice of the vocabulary; None: targets are tokens of the whole vocabulary"""
    restrict: bool = True
    """normalise a level over its slice alone; off, over the whole vocabulary, which is what generic decoders do: then
    a level's probabilities sum to less than one"""
    dropout: float = 0.0
    """share of zeroed embeddings and block outputs in training"""
    target_dropout: float | None = None
    """the same for the codes of targets, of which there are few and often seen; None: as `dropout`"""
    dtype: str = "float32"
    """type of activations"""

    def __post_init__(self):
        place = "model.backbone"
        check_least(self, place, width=1, heads=1, groups=1, head_dim=2, hidden=1, layers=1, rotary_base=1, epsilon=0)
        check_shares(self, place, "dropout", "target_dropout")
        check_choice(self, place, "dtype", DTYPES)
        check_levels(self.levels, self.vocabulary)
        if self.heads % self.groups:
            raise UserError(
                f"configuration key '{place}.groups' is {self.groups}; give one that divides the {self.heads} heads"
            )
        if self.head_dim % 2:
            raise UserError(
                f"configuration key '{place}.head_dim' is {self.head_dim}; the rotary embedding needs an even one"
            )


@struct.dataclass
class CausalContext:
    """A prefilled context. Never copied per target.

    own: per layer K/V [B, S, G, H]; mask bool [B, S]; length int32 [B]: real tokens, which is the position of every
    target's first code; state [B, D] of the last real token, from which the first code is predicted. Where every target
    sees another part of the context (`at`): mask [B, L, S], length [B, L], state [B, L, D].
    """

    own: tuple[KeyValue, ...]
    mask: jax.Array
    length: jax.Array
    state: jax.Array

    def at(self, states: jax.Array, last: jax.Array) -> "CausalContext":
        """The context as L targets see it, each up to a position of it: last int32 [B, L], of a real token.

        states [B, S, D] of all positions, as `Causal.prefill_with_states` returns them. Nothing is copied.
        """
        mask = self.mask[:, None] & (jnp.arange(self.mask.shape[1]) <= last[..., None])
        state = jnp.take_along_axis(states, last[..., None], axis=1)
        return self.replace(mask=mask, length=mask.sum(-1).astype(jnp.int32), state=state)


class CausalLayer(nn.Module):
    """Causal self-attention and a gated feed-forward."""

    config: CausalConfig

    def setup(self):
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)
        # What a block adds begins as small as the embeddings are, which it would drown otherwise.
        gain = cfg.width**-0.5
        self.attention = SelfAttention(
            *(cfg.width, cfg.heads, cfg.groups, cfg.head_dim, cfg.bias, cfg.rotary_base, None, cfg.epsilon, dtype, gain)
        )
        self.feed_forward = FeedForwardBlock(cfg.hidden, "silu", True, cfg.epsilon, dtype, gain)
        self.drop, self.target_drop = dropouts(cfg)

    def sequence(self, x: jax.Array, mask: jax.Array, positions: jax.Array, train: bool) -> tuple[jax.Array, KeyValue]:
        """x [B, S, D], mask [B, S, S], positions [B, S] -> x and its own K/V."""
        x = nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed"))
        attended, own = self.attention.sequence(x, mask, positions=positions)
        return self._feed_forward(x, attended, self.drop, train), own

    def targets(
        self, x, context: KeyValue, mask, past: KeyValue | None, positions, train: bool
    ) -> tuple[jax.Array, KeyValue]:
        """x [B, L, M, D] -> x, and the targets' own K/V [B, L, t + M, G, H] with `past` [B, L, t, G, H] in front."""
        x = nn.with_logical_constraint(x, ("act_batch", "act_targets", None, "act_embed"))
        attended, own = self.attention.targets(x, context=context, context_mask=mask, past=past, positions=positions)
        return self._feed_forward(x, attended, self.target_drop, train), own

    def _feed_forward(self, x: jax.Array, attended: jax.Array, drop: nn.Dropout, train: bool) -> jax.Array:
        x = dropped(x, attended, drop, train)
        return dropped(x, self.feed_forward(x), drop, train)


def dropouts(config: CausalConfig) -> tuple[nn.Dropout, nn.Dropout]:
    """Of the context and of the targets."""
    rate = config.target_dropout
    return nn.Dropout(config.dropout), nn.Dropout(config.dropout if rate is None else rate)


class Causal(nn.Module):
    """Qwen2 with the three verbs."""

    config: CausalConfig

    def setup(self):
        cfg = self.config
        scale = cfg.width**-0.5  # logits start with unit variance
        self.embed = Embedding(cfg.vocabulary, cfg.width, jnp.dtype(cfg.dtype), scale)
        self.head = None if cfg.tied else Embedding(cfg.vocabulary, cfg.width, jnp.dtype(cfg.dtype), scale)
        self.layers = [CausalLayer(cfg) for _ in range(cfg.layers)]
        self.norm = RMSNorm(cfg.epsilon)
        self.drop, self.target_drop = dropouts(cfg)

    def prefill(self, tokens: jax.Array, mask: jax.Array, train: bool = False) -> CausalContext:
        """Read B contexts once: tokens int32 [B, S], mask bool [B, S], True = a token, padding on either side.

        A row without any token gives finite numbers that mean nothing.
        """
        return self.prefill_with_states(tokens, mask, train)[0]

    def prefill_with_states(
        self, tokens: jax.Array, mask: jax.Array, train: bool = False
    ) -> tuple[CausalContext, jax.Array]:
        """As `prefill`, and the states [B, S, D] of all positions, each of which predicts the token after it."""
        return self.read(self.embed(tokens), mask, train)

    def read(self, x: jax.Array, mask: jax.Array, train: bool = False) -> tuple[CausalContext, jax.Array]:
        """As `prefill_with_states`, of positions that are given as vectors x [B, S, D] in place of tokens."""
        length = mask.sum(1).astype(jnp.int32)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        order = jnp.arange(mask.shape[1])
        seen = (order <= order[:, None]) & mask[:, None, :]
        x, own = self.drop(x, deterministic=not train), []
        for layer in self.layers:
            x, kv = layer.sequence(x, seen, positions, train)
            own.append(kv)
        states = self.norm(x)
        last = jnp.max(jnp.where(mask, order, 0), axis=1)
        state = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
        return CausalContext(tuple(own), mask, length, state), states

    def score_context(self, states: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Log-probability float32 [B, S] of every token of the context given those before it (RankGR Eq. 2).

        `states` are those of `prefill_with_states`. The first token of a row and padding give 0. With
        `config.restrict` a token of a level's slice is normalised over that slice.
        """
        cfg = self.config
        found = token_log_probs(self._table(), states[:, :-1], tokens[:, 1:], cfg.levels, cfg.restrict)
        return jnp.pad(jnp.where(mask[:, 1:] & mask[:, :-1], found, 0.0), ((0, 0), (1, 0)))

    def score(
        self, context: CausalContext, targets: jax.Array, train: bool = False, smoothing: float = 0.0
    ) -> jax.Array:
        """Log-probabilities float32 [B, L, M] of every code of targets int32 [B, L, M] (RankGR Eq. 4 and 7).

        Their sum over M is pi of RankGR Eq. 5. `smoothing` as for `target_log_probs`.
        """
        return self.log_probs(context.state, self.states(context, targets[..., :-1], train), targets, smoothing)

    def log_probs(
        self,
        first: jax.Array,
        states: jax.Array,
        targets: jax.Array,
        smoothing: float = 0.0,
        priors: Sequence[jax.Array] | None = None,
    ) -> jax.Array:
        """As `score`, from the states that predict the first codes ([B, D], or [B, L, D]) and the others.

        `priors` as for `target_log_probs`.
        """
        cfg = self.config
        return target_log_probs(self._table(), first, states, targets, cfg.levels, cfg.restrict, smoothing, priors)

    def states(self, context: CausalContext, codes: jax.Array, train: bool = False) -> jax.Array:
        """States of codes int32 [B, L, M] (RankGR Eq. 3): [B, L, M, D], the m-th predicts the code after the m-th."""
        if codes.shape[-1] == 0:
            return jnp.zeros((*codes.shape, self.config.width), self.config.dtype)
        return self._continue(to_tokens(codes, self.config.levels), context, None, train)[0]

    def extend(self, context: CausalContext, tokens: jax.Array | None, cache: dict | None, level: int):
        """One more code for every beam: codes int32 [B, W] of level - 1 -> (log-probabilities [B, W, K], cache).

        At level 0 there are no codes and W is 1. The cache holds, per layer, the K/V [B, W, t, G, H] of the codes so
        far. K is the level's size, or V without levels.
        """
        state, cache = self.extend_state(context, tokens, cache, level)
        return self.level_log_probs(state, level), cache

    def extend_state(self, context: CausalContext, tokens: jax.Array | None, cache: dict | None, level: int):
        """As `extend`, but the states [B, W, D] that the level's codes are predicted from."""
        if level == 0:
            return context.state[:, None], {}
        entered = to_tokens(tokens[..., None], self.config.levels, level - 1)
        states, own = self._continue(entered, context, cache["own"] if level > 1 else None, False)
        return states[:, :, 0], {"own": own}

    def level_log_probs(self, states: jax.Array, level: int, prior: jax.Array | None = None) -> jax.Array:
        """Log-probabilities float32 [..., K] of a level's codes from states [..., D]; prior: [..., K] to begin with."""
        return level_log_probs(self._table(), states, level, self.config.levels, self.config.restrict, prior)

    def _continue(self, tokens: jax.Array, context: CausalContext, past: tuple[KeyValue, ...] | None, train: bool):
        """Tokens int32 [B, L, M] after the context and their past -> (states [B, L, M, D], each layer's own K/V)."""
        earlier = 0 if past is None else past[0][0].shape[2]
        length = context.length if context.length.ndim == 2 else context.length[:, None]
        positions = length[..., None] + jnp.arange(earlier, earlier + tokens.shape[-1])
        x, own = self.target_drop(self.embed(tokens), deterministic=not train), []
        for index, layer in enumerate(self.layers):
            before = None if past is None else past[index]
            x, kv = layer.targets(x, context.own[index], context.mask, before, positions, train)
            own.append(kv)
        return self.norm(x), tuple(own)

    def _table(self) -> jax.Array:
        return (self.embed if self.head is None else self.head).table

    def __call__(self, tokens: jax.Array, mask: jax.Array, targets: jax.Array) -> jax.Array:
        """Touches every part once; for `init`."""
        return self.score(self.prefill(tokens, mask), targets)
