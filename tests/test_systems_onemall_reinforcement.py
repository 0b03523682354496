"""OneMall's reinforcement learning: a whole step against plain loops and by hand, its gradient by finite differences.

End to end, as real processes: `tests/test_runs_reinforcement.py`.
"""

import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from onemall_parts import FEATURES, ITEMS, MODEL, make_arrays, make_assembly, make_history, make_variables

from jaxrec.config import UserError
from jaxrec.evaluation.proxies import courses, has_split
from jaxrec.run import TRAINING
from jaxrec.systems.onemall import reinforcement
from jaxrec.systems.onemall.config import OneMallConfig, OneMallObjective, ReinforcementConfig, RewardWeights
from jaxrec.systems.onemall.reinforcement import DrawnCandidates, Known, mean_loss, policy_loss, refreshed, selected
from jaxrec.systems.onemall.reward_measure import RewardMeasure
from jaxrec.systems.onemall.rewards import SpendReward, fuse
from jaxrec.systems.onemall.training import mean_loss as supervised_loss
from jaxrec.training.stages import Task

LEAVES = 12
"""Distinct IDs of the twenty items (`make_assembly`)."""
OWN = ReinforcementConfig(share=0.5, sampling="beam", candidates=LEAVES + 4, drawn=LEAVES, clip=0.2, weight=0.5)
CONFIG = OneMallConfig(
    data=None,
    features=FEATURES,
    model=dataclasses.replace(MODEL, dispatch="ragged"),
    objective=OneMallObjective(contrastive_weight=0.3),
    reinforcement=dataclasses.replace(OWN, batch_size=4),
)
TARGET = np.array([[2, 17, 5, 0], [18, 2, 0, 0], [9, 11, 13, 2], [1, 2, 3, 4]])
REAL = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]], bool)


class TableReward:
    """Rates that depend on the item alone; the state holds them."""

    def read(self, record, session, answer):
        return {}

    def terms(self, state, arrays, items):
        return {name: values[items] for name, values in state.items()}


@pytest.fixture(scope="module")
def tiny():
    """An assembly, a policy, another policy as the sampler, a batch, and the compiled step."""
    assembly = make_assembly(CONFIG.model)
    variables = make_variables(assembly)
    rng = np.random.default_rng(5)
    moved = jax.tree.map(lambda x: jnp.asarray(x + 0.05 * rng.normal(size=x.shape), jnp.float32), variables)
    arrays = make_arrays([make_history(seed, 8) for seed in range(4)], assembly)
    batch = {**arrays, "target": TARGET, "target_where": REAL, "where": np.array([True, True, True, False])}
    rates = {
        "ctr": jnp.asarray(rng.uniform(0, 1, ITEMS), jnp.float32),
        "ctcvr": jnp.asarray(rng.uniform(0, 0.2, ITEMS), jnp.float32),
        "price": jnp.asarray(rng.uniform(5, 100, ITEMS), jnp.float32),
    }
    return SimpleNamespace(
        assembly=assembly, variables=variables, sampler=moved, batch=batch, rates=rates, step=compiled(assembly, CONFIG)
    )


def compiled(assembly, config):
    """(params, extra, batch, rates, frozen) -> ((loss, (metrics, extra)), gradient)."""
    trie = assembly.space.build_trie()

    @jax.jit
    def step(params, extra, batch, rates, frozen, key):
        known = Known(assembly.catalogue, trie, rates)
        loss = Partial(partial(mean_loss, assembly, config, TableReward()), known, frozen)
        return jax.value_and_grad(loss, has_aux=True)(params, extra, batch, key)

    def run(tiny, rates=None, sampler=None, frozen=None, age=1):
        extra = {name: value for name, value in tiny.variables.items() if name != "params"}
        extra[reinforcement.SAMPLER] = {"variables": sampler or tiny.sampler, "age": jnp.int32(age)}
        known = tiny.rates if rates is None else rates
        return step(tiny.variables["params"], extra, tiny.batch, known, frozen or {}, jax.random.key(3))

    return run


