"""TIGER's model, fitted to one catalogue: what training, decoding and evaluation share.

tokens of the vocabulary   0: start   |   codes, a slice for every level   |   items   |   hashed users
context                    user   c1 c2 .. cM of the first item   ...   c1 c2 .. cM of the last      (positions "codes")
                           user   c1 + c2 .. + cM of the first    ...   c1 + c2 .. + cM of the last  (positions "items")
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from jaxrec.catalogue.version import Version
from jaxrec.models.encoder_decoder import EncodedContext, EncoderDecoder, EncoderDecoderConfig
from jaxrec.models.prior import Prior, popularity_prior
from jaxrec.models.vocabulary import ContextTokens, Levels, to_tokens
from jaxrec.nn.geometry import principal_axes
from jaxrec.run import Run
from jaxrec.semantic_ids.files.vectors import EMBEDDINGS, read_embeddings
from jaxrec.systems.generative import read_items
from jaxrec.systems.recommender import Served, filled_up, with_later_prior
from jaxrec.systems.tiger.config import TigerConfig
from jaxrec.targets import SemanticIdSpace
from jaxrec.training.sharding import init_sharded

START = 0


@struct.dataclass
class TigerCatalogue:
    """What a training step reads of all items: codes int32 [I, M], and the prior or None."""

    codes: jax.Array
    prior: Prior | None = None


@struct.dataclass(kw_only=True)
class TigerServed(Served):
    """TIGER's arrays: codes int32 [I, M] of all items and, if the decoder begins with it, the prior."""

    codes: jax.Array
    prior: Prior | None


