"""The item-level sequence models of the field: a history of items in, a vector in the space of the items out.

An item's score is the product of that vector with the item's row of the table, which is the table of the inputs too.
All but BERT4Rec are causal: the state at a place depends on the items up to it, so that every next item of a history is
a target of one pass. Sequences are aligned on the left, and positions count from their beginning. Two things that no
paper here has can be added to each, for comparison with models that have them: text embeddings and a popularity prior.

What they leave out of their papers is said in each. All share the norm (RMSNorm, before a block) and the places of
dropout (of what goes in, and of what a block adds); its rates, sizes and the optimiser's are each configuration's own.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.linen import initializers as init

from jaxrec.config import check_heads, check_least, check_shares
from jaxrec.nn.attention import masked_softmax
from jaxrec.nn.geometry import unit
from jaxrec.nn.layers import Dropout, Embedding, Projection, RMSNorm, partitioned
from jaxrec.nn.transformer import FeedForwardBlock, SelfAttention


@dataclass(frozen=True)
class EncoderSizes:
    """What every model has."""

    width: int = 128
    """width D of items and states"""
    dropout: float = 0.3
    """dropout of embeddings and of what each block adds, in training"""
    temperature: float = 0.0
    """what the cosine of state and item is divided by to be a score; 0: their product is, as most papers have it"""
    embeddings: bool = False
    """an item's vector is the sum of its own row and a projection of its text embedding"""
    prior: bool = False
    """the log-probability of an item under popularity is added to its score"""

    def __post_init__(self):
        check_least(self, "model", width=1, temperature=0)
        check_shares(self, "model", "dropout")


@dataclass(frozen=True)
class YouTubeDnnConfig(EncoderSizes):
    """YouTubeDNN (Covington et al. 2016, "Deep Neural Networks for YouTube Recommendations")."""

    hidden: tuple[int, ...] = (256,)
    """widths of the ReLU layers"""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, "model", hidden=1)


@dataclass(frozen=True)
class AttentionConfig(EncoderSizes):
    """What the models of attention blocks share."""

    layers: int = 2
    """blocks"""
    heads: int = 2
    """heads N of each attention"""
    hidden: int = 256
    """width F of each feed-forward"""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, "model", layers=1, hidden=1)
        check_heads(self.width, self.heads, "model.heads")


@dataclass(frozen=True)
class SasRecConfig(AttentionConfig):
    """SASRec (Kang & McAuley 2018, "Self-Attentive Sequential Recommendation")."""


@dataclass(frozen=True)
class Bert4RecConfig(AttentionConfig):
    """BERT4Rec (Sun et al. 2019, "Sequential Recommendation with Bidirectional Encoder Representations")."""

    masked: float = 0.3
    """share of the items that are hidden in training"""
    last_only: float = 0.2
    """share of the histories of which only the last item is hidden, as in use"""

    def __post_init__(self):
        super().__post_init__()
        check_shares(self, "model", "masked", "last_only")


@dataclass(frozen=True)
class CaserConfig(EncoderSizes):
    """Caser (Tang & Wang 2018, "Personalized Top-N Sequential Recommendation via Convolutional Sequence Embedding")."""

    window: int = 5
    """latest items that are read"""
    horizontal: int = 16
    """filters of each height"""
    vertical: int = 4
    """filters over the whole window"""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, "model", window=1, horizontal=1, vertical=1)


@dataclass(frozen=True)
class NextItNetConfig(EncoderSizes):
    """NextItNet (Yuan et al. 2019, "A Simple Convolutional Generative Network for Next Item Recommendation")."""

    dilations: tuple[int, ...] = (1, 4)
    """of the first convolution of each block; the second one's is twice that"""
    kernel: int = 3
    """places that a convolution reads"""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, "model", dilations=1, kernel=1)


@dataclass(frozen=True)
class CoreConfig(AttentionConfig):
    """CORE (Hou et al. 2022, "CORE: Simple and Effective Session-based Recommendation within Consistent Space")."""

    temperature: float = 0.07
    """what cosines are divided by"""


