"""The mixture of a decoder's distribution and one over the past's items, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.models.contract import Scored
from jaxrec.models.copying import Points, check_labels

# Two items of the past with weights .6 and .4, of which a quarter is copied, and a target that is the first item.
POINTS = Points(jnp.array([[[0.6, 0.4]]]), jnp.array([[0.25]]))
CODES = jnp.array([[[1, 0], [1, 2]]])
TARGET = jnp.array([[[1, 0]]])
OWN = np.log([0.2, 0.5])
EXPECTED = np.log([0.75 * 0.2 + 0.25, (0.75 * 0.1 + 0.25 * 0.6) / (0.75 * 0.2 + 0.25)])


def test_a_target_that_is_an_item_of_the_past():
    scored = Scored(jnp.asarray(OWN)[None, None], jnp.array([[[-3.0, -2.0]]]), jnp.zeros((1, 1, 2, 4)))
    mixed = POINTS.along(scored, TARGET, CODES)
    np.testing.assert_allclose(mixed.log_probs[0, 0], EXPECTED, rtol=1e-5)
    # The mean of a level is the decoder's own, whatever the target gains.
    np.testing.assert_array_equal(mixed.mean_log_probs, scored.mean_log_probs)
    # A target of one token needs one code of every item.
    short = scored.replace(log_probs=scored.log_probs[..., :1], mean_log_probs=scored.mean_log_probs[..., :1])
    np.testing.assert_allclose(POINTS.along(short, TARGET[..., :1], CODES).log_probs[0, 0], EXPECTED[:1], rtol=1e-5)


def test_level_by_level_it_is_the_same():
    first, second = jnp.log(jnp.array([[[0.8, 0.2]]])), jnp.log(jnp.array([[[0.5, 0.3, 0.2]]]))
    copied = POINTS.begin()
    levels = [copied.mix(first, CODES[..., 0])]
    copied = copied.after(jnp.array([[1]]), CODES[..., 0], first[..., 1])
    levels.append(copied.mix(second, CODES[..., 1]))
    for level, (found, code) in enumerate(zip(levels, (1, 0), strict=True)):
        np.testing.assert_allclose(jnp.exp(found).sum(), 1, rtol=1e-5)
        np.testing.assert_allclose(found[0, 0, code], EXPECTED[level], rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_are_smoothed_only_where_nothing_is_copied(smoothing):
    check_labels(False, "model.pointer", smoothing)
    if not smoothing:
        return check_labels(True, "model.pointer", smoothing)
    with pytest.raises(UserError, match=r"'objective.smoothing' is 0.1 and 'model.pointer' is on: .*set either"):
        check_labels(True, "model.pointer", smoothing)


def test_without_a_past_nothing_is_copied():
    nothing = Points(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1)))
    scored = Scored(jnp.asarray(OWN)[None, None], jnp.zeros((1, 1, 2)), jnp.zeros((1, 1, 2, 4)))
    np.testing.assert_allclose(nothing.along(scored, TARGET, CODES).log_probs[0, 0], OWN, rtol=1e-5)
