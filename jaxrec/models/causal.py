"""Qwen2 and Qwen3 for generative retrieval (RankGR): context and targets go through the same causal layers.

    tokens ──▶ prefill ──▶ CausalContext: per layer K/V of the context, and the state of every position
                              ├─ at(last): a view of it in which each target sees the part up to a position
               targets ──▶ score:  [B, L, M] log-probabilities under the mask of RankGR Eq. 7, which is never built
               beams   ──▶ extend: one more code for every beam, its cache is [B, W, t, N, H] a layer

The states of all positions predict every next token of the context as well (`score_context`, RankGR Eq. 2).

The context's last token predicts the first code of every target, so a target of M codes costs M - 1 tokens. Positions
count real tokens only: padding on either side of a context changes nothing, and every target continues where its
context ends. Weights as Hugging Face has them are read by `jaxrec.models.huggingface`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxrec.config import UserError, check_choice, check_least, check_shares
from jaxrec.models.contract import Scored, score_targets
from jaxrec.models.prior import Prior
from jaxrec.models.vocabulary import (
    ContextTokens,
    Levels,
    check_levels,
    level_log_probs,
    level_logits,
    to_tokens,
    token_log_probs,
)
from jaxrec.nn.attention import KeyValue
from jaxrec.nn.layers import DTYPES, Dropout, Embedding, RMSNorm
from jaxrec.nn.transformer import FeedForwardBlock, SelfAttention, dropped


@dataclass(frozen=True)
class CausalConfig:
    """Sizes and parts of a Qwen2 (Qwen2.5) or, with `head_norm` in place of `bias`, of a Qwen3."""

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
    head_norm: bool = False
    """every head's query and key are normalised"""
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

    @property
    def embed_scale(self) -> float:
        """Initial standard deviation of the embeddings, and of what a block adds to them: logits begin with a variance
        of 1."""
        return self.width**-0.5

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
    """A prefilled context. Never copied per target. X is 1, or L in a view of which each target sees another part.

    own: per layer K/V [B, S, G, H]; states [B, S, D] of all positions, each of which predicts the token after it; mask
    bool [B, X, S]; length int32 [B, X]: real tokens, which is the position of a target's first code; state [B, X, D] of
    the last real token, from which the first code is predicted; prior: added to the logits of the codes.
    """

    own: tuple[KeyValue, ...]
    states: jax.Array
    mask: jax.Array
    length: jax.Array
    state: jax.Array
    prior: Prior | None = None

    def at(self, last: jax.Array) -> "CausalContext":
        """A view: target l sees the positions up to last int32 [B, L], each of a real token."""
        mask = self.mask & (jnp.arange(self.mask.shape[-1]) <= last[..., None])
        state = jnp.take_along_axis(self.states, last[..., None], axis=1)
        return self.replace(mask=mask, length=mask.sum(-1).astype(jnp.int32), state=state)


