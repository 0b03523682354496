"""Searches and suggestions: a folder's files and links, preparation and records, against plain loops."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxrec.config import UserError
from jaxrec.data.cleaning import KCore
from jaxrec.data.examples import Records, write_examples
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.sources import Folder, SyntheticMall
from jaxrec.data.tables import CHOSEN, FEEDBACK, SPLITS
from jaxrec.evaluation import evaluate, fit_baselines, make_cases, prefix_cases, search_cases

BEHAVIORS = Folder.behaviors

T = 1_700_000_000
ITEMS = [{"item_id": name, "title": f"Title {name}"} for name in ("a", "b", "c")]
SEARCHES = [
    {"user_id": "u", "timestamp": T, "query": "Red  shoes ", "search_id": "q1", "session_id": "s1"},
    {"user_id": "u", "timestamp": T + 50, "query": "boots", "search_id": "q2", "session_id": "s1"},
    {"user_id": "v", "timestamp": T, "query": "靴", "search_id": "q3", "session_id": "s1"},
]
EVENTS = [
    {"user_id": "u", "item_id": "a", "timestamp": T, "behavior": "click", "search_id": "q1", "session_id": "s1"},
    {
        "user_id": "u",
        "item_id": "a",
        "timestamp": T + 60,
        "behavior": "purchase",
        "search_id": "q1",
        "session_id": "s1",
    },
    {
        "user_id": "u",
        "item_id": "b",
        "timestamp": T + 70,
        "behavior": "purchase",
        "search_id": None,
        "session_id": "s1",
    },
    {"user_id": "v", "item_id": "c", "timestamp": T + 9, "behavior": "purchase", "search_id": "q3", "session_id": "s1"},
]
SUGGESTIONS = [
    {"user_id": "u", "timestamp": T - 3, "prefix": "re", "query": query, "feedback": feedback, "session_id": "s1"}
    for query, feedback in (("Red  shoes ", "order"), ("red hats", "show"))
]


JUDGMENTS = [
    {"query": "boots", "item_id": "a", "grade": 0},
    {"query": "boots", "item_id": "c", "grade": 3.5},
    {"query": "sold out", "item_id": "a", "grade": 4},
]


def write(folder, **tables):
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def without(rows, *columns):
    return [{name: value for name, value in row.items() if name not in columns} for row in rows]


def changed(rows, place, **values):
    return [{**row, **values} if n == place else row for n, row in enumerate(rows)]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, items=ITEMS, events=EVENTS, searches=SEARCHES, suggestions=SUGGESTIONS)
    return tmp_path


def rows_of(table, *columns):
    return sorted(tuple(row[name] for name in columns) for row in table.to_pyarrow().to_pylist())


# ---- a user's own folder ---------------------------------------------------------------------------------------------


def test_texts_and_ids_are_kept_as_written(folder):
    raw = Folder(folder).load()
    columns = ("search_id", "user_id", "timestamp", "query", "session_id")
    assert rows_of(raw.searches, *columns) == [tuple(row[name] for name in columns) for row in SEARCHES]
    assert rows_of(raw.suggestions, *SUGGESTIONS[0]) == sorted(tuple(row.values()) for row in SUGGESTIONS)
    links = {(row["item_id"], row["behavior"]): row["search_id"] for row in raw.events.to_pyarrow().to_pylist()}
    assert links == {("a", "click"): "q1", ("a", "purchase"): "q1", ("b", "purchase"): None, ("c", "purchase"): "q3"}
    assert "query" not in raw.events.columns and raw.dropped["link to an unknown search"] == 0


FAULTS = {
    "an empty query": ("searches", changed(SEARCHES, 1, query=""), "searches.jsonl, column 'query', row 2: is empty"),
    "a blank query": ("searches", changed(SEARCHES, 2, query=" \t\u3000"), "column 'query', row 3: is empty; fill"),
    "no query": ("searches", changed(SEARCHES, 0, query=None), "searches.jsonl, column 'query', row 1: is empty"),
    "a prefix of control characters": (
        "suggestions",
        changed(SUGGESTIONS, 1, prefix="\x07\u202e"),
        "column 'prefix', row 2: is empty",
    ),
    "half a character": (
        "suggestions",
        changed(SUGGESTIONS, 1, query="x\ud83d"),
        r"column 'query', row 2: half a character, \\ud83d, is no UTF-8",
    ),
    "a blank prefix": ("suggestions", changed(SUGGESTIONS, 1, prefix=" "), "column 'prefix', row 2: is empty"),
    "no suggested query": ("suggestions", changed(SUGGESTIONS, 1, query=""), "column 'query', row 2: is empty"),
    "unknown feedback": (
        "suggestions",
        changed(SUGGESTIONS, 1, feedback="buy"),
        "suggestions.jsonl, column 'feedback', row 2: 'buy' is none of order, item_click, click, show,",
    ),
    "no feedback": ("suggestions", changed(SUGGESTIONS, 0, feedback=None), "column 'feedback', row 1: None is none of"),
    "a search_id twice": (
        "searches",
        [*SEARCHES, SEARCHES[1]],
        "searches.jsonl, column 'search_id', row 4: 'q2' occurs twice; give every search an id of its own",
    ),
    "a search_id of floats": ("searches", changed(SEARCHES, 0, search_id=1.5), "'search_id', row 1: 1.5 is a floating"),
    "a link of floats": ("events", changed(EVENTS, 0, search_id=1.5), "'search_id', row 1: 1.5 is a floating-point"),
    "milliseconds": ("searches", changed(SEARCHES, 1, timestamp=T * 1000), "'timestamp', row 2: .* is in milliseconds"),
    "a time in words": ("suggestions", changed(SUGGESTIONS, 0, timestamp="noon"), "row 1: 'noon' is no time"),
    "no user": ("searches", changed(SEARCHES, 1, user_id=None), "searches.jsonl, column 'user_id', row 2: is empty"),
    "no query column": ("searches", without(SEARCHES, "query"), "searches.jsonl: the column 'query' is missing"),
    "a search of another user": (
        "events",
        changed(EVENTS, 3, search_id="q1"),
        "events.jsonl, column 'search_id', row 4: 'q1' is a search of another user",
    ),
    "another query": (
        "events",
        changed(EVENTS, 1, query="boots"),
        "events.jsonl, column 'query', row 2: 'boots' is not the query of the search that search_id names",
    ),
    "before its search": (
        "events",
        changed(EVENTS, 1, timestamp=T - 1),
        "events.jsonl, column 'timestamp', row 2: 1699999999 is before the search that search_id names",
    ),
    "mostly unknown searches": (
        "events",
        changed(changed(EVENTS, 1, search_id="q7"), 3, search_id="q8"),
        "events.jsonl, .* 2 of 3 events name a search that the searches file lacks, the first in row 2",
    ),
    "a grade beyond the scale": (
        "judgments",
        changed(JUDGMENTS, 1, grade=4.5),
        "judgments.jsonl, column 'grade', row 2: 4.5 is outside of the scale from 0 to 4; correct it, or the source's",
    ),
    "no grade": ("judgments", changed(JUDGMENTS, 0, grade=None), "column 'grade', row 1: is empty; grade the pair"),
    "a grade in words": ("judgments", changed(JUDGMENTS, 0, grade="good"), "'grade', row 1: 'good' is no number"),
    "a judged item that there isn't": (
        "judgments",
        changed(JUDGMENTS, 2, item_id="z"),
        "judgments.jsonl, column 'item_id', row 3: 'z' is no item of the items file; add it there, or leave the row",
    ),
    "a pair judged twice": (
        "judgments",
        [*JUDGMENTS, JUDGMENTS[0]],
        "judgments.jsonl, column 'item_id', row 4: 'a' was judged for this query before; keep one of the rows",
    ),
    "a judged query of blanks": ("judgments", changed(JUDGMENTS, 1, query=" "), "column 'query', row 2: is empty"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(folder, fault):
    name, rows, message = FAULTS[fault]
    write(folder, **{name: rows})
    with pytest.raises(UserError, match=message):
        Folder(folder).load()


def test_judgments_have_the_split_of_the_searches_for_their_query(folder):
    """Judgments of a query that nobody searched for are counted; without the file all is as it was."""
    plain = Folder(folder)
    before = plain.fingerprint()
    assert dataclasses.replace(plain, grades=(1, 5)).fingerprint() == before
    write(folder, judgments=JUDGMENTS)
    assert plain.fingerprint() != before and dataclasses.replace(plain, grades=(0, 5)).fingerprint() != before
    (folder / "out").mkdir()
    statistics = prepare(plain, PrepareConfig(), folder / "out")
    queries = [row["query"] for row in read(folder / "out", "queries")]
    assert read(folder / "out", "judgments") == [
        {"query_index": queries.index("boots"), "item": 0, "grade": 0.0, "split": "train"},
        {"query_index": queries.index("boots"), "item": 2, "grade": 3.5, "split": "train"},
    ]
    assert statistics["judgments"] == 2 and statistics["dropped"] == {"judgment of a dropped query or item": 1}
    (folder / "searches.jsonl").unlink()
    write(folder, events=without(EVENTS, "search_id"))
    with pytest.raises(UserError, match=r"judgments.jsonl needs searches, since a query has the split of its searches"):
        plain.load()


def test_a_query_that_is_no_utf_8_is_refused(folder):
    (folder / "searches.jsonl").unlink()
    (folder / "searches.csv").write_bytes(b"user_id,timestamp,query\nu,1700000000,boots\nu,1700000001,caf\xe9\n")
    message = r"searches.csv, column 'query', row 2: the byte 0xe9 is no UTF-8; save the file as UTF-8"
    with pytest.raises(UserError, match=message):
        Folder(folder).load()


def test_a_search_may_come_before_all_events_of_its_user(folder):
    write(folder, searches=[*SEARCHES, {**SEARCHES[1], "search_id": "q0", "timestamp": 5, "session_id": "s0"}])
    (folder / "out").mkdir()
    prepare(Folder(folder), PrepareConfig(), folder / "out")
    first = read(folder / "out", "searches")[0]
    assert (first["search_id"], first["session"], first["split"]) == ("q0", 0, "train")


def test_the_earlier_name_of_suggestions_is_refused(folder):
    (folder / "suggestions.jsonl").rename(folder / "queries.jsonl")
    with pytest.raises(UserError, match=r"queries.jsonl has the earlier name of suggestions.jsonl; rename it"):
        Folder(folder).load()


def test_links_to_unknown_searches_are_dropped_and_counted(folder):
    write(folder, events=changed(EVENTS, 0, search_id="gone"))
    raw = Folder(folder).load()
    assert raw.dropped["link to an unknown search"] == 1
    assert rows_of(raw.events.filter(raw.events.behavior == "click"), "item_id", "search_id") == [("a", None)]


def test_an_event_may_name_its_search_by_the_query(folder):
    again = {**SEARCHES[1], "timestamp": T + 65, "search_id": "q9"}
    rows = without(EVENTS, "search_id")
    events = [
        {**rows[0], "query": "Red  shoes "},
        {**rows[1], "query": "boots"},  # at T + 60: q2, not q9, which is later
        {**rows[2], "query": "boots"},  # at T + 70: the latest is q9
        {**rows[3], "query": "boots"},  # of another user alone
    ]
    write(folder, events=events, searches=[*SEARCHES, again])
    raw = Folder(folder).load()
    found = rows_of(raw.events, "user_id", "timestamp", "search_id")
    assert [row[2] for row in found] == ["q1", "q2", "q9", None]
    assert raw.dropped["link to an unknown search"] == 1


def test_searches_are_made_from_the_queries_of_events(folder):
    (folder / "searches.jsonl").unlink()
    queries = ["Red  shoes ", "Red  shoes ", None, "靴"]
    write(folder, events=[{**row, "query": query} for row, query in zip(EVENTS, queries, strict=True)])
    raw = Folder(folder).load()
    columns = ("search_id", "user_id", "timestamp", "query", "session_id")
    assert rows_of(raw.searches, *columns) == [("q1", "u", T, "Red  shoes ", "s1"), ("q3", "v", T + 9, "靴", "s1")]
    plain = without(EVENTS, "search_id", "session_id")
    later = {**plain[0], "timestamp": T + 5000}  # of another session, so another search
    write(folder, events=[{**row, "query": "x"} for row in [*plain[:2], later]])
    raw = Folder(folder).load()
    made = rows_of(raw.searches, "timestamp", "query", "session_id", "search_id")
    # The first are in the stretch of the suggestions, which have a session.
    assert [row[:3] for row in made] == [(T, "x", "s1"), (T + 5000, "x", "000000001")]
    assert [row[1] for row in rows_of(raw.events, "timestamp", "search_id")] == [made[0][3], made[0][3], made[1][3]]
    write(folder, events=changed([{**row, "query": "x"} for row in EVENTS], 3, search_id="q1"))
    with pytest.raises(UserError, match=r"'search_id', row 4: 'q1' names another user or query than another row"):
        Folder(folder).load()


def test_an_event_may_name_by_id_alone_a_search_that_another_event_tells_the_query_of(folder):
    """The search has the time of its first event, with a query or without; an id without a query is no search."""
    (folder / "searches.jsonl").unlink()
    (folder / "suggestions.jsonl").unlink()
    told = [{"query": None}, {"query": "boots"}, {"search_id": "q8", "query": None}, {"query": None}]
    events = [{**row, **more} for row, more in zip(EVENTS, told, strict=True)]
    events[3] = {**events[3], "search_id": None}
    write(folder, events=events)
    raw = Folder(folder).load()
    assert rows_of(raw.searches, "search_id", "user_id", "timestamp", "query") == [("q1", "u", T, "boots")]
    assert [row[1] for row in rows_of(raw.events, "item_id", "search_id", "timestamp")] == ["q1", "q1", None, None]
    assert raw.dropped["link to an unknown search"] == 1
    write(folder, events=changed(events, 3, search_id="q1"))
    with pytest.raises(UserError, match=r"'search_id', row 4: 'q1' names another user or query than another row"):
        Folder(folder).load()
    write(folder, events=[{**row, "query": None} for row in events])
    raw = Folder(folder).load()
    assert raw.searches is None and raw.dropped["link to an unknown search"] == 3


def test_without_searches_and_queries_a_search_id_is_not_used(folder, capsys):
    for name in ("searches", "suggestions"):
        (folder / f"{name}.jsonl").unlink()
    raw = Folder(folder).load()
    assert raw.searches is None and "search_id" not in raw.events.columns
    assert "events.jsonl: search_id is not used" in " ".join(capsys.readouterr().out.split())


def test_searches_without_an_id_get_one_that_nobody_has(folder):
    write(folder, searches=changed(without(SEARCHES[:2], "search_id"), 0, search_id="row 2") + SEARCHES[2:])
    write(folder, events=changed(changed(EVENTS, 0, search_id="row 2"), 1, search_id="row 2"))
    found = rows_of(Folder(folder).load().searches, "timestamp", "search_id")
    ids = [row[1] for row in found]
    assert len(set(ids)) == 3 and {"row 2", "q3"} < set(ids) and None not in ids
    write(folder, searches=without(SEARCHES, "search_id"), events=without(EVENTS, "search_id"))
    made = rows_of(Folder(folder).load().searches, "search_id")[0][0]
    write(folder, events=[{**row, "search_id": made} for row in EVENTS[:1]])
    with pytest.raises(UserError, match="1 of 1 events name a search that the searches file lacks"):
        Folder(folder).load()


def test_rows_without_a_session_share_that_of_the_rows_around_them(folder):
    bare = without(EVENTS, "session_id", "search_id")
    events = [
        {**bare[0], "timestamp": T + 100, "session_id": "s1", "search_id": "q1"},
        {**bare[1], "timestamp": T + 9000, "session_id": "s2"},
        {**bare[2], "timestamp": T + 90_000},
        {**bare[3], "timestamp": T + 100_020, "search_id": "q5"},
    ]
    searches = [
        {"user_id": "u", "timestamp": T + 20, "query": "x", "search_id": "q1"},  # led to the event of s1
        {"user_id": "u", "timestamp": T + 9100, "query": "x", "search_id": "q2"},  # after the event of s2
        {"user_id": "u", "timestamp": T + 8900, "query": "x", "search_id": "q3"},  # before it, with nothing earlier
        {"user_id": "u", "timestamp": T + 50_000, "query": "x", "search_id": "q4"},  # alone
        {"user_id": "v", "timestamp": T + 100_000, "query": "x", "search_id": "q5", "session_id": "mine"},
    ]
    write(folder, events=events, searches=searches, suggestions=changed(without(SUGGESTIONS, "session_id"), 0))
    raw = Folder(folder).load()
    found = {key: session for key, session in rows_of(raw.searches, "search_id", "session_id")}
    assert [found[f"q{n}"] for n in range(1, 6)] == ["s1", "s2", "s2", "000000002", "mine"]
    assert rows_of(raw.events, "timestamp", "session_id")[2:] == [(T + 90_000, "000000003"), (T + 100_020, "mine")]
    assert {row[0] for row in rows_of(raw.suggestions, "session_id")} == {"s1"}


def test_the_session_of_a_suggestion_alone_is_that_of_no_event(folder):
    """Where searches are made from the queries of events."""
    (folder / "searches.jsonl").unlink()
    rows = [{**row, "query": "x"} for row in without(EVENTS[:2], "session_id", "search_id")]
    write(folder, events=changed(rows, 1, timestamp=T + 20_000))
    write(folder, suggestions=[{**SUGGESTIONS[0], "timestamp": T + 10_000, "session_id": None}])
    raw = Folder(folder).load()
    sessions = [rows_of(table, "timestamp", "session_id") for table in (raw.events, raw.suggestions)]
    assert sessions[0] == rows_of(raw.searches, "timestamp", "session_id")
    assert sessions == [[(T, "000000000"), (T + 20_000, "000000002")], [(T + 10_000, "000000001")]]


def test_a_pause_ends_what_a_search_and_its_events_share(folder):
    bare, later = without(EVENTS, "session_id"), T + 86_400
    searches = [
        {**SEARCHES[0], "session_id": None},  # led to an event of s1 a day later
        {**SEARCHES[1], "session_id": "mine"},  # led to an event a day later, which has no session
    ]
    events = [
        {**bare[0], "timestamp": later, "session_id": "s1"},
        {**bare[1], "timestamp": later + 9000, "search_id": "q2"},
    ]
    write(folder, searches=searches, events=events)
    (folder / "suggestions.jsonl").unlink()
    raw = Folder(folder).load()
    assert rows_of(raw.searches, "search_id", "session_id") == [("q1", "mine"), ("q2", "mine")]
    assert rows_of(raw.events, "search_id", "session_id") == [("q1", "s1"), ("q2", "000000002")]


@pytest.mark.parametrize("session", [None, "x", "events"])
def test_what_a_search_leads_to_days_later_is_in_no_earlier_history(tmp_path, session):
    """A search on Monday leads to Friday's purchase; on Wednesday nobody knows of it, whatever the sessions are."""
    day, common = 86_400, {"user_id": "u", "behavior": "purchase"}
    events = [
        {**common, "item_id": "a", "timestamp": T, "session_id": "first"},
        {**common, "item_id": "b", "timestamp": T + 3 * day, "session_id": "wednesday"},
        {**common, "item_id": "c", "timestamp": T + 5 * day, "session_id": "x", "search_id": "q1"},
    ]
    if session == "events":
        events.append({**common, "behavior": "click", "item_id": "c", "timestamp": T + day, "session_id": "x"})
    given = session if session == "x" else None
    searches = [{"user_id": "u", "timestamp": T + day, "query": "boots", "search_id": "q1", "session_id": given}]
    write(tmp_path, items=ITEMS, events=events, searches=searches)
    (tmp_path / "tables").mkdir(), (tmp_path / "examples").mkdir()
    prepare(Folder(tmp_path), PrepareConfig(), tmp_path / "tables")
    write_examples(tmp_path / "tables", tmp_path / "examples", BEHAVIORS)
    found = {}
    for split in ("valid", "test"):
        for case in make_cases(Records(tmp_path / "examples", split), [BEHAVIORS.index("purchase")], split).histories:
            found[case["now"]] = sorted(zip(case["item"].tolist(), case["timestamp"].tolist(), strict=True))
    before = [(0, T), *([(2, T + day)] if session == "events" else [])]
    assert found[T + 3 * day] == before
    if session != "events":  # there x is the earlier session, since its first event is
        assert found[T + 5 * day] == [*before, (1, T + 3 * day)]


