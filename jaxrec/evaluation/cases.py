"""Test cases: a history, optionally a query or a prefix, and the ground truth.

    make_cases     history before a session          truths: the items of the session
    search_cases   history before a search, query    truths: the items that the search led to
    prefix_cases   history before a prefix, prefix   truths: the suggested queries that the user chose
    text_cases     the same with texts in place of rows, as models read them

The time of a request is that of the search or the prefix, or of the first event of the session. No history has anything
after it, even where a user's sessions overlap, nor anything at that very second, with one exception: the history before
a session or a search keeps earlier sessions' events of that second, since some logs give days alone. Feedback on
suggestions of the request's own session is left out too, since it was given at an unknown later time.

The order of events with equal timestamps is arbitrary, but a model can learn it (data sets stored in the order of item
ids leak the ground truth). `shuffle_ties` puts such events in random order.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxrec.config import UserError
from jaxrec.data.examples import SEARCH_DTYPES, Record
from jaxrec.data.searches import before_moment, before_search, before_session, led_to, with_texts
from jaxrec.data.tables import CHOSEN, FEEDBACK, SPLITS
from jaxrec.targets.space import TargetSpace

History = dict[str, np.ndarray]


@dataclass(frozen=True)
class Cases:
    """U histories with their truths, padded to the longest list of truths."""

    users: np.ndarray
    """int32 [U]."""
    histories: list[History]
    """One a case: item int32 [T], behavior int8 [T], timestamp int64 [T], session int32 [T]; `user` int32; `now` int:
    the time of the question. Where `answer_time` of the record is False, `now` is the time of the history's last event
    instead, or of its last event or search in a case of a search or prefix. T >= 1 in a case of a session.

    Of a record with searches or suggestions, also their fields (`jaxrec.data.examples.Record`, without the split). In a
    case of a search: `query` int32, a row of queries.parquet. In a case of a prefix: `prefix` int32, a row of
    prefixes.parquet. In the history of a request, and in `text_cases`, texts stand in place of these rows.
    """
    targets: np.ndarray
    """int32 [U, L], distinct within a row, -1 where `where` is False: items, or queries in cases of prefixes, or
    numbers of texts in `text_cases`."""
    where: np.ndarray
    """bool [U, L]."""
    new: np.ndarray
    """bool [U, L]: truths not in the history, as an item of a target behavior or as a searched query."""
    cold: int = 0
    """Users left out because their history is empty; cases of searches and prefixes may have an empty history."""
    feedback: np.ndarray | None = None
    """int8 [U, L], in cases of prefixes: the strongest feedback on each query, an index in FEEDBACK; -1 in the padding.
    """
    behavior: np.ndarray | None = None
    """int8 [U, L], in cases of searches: the strongest behavior of the search with each item; -1 in the padding."""

    def __len__(self) -> int:
        return len(self.histories)

    def take(self, rows: Sequence[int]) -> "Cases":
        """The cases of these rows, e.g. `cases.take(range(256))` for a quick look during training."""
        rows = np.asarray(rows, np.int64)
        histories = [self.histories[row] for row in rows]
        told = {"feedback": self.feedback, "behavior": self.behavior}
        told = {name: values[rows] for name, values in told.items() if values is not None}
        return Cases(self.users[rows], histories, self.targets[rows], self.where[rows], self.new[rows], **told)


def make_cases(records: Iterable[Record], target_behaviors: Sequence[int], split: str = "test") -> Cases:
    """One case a user: the truths are the target items of `split`, the history is everything before their first
    session.

    A record is one user's events in order with `split` int8 [T] (index into SPLITS). Only events whose behavior is one
    of `target_behaviors` are truths; earlier sessions of the split without a truth belong to the history, but for what
    happened after the first event of the truths' session. Users without a truth are left out. Users without a history
    are left out and counted.
    """
    place = SPLITS.index(split)
    users, histories, targets, new, cold = [], [], [], [], 0
    for record in records:
        wanted = np.isin(record["behavior"], target_behaviors)
        asked = wanted & (record["split"] == place)
        if not asked.any():
            continue
        answer = np.unique(record["item"][asked])
        session = record["session"][np.argmax(asked)]
        moment = int(record["timestamp"][record["session"] == session].min())
        history = before_session(record, session, moment)
        if not len(history["item"]):
            cold += 1
            continue
        now = moment if record.get("answer_time", True) else int(history["timestamp"].max())
        users.append(int(record["user"]))
        histories.append({**history, "now": now, "user": np.int32(record["user"])})
        targets.append(answer)
        had = history["item"][np.isin(history["behavior"], target_behaviors)]
        new.append(~np.isin(answer, had))
    padded, where = _pad(targets, -1, np.int32)
    return Cases(np.array(users, np.int32), histories, padded, where, _pad(new, False, bool)[0], cold)


def search_cases(records: Iterable[Record], target_behaviors: Sequence[int], split: str = "test") -> Cases:
    """One case a search of `split` that led to target items of `split`: the truths are these items.

    The history is everything before the search, also in its own session (`before_search`), and may be empty.

    Raises:
      UserError: the records hold no searches.
    """
    place, found = SPLITS.index(split), []
    for record in records:
        _check_holds(record, "search_query", "searches")
        wanted = np.isin(record["behavior"], target_behaviors)
        truth = wanted & (record["split"] == place)
        for search in np.flatnonzero(record["search_split"] == place):
            truths = led_to(record, search, truth)
            if not len(truths):
                continue
            history = before_search(record, search)
            question = {"query": np.int32(record["search_query"][search])}
            had = history["item"][np.isin(history["behavior"], target_behaviors)]
            history |= question_of(record, history, record["search_timestamp"][search])
            led = truth & (record["search"] == search)
            behavior = np.zeros(len(truths), np.int8)
            np.maximum.at(behavior, np.searchsorted(truths, record["item"][led]), record["behavior"][led])
            found.append((history | question, truths, ~np.isin(truths, had), behavior))
    behavior, _ = _pad([each[3] for each in found], -1, np.int8)
    return dataclasses.replace(_cases_of([each[:3] for each in found]), behavior=behavior)


def prefix_cases(records: Iterable[Record], split: str = "test") -> Cases:
    """One case a typed prefix of `split` for which the user chose a suggested query: the truths are the chosen queries.

    The suggestions of one (timestamp, session, prefix) are one prefix. The history is everything strictly before it,
    and may be empty. `feedback` is the strongest on each truth.

    Raises:
      UserError: the records hold no suggestions.
    """
    place, found = SPLITS.index(split), []
    for record in records:
        _check_holds(record, "suggestion_query", "suggestions")
        chosen = (record["suggestion_feedback"] < len(CHOSEN)) & (record["suggestion_split"] == place)
        names = ("suggestion_timestamp", "suggestion_session", "suggestion_prefix")
        asked = np.stack([record[name][chosen].astype(np.int64) for name in names], axis=1)
        for moment, session, prefix in np.unique(asked, axis=0):
            rows = np.flatnonzero(chosen)[(asked == (moment, session, prefix)).all(1)]
            truths, row = np.unique(record["suggestion_query"][rows], return_inverse=True)
            feedback = np.full(len(truths), len(FEEDBACK), np.int8)
            np.minimum.at(feedback, row, record["suggestion_feedback"][rows])
            history = before_moment(record, int(moment), int(session))
            new = ~np.isin(truths, history.get("search_query", []))
            history |= question_of(record, history, int(moment))
            found.append((history | {"prefix": np.int32(prefix)}, truths, new, feedback))
    feedback, _ = _pad([each[3] for each in found], -1, np.int8)
    return dataclasses.replace(_cases_of([each[:3] for each in found]), feedback=feedback)


def cases_with_texts(cases: Cases, queries: np.ndarray, prefixes: np.ndarray | None = None) -> Cases:
    """Cases with the texts of their histories in place of rows: arguments as of `jaxrec.data.searches.with_texts`."""
    histories = [with_texts(history, queries, prefixes) for history in cases.histories]
    return dataclasses.replace(cases, histories=histories)


def text_cases(cases: Cases, space: TargetSpace, queries: np.ndarray, prefixes: np.ndarray | None = None) -> Cases:
    """Cases whose truths are queries, as a model reads and writes them: texts in place of rows, truths of `space`.

    Two writings of one text are one truth, with the stronger feedback. It is new if no search of the history is for it,
    in any writing.

    Args:
      queries, prefixes: as for `jaxrec.data.searches.with_texts`.
    """
    histories = cases_with_texts(cases, queries, prefixes).histories
    rows = [queries[targets[where]] for targets, where in zip(cases.targets, cases.where, strict=True)]
    targets, where = space.truths(rows)
    new, feedback = np.zeros_like(where), None
    for row, history in enumerate(histories):
        new[row] = where[row] & ~np.isin(targets[row], space.held(history, np.zeros(0, bool)))
    if cases.feedback is not None:
        feedback = np.full(targets.shape, -1, np.int8)
        for row, texts in enumerate(rows):
            numbers, there = space.truths([[text] for text in texts])
            given = cases.feedback[row][cases.where[row]]
            for place, number in enumerate(targets[row][where[row]]):
                feedback[row, place] = given[there[:, 0] & (numbers[:, 0] == number)].min()
    return Cases(cases.users, histories, targets, where, new, cases.cold, feedback)


def _cases_of(found: Sequence[tuple[History, np.ndarray, np.ndarray]]) -> Cases:
    """Cases of (history, truths, new)."""
    histories, truths, new = (list(column) for column in zip(*found, strict=True)) if found else ([], [], [])
    padded, where = _pad(truths, -1, np.int32)
    users = np.array([history["user"] for history in histories], np.int32)
    return Cases(users, histories, padded, where, _pad(new, False, bool)[0])


def question_of(record: Record, history: History, moment: int) -> dict:
    """Of a question about a record: `user`, and `now`: the moment, or the history's last time if that is hidden."""
    if not record.get("answer_time", True):
        times = np.concatenate([history["timestamp"], history.get("search_timestamp", [])])
        moment = times.max(initial=0)
    return {"now": int(moment), "user": np.int32(record["user"])}


