"""Packed attention against the literal mask that it never builds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.nn.attention import TargetAttention, masked_softmax, packed_attention

B, L, M, S, N, H = 2, 3, 4, 5, 2, 8


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def literal(query, key, value, mask):
    """Plain attention with a full mask: query [B, X, N, H], key and value [B, Y, N, H], mask [B, X, Y]."""
    scores = jnp.einsum("BXNH,BYNH->BNXY", query, key) / jnp.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BNXY,BYNH->BXNH", weights, value)


def literal_mask(context_mask):
    """[B, S + L*M, S + L*M]: a token sees the context and the earlier tokens of its own target (RankGR Eq. 7)."""
    mask = np.zeros((B, S + L * M, S + L * M), bool)
    for b in range(B):
        for one in range(L):
            for token in range(M):
                row = S + one * M + token
                mask[b, row, :S] = context_mask[b]
                mask[b, row, S + one * M : row + 1] = True
    return jnp.asarray(mask)


def test_packed_attention_is_attention_under_the_literal_mask():
    query, own_key, own_value = (draw(B, L, M, N, H, seed=seed) for seed in range(3))
    key, value = draw(B, S, N, H, seed=3), draw(B, S, N, H, seed=4)
    context_mask = jnp.array([[True, True, False, True, True], [True, False, False, False, True]])
    out = packed_attention(query, context=(key, value), context_mask=context_mask, own=(own_key, own_value))

    def joined(context, own):
        return jnp.concatenate([context, own.reshape(B, L * M, N, H)], axis=1)

    full = literal(joined(draw(B, S, N, H), query), joined(key, own_key), joined(value, own_value),
                   literal_mask(np.asarray(context_mask)))  # fmt: skip
    np.testing.assert_allclose(out.reshape(B, L * M, N, H), full[:, S:], atol=1e-5)


def test_one_more_token_at_a_time_is_the_whole_target():
    query, key, value = (draw(B, L, M, N, H, seed=seed) for seed in range(3))
    context = draw(B, S, N, H, seed=3), draw(B, S, N, H, seed=4)
    whole = packed_attention(query, context=context, own=(key, value))
    for token in range(M):
        seen = key[:, :, : token + 1], value[:, :, : token + 1]
        step = packed_attention(query[:, :, token : token + 1], context=context, own=seen)
        np.testing.assert_allclose(step[:, :, 0], whole[:, :, token], atol=1e-5)


def test_targets_do_not_see_each_other():
    query, key, value = (draw(B, L, M, N, H, seed=seed) for seed in range(3))
    before = packed_attention(query, own=(key, value))
    after = packed_attention(query, own=(key.at[:, 1].add(1.0), value.at[:, 1].add(1.0)))
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert not np.allclose(before[:, 1], after[:, 1])


def test_nothing_to_look_at_gives_zeros_and_finite_gradients():
    query, context = draw(B, L, M, N, H), (draw(B, S, N, H), draw(B, S, N, H))
    nothing = jnp.zeros((B, S), bool)
    out, gradient = jax.value_and_grad(
        lambda q: packed_attention(q, context=context, context_mask=nothing).sum()
    )(query)  # fmt: skip
    assert out == 0
    assert jnp.isfinite(gradient).all()


def test_masked_softmax_by_hand():
    weights = masked_softmax(jnp.log(jnp.array([1.0, 3.0, 5.0])), jnp.array([True, True, False]))
    np.testing.assert_allclose(weights, [0.25, 0.75, 0.0], rtol=1e-6)


@pytest.mark.parametrize("part", ["context", "own", "both"])
def test_block_adds_its_output_to_its_input(part):
    block, x, memory = TargetAttention(N, H), draw(B, L, M, N * H), draw(B, S, N * H)

    def run(module, x, memory):
        context = module.context_kv(memory) if part != "own" else None
        return module(x, context, None, module.own_kv(x) if part != "context" else None)

    variables = block.init(jax.random.key(0), x, memory, method=run)
    silent = jax.tree.map(jnp.zeros_like, variables)
    np.testing.assert_array_equal(block.apply(silent, x, memory, method=run), x)
    assert not np.allclose(block.apply(variables, x, memory, method=run), x)


def test_masked_softmax_has_the_gradient_of_its_formula():
    scores = jax.random.normal(jax.random.key(0), (3, 5))
    mask = jnp.array([[True, False, True, True, True], [True] * 5, [False] * 5])
    weight = jnp.arange(15.0).reshape(3, 5)

    def plain(scores):
        powers = jnp.where(mask, jnp.exp(scores), 0.0)
        return (weight * powers / jnp.maximum(powers.sum(1, keepdims=True), 1e-30)).sum()

    ours = jax.grad(lambda scores: (weight * masked_softmax(scores, mask)).sum())(scores)
    assert jnp.allclose(ours, jax.grad(plain)(scores), atol=1e-6)
    assert not ours[2].any()
