"""The sequence models: what each place sees, and every architecture against plain loops."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.models import sequential
from jaxrec.models.sequential import (
    Bert4RecConfig,
    CaserConfig,
    CoreConfig,
    HstuConfig,
    ItemFacts,
    NextItNetConfig,
    SasRecConfig,
    SequentialModel,
    YouTubeDnnConfig,
    earlier,
    prefix_mean,
)

ITEMS, LENGTH = 9, 7
SMALL = {"width": 8, "dropout": 0.2}
CONFIGS = {
    "youtubednn": YouTubeDnnConfig(hidden=(6,), **SMALL),
    "sasrec": SasRecConfig(layers=1, hidden=6, **SMALL),
    "bert4rec": Bert4RecConfig(layers=1, hidden=6, **SMALL),
    "caser": CaserConfig(window=3, horizontal=2, vertical=2, **SMALL),
    "nextitnet": NextItNetConfig(dilations=(1, 2), **SMALL),
    "core": CoreConfig(layers=1, hidden=6, **SMALL),
    "hstu": HstuConfig(layers=1, **SMALL),
    "sasrec_text": SasRecConfig(layers=1, hidden=6, embeddings=True, prior=True, temperature=0.5, **SMALL),
}
CAUSAL = [name for name in CONFIGS if name != "bert4rec"]
RNG = np.random.default_rng(0)
ITEM = RNG.integers(0, ITEMS, (2, LENGTH + 1))
TIME = np.cumsum(RNG.integers(0, 10**6, (2, LENGTH + 1)), axis=1).astype(np.int32)
FACTS = ItemFacts(
    jnp.log(jnp.arange(1, ITEMS + 1) / sum(range(1, ITEMS + 1))), jnp.asarray(RNG.normal(size=(ITEMS, 5)), jnp.float32)
)


def make(name: str) -> SequentialModel:
    return SequentialModel(CONFIGS[name], ITEMS, LENGTH, answer_time=True)


@functools.cache
def params_of(name: str):
    """Random parameters that are far from their first values: no position, bias or scale is without effect."""
    shapes = jax.eval_shape(
        lambda: make(name).init(jax.random.key(0), FACTS, ITEM, TIME, jnp.zeros(2, jnp.int32), method="next")
    )
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32), nn.unbox(shapes)["params"])


def states_of(name: str, item=ITEM[:, :-1], mask=None, time=TIME, params=None, **options):
    mask = np.ones(item.shape, bool) if mask is None else mask
    size = item.shape[1]
    params = params_of(name) if params is None else params
    return make(name).apply({"params": params}, FACTS, item, mask, time[:, :size], time[:, 1 : size + 1], **options)


def next_of(name: str, item, time, length):
    return make(name).apply({"params": params_of(name)}, FACTS, item, time, np.array(length), method="next")


def test_every_configuration_has_an_encoder():
    assert {type(config) for config in CONFIGS.values()} == set(sequential.ENCODERS)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_place_depends_on_the_items_up_to_it_alone(name):
    states, table = states_of(name)
    width = 8 + CONFIGS[name].prior
    assert states.shape == (2, LENGTH, width) and table.shape == (ITEMS, width)
    changed = ITEM[:, :-1].copy()
    changed[:, 4] = (changed[:, 4] + 1) % ITEMS
    others, _ = states_of(name, changed)
    np.testing.assert_allclose(states[:, :4], others[:, :4], atol=1e-6)
    assert (jnp.abs(states - others)[:, 4].max(-1) > 1e-4).all()


def test_bert4rec_sees_both_sides():
    item = ITEM[:, :-1].copy()
    item[:, 2] = ITEMS
    changed = item.copy()
    changed[:, 4] = (changed[:, 4] + 1) % ITEMS
    apart = jnp.abs(states_of("bert4rec", item)[0] - states_of("bert4rec", changed)[0])
    assert (apart[:, 2].max(-1) > 1e-4).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_follows_is_the_same_in_every_length_bucket(name):
    short, table = next_of(name, ITEM[:, :5], TIME[:, :5], [4, 2])
    padded = ITEM.copy()
    padded[0, 4:], padded[1, 2:] = 3, 5
    long, again = next_of(name, padded, TIME, [4, 2])
    np.testing.assert_allclose(short, long, atol=1e-5)
    np.testing.assert_array_equal(table, again)
    if name in CAUSAL:
        states, _ = states_of(name)
        np.testing.assert_allclose(long, jnp.stack([states[0, 3], states[1, 1]]), atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_learns(name):
    where = np.arange(LENGTH) < np.array([[LENGTH], [3]])

    def total(params):
        states, table = states_of(name, ITEM[:, :-1].clip(0, ITEMS - 1), where, params=params)
        return jnp.where(where, jax.nn.logsumexp(states @ table.T, axis=-1) - states.sum(-1), 0.0).sum()

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.grad(total)(params_of(name))):
        path = jax.tree_util.keystr(path)
        assert jnp.isfinite(gradient).all(), path
        # A constant added to all logits of an attention changes no weight of it.
        if "['key']['bias']" not in path:
            assert jnp.abs(gradient).max() > 1e-6, path


@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_is_for_training(name):
    keys = [jax.random.key(seed) for seed in (0, 1)]
    first, second = (states_of(name, train=True, rngs={"dropout": key})[0] for key in keys)
    assert jnp.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(states_of(name)[0], states_of(name)[0])


def test_prefix_mean_and_earlier_by_hand():
    x = jnp.array([[[1.0], [3.0], [8.0]]])
    np.testing.assert_allclose(prefix_mean(x)[0, :, 0], [1, 2, 4])
    np.testing.assert_array_equal(earlier(x, 2)[0, :, 0], [0, 0, 1])
    np.testing.assert_array_equal(earlier(x, 0), x)


def arrays(name: str):
    params = jax.tree.map(np.asarray, params_of(name))
    return params["encoder"], params["item"]["table"][ITEM[0, :-1]]


def test_youtubednn_in_a_loop():
    params, x = arrays("youtubednn")
    for place in range(LENGTH):
        hidden = x[: place + 1].mean(0) @ params["hidden_0"]["weight"] + params["hidden_0"]["bias"]
        expected = np.maximum(hidden, 0) @ params["out"]["weight"] + params["out"]["bias"]
        np.testing.assert_allclose(states_of("youtubednn")[0][0, place], expected, atol=1e-5)


def test_caser_in_a_loop():
    params, x = arrays("caser")
    x = np.concatenate([np.zeros((2, 8), np.float32), x])
    for place in range(LENGTH):
        window, found = x[place : place + 3], []
        for height in (1, 2, 3):
            read = params[f"horizontal_{height}"]
            values = [window[at : at + height].ravel() @ read["weight"] + read["bias"] for at in range(4 - height)]
            found.append(np.maximum(values, 0).max(0))
        found += [params["vertical"][:, each] @ window for each in range(2)]
        expected = np.maximum(np.concatenate(found) @ params["out"]["weight"] + params["out"]["bias"], 0)
        np.testing.assert_allclose(states_of("caser")[0][0, place], expected, atol=1e-5)


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def test_nextitnet_in_a_loop():
    params, x = arrays("nextitnet")
    x = x * np.sqrt(8)
    for block, dilation in enumerate((1, 2)):
        y = x
        for part, step in enumerate((dilation, 2 * dilation)):
            layer, out = params[f"convolution_{block}_{part}"], []
            for place in range(LENGTH):
                total = layer["bias"].copy()
                for back in range(3):
                    if place - back * step >= 0:
                        total += y[place - back * step] @ layer["weight"][8 * back : 8 * (back + 1)]
                out.append(np.maximum(rms(total, params[f"norm_{block}_{part}"]["scale"]), 0))
            y = np.stack(out)
        x = x + y
    np.testing.assert_allclose(states_of("nextitnet")[0][0], rms(x, params["norm"]["scale"]), atol=1e-4)


def test_hstu_in_a_loop():
    params, x = arrays("hstu")
    x = x * np.sqrt(8)
    silu = lambda v: v / (1 + np.exp(-v))  # noqa: E731
    normed = rms(x, params["norm_0"]["scale"])
    names = ("gate", "value", "query", "key")
    gate, value, query, key = (silu(np.einsum("SD,DNH->SNH", normed, params[f"{name}_0"]["weight"])) for name in names)
    read = np.zeros((LENGTH, 2, 4), np.float32)
    for head in range(2):
        for place in range(LENGTH):
            for past in range(place + 1):
                seconds = max(int(TIME[0, place + 1] - TIME[0, past]), 1)
                bias = params["place_0"][place - past] + params["time_0"][seconds.bit_length() - 1]
                weight = silu(query[place, head] @ key[past, head] + bias) / LENGTH
                read[place, head] += weight * value[past, head]
    gated = rms(read.reshape(LENGTH, 8), params["read_0"]["scale"]) * gate.reshape(LENGTH, 8)
    expected = rms(x + gated @ params["out_0"]["weight"], params["norm"]["scale"])
    np.testing.assert_allclose(states_of("hstu")[0][0], expected, atol=1e-4)


def test_hstu_is_not_told_when_the_answer_comes_unless_asked_for():
    later = TIME.copy()
    later[:, -1] += 10**7
    hidden, told = (SequentialModel(CONFIGS["hstu"], ITEMS, LENGTH, answer_time=each) for each in (False, True))
    length, params = np.array([LENGTH, LENGTH]), {"params": params_of("hstu")}
    for model, same in ((hidden, True), (told, False)):
        first, second = (model.apply(params, FACTS, ITEM, time, length, method="next")[0] for time in (TIME, later))
        assert bool(jnp.array_equal(first, second)) == same


def test_text_and_prior_by_hand():
    """An item's vector is its row and its projected text; its score is the cosine's and the prior's sum."""
    params = jax.tree.map(np.asarray, params_of("sasrec_text"))
    text = np.asarray(FACTS.embeddings) * np.sqrt(5) @ params["text"]["weight"]
    rows = params["item"]["table"][:ITEMS] + text
    plain = {name: value for name, value in params.items() if name != "text"}
    plain["item"] = {"table": np.concatenate([rows, params["item"]["table"][ITEMS:]])}
    states, table = states_of("sasrec_text")
    config = dataclasses.replace(CONFIGS["sasrec_text"], embeddings=False, prior=False)
    model = SequentialModel(config, ITEMS, LENGTH, answer_time=True)
    mask = np.ones((2, LENGTH), bool)
    expected, vectors = model.apply({"params": plain}, FACTS, ITEM[:, :-1], mask, TIME[:, :-1], TIME[:, 1:])
    np.testing.assert_allclose(vectors, rows / np.linalg.norm(rows, axis=-1, keepdims=True), atol=1e-5)
    scores = np.asarray(states @ table.T)
    np.testing.assert_allclose(scores, expected @ vectors.T + FACTS.log_q, atol=1e-5)


