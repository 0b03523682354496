"""LDPO and the hybrid losses against hand-computed cases, plain loops, and at scores where exponentials overflow."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.losses.preference import HybridConfig, has_preference, hybrid, implicit_reward, ldpo, listwise, pairwise
from jaxrec.losses.rewards import feedback_reward, pair_weights

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


# ---- hybrid losses ---------------------------------------------------------------------------------------------------

FORMS = ("margin", "linear", "tolerance", "lead")
PRINTED = ("tolerance", "lead")
POLICY = jnp.array([-3.0, -4.0, -2.0, -5.0, -1.0])
REFERENCE = jnp.array([-3.5, -3.0, -3.0, -4.0, -1.0])
# Implicit rewards with beta 2: 1, -2, 2, -2, 0. Both first targets are chosen; the last isn't compared.
RW = jnp.zeros((5, 5)).at[0, 2].set(1.0).at[0, 3].set(0.5).at[1, 2].set(2.0)
CONFIG = HybridConfig(beta=2.0, margin=1.5, likelihood=0.25)


def with_form(form: str, **changes) -> HybridConfig:
    return HybridConfig(**{"beta": 2.0, "margin": 1.5, "likelihood": 0.25, "form": form} | changes)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# z of the pairs 0-2, 0-3, 1-2: the rejected one leads by 1, -3 and 4.
Z = {
    "margin": (2.5, 0, 2 * 5.5),
    "linear": (2.5, 0.5 * -1.5, 2 * 5.5),
    "tolerance": (0, 0, 2 * 2.5),
    "lead": (0, 0.5 * 1.5, 0),
}


@pytest.mark.parametrize("form", FORMS)
def test_hybrid_losses_by_hand(form):
    """OneSug Eq. 7-9 and OneSearch Eq. 11-12, with beta 2, delta 1.5 and alpha .25."""
    np.testing.assert_allclose(implicit_reward(POLICY, REFERENCE, beta=2.0), [1, -2, 2, -2, 0])
    sign, (a, b, c) = 1 if form == "lead" else -1, Z[form]
    lists = [-math.log(sigmoid(sign * math.log(math.exp(a) + math.exp(b)))), -math.log(sigmoid(sign * c))]
    pairs = [-math.log(sigmoid(sign * a)) - math.log(sigmoid(sign * b)), -math.log(sigmoid(sign * c))]
    for function, compare, expected, terms in ((listwise, "lists", lists, (1, 1)), (pairwise, "pairs", pairs, (2, 1))):
        config = with_form(form, compare=compare)
        found = function(POLICY, REFERENCE, RW, config)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, [*expected, 0, 0, 0], rtol=1e-5)
        whole = [expected[0] + 0.25 * 3 * terms[0], expected[1] + 0.25 * 4 * terms[1], 0, 0, 0]
        np.testing.assert_allclose(hybrid(POLICY, REFERENCE, RW, config), whole, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compare", ["lists", "pairs"])
def test_the_printed_forms_have_no_gradient_at_the_reference_and_the_default_has(form, compare):
    config = with_form(form, compare=compare, likelihood=0.0)
    gradient = jax.grad(lambda policy: hybrid(policy, POLICY, RW, config).sum())(POLICY)
    if form in PRINTED:
        assert not gradient.any()
    else:
        assert (gradient[:2] < 0).all() and (gradient[2:4] > 0).all() and gradient[4] == 0


@pytest.mark.parametrize("compare", ["lists", "pairs"])
def test_gradients_at_the_reference_by_hand(compare):
    """Each z is its rw times the margin; the gradient is beta rw sigma(z) for a pair, by its share for a list."""
    gradient = jax.grad(lambda p: hybrid(p, POLICY, RW, with_form("margin", compare=compare)).sum())(POLICY)
    z = np.array([1.5, 0.75, 3.0])
    outer = 1 / (1 + np.exp(-z))
    if compare == "lists":
        total = np.exp(z[:2]).sum()
        outer[:2] = np.exp(z[:2]) / total * (total / (1 + total))
    pull = 2.0 * np.array([1, 0.5, 2]) * outer
    terms = (2, 1) if compare == "pairs" else (1, 1)
    expected = [-pull[0] - pull[1] - 0.25 * terms[0], -pull[2] - 0.25 * terms[1], pull[0] + pull[2], pull[1], 0]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_a_margin_of_zero_trains_from_the_reference_on():
    gradient = jax.grad(lambda p: listwise(p, POLICY, RW, with_form("margin", margin=0.0)).sum())(POLICY)
    assert (gradient[:2] < 0).all() and (gradient[2:4] > 0).all()


def test_a_margin_that_is_kept_has_no_gradient():
    def total(lead):
        policy = REFERENCE.at[0].add(lead)
        return listwise(policy, REFERENCE, jnp.zeros((5, 5)).at[0, 1].set(3.0), with_form("margin")).sum()

    value, gradient = jax.value_and_grad(total)(1.0)
    np.testing.assert_allclose(value, math.log(2), rtol=1e-6)
    assert gradient == 0 and jax.grad(total)(0.7) < 0


def test_a_pair_is_a_list_of_one():
    rw = RW.at[0, 3].set(0.0)
    for form in FORMS:
        lists, pairs = (each(POLICY, REFERENCE, rw, with_form(form)) for each in (listwise, pairwise))
        np.testing.assert_allclose(lists, pairs, rtol=1e-6)


def random_case(seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)
    policy, reference = (jnp.asarray(rng.normal(-8, 2, (3, 6)), jnp.float32) for _ in range(2))
    return policy, reference, jnp.asarray(rng.integers(0, 3, (3, 6))), jnp.asarray(rng.random((3, 6)) < 0.8)


def plain_hybrid(policy, reference, reward, chosen, where, config) -> np.ndarray:
    """OneSug Eq. 6-9 in loops over targets, in double precision."""
    found = np.zeros(len(policy))
    implicit = config.beta * (policy.astype(np.float64) - reference)
    for w in np.flatnonzero(chosen & where):
        terms = [
            min(1 / (reward[w] - reward[i]), config.largest_weight) * max(0, implicit[i] - implicit[w] + config.margin)
            for i in np.flatnonzero(~chosen & where)
            if reward[w] > reward[i]
        ]
        if terms and config.compare == "lists":
            found[w] -= math.log(sigmoid(-math.log(sum(map(math.exp, terms))))) + config.likelihood * policy[w]
        elif terms:
            found[w] -= sum(math.log(sigmoid(-term)) + config.likelihood * policy[w] for term in terms)
    return found


@pytest.mark.parametrize("compare", ["lists", "pairs"])
def test_rewards_of_any_feedback_against_loops(compare):
    policy, reference, _, where = random_case(2)
    rng = np.random.default_rng(3)
    feedback, share = jnp.asarray(rng.integers(2, 4, (3, 6))), jnp.asarray(rng.random((3, 6)))
    reward, chosen = feedback_reward(feedback, share), feedback < 3
    config = with_form("margin", compare=compare, largest_weight=1.5)
    weight, left_out = pair_weights(reward, chosen=chosen, where=where, largest=config.largest_weight)
    assert left_out.any() and (weight == config.largest_weight).any()
    found = hybrid(policy, reference, weight, config)
    rows = zip(*(np.asarray(each) for each in (policy, reference, reward, chosen, where)), strict=True)
    np.testing.assert_allclose(found, [plain_hybrid(*row, config) for row in rows], rtol=1e-4)
    assert (found > 0).sum() > 3


def test_training_from_the_reference_on_reaches_the_margin_and_the_printed_forms_stay():
    """A policy over five answers, the first chosen and the next two rejected."""
    start, rw = jax.nn.log_softmax(POLICY), jnp.zeros((5, 5)).at[0, 1:3].set(2.0)
    for form in ("margin", *PRINTED):
        config = with_form(form, likelihood=0.0)

        def loss(logits, config=config):
            return hybrid(jax.nn.log_softmax(logits), start, rw, config).sum()

        step, logits = jax.jit(jax.grad(loss)), POLICY
        for _ in range(30):
            logits = logits - 0.2 * step(logits)
        lead = 2.0 * np.asarray((logits - POLICY)[0] - (logits - POLICY)[1:3])
        assert (lead >= 1.5).all() if form == "margin" else not lead.any()


def test_dpo_and_s_dpo_are_special_cases():
    """One rejected: -log sigmoid(r_w - r_l). Several: -log sigmoid(-log sum exp(r_l - r_w)), which is LDPO."""
    plain = HybridConfig(beta=0.5, margin=0.0, likelihood=0.0, form="linear")
    policy, reference, level, where = random_case()
    reward = 0.5 * (policy - reference)
    one = jnp.zeros((3, 6, 6)).at[:, 1, 4].set(1.0)
    dpo = -jnp.log(jax.nn.sigmoid(reward[:, 1] - reward[:, 4]))
    for function in (listwise, pairwise):
        np.testing.assert_allclose(function(policy, reference, one, plain).sum(-1), dpo, rtol=1e-5)
    several = jnp.zeros((3, 6, 6)).at[:, 1, 3:].set(1.0)
    s_dpo = -jnp.log(jax.nn.sigmoid(-jnp.log(jnp.exp(reward[:, 3:] - reward[:, 1:2]).sum(-1))))
    np.testing.assert_allclose(listwise(policy, reference, several, plain).sum(-1), s_dpo, rtol=1e-5)
    every = jnp.ones_like(where)
    lower = pair_weights(level, chosen=every, rejected=every, where=where, weighted=False).weight
    expected = ldpo(policy - reference, level, where, beta=0.5)
    assert (expected > 0).all()
    np.testing.assert_allclose(listwise(policy, reference, lower, plain).sum(-1), expected, rtol=1e-5)


def test_the_default_is_ldpo_while_the_maximum_is_inactive():
    """With a margin of 0, where no rejected target's implicit reward is below the chosen one's."""
    level, where, reference = jnp.array([2, 1, 0, 0]), jnp.ones(4, bool), jnp.full(4, -3.0)
    every = jnp.ones(4, bool)
    lower = pair_weights(level, chosen=every, rejected=every, where=where, weighted=False).weight
    config = HybridConfig(margin=0.0)
    rising = reference + jnp.array([0.0, 0.5, 0.75, 2.0])
    np.testing.assert_allclose(
        listwise(rising, reference, lower, config).sum(), ldpo(rising - reference, level, where), rtol=1e-6
    )
    falling = reference - jnp.array([0.0, 0.5, 0.75, 2.0])
    assert listwise(falling, reference, lower, config).sum() > ldpo(falling - reference, level, where) + 0.5


@pytest.mark.parametrize("compare", ["lists", "pairs"])
@pytest.mark.parametrize("form", FORMS)
def test_contexts_are_independent_and_their_targets_have_no_order(form, compare):
    policy, reference, level, where = random_case(1)
    config = with_form(form, compare=compare)

    def loss(policy, reference, level, where):
        rw = pair_weights(level.astype(jnp.float32), chosen=level > 0, rejected=level < 2, where=where).weight
        return hybrid(policy, reference, rw, config)

    whole, order = loss(policy, reference, level, where), np.array([3, 0, 5, 1, 4, 2])
    assert (whole > 0).any(-1).all()
    others = loss(*(each.at[1].set(each[2]) for each in (policy, reference, level, where)))
    np.testing.assert_array_equal(others, whole[jnp.array([0, 2, 2])])
    shuffled = loss(*(each[:, order] for each in (policy, reference, level, where)))
    np.testing.assert_allclose(shuffled, whole[:, order], rtol=1e-5)


@pytest.mark.parametrize("compare", ["lists", "pairs"])
@pytest.mark.parametrize("form", FORMS)
def test_targets_without_a_pair_cost_nothing_whatever_they_score(form, compare):
    """Also log-likelihoods of -inf and NaN under the policy or the reference; a context without pairs."""
    config = with_form(form, compare=compare)
    bad = jnp.array([[-1.0, -2.0, jnp.nan, -jnp.inf], [jnp.nan, -jnp.inf, jnp.inf, 0.0]])
    rw = jnp.zeros((2, 4, 4)).at[0, 0, 1].set(1.0)
    both = jax.value_and_grad(lambda p: hybrid(p, p, rw, config).sum())
    value, gradient = both(bad)
    assert np.isfinite(gradient).all() and not gradient[1].any() and not gradient[0, 2:].any()
    np.testing.assert_array_equal(value, both(jnp.zeros((2, 4)).at[0, :2].set(bad[0, :2]))[0])


@pytest.mark.parametrize("compare", ["lists", "pairs"])
@pytest.mark.parametrize("form", FORMS)
def test_log_likelihoods_of_any_size_are_stable(form, compare):
    rw = jnp.zeros((2, 4, 4)).at[:, 0, 1:].set(10.0)
    policy = jnp.array([[-1e4, 0.0, -1e4, -1e4], [0.0, -1e4, -1e4, -1e4]])
    config = with_form(form, compare=compare)
    value, gradient = jax.value_and_grad(lambda p: hybrid(p, p[::-1], rw, config).sum())(policy)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    value = hybrid(policy, jnp.zeros((2, 4)), rw, with_form("margin", likelihood=0.0)).max()
    np.testing.assert_allclose(value, 10 * (2e4 + 1.5), rtol=1e-5)


def test_no_gradient_passes_through_the_reference():
    gradient = jax.grad(lambda r: hybrid(POLICY, r, RW, CONFIG).sum())(REFERENCE)
    assert not gradient.any()


def test_half_precision_is_computed_in_float32():
    rounded = [each.astype(jnp.bfloat16) for each in (POLICY, REFERENCE)]
    found = hybrid(*rounded, RW, CONFIG)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, hybrid(*(each.astype(jnp.float32) for each in rounded), RW, CONFIG))


@pytest.mark.parametrize("name", ["beta", "largest_weight", "margin", "likelihood"])
def test_a_configuration_that_cannot_train_is_refused(name):
    with pytest.raises(UserError, match=f"'{name}' is -1"):
        HybridConfig(**{name: -1.0})
    if name in ("beta", "largest_weight"):
        with pytest.raises(UserError, match=f"'{name}' is 0; give a number above 0"):
            HybridConfig(**{name: 0.0})
