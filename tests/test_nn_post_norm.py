"""BART's parts by hand, and an encoder-decoder of them against a plain one that runs every target by itself."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.models.encoder_decoder import EncoderDecoder, bart_config
from jaxrec.models.vocabulary import ContextTokens
from jaxrec.nn.layers import LayerNorm
from jaxrec.nn.post_norm import LearnedPositions, PostNormEncoderLayer
from jaxrec.nn.transformer import FeedForwardBlock

LEVELS = ((3, 4), (7, 3), (12, 5))
CONFIG = bart_config(
    vocabulary=20, width=12, heads=2, head_dim=6, hidden=10, encoder_layers=2, layers=2, levels=LEVELS, max_positions=16
)
B, S, L = 2, 9, 4
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 20, (B, S)), jnp.int32)
MASK = jnp.arange(S) < jnp.array([[S], [5]])
TARGETS = jnp.asarray(np.random.default_rng(1).integers(0, (4, 3, 5), (B, L, 3)), jnp.int32)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


# ---- parts by hand ---------------------------------------------------------------------------------------------------


def test_layer_norm_by_hand():
    """(1, 2, 3) has the mean 2 and the variance 2/3."""
    variables = {"params": {"scale": jnp.array([1.0, 2.0, 3.0]), "bias": jnp.array([0.0, 0.5, -1.0])}}
    found = LayerNorm(0.0).apply(variables, jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(found, [-(1.5**0.5), 0.5, 3 * 1.5**0.5 - 1], rtol=1e-6)
    wide = LayerNorm().apply(variables, jnp.array([1000.0, 1001.0, 1002.0], jnp.bfloat16))
    assert wide.dtype == jnp.bfloat16


def test_positions_begin_behind_the_two_rows_that_none_has():
    table = draw(2 + 4, 3)
    found = LearnedPositions(4, 3).apply({"params": {"table": table}}, jnp.array([[0, 3]]))
    np.testing.assert_array_equal(found, table[None, [2, 5]])


def test_the_exact_gelu_with_biases_and_no_norm():
    module, x, up, down, bias, out = (
        FeedForwardBlock(7, "gelu_erf", bias=True, pre_norm=False),
        *(draw(*shape, seed=seed) for seed, shape in enumerate([(2, 5), (5, 7), (7, 5), (7,), (5,)])),
    )
    params = {"up": {"weight": up, "bias": bias}, "down": {"weight": down, "bias": out}}
    hidden = np.asarray(x @ up + bias)
    hidden = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / np.sqrt(2)))
    np.testing.assert_allclose(module.apply({"params": params}, x), x + hidden @ down + out, atol=1e-5)


def test_a_layer_whose_blocks_add_nothing_normalises_x_twice_at_any_rate():
    """Post-norm: x itself is not passed on, LayerNorm(LayerNorm(x)) is; dropout has nothing to take."""
    layer, x = PostNormEncoderLayer(12, 2, 6, 10), draw(2, 5, 12)
    mask = jnp.ones((2, 5), bool)

    def keep(before, after):
        return before + 10 * jax.random.bernoulli(jax.random.key(3), 0.1, before.shape) * (after - before)

    variables = nn.unbox(layer.init(jax.random.key(0), x, mask, None, keep))
    clear = jax.tree.map_with_path(
        lambda path, leaf: leaf * (not any(part in jax.tree_util.keystr(path) for part in ("'out'", "'down'"))),
        variables,
    )
    normed = nn.LayerNorm(epsilon=1e-5).apply({"params": {"scale": jnp.ones(12), "bias": jnp.zeros(12)}}, x)
    np.testing.assert_allclose(layer.apply(clear, x, mask, None, keep), normed, atol=2e-5)
    assert np.abs(layer.apply(variables, x, mask, None, keep) - normed).max() > 0.1


# ---- a plain BART ----------------------------------------------------------------------------------------------------


@functools.cache
def make():
    model = EncoderDecoder(CONFIG)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), ContextTokens(TOKENS, MASK), TARGETS))["params"]
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    noise = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return model, jax.tree.map(lambda p, key: p + 0.3 * jax.random.normal(key, p.shape), params, noise)


@functools.cache
def compiled():
    model = make()[0]

    @jax.jit
    def run(params, tokens, mask, targets):
        context = model.apply({"params": params}, ContextTokens(tokens, mask), method="prefill")
        return model.apply({"params": params}, context, targets, method="score").log_probs

    return run


def plain_norm(x, part):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * part["scale"] + part["bias"]


def plain_linear(x, part):
    """[X, D] -> [X, outputs], heads side by side."""
    return x @ part["weight"].reshape(x.shape[-1], -1) + part["bias"].reshape(-1)


def plain_attention(x, read, part, mask):
    """x [X, D] attends to read [Y, D] under mask [X, Y]; the residual included."""
    query, key, value = (
        plain_linear(each, part[name]).reshape(len(each), CONFIG.heads, -1)
        for name, each in (("query", x), ("key", read), ("value", read))
    )
    scores = jnp.einsum("XNH,YNH->NXY", query, key) / np.sqrt(CONFIG.head_dim)
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1)
    return x + plain_linear(jnp.einsum("NXY,YNH->XNH", weights, value).reshape(len(x), -1), part["out"])


def plain_feed_forward(x, layer):
    hidden = jax.nn.gelu(plain_linear(x, layer["feed_forward"]["up"]), approximate=False)
    return plain_norm(x + plain_linear(hidden, layer["feed_forward"]["down"]), layer["feed_forward_norm"])


def plain_side(params, side, tokens):
    positions = params[f"{side}_positions"]["table"][2 : 2 + len(tokens)]
    return plain_norm(params["embed"]["table"][tokens] + positions, params[f"{side}_norm"])


def plain_score(params, tokens, codes):
    """Log-probabilities [M] of one target after one context without padding."""
    x = plain_side(params, "encoder", tokens)
    for i in range(CONFIG.encoder_layers):
        layer = params[f"encoder_{i}"]
        x = plain_norm(plain_attention(x, x, layer["attention"], True), layer["attention_norm"])
        x = plain_feed_forward(x, layer)
    memory, wanted = x, codes + jnp.array([offset for offset, _ in LEVELS])
    x = plain_side(params, "decoder", jnp.concatenate([jnp.array([CONFIG.start_token]), wanted[:-1]]))
    for i in range(CONFIG.layers):
        layer = params[f"decoder_{i}"]
        causal = jnp.tril(jnp.ones((len(x), len(x)), bool))
        x = plain_norm(plain_attention(x, x, layer["attention"], causal), layer["attention_norm"])
        x = plain_norm(plain_attention(x, memory, layer["cross"], True), layer["cross_norm"])
        x = plain_feed_forward(x, layer)
    logits = x @ params["embed"]["table"].T + params["logits_bias"]
    return jnp.stack(
        [
            logits[level, wanted[level]] - jax.nn.logsumexp(logits[level, offset : offset + size])
            for level, (offset, size) in enumerate(LEVELS)
        ]
    )


def test_packed_scores_and_gradients_are_those_of_every_target_by_itself():
    _, params = make()
    weights = draw(*TARGETS.shape, seed=2)

    def run(params):
        found = compiled()(params, TOKENS, MASK, TARGETS)
        return (found * weights).sum(), found

    def plain(params):
        one = jax.vmap(plain_score, (None, None, 0))
        found = jnp.stack([one(params, TOKENS[b][: (S, 5)[b]], TARGETS[b]) for b in range(B)])
        return (found * weights).sum(), found

    (_, found), gradient = jax.value_and_grad(run, has_aux=True)(params)
    (_, expected), expected_gradient = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not gradient.pop("logits_bias").any(), "is not trained"
    assert expected_gradient.pop("logits_bias").any()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4), gradient, expected_gradient)


def test_padding_on_the_left_changes_nothing():
    """Positions are those of real tokens."""
    _, params = make()
    expected = compiled()(params, TOKENS, MASK, TARGETS)
    left = compiled()(params, jnp.roll(TOKENS, 4, axis=1), jnp.roll(MASK, 4, axis=1), TARGETS)
    np.testing.assert_allclose(left[1], expected[1], atol=1e-5)


def test_what_is_longer_than_the_positions_is_refused():
    model, params = make()
    long = ContextTokens(jnp.ones((1, 17), jnp.int32), jnp.ones((1, 17), bool))
    with pytest.raises(UserError, match=r"a context has 17 tokens, but model\.max_positions is 16"):
        model.apply({"params": params}, long, method="prefill")
    with pytest.raises(UserError, match=r"'model\.style' is 'gpt'"):
        dataclasses.replace(CONFIG, style="gpt")
