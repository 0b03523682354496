"""RankGR's losses; and end to end on a tiny synthetic mall: trained, killed and resumed, measured, served, exported."""

import dataclasses
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from compilations import constant_shapes, count_compilations
from exported import check_same_answers
from flax import linen as nn
from rankgr_parts import BACKBONE, FEATURES, ITEMS, MODEL, make_arrays, make_assembly, make_record, make_variables

from jaxrec.config import UserError, load_config
from jaxrec.data.leveled_sessions import next_items, targets
from jaxrec.models.causal import Causal
from jaxrec.models.huggingface import save_qwen2
from jaxrec.models.rankgr import RankConfig, RankGRConfig
from jaxrec.models.vocabulary import ContextTokens
from jaxrec.run import Run
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Request
from jaxrec.systems import generative, load_recommender, train
from jaxrec.systems.generative import bound_loss
from jaxrec.systems.rankgr.config import RankGRObjective, RankGRRunConfig, behavior_levels
from jaxrec.systems.rankgr.model import assemble, with_pretrained
from jaxrec.systems.rankgr.training import (
    _weights,
    counted_loss,
    draw_targets,
    losses,
    mean_loss,
    pack,
    rank_from,
    rank_loss,
    stages,
)
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender
from jaxrec.training import checkpoint
from jaxrec.training.flops import Flops, step_flops

ROOT = Path(__file__).parent.parent
STAGE = "stages/train"


# ---- losses on a batch of made-up records ----------------------------------------------------------------------------

CONFIG = RankGRRunConfig(data=None, features=FEATURES, model=MODEL, objective=RankGRObjective(alpha=0.5, beta=2.0))


def make_batch(config=CONFIG, count=3, crowd=0) -> dict:
    """Targets are the last session's, or of one more with about `crowd` items; the last row only fills the batch."""
    assembly = make_assembly(config.model)
    features = dataclasses.replace(config.features, buckets=(6,))
    records = [make_record(seed + 10, 10) for seed in range(count)]
    if crowd:
        records = [with_session(record, make_record(seed, crowd)) for seed, record in enumerate(records)]
    arrays = make_arrays(records, features)
    level_of, positive, rows = assembly.levels, rank_from(assembly, config), []
    for seed, record in enumerate(records):
        rng, last = np.random.default_rng(seed), int(record["session"][-1])
        cut = {name: array[seed] for name, array in arrays.items()}
        popular = np.linspace(0.05, 1, 20)
        held = targets(
            record, last, features, level_of=level_of, rng=rng, popular=popular, positive=positive, room=crowd
        )
        rows.append(held | next_items(cut, features, rng))
    more = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return {**arrays, **more, "where": np.array([True] * (count - 1) + [False])}


def with_session(record: dict, more: dict) -> dict:
    """The record, and all of another one's events as its last session."""
    last = np.full(len(more["item"]), record["session"][-1] + 1, np.int32)
    return {name: np.concatenate([values, {**more, "session": last}[name]]) for name, values in record.items()}


def test_the_losses_are_those_of_the_paper():
    """Eq. 8-11 from the items' scores one by one; the row that only fills the batch has none."""
    batch, assembly, variables = make_batch(), make_assembly(), make_variables()
    sums, count, notes = losses(assembly, CONFIG, assembly.catalogue, variables, batch, jax.random.key(0))
    served = assembly.serve(variables)
    context = assembly.context(served, batch)
    packed = pack(assembly, CONFIG, batch)
    view, codes = context.at(packed["last"]), assembly.catalogue.codes[packed["item"]]
    score = assembly.model.apply(variables, view, codes, method="score").log_probs.sum(-1)
    next_token, ldpo, number, one_level = 0.0, 0.0, 0, 0
    for b in range(2):
        level, rows = batch["target_level"][b], np.flatnonzero(batch["target_level"][b] >= 0)
        one_level += len(set(level[rows].tolist())) == 1
        for k in rows:
            lower = [i for i in rows if level[i] < level[k]]
            if lower:
                own, others = math.exp(2 * score[b, k]), sum(math.exp(2 * score[b, i]) for i in lower)
                ldpo -= math.log(own / (own + others))
        following = np.flatnonzero(batch["next_where"][b]) + level.shape[0]
        for k in [*rows, *following]:
            next_token, number = next_token - float(score[b, k]), number + 1
    assert count == number
    np.testing.assert_allclose(sums["next_token"], next_token, rtol=1e-4)
    np.testing.assert_allclose(sums["ldpo"], ldpo, rtol=1e-4)
    assert [float(value) for value in notes["one_level"]] == [one_level, 2]


