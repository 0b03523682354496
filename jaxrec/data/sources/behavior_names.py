"""What a shop calls its behaviors: `--data.behaviors view=click add_to_cart=cart buy=purchase`.

An entry is WORD=BEHAVIOR, or a BEHAVIOR that the log itself has. Several words may be one behavior. `scroll=` leaves
the events of a word out. Behaviors that jaxrec knows are put in the order of their strength where words are given; any
other list is in that order as it stands.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import ibis

from jaxrec.config import UserError
from jaxrec.data.sources.checks import as_text

BEHAVIORS = ("pseudo_exposure", "exposure", "click", "cart", "purchase")
"""The behaviors that jaxrec knows, from weak to strong."""
FLAG = "--data.behaviors"
LISTED = 30
"""The most words of a log that a message lists."""


def parse_behaviors(entries: Sequence[str], words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Behaviors from weak to strong, and WORD=BEHAVIOR of every word of the log, from either or both of the fields.

    Raises:
      UserError: an entry is no WORD=BEHAVIOR, a word has two behaviors, or one that is not listed.
    """
    if not any("=" in entry for entry in entries):
        names = {pair.rpartition("=")[2] for pair in words} - {"", *entries}
        if names:
            raise UserError(
                f"data.words has the behavior {sorted(names)[0]!r}, which {FLAG} {' '.join(entries)} lacks; give "
                f"{FLAG} as WORD=BEHAVIOR, such as view=click"
            )
        return tuple(entries), tuple(words)
    pairs: dict[str, str] = {}
    for entry in entries:
        word, _, name = entry.rpartition("=") if "=" in entry else (entry, "=", entry)
        word, name = word.strip(), name.strip()
        if not word:
            raise UserError(f"{FLAG} {shlex.quote(entry)}: write WORD=BEHAVIOR, such as view=click")
        if pairs.setdefault(word, name) != name:
            raise UserError(f"{FLAG} gives {word!r} twice, as {pairs[word]!r} and {name!r}; keep one of them")
    names = [name for name in dict.fromkeys(pairs.values()) if name]
    if not names:
        raise UserError(f"{FLAG} leaves all events out; give one a behavior, such as buy=purchase")
    if set(names) <= set(BEHAVIORS):
        names.sort(key=BEHAVIORS.index)
    return tuple(names), tuple(f"{word}={name}" for word, name in pairs.items())


def known_words(behaviors: Sequence[str], words: Sequence[str]) -> dict[str, str]:
    """The behavior of every word of the log; "" where its events are left out."""
    if not words:
        return {name: name for name in behaviors}
    return {word: name for word, _, name in (pair.rpartition("=") for pair in words)}


def check_known(path: Path, table: ibis.Table, behaviors: Sequence[str], words: Sequence[str]) -> None:
    """Checks that all words of the column `behavior` are known.

    Raises:
      UserError: some are not; the message lists them with their numbers of rows, and the flag.
    """
    known = known_words(behaviors, words)
    word = as_text(table.behavior)
    strange = table.filter(word.notnull() & ~word.isin(list(known)))
    strange = strange.group_by(word=as_text(strange.behavior)).agg(n=strange.count(), row=strange._row.min())
    found = strange.order_by([ibis.desc("n"), "word"]).limit(LISTED + 1).to_pyarrow().to_pylist()
    if not found:
        return
    first = min(found, key=lambda each: each["row"])
    shown = ", ".join(f"{each['word']!r} ({each['n']:,} rows)" for each in found[:LISTED])
    more = ", and more" if len(found) > LISTED else ""
    given = list(map(shlex.quote, words))
    asked = [f"{shlex.quote(each['word'])}=..." for each in found[:LISTED]]
    flag = f"{FLAG} {' '.join(given + asked)}"
    raise UserError(
        f"{path}, column 'behavior', row {first['row']}: "
        f"{first['word']!r} is none of {', '.join(known)}; say "
        f"what each word means, or leave its events out by a word with nothing behind its =: {flag} "
        f"(the log has {shown}{more}; behaviors are {', '.join(BEHAVIORS)}, or your own)"
    )


def translated(column: ibis.Value, words: Sequence[str]) -> ibis.expr.types.StringValue:
    """The behaviors of a column of words; "" for those that are left out."""
    text = as_text(column)
    if not words:
        return text
    pairs = known_words((), words)
    return ibis.cases(*((text == word, name) for word, name in pairs.items()), else_=text)
