"""Validation metrics: of both ways to rank, by hand."""

import numpy as np
import pytest

from jaxrec.evaluation import make_cases
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.validation import validation_metrics

RECORD = {
    "user": np.int32(0),
    "item": np.array([1, 2, 1, 3], np.int32),
    "behavior": np.zeros(4, np.int8),
    "timestamp": np.arange(4),
    "session": np.array([0, 1, 2, 2], np.int32),
    "split": np.array([0, 0, 1, 1], np.int8),
}


@pytest.mark.parametrize(("exclude_history", "recall"), [(False, 0.5), (True, 1.0)])
def test_without_the_history_what_the_user_had_is_no_target(exclude_history, recall):
    """The session holds item 1, which the user had, and item 3; the ranking has item 3 alone."""
    cases = make_cases([RECORD], (0,), "valid")
    config = EvaluationConfig(split="valid", exclude_history=exclude_history)
    assert validation_metrics(np.array([[3, 0, 4]]), cases, config)["recall@10"] == recall
