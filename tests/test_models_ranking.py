"""DIN, DCN-v2 and SIM against plain NumPy: packed candidates, attention units, crosses, searches, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.models.ranking.dcn import CrossLayer, DcnConfig
from jaxrec.models.ranking.din import ActivationUnit, DinConfig
from jaxrec.models.ranking.inputs import (
    InputConfig,
    Inputs,
    ItemSizes,
    RankedItems,
    RankingContext,
    RankingInputs,
    crosses,
)
from jaxrec.models.ranking.sim import FoundAttention, ProductSearch, SimConfig, latest_of_category
from jaxrec.models.ranking.towers import SEARCH, RankingModel, probabilities

ITEMS, BEHAVIORS, AGES = 30, 3, 8
SIZES = ItemSizes(ITEMS, (4, 3), (5, 2), BEHAVIORS, AGES, (1.0, 2.0))
CONFIG = InputConfig(width=6, users=4)
HIDDEN = {"hidden": (8,)}
MODELS = {
    "din": DinConfig(length=5, unit=4, **HIDDEN),
    "dcn": DcnConfig(length=5, crosses=2, rank=3, **HIDDEN),
    "sim": SimConfig(found=3, heads=2, head_dim=4, length=2, unit=4, **HIDDEN),
    "sim by product": SimConfig("product", found=3, heads=2, head_dim=4, length=2, unit=4, **HIDDEN),
}


def make_items(seed: int = 0) -> RankedItems:
    rng = np.random.default_rng(seed)
    price = rng.normal(size=ITEMS)
    price[::4] = np.nan
    return RankedItems(
        embeddings=jnp.asarray(rng.normal(size=(ITEMS, 7)), jnp.float32),
        codes=jnp.asarray(rng.integers(0, (4, 3), (ITEMS, 2)), jnp.int32),
        attributes=jnp.asarray(rng.integers(0, (5, 2), (ITEMS, 2)), jnp.int32),
        log_price=jnp.asarray(price, jnp.float32),
        counts=jnp.asarray(rng.normal(size=(2, ITEMS, 5)), jnp.float32),
    )


def make_context(seed: int = 1, batch: int = 3, length: int = 7, queries: bool = False) -> RankingContext:
    rng = np.random.default_rng(seed)
    item, behavior, age = (jnp.asarray(rng.integers(0, most, (batch, length))) for most in (ITEMS, BEHAVIORS, AGES))
    mask = jnp.arange(length) < jnp.asarray(rng.integers(1, length, batch))[:, None]
    asked = {}
    if queries:
        asked = {
            "query": jnp.asarray(rng.normal(size=(batch, 7)), jnp.float32),
            "asked": jnp.arange(batch) > 0,
            "led_item": jnp.asarray(np.stack([rng.permutation(ITEMS)[:4] for _ in range(batch)])),
            "led": jnp.asarray(rng.normal(size=(batch, 4, 4)), jnp.float32),
        }
    return RankingContext(item, behavior, age, mask, jnp.arange(batch) % 2, jnp.arange(batch) - 1, **asked)


ROWS = make_items()


@functools.cache
def trained(name: str, queries: bool = False):
    """A model and random variables, the same for its name."""
    model = RankingModel(MODELS[name], CONFIG, SIZES)
    candidates = jnp.zeros((3, 2), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ROWS, make_context(queries=queries), candidates))
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: x, shapes))
    rng = np.random.default_rng(5)
    return model, jax.tree.unflatten(tree, [jnp.asarray(0.4 * rng.normal(size=x.shape), jnp.float32) for x in leaves])


def candidates_of(seed: int, batch: int = 3, count: int = 5):
    return jnp.asarray(np.random.default_rng(seed).integers(0, ITEMS, (batch, count)), jnp.int32)


@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_packed_candidates_are_scored_as_one_by_one(name, queries):
    model, variables = trained(name, queries)
    context, candidates = make_context(queries=queries), candidates_of(2)
    found = model.apply(variables, ROWS, context, candidates)
    assert set(found) - {SEARCH} == {"ctr", "cvr", "ctcvr", "price"} and (SEARCH in found) == (name == "sim by product")
    for row in range(3):
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], context)
        for place in range(5):
            one = model.apply(variables, ROWS, alone, candidates[row : row + 1, place : place + 1])
            for tower, logits in found.items():
                assert logits.shape == (3, 5) and logits.dtype == jnp.float32
                np.testing.assert_allclose(logits[row, place], one[tower][0, 0], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_padding_says_nothing_and_events_do(name):
    model, variables = trained(name)
    context, candidates = make_context(), candidates_of(3)
    found = model.apply(variables, ROWS, context, candidates)["ctr"]
    other = make_context(seed=9)
    junk = {
        each: jnp.where(context.mask, getattr(context, each), getattr(other, each))
        for each in ("item", "behavior", "age")
    }
    np.testing.assert_array_equal(found, model.apply(variables, ROWS, context.replace(**junk), candidates)["ctr"])
    longer = context.replace(
        **{each: jnp.pad(getattr(context, each), ((0, 0), (0, 4))) for each in ("item", "behavior", "age", "mask")}
    )
    np.testing.assert_allclose(found, model.apply(variables, ROWS, longer, candidates)["ctr"], rtol=1e-5, atol=1e-6)
    moved = context.replace(item=(context.item + 1) % ITEMS)
    assert (jnp.abs(found - model.apply(variables, ROWS, moved, candidates)["ctr"]) > 1e-4).any()


def test_the_activation_unit_is_a_network_of_both_vectors_and_their_product():
    rng = np.random.default_rng(0)
    own, events = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 4), (2, 5, 4)))
    mask = np.arange(5) < np.array([[5], [2]])
    unit = ActivationUnit(6)
    params = unit.init(jax.random.key(0), own, events, mask)
    found = unit.apply(params, own, events, mask)
    of = {name: np.asarray(params["params"][name]["weight"].unbox()) for name in ("candidate", "event", "out")}
    product = np.asarray(params["params"]["product"].unbox())
    matrix = np.concatenate([of["candidate"], of["event"], product])  # [3 D, F]
    for row, place, event in np.ndindex(2, 3, 5):
        q, k = own[row, place], events[row, event]
        hidden = jax.nn.gelu(np.concatenate([q, k, q * k]) @ matrix)
        expected = float((hidden @ of["out"])[0]) if mask[row, event] else 0.0
        np.testing.assert_allclose(found[row, place, event], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_cross_layers_by_hand(rank):
    """DCN-v2 Eq. 1 and 2."""
    rng = np.random.default_rng(0)
    first, x = rng.normal(size=(2, 3, 5)).astype(np.float32), rng.normal(size=(2, 3, 5)).astype(np.float32)
    layer = CrossLayer(rank)
    params = jax.tree.map(lambda x: 0.1 + x, layer.init(jax.random.key(0), first, x))["params"]
    found = layer.apply({"params": params}, first, x)
    weight, bias = (np.asarray(params["cross"][name].unbox()) for name in ("weight", "bias"))
    inner = x @ np.asarray(params["down"]["weight"].unbox()) if rank else x
    np.testing.assert_allclose(found, first * (inner @ weight + bias) + x, rtol=1e-4, atol=1e-5)


def inputs_of(own, events, mask, same=None) -> Inputs:
    own, events = jnp.asarray(own, jnp.float32), jnp.asarray(events, jnp.float32)
    plain, age = jnp.zeros((*own.shape[:2], 1)), jnp.zeros(mask.shape, jnp.int32)
    return Inputs(own, events, jnp.asarray(mask), age, plain, None if same is None else jnp.asarray(same))


@pytest.mark.parametrize("count", [2, 6, 9])
def test_attention_over_what_was_found_is_that_of_a_plain_search(count):
    """SIM Eq. 6-7, with fewer events than are to be found, and equal scores: the newest of them are found."""
    rng = np.random.default_rng(1)
    own, events = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 6, 4))
    mask = np.arange(6) < np.array([[6], [3]])
    scores = rng.integers(0, 3, (2, 3, 6)).astype(np.float32)
    scores[0, 0] = -np.inf
    layer, inputs = FoundAttention(count, 2, 4), inputs_of(own, events, mask)
    params = layer.init(jax.random.key(0), inputs, jnp.asarray(scores))
    found = layer.apply(params, inputs, jnp.asarray(scores))
    query, key, value = (np.asarray(params["params"][name]["weight"].unbox()) for name in ("query", "key", "value"))
    for row, place in np.ndindex(2, 3):
        allowed = [at for at in range(6) if mask[row, at] and scores[row, place, at] > -np.inf]
        best = sorted(allowed, key=lambda at: (-scores[row, place, at], at))[:count]
        expected = np.zeros((2, 4))
        for head in range(2 if best else 0):
            logits = (events[row, best] @ key[:, head]) @ (own[row, place] @ query[:, head]) / 2
            weights = np.exp(logits - logits.max())
            expected[head] = weights / weights.sum() @ (events[row, best] @ value[:, head])
        np.testing.assert_allclose(found[row, place], expected.ravel(), rtol=1e-4, atol=1e-5)


def test_the_hard_search_finds_the_newest_of_a_category():
    same = np.array([[[True, False, True, True]]])
    scores = latest_of_category(inputs_of(np.zeros((1, 1, 2)), np.zeros((1, 4, 2)), np.ones((1, 4), bool), same))
    assert np.argsort(-np.asarray(scores[0, 0]), kind="stable")[:3].tolist() == [0, 2, 3]
    assert np.isneginf(scores[0, 0, 1])
    with pytest.raises(UserError, match=r"'ranking\.model\.search' is 'category'"):
        latest_of_category(inputs_of(np.zeros((1, 1, 2)), np.zeros((1, 4, 2)), np.ones((1, 4), bool)))


def test_the_soft_search_learns_from_its_own_logit_alone():
    model, variables = trained("sim by product")
    context, candidates = make_context(), candidates_of(3)

    def of(name):
        gradient = jax.grad(lambda v: model.apply(v, ROWS, context, candidates)[name].sum())(variables)
        return sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(gradient["params"]["body"]["search"]))

    assert of(SEARCH) > 0 and of("ctr") == 0
    search = ProductSearch()
    own, events = np.ones((1, 1, 3)), np.arange(6.0).reshape(1, 2, 3)
    inputs = inputs_of(own, events, np.array([[True, False]]))
    params = search.init(jax.random.key(0), inputs)
    np.testing.assert_allclose(search.apply(params, inputs)[1][0, 0], events[0, 0], rtol=1e-6)


def test_crosses_by_hand():
    """Two events of behavior 1 and one of behavior 0 match; the latest of them is of age 3 of 8."""
    match = jnp.array([[[True, True, False, True], [False] * 4]])
    found = crosses(match, jnp.array([[1, 0, 2, 1]]), jnp.array([[3, 5, 0, 6]]), 3, 8)
    np.testing.assert_allclose(found[0, 0], [np.log(2), np.log(3), 0, 1 - 3 / 8], rtol=1e-6)
    np.testing.assert_allclose(found[0, 1], 0, atol=1e-6)


def test_what_is_told_of_candidates_by_hand():
    """Events by behavior, counts of the period, crosses of item and category, price against the history's."""
    items = make_items().replace(
        attributes=jnp.asarray(np.stack([np.arange(ITEMS) % 5, np.zeros(ITEMS)], 1), jnp.int32),
        log_price=jnp.asarray(np.where(np.arange(ITEMS) == 3, np.nan, np.arange(ITEMS)), jnp.float32),
    )
    context = RankingContext(
        item=jnp.array([[6, 3, 11, 6]]),
        behavior=jnp.array([[2, 0, 2, 0]]),
        age=jnp.array([[1, 2, 4, 6]]),
        mask=jnp.array([[True, True, True, False]]),
        period=jnp.array([1]),
        user=jnp.array([-1]),
    )
    config = InputConfig(width=2, dropout=0.0)
    candidates = jnp.array([[6, 3, 5]])
    module = RankingInputs(config, SIZES)
    found = module.apply(module.init(jax.random.key(0), items, context, candidates), items, context, candidates)
    plain = np.asarray(found.plain[0])
    np.testing.assert_allclose(plain[:, :3], [[np.log(2), 0, np.log(3)]] * 3, rtol=1e-6)
    np.testing.assert_allclose(plain[:, 3:8], items.counts[1, candidates[0]], rtol=1e-6)
    item = [[0, 0, np.log(2), 1 - 1 / 8], [np.log(2), 0, 0, 1 - 2 / 8], [0, 0, 0, 0]]
    np.testing.assert_allclose(plain[:, 8:12], item, atol=1e-6)
    # 6 and 11 are of category 1, 3 of category 3; 5 is of category 0, which is none.
    category = [[0, 0, np.log(3), 1 - 1 / 8], [np.log(2), 0, 0, 1 - 2 / 8], [0, 0, 0, 0]]
    np.testing.assert_allclose(plain[:, 12:16], category, atol=1e-6)
    scaled = (np.array([6, np.nan, 5]) - 1) / 2
    usual = (np.mean([6, 11]) - 1) / 2
    price = [[1, scaled[0], scaled[0] - usual], [0, 0, 0], [1, scaled[2], scaled[2] - usual]]
    np.testing.assert_allclose(plain[:, 16:], price, atol=1e-6)


def test_probabilities_by_hand():
    logits = {name: jnp.array([[0.0, 2.0]]) for name in ("ctr", "cvr", "price")}
    found = probabilities(logits, (1.0, 0.5))
    p = 1 / (1 + np.exp(-2.0))
    np.testing.assert_allclose(found["ctcvr"], [[0.25, p * p]], rtol=1e-6)
    np.testing.assert_allclose(found["price"], [[np.exp(1.0), np.exp(2.0)]], rtol=1e-6)
    own = probabilities(logits | {"ctcvr": jnp.array([[0.0, 0.0]])})
    np.testing.assert_allclose(own["ctcvr"], [[0.5, 0.5]])
    assert set(probabilities({"ctcvr": jnp.zeros((1, 1))})) == {"ctcvr"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DinConfig(length=0), "'ranking.model.length' is 0"),
        (lambda: SimConfig(search="nearest"), "'ranking.model.search' is 'nearest'; give one of category, product"),
        (lambda: DcnConfig(dropout=1.0), "'ranking.model.dropout' is 1.0"),
        (lambda: InputConfig(width=0), "'ranking.inputs.width' is 0"),
    ],
)
def test_sizes_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()
