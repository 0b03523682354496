"""Suggestions derived from whole queries: against plain loops, and what a request for one of them may know."""

import json
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.config import UserError, load_config, parse_cli, to_json
from jaxrec.data.examples import Records, write_examples
from jaxrec.data.prefix_cuts import PrefixCutConfig, cut_prefixes
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.searches import before_moment
from jaxrec.data.sources import ClickLog, Folder, SyntheticMall
from jaxrec.data.tables import CHOSEN, connect, store
from jaxrec.data.words import normalised
from jaxrec.evaluation import prefix_cases

POOL = ("Xbox 360", "xbox  360", "xbox live", "XBOX kinect", "xbox", "halo", "halo 3", "ha", "靴下 赤", "靴下", "h")
LED = ("purchase", "click", "exposure", "")


def random_activity(seed=0, users=5, sessions=6):
    """Rows of searches and events; every fourth search shares its second with the one before."""
    rng, rows = np.random.default_rng(seed), []
    for user in range(users):
        time = 1000 * user
        for session in range(sessions):
            split = ("train", "valid", "test")[max(0, session - sessions + 3)]
            for number in range(3):
                time += int(rng.integers(2, 50)) * (number != 2)
                name = f"{user}/{session}/{number}"
                common = {"user_id": f"u{user}", "session": session, "split": split, "search_id": name}
                query, led = rng.choice(POOL), rng.choice(LED)
                rows.append(
                    {**common, "timestamp": time, "query": str(query), "behavior": "", "_kind": "search"},
                )
                for behavior in {led, "exposure"} - {""}:
                    rows.append(
                        {**common, "timestamp": time + 1, "query": None, "behavior": behavior, "_kind": "event"},
                    )
    return rows


def derived(rows, **config):
    """(The suggestions as dicts, what was dropped)."""
    engine, dropped = connect(), {}
    table = cut_prefixes(engine, store(engine, pa.Table.from_pylist(rows)), PrefixCutConfig(**config), dropped)
    return table.to_pyarrow().to_pylist(), dropped


def sorted_rows(rows):
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


def lists_of(rows):
    """The rows of each prefix of a second."""
    lists = defaultdict(list)
    for row in rows:
        lists[row["user_id"], row["session"], row["timestamp"], row["prefix"]].append(row)
    return lists


def level_of(rows, search):
    led = {row["behavior"] for row in rows if row["_kind"] == "event" and row["search_id"] == search["search_id"]}
    return "order" if "purchase" in led else "item_click" if "click" in led else "click"


def test_every_keystroke_of_every_search_is_a_prefix_with_its_feedback():
    rows = random_activity()
    expected = {}
    for search in (row for row in rows if row["_kind"] == "search"):
        text = normalised(search["query"])
        for end in range(2, len(text)):
            names = ("user_id", "session", "split", "query")
            key = (*(search[name] for name in names), search["timestamp"] - 1, text[:end])
            expected.setdefault(key, []).append(level_of(rows, search))
    found, dropped = derived(rows, cut="keystrokes")
    chosen = {
        tuple(row[name] for name in ("user_id", "session", "split", "query", "timestamp", "prefix")): row["feedback"]
        for row in found
        if row["feedback"] in CHOSEN
    }
    assert chosen == {key: min(levels, key=CHOSEN.index) for key, levels in expected.items()}
    short = [row for row in rows if row["_kind"] == "search" and len(normalised(row["query"])) <= 2]
    assert dropped == {"search too short for a prefix": len(short)} and short


