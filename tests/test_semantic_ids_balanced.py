"""Balanced k-means: bounds, optimality against the exact transport problem, hard cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jaxrec.semantic_ids import balanced, kmeans, residual
from jaxrec.semantic_ids.balanced import BalancedConfig, assign_within, bounds, cheapest, smallest
from jaxrec.semantic_ids.residual import ResidualConfig


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
    assert cost(equal) < 1.06 * exact


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


def test_smallest_margin_of_a_rank():
    margin, group = jnp.array([5.0, 1, 3, 2]), jnp.array([0, 0, 0, 2])
    assert smallest(margin, group, jnp.array([1.0, 0, 7]), 3).tolist() == [3.0, 2.75, 2.0]


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
