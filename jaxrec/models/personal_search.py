"""Personalised search (OneSearch §3.2 and §3.3): who asks, the query and the past in one prompt, items' IDs out.

    text tokens | BOS SEP EOS start | tasks | codes, a slice a level           one vocabulary (`SearchVocabulary`)

    soft tokens   BOS uid SEP query SEP its ID SEP last queries' IDs SEP last items' IDs SEP profile SEP EOS
      ▲                          │
      │                          └──▶ Backbone ──▶ log-probabilities of codes, mixed with `CandidateHead`'s
    QFormer ◀── sums of centroids of the long past (Eq. 4)                     over given items

The mixture is not in the paper; without candidates this is the paper's model. The tasks that align texts with IDs
(§3.4.1) have prompts of their own, `TaskInputs`; where texts are written, `texts` gives the same module with the text
tokens as every level's slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxrec.config import check_choice, check_least
from jaxrec.models.backbone import BackboneConfig, ReadContext, make_backbone, with_vocabulary
from jaxrec.models.contract import Scored
from jaxrec.models.copying import CandidateHead, Points, extend_mixture
from jaxrec.models.prior import Prior
from jaxrec.models.vocabulary import ContextTokens, Levels
from jaxrec.nn.layers import Projection, RMSNorm, partitioned
from jaxrec.nn.qformer import QFormer

BOS, SEP, EOS, START = range(4)
SPECIALS = 4
SEQUENCES = 3
"""long sequences of Eq. 4: clicked, ordered, search-relevant items"""


@dataclass(frozen=True)
class SearchVocabulary:
    """One vocabulary for text tokens, special tokens, tasks, and the codes of every level."""

    texts: int
    """text tokens"""
    tasks: int
    """tasks that have a prompt token"""
    sizes: tuple[int, ...]
    """codebook sizes"""

    @property
    def levels(self) -> Levels:
        """(offset, size) of every level's codes."""
        offset, found = self.texts + SPECIALS + self.tasks, []
        for size in self.sizes:
            found.append((offset, size))
            offset += size
        return tuple(found)

    @property
    def size(self) -> int:
        """Tokens V."""
        return self.texts + SPECIALS + self.tasks + sum(self.sizes)

    def fit(self, config: BackboneConfig) -> BackboneConfig:
        """The configuration with this vocabulary and its levels."""
        return with_vocabulary(config, self.size, self.levels, self.texts + START)

    def codes(self, codes: jax.Array) -> jax.Array:
        """Tokens of codes int32 [..., M]; -1 stays."""
        return jnp.where(codes >= 0, codes + jnp.array([offset for offset, _ in self.levels], jnp.int32), -1)


@dataclass(frozen=True)
class PromptConfig:
    """The parts of the prompt beside the query."""

    positions: Literal["codes", "items"] = "codes"
    """what a position is: one code, as published, or an ID, the sum of its codes' embeddings: contexts are then as many
    times shorter as IDs have levels"""
    user_ids: Literal["behavior", "hashed", "none"] = "behavior"
    """user IDs of what the user took (Eq. 3), hashed ones (TIGER), or none"""
    query_ids: bool = True
    """the query's own ID is read"""
    long_queries: int = 4
    """soft tokens that the long sequences become (Eq. 4); 0: they are not read"""
    long_heads: int = 4
    """heads of the Query-Former"""
    copying: bool = True
    """a distribution over the user's search-relevant items and the query's most taken ones is mixed in; not in the
    paper"""

    def __post_init__(self):
        check_choice(self, "prompt", "positions", ("codes", "items"))
        check_choice(self, "prompt", "user_ids", ("behavior", "hashed", "none"))
        check_least(self, "prompt", long_queries=0, long_heads=1)


@struct.dataclass
class SearchInputs:
    """B searches; -1 stands for no token and no code.

    query int32 [B, T]; query_codes int32 [B, M]; user_codes int32 [B, 2, M] of the short and the long behavior;
    recent_queries int32 [B, R, M]; recent_items int32 [B, r, M]; long: float32 [B, E] a sequence and level, sums of
    centroids, as [B, 3, levels, E], or None; candidates int32 [B, C, M] with habits float32 [B, C, F], or None; user
    float32 [B, U]; profile int32 [B, P] of the user, or None; prior: of items' IDs, or None.
    """

    query: jax.Array
    query_codes: jax.Array
    user_codes: jax.Array
    recent_queries: jax.Array
    recent_items: jax.Array
    long: jax.Array | None
    candidates: jax.Array | None
    habits: jax.Array | None
    user: jax.Array
    profile: jax.Array | None = None
    prior: Prior | None = None


