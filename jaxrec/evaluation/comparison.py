"""The comparison: every model on the same cases and subsets (`jaxrec.evaluation.subsets`), as rows for evaluation.json
and as tables."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from rich.table import Table

from jaxrec.console import progress
from jaxrec.data.examples import Record
from jaxrec.evaluation.baselines import Recommender, fit_baselines
from jaxrec.evaluation.cases import Cases, make_cases, shuffle_ties, tied_fraction
from jaxrec.evaluation.metrics import CUTOFFS, SumCount, add, mean, ranking_metrics
from jaxrec.evaluation.subsets import ALL, NEW, Subset, is_of_queries, item_subsets
from jaxrec.evaluation.suggestion_subsets import GROUPS

SEMANTIC_IDS = "semantic_ids"  # the subset of what is measured of a model's IDs: accuracy per level, validity
TEXTS = "texts"  # the same of a model's texts: accuracy of their tokens, validity
REWARDS = "rewards"  # the subset of what a policy is worth, by the learned and the true reward
SUGGESTIONS = "suggestions"  # the subset of what is shown for prefixes, whatever the truth
TEACHER_FORCED = {"items": SEMANTIC_IDS, "texts": TEXTS}
"""The subset of what is measured of targets, by the kind of their space."""
SHOWN_TO_USERS = "impressions"
"""What is counted where probabilities of what was shown are judged."""
IMPRESSIONS = {name: f"{SHOWN_TO_USERS}_{name}" for name in ("ctr", "cvr", "ctcvr")}
"""The subsets of what was shown, by the probability that is judged: of a click, of a clicked item's purchase, of a
purchase."""
CALIBRATION = "calibration.json"
"""In the folder of an evaluation: by model and probability, the bins of a calibration curve."""
CASES = {"prefix": "prefixes", "query": "searches"}
"""What is counted, by the field that the histories of such cases have; users in all others."""
BY_QUERY = "by query"
TIES_SHUFFLED = " (ties shuffled)"

Row = dict[str, str | float | int]
Measure = Callable[[Cases, np.ndarray], dict[str, SumCount]]
"""Metrics of a few cases and their full ranking int32 [B, k]."""


def unit_of(rows: Sequence[Row], targets: bool = False) -> str:
    """What the counts of rows count: users, or as the first row says in `cases`; targets: of teacher-forced targets."""
    return "targets" if targets else str(rows[0].get("cases", "users") if rows else "users")


def evaluate(
    models: Mapping[str, Recommender],
    cases: Cases,
    *,
    split: str = "test",
    cutoffs: Sequence[int] = CUTOFFS,
    batch_size: int = 512,
    subsets: Sequence[Subset] | None = None,
    measures: Mapping[str, Measure] | None = None,
) -> list[Row]:
    """Rows `{model, split, subset, metric, value, count}`: the mean over `count` users, for every model and subset.

    Where cases are searches or prefixes, of which a user may have several, rows also have `cases`: the unit of `count`.
    Each model ranks every case twice, with and without the items of the history, `batch_size` histories at a time.

    subsets: of these cases; None: those of `item_subsets`.
    measures: what else is measured of the full ranking, by the subset of its rows.
    """
    rows, subsets, measures = [], item_subsets(cases) if subsets is None else subsets, measures or {}
    asked = next((unit for name, unit in CASES.items() if len(cases) and name in cases.histories[0]), None)
    with progress() as bars:
        task = bars.add_task("evaluate", total=2 * len(cases) * len(models))
        for name, model in models.items():
            bars.update(task, description=f"evaluate {name}")
            sums = {subset: {} for subset in (*(each.name for each in subsets), *measures)}
            for start in range(0, len(cases), batch_size):
                batch = np.arange(start, min(start + batch_size, len(cases)))
                for subset, metrics in _evaluate_batch(model, cases, batch, cutoffs, subsets, measures).items():
                    sums[subset] = add(sums[subset], metrics)
                bars.advance(task, 2 * len(batch))
            found = {"model": name, "split": split}
            unit = {} if asked is None else {"cases": asked}
            rows += [
                {**found, "subset": subset, "metric": metric, "value": mean(pair), "count": pair[1], **unit}
                for subset, metrics in sums.items()
                for metric, pair in metrics.items()
            ]
    return rows


def _evaluate_batch(
    model: Recommender,
    cases: Cases,
    rows: np.ndarray,
    cutoffs: Sequence[int],
    subsets: Sequence[Subset],
    measures: Mapping[str, Measure],
) -> dict[str, dict[str, SumCount]]:
    """The metrics of the cases `rows` by subset."""
    depth, batch = max(cutoffs), cases.take(rows)
    ranked = [model.recommend(batch.histories, depth, exclude_history=without)[0] for without in (False, True)]
    found = {
        subset.name: ranking_metrics(ranked[subset.without_history], batch.targets, subset.where[rows], cutoffs)
        for subset in subsets
    }
    return found | {name: measure(batch, ranked[False]) for name, measure in measures.items()}


def evaluate_ties_shuffled(
    records: Sequence[Record],
    num_items: int,
    target_behaviors: Sequence[int],
    *,
    split: str = "test",
    seed: int = 0,
    cutoffs: Sequence[int] = CUTOFFS,
) -> list[Row]:
    """Rows of the baselines, named `markov (ties shuffled)` and so on, fitted and tested on data with shuffled ties.

    Empty if no order is arbitrary: no ties, or sessions are baskets. Baselines only: the shuffled target may be among a
    trained model's training events.
    """
    if tied_fraction(records) == 0:
        return []
    shuffled = [shuffle_ties(record, seed) for record in records]
    baselines = fit_baselines(shuffled, num_items, target_behaviors)
    models = {f"{name}{TIES_SHUFFLED}": model for name, model in baselines.items()}
    return evaluate(models, make_cases(shuffled, target_behaviors, split), split=split, cutoffs=cutoffs)


SHOWN = (
    "recall@10",
    "ndcg@10",
    "hr@10",
    "mrr@10",
    "hr@16",
    "mrr@16",
    "full",
    "begins",
    "duplicates",
    "saved",
    "recall@50",
    "recall@350",
    "recall@500",
    "acc_sid1",
    "acc_sid2",
    "acc_sid3",
    "acc_token",
    "validity",
    "auc",
    "gauc",
    "log_loss",
    "ece",
)
LOWER_IS_BETTER = ("log_loss", "ece")

SHOWN_OF_REWARDS = (
    "true_reward@10",
    "true_reward@100",
    "reward@10",
    "reward@100",
    "spent@10",
    "hr@50",
    "recall@10",
    "distinct@10",
    "validity",
)


def shown_metrics(subset: str, metrics: Sequence[str]) -> Sequence[str]:
    """The metrics that tables of a subset show; `metrics` for most."""
    return SHOWN_OF_REWARDS if subset == REWARDS else metrics


def comparison_tables(rows: Iterable[Row], metrics: Sequence[str] = SHOWN) -> list[Table]:
    """One rich table a split and subset, one row a model, the best of every column bold; one a group of subsets."""
    rows = list(rows)
    tables, others = [], [row for row in rows if not group_of(row["subset"])]
    for (split, subset), group in groupby(sorted(others, key=_split_and_subset), key=_split_and_subset):
        group = list(group)
        values, counts = pivot(group)
        columns = shown_metrics(subset, metrics)
        shown = [metric for metric in columns if any(metric in row for row in values.values())]
        best = {metric: best_of(metric, values) for metric in shown}
        unit = unit_of(group, subset in TEACHER_FORCED.values())
        title = f"{split}, {subset.replace('_', ' ')} ({max(counts.values()):,.0f} {unit})"
        table = Table(title=title, title_justify="left")
        table.add_column("model")
        for metric in shown:
            table.add_column(metric, justify="right")
        for model, row in values.items():
            cells = [row.get(metric) for metric in shown]
            table.add_row(model, *(_cell(cell, best[metric]) for cell, metric in zip(cells, shown, strict=True)))
        tables.append(table)
    return tables + [_group_table(f"{split}, {group}", columns) for (split, group), columns in grouped(rows).items()]


def group_of(subset: str) -> str:
    """The group of subsets that a subset stands in one table with, such as `by query`; "" for a table of its own."""
    return BY_QUERY if is_of_queries(subset) else GROUPS.get(subset, "")


@dataclass(frozen=True)
class SubsetColumn:
    """A subset of the searches or prefixes, with one metric of every model."""

    subset: str
    metric: str
    count: int
    """searches or prefixes"""
    values: dict[str, float]
    """by model"""

    @property
    def title(self) -> str:
        """The subset in words."""
        return self.subset.replace("_", " ")


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str], list[SubsetColumn]]:
    """By split and group of subsets, the columns of the group's table: two metrics of each subset.

    They are recall and MRR at 10 of searches, HR and MRR at 16 or 10 of prefixes; at the least place measured where
    none of these was. Empty where neither was measured; a subset without a case is left out.
    """
    found: dict[tuple[str, str], dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        if (group := group_of(row["subset"])) and row["count"]:
            found.setdefault((row["split"], group), {}).setdefault((row["subset"], row["metric"]), []).append(row)
    columns: dict[tuple[str, str], list[SubsetColumn]] = {}
    for key, metrics in found.items():
        places = sorted({int(metric.split("@")[1]) for _, metric in metrics})
        first, wanted = ("recall", (10,)) if key[1] == BY_QUERY else ("hr", (16, 10))
        place = next((place for place in wanted if place in places), places[0])
        for (subset, metric), group in metrics.items():
            if metric in (f"{first}@{place}", f"mrr@{place}"):
                values = {row["model"]: row["value"] for row in group}
                columns.setdefault(key, []).append(SubsetColumn(subset, metric, group[0]["count"], values))
    return columns


def _group_table(title: str, columns: Sequence[SubsetColumn]) -> Table:
    """One column a subset, with all of its metrics in a cell."""
    metrics, subsets = (dict.fromkeys(getattr(each, name) for each in columns) for name in ("metric", "title"))
    table = Table(title=f"{title}: {' / '.join(metrics)}", title_justify="left")
    table.add_column("model")
    for title in subsets:
        count = next(column.count for column in columns if column.title == title)
        table.add_column(f"{title}\n({count:,.0f})", justify="right")
    for model in dict.fromkeys(model for column in columns for model in column.values):
        cells = [(each.title, _cell(each.values.get(model), max(each.values.values()))) for each in columns]
        table.add_row(model, *(" / ".join(cell for of, cell in cells if of == title) for title in subsets))
    return table


JUDGED = ((ALL, "recall@10"), (ALL, "ndcg@10"), (NEW, "recall@10"), (NEW, "ndcg@10"))
"""The (subset, metric) pairs in which a system is compared with the best baseline."""
JUDGED_OF = {
    CASES["query"]: ((ALL, "recall@10"), (ALL, "mrr@10"), (NEW, "recall@10"), (NEW, "mrr@10")),
    CASES["prefix"]: ((ALL, "hr@16"), (ALL, "mrr@16"), (NEW, "hr@16"), (NEW, "mrr@16")),
}
"""The same by what is counted."""
ANSWERS = {"prefixes": "queries"}
"""What answers are called, by what is counted; items in all others."""


@dataclass(frozen=True)
class Standing:
    """A system and the best baseline in one metric of one subset."""

    subset: str
    metric: str
    value: float
    """The system's value."""
    baseline: str
    best: float
    """The baseline's value."""
    answers: str = "items"
    """What answers are called."""

    @property
    def difference(self) -> str:
        """Difference of the system from the baseline, in percent, with its sign."""
        if self.value == self.best:
            return "equal"
        return f"{self.value / self.best - 1:+.1%}" if self.best else "above 0"

    @property
    def what(self) -> str:
        """The metric and the subset in words."""
        return self.metric if self.subset == "all" else f"{self.metric} on new {self.answers}"

    def __str__(self) -> str:
        return f"{self.what} {self.value:.4f}, {self.baseline} {self.best:.4f} ({self.difference})"