def test_the_fingerprint_follows_the_searches(folder):
    found = {Folder(folder).fingerprint()}
    (folder / "suggestions.jsonl").write_bytes((folder / "searches.jsonl").read_bytes())
    found.add(Folder(folder).fingerprint())
    (folder / "searches.jsonl").unlink()
    found.add(Folder(folder).fingerprint())
    (folder / "suggestions.jsonl").rename(folder / "searches.jsonl")
    found.add(Folder(folder).fingerprint())
    assert len(found) == 4


def test_the_example_of_the_docs_is_read(tmp_path):
    """docs/sources.md shows a file of each table: its name, then its rows in one column."""
    text = (Path(__file__).parent.parent / "docs" / "sources.md").read_text().split("### Searches and suggestions")[1]
    lines = [line[4:] for line in text.split("- **search_id**")[0].splitlines() if line.startswith("    ")]
    width = len(lines[0]) - len(lines[0].split(maxsplit=1)[1])
    files = {}
    for line in lines:
        if name := line[:width].strip():
            rows = files.setdefault(name, [])
        rows.append(line[width:])
    for name, rows in files.items():
        (tmp_path / name).write_text("\n".join(rows) + "\n")
    write(tmp_path, items=[{"item_id": name, "title": name} for name in ("p7", "p9")])
    raw = Folder(tmp_path).load()
    assert set(files) == {"searches.csv", "events.csv", "suggestions.csv"}
    assert rows_of(raw.events, "item_id", "behavior", "search_id")[:2] == [
        ("p7", "click", "q1"),
        ("p7", "purchase", "q1"),
    ]
    assert rows_of(raw.suggestions, "query", "feedback")[2] == ("running shoes", "order")
    assert {
        row[0] for table in (raw.events, raw.searches, raw.suggestions) for row in rows_of(table, "session_id")
    } == {"000000000"}


