"""The ablation of OneSug without its trainings: what a variant changes, its arguments, its table and its plots."""

import dataclasses
import io
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from rich.console import Console

from jaxrec.config import UserError, load_config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import onesug_ablation as benchmark  # noqa: E402
from shared.ablation import parse_variants, table_of, with_files  # noqa: E402

MALL = ROOT / "configs" / "onesug_mall.py"


@pytest.fixture(scope="module")
def config():
    made = load_config(MALL)
    return dataclasses.replace(made, features=dataclasses.replace(made.features, related=10, near=4))


def changed(old, new, place=""):
    """The fields that differ, with their new values, by their place."""
    if not dataclasses.is_dataclass(old) or not dataclasses.is_dataclass(new):
        return {} if old == new else {place: new}
    found = {}
    for each in dataclasses.fields(old):
        at = f"{place}.{each.name}".lstrip(".")
        found |= changed(getattr(old, each.name), getattr(new, each.name), at)
    return found


def test_each_variant_changes_its_part_alone(config):
    no_margin = {"preference.loss.form": "linear", "preference.loss.margin": 0.0}
    pairs = {"preference.loss.compare": "pairs", "preference.rejected": 1}
    plain = pairs | no_margin | {"preference.weighted": False}
    no_pre, alone = {"features.related": 0, "features.near": 0}, {"preference": None}
    assert {name: changed(config, change(config)) for name, change in benchmark.VARIANTS.items()} == {
        "whole": {}, "no_margin": no_margin, "no_rw": {"preference.weighted": False}, "pairs": pairs,
        "pairs_no_margin": pairs | no_margin, "pairs_no_rw": plain, "no_rwr": alone, "no_pre": no_pre,
        "gra_dpo": plain | no_pre, "gra_sft": alone | no_pre, "no_copying": {"copying": False},
    }  # fmt: skip
    assert changed(config, benchmark.related(20, config)) == {"features.related": 20}
    with pytest.raises(UserError, match="no preference stage"):
        benchmark.VARIANTS["pairs"](dataclasses.replace(config, preference=None))


def test_arguments_are_checked():
    assert parse_variants(" no_pre,whole", benchmark.VARIANTS) == ["no_pre", "whole"]
    assert parse_variants("", benchmark.VARIANTS) == ["whole"]
    with pytest.raises(UserError, match="there is no 'nothing'; give some of whole, "):
        parse_variants("nothing", benchmark.VARIANTS)
    assert benchmark.parse_numbers("--beams", "32, 16,32", 1) == [16, 32]
    assert benchmark.parse_numbers("--beams", "", 1) == []
    with pytest.raises(UserError, match="--beams '0,16': give numbers of 1 or more"):
        benchmark.parse_numbers("--beams", "0,16", 1)
    with pytest.raises(UserError, match="--related 'ten': give whole numbers"):
        benchmark.parse_numbers("--related", "ten", 0)
    with pytest.raises(UserError, match="configuration of tiger; give one of onesug"):
        benchmark.base_config(ROOT / "configs" / "tiger.py", [], quick=False)
    with pytest.raises(UserError, match=r"--data path=x: give FIELD=FILE, with one of .*users"):
        with_files(load_config(MALL), ["path=x"])


def test_what_is_shown_is_measured_and_quick_is_quick():
    made = load_config(MALL)
    whole, quick = (benchmark.base_config(MALL, [], quick) for quick in (False, True))
    assert {10, 16} <= set(whole.evaluation.cutoffs) and set(made.evaluation.cutoffs) <= set(whole.evaluation.cutoffs)
    assert changed(made, dataclasses.replace(whole, evaluation=made.evaluation)) == {}
    assert quick.training.steps == quick.preference.training.steps == benchmark.QUICK_STEPS
    quick.check()


def test_variants_of_a_seed_share_what_is_made(tmp_path, monkeypatch, config):
    """A new run begins with the tables and the first stage of another, and with none of its results."""
    other = tmp_path / "onesug_mall-whole-3"
    for name in ("tables/queries.parquet", "examples/x", "stages/likelihood/fingerprint.json",
                 "stages/preference/fingerprint.json", "evaluation/evaluation.json", "validation/evaluation.json",
                 "beams_16/evaluation.json", "report.html", "metrics.jsonl"):  # fmt: skip
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_text("{}")
    given = []
    monkeypatch.setattr(benchmark, "train", lambda run, config: given.append(run.path))
    args = Namespace(runs=tmp_path, quick=False, config=MALL)
    for seed, kept in ((3, ["examples/x", "stages/likelihood/fingerprint.json", "tables/queries.parquet"]), (4, [])):
        run, seconds = benchmark.trained(args, "no_rw", dataclasses.replace(config, seed=seed))
        assert given[-1] == run.path == tmp_path / f"onesug_mall-no_rw-{seed}" and seconds >= 0
        files = [str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()]
        assert sorted(set(files) - {"config.json", ".lock"}) == kept


def entry(model, seed, value, *others):
    rows = [
        {"model": name, "split": "test", "subset": "all", "metric": metric, "value": number, "count": 9}
        for name, metric, number in (("onesug", "hr@16", value), ("onesug", "mrr@16", value / 2), *others)
    ]
    return {"model": model, "seed": seed, "seconds": 1.0, "rows": rows}


def test_the_table_has_variants_and_the_baselines_beside_the_first():
    popular = ("popular completion", "hr@16", 0.5)
    entries = [entry("whole", seed, 0.8 + seed / 10, popular) for seed in (0, 1)] + [entry("no_rw", 0, 0.7, popular)]
    table = table_of(entries, "onesug", benchmark.SHOWN)
    assert [column.header for column in table.columns] == ["", "hr@16, all", "mrr@16, all"]
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    lines = {line.split("│")[1].strip(): line for line in text.getvalue().splitlines() if "±" in line}
    assert list(lines) == ["whole", "popular completion", "no_rw"]
    assert "0.8500 ± 0.0707" in lines["whole"] and "0.5000 ± 0.0000" in lines["popular completion"]
    assert "0.7000 ± 0.0000" in lines["no_rw"]


def test_sweeps_are_plotted_over_their_numbers(tmp_path):
    timed = ("onesug", "ms_a_prefix", 4.25)
    entries = [entry(f"related_{each}", 0, 0.6) for each in (0, 10)]
    entries += [entry(f"beams_{each}", seed, 0.7, timed) for each in (16, 32) for seed in (0, 1)]
    path = tmp_path / "sweeps.svg"
    benchmark.plot(entries, "onesug", {"related": [10], "beams": []}, path)
    assert not path.exists()  # one point is no sweep
    benchmark.plot(entries, "onesug", {"related": [0, 10], "beams": [16, 32]}, path)
    text = path.read_text()
    for words in ("related queries", "beams", "hr@16", "mrr@16", "4.2 ms"):
        assert words in text, words