def test_core_is_a_mean_of_the_items_of_unit_length():
    """Its state is a positive combination of the items so far; its scores are cosines over the temperature."""
    states, table = states_of("core")
    np.testing.assert_allclose(jnp.linalg.norm(table, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(states, axis=-1), 1 / CONFIGS["core"].temperature, rtol=1e-5)
    _, x = arrays("core")
    for place in range(3):
        basis = x[: place + 1]
        shares, *_ = np.linalg.lstsq(basis.T, np.asarray(states[0, place]), rcond=None)
        np.testing.assert_allclose(shares @ basis, states[0, place], atol=1e-3)
        assert (shares > 0).all() or len(np.unique(ITEM[0, : place + 1])) <= place


@pytest.mark.parametrize("config", [SasRecConfig, CoreConfig, HstuConfig])
def test_heads_share_the_width_evenly(config):
    with pytest.raises(UserError, match=r"model\.heads' is 3; give a number that divides the width, 8"):
        config(width=8, heads=3)


def test_sasrec_uses_places():
    """The same item at every place: only what is learned of places tells them apart."""
    item = np.full((1, LENGTH), 4)
    states, _ = states_of("sasrec", item, time=TIME[:1])
    assert jnp.abs(states[0, 1:] - states[0, :-1]).max(-1).min() > 1e-3
    config = dataclasses.replace(CONFIGS["sasrec"], width=16, heads=4)
    model = SequentialModel(config, ITEMS, LENGTH)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), FACTS, ITEM, TIME, jnp.zeros(2, jnp.int32), method="next")
    )
    assert nn.unbox(shapes)["params"]["encoder"]["blocks"]["attention_0"]["query"]["weight"].shape == (16, 4, 4)
