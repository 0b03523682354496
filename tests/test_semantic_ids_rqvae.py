"""RQ-VAE: Eq. 3 and its gradients by hand, that it learns, and that its codebooks do not collapse."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.config import UserError
from jaxrec.semantic_ids.quantizers import residual, rqvae
from jaxrec.semantic_ids.quantizers.residual import ResidualConfig
from jaxrec.semantic_ids.quantizers.rqvae import RqVae, RqVaeConfig

QUICK = RqVaeConfig((16, 16, 16), hidden=(32, 24, 16), latent_width=8, warm_steps=100, steps=300, batch_size=128)
TINY = replace(QUICK, sizes=(4, 4), hidden=(6,), latent_width=3, warm_steps=4, steps=6, batch_size=8)


@pytest.fixture(scope="module")
def planted():
    """[2000, 24]: the sum of a far, a nearer and a near vector, of 16 each, in a bent 6-d space."""
    rng = np.random.default_rng(0)
    latent = sum(rng.normal(size=(16, 6))[rng.integers(0, 16, 2000)] * size for size in (3.0, 1.5, 0.7))
    x = np.tanh(latent @ rng.normal(size=(6, 24)) / 6) + rng.normal(size=(2000, 24)) * 0.02
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def fitted(planted):
    return rqvae.fit(jax.random.key(0), planted, QUICK)


def error(fitted, x, levels=None):
    codes = np.asarray(rqvae.encode(fitted, x))[:, :levels]
    return ((x - np.asarray(rqvae.decode(fitted, codes))) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()


def used(fitted, x):
    """The share of its codes that each level uses."""
    codes = np.asarray(rqvae.encode(fitted, x))
    return np.array([len(np.unique(level)) / k for level, k in zip(codes.T, fitted.sizes, strict=True)])


def by_hand():
    """Two levels: x, reconstruction, residuals [1, 2, 2], chosen [1, 2, 2], and the loss for beta = 0.25."""
    x, reconstruction = jnp.array([[1.0, 2]]), jnp.array([[0.0, 4]])  # 1 + 4 = 5
    residuals = jnp.array([[[3.0, 0], [1, 1]]])
    chosen = jnp.array([[[2.0, -1], [0, 3]]])  # level 0: 1 + 1 = 2; level 1: 1 + 4 = 5
    return x, reconstruction, residuals, chosen, 5 + 7 + 0.25 * 7


def test_equation_3_by_hand():
    *inputs, expected = by_hand()
    np.testing.assert_allclose(rqvae.loss(*inputs, 0.25), [expected])
    twice = [jnp.concatenate([each, each]) for each in inputs]
    np.testing.assert_allclose(rqvae.loss(*twice, 0.25, where=jnp.array([False, True])), [0, expected])


def test_masked_rows_give_zero_and_no_gradient():
    x, reconstruction, residuals, chosen, _ = by_hand()
    total = lambda r: rqvae.loss(x, r, residuals, chosen, 0.25, where=jnp.array([False])).sum()  # noqa: E731
    assert total(reconstruction * jnp.inf) == 0
    np.testing.assert_array_equal(jax.grad(total)(reconstruction), 0)


def test_each_term_moves_its_own_side():
    x, reconstruction, residuals, chosen, _ = by_hand()
    of_residuals, of_chosen = jax.grad(lambda r, e: rqvae.loss(x, reconstruction, r, e, 0.25).sum(), (0, 1))(
        residuals, chosen
    )
    np.testing.assert_allclose(of_residuals, 0.25 * 2 * (residuals - chosen))  # beta ||r - sg[e]||^2
    np.testing.assert_allclose(of_chosen, 2 * (chosen - residuals))  # ||sg[r] - e||^2


def test_quantization_by_hand():
    books = (jnp.array([[0.0, 0], [10, 0]]), jnp.array([[0.0, 1], [0, -1]]))
    codes, residuals, chosen = rqvae.quantize(books, jnp.array([[9.5, 1.2], [0.3, -4.0]]))
    np.testing.assert_array_equal(codes, [[1, 0], [0, 1]])
    np.testing.assert_allclose(residuals, [[[9.5, 1.2], [-0.5, 1.2]], [[0.3, -4], [0.3, -4]]])
    np.testing.assert_allclose(chosen, [[[10, 0], [0, 1]], [[0, 0], [0, -1]]])


def test_gradient_goes_straight_through_the_codes():
    books = (jnp.array([[0.0, 0], [10, 0]]), jnp.array([[0.0, 1], [0, -1]]))
    weights = jnp.array([2.0, -3])

    def through(latents, books):
        _, _, chosen = rqvae.quantize(books, latents)
        return jnp.sum(rqvae.straight_through(latents, chosen) ** 2 @ weights)

    latents = jnp.array([[9.5, 1.2]])
    of_latents, of_books = jax.grad(through, (0, 1))(latents, books)
    np.testing.assert_allclose(through(latents, books), 2 * 100 - 3 * 1)  # the value is the codes' sum, (10, 1)
    np.testing.assert_allclose(of_latents, [[2 * 2 * 10, 2 * -3 * 1]])  # the gradient there, handed on
    assert all((gradient == 0).all() for gradient in of_books)


def test_a_residuals_gradient_goes_to_the_latent_alone():
    books = (jnp.array([[0.0, 0], [10, 0]]), jnp.array([[0.0, 1], [0, -1]]))
    second = lambda latents, books: rqvae.quantize(books, latents)[1][:, 1].sum()  # noqa: E731
    of_latents, of_books = jax.grad(second, (0, 1))(jnp.array([[9.5, 1.2]]), books)
    np.testing.assert_array_equal(of_latents, [[1, 1]])
    assert all((gradient == 0).all() for gradient in of_books)


def test_codes_follow_their_residuals_by_hand():
    book, counts = jnp.array([[1.0, 1], [5, 5]]), jnp.array([2.0, 1])
    moved, found = rqvae.follow(book, counts, jnp.array([[3.0, 1], [5, 1]]), jnp.array([0, 0]), 0.5)
    # Code 0: count (2 + 2) / 2 = 2, sum ((2, 2) + (8, 2)) / 2 = (5, 2). Code 1: nothing new.
    np.testing.assert_allclose(moved, [[2.5, 1], [5, 5]])
    np.testing.assert_allclose(found, [2, 0.5])


def test_idle_codes_move_to_residuals_of_the_batch():
    book, counts, idle = jnp.zeros((3, 2)), jnp.array([1.0, 2, 3]), jnp.array([4, 5, 6])
    residuals = jnp.arange(1.0, 13).reshape(6, 2)
    moved, found, waited = rqvae.revive(jax.random.key(0), book, counts, idle, residuals, 5)
    np.testing.assert_array_equal(moved[0], [0, 0])
    assert all((np.asarray(residuals) == row).all(1).any() for row in np.asarray(moved[1:]))
    np.testing.assert_allclose(found, [1, 2, 2])
    np.testing.assert_array_equal(waited, [4, 0, 0])


@pytest.mark.parametrize("changed", [{}, {"ema_decay": 0.99}, {"linear": False}, {"linear": False, "warm_steps": 0}])
def test_every_level_uses_its_codes(planted, fitted, changed):
    if changed:
        fitted = rqvae.fit(jax.random.key(0), planted, replace(QUICK, **changed))
    assert (used(fitted, planted) > 0.9).all()


@pytest.mark.parametrize("decay", [0.0, 0.99])
def test_codebooks_come_back_from_collapse(planted, decay):
    params = rqvae.init(jax.random.key(0), jnp.asarray(planted), QUICK)
    mean, scale = rqvae.centre_and_scale(jnp.asarray(planted))
    # All codes but the first lie where no latent will ever be.
    collapsed = tuple(jnp.full((16, 8), 1e3).at[0].set(0) for _ in range(3))
    shares = []
    for after in (20, 10**6):
        config = replace(QUICK, revive_after=after, steps=200, ema_decay=decay)
        keys = jax.random.split(jax.random.key(1), config.steps)
        state = rqvae.begin(jax.tree.map(jnp.copy, params), collapsed, len(planted), config)
        state = rqvae.train(config, jax.tree.map(jnp.copy, state), (planted - mean) / scale, keys)
        shares.append(used(RqVae(state.params, state.codebooks, mean, scale), planted))
    assert (shares[0] > 0.9).all()
    assert (shares[1] < 0.1).all()


def test_error_falls_with_each_level_and_with_training(planted, fitted):
    errors = [error(fitted, planted, levels) for levels in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    # It bends with the data, which k-means cannot.
    flat = residual.fit(jax.random.key(0), planted, ResidualConfig(QUICK.sizes))
    left = planted - residual.decode(flat, residual.encode(flat, planted))
    assert errors[2] < (left**2).sum() / ((planted - planted.mean(0)) ** 2).sum()


@pytest.mark.parametrize("linear", [True, False])
def test_training_lowers_the_error(planted, linear):
    few, many = (
        error(rqvae.fit(jax.random.key(0), planted, replace(QUICK, linear=linear, warm_steps=n // 3, steps=n)), planted)
        for n in (10, 300)
    )
    # The linear path starts near the end.
    assert many < (0.85 if linear else 0.5) * few


def test_shapes(planted, fitted):
    assert (fitted.sizes, fitted.width) == ((16, 16, 16), 24)
    codes = rqvae.encode(fitted, planted)
    assert (codes.shape, codes.dtype) == ((2000, 3), jnp.int32)
    np.testing.assert_array_equal(rqvae.encode(fitted, planted), codes)
    for levels in (1, 2, 3):
        vectors = rqvae.decode(fitted, codes[:, :levels])
        assert (vectors.shape, vectors.dtype) == ((2000, 24), jnp.float32)


def test_encoding_and_decoding_are_plain_numpys(planted, fitted):
    def dense(layers, x):
        start = x
        for i in range(4):
            x = x @ np.asarray(layers[f"layer_{i}"]["kernel"], np.float64) + np.asarray(layers[f"layer_{i}"]["bias"])
            x = np.maximum(x, 0) if i < 3 else x
        return x + start @ np.asarray(layers["linear"]["kernel"])

    mean, scale = np.asarray(fitted.mean, np.float64), float(fitted.scale)
    rest, total, codes = dense(fitted.params["encoder"], (planted - mean) / scale), 0.0, []
    for book in np.asarray(fitted.codebooks, np.float64):
        codes.append(((rest[:, None] - book) ** 2).sum(-1).argmin(1))
        rest, total = rest - book[codes[-1]], total + book[codes[-1]]
    codes = np.stack(codes, axis=1)
    assert (codes == np.asarray(rqvae.encode(fitted, planted))).mean() > 0.999
    expected = dense(fitted.params["decoder"], total) * scale + mean
    np.testing.assert_allclose(rqvae.decode(fitted, codes), expected, atol=1e-4)


def test_the_same_key_gives_the_same_bits(planted, fitted):
    jax.tree.map(np.testing.assert_array_equal, rqvae.fit(jax.random.key(0), planted, QUICK), fitted)


@pytest.mark.parametrize("scale", [1e-9, 1e12])
def test_any_scale_of_the_data_is_the_same_problem(planted, fitted, scale):
    x = ((planted + 2) * scale).astype(np.float32)
    other = rqvae.fit(jax.random.key(0), x, QUICK)
    codes = rqvae.encode(other, x)
    share = np.sum((x / scale - rqvae.decode(other, codes) / scale) ** 2) / np.sum((planted - planted.mean(0)) ** 2)
    assert share < 2 * error(fitted, planted)
    assert (used(other, x) > 0.9).all()


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=3),
    hidden=st.lists(st.integers(1, 6), max_size=2),
    width=st.integers(1, 5),
    rows=st.integers(5, 12),
)
def test_any_shape(sizes, hidden, width, rows):
    x = np.random.default_rng(rows).normal(size=(rows, width)).astype(np.float32)
    config = replace(TINY, sizes=tuple(sizes), hidden=tuple(hidden))
    fitted = rqvae.fit(jax.random.key(0), x, config)
    codes = np.asarray(rqvae.encode(fitted, x))
    assert codes.shape == (rows, len(sizes)) and fitted.sizes == tuple(sizes)
    assert (codes >= 0).all() and (codes < sizes).all()
    assert np.isfinite(rqvae.decode(fitted, codes)).all()


@pytest.mark.parametrize(
    "x", [np.full((20, 4), 0.1, np.float32), np.zeros((20, 4), np.float32), np.repeat(np.eye(4), 5, axis=0)]
)
@pytest.mark.parametrize("decay", [0.0, 0.99])
def test_fewer_distinct_rows_than_codes(x, decay):
    x = x.astype(np.float32)
    fitted = rqvae.fit(jax.random.key(0), x, replace(TINY, sizes=(8, 8), warm_steps=30, steps=60, ema_decay=decay))
    codes = np.asarray(rqvae.encode(fitted, x))
    decoded = np.asarray(rqvae.decode(fitted, codes))
    assert len(np.unique(codes, axis=0)) == len(np.unique(x, axis=0))
    if (x == x[0]).all():
        np.testing.assert_allclose(decoded, x, atol=0.2)
    assert np.isfinite(decoded).all()


def test_bad_input_is_named(planted, fitted):
    key = jax.random.key(0)
    for changed, message in (
        ({"sizes": ()}, "at least one level"),
        ({"sizes": (4, 1)}, "each of 2 codes or more"),
        ({"sizes": (4096,)}, "2000 rows cannot fill a codebook of 4096"),
        ({"hidden": (4, 0)}, r"hidden=\(4, 0\).*1 or more"),
    ):
        with pytest.raises(UserError, match=message):
            rqvae.fit(key, planted, replace(TINY, **changed))
    with pytest.raises(UserError, match="1 rows cannot fill"):
        rqvae.fit(key, planted[:1], TINY)
    broken = planted.copy()
    broken[7, 3] = np.nan
    for call in (lambda: rqvae.fit(key, broken, TINY), lambda: rqvae.encode(fitted, broken)):
        with pytest.raises(UserError, match=r"row 7 .*NaN"):
            call()
    with pytest.raises(UserError, match="5 wide"):
        rqvae.encode(fitted, planted[:, :5])