@pytest.mark.parametrize("cut", ["random", "keystrokes"])
def test_lists_of_training_are_what_the_most_popular_completion_shows(cut):
    """Against a loop over all training searches; validation and test have chosen queries alone."""
    rows = random_activity(1)
    found, _ = derived(rows, cut=cut, shown=2, not_shown=1, random=2)
    train = [row for row in rows if row["_kind"] == "search" and row["split"] == "train"]
    counts = Counter(text for *_, text in {(row["user_id"], row["session"], normalised(row["query"])) for row in train})
    writings = Counter(row["query"] for row in train)
    lists, drawn = lists_of(found), 0
    assert {row["split"] for row in found} == {"train", "valid", "test"}
    for (*_rest, prefix), suggested in lists.items():
        by_feedback = defaultdict(list)
        for row in suggested:
            by_feedback[row["feedback"]].append(row["query"])
        chosen = {normalised(query) for level in CHOSEN for query in by_feedback[level]}
        assert chosen and all(text.startswith(prefix) and len(text) > len(prefix) >= 2 for text in chosen)
        if suggested[0]["split"] != "train":
            assert set(by_feedback) <= set(CHOSEN)
            continue
        begun = sorted((text for text in counts if text.startswith(prefix)), key=lambda text: (-counts[text], text))
        begun = [text for text in begun if text not in chosen]
        assert sorted(map(normalised, by_feedback["show"])) == sorted(begun[:2])
        assert list(map(normalised, by_feedback["not_show"])) == begun[2:3]
        others = [normalised(row["query"]) for row in suggested if row["feedback"] not in CHOSEN]
        assert len(set(others)) == len(others) and chosen.isdisjoint(others) and set(others) <= set(counts)
        assert len(by_feedback["random"]) <= 2
        drawn += len(by_feedback["random"])
        for row in suggested:
            if row["feedback"] not in CHOSEN:
                same = [query for query in writings if normalised(query) == normalised(row["query"])]
                assert row["query"] == min(same, key=lambda query: (-writings[query], query))
    assert {row["feedback"] for row in found} >= {"show", "not_show"}
    # Of so few queries, all that were drawn may be in the list already.
    assert drawn > 1.8 * sum(suggested[0]["split"] == "train" for suggested in lists.values())


def test_rows_alone_decide_and_the_seed():
    rows = random_activity(2)
    found, _ = derived(rows)
    shuffled = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    assert sorted_rows(derived(shuffled)[0]) == sorted_rows(found)
    fewer = [row for row in found if row["user_id"] != "u0" and row["feedback"] in CHOSEN]
    without, _ = derived([row for row in rows if row["user_id"] != "u0"])
    assert sorted_rows(row for row in without if row["feedback"] in CHOSEN) == sorted_rows(fewer)
    assert sorted_rows(derived(rows, seed=1)[0]) != sorted_rows(found)


def test_random_cuts_have_every_length():
    rows = [
        {"user_id": f"u{user}", "session": 0, "split": "train", "search_id": str(user), "timestamp": 7 * user}
        | {"query": "halo 3", "behavior": "", "_kind": "search"}
        for user in range(400)
    ]
    found, _ = derived(rows)
    lengths = Counter(len(row["prefix"]) for row in found)
    assert set(lengths) == {2, 3, 4, 5} and min(lengths.values()) > 60
    # Of a log of one query nothing else can be shown.
    assert {row["feedback"] for row in found} == {"click"}


def test_the_last_sessions_get_prefixes_and_all_count():
    rows = random_activity(3, users=3)
    found, _ = derived(rows, last_sessions=4, cut="keystrokes")
    assert {row["session"] for row in found} == {2, 3, 4, 5}
    everything, _ = derived(rows, cut="keystrokes")
    assert sorted_rows(found) == sorted_rows(row for row in everything if row["session"] >= 2)


def test_events_of_a_later_split_say_nothing():
    rows = random_activity(4)
    (search, *_), late = rows, {**rows[0], "query": None, "behavior": "purchase", "_kind": "event", "split": "test"}
    kept = [row for row in rows if row is search or row["search_id"] != search["search_id"]]
    kept[0] = {**search, "query": "quite another"}
    for event, feedback in ((late, "click"), ({**late, "split": search["split"]}, "order")):
        found, _ = derived([*kept, event])
        assert [row["feedback"] for row in found if row["query"] == "quite another" and row["feedback"] in CHOSEN] == [
            feedback
        ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cut": "words"}, "'prepare.suggestions.cut' is 'words'; give one of random, keystrokes"),
        ({"shown": -1}, "'prepare.suggestions.shown' is -1; give 0 or more"),
        ({"last_sessions": -1}, "'prepare.suggestions.last_sessions' is -1"),
    ],
)
def test_configurations_are_checked(config, message):
    with pytest.raises(UserError, match=message):
        PrefixCutConfig(**config)


def test_a_log_of_two_letters_has_nothing_to_cut():
    with pytest.raises(UserError, match="no search has more than 2 characters"):
        derived([{**row, "query": "ab"} for row in random_activity()])


