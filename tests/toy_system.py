"""A toy system that reads what a user typed and searched for before, and writes the query.

Two stages: the likelihood of the chosen queries; then S-DPO (Chen et al., 2024): the chosen query above the others that
were suggested, against the model of the first stage as the frozen reference.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq

from jaxrec.config import fingerprint
from jaxrec.data.examples import Records
from jaxrec.data.searches import before_moment, recent_queries, with_texts
from jaxrec.data.sources import SyntheticMall
from jaxrec.data.tables import CHOSEN
from jaxrec.data.token_sequences import TokenSequenceConfig
from jaxrec.evaluation import prefix_cases, text_cases
from jaxrec.losses.likelihood import log_likelihood, next_token
from jaxrec.losses.preference import has_preference, ldpo
from jaxrec.models.causal import Causal, CausalConfig
from jaxrec.models.vocabulary import ContextTokens
from jaxrec.run import Run
from jaxrec.systems import SYSTEMS, System, train
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.config import RunConfig
from jaxrec.systems.generative import context_batches, train_model
from jaxrec.systems.phases import prepare_examples, prepare_tables
from jaxrec.systems.recommender import DecodingConfig, Served
from jaxrec.targets import TextSpace, TextSpaceConfig, load_text_space, normalised, text_space
from jaxrec.targets.texts import TARGETS
from jaxrec.text.tokenizer import TokenizerConfig, train_tokenizer
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig
from jaxrec.training.sharding import init_sharded
from jaxrec.training.stages import Stage

TARGETS_OF_A_CONTEXT = 4


@dataclass(frozen=True)
class PreferenceConfig:
    """The second stage."""

    beta: float = 0.5
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=2e-3, warmup=2))
    training: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=12, log_every=4, checkpoint_every=4, evaluate_every=0)
    )


@dataclass(frozen=True)
class ToySuggestConfig(RunConfig):
    """Everything that decides a run."""

    system: str = "toy"
    searches: int = 1
    """earlier searches that the context holds"""
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(vocabulary=340))
    texts: TextSpaceConfig = field(default_factory=lambda: TextSpaceConfig(max_length=5))
    features: TokenSequenceConfig = field(default_factory=lambda: TokenSequenceConfig((12,)))
    model: CausalConfig = field(
        default_factory=lambda: CausalConfig(width=32, heads=2, groups=1, head_dim=16, hidden=64, layers=1)
    )
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    decoding: DecodingConfig = field(default_factory=lambda: DecodingConfig(beam_width=24, batch_size=8))
    validation_decoding: DecodingConfig = field(default_factory=lambda: DecodingConfig(beam_width=24, batch_size=8))

    of_phases: ClassVar[tuple[str, ...]] = (*RunConfig.of_phases, "tokenizer", "texts")
    of_validation: ClassVar[tuple[str, ...]] = (*RunConfig.of_validation, "validation_decoding")
    of_evaluation: ClassVar[tuple[str, ...]] = (*RunConfig.of_evaluation, "decoding")


@dataclass(frozen=True, eq=False)
class ToyAssembly:
    """The model, with the texts of the run."""

    model: Causal
    space: TextSpace
    queries: np.ndarray
    prefixes: np.ndarray
    searches: int
    behaviors: tuple[str, ...]
    wanted: np.ndarray
    examples: Path
    catalogue: Any = None

    @property
    def target_behaviors(self) -> list[int]:
        return np.flatnonzero(self.wanted).tolist()

    def cases(self, split: str):
        return text_cases(prefix_cases(Records(self.examples, split), split), self.space, self.queries, self.prefixes)

    def read_texts(self, history: dict) -> dict:
        """`tokens`: the last searches and what was typed, each with the end token behind it."""
        texts = list(recent_queries(history, self.searches)["query"]) if "search_query" in history else []
        typed = history.get("prefix", history.get("query", ""))
        rows = self.space.tokenizer.encode([normalised(text) for text in [*filter(None, texts), typed]])
        return {**history, "tokens": np.array([token for row in rows for token in (*row, self.space.tokenizer.end)])}

    def init(self, seed: int, mesh=None) -> dict:
        one = jnp.zeros((1, 1), jnp.int32)
        make = partial(self.model.init, jax.random.key(seed), ContextTokens(one, one > -1), one[None])
        return init_sharded(make, mesh)

    def serve(self, variables: dict, version=None, before=None) -> Served:
        return Served(variables=variables)

    def context(self, served: Served, arrays: dict):
        inputs = ContextTokens(arrays["tokens"], arrays["mask"])
        return self.model.apply(served.variables, inputs, method="prefill")

    def extend(self, served: Served, context, tokens, cache, level: int):
        return self.model.apply(served.variables, context, tokens, cache, level, method="extend")

    def rescore(self, served: Served, context, likelihood_weight: float) -> None:
        return None


def assemble(run, config: ToySuggestConfig) -> ToyAssembly:
    space = load_text_space(run.place(TARGETS))
    model = Causal(dataclasses.replace(config.model, vocabulary=space.tokenizer.size))
    wanted = np.isin(config.data.behaviors, config.data.target_behaviors)
    tables = [texts(run.tables / f"{name}.parquet", name_of) for name, name_of in FILES.items()]
    return ToyAssembly(model, space, *tables, config.searches, tuple(config.data.behaviors), wanted, run.examples)


FILES = {"queries": "query", "prefixes": "prefix"}


def texts(path: Path, column: str) -> np.ndarray:
    return np.array(pq.read_table(path, columns=[column])[column].to_pylist(), object)


def make_targets(run, config: ToySuggestConfig, folder: Path) -> None:
    """The listed texts are the queries that somebody chose in training."""
    table = pq.read_table(run.tables / "queries.parquet").to_pydict()
    tokenizer = train_tokenizer(map(normalised, table["query"]), config.tokenizer)
    chosen = [(text, count) for text, count in zip(table["query"], table["chosen"], strict=True) if count]
    text_space(tokenizer, *zip(*chosen, strict=True), config.texts).save(folder)


def scores(assembly: ToyAssembly, variables: dict, batch: dict) -> jax.Array:
    """float32 [B, L, M], the log-probabilities of the packed targets' tokens."""
    context = assembly.context(Served(variables=variables), batch)
    return assembly.model.apply(variables, context, batch["target"], method="score").log_probs


