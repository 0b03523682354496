"""OneMall's model (§3.2): Query-Formers over long histories, a cross-attention decoder with sparse experts.

    features ──▶ prefill ──▶ CrossContext: per layer K/V of {F_click, F_buy, ..., recent items}, BOS already decoded
                                │
                 targets ──▶ score:  [B, L, M] log-probabilities, all targets against the one context
                 beams   ──▶ extend: one more level for every beam, its cache is [B, W, t, N, H]

BOS is the same token in every target, so it belongs to the context: it is decoded once, and the first level's
distribution is part of the context.

Beside the decoder stands the *habit* distribution over the items of the user's own past: people buy again what they
bought. `jaxrec.models.copying` mixes the two, with a learned share per user.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxrec.models.contract import Scored, score_targets
from jaxrec.models.copying import HabitHead, Points
from jaxrec.models.prior import Prior
from jaxrec.nn.attention import KeyValue, TargetAttention
from jaxrec.nn.layers import Dropout, Embedding, FeedForward, Projection, RMSNorm
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
    """recent items have an embedding of their place, counted from the last, and the last item is added to BOS; for logs
    of one item a session, where places tell more than days do"""
    prior: bool = True
    """add the log-probability of codes under the catalogue's popularity to the decoder's logits; off, the decoder must
    learn which IDs exist and how popular each is"""
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


@struct.dataclass
class CatalogueArrays:
    """The features of all items: codes int32 [I, M], attributes int32 [I, A], embeddings float32 [I, d].

    `log_q` float32 [I] is the log-probability that an item is drawn as a target; `prior` is a distribution over IDs,
    which is added to the decoder's logits, or None.
    """

    codes: jax.Array
    attributes: jax.Array
    embeddings: jax.Array
    log_q: jax.Array
    prior: Prior | None = None


@struct.dataclass
class EventSequence:
    """Some of a user's events: item int32 [B, S], age int32 [B, S] (bucket), mask bool [B, S]."""

    item: jax.Array
    age: jax.Array
    mask: jax.Array


@struct.dataclass
class ContextFeatures:
    """A context, as arrays: history {behavior: EventSequence}, the distinct items of the past, and the moment.

    past: the distinct target items, the most recent first; habit float32 [B, S, 4]: how often, how long ago, ... each
    was taken (jaxrec/data/features.py); user float32 [B, 4]: how much is known of the user;
    period int32 [B]: the period of the prior at the moment of the context.
    """

    history: dict[str, EventSequence]
    past: EventSequence
    habit: jax.Array
    user: jax.Array
    period: jax.Array


@struct.dataclass
class CrossInputs:
    """What `CrossDecoder.prefill` reads.

    table float32 [I, D]: the catalogue's `item_table`, for callers that make it once for many requests; where bool [B]:
    the contexts that exist, of which all others are kept out of the experts.
    """

    features: ContextFeatures
    catalogue: CatalogueArrays
    table: jax.Array | None = None
    where: jax.Array | None = None


