"""The item-level baselines as a system: what is trained on, what is recommended, a whole run, killed and resumed."""

import dataclasses
import gc
import json
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import count_compilations
from stopping import train_whole_and_killed, untimed_lines

from jaxrec.config import UserError, load_config
from jaxrec.evaluation.metrics import METRICS
from jaxrec.models.sequential import Bert4RecConfig, ItemFacts, SasRecConfig, SequentialModel
from jaxrec.run import TRAINING, Run
from jaxrec.systems import load_recommender
from jaxrec.systems.sequential import model as sequential_recommender
from jaxrec.systems.sequential.config import Binary, FullSoftmax, SampledSoftmax
from jaxrec.systems.sequential.model import Histories, SequentialAssembly, SequentialRecommender, disjoint_windows
from jaxrec.systems.sequential.training import (
    at_once,
    bound_loss,
    hidden_places,
    losses,
    next_places,
    unseen_items,
)
from jaxrec.training import checkpoint
from jaxrec.training.flops import Flops, step_flops

ROOT = Path(__file__).parent.parent
ITEMS = 12
SIZES = {"width": 8, "layers": 1, "heads": 2, "hidden": 8, "dropout": 0.0}
WANTED = np.array([False, True])


def make_assembly(config=None) -> SequentialAssembly:
    model = SequentialModel(config or SasRecConfig(**SIZES), ITEMS, 6)
    log_q = np.log(np.arange(1, ITEMS + 1) / np.arange(1, ITEMS + 1).sum()).astype(np.float32)
    return SequentialAssembly(model, (3, 6), ItemFacts(jnp.asarray(log_q)), None, WANTED)


ASSEMBLY = make_assembly()
PARAMS = ASSEMBLY.init(0)["params"]
MODEL = SequentialRecommender(ASSEMBLY, PARAMS)


def history(items, behaviors=None) -> dict:
    count = len(items)
    behaviors = np.ones(count, np.int8) if behaviors is None else np.array(behaviors, np.int8)
    times = 1_700_000_000 + 1000 * np.arange(count)
    return {"item": np.array(items, np.int32), "behavior": behaviors, "timestamp": times, "now": 1_700_100_000}


def batch_of(lengths: list[int], size: int) -> dict:
    rng = np.random.default_rng(0)
    histories = Histories.of([history(rng.integers(0, ITEMS, length)) for length in lengths], WANTED)
    return {**histories.take(np.arange(len(lengths)), size, size), "where": np.ones(len(lengths), bool)}


def test_histories_are_cut_to_the_latest_events_of_target_behaviors():
    seen = history([3, 1, 4, 1, 5], [1, 0, 1, 1, 1])
    flat = Histories.of([history([]), seen, history([9, 2])], WANTED)
    assert flat.lengths.tolist() == [0, 4, 2]
    taken = flat.take(np.array([1, 2, 0]), 4, 3)
    assert taken["item"].tolist() == [[4, 1, 5, 0], [9, 2, 0, 0], [0, 0, 0, 0]]
    assert taken["length"].tolist() == [3, 2, 0]
    # Behind the last event stands the time of the question, which is 100,000 s after the first event of all.
    assert taken["time"].tolist() == [[0, 1000, 2000, 98_000], [0, 1000, 100_000, 100_000], [0, 0, 0, 0]]
    first = flat.take(np.array([1]), 4, 4, np.array([2]))
    assert first["item"].tolist() == [[3, 4, 0, 0]] and first["length"].tolist() == [2]


def test_every_event_but_the_first_is_a_target_once():
    lengths = np.array([0, 1, 2, 6, 7, 8, 20])
    rows, ends = disjoint_windows(lengths, 6)
    targets = [[] for _ in lengths]
    for row, end in zip(rows, ends, strict=True):
        begin = max(end - 7, 0)
        targets[row] += range(begin + 1, end)
    assert [sorted(each) for each in targets] == [list(range(1, length)) for length in lengths]
    assert ends[rows == 6].tolist() == [20, 14, 8, 2]


