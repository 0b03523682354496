"""Training examples of OneSug: a typed prefix with its history as at serving, and suggested queries as targets.

What is counted of the log holds the example itself; `seen_of` names what has to be left out of it.
"""

import numpy as np

from jaxrec.data.examples import Record, Records
from jaxrec.data.pipeline import Features
from jaxrec.data.searches import before_moment
from jaxrec.data.suggestion_targets import TypedPrefix, asked_rows, typed_prefix
from jaxrec.data.tables import CHOSEN
from jaxrec.evaluation.cases import question_of
from jaxrec.systems.onesug.config import OneSugConfig
from jaxrec.systems.onesug.model import OneSugAssembly
from jaxrec.systems.onesug.queries import Seen


def training_prefixes(assembly: OneSugAssembly, config: OneSugConfig) -> tuple[Records, np.ndarray, list[int]]:
    """The training records; int64 [n, 2] of (record, row of `asked_rows`); the bucket of each prompt."""
    records, cuts, lengths = Records(assembly.examples, "train"), [], []
    if assembly.related is not None:
        assembly.related.remember(assembly.prefixes)
    for at, record in enumerate(records):
        for row in asked_rows(record):
            cuts.append((at, row))
            asked = typed_prefix(record, row)
            read = assembly.read_prompt(history_of(assembly, record, asked), seen_of(assembly, record, asked))
            lengths.append(config.features.bucket_of(read, 0))
    return records, np.array(cuts, np.int64).reshape(-1, 2), lengths


def history_of(assembly: OneSugAssembly, record: Record, asked: TypedPrefix) -> Record:
    """The history of a typed prefix as at serving, with rows of queries.parquet."""
    history = before_moment(record, asked.moment, asked.session)
    return history | question_of(record, history, asked.moment) | {"prefix": assembly.prefixes[asked.prefix]}


def seen_of(assembly: OneSugAssembly, record: Record, asked: TypedPrefix) -> Seen:
    """What the log holds of a training example."""
    name = "search" if "search_query" in record else "suggestion"
    queries, times, sessions = (record[f"{name}_{field}"] for field in ("query", "timestamp", "session"))
    if name == "suggestion":
        chosen = record["suggestion_feedback"] < len(CHOSEN)
        queries, times, sessions = queries[chosen], times[chosen], sessions[chosen]
    numbers = assembly.known.of_row[queries]
    told = (np.unique(numbers[where & (numbers >= 0)]) for where in (sessions == asked.session, times >= asked.moment))
    best = asked.rows[np.argmin(record["suggestion_feedback"][asked.rows])]
    return Seen(*told, assembly.queries[record["suggestion_query"][best]])


def cut(assembly: OneSugAssembly, read: Record, size: int | None = None) -> Features:
    """The arrays of a history that `read_texts` read; size: as of `SuggestionFeatureConfig.cut`."""
    return assembly.features.cut(read, 0, behaviors=len(assembly.behaviors), wanted=assembly.wanted, size=size)


def packed(assembly: OneSugAssembly, texts: list[str], count: int) -> Features:
    """Texts as targets: target int32 [L, M], and real bool [L, M], the mask of their tokens."""
    target, real = assembly.space.encode([*texts, *[""] * (count - len(texts))])
    return {"target": target, "real": real & (np.arange(count) < len(texts))[:, None]}
