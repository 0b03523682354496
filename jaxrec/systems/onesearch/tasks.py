"""The tasks of the first two stages (OneSearch Table 4) as rows of indices, and batches of them.

A row is a task, what its prompt holds (a text or an ID) and what is written (a text or an ID). Texts are those of
queries, items and categories, one after the other; IDs are those of queries and items. Rows that write IDs and rows
that write texts are in batches of their own, since their targets have other shapes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq

from jaxrec.config import UserError
from jaxrec.console import console
from jaxrec.data.padding import padded
from jaxrec.data.pipeline import Features, array_batches
from jaxrec.data.search_statistics import training_searches
from jaxrec.data.words import normalised
from jaxrec.systems.onesearch.config import TASKS, OneSearchConfig
from jaxrec.systems.onesearch.model import OneSearchAssembly
from jaxrec.systems.onesearch.queries import trained_queries

NONE = -1
MOST_ROWS = 16
"""rows of all tasks to one example"""


@dataclass(frozen=True, eq=False)
class TaskTables:
    """What prompts and targets are looked up in."""

    read: np.ndarray
    """int32 [texts, T]: tokens of a text as it is read, NONE in the padding"""
    written: np.ndarray
    """int32 [texts, W]: as it is written, with its end, NONE behind it"""
    codes: np.ndarray
    """int32 [queries + items, M]"""


@dataclass(frozen=True, eq=False)
class TaskRows:
    """n examples: the index in TASKS, and rows of `TaskTables`, NONE for nothing."""

    task: np.ndarray
    read_text: np.ndarray
    read_id: np.ndarray
    write_text: np.ndarray
    write_id: np.ndarray

    def __len__(self) -> int:
        return len(self.task)


@dataclass(frozen=True, eq=False)
class SearchPairs:
    """What the tasks are made of: queries, items, categories, and which belong together."""

    queries: np.ndarray
    """int64 [n]: distinct pairs of a query and an item that it led to"""
    items: np.ndarray
    """int64 [n]"""
    query_category: np.ndarray
    """int64 [Q], NONE where nothing is known"""
    item_category: np.ndarray
    """int64 [I], NONE for none"""
    trained: np.ndarray
    """int64 [q]: the queries that were searched for in training; no task has any other"""


def item_texts(tables: Path, column: str) -> list[str]:
    """The normalised text of every item, "" for none.

    Raises:
      UserError: the items have no such column.
    """
    names = pq.read_schema(tables / "items.parquet").names
    if column not in names:
        raise UserError(
            f"configuration key 'texts.column': the items have no column {column!r}; there are {', '.join(names)}"
        )
    table = pq.read_table(tables / "items.parquet", columns=[column])
    return [normalised(text or "") for text in table[column].to_pylist()]


def read_tasks(tables: Path, assembly: OneSearchAssembly, config: OneSearchConfig) -> tuple[TaskTables, SearchPairs]:
    """The texts, IDs and pairs of a run's training searches."""
    items = item_texts(tables, config.texts.column)
    names, item_category = _categories(tables)
    searched = training_searches(tables, config.data.target_behaviors)
    query = assembly.queries.of_row[searched["query_index"].to_numpy()]
    pairs, count = np.unique(np.stack([query, searched["item"].to_numpy()], 1), axis=0, return_counts=True)
    query_category = np.full(len(assembly.queries.texts), NONE, np.int64)
    known = item_category[pairs[:, 1]] >= 0
    votes = np.zeros((len(query_category), len(names)), np.int64)
    np.add.at(votes, (pairs[known, 0], item_category[pairs[known, 1]]), count[known])
    if names:
        query_category = np.where(votes.any(1), votes.argmax(1), NONE)
    tokenizer, lengths = assembly.queries.tokenizer, config.texts
    rows = tokenizer.encode([*assembly.queries.texts, *items, *names])
    codes = np.concatenate([assembly.queries.code_table, assembly.space.codes]).astype(np.int32)
    read = np.stack([padded(row[: lengths.read], lengths.read, NONE) for row in rows])
    ended = ([*row, tokenizer.end][: lengths.written] for row in rows)
    written = np.stack([padded(row, lengths.written, NONE) for row in ended])
    trained = assembly.queries.numbers(trained_queries(tables))
    of_pairs = SearchPairs(pairs[:, 0], pairs[:, 1], query_category, item_category, trained)
    return TaskTables(read, written, codes), of_pairs


