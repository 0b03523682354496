"""Embeddings of texts that are asked for one by one, in arrays of few shapes, so that a server compiles nothing."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxrec.semantic_ids.embeddings import encoder_of, is_aligned, read_alignment
from jaxrec.text import align
from jaxrec.text.encoder import EncoderConfig, encode_batches, load_encoder, longest

BLOCK_ROWS = 64
"""Rows that are projected and quantized at once: one shape, compiled once, so other rows change no bit."""


class TextEmbedder:
    """Embeds texts as those of a folder were, without remembering them in the cache on disk."""

    def __init__(self, folder: Path, text_config: EncoderConfig | None, batch_tokens: int):
        """folder: a semantic_ids folder, or another one that says how texts become embeddings.

        batch_tokens: tokens that are encoded at once, padding included; 1 encodes one text at a time, so that an
        embedding doesn't depend on the other texts.

        Raises:
          UserError: a file is missing or damaged, or the folder's items were not embedded from texts.
        """
        self._text_config = encoder_of(folder, text_config)
        self._encoder = load_encoder(self._text_config.model)
        self._alignment = read_alignment(folder) if is_aligned(folder) else None
        self._batch_tokens = batch_tokens

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """The embeddings of texts, f32 [n, D]."""
        vectors = np.zeros((len(texts), self._encoder.config.hidden_size), np.float32)
        max_tokens = longest(self._encoder, self._text_config)
        for rows, encoded in encode_batches(self._encoder, texts, max_tokens, self._batch_tokens, progress=False):
            vectors[rows] = encoded
        if self._alignment is None:
            return vectors
        return by_block(lambda rows: np.asarray(_project(self._alignment, rows)), vectors)


def by_block(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, rows: int = BLOCK_ROWS) -> np.ndarray:
    """`function` of blocks [rows, D] over all rows of x [n, D], the last block padded with zeros."""
    parts = []
    for some in (x[start : start + rows] for start in range(0, max(len(x), 1), rows)):
        padded = np.pad(some, ((0, rows - len(some)), (0, 0)))
        parts.append(function(padded)[: len(some)])
    return np.concatenate(parts)


_project = jax.jit(align.apply)