def test_no_array_of_all_items_is_a_constant_of_the_training_step():
    """Of a large catalogue they would be gigabytes in the program."""
    loss, given = (
        bound_loss(mean_loss, make_assembly(), CONFIG),
        (make_variables()["params"], {}, make_batch(), jax.random.key(0)),
    )
    assert not [shape for shape in constant_shapes(loss, *given) if ITEMS in shape]
    bound = jax.make_jaxpr(lambda: loss(*given))().consts
    assert [array.shape for array in bound if ITEMS in np.shape(array)]


def test_flops_of_the_softmax_over_items_are_counted_with_all_targets_at_once():
    model = dataclasses.replace(MODEL, rank=dataclasses.replace(MODEL.rank, loss="softmax"))
    config, batch = dataclasses.replace(CONFIG, model=model), make_batch()
    assembly, variables = make_assembly(model), make_variables(model)
    chunked = step_flops(bound_loss(mean_loss, assembly, config), variables)(batch)
    whole = step_flops(counted_loss(assembly, config), variables)(batch)
    targets = pack(assembly, config, batch)["item"].size
    assert whole == Flops(chunked.count + 3 * 2 * targets * ITEMS * MODEL.backbone.width)
    assert not chunked.exact


# All weights of Eq. 17 other than 1, and the head of the headline result.
SOFTMAX = dataclasses.replace(
    CONFIG,
    features=dataclasses.replace(FEATURES, targets=5, sampled=2),
    model=RankGRConfig(BACKBONE, embeddings=True, prior=True, rank=RankConfig(loss="softmax", temperature=0.5)),
    objective=RankGRObjective(
        alpha=0.3, beta=2.0, level_weights=(0.5, 1.0, 3.0), rank_from=1, rank_weight=0.7, smoothing=0.2
    ),
)


def asked(batch: dict) -> list[dict]:
    """Every target of a batch of SOFTMAX: who, what, and the last place of the history before it."""
    found = []
    for b in np.flatnonzero(batch["where"]):
        end, weights = int(batch["mask"][b].sum()) - 1, SOFTMAX.objective.level_weights
        for item, level in zip(batch["target"][b].tolist(), batch["target_level"][b].tolist()):
            if level >= 0:  # 0: drawn
                of_session = {"level": level, "weight": weights[level - 1] if level else 0.0, "wanted": level >= 2}
                found.append({"row": b, "item": item, "last": end} | of_session)
        for place in batch["next_after"][b][batch["next_where"][b]].tolist():
            behavior = int(batch["behavior"][b, place + 1])
            of_history = {"level": None, "weight": weights[behavior], "wanted": behavior >= 1}
            found.append({"row": b, "item": int(batch["item"][b, place + 1]), "last": place} | of_history)
    return found


def plain_losses(assembly, params, batch: dict) -> dict:
    """Each loss of Eq. 17 in plain loops: every target after a history of its own, read to its place, code by code."""
    rows, objective = asked(batch), SOFTMAX.objective
    who, last = np.array([each["row"] for each in rows]), np.array([each["last"] for each in rows])
    mask = np.arange(batch["mask"].shape[1]) <= last[:, None]
    arrays = {name: np.where(mask, batch[name][who], 0) for name in ("item", "behavior", "gap")} | {"mask": mask}
    variables = {"params": params}
    served = assembly.serve(variables)
    context = assembly.context(served, arrays)
    query = assembly.model.apply(variables, context.own.state[:, 0], method=lambda model, x: model.query(x))
    codes, cache, tables = assembly.space.codes[[each["item"] for each in rows]], None, []
    for level in range(codes.shape[1]):
        before = None if level == 0 else codes[:, level - 1, None]
        found, cache = assembly.extend(served, context, before, cache, level)
        tables.append(found[:, 0])
    sums = {"next_token": 0.0, "ldpo": 0.0, "rank": 0.0}
    score = [sum(table[n, code] for table, code in zip(tables, codes[n])) for n in range(len(rows))]
    smoothing, items = objective.smoothing, served.table
    for n, each in enumerate(rows):
        mean = sum(table[n].mean() for table in tables)
        sums["next_token"] -= each["weight"] * ((1 - smoothing) * score[n] + smoothing * mean)
        if each["wanted"]:
            cosine = items @ query[n] / jnp.linalg.norm(items, axis=1) / jnp.linalg.norm(query[n])
            log_p = jax.nn.log_softmax(cosine / 0.5)
            sums["rank"] -= (1 - smoothing) * log_p[each["item"]] + smoothing * log_p.mean()
        beside = [m for m, other in enumerate(rows) if each["level"] and other["row"] == each["row"]]
        if lower := [m for m in beside if rows[m]["level"] is not None and rows[m]["level"] < each["level"]]:
            below = sum(jnp.exp(2 * score[m]) for m in lower)
            sums["ldpo"] -= 2 * score[n] - jnp.log(jnp.exp(2 * score[n]) + below)
    total = sums["next_token"] + 0.3 * sums["ldpo"] + 0.7 * sums["rank"]
    return sums | {"loss": total, "count": sum(each["weight"] for each in rows)}


