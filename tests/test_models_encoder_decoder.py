"""T5's three verbs against one another and against a plain decoder that runs every target by itself."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.decoding import beam_search, build_trie
from jaxrec.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, bart_config
from jaxrec.models.vocabulary import ContextTokens
from jaxrec.nn.transformer import relative_buckets

SIZES = (4, 3, 5)
LEVELS = ((3, 4), (7, 3), (12, 5))
CONFIG = EncoderDecoderConfig(
    vocabulary=20,
    width=12,
    heads=2,
    head_dim=8,
    hidden=10,
    encoder_layers=2,
    layers=2,
    buckets=8,
    max_distance=20,
    levels=LEVELS,
)
VARIANTS = {
    "1.0": {},
    "1.1": {"activation": "gelu", "gated": True, "tied": False, "scale_head": False, "start_token": 2},
    "whole vocabulary": {"restrict": False},
    "tokens": {"levels": None},
}
B, S, L = 2, 9, 4
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 20, (B, S)), jnp.int32)
MASK = jnp.arange(S) < jnp.array([[S], [5]])
TARGETS = jnp.asarray(np.random.default_rng(1).integers(0, SIZES, (B, L, 3)), jnp.int32)
IDS = np.array(list(itertools.product(*map(range, SIZES))), np.int32)  # every ID


@functools.cache
def make(**changes):
    """(model, params) of the tiny configuration with some fields changed; every parameter matters."""
    model = EncoderDecoder(dataclasses.replace(CONFIG, **changes))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), ContextTokens(TOKENS, MASK), TARGETS))["params"]
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    noise = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return model, jax.tree.map(lambda p, key: p + 0.3 * jax.random.normal(key, p.shape), params, noise)


def everything(model, params, tokens, mask, targets):
    context = model.apply({"params": params}, ContextTokens(tokens, mask), method="prefill")
    return model.apply({"params": params}, context, targets, method="score").log_probs


@functools.cache
def compiled(**changes):
    """`everything` of a variant, compiled once."""
    return jax.jit(functools.partial(everything, make(**changes)[0]))


# ---- a plain T5, which shares the buckets alone with ours ------------------------------------------------------------


def plain_norm(x, part):
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * part["scale"]


def plain_bias(config, table, queries, keys, both_sides):
    distance = np.arange(keys)[None] - np.arange(queries)[:, None]
    bucket = relative_buckets(distance, both_sides=both_sides, buckets=config.buckets, max_distance=config.max_distance)
    return jnp.moveaxis(table[bucket], -1, 0)


def plain_attention(query, key, value, mask, bias):
    """query [X, N, H], key and value [Y, N, H], mask [X, Y] -> [X, N * H]; T5 doesn't scale."""
    scores = jnp.where(mask, jnp.einsum("XNH,YNH->NXY", query, key) + bias, -jnp.inf)
    return jnp.einsum("NXY,YNH->XNH", jax.nn.softmax(scores, -1), value).reshape(len(query), -1)


def plain_self_attention(x, part, mask, bias):
    normed = plain_norm(x, part["norm"])
    query, key, value = (jnp.einsum("XD,DNH->XNH", normed, part[p]["weight"]) for p in ("query", "key", "value"))
    return x + plain_attention(query, key, value, mask, bias) @ part["out"]["weight"]


def plain_cross_attention(x, part, memory, mask):
    query = jnp.einsum("XD,DNH->XNH", plain_norm(x, part["norm"]), part["query"]["weight"])
    key, value = (jnp.einsum("XD,DNH->XNH", memory, part[p]["weight"]) for p in ("key", "value"))
    return x + plain_attention(query, key, value, mask, 0.0) @ part["out"]["weight"]


def plain_feed_forward(config, x, part):
    normed, up = plain_norm(x, part["norm"]), part["up"]["weight"]
    if config.gated:
        hidden = nn.gelu(normed @ part["gate"]["weight"]) * (normed @ up)
    else:
        hidden = jnp.maximum(normed @ up, 0)
    return x + hidden @ part["down"]["weight"]


