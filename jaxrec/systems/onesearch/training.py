"""Training OneSearch (§3.4.1): content alignment, co-occurrence, personalisation.

The first two stages are tasks with prompts of their own (`tasks`). In the third, the items that a search led to are L
targets of its one context. Each stage logs the loss of every task.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq

from jaxrec.config import UserError, fingerprint
from jaxrec.data.examples import Record, Records
from jaxrec.data.item_neighbours import ItemNeighbours, item_neighbours
from jaxrec.data.padding import padded
from jaxrec.data.pipeline import Features
from jaxrec.data.search_statistics import training_searches
from jaxrec.data.searches import before_search, led_to
from jaxrec.data.tables import training_events
from jaxrec.evaluation.cases import question_of
from jaxrec.losses.likelihood import next_token
from jaxrec.models.personal_search import TaskInputs
from jaxrec.run import Run
from jaxrec.systems.generative import bound_loss, context_batches, mean_of, train_model
from jaxrec.systems.onesearch.config import (
    CO_OCCURRENCE,
    CONTENT,
    PERSONALISATION,
    TASKS,
    OneSearchConfig,
    TaskStageConfig,
)
from jaxrec.systems.onesearch.model import OneSearchAssembly, OneSearchCatalogue, assemble, fitted
from jaxrec.systems.onesearch.queries import NEIGHBOURS, PROMPTS, make_tokenizer
from jaxrec.systems.onesearch.tasks import item_texts, read_tasks, task_batches, task_rows
from jaxrec.systems.phases import ALIGNMENT, alignment, prepare_tables, prepare_with_ids
from jaxrec.systems.pretrained import digests, initial, write_pretrained
from jaxrec.systems.profiles import profile_texts
from jaxrec.training.stages import Stage, Task, minimise

REWARDS = "rewards"
"""The field of the configuration that decides later stages alone."""


def supervised_stages(run: Run, config: OneSearchConfig) -> tuple[Stage, ...]:
    """Three stages, each from the best state of the one before; the text encoder's first, where it is fine-tuned.

    One of the first two without a task of a weight is left out: what comes behind it begins with the stage before it
    or, where there is none, with fresh or pretrained parameters.
    """
    before = alignment(run, config, with_ids=True)
    needs = (ALIGNMENT,) if before else ()
    data = partial(prepare_searches, run, config)

    def train_tasks(of_stage: TaskStageConfig, task: Task) -> None:
        assembly = assemble(run, config)
        batches = training_tasks(run, assembly, config, of_stage)
        mine = dataclasses.replace(config, optim=of_stage.optim, training=of_stage.training)
        loss = partial(task_loss, tuple(of_stage.weights))
        init = partial(initial, assembly, config.pretrained, task)
        minimise(bound_loss(loss, assembly, mine), init, batches, mine, task)

    def train_searches(task: Task) -> None:
        assembly = assemble(run, config)
        mine = fitted(config, assembly.space)
        init = partial(initial, assembly, config.pretrained, task)
        train_model(assembly, mine, mean_loss, training_batches(assembly, mine), task, init=init)

    last = ("optim", "training", "validation", "objective", REWARDS)
    of_tasks, start = [], ""
    for name, other in ((CONTENT, CO_OCCURRENCE), (CO_OCCURRENCE, CONTENT)):
        of_stage = getattr(config, name)
        if of_stage.weights:
            inputs, train = config.training_inputs(*last, other), partial(train_tasks, of_stage)
            of_tasks.append(Stage(name, inputs, data, train, start=start, needs=needs))
            start = name
    inputs = config.training_inputs(CONTENT, CO_OCCURRENCE, REWARDS)
    return *before, *of_tasks, Stage(PERSONALISATION, inputs, data, train_searches, start=start, needs=needs)


def prepare_searches(run: Run, config: OneSearchConfig) -> tuple[str, ...]:
    """Tables, semantic IDs and examples, and with them the tokenizer and the IDs of the queries.

    Raises:
      UserError: no search led to anything that is trained on, or pretrained weights can't be used.
    """
    weights = digests(config.pretrained) if config.pretrained else ()
    prepare_tables(run, config)
    check_searches(run.tables, config.data.target_behaviors)
    ids, examples = prepare_with_ids(run, config)

    def make(folder: Path) -> None:
        profiles = profile_texts(run.tables, config.profile) if config.profile else []
        if config.pretrained:
            write_pretrained(folder, config.pretrained)
        else:
            texts = [*item_texts(run.tables, config.texts.column), *profiles]
            make_tokenizer(run, folder, config.tokenizer, texts)
        if config.neighbours.kept:
            training_neighbours(run, config).save(folder / NEIGHBOURS)

    made_of = fingerprint(ids, config.tokenizer, config.texts.column, config.neighbours, config.profile, *weights)
    return ids, examples, run.phase(PROMPTS, made_of, make)


def check_searches(tables: Path, behaviors: Sequence[str]) -> None:
    """Raises UserError where no search led to an event of training with one of these behaviors."""
    if not training_searches(tables, behaviors).num_rows:
        raise UserError(
            f"{tables / 'events.parquet'}: no training event of the target behaviors {', '.join(behaviors)} names the "
            "search that led to it; give the source's events a search_id, or choose other target behaviors"
        )


def training_neighbours(run: Run, config: OneSearchConfig) -> ItemNeighbours:
    """Which items the same users take in training."""
    events = training_events(run.tables, config.data.target_behaviors, ["user", "item"])
    count = pq.read_metadata(run.tables / "items.parquet").num_rows
    return item_neighbours(events["user"].to_numpy(), events["item"].to_numpy(), count, config.neighbours)


# ---- content, co-occurrence ------------------------------------------------------------------------------------------


def training_tasks(
    run: Run, assembly: OneSearchAssembly, config: OneSearchConfig, of_stage: TaskStageConfig
) -> Iterator[Features]:
    """Batches of a stage's tasks, mixed by its weights."""
    tables, pairs = read_tasks(run.tables, assembly, config)
    return task_batches(task_rows(of_stage.weights, tables, pairs, config.seed), tables, config)


