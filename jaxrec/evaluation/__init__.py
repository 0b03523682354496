"""Evaluation: test cases, ranking metrics over items, baselines, the comparison of models, and the report.

cases = make_cases(records, target_behaviors)
models = {**fit_baselines(records, num_items, target_behaviors), "onemall": recommender}
rows = evaluate(models, cases) + evaluate_ties_shuffled(records, num_items, target_behaviors)
"""

from jaxrec.evaluation.baselines import Recommender, fit_baselines, text_baselines
from jaxrec.evaluation.cases import (
    Cases,
    make_cases,
    prefix_cases,
    search_cases,
    shuffle_ties,
    text_cases,
    tied_fraction,
)
from jaxrec.evaluation.comparison import comparison_tables, evaluate, evaluate_ties_shuffled, standing_table, standings
from jaxrec.evaluation.metrics import id_accuracy, ranking_metrics, validity_rate

__all__ = [
    "Cases",
    "Recommender",
    "comparison_tables",
    "evaluate",
    "evaluate_ties_shuffled",
    "fit_baselines",
    "id_accuracy",
    "make_cases",
    "prefix_cases",
    "ranking_metrics",
    "search_cases",
    "shuffle_ties",
    "standing_table",
    "standings",
    "text_baselines",
    "text_cases",
    "tied_fraction",
    "validity_rate",
]