def test_logs_that_cannot_be_cut(tmp_path):
    config = PrepareConfig(suggestions=PrefixCutConfig())
    mall = SyntheticMall(users=20, items=60, tastes=6, sessions_per_user=3)
    with pytest.raises(UserError, match="SyntheticMall has no searches"):
        prepare(mall, config, tmp_path)
    mall = SyntheticMall(users=20, items=60, tastes=6, sessions_per_user=3, searched=1)
    with pytest.raises(UserError, match="SyntheticMall has suggestions of its own"):
        prepare(mall, config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_runs_without_cuts_keep_their_fingerprint():
    config = PrepareConfig()
    assert "suggestions" not in config.inputs() and config.inputs().keys() | {"suggestions"} == to_json(config).keys()
    cut = PrepareConfig(suggestions=PrefixCutConfig(seed=3))
    assert cut.inputs()["suggestions"]["seed"] == 3


# ---- through preparation ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The tables and examples of a click log of random queries."""
    folder, rng = tmp_path_factory.mktemp("cuts"), np.random.default_rng(0)
    lines = ["user,time,query,item"]
    for user in range(6):
        for session in range(4):
            for search in range(2):
                # Two searches of a session in one second, and the next one second later.
                time = 100_000 * (session + 1) + 50 * user + (search if user % 2 else 0)
                lines += [f"u{user},{time},{rng.choice(POOL)},i{rng.integers(5)}"]
    (folder / "log.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = ClickLog(folder / "log.csv", split="last_session")
    for name in ("tables", "examples"):
        (folder / name).mkdir()
    cuts = PrefixCutConfig(cut="keystrokes")
    statistics = prepare(source, PrepareConfig(suggestions=cuts), folder / "tables")
    write_examples(folder / "tables", folder / "examples", source.behaviors)
    return folder, statistics


def test_prepared_tables_hold_the_cuts(run):
    folder, statistics = run
    rows = pq.read_table(folder / "tables" / "suggestions.parquet").to_pylist()
    searches = pq.read_table(folder / "tables" / "searches.parquet").to_pylist()
    queries = pq.read_table(folder / "tables" / "queries.parquet").to_pylist()
    assert statistics["suggestions"] == len(rows) and statistics["suggestions_cut_from_searches"] == "keystrokes"
    asked = {(row["user_id"], row["session"], row["timestamp"] - 1, row["query"], row["split"]) for row in searches}
    chosen = [row for row in rows if row["feedback"] in CHOSEN]
    names = ("user_id", "session", "timestamp", "query", "split")
    assert {tuple(row[name] for name in names) for row in chosen} <= asked
    assert {row["feedback"] for row in chosen} == {"item_click"}  # a click is no order
    assert {row["query"] for row in queries} == {row["query"] for row in searches}
    trained = Counter(row["query"] for row in chosen if row["split"] == "train")
    assert all(row["chosen"] == trained[row["query"]] for row in queries)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_no_history_before_a_prefix_holds_its_search(run, split):
    folder, _ = run
    records = Records(folder / "examples", split)
    seen = 0
    for record in records:
        chosen = np.flatnonzero(record["suggestion_feedback"] < len(CHOSEN))
        for row in chosen:
            moment, session = (int(record[f"suggestion_{name}"][row]) for name in ("timestamp", "session"))
            history = before_moment(record, moment, session)
            same = record["search_query"] == record["suggestion_query"][row]
            assert (same & (record["search_timestamp"] == moment + 1)).any()
            assert (history["search_timestamp"] < moment).all() and (history["timestamp"] < moment).all()
            assert (history["suggestion_session"] < session).all()
            seen += 1
    assert seen > 10
    cases = prefix_cases(records, split)
    for history, truths in zip(cases.histories, cases.targets, strict=True):
        assert history["now"] not in history["search_timestamp"] and len(truths)


def test_the_command_line_takes_cuts(tmp_path):
    path = tmp_path / "cut.py"
    path.write_text(
        "from dataclasses import dataclass, field\n"
        "from jaxrec.data.prepare import PrepareConfig\n"
        "@dataclass(frozen=True)\nclass Cut:\n    prepare: PrepareConfig = field(default_factory=PrepareConfig)\n"
        "    system: str = 'cut'\n"
        "config = Cut()\n"
    )
    assert load_config(path).prepare.suggestions is None
    flags = ["--prepare.suggestions", "PrefixCutConfig", "--prepare.suggestions.cut", "keystrokes"]
    config, _ = parse_cli([str(path), "--run", str(tmp_path / "run"), *flags])
    assert config.prepare.suggestions == PrefixCutConfig(cut="keystrokes")


def test_a_folder_with_one_user_and_one_query(tmp_path):
    tables = {
        "items": [{"item_id": "a", "title": "A"}],
        "events": [{"user_id": "u", "item_id": "a", "timestamp": 50, "behavior": "purchase", "query": "boots"}],
    }
    for name, rows in tables.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "out").mkdir()
    prepare(Folder(tmp_path), PrepareConfig(suggestions=PrefixCutConfig()), tmp_path / "out")
    (row,) = pq.read_table(tmp_path / "out" / "suggestions.parquet").to_pylist()
    assert (row["query"], row["feedback"], row["timestamp"]) == ("boots", "order", 49)
