"""The last phase of every system: the trained model beside the baselines, and the report."""

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq

from jaxrec.config import UserError, check_choice, check_least
from jaxrec.console import console
from jaxrec.data.examples import Record, Records
from jaxrec.data.tables import FEEDBACK
from jaxrec.evaluation import (
    Cases,
    Recommender,
    comparison_tables,
    evaluate,
    evaluate_ties_shuffled,
    fit_baselines,
    make_cases,
    standing_table,
    standings,
    text_baselines,
)
from jaxrec.evaluation.comparison import TEACHER_FORCED, Row
from jaxrec.evaluation.metrics import CUTOFFS, mean
from jaxrec.evaluation.proxies import courses
from jaxrec.evaluation.report import write_report
from jaxrec.files import read_json, write_json
from jaxrec.run import Run
from jaxrec.systems.searches import are_searches, evaluate_searches, fit_search_baselines
from jaxrec.systems.suggestions import are_suggestions, evaluate_suggestions, fit_suggestion_baselines
from jaxrec.targets.semantic_ids import held_items, show_items


class TrainedRecommender(Recommender, Protocol):
    """A system's trained model, with what it was made of.

    A generative one also has `space`, its target space, and `diagnose(cases)`; without, answers are items. An assembly
    whose targets are not the items of later sessions has `cases(split)`: cases whose targets are answers of its space.

    A model that is measured in other forms too has `variants`: recommenders by the names of their rows. One that judges
    more than rankings has `further_rows(split, folder)`: rows of its own subsets; `folder` is that of the evaluation.
    """

    assembly: Any


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured at the end of a run."""

    split: str = "test"
    """test, or valid while choosing a configuration"""
    max_users: int = 0
    """measure this many users, drawn by the seed; 0 for all"""
    seed: int = 0
    """seed of that draw, and of shuffled ties"""
    cutoffs: tuple[int, ...] = CUTOFFS
    """places that are measured; the deepest is the length of every ranking"""
    exclude_history: bool = False
    """of a validation: what the user had is left out of the ranking and of the targets, as in the rows `new`; the final
    evaluation always measures both ways"""
    baselines: bool = True
    """measure popularity, Markov and the others too"""
    shown_users: int = 8
    """users whose history and recommendations the report shows"""
    beside: tuple[Path, ...] = ()
    """of the final evaluation: finished runs on the same log, whose models are measured on the same cases and stand in
    the same tables"""

    def __post_init__(self):
        check_choice(self, "evaluation", "split", ("test", "valid"))
        check_least(self, "evaluation", max_users=0, seed=0, cutoffs=1, shown_users=0)
        if not self.cutoffs:
            raise UserError(
                "configuration key 'evaluation.cutoffs' is empty; give places that are measured, such as 10"
            )

    def check_validation(self) -> None:
        """Whether this may decide when a training stops and which state is the best.

        Raises:
          UserError: it looks at the test split.
        """
        if self.split != "valid":
            raise UserError(
                f"configuration key 'validation.split' is '{self.split}'; by it the best state is chosen: give valid"
            )
        if self.beside:
            raise UserError("configuration key 'validation.beside' is of no use while training; set evaluation.beside")


def compare(
    run: Run,
    model: TrainedRecommender,
    config: EvaluationConfig,
    folder: Path,
    beside: Mapping[str, Recommender] | None = None,
) -> None:
    """Measures the model and the baselines; writes evaluation.json and examples_shown.json into `folder`.

    beside: models of other runs, by the names of their rows.
    """
    name, kind = read_json(run.config_file)["system"], model.space.kind if hasattr(model, "space") else "items"
    records = functools.cache(lambda: list(Records(model.assembly.examples, config.split)))  # of all users, if at all
    cases = draw(cases_of(model.assembly, config.split, records), config)
    ours = {**(beside or {}), name: model, **getattr(model, "variants", {})}
    rows = _measured(run, ours, model, kind, cases, config, records)
    rows += [
        {
            "model": name,
            "split": config.split,
            "subset": TEACHER_FORCED[kind],
            "metric": metric,
            "value": mean(pair),
            "count": pair[1],
        }
        for metric, pair in (model.diagnose(cases) if hasattr(model, "diagnose") else {}).items()
    ]
    if hasattr(model, "further_rows"):
        rows += model.further_rows(config.split, folder)
    write_json(folder / "evaluation.json", rows)
    write_json(folder / "examples_shown.json", _shown(run, model, cases, config.shown_users))


def _measured(
    run: Run,
    ours: Mapping[str, Recommender],
    model: TrainedRecommender,
    kind: str,
    cases: Cases,
    config: EvaluationConfig,
    records: Callable[[], Sequence[Record]],
) -> list[Row]:
    """The rows of `ours`, among them the model, and of the baselines that fit the cases and the kind of answers."""
    assembly, measured = model.assembly, {"split": config.split, "cutoffs": config.cutoffs}
    if kind == "items" and are_searches(cases):
        baselines = fit_search_baselines(run, assembly) if config.baselines else {}
        return evaluate_searches(run, {**baselines, **ours}, cases, assembly.behaviors, **measured)
    if kind == "texts" and are_suggestions(cases):
        baselines = fit_suggestion_baselines(run, model.space) if config.baselines else {}
        return evaluate_suggestions(run, {**baselines, **ours}, cases, model.space, **measured)
    if not config.baselines:
        return evaluate(ours, cases, **measured)
    if kind == "texts":
        return evaluate({**text_baselines(model.space), **ours}, cases, **measured)
    items, targets = pq.read_metadata(run.tables / "items.parquet").num_rows, assembly.target_behaviors
    rows = evaluate({**fit_baselines(records(), items, targets), **ours}, cases, **measured)
    return rows + evaluate_ties_shuffled(records(), items, targets, seed=config.seed, **measured)


def present(run: Run) -> None:
    """Puts the results where readers look first, writes report.html and prints the comparison, the verdict last."""
    for name in ("evaluation.json", "examples_shown.json"):
        shutil.copyfile(run.path / "evaluation" / name, run.path / name)
    report = write_report(run.path)
    rows, system = read_json(run.path / "evaluation.json"), read_json(run.config_file)["system"]
    tables = comparison_tables(rows)
    if found := standings(rows, system):
        tables.append(standing_table(found, system))
    for table in tables:
        console.print(table)
    for course in courses(run.metrics_file):
        console.print(str(course), markup=False)
    console.print(f"report: {report}", markup=False)


def cases_of(assembly: Any, split: str, records: Callable[[], Sequence[Record]] | None = None) -> Cases:
    """The cases of a split: the assembly's own, or the items of each user's first session in it.

    records: reads the example records of the split; None: they are read one by one.
    """
    if hasattr(assembly, "cases"):
        return assembly.cases(split)
    found = Records(assembly.examples, split) if records is None else records()
    return make_cases(found, assembly.target_behaviors, split)


def draw(cases: Cases, config: EvaluationConfig) -> Cases:
    """Some of the cases: `config.max_users` of them, the same for the same seed; all if there are no more."""
    if not 0 < config.max_users < len(cases):
        return cases
    return cases.take(np.sort(np.random.default_rng(config.seed).permutation(len(cases))[: config.max_users]))


def _shown(run: Run, model: Recommender, cases: Cases, count: int) -> list[dict]:
    """A few users in readable text: what they had, what they took next, what was generated."""
    titles = pq.read_table(run.tables / "items.parquet", columns=["title"])["title"].to_pylist()
    users = pq.read_table(run.tables / "users.parquet")["user_id"].to_pylist()
    rows = np.linspace(0, len(cases) - 1, min(count, len(cases))).astype(int)
    some = cases.take(rows)
    answers, scores = model.recommend(some.histories, 10)
    wanted, space = model.assembly.wanted, getattr(model, "space", None)
    show, held = (show_items, held_items) if space is None else (space.show, space.held)
    shown = []
    for row, history in enumerate(some.histories):
        right, had = some.targets[row][some.where[row]], held(history, wanted)
        generated = [
            {"title": show([answer], titles)[0], "score": float(score), "hit": bool(answer in right),
             "new": bool(answer not in had)}
            for answer, score in zip(answers[row], scores[row], strict=True)
            if answer >= 0
        ]  # fmt: skip
        recent = list(dict.fromkeys(held_items(history, wanted)[::-1].tolist()))[:20][::-1]
        shown.append(
            {
                "user": users[some.users[row]],
                **{name: str(history[name]) for name in ("query", "prefix") if name in history},
                **_searched(history),
                "history": show_items(recent, titles),
                "targets": show(right, titles),
                **_feedback(some, row),
                "generated": generated,
            }
        )
    return shown


def _searched(history: dict) -> dict[str, list[str]]:
    """The last searches of a history that holds texts."""
    queries = history.get("search_query", np.zeros(0, np.int32))
    return {"searches": queries[-5:].tolist()} if queries.dtype == object and len(queries) else {}


def _feedback(cases: Cases, row: int) -> dict[str, list[str]]:
    """The strongest feedback on each of a case's truths, by name."""
    if cases.feedback is None:
        return {}
    return {"feedback": [FEEDBACK[given] for given in cases.feedback[row][cases.where[row]]]}
