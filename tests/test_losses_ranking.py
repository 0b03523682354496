"""Losses of ranking models against values by hand in float64, their gradients, and masked candidates."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.losses.ranking import binary_cross_entropy, entire_space, log_price_error

LOGITS = np.array([0.0, 2.0, -3.0, 60.0, -60.0])
MORE = np.array([1.0, -2.0, 0.5, 60.0, 60.0])
LABELS = np.array([1, 0, 1, 1, 0])


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_binary_cross_entropy_by_hand():
    found = binary_cross_entropy(jnp.array(LOGITS), jnp.array(LABELS), where=jnp.ones(5, bool))
    p = sigmoid(LOGITS[:3])
    expected = [-np.log(p[0]), -np.log(1 - p[1]), -np.log(p[2]), 0.0, 0.0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    gradient = jax.grad(lambda x: binary_cross_entropy(x, LABELS, where=jnp.ones(5, bool)).sum())(jnp.array(LOGITS))
    np.testing.assert_allclose(gradient, sigmoid(LOGITS) - LABELS, atol=1e-6)


def test_a_confident_mistake_costs_what_it_should():
    where = jnp.ones(2, bool)
    wrong = binary_cross_entropy(jnp.array([80.0, -80.0]), jnp.array([0, 1]), where=where)
    np.testing.assert_allclose(wrong, [80.0, 80.0])
    np.testing.assert_allclose(entire_space(jnp.array([80.0]), jnp.array([80.0]), jnp.array([0]), where=where[:1]),
                               [80 - np.log(2)], rtol=1e-6)  # fmt: skip


def test_entire_space_by_hand():
    """ESMM Eq. 2-3: a product of two probabilities over everything that was shown."""
    found = entire_space(jnp.array(LOGITS), jnp.array(MORE), jnp.array(LABELS), where=jnp.ones(5, bool))
    p = sigmoid(LOGITS) * sigmoid(MORE)
    expected = [-np.log(p[0]), -np.log(1 - p[1]), -np.log(p[2]), 0.0, 0.0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_gradients_of_the_entire_space_against_finite_differences():
    def total(clicks, conversions):
        p = sigmoid(clicks) * sigmoid(conversions)
        return -np.log(np.where(LABELS[:3], p, 1 - p)).sum()

    def ours(clicks, conversions):
        return entire_space(clicks, conversions, LABELS[:3], where=jnp.ones(3, bool)).sum()

    a, b = LOGITS[:3], MORE[:3]
    gradients = jax.grad(ours, argnums=(0, 1))(jnp.array(a), jnp.array(b))
    for place in range(3):
        step = 1e-6 * np.eye(3)[place]
        np.testing.assert_allclose(gradients[0][place], (total(a + step, b) - total(a - step, b)) / 2e-6, atol=1e-5)
        np.testing.assert_allclose(gradients[1][place], (total(a, b + step) - total(a, b - step)) / 2e-6, atol=1e-5)


def test_prices_by_hand():
    where = jnp.array([True, True, False])
    found = log_price_error(jnp.log(jnp.array([4.0, 2.0, 1.0])), jnp.log(jnp.array([2.0, 2.0, 9.0])), where=where)
    np.testing.assert_allclose(found, [0.5 * np.log(2) ** 2, 0, 0], rtol=1e-6)


def test_what_is_masked_costs_nothing_whatever_it_holds():
    where, bad = jnp.array([True, False, False]), jnp.array([0.3, jnp.nan, jnp.inf])

    def total(x):
        click = binary_cross_entropy(x, x, where=where)
        return (click + entire_space(x, x, x > 0, where=where) + log_price_error(x, x + 1, where=where)).sum()

    value, gradient = jax.value_and_grad(total)(bad)
    assert jnp.isfinite(value) and gradient[1] == gradient[2] == 0 and jnp.isfinite(gradient).all()
    for found in (binary_cross_entropy(bad, bad, where=where), entire_space(bad, bad, bad > 0, where=where)):
        assert found[0] > 0 and (found[1:] == 0).all() and found.dtype == jnp.float32
