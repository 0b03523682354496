"""Validation metrics: of both ways to rank, by hand."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from onemall_parts import make_assembly

from jaxrec.config import UserError, load_config
from jaxrec.evaluation import make_cases
from jaxrec.systems import generative
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.generative import train_model
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.systems.validation import make_validation, validation_cases, validation_metrics
from jaxrec.text.finetune import FinetuneConfig
from jaxrec.training.optim import OptimConfig
from jaxrec.training.stages import Task

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


def test_nobody_to_measure_is_said(capsys):
    train = {**RECORD, "split": np.zeros(4, np.int8)}
    assert len(validation_cases([train], (0,), EvaluationConfig(split="valid"))) == 0
    assert "no user has a session to validate on" in capsys.readouterr().out
    assert len(validation_cases([RECORD], (0,), EvaluationConfig(split="valid"))) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("key", ["beam_widths", "candidates"])
def test_a_decoding_that_does_not_fit_the_ids_is_refused_before_training(tmp_path, key):
    config = load_config(Path(__file__).parent / "mall.py")
    wrong = dataclasses.replace(config, decoding=DecodingConfig(**{key: (4, 4)}))
    assert wrong.validation_decoding == config.decoding
    with pytest.raises(UserError, match=rf"'decoding.{key}' has 2 numbers, but semantic IDs have 3 levels"):
        train_model(make_assembly(), wrong, None, None, Task("train", tmp_path, tmp_path / "metrics.jsonl"))


def test_a_validation_decoding_that_does_not_fit_the_ids_is_refused_before_training(tmp_path, monkeypatch):
    config, given = load_config(Path(__file__).parent / "mall.py"), []
    monkeypatch.setattr(generative, "minimise", lambda *_, evaluate, **__: given.append(evaluate))
    wrong = dataclasses.replace(config, validation_decoding=DecodingConfig(beam_widths=(4, 4)))
    task = Task("train", tmp_path, tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"'validation_decoding.beam_widths' has 2 numbers, but semantic IDs have 3"):
        train_model(make_assembly(), wrong, None, None, task)
    # Where nothing is validated, it decides nothing.
    never = dataclasses.replace(config.training, evaluate_every=0)
    train_model(make_assembly(), dataclasses.replace(wrong, training=never), print, None, task)
    assert given == [None]


def test_what_no_trie_can_be_built_of_is_refused_before_the_first_evaluation():
    def build_trie() -> None:
        raise UserError("the listed text 'milk' is too long")

    texts = SimpleNamespace(space=SimpleNamespace(levels=None, kind="texts", build_trie=build_trie))
    config = EvaluationConfig(split="valid")
    with pytest.raises(UserError, match="too long"):
        make_validation(texts, None, DecodingConfig(), config)
    with pytest.raises(UserError, match=r"'validation_decoding.candidates' .* texts have no levels; leave"):
        make_validation(texts, None, DecodingConfig(candidates=(3,)), config)


@pytest.mark.parametrize("name", ["mall_sequential", "mall_tiger"])
def test_trainings_are_checked_before_any_work(name):
    config = load_config(Path(__file__).parent / f"{name}.py")
    config.check()
    both = dataclasses.replace(config, evaluation=EvaluationConfig(exclude_history=True))
    with pytest.raises(UserError, match=r"'evaluation.exclude_history': .* set it in validation"):
        both.check()
    slow = dataclasses.replace(config, align=FinetuneConfig(optim=OptimConfig(warmup=10**6)))
    with pytest.raises(UserError, match=r"'align.optim.warmup' is 1000000"):
        slow.check()
