import dataclasses
import json
import shutil
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from exported import without_the_library
from mall_onesug import config as CONFIG
from pydantic import ValidationError
from stopping import StoppedError, stopping

from jaxrec.config import UserError
from jaxrec.data.completions import completions_of, training_queries
from jaxrec.data.examples import Records
from jaxrec.data.popularity import PopularityConfig
from jaxrec.data.suggestion_features import SuggestionFeatureConfig
from jaxrec.data.suggestion_targets import asked_rows, typed_prefix
from jaxrec.data.tables import CHOSEN, FEEDBACK
from jaxrec.data.vetted_queries import VettedQueriesConfig
from jaxrec.data.words import normalised, typed
from jaxrec.export import ExportConfig, export_run, load
from jaxrec.files import read_json
from jaxrec.losses.preference import HybridConfig
from jaxrec.losses.rewards import BASE_WEIGHTS
from jaxrec.models.causal import CausalConfig
from jaxrec.run import Run
from jaxrec.serving.batch import answer_file
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Request
from jaxrec.systems import load_recommender, train
from jaxrec.systems import stored_rows as of_stored
from jaxrec.systems.onesug.config import (
    LIKELIHOOD,
    PREFERENCE,
    LikelihoodObjective,
    PreferenceConfig,
)
from jaxrec.systems.onesug.examples import cut, history_of, packed, seen_of
from jaxrec.systems.onesug.model import assemble
from jaxrec.systems.onesug.preference import (
    REFERENCE,
    preference_examples,
    preference_loss,
    referring_loss,
    stored_scores,
    stores_reference,
    target_scores,
)
from jaxrec.systems.onesug.training import likelihood_batches, losses, make_targets, recut, stages
from jaxrec.targets import load_text_space
from jaxrec.training import checkpoint, loop
from jaxrec.training.stages import best_variables