def test_next_places_by_hand():
    batch = batch_of([4, 2], 5)
    (item, mask, time, asked), target, where = next_places(ASSEMBLY, batch, jax.random.key(0))
    np.testing.assert_array_equal(item, batch["item"][:, :4])
    np.testing.assert_array_equal(target, batch["item"][:, 1:])
    assert where.tolist() == [[True, True, True, False], [True, False, False, False]]
    np.testing.assert_array_equal(mask, where)
    np.testing.assert_array_equal(asked[:, :3], time[:, 1:])


def test_every_history_has_a_hidden_place_and_none_behind_its_end():
    config = Bert4RecConfig(**SIZES, masked=0.4, last_only=0.3)
    batch = batch_of([5, 2, 1, 4] * 50, 6)
    (item, mask, *_), target, hidden = hidden_places(make_assembly(config), batch, jax.random.key(0))
    assert hidden.any(1).all() and not (hidden & ~mask).any()
    np.testing.assert_array_equal(mask.sum(1), batch["length"])
    np.testing.assert_array_equal(item, np.where(hidden, ITEMS, batch["item"]))
    np.testing.assert_array_equal(target, batch["item"])
    long = np.asarray(hidden)[::4, :5]
    only_last = long[:, 4] & (long.sum(1) == 1)
    # 0.3, and of the rest those that hide nothing else by chance: 0.7 * (0.6^4 * 0.4 + 0.6^5).
    assert abs(only_last.mean() - 0.39) < 0.2
    assert 0.2 < long[:, :4].mean() < 0.37


def test_negatives_are_not_the_users_own():
    batch = batch_of([6, 3, 2], 6)
    drawn, there = unseen_items(batch, (3, 5), 40, ITEMS, jax.random.key(0))
    assert drawn.shape == there.shape == (3, 5, 40)
    for row, length in enumerate(batch["length"]):
        own = batch["item"][row, :length]
        assert not np.isin(np.asarray(drawn[row])[np.asarray(there[row])], own).any()
    assert there.mean() > 0.9
    everything = {"item": np.arange(ITEMS)[None], "length": np.array([ITEMS])}
    assert not unseen_items(everything, (1, 2), 3, ITEMS, jax.random.key(0))[1].any()


def test_other_parameters_compile_nothing_and_nothing_keeps_an_assembly_alive():
    histories = [history([1, 2, 3])]
    assembly = make_assembly()
    used = SequentialRecommender(assembly, PARAMS)
    used.recommend(histories, 3)
    other = jax.tree.map(lambda x: 2 * x, PARAMS)
    with count_compilations() as compiled:
        used.with_params(other).recommend(histories, 3)
    assert compiled == []
    alive = weakref.ref(used), weakref.ref(assembly)
    del used, assembly
    gc.collect()
    assert [each() for each in alive] == [None, None]


