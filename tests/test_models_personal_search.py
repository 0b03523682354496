import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.models.causal import CausalConfig
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.models.personal_search import (
    PersonalSearch,
    PromptConfig,
    SearchInputs,
    SearchVocabulary,
    TaskInputs,
    level_sums,
)

SIZES = (5, 4, 3)
VOCABULARY = SearchVocabulary(texts=11, tasks=2, sizes=SIZES)
TINY = VOCABULARY.fit(
    EncoderDecoderConfig(width=16, heads=2, head_dim=8, hidden=16, encoder_layers=1, layers=1, scale_head=False)
)
CAUSAL = VOCABULARY.fit(CausalConfig(width=16, heads=2, groups=1, head_dim=8, hidden=16, layers=1))
BATCH = 2


def codes(rng, *shape):
    return np.stack([rng.integers(0, size, shape) for size in SIZES], axis=-1).astype(np.int32)


def make_inputs(seed=0, **more):
    rng = np.random.default_rng(seed)
    query = rng.integers(3, 11, (BATCH, 4)).astype(np.int32)
    query[1, 2:] = -1
    candidates, recent = codes(rng, BATCH, 6), codes(rng, BATCH, 3)
    candidates[0, 4:], recent[1, 1:] = -1, -1
    made = SearchInputs(
        query=query,
        query_codes=codes(rng, BATCH),
        user_codes=codes(rng, BATCH, 2),
        recent_queries=codes(rng, BATCH, 2),
        recent_items=recent,
        long=rng.normal(size=(BATCH, 3, 2, 7)).astype(np.float32),
        candidates=candidates,
        habits=rng.normal(size=(BATCH, 6, 12)).astype(np.float32),
        user=rng.normal(size=(BATCH, 4)).astype(np.float32),
    )
    return jax.tree.map(jnp.asarray, dataclasses.replace(made, **more))


KINDS = {"items": (TINY, "items"), "codes": (TINY, "codes"), "causal": (CAUSAL, "items")}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    """The model and its parameters, for both kinds of positions, and of backbones."""
    config, positions = KINDS[request.param]
    made = PersonalSearch(config, VOCABULARY, PromptConfig(positions, long_queries=2, long_heads=2))
    return made, jax.jit(made.init)(jax.random.key(1), make_inputs(), jnp.zeros((BATCH, 1, 3), jnp.int32))


@partial(jax.jit, static_argnums=0)
def jitted(made, variables, inputs, targets):
    return made.apply(variables, inputs, targets)


@partial(jax.jit, static_argnums=0)
def step_by_step(made, variables, inputs, targets):
    """Log-probabilities [B, L, K] of every level of targets [B, L, M]."""
    context = made.apply(variables, inputs, method="prefill")
    cache, before, found = None, None, []
    for level in range(targets.shape[-1]):
        log_probs, cache = made.apply(variables, context, before, cache, level, method="extend")
        found.append(jnp.broadcast_to(log_probs, (*targets.shape[:2], log_probs.shape[-1])))
        before = targets[..., level]
        if not level:
            cache = jax.tree.map(lambda x: jnp.repeat(x, targets.shape[1], axis=1), cache)
    return found


def score(model, inputs, targets):
    return jitted(*model, inputs, targets)


def test_level_sums_are_the_sums_of_the_centroids_of_equation_4():
    rng = np.random.default_rng(3)
    centroids = [rng.normal(size=(size, 7)).astype(np.float32) for size in SIZES]
    some = codes(rng, 2, 9)
    some[0, 6:] = -1
    expected = np.zeros((2, 3, 7))
    for row in range(2):
        for item in some[row]:
            for level, code in enumerate(item):
                expected[row, level] += centroids[level][code] if code >= 0 else 0
    np.testing.assert_allclose(level_sums(jnp.asarray(some), centroids), expected, atol=1e-5)
    np.testing.assert_allclose(level_sums(jnp.asarray(some), centroids[:2]), expected[:, :2], atol=1e-5)


