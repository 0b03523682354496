"""Balanced k-means: bounds, optimality against the exact transport problem, hard cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jaxrec.semantic_ids.quantizers import balanced, kmeans, residual
from jaxrec.semantic_ids.quantizers.balanced import BalancedConfig, assign_within, bounds, cheapest, smallest
from jaxrec.semantic_ids.quantizers.residual import ResidualConfig


@pytest.fixture(scope="module")
def uneven():
    """600 rows [600, 4], half of them in one dense place."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 4)).astype(np.float32)
    x[:300] = x[:300] * 0.1 + 2
    return x


@pytest.fixture(scope="module")
def fitted(uneven):
    return balanced.fit(jax.random.key(0), uneven, 12)


def test_bounds_are_rounded_outwards():
    assert bounds(100, 10, 0.1) == (9, 11)
    assert bounds(10, 4, 0.0) == (2, 3)
    assert bounds(600, 12, 0.1) == (45, 55)


def test_sizes_keep_the_bound_where_plain_k_means_does_not(uneven, fitted):
    codes = assign_within(uneven, *fitted, slack=0.1)
    sizes = np.bincount(codes, minlength=12)
    assert 45 <= sizes.min() <= sizes.max() <= 55
    plain = np.bincount(kmeans.kmeans(jax.random.key(0), uneven, 12).assignment, minlength=12)
    assert plain.max() > 60


def test_prices_alone_nearly_keep_it(uneven, fitted):
    codes, _ = kmeans.assign(jnp.asarray(uneven), *fitted)
    sizes = np.bincount(codes, minlength=12)
    assert 35 <= sizes.min() <= sizes.max() <= 65


def test_the_assignment_is_nearly_the_cheapest_of_its_kind(uneven, fitted):
    centroids = np.asarray(fitted.centroids)
    costs = ((uneven[:, None] - np.repeat(centroids, 50, axis=0)) ** 2).sum(-1)
    exact = costs[linear_sum_assignment(costs)].sum()

    def cost(codes):
        return ((uneven - centroids[codes]) ** 2).sum()

    # Sizes that may differ by a tenth cost less than equal ones; equal ones cost a little more than they must.
    assert cost(assign_within(uneven, *fitted, slack=0.1)) < exact
    equal = assign_within(uneven, *fitted, slack=0.0)
    assert np.bincount(equal).tolist() == [50] * 12
    assert cost(equal) < 1.1 * exact


def test_equal_rows_are_split_to_the_letter():
    x = np.concatenate([np.zeros((30, 2)), np.ones((10, 2))]).astype(np.float32)
    fitted = balanced.fit(jax.random.key(0), x, 4)
    sizes = np.bincount(assign_within(x, *fitted, slack=0.1), minlength=4)
    assert 9 <= sizes.min() <= sizes.max() <= 11


def test_margins_by_hand():
    x, centroids = jnp.array([[0.0], [1.0], [4.0]]), jnp.array([[0.0], [3.0], [9.0]])
    first, second, margin = cheapest(x, centroids, jnp.array([0.0, 1.0, 0.0]))
    assert first.tolist() == [0, 0, 1] and second.tolist() == [1, 1, 0]
    np.testing.assert_allclose(margin, [10, 4, 14], atol=1e-5)


def test_smallest_margin_of_a_rank_is_at_most_a_bin_too_large():
    rng = np.random.default_rng(0)
    margin, group = rng.exponential(size=200).astype(np.float32), rng.integers(0, 4, 200)
    rank = np.array([0, 7, 1000, 3, 5])
    found = np.asarray(smallest(jnp.asarray(margin), jnp.asarray(group), jnp.asarray(rank), 5))
    for cluster in range(4):
        mine = np.sort(margin[group == cluster])
        exact = mine[min(rank[cluster], len(mine) - 1)]
        assert exact <= found[cluster] * 1.0001 and found[cluster] <= exact * 2**0.25 * 1.0001
    np.testing.assert_allclose(found[4], margin.mean(), rtol=1e-5)


def test_rows_all_the_same_have_finite_prices():
    fitted = balanced.fit(jax.random.key(0), np.ones((40, 3), np.float32), 4)
    assert np.isfinite(fitted.prices).all() and np.isfinite(fitted.centroids).all()
    codes = assign_within(np.ones((40, 3), np.float32), *fitted, slack=0.1)
    sizes = np.bincount(codes, minlength=4)
    assert sizes.min() >= 9 and sizes.max() <= 11


def test_shared_sizes_and_prices_by_hand():
    # At temperature 1 the costs 0 and log 3 + price share a row 3 : 1, those of the other row the other way round.
    x = jnp.array([[0.0], [np.sqrt(np.log(3))]])
    sizes = balanced.shared_sizes(x, x, jnp.zeros(2), 1.0)
    np.testing.assert_allclose(sizes, [1, 1], rtol=1e-6)
    three = jnp.concatenate([x, x[:1]])
    np.testing.assert_allclose(balanced.shared_sizes(three, x, jnp.zeros(2), 1.0), [1.75, 1.25], rtol=1e-6)
    # Bounds 1 and 2 hold already: no price. With exactly 1.5 wanted, each price moves by the logarithm of its excess.
    assert balanced.share(three, x, jnp.zeros(2), 1.0, 0.3, 1).tolist() == [0, 0]
    prices = balanced.share(jnp.tile(three, (2, 1)), x, jnp.zeros(2), 1.0, 0.0, 1)
    np.testing.assert_allclose(prices, 1.5 * np.log([3.5 / 3, 2.5 / 3]), rtol=1e-5)


def test_a_balanced_last_level_uses_its_codes_evenly(uneven):
    config = ResidualConfig((4, 8), balanced=(2,), balance=BalancedConfig(slack=0.05))
    levels = residual.fit(jax.random.key(0), uneven, config)
    assert levels.prices[0] is None and levels.prices[1].shape == (8,)
    codes = np.asarray(residual.encode_together(levels, uneven, config.balance))
    sizes = np.bincount(codes[:, 1])
    assert 71 <= sizes.min() <= sizes.max() <= 79
    # Each row by itself, most fall the same: a bound this tight makes the dense half choose between equals.
    assert (np.asarray(residual.encode(levels, uneven)) == codes).all(1).mean() > 0.8


def test_the_same_key_gives_the_same_bits(uneven, fitted):
    jax.tree.map(np.testing.assert_array_equal, balanced.fit(jax.random.key(0), uneven, 12), fitted)
