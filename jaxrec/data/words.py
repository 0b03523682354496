"""Texts as they are compared: one writing of a text, and its words."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# Scripts written without spaces: a character of these stands as a word of its own.
_UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF),  # Thai and Lao, Burmese, Khmer
    (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),  # kana, Han
)  # fmt: skip
_ASCII_WORD = re.compile("[a-z0-9]+")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200b]")
"""Control characters and the zero-width space: they part words and are not seen."""
_UNSEEN = re.compile("[\u00ad\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
"""Soft hyphens, marks of direction, byte order marks. Joiners stay: they make other letters and emoji."""


def normalised(text: str) -> str:
    """What texts are compared by: NFKC, case folded, white space as single spaces and none at the ends.

    Control characters are white space, and what can't be seen is left out. The tables hold texts as they were typed.
    Models, and whatever counts texts, read them in this form.
    """
    if not text.isprintable():
        text = _CONTROL.sub(" ", text)
    if text.isascii():  # where all of this is to lower the letters
        return " ".join(text.lower().split())
    text, before = _UNSEEN.sub("", text), None
    while text != before:  # folding can leave what NFKC composes, and the other way round
        before, text = text, unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.split())


def typed(text: str) -> str:
    """What was typed so far, `normalised`, but with the space at its end: "red " begins "red shoes" and not "redwood".

    A normalised text completes what was typed if it begins with this.
    """
    known = normalised(text)
    return f"{known} " if known and text[-1].isspace() else known


def distinct(texts: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Distinct normalised texts in alphabetical order, and the number of each text, int64 [n]."""
    folded = [normalised(text) for text in texts]
    known = sorted(set(folded))
    number = {text: at for at, text in enumerate(known)}
    return tuple(known), np.array([number[text] for text in folded], np.int64)


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
