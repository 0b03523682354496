"""Qwen2 against a plain model under the literal mask of RankGR Eq. 7; its verbs: test_models_contract.py."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.decoding import beam_search, build_trie
from jaxrec.models.causal import Causal, CausalConfig
from jaxrec.models.vocabulary import ContextTokens

SIZES = (4, 3, 5)
LEVELS = ((3, 4), (7, 3), (12, 5))
CONFIG = CausalConfig(
    vocabulary=20,
    width=12,
    heads=4,
    groups=2,
    head_dim=6,
    hidden=10,
    layers=2,
    rotary_base=100.0,
    levels=LEVELS,
)
VARIANTS = {
    "grouped, tied": {},
    "untied, every head its key, no bias": {"tied": False, "groups": 4, "bias": False},
    "whole vocabulary, one key": {"restrict": False, "groups": 1},
    "tokens": {"levels": None},
}
B, S, L, M = 2, 7, 4, 3
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 17, (B, S)), jnp.int32)
MASK = jnp.arange(S) < jnp.array([[S], [4]])
TARGETS = jnp.asarray(np.random.default_rng(1).integers(0, SIZES, (B, L, M)), jnp.int32)
IDS = np.array(list(itertools.product(*map(range, SIZES))), np.int32)  # every ID


@functools.cache
def make(**changes):
    """(model, params) of the tiny configuration with some fields changed; every parameter matters."""
    model = Causal(dataclasses.replace(CONFIG, **changes))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), ContextTokens(TOKENS, MASK), TARGETS))["params"]
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    noise = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return model, jax.tree.map(lambda p, key: p + 0.3 * jax.random.normal(key, p.shape), params, noise)


def everything(model, params, tokens, mask, targets):
    context = model.apply({"params": params}, ContextTokens(tokens, mask), method="prefill")
    return model.apply({"params": params}, context, targets, method="score").log_probs


@functools.cache
def compiled(**changes):
    """`everything` of a variant, compiled once."""
    return jax.jit(functools.partial(everything, make(**changes)[0]))


# ---- a plain Qwen2 that shares no code with ours ---------------------------------------------------------------------


def plain_norm(x, part):
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * part["scale"]


def plain_turn(x, positions, base):
    """Rotary embedding of x [X, N, H] by complex numbers."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * base ** (-jnp.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angles)
    return jnp.concatenate([turned.real, turned.imag], -1)


def plain_states(config, params, tokens, positions, mask):
    """States [X, D] of a sequence of tokens [X] at any positions, under any mask [X, X]."""
    x = params["embed"]["table"][tokens]
    each = config.heads // config.groups
    for i in range(config.layers):
        layer = params[f"layers_{i}"]
        part, normed = layer["attention"], plain_norm(x, layer["attention"]["norm"])
        query, key, value = (
            jnp.einsum("XD,DNH->XNH", normed, part[p]["weight"]) + part[p].get("bias", 0.0)
            for p in ("query", "key", "value")
        )
        key, value = (jnp.repeat(p, each, axis=1) for p in (key, value))
        query, key = (plain_turn(p, positions, config.rotary_base) for p in (query, key))
        scores = jnp.einsum("XNH,YNH->NXY", query, key) / jnp.sqrt(config.head_dim)
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1)
        x = x + jnp.einsum("NXY,YNH->XNH", weights, value).reshape(len(x), -1) @ part["out"]["weight"]
        part, normed = layer["feed_forward"], plain_norm(x, layer["feed_forward"]["norm"])
        x = x + (nn.silu(normed @ part["gate"]["weight"]) * (normed @ part["up"]["weight"])) @ part["down"]["weight"]
    return plain_norm(x, params["norm"])


def literal_mask(length: int) -> np.ndarray:
    """[X, X] over a context and L targets of M tokens: the context and the own target, up to oneself (RankGR Eq. 7)."""
    target = np.concatenate([np.full(length, -1), np.repeat(np.arange(L), M)])
    order = np.arange(len(target))
    return (order[None] <= order[:, None]) & ((target[None] == -1) | (target[None] == target[:, None]))


def plain_everything(config, params, tokens, lengths, targets):
    """Log-probabilities [B, L, M]: context (without padding) and all targets as one sequence under the literal mask."""
    levels = config.levels or ((0, config.vocabulary),) * M
    wanted = targets + jnp.array([offset for offset, _ in levels])
    table, rows = params["embed" if config.tied else "head"]["table"], []
    for b, length in enumerate(lengths):
        sequence = jnp.concatenate([tokens[b, :length], wanted[b].reshape(-1)])
        positions = np.concatenate([np.arange(length), np.tile(length + np.arange(M), L)])
        states = plain_states(config, params, sequence, positions, literal_mask(length))
        own = states[length:].reshape(L, M, -1)[:, :-1]
        first = jnp.broadcast_to(states[length - 1], (L, 1, config.width))
        logits = jnp.concatenate([first, own], 1) @ table.T  # [L, M, V]
        found = []
        for level, (offset, size) in enumerate(levels):
            inside = logits[:, level, offset : offset + size] if config.restrict else logits[:, level]
            chosen = logits[np.arange(L), level, wanted[b, :, level]]
            found.append(chosen - jax.nn.logsumexp(inside, -1))
        rows.append(jnp.stack(found, -1))
    return jnp.stack(rows)


