"""The transformer blocks against plain ones, and their formulas by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.nn.attention import packed_attention
from jaxrec.nn.layers import Projection
from jaxrec.nn.transformer import (
    CrossAttention,
    FeedForwardBlock,
    RelativeBias,
    SelfAttention,
    relative_buckets,
    rotate,
)

B, L, M, S, D, N, H = 2, 3, 4, 5, 12, 4, 6


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def literal(query, key, value, mask, bias=0.0, scale=None):
    """query [B, X, N, H], key and value [B, Y, N, H], mask [B, X, Y], bias [N, X, Y]; a softmax of every row."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("BXNH,BYNH->BNXY", query, key) * scale + bias
    return jnp.einsum("BNXY,BYNH->BXNH", jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), -1), value)


# ---- positions -------------------------------------------------------------------------------------------------------


def test_rotation_by_hand():
    """Base 100 and H = 4: the pair (0, 2) turns by the position, the pair (1, 3) by a tenth of it."""
    x = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])  # [positions, N, H]
    [[turned]] = rotate(x, jnp.array([2]), 100.0)
    cos, sin, slow_cos, slow_sin = np.cos(2), np.sin(2), np.cos(0.2), np.sin(0.2)
    expected = [cos - 3 * sin, 2 * slow_cos - 4 * slow_sin, 3 * cos + sin, 4 * slow_cos + 2 * slow_sin]
    np.testing.assert_allclose(turned, expected, rtol=1e-6)
    np.testing.assert_array_equal(rotate(x, jnp.array([0]), 100.0), x)


def test_rotated_products_depend_on_the_distance_alone():
    query, key = draw(1, N, H), draw(1, N, H, seed=1)

    def product(at, other):
        return (rotate(query, jnp.array([at]), 50.0) * rotate(key, jnp.array([other]), 50.0)).sum(-1)

    np.testing.assert_allclose(product(9, 4), product(25, 20), atol=1e-5)
    assert not np.allclose(product(9, 4), product(9, 5), atol=1e-2)


def test_rotation_keeps_the_type_and_broadcasts_positions():
    x = draw(B, L, M, N, H).astype(jnp.bfloat16)
    turned = rotate(x, jnp.arange(M)[None, None] + jnp.array([3, 8])[:, None, None], 50.0)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned[1, 2, 3], rotate(x[1, 2, 3], jnp.array(11), 50.0))


def test_buckets_of_both_sides_by_hand():
    """32 buckets: 16 a side, of which 8 are exact; from 8 on, 8 + floor(8 log(d / 8) / log(128 / 8))."""
    expected = {
        0: 0, -1: 1, -7: 7, -8: 8, -15: 9, -16: 10, -64: 14, -127: 15, -128: 15, -5000: 15,
        1: 17, 7: 23, 8: 24, 16: 26, 127: 31, 5000: 31,
    }  # fmt: skip
    found = relative_buckets(np.array(list(expected)), both_sides=True, buckets=32, max_distance=128)
    assert found.tolist() == list(expected.values())


def test_buckets_of_one_side_by_hand():
    """32 buckets, 16 of them exact; then 16 + floor(16 log(d / 16) / log(128 / 16)); later keys are in bucket 0."""
    expected = {0: 0, 5: 0, 900: 0, -1: 1, -15: 15, -16: 16, -31: 21, -64: 26, -127: 31, -128: 31, -5000: 31}
    found = relative_buckets(np.array(list(expected)), both_sides=False, buckets=32, max_distance=128)
    assert found.tolist() == list(expected.values())


def test_relative_bias_reads_the_bucket_of_each_distance():
    module = RelativeBias(heads=N, buckets=8, max_distance=20, both_sides=False)
    variables = module.init(jax.random.key(0), np.arange(2), np.arange(2))
    table = jax.tree.leaves(variables)[0]
    bias = module.apply(variables, np.array([2, 3]), np.arange(4))
    assert bias.shape == (N, 2, 4)
    np.testing.assert_array_equal(bias[:, 0], table[np.array([2, 1, 0, 0])].T)
    np.testing.assert_array_equal(bias[:, 1], table[np.array([3, 2, 1, 0])].T)


# ---- packed attention with a bias, a scale, grouped heads, a mask a target -------------------------------------------


@pytest.mark.parametrize("tokens", [M, 10], ids=["unrolled", "matrix routine"])
@pytest.mark.parametrize("group", [1, 2], ids=["every head its key", "grouped heads"])
def test_packed_attention_and_its_gradient_are_those_of_plain_attention(group, tokens):
    query = draw(B, L, tokens, N, H)
    context = draw(B, S, N // group, H, seed=1), draw(B, S, N // group, H, seed=2)
    own = draw(B, L, tokens, N // group, H, seed=3), draw(B, L, tokens, N // group, H, seed=4)
    context_mask = jnp.asarray(np.random.default_rng(5).random((B, L, S)) < 0.7)
    bias = draw(N, 1, tokens, S + tokens, seed=6)

    def packed(query, context, own, bias):
        return packed_attention(query, context=context, context_mask=context_mask, own=own, bias=bias, scale=0.7)

    def plain(query, context, own, bias):
        out = []
        for target in range(L):
            key, value = (
                jnp.repeat(jnp.concatenate([c, o[:, target]], 1), group, axis=2)
                for c, o in zip(context, own, strict=True)
            )
            seen = jnp.broadcast_to(context_mask[:, target, None], (B, tokens, S))
            causal = jnp.broadcast_to(jnp.tril(jnp.ones((tokens, tokens), bool)), (B, tokens, tokens))
            mask = jnp.concatenate([seen, causal], axis=2)
            out.append(literal(query[:, target], key, value, mask, bias[:, 0], 0.7))
        return jnp.stack(out, 1)

    weights = draw(B, L, tokens, N, H, seed=7)
    compare = [
        jax.jit(jax.value_and_grad(lambda *args, f=f: (f(*args) * weights).sum(), (0, 1, 2, 3)))(
            query, context, own, bias
        )
        for f in (packed, plain)
    ]
    np.testing.assert_allclose(packed(query, context, own, bias), plain(query, context, own, bias), atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), *compare)


def test_one_bias_for_all_tokens_of_grouped_heads():
    query, own = draw(B, L, M, N, H), (draw(B, L, M, 2, H, seed=1), draw(B, L, M, 2, H, seed=2))
    bias = draw(N, 1, 1, M, seed=3)
    whole = jnp.broadcast_to(bias, (N, 1, M, M))
    np.testing.assert_array_equal(
        packed_attention(query, own=own, bias=bias), packed_attention(query, own=own, bias=whole)
    )


def test_own_gradients_in_bfloat16_keep_their_types():
    query, key, value = (draw(B, L, M, N, H, seed=seed).astype(jnp.bfloat16) for seed in range(3))
    gradients = jax.grad(
        lambda *args: packed_attention(args[0], own=args[1:]).astype(jnp.float32).sum(), argnums=(0, 1, 2)
    )(query, key, value)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16] * 3


