"""Query suggestion (OneSug §3.3): what is typed and what was searched for before in one prompt, queries' tokens out.

    text tokens | CLS SEP NEXT START                                   one vocabulary (`SuggestionVocabulary`)

    CLS prefix SEP related queries SEP earlier queries SEP profile     Eq. 5; NEXT between two queries
          │
          └──▶ EncoderDecoder or Causal ──▶ log-probabilities of text tokens, mixed with `CandidateHead`'s over given
                                            queries

The mixture is not in the paper; without candidates this is the paper's model. It is exact, as a distribution over whole
texts with their end: a given query gets what the decoder gives it, and a part of what is copied besides.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jaxrec.data.suggestion_features import SPECIALS, START
from jaxrec.models.backbone import BackboneConfig, ReadContext, make_backbone, with_vocabulary
from jaxrec.models.causal import CausalConfig
from jaxrec.models.contract import Scored
from jaxrec.models.copying import CandidateHead, Points, extend_mixture
from jaxrec.models.vocabulary import ContextTokens


@dataclass(frozen=True)
class SuggestionVocabulary:
    """One vocabulary for text tokens and the special tokens of prompts."""

    texts: int
    """text tokens; those of pretrained weights, which may be more than their tokenizer has"""

    @property
    def size(self) -> int:
        """Tokens V."""
        return self.texts + SPECIALS

    def special(self, which: int) -> int:
        """The token of CLS, SEP, NEXT or START."""
        return self.texts + which

    def fit(self, config: BackboneConfig, length: int) -> BackboneConfig:
        """The configuration with this vocabulary, whose targets are texts of up to `length` tokens."""
        return with_vocabulary(config, self.size, ((0, self.texts),) * length, self.special(START))


@struct.dataclass
class SuggestionInputs:
    """B prompts; -1 stands for no token.

    tokens int32 [B, S]: prompts of `jaxrec.data.suggestion_features`, padding behind. Read where something is copied:
    candidates int32 [B, C, M], tokens of queries with their end, -1 behind it and for none, with habits float32
    [B, C, F]; user float32 [B, U].
    """

    tokens: jax.Array
    candidates: jax.Array | None = None
    habits: jax.Array | None = None
    user: jax.Array | None = None


@struct.dataclass
class SuggestionContext:
    """A prefilled prompt: the backbone's, and the candidates' weights and tokens int32 [B, C, M], or None."""

    own: ReadContext
    points: Points | None = None
    candidates: jax.Array | None = None

    @property
    def mask(self) -> jax.Array:
        """bool [B, 1, S]: what targets attend to."""
        return self.own.mask


class SuggestionModel(nn.Module):
    """The three verbs over `SuggestionInputs`."""

    config: BackboneConfig
    """as `SuggestionVocabulary.fit` makes it"""
    vocabulary: SuggestionVocabulary
    copying: bool = True
    """a distribution over given queries is mixed in; not in the paper"""

    def setup(self):
        self.backbone = make_backbone(self.config)
        if self.copying:
            self.copy = CandidateHead(min(self.config.width, 64))

    def prefill(self, inputs: SuggestionInputs, train: bool = False) -> SuggestionContext:
        """Read B prompts once."""
        tokens = inputs.tokens
        if isinstance(self.config, CausalConfig):
            # Targets continue behind a token that always is the same; an encoder has its decoder's start token.
            tokens = jnp.pad(tokens, ((0, 0), (0, 1)), constant_values=self.vocabulary.special(START))
        mask = tokens >= 0
        read = self.backbone.prefill(ContextTokens(jnp.maximum(tokens, 0), mask), train)
        if not self.copying or inputs.candidates is None:
            return SuggestionContext(read)
        written = inputs.candidates >= 0
        embedded = self.backbone.embed(jnp.maximum(inputs.candidates, 0))
        vectors = jnp.where(written[..., None], embedded, 0.0).sum(2)
        points = self.copy(vectors, inputs.habits, written[..., 0], read.state[:, 0], inputs.user)
        return SuggestionContext(read, points, inputs.candidates)

    def score(
        self, context: SuggestionContext, targets: jax.Array, where: jax.Array | None = None, train: bool = False
    ) -> Scored:
        """Every token of targets int32 [B, L, M], their end included; what follows the end means nothing."""
        scored = self.backbone.score(context.own, targets, where, train)
        return scored if context.points is None else context.points.along(scored, targets, context.candidates)

    def extend(self, context: SuggestionContext, tokens: jax.Array | None, cache: dict | None, level: int):
        """One more token for every beam; as that of the backbone, with the candidates mixed in."""
        before = cache or {}
        log_probs, own = self.backbone.extend(context.own, tokens, before.get("backbone"), level)
        if context.points is None:
            return log_probs, {"backbone": own}
        mixed, copied = extend_mixture(
            context.points, context.candidates, log_probs, tokens, before.get("mixture"), level
        )
        return mixed, {"backbone": own, "mixture": copied}

    def __call__(self, inputs: SuggestionInputs, targets: jax.Array) -> jax.Array:
        """Touches every part once; for `init`."""
        return self.score(self.prefill(inputs), targets).log_probs