# ---- tests -----------------------------------------------------------------------------------------------------------


def test_the_literal_mask_is_that_of_the_paper():
    mask = literal_mask(2)
    assert mask.shape == (2 + L * M, 2 + L * M)
    # The second token of the second target: the context, and the two first of its own.
    assert np.flatnonzero(mask[2 + M + 1]).tolist() == [0, 1, 2 + M, 2 + M + 1]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_packed_scores_and_gradients_are_those_under_the_literal_mask(changes):
    model, params = make(**changes)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=TARGETS.shape), jnp.float32)

    def run(params):
        found = everything(model, params, TOKENS, MASK, TARGETS)
        return (found * weights).sum(), found

    def plain(params):
        found = plain_everything(model.config, params, TOKENS, (S, 4), TARGETS)
        return (found * weights).sum(), found

    (_, found), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    (_, expected), expected_gradient = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4), gradient, expected_gradient)
    assert all(jnp.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradient)), "every parameter has a gradient"


def test_the_beam_finds_the_best_of_all_ids():
    model, params = make()

    @jax.jit
    def search(params):
        context = model.apply({"params": params}, ContextTokens(TOKENS, MASK), method="prefill")
        every = jnp.broadcast_to(IDS, (B, *IDS.shape))
        scored = model.apply({"params": params}, context, every, method="score").log_probs.sum(-1)

        def extend(tokens, cache, level):
            return model.apply({"params": params}, context, tokens, cache, level, method="extend")

        return scored, beam_search(extend, None, build_trie(IDS, SIZES), batch=B, beam_width=len(IDS))

    scored, result = search(params)
    assert result.valid.all()
    order = np.argsort(-scored, axis=1, kind="stable")
    np.testing.assert_allclose(result.log_probs, np.take_along_axis(scored, order, 1), atol=1e-5)
    np.testing.assert_array_equal(result.codes[:, :10], IDS[order[:, :10]])


def test_padding_on_the_left_changes_nothing():
    _, params = make()
    expected = compiled()(params, TOKENS, MASK, TARGETS)
    left = compiled()(params, jnp.roll(TOKENS, 3, axis=1), jnp.roll(MASK, 3, axis=1), TARGETS)
    np.testing.assert_allclose(left[1], expected[1], atol=1e-5)
    # The row without padding was rolled too: its tokens stand in another order, which must show.
    assert not np.allclose(left[0], expected[0], atol=1e-3)


@pytest.mark.parametrize("restrict", [True, False])
@pytest.mark.parametrize("shift", [0, 3], ids=["right", "left"])
def test_one_prefill_scores_every_next_token(shift, restrict):
    """RankGR Eq. 2: the log-probability of each token given those before it, each prefix run by itself."""
    model, params = make(restrict=restrict)
    tokens, mask = jnp.roll(TOKENS, shift, axis=1), jnp.roll(MASK, shift, axis=1)

    @jax.jit
    def run(params):
        variables = {"params": params}
        context = model.apply(variables, ContextTokens(tokens, mask), method="prefill")
        return model.apply(variables, context.states, tokens, mask, method="score_context")

    found = run(params)
    row, where = tokens[1], np.flatnonzero(mask[1])
    if shift == 0:
        np.testing.assert_array_equal(where, range(4))
    real = np.asarray(row)[where]
    expected = np.zeros(S)
    for count in range(1, len(real)):
        mask_of_prefix = jnp.tril(jnp.ones((count, count), bool))
        states = plain_states(model.config, params, jnp.asarray(real[:count]), np.arange(count), mask_of_prefix)
        logits = params["embed"]["table"] @ states[-1]
        offset, size = next(level for level in LEVELS if level[0] <= real[count] < sum(level))
        inside = logits[offset : offset + size] if restrict else logits
        expected[where[count]] = logits[real[count]] - jax.nn.logsumexp(inside)
    np.testing.assert_allclose(found[1], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"levels": ((0, 21),)}, "level 0 takes the tokens 0 ... 20"),
        ({"groups": 3}, "'model.backbone.groups' is 3; give one that divides"),
        ({"groups": 0}, "'model.backbone.groups' is 0; give 1 or more"),
        ({"head_dim": 5}, "'model.backbone.head_dim' is 5"),
        ({"dropout": 1.0}, "'model.backbone.dropout' is 1.0; give 0 or more, below 1"),
        ({"target_dropout": -0.5}, "'model.backbone.target_dropout' is -0.5"),
        ({"epsilon": float("nan")}, "'model.backbone.epsilon' is nan"),
        ({"dtype": "foo"}, "'model.backbone.dtype' is 'foo'; give one of float32"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        dataclasses.replace(CONFIG, **changes)


def test_dropout_is_for_training_alone():
    model, params = make(dropout=0.5)
    run = jax.jit(lambda key, train: model.apply(
        {"params": params}, ContextTokens(TOKENS, MASK), train, method="prefill", rngs={"dropout": key}
    ).states, static_argnums=1)  # fmt: skip
    one, other = jax.random.key(0), jax.random.key(1)
    np.testing.assert_array_equal(run(one, False), run(other, False))
    np.testing.assert_array_equal(run(one, True), run(one, True))
    assert not np.allclose(run(one, True), run(other, True))
