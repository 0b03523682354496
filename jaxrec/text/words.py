"""Texts as they are compared: one writing of a text, and its words."""

import re
import unicodedata
from functools import lru_cache

from jaxrec.data.queries import normalised

__all__ = ["normalised", "words"]

# Scripts written without spaces: a character of these stands as a word of its own.
_UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF),  # Thai and Lao, Burmese, Khmer
    (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),  # kana, Han
)  # fmt: skip
_ASCII_WORD = re.compile("[a-z0-9]+")


def words(text: str) -> list[str]:
    """The words of a normalised text: runs of letters, digits and marks. A character of Han, kana or Thai is a word."""
    if text.isascii():
        return _ASCII_WORD.findall(text)
    return "".join(map(_as_word, text)).split()


@lru_cache(maxsize=1 << 16)
def _as_word(character: str) -> str:
    """A character of a word as it is; a space for any other; between spaces where the script has none."""
    if unicodedata.category(character)[0] not in "LMN":
        return " "
    code = ord(character)
    return f" {character} " if any(low <= code <= high for low, high in _UNSPACED) else character