def plain_likelihoods(assembly, variables, arrays, codes):
    """log pi of every ID int [n, M] for every context, float [B, n], one code after the other."""
    served = assembly.serve(variables)
    context, cache, total = assembly.context(served, arrays), None, 0.0
    batch = len(arrays["day"])
    tokens = np.broadcast_to(codes, (batch, *codes.shape))
    for level in range(codes.shape[1]):
        log_probs, cache = assembly.extend(served, context, tokens[..., level - 1] if level else None, cache, level)
        if not level:
            log_probs = jnp.broadcast_to(log_probs, (*tokens.shape[:2], log_probs.shape[-1]))
            cache = jax.tree.map(lambda x: jnp.repeat(x, len(codes), axis=1), cache)
        total += jnp.take_along_axis(log_probs, jnp.asarray(tokens[..., level])[..., None], axis=-1)[..., 0]
    return total


def test_the_whole_loss_equals_a_plain_computation(tiny):
    """Eq. 8, the advantages, Eq. 10 and the sum with Eq. 7, over all IDs of the two contexts that draw."""
    (loss, (metrics, extra)), gradient = tiny.step(tiny)
    assembly, ids = tiny.assembly, tiny.assembly.space.ids
    assert len(ids) == LEAVES
    items = np.array([assembly.space.items(code)[0] for code in ids])
    rates = {name: np.asarray(value, np.float64)[items] for name, value in tiny.rates.items()}
    reward = rates["ctr"] + 30 * rates["ctcvr"] + rates["ctcvr"] * rates["price"]
    advantage = (reward - reward.mean()) / reward.std()
    few = {name: value[:2] for name, value in tiny.batch.items() if not name.startswith("target") and name != "where"}
    extra_of_model = {name: value for name, value in tiny.variables.items() if name != "params"}

    def plain(params):
        variables = {"params": params, **extra_of_model}
        policy = plain_likelihoods(assembly, variables, few, ids)
        sampled = plain_likelihoods(assembly, tiny.sampler, few, ids)
        ratio = jnp.exp(policy - sampled)
        terms = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
        supervised, _ = supervised_loss(
            assembly, CONFIG, assembly.catalogue, params, extra_of_model, tiny.batch, jax.random.key(3)
        )
        return supervised + 0.5 * -terms.sum(-1).mean(), (ratio, -terms.sum(-1))

    (expected, (ratio, terms)), plain_gradient = jax.jit(jax.value_and_grad(plain, has_aux=True))(
        tiny.variables["params"]
    )
    assert ((ratio < 0.8).any() or (ratio > 1.2).any()) and (np.abs(ratio - 1) < 0.2).any(), "some are clipped"
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), gradient, plain_gradient)
    np.testing.assert_allclose(metrics["policy"][0], terms.sum(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(metrics["reward"][0] / metrics["reward"][1], reward.mean(), rtol=1e-5)
    assert metrics["reward"][1] == 2 * LEAVES and metrics["policy"][1] == 2
    assert metrics["clipped"][0] == (np.abs(ratio - 1) > 0.2).sum()
    assert metrics["equal_rewards"] == (0, 2) and metrics["skipped_rewards"] == (0, 2 * LEAVES)
    assert int(extra[reinforcement.SAMPLER]["age"]) == 2


def test_at_the_sampler_the_ratio_is_one_and_the_gradient_is_the_policy_gradient(tiny):
    """Against finite differences of -sum(A log pi) along a few directions."""
    (_, (metrics, _)), gradient = tiny.step(tiny, sampler=tiny.variables)
    assert metrics["clipped"][0] == 0
    # The sum of advantages, each with ratio 1.
    np.testing.assert_allclose(metrics["policy"][0], 0, atol=1e-3)
    extra = {name: value for name, value in tiny.variables.items() if name != "params"}
    supervised = jax.jit(
        jax.grad(partial(supervised_loss, tiny.assembly, CONFIG, tiny.assembly.catalogue), has_aux=True)
    )(tiny.variables["params"], extra, tiny.batch, jax.random.key(3))[0]
    own = jax.tree.map(lambda a, b: (a - b) / 0.5, gradient, supervised)
    few = {name: value[:2] for name, value in tiny.batch.items() if not name.startswith("target") and name != "where"}
    ids = tiny.assembly.space.ids
    items = np.array([tiny.assembly.space.items(code)[0] for code in ids])
    reward = np.asarray(fuse({name: value[items] for name, value in tiny.rates.items()}, RewardWeights()), np.float64)
    advantage = (reward - reward.mean()) / reward.std()

    @jax.jit
    def objective(params):
        return -(plain_likelihoods(tiny.assembly, {"params": params, **extra}, few, ids) * advantage).sum(-1).mean()

    leaves, tree = jax.tree.flatten(tiny.variables["params"])
    slopes = jax.tree.leaves(own)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        way = [np.asarray(slope) * rng.uniform(0, 2, slope.shape) for slope in slopes]
        length = float(np.sqrt(sum((step**2).sum() for step in way)))
        above, below = (
            float(
                objective(tree.unflatten([leaf + size * step / length for leaf, step in zip(leaves, way, strict=True)]))
            )
            for size in (5e-3, -5e-3)
        )
        slope = sum(float((each * step).sum()) for each, step in zip(slopes, way, strict=True)) / length
        assert slope > 0.1
        np.testing.assert_allclose(slope, (above - below) / 1e-2, rtol=0.01)


def test_equal_rewards_teach_nothing_and_bad_ones_are_left_out_and_counted(tiny):
    (_, (metrics, _)), gradient = tiny.step(tiny, rates={name: jnp.ones(ITEMS) for name in tiny.rates})
    extra = {name: value for name, value in tiny.variables.items() if name != "params"}
    plain = jax.jit(jax.grad(partial(supervised_loss, tiny.assembly, CONFIG, tiny.assembly.catalogue), has_aux=True))
    supervised = plain(tiny.variables["params"], extra, tiny.batch, jax.random.key(3))[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), gradient, supervised)
    assert metrics["equal_rewards"] == (2, 2) and metrics["policy"] == (0, 0)
    first = [int(tiny.assembly.space.items(code)[0]) for code in tiny.assembly.space.ids]
    bad = tiny.rates | {"ctr": tiny.rates["ctr"].at[jnp.array(first[:2])].set(jnp.nan).at[first[2]].set(jnp.inf)}
    (loss, (metrics, _)), gradient = tiny.step(tiny, rates=bad)
    assert metrics["skipped_rewards"] == (2 * 3, 2 * LEAVES) and metrics["reward"][1] == 2 * (LEAVES - 3)
    assert np.isfinite(loss) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


GROUP = DrawnCandidates(
    codes=jnp.zeros((2, 3, 1), jnp.int32),
    items=jnp.zeros((2, 3), jnp.int32),
    where=jnp.array([[True, True, True], [True, True, False]]),
    sampled=jnp.log(jnp.array([[0.5, 0.2, 0.1], [0.4, 0.3, 1.0]])),
    reward=jnp.array([[3.0, 1.0, 2.0], [5.0, 5.0, 9.0]]),
    advantage=jnp.array([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]),
)
POLICY = jnp.log(jnp.array([[0.75, 0.1, 0.1], [0.1, 0.6, 1.0]]))
REFERENCE = jnp.log(jnp.array([[0.25, 0.4, 0.1], [0.4, 0.3, 1.0]]))


def test_the_policys_loss_by_hand():
    """Two contexts, the second with equal rewards: only the first counts."""
    total, notes = policy_loss(OWN, POLICY, GROUP, None)
    # Ratios 1.5 and .5: min(1.5, 1.2) * 1 and min(.5 * -1, .8 * -1).
    np.testing.assert_allclose(notes["policy"][0], -(1.2 - 0.8), rtol=1e-5)
    np.testing.assert_allclose(total, 0.5 * -(1.2 - 0.8), rtol=1e-5)
    assert notes["policy"][1] == 1 and notes["clipped"] == (4, 5) and "kl" not in notes
    frozen = dataclasses.replace(OWN, reference="frozen", kl_weight=2.0)
    total, notes = policy_loss(frozen, POLICY, GROUP, REFERENCE)
    # Ratios 3 and .25 against the frozen stage.
    np.testing.assert_allclose(notes["policy"][0], -(1.2 - 0.8), rtol=1e-5)
    kl = sum(r - np.log(r) - 1 for r in (1 / 3, 4, 1, 4, 0.5))
    np.testing.assert_allclose(notes["kl"][0], kl, rtol=1e-5)
    np.testing.assert_allclose(total, 0.5 * -(1.2 - 0.8) + 2 * kl / 5, rtol=1e-5)


def test_dpo_takes_the_best_and_the_worst_of_all_candidates():
    own = dataclasses.replace(OWN, loss="dpo", scale=0.4)
    drawn = dataclasses.replace(GROUP, reward=jnp.array([[3.0, 1.0, jnp.nan], [5.0, 5.0, 9.0]]))
    index = selected(own, drawn, jax.random.key(0))
    np.testing.assert_array_equal(index, [[0, 1], [0, 0]])
    group = drawn.take(index)
    total, notes = policy_loss(own, jnp.take_along_axis(POLICY, index, 1), group, None)
    z = 0.4 * (np.log(1.5) - np.log(0.5))
    np.testing.assert_allclose(notes["policy"][0], np.log1p(np.exp(-z)), rtol=1e-5)
    np.testing.assert_allclose(total, 0.5 * np.log1p(np.exp(-z)), rtol=1e-5)
    assert notes["policy"][1] == 1


def test_grpo_takes_some_of_the_candidates_that_exist_evenly():
    own, keys = dataclasses.replace(OWN, drawn=2), jax.random.split(jax.random.key(0), 500)
    found = np.asarray(jax.vmap(lambda key: selected(own, GROUP, key))(keys))
    assert found.shape == (500, 2, 2) and (found[:, 0, 0] != found[:, 0, 1]).all()
    shares = np.bincount(found[:, 0].ravel(), minlength=3) / 500
    np.testing.assert_allclose(shares, 2 / 3, atol=0.1)
    assert set(found[:, 1].ravel()) == {0, 1}, "the third does not exist"


def test_the_sampler_is_refreshed_every_so_many_steps():
    sampler = {"variables": {"w": jnp.zeros(2)}, "age": jnp.int32(0)}
    seen = []
    for step in range(7):
        sampler = refreshed(sampler, {"w": jnp.full(2, 10.0 + step)}, 3)
        seen.append(float(sampler["variables"]["w"][0]))
    assert seen == [10, 10, 10, 13, 13, 13, 16]


def test_candidates_are_a_function_of_key_and_sampler_alone(tiny):
    own = dataclasses.replace(OWN, sampling="rollout", candidates=5)
    known = Known(tiny.assembly.catalogue, tiny.assembly.space.build_trie(), tiny.rates)
    few = {name: value[:2] for name, value in tiny.batch.items()}

    @jax.jit
    def draw(variables, key):
        return reinforcement.draw(tiny.assembly, own, TableReward(), known, variables, few, key)

    first, again = draw(tiny.sampler, jax.random.key(1)), draw(tiny.sampler, jax.random.key(1))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert not np.array_equal(first.codes, draw(tiny.sampler, jax.random.key(2)).codes)
    assert not np.array_equal(first.sampled, draw(tiny.variables, jax.random.key(1)).sampled)
    assert first.where.all() and all(len(set(map(tuple, row))) == 5 for row in np.asarray(first.codes))
    np.testing.assert_array_equal(tiny.assembly.space.codes[np.asarray(first.items)], first.codes)
    np.testing.assert_allclose(first.advantage.mean(-1), 0, atol=1e-5)
    alone = dataclasses.replace(own, candidates=1)
    one = reinforcement.draw(tiny.assembly, alone, TableReward(), known, tiny.sampler, few, jax.random.key(1))
    np.testing.assert_array_equal(one.advantage, np.zeros((2, 1)))


def test_a_reference_with_other_sizes_is_refused():
    assembly = make_assembly()
    frozen = jax.eval_shape(partial(assembly.init, 0))
    params = dict(frozen["params"])
    params["bos"] = jax.ShapeDtypeStruct((24,), jnp.float32)
    task = Task("reinforcement", None, None, frozen={TRAINING: {**frozen, "params": params}})
    with pytest.raises(UserError, match=r"params/bos of the reference, stage train, is \(24,\) and \(16,\) in the pol"):
        reinforcement.check_reference(task, assembly)
    reinforcement.check_reference(dataclasses.replace(task, frozen={TRAINING: frozen}), assembly)


def test_rewards_by_hand():
    terms = {"ctr": jnp.array([0.5]), "ctcvr": jnp.array([0.1]), "price": jnp.array([20.0])}
    np.testing.assert_allclose(fuse(terms, RewardWeights()), [0.5 + 30 * 0.1 + 0.1 * 20], rtol=1e-6)
    np.testing.assert_allclose(fuse(terms, RewardWeights(ctr=0, ctcvr=0, egpm=0, price=2)), [40.0])
    with pytest.raises(UserError, match="has a weight for cvr, which nothing predicts"):
        fuse(terms, RewardWeights(cvr=1))
    spend = SpendReward(jnp.array([3.0, 5.0, jnp.nan, 7.0]), 3)
    arrays = {name: value[None] for name, value in spend.read({}, 0, np.array([3, 1])).items()}
    found = spend.terms(spend.state, arrays, jnp.array([[1, 0, 3, 2]]))
    np.testing.assert_array_equal(fuse(found, RewardWeights(ctr=0, ctcvr=0)), [[5.0, 0, 7, 0]])


def test_the_divergence_is_that_of_all_ids(tiny):
    """With more rollouts than IDs every ID is drawn and has weight 1."""
    measure = RewardMeasure(None, tiny.assembly, CONFIG, TableReward())
    few = {name: value[:2] for name, value in tiny.batch.items() if not name.startswith("target") and name != "where"}
    served = tiny.assembly.serve(tiny.sampler).replace(trie=measure.trie)
    found = measure._kl(served, tiny.assembly.serve(tiny.variables), few, jax.random.key(0))
    ids = tiny.assembly.space.ids
    policy, reference = (plain_likelihoods(tiny.assembly, each, few, ids) for each in (tiny.sampler, tiny.variables))
    # The model gives what is not in the catalogue a little, which no rollout can be.
    share = np.exp(policy) / np.exp(policy).sum(-1, keepdims=True)
    np.testing.assert_allclose(found, (share * (policy - reference)).sum(-1), rtol=0.02, atol=1e-4)
    assert (np.asarray(found) > 0.01).all()


def test_what_loses_too_many_hits_is_no_better_than_where_it_began():
    measure = object.__new__(RewardMeasure)
    measure.own, measure._start = ReinforcementConfig(lost_hits=0.01), {"hr@50": 0.8, "reward@10": 20.0}
    assert measure.kept({"hr@50": 0.793, "reward@10": 25.0}) == 25.0
    lost = measure.kept({"hr@50": 0.78, "reward@10": 30.0})
    assert 19.5 < lost < 20.0 and measure.kept({"hr@50": 0.7, "reward@10": 40.0}) < lost


def test_proxy_and_truth_in_a_sentence(tmp_path):
    def line(step: int, **values: float) -> str:
        return json.dumps({"stage": "reinforcement", "step": step, **{f"valid/{k}": v for k, v in values.items()}})

    log = tmp_path / "metrics.jsonl"
    assert courses(log) == []
    values = [(0, 2.0, 5.0), (10, 3.0, 4.0), (20, 2.5, 5.5)]
    text = [line(s, **{"reward@10": r, "true_reward@10": t, "spent@10": 9 - t}) for s, r, t in values]
    log.write_text("\n".join([*text, '{"stage": "train", "step": 1, "valid/recall@10": 1.0}', '{"broken']))
    (course,) = courses(log)
    assert not course.split
    assert str(course) == (
        "reinforcement: the learned reward of the first ten rose from 2 to 2.5, the true reward rose from 5 to 5.5"
    )
    log.write_text("\n".join(text[:2]))
    assert courses(log)[0].split and "worth less than before" in str(courses(log)[0])
    start, now = {"reward@10": 2.0, "spent@10": 5.0}, {"reward@10": 3.0, "spent@10": 4.9}
    assert has_split(start, now, lost=0.03) == ""
    assert has_split(start, now) == (
        "the learned reward rose from 2 to 3 while the spend of the held-out baskets fell from 5 to 4.9"
    )
    assert has_split(start, {"reward@10": 1.0, "spent@10": 1.0}) == "" == has_split(start, {"reward@10": 3.0})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"share": 0.0}, "'reinforcement.share' is 0.0; give more than 0, at most 1"),
        ({"temperature": 0.0}, "'reinforcement.temperature' is 0.0; give a number above 0"),
        ({"candidates": 0}, "'reinforcement.candidates' is 0; give 1 or more"),
        ({"weights": RewardWeights(0, 0, 0, 0, 0)}, "'reinforcement.weights' gives every term the weight 0"),
    ],
)
def test_configurations_that_cannot_be_are_refused(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        ReinforcementConfig(**fields)