@struct.dataclass
class TaskInputs:
    """B prompts of tasks int32 [B]: texts int32 [B, T], or codes int32 [B, M], -1 where a prompt has none."""

    task: jax.Array
    tokens: jax.Array
    codes: jax.Array


@struct.dataclass
class SearchContext:
    """A prefilled search: the backbone's, and the candidates' weights and codes int32 [B, C, M], or None."""

    own: ReadContext
    points: Points | None = None
    codes: jax.Array | None = None

    @property
    def mask(self) -> jax.Array:
        """bool [B, 1, S]: what targets attend to."""
        return self.own.mask


def level_sums(codes: jax.Array, centroids: Sequence[jax.Array]) -> jax.Array:
    """Sums over a sequence of the centroids of its items' codes, level by level (Eq. 4): float32 [B, levels, E].

    codes int32 [B, L, M], -1 in the padding; centroids: float32 [K, E] a level, of the first levels or all. Computed as
    products of the codes' counts [B, K] with the centroids: the [B, L, E] centroids of the items are never made.
    """
    rows, sums = jnp.arange(codes.shape[0])[:, None], []
    for level, table in enumerate(centroids):
        code = codes[..., level]
        counts = jnp.zeros((codes.shape[0], len(table))).at[rows, jnp.maximum(code, 0)].add(code >= 0)
        sums.append(counts @ table)
    return jnp.stack(sums, axis=1)


