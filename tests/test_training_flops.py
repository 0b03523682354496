"""Counting floating-point operations, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxrec.training.flops import matmul_flops

X = jnp.ones((3, 4))
Y = jnp.ones((4, 5))
ONE = 2 * 3 * 4 * 5  # X @ Y


def scanned(x, y):
    def step(carry, _):
        return carry, carry @ y

    return jax.lax.scan(step, x, None, length=7)


def scanned_twice(x, y):
    def outer(carry, _):
        return carry, scanned(carry, y)[1].sum()

    return jax.lax.scan(outer, x, None, length=2)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, y: x @ y, ONE),
        (lambda x, y: jnp.tanh(x).sum() + y.mean(), 0),
        (lambda x, y: jnp.einsum("ij,jk->ki", x, y), ONE),
        (lambda x, y: jax.jit(lambda a: jax.jit(jnp.dot)(a, y) + 1)(x), ONE),
        (scanned, 7 * ONE),
        (scanned_twice, 14 * ONE),
        (lambda x, y: jax.checkpoint(jnp.dot)(x, y), ONE),
        (lambda x, y: jax.vmap(lambda row: row @ y)(x), ONE),
        # forward; the gradient of each factor: three products of the same size
        (lambda x, y: jax.grad(lambda a, b: jnp.square(a @ b).sum(), (0, 1))(x, y), 3 * ONE),
    ],
    ids=["product", "none", "einsum", "nested jit", "scan", "scan in scan", "remat", "vmap", "gradient"],
)
def test_by_hand(function, expected):
    assert matmul_flops(function, X, Y) == expected


def test_a_batched_einsum():
    left, right = jnp.ones((6, 2, 3, 4)), jnp.ones((6, 2, 5, 4))
    # for each of 6 * 2: [3, 4] x [4, 5]
    assert matmul_flops(lambda a, b: jnp.einsum("bnsh,bnth->bnst", a, b), left, right) == 12 * ONE


def test_a_contraction_over_two_axes():
    assert matmul_flops(lambda a, b: jnp.einsum("ijk,jkl->il", a, b), jnp.ones((2, 3, 4)), jnp.ones((3, 4, 5))) == (
        2 * 2 * 12 * 5
    )


def test_ragged_dot_counts_the_rows_once():
    x, experts, sizes = jnp.ones((8, 4)), jnp.ones((3, 4, 5)), jnp.array([5, 0, 3])
    assert matmul_flops(jax.lax.ragged_dot, x, experts, sizes) == 2 * 8 * 4 * 5


def test_shapes_are_enough_and_nothing_is_run():
    def refuse(x, y):
        jax.debug.callback(lambda: pytest.fail("it was run"))
        return x @ y

    shapes = [jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((4, 5), jnp.float32)]
    assert matmul_flops(refuse, *shapes) == ONE
