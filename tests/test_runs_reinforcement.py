"""Reinforcement learning end to end on a tiny mall: behind a trained run, stopped, resumed, shown.

`whole` is trained at once. `killed` is trained without reinforcement, stopped on the way, and then goes on with it,
stopped again between two refreshes of the sampler.
"""

import dataclasses
import io
import json
import shutil
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import jax
import numpy as np
import pytest
from mall_reinforcement import config as CONFIG
from stopping import StoppedError, stopping

from jaxrec.config import UserError
from jaxrec.data.sources import SequenceText
from jaxrec.evaluation.proxies import courses
from jaxrec.run import Run
from jaxrec.systems import load_recommender, train
from jaxrec.systems.onemall.config import OneMallConfig, ReinforcementConfig, RewardWeights
from jaxrec.training import checkpoint, loop
from jaxrec.training.log import TIMING_FIELDS

STAGES = ("train", "reinforcement")
PARTS = ("step", "params", "opt_state", "extra")
# The learned reward is the larger, the cheaper an item is, whoever buys.
GREEDY = dataclasses.replace(CONFIG.reinforcement, weights=RewardWeights(ctr=0, ctcvr=0, egpm=0, price=-1), stop=True)


def trained(path: Path, config: OneMallConfig, stop: str = "") -> str:
    """What a training prints; it is stopped at a fault point."""
    stops, said = [stop] if stop else [], io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(loop, "fault_point", stopping(stops))
        with pytest.raises(StoppedError) if stop else nullcontext():
            train(Run.open(path, config), config)
    assert not stops
    return said.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder, supervised = tmp_path_factory.mktemp("reinforcement"), dataclasses.replace(CONFIG, reinforcement=None)
    (folder / "whole.txt").write_text(trained(folder / "whole", CONFIG))
    trained(folder / "killed", supervised, "step:45")
    trained(folder / "killed", supervised)
    shutil.copytree(folder / "killed", folder / "greedy")
    trained(folder / "killed", CONFIG, "step:13")
    (folder / "killed.txt").write_text(trained(folder / "killed", CONFIG))
    (folder / "greedy.txt").write_text(trained(folder / "greedy", dataclasses.replace(CONFIG, reinforcement=GREEDY)))
    return folder


def lines_of(run: Path, stage: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING_FIELDS} for line in lines if line["stage"] == stage]


def same(left, right) -> bool:
    return jax.tree.structure(left) == jax.tree.structure(right) and jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), left, right)
    )


def test_killed_between_two_refreshes_it_ends_in_the_same_bits(folder):
    said = (folder / "killed.txt").read_text()
    assert "reinforcement: going on from step 8" in said and "train:" not in said, "the supervised stage stays"
    for stage in STAGES:
        whole, killed = (
            checkpoint.load_parts(folder / name / "stages" / stage, *PARTS) for name in ("whole", "killed")
        )
        assert same(whole, killed)
        assert lines_of(folder / "whole", stage) == lines_of(folder / "killed", stage)
    assert int(whole["extra"]["sampler"]["age"]) == 24
    assert not same(whole["extra"]["sampler"]["variables"]["params"], whole["params"]), "it was refreshed at 20"
    bests = [checkpoint.load_best(folder / name / "stages" / "reinforcement", "params") for name in ("whole", "killed")]
    assert same(*bests)
    assert (folder / "whole" / "evaluation.json").read_bytes() == (folder / "killed" / "evaluation.json").read_bytes()


def test_proxy_truth_and_what_may_be_lost_are_logged_and_shown(folder):
    run = folder / "whole"
    lines = [line for line in lines_of(run, "reinforcement") if "valid/reward@10" in line]
    assert [line["step"] for line in lines] == [0, 12, 24]
    assert lines[0]["valid/kl"] == pytest.approx(0, abs=1e-5) and lines[-1]["valid/kl"] > 1e-3
    for line in lines:
        # Learned from the truth itself.
        assert line["valid/reward@10"] == pytest.approx(line["valid/true_reward@10"])
        assert 0 < line["valid/distinct@10"] <= 1 and line["valid/validity"] > 0.9
        assert {"valid/hr@50", "valid/acc_sid1", "valid/spent@10", "valid/kept_reward@10"} <= line.keys()
    steps = [line for line in lines_of(run, "reinforcement") if "loss" in line]
    assert {"reward", "policy", "equal_rewards", "skipped_rewards", "clipped"} <= steps[0].keys()
    (course,) = courses(run / "metrics.jsonl")
    assert not course.split and str(course) in (folder / "whole.txt").read_text()
    page = (run / "report.html").read_text()
    assert "reinforcement valid/true_reward@10" in page and str(course) in page
    rows = {
        (row["model"], row["metric"]): row["value"]
        for row in json.loads((run / "evaluation.json").read_text())
        if row["subset"] == "rewards"
    }
    assert rows["onemall", "true_reward@10"] > rows["onemall before reinforcement", "true_reward@10"]
    model = load_recommender(Run(run))
    assert set(model.variables) == {"params", "balance"}, "the sampler is not served"


def test_a_run_that_raises_the_proxy_and_lowers_the_truth_says_so_and_stops(folder):
    said = (folder / "greedy.txt").read_text()
    assert "reinforcement: stopped after step 12: the learned reward rose from" in said
    assert "while the true reward fell from" in said
    (course,) = courses(folder / "greedy" / "metrics.jsonl")
    assert course.split and str(course).endswith("exploits its reward model, and is worth less than before")
    assert str(course) in said and str(course) in (folder / "greedy" / "report.html").read_text()
    assert checkpoint.steps(folder / "greedy" / "stages" / "reinforcement")[-1] == 12


def test_reinforcement_without_what_it_needs_is_refused(tmp_path):
    missing = "the stage train, which it is trained from, is not trained with this configuration"
    with pytest.raises(UserError, match=missing):
        train(Run.open(tmp_path / "new", CONFIG), CONFIG, only="reinforcement")
    config = OneMallConfig(data=SequenceText(path="nowhere"), reinforcement=ReinforcementConfig(reward="environment"))
    with pytest.raises(UserError, match="'environment', but SequenceText does not know the true rates of its items"):
        config.check()