# ---- prepared, against loops -----------------------------------------------------------------------------------------


def random_folder(path, seed):
    """Users with events, searches or both, in sessions that overlap in time."""
    rng, events, searches, suggestions = np.random.default_rng(seed), [], [], []
    for user in range(14):
        for _ in range(rng.integers(1, 12)):
            session, start = f"s{rng.integers(8)}", T + int(rng.integers(0, 40)) * 1000
            common = {"user_id": f"u{user}", "session_id": session}
            found = None
            if rng.random() < 0.6:
                found = f"q{len(searches)}"
                query = f"word{rng.integers(9)}"
                searches.append({**common, "timestamp": start, "query": query, "search_id": found})
            if rng.random() < 0.4:
                for place, feedback in enumerate(rng.permutation(FEEDBACK)[: rng.integers(1, 4)]):
                    typed = {**common, "timestamp": start - 2, "prefix": f"w{rng.integers(2)}"}
                    suggestions.append({**typed, "query": f"word{place}", "feedback": str(feedback)})
            for _ in range(rng.integers(0, 4) if user < 12 else 0):
                item, behavior = f"i{rng.integers(9)}", ("click", "purchase")[rng.integers(2)]
                link = found if rng.random() < 0.7 else None
                time = start + int(rng.integers(0, 3000))
                events.append({**common, "item_id": item, "timestamp": time, "behavior": behavior, "search_id": link})
    items = [{"item_id": f"i{n}", "title": "t"} for n in range(9)]
    write(path, items=items, events=events, searches=searches, suggestions=suggestions)