def task_loss(
    tasks: Sequence[str],
    assembly: OneSearchAssembly,
    config: OneSearchConfig,
    catalogue: OneSearchCatalogue,
    params: Any,
    extra: dict,
    batch: dict,
    key: jax.Array,
):
    """As `jaxrec.training.step.Loss`; a batch of `task_batches`. Tells the loss of each of the tasks."""
    writes = "target_codes" not in batch
    model = assembly.model.writing(batch["target_tokens"].shape[1]) if writes else assembly.model
    target = batch["target_tokens"] if writes else batch["target_codes"]
    real = jnp.broadcast_to(batch["where"][:, None], target.shape)
    if writes:
        real &= batch["target_mask"]
    apply = partial(model.apply, {"params": params}, rngs={"dropout": key})
    context = apply(TaskInputs(batch["task"], batch["tokens"], batch["codes"]), True, method="prefill")
    scored = apply(context, target[:, None], None, True, method="score")
    each = next_token(scored.log_probs, real[:, None])[:, 0]
    metrics = {"loss": (each.sum(), batch["where"].sum())}
    for name in tasks:
        mine = batch["where"] & (batch["task"] == TASKS.index(name))
        metrics[f"loss_{name}"] = (jnp.where(mine, each, 0.0).sum(), mine.sum())
    return each.sum() / jnp.maximum(batch["where"].sum(), 1), (metrics, extra)


# ---- personalisation -------------------------------------------------------------------------------------------------


def losses(
    assembly: OneSearchAssembly,
    config: OneSearchConfig,
    catalogue: OneSearchCatalogue,
    variables: dict,
    batch: dict,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The sum of the targets' negative log-likelihoods (labels smoothed), and the number of targets."""
    apply = partial(assembly.model.apply, variables, rngs={"dropout": key})
    context = apply(assembly.inputs(catalogue, batch), True, method="prefill")
    where = (batch["target"] >= 0) & batch["where"][:, None]
    scored = apply(context, catalogue.codes[jnp.maximum(batch["target"], 0)], where, True, method="score")
    smoothing = config.objective.smoothing
    loss = next_token(scored.log_probs, where, mean_log_probs=scored.mean_log_probs, smoothing=smoothing)
    return loss.sum(), where.sum()


mean_loss = mean_of(losses)
"""As `jaxrec.training.step.Loss`; a batch is what `training_batches` yields."""


def training_batches(assembly: OneSearchAssembly, config: OneSearchConfig) -> Iterator[Features]:
    """Batches of searches with the items that they led to, without end, in an order that the seed decides."""
    records = Records(assembly.examples, "train")
    cuts = training_searches_of(records, assembly.wanted)
    lengths = bucket_lengths(assembly, config, records, cuts)
    return context_batches(records, cuts, partial(example, assembly, config), config, lengths)


def training_searches_of(records: Records, wanted: np.ndarray) -> np.ndarray:
    """(record, search) of every search that led to a target item, int64 [n, 2]."""
    found = []
    for at, record in enumerate(records):
        led = record["search"][wanted[record["behavior"]]]
        places = np.unique(led[led >= 0])
        found.append(np.stack([np.full(len(places), at), places], axis=1))
    return np.concatenate(found).astype(np.int64)


def example(
    assembly: OneSearchAssembly, config: OneSearchConfig, record: Record, place: int, rng: np.random.Generator
) -> Features:
    """The features of a search as at serving, and its items: target int32 [L], -1 in the padding.

    The short sequences of some samples are cut (the sliding window), and the past of some is left out.
    """
    objective, wanted = config.objective, assembly.wanted
    items, read = led_to(record, place, wanted[record["behavior"]]), read_search(assembly, record, place)
    if objective.window and rng.random() < objective.windowed:
        shown = int(rng.integers(0, objective.window + 1))
        read |= {"shown": shown, "recent_codes": read["recent_codes"][max(len(read["recent_codes"]) - shown, 0) :]}
    if rng.random() < objective.without_past:
        read |= {name: read[name][:0] for name in ("item", "behavior", "timestamp", "session", "same", "recent_codes")}
        read["user"] = -1
    cut = config.features.cut(read, 0, behaviors=len(assembly.behaviors), wanted=wanted)
    if len(items) > objective.targets:
        items = np.sort(rng.permutation(items)[: objective.targets])
    return cut | {"target": padded(items, objective.targets, -1)}


def read_search(assembly: OneSearchAssembly, record: Record, place: int) -> Record:
    """The history of a training search as a server reads it whose log lacks the search."""
    wanted = assembly.wanted
    history = before_search(record, place)
    history |= question_of(record, history, record["search_timestamp"][place]) | {
        "query": record["search_query"][place]
    }
    later = record["item"][(record["search_timestamp"][place] <= record["timestamp"]) & wanted[record["behavior"]]]
    return assembly.read_texts(history, without=led_to(record, place, wanted[record["behavior"]]), ahead=later)


def bucket_lengths(assembly: OneSearchAssembly, config: OneSearchConfig, records: Records, cuts: np.ndarray) -> list:
    """Which bucket of `features` the query of each (record, search) is padded to, [n]."""
    return [config.features.bucket_of({"tokens": _tokens(assembly, records[at], place)}, 0) for at, place in cuts]


def _tokens(assembly: OneSearchAssembly, record: Record, place: int) -> np.ndarray:
    return assembly.queries.tokens[assembly.queries.of_row[record["search_query"][place]]]
