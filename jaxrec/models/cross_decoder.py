"""OneMall's model (§3.2): Query-Formers over long histories, a cross-attention decoder with sparse experts.

    features ──▶ prefill ──▶ Context: per layer K/V of {F_click, F_buy, ..., recent items}, BOS already decoded
                                │
                 targets ──▶ score:  [B, L, M] log-probabilities, all targets against the one context
                 beams   ──▶ extend: one more level for every beam, its cache is [B, W, t, N, H]

BOS is the same token in every target, so it belongs to the context: it is decoded once, and the first level's
distribution is part of the context.

Beside the decoder stands the *habit* distribution over the items of the user's own past (`HabitHead`): people buy again
what they bought. The two are mixed as distributions over whole IDs, with a learned share per user, and every level's
probability follows from the mixture by the chain rule, so that training, scoring and the beam stay exact.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxrec.models.context import CatalogueArrays, Context, ContextFeatures, EventSequence
from jaxrec.models.habit import HabitHead, mixture
from jaxrec.models.pointer import Copied
from jaxrec.nn.attention import KeyValue, TargetAttention
from jaxrec.nn.layers import Embedding, FeedForward, Projection, RMSNorm
from jaxrec.nn.moe import Dispatch, MixtureOfExperts
from jaxrec.nn.qformer import QFormer
from jaxrec.nn.transformer import dropped


@dataclass(frozen=True)
class CrossDecoderConfig:
    """Sizes and parts of OneMall's model."""

    width: int = 128
    """model width D"""
    heads: int = 4
    """attention heads N; head width is width / heads"""
    layers: int = 2
    """decoder layers"""
    hidden: int = 256
    """width F of one expert (of the feed-forward when experts is 1)"""
    experts: int = 8
    """experts E per layer; 1 for a dense feed-forward"""
    experts_per_token: int = 2
    """experts that a token goes through"""
    dispatch: Dispatch = "auto"
    """how experts are run; see jaxrec/nn/moe.py"""
    balance_rate: float = 1e-3
    """step of the router's bias, per training step (loss-free balancing)"""
    queries: int = 16
    """learned queries of each behavior's Query-Former (Eq. 3); 0 gives the decoder the uncompressed sequences"""
    qformer_layers: int = 1
    """layers of each Query-Former"""
    recent: int = 64
    """most recent distinct items that the decoder sees uncompressed"""
    places: bool = False
    """recent items say which is the last, the one before it, ..., and the decoder begins with the last; for logs of one
    item a session, where that tells more than days do"""
    prior: bool = True
    """start the decoder from the catalogue's popularity; off, it must learn which IDs exist and how popular each is"""
    habit: bool = True
    """mix in the distribution over the items of the user's own past"""
    item_queries: int = 2
    """learned queries of the item tower's Query-Former (Eq. 4)"""
    item_embedding: bool = True
    """an embedding per item beside its codes and attributes in the history; off for catalogues with many new items"""
    dropout: float = 0.0
    """dropout of what every block of the decoder adds, in training"""
    context_dropout: float = 0.0
    """dropout on the items of the past and of the histories, in training"""
    dtype: str = "float32"
    """type of activations"""


