"""Cleaning, k-core, sessions, splits and the files of a prepared folder, against plain Python and by hand."""

import hashlib
import json
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pytest

from jaxrec.config import UserError
from jaxrec.data.cleaning import KCore, drop_repeats, k_core
from jaxrec.data.pairs import PairConfig
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.splits import TimeSplit
from jaxrec.data.tables import RawTables, Tables, connect, machine_memory, mix, spilling_into, store

NAMES = ("user_id", "item_id", "timestamp", "behavior", "session_id")


@dataclass(frozen=True)
class Rows:
    """A source of rows written down in a test: (user, item, time, behavior, session)."""

    rows: tuple
    split: str = "last_session"
    behaviors: tuple = ("click", "buy")
    target_behaviors: tuple = ("buy",)
    items: tuple = field(default=())

    def load(self):
        engine = connect()
        items = sorted(set(self.items) | {row[1] for row in self.rows if row[1] != "stranger"})
        table = pa.table({"item_id": pa.array(items, pa.string()), "title": items, "text": items})
        events = pa.table(
            {name: list(column) for name, column in zip(NAMES, zip(*self.rows, strict=True), strict=True)}
        )
        return RawTables(engine, store(engine, table), store(engine, events))

    def fingerprint(self):
        return "rows"


def prepared(tmp_path, source, config=None):
    prepare(source, config or PrepareConfig(pairs=PairConfig(min_common=1)), tmp_path)
    return Tables.read(tmp_path)


def splits(tables):
    """{user: [(session, item, split), ...]} in the order of the file."""
    result = {}
    for row in tables.events.to_pylist():
        result.setdefault(row["user_id"], []).append((row["session"], row["item_id"], row["split"]))
    return result


def test_last_session_by_hand(tmp_path):
    rows = [
        ("a", "i1", 10, "buy", "s1"),
        ("a", "i2", 20, "click", "s2"),  # browsing before the validation basket belongs to it
        ("a", "i2", 30, "buy", "s3"),
        ("a", "i3", 30, "buy", "s3"),
        ("a", "i4", 40, "click", "s4"),
        ("a", "i4", 50, "buy", "s5"),
        ("a", "i1", 60, "click", "s6"),  # nothing is bought after this: dropped
        ("b", "i1", 10, "buy", "s1"),
        ("b", "i2", 20, "buy", "s2"),
        ("b", "i3", 30, "click", "s3"),  # two baskets are too few to hold one out
    ]
    tables = prepared(tmp_path, Rows(tuple(rows)))
    assert splits(tables) == {
        "a": [
            (0, "i1", "train"),
            (1, "i2", "valid"),
            (2, "i2", "valid"),
            (2, "i3", "valid"),
            (3, "i4", "test"),
            (4, "i4", "test"),
        ],
        "b": [(0, "i1", "train"), (1, "i2", "train"), (2, "i3", "train")],
    }
    assert tables.statistics["dropped"] == {"after the last target": 1}
    assert tables.statistics["events_by_behavior"] == {"click": 3, "buy": 6}
    assert tables.statistics["test_users"] == 1
    assert dict(zip(tables.items["item_id"].to_pylist(), tables.items["count"].to_pylist(), strict=True)) == {
        "i1": 2,
        "i2": 1,
        "i3": 0,
        "i4": 0,
    }


@pytest.mark.parametrize(("split", "given", "told"), [
    ("leave_one_out", None, False), ("leave_one_out", True, True), ("last_session", None, True), ("time", None, True),
    ("time", False, False),
])  # fmt: skip
def test_the_time_of_the_answer_is_told_except_on_leave_one_out(tmp_path, split, given, told):
    rows = [("u", f"i{number % 3}", 10 * number, "buy", f"s{number}") for number in range(10)]
    tables = prepared(
        tmp_path, Rows(tuple(rows), split=split), PrepareConfig(pairs=PairConfig(min_common=1), answer_time=given)
    )
    assert tables.statistics["answer_time"] is told


def test_leave_one_out_by_hand(tmp_path):
    rows = [
        ("a", "i1", 10, "buy", "s1"),
        ("a", "i2", 20, "buy", "s1"),
        ("a", "i3", 25, "click", "s1"),
        ("a", "i3", 30, "buy", "s1"),
        ("a", "i1", 40, "buy", "s2"),
        ("a", "i2", 50, "click", "s2"),
        ("b", "i1", 10, "buy", "s1"),
        ("b", "i2", 20, "buy", "s1"),
    ]
    assert splits(prepared(tmp_path, Rows(tuple(rows), split="leave_one_out"))) == {
        "a": [(0, "i1", "train"), (1, "i2", "train"), (2, "i3", "valid"), (2, "i3", "valid"), (3, "i1", "test")],
        "b": [(0, "i1", "train"), (1, "i2", "train")],
    }