def test_the_prompt_is_that_of_the_paper():
    """BOS uid SEP query SEP its ID SEP queries SEP items SEP EOS."""
    made, inputs = PersonalSearch(TINY, VOCABULARY, PromptConfig("codes", long_queries=0)), make_inputs()
    tokens, mask = (np.asarray(each) for each in made.apply({}, inputs, method="search_prompt"))
    bos, sep, eos = 11, 12, 13
    offset = np.array([17, 22, 26])
    row = jax.tree.map(lambda x: np.asarray(x[1]), inputs)
    ids = [*(row.user_codes + offset).ravel(), sep, *row.query[:2], sep, *(row.query_codes + offset), sep]
    recent = [*(row.recent_queries + offset).ravel(), sep, *(row.recent_items[:1] + offset).ravel(), sep]
    assert tokens[1][mask[1]].tolist() == [bos, *ids[:6], sep, *ids[7:], *recent, eos]
    inputs = dataclasses.replace(inputs, profile=jnp.array([[-1, -1], [4, -1]]))
    tokens, mask = (np.asarray(each) for each in made.apply({}, inputs, method="search_prompt"))
    assert tokens[1][mask[1]].tolist()[-4:] == [sep, 4, sep, eos]
    assert tokens[0][mask[0]].tolist()[-3:] == [sep, sep, eos]
    inputs = dataclasses.replace(inputs, profile=None)
    whole, there = made.clone(prompt=PromptConfig("items", long_queries=0)).apply({}, inputs, method="search_prompt")
    assert whole.shape == (2, 1 + 2 + 1 + 4 + 1 + 1 + 1 + 2 + 1 + 3 + 1 + 1, 3) and there[0].all()
    np.testing.assert_array_equal(whole[1, 1:3], row.user_codes + offset)
    np.testing.assert_array_equal(whole[1, 4], [row.query[0], -1, -1])


def test_packed_targets_equal_one_by_one_and_level_by_level(model):
    inputs, targets = make_inputs(), jnp.asarray(codes(np.random.default_rng(5), BATCH, 4))
    targets = targets.at[:, 0].set(inputs.candidates[:, 1])
    packed = score(model, inputs, targets)
    for place in range(4):
        alone = score(model, inputs, targets[:, place : place + 1])
        np.testing.assert_allclose(packed[:, place], alone[:, 0], atol=1e-5)
    for level, log_probs in enumerate(step_by_step(*model, inputs, targets)):
        np.testing.assert_allclose(jnp.exp(log_probs).sum(-1), 1, atol=1e-5)
        found = np.take_along_axis(np.asarray(log_probs), np.asarray(targets[..., level, None]), axis=-1)[..., 0]
        np.testing.assert_allclose(found, packed[..., level], atol=1e-4)


def test_the_mixture_is_one_distribution_over_whole_ids(model):
    every = np.stack(np.meshgrid(*map(np.arange, SIZES), indexing="ij"), axis=-1).reshape(1, -1, 3).repeat(BATCH, 0)
    found = np.exp(score(model, make_inputs(), jnp.asarray(every)).sum(-1))
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-4)


def test_every_part_is_read_and_padding_is_not(model):
    targets = jnp.asarray(codes(np.random.default_rng(5), BATCH, 4))
    inputs = make_inputs()
    before = score(model, inputs, targets)
    changed = make_inputs(seed=9)
    for name in (
        "query",
        "query_codes",
        "user_codes",
        "recent_queries",
        "recent_items",
        "long",
        "candidates",
        "habits",
    ):
        other = score(model, dataclasses.replace(inputs, **{name: getattr(changed, name)}), targets)
        assert np.abs(other - before).max() > 1e-6, name
    habits = inputs.habits.at[0, 4:].set(7.0)  # of candidates that are padding
    np.testing.assert_array_equal(score(model, dataclasses.replace(inputs, habits=habits), targets), before)


@pytest.mark.parametrize(
    "off",
    [
        {"user_ids": "none"}, {"query_ids": False}, {"long_queries": 0}, {"copying": False},
        {"user_ids": "none", "query_ids": False, "long_queries": 0, "copying": False},
    ],
)  # fmt: skip
def test_each_part_can_be_left_out(off):
    made = PersonalSearch(TINY, VOCABULARY, PromptConfig("items", long_heads=2, **off))
    inputs = make_inputs(recent_queries=np.zeros((BATCH, 0, 3), np.int32))
    shapes = jax.eval_shape(made.init, jax.random.key(0), inputs, jnp.zeros((BATCH, 1, 3), jnp.int32))["params"]
    assert ("long" in shapes) == bool(off.get("long_queries", 1)) and ("copy" in shapes) == off.get("copying", True)


def test_texts_are_written_with_the_text_tokens_alone(model):
    made, variables = model
    prompts = TaskInputs(jnp.array([0, 1]), jnp.array([[4, 5], [-1, -1]]), jnp.array([[-1] * 3, [1, 2, 0]]))
    tokens, mask = made.apply(variables, prompts, method="task_prompt")
    flat = np.asarray(tokens if tokens.ndim == 2 else tokens[..., 0])
    assert flat[0][np.asarray(mask[0])].tolist() == [15, 4, 5, 13] and flat[1][np.asarray(mask[1])][0] == 16
    every = jnp.stack(jnp.meshgrid(jnp.arange(11), jnp.arange(11), indexing="ij"), axis=-1).reshape(1, -1, 2)
    log_probs = jitted(made.writing(2), variables, prompts, jnp.repeat(every, 2, 0))
    np.testing.assert_allclose(np.exp(log_probs.sum(-1)).sum(1), 1, atol=1e-4)