def test_the_whole_loss_and_its_gradient_equal_a_plain_computation():
    """Eq. 17 with all its weights: next tokens, LDPO, and the rank head's softmax over the items."""
    assembly, batch = make_assembly(SOFTMAX.model), make_batch(SOFTMAX, crowd=6)
    params = make_variables(SOFTMAX.model)["params"]
    rows = asked(batch)
    assert {each["level"] for each in rows} >= {None, 0, 1, 2, 3}
    assert {each["weight"] for each in rows} == {0.0, 0.5, 1.0, 3.0}

    def plain(params):
        found = plain_losses(assembly, params, batch)
        return found["loss"] / found["count"], found

    (expected, sums), plain_gradient = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    step = jax.jit(jax.value_and_grad(bound_loss(mean_loss, assembly, SOFTMAX), has_aux=True))
    (loss, (metrics, _)), gradient = step(params, {}, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    for name in ("next_token", "ldpo", "rank", "loss"):
        np.testing.assert_allclose(metrics[name][0], sums[name], rtol=1e-4)
        assert metrics[name][1] == sums["count"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient, plain_gradient)


# Every item of a session is looked for, but only three of them are targets.
CROWDED = dataclasses.replace(
    CONFIG, features=dataclasses.replace(FEATURES, targets=3), objective=RankGRObjective(rank_from=0)
)


def scored(config: RankGRRunConfig, batch: dict):
    """(a batch's targets as the step packs them, what `rank_loss` takes before and after its targets)."""
    assembly, variables = make_assembly(), make_variables()
    context, packed = assembly.context(assembly.serve(variables), batch), pack(assembly, config, batch)
    view, codes = context.at(packed["last"]), assembly.catalogue.codes[packed["item"]]
    states = assembly.model.apply(variables, view, codes, method="score").states
    return packed, (assembly, assembly.catalogue.codes, variables, context, states)


@pytest.mark.parametrize("count", [2, 20])
def test_the_rank_heads_loss_by_hand(count):
    """Eq. 16 with Eq. 9: at every level the true code and the three most likely others, told apart by cross-entropy.

    Each item that is looked for from the same place makes its code a positive, whether or not it was drawn; one that
    found no place among the targets keeps its code from being a negative.
    """
    batch = make_batch(CROWDED, crowd=8)
    packed, given = scored(CROWDED, batch)
    assembly, catalogue, variables, context, states = given
    drawn = np.asarray(draw_targets(jax.random.key(3), packed, count))
    found = np.asarray(rank_loss(*given, packed, drawn))

    def apply(*args, method):
        return assembly.model.apply(variables, *args, method=method)

    seen, memory = context.at(packed["last"]), apply(context, method="memory")
    tables = []
    for level, size in enumerate(assembly.space.codebook_sizes):
        logits, log_z = apply(states[:, :, level], method=lambda m, x, i=level: m.backbone._level_logits(i, x))
        log_probs = logits - log_z[..., None]
        prefixes = apply(states[:, :, : level + 1], method="prefixes")
        every = jnp.broadcast_to(jnp.arange(size), log_probs.shape)
        tables.append(
            jax.device_get((log_probs, apply(seen, memory, prefixes, every, log_probs, level, method="rank")))
        )
    catalogue, packed = np.asarray(catalogue), jax.device_get(packed)
    codes, left_out, wanted, last = catalogue[packed["item"]], packed["left_out"], packed["wanted"], packed["last"]
    assert (left_out >= 0).sum(1).min() >= 2
    kinds = dict.fromkeys(("positive", "undrawn", "masked", "negative"), 0)
    for b, row in np.ndindex(drawn.shape):
        k = drawn[b, row]
        if not wanted[b, k]:
            assert found[b, row] == 0
            continue
        total = 0.0
        for level, (log_probs, logits) in enumerate(tables):
            own, prefix = int(codes[b, k, level]), codes[b, k, :level]
            best = {own, *np.argsort(-log_probs[b, k], kind="stable")[:3].tolist()}
            true, unlabelled = {}, set()
            for i in np.flatnonzero(wanted[b] & (last[b] == last[b, k])):
                if (codes[b, i, :level] == prefix).all():
                    true.setdefault(int(codes[b, i, level]), set()).add(int(i))
            if last[b, k] == packed["end"][b, 0]:
                others = catalogue[left_out[b][left_out[b] >= 0]]
                unlabelled = {int(each[level]) for each in others if (each[:level] == prefix).all()}
            for code in best:
                if code not in true and code in unlabelled:
                    kinds["masked"] += 1
                    continue
                logit = float(logits[b, k, code])
                total += math.log1p(math.exp(-logit if code in true else logit))
                kinds["positive" if code in true else "negative"] += 1
                kinds["undrawn"] += code in true and not true[code] & set(drawn[b].tolist())
        np.testing.assert_allclose(found[b, row], total, rtol=1e-3)
    assert all(kinds[kind] for kind in ("positive", "masked", "negative"))
    assert (kinds["undrawn"] > 0) == (count == 2)
    if count > wanted.sum(1).max():
        sums, _, _ = losses(assembly, CROWDED, assembly.catalogue, variables, batch, jax.random.key(0))
        np.testing.assert_allclose(sums["rank"], found.sum(), rtol=1e-4)


def test_the_rank_head_learns_from_all_that_it_looks_for_in_turn():
    """Those of the session evenly, and of the history only where the session has too few."""
    packed = pack(make_assembly(), CROWDED, make_batch(CROWDED, crowd=8))
    wanted, last, end = (np.asarray(packed[name]) for name in ("wanted", "last", "end"))
    draw = jax.jit(draw_targets, static_argnums=2)
    keys = jax.random.split(jax.random.key(0), 300)
    np.testing.assert_array_equal(draw(keys[0], packed, 2), draw(keys[0], packed, 2))
    for b in range(2):
        session, history = (
            np.flatnonzero(wanted[b] & (last[b] == end[b])),
            np.flatnonzero(wanted[b] & (last[b] < end[b])),
        )
        assert len(session) == 3
        assert len(history) == 3
        drawn = np.stack([draw(key, packed, 2)[b] for key in keys])
        counts = np.bincount(drawn.ravel(), minlength=wanted.shape[1])
        # Of 600 draws each of three gets 200, with a standard deviation of 8.
        assert (abs(counts[session] - 200) < 40).all()
        more = np.stack([draw(key, packed, 4)[b] for key in keys])
        assert all(set(session) < set(row) for row in more.tolist())
        assert (abs(np.bincount(more.ravel(), minlength=wanted.shape[1])[history] - 100) < 40).all()
    assert not wanted[2].any()
    np.testing.assert_array_equal(
        np.sort(draw(keys[0], packed, 20), axis=1)[:2], np.sort(np.argsort(~wanted[:2]), axis=1)
    )


def test_next_items_of_the_history_count_as_their_behaviors_do():
    config = dataclasses.replace(CONFIG, objective=RankGRObjective(level_weights=(0.0, 1.0, 3.0)))
    assembly, batch = make_assembly(), make_batch(config)
    packed = pack(assembly, config, batch)
    history = slice(FEATURES.targets, None)
    behavior = np.take_along_axis(batch["behavior"], np.minimum(batch["next_after"] + 1, 5), axis=1)
    real = batch["next_where"] & batch["where"][:, None]
    assert set(behavior[real].tolist()) == {1, 2}
    np.testing.assert_array_equal(packed["weight"][:, history], np.where(real, np.array([0, 1, 3])[behavior], 0))
    np.testing.assert_array_equal(packed["wanted"][:, history], real & (behavior == 2))


def test_the_rank_head_finds_all_levels_where_it_is_asked_to():
    """Eq. 16 with Eq. 9: as published, every item of a session is true; drawn ones are none."""
    features = dataclasses.replace(FEATURES, sampled=2)
    config = dataclasses.replace(CONFIG, features=features, objective=RankGRObjective(rank_from=0))
    batch = make_batch(config)
    packed = pack(make_assembly(), config, batch)
    there = batch["where"][:, None]
    np.testing.assert_array_equal(packed["wanted"][:, : FEATURES.targets + 2], (batch["target_level"] >= 1) & there)
    assert (batch["target_level"] == 0).any()
    np.testing.assert_array_equal(packed["wanted"][:, FEATURES.targets + 2 :], batch["next_where"] & there)


def test_drawn_items_are_compared_but_not_learnt():
    features = dataclasses.replace(FEATURES, sampled=3)
    config = dataclasses.replace(CONFIG, features=features)
    packed = pack(make_assembly(), config, make_batch(config))
    drawn = slice(FEATURES.targets, FEATURES.targets + 3)
    assert (packed["weight"][:, drawn] == 0).all()
    assert not packed["wanted"][:, drawn].any()
    assert packed["compared"][:2, drawn].any()
    assert not packed["compared"][2].any()


def test_serving_other_parameters_compiles_nothing_and_nothing_keeps_the_assembly_alive():
    assembly, variables = dataclasses.replace(make_assembly()), make_variables()
    used = GenerativeRecommender(assembly, variables, FEATURES, DecodingConfig(beam_width=4, batch_size=2))
    used.recommend([make_record(0, 6)], 3)
    other = jax.tree.map(lambda x: 2 * x, variables)
    with count_compilations() as compiled:
        served = assembly.serve(other).replace(trie=used.served.trie)
        used.recommend([make_record(0, 6)], 3, served=served)
    assert compiled == []
    alive = weakref.ref(used), weakref.ref(assembly)
    del used, assembly
    gc.collect()
    assert [each() for each in alive] == [None, None]


@pytest.mark.parametrize("given", [(0, 1), (1, 0, 2), (-1, 0, 1)])
def test_levels_that_do_not_fit_the_behaviors_are_refused(given):
    with pytest.raises(UserError, match=r"objective\.levels.*exposure, click, purchase"):
        behavior_levels(given, ("exposure", "click", "purchase"))


# ---- beginning from a Qwen2 ------------------------------------------------------------------------------------------


def save_tiny_qwen2(folder: Path) -> dict:
    one = jnp.zeros((1, 1), jnp.int32)
    config = dataclasses.replace(BACKBONE, vocabulary=9)
    params = Causal(config).init(jax.random.key(5), ContextTokens(one, one > -1), one[None])["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1, jax.tree.map(jnp.asarray, jax.device_get(nn.unbox(params))))
    rng, words = np.random.default_rng(0), params["embed"]["table"].shape
    params["embed"]["table"] = jnp.asarray(np.arange(words[1]) + 0.02 * rng.normal(size=words), jnp.float32)
    save_qwen2(folder, config, params)
    return params


def test_layers_of_a_pretrained_model_are_taken_over(tmp_path):
    pretrained = save_tiny_qwen2(tmp_path / "qwen")
    fresh = make_assembly().init(0)["params"]
    begun = with_pretrained(fresh, pretrained, 0)
    for name in ("layers_0", "layers_1", "norm"):
        jax.tree.map(np.testing.assert_array_equal, begun["backbone"][name], pretrained[name])
    table, words = np.asarray(begun["backbone"]["embed"]["table"]), np.asarray(pretrained["embed"]["table"])
    assert table.shape == fresh["backbone"]["embed"]["table"].shape
    # Drawn around the mean of the words, whose columns are 1 apart, as far from it as they are themselves.
    assert np.ptp(words.mean(0)) > 10 > 100 * words.std(0).max()
    np.testing.assert_allclose(table, np.broadcast_to(words.mean(0), table.shape), atol=4 * words.std(0).max())
    assert (table.std(0) > words.std(0) / 4).all()
    jax.tree.map(np.testing.assert_array_equal, begun["rank_head"], fresh["rank_head"])


def test_what_is_no_size_stays_the_configurations(folder, tmp_path):
    run, _ = Run.load(folder / "whole")
    config = load_config(ROOT / "tests" / "mall_rankgr.py")
    save_tiny_qwen2(tmp_path / "qwen")
    backbone = dataclasses.replace(config.model.backbone, dropout=0.4, target_dropout=0.1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
    found = assemble(run, dataclasses.replace(config, pretrained=str(tmp_path / "qwen"))).model.config.backbone
    assert (found.width, found.dropout, found.target_dropout) == (BACKBONE.width, 0.4, 0.1)


def test_the_weights_a_run_began_from_may_go(tmp_path):
    save_tiny_qwen2(tmp_path / "qwen")
    there = _weights(str(tmp_path / "qwen"), tmp_path / "kept.json")
    (tmp_path / "kept.json").write_text(json.dumps({"folder": str(tmp_path / "qwen"), "files": there}))
    # Files that are not read don't count.
    (tmp_path / "qwen" / "tokenizer.json").write_text("{}")
    assert _weights(str(tmp_path / "qwen"), tmp_path / "none.json") == there
    shutil.rmtree(tmp_path / "qwen")
    assert _weights(str(tmp_path / "qwen"), tmp_path / "kept.json") == there
    with pytest.raises(UserError, match="there is no folder"):
        _weights(str(tmp_path / "other"), tmp_path / "kept.json")


def test_the_weights_of_a_training_beside_the_old_one_may_go_too(tmp_path, monkeypatch):
    monkeypatch.setattr(generative, "prepare_with_ids", lambda *_: ())
    run, gone = Run(tmp_path), str(tmp_path / "qwen")
    config = dataclasses.replace(load_config(ROOT / "tests" / "mall_rankgr.py"), pretrained=gone)

    def keep(place: Path, folder: str, files: list[str]) -> None:
        (place / STAGE).mkdir(parents=True, exist_ok=True)
        (place / STAGE / "pretrained.json").write_text(json.dumps({"folder": folder, "files": files}))

    def digests() -> tuple[str, ...]:
        return stages(run, config)[-1].data()

    with pytest.raises(UserError, match="there is no folder"):
        digests()
    keep(run.path, gone, ["old"])
    assert digests() == ("old",)
    # Of another folder they don't count.
    keep(run.path / "next", str(tmp_path / "other"), ["other"])
    assert digests() == ("old",)
    keep(run.path / "next", gone, ["new"])
    assert digests() == ("new",)


SPLIT = (
    f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
"""
    + """
import dataclasses
import jax, numpy as np
from rankgr_parts import make_assembly
from jaxrec.training.sharding import MeshConfig, make_mesh

assembly = make_assembly()
mesh = make_mesh(MeshConfig(model=2))
one, many = assembly.init(0), assembly.init(0, mesh)
taken = dataclasses.replace(assembly, pretrained=one["params"]["backbone"])
for params in (many, taken.init(0, mesh)):
    up = params["params"]["backbone"]["layers_0"]["feed_forward"]["up"]["weight"]
    assert "model" in up.sharding.spec, up.sharding
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.device_get(one), jax.device_get(many))
"""
)


def test_weights_lie_where_the_mesh_puts_them(on_devices):
    """Fresh ones, and those of a pretrained model."""
    on_devices(2, SPLIT)


# ---- end to end ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`whole`: a run; `killed`: the same one, killed in training and gone on with."""
    folder = tmp_path_factory.mktemp("mall")
    config = load_config(ROOT / "tests" / "mall_rankgr.py")
    train(Run.open(folder / "whole", config), config)
    shutil.copytree(folder / "whole", folder / "killed", ignore=shutil.ignore_patterns("stages", "eval*", "*.jsonl"))
    line = [sys.executable, "train.py", "tests/mall_rankgr.py", "--run", str(folder / "killed")]
    environment = {**os.environ, "JAXREC_KILL_AT": "step:50"}
    death = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert death.returncode == -signal.SIGKILL, death.stderr + death.stdout
    assert checkpoint.steps(folder / "killed" / STAGE) == [24, 48]
    train(Run.open(folder / "killed", config), config)
    return folder


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_learns_what_was_planted(folder):
    rows = json.loads((folder / "whole" / "evaluation.json").read_text())
    recall = {row["model"]: row["value"] for row in rows if row["metric"] == "recall@10" and row["subset"] == "all"}
    others = [value for name, value in recall.items() if name != "rankgr"]
    assert len(others) >= 4
    assert recall["rankgr"] > max(others)
    lines = read_lines(folder / "whole" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert {"next_token", "ldpo", "rank", "one_level", "left_out"} <= set(lines[0])


def test_killed_and_gone_on_with_it_ends_in_the_same_bits(folder):
    names = ("step", "params", "opt_state")
    parts = [checkpoint.load_parts(folder / run / STAGE, *names) for run in ("whole", "killed")]
    assert int(parts[0]["step"]) == 120
    jax.tree.map(np.testing.assert_array_equal, *parts)
    for name in ("evaluation.json", "examples_shown.json", "config.json"):
        assert (folder / "whole" / name).read_bytes() == (folder / "killed" / name).read_bytes()


def test_it_is_served_and_gets_new_items(folder):
    retriever = Retriever(folder / "whole")
    user = pq.read_table(folder / "whole" / "tables" / "users.parquet")["user_id"][0].as_py()
    answer, stranger = retriever.answer([Request(user_id=user, k=5), Request(user_id="nobody", k=3)])
    assert answer.source == "model"
    assert len({item.item_id for item in answer.items}) == 5
    scores = [item.score for item in answer.items]
    assert scores == sorted(scores, reverse=True)
    assert stranger.source == "popular"
    # A new item under the ID of the best one is recommended beside it.
    best = retriever.catalogue.current.row(answer.items[0].item_id)
    code = retriever.catalogue.current.codes[best]
    new = pa.table({"item_id": ["brand new"], "title": ["Brand new"]})
    retriever.catalogue.add(new, code[None], popularity=[1e6])
    (again,) = retriever.answer([Request(user_id=user, k=5)])
    assert again.items[0].item_id == "brand new"


def test_an_export_answers_the_same(folder, tmp_path):
    run, _ = Run.load(folder / "whole")
    events = {"item": np.array([3, 9], np.int32), "behavior": np.array([2, 4], np.int8)}
    events |= {"timestamp": np.array([5, 5], np.int64), "session": np.array([0, 0], np.int32)}
    check_same_answers(load_recommender(run), run, tmp_path / "out", events)


def test_items_without_an_id_are_named(folder, tmp_path):
    run, _ = Run.load(folder / "whole")
    config = load_config(ROOT / "tests" / "mall_rankgr.py")
    other = Run(tmp_path)
    other.tables, other.semantic_ids = run.tables, tmp_path
    codes = pq.read_table(run.semantic_ids / "codes.parquet")
    pq.write_table(codes.slice(1), tmp_path / "codes.parquet")
    missing = codes["item_id"][0].as_py()
    with pytest.raises(UserError, match=missing):
        assemble(other, config)


def test_what_the_rank_head_or_the_history_cannot_be_is_named(folder):
    run, _ = Run.load(folder / "whole")
    config = load_config(ROOT / "tests" / "mall_rankgr.py")
    weakest = dataclasses.replace(config.features, weakest=5)
    with pytest.raises(UserError, match=r"features\.weakest' is 5.*purchase"):
        assemble(run, dataclasses.replace(config, features=weakest))
    objective = dataclasses.replace(config.objective, rank_from=4)
    with pytest.raises(UserError, match=r"objective\.rank_from' is 4; levels go from 0 to 3"):
        assemble(run, dataclasses.replace(config, objective=objective))
    model = dataclasses.replace(config.model, rank=dataclasses.replace(config.model.rank, loss="softmax"))
    with pytest.raises(UserError, match=r"softmax scores one item an ID.*nearest_free"):
        assemble(run, dataclasses.replace(config, model=model))


def test_bad_pretrained_folders_are_named_before_anything_is_made(folder, tmp_path):
    run, _ = Run.load(folder / "whole")
    config = load_config(ROOT / "tests" / "mall_rankgr.py")
    save_tiny_qwen2(tmp_path / "qwen")
    good = assemble(run, dataclasses.replace(config, pretrained=str(tmp_path / "qwen")))
    assert good.model.config.backbone.width == BACKBONE.width
    assert good.model.config.backbone.layers == BACKBONE.layers
    about = json.loads((tmp_path / "qwen" / "config.json").read_text())

    def refused(words, **changes):
        (tmp_path / "qwen" / "config.json").write_text(json.dumps(about | changes))
        with pytest.raises(UserError, match=words):
            assemble(run, dataclasses.replace(config, pretrained=str(tmp_path / "qwen")))

    refused("llama", model_type="llama")
    refused(r"layers\.2\.", num_hidden_layers=3)
    refused(r"layers\.1\.", num_hidden_layers=1)
    with pytest.raises(UserError, match="'pretrained': there is no folder"):
        train(run, dataclasses.replace(config, pretrained=str(tmp_path / "none")))
