"""Dropout takes from what a block adds and never from the stream that it adds to, in every model with such blocks."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import onemall_parts
import pytest
import rankgr_parts
from flax import linen as nn

from jaxrec.models.causal import Causal, CausalConfig
from jaxrec.models.cross_decoder import CrossDecoderLayer
from jaxrec.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, bart_config
from jaxrec.models.sequential import (
    Bert4RecConfig,
    CoreConfig,
    HstuConfig,
    ItemFacts,
    NextItNetConfig,
    SasRecConfig,
    SequentialModel,
)
from jaxrec.models.vocabulary import ContextTokens
from jaxrec.nn.layers import Dropout

RATE = 0.5
ADDED = re.compile(r"/((out|down|out_\d+)/(weight|bias)|moe/down|norm_\d+_1/scale)$")
"""the parameters without which a block adds nothing"""
RNG = np.random.default_rng(0)
TOKENS, MASK = RNG.integers(3, 17, (2, 5)), np.arange(5) < [[5], [3]]
TARGETS = RNG.integers(0, (4, 3, 2), (2, 4, 3)).astype(np.int32)
TEXT = {"vocabulary": 20, "width": 8, "heads": 2, "head_dim": 4, "hidden": 6, "layers": 2, "dropout": RATE}
LEVELS = {"levels": ((3, 4), (7, 3), (12, 5))}


def onemall(**changes):
    config = dataclasses.replace(onemall_parts.MODEL, dropout=RATE, context_dropout=RATE, **changes)
    assembly = onemall_parts.make_assembly(config)
    arrays = onemall_parts.make_arrays([onemall_parts.make_history(seed, 9) for seed in range(2)], assembly)

    def run(apply):
        context = apply(assembly.inputs(assembly.catalogue, arrays), True, method="prefill")
        apply(context, TARGETS, None, True, method="score")

    return run, assembly.model, onemall_parts.make_variables(assembly)


def rankgr():
    backbone = dataclasses.replace(rankgr_parts.BACKBONE, dropout=RATE)
    config = dataclasses.replace(rankgr_parts.MODEL, backbone=backbone)
    assembly = rankgr_parts.make_assembly(config)
    features = dataclasses.replace(rankgr_parts.FEATURES, buckets=(6,))
    arrays = rankgr_parts.make_arrays([rankgr_parts.make_record(seed, 9) for seed in range(2)], features)

    def run(apply):
        context = apply(assembly.inputs(assembly.catalogue, arrays), True, method="prefill")
        apply(context, TARGETS, None, True, method="score")

    return run, assembly.model, rankgr_parts.make_variables(config)


def tokens(model):
    inputs = ContextTokens(TOKENS, MASK)

    def run(apply):
        context = apply(inputs, True, method="prefill")
        apply(context, TARGETS, None, True, method="score")

    return run, model, random_variables(model, inputs, TARGETS)


def sequential(config):
    model = SequentialModel(dataclasses.replace(config, width=8, dropout=RATE), 20, 5)
    inputs = ItemFacts(jnp.zeros(20)), TOKENS, MASK, TOKENS, TOKENS
    return lambda apply: apply(*inputs, True), model, random_variables(model, *inputs)


def random_variables(model, *inputs):
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))
    return jax.tree.map(lambda x: jnp.asarray(0.5 * RNG.normal(size=x.shape), x.dtype), shapes)


def adding_nothing(variables):
    def clear(path, leaf):
        return 0 * leaf if ADDED.search(jax.tree_util.keystr(path, simple=True, separator="/")) else leaf

    return jax.tree.map_with_path(clear, variables)


SHORT = {"layers": 2, "heads": 2, "hidden": 6}
MODELS = {
    # dropout of what is read (the past, two histories), and after three blocks a layer, of BOS and of the targets
    "onemall": (onemall, 3, 2 * 2 * 3),
    "onemall, dense": (lambda: onemall(experts=1), 3, 2 * 2 * 3),
    # of the embeddings of the history and of the targets
    "rankgr": (rankgr, 2, 2 * 2 * 2),
    "causal": (lambda: tokens(Causal(CausalConfig(groups=1, **TEXT, **LEVELS))), 2, 2 * 2 * 2),
    # of embeddings and last states of the encoder, of the decoder's start token and of the targets; a layer at once
    "encoder_decoder": (
        lambda: tokens(EncoderDecoder(EncoderDecoderConfig(encoder_layers=2, **TEXT, **LEVELS))), 6, 2 + 2 * 2
    ),
    # of the normalised embeddings of the encoder, of the start token and of the targets; each block's by itself, before
    # the norm of the sum: two a layer of the encoder, three of the decoder
    "bart": (lambda: tokens(EncoderDecoder(bart_config(encoder_layers=2, **TEXT, **LEVELS))), 3, 2 * 2 + 2 * 2 * 3),
    "sasrec": (lambda: sequential(SasRecConfig(**SHORT)), 1, 2 * 2),
    "bert4rec": (lambda: sequential(Bert4RecConfig(**SHORT)), 1, 2 * 2),
    "core": (lambda: sequential(CoreConfig(**SHORT)), 2, 2 * 2),  # of the items' table as well
    "nextitnet": (lambda: sequential(NextItNetConfig(dilations=(1, 2))), 1, 2),
    "hstu": (lambda: sequential(HstuConfig(layers=2, heads=2)), 1, 2),
}  # fmt: skip


@pytest.mark.parametrize(("make", "inputs", "blocks"), MODELS.values(), ids=MODELS)
def test_blocks_that_add_nothing_leave_dropout_nothing_to_take(make, inputs, blocks):
    """Every dropout but those of a model's inputs is of what a block adds, here zeros, and every block has one."""
    run, model, variables = make()

    @jax.jit
    def taken_from(variables):
        found = []

        def look(call, args, kwargs, context):
            if isinstance(context.module, Dropout):
                found.append(args[0].any())
            return call(*args, **kwargs)

        def apply(*args, **options):
            return model.apply(variables, *args, rngs={"dropout": jax.random.key(0)}, **options)

        with nn.intercept_methods(look):
            run(apply)
        return jnp.stack(found)

    assert taken_from(adding_nothing(variables)).sum() == inputs
    assert taken_from(variables).tolist() == [True] * (inputs + blocks)


