"""Rewards and pair weights against values computed by hand, and with counts and rewards that are no use."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.data.tables import FEEDBACK
from jaxrec.losses.rewards import (
    BASE_WEIGHTS,
    base_weight,
    calibrated_rates,
    feedback_reward,
    pair_weights,
    places_gained,
    predicted_reward,
    rate_reward,
    share_within_feedback,
)


def weights(reward, chosen, where=None, **options):
    reward, chosen = jnp.array(reward), jnp.array(chosen, bool)
    return pair_weights(
        reward, chosen=chosen, where=jnp.ones(chosen.shape, bool) if where is None else where, **options
    )


def test_every_feedback_has_its_base_weight():
    assert len(FEEDBACK) == len(BASE_WEIGHTS)
    np.testing.assert_array_equal(base_weight(jnp.arange(6)), np.float32([2, 1.5, 1, 0.5, 0.2, 0]))
    np.testing.assert_array_equal(base_weight(jnp.array([[-1, 6]])), [[0, 0]])
    np.testing.assert_array_equal(base_weight(jnp.array([1, 0]), (3.0, 4.0)), [4, 3])


def test_shares_and_rewards_of_feedback_by_hand():
    """OneSug §3.4.1: of the clicks three and one, of what was shown all; the last target does not exist."""
    feedback, where = jnp.array([2, 2, 3, 0, 2]), jnp.array([True, True, True, True, False])
    share = share_within_feedback(jnp.array([3, 1, 7, 0, 50]), feedback, where=where)
    np.testing.assert_allclose(share, [0.75, 0.25, 1, 0, 0])
    expected = [math.exp(0.75), math.exp(0.25), 0.5 * math.e, 2.0, 1.0]
    np.testing.assert_allclose(feedback_reward(feedback, share), expected, rtol=1e-6)


def test_calibrated_rates_by_hand():
    """OneSearch Eq. 6-7: 990 exposures, 90 clicks, no order; no counts at all; orders without clicks."""
    ctr, cvr = calibrated_rates(np.array([990, 0, 90]), np.array([90, 0, 0]), np.array([0, 0, 90]))
    np.testing.assert_allclose(ctr, [2 / 6, 1 / 3, 1 / 5], rtol=1e-6)
    np.testing.assert_allclose(cvr, [1 / 2, 1, 2], rtol=1e-6)
    assert ctr.dtype == cvr.dtype == jnp.float32
    exposures, clicks, orders = 1e9, 3e7, 12345.0
    logs = [math.log(each + 10) for each in (exposures, clicks, orders)]
    ctr, cvr = calibrated_rates(*(jnp.array([each]) for each in (exposures, clicks, orders)))
    np.testing.assert_allclose(ctr, logs[1] / sum(logs), rtol=1e-5)
    np.testing.assert_allclose(cvr, logs[2] / logs[1], rtol=1e-5)


def test_rewards_of_rates_by_hand():
    """OneSearch Eq. 8: 2 * 2 * (1/3 * 1/2) / (5/6) = .8; rates of zero; a random item counts nothing."""
    found = rate_reward(jnp.array([0, 0, 5]), jnp.array([1 / 3, 0.0, 0.5]), jnp.array([1 / 2, 0.0, 0.5]))
    np.testing.assert_allclose(found, [0.8, 0, 0], rtol=1e-6)


def test_predicted_rewards_by_hand():
    """OneMall Eq. 8 with 1, 30 and 1; OneSearch Eq. 10 with relevance ten times."""
    predicted = {"ctr": np.array([0.1, 0.2]), "ctcvr": np.array([0.01, 0.0]), "egpm": np.array([0.5, 2.0])}
    found = predicted_reward(predicted, {"ctr": 1, "ctcvr": 30, "egpm": 1})
    np.testing.assert_allclose(found, [0.9, 2.2], rtol=1e-6)
    predicted = {
        "ctr": np.array([0.1]),
        "cvr": np.array([0.2]),
        "ctcvr": np.array([0.02]),
        "relevance": np.array([0.7]),
    }
    found = predicted_reward(predicted, {"ctr": 1, "cvr": 1, "ctcvr": 1, "relevance": 10})
    np.testing.assert_allclose(found, [7.32], rtol=1e-6)
    with pytest.raises(UserError, match=r"a weight for cvrr, which nothing predicts; .* ctcvr, ctr"):
        predicted_reward({"ctr": np.ones(1), "ctcvr": np.ones(1)}, {"cvrr": 1.0})
    with pytest.raises(UserError, match="has no weights"):
        predicted_reward({"ctr": np.ones(1)}, {})


def test_places_gained_by_hand():
    """Rewards 3, 5, 5, none, 9, and a place without a target: in the order of rewards 9, 5, 5, 3."""
    reward = jnp.array([3.0, 5.0, 5.0, math.nan, 9.0, 99.0])
    found = places_gained(reward, where=jnp.arange(6) < 5)
    assert found.tolist() == [-3, 0, 0, 0, 3, 0] and found.dtype == jnp.int32
    assert not places_gained(-jnp.arange(4), where=jnp.ones(4, bool)).any()


def test_pair_weights_by_hand():
    """OneSug Eq. 6: two chosen of rewards 2 and 1, two rejected of .5 and 1.5, and a place without a target."""
    rw, left_out = weights([2.0, 1.0, 0.5, 1.5, 0.0], [1, 1, 0, 0, 0], jnp.arange(5) < 4)
    expected = np.zeros((5, 5))
    expected[0, 2], expected[0, 3], expected[1, 2] = 1 / 1.5, 2, 2
    np.testing.assert_allclose(rw, expected, rtol=1e-6)
    assert np.argwhere(left_out).tolist() == [[1, 3]]


def test_pair_weights_are_bounded_and_rewards_have_an_order():
    """Nearly equal, equal, and in the wrong order."""
    rw, left_out = weights([1.0, 0.999, 1.0, 1.001], [1, 0, 0, 0], largest=5.0)
    np.testing.assert_array_equal(rw[0], [0, 5, 0, 0])
    np.testing.assert_array_equal(left_out[0], [False, False, True, True])
    assert not rw[1:].any() and not left_out[1:].any()
    assert weights([1.0, 0.0], [1, 0], largest=math.inf).weight[0, 1] == 1
    np.testing.assert_array_equal(weights([3.0, 1.0, 2.9], [1, 0, 0], weighted=False).weight[0], [0, 1, 1])


def test_rewards_that_are_no_numbers_are_left_out():
    rw, left_out = weights([math.inf, 1.0, math.nan, -math.inf, 0.5], [1, 1, 0, 0, 0])
    assert np.argwhere(rw).tolist() == [[1, 4]] and rw[1, 4] == 2
    assert np.argwhere(left_out).tolist() == [[0, 2], [0, 3], [0, 4], [1, 2], [1, 3]]


def test_given_rejected_targets_alone_are_compared():
    rejected = jnp.array([[False, False, True], [False, True, False]])
    rw, left_out = weights([[2.0, 1.0, 0.0]] * 2, [[1, 0, 0]] * 2, rejected=rejected)
    np.testing.assert_array_equal(rw[:, 0], [[0, 0, 0.5], [0, 1, 0]])
    assert not left_out.any()


def test_weights_are_data():
    def total(reward):
        return weights(reward, [1, 0]).weight.sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.array([1.0, 0.5])), [0, 0])