def _check_holds(record: Record, field: str, name: str) -> None:
    if field not in record:
        raise UserError(f"the records hold no {name}; use data with a table of {name}, or cases of another kind")


def _pad(rows: list[np.ndarray], fill: int | bool, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(row) for row in rows], np.int64)
    where = np.arange(lengths.max(initial=1)) < lengths[:, None]
    padded = np.full(where.shape, fill, dtype)
    if rows:
        padded[where] = np.concatenate(rows)
    return padded, where


def tied_fraction(records: Iterable[Record]) -> float:
    """Share of users with events whose last two events have equal timestamps, so that their order is arbitrary.

    0 if any session has several events: the events of a basket share their timestamp, and are one target.
    """
    tied = users = 0
    for record in records:
        if len(np.unique(record["session"])) < len(record["session"]):
            return 0.0
        users += len(record["session"]) > 0
        tied += len(record["timestamp"]) > 1 and record["timestamp"][-1] == record["timestamp"][-2]
    return tied / users if users else 0.0


def shuffle_ties(record: Record, seed: int) -> Record:
    """The record with events of equal timestamp in random order; `session` and `split` keep their positions.

    The last position is still the test item, a random one of the tied events. A search of an event's own session moves
    with the event: it gets the session and the split of the event's new position, of several events the first's. The
    order depends on `seed` and the user alone, not on the order of the records.
    """
    chance = np.random.default_rng([seed, int(record["user"])]).random(len(record["item"]))
    order = np.lexsort((chance, record["timestamp"]))
    moved = {field: record[field][order] for field in ("item", "behavior")}
    return {**record, **moved, **(_move_searches(record, order) if "search" in record else {})}


def _move_searches(record: Record, order: np.ndarray) -> Record:
    """The fields of the searches, and `search`, where events int [T] were put into this order."""
    search, session, split = record["search"][order], record["search_session"].copy(), record["search_split"].copy()
    led = np.flatnonzero(search >= 0)
    own = led[record["search_session"][search[led]] == record["session"][order][led]][::-1]
    # Of repeated assignments the last stays: that of the first event.
    session[search[own]], split[search[own]] = record["session"][own], record["split"][own]
    moved = record | {"search_session": session, "search_split": split}
    by_time = np.lexsort((session, record["search_timestamp"]))
    place = np.append(np.argsort(by_time), -1).astype(search.dtype)  # -1, for no search, stays
    fields = {field: moved[field][by_time] for field in SEARCH_DTYPES}
    return fields | {"search": place[search]}
