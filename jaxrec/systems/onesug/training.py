"""Training OneSug: the likelihood of what was chosen (§3.3), then preferences between what was suggested (§3.4).

The queries of one typed prefix are L targets of one context in both stages. The reference of the preferences is the
first stage, frozen; its scores are computed once, before the first step (`reference`).
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import fingerprint
from jaxrec.data.completions import training_queries
from jaxrec.data.examples import Record, Records
from jaxrec.data.item_neighbours import item_neighbours
from jaxrec.data.pipeline import Features
from jaxrec.data.searches import before_moment
from jaxrec.data.suggestion_targets import TypedPrefix, strongest, training_shares, typed_prefixes
from jaxrec.data.tables import CHOSEN
from jaxrec.data.words import distinct, normalised
from jaxrec.losses.likelihood import log_likelihood, next_token
from jaxrec.losses.preference import hybrid
from jaxrec.losses.rewards import pair_weights
from jaxrec.run import Run
from jaxrec.systems.generative import context_batches, mean_of, train_model
from jaxrec.systems.onesug.config import LIKELIHOOD, PREFERENCE, OneSugConfig
from jaxrec.systems.onesug.model import NEIGHBOURS_FILE, OneSugAssembly, assemble
from jaxrec.systems.onesug.queries import NEIGHBOURS
from jaxrec.systems.phases import prepare_examples, prepare_tables
from jaxrec.targets import text_space
from jaxrec.targets.texts import TARGETS
from jaxrec.text.tokenizer import train_tokenizer
from jaxrec.training.stages import Stage, Task


def stages(run: Run, config: OneSugConfig) -> tuple[Stage, ...]:
    """The likelihood, and the preferences with it as start and reference."""

    def data() -> tuple[str, ...]:
        return prepare_suggestions(run, config)

    def train_likelihood(task: Task) -> None:
        assembly = assemble(run, config)
        mine = dataclasses.replace(config, features=assembly.features)
        train_model(assembly, mine, likelihood_loss, likelihood_batches(assembly, mine), task)

    def train_preference(task: Task) -> None:
        assembly, of_stage = assemble(run, config), config.preference
        mine = dataclasses.replace(config, features=assembly.features, optim=of_stage.optim, training=of_stage.training)
        batches = preference_batches(run.tables, assembly, mine)
        train_model(assembly, mine, preference_loss, batches, task)

    first = Stage(LIKELIHOOD, config.training_inputs("preference"), data, train_likelihood)
    if config.preference is None:
        return (first,)
    second = Stage(PREFERENCE, config.training_inputs(), data, train_preference, start=LIKELIHOOD, frozen=(LIKELIHOOD,))
    return first, second


# ---- data ------------------------------------------------------------------------------------------------------------


def prepare_suggestions(run: Run, config: OneSugConfig) -> tuple[str, ...]:
    """Tables and examples, the tokenizer with the list of queries, and which queries the same users search for."""
    tables = prepare_tables(run, config)
    made = [
        run.phase(TARGETS, fingerprint(tables, config.tokenizer, config.texts), partial(make_targets, run, config)),
        prepare_examples(run, config, tables),
    ]
    if config.neighbours.kept:
        inputs = fingerprint(tables, config.neighbours)
        made.append(run.phase(NEIGHBOURS, inputs, partial(make_neighbours, run, config)))
    return tuple(made)


def make_targets(run: Run, config: OneSugConfig, folder: Path) -> None:
    """Trains the tokenizer on the queries of training and lists these, the ones that are too long left out."""
    texts, log = training_queries(run.tables)
    counts = np.bincount(log["query"].to_numpy(), minlength=len(texts))
    tokenizer = train_tokenizer(texts, config.tokenizer)
    short = [at for at, row in enumerate(tokenizer.encode(texts)) if len(row) < config.texts.max_length]
    space = text_space(tokenizer, [texts[at] for at in short], counts[short], config.texts)
    space.save(folder)


def make_neighbours(run: Run, config: OneSugConfig, folder: Path) -> None:
    """Writes which queries of training the same users search for."""
    texts, log = training_queries(run.tables)
    users, queries = (log[name].to_numpy() for name in ("user", "query"))
    item_neighbours(users, queries, len(texts), config.neighbours).save(folder / NEIGHBOURS_FILE)


# ---- likelihood ------------------------------------------------------------------------------------------------------


def losses(
    assembly: OneSugAssembly, config: OneSugConfig, catalogue: None, variables: dict, batch: dict, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sum of the chosen queries' negative log-likelihoods, and their number."""
    apply = partial(assembly.model.apply, variables, rngs={"dropout": key})
    context = apply(assembly.inputs(batch), True, method="prefill")
    real = batch["real"] & batch["where"][:, None, None]
    scored = apply(context, batch["target"], real.any(-1), True, method="score")
    smoothing = config.objective.smoothing
    loss = next_token(scored.log_probs, real, mean_log_probs=scored.mean_log_probs, smoothing=smoothing)
    return loss.sum(), real.any(-1).sum()