@pytest.mark.parametrize("objective", [FullSoftmax(rows=2), FullSoftmax(rows=0), SampledSoftmax(64), Binary(2)])
def test_losses_count_targets_and_leave_out_rows_that_fill_up(objective):
    batch = batch_of([4, 2, 6], 6)
    value, count = losses(ASSEMBLY, objective, ASSEMBLY.facts, {"params": PARAMS}, batch, jax.random.key(0))
    assert count == 3 + 1 + 5 and value > 0
    filled = {**batch, "where": np.array([True, True, False])}
    less, fewer = losses(ASSEMBLY, objective, ASSEMBLY.facts, {"params": PARAMS}, filled, jax.random.key(0))
    assert fewer == 4 and 0 < less < value
    gradient = jax.grad(
        lambda params: losses(ASSEMBLY, objective, ASSEMBLY.facts, {"params": params}, batch, jax.random.key(0))[0]
    )(PARAMS)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_the_full_softmax_of_a_batch_is_that_of_every_prefix():
    batch = batch_of([4, 2, 6], 6)
    value, _ = losses(ASSEMBLY, FullSoftmax(rows=4), ASSEMBLY.facts, {"params": PARAMS}, batch, jax.random.key(0))
    expected = 0.0
    for row, length in enumerate(batch["length"]):
        for seen in range(1, length):
            one = {name: batch[name][row : row + 1] for name in ("item", "time")}
            state, table = ASSEMBLY.model.apply(
                {"params": PARAMS}, ASSEMBLY.facts, one["item"], one["time"], np.array([seen]), method="next"
            )
            expected -= jax.nn.log_softmax(state @ table.T)[0, batch["item"][row, seen]]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_flops_of_the_full_softmax_are_counted_with_all_targets_at_once():
    batch = batch_of([4, 2, 6], 6) | {"where": np.ones(3, bool)}
    chunked, whole = (
        step_flops(bound_loss(ASSEMBLY, each), {"params": PARAMS})(batch)
        for each in (FullSoftmax(rows=4), at_once(FullSoftmax(rows=4, label_smoothing=0.1)))
    )
    # three times, as for the gradients: states [3 * 5, D] against the table [I, D]
    assert whole == Flops(chunked.count + 3 * 2 * 15 * ITEMS * SIZES["width"])
    assert not chunked.exact
    assert at_once(SampledSoftmax()) == SampledSoftmax()


def test_with_many_draws_the_sampled_softmax_is_the_full_one():
    batch = batch_of([6, 6, 6], 6)
    full, count = losses(ASSEMBLY, FullSoftmax(), ASSEMBLY.facts, {"params": PARAMS}, batch, jax.random.key(0))
    for power in (0.0, 1.0):
        objective = SampledSoftmax(negatives=20_000, power=power)
        sampled, _ = losses(ASSEMBLY, objective, ASSEMBLY.facts, {"params": PARAMS}, batch, jax.random.key(1))
        assert abs(sampled - full) / count < 0.02


def test_recommendations_are_those_of_a_plain_ranking():
    histories = [history([3, 1, 4]), history([2]), history([1, 5, 9, 2, 6, 5, 3, 5])]
    items, scores = MODEL.recommend(histories, 5)
    for row, one in enumerate(histories):
        latest = np.zeros((1, 7), np.int32)
        kept = one["item"][-6:]
        latest[0, : len(kept)] = kept
        state, table = ASSEMBLY.model.apply(
            {"params": PARAMS}, ASSEMBLY.facts, latest, np.zeros((1, 7), np.int32), np.array([len(kept)]), method="next"
        )
        expected = np.asarray(table @ state[0])
        np.testing.assert_array_equal(items[row], np.argsort(-expected, kind="stable")[:5])
        np.testing.assert_allclose(scores[row], np.sort(expected)[::-1][:5], rtol=1e-4)


def test_of_a_long_history_the_latest_events_count():
    long = history([7, 7, 8, 0, 1, 5, 9, 2, 6, 5])
    latest = {name: value[4:] if np.ndim(value) else value for name, value in long.items()}
    for mine, same in zip(MODEL.recommend([long], 12), MODEL.recommend([latest], 12), strict=True):
        np.testing.assert_array_equal(mine, same)
    unseen, _ = MODEL.recommend([long], 12, exclude_history=True)
    assert sorted(unseen[0][unseen[0] >= 0].tolist()) == [3, 4, 10, 11]


def test_few_histories_are_padded_to_few_sizes(monkeypatch):
    rows, rank = [], sequential_recommender._rank
    monkeypatch.setattr(sequential_recommender, "_rank", lambda *of: (rows.append(len(of[3]["length"])), rank(*of))[1])
    histories = [history([row % ITEMS, 3, (5 * row) % ITEMS]) for row in range(130)]
    alone = [MODEL.recommend([each], 4)[0][0] for each in histories[:9]]
    assert rows == [1] * 9
    for count, sizes in ((2, [8]), (9, [32]), (130, [128, 128])):
        rows.clear()
        items, _ = MODEL.recommend(histories[:count], 4)
        assert rows == sizes
        np.testing.assert_array_equal(items[:9], alone[:count])


