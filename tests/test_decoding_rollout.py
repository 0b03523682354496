"""Rollouts: exact log-probabilities, the law of sampling without replacement, filters, caps, keys."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.decoding.rollout import Rollouts, _conditioned, rollout
from jaxrec.decoding.trie import build_text_trie, build_trie

SIZES = (3, 4)
CODES = np.array([[0, 0], [0, 1], [0, 3], [1, 2], [2, 0], [2, 1], [2, 1]])
IDS = np.unique(CODES, axis=0)


def make_tables(seed: int, sizes=SIZES) -> list[jax.Array]:
    generator = np.random.default_rng(seed)
    tables = [generator.normal(size=sizes[: level + 1]).astype(np.float32) for level in range(len(sizes))]
    return [jax.nn.log_softmax(jnp.asarray(table)) for table in tables]


@functools.partial(jax.jit, static_argnames=("batch", "samples", "per_prefix"))
def draw(tables, trie, key, temperature=1.0, allowed=None, *, batch, samples, per_prefix=None) -> Rollouts:
    def extend(tokens, prefix, level):
        if level == 0:
            return jnp.broadcast_to(tables[0], (batch, 1, len(tables[0]))), prefix
        prefix = prefix * 100 + tokens
        index = tuple(prefix // 100 ** (level - 1 - place) % 100 for place in range(level))
        return tables[level][index], prefix

    cache = jnp.zeros((batch, 1), jnp.int32)
    return rollout(
        extend, cache, trie, key, batch=batch, samples=samples, temperature=temperature, allowed=allowed,
        per_prefix=per_prefix,
    )  # fmt: skip


def law(tables, ids: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """(log-probabilities of the model, of the distribution sampled from) of each ID, by enumeration."""
    tables = [np.asarray(table, np.float64) for table in tables]
    model = np.array([sum(tables[m][tuple(code[: m + 1])] for m in range(len(code))) for code in ids])
    sampling = np.zeros(len(ids))
    for row, code in enumerate(ids):
        for m in range(len(code)):
            follow = sorted({int(other[m]) for other in ids if (other[:m] == code[:m]).all()})
            logits = tables[m][tuple(code[:m])] / temperature
            sampling[row] += logits[code[m]] - np.log(np.exp(logits[follow]).sum())
    return model, sampling


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("samples", [2, 6, 10])
def test_samples_are_distinct_ids_with_their_exact_log_probabilities(temperature, samples):
    tables = make_tables(0)
    result = draw(tables, build_trie(CODES, SIZES), jax.random.key(1), temperature, batch=8, samples=samples)
    model, sampling = law(tables, IDS, temperature)
    assert np.isclose(np.exp(sampling).sum(), 1)
    found = min(samples, len(IDS))
    np.testing.assert_array_equal(result.valid, np.tile(np.arange(samples) < found, (8, 1)))
    for row in range(8):
        leaf = np.asarray(result.leaf[row, :found])
        assert len(set(leaf.tolist())) == found
        np.testing.assert_array_equal(result.codes[row, :found], IDS[leaf])
        np.testing.assert_allclose(result.log_probs[row, :found], model[leaf], rtol=1e-5)
        np.testing.assert_allclose(result.sampling_log_probs[row, :found], sampling[leaf], rtol=1e-5, atol=1e-6)
        assert (np.diff(result.perturbed[row, :found]) <= 0).all()
    assert (result.log_probs[:, found:] == -np.inf).all() and (result.codes[:, found:] == -1).all()
    assert ((result.threshold == -np.inf) == (samples >= len(IDS))).all()
    assert not result.nan.any()


def ordered_law(sampling: np.ndarray, n: int) -> dict[tuple[int, ...], float]:
    """The probability of every ordered draw of n without replacement."""
    p = np.exp(sampling)
    law = {}
    for draw_ in itertools.permutations(range(len(p)), n):
        left, total = 1.0, 1.0
        for leaf in draw_:
            total *= p[leaf] / left
            left -= p[leaf]
        law[draw_] = total
    return law


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Standard deviations by which the statistic exceeds its mean."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


def inclusions(law: dict[tuple[int, ...], float], leaves: int) -> np.ndarray:
    total = np.zeros(leaves)
    for draw_, p in law.items():
        total[list(draw_)] += p
    return total


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_follow_the_law_of_sampling_without_replacement(temperature):
    tables, n, batch = make_tables(3), 2, 4000
    result = draw(tables, build_trie(CODES, SIZES), jax.random.key(5), temperature, batch=batch, samples=n)
    expected = ordered_law(law(tables, IDS, temperature)[1], n)
    drawn = [tuple(row) for row in np.asarray(result.leaf).tolist()]
    counts = np.array([drawn.count(draw_) for draw_ in expected])
    assert counts.sum() == batch
    assert chi_square(counts, batch * np.array(list(expected.values()))) < 4
    # The bound can fail: the law at another temperature is far outside it.
    other = ordered_law(law(tables, IDS, temperature * 1.5)[1], n)
    assert chi_square(counts, batch * np.array(list(other.values()))) > 8
    # Inclusion frequencies, each within 4 standard deviations.
    rate = inclusions(expected, len(IDS))
    seen = np.bincount(np.asarray(result.leaf).ravel(), minlength=len(IDS)) / batch
    assert (np.abs(seen - rate) < 4 * np.sqrt(rate * (1 - rate) / batch)).all()


def test_importance_weights_give_unbiased_estimates():
    tables, batch = make_tables(4), 4000
    result = draw(tables, build_trie(CODES, SIZES), jax.random.key(6), batch=batch, samples=3)
    values = np.arange(len(IDS)) ** 2.0
    weights = np.exp(result.sampling_log_probs - result.inclusion_log_probs())
    estimates = (weights * values[np.asarray(result.leaf)]).sum(1)
    exact = (np.exp(law(tables, IDS, 1.0)[1]) * values).sum()
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / np.sqrt(batch)
    unweighted = values[np.asarray(result.leaf)].mean(1)
    assert abs(unweighted.mean() - exact) > 8 * unweighted.std() / np.sqrt(batch)


def test_weights_are_the_probabilities_when_everything_was_drawn():
    result = draw(make_tables(4), build_trie(CODES, SIZES), jax.random.key(6), batch=2, samples=9)
    weights = np.exp(result.sampling_log_probs - result.inclusion_log_probs())[np.asarray(result.valid)]
    np.testing.assert_allclose(weights.reshape(2, -1).sum(1), 1, rtol=1e-5)


def test_conditioned_gumbels_by_hand():
    """-log(exp(-1) - exp(-2) + exp(-g)) for g = 2 and 0.5."""
    got = _conditioned(jnp.array([2.0, 0.5, -jnp.inf]), jnp.array([1.0]))
    np.testing.assert_allclose(got, [1.0, -np.log(np.exp(-1) - np.exp(-2) + np.exp(-0.5)), -np.inf], rtol=1e-6)
    extreme = _conditioned(jnp.array([-300.0, -900.0]), jnp.array([80.0]))
    assert extreme[0] == 80 and np.isfinite(extreme[1])


def test_a_filter_restricts_and_renormalises():
    tables, trie = make_tables(7), build_trie(CODES, SIZES)
    allowed = np.array([[True] * 7, [False, True, False, True, False, False, True], [False] * 7])
    result = draw(tables, trie, jax.random.key(2), 1.0, jnp.asarray(allowed), batch=3, samples=4)
    assert result.valid.sum(1).tolist() == [4, 3, 0]
    _, sampling = law(tables, IDS[[1, 3, 5]], 1.0)
    order = np.argsort(np.asarray(result.leaf[1, :3]))
    assert np.asarray(result.leaf[1, :3])[order].tolist() == [1, 3, 5]
    np.testing.assert_allclose(np.asarray(result.sampling_log_probs[1, :3])[order], sampling, rtol=1e-5, atol=1e-6)


def test_a_cap_limits_the_samples_of_one_first_code():
    tables = make_tables(8, (3, 8))
    codes = np.array(list(itertools.product(range(3), range(8))))
    result = draw(tables, build_trie(codes, (3, 8)), jax.random.key(3), batch=20, samples=5, per_prefix=2)
    assert result.valid.all()
    for row in np.asarray(result.codes[..., 0]):
        assert np.bincount(row, minlength=3).max() <= 2
    assert np.isnan(result.threshold).all()
    assert np.isnan(result.inclusion_log_probs()).all()
    free = draw(tables, build_trie(codes, (3, 8)), jax.random.key(3), batch=20, samples=5)
    assert max(np.bincount(row).max() for row in np.asarray(free.codes[..., 0])) > 2


def test_the_same_key_gives_the_same_samples_whatever_the_batch():
    tables, trie = make_tables(9), build_trie(CODES, SIZES)
    first, again = (draw(tables, trie, jax.random.key(4), batch=5, samples=3) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    alone = draw(tables, trie, jax.random.key(4), batch=2, samples=3)
    np.testing.assert_array_equal(alone.leaf, first.leaf[:2])
    other = draw(tables, trie, jax.random.key(5), batch=5, samples=3)
    assert (first.leaf != other.leaf).any()


def test_nan_is_reported():
    tables = make_tables(10)
    tables[1] = tables[1].at[0, 1].set(jnp.nan)
    result = draw(tables, build_trie(CODES, SIZES), jax.random.key(0), batch=2, samples=3)
    assert result.nan.all() and not result.valid.any()
    assert not np.isnan(result.log_probs).any()


def test_wrong_calls_are_named():
    trie, call = build_trie(CODES, SIZES), functools.partial(rollout, None, None, key=jax.random.key(0), batch=1)
    for options, message in (
        ({"trie": trie, "samples": 0}, "samples is 0"),
        ({"trie": trie, "samples": 1, "per_prefix": 0}, "per_prefix is 0"),
        ({"trie": trie, "samples": 1, "temperature": 0.0}, "temperature is 0"),
        ({"trie": build_text_trie([[1]], 2, 1), "samples": 1}, "trie holds texts"),
    ):
        with pytest.raises(UserError, match=message):
            call(**options)
