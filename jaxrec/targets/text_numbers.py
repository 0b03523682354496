"""Numbers of texts, listed or not: what answers that are texts are compared by."""

import threading
from collections import OrderedDict
from collections.abc import Iterable

from jaxrec.config import UserError

REMEMBERED = 1 << 20
"""Texts outside the list that keep their numbers after they were generated; of more, the oldest are forgotten."""


class TextNumbers:
    """Numbers of normalised texts: those of a list, true ones and generated ones. Safe to use from several threads.

    Generated texts are forgotten when there are too many, so that a server's memory doesn't grow; numbers are never
    given again.
    """

    def __init__(self, listed: Iterable[str], remembered: int = REMEMBERED):
        self._kept = {text: number for number, text in enumerate(dict.fromkeys(listed))}
        self._texts = dict(enumerate(self._kept))
        self._passing: OrderedDict[str, int] = OrderedDict()
        self._next, self._remembered, self._lock = len(self._kept), remembered, threading.Lock()

    def __len__(self) -> int:
        return len(self._texts)

    def known(self, text: str) -> int | None:
        """The number of a text that has one."""
        with self._lock:
            return self._kept.get(text, self._passing.get(text))

    def of(self, text: str, for_good: bool = False) -> int:
        """The number of a text; a new one gets the next. `for_good`: it is never forgotten."""
        with self._lock:
            number = self._kept.get(text, self._passing.get(text))
            if number is None:
                number, self._next = self._next, self._next + 1
                self._texts[number] = text
            if for_good:
                self._kept[text] = number
                self._passing.pop(text, None)
            elif text not in self._kept:
                self._passing[text] = number
                self._passing.move_to_end(text)
                if len(self._passing) > self._remembered:
                    del self._texts[self._passing.popitem(last=False)[1]]
            return number

    def text(self, number: int) -> str:
        """The normalised text of a number.

        Raises:
          UserError: no text has it, or it was forgotten.
        """
        with self._lock:
            if number not in self._texts:
                raise UserError(f"no text has the number {number}, or it was generated too long ago")
            return self._texts[number]
