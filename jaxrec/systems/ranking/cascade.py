"""The cascade: recall -> pre-ranking -> ranking, as one recommender (OneSug Table 2, OneSearch Table 5).

    recall        some hundred items, by the nearest embeddings or by baselines
    pre-ranking   DCN-v2 orders them
    ranking       DIN or SIM orders the first of them anew

Each part sees only what the one before left. In tables the cascade stands beside itself without the last part, and
without the last two.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrec.data.examples import Records
from jaxrec.data.queries import table_texts
from jaxrec.evaluation.baselines import Recommender
from jaxrec.evaluation.cases import Cases, History, cases_with_texts, make_cases, search_cases
from jaxrec.evaluation.comparison import CALIBRATION, IMPRESSIONS, SHOWN_TO_USERS, Row
from jaxrec.files import write_json
from jaxrec.run import Run, stage_path
from jaxrec.systems.phases import ALIGNMENT, alignment, prepare_with_ids
from jaxrec.systems.ranking.config import CASCADE, PRE_RANKING, RANKING, CascadeConfig, RankingConfig, RecallConfig
from jaxrec.systems.ranking.model import Ranker, assemble_ranker, stack
from jaxrec.systems.ranking.recall import make_recall
from jaxrec.systems.ranking.training import (
    calibration_curves,
    measured_batches,
    predict_impressions,
    ranking_stage,
)
from jaxrec.systems.recommender import repeated_item
from jaxrec.training.stages import Stage, best_variables

SIZES = 1, 8, 32
"""Histories are ranked in batches of the last size; fewer of them are padded to one of the others."""


@dataclass(frozen=True, eq=False)
class RankingPart:
    """A trained ranking model."""

    config: RankingConfig
    ranker: Ranker
    params: Any

    def scores(self, histories: list[History], candidates: np.ndarray) -> np.ndarray:
        """float32 [B, L] in [0, 1] of items int32 [B, L]; -1 where there is no item."""
        found = np.full(candidates.shape, -1.0, np.float32)
        for rows, arrays in _batches(self.ranker, histories):
            predicted = self.ranker.predict(self.params, arrays, np.maximum(candidates[rows], 0))[self.config.ranked_by]
            if np.isnan(predicted).any():
                raise FloatingPointError("the model gave NaN; its parameters are damaged, train it again")
            found[rows] = predicted  # a batch is filled up with copies, which have the same scores
        return np.where(candidates >= 0, found, -1.0)


@dataclass(frozen=True, eq=False)
class CascadeAssembly:
    """The parts of a cascade, fitted to the items of a run."""

    ranker: Ranker
    """of the last part"""
    recall: Recommender
    config: RecallConfig
    first: RankingPart | None = None
    """the pre-ranking model"""
    rows: np.ndarray | None = None
    """object [rows]: the texts of queries.parquet, where contexts are searches"""

    @property
    def examples(self) -> Any:
        """Folder of the example records."""
        return self.ranker.examples

    @property
    def behaviors(self) -> tuple[str, ...]:
        """Names, weakest first."""
        return self.ranker.behaviors

    @property
    def wanted(self) -> np.ndarray:
        """bool [behaviors]: the target behaviors."""
        return self.ranker.wanted

    @property
    def target_behaviors(self) -> list[int]:
        """Indices of the target behaviors."""
        return self.ranker.target_behaviors

    def cases(self, split: str) -> Cases:
        """What is measured: the next session of each user, or each search of the split."""
        records = Records(self.examples, split)
        if self.rows is None:
            return make_cases(records, self.target_behaviors, split)
        return cases_with_texts(search_cases(records, self.target_behaviors, split), self.rows)


class CascadeRecommender:
    """Recommends by a cascade."""

    def __init__(self, assembly: CascadeAssembly, last: RankingPart | None):
        """last: the ranking model; None: the cascade without it."""
        self.assembly, self.last = assembly, last

    @property
    def reads_queries(self) -> bool:
        """Whether a history's query is read."""
        return self.assembly.rows is not None

    @property
    def required_text(self) -> str | None:
        """The field that every request has to have."""
        return "query" if self.reads_queries else None

    @property
    def variants(self) -> dict[str, Recommender]:
        """The cascade without its last parts, by the names of their rows."""
        found = {f"{CASCADE}, recall alone": self.assembly.recall}
        if self.assembly.first is not None:
            found[f"{CASCADE} without ranking"] = CascadeRecommender(self.assembly, None)
        return found

    def recommend(
        self, histories: list[History], k: int, exclude_history: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best items of each history: items int32 [B, k] (-1 = none) and falling scores float32 [B, k] (-inf).

        Of what is ranked 2 and the probability is the score, of what is only pre-ranked 1 and the probability; what
        is only recalled has less than 1. `exclude_history` leaves out all items of the history.
        """
        config = self.assembly.config
        items, scores = self.assembly.recall.recommend(histories, max(k, config.items), exclude_history)
        parts = ((self.assembly.first, config.items, 1.0), (self.last, config.ranked, 2.0))
        for part, count, base in parts:
            if part is not None and len(histories):
                first = part.scores(histories, items[:, :count])
                order = np.argsort(-first, axis=1, kind="stable")
                items[:, :count] = np.take_along_axis(items[:, :count], order, axis=1)
                ordered = np.take_along_axis(first, order, axis=1)
                scores[:, :count] = np.where(items[:, :count] >= 0, base + ordered, -np.inf)
        return items[:, :k], scores[:, :k]

    def further_rows(self, split: str, folder: Path) -> list[Row]:
        """The metrics of what was shown in a split, of each ranking model; `folder` gets calibration.json."""
        rows, curves = [], {}
        for name, part in ((RANKING, self.last), (PRE_RANKING, self.assembly.first)):
            some = [] if part is None else measured_batches(part.ranker, part.config, split)
            if not some:
                continue
            found, model = predict_impressions(part.ranker, part.params, some), f"{CASCADE}, {name.replace('_', '-')}"
            curves[model] = calibration_curves(found)
            for probability, values in found.metrics().items():
                row = {"model": model, "split": split, "subset": IMPRESSIONS[probability], "cases": SHOWN_TO_USERS}
                row["count"] = len(found.of(probability)[0])
                rows += [row | {"metric": metric, "value": value} for metric, value in values.items()]
        write_json(folder / CALIBRATION, curves)
        return rows

    def every_length(self) -> list[History]:
        """A history for each length that histories are padded to."""
        behavior, text = self.assembly.target_behaviors[0], {"query": "a"} if self.reads_queries else {}
        return [repeated_item(length, behavior) | text for length in self.assembly.ranker.features.buckets]


def _batches(ranker: Ranker, histories: list[History]) -> Iterator[tuple[np.ndarray, dict]]:
    """(rows, stacked arrays) of histories of one length bucket, padded to one of SIZES by copies of the first."""
    lengths = np.array([ranker.features.bucket_of(history, ranker.wanted) for history in histories])
    for length in np.unique(lengths):
        group = np.flatnonzero(lengths == length)
        size = next((size for size in SIZES if size >= len(group)), SIZES[-1])
        for start in range(0, len(group), size):
            rows = group[start : start + size]
            contexts = [ranker.read(histories[row]) for row in rows]
            filled = [*contexts, *[contexts[0]] * (size - len(rows))]
            yield np.concatenate([rows, np.full(size - len(rows), rows[0])]), stack(filled)


# ---- the system ------------------------------------------------------------------------------------------------------


def stages(run: Run, config: CascadeConfig) -> tuple[Stage, ...]:
    """Pre-ranking and ranking, behind the stage of the text encoder where it is fine-tuned."""
    before = alignment(run, config, with_ids=True)
    needs = (ALIGNMENT,) if before else ()
    data = functools.partial(prepare_with_ids, run, config)
    first = ()
    if config.pre_ranking is not None:
        first = (ranking_stage(run, config, config.pre_ranking, data, PRE_RANKING, needs),)
        # Ranking learns nothing of pre-ranking, but what a finished run is evaluated by is both.
        needs = (*needs, PRE_RANKING)
    return *before, *first, ranking_stage(run, config, config.last_stage, data, RANKING, needs)


def assemble(run: Run, config: CascadeConfig) -> CascadeAssembly:
    """Reads the catalogue and the trained pre-ranking model of a run.

    Raises:
      UserError: a file is missing or doesn't fit the items.
    """
    ranker = assemble_ranker(run, config, config.ranking)
    recall = make_recall(run, ranker, config.recall.channels, config.recall.seeds)
    first = None
    if config.pre_ranking is not None:
        params = best_variables(run.place(stage_path(PRE_RANKING)))["params"]
        first = RankingPart(config.pre_ranking, assemble_ranker(run, config, config.pre_ranking), params)
    rows = table_texts(run.tables, "queries") if config.query_ids else None
    return CascadeAssembly(ranker, recall, config.recall, first, rows)


def recommender(assembly: CascadeAssembly, variables: dict, config: CascadeConfig) -> CascadeRecommender:
    """The trained cascade of a run."""
    return CascadeRecommender(assembly, RankingPart(config.ranking, assembly.ranker, variables["params"]))