def standings(rows: Iterable[Row], system: str) -> list[Standing]:
    """The system in each of JUDGED, of searches and prefixes JUDGED_OF; empty if it or every baseline is missing.

    Rows of shuffled ties are ignored.
    """
    found = []
    rows = [row for row in rows if row["count"] and not row["model"].endswith(TIES_SHUFFLED)]
    unit = unit_of(rows)
    measured = {(row["subset"], row["metric"]) for row in rows}
    wanted = JUDGED_OF.get(unit, JUDGED)
    for subset, metric in wanted if measured.intersection(wanted) else JUDGED:
        values = {row["model"]: row["value"] for row in rows if (row["subset"], row["metric"]) == (subset, metric)}
        ours = [name for name in values if is_system(name, system)]
        others = [name for name in values if name not in ours]
        if ours and others:
            best = max(others, key=values.get)
            found.append(Standing(subset, metric, values[ours[0]], best, values[best], ANSWERS.get(unit, "items")))
    return found


def verdict(found: Sequence[Standing], system: str) -> str:
    """One sentence: whether and by how much the system is below the best baseline anywhere; "" without standings."""
    if not found:
        return ""
    below = [each for each in found if each.value < each.best]
    if below:
        return f"{system} is BELOW the best baseline: {'; '.join(map(str, below))}"
    return f"{system} is not below the best baseline: {'; '.join(map(str, found))}"


