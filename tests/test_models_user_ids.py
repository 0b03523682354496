import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.models.user_ids import hashed_ids, user_ids


def test_a_hand_computed_case_of_equation_3():
    """exp(sqrt(1)) = 2.7183, exp(sqrt(2)) = 4.1133, exp(sqrt(3)) = 5.6522; weights .2177, .3295, .4528."""
    codes = np.array([[10, 0, 3], [20, 1, 3], [40, 7, 3]])
    # .2177 * 10 + .3295 * 20 + .4528 * 40 = 26.88; .3295 + .4528 * 7 = 3.499; 3
    np.testing.assert_array_equal(user_ids(jnp.array(codes), jnp.ones(3, bool)), [27, 4, 3])


def test_padding_does_not_count_wherever_it_stands():
    codes = jnp.array([[10, 0], [-1, -1], [20, 1], [40, 7], [-1, -1]])
    mask = codes[:, 0] >= 0
    expected = user_ids(codes[mask], jnp.ones(3, bool))
    np.testing.assert_array_equal(user_ids(codes, mask), expected)
    np.testing.assert_array_equal(user_ids(codes, jnp.zeros(5, bool)), [0, 0])


@pytest.mark.parametrize("length", [1, 7, 1000, 3000])
def test_it_stays_inside_the_codebook_and_equals_the_equation(length):
    rng = np.random.default_rng(length)
    codes = rng.integers(0, 4096, (length, 3))
    codes[:, 2] = 4095
    weights = np.exp(np.sqrt(np.arange(1, length + 1)))
    expected = np.ceil((weights / weights.sum()) @ codes - 1e-9)
    found = np.asarray(user_ids(jnp.array(codes), jnp.ones(length, bool)))
    assert found[2] == 4095 and found.max() <= 4095
    assert np.abs(found - expected).max() <= 1 and (found == expected).mean() > 0.6


def test_hashed_ids_tell_users_apart_and_know_nothing_of_them():
    sizes = (64, 32, 16)
    found = np.asarray(hashed_ids(jnp.arange(2000), sizes))
    assert (found >= 0).all() and (found < np.array(sizes)).all()
    assert len(np.unique(found, axis=0)) > 1900
    assert all(len(np.unique(found[:, level])) == size for level, size in enumerate(sizes))