def plain_score(config, params, tokens, mask, codes):
    """Log-probabilities [M] of one target of one context [S]: the whole sequence of it, under the literal mask."""
    x, count = params["embed"]["table"][tokens], len(tokens)
    bias = plain_bias(config, params["encoder_bias"]["table"], count, count, True)
    for i in range(config.encoder_layers):
        x = plain_self_attention(x, params[f"encoder_{i}"]["attention"], mask[None], bias)
        x = plain_feed_forward(config, x, params[f"encoder_{i}"]["feed_forward"])
    memory = plain_norm(x, params["encoder_norm"])
    levels = config.levels or ((0, config.vocabulary),) * len(codes)
    wanted = codes + jnp.array([offset for offset, _ in levels])
    x = params["embed"]["table"][jnp.concatenate([jnp.array([config.start_token]), wanted[:-1]])]
    bias = plain_bias(config, params["decoder_bias"]["table"], len(x), len(x), False)
    for i in range(config.layers):
        layer = params[f"decoder_{i}"]
        x = plain_self_attention(x, layer["attention"], jnp.tril(jnp.ones((len(x), len(x)), bool)), bias)
        x = plain_cross_attention(x, layer["cross"], memory, mask[None])
        x = plain_feed_forward(config, x, layer["feed_forward"])
    x = plain_norm(x, params["decoder_norm"]) * (config.width**-0.5 if config.scale_head else 1.0)
    logits = x @ params["embed" if config.tied else "head"]["table"].T
    found = []
    for level, (offset, size) in enumerate(levels):
        inside = logits[level, offset : offset + size] if config.restrict else logits[level]
        found.append(logits[level, wanted[level]] - jax.nn.logsumexp(inside))
    return jnp.stack(found)


def plain_everything(config, params, tokens, mask, targets):
    one = functools.partial(plain_score, config)
    return jax.vmap(jax.vmap(one, (None, None, None, 0)), (None, 0, 0, 0))(params, tokens, mask, targets)


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_packed_scores_and_gradients_are_those_of_every_target_by_itself(changes):
    model, params = make(**changes)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=TARGETS.shape), jnp.float32)

    def run(params):
        found = everything(model, params, TOKENS, MASK, TARGETS)
        return (found * weights).sum(), found

    def plain(params):
        found = plain_everything(model.config, params, TOKENS, MASK, TARGETS)
        return (found * weights).sum(), found

    (_, found), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    (_, expected), expected_gradient = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4), gradient, expected_gradient)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradient)), "every parameter has a gradient"


def test_the_beam_finds_the_best_of_all_ids():
    model, params = make()

    @jax.jit
    def search(params):
        context = model.apply({"params": params}, ContextTokens(TOKENS, MASK), method="prefill")
        every = jnp.broadcast_to(IDS, (B, *IDS.shape))
        scored = model.apply({"params": params}, context, every, method="score").log_probs.sum(-1)

        def extend(tokens, cache, level):
            return model.apply({"params": params}, context, tokens, cache, level, method="extend")

        return scored, beam_search(extend, None, build_trie(IDS, SIZES), batch=B, beam_width=len(IDS))

    scored, result = search(params)
    assert result.valid.all()
    order = np.argsort(-scored, axis=1, kind="stable")
    np.testing.assert_allclose(result.log_probs, np.take_along_axis(scored, order, 1), atol=1e-5)
    np.testing.assert_array_equal(result.codes[:, :10], IDS[order[:, :10]])


def test_padding_on_the_left_changes_nothing():
    """Positions enter by their differences alone."""
    _, params = make()
    run = compiled()
    expected = run(params, TOKENS, MASK, TARGETS)
    left = run(params, jnp.roll(TOKENS, 4, axis=1), jnp.roll(MASK, 4, axis=1), TARGETS)
    np.testing.assert_allclose(left[1], expected[1], atol=1e-5)


