"""Pair statistics on Spark equal those on DuckDB, bit for bit. Run by `make test-spark`, which installs Spark."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.config import UserError
from jaxrec.data.cleaning import KCore
from jaxrec.data.pairs import PairConfig, build_pairs, itemcf_scores, overlap_by_item, overlap_by_pair, swing_scores
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.sources import SyntheticMall
from jaxrec.data.spark import connect_spark
from jaxrec.data.tables import RawTables, connect, mix, store

# Spark and ibis call what pandas is about to change.
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")


@pytest.fixture(scope="module")
def spark():
    engine = connect_spark(memory="1g")
    engine.raw_sql("SET spark.sql.shuffle.partitions = 2")
    return engine


def log(seed, users=40, items=30, events=600):
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "user": rng.integers(0, users, events).astype(np.int32),
            "session": rng.integers(0, 4, events).astype(np.int32),
            "item": np.minimum(rng.zipf(1.4, events) - 1, items - 1).astype(np.int32),
        }
    )


CASES = {
    "defaults": PairConfig(),
    "everything": PairConfig(min_common=1, max_users_per_pair=10**6, max_items_per_group=10**6),
    "by user": PairConfig(itemcf_within="user", min_common=1),
    "tight limits": PairConfig(
        max_pairs_per_item=2, min_common=1, candidates_per_item=5, max_items_per_group=4, max_users_per_pair=3, seed=5
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_pairs_as_on_duckdb(spark, case):
    events, duckdb = log(3), connect()
    ours = build_pairs(spark, store(spark, events), CASES[case])
    assert ours.num_rows and ours.equals(build_pairs(duckdb, store(duckdb, events), CASES[case]))


def test_no_pair_is_an_empty_table(spark):
    events = pa.table({name: pa.array([0, 1], pa.int32()) for name in ("user", "session", "item")})
    pairs = build_pairs(spark, store(spark, events), PairConfig())
    assert pairs.num_rows == 0 and pairs.schema.types == [pa.int32(), pa.int32(), pa.float32(), pa.string()]


def test_intermediate_results_are_freed(spark):
    events = store(spark, log(1))
    before = set(spark.list_tables())
    build_pairs(spark, events, PairConfig())
    # What is given stays; what is taken over from it and all else goes.
    assert set(spark.list_tables()) <= before


def test_a_missing_java_is_named(monkeypatch, tmp_path):
    from jaxrec.data import spark as module

    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"JAVA_HOME is .* holds no bin/java"):
        module._check_java()


def test_a_java_that_is_not_there_is_named(monkeypatch, tmp_path):
    from jaxrec.data import spark as module

    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="install Java 17 or newer or set JAVA_HOME"):
        module._check_java()


def sorted_rows(table, *keys):
    return table.order_by(*keys).to_pyarrow()


def test_scores_are_equal_before_they_are_rounded(spark):
    """Float64 as the engines leave it, sums of many terms among them: users of many items, candidates without limit."""
    config = PairConfig(min_common=1, candidates_per_item=10**6, max_users_per_pair=10**6, swing_alpha=0.7)
    results = {}
    for engine in (spark, connect()):
        events = store(engine, store(engine, log(5, users=60, items=20, events=900)).distinct())
        itemcf = itemcf_scores(engine, events, ["user", "session"], config)
        swing = swing_scores(engine, events, itemcf, config)
        results[engine.name] = [sorted_rows(table, "item", "other") for table in (itemcf, swing)]
    for ours, expected in zip(results["pyspark"], results["duckdb"], strict=True):
        assert ours.num_rows > 50 and ours.equals(expected)


def test_ties_fall_alike(spark):
    # Every user has the same items, so that all pairs have one score, and the limits cut through them.
    rows = [(user, session, item) for user in range(6) for session in range(2) for item in range(12)]
    events = pa.table(
        dict(zip(("user", "session", "item"), (pa.array(c, pa.int32()) for c in zip(*rows)), strict=True))
    )
    config = PairConfig(max_pairs_per_item=3, candidates_per_item=4, max_users_per_pair=4, max_items_per_group=9)
    ours, expected = (build_pairs(engine, store(engine, events), config) for engine in (spark, connect()))
    assert ours.num_rows and ours.equals(expected)


def test_an_empty_log(spark):
    ours, expected = (build_pairs(e, store(e, log(0).slice(0, 0)), PairConfig()) for e in (spark, connect()))
    assert ours.num_rows == 0 and ours.equals(expected)


def test_both_ways_to_an_overlap(spark):
    pairs = pa.table({"user": [0, 0, 1], "partner": [1, 2, 2], "size": [3, 3, 2], "size_partner": [2, 3, 3]})
    users = pa.table({"user": [0, 0, 0, 1, 1, 2, 2, 2], "item": [1, 2, 3, 1, 2, 2, 3, 4]})
    users, pairs = store(spark, users), store(spark, pairs)
    for count in (overlap_by_item, overlap_by_pair):
        assert sorted_rows(count(users, pairs), "user", "partner")["overlap"].to_pylist() == [2, 2, 1]


def test_pseudo_random_numbers_are_the_same(spark):
    table = pa.table({"a": [0, 1, 2**31 - 1, 2**40], "b": [3, 2, 1, 0], "c": [7, 7, 7, 2**62]})
    ours, expected = (
        sorted_rows(store(e, table).select("a", r=mix(11, ibis._.a, ibis._.b, ibis._.c)), "a")
        for e in (spark, connect())
    )
    assert ours.equals(expected) and len(set(ours["r"].to_pylist())) == 4


def test_rows_are_stored_as_they_are(spark):
    table = pa.table({"n": [1, None, 2**53 + 1], "text": ["é", None, ""], "many": [[1.5], None, []]})
    stored = store(spark, table)
    assert stored.filter(stored.n == 2**53 + 1).count().to_pyarrow().as_py() == 1
    kept = sorted_rows(stored.drop("n"), "text").to_pylist()
    assert kept == [{"text": "", "many": []}, {"text": "é", "many": [1.5]}, {"text": None, "many": None}]


@dataclass(frozen=True)
class Warehouse:
    """A source whose tables live on an engine that was there before, under names of their own."""

    engine: ibis.BaseBackend
    split: str
    behaviors = SyntheticMall.behaviors
    target_behaviors = SyntheticMall.target_behaviors

    def load(self):
        made = SyntheticMall(users=40, items=60, tastes=6, sessions_per_user=5).load()
        name = f"own_{self.split}"
        for part in ("items", "events"):
            self.engine.create_table(f"{name}_{part}", store(self.engine, getattr(made, part).to_pyarrow()))
        return RawTables(self.engine, self.engine.table(f"{name}_items"), self.engine.table(f"{name}_events"))

    def fingerprint(self):
        return "warehouse"


@pytest.mark.parametrize("split", ["last_session", "leave_one_out", "time"])
def test_preparation_as_a_whole(spark, split, tmp_path):
    config = PrepareConfig(k_core=KCore(2, 2, rounds=1), pairs=PairConfig(min_common=1))
    for engine in (spark, connect()):
        (tmp_path / engine.name).mkdir()
        prepare(Warehouse(engine, split), config, tmp_path / engine.name)
    assert {f"own_{split}_items", f"own_{split}_events"} <= set(spark.list_tables()), "a user's tables are left alone"
    for name in ("items", "events", "users", "pairs"):
        ours, expected = (pq.read_table(tmp_path / on / f"{name}.parquet") for on in ("pyspark", "duckdb"))
        assert ours.num_rows and ours.equals(expected), name
    ours, expected = ((tmp_path / on / "statistics.json").read_text() for on in ("pyspark", "duckdb"))
    assert ours == expected


def test_a_session_that_is_given_is_used(spark):
    session = spark.raw_sql("SELECT 1").sparkSession.newSession()
    session.conf.set("spark.sql.session.timeZone", "Asia/Tokyo")
    engine = connect_spark(session)
    assert engine.raw_sql("SELECT 1").sparkSession is session
    assert session.conf.get("spark.sql.session.timeZone") == "UTC"


ALONE = """
import pyarrow as pa
from jaxrec.data.spark import connect_spark
from jaxrec.data.tables import count_rows, store
engine = connect_spark(memory="512m")
assert count_rows(store(engine, store(engine, pa.table({"a": [1, 2]})).distinct())) == 2
context = engine.raw_sql("SELECT 1").sparkSession.sparkContext
print(context.getConf().get("spark.driver.host"), context.uiWebUrl)
# Sockets that listen, of this process and of the Java that it started.
import glob, os
mine = {os.getpid(), context._gateway.proc.pid}
inodes = set()
for pid in mine:
    for link in glob.glob(f"/proc/{pid}/fd/*"):
        try:
            inodes.add(os.readlink(link))
        except FileNotFoundError:
            continue
found = 0
for table in ("tcp", "tcp6"):
    for line in open(f"/proc/net/{table}").read().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
            found += 1
            address = words[1].split(":")[0]
            assert address in ("0100007F", "0000000000000000FFFF00000100007F"), line
assert found
"""


def test_a_local_session_listens_on_loopback_and_leaves_nothing_behind(tmp_path):
    here, scratch = tmp_path / "here", tmp_path / "scratch"
    here.mkdir(), scratch.mkdir()
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(scratch)}
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "127.0.0.1 None\n"
    assert not list(here.iterdir()) and not list(scratch.iterdir())