def test_split_by_time_holds_a_session_out_by_its_end(tmp_path):
    rows = [
        ("a", "i1", 10, "buy", "s1"),
        ("a", "i2", 15, "buy", "s2"),
        ("a", "i3", 25, "buy", "s2"),  # ends after validation begins
        ("a", "i1", 18, "buy", "s3"),  # ends before, but follows s2
        ("b", "i1", 19, "buy", "s1"),
        ("b", "i2", 30, "buy", "s2"),
    ]
    source = Rows(tuple(rows), split="time")
    config = PrepareConfig(time_split=TimeSplit(valid_from=20, test_from=30))
    assert splits(prepared(tmp_path, source, config)) == {
        "a": [(0, "i1", "train"), (1, "i2", "valid"), (1, "i3", "valid"), (2, "i1", "valid")],
        "b": [(0, "i1", "train"), (1, "i2", "test")],
    }
    with pytest.raises(UserError, match="validation begins at 40, after test at 30"):
        prepare(source, PrepareConfig(time_split=TimeSplit(valid_from=40, test_from=30)), tmp_path)


def test_weaker_behaviors_come_first_at_one_time(tmp_path):
    rows = [("a", "i2", 5, "buy", "s1"), ("a", "i9", 5, "click", "s1"), ("a", "i1", 5, "buy", "s1")]
    tables = prepared(tmp_path, Rows(tuple(rows)))
    assert tables.events["item_id"].to_pylist() == ["i9", "i1", "i2"]


def test_repeats_and_unknown_items_are_dropped_and_counted(tmp_path):
    rows = [
        ("a", "i1", 7, "buy", "s1"), ("a", "i1", 5, "buy", "s1"), ("a", "i1", 5, "click", "s1"),
        ("a", "i1", 5, "buy", "s2"), ("a", "stranger", 5, "buy", "s2"),
    ]  # fmt: skip
    tables = prepared(tmp_path, Rows(tuple(rows)))
    assert tables.statistics["dropped"] == {"event of an unknown item": 1, "repeat inside a session": 1}
    kept = [(row["timestamp"], row["behavior"], row["session"]) for row in tables.events.to_pylist()]
    assert kept == [(5, "click", 0), (5, "buy", 0), (5, "buy", 1)]


def test_the_first_repeat_keeps_its_further_columns():
    engine = connect()
    table = pa.table({"user_id": ["a", "a"], "item_id": ["i", "i"], "timestamp": [9, 3], "behavior": ["buy", "buy"],
                      "session_id": ["s", "s"], "scenario": ["late", "early"]})  # fmt: skip
    assert drop_repeats(store(engine, table)).to_pyarrow().to_pylist()[0]["scenario"] == "early"


def test_an_event_that_a_search_led_to_is_no_repeat_of_one_before_it():
    engine = connect()
    table = pa.table(
        {
            "user_id": ["u"] * 5,
            "item_id": ["i"] * 5,
            "timestamp": [1, 2, 3, 4, 5],
            "behavior": ["click"] * 5,
            "session_id": ["s"] * 5,
            "search_id": pa.array([None, None, "q1", "q1", "q2"], pa.string()),
        }
    )
    kept = drop_repeats(store(engine, table)).order_by("timestamp").to_pyarrow().to_pylist()
    assert [(row["timestamp"], row["search_id"]) for row in kept] == [(1, None), (3, "q1"), (5, "q2")]


def plain_k_core(rows, config):
    rows = set(rows)
    turn = 0
    while turn < config.rounds or config.rounds == 0:
        size, turn = len(rows), turn + 1
        users_of = {item: {u for u, i, _ in rows if i == item} for item in {row[1] for row in rows}}
        rows = {row for row in rows if len(users_of[row[1]]) >= config.min_users_per_item}
        sessions_of = {user: {s for u, _, s in rows if u == user} for user in {row[0] for row in rows}}
        rows = {row for row in rows if len(sessions_of[row[0]]) >= config.min_sessions_per_user}
        if len(rows) == size:
            break
    return {row[1] for row in rows}, {row[0] for row in rows}


@pytest.mark.parametrize("rounds", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_k_core_equals_a_plain_loop(seed, rounds):
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{u}", f"i{i}", f"s{s}")
        for u, i, s in zip(rng.integers(0, 40, 260), rng.zipf(1.5, 260) % 60, rng.integers(0, 5, 260), strict=True)
    ]
    config, engine = KCore(min_users_per_item=4, min_sessions_per_user=4, rounds=rounds), connect()
    table = store(
        engine, pa.table(dict(zip(("user_id", "item_id", "session_id"), zip(*rows, strict=True), strict=True)))
    )
    items, users = k_core(engine, table, config)
    expected = plain_k_core(rows, config)
    assert 0 < len(expected[0]) < len({row[1] for row in rows})
    assert (set(items.to_pyarrow()["item_id"].to_pylist()), set(users.to_pyarrow()["user_id"].to_pylist())) == expected


