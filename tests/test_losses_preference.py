"""LDPO against a hand-computed session, a plain loop, and at scores where sums of exponentials overflow."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.losses.preference import has_preference, ldpo

# A purchase and a click, an exposure, two pseudo-exposures; the last place is empty.
SCORES = jnp.log(jnp.array([0.2, 0.1, 0.3, 0.05, 0.15, 0.9]))
LEVEL = jnp.array([3, 2, 1, 0, 0, 9])
WHERE = jnp.array([True, True, True, True, True, False])


def plain(scores, level, where, beta) -> float:
    """RankGR Eq. 8 as it is printed."""
    total = 0.0
    for k in np.flatnonzero(where):
        lower = [i for i in np.flatnonzero(where) if level[i] < level[k]]
        if lower:
            own = math.exp(beta * scores[k])
            total -= math.log(own / (own + sum(math.exp(beta * scores[i]) for i in lower)))
    return total


def test_a_session_by_hand():
    """The purchase among .2 + .1 + .3 + .05 + .15 = .8, the click among .6, the exposure among .5."""
    expected = -math.log(0.2 / 0.8) - math.log(0.1 / 0.6) - math.log(0.3 / 0.5)
    np.testing.assert_allclose(ldpo(SCORES, LEVEL, WHERE), expected, rtol=1e-6)
    # Squared probabilities with beta 2.
    squares = -math.log(0.04 / 0.165) - math.log(0.01 / 0.125) - math.log(0.09 / 0.115)
    np.testing.assert_allclose(ldpo(SCORES, LEVEL, WHERE, beta=2.0), squares, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_any_ordered_levels_and_any_order_of_items(seed):
    rng = np.random.default_rng(seed)
    scores, level = rng.normal(size=(3, 7)).astype(np.float32), rng.integers(0, [[2], [4], [7]], (3, 7))
    where = rng.random((3, 7)) < 0.7
    found = ldpo(jnp.asarray(scores), jnp.asarray(level), jnp.asarray(where), beta=0.7)
    np.testing.assert_allclose(found, [plain(*row, 0.7) for row in zip(scores, level, where)], rtol=1e-5, atol=1e-6)
    order = rng.permutation(7)
    shuffled = ldpo(jnp.asarray(scores[:, order]), jnp.asarray(level[:, order]), jnp.asarray(where[:, order]), beta=0.7)
    np.testing.assert_allclose(shuffled, found, rtol=1e-5, atol=1e-6)


def test_one_level_has_no_term_and_no_gradient():
    level, where = jnp.array([[1, 1, 1], [2, 0, 0], [0, 1, 1]]), jnp.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    value, gradient = jax.value_and_grad(lambda s: ldpo(s, level, where).sum())(jnp.ones((3, 3)))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((3, 3)))
    np.testing.assert_array_equal(has_preference(level, where), [False, False, False])
    np.testing.assert_array_equal(has_preference(level, jnp.ones((3, 3), bool)), [False, True, True])


def test_scores_of_any_size_are_stable():
    scores = jnp.array([-2000.0, -1000.0, -3000.0])
    value, gradient = jax.value_and_grad(lambda s: ldpo(s, jnp.array([1, 0, 0]), jnp.ones(3, bool)))(scores)
    np.testing.assert_allclose(value, 1000, rtol=1e-6)
    np.testing.assert_allclose(gradient, [-1, 1, 0], atol=1e-6)


def test_gradients_push_up_what_is_preferred():
    gradient = jax.grad(lambda s: ldpo(s, LEVEL, WHERE))(SCORES)
    assert gradient[0] < 0
    assert (gradient[3:5] > 0).all()
    assert gradient[5] == 0
