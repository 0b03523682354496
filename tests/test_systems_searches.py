"""The evaluation of a system that answers searches with items: a stub on a tiny mall, from tables to the report."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from html_page import check

from jaxrec.data.examples import Records, write_examples
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.searches import with_texts
from jaxrec.data.sources import SyntheticMall
from jaxrec.evaluation import search_cases
from jaxrec.files import read_json
from jaxrec.run import Run
from jaxrec.systems import comparison, searches
from jaxrec.systems.comparison import EvaluationConfig, compare, present

MALL = SyntheticMall(*(40, 60, 6, 3, 5), browsed_per_session=1, exposures_per_session=1, searched=0.7)


@dataclasses.dataclass
class Searched:
    """An assembly of searches."""

    examples: Path
    queries: np.ndarray
    behaviors = tuple(MALL.behaviors)
    wanted = np.isin(MALL.behaviors, ("click", *MALL.target_behaviors))

    @property
    def target_behaviors(self):
        return np.flatnonzero(self.wanted).tolist()

    def cases(self, split):
        cases = search_cases(Records(self.examples, split), self.target_behaviors, split)
        return dataclasses.replace(cases, histories=[with_texts(each, self.queries) for each in cases.histories])


class Same:
    """Ranks the items as they stand."""

    def __init__(self, assembly):
        self.assembly = assembly

    def recommend(self, histories, k, exclude_history=False):
        ranked = np.arange(min(k, 60), dtype=np.int32)
        return np.tile(ranked, (len(histories), 1)), np.zeros((len(histories), len(ranked)), np.float32)


def texts(run):
    return np.array(pq.read_table(run.tables / "queries.parquet")["query"].to_pylist(), object)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("runs") / "run")
    for folder in (run.tables, run.examples, run.path / "evaluation"):
        folder.mkdir(parents=True)
    prepare(MALL, PrepareConfig(), run.tables)
    write_examples(run.tables, run.examples, MALL.behaviors)
    run.config_file.write_text(json.dumps({"system": "stub"}))
    count = pq.read_metadata(run.tables / "queries.parquet").num_rows
    judged = {"query_index": pa.array([0, 0, count - 1], pa.int32()), "item": pa.array([1, 2, 3], pa.int32())}
    pq.write_table(pa.table(judged | {"grade": [2.0, 1.0, 3.0], "split": ["test"] * 3}), run.tables / "judgments.parquet")  # noqa: E501  # fmt: skip
    config = EvaluationConfig(cutoffs=(5, 10), shown_users=3)
    compare(run, Same(Searched(run.examples, texts(run))), config, run.path / "evaluation")
    present(run)
    return run


def test_every_baseline_is_measured_on_every_subset(run):
    rows = read_json(run.path / "evaluation.json")
    models = {row["model"] for row in rows}
    assert models == {
        "stub", "popularity", "popularity in query", "recent popularity in query", "personal frequency in query",
        "personal frequency, then recent in query", "markov in query", "itemknn in query", "bm25",
    }  # fmt: skip
    subsets = {
        "all", "new", "new_in_full_ranking", "head_queries", "torso_queries", "tail_queries", "unseen_queries",
        "led_to_click", "led_to_purchase", "judged", "judged_only",
    }  # fmt: skip
    assert {row["subset"] for row in rows if row["model"] == "bm25"} == subsets
    counts = {row["subset"]: row["count"] for row in rows if row["metric"].endswith("@10")}
    assert counts["head_queries"] + counts["torso_queries"] + counts["tail_queries"] == counts["all"]
    assert counts["judged"] == 2
    recall = {row["model"]: row["value"] for row in rows if (row["subset"], row["metric"]) == ("all", "recall@5")}
    assert recall["popularity in query"] > 1.5 * recall["popularity"]


def test_the_example_records_are_read_only_by_the_cases(run, tmp_path, monkeypatch):
    """Of all users at once, they are the memory of an evaluation."""
    monkeypatch.setattr(comparison, "Records", lambda *_: pytest.fail("the records were read"))
    config = EvaluationConfig(cutoffs=(5,), shown_users=1, max_users=4, baselines=False)
    compare(run, Same(Searched(run.examples, texts(run))), config, tmp_path)
    with pytest.raises(pytest.fail.Exception, match="the records were read"):
        comparison.cases_of(SimpleNamespace(examples=run.examples), "test")


def test_neighbours_in_a_query_are_more(run, monkeypatch):
    assert searches.NEIGHBORS > 100
    monkeypatch.setattr(searches, "NEIGHBORS", 3)
    similarity = searches.fit_search_baselines(run, Searched(run.examples, texts(run)))["itemknn in query"]
    assert np.diff(similarity.within.similarity.indptr).max() == 3


def test_the_report_shows_searches(run):
    page = check(run.path / "report.html")
    for text in ("Some searches", "Searched for", "The search led to", "By query", "Judged pairs", "tail queries"):
        assert text in page.text, text
    shown = read_json(run.path / "examples_shown.json")
    assert len(shown) == 3 and all(each["query"] for each in shown) and any(each.get("searches") for each in shown)
    assert "stub is BELOW the best baseline: recall@10" in page.text and "mrr@10 on new items" in page.text
