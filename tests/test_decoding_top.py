"""Exact top-k of long rows against `lax.top_k`; caps against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.decoding import top as module
from jaxrec.decoding.top import capped, top, top_capped, top_of_rows


@pytest.mark.parametrize(("n", "k"), [(20_000, 1), (20_001, 7), (70_000, 64), (300_000, 16), (100, 100)])
@pytest.mark.parametrize("kind", ["normal", "ties", "mostly dead", "dead"])
def test_long_rows_are_ranked_as_lax_top_k_ranks_them(n, k, kind):
    scores = np.random.default_rng(n).normal(size=(2, n)).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores)
    if kind == "mostly dead":
        scores[:, ::2] = scores[:, 5:] = -np.inf
    if kind == "dead":
        scores[:] = -np.inf
    for ours, expected in zip(top(jnp.asarray(scores), k), jax.lax.top_k(scores, k), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_the_block_path_is_taken_and_may_nest(monkeypatch):
    monkeypatch.setattr(module, "SHORT", 8)
    assert module._block_size(300_000, 3) > 1
    assert module._block_size(300_000 // module._block_size(300_000, 1), 1) > 1  # the maxima are long again
    scores = np.round(np.random.default_rng(0).normal(size=(3, 300_000)).astype(np.float32), 1)
    for k in (1, 3):
        for ours, expected in zip(top(jnp.asarray(scores), k), jax.lax.top_k(scores, k), strict=True):
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    ("width", "places", "k"), [(32, 4000, 32), (5, 4001, 3), (1, 20_000, 7), (64, 1031, 16), (4, 9, 20), (2000, 11, 5)]
)
@pytest.mark.parametrize("kind", ["normal", "ties", "few candidates"])
def test_rows_with_something_added_are_ranked_as_one_row(width, places, k, kind):
    generator = np.random.default_rng(places)
    values = generator.normal(size=(2, width, places)).astype(np.float32)
    added = generator.normal(size=(2, width)).astype(np.float32)
    if kind == "ties":
        values, added = np.round(values), np.round(added)
    if kind == "few candidates":
        added[:, 1:] = -np.inf
        added[1] = -np.inf
        values[..., 2:] = -np.inf
    scores, index = top_of_rows(jnp.asarray(values), jnp.asarray(added), k)
    expected, place = jax.lax.top_k((values + added[..., None]).reshape(2, -1), k)
    np.testing.assert_array_equal(scores, expected)
    real = expected > -np.inf
    np.testing.assert_array_equal(index[real], place[real])
    assert (index < width * places).all() and real.any() and (kind != "few candidates" or not real.all())


@pytest.mark.parametrize("places", [7, 4001])
def test_a_row_without_a_candidate_may_hold_anything(places):
    values, added = np.zeros((1, 20, places), np.float32), np.zeros((1, 20), np.float32)
    values[0, 4, 2], values[0, 5, 3], added[0, 4:6] = np.nan, np.inf, -np.inf
    scores, index = top_of_rows(jnp.asarray(values), jnp.asarray(added), 8)
    assert (scores == 0).all() and not np.isin(np.asarray(index) // places, (4, 5)).any()


def capped_oracle(scores, groups, cap):
    kept = np.full_like(scores, -np.inf)
    for row in range(len(scores)):
        seen = {}
        for place in np.argsort(-scores[row], kind="stable"):
            seen[groups[row, place]] = seen.get(groups[row, place], 0) + 1
            if seen[groups[row, place]] <= cap:
                kept[row, place] = scores[row, place]
    return kept


@pytest.mark.parametrize("cap", [1, 3, 50])
def test_a_cap_keeps_the_best_of_each_group(cap):
    generator = np.random.default_rng(cap)
    scores = np.round(generator.normal(size=(3, 40)), 1).astype(np.float32)
    groups = generator.integers(0, 6, (3, 40))
    np.testing.assert_array_equal(
        capped(jnp.asarray(scores), jnp.asarray(groups), cap), capped_oracle(scores, groups, cap)
    )


@pytest.mark.parametrize("cap", [1, 2, 7])
def test_top_under_a_cap_is_the_top_of_what_the_cap_keeps(cap):
    generator = np.random.default_rng(cap)
    scores = np.round(generator.normal(size=(2, 12, 5)), 1).astype(np.float32)
    groups = np.sort(generator.integers(0, 3, (2, 12)), axis=1)
    kept = capped_oracle(scores.reshape(2, -1), np.repeat(groups, 5, axis=1), cap)
    best, index = top_capped(jnp.asarray(scores), jnp.asarray(groups), cap, 10)
    expected, place = jax.lax.top_k(kept, 10)
    np.testing.assert_array_equal(best, expected)
    alive = expected > -np.inf
    np.testing.assert_array_equal(index[alive], place[alive])
