"""The preference stage of OneSug (§3.4): chosen queries against rejected ones, weighted by the gap of their rewards.

The reference is the stage before it, frozen. Where an example is seen more than once, its scores of all examples are
computed once, before the first step, and kept beside the stage's checkpoints (`jaxrec.systems.stored_rows`). Else each
step computes those of its own examples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.data.examples import Record, Records
from jaxrec.data.padding import padded
from jaxrec.data.pipeline import Features
from jaxrec.data.suggestion_targets import FeedbackShares, strongest, training_shares, typed_prefix
from jaxrec.data.tables import CHOSEN
from jaxrec.data.words import distinct
from jaxrec.losses.likelihood import log_likelihood
from jaxrec.losses.preference import hybrid
from jaxrec.losses.rewards import pair_weights
from jaxrec.systems.generative import context_batches
from jaxrec.systems.onesug.config import LIKELIHOOD, OneSugConfig
from jaxrec.systems.onesug.examples import cut, history_of, packed, seen_of, training_prefixes
from jaxrec.systems.onesug.model import OneSugAssembly
from jaxrec.systems.stored_rows import seen_again, stored_rows

REFERENCE = "reference"
"""The folder of the reference's scores inside the stage's."""


def preference_loss(
    assembly: OneSugAssembly,
    config: OneSugConfig,
    catalogue: None,
    params: Any,
    extra: dict,
    batch: dict,
    key: jax.Array,
):
    """As `jaxrec.training.step.Loss`; a batch of `preference_batches` with the reference's scores, float32 [B, L]."""
    settings, real = config.preference, batch["real"] & batch["where"][:, None, None]
    policy = target_scores(assembly, {"params": params}, batch, key)
    where, chosen = real.any(-1), batch["feedback"] < len(CHOSEN)
    bounds = {"largest": settings.loss.largest_weight, "weighted": settings.weighted}
    pairs = pair_weights(batch["reward"], chosen=chosen, where=where, **bounds)
    loss = hybrid(policy, batch["reference"], pairs.weight, settings.loss)
    count = (pairs.weight > 0).any(-1).sum()
    wanted = (pairs.weight > 0) | pairs.left_out
    metrics = {"loss": (loss.sum(), count), "pairs_left_out": (pairs.left_out.sum(), wanted.sum())}
    return loss.sum() / jnp.maximum(count, 1), (metrics, extra)


def referring_loss(
    assembly: OneSugAssembly,
    config: OneSugConfig,
    catalogue: None,
    frozen: dict[str, dict],
    params: Any,
    extra: dict,
    batch: dict,
    key: jax.Array,
):
    """As `preference_loss`, which computes the reference's scores of the batch itself, from the frozen stage."""
    reference = target_scores(assembly, frozen[LIKELIHOOD], batch)
    return preference_loss(assembly, config, catalogue, params, extra, batch | {"reference": reference}, key)


def target_scores(assembly: OneSugAssembly, variables: dict, batch: dict, key: jax.Array | None = None) -> jax.Array:
    """Log-likelihoods float32 [B, L] of packed targets, 0 for none; with dropout where there is a key."""
    train, real = key is not None, batch["real"] & batch["where"][:, None, None]
    apply = partial(assembly.model.apply, variables, rngs={"dropout": key} if train else None)
    context = apply(assembly.inputs(batch), train, method="prefill")
    scored = apply(context, batch["target"], real.any(-1), train, method="score")
    return log_likelihood(scored.log_probs, real)


@dataclass(frozen=True, eq=False)
class PreferenceExamples:
    """Typed prefixes with chosen and rejected queries, the same ones in every epoch."""

    records: Records
    cuts: np.ndarray
    """int64 [n, 2], as `training_prefixes`"""
    lengths: list[int]
    assembly: OneSugAssembly
    config: OneSugConfig
    texts: tuple[str, ...]
    """distinct queries of the log, suggested ones included"""
    of_row: np.ndarray
    """int64: their number for every row of queries.parquet"""
    prefix_of_row: np.ndarray
    """int64: the number of the text in every row of prefixes.parquet"""
    shares: FeedbackShares

    def __call__(self, record: Record, row: int, rng: np.random.Generator) -> Features:
        """The arrays of a prompt and of its targets; feedback int32 [L], reward float32 [L] (OneSug §3.4.1)."""
        settings, asked = self.config.preference, typed_prefix(record, row)
        # The reference's scores of these targets may be computed once, so that the epoch must not change them.
        rng = np.random.default_rng([self.config.seed, record["user"], row])
        suggested = self.of_row[record["suggestion_query"][asked.rows]]
        query, feedback = strongest(suggested, record["suggestion_feedback"][asked.rows])
        chosen = feedback < len(CHOSEN)
        sides = ((np.flatnonzero(chosen), settings.chosen), (np.flatnonzero(~chosen), settings.rejected))
        kept = np.concatenate([np.sort(rng.permutation(side)[:most]) for side, most in sides])
        query, feedback = query[kept], feedback[kept]
        reward = np.array(settings.base, np.float32)[feedback]
        reward *= np.exp(self.shares.of(self.prefix_of_row[asked.prefix], query, feedback))
        assembly, count = self.assembly, settings.chosen + settings.rejected
        read = assembly.read_texts(history_of(assembly, record, asked), seen_of(assembly, record, asked))
        return {
            **cut(assembly, read),
            **packed(assembly, [self.texts[at] for at in query], count),
            "feedback": padded(feedback, count),
            "reward": padded(reward, count, 0, np.float32),
        }

    def batches(self) -> Iterator[Features]:
        """Batches without end, in an order that the seed decides."""
        return context_batches(self.records, self.cuts, self, self.config, self.lengths)


def preference_examples(tables: Path, assembly: OneSugAssembly, config: OneSugConfig) -> PreferenceExamples:
    """Those of a run's training log."""
    texts, of_row = distinct(assembly.queries)
    _, prefix_of_row = distinct(assembly.prefixes)
    shares = training_shares(tables, prefix_of_row, of_row)
    return PreferenceExamples(
        *training_prefixes(assembly, config), assembly, config, texts, of_row, prefix_of_row, shares
    )


# ---- the reference's scores ------------------------------------------------------------------------------------------


def stores_reference(examples: PreferenceExamples) -> bool:
    """Whether the reference's scores are computed before the first step; else every step computes those of its own."""
    settings = examples.config.preference
    return settings.stored_reference and seen_again(examples, settings.training.steps)


def stored_scores(folder: Path, examples: PreferenceExamples, variables: dict) -> np.ndarray:
    """The reference's log-likelihoods of all examples, float32 [n, L], a row for each of `cuts`; made where missing."""
    score = jax.jit(partial(target_scores, examples.assembly))
    found = stored_rows(folder, examples, lambda batch: {"reference": score(variables, batch)}, "reference")
    return found["reference"]