@pytest.fixture(scope="module", params=["last_session", "time", "leave_one_out"])
def prepared(tmp_path_factory, request):
    """(tables, examples, statistics) of a random folder under one of the splits."""
    folder = tmp_path_factory.mktemp("random")
    random_folder(folder, 3)
    tables, examples = folder / "tables", folder / "examples"
    tables.mkdir(), examples.mkdir()
    source = Folder(folder, split=request.param)
    statistics = prepare(source, PrepareConfig(), tables)
    write_examples(tables, examples, source.behaviors)
    return tables, examples, statistics


def read(tables, name):
    return pq.read_table(tables / f"{name}.parquet").to_pylist()


def given(tables, name):
    return [json.loads(line) for line in (tables.parent / f"{name}.jsonl").read_text().splitlines()]


def test_users_are_those_of_all_tables(prepared):
    tables, _, statistics = prepared
    users = [row["user_id"] for row in read(tables, "users")]
    kept = {row["user_id"] for name in ("events", "searches", "suggestions") for row in read(tables, name)}
    assert users == sorted(kept) and statistics["users"] == len(users)
    assert set(users) - {row["user_id"] for row in read(tables, "events")}, "some users only search"
    for name in ("events", "searches", "suggestions"):
        assert all(users[row["user"]] == row["user_id"] for row in read(tables, name))