def likelihood(assembly, config, catalogue, params, extra, batch, key):
    real = batch["real"] & (batch["level"] == 1)[..., None] & batch["where"][:, None, None]
    total, count = next_token(scores(assembly, {"params": params}, batch), real).sum(), real.any(-1).sum()
    return total / jnp.maximum(count, 1), ({"loss": (total, count)}, extra)


def preference(assembly, config, catalogue, frozen, params, extra, batch, key):
    real = batch["real"] & batch["where"][:, None, None]
    policy, reference = (
        log_likelihood(scores(assembly, variables, batch), real)
        for variables in ({"params": params}, frozen["likelihood"])
    )
    level, where = batch["level"], real.any(-1)
    loss = ldpo(policy - reference, level, where, beta=config.preference.beta)
    total, count = loss.sum(), has_preference(level, where).sum()
    return total / jnp.maximum(count, 1), ({"loss": (total, count)}, extra)


def training_batches(assembly: ToyAssembly, config: ToySuggestConfig):
    """Contexts at the prefix of each chosen suggestion; targets are the chosen query and others that were suggested."""
    records = Records(assembly.examples, "train")
    cuts = [(at, row) for at, each in enumerate(records) for row in np.flatnonzero(chosen(each))]

    def example(record: dict, row: int, rng: np.random.Generator) -> dict:
        moment, session, prefix = (record[f"suggestion_{name}"][row] for name in ("timestamp", "session", "prefix"))
        same = (record["suggestion_timestamp"] == moment) & (record["suggestion_prefix"] == prefix)
        others = rng.permutation(np.flatnonzero(same & ~chosen(record)))[: TARGETS_OF_A_CONTEXT - 1]
        rows = record["suggestion_query"][[row, *others]]
        history = before_moment(record, moment, session) | {"prefix": prefix}
        history = assembly.read_texts(with_texts(history, assembly.queries, assembly.prefixes))
        target, real = assembly.space.encode([*assembly.queries[rows], *[""] * (TARGETS_OF_A_CONTEXT - len(rows))])
        there = np.arange(TARGETS_OF_A_CONTEXT) < len(rows)
        level = (np.arange(TARGETS_OF_A_CONTEXT) == 0).astype(np.int32)
        context = config.features.cut(history, 0, behaviors=len(assembly.behaviors), wanted=assembly.wanted)
        return context | {"target": target, "real": real & there[:, None], "level": level}

    return context_batches(records, np.array(cuts), example, config, [config.features.buckets[-1]] * len(cuts))


def chosen(record: dict) -> np.ndarray:
    return record["suggestion_feedback"] < len(CHOSEN)


def stages(run, config: ToySuggestConfig) -> tuple[Stage, ...]:
    def data() -> tuple[str, ...]:
        tables = prepare_tables(run, config)
        made = fingerprint(tables, config.tokenizer, config.texts)
        targets = run.phase(TARGETS, made, lambda folder: make_targets(run, config, folder))
        return targets, prepare_examples(run, config, tables)

    def train_stage(mean_loss, config, task) -> None:
        assembly = assemble(run, config)
        train_model(assembly, config, mean_loss, training_batches(assembly, config), task)

    later = dataclasses.replace(config, optim=config.preference.optim, training=config.preference.training)
    return (
        Stage("likelihood", config.training_inputs("preference"), data, partial(train_stage, likelihood, config)),
        Stage(
            *("preference", config.training_inputs(), data, partial(train_stage, preference, later)),
            start="likelihood",
            frozen=("likelihood",),
        ),
    )


config = ToySuggestConfig(
    data=SyntheticMall(*(60, 60, 6, 3, 6), browsed_per_session=1, exposures_per_session=1, searched=0.6),
    batch_size=32,
    optim=OptimConfig(learning_rate=1e-2, warmup=4),
    training=LoopConfig(steps=48, log_every=16, checkpoint_every=16, evaluate_every=0),
    validation=EvaluationConfig(split="valid", max_users=30),
    evaluation=EvaluationConfig(cutoffs=(1, 5, 10), shown_users=3),
)


if __name__ == "__main__":
    SYSTEMS["toy"] = System(ToySuggestConfig, assemble, stages)
    train(Run.open(Path(sys.argv[1]), config), config)
