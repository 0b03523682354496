"""OneMall's model against the enumeration of every ID; its verbs: test_models_contract.py."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onemall_parts import BEHAVIORS, MODEL, SIZES, make_arrays, make_assembly, make_history, make_variables

from jaxrec.systems.onemall.training import losses, move_biases

IDS = np.array(list(itertools.product(*map(range, SIZES))), np.int32)  # [24, 3]: every ID, in the catalogue or not
HISTORIES = [make_history(0, 9), make_history(1, 4), make_history(2, 0)]
VARIANTS = {
    "all parts": {},
    "no habit": {"habit": False},
    "places": {"habit": False, "places": True},
    "uncompressed and dense": {"queries": 0, "experts": 1, "item_embedding": False, "prior": False},
}
UNCOMPRESSED = VARIANTS["uncompressed and dense"]


@functools.cache
def make(**changes):
    """(assembly, variables, arrays of the three histories) of the tiny model with some fields changed."""
    assembly = make_assembly(dataclasses.replace(MODEL, **changes))
    return assembly, make_variables(assembly), make_arrays(HISTORIES, assembly)


@functools.cache
def compiled(**changes):
    """`everything` of a variant, compiled once."""
    return jax.jit(functools.partial(everything, make(**changes)[0]))


@functools.cache
def run(**changes) -> dict:
    """Everything that is compared, of every ID as a target of every history."""
    _, variables, arrays = make(**changes)
    return jax.device_get(compiled(**changes)(variables, arrays))


def everything(assembly, variables, arrays) -> dict:
    model = assembly.model
    targets = jnp.broadcast_to(IDS, (len(HISTORIES), *IDS.shape))
    context = model.apply(variables, assembly.inputs(assembly.catalogue, arrays), method="prefill")
    scored = model.apply(variables, context, targets, method="score")
    return {"context": context, "scored": scored.log_probs, "state": scored.end}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_probabilities_sum_to_one(changes):
    """Over all IDs together; also where nothing is known of a user."""
    found = run(**changes)
    np.testing.assert_allclose(np.exp(found["scored"].sum(-1)).sum(-1), 1, atol=1e-5)
    # Far from uniform, so that the comparisons say something.
    assert np.exp(found["scored"].sum(-1)).max() > 3 / len(IDS)


def test_the_mixture_is_the_mixture_of_whole_ids():
    """(1 - share) P_generated(ID) + share P_habit(ID), and a level's probability is the ratio of its prefixes' sums."""
    context = run()["context"]
    generated = run(habit=False)["scored"].sum(-1)  # of the same parameters otherwise
    for row in range(len(HISTORIES)):
        weights, share = context.points.weights[row, 0], context.points.share[row, 0]
        habit = np.array([weights[(context.codes[row] == each).all(-1)].sum() for each in IDS])
        joint = (1 - share) * np.exp(generated[row]) + share * habit
        np.testing.assert_allclose(joint.sum(), 1, atol=1e-5)
        for index, each in enumerate(IDS):
            sums = [joint[(IDS[:, :levels] == each[:levels]).all(-1)].sum() for levels in range(len(SIZES) + 1)]
            expected = [sums[level + 1] / sums[level] for level in range(len(SIZES))]
            np.testing.assert_allclose(np.exp(run()["scored"][row, index]), expected, rtol=2e-4, atol=1e-6)
    assert 0 < context.points.share[0, 0] < 1
    np.testing.assert_allclose(context.points.weights[:2].sum(-1), 1, atol=1e-6)


def test_without_history_there_is_no_habit():
    context = run()["context"]
    assert context.points.share[2] == 0
    assert not context.points.weights[2].any()
    assert not context.mask[2].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run()))


def test_the_context_is_as_long_as_what_is_read():
    compressed, uncompressed = run()["context"], run(**UNCOMPRESSED)["context"]
    assert compressed.mask.shape == (3, MODEL.recent + len(BEHAVIORS) * MODEL.queries)
    assert uncompressed.mask.shape == (3, MODEL.recent + len(BEHAVIORS) * 6)
    read = [min(MODEL.recent, len(np.unique(h["item"][h["behavior"] == 1]))) for h in HISTORIES]
    events = [sum(min(6, (h["behavior"] == b).sum()) for b in range(2)) for h in HISTORIES]
    assert uncompressed.mask.sum(-1).tolist() == (np.array(read) + events).tolist()


@pytest.mark.parametrize("places", [False, True])
def test_places_alone_tell_which_of_the_recent_items_is_the_last(places):
    """Without them recent items are a set; with them another order is another context."""
    changes = {"habit": False, "places": places}
    _, variables, arrays = make(**changes)
    count = arrays["past_mask"][0].sum()
    assert count > 2
    turned = {name: value.copy() for name, value in arrays.items()}
    for name in ("past_item", "past_age", "habit"):
        turned[name][0, :2] = arrays[name][0, 1::-1]
    difference = np.abs(compiled(**changes)(variables, turned)["scored"] - run(**changes)["scored"])[0].max()
    assert (difference > 1e-3) == places
    assert places or difference < 1e-5


# ---- the auxiliary task and gradients --------------------------------------------------------------------------------


def scores_tower_and_match(assembly, variables, state, items):
    apply, catalogue = functools.partial(assembly.model.apply, variables), assembly.catalogue
    tower = apply(items, catalogue, method=lambda m, i, c: m.item_tower(m._item_features(i, c)))
    return apply(state, items, catalogue, method="contrast"), tower, apply(state, method=lambda m, s: m.match(s))


def test_contrast_is_the_cosine_over_a_temperature():
    assembly, variables, _ = make()
    state, items = run()["state"][0, :5], jnp.array([3, 0, 3])
    scores, tower, wanted = jax.jit(functools.partial(scores_tower_and_match, assembly))(variables, state, items)
    assert tower.shape == (3, MODEL.width)
    expected = [
        [a @ b / np.linalg.norm(a) / np.linalg.norm(b) / 0.05 for b in np.array(tower)] for a in np.array(wanted)
    ]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores[:, 0], scores[:, 2], rtol=1e-6)
    assert np.abs(scores).max() <= 20.001


def test_the_auxiliary_task_trains_the_item_tower_and_no_bias_of_a_router():
    assembly, variables, arrays = make(layers=1)
    targets = jnp.array([[[0, 1, 1]], [[2, 0, 1]], [[1, 1, 0]]])

    def loss(variables):
        _, scores = assembly.model.apply(variables, assembly.inputs(assembly.catalogue, arrays), targets)
        return jax.nn.logsumexp(scores)

    gradients = jax.jit(jax.grad(loss))(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert all(leaf.any() for leaf in jax.tree.leaves([gradients["params"][name] for name in ("item_tower", "match")]))
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients["balance"]))
    assert len(jax.tree.leaves(gradients["balance"])) == 1


def test_the_loads_count_the_tokens_of_real_targets_and_bos_of_real_contexts():
    assembly, variables, arrays = make()
    batch = arrays | {
        "target": np.array([[3, 0], [7, 1], [4, 4]]),
        "target_where": np.array([[True, False], [True, True], [True, True]]),
        "where": np.array([True, True, False]),
    }
    config = types.SimpleNamespace(objective=types.SimpleNamespace(contrastive_weight=0.0))
    run = functools.partial(losses, assembly, config, assembly.catalogue)
    _, count, (begun, scored), _ = jax.jit(run)(variables, batch, jax.random.key(0))
    assert count == 3
    for layer in range(MODEL.layers):
        of_bos, of_targets = (each[f"decoder_{layer}"]["moe"]["load"] for each in (begun, scored))
        assert of_bos.sum() == 2 * MODEL.experts_per_token
        assert of_targets.sum() == 3 * len(SIZES) * MODEL.experts_per_token


def test_biases_move_against_the_load_of_bos_and_targets_together():
    bias, of_bos, of_targets = np.zeros(3), np.array([9.0, 0.0, 0.0]), np.array([1.0, 5.0, 3.0])
    loads = [{"decoder_0": {"moe": {"load": load}}} for load in (of_bos, of_targets)]
    moved = move_biases({"decoder_0": {"moe": {"bias": bias}}}, loads, 0.1)
    np.testing.assert_allclose(moved["decoder_0"]["moe"]["bias"], [-0.1, 0.1, 0.1])
