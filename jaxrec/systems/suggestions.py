"""The evaluation of systems that suggest whole queries for a prefix: baselines of completions, subsets of prefixes, and
what is shown for a prefix."""

from collections.abc import Mapping, Sequence

from jaxrec.data.completions import completions_of, training_queries
from jaxrec.evaluation.baselines import Recommender
from jaxrec.evaluation.cases import Cases
from jaxrec.evaluation.comparison import SUGGESTIONS, Row, evaluate
from jaxrec.evaluation.subsets import item_subsets
from jaxrec.evaluation.suggestion_baselines import suggestion_baselines
from jaxrec.evaluation.suggestion_metrics import suggestion_metrics
from jaxrec.evaluation.suggestion_subsets import known_queries, prefix_counts, suggestion_subsets
from jaxrec.run import Run
from jaxrec.targets import TextSpace


def are_suggestions(cases: Cases) -> bool:
    """Whether the cases are of prefixes, with the text that was typed."""
    return len(cases) > 0 and isinstance(cases.histories[0].get("prefix"), str)


def fit_suggestion_baselines(run: Run, space: TextSpace) -> dict[str, Recommender]:
    """The baselines of suggestions, fitted on the training queries of a run; they answer with numbers of the space."""
    texts, log = training_queries(run.tables)
    known = completions_of(texts, log["query"].to_numpy(), log["timestamp"].to_numpy())
    return suggestion_baselines(space, known, log)


def evaluate_suggestions(
    run: Run,
    models: Mapping[str, Recommender],
    cases: Cases,
    space: TextSpace,
    *,
    split: str,
    cutoffs: Sequence[int],
) -> list[Row]:
    """Rows of all subsets of the prefixes, and of what is shown for them."""
    subsets = (
        *item_subsets(cases),
        *suggestion_subsets(cases, space, known_queries(run.tables), prefix_counts(run.tables)),
    )

    def shown(batch: Cases, ranked):
        return suggestion_metrics(
            ranked, batch.targets, batch.where, [history["prefix"] for history in batch.histories], space
        )

    return evaluate(models, cases, split=split, cutoffs=cutoffs, subsets=subsets, measures={SUGGESTIONS: shown})
