"""Contexts of tokens as fixed-shape arrays, for models that read texts (NumPy; no tokenizer here).

    history["tokens"]  a b c d e      buckets (4, 8)      tokens [a b c d e - - -]  mask [1 1 1 1 1 0 0 0]

What the tokens of a history are, a system's assembly decides (`jaxrec.systems.recommender.Assembly.read_texts`).
"""

from dataclasses import dataclass

import numpy as np

from jaxrec.data.padding import bucket, check_buckets, padded

NO_TOKENS = np.zeros(0, np.int32)


@dataclass(frozen=True)
class TokenSequenceConfig:
    """Length buckets of the token sequences that a model reads."""

    buckets: tuple[int, ...] = (32,)
    """lengths that sequences are padded to; a batch holds sequences of one bucket; the last is also the longest
    sequence that is read"""

    def __post_init__(self):
        check_buckets(self.buckets)

    def cut(self, record: dict, session: int, *, behaviors: int, wanted: np.ndarray) -> dict[str, np.ndarray]:
        """The last tokens of a history, all of which is read: tokens int32 [S], mask bool [S].

        What was typed stands last, so that a sequence that is too long loses the oldest part of the history.
        """
        size, tokens = self.bucket_of(record, session), record.get("tokens", NO_TOKENS)[-self.buckets[-1] :]
        return {"tokens": padded(tokens, size), "mask": np.arange(size) < len(tokens)}

    def bucket_of(self, record: dict, session: int) -> int:
        """The length that a sequence is padded to: the smallest bucket that holds it, or else the last."""
        return bucket(self.buckets, len(record.get("tokens", NO_TOKENS)))