def test_a_history_for_every_length():
    histories = Histories.of(MODEL.every_length(), WANTED)
    assert histories.lengths.tolist() == list(ASSEMBLY.lengths)


def test_other_behaviors_are_not_read_and_strangers_get_what_is_popular():
    mixed = history([3, 8, 1], [1, 0, 1])
    np.testing.assert_array_equal(MODEL.recommend([mixed], 4)[0], MODEL.recommend([history([3, 1])], 4)[0])
    items, _ = MODEL.recommend([history([8], [0]), history([])], 3)
    assert items.tolist() == [[11, 10, 9]] * 2


def test_more_than_there_is_ends_with_nothing():
    items, scores = MODEL.recommend([history([3, 1])], ITEMS + 3)
    assert sorted(items[0, :ITEMS].tolist()) == list(range(ITEMS))
    assert (items[0, ITEMS:] == -1).all() and np.isneginf(scores[0, ITEMS:]).all()


def test_damaged_parameters_are_noticed():
    broken = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    with pytest.raises(FloatingPointError, match="train it again"):
        SequentialRecommender(ASSEMBLY, broken).recommend([history([3, 1])], 2)


def test_lengths_must_rise():
    config = load_config(ROOT / "tests" / "mall_sequential.py")
    with pytest.raises(UserError, match="'lengths' is \\(8, 4\\); give rising lengths"):
        dataclasses.replace(config, lengths=(8, 4))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs of the same configuration: `whole`, and `killed` after step 45."""
    folder = tmp_path_factory.mktemp("mall")
    train_whole_and_killed(folder, "mall_sequential.py", 45)
    return folder


def test_a_run_learns_and_stops_early(runs):
    rows = json.loads((runs / "whole" / "evaluation.json").read_text())
    recall = {row["model"]: row["value"] for row in rows if row["metric"] == "recall@10" and row["subset"] == "all"}
    assert recall["sasrec_ce"] > 1.5 * recall["popularity"]
    assert {row["metric"] for row in rows} == {f"{name}@{k}" for name in METRICS for k in (5, 10)}
    lines = untimed_lines(runs / "whole" / "metrics.jsonl")
    valid = {line["step"]: line["valid/ndcg@10"] for line in lines if "loss" not in line}
    best = checkpoint.steps(runs / "whole" / "stages" / TRAINING / checkpoint.BEST)
    assert best == [max(valid, key=valid.get)] and valid[best[0]] > 0
    last = checkpoint.steps(runs / "whole" / "stages" / TRAINING)[-1]
    assert last == max(valid) and (last == 200 or last == best[0] + 3 * 20)
    assert "sasrec_ce" in (runs / "whole" / "report.html").read_text()
    assert "recall@10" in (runs / "whole.txt").read_text()


def test_killed_it_ends_in_the_same_bits(runs):
    whole, killed = (checkpoint.load_best(runs / name / "stages" / TRAINING, "params") for name in ("whole", "killed"))
    jax.tree.map(np.testing.assert_array_equal, whole, killed)
    whole, killed = (untimed_lines(runs / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert whole == killed
    assert (runs / "whole" / "evaluation.json").read_bytes() == (runs / "killed" / "evaluation.json").read_bytes()
    assert "going on from step 30" in (runs / "killed.txt").read_text()


def test_the_best_state_is_loaded(runs):
    model = load_recommender(Run(runs / "whole"))
    best = checkpoint.load_best(runs / "whole" / "stages" / TRAINING, "params")["params"]
    jax.tree.map(np.testing.assert_array_equal, model.params, best)