@pytest.mark.parametrize("width", [64, 7])
def test_a_share_is_zeroed_and_the_others_are_scaled_up(width):
    x, drop = np.full((2000, width), 3.0, np.float32), Dropout(0.2)

    def run(seed):
        return np.asarray(drop.apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(seed)}))

    found = run(0)
    kept = found > 0
    deviation = (0.2 * 0.8 / found.size) ** 0.5
    assert abs((~kept).mean() - 0.2) < 4 * deviation
    np.testing.assert_allclose(found[kept], 3 / 0.8, rtol=1e-4)
    # No two columns, nor rows, nor seeds are drawn together.
    assert abs(np.corrcoef(kept.T)[~np.eye(width, dtype=bool)]).max() < 5 / 2000**0.5
    assert abs((kept[1:] & kept[:-1]).mean() - 0.64) < 0.01
    np.testing.assert_array_equal(found, run(0))
    assert (found != run(1)).any()
    np.testing.assert_array_equal(drop.apply({}, x, deterministic=True), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, deterministic=False), x)
    gradient = jax.grad(lambda x: drop.apply({}, x, False, rngs={"dropout": jax.random.key(0)}).sum())(x)
    np.testing.assert_allclose(gradient, np.where(kept, 1 / 0.8, 0), rtol=1e-4)


@pytest.mark.parametrize("rate", [0.2, 0.9])
def test_a_layer_of_onemall_that_adds_nothing_passes_x_unchanged(rate):
    layer = CrossDecoderLayer(dataclasses.replace(onemall_parts.MODEL, dropout=rate))
    x, kv = RNG.normal(size=(2, 4, 3, 16)).astype(np.float32), RNG.normal(size=(2, 5, 2, 8)).astype(np.float32)
    bos = kv[:, :1]
    inputs = x, (kv, kv), MASK, (bos, bos), None, None

    @jax.jit
    def run(variables):
        return layer.apply(variables, *inputs, True, rngs={"dropout": jax.random.key(0)})[0]

    variables = random_variables(layer, *inputs)
    np.testing.assert_array_equal(run(adding_nothing(variables)), x)
    assert (np.asarray(run(variables)) != x).any()