def test_every_row_is_there_or_counted(prepared):
    tables, _, statistics = prepared
    for kind, name in (("search", "searches"), ("suggestion", "suggestions")):
        rows = read(tables, name)
        dropped = statistics["dropped"].get(f"{kind} after the last target", 0)
        assert len(rows) == statistics[name] == len(given(tables, name)) - dropped
        keys = [(row["user"], row["timestamp"]) for row in rows]
        assert keys == sorted(keys)


def test_texts_are_indexed_and_counted_in_training(prepared):
    tables, _, statistics = prepared
    searches, suggestions = read(tables, "searches"), read(tables, "suggestions")
    texts = sorted({row["query"] for row in [*searches, *suggestions]})
    assert read(tables, "queries") == [
        {
            "query": text,
            "count": sum(row["query"] == text and row["split"] == "train" for row in searches),
            "chosen": sum(
                row["query"] == text and row["split"] == "train" and row["feedback"] in CHOSEN for row in suggestions
            ),
        }
        for text in texts
    ]
    prefixes = sorted({row["prefix"] for row in suggestions})
    assert read(tables, "prefixes") == [
        {"prefix": text, "count": sum(row["prefix"] == text and row["split"] == "train" for row in suggestions)}
        for text in prefixes
    ]
    assert statistics["queries"] == len(texts) and statistics["prefixes"] == len(prefixes)
    assert all(texts[row["query_index"]] == row["query"] for row in [*searches, *suggestions])
    assert all(prefixes[row["prefix_index"]] == row["prefix"] for row in suggestions)


