"""Losses against values computed by hand and plain loops."""

import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jaxrec.losses import contrastive, likelihood, policy, preference, rewards
from jaxrec.losses.contrastive import in_batch_softmax, margin_rank, pair_loss, relevance_regression
from jaxrec.losses.likelihood import binary, full_softmax, log_likelihood, next_token, sampled_softmax


@pytest.mark.parametrize("module", [contrastive, likelihood, policy, preference, rewards])
def test_doctests(module):
    result = doctest.testmod(module, extraglobs={"jnp": jnp})
    assert result.attempted > 0
    assert result.failed == 0


def test_next_token_by_hand():
    probs = jnp.array([[[0.5, 0.5, 0.25], [0.1, 1.0, 0.1]], [[1.0, 1.0, 1.0], [0.3, 0.3, 0.3]]])
    loss = next_token(jnp.log(probs), jnp.array([[True, True], [True, False]]))
    np.testing.assert_allclose(loss, [[4 * math.log(2), 2 * math.log(10)], [0, 0]], rtol=1e-6)


def test_next_token_of_padding_is_zero_with_a_zero_gradient():
    log_probs = jnp.array([[-1.0, -jnp.inf], [-1.0, -2.0]])
    where = jnp.array([False, True])
    assert next_token(log_probs, where).tolist() == [0.0, 3.0]
    gradient = jax.grad(lambda x: next_token(x, where).sum())(log_probs)
    assert gradient.tolist() == [[0.0, 0.0], [-1.0, -1.0]]


def test_tokens_and_targets_that_do_not_exist_count_for_nothing():
    """Targets of unequal length: of one, two and no tokens."""
    log_probs = jnp.log(jnp.array([[0.5, 0.1], [0.5, 0.25], [0.3, 0.3]]))
    where = jnp.array([[True, False], [True, True], [False, False]])
    np.testing.assert_allclose(log_likelihood(log_probs, where), [-math.log(2), -math.log(8), 0], rtol=1e-6)
    np.testing.assert_allclose(next_token(log_probs, where), [math.log(2), math.log(8), 0], rtol=1e-6)
    gradient = jax.grad(lambda x: next_token(x, where).sum())(log_probs.at[0, 1].set(-jnp.inf))
    np.testing.assert_array_equal(gradient, -where.astype(jnp.float32))


def test_smoothed_labels_by_hand():
    """Of two tokens over levels of two and four: 0.7 of the true one's -log p and 0.3 of the level's mean."""
    levels = [np.log([0.25, 0.75]), np.log([0.1, 0.2, 0.3, 0.4])]
    log_probs = jnp.array([[levels[0][1], levels[1][2]]])
    means = jnp.array([[level.mean() for level in levels]])
    expected = -0.7 * (math.log(0.75) + math.log(0.3)) - 0.3 * (levels[0].mean() + levels[1].mean())
    smooth = {"mean_log_probs": means, "smoothing": 0.3}
    np.testing.assert_allclose(next_token(log_probs, jnp.array([True]), **smooth), [expected], rtol=1e-6)
    first = next_token(log_probs, jnp.array([[True, False]]), **smooth)
    np.testing.assert_allclose(first, [-0.7 * math.log(0.75) - 0.3 * levels[0].mean()], rtol=1e-6)
    assert next_token(log_probs, jnp.array([False]), **smooth) == 0


def test_in_batch_softmax_by_hand():
    # Row 0 sees all three columns, row 1 the first two only, row 2 itself alone.
    scores = jnp.log(jnp.array([[2.0, 3.0, 5.0], [2.0, 3.0, 5.0], [2.0, 3.0, 5.0]]))
    candidates = jnp.array([[1, 1, 1], [1, 1, 0], [0, 0, 1]], bool)
    loss = in_batch_softmax(scores, positive=jnp.arange(3), candidates=candidates)
    np.testing.assert_allclose(loss, [-math.log(2 / 10), -math.log(3 / 5), 0.0], rtol=1e-6, atol=1e-6)


