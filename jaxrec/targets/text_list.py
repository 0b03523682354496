"""The list of a space of texts: made, changed and read back."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrec.config import UserError, from_json, to_json
from jaxrec.data.blocked import NOTHING, Blocked
from jaxrec.data.words import normalised
from jaxrec.files import read_json
from jaxrec.targets.texts import OPTIONS, TEXT_LIST, TextRows, TextSpace, TextSpaceConfig
from jaxrec.text.tokenizer import TextTokenizer, load_tokenizer


def text_space(
    tokenizer: TextTokenizer,
    texts: Sequence[str] = (),
    popularity: Sequence[float] | None = None,
    config: TextSpaceConfig | None = None,
    vocabulary: int = 0,
    blocked: Blocked = NOTHING,
) -> TextSpace:
    """The space of a vetted list of texts, or of any text where there is no list.

    Writings of one text become one answer: it is shown as the most popular one is written (of equal ones the first),
    and its popularity is the sum. Blocked texts are left out of the list.

    Raises:
      UserError: a listed text is empty after `normalised`, all are blocked, the popularity is not one number a text, or
        the vocabulary has no room for the tokenizer's tokens.
    """
    listed = _merged(texts, popularity, blocked)
    if len(texts) and not listed.known:
        raise UserError("every text of the list is blocked: give others, or no list, which makes any text an answer")
    counts = None if popularity is None else listed.popularity
    return TextSpace(tokenizer, listed.shown, counts, config or TextSpaceConfig(), vocabulary, blocked, listed.known)


def changed(
    space: TextSpace,
    *,
    add: Sequence[str] = (),
    popularity: Sequence[float] | None = None,
    remove: Sequence[str] = (),
    blocked: Blocked | None = None,
) -> TextSpace:
    """The space with a changed list; the tokens of texts that stay are not made again.

    Args:
      add: texts that come, or get another popularity and writing.
      popularity: of `add`; None for 0.
      remove: texts that go, in any writing.
      blocked: the new block list; None: it stays. What it holds goes, and does not come.

    Raises:
      UserError: as `text_space`; there is no list, or none of it would be left; a text that goes is not listed, or
        comes too; a text that comes is too long.
    """
    if not space.texts:
        raise UserError("this run lists no texts, and any text is an answer: there is no list to change")
    blocked = space.blocked if blocked is None else blocked
    coming = _merged(add, popularity, blocked)
    going = {normalised(text): text for text in remove}
    both = set(coming.known) & set(going)
    for key, text in going.items():
        if not space.lists(key) or key in both:
            state = "is to be added too" if key in both else "is not listed"
            raise UserError(f"the text {text[:50]!r} can't be removed: it {state}; leave it out")
    keep = np.ones(len(space.texts), bool)
    keep[[space.numbers.known(key) for key in (*going, *coming.known) if space.lists(key)]] = False
    if blocked != space.blocked:
        keep &= [not blocked.holds(key) for key in space.known]
    staying = np.flatnonzero(keep).tolist()
    if not staying and not coming.known:
        raise UserError("no text would be left in the list: keep at least one")
    counts = None
    if space.popularity is not None or popularity is not None:
        before = np.zeros(len(keep)) if space.popularity is None else np.asarray(space.popularity, np.float64)
        counts = np.concatenate([before[keep], coming.popularity])
    new = replace(
        space,
        texts=(*(space.texts[number] for number in staying), *coming.shown),
        known=(*(space.known[number] for number in staying), *coming.known),
        popularity=counts,
        blocked=blocked,
    )
    parts = (TextRows(*(values[keep] for values in space.rows)), new.encoded(coming.known))
    new.__dict__["rows"] = TextRows(*map(np.concatenate, zip(*parts, strict=True)))
    return new


class _Merged(NamedTuple):
    """Distinct texts that are not blocked."""

    known: tuple[str, ...]
    """as they are compared"""
    shown: tuple[str, ...]
    popularity: np.ndarray
    """float64, 0 where none was given"""


def _merged(texts: Sequence[str], popularity: Sequence[float] | None, blocked: Blocked) -> _Merged:
    """One writing of every text, as `text_space`."""
    if popularity is not None and len(popularity) != len(texts):
        raise UserError(f"there are {len(popularity)} numbers of popularity for {len(texts)} texts; give one for each")
    counts = np.zeros(len(texts)) if popularity is None else np.asarray(popularity, np.float64)
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        if not (key := normalised(text)):
            raise UserError(f"the list of texts holds an empty text in row {row} ({text!r}); leave it out")
        rows.setdefault(key, []).append(row)
    rows = {key: same for key, same in rows.items() if not blocked.holds(key)}
    shown = tuple(texts[max(same, key=lambda row: counts[row])] for same in rows.values())
    return _Merged(tuple(rows), shown, np.array([counts[same].sum() for same in rows.values()], np.float64))


def load_text_space(folder: Path) -> TextSpace:
    """The space that `TextSpace.save` wrote.

    Raises:
      UserError: a file is missing or damaged.
    """
    options = read_json(folder / OPTIONS)
    texts, popularity = [], []
    try:
        for line in (folder / TEXT_LIST).read_text(encoding="utf-8").split("\n")[:-1]:
            known = json.loads(line)
            texts.append(known["text"])
            popularity.append(known["popularity"])
        vocabulary = options.pop("vocabulary")
        blocked = from_json(Blocked, options.pop("blocked", None) or to_json(NOTHING))
        config = TextSpaceConfig(**options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / TEXT_LIST} or {OPTIONS} is missing or damaged ({error}); train the run, or export it, again"
        ) from error
    counts = None if None in popularity or not popularity else np.array(popularity, np.float64)
    return TextSpace(load_tokenizer(folder), tuple(texts), counts, config, vocabulary, blocked)