class ItemTower(nn.Module):
    """f_item = MLP(Flatten(QFormer(features of the item))) (OneMall Eq. 4): [..., S, D] -> [..., D]."""

    config: CrossDecoderConfig

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        cfg = self.config
        flat = features.reshape(-1, *features.shape[-2:])
        qformer = QFormer(cfg.item_queries, cfg.heads, cfg.width // cfg.heads, cfg.width, name="qformer")
        read = qformer(flat, jnp.ones(flat.shape[:2], bool)).reshape(len(flat), -1)
        hidden = nn.gelu(Projection(cfg.width, ("embed", "mlp"), name="up")(read))
        return Projection(cfg.width, ("mlp", "embed"), name="down")(hidden).reshape(*features.shape[:-2], cfg.width)


class CrossDecoderLayer(nn.Module):
    """Cross-attention (Eq. 5), causal self-attention and sparse MoE (Eq. 6), each pre-norm with a residual.

    The equations print no norm and one residual around all three; that does not train beyond a layer or two.
    """

    config: CrossDecoderConfig

    def setup(self):
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)
        self.cross = TargetAttention(cfg.heads, cfg.width // cfg.heads, dtype)
        self.self_attention = TargetAttention(cfg.heads, cfg.width // cfg.heads, dtype)
        self.norm = RMSNorm()
        self.drop = nn.Dropout(cfg.dropout)
        if cfg.experts > 1:
            self.moe = MixtureOfExperts(cfg.experts, cfg.experts_per_token, cfg.hidden, cfg.dispatch, dtype)
        else:
            self.feed_forward = FeedForward(cfg.hidden, dtype)

    def __call__(self, x, cross: KeyValue, mask, bos: KeyValue | None, past: KeyValue | None, where=None, train=False):
        """x [B, L, M, D]; `past` K/V [B, L, t, N, H] of the earlier tokens of each target.

        Returns x and the targets' own K/V, `past` included.
        """
        x = nn.with_logical_constraint(x, ("act_batch", "act_targets", None, "act_embed"))
        x = dropped(x, self.cross(x, cross, mask), self.drop, train)
        own = self.self_attention.own_kv(x)
        if past is not None:
            own = tuple(jnp.concatenate([p, o], axis=2) for p, o in zip(past, own, strict=True))
        x = dropped(x, self.self_attention(x, bos, None, own), self.drop, train)
        normed = self.norm(x)
        if self.config.experts > 1:
            where = None if where is None else jnp.broadcast_to(where[..., None], x.shape[:-1])
            out = self.moe(normed, where)
        else:
            out = self.feed_forward(normed)
        return x + self.drop(out, deterministic=not train), own


class CrossDecoder(nn.Module):
    """OneMall's model over semantic IDs with `codebook_sizes` and items with attributes of `attribute_sizes`."""

    config: CrossDecoderConfig
    behaviors: tuple[str, ...]
    codebook_sizes: tuple[int, ...]
    attribute_sizes: tuple[int, ...]
    items: int
    ages: int

    def setup(self):
        cfg = self.config
        self.codes = [Embedding(size, cfg.width) for size in self.codebook_sizes]
        self.heads = [Embedding(size, cfg.width) for size in self.codebook_sizes]
        self.attributes = [Embedding(size, cfg.width) for size in self.attribute_sizes]
        self.item = Embedding(self.items, cfg.width) if cfg.item_embedding else None
        self.embedding_in = Projection(cfg.width, (None, "embed"))
        self.age = Embedding(self.ages, cfg.width)
        self.kinds = Embedding(len(self.behaviors) + 1, cfg.width)  # one a behavior, the last for the distinct items
        self.table_norm = RMSNorm()
        self.places = Embedding(cfg.recent, cfg.width) if cfg.places else None
        self.last_in = Projection(cfg.width, (None, "embed")) if cfg.places else None
        self.habit_in = Projection(cfg.width, (None, "embed"))
        self.user_in = Projection(cfg.width, (None, "embed"))
        self.bos = self.param(
            "bos", nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",)), (cfg.width,)
        )
        self.levels = Embedding(len(self.codebook_sizes), cfg.width)
        if cfg.queries:
            self.qformers = [
                QFormer(cfg.queries, cfg.heads, cfg.width // cfg.heads, 2 * cfg.width, cfg.qformer_layers)
                for _ in self.behaviors
            ]
        self.memory_norm = RMSNorm()
        self.decoder = [CrossDecoderLayer(cfg) for _ in range(cfg.layers)]
        self.out_norm = RMSNorm()
        self.habit = HabitHead(cfg.width) if cfg.habit else None
        self.item_tower = ItemTower(cfg)
        self.match = Projection(cfg.width, ("embed", "mlp"))
        self.context_drop = nn.Dropout(cfg.context_dropout)

    # ---- the context -------------------------------------------------------------------------------------------------

    def prefill(
        self,
        features: ContextFeatures,
        catalogue: CatalogueArrays,
        train: bool = False,
        table: jax.Array | None = None,
        where: jax.Array | None = None,
    ) -> Context:
        """Encode what is known of B users once (OneMall Eq. 3).

        `table` is what `item_table` gave; who answers many requests with the same parameters makes it once. `where` [B]
        keeps rows that are padding out of the experts.
        """
        table = self.item_table(catalogue) if table is None else table
        past = self._tokens(table, features.past, len(self.behaviors)) + self.habit_in(features.habit)
        recent = self._recent(past, train)
        memory, mask = self._memory(features, table, recent, train)
        cross = tuple(layer.cross.context_kv(memory) for layer in self.decoder)
        x = self._begin(features, recent).astype(self.config.dtype)[:, None, None]
        bos, where = [], None if where is None else where[:, None]
        for layer, kv in zip(self.decoder, cross, strict=True):
            x, own = layer(x, kv, mask, None, None, where, train)
            bos.append((own[0][:, 0], own[1][:, 0]))
        state = self.out_norm(x[:, 0, 0])
        codes, weights, share = self._habit(features, catalogue, past, state)
        prior = catalogue.prior if self.config.prior else None
        return Context(cross, tuple(bos), mask, state, codes, weights, share, features.period, prior)

    def _recent(self, past: jax.Array, train: bool) -> jax.Array:
        """The items of the past that are read uncompressed, [B, R, D]."""
        recent = self._dropped(past[:, : self.config.recent], train)
        return recent if self.places is None else recent + self.places.table[: recent.shape[1]]

    def _memory(self, features: ContextFeatures, table: jax.Array, recent: jax.Array, train: bool):
        """(memory [B, S, D], mask bool [B, S]): the recent items, and what Query-Formers make of each behavior."""
        memory, mask = [recent], [features.past.mask[:, : recent.shape[1]]]
        for index, behavior in enumerate(self.behaviors):
            sequence = features.history[behavior]
            tokens = self._dropped(self._tokens(table, sequence, index), train)
            if self.config.queries:
                tokens = self.qformers[index](tokens, sequence.mask)
                mask.append(jnp.broadcast_to(sequence.mask.any(1, keepdims=True), tokens.shape[:2]))
            else:
                mask.append(sequence.mask)
            memory.append(tokens)
        memory = self.memory_norm(jnp.concatenate(memory, axis=1)).astype(self.config.dtype)
        memory = nn.with_logical_constraint(memory, ("act_batch", "act_length", "act_embed"))
        return memory, jnp.concatenate(mask, axis=1)

    def _begin(self, features: ContextFeatures, recent: jax.Array) -> jax.Array:
        """What goes in for BOS, [B, D]."""
        begin = self.bos + self.user_in(features.user)
        if self.last_in is None:
            return begin
        return begin + self.last_in(recent[:, 0]) * features.past.mask[:, :1]

    def item_table(self, catalogue: CatalogueArrays) -> jax.Array:
        """One vector an item, [I, D]: the sum of what is known of it; made once, then gathered by every history."""
        parts = [embed(catalogue.codes[:, level]) for level, embed in enumerate(self.codes)]
        parts += [embed(catalogue.attributes[:, i]) for i, embed in enumerate(self.attributes)]
        if self.item is not None:
            parts.append(self.item.table)
        parts.append(self.embedding_in(catalogue.embeddings))
        return self.table_norm(sum(parts))

    def _tokens(self, table: jax.Array, sequence: EventSequence, kind: int) -> jax.Array:
        ages = self.age.table + self.kinds(jnp.array(kind))  # added in the small table, not in every token
        return jnp.take(table, sequence.item, axis=0) + jnp.take(ages, sequence.age, axis=0)

    def _dropped(self, tokens: jax.Array, train: bool) -> jax.Array:
        return self.context_drop(tokens, deterministic=not train)

    def _habit(self, features: ContextFeatures, catalogue: CatalogueArrays, past, state):
        if self.habit is None:
            batch = state.shape[0]
            codes = jnp.zeros((batch, 1, len(self.codebook_sizes)), jnp.int32)
            return codes, jnp.zeros((batch, 1)), jnp.zeros(batch)
        weights, share = self.habit(past, features.habit, features.past.mask, state, features.user)
        return catalogue.codes[features.past.item], weights, share

    # ---- scoring given targets ---------------------------------------------------------------------------------------

    def score(self, context: Context, targets: jax.Array, where=None, train: bool = False):
        """Log-probabilities [B, L, M] of every token of targets int32 [B, L, M], and the last token's state [B, L, D].

        The state is s_M of Eq. 7: it has read the whole ID. `where` [B, L] keeps padding out of the experts.
        """
        levels = range(targets.shape[-1])
        x = jnp.stack([self._code_token(targets[..., level], level) for level in levels], axis=2)
        x, _ = self._decode(x, context, None, where, train)
        first = jnp.broadcast_to(context.state[:, None, None], (*targets.shape[:2], 1, x.shape[-1]))
        states = jnp.concatenate([first, x[:, :, :-1]], axis=2)  # the state that predicts each level
        generated, nodes = [], jnp.zeros(targets.shape[:2], jnp.int32)
        for level in levels:
            log_probs = jax.nn.log_softmax(self._logits(states[:, :, level], level, context, nodes))
            generated.append(_pick(log_probs, targets[..., level]))
            if context.prior is not None:
                nodes, _ = context.prior.step(level, nodes, targets[..., level], context.period)
        return self._mix(jnp.stack(generated, -1), context, targets), x[:, :, -1]

    def _mix(self, generated: jax.Array, context: Context, targets: jax.Array) -> jax.Array:
        """Log-probabilities [B, L, M] of the mixture of decoder and habit, by the chain rule over levels."""
        if self.habit is None:
            return generated
        same = context.habit_codes[:, None] == targets[:, :, None]  # [B, L, S, M]
        prefix = jnp.cumprod(same.astype(jnp.float32), axis=-1)
        habit = jnp.einsum("BLSM,BS->BLM", prefix, context.habit_weights)
        joint = mixture(context.share[:, None, None], jnp.cumsum(generated, -1), habit)
        return jnp.diff(joint, prepend=0.0, axis=-1)

    def _logits(self, state: jax.Array, level: int, context: Context, nodes: jax.Array) -> jax.Array:
        """The decoder's own logits [B, L, K] of a level, from the state [B, L, D] and the prior's nodes [B, L]."""
        logits = self.heads[level].attend(state)
        return logits if context.prior is None else logits + context.prior.logits(level, nodes, context.period)

    def _code_token(self, codes: jax.Array, level: int) -> jax.Array:
        return (self.codes[level](codes) + self.levels(jnp.array(level))).astype(self.config.dtype)

    def _decode(self, x, context: Context, past, where=None, train: bool = False):
        """x [B, L, M, D] through the layers -> (normed x, each layer's own K/V of every target)."""
        own = []
        for index, layer in enumerate(self.decoder):
            earlier = None if past is None else past[index]
            x, kv = layer(x, context.cross[index], context.mask, context.bos[index], earlier, where, train)
            own.append(kv)
        return self.out_norm(x), tuple(own)

    # ---- decoding ----------------------------------------------------------------------------------------------------

    def extend(self, context: Context, tokens: jax.Array | None, cache: dict | None, level: int):
        """One more level for every beam: tokens int32 [B, W] of level - 1 -> (log-probabilities [B, W, K], cache).

        At level 0 there are no tokens and W is 1. The cache holds, per beam: `own`, the layers' K/V [B, W, t, N, H];
        `state` [B, W, D] and `log_z` [B, W], from which the chosen token's probability follows; `node` [B, W], where
        the prefix leads in the prior; `generated` [B, W], the prefix's log-probability under the decoder alone;
        `habit` [B, W, S], the weights of the past's items that begin with the prefix.
        """
        if level == 0:
            state = context.state[:, None]
            cache = {"generated": jnp.zeros(state.shape[:2]), "node": jnp.zeros(state.shape[:2], jnp.int32)}
            if self.habit is not None:
                cache["habit"] = context.habit_weights[:, None]
        else:
            chosen = jnp.einsum("BWD,BWD->BW", cache["state"], self.heads[level - 1](tokens)) - cache["log_z"]
            x, own = self._decode(self._code_token(tokens, level - 1)[:, :, None], context, cache.get("own"))
            state = x[:, :, 0]
            cache = {**cache, "own": own, "generated": cache["generated"] + chosen}
            if context.prior is not None:
                cache["node"], edge = context.prior.step(level - 1, cache["node"], tokens, context.period)
                cache["generated"] += edge
            if self.habit is not None:
                begins = context.habit_codes[:, None, :, level - 1] == tokens[..., None]
                cache["habit"] = cache["habit"] * begins
        logits = self._logits(state, level, context, cache["node"])
        log_z = jax.nn.logsumexp(logits, axis=-1)
        cache = {**cache, "state": state, "log_z": log_z}
        return self._next(context, logits - log_z[..., None], cache, level), cache

    def _next(self, context: Context, log_probs: jax.Array, cache: dict, level: int) -> jax.Array:
        """The mixture's distribution over the next code, given the decoder's [B, W, K] and the beams' cache."""
        if self.habit is None:
            return log_probs
        copied = Copied(context.share[:, None], cache["generated"], cache["habit"])
        return copied.mix(log_probs, context.habit_codes[..., level])

    # ---- the auxiliary task ------------------------------------------------------------------------------------------

    def contrast(self, state: jax.Array, items: jax.Array, catalogue: CatalogueArrays) -> jax.Array:
        """Scores [R, C] of the states s_M [R, D] against the item tower's f_item of items int32 [C] (Eq. 4, 7).

        Cosine over a temperature of 0.05.
        """
        wanted, tower = self.match(state), self.item_tower(self._item_features(items, catalogue))
        return jnp.einsum("RD,CD->RC", _unit(wanted), _unit(tower)) / 0.05

    def _item_features(self, items: jax.Array, catalogue: CatalogueArrays) -> jax.Array:
        """What the item tower reads: one token a code, an attribute and the item itself, [C, F, D]."""
        parts = [embed(catalogue.codes[items, level]) for level, embed in enumerate(self.codes)]
        parts += [embed(catalogue.attributes[items, i]) for i, embed in enumerate(self.attributes)]
        if self.item is not None:
            parts.append(self.item(items))
        parts.append(self.embedding_in(catalogue.embeddings[items]))
        return jnp.stack(parts, axis=1)

    def __call__(self, features: ContextFeatures, targets: jax.Array, catalogue: CatalogueArrays):
        """Touches every part once; for `init`. features of B users, targets int32 [B, L] (items)."""
        context = self.prefill(features, catalogue)
        log_probs, state = self.score(context, catalogue.codes[targets])
        flat = targets.reshape(-1)
        return log_probs, self.contrast(state.reshape(len(flat), -1), flat, catalogue)


def _pick(log_probs: jax.Array, codes: jax.Array) -> jax.Array:
    return jnp.take_along_axis(log_probs, codes[..., None], axis=-1)[..., 0]


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-8)
