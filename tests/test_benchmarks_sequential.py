"""The benchmark of many models on one log: its arguments, its rows, what it keeps, and all of it on a small log."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.run import Run

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import sequential as benchmark  # noqa: E402
from shared import results  # noqa: E402

TINY = """
from pathlib import Path
from jaxrec.data.sources import SequenceText
from jaxrec.models.sequential import {model}Config
from jaxrec.systems.sequential.config import SequentialConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = SequentialConfig(
    data=SequenceText(path=Path("somewhere")),
    system="{system}",
    model={model}Config(width=16),
    batch_size=32,
    lengths=(8,),
    optim=OptimConfig(learning_rate=5e-3, warmup=10),
    training=LoopConfig(steps=150, log_every=50, checkpoint_every=100, evaluate_every=50, patience=2),
)
"""


def test_an_unknown_model_is_named_with_those_there_are():
    assert benchmark.parse_models("sasrec_ce, core,sasrec_ce") == ["sasrec_ce", "core"]
    with pytest.raises(UserError, match=r"there is no configs/sasrek\.py; give some of .*sasrec_ce"):
        benchmark.parse_models("sasrec_ce,sasrek")
    with pytest.raises(UserError, match="--models is empty"):
        benchmark.parse_models(" ,")


def test_seeds_are_whole_numbers():
    assert benchmark.parse_seeds("0,1, 2,1") == [0, 1, 2]
    for text in ("0,x", "", "1.5"):
        with pytest.raises(UserError, match="give whole numbers with commas between"):
            benchmark.parse_seeds(text)
    with pytest.raises(UserError, match="a seed is 0 or more"):
        benchmark.parse_seeds("-1")


def test_a_folder_without_sequences_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"sequences\.txt is missing; write `user item item"):
        benchmark.with_items(tmp_path, tmp_path / "log")


def test_seconds_add_up_over_processes(tmp_path):
    run = Run(tmp_path)
    lines = [(10, 0.1), (25, 0.2), (4, None), (9, 0.3)]
    with run.metrics_file.open("w") as file:
        for step, (seconds, value) in enumerate(lines):
            file.write(json.dumps({"step": step, "loss": 1.0, "seconds": seconds}) + "\n")
            if value:
                file.write(json.dumps({"step": step, "valid/ndcg@10": value}) + "\n")
    assert benchmark.training_curve(run) == ([(10, 0.1), (25, 0.2), (34, 0.3)], 34)


def test_mean_and_spread_by_hand():
    rows = [
        {"model": "a", "seed": seed, "split": "test", "subset": "all", "metric": metric, "value": value, "seconds": 10}
        for seed, value in enumerate((0.1, 0.3))
        for metric in ("recall@10", "ndcg@10", "recall@5", "ndcg@5")
    ]
    average, deviation, seeds = benchmark.spread(rows)["test", "all", "a"]["recall@10"]
    np.testing.assert_allclose([average, deviation, seeds], [0.2, np.sqrt(0.02), 2])
    assert benchmark.spread(rows)["test", "all", "a"]["seconds"] == (10, 0, 2)


def test_results_are_kept_once_for_a_commit_and_once_for_the_same_rows(tmp_path):
    entry = {"model": "a", "seed": 0, "data": "beauty", "commit": "c1", "seconds": 1.0, "rows": [{"value": 0.1}]}
    other = {**entry, "rows": [{"value": 0.2}]}
    results.append("x", [entry, {**entry, "seed": 1}], tmp_path)
    results.append("x", [{**other, "seconds": 2.0}, {**entry, "seed": 1, "commit": "c2"}], tmp_path)
    results.append("x", [{**other, "rows": [{"value": 0.3}], "commit": "c2"}], tmp_path)
    kept = json.loads((tmp_path / "x.json").read_text())
    assert [(each["seed"], each["commit"], each["seconds"]) for each in kept] == [
        (1, "c1", 1.0), (0, "c1", 2.0), (0, "c2", 1.0),
    ]  # fmt: skip
    assert all(each["command"].startswith("python ") for each in kept)
    assert results.commit() == "unknown" or len(results.commit().rstrip("+")) == 12


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """Configurations and a log in which item i is followed by i + 1; without items.jsonl."""
    configs, log = tmp_path / "configs", tmp_path / "log"
    configs.mkdir(), log.mkdir()
    (configs / "sasrec_ce.py").write_text(TINY.format(model="SasRec", system="sasrec_ce"))
    (configs / "youtubednn.py").write_text(TINY.format(model="YouTubeDnn", system="youtubednn"))
    rng, lines, times = np.random.default_rng(0), [], []
    for user in range(60):
        first, count = rng.integers(0, 40), rng.integers(4, 12)
        lines.append(f"u{user} " + " ".join(str((first + place) % 40) for place in range(count)))
        times.append(
            json.dumps({"u": f"u{user}", "t": [1_500_000_000 + 86_400 * (place // 2) for place in range(count)]})
        )
    (log / "sequences.txt").write_text("\n".join(lines) + "\n")
    (log / "timestamps.jsonl").write_text("\n".join(times) + "\n")
    monkeypatch.setattr(benchmark, "CONFIGS", configs)
    return log


def test_the_whole_on_a_small_log_without_texts(small, tmp_path, monkeypatch, capsys):
    command = ["sequential.py", "--data", str(small), "--models", "sasrec_ce,youtubednn", "--seeds", "0,1", "--quick"]
    monkeypatch.setattr(sys, "argv", [*command, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "rows.json")])
    benchmark.main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all({"model", "seed", "split", "subset", "metric", "value", "seconds"} <= set(row) for row in rows)
    ranked = {
        (row["model"], row["split"], row["seed"]): row["value"]
        for row in rows
        if row["metric"] == "recall@10" and row["subset"] == "all"
    }
    models = {model for model, *_ in ranked}
    assert {"sasrec_ce", "youtubednn", "popularity", "markov", "itemknn", "markov (ties shuffled)"} <= models
    for split in ("valid", "test"):
        assert ranked["sasrec_ce", split, 1] > 2 * ranked["popularity", split, 0]
    assert (tmp_path / "rows.svg").read_text().count("sasrec_ce") == 1
    shown = capsys.readouterr().out
    assert "±" in shown and "valid, all items ranked" in shown and "test, the history left out" in shown
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/metrics.jsonl")}
    assert len(before) == 4
    benchmark.main()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
