"""Searches of the synthetic mall, and the queries that it suggests for typed prefixes.

A query names a taste, so a search tells which goods the shopper wants. Three kinds of searches are planted, each at
most once a session: for the basket, which is bought; for the browsed items, which are clicked; and for a random taste,
without any event after it but what it showed. The events of the basket and of the browsed items carry the search_id of
their search, as the exposures of its results do (`results_of`).

A shopper types some letters of the query. The mall then suggests queries that begin with them, the searched one among
them. Sometimes one letter is typed first and no suggestion is chosen.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from jaxrec.data.sources.mall_words import goods, identifiers, queries_of

KINDS = ("order", "item_click", "click")
"""The feedback on the searched query, for the basket, the browsed items and the search that leads to nothing."""
RATES = (1.0, 0.5, 0.1)
"""How often each kind of search happens, as a multiple of the configured probability."""
WORDING = (0.55, 0.25, 0.12, 0.08)
"""Probability of each of the queries for a kind of goods."""
TYPED_BEFORE = 2
"""Seconds from a typed prefix to the search."""


@dataclass(frozen=True)
class Searches:
    """R searches in the order of their numbers, and G suggested queries."""

    user: np.ndarray
    """int64 [R]"""
    session: np.ndarray
    """int64 [R]"""
    timestamp: np.ndarray
    """int64 [R]"""
    query: list[str]
    """[R]"""
    taste: np.ndarray
    """int64 [R], the searched taste."""
    led: np.ndarray
    """int64 [U, T, 2]: the number of the search for the basket and for the browsed items of a session, -1 for none."""
    suggestions: dict[str, list]
    """search (its number), timestamp, prefix, query, feedback: each [G]."""

    def ids(self) -> pa.Array:
        """The search_id of every search."""
        return identifiers("q", np.arange(len(self.query)), len(self.query))


def plant_searches(
    rng: np.random.Generator, aims: tuple[np.ndarray, np.ndarray], times: np.ndarray, tastes: int, searched: float
) -> Searches:
    """Draws the searches of all sessions.

    Args:
      rng: a generator that nothing else draws from.
      aims: int [U, T] each, the taste of the basket and of the browsed items of a session, -1 where there are none.
      times: int [U, T], when the searches of a session begin.
      tastes: number of tastes.
      searched: probability that a basket is searched for.
    """
    users, sessions = times.shape
    aim = np.stack([*aims, rng.integers(0, tastes, times.shape)], axis=-1)
    happens = (rng.random((users, sessions, len(KINDS))) < searched * np.array(RATES)) & (aim >= 0)
    wording = rng.choice(len(WORDING), happens.shape, p=WORDING)
    user, session, kind = np.nonzero(happens)
    number = np.where(happens, np.cumsum(happens).reshape(happens.shape) - 1, -1)
    texts = [queries_of(goods(taste)) for taste in range(tastes)]
    chosen = zip(aim[happens], wording[happens], strict=True)
    query = [texts[taste][word] for taste, word in chosen]
    timestamp = times[user, session] + kind
    known = sorted(text for each in texts for text in each)
    suggestions = _suggest(rng, timestamp, query, kind, known)
    return Searches(user, session, timestamp, query, aim[happens], number[..., :2], suggestions)


def results_of(rng: np.random.Generator, searches: Searches, taste_of_item: np.ndarray, count: int) -> np.ndarray:
    """Items of the searched taste that each search shows, drawn without replacement: int64 [R, count].

    -1 in the place of items that a taste lacks.
    """
    results = np.full((len(searches.query), count), -1)
    for taste in np.unique(searches.taste):
        inside, rows = np.flatnonzero(taste_of_item == taste), np.flatnonzero(searches.taste == taste)
        order = np.argsort(rng.random((len(rows), len(inside))), axis=1)[:, :count]
        results[rows, : order.shape[1]] = inside[order]
    return results


def searches_table(searches: Searches, users: int, sessions: int) -> pa.Table:
    """As `RawTables.searches`."""
    return pa.table(
        {
            "search_id": searches.ids(),
            "user_id": identifiers("u", searches.user, users),
            "timestamp": searches.timestamp,
            "query": pa.array(searches.query, pa.string()),
            "session_id": identifiers("s", searches.session, sessions),
        }
    )


def suggestions_table(searches: Searches, users: int, sessions: int) -> pa.Table:
    """As `RawTables.suggestions`."""
    of = np.array(searches.suggestions["search"], np.int64)
    texts = {name: pa.array(searches.suggestions[name], pa.string()) for name in ("prefix", "query", "feedback")}
    return pa.table(
        {
            "user_id": identifiers("u", searches.user[of], users),
            "timestamp": pa.array(searches.suggestions["timestamp"], pa.int64()),
            **texts,
            "session_id": identifiers("s", searches.session[of], sessions),
        }
    )


def _suggest(
    rng: np.random.Generator, timestamp: np.ndarray, query: list[str], kind: np.ndarray, known: list[str]
) -> dict[str, list]:
    """The prefixes typed before each search, the suggested queries and the feedback on them."""
    length, first = rng.integers(2, 8, len(query)), rng.random(len(query)) < 0.3
    drawn = rng.integers(0, len(known), len(query))
    rows = []
    for number, text in enumerate(query):
        typed = text[: length[number]]
        time = int(timestamp[number]) - TYPED_BEFORE
        if first[number]:
            beginning = [other for other in known if other.startswith(text[0])]
            rows += [(number, time - 1, text[0], other, "show") for other in beginning[:4]]
        others = [other for other in known if other.startswith(typed) and other != text]
        rows.append((number, time, typed, text, KINDS[kind[number]]))
        rows += [(number, time, typed, other, "show" if at < 3 else "not_show") for at, other in enumerate(others[:6])]
        if known[drawn[number]] not in (text, *others):
            rows.append((number, time, typed, known[drawn[number]], "random"))
    names = ("search", "timestamp", "prefix", "query", "feedback")
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}
