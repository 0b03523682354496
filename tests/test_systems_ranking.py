"""Ranking models as a system: contexts, labels, losses; a cascade trained, killed and resumed; as a reward model."""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from stopping import train_whole_and_killed, untimed_lines

from jaxrec.config import UserError, from_json, load_config, to_json
from jaxrec.data.examples import Records
from jaxrec.evaluation.baselines import Popularity
from jaxrec.evaluation.comparison import IMPRESSIONS
from jaxrec.models.ranking.dcn import DcnConfig
from jaxrec.models.ranking.sim import SimConfig
from jaxrec.run import Run
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Request
from jaxrec.systems import check, check_beside, load_beside, load_recommender, train
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.ranking.config import PRE_RANKING, RANKING, RankingConfig, RankingObjective, RankingStageConfig
from jaxrec.systems.ranking.model import Ranker, load_ranker, stack
from jaxrec.systems.ranking.recall import InTurns, NearestToHistory, make_recall
from jaxrec.systems.ranking.training import (
    Impressions,
    bound_loss,
    context_cuts,
    losses,
    measured_batches,
    outcomes,
    predict_impressions,
    training_batches,
)
from jaxrec.training import checkpoint

ROOT = Path(__file__).parent.parent
CONFIG = load_config(ROOT / "tests" / "mall_cascade.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs of the same configuration: `whole`, and `killed` in its second stage."""
    folder = tmp_path_factory.mktemp("mall")
    train_whole_and_killed(folder, "mall_cascade.py", 75)
    return folder


@pytest.fixture(scope="module")
def ranked(runs) -> tuple[Ranker, dict]:
    return load_ranker(runs / "whole")


@pytest.fixture(scope="module")
def batch(ranked) -> dict:
    return measured_batches(ranked[0], CONFIG.ranking, "valid", batch_size=16)[0]


def rows_of(runs: Path, metric: str, subset: str = "all") -> dict[str, float]:
    rows = json.loads((runs / "whole" / "evaluation.json").read_text())
    return {row["model"]: row["value"] for row in rows if (row["metric"], row["subset"]) == (metric, subset)}


def test_the_cascade_stands_in_the_table_with_and_without_its_parts(runs):
    ndcg = rows_of(runs, "ndcg@10")
    whole, first, recall = (ndcg[name] for name in ("cascade", "cascade without ranking", "cascade, recall alone"))
    assert whole > recall and first > recall and whole > 1.5 * ndcg["popularity"]
    report = (runs / "whole" / "report.html").read_text()
    assert "cascade without ranking" in report and "Calibration" in report and "Clicks of what was shown" in report
    assert "cascade, recall alone" in (runs / "whole.txt").read_text()


def test_the_probabilities_of_what_was_shown_are_judged(runs):
    for subset in IMPRESSIONS.values():
        found = {metric: rows_of(runs, metric, subset) for metric in ("auc", "gauc", "log_loss", "ece")}
        for values in found.values():
            assert set(values) == {"cascade, ranking", "cascade, pre-ranking"}
        assert found["auc"]["cascade, ranking"] > 0.6 and found["ece"]["cascade, ranking"] < 0.15
    curves = json.loads((runs / "whole" / "evaluation" / "calibration.json").read_text())["cascade, ranking"]
    assert set(curves) == {"ctr", "cvr", "ctcvr"} and sum(curves["ctr"]["count"]) > sum(curves["cvr"]["count"])
    lines = untimed_lines(runs / "whole" / "metrics.jsonl")
    assert {line["stage"] for line in lines} == {PRE_RANKING, RANKING}
    assert {"valid/auc_ctr", "valid/likelihood_ctcvr", "valid/ece_cvr"} < set().union(*lines)
    assert {"loss_ctr", "loss_ctcvr", "loss_price"} < set().union(*lines)


def test_killed_it_ends_in_the_same_bits(runs):
    for stage in (PRE_RANKING, RANKING):
        whole, killed = (checkpoint.load_best(runs / name / "stages" / stage, "params") for name in ("whole", "killed"))
        jax.tree.map(np.testing.assert_array_equal, whole, killed)
    assert (runs / "whole" / "evaluation.json").read_bytes() == (runs / "killed" / "evaluation.json").read_bytes()
    assert "going on from step 60" in (runs / "killed.txt").read_text()


def test_contexts_hold_what_was_known_and_labels_what_followed(runs, ranked):
    """Against loops over the events of the tables."""
    ranker, _ = ranked
    records = Records(runs / "whole" / "examples", "train")
    cuts = context_cuts(ranker, CONFIG.ranking, records)
    sessions = {(at, int(session)) for at in range(len(records)) for session in records[at]["session"]}
    assert len(cuts) == len(sessions), "every session shows something, the first of a user too"
    for at, session in cuts[:: len(cuts) // 7]:
        record = records[at]
        before = ranker.before_session(record, session)
        read = ranker.read(before)
        inside = record["session"] == session
        begin = record["timestamp"][inside].min()
        assert before["now"] == begin and (before["timestamp"] <= begin).all()
        seen = [
            (int(item), int(behavior))
            for item, behavior, of, time in zip(*(record[n] for n in ("item", "behavior", "session", "timestamp")))
            if of < session and behavior >= 2 and time <= begin
        ]
        mine = list(zip(read["seen_item"][read["seen_mask"]].tolist(), read["seen_behavior"].tolist(), strict=False))
        assert mine == seen[::-1][:24]
        items, strongest = ranker.labels.impressions(record, inside)
        expected: dict[int, int] = {}
        for item, behavior in zip(record["item"][inside].tolist(), record["behavior"][inside].tolist(), strict=True):
            if behavior >= 1:
                expected[item] = max(behavior, expected.get(item, 0))
        assert dict(zip(items.tolist(), strongest.tolist(), strict=True)) == expected
        clicked, purchased = outcomes(ranker, strongest)
        assert (purchased <= clicked).all() and purchased.sum() == len(
            set(record["item"][inside & (record["behavior"] == 4)])
        )


def test_losses_by_hand(ranked, batch):
    """Entire space for ctr and cvr without ctcvr; towers of their own with it; prices of purchases alone."""
    ranker, _ = ranked
    rng = np.random.default_rng(0)
    logits = {name: rng.normal(size=batch["candidate"].shape) for name in ("ctr", "cvr", "ctcvr", "price")}
    where = batch["candidate_where"] & batch["where"][:, None]
    clicked, bought = batch["candidate_behavior"] >= 2, batch["candidate_behavior"] >= 4
    p = {name: 1 / (1 + np.exp(-value)) for name, value in logits.items()}

    def entropy(probability, label, mask):
        return -np.log(np.where(label, probability, 1 - probability))[mask].sum()

    given = {name: jnp.asarray(value) for name, value in logits.items()}
    own = losses(ranker, RankingObjective(), ranker.items, given, batch)
    assert set(own) == {"ctr", "cvr", "ctcvr", "price"}
    expected = {
        "ctr": entropy(p["ctr"], clicked, where),
        "cvr": entropy(p["cvr"], bought, where & clicked),
        "ctcvr": entropy(p["ctcvr"], bought, where),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(own[name][0].sum(), value, rtol=1e-5)
    np.testing.assert_array_equal(own["cvr"][1], where & clicked)
    mean, deviation = ranker.model.sizes.price
    price = (np.asarray(ranker.items.log_price)[batch["candidate"]] - mean) / deviation
    squares = 0.5 * (logits["price"] - price)[where & bought] ** 2
    np.testing.assert_allclose(own["price"][0].sum(), squares.sum(), rtol=1e-5)
    del given["ctcvr"]
    entire = losses(ranker, RankingObjective(price=0), ranker.items, given, batch)
    assert set(entire) == {"ctr", "ctcvr"}
    np.testing.assert_allclose(entire["ctcvr"][0].sum(), entropy(p["ctr"] * p["cvr"], bought, where), rtol=1e-5)


def test_the_loss_is_the_weighted_sum_of_means_and_rows_that_fill_up_count_nothing(ranked, batch):
    ranker, params = ranked
    objective = RankingObjective(ctr=2.0, ctcvr=0.5, price=0.25)
    loss = bound_loss(ranker, objective)
    value, (metrics, _) = loss(params, {}, batch, jax.random.key(0))
    means = {name: float(total / count) for name, (total, count) in metrics.items()}
    expected = 2 * means["loss_ctr"] + 0.5 * means["loss_ctcvr"] + 0.25 * means["loss_price"]
    np.testing.assert_allclose([value, means["loss"]], expected, rtol=1e-5)
    fewer = batch | {"where": np.arange(len(batch["where"])) < 3}
    _, (less, _) = loss(params, {}, fewer, jax.random.key(0))
    assert less["loss_ctr"][1] == batch["candidate_where"][:3].sum()


def test_rewards_are_probabilities_in_one_pass_that_others_can_call(runs, ranked):
    """As the reward model of another system: contexts of a padded batch, candidates that it chose itself."""
    ranker, params = ranked
    records = Records(runs / "whole" / "examples", "train")
    contexts = [ranker.read(ranker.before_session(records[at], 5), size=24) for at in range(3)]
    arrays = stack(contexts) | {"another": np.zeros((3, 2))}
    candidates = np.random.default_rng(0).integers(0, 120, (3, 7)).astype(np.int32)

    @jax.jit
    def inside(items, params, arrays, candidates):
        return ranker.rewards(params, arrays, candidates, items)

    found = inside(ranker.items, params, arrays, candidates)
    assert set(found) == {"ctr", "cvr", "ctcvr", "price"}
    for name, values in found.items():
        assert values.shape == (3, 7) and values.dtype == jnp.float32
        np.testing.assert_allclose(values, ranker.predict(params, arrays, candidates)[name], rtol=1e-4)
    assert ((found["ctr"] > 0) & (found["ctr"] < 1)).all()
    np.testing.assert_allclose(found["ctcvr"], found["ctr"] * found["cvr"], rtol=1e-5)
    prices = pq.read_table(runs / "whole" / "tables" / "items.parquet", columns=["price"])["price"].to_numpy()
    assert np.corrcoef(np.log(found["price"]).ravel(), np.log(prices[candidates]).ravel())[0, 1] > 0.8


def test_the_cascade_is_recall_then_two_orders(runs):
    model = load_recommender(Run(runs / "whole"))
    cases = model.assembly.cases("test").take(range(9))
    items, scores = model.recommend(cases.histories, 40)
    recalled, _ = model.assembly.recall.recommend(cases.histories, 40)
    np.testing.assert_array_equal(np.sort(items), np.sort(recalled))
    first = model.assembly.first.scores(cases.histories, recalled)
    middle = np.take_along_axis(recalled, np.argsort(-first, axis=1, kind="stable"), axis=1)
    np.testing.assert_array_equal(items[:, 20:], middle[:, 20:])
    assert (np.diff(scores) <= 0).all() and (scores[:, :20] >= 2).all() and (scores[:, 20:] < 2).all()
    ranker, params = model.last.ranker, model.last.params
    for row, history in enumerate(cases.histories):
        alone = ranker.predict(params, stack([ranker.read(history)]), middle[row : row + 1, :20])["ctcvr"][0]
        np.testing.assert_allclose(scores[row, :20] - 2, np.sort(alone)[::-1], rtol=1e-4)
    np.testing.assert_array_equal(model.variants["cascade without ranking"].recommend(cases.histories, 40)[0], middle)
    new, _ = model.recommend(cases.histories, 10, exclude_history=True)
    for row, history in enumerate(cases.histories):
        assert not np.isin(new[row], history["item"][history["behavior"] == 4]).any()
    few, _ = model.recommend(cases.histories[:1], 200)
    assert (few[0] >= 0).sum() == 120 and (few[0, 120:] == -1).all(), "what is only recalled follows"


def test_runs_stand_beside_one_another(runs, tmp_path):
    whole, killed = Run(runs / "whole"), runs / "killed"
    assert check_beside(whole, (killed,)) == (killed,)
    model = load_recommender(whole)
    found = load_beside(model, "cascade", (killed,))
    own = ["cascade", "cascade, recall alone", "cascade without ranking"]
    assert list(found) == [f"{name} of killed" for name in own]
    histories = model.assembly.cases("test").take(range(3)).histories
    ranked = found["cascade of killed"].recommend(histories, 5)[0]
    np.testing.assert_array_equal(ranked, model.recommend(histories, 5)[0])
    assert list(load_beside(SimpleNamespace(), "another", (killed,))) == own
    with pytest.raises(UserError, match=r"the model of .*killed answers with items; leave it out"):
        load_beside(SimpleNamespace(space=SimpleNamespace(kind="texts")), "another", (killed,))
    other = Run(tmp_path / "run")
    shutil.copytree(whole.tables, other.tables)
    users = pq.read_table(other.tables / "users.parquet").slice(1)
    pq.write_table(users, other.tables / "users.parquet")
    with pytest.raises(
        UserError, match=r"killed is of other items, users or behaviors than .*; train both on the same"
    ):
        check_beside(other, (killed,))
    with pytest.raises(UserError, match="holds no run"):
        check_beside(whole, (tmp_path / "nothing",))
    with pytest.raises(UserError, match=r"'validation\.beside' is of no use while training"):
        dataclasses.replace(CONFIG, validation=EvaluationConfig(split="valid", beside=(killed,)))


def test_channels_take_turns():
    class Fixed:
        def __init__(self, items):
            self.items = items

        def recommend(self, histories, k, exclude_history=False):
            items = np.full((len(histories), k), -1, np.int32)
            items[:, : len(self.items)] = self.items[:k]
            return items, np.zeros(items.shape, np.float32)

    both = InTurns((Fixed([4, 2, 9, 1]), Fixed([2, 7, 4])))
    items, scores = both.recommend([{}], 7)
    assert items.tolist() == [[4, 2, 7, 9, 1, -1, -1]] and np.isneginf(scores[0, 5:]).all()
    assert both.recommend([{}], 3)[0].tolist() == [[4, 2, 7]]


def test_the_nearest_to_the_latest_items_by_hand():
    vectors = np.array([[1, 0], [0, 1], [3, 3], [-1, 0.1]], np.float32)
    model = NearestToHistory(Popularity(np.array([1, 5, 2, 9]), (0,)), vectors, seeds=1)
    seen = {
        "item": np.array([3, 0]),
        "behavior": np.zeros(2, np.int8),
        "timestamp": np.arange(2),
        "session": np.arange(2),
    }
    items, scores = model.recommend([seen, {name: value[:0] for name, value in seen.items()}], 3)
    assert items.tolist() == [[0, 2, 1], [3, 1, 2]]
    np.testing.assert_allclose(scores[0], [1, (1 + math.sqrt(0.5)) / 2, 0.5], rtol=1e-5)


def test_flat_impressions_are_those_of_the_batches(ranked, batch):
    ranker, params = ranked
    found = predict_impressions(ranker, params, [batch, batch])
    keep = batch["candidate_where"] & batch["where"][:, None]
    assert (
        len(found.user) == 2 * keep.sum() and found.clicked.sum() == 2 * (batch["candidate_behavior"][keep] >= 2).sum()
    )
    scores, labels, users = found.of("cvr")
    assert len(scores) == len(labels) == len(users) == found.clicked.sum()
    nothing = Impressions(
        np.arange(2), np.zeros(2, bool), np.zeros(2, bool), {"ctr": np.full(2, 0.5), "cvr": np.ones(2)}
    )
    assert set(nothing.metrics()["ctr"]) == {"log_loss", "ece"} and nothing.metrics()["cvr"] == {}


def test_a_log_without_exposures_draws_them_and_says_so(runs, ranked, capsys):
    ranker, _ = ranked
    labels = dataclasses.replace(ranker.labels, exposure=None, click=None, purchase=4, candidates=10, sampled=5)
    other = dataclasses.replace(ranker, labels=labels)
    config = RankingStageConfig(**{**vars(CONFIG.ranking), "towers": ("ctcvr",)}, batch_size=16)
    batch = next(training_batches(other, config, 0))
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "5 of 10 candidates of a context are drawn and count as shown and not taken (the log has no exposures)" in told
    )
    behavior = np.where(batch["candidate_where"], batch["candidate_behavior"], 99)
    assert ((behavior == -1) | (behavior == 4) | (behavior == 99)).all()
    drawn = (behavior == -1).sum(1)
    assert (drawn >= 2).all() and (drawn <= 5).all() and ((behavior == 4).sum(1) >= 1).all()


def test_searches_with_their_query_and_what_it_led_to(tmp_path):
    """Three towers, SIM with a soft search, contexts that are searches: a run from end to end."""
    sys.path.insert(0, str(ROOT / "tests"))
    config = load_config(ROOT / "tests" / "mall_cascade_searches.py")
    assert from_json(type(config), to_json(config)) == config
    run = Run.open(tmp_path / "run", config)
    train(run, config)
    model = load_recommender(run)
    rows = json.loads((run.path / "evaluation.json").read_text())
    hits = {row["model"]: row["value"] for row in rows if row["metric"] == "recall@10" and row["subset"] == "all"}
    assert hits["cascade"] > 0.5 and set(hits) == {"cascade", "cascade, recall alone"}
    ranker = model.assembly.ranker
    records = Records(run.examples, "train")
    cuts = context_cuts(ranker, config.ranking, records)
    record, search = records[cuts[40, 0]], cuts[40, 1]
    history = ranker.before_search(record, search)
    read = ranker.read(history)
    text = model.assembly.rows[record["search_query"][search]]
    np.testing.assert_array_equal(read["query_vector"], ranker.read(history | {"query": text})["query_vector"])
    assert read["asked"] and (history["timestamp"] <= record["search_timestamp"][search]).all()
    unknown = ranker.read(history | {"query": "something that nobody searched for"})
    assert unknown["asked"] and unknown["query_vector"].any() and (unknown["led_item"] == -1).all()
    assert not ranker.read(history | {"query": " "})["asked"]
    assert model.required_text == "query" and model.every_length()[0]["query"]


def test_a_reward_model_of_another_catalogue_is_refused(runs, ranked):
    ranker, _ = ranked
    ids = pq.read_table(runs / "whole" / "tables" / "items.parquet", columns=["item_id"])["item_id"].to_pylist()
    ranker.check_items(ids, "runs/a")
    with pytest.raises(UserError, match=r"another catalogue of 120 items than the 119 of runs/a; train it on the same"):
        ranker.check_items(ids[1:], "runs/a")
    with pytest.raises(UserError, match="another catalogue"):
        ranker.check_items(ids[::-1], "runs/a")


def test_runs_that_hold_no_ranking_model(runs, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        load_ranker(tmp_path)
    (tmp_path / "config.json").write_text('{"system": "tiger"}')
    with pytest.raises(UserError, match=r"is a run of 'tiger'; give one of 'cascade'"):
        load_ranker(tmp_path)
    assert load_ranker(runs / "whole", PRE_RANKING)[0].model.config == CONFIG.pre_ranking.model


def refused(**changes) -> str:
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError) as error:
        check(Path("unused"), config)
    return str(error.value)


def test_contradictions_are_refused_before_any_work():
    labels = dataclasses.replace(CONFIG.ranking.labels, click="view")
    said = refused(ranking=dataclasses.replace(CONFIG.ranking, labels=labels))
    assert said.startswith("configuration key 'ranking.towers' has ctr, and the log has no behavior 'view'")
    labels = dataclasses.replace(CONFIG.ranking.labels, exposure="impression", sampled=0)
    said = refused(pre_ranking=dataclasses.replace(CONFIG.pre_ranking, labels=labels))
    assert "'pre_ranking.labels.sampled' is 0, and the log has no behavior 'impression': without impressions" in said
    said = refused(pre_ranking=dataclasses.replace(CONFIG.pre_ranking, contexts="searches"))
    assert "are 'searches' and 'sessions'; give both the same" in said
    said = refused(training=dataclasses.replace(CONFIG.training, monitor="ndcg@10"))
    assert "'training.monitor': 'ndcg@10' is not evaluated; there are auc_ctr, gauc_ctr" in said
    with pytest.raises(UserError, match=r"'ranking.towers' is \('ctr', 'ctr'\); give some of ctr, cvr, ctcvr, price"):
        RankingConfig(towers=("ctr", "ctr"))
    with pytest.raises(UserError, match="is price alone, which ranks nothing"):
        RankingConfig(towers=("price",))
    with pytest.raises(UserError, match="names no column: name the category first, or search by product"):
        RankingConfig(model=SimConfig(), attributes=())
    assert RankingConfig(model=DcnConfig(), towers=("ctr", "cvr")).predicted == ("ctr", "cvr", "ctcvr")
    assert RankingConfig(towers=("price", "ctr")).ranked_by == "ctr"


def test_a_channel_that_nothing_here_is_called(runs):
    run = Run(runs / "whole")
    with pytest.raises(UserError, match=r"'recall.channels': nothing here is called 'bm25'; there are popularity, .*"):
        make_recall(run, load_ranker(run.path)[0], ("bm25",), 3)


def test_a_cascade_answers_requests(runs):
    retriever = Retriever(runs / "whole")
    user = pq.read_table(runs / "whole" / "tables" / "users.parquet")["user_id"][3].as_py()
    items = pq.read_table(runs / "whole" / "tables" / "items.parquet")
    asked = Request.model_validate({"user_id": user, "k": 5})
    history = [{"item_id": items["item_id"][7].as_py()}]
    answer, other = retriever.answer([asked, Request.model_validate({"history": history})])
    assert answer.source == other.source == "model" and len(answer.items) == 5
    cheap = Request.model_validate({"user_id": user, "k": 5, "filter": {"price": {"max": 30}}})
    chosen = retriever.answer([cheap])[0]
    price = dict(zip(items["item_id"].to_pylist(), items["price"].to_pylist(), strict=True))
    assert len(chosen.items) == 5 and max(price[each.item_id] for each in chosen.items) <= 30
    refused = retriever.answer([Request.model_validate({"user_id": user, "query": "shoes"})])[0]
    assert isinstance(refused, UserError) and "reads no queries" in str(refused)