def test_soft_tokens_do_not_move_the_tokens_of_a_bart():
    """In front of the tokens they are as if behind them: soft tokens that are words, against the words themselves."""
    sizes = {name: getattr(CONFIG, name) for name in ("vocabulary", "width", "heads", "head_dim", "hidden", "levels")}
    model = EncoderDecoder(bart_config(encoder_layers=1, layers=1, max_positions=S, **sizes))
    rows, real = TOKENS[:, :7], jnp.array([5, 3])  # of which the last two are soft
    whole = ContextTokens(rows, jnp.arange(7) < real[:, None])
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), whole, TARGETS))["params"]
    params |= {name: jax.tree.map(lambda x: 20 * x, params[name]) for name in ("embed", "encoder_positions")}
    words = params["embed"]["table"][rows]
    last = jnp.stack([words[row, count - 2 : count] for row, count in enumerate(real)])
    soft, there = jnp.concatenate([last, 9 + last[:, :1]], 1), jnp.broadcast_to(jnp.arange(3) < 2, (B, 3))
    parts = ContextTokens(rows[:, :3], jnp.arange(3) < real[:, None] - 2, soft=soft, soft_mask=there)

    @jax.jit
    def score(inputs):
        context = model.apply({"params": params}, inputs, method="prefill")
        return model.apply({"params": params}, context, TARGETS, method="score").log_probs

    np.testing.assert_allclose(score(parts), score(whole), atol=1e-5)
    moved = parts.replace(tokens=jnp.roll(parts.tokens, 1, 1), mask=jnp.roll(parts.mask, 1, 1))
    np.testing.assert_allclose(score(moved)[1], score(whole)[1], atol=1e-5)
    assert not np.allclose(
        score(parts.replace(soft=soft[:, 1::-1], soft_mask=there[:, :2]))[1], score(whole)[1], atol=1e-3
    )


def test_dropout_is_drawn_from_its_key():
    model, params = make(dropout=0.3)

    @jax.jit
    def run(key):
        rngs, variables = {"dropout": key}, {"params": params}
        context = model.apply(variables, ContextTokens(TOKENS, MASK), True, method="prefill", rngs=rngs)
        return model.apply(variables, context, TARGETS, None, True, method="score", rngs=rngs).log_probs

    first, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    still = compiled(dropout=0.3)(params, TOKENS, MASK, TARGETS)
    np.testing.assert_array_equal(still, compiled()(params, TOKENS, MASK, TARGETS))


def test_half_precision_is_close():
    _, params = make(dtype="bfloat16")
    found = compiled(dtype="bfloat16")(params, TOKENS, MASK, TARGETS)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, compiled()(params, TOKENS, MASK, TARGETS), atol=0.3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"levels": ((3, 4), (18, 3))}, "level 1 takes the tokens 18 ... 20, but the vocabulary is 0 ... 19"),
        ({"levels": ((3, 0),)}, "level 0"),
        ({"buckets": 2}, "model.buckets is 2"),
        ({"max_distance": 4}, "max_distance 4"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        dataclasses.replace(CONFIG, **changes)


def test_more_codes_than_levels_are_refused():
    model, params = make()
    with pytest.raises(UserError, match=r"model\.levels names 3"):
        everything(model, params, TOKENS, MASK, jnp.zeros((B, L, 5), jnp.int32))
    context = model.apply({"params": params}, ContextTokens(TOKENS, MASK), method="prefill")
    with pytest.raises(UserError, match="level 3 is asked for"):
        cache = model.apply({"params": params}, context, TARGETS[..., 0], {}, 1, method="extend")[1]
        model.apply({"params": params}, context, TARGETS[..., 0], cache, 3, method="extend")


@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_encoders_last_place_is_added_to_the_start_token(causal):
    """Without cross-attention, targets know of the context what the encoder says of its last real place, or nothing."""
    model, params = make(causal=causal)
    silent = jax.tree.map_with_path(
        lambda path, leaf: leaf * ("cross" not in jax.tree_util.keystr(path)), nn.unbox(params)
    )
    score = jax.jit(functools.partial(everything, model, silent))
    found = score(TOKENS, MASK, TARGETS)
    for changed, matters in ((4, True), (5, False)):  # the second context has five tokens
        other = score(TOKENS.at[1, changed].set(1 + TOKENS[1, changed] % 18), MASK, TARGETS)
        assert np.allclose(other[1], found[1], atol=1e-6) != (causal and matters)
