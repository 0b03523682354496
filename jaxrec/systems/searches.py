"""The evaluation of systems that answer searches with items: baselines that read the query, subsets of queries, and
judged pairs where the run has some."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from jaxrec.config import from_json
from jaxrec.evaluation.baselines import PurchaseLog, Recommender, baselines_of
from jaxrec.evaluation.cases import Cases
from jaxrec.evaluation.comparison import Row, evaluate
from jaxrec.evaluation.judgments import evaluate_judgments, read_judgments
from jaxrec.evaluation.search_baselines import NEIGHBORS, QueryLog, search_baselines
from jaxrec.evaluation.subsets import item_subsets, query_counts, query_subsets
from jaxrec.files import read_json
from jaxrec.run import Run
from jaxrec.semantic_ids.embeddings import encodes_texts
from jaxrec.semantic_ids.files.vectors import EMBEDDINGS, read_embeddings
from jaxrec.semantic_ids.queries import load_query_ids
from jaxrec.text.encoder import EncoderConfig, embed_texts


def are_searches(cases: Cases) -> bool:
    """Whether the cases are searches, with the text of their query."""
    return len(cases) > 0 and isinstance(cases.histories[0].get("query"), str)


def fit_search_baselines(run: Run, assembly: Any) -> dict[str, Recommender]:
    """The baselines of searches, fitted on the training events of a run; those of texts where its items have texts."""
    names = [assembly.behaviors[index] for index in assembly.target_behaviors]
    items = pq.read_table(run.tables / "items.parquet")
    texts = [text or "" for text in items["text" if "text" in items.column_names else "title"].to_pylist()]
    fitted = baselines_of(PurchaseLog.read(run.tables, names), len(items), assembly.target_behaviors, NEIGHBORS)
    log = QueryLog.read(run.tables, names, len(items))
    return search_baselines(log, fitted, texts, _embeddings(run, texts, items["item_id"].to_pylist()))


def evaluate_searches(
    run: Run,
    models: Mapping[str, Recommender],
    cases: Cases,
    behaviors: Sequence[str],
    *,
    split: str,
    cutoffs: Sequence[int],
) -> list[Row]:
    """Rows of all subsets of the searches, and of the judged pairs of the split."""
    subsets = (*item_subsets(cases), *query_subsets(cases, query_counts(run.tables), behaviors))
    rows = evaluate(models, cases, split=split, cutoffs=cutoffs, subsets=subsets)
    judgments = read_judgments(run.tables, split)
    if judgments is not None:
        rows += evaluate_judgments(models, judgments, split=split, cutoffs=cutoffs)
    return rows


def _embeddings(run: Run, texts: Sequence[str], item_ids: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of the queries and the items, by the encoder as it came (`text`) and as the run aligned it and quantized
    its embeddings (`aligned`).

    Neither where the items brought embeddings of their own, which no text encoder made.
    """
    if not encodes_texts(run.semantic_ids):
        return {}
    queries = pq.read_table(run.tables / "queries.parquet", columns=["query"])["query"].to_pylist()
    config = from_json(EncoderConfig, read_json(run.config_file)["text"])
    return {
        "text": (embed_texts(queries, config), embed_texts(texts, config)),
        "aligned": (
            load_query_ids(run.semantic_ids, config).embeddings(queries),
            read_embeddings(run.semantic_ids / EMBEDDINGS, item_ids),
        ),
    }
