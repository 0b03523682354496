import dataclasses
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.models.causal import CausalConfig
from jaxrec.models.encoder_decoder import EncoderDecoderConfig, bart_config
from jaxrec.models.suggestion import SuggestionInputs, SuggestionModel, SuggestionVocabulary

TEXTS, LENGTH, END, BATCH = 5, 3, 1, 2
VOCABULARY = SuggestionVocabulary(TEXTS)
SIZES = {"width": 16, "heads": 2, "head_dim": 8, "hidden": 16, "layers": 1}
BACKBONES = {
    "t5": EncoderDecoderConfig(**SIZES, encoder_layers=1, scale_head=False),
    "bart": bart_config(**SIZES, encoder_layers=1, dropout=0.0),
    "qwen2": CausalConfig(**SIZES),
}
EVERY = [
    [*text, END] for count in range(LENGTH) for text in product([0, 2, 3, 4], repeat=count)
]  # every text with its end that fits
CANDIDATES = [[[2, END, -1], [3, 4, END], [0, 2, END]], [[END, -1, -1], [4, END, -1], [-1, -1, -1]]]


def make_inputs(seed=0, **more):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY.size, (BATCH, 7)).astype(np.int32)
    tokens[1, 4:] = -1
    made = SuggestionInputs(
        tokens=tokens,
        candidates=np.array(CANDIDATES, np.int32),
        habits=rng.normal(size=(BATCH, 3, 5)).astype(np.float32),
        user=rng.normal(size=(BATCH, 4)).astype(np.float32),
    )
    return jax.tree.map(jnp.asarray, dataclasses.replace(made, **more))


@pytest.fixture(scope="module", params=BACKBONES)
def model(request):
    made = SuggestionModel(VOCABULARY.fit(BACKBONES[request.param], LENGTH), VOCABULARY)
    return made, jax.jit(made.init)(jax.random.key(1), make_inputs(), jnp.zeros((BATCH, 1, LENGTH), jnp.int32))


@partial(jax.jit, static_argnums=0)
def score(made, variables, inputs, targets):
    return made.apply(variables, inputs, targets)


def padded(texts, fill=0):
    return jnp.array([[*text, *[fill] * (LENGTH - len(text))] for text in texts])


def test_the_mixture_is_one_distribution_over_whole_texts(model):
    """Texts of all lengths with their end, and the beginnings of those that do not fit, have a probability of 1."""
    unended = [list(text) for text in product([0, 2, 3, 4], repeat=LENGTH)]
    targets = padded(EVERY + unended)[None].repeat(BATCH, 0)
    lengths = np.array([len(text) for text in EVERY + unended])
    found = np.asarray(score(*model, make_inputs(), targets))
    total = np.where(np.arange(LENGTH) < lengths[:, None], found, 0.0).sum(-1)
    np.testing.assert_allclose(np.exp(total).sum(1), 1, atol=1e-4)


def test_a_candidate_gains_its_part_of_what_is_copied(model):
    made, variables = model
    inputs, plain = make_inputs(), made.clone(copying=False)
    context = jax.jit(partial(made.apply, method="prefill"))(variables, inputs)
    share, weights = (np.asarray(each)[:, 0] for each in (context.points.share, context.points.weights))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert weights[1, 2] == 0 and (share > 0.5).all()
    of_plain = {"params": {"backbone": variables["params"]["backbone"]}}
    for row, candidates in enumerate(CANDIDATES):
        texts = [[token for token in text if token >= 0] for text in candidates]
        for place, text in enumerate(filter(None, texts)):
            targets = padded([text])[None].repeat(BATCH, 0)
            own, mixed = (
                np.exp(np.asarray(score(each, params, inputs, targets))[row, 0, : len(text)].sum())
                for each, params in ((plain, of_plain), (made, variables))
            )
            np.testing.assert_allclose(mixed, (1 - share[row]) * own + share[row] * weights[row, place], rtol=1e-4)


def test_what_stands_behind_the_end_means_nothing(model):
    texts = [[2, END], [3, 4, END], [END]]
    first, second = (
        np.asarray(score(*model, make_inputs(), padded(texts, fill)[None].repeat(BATCH, 0))) for fill in (0, 3)
    )
    for place, text in enumerate(texts):
        np.testing.assert_allclose(first[:, place, : len(text)], second[:, place, : len(text)], atol=1e-5)


def test_untrained_the_first_column_orders_the_candidates():
    """Far apart, the initial weights decide alone."""
    made = SuggestionModel(VOCABULARY.fit(BACKBONES["t5"], LENGTH), VOCABULARY)
    habits = np.zeros((BATCH, 3, 5), np.float32)
    habits[..., 0] = [-8, 0, -4]
    inputs = make_inputs(habits=habits)
    for seed in range(3):
        variables = jax.jit(made.init)(jax.random.key(seed), inputs, jnp.zeros((BATCH, 1, LENGTH), jnp.int32))
        context = jax.jit(partial(made.apply, method="prefill"))(variables, inputs)
        assert np.argsort(-np.asarray(context.points.weights[0, 0])).tolist() == [1, 2, 0]


def test_every_input_is_read_and_candidates_alone_are_left_out(model):
    made, variables = model
    targets, other = padded(EVERY[:4])[None].repeat(BATCH, 0), make_inputs(seed=5)
    before = score(made, variables, make_inputs(), targets)
    for name in ("tokens", "habits", "user"):
        changed = score(made, variables, make_inputs(**{name: getattr(other, name)}), targets)
        assert np.abs(changed - before).max() > 1e-6, name
    plain = made.clone(copying=False)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), SuggestionInputs(make_inputs().tokens), targets)["params"]
    assert set(shapes) == {"backbone"}
