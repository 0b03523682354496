"""Experts: every way of running them against all of them, the router's bias, the balance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.nn.moe import (
    MixtureOfExperts,
    balance,
    route,
    run_blocked,
    run_dense,
    run_ragged,
)

T, D, F, E, K = 37, 8, 12, 5, 2


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def problem():
    experts, gates = route(draw(T, E), jnp.zeros(E), K)
    return draw(T, D), draw(E, D, F), draw(E, F, D), experts, gates


def by_hand(x, up, down, experts, gates):
    out = np.zeros(x.shape, np.float32)
    for token in range(len(x)):
        for expert, gate in zip(experts[token], gates[token], strict=True):
            out[token] += gate * np.asarray(jax.nn.gelu(x[token] @ up[expert]) @ down[expert])
    return out


def test_dense_is_the_sum_over_chosen_experts(problem):
    np.testing.assert_allclose(run_dense(*problem), by_hand(*problem), atol=2e-4)


@pytest.fixture(scope="module")
def padded(problem):
    """Every third token is padding, the first one too, as a layer tells a dispatch."""
    x, up, down, experts, gates = problem
    return x, up, down, jnp.where((jnp.arange(T) % 3 > 0)[:, None], experts, E), gates


@pytest.mark.parametrize("run", [run_ragged, run_blocked])
@pytest.mark.parametrize("tokens", ["problem", "padded"])
def test_every_dispatch_and_its_gradient_equal_dense(request, tokens, run):
    problem = request.getfixturevalue(tokens)

    def value_and_gradients(function):
        def loss(x, up, down, gates):
            return jnp.sin(function(x, up, down, problem[3], gates)).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*problem[:3], problem[4])

    for one, other in zip(*map(jax.tree.leaves, map(value_and_gradients, (run, run_dense))), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("block", [1, 8, 64])
def test_blocks_of_any_size_and_an_expert_without_tokens(problem, block):
    x, up, down, _, gates = problem
    experts = jnp.stack([jnp.zeros(T, jnp.int32), jnp.full(T, 3)], axis=1)
    out = run_blocked(x, up, down, experts, gates, block)
    np.testing.assert_allclose(out, run_dense(x, up, down, experts, gates), atol=2e-4)


@pytest.mark.parametrize("run", [run_dense, run_ragged, run_blocked])
def test_padding_goes_through_no_expert_and_nobody_else_notices(padded, run):
    x, up, down, experts, gates = padded
    out, real = run(*padded), np.arange(T) % 3 > 0
    np.testing.assert_array_equal(out[~real], 0)
    np.testing.assert_allclose(out[real], run(x[real], up, down, experts[real], gates[real]), atol=2e-4)


@pytest.mark.parametrize("place", [0, 20, T - 1])
def test_a_token_of_the_fullest_expert_is_not_dropped_wherever_it_stands(place):
    """All tokens want the same experts, as BOS does in every context."""
    layer = MixtureOfExperts(E, K, F)
    x = jnp.ones((1, T, D)).at[0, place].add(0.01)
    variables = layer.init(jax.random.key(0), x)
    out, changed = layer.apply(variables, x, mutable=["balance"])
    assert sorted(changed["balance"]["load"].tolist()) == [0, 0, 0, T, T]
    np.testing.assert_allclose(out, layer.clone(dispatch="dense").apply(variables, x), atol=2e-4)
    assert np.abs(out[0, place]).max() > 1e-3 and np.abs(out[0, place] - out[0, place - 1]).max() > 1e-5


def test_bias_selects_and_never_weighs():
    """A peer lets the bias leak into the gates."""
    logits = jnp.array([[2.0, 1.0, 0.0]])
    chosen, gates = route(logits, jnp.array([0.0, 0.0, 10.0]), 2)
    assert set(chosen[0].tolist()) == {2, 0}
    scores = jax.nn.sigmoid(logits[0, chosen[0]])
    np.testing.assert_allclose(gates[0], scores / scores.sum(), rtol=1e-6)
    assert not jax.grad(lambda bias: route(logits, bias, 2)[1].max())(jnp.zeros(3)).any()


def test_balance_by_hand():
    bias = balance(jnp.array([0.5, 0.0, 0.0]), jnp.array([6.0, 3.0, 0.0]), 0.1)
    np.testing.assert_allclose(bias, [0.4, 0.0, 0.1], atol=1e-7)


def test_balancing_evens_the_load():
    logits = draw(256, E) + jnp.array([3.0, 0.0, 0.0, 0.0, -3.0])

    def spread(bias):
        load = jax.nn.one_hot(route(logits, bias, K)[0], E).sum((0, 1))
        return load, float(load.max() / load.mean())

    bias = jnp.zeros(E)
    _, before = spread(bias)
    for _ in range(300):
        bias = balance(bias, spread(bias)[0], 0.01)
    assert before > 2
    assert spread(bias)[1] < 1.2


def test_load_counts_real_tokens_once_even_under_remat():
    layer = MixtureOfExperts(E, K, F, dispatch="dense")
    x, where = draw(2, 6, D), jnp.arange(12).reshape(2, 6) < 7
    variables = layer.init(jax.random.key(0), x)

    def loss(params, apply):
        out, mutated = apply({"params": params, "balance": variables["balance"]}, x, where)
        return out.sum(), mutated["balance"]["load"]

    def apply(v, x, where):
        return layer.apply(v, x, where, mutable=["balance"])

    for function in (apply, jax.checkpoint(apply)):
        load = jax.grad(loss, has_aux=True)(variables["params"], function)[1]
        assert load.sum() == 7 * K