class CausalLayer(nn.Module):
    """Causal self-attention and a gated feed-forward."""

    config: CausalConfig

    def setup(self):
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)
        # A block's initial output is as small as the embeddings, which it would drown otherwise.
        gain = cfg.embed_scale
        self.attention = SelfAttention(
            *(cfg.width, cfg.heads, cfg.groups, cfg.head_dim, cfg.bias, cfg.rotary_base, None, cfg.epsilon, dtype),
            out_gain=gain,
            head_norm=cfg.head_norm,
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

    def _feed_forward(self, x: jax.Array, attended: jax.Array, drop: Dropout, train: bool) -> jax.Array:
        x = dropped(x, attended, drop, train)
        return dropped(x, self.feed_forward(x), drop, train)


def dropouts(config: CausalConfig) -> tuple[Dropout, Dropout]:
    """Of the context and of the targets."""
    rate = config.target_dropout
    return Dropout(config.dropout), Dropout(config.dropout if rate is None else rate)


class Causal(nn.Module):
    """Qwen2 or Qwen3 with the three verbs."""

    config: CausalConfig

    def setup(self):
        cfg = self.config
        table = cfg.vocabulary, cfg.width, jnp.dtype(cfg.dtype), cfg.embed_scale
        self.embed, self.head = Embedding(*table), None if cfg.tied else Embedding(*table)
        self.layers = [CausalLayer(cfg) for _ in range(cfg.layers)]
        self.norm = RMSNorm(cfg.epsilon)
        self.drop, self.target_drop = dropouts(cfg)

    def prefill(self, inputs: ContextTokens, train: bool = False) -> CausalContext:
        """Read B contexts once; padding stands on either side.

        A row without any token gives finite numbers that mean nothing.
        """
        return self.read(inputs.vectors(self.embed), inputs.seen, train, inputs.prior)

    def read(self, x: jax.Array, mask: jax.Array, train: bool = False, prior: Prior | None = None) -> CausalContext:
        """As `prefill`, of positions that are given as vectors x [B, S, D] in place of tokens."""
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
        state = jnp.take_along_axis(states, last[:, None, None], axis=1)
        return CausalContext(tuple(own), states, mask[:, None], length[:, None], state, prior)

    def score_context(self, states: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Log-probability float32 [B, S] of every token of the context given those before it (RankGR Eq. 2).

        `states` [B, S, D] are those of the context. The first token of a row and padding give 0. With
        `config.restrict` a token of a level's slice is normalised over that slice.
        """
        cfg = self.config
        found = token_log_probs(self._table(), states[:, :-1], tokens[:, 1:], cfg.levels, cfg.restrict)
        return jnp.pad(jnp.where(mask[:, 1:] & mask[:, :-1], found, 0.0), ((0, 0), (1, 0)))

    def score(
        self, context: CausalContext, targets: jax.Array, where: jax.Array | None = None, train: bool = False
    ) -> Scored:
        """Every code of targets int32 [B, L, M] (RankGR Eq. 4 and 7)."""
        rest = self.states(context, targets[..., :-1], train)
        return score_targets(self._level_logits, context.state, rest, targets, context.prior)

    def states(self, context: CausalContext, codes: jax.Array, train: bool = False) -> jax.Array:
        """States of codes int32 [B, L, M] (RankGR Eq. 3): [B, L, M, D], the m-th predicts the code after the m-th."""
        if codes.shape[-1] == 0:
            return jnp.zeros((*codes.shape, self.config.width), self.config.dtype)
        return self._continue(to_tokens(codes, self.config.levels), context, None, train)[0]

    def extend(self, context: CausalContext, tokens: jax.Array | None, cache: dict | None, level: int):
        """One more code for every beam: codes int32 [B, W] of level - 1 -> (log-probabilities [B, W, K], cache).

        The cache holds, per layer, the K/V [B, W, t, G, H] of the codes so far, and with a prior the node int32 [B, W]
        of the prefix. K is the level's size, or V without levels.
        """
        before = cache or {}
        state, own = self.extend_states(context, tokens, before.get("own"), level)
        log_probs, node = self.next_codes(context, state, tokens, before.get("node"), level)
        return log_probs, {"own": own, "node": node}

    def extend_states(
        self, context: CausalContext, tokens: jax.Array | None, past: tuple[KeyValue, ...] | None, level: int
    ) -> tuple[jax.Array, tuple[KeyValue, ...]]:
        """As `extend`, but the states [B, W, D] that predict the level's codes, and each layer's K/V of the codes."""
        if level == 0:
            return context.state, ()
        entered = to_tokens(tokens[..., None], self.config.levels, level - 1)
        states, own = self._continue(entered, context, past or None, False)
        return states[:, :, 0], own

    def next_codes(
        self, context: CausalContext, states: jax.Array, tokens: jax.Array | None, node: jax.Array | None, level: int
    ) -> tuple[jax.Array, jax.Array | None]:
        """Log-probabilities float32 [B, L, K] of a level's codes after L prefixes, and the prefixes' nodes.

        states [B, L, D] predict the codes; tokens int32 [B, L] are those of level - 1; node int32 [B, L] is the prior's
        node of the prefix without them, None without a prior.
        """
        prior = None
        if context.prior is not None:
            node, prior = context.prior.after(level, node, tokens, states.shape[:2])
        cfg = self.config
        return level_log_probs(self._table(), states, level, cfg.levels, cfg.restrict, prior), node

    def _level_logits(self, level: int, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        return level_logits(self._table(), states, level, self.config.levels, self.config.restrict)

    def _continue(self, tokens: jax.Array, context: CausalContext, past: tuple[KeyValue, ...] | None, train: bool):
        """Tokens int32 [B, L, M] after the context and their past -> (states [B, L, M, D], each layer's own K/V)."""
        earlier = 0 if past is None else past[0][0].shape[2]
        positions = context.length[..., None] + jnp.arange(earlier, earlier + tokens.shape[-1])
        x, own = self.target_drop(self.embed(tokens), deterministic=not train), []
        for index, layer in enumerate(self.layers):
            before = None if past is None else past[index]
            x, kv = layer.targets(x, context.own[index], context.mask, before, positions, train)
            own.append(kv)
        return self.norm(x), tuple(own)

    def _table(self) -> jax.Array:
        return (self.embed if self.head is None else self.head).table

    def __call__(self, inputs: ContextTokens, targets: jax.Array) -> jax.Array:
        """Touches every part once; for `init`."""
        return self.score(self.prefill(inputs), targets).log_probs