STAGES = (LIKELIHOOD, PREFERENCE)
EMPTY = {name: np.zeros(0, np.int32) for name in ("item", "behavior", "timestamp", "session")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Two runs of one configuration: one without a stop, one stopped in both stages, and while the reference's scores
    are computed, and run again."""
    folder = tmp_path_factory.mktemp("onesug")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_stored, "AT_ONCE", 200)
        train(Run.open(folder / "whole", CONFIG), CONFIG)
        unmade = shutil.ignore_patterns("stages", "eval*", "metrics.jsonl")
        shutil.copytree(folder / "whole", folder / "stopped", ignore=unmade)
        stops, files, save = ["step:30", "step:7", "step:20"], [], of_stored.save_rows

        def save_and_stop(path: Path, scores: dict) -> None:
            save(path, scores)
            files.append(path)
            if len(files) == 2:
                raise StoppedError

        patch.setattr(loop, "fault_point", stopping(stops))
        patch.setattr(of_stored, "save_rows", save_and_stop)
        for _ in range(4):
            with pytest.raises(StoppedError):
                train(Run.open(folder / "stopped", CONFIG), CONFIG)
        train(Run.open(folder / "stopped", CONFIG), CONFIG)
        assert not stops and len(files) == len(set(files)) > 2
    return folder / "whole", folder / "stopped"


@pytest.fixture(scope="module")
def path(runs) -> Path:
    return runs[0]


@pytest.fixture(scope="module")
def model(path):
    return load_recommender(Run.load(path)[0])


@pytest.fixture(scope="module")
def assembly(model):
    return model.assembly


@pytest.fixture(scope="module")
def records(assembly) -> Records:
    return Records(assembly.examples, "train")


@pytest.fixture(scope="module")
def examples(path, assembly):
    return preference_examples(path / "tables", assembly, fitted(assembly))


def fitted(assembly, **changes):
    return dataclasses.replace(CONFIG, features=assembly.features, **changes)


def on_device(batch: dict, rows: int | None = None) -> dict:
    return {name: jnp.asarray(each[:rows]) for name, each in batch.items()}


def make_searches(texts) -> dict:
    """The searches of a history, one a session."""
    order = np.arange(len(texts))
    return {"search_query": np.array([*texts], object), "search_timestamp": order, "search_session": order}


# ---- trained ---------------------------------------------------------------------------------------------------------


def test_stopped_in_every_stage_it_ends_in_the_same_bits(runs):
    for stage in STAGES:
        whole, stopped = (checkpoint.load_parts(run / "stages" / stage, "params", "opt_state") for run in runs)
        assert jax.tree.all(jax.tree.map(np.array_equal, whole, stopped)), stage
    assert (runs[0] / "evaluation.json").read_bytes() == (runs[1] / "evaluation.json").read_bytes()


def test_it_is_above_the_most_popular_completion(path):
    rows = read_json(path / "evaluation.json")
    found = {row["model"]: row["value"] for row in rows if (row["subset"], row["metric"]) == ("all", "mrr@10")}
    assert found["onesug"] > max(value for name, value in found.items() if name != "onesug")


def test_pairs_without_an_order_are_counted_in_the_log(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert all("pairs_left_out" in line for line in lines if line["stage"] == PREFERENCE)


def test_a_step_equals_a_plain_computation(model, assembly):
    """-log of (1 - share) * the decoder's probability of a query + share * the weight of the candidate that it is."""
    batch = on_device(next(likelihood_batches(assembly, fitted(assembly))), 4)
    total, count = losses(assembly, CONFIG, None, model.variables, batch, jax.random.key(0))
    plain, inputs = assembly.model.clone(copying=False), assembly.inputs(batch)
    of_plain = {"params": {"backbone": model.variables["params"]["backbone"]}}
    context = assembly.model.apply(model.variables, inputs, method="prefill")
    decoder = plain.apply(of_plain, inputs, batch["target"])
    expected, targets = 0.0, 0
    for row, place in zip(*np.nonzero(np.asarray(batch["real"]).any(-1)), strict=True):
        real = np.asarray(batch["real"][row, place])
        written = np.where(real, batch["target"][row, place], -1)
        weights, share = np.asarray(context.points.weights[row, 0]), float(context.points.share[row, 0])
        copied = weights[(np.asarray(context.candidates[row]) == written).all(1)].sum()
        own = np.exp(np.asarray(decoder)[row, place][real].sum(dtype=np.float64))
        expected -= np.log((1 - share) * own + share * copied)
        targets += 1
    assert count == targets >= 4
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_the_chosen_queries_of_a_prefix_are_targets_of_one_context(assembly, records):
    """Two queries chosen for one prefix at one moment, beside one that was shown."""
    record = dict(records[3])
    row = int(asked_rows(record)[-1])
    two = np.flatnonzero(record["suggestion_query"] != record["suggestion_query"][row])[0]
    added = {name: record[name][[row, row]].copy() for name in record if name.startswith("suggestion_")}
    added["suggestion_query"][:] = record["suggestion_query"][two]
    added["suggestion_feedback"] = np.array([2, 3], np.int8)
    for name, values in added.items():
        record[name] = np.insert(record[name], row + 1, values)
    asked = typed_prefix(record, row)
    queries = record["suggestion_query"][asked.rows]
    chosen = queries[record["suggestion_feedback"][asked.rows] < len(CHOSEN)]
    assert len(set(chosen)) == 2
    assembly = dataclasses.replace(assembly, examples=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxrec.systems.onesug.examples.Records", lambda *_: [record])
        drawn = islice(likelihood_batches(assembly, fitted(assembly, batch_size=1)), 1000)
        batch = next(batch for batch in drawn if batch["real"].any(-1).sum() == 2)
    written = assembly.tokenizer.decode(
        [row[real] for row, real in zip(batch["target"][0], batch["real"][0]) if real.any()]
    )
    assert set(written) == {normalised(text) for text in assembly.queries[chosen]}


def served_without(path, assembly, record, session, config):
    """The assembly of a server whose log lacks a session of a user."""
    texts, log = training_queries(path / "tables")
    user, sessions, query, times = (log[name].to_numpy() for name in ("user", "session", "query", "timestamp"))
    keep = (user != record["user"]) | (sessions != session)
    there, query = np.unique(query[keep], return_inverse=True)
    known = completions_of([texts[at] for at in there], query, times[keep], config)
    of_row = known.rows(assembly.queries)
    return dataclasses.replace(assembly, known=dataclasses.replace(assembly.known, completions=known, of_row=of_row))


def test_a_training_example_is_what_a_server_sees_whose_log_lacks_the_session(path, assembly, records):
    """All of the prompt and the candidates, without related queries and nearness to the past: these have own tests."""
    config = dataclasses.replace(CONFIG.completions, recent=PopularityConfig(1, 20.0, 0.0))
    texts, log = training_queries(path / "tables")
    columns = (log[name].to_numpy() for name in ("query", "timestamp"))
    known = dataclasses.replace(assembly.known, completions=completions_of(texts, *columns, config), neighbours=None)
    assembly, seen = dataclasses.replace(assembly, known=known, related=None), 0
    for at in range(0, len(records), 9):
        record = records[at]
        for row in asked_rows(record)[::3]:
            asked = typed_prefix(record, row)
            found = cut(
                assembly, assembly.read_texts(history_of(assembly, record, asked), seen_of(assembly, record, asked))
            )
            server = served_without(path, assembly, record, asked.session, config)
            history = history_of(assembly, record, asked)
            typed = {
                "prefix": " " + history["prefix"].upper(),
                "search_query": assembly.queries[history["search_query"]],
            }
            expected = cut(server, server.read_texts(history | typed))
            for name, array in expected.items():
                np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
            seen += 1
    assert seen > 20


def test_related_queries_are_read_and_may_be_copied_but_not_those_of_the_own_session(assembly, records):
    """OneSug §3.2: related queries stand beside what is typed, without an answer that its session alone knew."""
    related, shown, once = assembly.related.found, 0, 0
    for record in records:
        for row in asked_rows(record):
            asked = typed_prefix(record, row)
            history, seen = history_of(assembly, record, asked), seen_of(assembly, record, asked)
            read = assembly.read_texts(history, seen)
            rows = [at for at in related.related([history["prefix"]], [seen.answer])[0].tolist() if at >= 0]
            texts = [assembly.known.completions.texts[at] for at in read["near"]]
            rare = [at for at in seen.session if assembly.known.completions.count[at] == 1]
            assert not set(rare) & set(read["near"].tolist())
            if not rare:
                assert texts == [related.texts[at] for at in rows]
            wanted = [assembly.known.read[at].tolist() for at in read["near"][: assembly.features.related]]
            assert [tokens.tolist() for tokens in read["related"]] == wanted
            shown, once = shown + len(rows), once + len(rare)
    assert shown > 100


def answer_ranks(assembly, histories, answers) -> np.ndarray:
    """The place of each answer among its candidates by initial weight, the number of candidates for none."""
    ranks = []
    for read, answer in zip(histories, answers, strict=True):
        arrays = cut(assembly, read)
        order = np.argsort(-np.where(arrays["candidate"][:, 0] >= 0, arrays["habits"][:, 0], -np.inf), kind="stable")
        target, real = assembly.space.encode([answer])
        same = (arrays["candidate"][order] == np.where(real[0], target[0], -1)).all(1)
        ranks.append(np.argmax(same) if same.any() else len(order))
    return np.array(ranks)


def test_the_answer_stands_among_the_candidates_of_training_as_in_those_of_validation(assembly, records):
    """With the answer's own search in the counts it would stand higher."""
    trained, leaking, answers = [], [], []
    for record in records:
        for row in asked_rows(record):
            asked = typed_prefix(record, row)
            history = history_of(assembly, record, asked)
            trained.append(assembly.read_texts(history, seen_of(assembly, record, asked)))
            leaking.append(assembly.read_texts(history))
            chosen = record["suggestion_feedback"][asked.rows] < len(CHOSEN)
            answers.append(assembly.queries[record["suggestion_query"][asked.rows[chosen][0]]])
    cases = assembly.cases("valid")
    held = [assembly.read_texts(history) for history in cases.histories]
    truths = [assembly.space.show(row[where])[0] for row, where in zip(cases.targets, cases.where, strict=True)]
    first = {
        name: (answer_ranks(assembly, histories, texts) < 3).mean()
        for name, histories, texts in (
            ("training", trained, answers), ("leaking", leaking, answers), ("validation", held, truths)
        )
    }  # fmt: skip
    assert abs(first["training"] - first["validation"]) < 0.08 and first["leaking"] >= first["training"]


def test_a_prefix_cut_anew_is_a_beginning_of_a_chosen_query():
    rng, found = np.random.default_rng(0), set()
    for _ in range(200):
        history, texts = recut({"prefix": "x", "now": 3}, ["red shoes", "red socks"], rng)
        assert texts and all(text.startswith(history["prefix"]) for text in texts) and history["now"] == 3
        found.add((len(history["prefix"]), len(texts)))
    assert {size for size, _ in found} == set(range(9)) and {(5, 2), (6, 1)} <= found


# ---- preferences -----------------------------------------------------------------------------------------------------


def test_what_is_blocked_is_neither_listed_nor_written(path, model, tmp_path):
    text = model.space.texts[0]
    (tmp_path / "blocked.txt").write_text(text)
    vetted = VettedQueriesConfig(block_list=tmp_path / "blocked.txt")
    make_targets(Run(path), dataclasses.replace(CONFIG, vetted=vetted), tmp_path / "targets")
    space = load_text_space(tmp_path / "targets")
    assert text not in space.texts and space.blocked.holds(text.upper())
    assert not any(map(space.blocked.holds, space.texts))


def test_changed_samples_are_padded_to_the_longest_bucket(assembly):
    """A prefix that is cut anew, or a past that is left out, may leave a prompt for another bucket than the log's."""
    longest = assembly.features.buckets[-1]
    for change in ({"recut": 1.0}, {"without_past": 0.5}):
        batches = likelihood_batches(assembly, fitted(assembly, objective=LikelihoodObjective(**change)))
        shapes = {next(batches)["tokens"].shape[1] for _ in range(6)}
        assert shapes == {longest}


def test_packed_targets_of_unequal_length_equal_one_by_one(model, assembly, examples):
    batch = on_device(next(examples.batches()), 6)
    lengths = np.asarray(batch["real"].sum(-1))
    assert len(np.unique(lengths[lengths > 0])) > 2 and (lengths == 0).any()
    together = np.asarray(target_scores(assembly, model.variables, batch))
    score = jax.jit(partial(target_scores, assembly))
    for place in range(lengths.shape[1]):
        alone = batch | {name: batch[name][:, place : place + 1] for name in ("target", "real")}
        np.testing.assert_allclose(together[:, place], score(model.variables, alone)[:, 0], atol=2e-5)


def test_rewards_are_those_of_table_1(path, assembly, records, examples):
    """lambda e^p, p counted in the log."""
    table = pq.read_table(path / "tables" / "suggestions.parquet")
    table = table.filter(pa.array([split == "train" for split in table["split"].to_pylist()])).to_pylist()
    for at in (2, 40):
        record = records[at]
        row = int(asked_rows(record)[-1])
        asked, found = typed_prefix(record, row), examples(record, row, None)
        typed = assembly.prefixes[asked.prefix]
        same = [each for each in table if each["prefix"] == typed]
        kept = found["real"].any(-1)
        texts = assembly.tokenizer.decode([t[r] for t, r in zip(found["target"][kept], found["real"][kept])])
        levels = {each["query"]: each["feedback"] for each in (
            {"query": assembly.queries[record["suggestion_query"][place]],
             "feedback": FEEDBACK[record["suggestion_feedback"][place]]} for place in asked.rows)}  # fmt: skip
        for text, feedback, reward in zip(texts, found["feedback"][kept], found["reward"][kept], strict=True):
            assert levels[text] == FEEDBACK[feedback]
            level = [each["query"] for each in same if each["feedback"] == FEEDBACK[feedback]]
            expected = BASE_WEIGHTS[feedback] * np.exp(level.count(text) / len(level))
            np.testing.assert_allclose(reward, expected, rtol=1e-5)
        assert (found["feedback"][kept] < len(CHOSEN)).sum() >= 1 and kept.sum() > 2


def hand_batch(assembly, feedback, reward, reference):
    """Six targets of one real context."""
    read = assembly.read_texts(EMPTY | {"prefix": "ga"})
    texts = list(assembly.space.texts[: len(feedback)])
    arrays = {**cut(assembly, read), **packed(assembly, texts, len(feedback))}
    told = {"feedback": np.array(feedback, np.int32), "reward": np.array(reward, np.float32)}
    told["reference"] = np.array(reference, np.float32)
    return {name: jnp.asarray(array)[None] for name, array in (arrays | told).items()} | {"where": jnp.array([True])}


FEEDBACK_OF, REWARDS = [0, 2, 3, 4, 5, 3], [2.0, 1.5, 0.5, 0.25, 0.0, 1.5]
"""The last of the shown queries has the reward of the second chosen one: that pair has no order."""


@pytest.mark.parametrize("compare", ["lists", "pairs"])
def test_the_loss_by_hand(model, assembly, compare):
    """Eq. 6 to 9 with the default's margin: every pair with rw = 1 / (r_w - r_l)."""
    loss = HybridConfig(compare, beta=0.5, margin=0.3, likelihood=0.2)
    config = dataclasses.replace(CONFIG, preference=PreferenceConfig(loss))
    batch = hand_batch(assembly, FEEDBACK_OF, REWARDS, [-3.0, -4.0, -2.0, -6.0, -5.0, -1.0])
    found, (metrics, _) = preference_loss(
        assembly, config, None, model.variables["params"], {}, batch, jax.random.key(0)
    )
    policy = np.asarray(target_scores(assembly, model.variables, batch))[0].astype(np.float64)
    implicit = 0.5 * (policy - np.asarray(batch["reference"])[0])
    total = 0.0
    for chosen in (0, 1):
        terms = [
            max(0.0, implicit[other] - implicit[chosen] + 0.3) / (REWARDS[chosen] - REWARDS[other])
            for other in (2, 3, 4, 5)
            if REWARDS[chosen] > REWARDS[other]
        ]
        if compare == "lists":
            total += np.log1p(np.exp(terms).sum()) - 0.2 * policy[chosen]
        else:
            total += np.log1p(np.exp(terms)).sum() - 0.2 * len(terms) * policy[chosen]
    np.testing.assert_allclose(found, total / 2, rtol=1e-4)
    assert [int(each) for each in metrics["pairs_left_out"]] == [1, 8]


def test_where_no_pair_has_an_order_there_is_no_loss(model, assembly):
    batch = hand_batch(assembly, [2, 3, 3], [1.0, 1.0, 1.5], [-3.0, -4.0, -2.0])
    found, (metrics, _) = preference_loss(
        assembly, CONFIG, None, model.variables["params"], {}, batch, jax.random.key(0)
    )
    assert float(found) == 0 and [int(each) for each in metrics["pairs_left_out"]] == [2, 2]


@pytest.mark.parametrize(("form", "moves"), [("margin", True), ("linear", True), ("tolerance", False), ("lead", False)])
@pytest.mark.parametrize("compare", ["lists", "pairs"])
def test_gradients_at_the_start_are_those_of_the_text(path, assembly, compare, form, moves):
    """At policy = reference the printed forms (tolerance, lead) do not move; without the chosen queries' likelihood."""
    config = dataclasses.replace(CONFIG, preference=PreferenceConfig(HybridConfig(compare, likelihood=0.0, form=form)))
    batch = hand_batch(assembly, FEEDBACK_OF, REWARDS, [0.0] * 6)
    variables = best_variables(path / "stages" / LIKELIHOOD)
    frozen = {LIKELIHOOD: variables}

    def loss(params):
        return referring_loss(assembly, config, None, frozen, params, {}, batch, jax.random.key(0))[0]

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert any(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(gradient)) == moves


def test_the_second_stage_prefers_what_was_chosen(path, assembly, examples):
    """Against its reference, which is the first stage, by the loss; at the reference all is even."""
    before, after = (best_variables(path / "stages" / name) for name in STAGES)
    batch = on_device(next(examples.batches()))
    config = fitted(assembly)
    run = jax.jit(
        lambda params: referring_loss(
            assembly, config, None, {LIKELIHOOD: before}, params, {}, batch, jax.random.key(0)
        )[0]
    )
    assert run(after["params"]) < run(before["params"]) - 0.02


def test_stored_scores_are_those_of_the_frozen_stage(path, assembly, examples, tmp_path):
    frozen = best_variables(path / "stages" / LIKELIHOOD)
    kept = path / "stages" / PREFERENCE / REFERENCE
    scores = np.zeros((len(examples.cuts), 8), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_stored, "AT_ONCE", 200)
        patch.setattr(of_stored, "computed_rows", None)  # nothing is computed again
        scores = stored_scores(kept, examples, frozen)
    batches = of_stored.WithStored(examples.batches(), {"reference": scores})
    batch = on_device(next(batches))
    plain = target_scores(assembly, frozen, batch)
    np.testing.assert_allclose(batch["reference"], plain, atol=2e-5)
    assert np.abs(plain).max() > 1
    params, key, config = best_variables(path / "stages" / PREFERENCE)["params"], jax.random.key(0), fitted(assembly)
    stored, computed = (
        preference_loss(assembly, config, None, params, {}, batch, key)[0],
        referring_loss(assembly, config, None, {LIKELIHOOD: frozen}, params, {}, batch, key)[0],
    )
    np.testing.assert_allclose(stored, computed, rtol=1e-5)
    state = batches.get_state()
    second = next(batches)
    batches.set_state(state)
    np.testing.assert_array_equal(next(batches)["cut"], second["cut"])


def test_scores_are_stored_where_an_example_is_seen_again(assembly, examples):
    assert stores_reference(examples)
    few = dataclasses.replace(CONFIG.preference, training=dataclasses.replace(CONFIG.preference.training, steps=2))
    off = dataclasses.replace(CONFIG.preference, stored_reference=False)
    for each in (few, off):
        config = fitted(assembly, preference=each)
        assert not stores_reference(dataclasses.replace(examples, config=config))


def test_the_targets_of_a_prefix_are_the_same_in_every_epoch_and_no_more_than_wanted(assembly, records, examples):
    few = fitted(assembly, preference=dataclasses.replace(CONFIG.preference, rejected=2))
    some = dataclasses.replace(examples, config=few)
    for at in range(0, len(records), 17):
        for row in asked_rows(records[at]):
            first, second = (some(records[at], row, np.random.default_rng(seed)) for seed in (0, 1))
            for name, array in first.items():
                np.testing.assert_array_equal(array, second[name])
            real = first["real"].any(-1)
            assert real.sum() <= 3 and (first["feedback"][real] >= len(CHOSEN)).sum() <= 2


# ---- served ----------------------------------------------------------------------------------------------------------


def texts_of(answer) -> list[str]:
    assert not isinstance(answer, UserError), answer
    return [each.text for each in answer.texts]


def test_the_own_history_and_what_is_typed_decide(model):
    def best(prefix: str, searched: list[str]) -> list[str]:
        rows, _ = model.recommend([EMPTY | {"prefix": prefix} | make_searches(searched)], 5)
        return model.space.show(rows[0])

    assert best("garden", [])[0].startswith("garden") and best("phone", [])[0].startswith("phone")
    usual = best("", [])
    rare = min(set(model.space.texts) - set(usual))
    assert rare in best("", [rare] * 3)


PREFIXES = ("{known}", "{start}", "", "   ", "zzz qqq", "кросс 跑步鞋 👟", "عربي", "a " * 5000)


@pytest.mark.parametrize("prefix", PREFIXES, ids=range(len(PREFIXES)))
def test_a_server_answers_any_prefix(path, model, prefix):
    retriever = Retriever(path, model)
    known = model.space.texts[3]
    prefix = prefix.format(known=known, start=known[:2])[:10_000]
    user = pq.read_table(path / "tables" / "users.parquet")["user_id"][0].as_py()
    asked = [{"user_id": user}, {"user_id": "nobody"}, {"history": [{"query": known}]}]
    requests = [Request.model_validate(each | ({"prefix": prefix} if prefix else {}) | {"k": 5}) for each in asked]
    answers = retriever.answer(requests)
    begun = typed(prefix)
    completions = [text for text in model.space.texts if text.startswith(begun)]
    for answer in answers:
        assert len(texts_of(answer)) == min(5, len(completions))
        assert all(text.startswith(begun) for text in texts_of(answer))


def test_half_a_character_is_refused():
    with pytest.raises(ValidationError, match="unable to parse raw data as a unicode string"):
        Request.model_validate({"user_id": "u1", "prefix": "a\ud800", "k": 2})


def test_files_answer_as_python_does(path, model, tmp_path):
    retriever = Retriever(path, model)
    lines = [{"user_id": "u007", "prefix": "bo", "k": 3}, {"history": [], "prefix": "garden", "k": 2}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    answer_file(retriever, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    direct = retriever.answer([Request.model_validate(each) for each in lines])
    assert [[each["text"] for each in line["texts"]] for line in found] == [texts_of(each) for each in direct]


def test_an_export_answers_the_same(path, model, assembly, tmp_path):
    manifest = export_run(path, tmp_path / "out", ExportConfig(k=5, platforms=("cpu",)))
    assert manifest["reader"] == "SuggestionFeatureConfig"
    named = {"tokens", "candidate", "habits", "user", "typed", "typed_length"}
    assert set(manifest["modules"][0]["inputs"]) == named
    history, artefact = EMPTY | {"prefix": "ga"}, load(tmp_path / "out")
    inputs = artefact.prepare([assembly.read_texts(history)])
    texts, scores = model.recommend([history], 5)
    length = inputs["tokens"].shape[1]
    for found in (
        artefact.retrieve(inputs),
        without_the_library(tmp_path / "out", {length: inputs}, (1,), tmp_path)[1][length, 1],
    ):
        np.testing.assert_array_equal(found["texts"], texts)
        np.testing.assert_allclose(found["scores"], scores, atol=1e-5)


# ---- configured ------------------------------------------------------------------------------------------------------


def test_the_second_stage_can_be_left_out(path):
    alone = dataclasses.replace(CONFIG, preference=None)
    assert [stage.name for stage in stages(Run(path), alone)] == [LIKELIHOOD]
    both = stages(Run(path), CONFIG)
    assert [(stage.name, stage.start, stage.frozen) for stage in both] == [
        (LIKELIHOOD, "", ()), (PREFERENCE, LIKELIHOOD, (LIKELIHOOD,))
    ]  # fmt: skip
    # The first stage does not depend on the second one's settings.
    assert stages(Run(path), alone)[0].settings == both[0].settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": LikelihoodObjective(smoothing=0.1)}, r"'objective\.smoothing' is 0\.1 and 'copying' is on"),
        ({"features": SuggestionFeatureConfig((16, 32), own=0, popular=0)}, r"'copying': there is nothing to copy"),
    ],
)
def test_what_contradicts_itself_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)
    dataclasses.replace(CONFIG, copying=False, **changes)


def test_related_queries_are_copied_only_where_there_are_some():
    with pytest.raises(UserError, match=r"'features\.near' is 2, but there are no related queries: give 'related'"):
        dataclasses.replace(CONFIG, related=None)


def test_numbers_without_a_meaning_are_refused():
    with pytest.raises(UserError, match=r"'preference\.base' is \(1\.0, 2\.0\); give 6 falling"):
        PreferenceConfig(base=(1.0, 2.0))
    with pytest.raises(UserError, match=r"'objective\.recut' is 1\.5"):
        LikelihoodObjective(recut=1.5)
    stage = dataclasses.replace(CONFIG.preference, optim=dataclasses.replace(CONFIG.preference.optim, warmup=50))
    with pytest.raises(UserError, match=r"preference\.optim"):
        dataclasses.replace(CONFIG, preference=stage).check()


def test_a_decoder_alone_is_a_backbone_too(path, assembly):
    sizes = {"width": 16, "heads": 2, "groups": 1, "head_dim": 8, "hidden": 16, "layers": 1}
    config = dataclasses.replace(CONFIG, model=CausalConfig(**sizes))
    made = assemble(Run.load(path)[0], config)
    batch = on_device(next(likelihood_batches(made, fitted(made, model=config.model))), 4)
    total, count = losses(made, config, None, made.init(0), batch, jax.random.key(0))
    # At the start each token is about equally likely.
    tokens = float(np.asarray(batch["real"]).sum())
    assert np.isfinite(total) and total < 1.5 * tokens * np.log(made.tokenizer.size) and count >= 4
