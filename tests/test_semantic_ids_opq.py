"""Optimized product quantization: its two steps by hand and against NumPy, and that the rotation pays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.config import UserError
from jaxrec.semantic_ids.quantizers import opq
from jaxrec.semantic_ids.quantizers.kmeans import KMeansConfig, kmeans
from jaxrec.semantic_ids.quantizers.opq import Opq, OpqConfig

QUICK = OpqConfig((16, 16), rotations=8, finish=KMeansConfig(iterations=8))


def random_rotation(rng, width):
    return np.linalg.qr(rng.normal(size=(width, width)))[0]


def squared_error(fitted, x):
    return ((x - np.asarray(opq.decode(fitted, opq.encode(fitted, x)))) ** 2).sum()


@pytest.fixture(scope="module")
def correlated():
    """1500 rows [1500, 8] whose variance lies in few directions, none along an axis, far from zero."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 8)) * np.geomspace(4, 0.1, 8) @ random_rotation(rng, 8)
    return (x + 3).astype(np.float32)


@pytest.fixture(scope="module")
def fitted(correlated):
    return opq.fit(jax.random.key(0), correlated, QUICK)


def test_shapes_and_rotation(correlated, fitted):
    assert (fitted.sizes, fitted.width) == ((16, 16), 8)
    assert [book.shape for book in fitted.codebooks] == [(16, 4), (16, 4)]
    codes = opq.encode(fitted, correlated)
    assert (codes.shape, codes.dtype) == ((1500, 2), jnp.int32)
    assert (opq.decode(fitted, codes).shape, opq.decode(fitted, codes).dtype) == ((1500, 8), jnp.float32)
    rotation = np.asarray(fitted.rotation, np.float64)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(8), atol=1e-5)


def test_codes_are_the_nearest_in_each_subspace(correlated, fitted):
    rotated = correlated.astype(np.float64) @ np.asarray(fitted.rotation, np.float64)
    codes = np.asarray(opq.encode(fitted, correlated))
    for part, book, mine in zip(np.split(rotated, 2, axis=1), fitted.codebooks, codes.T, strict=True):
        distances = ((part[:, None] - np.asarray(book, np.float64)) ** 2).sum(-1)
        np.testing.assert_allclose(distances[np.arange(1500), mine], distances.min(1), rtol=1e-3, atol=1e-4)
        assert (distances.argmin(1) == mine).mean() > 0.999
    np.testing.assert_array_equal(opq.encode(fitted, correlated), codes)


def test_decoding_by_hand():
    turn = jnp.array([[0.0, 1], [-1, 0]])  # x @ turn = (-x2, x1)
    fitted = Opq(turn, (jnp.array([[-2.0], [5]]), jnp.array([[1.0], [7]])))
    np.testing.assert_allclose(opq.decode(fitted, np.array([[0, 0], [1, 1]])), [[1, 2], [7, -5]])
    np.testing.assert_array_equal(opq.encode(fitted, np.array([[1, 2], [6, -5]], np.float32)), [[0, 0], [1, 1]])
    # The second sub-space is not known yet: the middle of its codes, 4.
    np.testing.assert_allclose(opq.decode(fitted, np.array([[1]])), [[4, -5]])


def test_codes_stand_for_themselves(fitted):
    codes = np.stack(np.meshgrid(range(16), range(16)), -1).reshape(-1, 2)
    np.testing.assert_array_equal(opq.encode(fitted, opq.decode(fitted, codes)), codes)


def test_no_worse_than_product_quantization(correlated, fitted):
    plain = 0.0
    for j, part in enumerate(np.split(correlated, 2, axis=1)):
        plain += float(kmeans(jax.random.key(j), part, 16).inertia)
    parametric = opq.fit(jax.random.key(0), correlated, OpqConfig((16, 16), rotations=0))
    assert squared_error(fitted, correlated) < squared_error(parametric, correlated) * 1.02
    assert squared_error(fitted, correlated) < 0.8 * plain


def test_rotating_finds_sub_spaces_that_the_principal_components_do_not():
    rng = np.random.default_rng(1)
    # Two independent sets of 8 corners, equally spread in all directions: the covariance is the identity.
    corners = np.array(list(np.ndindex(2, 2, 2))) * 2.0 - 1
    picked = np.concatenate([corners[rng.integers(0, 8, 2000)], corners[rng.integers(0, 8, 2000)]], axis=1)
    x = ((picked + rng.normal(size=(2000, 6)) * 0.05) @ random_rotation(rng, 6)).astype(np.float32)
    # From some starts the turns end in a local optimum, so the best of a few counts.
    parametric, rotated = (
        min(
            squared_error(opq.fit(jax.random.key(seed), x, OpqConfig((8, 8), rotations=rotations)), x)
            for seed in range(4)
        )
        for rotations in (0, 10)
    )
    noise = 2000 * 6 * 0.05**2
    assert parametric > 10 * noise
    assert rotated < 1.1 * noise