def task_rows(weights: dict[str, float], tables: TaskTables, pairs: SearchPairs, seed: int) -> TaskRows:
    """The examples of some tasks in proportion to their weights, those of a small task repeated.

    All rows together are no more than MOST_ROWS times the examples: beside a task of a tiny weight the others are not
    repeated without bound, and it has a part of its own.

    weights: of tasks by name. Examples without a text or an ID that their task needs are left out.

    Raises:
      UserError: no task has an example.
    """
    found = {}
    for name, weight in weights.items():
        if weight:
            columns = _examples(name, pairs)
            columns = columns[:, _complete(columns, tables)]
            if columns.shape[1]:
                found[name] = columns
            else:
                console.print(f"the task {name} has no example in these data: it is left out", markup=False)
    if not found:
        raise UserError(
            "none of the tasks of this stage has an example; give items titles, or leave it out with weights of 0"
        )
    largest = max(columns.shape[1] / weights[name] for name, columns in found.items())
    examples = sum(columns.shape[1] for columns in found.values())
    largest = min(largest, MOST_ROWS * examples / sum(weights[name] for name in found))
    parts = []
    for name, columns in found.items():
        wanted = max(round(largest * weights[name]), 1)
        order = np.random.default_rng([seed, TASKS.index(name)]).permutation(columns.shape[1])
        chosen = columns[:, np.resize(order, wanted)]
        parts.append(np.concatenate([np.full((1, wanted), TASKS.index(name)), chosen]))
    return TaskRows(*np.concatenate(parts, axis=1).astype(np.int32))


def task_batches(rows: TaskRows, tables: TaskTables, config: OneSearchConfig) -> Iterator[Features]:
    """Batches of one kind of target each, without end, in an order that the seed decides.

    task int32 [B]; tokens int32 [B, T] and codes int32 [B, M] of the prompt, -1 for none; either target_codes int32
    [B, M], or target_tokens int32 [B, W] with target_mask bool [B, W].
    """

    def take(chosen: np.ndarray) -> Features:
        batch = {
            "task": rows.task[chosen],
            "tokens": _looked_up(tables.read, rows.read_text[chosen]),
            "codes": _looked_up(tables.codes, rows.read_id[chosen]),
        }
        if rows.write_id[chosen[0]] >= 0:
            return batch | {"target_codes": tables.codes[rows.write_id[chosen]]}
        written = tables.written[rows.write_text[chosen]]
        return batch | {"target_tokens": np.maximum(written, 0), "target_mask": written >= 0}

    return array_batches(
        take,
        (rows.write_id < 0).astype(np.int64),
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _examples(name: str, pairs: SearchPairs) -> np.ndarray:
    """int64 [4, n]: read_text, read_id, write_text, write_id of a task's examples."""
    query_count, item_count = len(pairs.query_category), len(pairs.item_category)
    every = {"query": pairs.trained, "item": query_count + np.arange(item_count)}
    category = {"query": pairs.query_category[pairs.trained], "item": pairs.item_category}
    together = {"query": pairs.queries, "item": query_count + pairs.items}
    source, target = name.split("_to_")
    kind = "query" if "query" in name else "item"
    if target == "category":
        kind = source.removesuffix("_id")
        wanted = np.where(category[kind] >= 0, query_count + item_count + category[kind], NONE)
        return _columns(source, every[kind], "text", wanted)
    if source == "id":
        return _columns("id", every[kind], "text", every[kind])
    if target == "id":
        return _columns("text", every[kind], "id", every[kind])
    of_source, of_target = source.removesuffix("_id"), target.removesuffix("_id")
    return _columns(source, together[of_source], target, together[of_target])


def _columns(source: str, read: np.ndarray, target: str, written: np.ndarray) -> np.ndarray:
    """Whatever is called an id is looked up among the IDs, all else among the texts."""
    nothing = np.full(len(read), NONE)
    is_id = [each.split("_")[-1] == "id" for each in (source, target)]
    reads = (nothing, read) if is_id[0] else (read, nothing)
    writes = (nothing, written) if is_id[1] else (written, nothing)
    return np.stack([*reads, *writes])


def _complete(columns: np.ndarray, tables: TaskTables) -> np.ndarray:
    """bool [n]: examples whose texts have a token, and whose IDs have all codes."""
    texts, codes = tables.read[:, 0] >= 0, (tables.codes >= 0).all(1)
    keep = (columns[2] >= 0) | (columns[3] >= 0)
    for column, there in zip(columns, (texts, codes, texts, codes), strict=True):
        keep &= (column < 0) | there[np.minimum(column, len(there) - 1)]
    return keep


def _categories(tables: Path) -> tuple[list[str], np.ndarray]:
    """The distinct categories, normalised, and that of every item, NONE for none."""
    names = pq.read_schema(tables / "items.parquet").names
    if "category" not in names:
        return [], np.full(pq.read_metadata(tables / "items.parquet").num_rows, NONE)
    column = pq.read_table(tables / "items.parquet", columns=["category"])["category"].to_pylist()
    folded = [normalised(str(value)) if value is not None else "" for value in column]
    known = sorted(set(folded) - {""})
    number = {text: at for at, text in enumerate(known)} | {"": NONE}
    return known, np.array([number[text] for text in folded], np.int64)


def _looked_up(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.where(rows[:, None] >= 0, table[rows], NONE).astype(np.int32)
