"""The prior over the catalogue's tree against counting by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.models.prior import FLOOR, build_prior

CODES = np.array([[0, 1], [0, 1], [0, 3], [2, 0]])
WEIGHTS = np.array([[1.0, 2.0, 1.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
NOW = jnp.array([0])
SIZES = (3, 4)


def test_edges_by_hand():
    prior = build_prior(CODES, WEIGHTS, SIZES)
    root = prior.logits(0, jnp.zeros((1, 1), jnp.int32), NOW)[0, 0]
    np.testing.assert_allclose(root, [np.log(4 / 8), FLOOR, np.log(4 / 8)], rtol=1e-6)
    nodes, edges = prior.step(0, jnp.zeros((1, 3), jnp.int32), jnp.array([[0, 1, 2]]), NOW)
    np.testing.assert_allclose(edges[0], root, rtol=1e-6)
    below = prior.logits(1, nodes, NOW)[0]
    np.testing.assert_allclose(below[0], [FLOOR, np.log(3 / 4), FLOOR, np.log(1 / 4)], rtol=1e-6)
    np.testing.assert_allclose(below[1], np.full(4, FLOOR))  # no item begins with code 1
    np.testing.assert_allclose(below[2], [0.0, FLOOR, FLOOR, FLOOR], atol=1e-6)


def test_once_off_the_tree_always_off_it():
    prior = build_prior(np.array([[0, 0, 0]]), np.ones((1, 1)), (2, 2, 2))
    node, _ = prior.step(0, jnp.array([[0]]), jnp.array([[1]]), NOW)
    node, edge = prior.step(1, node, jnp.array([[0]]), NOW)
    assert edge == FLOOR
    np.testing.assert_allclose(prior.logits(2, node, NOW), np.full((1, 1, 2), FLOOR))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(1, 1, 1), (40, 5, 4)]))  # every shape compiles
def test_every_id_has_its_share_of_the_popularity(seed, shape):
    rng = np.random.default_rng(seed)
    items, *sizes = shape
    sizes = (*sizes, 3)
    codes = np.stack([rng.integers(0, size, items) for size in sizes], axis=1)
    weights = rng.random(items) + 0.1
    prior, node, total = build_prior(codes, weights[None], sizes), jnp.zeros((1, items), jnp.int32), jnp.zeros(items)
    for level in range(3):
        dense = jnp.take_along_axis(prior.logits(level, node, NOW), jnp.asarray(codes[None, :, level, None]), 2)[..., 0]
        node, edge = prior.step(level, node, jnp.asarray(codes[None, :, level]), NOW)
        np.testing.assert_array_equal(dense, edge)
        total += edge[0]
    same = (codes[:, None] == codes).all(-1)
    np.testing.assert_allclose(jnp.exp(total), same @ weights / weights.sum(), rtol=1e-4)


def test_each_row_has_its_own_period():
    prior, nodes = build_prior(CODES, WEIGHTS, SIZES), jnp.array([[0, 1], [0, 0]])
    out = jax.jit(lambda p, n, period: p.logits(1, n, period))(prior, nodes, jnp.array([0, 1]))
    np.testing.assert_allclose(out[0, 0, [1, 3]], np.log([3 / 4, 1 / 4]), rtol=1e-6)
    np.testing.assert_allclose(out[1, 0, [1, 3]], np.log([2 / 3, 1 / 3]), rtol=1e-6)
    np.testing.assert_array_equal(out[1, 1], out[1, 0])


def test_room_for_more_items_changes_shapes_and_nothing_else():
    """All prefixes, in the catalogue and not, in shapes that a larger catalogue has too."""
    plain, roomy = build_prior(CODES, WEIGHTS, SIZES), build_prior(CODES, WEIGHTS, SIZES, capacity=9)
    tokens = jnp.arange(3)[None]
    reached = []
    for prior in (plain, roomy):
        nodes, edges = prior.step(0, jnp.zeros((1, 3), jnp.int32), tokens, NOW)
        reached.append((prior.logits(0, jnp.zeros((1, 1), jnp.int32), NOW), edges, prior.logits(1, nodes, NOW)))
    jax.tree.map(np.testing.assert_array_equal, *reached)
    codes = np.concatenate([CODES, [[1, 0], [1, 1], [1, 2], [2, 3]]])
    larger = build_prior(codes, np.ones((2, 8)), SIZES, capacity=9, like=roomy)
    assert jax.tree.map(jnp.shape, larger) == jax.tree.map(jnp.shape, roomy)
    fewer = build_prior(CODES[:1], np.ones((2, 1)), (3, 40), capacity=9)
    wide = build_prior(np.array([[0, code] for code in range(9)]), np.ones((2, 9)), (3, 40), capacity=9)
    again = build_prior(CODES[:1], np.ones((2, 1)), (3, 40), capacity=9, like=wide)
    assert (fewer.branching[1], wide.branching[1], again.branching[1]) == (8, 16, 16)