def test_log_q_divides_by_how_often_an_item_is_drawn():
    scores, drawn = jnp.zeros((1, 3)), jnp.array([0.5, 0.25, 0.25])
    loss = in_batch_softmax(scores, positive=jnp.array([0]), candidates=jnp.ones((1, 3), bool), log_q=jnp.log(drawn))
    # exp(score) / q: 2, 4, 4
    np.testing.assert_allclose(loss, [-math.log(2 / 10)], rtol=1e-6)


def test_the_positive_counts_even_if_it_is_no_candidate():
    scores = jnp.log(jnp.array([[2.0, 3.0]]))
    loss = in_batch_softmax(scores, positive=jnp.array([0]), candidates=jnp.array([[False, True]]))
    np.testing.assert_allclose(loss, [-math.log(2 / 5)], rtol=1e-6)


def test_rows_without_candidates_are_zero_and_gradients_finite():
    scores = jnp.array([[1.0, -2.0], [3.0, 1e4]])
    candidates = jnp.array([[False, False], [True, True]])

    def total(scores):
        return in_batch_softmax(scores, positive=jnp.array([1, 0]), candidates=candidates).sum()

    value, gradient = jax.value_and_grad(total)(scores)
    assert float(value) == pytest.approx(1e4 - 3)
    assert gradient[0].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(gradient[1], [-1.0, 1.0], atol=1e-6)


def test_in_batch_softmax_against_a_loop():
    rng = np.random.default_rng(0)
    rows, columns = 7, 5
    scores, log_q = rng.normal(size=(rows, columns)), np.log(rng.dirichlet(np.ones(columns)))
    positive, candidates = rng.integers(0, columns, rows), rng.random((rows, columns)) < 0.5
    candidates[0] = False
    expected = []
    for row in range(rows):
        compared = [c for c in range(columns) if candidates[row, c] or c == positive[row]]
        weights = {c: math.exp(scores[row, c] - log_q[c]) for c in compared}
        loss = -math.log(weights[positive[row]] / sum(weights.values()))
        expected.append(loss if candidates[row].any() else 0.0)
    loss = in_batch_softmax(
        jnp.asarray(scores),
        positive=jnp.asarray(positive),
        candidates=jnp.asarray(candidates),
        log_q=jnp.asarray(log_q),
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)


def test_half_precision_scores_give_a_float32_loss():
    scores = jnp.zeros((1, 4), jnp.bfloat16)
    loss = in_batch_softmax(scores, positive=jnp.array([2]), candidates=jnp.ones((1, 4), bool))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [math.log(4)], rtol=1e-6)


def test_a_masked_pair_costs_nothing_and_is_nobodys_negative():
    scores = jnp.array([[2.0, 1.0, 90.0], [0.0, 3.0, 70.0], [80.0, 60.0, -50.0]])
    where = jnp.array([[True, True, False], [True, True, False], [False, False, False]])
    loss = pair_loss(scores, jnp.zeros((2, 3)), where)
    small = pair_loss(scores[:2, :2], jnp.zeros((2, 2)), jnp.ones((2, 2), bool))
    np.testing.assert_allclose(loss, [*small, 0.0], rtol=1e-6)
    gradient = jax.grad(lambda s: pair_loss(s, jnp.zeros((2, 3)), where).sum())(scores)
    assert np.isfinite(gradient).all() and not gradient[2].any() and not gradient[:, 2].any()


def test_margin_rank_by_hand():
    # Order, click and show with margin 0.1: order-click lacks 0.1 - 0.05, order-show nothing, click-show 0.1 - 0.05.
    scores, levels = jnp.array([[0.6, 0.55, 0.5]]), jnp.array([[2, 1, 0]])
    everything = jnp.ones((1, 3), bool)
    loss = margin_rank(scores, levels, margin=0.1, where=everything)
    np.testing.assert_allclose(loss, [(0.05 + 0.1 + 0.05) / 3], rtol=1e-5)  # order-show: 2 * 0.1 - 0.1
    # Far enough apart, by one margin a level, it costs nothing; in the wrong order the gap and the margin both count.
    apart = margin_rank(jnp.array([[0.8, 0.65, 0.5]]), levels, margin=0.1, where=everything)
    np.testing.assert_allclose(apart, [0.0], atol=1e-6)
    wrong = margin_rank(jnp.array([[0.1, 0.4]]), jnp.array([[3, 1]]), margin=0.1, where=jnp.ones((1, 2), bool))
    np.testing.assert_allclose(wrong, [0.2 + 0.3], rtol=1e-5)