def test_k_core_in_preparation_counts_and_refuses(tmp_path):
    rows = [("a", "i1", t, "buy", f"s{t}") for t in range(4)] + [
        ("b", "i1", 1, "buy", "s"),
        ("a", "i2", 9, "buy", "s9"),
    ]
    tables = prepared(tmp_path, Rows(tuple(rows)), PrepareConfig(k_core=KCore(min_users_per_item=2)))
    assert tables.items["item_id"].to_pylist() == ["i1"]
    assert tables.statistics["dropped"] == {"rare item or user": 1}
    with pytest.raises(UserError, match="lower min_users_per_item or min_sessions_per_user"):
        prepare(Rows(tuple(rows)), PrepareConfig(k_core=KCore(min_users_per_item=3)), tmp_path)


def test_items_without_events_stay_in_the_catalogue(tmp_path):
    rows = [("a", "i1", 1, "buy", "s")]
    tables = prepared(tmp_path, Rows(tuple(rows), items=("i0", "i5")))
    assert tables.items["item_id"].to_pylist() == ["i0", "i1", "i5"]
    assert tables.events["item"].to_pylist() == [1]


def test_a_log_without_targets_is_refused(tmp_path):
    with pytest.raises(UserError, match="no event of the behaviors that are predicted"):
        prepare(Rows((("a", "i1", 1, "click", "s"),)), PrepareConfig(), tmp_path)


def random_rows(seed, users=25):
    rng = np.random.default_rng(seed)
    return tuple(
        (f"u{user}", f"i{rng.integers(0, 30)}", int(1000 * session + rng.integers(0, 900)), 
         str(rng.choice(["click", "buy"])), f"s{session}")
        for user in range(users) for session in range(rng.integers(1, 7)) for _ in range(rng.integers(1, 6))
    )  # fmt: skip


@pytest.mark.parametrize("split", ["last_session", "leave_one_out", "time"])
@pytest.mark.parametrize("seed", range(2))
def test_splits_rise_along_sessions_and_hold_targets(tmp_path, split, seed):
    tables = prepared(tmp_path, Rows(random_rows(seed), split=split))
    rank = {"train": 0, "valid": 1, "test": 2}
    by_user = {}
    for row in tables.events.to_pylist():
        by_user.setdefault(row["user_id"], []).append((row["session"], rank[row["split"]], row["behavior"] == "buy"))
    for events in by_user.values():
        ranks = [r for _, r, _ in events]
        assert ranks == sorted(ranks)
        assert len({(s, r) for s, r, _ in events}) == len({s for s, _, _ in events})
        assert sorted({s for s, _, _ in events}) == list(range(max(s for s, _, _ in events) + 1))
        held = {s for s, r, target in events if r == 2 and target}
        if split != "time":
            targets = {s for s, _, target in events if target}
            assert held == ({max(targets)} if len(targets) >= 3 else set())
            assert not held or max(s for s, _, _ in events) in held


@pytest.mark.parametrize("split", ["last_session", "leave_one_out"])
def test_pairs_and_counts_know_nothing_of_what_is_held_out(tmp_path, split):
    """Changing only the held-out items of every user must not change pairs or counts."""
    rows = random_rows(5)
    others = tuple(f"z{n:03d}" for n in range(len(rows)))  # one for each row, so that no new repeats arise
    base = Rows(rows, split=split, items=(*(f"i{n}" for n in range(30)), *others))
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    first = prepared(tmp_path / "a", base)
    events = [(row["user_id"], row["timestamp"], row["split"]) for row in first.events.to_pylist()]
    train = {(user, time) for user, time, part in events if part == "train"}
    held = {(user, time) for user, time, part in events if part != "train"} - train
    changed = tuple((row[0], others[n] if (row[0], row[2]) in held else row[1], *row[2:]) for n, row in enumerate(rows))
    second = prepared(tmp_path / "b", Rows(changed, split=split, items=base.items))
    assert changed != rows and not first.events["item"].equals(second.events["item"])
    assert first.pairs.num_rows and first.pairs.equals(second.pairs)
    assert first.items["count"].equals(second.items["count"])


