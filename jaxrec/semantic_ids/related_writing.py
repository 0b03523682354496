"""Makes the folder of related queries from a run's tables: embeddings, codebooks, IDs, figures (OneSug §3.2).

Everything that is counted is of the train split, and counted in sessions, so that an example's own session is exactly
one of them. The texts of all splits have embeddings of their own, which depend on no count.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.config import UserError, to_json
from jaxrec.data.suggestion_log import read_asked, read_suggestions
from jaxrec.data.words import distinct
from jaxrec.files import write_json
from jaxrec.semantic_ids.embeddings import embed_new, keep_encoder
from jaxrec.semantic_ids.files.vectors import write_embeddings
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.quantizers.codebooks import Codebooks
from jaxrec.semantic_ids.related_index import build_index
from jaxrec.semantic_ids.related_queries import (
    BOOKS,
    CONFIG,
    PREFIX_VECTORS,
    PREFIXES,
    QUERIES,
    QUERY_VECTORS,
    RelatedQueries,
    RelatedQueriesConfig,
    quantize,
)
from jaxrec.semantic_ids.table.quality import quality
from jaxrec.semantic_ids.table.space import SemanticIds
from jaxrec.text.align import evenly
from jaxrec.text.encoder import EncoderConfig
from jaxrec.text.prefixes import augment, co_occurrence, most_frequent

MEASURED = 2000
"""Examples of a split whose answers are looked for among the related queries."""


class TypedLog(NamedTuple):
    """What people typed and searched in training."""

    queries: list[str]
    """Q normalised queries, sorted."""
    sessions: np.ndarray
    """int64 [Q], the sessions that searched or chose each."""
    prefixes: list[str]
    """P normalised prefixes of all splits, sorted."""
    trained: np.ndarray
    """bool [P], whether a prefix was typed in training."""
    completions: np.ndarray
    """int32 [P, k + 1], rows of queries, the most frequent first, padded with -1; one more than Eq. 2 takes."""
    counts: np.ndarray
    """int64 [P, k + 1], the sessions of each; 0 in the padding."""


def write_related(
    tables: Path,
    folder: Path,
    text_config: EncoderConfig,
    config: RelatedQueriesConfig,
    seed: int,
    tuned: Path | None = None,
) -> None:
    """Writes the related queries of a tables folder into `folder`, for `load_related`.

    Args:
      tuned: the folder of the encoder that was aligned on the suggestions (Eq. 1); None: the encoder as it came.

    Raises:
      UserError: the tables have no suggestions, nobody chose one, there are fewer texts than codes, or the
        configuration is invalid.
    """
    log = read_log(tables, config)
    codebooks.check(config.semantic_ids, (int(log.trained.sum()) + len(log.queries), 0))
    keep_encoder(folder, text_config, tuned)
    queries, own = (embed_new(folder, texts, text_config=text_config) for texts in (log.queries, log.prefixes))
    limits = config.prefixes
    table = most_frequent(log.completions, log.counts, limits.queries, limits.min_count)
    prefixes = augment(own, queries, table, limits.weight)
    near = _nearest_prefix(prefixes, queries, table) >= config.fit_cosine
    books = codebooks.fit(
        jax.random.key(seed), np.concatenate([prefixes[log.trained], queries[near]]), config.semantic_ids
    )
    query_codes = codebooks.encode(books, queries)
    prefix_codes = quantize(books, prefixes)
    write_json(folder / CONFIG, to_json(config))
    codebooks.save(books, folder / BOOKS)
    columns = {"query": pa.array(log.queries, pa.string()), "sessions": log.sessions}
    pq.write_table(pa.table(columns | _code_columns(query_codes)), folder / QUERIES)
    write_embeddings(folder / QUERY_VECTORS, log.queries, queries)
    columns = {"prefix": pa.array(log.prefixes, pa.string())} | _code_columns(prefix_codes)
    lists = {name: _lists(getattr(log, name)) for name in ("completions", "counts")}
    pq.write_table(pa.table(columns | lists), folder / PREFIXES)
    write_embeddings(folder / PREFIX_VECTORS, log.prefixes, own)
    space = SemanticIds(query_codes, books.sizes, log.sessions)
    figures = {
        "queries": quality(space, queries, partial(codebooks.decode, books)),
        "prefixes": _of_prefixes(log, table, prefix_codes, query_codes, books),
        "answers": answers_found(tables, RelatedQueries(folder, text_config)),
    }
    write_json(folder / "quality.json", figures)


def read_log(tables: Path, config: RelatedQueriesConfig) -> TypedLog:
    """Counts a tables folder's searches and suggestions.

    Raises:
      UserError: there are no suggestions, or nobody chose one in training.
    """
    typed = read_suggestions(tables, "train", config.prefixes.feedback)
    known = read_asked(tables, config.prefixes.feedback).group_by("query").aggregate([("user", "count")])
    known = known.filter(pc.greater_equal(known["user_count"], config.min_sessions)).sort_by("query")
    if not len(known):
        raise UserError(
            f"no query of {tables} was searched or chosen in {config.min_sessions} sessions of training: lower "
            "related.min_sessions, or give a longer log"
        )
    # One query more than Eq. 2 takes: that of an example may be left out.
    limits = replace(config.prefixes, queries=config.prefixes.queries + 1, min_count=1)
    found = co_occurrence(typed.filter(pc.is_in(typed["query"], known["query"].combine_chunks())), limits)
    texts, _ = distinct(pq.read_table(Path(tables) / "prefixes.parquet", columns=["prefix"])["prefix"].to_pylist())
    texts = [text for text in texts if text]
    trained = np.isin(np.array(texts, object), np.array(typed["prefix"].unique().to_pylist(), object))
    completions = np.full((len(texts), limits.queries), -1, np.int32)
    counts = np.zeros((len(texts), limits.queries), np.int64)
    place = pc.index_in(pa.array(found.prefixes), pa.array(texts, pa.string())).to_numpy()
    row = pc.index_in(pa.array(found.queries), known["query"].combine_chunks()).to_numpy()
    completions[place] = np.where(found.table >= 0, row[found.table], -1)
    counts[place] = found.count
    return TypedLog(known["query"].to_pylist(), known["user_count"].to_numpy(), texts, trained, completions, counts)


def answers_found(tables: Path, related: RelatedQueries) -> dict[str, float | None]:
    """The share of examples whose answer, the chosen query, is among the related queries of what was typed.

    train: as a training reads them, without what the example's session alone told; with_itself: with it, as no server
    can; held_out: of the validation split. Over at most MEASURED examples each; None without any.
    """
    chosen = related.config.prefixes.feedback

    def share(split: str, leave_out: bool) -> float | None:
        typed = read_suggestions(tables, split, chosen)
        typed = typed.filter(pc.equal(typed["feedback"], chosen[0]))
        typed = typed.take(evenly(np.arange(len(typed)), MEASURED)) if len(typed) else typed
        prefixes, answers = typed["prefix"].to_pylist(), typed["query"].to_pylist()
        rows = related.related(prefixes, answers if leave_out else None)
        found = [answer in {related.texts[row] for row in some if row >= 0} for some, answer in zip(rows, answers)]
        return float(np.mean(found)) if found else None

    return {"train": share("train", True), "with_itself": share("train", False), "held_out": share("valid", False)}


def _nearest_prefix(prefixes: np.ndarray, queries: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The largest cosine of each query with an enhanced prefix that it completes, f32 [Q]; -1 for none."""
    row, place = np.nonzero(table >= 0)
    query = table[row, place]
    length = np.maximum(np.linalg.norm(prefixes, axis=1), 1e-12)
    found = np.full(len(queries), -1, np.float32)
    np.maximum.at(found, query, np.einsum("nd,nd->n", prefixes[row], queries[query]) / length[row])
    return found


def _of_prefixes(
    log: TypedLog, table: np.ndarray, codes: np.ndarray, query_codes: np.ndarray, books: Codebooks
) -> dict:
    """Figures of the prefixes typed in training: how many, with completions, sharing 1, 2, ... M codes with a query."""
    codes = codes[log.trained]
    index = build_index(np.zeros((len(query_codes), 1), np.float32), query_codes, books.sizes)
    return {
        "prefixes": len(codes),
        "completed": float((table[log.trained, 0] >= 0).mean()),
        "sharing_codes": (index.find(codes)[:, 1:] >= 0).mean(0).tolist(),
    }


def _code_columns(codes: np.ndarray) -> dict[str, pa.Array]:
    return {f"c{level + 1}": pa.array(codes[:, level], pa.int32()) for level in range(codes.shape[1])}


def _lists(rows: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
