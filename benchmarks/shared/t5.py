"""The T5 of the decoding benchmarks: 4.6M parameters, random weights, a slice of the vocabulary for every level.

python benchmarks/shared/t5.py FOLDER     # config.json and model.safetensors, as other libraries read them
"""

import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrec.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from jaxrec.models.huggingface import save_t5
from jaxrec.models.vocabulary import ContextTokens

LEVELS, SIZE, FIRST = 4, 256, 3
CONTEXT = 80
CONFIG = EncoderDecoderConfig(
    vocabulary=1100,
    width=128,
    heads=6,
    head_dim=64,
    hidden=1024,
    encoder_layers=4,
    layers=4,
    levels=tuple((FIRST + level * SIZE, SIZE) for level in range(LEVELS)),
    restrict=False,  # as other libraries normalise
)


def make_t5(seed: int = 0, config: EncoderDecoderConfig = CONFIG) -> dict:
    """Random parameters of `EncoderDecoder(config)`: {"params": ...}."""
    shapes = ContextTokens(jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)), jnp.zeros((1, 1, LEVELS), jnp.int32)
    return nn.unbox(jax.jit(EncoderDecoder(config).init)(jax.random.key(seed), *shapes))


def make_contexts(batch: int, length: int = CONTEXT, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Random contexts: tokens int32 [B, S], all of them real, and their mask."""
    tokens = jax.random.randint(jax.random.key(seed), (batch, length), FIRST, FIRST + LEVELS * SIZE)
    return tokens, jnp.ones((batch, length), bool)


if __name__ == "__main__":
    save_t5(Path(sys.argv[1]), CONFIG, make_t5()["params"])