@dataclass(frozen=True, eq=False)
class TigerAssembly:
    """The model, fitted to the items of a run."""

    model: EncoderDecoder
    space: SemanticIdSpace
    behaviors: tuple[str, ...]
    """names, weakest first"""
    wanted: np.ndarray
    """bool [behaviors]: the target behaviors"""
    users: int
    """tokens that users are hashed to; 0 for none"""
    positions: str = "codes"
    """what a position of the context is: one code, or the sum of an item's codes ("items")"""
    own_tokens: bool = False
    """every item has a token beside those of its codes, where positions are items"""
    prior: Prior | None = None
    """the popularity of IDs, if it is added to the decoder's logits"""
    examples: Any = None
    """folder of the example records"""
    embeddings: np.ndarray | None = None
    """float32 [I, d] with d <= D: initial values of the first d components of the items' own tokens; None: random"""

    @property
    def target_behaviors(self) -> list[int]:
        """Indices of the target behaviors."""
        return np.flatnonzero(self.wanted).tolist()

    @property
    def catalogue(self) -> TigerCatalogue:
        """What a training step reads of the items."""
        return TigerCatalogue(jnp.asarray(self.space.codes, jnp.int32), self.prior)

    @property
    def first_own(self) -> int:
        """The own token of the first item."""
        return self.model.config.vocabulary - self.users - len(self.space.codes)

    def init(self, seed: int, mesh: Mesh | None = None) -> dict:
        """Fresh variables {"params"}: made on the devices where they stay, if there is a mesh."""
        levels = self.space.levels

        def make():
            inputs = ContextTokens(jnp.zeros((1, levels), jnp.int32), jnp.ones((1, levels), bool))
            variables = self.model.init(jax.random.key(seed), inputs, jnp.zeros((1, 1, levels), jnp.int32))
            if self.embeddings is not None:
                table = variables["params"]["embed"]["table"]
                known, width = self.embeddings.shape
                begun = table.unbox().at[self.first_own : self.first_own + known, :width].set(self.embeddings)
                variables["params"]["embed"]["table"] = table.replace_boxed(begun)
            return variables

        return init_sharded(make, mesh)

    def tokens(self, codes: jax.Array, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The contexts of stacked item sequences, and their mask; the user, if there is one, in front.

        codes: int32 [I, M] of all items; arrays: item int32 [B, S], mask bool [B, S], user int32 [B].

        Returns tokens int32 [B, 1 + S * M] and mask bool of the same shape or, where positions are items, tokens
        [B, 1 + S, M or, with a token of its own, M + 1] and mask [B, 1 + S].
        """
        item, mask = arrays["item"], arrays["mask"]
        found = to_tokens(codes[item], self.model.config.levels)
        if self.own_tokens:
            # Items that came later have no token.
            own = jnp.where(item < len(self.space.codes), self.first_own + item, -1)
            found = jnp.concatenate([found, own[..., None]], axis=-1)
        batch, length, levels = found.shape
        if self.positions == "codes":
            found, mask = found.reshape(batch, length * levels, 1), jnp.repeat(mask, levels, axis=1)
        if self.users:
            user = arrays["user"]
            # Knuth's multiplicative hash: neighbours among the numbered users are no neighbours here.
            hashed = (user.astype(jnp.uint32) * jnp.uint32(2654435761)) >> 8
            token = self.model.config.vocabulary - self.users + (hashed % self.users).astype(jnp.int32)
            token = jnp.pad(token[:, None, None], ((0, 0), (0, 0), (0, found.shape[2] - 1)), constant_values=-1)
            found = jnp.concatenate([token, found], axis=1)
            mask = jnp.concatenate([(user >= 0)[:, None], mask], axis=1)
        return found[..., 0] if self.positions == "codes" else found, mask

    def inputs(self, catalogue: TigerCatalogue, arrays: dict[str, jax.Array]) -> ContextTokens:
        """The model's input from stacked item sequences, as for `tokens`."""
        return ContextTokens(*self.tokens(catalogue.codes, arrays), catalogue.prior)

    def before(self, items: jax.Array) -> jax.Array:
        """Positions of a context up to and with so many of its items, int32 of the same shape."""
        return items * (self.space.levels if self.positions == "codes" else 1) + (1 if self.users else 0)

    # ---- what the recommender asks for -------------------------------------------------------------------------------

    def serve(self, variables: dict, version: Version | None = None, before: Version | None = None) -> TigerServed:
        """A new item is its codes, and needs nothing else."""
        codes, prior = self.space.codes.astype(np.int32), self.prior
        if version is not None:
            codes = filled_up(version.codes.astype(np.int32), version.capacity)
            prior = with_later_prior(prior, version, before)
        return TigerServed(variables=variables, codes=jnp.asarray(codes), prior=prior)

    def context(self, served: TigerServed, arrays: dict[str, jax.Array]) -> EncodedContext:
        """B contexts from stacked arrays of `ItemSequenceConfig.cut`."""
        inputs = self.inputs(TigerCatalogue(served.codes, served.prior), arrays)
        return self.model.apply(served.variables, inputs, method="prefill")

    def extend(self, served: TigerServed, context: EncodedContext, tokens: jax.Array | None, cache: Any, level: int):
        """One more code for every beam."""
        return self.model.apply(served.variables, context, tokens, cache, level, method="extend")

    def rescore(self, served: TigerServed, context: EncodedContext, likelihood_weight: float) -> None:
        """None: beams are ranked by their log-probabilities."""


def assemble(run: Run, config: TigerConfig) -> TigerAssembly:
    """Reads the IDs of a run and shapes the model to them.

    Raises:
      UserError: a file is missing or doesn't fit the items.
    """
    item_ids, counts, space, behaviors, wanted = read_items(run, config)
    others = config.users + (len(counts) if config.own_tokens else 0)
    model = EncoderDecoder(fit_vocabulary(config.model, space.codebook_sizes, others))
    prior = popularity_prior(space.codes, counts, space.codebook_sizes) if config.prior else None
    own = None
    if config.own_tokens:
        own = own_tokens(read_embeddings(run.semantic_ids / EMBEDDINGS, item_ids), model.config, space.levels)
    reading = config.users, config.positions, config.own_tokens
    return TigerAssembly(model, space, behaviors, wanted, *reading, prior, run.examples, own)


def own_tokens(embeddings: np.ndarray, config: EncoderDecoderConfig, levels: int) -> np.ndarray:
    """Initial embeddings float32 [I, d] of the items' own tokens: the items' embeddings along their principal axes.

    Similar items then have similar tokens from the first step on. Their variance is that of the sum of an item's codes,
    of which there are `levels`.
    """
    centred = embeddings - embeddings.mean(0)
    squares, axes = principal_axes(centred)
    width = min(config.width, embeddings.shape[1])
    deviation = np.sqrt(squares[:width].sum() / (len(embeddings) * width)) or 1.0
    return (centred @ axes[:, :width] * (config.embed_scale * levels**0.5 / deviation)).astype(np.float32)


def fit_vocabulary(config: EncoderDecoderConfig, sizes: tuple[int, ...], others: int) -> EncoderDecoderConfig:
    """The configuration with a vocabulary of the start token, a slice for every level, and so many other tokens."""
    offsets = np.cumsum([START + 1, *sizes])
    levels: Levels = tuple(zip(offsets[:-1].tolist(), sizes, strict=True))
    return replace(config, vocabulary=int(offsets[-1]) + others, levels=levels, start_token=START)