def test_margin_rank_against_a_loop():
    rng = np.random.default_rng(0)
    scores, levels, where = rng.normal(size=(6, 5)), rng.integers(0, 3, (6, 5)), rng.random((6, 5)) < 0.7
    levels[2], where[3] = 1, False
    expected = []
    for s, level, keep in zip(scores, levels, where):
        terms = [
            max(0.0, 0.2 * (level[i] - level[j]) - (s[i] - s[j]))
            for i in range(5)
            for j in range(5)
            if keep[i] and keep[j] and level[i] > level[j]
        ]
        expected.append(sum(terms) / len(terms) if terms else 0.0)
    loss = margin_rank(jnp.asarray(scores), jnp.asarray(levels), margin=0.2, where=jnp.asarray(where))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert expected[2] == expected[3] == 0.0 < max(expected)


def test_rank_and_relevance_of_masked_rows_are_zero_with_finite_gradients():
    scores, none = jnp.array([[jnp.inf, 1.0], [0.5, 0.2]]), jnp.array([[False, False], [True, True]])

    def total(scores):
        ranked = margin_rank(scores, jnp.array([[1, 0], [1, 0]]), margin=1.0, where=none)
        return (ranked + relevance_regression(scores, jnp.zeros((2, 2)), where=none).sum(1)).sum()

    value, gradient = jax.value_and_grad(total)(scores)
    assert float(value) == pytest.approx(0.7 + 0.25 + 0.04)
    np.testing.assert_allclose(gradient, [[0.0, 0.0], [2 * 0.5 - 1, 2 * 0.2 + 1]], rtol=1e-5)


def test_relevance_by_hand():
    loss = relevance_regression(
        jnp.array([0.9, 0.2, 0.5]), jnp.array([1.0, 0.6, 0.0]), where=jnp.array([1, 1, 0], bool)
    )
    np.testing.assert_allclose(loss, [0.01, 0.16, 0.0], rtol=1e-4)


def test_full_softmax_by_hand():
    """Two items of logits log 3 and 0: probabilities 3/4 and 1/4."""
    states, table = jnp.array([[math.log(3.0)], [5.0]]), jnp.array([[1.0], [0.0]])
    targets, where = jnp.array([1, 0]), jnp.array([True, False])
    for rows in (0, 2):
        plain = full_softmax(states, table, targets, where=where, rows=rows)
        np.testing.assert_allclose(plain, [math.log(4), 0], rtol=1e-6)
        smooth = full_softmax(states, table, targets, where=where, label_smoothing=0.2, rows=rows)
        np.testing.assert_allclose(smooth, [0.9 * math.log(4) + 0.1 * math.log(4 / 3), 0], rtol=1e-6)


def plain_softmax(states, table, targets, where, smoothing):
    """A loop over targets; each has the labels of its own."""
    values = []
    for state, target, keep in zip(states, targets, where):
        labels = jnp.full(len(table), smoothing / len(table)).at[target].add(1 - smoothing)
        values.append(jnp.where(keep, -(labels * jax.nn.log_softmax(table @ state)).sum(), 0.0))
    return jnp.stack(values)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weights", ["equal", "different"])
def test_chunks_of_the_full_softmax_are_the_plain_one_with_its_gradients(smoothing, weights):
    rng = np.random.default_rng(0)
    states, table = (jnp.asarray(2 * rng.normal(size=(n, 5)), jnp.float32) for n in (11, 7))
    targets, where = jnp.asarray(rng.integers(0, 7, 11)), jnp.asarray(rng.random(11) < 0.6)
    weight = jnp.full(11, 0.25) if weights == "equal" else jnp.asarray(rng.normal(size=11), jnp.float32)

    def total(function):
        def weighted(states, table):
            values = function(states, table)
            return (weight * values).sum(), values

        return jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(states, table)

    (_, expected), gradients = total(lambda s, t: plain_softmax(s, t, targets, where, smoothing))
    assert not where.all() and jnp.abs(gradients[1]).min() > 0
    for rows in (0, 1, 4, 16):
        options = {"where": where, "label_smoothing": smoothing, "rows": rows}
        (_, values), found = total(lambda s, t, options=options: full_softmax(s, t, targets, **options))
        np.testing.assert_allclose(values, expected, atol=1e-5)
        for mine, plain in zip(found, gradients, strict=True):
            np.testing.assert_allclose(mine, plain, atol=1e-5)
        assert not found[0][~where].any()


