"""A random BERT of a few thousand weights in a folder, for tests of what trains or uses an encoder."""

from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxrec.text.encoder import Bert, BertConfig, TextEncoder, save_encoder


def make_encoder(folder: Path, words: list[str], *, seed: int = 0, positions: int = 32) -> TextEncoder:
    """Saves an encoder whose tokens are the given words, and returns it; its fingerprint is left empty."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=positions,
    )
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = Bert(config).init(jax.random.key(seed), tokens, jnp.ones((1, 4), bool))["params"]
    encoder = TextEncoder(config, dict(params), tokenizer, "")
    save_encoder(encoder, folder)
    return encoder