def test_same_input_same_bytes(tmp_path):
    digests = []
    for name, rows in (("a", random_rows(1)), ("b", random_rows(1)[::-1])):
        (tmp_path / name).mkdir()
        prepare(Rows(rows), PrepareConfig(), tmp_path / name)
        digests.append(
            {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((tmp_path / name).iterdir())}
        )
    assert digests[0] == digests[1]
    assert set(digests[0]) == {"items.parquet", "events.parquet", "users.parquet", "pairs.parquet", "statistics.json"}


def test_types_of_the_files(tmp_path):
    tables = prepared(tmp_path, Rows(random_rows(2)))
    types = {field.name: field.type for field in tables.events.schema}
    assert types == {
        "user": pa.int32(), "item": pa.int32(), "user_id": pa.string(), "item_id": pa.string(), "timestamp": pa.int64(),
        "behavior": pa.string(), "session": pa.int32(), "split": pa.string(),
    }  # fmt: skip
    assert tables.users["user_id"].to_pylist() == sorted(tables.users["user_id"].to_pylist())
    users, items = tables.users["user_id"].to_pylist(), tables.items["item_id"].to_pylist()
    for row in tables.events.to_pylist():
        assert users[row["user"]] == row["user_id"] and items[row["item"]] == row["item_id"]
    assert json.loads((tmp_path / "statistics.json").read_text())["items"] == tables.items.num_rows


def test_a_folder_without_tables_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no prepared tables"):
        Tables.read(tmp_path)


def setting(engine, name):
    return engine.con.execute(f"SELECT current_setting('{name}')").fetchall()[0][0]


def test_what_exceeds_the_memory_goes_into_the_prepared_folder_and_not_where_one_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXREC_DUCKDB_MEMORY", "40MB")
    (tmp_path / "tables").mkdir()
    with spilling_into(tmp_path / "tables" / ".duckdb"):
        engine = connect()
        engine.raw_sql("SET threads = 1")
        engine.raw_sql("CREATE TABLE large AS SELECT md5(i::VARCHAR) AS text FROM range(2000000) AS t(i)")
        assert list((tmp_path / "tables" / ".duckdb").iterdir())
    assert [path.name for path in tmp_path.rglob("*")] == ["tables"]

    seen = []

    @dataclass(frozen=True)
    class Spied(Rows):
        def load(self):
            raw = super().load()
            seen.append(setting(raw.engine, "temp_directory"))
            return raw

    prepare(Spied((("a", "i1", 10, "buy", "s1"),)), PrepareConfig(), tmp_path / "tables")
    assert seen == [str(tmp_path / "tables" / ".duckdb")]
    assert not setting(connect(), "temp_directory").startswith((str(tmp_path), ".tmp"))


def test_memory_of_the_engine(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrec.data.tables.machine_memory", lambda: 6 * 2**30)
    assert setting(connect(), "memory_limit") == "3.0 GiB"
    monkeypatch.setenv("JAXREC_DUCKDB_MEMORY", "2GiB")
    assert setting(connect(), "memory_limit") == "2.0 GiB"
    for wrong in ("lots", "0GB", "-1GB", "8", "1GB'; DROP"):
        monkeypatch.setenv("JAXREC_DUCKDB_MEMORY", wrong)
        with pytest.raises(UserError, match=r"JAXREC_DUCKDB_MEMORY is .*; give a size such as 8GB"):
            connect()


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("", {}, None),
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/\n", {"memory.max": "3000000"}, 3_000_000),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "2000000", "memory.max": "9000000"}, 2_000_000),
        ("3:cpu:/x\n2:cpuset,memory:/docker/1\n", {"memory/memory.limit_in_bytes": "5000000"}, 5_000_000),
        ("3:cpu:/x\n", {"x/memory.max": "1", "memory/memory.limit_in_bytes": "1"}, None),
        ("2:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
    ],
)
def test_the_limits_of_a_container_count(tmp_path, groups, limits, expected):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for name, limit in limits.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
    machine = machine_memory(tmp_path / "nothing")
    assert machine > 10_000_000
    assert machine_memory(tmp_path) == (expected or machine)


def test_mix_equals_python_integers():
    import ibis

    engine = connect()
    table = store(engine, pa.table({"a": [0, 5, 2**40], "b": [1, 2, 3]}))
    mixed = table.select(value=mix(3, ibis._.a, ibis._.b)).to_pyarrow()["value"].to_pylist()
    prime, first, second = 2**31 - 1, 1_103_515_245, 1_299_709_327
    start = (3 * 69_621 + 12_345) % prime
    expected = [
        ((start + a % prime * first % prime + b * second % prime) % prime) ** 2 % prime
        for a, b in ((0, 1), (5, 2), (2**40, 3))
    ]
    assert sorted(mixed) == sorted(expected)
