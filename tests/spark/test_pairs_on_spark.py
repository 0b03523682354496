"""Pair statistics on Spark equal those on DuckDB, bit for bit. Run by `make test-spark`, which installs Spark."""

import numpy as np
import pyarrow as pa
import pytest

from jaxrec.config import UserError
from jaxrec.data.pairs import PairConfig, build_pairs
from jaxrec.data.spark import connect_spark
from jaxrec.data.tables import connect, store


@pytest.fixture(scope="module")
def spark():
    return connect_spark(memory="1g")


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