likelihood_loss = mean_of(losses)
"""As `jaxrec.training.step.Loss`; a batch is what `likelihood_batches` yields."""


def likelihood_batches(assembly: OneSugAssembly, config: OneSugConfig) -> Iterator[Features]:
    """Batches of typed prefixes with the queries that were chosen, without end, in an order that the seed decides."""
    records, cuts, lengths = training_prefixes(assembly, config)

    def example(record: Record, place: int, rng: np.random.Generator) -> Features:
        asked = typed_prefixes(record)[place]
        chosen = asked.rows[record["suggestion_feedback"][asked.rows] < len(CHOSEN)]
        texts = sorted({normalised(text) for text in assembly.queries[record["suggestion_query"][chosen]]})
        history = history_of(assembly, record, asked)
        if rng.random() < config.objective.recut:
            history, texts = recut(history, texts, rng)
        if rng.random() < config.objective.without_past:
            history = {name: history[name] for name in ("prefix", "now")}
        if len(texts) > config.objective.targets:
            texts = [texts[at] for at in np.sort(rng.permutation(len(texts))[: config.objective.targets])]
        read = assembly.read_texts(history, *seen_of(assembly, record, asked))
        return cut(assembly, read) | packed(assembly, texts, config.objective.targets)

    return context_batches(records, cuts, example, config, lengths)


def training_prefixes(assembly: OneSugAssembly, config: OneSugConfig) -> tuple[Records, np.ndarray, list[int]]:
    """The training records; int64 [n, 2] of (record, place in `typed_prefixes`); the bucket of each prompt."""
    records, cuts, lengths = Records(assembly.examples, "train"), [], []
    for at, record in enumerate(records):
        for place, asked in enumerate(typed_prefixes(record)):
            cuts.append((at, place))
            read = assembly.read_texts(history_of(assembly, record, asked))
            lengths.append(config.features.bucket_of(read, 0))
    return records, np.array(cuts, np.int64).reshape(-1, 2), lengths


def history_of(assembly: OneSugAssembly, record: Record, asked: TypedPrefix) -> Record:
    """The history of a typed prefix as at serving, with rows of queries.parquet."""
    history = before_moment(record, asked.moment, asked.session)
    history |= {"prefix": assembly.prefixes[asked.prefix], "now": asked.moment, "user": record["user"]}
    if not record.get("answer_time", True):
        times = [history[name].max(initial=0) for name in ("timestamp", "search_timestamp") if name in history]
        history["now"] = int(max(times))
    return history


def seen_of(assembly: OneSugAssembly, record: Record, asked: TypedPrefix) -> tuple[np.ndarray, np.ndarray]:
    """What the counts of the log hold of a training example: the queries of its session, and all from then on."""
    name = "search" if "search_query" in record else "suggestion"
    queries, times, sessions = (record[f"{name}_{field}"] for field in ("query", "timestamp", "session"))
    if name == "suggestion":
        chosen = record["suggestion_feedback"] < len(CHOSEN)
        queries, times, sessions = queries[chosen], times[chosen], sessions[chosen]
    numbers = assembly.known.of_row[queries]
    return tuple(
        np.unique(numbers[where & (numbers >= 0)]) for where in (sessions == asked.session, times >= asked.moment)
    )


def recut(history: Record, texts: list[str], rng: np.random.Generator) -> tuple[Record, list[str]]:
    """The history with another beginning of one of the texts typed, and those of the texts that begin so."""
    text = texts[int(rng.integers(len(texts)))]
    typed = text[: int(rng.integers(len(text)))]
    return history | {"prefix": typed}, [each for each in texts if each.startswith(typed)]