def test_events_point_to_the_search_that_they_named(prepared):
    tables, *_ = prepared
    searches = read(tables, "searches")
    named = {}
    for row in given(tables, "events"):
        key = (row["user_id"], row["item_id"], row["behavior"], row["session_id"], row["search_id"])
        named.setdefault((row["user_id"], row["item_id"], row["behavior"], row["timestamp"]), set()).add(key[-1])
    kept = {row["search_id"] for row in searches}
    linked = 0
    for row in read(tables, "events"):
        options = named[(row["user_id"], row["item_id"], row["behavior"], row["timestamp"])]
        found = searches[row["search"]]["search_id"] if row["search"] >= 0 else None
        assert found in options or (found is None and not options & kept)
        assert found is None or searches[row["search"]]["user"] == row["user"]
        linked += found is not None
    assert linked > 20


def test_no_search_of_a_later_split_is_in_training(prepared):
    """A session has one split over all tables, and along a user's sessions the split never falls."""
    tables, _, statistics = prepared
    splits, times = {}, {name: [] for name in SPLITS}
    for name in ("events", "searches", "suggestions"):
        for row in read(tables, name):
            splits.setdefault((row["user"], row["session"]), set()).add(row["split"])
            times[row["split"]].append(row["timestamp"])
    assert all(len(found) == 1 for found in splits.values())
    for user in {user for user, _ in splits}:
        along = [SPLITS.index(next(iter(found))) for (of, _), found in sorted(splits.items()) if of == user]
        assert along == sorted(along)
    if statistics["split"] == "time":
        bought = sorted(row["timestamp"] for row in read(tables, "events") if row["behavior"] == "purchase")
        assert max(times["train"]) < np.quantile(bought, 0.8) + 1, "nothing of training is after the boundary"
    assert all(times.values())


def test_sessions_are_those_of_the_source(prepared):
    tables, _, statistics = prepared
    if statistics["split"] == "leave_one_out":  # there a session is one target event with what led to it
        targets = [row for row in read(tables, "events") if row["behavior"] == "purchase"]
        assert len({(row["user"], row["session"]) for row in targets}) == len(targets)
        return
    sessions = {}
    by_id = {row["search_id"]: row for row in given(tables, "searches")}
    for row in read(tables, "searches"):
        sessions.setdefault((row["user"], row["session"]), set()).add(by_id[row["search_id"]]["session_id"])
    keys = ("user_id", "item_id", "behavior", "timestamp")
    of_event = {tuple(row[key] for key in keys): row for row in given(tables, "events")}
    for row in read(tables, "events"):
        found = of_event[tuple(row[key] for key in keys)]["session_id"]
        sessions.setdefault((row["user"], row["session"]), set()).add(found)
    assert all(len(found) == 1 for found in sessions.values())


