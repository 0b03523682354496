"""The text models that a system can be built on, chosen by the type of one configuration field.

    EncoderDecoderConfig    T5 and BART: the prompt is encoded, a decoder reads it
    CausalConfig            Qwen2 and Qwen3: prompt and targets go through the same layers

Each has the three verbs over `ContextTokens`, positions that are sums of tokens and soft ones included, and one
vocabulary of words and codes. A model built on them adds its prompt; beside the verbs it reads what `Backbone` and
`ReadContext` name.
"""

from dataclasses import replace
from typing import Any, Protocol

import jax

from jaxrec.models.causal import Causal, CausalConfig
from jaxrec.models.contract import TargetModel
from jaxrec.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from jaxrec.models.vocabulary import Levels

BackboneConfig = EncoderDecoderConfig | CausalConfig


class Backbone(TargetModel, Protocol):
    """A text model with the three verbs over `ContextTokens`, as modules see it that are built on it."""

    config: BackboneConfig

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeddings [..., D] of tokens int32 [...]."""
        ...


class ReadContext(Protocol):
    """A prefilled context of a `Backbone`."""

    mask: jax.Array
    """bool [B, 1, S]: the positions that targets attend to"""
    state: jax.Array
    """[B, 1, D], from which the first token of every target is predicted"""
    prior: Any
    """as in `ContextTokens`"""


def make_backbone(config: BackboneConfig) -> Backbone:
    """The module of a configuration."""
    return Causal(config) if isinstance(config, CausalConfig) else EncoderDecoder(config)


def with_vocabulary(config: BackboneConfig, size: int, levels: Levels | None, start_token: int) -> BackboneConfig:
    """The configuration with so many tokens and these slices of levels; a decoder of its own begins with the start
    token, which a causal model has no use for."""
    fitted = replace(config, vocabulary=size, levels=levels)
    return fitted if isinstance(config, CausalConfig) else replace(fitted, start_token=start_token)
