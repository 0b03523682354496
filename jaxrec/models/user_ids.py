"""User IDs out of what a user took (OneSearch Eq. 3), and hashed ones (TIGER), which know nothing of it."""

import jax
import jax.numpy as jnp


def user_ids(codes: jax.Array, mask: jax.Array) -> jax.Array:
    """The weighted mean of items' codes, level by level and rounded up, as int32 [..., M].

        SID = ceil(sum over i of lambda_i * SID_i),    lambda_i = exp(sqrt(i)) / sum over i of exp(sqrt(i))

    codes int32 [..., T, M] of items in order, the latest last, where mask bool [..., T]; i counts the items that are
    there from 1. A mean of codes is no larger than the largest, so it stays inside the codebook. Without an item all
    are 0.

    >>> user_ids(jnp.array([[0, 7], [4, 7]]), jnp.array([True, True]))
    Array([3, 7], dtype=int32)
    """
    place = jnp.cumsum(mask, axis=-1)
    # Weights relative to the last item's: exp(sqrt(i)) itself grows without bound.
    weight = jnp.where(mask, jnp.exp(jnp.sqrt(place) - jnp.sqrt(place[..., -1:])), 0.0)
    weight /= jnp.maximum(weight.sum(-1, keepdims=True), 1e-30)
    mean = jnp.einsum("...T,...TM->...M", weight, codes.astype(jnp.float32))
    # Float32: the mean of equal codes may come out a little above them.
    return jnp.ceil(mean - 1e-3).astype(jnp.int32)


def hashed_ids(users: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """A code of every level for users int32 [B], int32 [B, M]: MurmurHash3's finaliser of the user and the level."""
    x = users.astype(jnp.uint32)[:, None] * jnp.uint32(len(sizes)) + jnp.arange(len(sizes), dtype=jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return ((x ^ (x >> 16)) % jnp.array(sizes, jnp.uint32)).astype(jnp.int32)
