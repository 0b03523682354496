"""Cuts and batches against plain loops; resuming, buckets, processes, speed."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.config import UserError
from jaxrec.data.examples import Records, write_examples
from jaxrec.data.pipeline import array_batches, batches, cut_index, merge_small

BEHAVIORS = ("exposure", "click", "purchase")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """40 users with random events; the last session is test, the one before valid."""
    folder = tmp_path_factory.mktemp("examples")
    names = ("user", "item", "timestamp", "session", "behavior", "split")
    rng, columns = np.random.default_rng(0), {name: [] for name in names}
    for user in range(40):
        sessions = np.sort(rng.integers(0, rng.integers(1, 9), size=rng.integers(1, 60)))
        sessions = np.unique(sessions, return_inverse=True)[1]
        last = sessions[-1]
        columns["user"] += [user] * len(sessions)
        columns["item"] += rng.integers(0, 99, len(sessions)).tolist()
        columns["timestamp"] += list(range(len(sessions)))
        columns["session"] += sessions.tolist()
        columns["behavior"] += [BEHAVIORS[index] for index in rng.choice(3, len(sessions), p=[0.7, 0.2, 0.1])]
        columns["split"] += ["test" if s == last else "valid" if s == last - 1 else "train" for s in sessions]
    types = {"user": pa.int32(), "item": pa.int32(), "timestamp": pa.int64(), "session": pa.int32()}
    table = pa.table({name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()})
    pq.write_table(table, folder / "events.parquet")
    write_examples(folder, folder, BEHAVIORS)
    return folder


def plain_cuts(records, targets, min_history):
    """Every rule of `cut_index` spelled out over the decoded records."""
    cuts, wanted = [], [BEHAVIORS.index(name) for name in targets]
    for index, record in enumerate(records):
        found = []
        for session in sorted(set(record["session"].tolist())):
            inside = record["session"] == session
            of_split = record["split"][inside][0] == ("train", "valid", "test").index(records.split)
            before = (record["session"] < session).sum()
            if of_split and before >= min_history and np.isin(record["behavior"][inside], wanted).any():
                found.append((index, session))
        cuts += found if records.split == "train" else found[:1]
    return cuts


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize(
    ("targets", "min_history"), [(("purchase",), 1), (("click", "purchase"), 5), (("purchase",), 0)]
)
def test_cuts_are_those_of_plain_loops(examples, split, targets, min_history):
    records = Records(examples, split)
    cuts = cut_index(records, targets, min_history=min_history)
    assert cuts.dtype == np.int32
    assert [tuple(cut) for cut in cuts.tolist()] == plain_cuts(records, targets, min_history)
    assert len(cuts)


def test_the_last_cuts_of_a_record(examples):
    records = Records(examples, "train")
    every, last = (cut_index(records, ("purchase",), max_per_record=n) for n in (None, 2))
    wanted = [cut for record in np.unique(every[:, 0]) for cut in every[every[:, 0] == record][-2:].tolist()]
    assert last.tolist() == wanted and len(last) < len(every)


def test_an_unknown_target_is_named(examples):
    with pytest.raises(UserError, match="'buy' is unknown; the data has exposure, click, purchase"):
        cut_index(Records(examples, "train"), ("buy",))


# 50 cuts over 10 records; features are the cut itself, a draw, and a vector as long as the bucket.
RECORDS = [{"user": index, "item": np.arange(index + 1, dtype=np.int32)} for index in range(10)]
CUTS = np.array([(index % 10, index // 10) for index in range(50)], np.int32)
BUCKETS = (CUTS[:, 0] >= 6).astype(np.int32)


def features(record, session, rng):
    length = 8 if record["user"] >= 6 else 4
    return {"key": np.int32([record["user"], session]), "draw": rng.random(2), "padded": np.zeros(length, np.int32)}


def make(**options):
    return batches(RECORDS, CUTS, features, **{"batch_size": 4, "buckets": BUCKETS, "seed": 3, **options})


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_an_epoch_has_every_cut_at_most_once_and_one_bucket_a_batch():
    # 30 cuts and 20 cuts: 7 + 5 batches of 4; 2 cuts are dropped.
    epoch = list(make(epochs=1))
    assert len(epoch) == 12
    rows = np.concatenate([batch["cut"] for batch in epoch])
    assert len(set(rows.tolist())) == 48
    for batch in epoch:
        np.testing.assert_array_equal(batch["key"], CUTS[batch["cut"]])
        assert len(set(BUCKETS[batch["cut"]])) == 1
        assert batch["padded"].shape == (4, 8 if BUCKETS[batch["cut"][0]] else 4)
        assert batch["where"].all()


def test_the_order_is_shuffled_by_seed_and_epoch():
    rows = lambda iterator, n: np.stack([batch["cut"] for batch in take(iterator, n)])  # noqa: E731
    both = rows(make(), 24)
    np.testing.assert_array_equal(both, rows(make(), 24))
    assert (both[:12] != both[12:]).any() and (both != rows(make(seed=4), 24)).any()
    # Batches of both buckets are mixed, and what is dropped differs.
    assert len(set(np.diff(BUCKETS[both[:12, 0]]))) > 1
    assert set(both[:12].ravel()) != set(both[12:].ravel())
    assert len(list(make(epochs=2))) == 24


def test_a_resumed_iterator_gives_the_same_bits():
    whole = make()
    before = take(whole, 17)
    state = whole.get_state()
    after = take(whole, 10)
    resumed = make()
    resumed.set_state(state)
    assert_equal(take(resumed, 10), after)
    assert_equal(take(make(), 17), before)


def test_the_draws_of_a_cut_change_with_the_epoch_alone():
    draws = [{}, {}]
    for number, batch in enumerate(make(batch_size=10, epochs=2)):
        draws[number // 5].update(zip(batch["cut"].tolist(), batch["draw"].tolist(), strict=True))
    assert len(draws[0]) == len(draws[1]) == 50
    assert all(draws[0][cut] != draws[1][cut] for cut in draws[0])
    again = {}
    for batch in make(batch_size=2, epochs=1):
        again.update(zip(batch["cut"].tolist(), batch["draw"].tolist(), strict=True))
    assert again == draws[0]


def test_evaluation_sees_every_cut_once_in_order():
    epoch = list(make(epochs=1, shuffle=False, drop_remainder=False))
    assert [len(batch["where"]) for batch in epoch] == [4] * 13
    rows = np.concatenate([batch["cut"][batch["where"]] for batch in epoch])
    np.testing.assert_array_equal(rows, np.argsort(BUCKETS, kind="stable"))
    filled = epoch[7]
    assert filled["where"].tolist() == [True, True, False, False]
    np.testing.assert_array_equal(filled["key"][2:], np.stack([filled["key"][0]] * 2))


def test_processes_share_each_batch():
    whole = take(make(), 12)
    parts = [take(make(process_index=index, process_count=2), 12) for index in range(2)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*parts, strict=True)]
    assert_equal(joined, whole)
    with pytest.raises(UserError, match="a batch of 4 doesn't split over 3 processes"):
        make(process_count=3)


def test_a_log_in_which_nobody_has_a_history():
    with pytest.raises(UserError, match=r"no session can be trained on: .* an earlier event of the same user"):
        array_batches(lambda rows: {}, np.zeros(0, np.int64), batch_size=8)


def test_too_few_cuts(capsys):
    with pytest.raises(UserError, match="50 cuts give no batch of 64"):
        make(batch_size=64)
    assert len(list(make(batch_size=64, epochs=1, drop_remainder=False))) == 2
    make(batch_size=25)
    assert "20 of 50 cuts are in length buckets smaller than a batch" in capsys.readouterr().out


def test_shapes_that_differ_in_a_bucket_are_named():
    with pytest.raises(
        ValueError, match=r"feature 'padded' has the shapes \[\(4,\), \(8,\)\] inside one length bucket"
    ):
        list(make(buckets=None, epochs=1))


def test_batches_out_of_arrays_are_those_of_a_loop():
    values, buckets = np.arange(23) * 10, np.arange(23) % 3
    asked = []

    def take(rows):
        asked.append(rows)
        return {"value": values[rows]}

    options = {"batch_size": 4, "seed": 3, "epochs": 2}
    found = list(array_batches(take, buckets, **options))
    cuts = np.stack([np.arange(23), np.zeros(23, int)], axis=1)
    plain = list(batches(values, cuts, lambda value, *_: {"value": np.asarray(value)}, buckets=buckets, **options))
    assert len(found) == len(plain) == 2 * (2 + 2 + 1)
    for mine, other in zip(found, plain, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], other[name])
    assert all(len(set(buckets[rows])) == 1 for rows in asked)
    iterator = array_batches(take, buckets, **options)
    for _ in range(3):
        next(iterator)
    again = array_batches(take, buckets, **options)
    again.set_state(iterator.get_state())
    np.testing.assert_array_equal(next(again)["value"], found[3]["value"])


def test_small_buckets_are_joined_to_longer_ones():
    def sizes(counts, least):
        merged = merge_small(np.repeat(np.arange(len(counts)), counts), least)
        assert (merged >= np.repeat(np.arange(len(counts)), counts)).all()
        return np.bincount(merged, minlength=len(counts)).tolist()

    assert sizes([5, 5, 5], 4) == [5, 5, 5]
    assert sizes([5, 2, 5, 1], 4) == [0, 7, 0, 6]
    assert sizes([1, 5, 5], 4) == [0, 6, 5]
    assert sizes([1, 1, 1], 4) == [0, 0, 3]
    assert sizes([9, 0, 0], 4) == [9, 0, 0]