def standing_table(found: Sequence[Standing], system: str) -> Table:
    """The rich table of `standings`, under its verdict."""
    table = Table(title=verdict(found, system), title_justify="left")
    for column in ("subset", "metric", system, "best baseline", "baseline's", "difference"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("subset", "best baseline") else "right")
    for each in found:
        values = (f"{each.value:.4f}", each.baseline, f"{each.best:.4f}", each.difference)
        table.add_row(each.subset, each.metric, *values)
    return table


def best_of(metric: str, values: Mapping[str, Mapping[str, float]]) -> float:
    """The best value of a metric among {model: {metric: value}}."""
    found = [row[metric] for row in values.values() if metric in row]
    return (min if metric in LOWER_IS_BETTER else max)(found)


def is_system(model: str, system: str) -> bool:
    """Whether a row's model is the system of the run, ignoring spelling variants."""
    return model.lower().startswith(system.lower())


def pivot(rows: Iterable[Row]) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """({model: {metric: value}}, {model: count}) of rows of one split and subset, models in their first order."""
    values: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    for row in rows:
        values.setdefault(row["model"], {})[row["metric"]] = row["value"]
        counts.setdefault(row["model"], row["count"])
    return values, counts


def _split_and_subset(row: Row) -> tuple[str, str]:
    return row["split"], row["subset"]


def _cell(value: float | None, best: float) -> str:
    if value is None:
        return "-"
    return f"[bold]{value:.4f}[/bold]" if value == best and best > 0 else f"{value:.4f}"
