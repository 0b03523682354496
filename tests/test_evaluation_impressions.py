"""AUC, GAUC, log-loss and calibration against plain loops over all pairs and rows, with ties."""

import math

import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.evaluation.impressions import auc, calibration, gauc, log_loss


def auc_of_pairs(scores, labels) -> float:
    """The definition: every positive row against every negative one."""
    wins = [
        1.0 if high > low else 0.5 if high == low else 0.0
        for high, good in zip(scores, labels, strict=True) if good
        for low, bad in zip(scores, labels, strict=True) if not bad
    ]  # fmt: skip
    return sum(wins) / len(wins) if wins else math.nan


def draw(seed: int, size: int, levels: int):
    rng = np.random.default_rng(seed)
    return rng.integers(0, levels, size) / levels, rng.random(size) < 0.3, rng.integers(0, 5, size)


@pytest.mark.parametrize(("seed", "levels"), [(0, 3), (1, 7), (2, 10**6)])
def test_auc_is_that_of_all_pairs(seed, levels):
    scores, labels, _ = draw(seed, 60, levels)
    assert auc(scores, labels) == pytest.approx(auc_of_pairs(scores, labels))
    assert auc(-scores, labels) == pytest.approx(1 - auc_of_pairs(scores, labels))


def test_auc_by_hand():
    labels = np.array([True, False, True, False])
    assert auc(np.array([0.9, 0.1, 0.4, 0.4]), labels) == 3.5 / 4
    assert auc(np.zeros(4), labels) == 0.5
    assert math.isnan(auc(np.arange(3.0), np.zeros(3, bool))) and math.isnan(auc(np.zeros(0), np.zeros(0, bool)))


@pytest.mark.parametrize(("seed", "levels"), [(0, 3), (1, 7), (2, 10**6)])
def test_gauc_is_the_weighted_mean_of_the_users_aucs(seed, levels):
    scores, labels, groups = draw(seed, 80, levels)
    labels[groups == 3] = True  # has no AUC
    groups = 10 - 2 * groups
    own = [
        (auc_of_pairs(scores[groups == user], labels[groups == user]), (groups == user).sum()) for user in set(groups)
    ]
    there = [(value, size) for value, size in own if not math.isnan(value)]
    expected = sum(value * size for value, size in there) / sum(size for _, size in there)
    value, count = gauc(scores, labels, groups)
    assert value == pytest.approx(expected) and count == len(there) < len(own)


def test_gauc_where_nobody_has_one():
    value, count = gauc(np.array([0.1, 0.9]), np.array([True, False]), np.array([0, 1]))
    assert math.isnan(value) and count == 0


def test_log_loss_by_hand():
    p, labels = np.array([0.5, 0.9, 0.2, 1.0]), np.array([True, True, False, False])
    expected = -(math.log(0.5) + math.log(0.9) + math.log(0.8) + math.log(1e-7)) / 4
    assert log_loss(p, labels) == pytest.approx(expected, rel=1e-5)
    assert math.isnan(log_loss(np.zeros(0), np.zeros(0, bool)))


def test_calibration_is_that_of_a_loop_over_bins():
    rng = np.random.default_rng(0)
    p = rng.random(97)
    labels = rng.random(97) < p**2
    found = calibration(p, labels, bins=5)
    order = sorted(range(97), key=lambda row: p[row])
    error = 0.0
    for place, (begin, end) in enumerate(zip([0, 19, 38, 58, 77], [19, 38, 58, 77, 97], strict=True)):
        rows = order[begin:end]
        predicted, observed = sum(p[rows]) / len(rows), sum(labels[rows]) / len(rows)
        assert found.count[place] == len(rows)
        assert (found.predicted[place], found.observed[place]) == pytest.approx((predicted, observed))
        error += len(rows) / 97 * abs(predicted - observed)
    assert found.error == pytest.approx(error)


def test_rows_of_one_probability_are_in_one_bin():
    p = np.array([0.1] * 7 + [0.6] * 3)
    labels = np.array([True] + [False] * 6 + [True] * 3)
    found = calibration(p, labels, bins=10)
    assert found.count.tolist() == [7, 3]
    np.testing.assert_allclose(found.observed, [1 / 7, 1.0])
    assert found.error == pytest.approx(0.7 * abs(0.1 - 1 / 7) + 0.3 * 0.4)
    assert math.isnan(calibration(np.zeros(0), np.zeros(0, bool)).error)


def test_calibrated_probabilities_have_a_small_error():
    rng = np.random.default_rng(1)
    p = rng.random(20_000)
    labels = rng.random(20_000) < p
    assert calibration(p, labels).error < 0.015 < 0.2 < calibration(p / 4, labels).error


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match=r"have \[2, 3\] rows; give one of each"):
        auc(np.zeros(2), np.zeros(3, bool))
    with pytest.raises(UserError, match="hold NaN"):
        gauc(np.array([0.1, np.nan]), np.array([True, False]), np.zeros(2, int))
