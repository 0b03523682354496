"""Texts that must never be shown: a block list of whole texts and of words."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from jaxrec.config import UserError
from jaxrec.data.words import normalised, words


@dataclass(frozen=True)
class Blocked:
    """A block list. Writings that differ in case, width, punctuation or invisible characters are one text."""

    texts: tuple[str, ...] = ()
    """texts that are blocked as a whole: "red shoes" leaves "red shoes for men" alone"""
    words: tuple[str, ...] = ()
    """words, or several in a row, that no text may hold: "shoe" blocks "red shoe" and leaves "red shoes" alone"""

    def __post_init__(self):
        for name in ("texts", "words"):
            for text in getattr(self, name):
                if not isinstance(text, str) or not compared(text):
                    raise UserError(f"the block list's {name} hold {text!r}, which says nothing; leave it out")

    def __bool__(self) -> bool:
        return bool(self.texts or self.words)

    def holds(self, text: str) -> bool:
        """Whether a text, in any writing, must not be shown."""
        if not self:
            return False
        plain = compared(text)
        return plain in self._texts or any(f" {phrase} " in f" {plain} " for phrase in self._phrases_begun(plain))

    @cached_property
    def _texts(self) -> frozenset[str]:
        return frozenset(map(compared, self.texts))

    @cached_property
    def _phrases(self) -> dict[str, list[str]]:
        """Blocked words by the first of those in a row, so that a text's words find the few that it may hold."""
        found: dict[str, list[str]] = {}
        for phrase in map(compared, self.words):
            found.setdefault(phrase.split()[0], []).append(phrase)
        return found

    def _phrases_begun(self, plain: str) -> Iterable[str]:
        return (phrase for word in set(plain.split()) for phrase in self._phrases.get(word, ()))


NOTHING = Blocked()


def compared(text: str) -> str:
    """The words of a text with single spaces between; of one without any, such as an emoji, its normalised form."""
    if not text.isascii():
        text = "".join(character for character in text if unicodedata.category(character) != "Cf")
    known = normalised(text)
    return " ".join(words(known)) or known