class PersonalSearch(nn.Module):
    """The three verbs over `SearchInputs` and `TaskInputs`."""

    config: BackboneConfig
    """with the vocabulary's size, levels and start token"""
    vocabulary: SearchVocabulary
    prompt: PromptConfig
    texts: int = 0
    """targets are texts of so many tokens; 0: IDs"""

    def setup(self):
        cfg, width = self.config, self.config.width
        if self.texts:
            cfg = replace(cfg, levels=((0, self.vocabulary.texts),) * self.texts)
        self.backbone = make_backbone(cfg)
        if self.prompt.long_queries:
            heads = self.prompt.long_heads
            self.long_in = Projection(width, (None, "embed"))
            self.long_norm, self.soft_norm = RMSNorm(), RMSNorm()
            kinds = (SEQUENCES, len(self.vocabulary.sizes), width)
            self.long_kind = self.param(
                "long_kind", partitioned(nn.initializers.normal(0.5), None, None, "embed"), kinds
            )
            self.long = QFormer(self.prompt.long_queries, heads, max(width // heads, 1), 2 * width)
        if self.prompt.copying:
            self.copy = CandidateHead(min(width, 64))

    def writing(self, length: int) -> "PersonalSearch":
        """The same module for targets that are texts of up to so many tokens."""
        return self.clone(texts=length)

    # ---- contexts ----------------------------------------------------------------------------------------------------

    def prefill(self, inputs: SearchInputs | TaskInputs, train: bool = False) -> SearchContext:
        """Read B prompts once."""
        if isinstance(inputs, TaskInputs):
            tokens, mask = self.task_prompt(inputs)
            return SearchContext(self.backbone.prefill(ContextTokens(tokens, mask), train))
        tokens, mask = self.search_prompt(inputs)
        soft, there = self._soft(inputs)
        own = self.backbone.prefill(ContextTokens(tokens, mask, inputs.prior, soft, there), train)
        if not self.prompt.copying or inputs.candidates is None:
            return SearchContext(own)
        codes = inputs.candidates
        where = codes[..., 0] >= 0
        # Level by level: the embeddings [B, C, M, D] of all codes are never made. In the padding there is any ID.
        tokens = jnp.maximum(self.vocabulary.codes(codes), 0)
        vectors = sum(self.backbone.embed(tokens[..., level]) for level in range(tokens.shape[-1]))
        points = self.copy(vectors, inputs.habits, where, own.state[:, 0], inputs.user)
        return SearchContext(own, points, codes)

    def search_prompt(self, inputs: SearchInputs) -> tuple[jax.Array, jax.Array]:
        """Tokens int32 [B, S] or, where positions are IDs, [B, S, M], and mask bool [B, S] of the prompt (§3.3)."""
        batch = inputs.query.shape[0]
        parts = [self._special(batch, BOS)]
        if self.prompt.user_ids != "none":
            parts += [self._ids(inputs.user_codes), self._special(batch, SEP)]
        parts += [self._words(inputs.query), self._special(batch, SEP)]
        if self.prompt.query_ids:
            parts += [self._ids(inputs.query_codes[:, None]), self._special(batch, SEP)]
        for codes in (inputs.recent_queries, inputs.recent_items):
            if codes.shape[1]:
                parts += [self._ids(codes), self._special(batch, SEP)]
        if inputs.profile is not None:
            parts += [self._words(inputs.profile), self._special(batch, SEP)]
        return self._joined([*parts, self._special(batch, EOS)])

    def task_prompt(self, inputs: TaskInputs) -> tuple[jax.Array, jax.Array]:
        """As `search_prompt`: the task in place of BOS, the text or the ID, EOS."""
        task = self.vocabulary.texts + SPECIALS + inputs.task[:, None]
        parts = [self._words(task), self._words(inputs.tokens), self._ids(inputs.codes[:, None])]
        return self._joined([*parts, self._special(task.shape[0], EOS)])

    def _special(self, batch: int, which: int) -> tuple[jax.Array, jax.Array]:
        return self._words(jnp.full((batch, 1), self.vocabulary.texts + which, jnp.int32))

    def _words(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Positions of single tokens int32 [B, n]."""
        width = len(self.vocabulary.sizes) if self.prompt.positions == "items" else 1
        return jnp.pad(tokens[..., None], ((0, 0), (0, 0), (0, width - 1)), constant_values=-1), tokens >= 0

    def _ids(self, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Positions of IDs int32 [B, n, M]."""
        tokens = self.vocabulary.codes(codes)
        if self.prompt.positions == "codes":
            tokens = tokens.reshape(tokens.shape[0], -1, 1)
        return tokens, (tokens >= 0).any(-1)

    def _joined(self, parts: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
        tokens, mask = (jnp.concatenate(each, axis=1) for each in zip(*parts, strict=True))
        # Padding of the parts goes to the end: relative positions are then those of the real tokens alone.
        order = jnp.argsort(~mask, axis=1, stable=True)
        tokens, mask = jnp.take_along_axis(tokens, order[..., None], 1), jnp.take_along_axis(mask, order, 1)
        if self.prompt.positions == "codes":
            tokens = jnp.maximum(tokens[..., 0], 0)
        return tokens, mask

    def _soft(self, inputs: SearchInputs) -> tuple[jax.Array | None, jax.Array | None]:
        """Soft tokens [B, Q, D] of the long sequences (Eq. 4), masked where there are no items at all."""
        if not self.prompt.long_queries or inputs.long is None:
            return None, None
        batch, kinds, levels, _ = inputs.long.shape
        there = jnp.abs(inputs.long).max((2, 3)) > 0
        x = self.long_norm(self.long_in(inputs.long)) + self.long_kind[:, :levels]
        x = x.reshape(batch, kinds * levels, -1)
        read = self.soft_norm(self.long(x, jnp.repeat(there, levels, axis=1)))
        mask = jnp.broadcast_to(there.any(1, keepdims=True), read.shape[:2])
        # As large as the position of an ID.
        return read * self.config.embed_scale * levels**0.5, mask

    # ---- targets -----------------------------------------------------------------------------------------------------

    def score(
        self, context: SearchContext, targets: jax.Array, where: jax.Array | None = None, train: bool = False
    ) -> Scored:
        """Every token of targets int32 [B, L, M]: codes, or text tokens (`writing`)."""
        scored = self.backbone.score(context.own, targets, where, train)
        return scored if context.points is None else context.points.along(scored, targets, context.codes)

    def extend(self, context: SearchContext, tokens: jax.Array | None, cache: dict | None, level: int):
        """One more code for every beam; as that of the backbone, with the candidates mixed in."""
        before = cache or {}
        log_probs, own = self.backbone.extend(context.own, tokens, before.get("backbone"), level)
        if context.points is None:
            return log_probs, {"backbone": own}
        mixed, copied = extend_mixture(context.points, context.codes, log_probs, tokens, before.get("mixture"), level)
        return mixed, {"backbone": own, "mixture": copied}

    def __call__(self, inputs: SearchInputs, targets: jax.Array) -> jax.Array:
        """Touches every part once; for `init`."""
        return self.score(self.prefill(inputs), targets).log_probs
