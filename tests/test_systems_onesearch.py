import dataclasses
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from exported import ROOT, without_the_library
from flax import linen as nn
from mall_onesearch import config as CONFIG
from stopping import StoppedError, stopping

from jaxrec import export
from jaxrec.config import UserError, from_json, to_json
from jaxrec.data.examples import Records
from jaxrec.data.popularity import DAY, PopularityConfig
from jaxrec.data.search_statistics import SearchStatisticsConfig, search_statistics, training_searches
from jaxrec.data.searches import before_search
from jaxrec.files import read_json
from jaxrec.models.backbone import make_backbone
from jaxrec.models.causal import CausalConfig
from jaxrec.models.encoder_decoder import bart_config
from jaxrec.models.huggingface import load, save_bart, save_qwen2
from jaxrec.models.personal_search import PersonalSearch, PromptConfig, SearchVocabulary, TaskInputs
from jaxrec.models.vocabulary import ContextTokens
from jaxrec.run import Run
from jaxrec.semantic_ids.table.version_files import BOOKS
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Request
from jaxrec.systems import load_recommender, pretrained, train
from jaxrec.systems import stored_rows as of_stored
from jaxrec.systems.onesearch import preference as onesearch_preference
from jaxrec.systems.onesearch import queries as onesearch_queries
from jaxrec.systems.onesearch import stages as onesearch_stages
from jaxrec.systems.onesearch import training as onesearch_training
from jaxrec.systems.onesearch.config import (
    CO_OCCURRENCE,
    CONTENT,
    PERSONALISATION,
    TASKS,
    ContentConfig,
    CoOccurrenceConfig,
    OneSearchConfig,
)
from jaxrec.systems.onesearch.model import assemble, fitted, level_centroids, recommender, run_centroids
from jaxrec.systems.onesearch.preference import interaction_examples, target_scores
from jaxrec.systems.onesearch.queries import make_tokenizer, trained_queries
from jaxrec.systems.onesearch.reordered import ANSWERS, AnsweredSearches, answered_searches, reordered_examples
from jaxrec.systems.onesearch.reward_config import INTERACTIONS, REORDERED, REWARD_MODEL
from jaxrec.systems.onesearch.reward_model import levels_of, make_search_reward, rewarded_order
from jaxrec.systems.onesearch.stages import REFERENCE, RewardedRecommender, behind
from jaxrec.systems.onesearch.tasks import MOST_ROWS, SearchPairs, TaskTables, item_texts, read_tasks, task_rows
from jaxrec.systems.onesearch.training import (
    check_searches,
    example,
    losses,
    supervised_stages,
    training_batches,
    training_searches_of,
)
from jaxrec.systems.pretrained import (
    backbone_of,
    digests,
    read_tokenizer,
    with_pretrained,
    write_pretrained,
)
from jaxrec.systems.ranking.training import context_batches, context_cuts
from jaxrec.text.tokenizer import load_tokenizer
from jaxrec.training import checkpoint, loop
from jaxrec.training.stages import Task, best_variables

