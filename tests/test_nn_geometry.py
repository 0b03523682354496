"""Unit length with a gradient that is always finite, and principal axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.nn.geometry import principal_axes, unit


def test_unit_length_by_hand():
    np.testing.assert_allclose(unit(jnp.array([[3.0, 4.0], [0.0, -1e-6]])), [[0.6, 0.8], [0.0, -1.0]], rtol=1e-6)


def test_zeros_stay_and_spoil_no_gradient():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_array_equal(unit(x)[0], 0)
    gradient = jax.grad(lambda x: unit(x)[:, 0].sum())(x)
    # d(a / |x|)/da = b^2 / |x|^3 and d(a / |x|)/db = -a b / |x|^3.
    np.testing.assert_allclose(gradient, [[0, 0], [16 / 125, -12 / 125]], rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_axes_by_hand(dtype):
    """Rows at +-5 along (3, 4) / 5 and at +-2 along (-4, 3) / 5."""
    x = np.array([[3, 4], [-3, -4], [-1.6, 1.2], [1.6, -1.2]], dtype)
    squares, axes = principal_axes(x)
    np.testing.assert_allclose(squares, [50, 8], rtol=1e-6)
    np.testing.assert_allclose(np.abs(axes), np.abs([[0.6, -0.8], [0.8, 0.6]]), rtol=1e-6)
    np.testing.assert_allclose(axes.T @ axes, np.eye(2), atol=1e-12)
