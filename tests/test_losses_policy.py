"""DPO of a group, GRPO and the divergence against hand-computed cases, finite differences and extreme values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.losses.likelihood import log_likelihood
from jaxrec.losses.policy import advantages, best_against_worst, divergence, grpo

EVERY = jnp.ones(3, bool)


# ---- advantages ------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    """Rewards 1, 2, 3, 6: mean 3, deviation sqrt(14 / 4). Of the second group only 1 and 5 exist."""
    reward = jnp.array([[1.0, 2.0, 3.0, 6.0], [1.0, 99.0, 5.0, math.nan]])
    where = jnp.array([[True] * 4, [True, False, True, True]])
    expected = [np.array([-2, -1, 0, 3]) / math.sqrt(3.5), [-1, 0, 1, 0]]
    np.testing.assert_allclose(advantages(reward, where=where), expected, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e4, 1e30])
def test_advantages_have_no_scale(scale):
    reward = np.random.default_rng(0).normal(size=(2, 64)) * scale
    expected = (reward - reward.mean(-1, keepdims=True)) / reward.std(-1, keepdims=True)
    found = advantages(jnp.asarray(reward, jnp.float32), where=jnp.ones((2, 64), bool))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_advantages_of_equal_rewards_are_zero():
    """Also of rewards that differ by rounding errors, of one candidate, of none, and of rewards that are no numbers."""
    noise = np.float32([1, 1 + 1.2e-7, 1, 1 - 6e-8])
    rows = [[0.1] * 4, [0.0] * 4, [1e4] * 4, 1e4 * noise, -0.3 * noise, [1, 2, 3, 4], [1, 2, 3, 4]]
    rows += [[math.nan] * 4, [math.inf, -math.inf, math.nan, 2.0]]
    where = np.ones((9, 4), bool)
    where[5], where[6, 1:] = False, False
    found = advantages(jnp.asarray(np.array(rows), jnp.float32), where=jnp.asarray(where))
    np.testing.assert_array_equal(found, np.zeros((9, 4)))
    assert advantages(jnp.array([1.0, 1.0001]), where=EVERY[:2]).tolist() == [-1, 1]


# ---- DPO of a group --------------------------------------------------------------------------------------------------

POLICY = jnp.array([-2.0, -3.0, -4.0])
REFERENCE = jnp.array([-2.5, -2.0, -4.0])
REWARD = jnp.array([0.5, 0.1, 0.9])


def test_best_against_worst_by_hand():
    """OneMall Eq. 9: the third is best (log ratio 0), the second worst (-1)."""
    z = 0.5 * (0 - -1)
    found = best_against_worst(POLICY, REFERENCE, REWARD, where=EVERY, scale=0.5)
    np.testing.assert_allclose(found, -math.log(1 / (1 + math.exp(-z))), rtol=1e-6)
    found = best_against_worst(POLICY, REFERENCE, REWARD, where=EVERY, scale=0.5, printed=True)
    np.testing.assert_allclose(found, -1 / (1 + math.exp(-z)), rtol=1e-6)
    delta = 0.05
    z = 0.5 * sum(sign * (POLICY[i] - math.log(math.exp(REFERENCE[i]) + delta)) for sign, i in ((1, 2), (-1, 1)))
    found = best_against_worst(POLICY, REFERENCE, REWARD, where=EVERY, scale=0.5, delta=delta, printed=True)
    np.testing.assert_allclose(found, -1 / (1 + math.exp(-z)), rtol=1e-5)


def test_the_printed_gradient_vanishes_where_the_pair_is_far_off():
    def gradient(first, **options):
        policy = jnp.array([first, 0.0])
        return jax.grad(
            lambda p: best_against_worst(p, jnp.zeros(2), REWARD[:2], where=EVERY[:2], scale=1.0, **options)
        )(policy)

    np.testing.assert_allclose(gradient(0.0), [-0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(gradient(0.0, printed=True), [-0.25, 0.25], atol=1e-6)
    np.testing.assert_allclose(gradient(-20.0), [-1, 1], atol=1e-6)
    np.testing.assert_allclose(gradient(-20.0, printed=True), [0, 0], atol=1e-6)
    assert np.isfinite(gradient(-1e4)).all() and np.isfinite(gradient(1e4)).all()


@pytest.mark.parametrize("printed", [False, True])
def test_groups_without_an_order_cost_nothing(printed):
    """Equal rewards, one candidate, none, rewards that are no numbers; the last group has a pair."""
    reward = jnp.array([[1.0] * 3, [3.0, 1, 2], [3.0, 1, 2], [math.nan, math.inf, 1], [2.0, math.nan, 1]])
    where = jnp.array([[True] * 3, [True, False, False], [False] * 3, [True] * 3, [True] * 3])
    policy = jnp.full((5, 3), -jnp.inf).at[4].set(POLICY)

    def loss(policy):
        return best_against_worst(policy, policy, reward, where=where, printed=printed)

    assert loss(policy)[:4].tolist() == [0] * 4
    np.testing.assert_allclose(loss(policy)[4], -0.5 if printed else math.log(2), rtol=1e-6)
    gradient = jax.grad(lambda p: loss(p).sum())(policy)
    assert np.isfinite(gradient).all() and not gradient[:4].any()
    assert gradient[4, 0] < 0 and gradient[4, 1] == 0 and gradient[4, 2] > 0


# ---- GRPO ------------------------------------------------------------------------------------------------------------


def of_ratios(ratio, advantage, **options):
    ratio = jnp.log(jnp.array(ratio))
    return grpo(
        ratio - 5, jnp.full(ratio.shape, -5.0), jnp.array(advantage), where=jnp.ones(ratio.shape, bool), **options
    )


def test_grpo_by_hand():
    """OneMall Eq. 10 with e = .2: good and bad candidates below, in and above the interval."""
    ratio, advantage = [0.5, 1.1, 2.0, 0.5, 1.1, 2.0], [2.0, 2.0, 2.0, -2.0, -2.0, -2.0]
    np.testing.assert_allclose(of_ratios(ratio, advantage), [-1, -2.2, -2.4, 1.6, 2.2, 4], rtol=1e-5)
    printed = of_ratios(ratio, advantage, printed=True)
    np.testing.assert_allclose(printed, [-1.6, -2.2, -2.4, 1.6, 2.2, 2.4], rtol=1e-5)
    found = of_ratios([2.0], [1.0], delta=math.exp(-5.0), printed=True, clip=0.5)
    np.testing.assert_allclose(found, [-1], rtol=1e-5)


def test_the_printed_form_never_corrects_what_is_on_the_wrong_side():
    """Good but unlikely, bad but likely: the pessimistic form has gradient -ratio * A."""

    def gradient(ratio, advantage, printed):
        def total(log_ratio):
            return grpo(log_ratio, jnp.zeros(2), jnp.array(advantage), where=EVERY[:2], printed=printed).sum()

        return jax.grad(total)(jnp.log(jnp.array(ratio)))

    np.testing.assert_allclose(gradient([0.5, 2.0], [1.0, -1.0], False), [-0.5, 2], rtol=1e-5)
    assert not gradient([0.5, 2.0], [1.0, -1.0], True).any()
    for printed in (False, True):
        assert not gradient([2.0, 0.5], [1.0, -1.0], printed).any()


@pytest.mark.parametrize("printed", [False, True])
def test_at_the_reference_the_gradient_is_the_policy_gradient(printed):
    """-A for each log-likelihood; and on a tiny policy that of the expected reward, by finite differences."""
    advantage = jnp.array([0.5, -1.0, 0.25])
    options = {"where": EVERY, "printed": printed}
    gradient = jax.grad(lambda p: grpo(p, REFERENCE, advantage, **options).sum())(REFERENCE)
    np.testing.assert_allclose(gradient, -advantage, rtol=1e-6)

    logits, reward = np.array([0.3, -0.7, 1.1]), np.array([1.0, 3.0, -2.0])
    start = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))

    def surrogate(logits):
        centred = jnp.asarray(reward - np.exp(start) @ reward, jnp.float32)
        return (jnp.exp(start) * grpo(jax.nn.log_softmax(logits), start, centred, **options)).sum()

    def expected_reward(logits):
        weights = np.exp(logits - logits.max())
        return weights @ reward / weights.sum()

    steps = 1e-4 * np.eye(3)
    slopes = [(expected_reward(logits + step) - expected_reward(logits - step)) / 2e-4 for step in steps]
    np.testing.assert_allclose(jax.grad(surrogate)(jnp.asarray(logits, jnp.float32)), -np.array(slopes), atol=1e-5)


def test_ratios_of_tokens_and_of_whole_candidates():
    """Candidates of two tokens and of one: by hand, and at the reference the gradients are the same."""
    reference = jnp.log(jnp.array([[[0.5, 0.25], [0.5, 0.9]]]))
    policy = reference + jnp.log(jnp.array([[[1.1, 3.0], [0.5, 7.0]]]))
    where, advantage = jnp.array([[[True, True], [True, False]]]), jnp.array([[1.0, -2.0]])
    found = grpo(policy, reference, advantage, where=where)
    np.testing.assert_allclose(found, [[-1.1 - 1.2, 2 * 0.8]], rtol=1e-5)
    whole = [log_likelihood(each, where) for each in (policy, reference)]
    found = grpo(*whole, advantage, where=where.any(-1))
    np.testing.assert_allclose(found, [[-1.2, 2 * 0.8]], rtol=1e-5)

    def gradient(of):
        return jax.grad(lambda p: grpo(of(p), of(reference), advantage, where=mask).sum())(reference)

    mask = where
    of_tokens = gradient(lambda p: p)
    mask = where.any(-1)
    np.testing.assert_allclose(of_tokens, gradient(lambda p: log_likelihood(p, where)), rtol=1e-6)
    np.testing.assert_allclose(of_tokens, [[[-1, -1], [2, 0]]], rtol=1e-6)
    whole_mask = grpo(policy, reference, advantage, where=jnp.array([[True, False]]))
    np.testing.assert_allclose(whole_mask, [[-2.3, 0]], rtol=1e-5)


def test_shapes_that_do_not_belong_together_are_refused():
    for shape in ((2, 3), (2, 3, 4), (4,)):
        with pytest.raises(ValueError, match="are of no candidates or tokens"):
            grpo(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros((2, 4)), where=jnp.ones((2, 4), bool))


@pytest.mark.parametrize("printed", [False, True])
def test_masked_candidates_cost_nothing_whatever_they_score(printed):
    bad = jnp.array([[-1.0, jnp.nan, -jnp.inf], [jnp.inf, jnp.nan, -1.0]])
    where, advantage = jnp.array([[True, False, False], [False] * 3]), jnp.array([[1.0, jnp.nan, jnp.inf]] * 2)
    for delta in (0.0, 1e-6):
        options = {"where": where, "printed": printed, "delta": delta}
        value, gradient = jax.value_and_grad(lambda p, o=options: grpo(p, bad, advantage, **o).sum())(bad)
        np.testing.assert_allclose([value, *gradient.ravel()], [-1, -1, 0, 0, 0, 0, 0], atol=1e-5)
    value, gradient = jax.value_and_grad(lambda p: divergence(p, bad, where=where).sum())(bad)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("printed", [False, True])
def test_ratios_of_any_size_are_finite(printed):
    policy = jnp.array([1e4, 1e4, -1e4, -1e4, 30.0, 30.0])
    advantage = jnp.array([1.0, -1.0, 1.0, -1.0, 0.0, -1e4])
    where = jnp.ones(6, bool)

    def total(policy):
        return grpo(policy, jnp.zeros(6), advantage, where=where, printed=printed)

    value, gradient = total(policy), jax.grad(lambda p: total(p).sum())(policy)
    assert np.isfinite(value).all() and np.isfinite(gradient).all()
    if not printed:
        assert gradient[1] > 1e4 and gradient[5] > 1e8  # still corrected
    for function in (divergence, lambda p, r, where: divergence(r, p, where=where)):
        value, gradient = jax.value_and_grad(lambda p, f=function: f(p, jnp.zeros(6), where=where).sum())(policy)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_no_gradient_passes_through_reference_or_advantage():
    def total(reference, advantage):
        losses = (
            grpo(POLICY, reference, advantage, where=EVERY),
            best_against_worst(POLICY, reference, advantage, where=EVERY),
            divergence(POLICY, reference, where=EVERY),
        )
        return sum(loss.sum() for loss in losses)

    for gradient in jax.grad(total, argnums=(0, 1))(REFERENCE, REWARD):
        assert not gradient.any()


# ---- divergence ------------------------------------------------------------------------------------------------------


def test_the_divergence_is_kl_in_expectation():
    """p = (.5, .3, .2), q = (.2, .2, .6): the estimates weighted by p sum to sum p log p / q."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    found = divergence(jnp.log(jnp.asarray(p, jnp.float32)), jnp.log(jnp.asarray(q, jnp.float32)), where=EVERY)
    np.testing.assert_allclose(found[0], 0.4 - math.log(0.4) - 1, rtol=1e-5)
    np.testing.assert_allclose(p @ np.asarray(found), (p * np.log(p / q)).sum(), rtol=1e-5)
    gradient = jax.grad(lambda x: divergence(x, REFERENCE, where=EVERY).sum())(REFERENCE)
    np.testing.assert_allclose(gradient, [0, 0, 0], atol=1e-6)
