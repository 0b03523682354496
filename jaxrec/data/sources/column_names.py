"""What a shop calls the columns of its files: `--data.columns item_id="Product ID" title=Title`, and hints for it.

A pair is OURS=THEIRS. It holds for every file that has the column THEIRS, or for one alone: `items.item_id=id`.
`price=` leaves a column out. Names are compared without regard to upper and lower case.

A hint names a column only where its words mean what is looked for: `Product ID` for item_id, and not `Title`, which is
written much like it.
"""

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence

from jaxrec.config import UserError

FLAG = "--data.columns"

_MEANINGS = {
    "user_id": "user id; user; customer id; customer; client id; client; shopper; visitor id; visitor; account id; "
    "account; member id; buyer; reviewer id; user pseudo id; uid; kunde; kunden nr; kundennummer; kunden id; nutzer",
    "item_id": "item id; item; product id; product; article id; article; sku; asin; parent asin; movie id; movie; "
    "variant id; goods id; offer id; iid; artikel; artikel nr; artikelnummer; artikel id; produkt; produkt id",
    "timestamp": "timestamp; time; datetime; date; created at; event time; occurred at; event timestamp; unix time; "
    "unix review time; when; ts; at; zeit; zeitpunkt; zeitstempel; datum",
    "behavior": "behavior; behaviour; event name; event type; event; action; activity; interaction; verb; ereignis; "
    "aktion; vorgang",
    "rating": "rating; stars; score; overall; bewertung; sterne",
    "title": "title; name; product name; product title; item name; label; titel; bezeichnung; produktname",
    "category": "category; product category; categories; category code; product type; department; genre; genres; "
    "kategorie; warengruppe",
    "brand": "brand; vendor; manufacturer; maker; marke; hersteller",
    "price": "price; unit price; variant price; amount; preis; verkaufspreis",
    "text": "text; description; body; beschreibung",
    "session_id": "session id; session; visit id; user session; ga session id; sitzung",
    "query": "query; search term; search; keyword; suchbegriff; suche",
    "grade": "grade; relevance",
    "prefix": "prefix; typed",
    "feedback": "feedback",
}
"""Words that shops use for a column; of a hint alone, no file is read by them."""
_NEAR = 0.6


def parse_columns(pairs: Sequence[str], known: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    """The pairs of `--data.columns` by table, "" for all tables: {table: {ours: theirs}}.

    known: the columns that jaxrec knows, by table.

    Raises:
      UserError: a pair is no OURS=THEIRS, names no table, or resembles a column that jaxrec knows; or two pairs say
        different things.
    """
    found: dict[str, dict[str, str]] = {}
    everything = dict.fromkeys(name for names in known.values() for name in names)
    for pair in pairs:
        ours, mark, theirs = pair.partition("=")
        table, _, name = ours.strip().rpartition(".")
        table, name = (table, name) if table in known else ("", ours.strip())
        if not mark or not name:
            raise UserError(f'{FLAG} {shlex.quote(pair)}: write OURS=THEIRS, such as item_id="Product ID"')
        of = known[table] if table else everything
        near = difflib.get_close_matches(name.lower(), of, n=1, cutoff=0.85)
        if name not in of and near:
            raise UserError(f"{FLAG} {shlex.quote(pair)}: jaxrec has no column {name!r}; did you mean {near[0]}?")
        here = found.setdefault(table, {})
        if here.setdefault(name, theirs.strip()) != theirs.strip():
            raise UserError(
                f"{FLAG} gives {name!r} twice, as {here[name]!r} and {theirs!r}; keep one, or say of which table each "
                f"is, such as items.{name}=..."
            )
    for table, names in found.items():
        theirs = [column.lower() for column in names.values() if column]
        if twice := next((column for column in theirs if theirs.count(column) > 1), ""):
            raise UserError(f"{FLAG} gives the column {twice!r} two names; keep one of them")
        if table and "" in found:
            names.update({name: column for name, column in found[""].items() if name not in names})
    return found


def hints(missing: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Pairs for a flag of the columns that are missing, each column given once; and those that nothing resembles."""
    nearest = {name: max(_nearness(each, name) for each in _MEANINGS) for name in names}
    scored = [(_nearness(ours, name), ours, name) for ours in missing for name in names]
    pairs: dict[str, str] = {}
    for score, ours, name in sorted(scored, key=lambda each: -each[0]):
        # What another column means more, as `Product Category` does category, is no hint.
        if score >= max(_NEAR, nearest[name]) and ours not in pairs and name not in pairs.values():
            pairs[ours] = name
    known = [f"{ours}={shlex.quote(pairs[ours])}" for ours in missing if ours in pairs]
    return known, [ours for ours in missing if ours not in pairs]


def flag_of(missing: Sequence[str], names: Sequence[str], given: Sequence[tuple[str, str]] = ()) -> str:
    """The end of a sentence about missing columns: the flag that names them behind those given, and what there is."""
    known, unknown = hints(missing, names)
    before = [f"{ours}={shlex.quote(theirs)}" for ours, theirs in given]
    asked = " ".join([*before, *known, *(f"{ours}=..." for ours in unknown)])
    listed = f"; it has {', '.join(names)}" if unknown else ""
    return f"say which with {FLAG} {asked}{listed}"


def _words(name: str) -> list[str]:
    """The words of a name: `userPseudoID`, `user_pseudo_id` and `User pseudo ID` have the same three."""
    spaced = re.sub(r"(?<=[a-zäöüß0-9])(?=[A-ZÄÖÜ])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return re.findall(r"[^\W_]+", spaced.lower())


def _nearness(ours: str, name: str) -> float:
    """How much of a name's words and of those of a meaning of `ours` are the same, in [0, 1]."""
    words = _words(name)
    meanings = _MEANINGS.get(ours, ours.replace("_", " ")).split(";")
    return max(_overlap(words, meaning.split()) for meaning in meanings) if words else 0.0


def _overlap(words: list[str], meaning: list[str]) -> float:
    left, same = list(meaning), 0.0
    for word in words:
        near = difflib.get_close_matches(word, left, n=1, cutoff=0.8)
        if near:
            same += difflib.SequenceMatcher(None, word, near[0]).ratio()
            left.remove(near[0])
    return 2 * same / (len(words) + len(meaning))