# ---- blocks ----------------------------------------------------------------------------------------------------------


def test_the_start_of_unscaled_attention_has_scores_of_unit_variance():
    module, x = SelfAttention(128, 8, 8, 64, scale=1.0), draw(4, 16, 128)
    query, (key, _) = module.init_with_output(jax.random.key(0), x, None, method="_project")[0]
    assert 0.7 < jnp.einsum("BXNH,BYNH->BNXY", query, key).std() < 1.3


def test_a_projection_with_a_bias():
    module, x = Projection((2, 3), (None, None, None), bias=True), draw(B, D)
    variables = {"params": {"weight": draw(D, 2, 3), "bias": draw(2, 3)}}
    expected = jnp.einsum("BD,DNH->BNH", x, variables["params"]["weight"]) + variables["params"]["bias"]
    np.testing.assert_allclose(module.apply(variables, x), expected, atol=1e-5)


def test_a_sequence_is_targets_of_one_token():
    """Causal over a sequence = the tokens of one target; both are the plain formula."""
    module = SelfAttention(D, N, 2, H, bias=True, rotary_base=100.0)
    x, positions = draw(B, S, D), jnp.broadcast_to(jnp.arange(S), (B, S))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((S, S), bool)), (B, S, S))
    variables = module.init(jax.random.key(0), x, causal, None, positions, method="sequence")
    variables = jax.tree.map(lambda p: p + 0.1 * draw(*p.shape), variables)
    whole, (key, value) = module.apply(variables, x, causal, None, positions, method="sequence")
    apart, own = module.apply(variables, x[:, None], positions=positions[:, None], method="targets")
    np.testing.assert_allclose(whole, apart[:, 0], atol=1e-5)
    np.testing.assert_allclose(key, own[0][:, 0], atol=1e-5)
    np.testing.assert_allclose(value, own[1][:, 0], atol=1e-5)


def test_targets_token_by_token_are_the_whole():
    module = SelfAttention(D, N, N, H, scale=1.0)
    x, context, bias = draw(B, L, M, D), (draw(B, S, N, H), draw(B, S, N, H, seed=1)), draw(N, 1, M, S + M)
    variables = module.init(jax.random.key(0), x, context=context, bias=bias, method="targets")
    whole, _ = module.apply(variables, x, context=context, bias=bias, method="targets")
    past = None
    for token in range(M):
        step, past = module.apply(
            variables,
            x[:, :, token : token + 1],
            context=context,
            past=past,
            bias=bias[:, :, token : token + 1, : S + token + 1],
            method="targets",
        )
        np.testing.assert_allclose(step[:, :, 0], whole[:, :, token], atol=1e-5)


def test_cross_attention_is_the_plain_formula():
    module, x, memory = CrossAttention(D, N, H, scale=1.0), draw(B, L, M, D), draw(B, S, D, seed=1)
    mask = jnp.array([[True, True, False, True, True], [True, False, False, False, True]])

    def run(module, x, memory):
        return module(x, module.key_value(memory), mask)

    variables = module.init(jax.random.key(0), x, memory, method=run)
    params = nn.unbox(variables)["params"]
    normed = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    query = jnp.einsum("BLMD,DNH->BLMNH", normed, params["query"]["weight"]).reshape(B, L * M, N, H)
    key, value = (jnp.einsum("BSD,DNH->BSNH", memory, params[part]["weight"]) for part in ("key", "value"))
    read = literal(query, key, value, jnp.broadcast_to(mask[:, None], (B, L * M, S)), scale=1.0)
    expected = x + (read.reshape(B, L, M, N * H) @ params["out"]["weight"])
    np.testing.assert_allclose(module.apply(variables, x, memory, method=run), expected, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward_is_the_plain_formula(activation, gated):
    module, x = FeedForwardBlock(7, activation, gated), draw(B, D)
    gate, up, down = draw(D, 7, seed=1), draw(D, 7), draw(7, D)
    params = {"norm": {"scale": jnp.ones(D)}, "up": {"weight": up}, "down": {"weight": down}}
    variables = {"params": params | ({"gate": {"weight": gate}} if gated else {})}
    act = {
        "relu": lambda h: np.maximum(h, 0),
        "gelu": lambda h: 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))),
        "silu": lambda h: h / (1 + np.exp(-h)),
    }[activation]
    normed = np.asarray(x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6))
    hidden = act(normed @ gate) * (normed @ up) if gated else act(normed @ up)
    np.testing.assert_allclose(module.apply(variables, x), x + hidden @ down, atol=1e-4)
