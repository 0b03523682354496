"""Which tokens go on with what was typed: byte by byte, also where the typed text ends inside a token.

    typed     r e d _ s h           of the bytes so far, 4 were written: the rest is "sh"
    tokens    s   sh   shoes        go on: token and rest agree as far as both go
              h   so                don't

A text can be spelled by many sequences of tokens. All that begin with the typed bytes are let through, and no other:
after m of the P typed bytes a token may follow if its bytes and the rest agree on their common length. After the last
one any token may follow, and only then the end.

The table is made where a request is read (NumPy): of V tokens in the order of their bytes, those that begin with the
rest are a range, and those that the rest begins with are looked up. It has one bit for each place and token.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from jaxrec.text.tokenizer import TextTokenizer

PLACES = 32
"""Places in a word of a table."""


class TokenBytes:
    """The bytes of V tokens, sorted."""

    def __init__(self, tokens: Sequence[bytes], lead: bytes = b""):
        """tokens: [V], none for those that are no text; lead: what the tokenizer puts in front of every text."""
        self.tokens, self.lead = tuple(tokens), lead
        written = [token for token, spelled in enumerate(self.tokens) if spelled]
        self._order = np.array(sorted(written, key=self.tokens.__getitem__), np.int64)
        self._sorted = [self.tokens[token] for token in self._order]
        self._same: dict[bytes, list[int]] = {}
        for token in written:
            self._same.setdefault(self.tokens[token], []).append(token)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [V], bytes of every token."""
        return np.array([len(token) for token in self.tokens], np.int32)

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return int(self.lengths.max(initial=0))

    def words(self, tokens: int) -> int:
        """Words of a table that has a place for every byte of the longest text of so many tokens."""
        return (len(self.lead) + tokens * self.longest) // PLACES + 1

    def of(self, typed: str) -> bytes:
        """What texts have to be written with to begin with what was typed (`jaxrec.data.words.typed`)."""
        return self.lead + typed.encode() if typed else b""

    def going_on(self, typed: bytes, words: int) -> tuple[np.ndarray, int]:
        """The tokens that may follow after each of the P typed bytes, uint32 [words, V], and P.

        Bit m % 32 of word m // 32 is that of place m: m bytes were written. If there is no place for P bytes, nothing
        may be written.
        """
        table = np.zeros((words, len(self.tokens)), np.uint32)
        if len(typed) >= words * PLACES:
            return table, 1
        for place in range(len(typed)):
            table[place // PLACES, self._follow(typed[place:])] |= np.uint32(1 << place % PLACES)
        table[len(typed) // PLACES] |= np.uint32(1 << len(typed) % PLACES)
        return table, len(typed)

    def _follow(self, rest: bytes) -> np.ndarray:
        """Tokens that begin with the rest, or that the rest begins with."""
        # UTF-8 has no byte 255, so that the last byte has a next one.
        first, end = (bisect_left(self._sorted, bound) for bound in (rest, rest[:-1] + bytes([rest[-1] + 1])))
        sizes = range(1, min(len(rest), self.longest + 1))
        shorter = [token for size in sizes for token in self._same.get(rest[:size], ())]
        return np.concatenate([self._order[first:end], np.array(shorter, np.int64)])


def token_bytes(tokenizer: TextTokenizer, vocabulary: int = 0) -> TokenBytes:
    """The bytes of a tokenizer's tokens, and of none behind them up to `vocabulary`.

    Raises:
      UserError: as `TextTokenizer.token_bytes`.
    """
    tokens = tokenizer.token_bytes()
    tokens += [b""] * (vocabulary - len(tokens))
    sample = "a"
    (row,) = tokenizer.encode([sample])
    return TokenBytes(tokens, b"".join(tokens[token] for token in row).removesuffix(sample.encode()))