@pytest.mark.parametrize("split", SPLITS)
def test_records_hold_the_rows_of_the_tables(prepared, split):
    tables, examples, _ = prepared
    allowed = SPLITS[: SPLITS.index(split) + 1]
    logs = {name: read(tables, name) for name in ("events", "searches", "suggestions")}
    users = sorted({row["user"] for rows in logs.values() for row in rows if row["split"] == split})
    records = Records(examples, split)
    assert [record["user"] for record in records] == users
    for record in records:
        mine = {
            name: [
                (place, row)
                for place, row in enumerate(rows)
                if row["user"] == record["user"] and row["split"] in allowed
            ]
            for name, rows in logs.items()
        }  # fmt: skip
        places = [place for place, _ in mine["searches"]]
        links = [places.index(row["search"]) if row["search"] in places else -1 for _, row in mine["events"]]
        assert record["search"].tolist() == links and record["search"].dtype == np.int32
        for prefix, name, columns in (
            ("search", "searches", {"query": "query_index", "timestamp": "timestamp", "session": "session"}),
            ("suggestion", "suggestions", {"query": "query_index", "prefix": "prefix_index", "timestamp": "timestamp",
                                           "session": "session"}),
        ):  # fmt: skip
            for field, column in columns.items():
                assert record[f"{prefix}_{field}"].tolist() == [row[column] for _, row in mine[name]]
            found = [SPLITS.index(row["split"]) for _, row in mine[name]]
            assert record[f"{prefix}_split"].tolist() == found
        feedback = [FEEDBACK.index(row["feedback"]) for _, row in mine["suggestions"]]
        assert record["suggestion_feedback"].tolist() == feedback
        assert record["item"].tolist() == [row["item"] for _, row in mine["events"]]
    counts = json.loads((examples / "examples.json").read_text())["splits"][split]
    assert counts["searches"] == sum(len(record["search_query"]) for record in records) > 0


def test_no_history_holds_what_comes_after_its_question(prepared):
    """But for what earlier sessions hold of the very second, in histories before a session or a search."""
    _, examples, _ = prepared
    count = 0
    for split in SPLITS:
        records = Records(examples, split)
        by_user = {record["user"]: {**record, "answer_time": True} for record in records}
        asked = [search_cases(by_user.values(), [4], split), prefix_cases(by_user.values(), split)]
        for cases in (make_cases(by_user.values(), [4], split), *asked):
            for history in cases.histories:
                strict = {name for name in history if name.endswith("timestamp")}
                if "prefix" not in history:
                    strict -= {"timestamp", *(["search_timestamp"] if "query" in history else [])}
                    assert all((history[name] <= history["now"]).all() for name in {"timestamp", "search_timestamp"})
                assert all((history[name] < history["now"]).all() for name in strict)
                count += 1
    assert count > 50


@pytest.mark.parametrize("kept", ["searches", "suggestions"])
def test_a_log_may_have_searches_or_suggestions_alone(tmp_path, kept):
    """Searches that led to no event give no links, and suggestions without searches give cases too."""
    random_folder(tmp_path, 3)
    for name in {"searches", "suggestions"} - {kept}:
        (tmp_path / f"{name}.jsonl").unlink()
    write(tmp_path, events=without([json.loads(line) for line in (tmp_path / "events.jsonl").open()], "search_id"))
    (tmp_path / "tables").mkdir(), (tmp_path / "examples").mkdir()
    statistics = prepare(Folder(tmp_path), PrepareConfig(), tmp_path / "tables")
    write_examples(tmp_path / "tables", tmp_path / "examples", BEHAVIORS)
    records = Records(tmp_path / "examples", "test")
    events = read(tmp_path / "tables", "events")
    if kept == "searches":
        assert {row["search"] for row in events} == {-1} and "suggestion_query" not in records[0]
        assert all((record["search"] == -1).all() for record in records) and "prefixes" not in statistics
        assert any(len(record["search_query"]) for record in records) and not len(search_cases(records, [4]))
    else:
        assert "search" not in events[0] and "search" not in records[0] and "search_query" not in records[0]
        cases = prefix_cases(records)
        assert len(cases) and cases.new[cases.where].all() and "searches" not in statistics


def test_models_of_items_alone_are_measured_as_before(prepared):
    """Users who only search are no case, searches are no event, and the baselines count events alone."""
    _, examples, statistics = prepared
    records = list(Records(examples, "test"))
    targets, items = [BEHAVIORS.index("purchase")], statistics["items"]
    fields = ("user", "item", "behavior", "timestamp", "session", "split", "answer_time")
    plain = [{name: record[name] for name in fields} for record in records if len(record["item"])]
    rows = [
        evaluate(fit_baselines(found, items, targets), make_cases(found, targets), cutoffs=(3,))
        for found in (records, plain)
    ]
    assert rows[0] == rows[1] and len(rows[0]) > 10


def test_a_k_core_drops_the_searches_of_the_users_that_it_drops(tmp_path):
    random_folder(tmp_path, 3)
    (tmp_path / "tables").mkdir()
    prepare(Folder(tmp_path), PrepareConfig(k_core=KCore(min_sessions_per_user=3)), tmp_path / "tables")
    users = {row["user_id"] for row in read(tmp_path / "tables", "events")}
    for name in ("searches", "suggestions"):
        assert {row["user_id"] for row in read(tmp_path / "tables", name)} <= users
    assert users == {row["user_id"] for row in read(tmp_path / "tables", "users")} < {f"u{n}" for n in range(14)}