def test_chunks_are_of_programs_on_one_device(monkeypatch):
    """The program's mesh counts, and not how many devices the machine has."""

    def loops() -> bool:
        given = jnp.ones((4, 2)), jnp.ones((5, 2)), jnp.arange(4)
        program = jax.make_jaxpr(lambda *given: full_softmax(*given, where=jnp.ones(4, bool), rows=2))(*given)
        return "while" in str(program)

    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert loops()
    for size, chunked in ((1, True), (2, False)):
        with jax.sharding.use_abstract_mesh(AbstractMesh((size,), ("data",))):
            assert loops() == chunked


@pytest.mark.parametrize("rows", [0, 2])
def test_full_softmax_of_nothing_is_zero_with_zero_gradients(rows):
    def total(states, table):
        return full_softmax(states, table, jnp.zeros(3, int), where=jnp.zeros(3, bool), rows=rows).sum()

    states = jnp.array([[1e30], [jnp.inf], [0.0]])
    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(states[2:].repeat(3, 0), jnp.ones((4, 1)))
    assert value == 0 and not any(gradient.any() for gradient in gradients)


def test_sampled_softmax_by_hand():
    """Scores log 2 and, drawn, log 3 and log 6; the second is expected three times as often and counts a third."""
    positive, negatives = jnp.log(jnp.full(2, 2.0)), jnp.log(jnp.array([[3.0, 6.0], [3.0, 6.0]]))
    options = {"log_draws": jnp.log(jnp.array([1.0, 3.0])), "candidates": jnp.array([[True, True], [False, True]])}
    loss = sampled_softmax(positive, negatives, where=jnp.array([True, True]), **options)
    np.testing.assert_allclose(loss, [math.log(7 / 2), math.log(4 / 2)], rtol=1e-6)
    masked = sampled_softmax(positive, negatives, where=jnp.array([False, True]), **options)
    assert masked[0] == 0 and masked[1] == loss[1]


def test_sampled_softmax_of_every_item_once_is_the_full_one():
    rng = np.random.default_rng(0)
    state, table = jnp.asarray(rng.normal(size=(1, 4)), jnp.float32), jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    scores = state @ table.T
    options = {"log_draws": jnp.zeros(6), "candidates": jnp.arange(6) != 2, "where": jnp.ones(1, bool)}
    sampled = sampled_softmax(scores[:, 2], scores, **options)
    np.testing.assert_allclose(sampled, full_softmax(state, table, jnp.array([2]), where=jnp.ones(1, bool)), rtol=1e-6)


def test_sampled_softmax_without_candidates_costs_nothing_and_has_a_finite_gradient():
    def total(positive, negatives):
        options = {"log_draws": jnp.zeros(3), "where": jnp.array([True, False])}
        return sampled_softmax(positive, negatives, candidates=jnp.zeros((2, 3), bool), **options).sum()

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(jnp.ones(2), jnp.ones((2, 3)))
    assert value == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))


def test_binary_by_hand():
    """sigmoid(log 3) = 3/4, sigmoid(0) = 1/2."""
    positive, negatives = jnp.full(3, math.log(3.0)), jnp.zeros((3, 2))
    candidates = jnp.array([[True, True], [True, False], [True, True]])
    loss = binary(positive, negatives, candidates=candidates, where=jnp.array([True, True, False]))
    one = -math.log(3 / 4)
    np.testing.assert_allclose(loss, [one + 2 * math.log(2), one + math.log(2), 0], rtol=1e-6)