@dataclass(frozen=True)
class HstuConfig(EncoderSizes):
    """HSTU (Zhai et al. 2024, "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers")."""

    layers: int = 2
    """blocks"""
    heads: int = 2
    """heads N of each attention"""
    time_buckets: int = 32
    """buckets of the time between two events, each twice as long as the one before, from a second on"""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, "model", layers=1, time_buckets=1)
        check_heads(self.width, self.heads, "model.heads")


EncoderConfig = (
    YouTubeDnnConfig | SasRecConfig | Bert4RecConfig | CaserConfig | NextItNetConfig | CoreConfig | HstuConfig
)


@struct.dataclass
class ItemFacts:
    """What is known of all items before training.

    log_q: float32 [I], the log of each item's share of the training events.
    embeddings: float32 [I, E] of unit length, made of the items' texts; None where the model doesn't read them.
    """

    log_q: jax.Array
    embeddings: jax.Array | None = None


class SequentialModel(nn.Module):
    """The items' table and the encoder of a configuration."""

    config: EncoderConfig
    items: int
    max_length: int
    """most events that are read"""
    answer_time: bool = False
    """whether the encoder is told when the next item is taken; otherwise each place is asked at its own time"""

    def setup(self):
        # The last row stands for a hidden item.
        self.item = Embedding(self.items + 1, self.config.width)
        scale = Embedding.scale
        self.text = Projection(self.config.width, (None, "embed"), gain=scale) if self.config.embeddings else None
        self.encoder = ENCODERS[type(self.config)](self.config, self.max_length)
        self.drop = Dropout(self.config.dropout)

    def __call__(
        self,
        facts: ItemFacts,
        items: jax.Array,
        mask: jax.Array,
        times: jax.Array,
        asked: jax.Array,
        train: bool = False,
    ):
        """States of every place, and the table whose products with the states are the items' scores.

        Args:
          items: int32 [B, S], `self.items` where one is hidden.
          mask: bool [B, S], which there are: the first of each row.
          times: int32 [B, S], seconds, of the events.
          asked: int32 [B, S], when the item after each place is asked for; read only with `answer_time`.

        Returns:
          float32 [B, S, D] and [I, D]. The state of a place tells the item after it, or under it where that is hidden.
          With a prior both have a column more: ones, and `facts.log_q`.
        """
        table = self.item.table
        if self.text is not None:
            # Numbers of a vector of unit length, scaled to a variance of about one. A hidden item has no text.
            text = self.text(facts.embeddings * facts.embeddings.shape[-1] ** 0.5)
            table = table.at[: self.items].add(text)
        x = self.drop(jnp.take(table, items, axis=0), deterministic=not train)
        x = jnp.where(mask[..., None], x, 0.0)
        table = table[: self.items]
        states = self.encoder(x, mask, times, asked if self.answer_time else times, train)
        if isinstance(self.config, CoreConfig):
            table = self.drop(table, deterministic=not train)
        if self.config.temperature:
            states, table = unit(states) / self.config.temperature, unit(table)
        if self.config.prior:
            states = jnp.concatenate([states, jnp.ones((*states.shape[:-1], 1))], axis=-1)
            table = jnp.concatenate([table, facts.log_q[:, None]], axis=-1)
        return states, table

    def next(
        self, facts: ItemFacts, items: jax.Array, times: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The state float32 [B, D] that tells what follows a history, and the table [I, D].

        items int32 [B, S + 1] of which the first `length` int32 [B] <= S count; times int32 [B, S + 1] with, behind the
        last event, when the next item is asked for.
        """
        place, after = jnp.arange(items.shape[1]), length[:, None]
        if isinstance(self.config, Bert4RecConfig):
            states, table = self(facts, jnp.where(place == after, self.items, items), place <= after, times, times)
            last = length
        else:
            states, table = self(facts, items[:, :-1], place[:-1] < after, times[:, :-1], times[:, 1:])
            last = jnp.maximum(length - 1, 0)
        return jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0], table


class YouTubeDnn(nn.Module):
    """The mean of the items so far, through a tower of ReLU layers. Without the paper's age and demographic inputs."""

    config: YouTubeDnnConfig
    max_length: int

    @nn.compact
    def __call__(self, x, mask, times, asked, train):
        x = prefix_mean(x)
        for index, width in enumerate(self.config.hidden):
            x = nn.relu(Projection(width, ("embed", "mlp"), bias=True, name=f"hidden_{index}")(x))
            x = Dropout(self.config.dropout)(x, deterministic=not train)
        return Projection(self.config.width, ("mlp", "embed"), bias=True, name="out")(x)


class AttentionBlocks(nn.Module):
    """Learned positions, then blocks of self-attention and feed-forward: what SASRec, BERT4Rec and CORE share."""

    config: AttentionConfig
    places: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        """x [B, S, D] of which each place looks at what mask bool [B, S, S] keeps -> [B, S, D]."""
        cfg, drop = self.config, Dropout(self.config.dropout)
        position = self.param("position", partitioned(init.normal(0.02), None, "embed"), (self.places, cfg.width))
        x = x * cfg.width**0.5 + position[: x.shape[1]]
        for index in range(cfg.layers):
            attention = SelfAttention(
                cfg.width, cfg.heads, cfg.heads, cfg.width // cfg.heads, bias=True, name=f"attention_{index}"
            )
            x += drop(attention.sequence(x, mask)[0] - x, deterministic=not train)
            x += drop(FeedForwardBlock(cfg.hidden, name=f"mlp_{index}")(x) - x, deterministic=not train)
        return RMSNorm(name="norm")(x)


class SasRec(nn.Module):
    """Causal self-attention."""

    config: SasRecConfig
    max_length: int

    @nn.compact
    def __call__(self, x, mask, times, asked, train):
        return AttentionBlocks(self.config, self.max_length, name="blocks")(x, causal(mask), train)


class Bert4Rec(nn.Module):
    """Self-attention to both sides, trained to tell hidden items. One place more: that of the item asked for."""

    config: Bert4RecConfig
    max_length: int

    @nn.compact
    def __call__(self, x, mask, times, asked, train):
        both_sides = jnp.broadcast_to(mask[:, None], (*mask.shape, mask.shape[1]))
        return AttentionBlocks(self.config, self.max_length + 1, name="blocks")(x, both_sides, train)


class Caser(nn.Module):
    """Convolutions over the latest items as over a picture. Without the paper's vector of the user.

    A horizontal filter reads some items in a row and keeps its highest value; a vertical one weighs the items alike in
    every dimension.
    """

    config: CaserConfig
    max_length: int

    @nn.compact
    def __call__(self, x, mask, times, asked, train):
        cfg = self.config
        window = jnp.stack([earlier(x, cfg.window - 1 - place) for place in range(cfg.window)], axis=2)
        found = []
        for height in range(1, cfg.window + 1):
            read = Projection(cfg.horizontal, ("embed", "mlp"), bias=True, name=f"horizontal_{height}")
            slices = [window[:, :, start : start + height] for start in range(cfg.window - height + 1)]
            slices = jnp.stack([each.reshape(*x.shape[:2], -1) for each in slices], axis=2)
            found.append(nn.relu(read(slices)).max(2))
        weights = self.param("vertical", partitioned(init.lecun_normal(), None, "mlp"), (cfg.window, cfg.vertical))
        found.append(jnp.einsum("BSWD,WF->BSFD", window, weights).reshape(*x.shape[:2], -1))
        joined = Dropout(cfg.dropout)(jnp.concatenate(found, axis=-1), deterministic=not train)
        return nn.relu(Projection(cfg.width, ("mlp", "embed"), bias=True, name="out")(joined))


class NextItNet(nn.Module):
    """Residual blocks of two dilated causal convolutions (the paper's Figure 3b)."""

    config: NextItNetConfig
    max_length: int

    @nn.compact
    def __call__(self, x, mask, times, asked, train):
        cfg, drop = self.config, Dropout(self.config.dropout)
        x = x * cfg.width**0.5
        for index, dilation in enumerate(cfg.dilations):
            y = x
            for part, step in enumerate((dilation, 2 * dilation)):
                read = jnp.concatenate([earlier(y, step * place) for place in range(cfg.kernel)], axis=-1)
                y = Projection(cfg.width, ("mlp", "embed"), bias=True, name=f"convolution_{index}_{part}")(read)
                y = nn.relu(RMSNorm(name=f"norm_{index}_{part}")(y))
            x += drop(y, deterministic=not train)
        return RMSNorm(name="norm")(x)


class Core(nn.Module):
    """A weighted mean of the items' own vectors, so that a history lies in the space of the items.

    Only the weights come from a transformer (the paper's CORE-trm).
    """

    config: CoreConfig
    max_length: int

    @nn.compact
    def __call__(self, x, mask, times, asked, train):
        looked = causal(mask)
        states = AttentionBlocks(self.config, self.max_length, name="blocks")(x, looked, train)
        logits = Projection(1, ("embed", None), name="weight")(states)[..., 0]
        weights = masked_softmax(jnp.broadcast_to(logits[:, None], looked.shape), looked)
        return jnp.einsum("BST,BTD->BSD", weights, x)


class Hstu(nn.Module):
    """Attention by SiLU instead of softmax, biased by places and times between, gated; no feed-forward (Eq. 1-3)."""

    config: HstuConfig
    max_length: int

    @nn.compact
    def __call__(self, x, mask, times, asked, train):
        cfg, drop, size = self.config, Dropout(self.config.dropout), x.shape[1]
        heads, looked = (cfg.heads, cfg.width // cfg.heads), causal(mask)
        apart = jnp.arange(size)[:, None] - jnp.arange(size)  # of a place and an earlier one
        seconds = jnp.maximum(asked[:, :, None] - times[:, None, :], 1).astype(jnp.float32)
        bucket = jnp.minimum(jnp.log2(seconds).astype(jnp.int32), cfg.time_buckets - 1)
        x = x * cfg.width**0.5
        for index in range(cfg.layers):
            normed = RMSNorm(name=f"norm_{index}")(x)
            gate, value, query, key = (
                nn.silu(Projection(heads, ("embed", "heads", "head_dim"), name=f"{name}_{index}")(normed))
                for name in ("gate", "value", "query", "key")
            )
            place = self.param(f"place_{index}", partitioned(init.normal(0.02), None), (self.max_length,))
            time = self.param(f"time_{index}", partitioned(init.normal(0.02), None), (cfg.time_buckets,))
            bias = place[jnp.maximum(apart, 0)] + time[bucket]
            scores = nn.silu(jnp.einsum("BSNH,BTNH->BNST", query, key) + bias[:, None])
            weights = jnp.where(looked[:, None], scores, 0.0) / self.max_length
            read = jnp.einsum("BNST,BTNH->BSNH", weights, value).reshape(*x.shape)
            read = RMSNorm(name=f"read_{index}")(read) * gate.reshape(*x.shape)
            out = Projection(cfg.width, ("heads", "embed"), name=f"out_{index}")(read)
            x += drop(out, deterministic=not train)
        return RMSNorm(name="norm")(x)


ENCODERS = {
    YouTubeDnnConfig: YouTubeDnn,
    SasRecConfig: SasRec,
    Bert4RecConfig: Bert4Rec,
    CaserConfig: Caser,
    NextItNetConfig: NextItNet,
    CoreConfig: Core,
    HstuConfig: Hstu,
}


def causal(mask: jax.Array) -> jax.Array:
    """bool [B, S, S]: what each place may look at, itself included, of what mask bool [B, S] keeps."""
    size = mask.shape[1]
    return jnp.tril(jnp.ones((size, size), bool)) & mask[:, None]


def earlier(x: jax.Array, places: int) -> jax.Array:
    """x [B, S, D] as it was so many places before; zeros before the beginning."""
    return jnp.pad(x, ((0, 0), (places, 0), (0, 0)))[:, : x.shape[1]]


def prefix_mean(x: jax.Array) -> jax.Array:
    """The mean of x [B, S, D] up to each place."""
    return jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1)[:, None]
