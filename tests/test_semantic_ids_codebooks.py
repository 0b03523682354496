"""Residual k-means, FSQ and the two together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.semantic_ids import FsqConfig, OpqConfig, ResidualConfig, SemanticIdConfig, decode, encode, fit
from jaxrec.semantic_ids.quantizers import codebooks, fsq, residual
from jaxrec.semantic_ids.quantizers.residual import Residual

QUICK = FsqConfig((2, 2, 2, 2), hidden=8, steps=50, batch_size=128)
CONFIG = SemanticIdConfig(ResidualConfig((4, 4)), QUICK)


@pytest.fixture(scope="module")
def hierarchy():
    """640 rows of a planted tree: 4 far centres, 4 nearer ones in each, noise; [640, 6] and both labels."""
    rng = np.random.default_rng(0)
    label = np.arange(640) % 16
    x = rng.normal(size=(4, 6))[label // 4] * 30 + rng.normal(size=(4, 6))[label % 4] * 5
    return (x + rng.normal(size=(640, 6)) * 0.3).astype(np.float32), label // 4, label % 4


@pytest.fixture(scope="module")
def fitted(hierarchy):
    return fit(jax.random.key(0), hierarchy[0], CONFIG)


def test_residual_codes_by_hand():
    levels = Residual((jnp.array([[0.0, 0], [10, 0]]), jnp.array([[0.0, 1], [0, -1]])), (None, None))
    x = np.array([[9.5, 1.2], [0.3, -4.0], [10, 0.0]], np.float32)
    np.testing.assert_array_equal(residual.encode(levels, x), [[1, 0], [0, 1], [1, 0]])
    np.testing.assert_array_equal(residual.decode(levels, np.array([[1, 0], [0, 1]])), [[10, 1], [0, -1]])
    np.testing.assert_array_equal(residual.decode(levels, np.array([[1]])), [[10, 0]])


def test_levels_recover_a_planted_hierarchy(hierarchy, fitted):
    x, first, second = hierarchy
    codes = encode(fitted, x)
    assert len(set(zip(codes[:, 0].tolist(), first.tolist(), strict=True))) == 4
    assert len(set(zip(codes[:, 1].tolist(), second.tolist(), strict=True))) == 4


def test_error_falls_with_each_level(hierarchy, fitted):
    x, codes = hierarchy[0], encode(fitted, hierarchy[0])
    errors = [((x - decode(fitted, codes[:, :m])) ** 2).sum() for m in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]


def test_a_residual_code_stands_for_itself(hierarchy):
    books = fit(jax.random.key(0), hierarchy[0], SemanticIdConfig(ResidualConfig((4, 4)), None))
    codes = np.stack(np.meshgrid(range(4), range(4)), -1).reshape(-1, 2)
    np.testing.assert_array_equal(encode(books, decode(books, codes)), codes)


def test_save_and_load_give_the_same_codes(hierarchy, fitted, tmp_path):
    codebooks.save(fitted, tmp_path / "codebooks.safetensors")
    loaded = codebooks.load(tmp_path / "codebooks.safetensors")
    assert loaded.sizes == fitted.sizes == (4, 4, 16)
    codes = encode(fitted, hierarchy[0])
    np.testing.assert_array_equal(encode(loaded, hierarchy[0]), codes)
    np.testing.assert_array_equal(decode(loaded, codes), decode(fitted, codes))


def test_the_same_key_gives_the_same_bits(hierarchy, fitted):
    again = fit(jax.random.key(0), hierarchy[0], CONFIG)
    jax.tree.map(np.testing.assert_array_equal, again, fitted)


def test_bad_input_is_named(hierarchy, fitted, tmp_path):
    x = hierarchy[0]
    for config, message in (
        (SemanticIdConfig(None, None), "neither a hierarchy nor a remainder"),
        (SemanticIdConfig(ResidualConfig(())), "at least one level"),
        (SemanticIdConfig(ResidualConfig((4, 1))), "each of 2 codes or more"),
        (SemanticIdConfig(ResidualConfig((4, 4), balanced=(3,))), "names level 3, but sizes=.* are levels 1 to 2"),
        (SemanticIdConfig(ResidualConfig((4, 1024))), "640 rows cannot fill a codebook of 1024"),
        (SemanticIdConfig(remainder=FsqConfig((2, 1))), "FSQ levels=.*each of 2 steps or more"),
        (SemanticIdConfig(remainder=OpqConfig((4, 4, 4, 4))), "6"),
    ):
        with pytest.raises(UserError, match=message):
            fit(jax.random.key(0), x, config)
    with pytest.raises(UserError, match="5 wide"):
        encode(fitted, x[:, :5])
    (tmp_path / "broken").write_bytes(b"nothing")
    for path in ("broken", "missing"):
        with pytest.raises(UserError, match="holds no codebooks"):
            codebooks.load(tmp_path / path)


def test_codebooks_with_nan_are_refused(tmp_path):
    path, centroids = tmp_path / "codebooks.safetensors", jnp.zeros((3, 2))
    codebooks.save(
        codebooks.Codebooks(Residual((centroids, centroids.at[1, 0].set(jnp.nan)), (None, None)), None), path
    )
    with pytest.raises(UserError, match=r"codebooks.safetensors: hierarchy/centroids/1 holds NaN or infinity: run the"):
        codebooks.load(path)


@pytest.mark.parametrize("levels", [(2, 2, 2), (3,), (8, 5, 4)])
def test_digits_and_codes_are_one_to_one(levels):
    codes = np.arange(np.prod(levels))
    digits = np.asarray(fsq.codes_to_digits(codes, levels))
    np.testing.assert_array_equal(digits, list(np.ndindex(*levels)))
    np.testing.assert_array_equal(fsq.digits_to_codes(jnp.asarray(digits), levels), codes)


def test_digits_by_hand():
    coordinates = jnp.array([[-3.0, -0.1, 9.0], [0.0, 3.0, -9.0]])
    np.testing.assert_array_equal(fsq.to_digits(coordinates, (2, 3, 4)), [[0, 1, 3], [1, 2, 0]])
    np.testing.assert_allclose(fsq.centres(jnp.array([[0, 1, 3]]), (2, 3, 4)), [[-0.5, 0, 0.75]])


def test_imbalance_is_zero_for_even_independent_digits_only():
    even = fsq.centres(fsq.codes_to_digits(np.arange(8), (2, 2, 2)), (2, 2, 2))
    assert fsq.imbalance(even, (2, 2, 2)) < 1e-6
    np.testing.assert_allclose(fsq.imbalance(even[:4], (2, 2, 2)), 2 / 3)  # a digit never changes: mean 1, variance 0
    np.testing.assert_allclose(fsq.imbalance(even[:, [0, 0]], (2, 2)), 1)  # two digits always agree
    middle = jnp.array([[-0.25], [0.25]])
    assert fsq.imbalance(middle, (4,)) > 0.1  # the outer steps are never used


@pytest.fixture(scope="module")
def skewed():
    """1000 rows [1000, 8] in a few dense places and a long tail, as residuals are."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(1000, 8)) * np.geomspace(1, 0.1, 8) * rng.exponential(size=(1000, 1))).astype(np.float32)