def cut(assembly: OneSugAssembly, read: Record) -> Features:
    """The arrays of a history that `read_texts` read."""
    return assembly.features.cut(read, 0, behaviors=len(assembly.behaviors), wanted=assembly.wanted)


def packed(assembly: OneSugAssembly, texts: list[str], count: int) -> Features:
    """Texts as targets: target int32 [L, M], and real bool [L, M], the mask of their tokens."""
    target, real = assembly.space.encode([*texts, *[""] * (count - len(texts))])
    return {"target": target, "real": real & (np.arange(count) < len(texts))[:, None]}


# ---- preference ------------------------------------------------------------------------------------------------------


def preference_loss(
    assembly: OneSugAssembly,
    config: OneSugConfig,
    catalogue: None,
    frozen: dict[str, dict],
    params: Any,
    extra: dict,
    batch: dict,
    key: jax.Array,
):
    """As `jaxrec.training.step.Loss`, with the frozen stages; a batch is what `preference_batches` yields."""
    settings, real = config.preference, batch["real"] & batch["where"][:, None, None]
    policy = target_scores(assembly, {"params": params}, batch, real, key)
    reference = target_scores(assembly, frozen[LIKELIHOOD], batch, real)
    chosen = batch["feedback"] < len(CHOSEN)
    pairs = pair_weights(
        batch["reward"],
        chosen=chosen,
        where=real.any(-1),
        largest=settings.loss.largest_weight,
        weighted=settings.weighted,
    )
    loss = hybrid(policy, reference, pairs.weight, settings.loss)
    count = (pairs.weight > 0).any(-1).sum()
    wanted = (chosen & real.any(-1))[..., :, None] & (~chosen & real.any(-1))[..., None, :]
    metrics = {"loss": (loss.sum(), count), "pairs_left_out": (pairs.left_out.sum(), wanted.sum())}
    return loss.sum() / jnp.maximum(count, 1), (metrics, extra)


def target_scores(
    assembly: OneSugAssembly, variables: dict, batch: dict, real: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """Log-likelihoods float32 [B, L] of packed targets; with dropout where there is a key."""
    train = key is not None
    apply = partial(assembly.model.apply, variables, rngs={"dropout": key} if train else None)
    context = apply(assembly.inputs(batch), train, method="prefill")
    scored = apply(context, batch["target"], real.any(-1), train, method="score")
    return log_likelihood(scored.log_probs, real)


def preference_batches(tables: Path, assembly: OneSugAssembly, config: OneSugConfig) -> Iterator[Features]:
    """Batches of typed prefixes with chosen and rejected queries, without end, in an order that the seed decides.

    feedback int32 [B, L], indices in FEEDBACK; reward float32 [B, L] (OneSug §3.4.1).
    """
    records, cuts, lengths = training_prefixes(assembly, config)
    settings, base = config.preference, np.array(config.preference.base, np.float32)
    texts, of_row = distinct(assembly.queries)
    _, prefix_of_row = distinct(assembly.prefixes)
    shares = training_shares(tables, prefix_of_row, of_row)

    def example(record: Record, place: int, rng: np.random.Generator) -> Features:
        asked = typed_prefixes(record)[place]
        # The same targets in every epoch: the reference's scores of them are computed once.
        rng = np.random.default_rng([config.seed, record["user"], place])
        query, feedback = strongest(
            of_row[record["suggestion_query"][asked.rows]], record["suggestion_feedback"][asked.rows]
        )
        kept = [
            np.sort(rng.permutation(np.flatnonzero(which))[:most])
            for which, most in ((feedback < len(CHOSEN), settings.chosen), (feedback >= len(CHOSEN), settings.rejected))
        ]
        query, feedback = (each[np.concatenate(kept)] for each in (query, feedback))
        share = shares.of(prefix_of_row[asked.prefix], query, feedback)
        count = settings.chosen + settings.rejected
        read = assembly.read_texts(history_of(assembly, record, asked), *seen_of(assembly, record, asked))
        told = {"feedback": (feedback, np.int32), "reward": (base[feedback] * np.exp(share), np.float32)}
        filled = {name: np.pad(each, (0, count - len(each))).astype(of) for name, (each, of) in told.items()}
        return cut(assembly, read) | packed(assembly, [texts[at] for at in query], count) | filled

    return context_batches(records, cuts, example, config, lengths)
