"""Counting floating-point operations, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxrec.losses.likelihood import full_softmax
from jaxrec.training.flops import Flops, count_matmuls, matmul_flops

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


def turning(limit, begin=0, step=1):
    """x @ y in every turn of a while loop up to `limit`."""
    return lambda x, y: jax.lax.while_loop(
        lambda carry: carry[0] < limit, lambda carry: (carry[0] + step, x @ y), (begin, x @ y * 0)
    )


def down_to_zero(x, y):
    return jax.lax.while_loop(lambda c: (c[0] > 0) & (c[1] < 9), lambda c: (c[0] - 2, c[1] + 1, x @ y), (7, 0, x @ y))


def limited(x, y):
    """The limit is an argument of a compiled function, and made of others."""
    loop = jax.jit(lambda n: jax.lax.fori_loop(0, jnp.minimum(n + 2, 9), lambda i, c: c + x @ y, jnp.zeros((3, 5))))
    return loop(3)


def nested_loops(x, y):
    def outer(carry):
        return carry[0] + 1, jax.lax.map(lambda row: row @ y, x)

    return jax.lax.while_loop(lambda carry: carry[0] < 3, outer, (0, jnp.zeros((3, 5))))


@jax.custom_vjp
def by_rule(x, y):
    return x @ y


by_rule.defvjp(lambda x, y: (x @ y, (x, y)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


@jax.custom_jvp
def by_forward_rule(x, y):
    return x @ y


by_forward_rule.defjvp(lambda inputs, tangents: (by_forward_rule(*inputs), tangents[0] @ inputs[1]))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (turning(5), 6 * ONE),
        (turning(10, begin=1, step=4), 4 * ONE),
        (turning(0), ONE),
        (down_to_zero, 5 * ONE),
        (limited, 5 * ONE),
        (nested_loops, 3 * ONE),
        (lambda x, y: jax.lax.map(lambda row: row @ y, x), ONE),
        (lambda x, y: jax.lax.scan(lambda c, row: (c, turning(4)(x, y)[1]), 0, x), 15 * ONE),
        (lambda x, y: jax.lax.cond(x.sum() > 0, lambda: x @ y, lambda: 2 * x @ y), ONE),
        (lambda x, y: jax.lax.switch(1, [lambda: x @ y, lambda: jnp.zeros((3, 5))]), 0),
        (by_rule, ONE),
        (lambda x, y: jax.grad(lambda a, b: by_rule(a, b).sum(), (0, 1))(x, y), 3 * ONE),
        (by_forward_rule, ONE),
        (lambda x, y: jax.checkpoint(turning(5))(x, y), 6 * ONE),
        (lambda x, y: jax.vmap(lambda row: turning(5)(row, y)[1])(x), 6 * ONE),
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
    ids=[
        "while", "steps of four", "no turn", "two counters", "a limit handed on", "map in while", "map",
        "while in scan", "equal branches", "a known branch", "custom_vjp", "its gradient", "custom_jvp",
        "while under remat", "while under vmap", "product", "none", "einsum", "nested jit", "scan", "scan in scan",
        "remat", "vmap", "gradient",
    ],
)  # fmt: skip
def test_by_hand(function, expected):
    assert matmul_flops(function, X, Y) == expected
    assert count_matmuls(function, X, Y) == Flops(expected)


@pytest.mark.parametrize(
    ("function", "least"),
    [
        (lambda x, y: jax.lax.fori_loop(0, x.sum().astype(int), lambda i, c: c + x @ y, x @ y), ONE),
        (lambda x, y: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + x @ y, x @ y), ONE),
        (lambda x, y: jax.lax.while_loop(lambda c: ~(x @ y * c > 1).all(), lambda c: c + 1, 0), ONE),
        (lambda x, y: jax.lax.cond(x.sum() > 0, lambda: x @ y, lambda: jnp.zeros((3, 5))), 0),
        (lambda x, y: jax.jit(lambda: jax.lax.scan(lambda c, r: (jax.lax.cond(c > 0, lambda: (x @ y).sum(),
            lambda: c), c), 1.0, x))(), 0),
    ],
    ids=["limit", "condition", "product in the condition", "branches", "branches in scan"],
)  # fmt: skip
def test_what_only_the_data_decide_counts_at_its_least_and_says_so(function, least):
    assert count_matmuls(function, X, Y) == Flops(least, exact=False)


def test_a_loop_without_products_is_counted_exactly():
    def function(x, y):
        return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x @ y)

    assert count_matmuls(function, X, Y) == Flops(ONE)


def test_the_full_softmax_at_once_and_in_chunks():
    """At the size of a step on Amazon Beauty; chunks without a target are left out, so that only the data tell."""
    states, table = jax.ShapeDtypeStruct((3600, 128), jnp.float32), jax.ShapeDtypeStruct((12_101, 128), jnp.float32)
    inputs = states, table, jax.ShapeDtypeStruct((3600,), jnp.int32), jax.ShapeDtypeStruct((3600,), bool)

    def count(rows):
        return count_matmuls(lambda s, t, i, where: full_softmax(s, t, i, where=where, rows=rows), *inputs)

    assert count(0) == Flops(2.0 * 3600 * 128 * 12_101)
    assert count(256) == Flops(0.0, exact=False)


def test_a_shard_map_counts_every_device(on_devices):
    source = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from jaxrec.training.flops import matmul_flops
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
product = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(P(("a", "b")), P()), out_specs=P(("a", "b")))
print(matmul_flops(product, jnp.ones((8, 4)), jnp.ones((4, 5))))
"""
    assert float(on_devices(4, source)) == 2 * 8 * 4 * 5


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