@pytest.mark.parametrize("levels", [(2,) * 6, (8, 8)])
def test_fsq_uses_its_codes_evenly(skewed, levels):
    size = int(np.prod(levels))
    config = dataclasses.replace(QUICK, levels=levels)
    codes = np.asarray(fsq.encode(fsq.fit(jax.random.key(0), skewed, config), skewed))[:, 0]
    assert codes.min() >= 0 and codes.max() < size
    share = np.bincount(codes, minlength=size) / len(codes)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    assert entropy > 0.85 * np.log2(size)


def test_training_lowers_the_error(skewed):
    errors = []
    for steps in (0, 400):
        fitted = fsq.fit(jax.random.key(0), skewed, FsqConfig((2,) * 4, steps=steps, balance=0.01))
        errors.append(((skewed - fsq.decode(fitted, fsq.encode(fitted, skewed))) ** 2).sum())
    assert errors[1] < errors[0] < ((skewed - skewed.mean(0)) ** 2).sum()


def test_fsq_of_constant_and_single_rows():
    for x in (np.ones((20, 4), np.float32), np.ones((1, 4), np.float32)):
        fitted = fsq.fit(jax.random.key(0), x, QUICK)
        assert np.isfinite(fsq.decode(fitted, fsq.encode(fitted, x))).all()