def test_procrustes_by_hand():
    x = np.array([[1.0, 0], [0, 2], [3, 1]])
    turn = np.array([[0.0, 1], [-1, 0]])
    np.testing.assert_allclose(opq.nearest_rotation(x.T @ (x @ turn)), turn, atol=1e-12)
    # A stretch is undone, and a mirror is orthonormal too.
    np.testing.assert_allclose(opq.nearest_rotation(np.diag([3.0, -0.5])), np.diag([1, -1]), atol=1e-12)


def test_one_alternation_is_numpys(correlated):
    rng = np.random.default_rng(2)
    x = (correlated - correlated.mean(0)).astype(np.float64)
    rotation = random_rotation(rng, 8)
    books = [part[:16] for part in np.split(x @ rotation, 2, axis=1)]
    moved, quantized = [], []
    for part, book in zip(np.split(x @ rotation, 2, axis=1), books, strict=True):
        codes = ((part[:, None] - book) ** 2).sum(-1).argmin(1)
        moved.append(np.stack([part[codes == k].mean(0) for k in range(16)]))
        quantized.append(moved[-1][codes])
    left, _, right = np.linalg.svd(x.T @ np.concatenate(quantized, axis=1))
    turned, found = opq.alternate(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(rotation, jnp.float32),
        tuple(jnp.asarray(b, jnp.float32) for b in books),
    )
    np.testing.assert_allclose(turned, left @ right, atol=1e-3)
    for mine, expected in zip(found, moved, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-3)


def test_directions_are_dealt_by_variance_and_codes():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 4)) * [8, 4, 2, 1]
    x -= x.mean(0)
    axes = lambda sizes: np.abs(opq.principal_rotation(x, sizes)).argmax(0).tolist()  # noqa: E731
    # 8 x 1 and 4 x 2: equal products. With 8 times the codes the first sub-space takes both large ones.
    assert axes((16, 16)) == [0, 3, 1, 2]
    assert axes((1024, 16)) == [0, 1, 2, 3]


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=3),
    each=st.integers(1, 3),
    rows=st.integers(5, 12),
    seed=st.integers(0, 100),
)
def test_any_shape(sizes, each, rows, seed):
    x = np.random.default_rng(seed).normal(size=(rows, each * len(sizes))).astype(np.float32)
    fitted = opq.fit(jax.random.key(seed), x, OpqConfig(tuple(sizes), rotations=2))
    codes = np.asarray(opq.encode(fitted, x))
    assert codes.shape == (rows, len(sizes)) and fitted.sizes == tuple(sizes)
    assert (codes >= 0).all() and (codes < sizes).all()
    assert squared_error(fitted, x) <= ((x - x.mean(0)) ** 2).sum() * 1.001


def test_the_same_key_gives_the_same_bits(correlated, fitted):
    jax.tree.map(np.testing.assert_array_equal, opq.fit(jax.random.key(0), correlated, QUICK), fitted)


@pytest.mark.parametrize(
    "x", [np.full((20, 4), 0.1, np.float32), np.repeat(np.eye(4, dtype=np.float32), 5, axis=0)], ids=["one", "four"]
)
def test_fewer_distinct_rows_than_codes_are_kept_exactly(x):
    fitted = opq.fit(jax.random.key(0), x, OpqConfig((8, 8), rotations=4))
    np.testing.assert_allclose(opq.decode(fitted, opq.encode(fitted, x)), x, atol=1e-5)


def test_rows_are_sampled_down(correlated):
    few = OpqConfig((16, 16), rotations=8, sample_rows=8, finish_rows=32)
    everything = squared_error(opq.fit(jax.random.key(0), correlated, QUICK), correlated)
    assert squared_error(opq.fit(jax.random.key(0), correlated, few), correlated) < 1.2 * everything


def test_bad_input_is_named(correlated, fitted):
    key = jax.random.key(0)
    for sizes, message in (
        ((4, 4, 4), r"sizes=\(4, 4, 4\).*8 does not divide by 3: give as many sizes as one of 1, 2, 4, 8"),
        ((), "at least one sub-space"),
        ((4, 1), "each of 2 codes or more"),
        ((2048, 4), "1500 rows cannot fill a codebook of 2048"),
    ):
        with pytest.raises(UserError, match=message):
            opq.fit(key, correlated, OpqConfig(sizes))
    with pytest.raises(UserError, match="1 rows cannot fill"):
        opq.fit(key, correlated[:1], QUICK)
    broken = correlated.copy()
    broken[7, 3] = np.nan
    for call in (lambda: opq.fit(key, broken, QUICK), lambda: opq.encode(fitted, broken)):
        with pytest.raises(UserError, match=r"row 7 .*NaN"):
            call()
    with pytest.raises(UserError, match="5 wide"):
        opq.encode(fitted, correlated[:, :5])
