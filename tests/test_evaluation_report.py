"""report.html: what it shows, that it stands alone, and that nothing in the data can break out of it."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from html_page import check, check_stands_alone

from jaxrec.config import UserError
from jaxrec.evaluation.report import write_report
from jaxrec.semantic_ids import SemanticIds, write_codes
from jaxrec.semantic_ids.table.quality import quality

EVIL = '<script>alert("1")</script>&\'"'


def row(model, subset, metric, value, count=9):
    return {"model": model, "split": "test", "subset": subset, "metric": metric, "value": value, "count": count}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "my-run"
    (path / "tables").mkdir(parents=True)
    (path / "semantic_ids").mkdir()
    (path / "config.json").write_text(json.dumps({"system": "onemall"}))
    (path / "tables" / "statistics.json").write_text(json.dumps({"users": 2306, "items": 10374}))
    rows = [row("popularity", "all", "recall@10", 0.05), row("OneMall", "all", "recall@10", 0.15)]
    rows += [row("popularity", "new", "recall@10", 0.02, 7), row("OneMall", "new", "recall@10", 0.01, 7)]
    rows += [row(EVIL, "all", "recall@10", 0.0)]
    (path / "evaluation.json").write_text(json.dumps(rows))
    lines = [json.dumps({"stage": "train", "step": step, "loss": 9 / step, "note": "x"}) for step in range(1, 1000)]
    broken = ['{"step": 3, "lo', '{"stage": "train", "step": 1000, "loss": NaN}', "[]"]
    (path / "metrics.jsonl").write_text("\n".join(lines + broken))
    titles = [f"Title {n}" for n in range(60)] + [EVIL]
    ids = [f"i{n:02}" for n in range(61)]
    pq.write_table(
        pa.table({"item_id": ids, "title": titles, "category": ["Tea"] * 61, "count": list(range(61))}),
        path / "tables" / "items.parquet",
    )
    codes = {"c1": [0] * 60 + [7], "c2": [n % 20 for n in range(61)], "c3": list(range(61))}
    pq.write_table(pa.table({"item_id": ids, **codes}), path / "semantic_ids" / "codes.parquet")
    quality = {"conflict_rate": 0.0125, "levels": [{"used": 3}], "by_level": {"1": {"perplexity": 7.5}}, "name": EVIL}
    (path / "semantic_ids" / "quality.json").write_text(json.dumps(quality))
    generated = [{"title": "Green tea", "score": -1.5, "hit": True, "new": True}, {"title": EVIL, "score": -2, "hit": False, "new": False}]  # noqa: E501  # fmt: skip
    shown = {"user": EVIL, "history": [f"Old {n}" for n in range(20)], "targets": ["Green tea"], "generated": generated}
    (path / "examples_shown.json").write_text(json.dumps([shown]))
    return path


@pytest.fixture(scope="module")
def report(run):
    return write_report(run)


def test_it_stands_alone_and_escapes_everything(report):
    check_stands_alone(report)
    assert check(report).text.count(EVIL) >= 5


def test_the_best_of_every_column_is_marked_and_the_headline_compares(report):
    html = report.read_text()
    assert re.findall(r'class="value best"[^>]*>([0-9.]+)<', html) == ["0.1500", "0.0200"]
    assert "recall@10, +200.0% against popularity" in html and "2,306" in html and "10,374" in html
    first = html[html.index("</nav>") :].split("\n")[1]
    assert first.startswith('<p class="verdict">onemall is BELOW the best baseline: recall@10 on new items 0.0100, ')
    assert "popularity 0.0200 (-50.0%).</p>" in first
    assert '<tr class="system"><td>OneMall</td>' in html


def test_curves_skip_what_is_no_number(report):
    page = check(report)
    assert page.tags.count("svg") == 1 and "train loss" in page.text and "at step 999" in page.text


def test_every_stage_has_its_own_curves_in_the_order_of_training(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    lines = [{"stage": stage, "step": 1, "loss": 2.0} for stage in ("other", "preference", "likelihood")]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run" / "stages.json").write_text(json.dumps(["alignment", "likelihood", "preference"]))
    page = check(write_report(tmp_path / "run"))
    assert page.tags.count("svg") == 3
    places = [page.text.index(f"Stage {name}") for name in ("likelihood", "preference", "other")]
    assert places == sorted(places) and "Stage alignment" not in page.text
    assert [page.text.index(f"{name} loss") > page.text.index(f"Stage {name}") for name in ("likelihood", "other")]


def test_the_tree_goes_from_coarse_to_fine_and_says_what_it_leaves_out(report):
    page = check(report)
    # Branches: 0 and 7; below 0 twelve of its twenty, below 7 its only one.
    assert page.tags.count("details") == 2 + 12 + 1
    assert "and 8 more" in page.text and "<7,0,60>" in page.text and "Tea 100%" in page.text


def test_examples_mark_hits_and_new_items(report):
    html = report.read_text()
    assert html.count('<li class="is-hit">Green tea') == 1
    assert html.count('<span class="chip hit">') == html.count('<span class="chip new">') == 1
    assert "5 earlier" in html and "Old 5<" in html and "Old 4<" not in html


def test_quality_is_flattened(report):
    text = check(report).text
    assert "conflict rate" in text and "0.0125" in text and "by level.1.perplexity" in text


def test_quality_and_tree_of_what_the_tokenizer_writes(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    codes = np.stack([np.zeros(61), np.arange(61) % 20, np.arange(61)], axis=1).astype(np.int32)
    space = SemanticIds(codes, (4, 20, 64))
    write_codes(tmp_path / "run" / "semantic_ids" / "codes.parquet", [f"i{n:02}" for n in range(61)], space)
    (tmp_path / "run" / "semantic_ids" / "quality.json").write_text(json.dumps(quality(space)))
    text = check(write_report(tmp_path / "run")).text
    assert "Each level alone" in text and "Levels together" in text and "CUR" in text and "independent coding" in text


def test_ids_of_other_items_are_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "semantic_ids" / "codes.parquet"
    pq.write_table(pa.table({"item_id": ["other"], "c1": [0]}), path)
    with pytest.raises(UserError, match=r"'other'.*not in items.parquet"):
        write_report(tmp_path / "run")


def test_it_is_the_same_bytes_when_written_again(run, report):
    before = report.read_bytes()
    assert write_report(run).read_bytes() == before


def test_a_run_with_nothing_yet_has_a_short_report(tmp_path):
    (tmp_path / "config.json").write_text('{"system": "onemall"}')
    page = check(write_report(tmp_path))
    assert "section" not in page.tags and tmp_path.name in page.text


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
