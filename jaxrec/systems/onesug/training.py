"""Training OneSug: the likelihood of what was chosen (§3.3), then preferences between what was suggested (§3.4).

The queries of one typed prefix are L targets of one context in both stages. The preferences have a file of their own.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxrec.config import fingerprint
from jaxrec.console import console
from jaxrec.data.completions import training_queries
from jaxrec.data.examples import Record
from jaxrec.data.item_neighbours import item_neighbours
from jaxrec.data.pipeline import Features
from jaxrec.data.suggestion_targets import typed_prefix
from jaxrec.data.tables import CHOSEN
from jaxrec.data.vetted_queries import vetted_queries
from jaxrec.data.words import normalised
from jaxrec.losses.likelihood import next_token
from jaxrec.run import Run
from jaxrec.systems.generative import context_batches, mean_of, train_model
from jaxrec.systems.onesug.config import LIKELIHOOD, PREFERENCE, OneSugConfig
from jaxrec.systems.onesug.examples import cut, history_of, packed, seen_of, training_prefixes
from jaxrec.systems.onesug.model import NEIGHBOURS_FILE, OneSugAssembly, assemble
from jaxrec.systems.onesug.preference import (
    REFERENCE,
    preference_examples,
    preference_loss,
    referring_loss,
    stored_scores,
    stores_reference,
)
from jaxrec.systems.onesug.queries import NEIGHBOURS
from jaxrec.systems.phases import ALIGNMENT, alignment, prepare_examples, prepare_related, prepare_tables
from jaxrec.systems.pretrained import digests, initial, write_pretrained
from jaxrec.systems.profiles import profile_texts
from jaxrec.systems.stored_rows import WithStored
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
        init = partial(initial, assembly, config.pretrained, task)
        train_model(assembly, mine, likelihood_loss, likelihood_batches(assembly, mine), task, init=init)

    def train_preference(task: Task) -> None:
        assembly, of_stage = assemble(run, config), config.preference
        mine = dataclasses.replace(config, features=assembly.features, optim=of_stage.optim, training=of_stage.training)
        examples = preference_examples(run.tables, assembly, mine)
        if not stores_reference(examples):
            train_model(assembly, mine, referring_loss, examples.batches(), task)
            return
        scores = stored_scores(task.folder / REFERENCE, examples, task.frozen[LIKELIHOOD])
        batches = WithStored(examples.batches(), {"reference": scores})
        train_model(assembly, mine, preference_loss, batches, dataclasses.replace(task, frozen={}))

    before = alignment(run, config, with_ids=False) if config.related else ()
    needs = (ALIGNMENT,) if before else ()
    first = Stage(LIKELIHOOD, config.training_inputs("preference"), data, train_likelihood, needs=needs)
    if config.preference is None:
        return *before, first
    second = Stage(PREFERENCE, config.training_inputs(), data, train_preference, start=LIKELIHOOD, frozen=(LIKELIHOOD,))
    return *before, first, second


# ---- data ------------------------------------------------------------------------------------------------------------


def prepare_suggestions(run: Run, config: OneSugConfig) -> tuple[str, ...]:
    """Tables and examples, the tokenizer with the list of queries, and which queries the same users search for."""
    weights = digests(config.pretrained) if config.pretrained else ()
    tables = prepare_tables(run, config)
    vetted = config.vetted.fingerprint()
    made_of = fingerprint(tables, config.tokenizer, config.texts, vetted, config.profile, *weights)
    made = [run.phase(TARGETS, made_of, partial(make_targets, run, config)), prepare_examples(run, config, tables)]
    if config.related:
        made.append(prepare_related(run, config))
    if config.neighbours.kept:
        inputs = fingerprint(tables, config.neighbours)
        made.append(run.phase(NEIGHBOURS, inputs, partial(make_neighbours, run, config)))
    return tuple(made)


def make_targets(run: Run, config: OneSugConfig, folder: Path) -> None:
    """Trains the tokenizer on the queries of training, or takes that of the pretrained weights, and lists the vetted
    queries. Those of more tokens than can be written are left out of the list.
    """
    texts, _ = training_queries(run.tables)
    vetted = vetted_queries(run.tables, config.vetted)
    profiles, vocabulary = profile_texts(run.tables, config.profile) if config.profile else [], 0
    if config.pretrained:
        tokenizer, vocabulary = write_pretrained(folder, config.pretrained)
    else:
        tokenizer = train_tokenizer([*texts, *profiles], config.tokenizer)
    short = [at for at, row in enumerate(tokenizer.encode(vetted.texts)) if len(row) < config.texts.max_length]
    if len(short) < len(vetted.texts):
        count = f"{len(vetted.texts) - len(short):,} of {len(vetted.texts):,} queries"
        longest = f"texts.max_length, {config.texts.max_length}"
        console.print(f"{count} have more tokens than {longest}: they are not listed", markup=False)
    listed = [vetted.texts[at] for at in short]
    text_space(tokenizer, listed, vetted.counts[short], config.texts, vocabulary, vetted.blocked).save(folder)


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
    objective, size = config.objective, None
    if objective.recut or objective.without_past:
        # A changed prompt may belong to another bucket than that of the log.
        size = config.features.buckets[-1]
        lengths = [size] * len(lengths)

    def example(record: Record, row: int, rng: np.random.Generator) -> Features:
        asked = typed_prefix(record, row)
        chosen = asked.rows[record["suggestion_feedback"][asked.rows] < len(CHOSEN)]
        texts = sorted({normalised(text) for text in assembly.queries[record["suggestion_query"][chosen]]})
        history, seen = history_of(assembly, record, asked), seen_of(assembly, record, asked)
        if rng.random() < objective.recut:
            history, texts = recut(history, texts, rng)
            seen = seen._replace(answer="")
        if rng.random() < objective.without_past:
            history = {name: history[name] for name in ("prefix", "now")}
        if len(texts) > objective.targets:
            texts = [texts[at] for at in np.sort(rng.permutation(len(texts))[: objective.targets])]
        read = assembly.read_texts(history, seen)
        return cut(assembly, read, size) | packed(assembly, texts, objective.targets)

    return context_batches(records, cuts, example, config, lengths)


def recut(history: Record, texts: list[str], rng: np.random.Generator) -> tuple[Record, list[str]]:
    """The history with another beginning of one of the texts typed, and those of the texts that begin so."""
    text = texts[int(rng.integers(len(texts)))]
    typed = text[: int(rng.integers(len(text)))]
    return history | {"prefix": typed}, [each for each in texts if each.startswith(typed)]