STAGES = (CONTENT, CO_OCCURRENCE, PERSONALISATION, REWARD_MODEL, REORDERED, INTERACTIONS)
EMPTY = {name: np.zeros(0, np.int32) for name in ("item", "behavior", "timestamp", "session")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Two runs of one configuration: one without a stop, one stopped in each of its six stages, and while the frozen
    stage answers searches, and run again."""
    folder = tmp_path_factory.mktemp("onesearch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXREC_CACHE", str(folder / "cache"))
        patch.setattr(of_stored, "AT_ONCE", 64)
        train(Run.open(folder / "whole", CONFIG), CONFIG)
        unmade = shutil.ignore_patterns("stages", "eval*", "*.jsonl")
        shutil.copytree(folder / "whole", folder / "stopped", ignore=unmade)
        stops, files, save = ["step:20", "step:14", "step:30", "step:18", "step:12", "step:10"], [], of_stored.save_rows

        def save_and_stop(path: Path, found: dict) -> None:
            save(path, found)
            files.append(path)
            if len(files) == 2:
                raise StoppedError

        patch.setattr(loop, "fault_point", stopping(stops))
        patch.setattr(of_stored, "save_rows", save_and_stop)
        while stops:
            with pytest.raises(StoppedError):
                train(Run.open(folder / "stopped", CONFIG), CONFIG)
        train(Run.open(folder / "stopped", CONFIG), CONFIG)
        assert len(files) == len(set(files)) > 4
    return folder / "whole", folder / "stopped"


@pytest.fixture(scope="module")
def path(runs) -> Path:
    return runs[0]


@pytest.fixture(scope="module")
def model(path):
    return load_recommender(Run(path))


@pytest.fixture(scope="module")
def assembly(model):
    return model.assembly


@pytest.fixture(scope="module")
def records(assembly) -> Records:
    return Records(assembly.examples, "train")


def test_stopped_in_every_stage_it_ends_in_the_same_bits(runs):
    for stage in STAGES:
        whole, stopped = (checkpoint.load_parts(run / "stages" / stage, "params", "opt_state") for run in runs)
        assert jax.tree.all(jax.tree.map(np.array_equal, whole, stopped)), stage
    assert (runs[0] / "evaluation.json").read_bytes() == (runs[1] / "evaluation.json").read_bytes()


def test_it_finds_what_was_searched_for(path):
    """A random item has a recall@10 of .08, and what is most popular .14."""
    rows = read_json(path / "evaluation.json")
    found = {row["model"]: row["value"] for row in rows if row["metric"] == "recall@10" and row["subset"] == "all"}
    assert set(found) == {"onesearch", "onesearch before rewards", "onesearch_rm"}
    assert min(found.values()) > 0.8


def test_the_loss_of_every_task_is_logged(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for stage, of_stage in ((CONTENT, CONFIG.content), (CO_OCCURRENCE, CONFIG.co_occurrence)):
        last = [line for line in lines if line["stage"] == stage][-1]
        first = next(line for line in lines if line["stage"] == stage)
        assert {f"loss_{name}" for name in of_stage.weights} <= set(last)
        assert last["loss_item_to_id" if stage == CONTENT else "loss_query_id_to_item_id"] < first["loss"]
    assert "loss_query_to_id" in (path / "report.html").read_text()


def test_a_step_equals_a_plain_computation(model, assembly):
    """-log of (1 - share) * the decoder's probability of an ID + share * the weights of the candidates that have it."""
    config = fitted(CONFIG, assembly.space)
    batch = {name: jnp.asarray(each[:4]) for name, each in next(training_batches(assembly, config)).items()}
    variables = model.variables
    total, count = losses(assembly, config, assembly.catalogue, variables, batch, jax.random.key(0))
    silent = assembly.model.clone(prompt=dataclasses.replace(assembly.model.prompt, copying=False))
    inputs = assembly.inputs(assembly.catalogue, batch)
    context = assembly.model.apply(variables, inputs, method="prefill")
    plain = silent.apply(variables, inputs, method="prefill")
    expected, targets = 0.0, 0
    extend = jax.jit(partial(silent.apply, variables, method="extend"), static_argnums=3)
    for row in range(4):
        for item in batch["target"][row]:
            if item < 0:
                continue
            codes, cache, before, decoder = assembly.space.codes[item], None, None, 1.0
            for level, code in enumerate(codes):
                log_probs, cache = extend(plain, before, cache, level)
                decoder *= float(np.exp(log_probs[row, 0, code]))
                before = jnp.full((4, 1), code, jnp.int32)
            weights, share = np.asarray(context.points.weights[row, 0]), float(context.points.share[row, 0])
            copied = weights[(np.asarray(context.codes[row]) == codes).all(1)].sum()
            expected -= np.log((1 - share) * decoder + share * copied)
            targets += 1
    assert count == targets > 4
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_a_decoder_alone_is_a_backbone_too(path):
    """Qwen2 in place of the T5: it learns, and answers."""
    kind = CausalConfig(width=32, heads=2, groups=1, head_dim=16, hidden=32, layers=1)
    config = dataclasses.replace(CONFIG, model=kind)
    assert from_json(OneSearchConfig, to_json(config)) == config
    assembly = assemble(Run(path), config)
    config = fitted(config, assembly.space)
    batch, optimizer = next(training_batches(assembly, config)), optax.adam(3e-3)
    params = nn.unbox(assembly.init(0)["params"])

    @jax.jit
    def step(params, state):
        def loss(params):
            total, count = losses(assembly, config, assembly.catalogue, {"params": params}, batch, jax.random.key(0))
            return total / count

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for _ in range(12):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    items, scores = recommender(assembly, {"params": params}, config).recommend([EMPTY | {"query": "zzz"}], 5)
    assert (items >= 0).all() and np.isfinite(scores).all() and len(np.unique(items)) == 5


def test_the_profile_of_the_log_or_of_the_request_stands_in_the_prompt(path, model, tmp_path):
    shutil.copytree(path, tmp_path / "run", ignore=shutil.ignore_patterns("stages", "eval*"))
    run, config = Run(tmp_path / "run"), dataclasses.replace(CONFIG, profile=("city", "age"))
    with pytest.raises(UserError, match="'profile': the users have no column 'city'; the source brings no profiles"):
        assemble(run, config)
    users = pq.read_table(run.tables / "users.parquet")
    for name, values in {"age": ["Old", "old", None], "city": ["Ulm", "ULM", "Ulm"]}.items():
        users = users.append_column(name, [np.resize(np.array(values, object), len(users)).tolist()])
    pq.write_table(users, run.tables / "users.parquet")
    assembly = assemble(run, config)
    assert assembly.profile_columns == ("city", "age") and assembly.reader.profiles.texts == ("ulm -", "ulm old")
    of = [assembly.read_texts(EMPTY | {"query": "zzz"} | who)["profile_tokens"].tolist() for who in (
        {"user": np.int32(0)}, {"user": np.int32(1)}, {"user": np.int32(2)}, {}, {"profile": {"city": "Ulm"}},
    )]  # fmt: skip
    decoded = assembly.tokenizer.decode(of)
    assert decoded == ["ulm old", "ulm old", "ulm -", "", "ulm -"]
    cut = assembly.features.cut(
        assembly.read_texts(EMPTY | {"query": "zzz", "user": 0}), 0, behaviors=5, wanted=assembly.wanted
    )
    assert cut["profile"].tolist() == [*of[0], *[-1] * (assembly.features.profile - len(of[0]))]
    # It has no parameters of its own.
    served = recommender(assembly, model.variables, config)
    asked = [
        EMPTY | {"query": "zzz"} | more
        for more in ({}, {"user": np.int32(0)}, {"profile": {"age": "old", "city": "ulm"}})
    ]
    scores = served.recommend(asked, 5)[1]
    np.testing.assert_allclose(scores[1], scores[2], atol=1e-5)
    assert np.abs(scores[0] - scores[1]).max() > 1e-4
    retriever = Retriever(run.path, served)
    given, refused = retriever.answer(
        [Request(history=[], query="zzz", profile=profile) for profile in ({"age": "old"}, {"shoe": "8"})]
    )
    assert len(given.items) == 10
    assert "reads no shoe of a user's profile" in str(refused)


def test_the_items_of_a_search_are_targets_of_one_context(assembly, records):
    config = fitted(CONFIG, assembly.space)
    cuts = training_searches_of(records, assembly.wanted)
    at, place = next((a, p) for a, p in cuts if len(wanted_items(records[a], p, assembly.wanted)) == 3)
    found = example(assembly, config, records[at], place, np.random.default_rng(0))
    assert sorted(found["target"].tolist()) == [-1, *wanted_items(records[at], place, assembly.wanted)]


def wanted_items(record, place, wanted) -> list[int]:
    return np.unique(record["item"][(record["search"] == place) & wanted[record["behavior"]]]).tolist()


def statistics_of(assembly, pairs, config):
    columns = (pairs[name].to_numpy() for name in ("search", "item", "timestamp"))
    numbers = assembly.queries.of_row[pairs["query_index"].to_numpy()]
    return search_statistics(assembly.queries.texts, numbers, *columns, config)


def with_statistics(assembly, statistics):
    return dataclasses.replace(assembly, reader=dataclasses.replace(assembly.reader, statistics=statistics))


def test_a_training_example_is_what_a_server_sees_whose_log_lacks_the_search(path, assembly, records):
    config = fitted(
        dataclasses.replace(CONFIG, objective=dataclasses.replace(CONFIG.objective, window=0)), assembly.space
    )
    pairs = training_searches(path / "tables", CONFIG.data.target_behaviors)
    daily = SearchStatisticsConfig(PopularityConfig(1, 20.0, 0.0))
    assembly = with_statistics(assembly, statistics_of(assembly, pairs, daily))
    searches = pq.read_table(path / "tables" / "searches.parquet")
    cuts, periods = training_searches_of(records, assembly.wanted), set()
    for at, place in cuts[:: len(cuts) // 12]:
        record = records[at]
        periods.add(int(assembly.reader.statistics.recent.period(record["search_timestamp"][place] // DAY)))
        found = example(assembly, config, record, place, np.random.default_rng(0))
        row = np.flatnonzero(searches["user"].to_numpy() == record["user"])[place]
        others = pairs.filter(pa.array(pairs["search"].to_numpy() != row))
        served = with_statistics(assembly, statistics_of(assembly, others, daily))
        now = int(record["search_timestamp"][place])
        typed = assembly.rows[record["search_query"][place]].upper() + " "
        history = before_search(record, place) | {"query": typed, "now": now, "user": record["user"]}
        history["search_query"] = assembly.rows[history["search_query"]]
        cut = config.features.cut(served.read_texts(history), 0, behaviors=5, wanted=assembly.wanted)
        for name, array in cut.items():
            if name == "habits":
                # Neighbours have tests of their own.
                array, found[name] = (each[:, :12] for each in (array, found[name]))
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
    assert 0 in periods and len(periods) > 1


def test_the_window_shows_some_samples_less_of_the_short_sequences(assembly, records):
    cut, whole = (
        fitted(
            dataclasses.replace(CONFIG, objective=dataclasses.replace(CONFIG.objective, window=window, windowed=1.0)),
            assembly.space,
        )
        for window in (2, 0)
    )
    shown = []
    for at, place in training_searches_of(records, assembly.wanted)[-40:]:
        found, uncut = (
            example(assembly, config, records[at], place, np.random.default_rng(place)) for config in (cut, whole)
        )
        shown.append(int((found["recent_item"] >= 0).sum()))
        assert (found["short_item"] >= 0).sum() == shown[-1] or not shown[-1]
        for name in ("click_item", "related_item", "long_item", "candidate", "habits"):
            np.testing.assert_array_equal(found[name], uncut[name])
    assert set(shown) == {0, 1, 2}


def test_tasks_are_made_of_what_belongs_together(path, assembly):
    tables, pairs = read_tasks(path / "tables", assembly, CONFIG)
    texts = [*assembly.queries.texts, *item_texts(path / "tables", "title")]
    decode = assembly.queries.tokenizer.decode
    count = len(assembly.queries.texts)
    for name in TASKS:
        rows = task_rows({name: 1.0}, tables, pairs, 0)
        assert set(rows.task.tolist()) == {TASKS.index(name)}
        source, target = name.split("_to_")
        reads, writes = (rows.read_id, rows.read_text), (rows.write_id, rows.write_text)
        assert (reads["id" not in source] >= 0).all() and (writes["id" not in target] >= 0).all()
        assert (reads["id" in source] < 0).all() and (writes["id" in target] < 0).all()
    rows = task_rows({"id_to_item": 1.0}, tables, pairs, 0)
    written = tables.written[rows.write_text[0]]
    assert decode([written[written >= 0]])[0].startswith(texts[rows.read_id[0]][:8])
    rows = task_rows({"query_id_to_item_id": 1.0}, tables, pairs, 0)
    known = set(zip(pairs.queries.tolist(), (pairs.items + count).tolist(), strict=True))
    assert set(zip(rows.read_id.tolist(), rows.write_id.tolist(), strict=True)) == known


def test_rows_follow_the_weights_and_what_lacks_a_text_is_left_out():
    tables = TaskTables(np.array([[1], [1], [-1], [1], [1]]), np.zeros((5, 2), int), np.array([[1], [1], [2], [3]]))
    pairs = SearchPairs(*map(np.array, ([0, 1, 1], [0, 0, 1], [0, -1], [0, 0], [0, 1])))
    rows = task_rows({"item_to_id": 1.0, "query_to_category": 0.5}, tables, pairs, 0)
    # Item 0 has no text, and the category of query 1 is not known.
    assert np.bincount(rows.task)[[TASKS.index("item_to_id"), TASKS.index("query_to_category")]].tolist() == [2, 1]
    assert rows.read_text[rows.task == TASKS.index("item_to_id")].tolist() == [3, 3]
    with pytest.raises(UserError, match="none of the tasks"):
        task_rows({"query_to_item": 0.0}, tables, pairs, 0)


def test_a_task_of_a_tiny_weight_does_not_repeat_the_others_without_bound():
    tables = TaskTables(np.ones((50, 1), int), np.ones((50, 1), int), np.zeros((50, 2), int))
    pairs = SearchPairs(*map(np.array, ([0], [0], [0] * 30, [0] * 20, range(30))))
    rows = task_rows({"item_to_id": 1.0, "query_to_id": 1e-7}, tables, pairs, 0)
    assert len(rows) <= MOST_ROWS * 50 + 2 and set(rows.task.tolist()) == {0, 1}
    with pytest.raises(UserError, match=r"'content\.id_to_item' is -1"):
        ContentConfig(id_to_item=-1)
    with pytest.raises(UserError, match=r"'co_occurrence\.item_to_query' is -0\.5"):
        CoOccurrenceConfig(item_to_query=-0.5)


def test_no_task_and_no_tokenizer_is_trained_on_queries_of_validation_and_test(tmp_path, monkeypatch):
    queries = {"query": ["Shoes", "hats", "shoes", "tents"], "count": [0, 0, 2, 1]}
    pq.write_table(pa.table(queries), tmp_path / "queries.parquet")
    assert trained_queries(tmp_path) == ["shoes", "tents"]
    seen = []
    monkeypatch.setattr(onesearch_queries, "train_tokenizer", lambda texts, config: seen.extend(texts))
    monkeypatch.setattr(onesearch_queries, "save_tokenizer", lambda *_: None)
    make_tokenizer(SimpleNamespace(tables=tmp_path), tmp_path, CONFIG.tokenizer, ["red"])
    assert seen == ["shoes", "tents", "red"]
    # Of the queries 0 to 2, number 1 was not searched for in training; two items stand behind them.
    tables = TaskTables(np.ones((6, 1), int), np.ones((6, 1), int), np.zeros((5, 2), int))
    pairs = SearchPairs(*map(np.array, ([0, 2], [0, 1], [0, 0, 0], [0, 0], [0, 2])))
    for name in TASKS:
        rows = task_rows({name: 1.0}, tables, pairs, 0)
        assert not (rows.read_text == 1).any() and not (rows.read_id == 1).any(), name
        assert not (rows.write_text == 1).any() and not (rows.write_id == 1).any(), name


def test_a_stage_without_tasks_is_left_out(path, monkeypatch, tmp_path):
    none = [
        dataclasses.replace(of_stage, **dict.fromkeys(of_stage.weights, 0.0))
        for of_stage in (CONFIG.content, CONFIG.co_occurrence)
    ]
    second, first, neither = (
        dataclasses.replace(CONFIG, **parts)
        for parts in ({"content": none[0]}, {"co_occurrence": none[1]}, {"content": none[0], "co_occurrence": none[1]})
    )
    order = [
        [(stage.name, stage.start) for stage in supervised_stages(Run(path), each)] for each in (second, first, neither)
    ]
    assert order == [
        [(CO_OCCURRENCE, ""), (PERSONALISATION, CO_OCCURRENCE)],
        [(CONTENT, ""), (PERSONALISATION, CONTENT)],
        [(PERSONALISATION, "")],
    ]
    # What is the first stage then begins with pretrained parameters, where there are some.
    made = []
    monkeypatch.setattr(onesearch_training, "train_model", lambda *_, init: made.append(init(0, None)))
    monkeypatch.setattr(pretrained, "with_pretrained", lambda variables, folder, seed: folder)
    (last,) = supervised_stages(Run(path), dataclasses.replace(neither, pretrained="bart"))
    monkeypatch.setattr(onesearch_training, "fitted", lambda config, space: config)
    monkeypatch.setattr(onesearch_training, "training_batches", lambda *_: None)
    monkeypatch.setattr(onesearch_training, "assemble", lambda *_: SimpleNamespace(init=lambda *_: "fresh", space=None))
    last.train(Task(PERSONALISATION, tmp_path, tmp_path))
    assert made == ["bart"]


def test_a_log_whose_events_name_no_search_is_refused(tmp_path):
    events = {"item": [0], "behavior": ["click"], "split": ["train"], "search": pa.array([-1], pa.int32())}
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    pq.write_table(pa.table({"timestamp": [0], "query_index": [0]}), tmp_path / "searches.parquet")
    with pytest.raises(UserError, match=r"events\.parquet: no training event of the target behaviors click names"):
        check_searches(tmp_path, ["click"])


def test_centroids_of_damaged_codebooks_are_not_made_up(path, assembly, tmp_path):
    ids = pq.read_table(path / "tables" / "items.parquet")["item_id"].to_pylist()
    shutil.copytree(path / "semantic_ids", tmp_path / "ids")
    copy = SimpleNamespace(semantic_ids=tmp_path / "ids")
    assert len(run_centroids(copy, assembly.space, ids)) == assembly.space.levels  # FSQ has none
    (tmp_path / "ids" / BOOKS).write_bytes(b"x")
    with pytest.raises(UserError, match="holds no codebooks"):
        run_centroids(copy, assembly.space, ids)


def test_centroids_of_items_are_those_of_residual_k_means():
    rng = np.random.default_rng(0)
    x, codes = rng.normal(size=(50, 3)), np.stack([rng.integers(0, 4, 50), rng.integers(0, 3, 50)], axis=1)
    first, second = level_centroids(codes, (5, 3), x)
    np.testing.assert_allclose(first[2], x[codes[:, 0] == 2].mean(0), rtol=1e-5)
    np.testing.assert_allclose(second[1], (x - first[codes[:, 0]])[codes[:, 1] == 1].mean(0), rtol=1e-4)
    assert not first[4].any()


QUERIES = ("{known}", "{known} please", "zzz qqq", "кроссовки 跑步鞋 👟", "shoes " * 2000)


@pytest.mark.parametrize("query", QUERIES, ids=range(len(QUERIES)))
def test_a_server_answers_any_query(path, model, assembly, query):
    retriever = Retriever(path, model)
    query = query.format(known=assembly.queries.texts[0])[:10_000]
    user = pq.read_table(path / "tables" / "users.parquet")["user_id"][0].as_py()
    asked = [Request(user_id=who, query=query, k=5) for who in (user, "nobody")]
    answers = retriever.answer(asked)
    assert all(len(answer.items) == 5 for answer in answers)
    if assembly.queries.texts[0] in query:
        led = assembly.reader.statistics.led_to(0, 0).item
        ids = np.array(pq.read_table(path / "tables" / "items.parquet")["item_id"].to_pylist())
        assert len(set(ids[led]) & {item.item_id for item in answers[1].items}) >= 3


def test_texts_outside_the_log_are_compared_normalised_and_long_ones_forgotten(assembly):
    history = EMPTY | {"item": np.array([3]), "behavior": np.array([4]), "timestamp": np.array([1])}
    history |= {"session": np.array([0]), "search": np.array([0]), "search_query": np.array(["ZZZ  qqq"], object)}
    read = assembly.read_texts(history | {"query": "zzz QQQ "})
    assert read["same"].tolist() == [True]
    assert assembly.read_texts(history | {"query": "zzz"})["same"].tolist() == [False]
    assembly.read_texts(EMPTY | {"query": "zzz " * 2000})
    kept = [text for _, text in assembly.queries.others] + list(assembly.reader.statistics.kept)
    assert max(len(text) for text in kept if isinstance(text, str)) <= 200


def test_without_a_query_everything_is_relevant(model, assembly):
    """The empty query, and none."""
    read = [assembly.read_texts(EMPTY | more) for more in ({}, {"query": ""}, {"query": "  "})]
    for each in read:
        assert each["tokens"].size == 0 and (each["query_codes"] == -1).all()
        np.testing.assert_array_equal(
            each["led_to"].item, assembly.reader.statistics.led_to(len(assembly.queries.texts), 0).item
        )
    items, _ = model.recommend([EMPTY, EMPTY | {"query": ""}], 5)
    assert (items >= 0).all()


def test_an_export_answers_the_same(path, model, assembly, tmp_path):
    manifest = export.export_run(path, tmp_path / "out", export.ExportConfig(k=5, platforms=("cpu",)))
    assert manifest["reader"] == "SearchFeatureConfig" and "tokens" in manifest["modules"][0]["inputs"]
    history = EMPTY | {"query": assembly.queries.texts[3], "user": -1}
    artefact = export.load(tmp_path / "out")
    with pytest.raises(UserError, match=r"history 0 lacks .*led_to, .*query_codes, .*tokens"):
        artefact.prepare([history])
    inputs = artefact.prepare([assembly.read_texts(history)])
    items, scores = model.recommend([history], 5)
    length = inputs["tokens"].shape[1]
    for found in (
        artefact.retrieve(inputs),
        without_the_library(tmp_path / "out", {length: inputs}, (1,), tmp_path)[1][length, 1],
    ):
        np.testing.assert_array_equal(found["items"], items)
        np.testing.assert_allclose(found["scores"], scores, atol=1e-5)


FRESH = """
import json, sys
from pathlib import Path
from jaxrec.export import load
requests = json.load(sys.stdin)
print(json.dumps(load(Path(sys.argv[1])).answer(requests)))
"""


def test_an_export_answers_queries_by_itself_in_a_fresh_process(path, model, assembly, tmp_path):
    """The folder alone: typed queries, unseen ones too, histories with searches, a time."""
    shutil.copytree(path, tmp_path / "run")
    export.export_run(tmp_path / "run", tmp_path / "out", export.ExportConfig(k=5, platforms=("cpu",)))
    shutil.rmtree(tmp_path / "run")
    ids = pq.read_table(path / "tables" / "items.parquet")["item_id"].to_pylist()
    known = assembly.queries.texts[3]
    past = [{"item_id": ids[4]}, {"query": "zzz"}, {"item_id": ids[9], "query": known, "behavior": "click"}]
    timed = [{"item_id": ids[7], "timestamp": 1_700_000_000}, {"query": "qqq", "timestamp": 1_700_000_100}]
    requests = [
        {"history": [], "query": f" {known.upper()} "},
        {"history": past, "query": "кроссовки 跑步鞋 👟"},
        {"history": timed, "query": f"{known} zzz", "now": 1_700_000_200, "k": 3},
        {"history": [{"item_id": "no such item"}], "query": "x" * 10_000},
    ]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "out")],
        input=json.dumps(requests), capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = Retriever(path, model).answer([Request(**request) for request in requests])
    for found, answer, request in zip(json.loads(done.stdout.splitlines()[-1]), expected, requests, strict=True):
        wanted = answer.items[: request.get("k", 5)]
        assert [item for item, _ in found] == [item.item_id for item in wanted]
        np.testing.assert_allclose([score for _, score in found], [item.score for item in wanted], atol=1e-5)
    artefact = export.load(tmp_path / "out")
    for request, message in (
        ({"user_id": "u1", "query": "x"}, "request 0: an artefact takes no user_id; give history, k, now"),
        ({"history": [], "query": "x", "k": 6}, "request 0: k is 6, but the artefact has 5 answers"),
        ({"history": []}, "request 0: the field query is missing"),
        ({"history": [], "query": "x", "profile": {"age": "3"}}, "reads no age of a profile"),
        ({"history": [{"item_id": ids[0], "behavior": "glance"}], "query": "x"}, "unknown behavior 'glance'"),
    ):
        with pytest.raises(UserError, match=message):
            artefact.answer([request])
    (tmp_path / "out" / "reader" / "statistics.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"statistics\.safetensors is damaged"):
        export.load(tmp_path / "out")


def test_parts_can_be_left_out_and_what_contradicts_itself_is_refused():
    plain = PromptConfig(user_ids="hashed", query_ids=False, long_queries=0, copying=False)
    dataclasses.replace(CONFIG, prompt=plain, prior=False)
    with pytest.raises(UserError, match=r"prompt\.copying.*nothing to copy"):
        dataclasses.replace(CONFIG, features=dataclasses.replace(CONFIG.features, related=0, popular=0))
    with pytest.raises(UserError, match=r"'prior'.*model\.restrict"):
        dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, restrict=False))
    smooth = dataclasses.replace(CONFIG.objective, smoothing=0.1)
    with pytest.raises(UserError, match=r"'objective\.smoothing' is 0\.1 and 'prompt\.copying' is on"):
        dataclasses.replace(CONFIG, objective=smooth)
    dataclasses.replace(CONFIG, objective=smooth, prompt=plain, prior=False)
    with pytest.raises(UserError, match=r"content\.training\.evaluate_every"):
        dataclasses.replace(CONFIG.content, training=dataclasses.replace(CONFIG.training, evaluate_every=2))


# ---- rewards ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen(path) -> dict[str, dict]:
    """The variables of the stages that phase one reads."""
    return {name: best_variables(path / "stages" / name) for name in (PERSONALISATION, REWARD_MODEL)}


@pytest.fixture(scope="module")
def reward(path, frozen):
    return make_search_reward(Run(path), CONFIG, frozen[REWARD_MODEL])


def of_phase(assembly, name: str) -> OneSearchConfig:
    return fitted(behind(CONFIG, name), assembly.space)


@pytest.fixture(scope="module")
def reordered(path, assembly, frozen):
    """Phase one's examples, of the answers that the run kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_stored, "AT_ONCE", 64)
        patch.setattr(of_stored, "computed_rows", None)  # nothing is computed again
        folder = path / "stages" / REORDERED / ANSWERS
        return reordered_examples(Run(path), assembly, of_phase(assembly, REORDERED), frozen, folder)


def test_samples_of_the_reward_model_are_of_the_search_and_of_what_followed_without_one(path, records, reward):
    """A purchase has the labels (1, 1, 1), a click that is no purchase (1, 0, 0)."""
    levels, ranker, ranking = levels_of(Run(path), CONFIG), reward.ranker, CONFIG.rewards.model
    cuts, found = context_cuts(ranker, ranking, records), set()
    some = np.array([cut for cut in cuts if levels.clicked_elsewhere(records[cut[0]], cut[1]).any()])[:16]
    assert len(some) == 16
    options = {"epochs": 1, "shuffle": False, "drop_remainder": False}
    (batch,) = context_batches(ranker, ranking, records, some, 16, 0, levels.clicked_elsewhere, **options)
    for row, (at, place) in enumerate(some[batch["cut"]]):
        record, there = records[at], batch["candidate_where"][row]
        where = levels.clicked_elsewhere(record, place)
        assert set(levels.category[record["item"][where]]) <= set(levels.categories(record, place))
        assert (record["search"][where] < 0).all()
        events = np.flatnonzero(where | ((record["search"] == place) & (record["behavior"] >= 1)))
        expected = {}
        for event in events:
            item, behavior = int(record["item"][event]), int(record["behavior"][event])
            expected[item] = max(behavior, expected.get(item, 0))
        given = dict(zip(*(batch[name][row][there].tolist() for name in ("candidate", "candidate_behavior"))))
        assert given.items() <= expected.items() and len(given) == min(len(expected), 12)
        found |= {expected[int(item)] for item in record["item"][where]}
    assert {2, 4} & found


def test_answers_are_those_of_the_frozen_stage_with_their_rewards(path, assembly, frozen, reward, reordered, tmp_path):
    """As a server answers whose log lacks the search; Eq. 10 of each answer, in double precision."""
    log = reordered.take(np.arange(8))
    log.pop("preferred")
    some = AnsweredSearches(**log, reward=reward)
    kept = answered_searches(some, frozen[PERSONALISATION], tmp_path)
    assert kept["answers"].shape == kept["scores"].shape == (8, 12)
    whole = dict(np.load(path / "stages" / REORDERED / ANSWERS / "000000.npz"))
    assert whole["answers"].shape == (64, 12)
    for row, (at, place) in enumerate(some.cuts[:3]):
        record = some.records[at]
        history = reward.ranker.before_search(record, place)
        arrays = {name: array[None] for name, array in reward.ranker.read(history, 24).items()}
        predicted = reward.ranker.predict(reward.state["params"], arrays, kept["answers"][row][None])
        items = np.asarray(reward.ranker.items.embeddings, np.float64)[kept["answers"][row]]
        query = arrays["query_vector"][0].astype(np.float64)
        cosine = items @ query / np.linalg.norm(items, axis=1) / np.linalg.norm(query)
        expected = sum(predicted[name][0] for name in ("ctr", "cvr", "ctcvr")) + 10 * (1 + cosine) / 2
        np.testing.assert_allclose(kept["scores"][row], expected, rtol=1e-4)
        assert (kept["answers"][row] >= 0).all()
    batch = {name: np.stack([some(some.records[at], place, None)[name] for at, place in some.cuts[:8]]) for name in
             some(some.records[some.cuts[0][0]], some.cuts[0][1], None)}  # fmt: skip
    target = {"target": kept["answers"], "where": np.ones(8, bool)}
    plain = jax.jit(partial(target_scores, assembly))(assembly.catalogue, frozen[PERSONALISATION], batch | target)
    assert (np.diff(plain, axis=1) < 1e-4).all()  # the beam's order


def test_every_example_of_phase_one_has_a_chosen_answer_and_rejected_ones(reordered):
    by_score = 0
    for at, place in reordered.cuts:
        found = reordered(reordered.records[at], place, None)
        real, chosen, level = found["target"] >= 0, found["chosen"], found["level"]
        assert chosen.tolist() == [True] + [False] * 6 and real[:2].all()
        assert (level[real & ~chosen] >= 3).all() and len(set(found["target"][real])) == real.sum()
        assert found["by_score"] == (level[0] >= 3)
        by_score += int(found["by_score"])
        codes = reordered.assembly.space.codes[found["target"][real]]
        assert not (codes[1:] == codes[0]).all(1).any()
    assert 0 < by_score < len(reordered.cuts) > 40


def test_examples_of_phase_two_are_the_same_in_every_epoch_and_never_reject_what_was_taken(path, assembly):
    examples = interaction_examples(Run(path), assembly, of_phase(assembly, INTERACTIONS))
    levels, seen = examples.levels, set()
    for at, place in examples.cuts[::9]:
        record = examples.records[at]
        found, again = (examples(record, place, np.random.default_rng(seed)) for seed in (0, 1))
        for name, array in found.items():
            np.testing.assert_array_equal(array, again[name])
        real, chosen = found["target"] >= 0, found["chosen"]
        met = dict(zip(*(each.tolist() for each in levels.of(record, place)), strict=True))
        for item, level, is_chosen in zip(found["target"][real], found["level"][real], chosen[real], strict=True):
            assert is_chosen == (level < 3) and met.get(int(item), level) == level
            assert (level == 4) == (int(item) not in met and levels.category[item] in levels.categories(record, place))
            seen.add(int(level))
        assert 1 <= chosen.sum() <= 2
        day = record["search_timestamp"][place] // DAY
        np.testing.assert_array_equal(found["counts"][real], examples.counts.before(found["target"][real], day))
    assert seen == {0, 1, 2, 3, 4, 5}


def test_the_stored_reference_is_the_frozen_stage(path, assembly, frozen, reordered):
    """Phase one sees its examples more than once; phase two does not, and scores those of each step."""
    assert (path / "stages" / REORDERED / REFERENCE).is_dir()
    assert not (path / "stages" / INTERACTIONS / REFERENCE).exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_stored, "AT_ONCE", 64)
        patch.setattr(of_stored, "computed_rows", None)
        folder = path / "stages" / REORDERED / REFERENCE
        rows = onesearch_stages.stored_reference(folder, reordered, frozen[PERSONALISATION])
    batch = next(of_stored.WithStored(reordered.batches(), rows))
    plain = jax.jit(partial(target_scores, assembly))(assembly.catalogue, frozen[PERSONALISATION], batch)
    np.testing.assert_allclose(batch["reference"], plain, atol=1e-4)
    assert np.abs(plain).max() > 0.1


def test_preferences_are_learned_and_pairs_left_out_are_counted(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for stage in (REORDERED, INTERACTIONS):
        mine = [line for line in lines if line["stage"] == stage]
        assert min(line["loss"] for line in mine[1:]) < mine[0]["loss"] and mine[-1]["pairs_ordered"] > 0.6
        assert all(0 <= line["pairs_left_out"] < 0.2 for line in mine)


def test_answers_are_served_in_the_order_of_the_reward(path, model, assembly):
    ordered = onesearch_stages.recommender(assembly, model.variables, dataclasses.replace(CONFIG, reorder=8))
    assert isinstance(model, RewardedRecommender) and model.reorder is None and ordered.reorder == 8
    histories = [EMPTY | {"query": text} for text in assembly.queries.texts[:3]]
    plain, _ = model.recommend(histories, 8)
    rewards = ordered.rewards_of(histories, plain, (4,))
    items, scores = ordered.recommend(histories, 5)
    order = rewarded_order(rewards, plain >= 0)
    np.testing.assert_array_equal(items, np.take_along_axis(plain, order, 1)[:, :5])
    assert np.isfinite(scores).all() and not np.array_equal(items, plain[:, :5])
    # How many are asked for changes no place; what is behind the first ones stays behind them.
    more = ordered.recommend(histories, 10)[0]
    np.testing.assert_array_equal(more[:, :5], items)
    np.testing.assert_array_equal(more[:, 8:], model.recommend(histories, 10)[0][:, 8:])
    # What the reward model does not know keeps its place.
    later = plain.copy()
    later[:, 2] = assembly.space.codes.shape[0] + 3
    assert np.isnan(ordered.rewards_of(histories, later, (1, 2))[:, 2]).all()
    retriever = Retriever(path, ordered)
    request = Request(history=[], query=assembly.queries.texts[0], k=5)
    ids = pq.read_table(path / "tables" / "items.parquet")["item_id"].to_pylist()
    expected = ordered.recommend([retriever.history(request)[0]], 5)[0][0]
    assert [item.item_id for item in retriever.answer([request])[0].items] == [ids[item] for item in expected]
    names = {True: ["onesearch before rewards", "onesearch without reordering"]}
    names[False] = ["onesearch before rewards", "onesearch_rm"]
    assert [list(each.variants) for each in (ordered, model)] == [names[True], names[False]]


def test_an_export_of_answers_in_the_order_of_the_reward_is_refused(path, model, assembly, tmp_path, monkeypatch):
    ordered = onesearch_stages.recommender(assembly, model.variables, dataclasses.replace(CONFIG, reorder=8))
    monkeypatch.setattr(export, "load_recommender", lambda _: ordered)
    with pytest.raises(UserError, match="'reorder' is 8: answers are ordered by a reward model, which an artefact"):
        export.export_run(path, tmp_path / "out", export.ExportConfig(k=5, platforms=("cpu",)))
    assert not (tmp_path / "out").exists()


def test_a_reward_that_is_not_there_or_no_number_is_refused(
    path, model, assembly, frozen, reward, tmp_path, monkeypatch
):
    elsewhere = dataclasses.replace(assembly, folder=tmp_path)
    ordered = onesearch_stages.recommender(elsewhere, model.variables, dataclasses.replace(CONFIG, reorder=8))
    with pytest.raises(UserError, match="reward_model holds no trained reward model to order answers by; run train"):
        ordered.recommend([EMPTY | {"query": "zzz"}], 5)
    broken = {"params": jax.tree.map(lambda each: each * np.nan, frozen[REWARD_MODEL]["params"])}
    few = of_phase(assembly, REORDERED)
    few = dataclasses.replace(
        few, rewards=dataclasses.replace(few.rewards, reordered=dataclasses.replace(few.rewards.reordered, searches=16))
    )
    with pytest.raises(UserError, match=r"0 of 16 .*; 192 of 192 rewards are no finite numbers.*train it longer"):
        reordered_examples(Run(path), assembly, few, frozen | {REWARD_MODEL: broken}, tmp_path / "answers")
    ranker = SimpleNamespace(queries=SimpleNamespace(ids=None))
    monkeypatch.setattr("jaxrec.systems.onesearch.reward_model.assemble_ranker", lambda *_: ranker)
    with pytest.raises(UserError, match=r"'rewards\.weights\.relevance' is 10\.0, but the embeddings of the items"):
        make_search_reward(Run(path), CONFIG, frozen[REWARD_MODEL])
    search_examples = onesearch_preference.search_examples

    def nothing(*arguments):
        log = search_examples(*arguments)
        return dataclasses.replace(log, cuts=log.cuts[:0], lengths=[])

    monkeypatch.setattr(onesearch_preference, "search_examples", nothing)
    with pytest.raises(UserError, match=r"events\.parquet: no search of training led to a click or a purchase"):
        interaction_examples(Run(path), assembly, of_phase(assembly, INTERACTIONS))


# ---- pretrained weights ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bart", "qwen2"])
def weights(request, tmp_path_factory) -> Path:
    """A folder with a tiny BART or Qwen2 and its tokenizer."""
    folder, sizes = tmp_path_factory.mktemp("weights") / request.param, {"width": 16, "heads": 2, "head_dim": 8}
    sizes |= {"vocabulary": 30, "hidden": 16, "layers": 1}
    config, save, end = CausalConfig(**sizes, groups=1), save_qwen2, "<|endoftext|>"
    if request.param == "bart":
        config, save, end = bart_config(**sizes, encoder_layers=1, max_positions=64), save_bart, "</s>"
    one = jnp.zeros((1, 1), jnp.int32)
    made = jax.jit(make_backbone(config).init)(jax.random.key(3), ContextTokens(one, one > -1), one[None])
    save(folder, config, jax.tree.map(np.asarray, nn.unbox(made["params"])))
    words = {"<s>": 0, "<pad>": 1, end: 2, "<unk>": 3, "red": 4, "shoes": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_weights_stand_in_front_of_the_prompts_tokens_and_the_codes(weights, tmp_path):
    write_pretrained(tmp_path, str(weights))
    assert load_tokenizer(tmp_path).encode(["red shoes"]) == [[4, 5]]
    backbone, (config, given) = backbone_of(tmp_path, dataclasses.replace(CONFIG.model, dropout=0.3)), load(weights)
    assert backbone == dataclasses.replace(config, dropout=0.3)
    assert backbone_of(tmp_path / "none", CONFIG.model) == CONFIG.model
    vocabulary = SearchVocabulary(backbone.vocabulary, len(TASKS), (5, 4))
    model = PersonalSearch(vocabulary.fit(backbone), vocabulary, PromptConfig("items", long_queries=0, copying=False))
    prompts = TaskInputs(jnp.zeros(1, int), jnp.array([[4, 5]]), jnp.full((1, 2), -1))

    @jax.jit
    def make():
        return nn.unbox(model.init(jax.random.key(0), prompts, jnp.zeros((1, 1, 2), jnp.int32)))

    fresh = make()
    found = with_pretrained(fresh, str(weights), 0)["params"]["backbone"]
    assert jax.tree.structure(found) == jax.tree.structure(fresh["params"]["backbone"])
    assert len(found["embed"]["table"]) == vocabulary.size
    for table in {"embed", "head"} & set(given):
        np.testing.assert_array_equal(found[table]["table"][:30], given[table]["table"])
    for name in set(given) - {"embed", "head", "logits_bias"}:
        assert jax.tree.all(jax.tree.map(np.array_equal, found[name], given[name])), name


def test_its_tokenizer_comes_with_it_and_other_folders_are_refused(weights, tmp_path):
    kind = type(load(weights)[0])
    tokenizer = read_tokenizer(str(weights), kind)
    assert tokenizer.encode(["red shoes"]) == [[4, 5]] and tokenizer.end == 2
    assert len(digests(str(weights))) == 3
    with pytest.raises(UserError, match=r"'pretrained'.*no folder"):
        digests(str(tmp_path / "nothing"))
    shutil.copytree(weights, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        read_tokenizer(str(tmp_path / "bare"), kind)
    words = {tokenizer.end_name: 0, "<unk>": 1} | {f"word{at}": at + 2 for at in range(29)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>")).save(str(tmp_path / "bare" / "tokenizer.json"))
    (tmp_path / "made").mkdir()
    with pytest.raises(UserError, match=r"'pretrained'.*has 31 tokens, but the weights have 30"):
        write_pretrained(tmp_path / "made", str(tmp_path / "bare"))
    assert not list((tmp_path / "made").iterdir())