@struct.dataclass
class CrossContext:
    """A prefilled context. Never copied per target.

    cross, bos: per layer K/V [B, S, N, H] and [B, 1, N, H]; mask bool [B, S]; state [B, 1, D] of BOS, from which the
    first level is predicted; points: the distribution over the past's distinct items, if it is mixed in, and codes
    int32 [B, S, M] of these items; prior: the catalogue's, in period int32 [B].
    """

    cross: tuple[KeyValue, ...]
    bos: tuple[KeyValue, ...]
    mask: jax.Array
    state: jax.Array
    points: Points | None
    codes: jax.Array
    period: jax.Array
    prior: Prior | None

    def first(self, count: int) -> "CrossContext":
        """The first `count` of the contexts."""
        cut = jax.tree.map(lambda x: x[:count], self.replace(prior=None))
        return cut.replace(prior=self.prior)


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
        self.drop = Dropout(cfg.dropout)
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
        self.context_drop = Dropout(cfg.context_dropout)

    # ---- the context -------------------------------------------------------------------------------------------------

    def prefill(self, inputs: CrossInputs, train: bool = False) -> CrossContext:
        """Encode the histories of B users once (OneMall Eq. 3)."""
        features, catalogue = inputs.features, inputs.catalogue
        table = self.item_table(catalogue) if inputs.table is None else inputs.table
        past = self._tokens(table, features.past, len(self.behaviors)) + self.habit_in(features.habit)
        recent = self._recent(past, train)
        memory, mask = self._memory(features, table, recent, train)
        cross = tuple(layer.cross.context_kv(memory) for layer in self.decoder)
        x = self._begin(features, recent).astype(self.config.dtype)[:, None, None]
        bos, where = [], None if inputs.where is None else inputs.where[:, None]
        for layer, kv in zip(self.decoder, cross, strict=True):
            x, own = layer(x, kv, mask, None, None, where, train)
            bos.append((own[0][:, 0], own[1][:, 0]))
        state, points = self.out_norm(x[:, :, 0]), None
        if self.habit is not None:
            points = self.habit(past, features.habit, features.past.mask, state[:, 0], features.user)
        prior = catalogue.prior if self.config.prior else None
        codes = catalogue.codes[features.past.item]
        return CrossContext(cross, tuple(bos), mask, state, points, codes, features.period, prior)

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

    # ---- scoring given targets ---------------------------------------------------------------------------------------

    def score(
        self, context: CrossContext, targets: jax.Array, where: jax.Array | None = None, train: bool = False
    ) -> Scored:
        """Every code of targets int32 [B, L, M]; `end` is s_M of Eq. 7, which has read the whole ID.

        `where` [B, L] keeps padding out of the experts.
        """
        levels = range(targets.shape[-1])
        x = jnp.stack([self._code_token(targets[..., level], level) for level in levels], axis=2)
        x, _ = self._decode(x, context, None, where, train)
        scored = score_targets(
            self._level_logits, context.state, x[:, :, :-1], targets, context.prior, context.period
        ).replace(end=x[:, :, -1])
        return scored if context.points is None else context.points.along(scored, targets, context.codes)

    def _level_logits(self, level: int, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = self.heads[level].attend(states)
        return logits, jax.nn.logsumexp(logits, axis=-1)

    def _code_token(self, codes: jax.Array, level: int) -> jax.Array:
        return (self.codes[level](codes) + self.levels(jnp.array(level))).astype(self.config.dtype)

    def _decode(self, x, context: CrossContext, past, where=None, train: bool = False):
        """x [B, L, M, D] through the layers -> (normed x, each layer's own K/V of every target)."""
        own = []
        for index, layer in enumerate(self.decoder):
            earlier = None if past is None else past[index]
            x, kv = layer(x, context.cross[index], context.mask, context.bos[index], earlier, where, train)
            own.append(kv)
        return self.out_norm(x), tuple(own)

    # ---- decoding ----------------------------------------------------------------------------------------------------

    def extend(self, context: CrossContext, tokens: jax.Array | None, cache: dict | None, level: int):
        """One more level for every beam: tokens int32 [B, W] of level - 1 -> (log-probabilities [B, W, K], cache).

        At level 0 there are no tokens and W is 1. The cache holds, per beam: `own`, the layers' K/V [B, W, t, N, H];
        `node` [B, W], the prior's node of the prefix; and where the past is mixed in `copied`, its part in the prefix,
        with `state` [B, W, D] and `log_z` [B, W], from which the next token's log-probability follows.
        """
        before, node, edge, prior = cache or {}, None, 0.0, 0.0
        state, own = context.state, ()
        if level:
            x, own = self._decode(self._code_token(tokens, level - 1)[:, :, None], context, before["own"] or None)
            state = x[:, :, 0]
        if context.prior is not None:
            node = jnp.zeros(state.shape[:2], jnp.int32)
            if level:
                node, edge = context.prior.step(level - 1, before["node"], tokens, context.period)
            prior = context.prior.logits(level, node, context.period)
        logits = self.heads[level].attend(state) + prior
        log_z = jax.nn.logsumexp(logits, axis=-1)
        log_probs, cache = logits - log_z[..., None], {"own": own, "node": node}
        if context.points is None:
            return log_probs, cache
        copied = before["copied"] if level else context.points.begin()
        if level:
            # From the state: the log-probabilities of all codes are too many to keep and to reorder for every beam.
            chosen = jnp.einsum("BWD,BWD->BW", before["state"], self.heads[level - 1](tokens)) - before["log_z"]
            copied = copied.after(tokens, context.codes[..., level - 1], chosen + edge)
        mixed = copied.mix(log_probs, context.codes[..., level])
        return mixed, cache | {"copied": copied, "state": state, "log_z": log_z}

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

    def __call__(self, inputs: CrossInputs, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Touches every part once; for `init`."""
        scored = self.score(self.prefill(inputs), targets)
        state = scored.end.reshape(-1, self.config.width)
        return scored.log_probs, self.contrast(state, jnp.zeros(1, jnp.int32), inputs.catalogue)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-8)