# ---- the synthetic mall ----------------------------------------------------------------------------------------------

PLAIN = SyntheticMall(users=40, items=80, tastes=5, tastes_per_user=3, sessions_per_user=5)
SEARCHED = dataclasses.replace(PLAIN, searched=0.5)


def test_searches_change_nothing_else_in_the_mall():
    plain, searched = PLAIN.load(), SEARCHED.load()
    assert plain.searches is None and plain.suggestions is None and "search_id" not in plain.events.columns
    assert searched.events.to_pyarrow().drop_columns("search_id").equals(plain.events.to_pyarrow())
    assert searched.items.to_pyarrow().equals(plain.items.to_pyarrow())
    # The fingerprint of this mall before it could be searched.
    assert PLAIN.fingerprint() == "2f1fdc38b913bdf4" != SEARCHED.fingerprint()


def test_searches_of_the_mall_name_the_taste_of_what_follows():
    raw = SEARCHED.load()
    kinds = {row["item_id"]: row["category"] for row in raw.items.to_pyarrow().to_pylist()}
    searches = {row["search_id"]: row for row in raw.searches.to_pyarrow().to_pylist()}
    led = {}
    for row in raw.events.to_pyarrow().to_pylist():
        if row["search_id"] is None:
            continue
        search = searches[row["search_id"]]
        assert kinds[row["item_id"]] in search["query"] and search["timestamp"] < row["timestamp"]
        assert (row["user_id"], row["session_id"]) == (search["user_id"], search["session_id"])
        led.setdefault(row["search_id"], set()).add(row["behavior"])
    bought = [found for found in led.values() if "purchase" in found]
    assert 0.4 < len(bought) / (40 * 5) < 0.6 and {"click"} < set.union(*led.values())
    assert 0.2 < len(led) / (40 * 5) - len(bought) / (40 * 5) < 0.35
    assert len(searches) > len(led), "some searches lead to nothing"
    chosen = {}
    rows = raw.suggestions.to_pyarrow().to_pylist()
    for row in rows:
        assert row["feedback"] == "random" or row["query"].startswith(row["prefix"])
        if row["feedback"] in CHOSEN:
            chosen[(row["user_id"], row["timestamp"] + 2, row["query"])] = row["feedback"]
    assert len(chosen) == len(searches) and {row["feedback"] for row in rows} == set(FEEDBACK)
    for search in searches.values():
        feedback = chosen[(search["user_id"], search["timestamp"], search["query"])]
        behaviors = led.get(search["search_id"], set())
        assert feedback == ("order" if "purchase" in behaviors else "item_click" if behaviors else "click")
    with pytest.raises(UserError, match=r"searched=2 is a probability"):
        dataclasses.replace(PLAIN, searched=2).load()


def test_a_search_of_the_mall_shows_results_of_its_taste_which_change_nothing_else():
    with_results = dataclasses.replace(SEARCHED, results_per_search=6)
    before, raw = SEARCHED.load(), with_results.load()
    assert before.searches.to_pyarrow().equals(raw.searches.to_pyarrow())
    rows, more = before.events.to_pyarrow(), raw.events.to_pyarrow()
    assert more.slice(0, rows.num_rows).equals(rows)
    kinds = {row["item_id"]: row["category"] for row in raw.items.to_pyarrow().to_pylist()}
    searches = {row["search_id"]: row for row in raw.searches.to_pyarrow().to_pylist()}
    shown = {}
    for row in more.slice(rows.num_rows).to_pylist():
        search = searches[row["search_id"]]
        assert row["behavior"] == "exposure" and row["timestamp"] == search["timestamp"] + 1
        assert kinds[row["item_id"]] in search["query"]
        assert (row["user_id"], row["session_id"]) == (search["user_id"], search["session_id"])
        shown.setdefault(row["search_id"], set()).add(row["item_id"])
    assert shown.keys() == searches.keys() and {len(items) for items in shown.values()} == {6}
    assert SEARCHED.fingerprint() != with_results.fingerprint()
    assert PLAIN.fingerprint() == dataclasses.replace(PLAIN, results_per_search=6).fingerprint()
    with pytest.raises(UserError, match=r"results_per_search=-1 is a number of items"):
        dataclasses.replace(SEARCHED, results_per_search=-1).load()


def test_the_best_possible_search_is_what_an_oracle_gets():
    """The k items of the searched taste with the largest shares, by simulation over many baskets."""
    config = SyntheticMall(users=4000, items=80, tastes=5, tastes_per_user=3, sessions_per_user=1, searched=1)
    from jaxrec.data.sources.synthetic_mall import _plant

    mall, hits = _plant(config), []
    for basket in mall.basket[:, -1]:
        basket = basket[basket >= 0]
        taste = mall.taste_of_item[basket[0]]
        best = np.argsort(-np.where(mall.taste_of_item == taste, mall.share, -1), kind="stable")[:3]
        hits.append(np.isin(basket, best).mean())
    assert abs(np.mean(hits) - config.best_possible_search(3)) < 4 * np.std(hits) / np.sqrt(len(hits))
