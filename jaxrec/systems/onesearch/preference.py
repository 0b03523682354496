"""The preferences of OneSearch (§3.4.2): chosen items of a search against rejected ones, by their rewards.

The items of a search are packed targets of its one context, as in the stage `personalisation`, which is the frozen
reference. Both phases have one loss (Eq. 11-12) and differ in where the items come from:

    phase one   the answers of the frozen stage, re-ordered by the reward model     `jaxrec.systems.onesearch.reordered`
    phase two   what the user did with the search's items                           `InteractionExamples`

A pair is weighted by the gap of its rewards (Eq. 9): of the levels and the items' calibrated rates (Eq. 6-8), or of the
reward model's scores (Eq. 10) where the chosen item is one that no user asked for. Pairs without a gap, or with one in
the wrong order, are left out and counted (`pairs_left_out`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import UserError
from jaxrec.data.behavior_levels import EXPOSED, POSITIVES, BehaviorLevels, RecentCounts, read_recent_counts
from jaxrec.data.examples import Record, Records
from jaxrec.data.padding import padded
from jaxrec.data.pipeline import Features
from jaxrec.data.popularity import DAY
from jaxrec.data.tables import SPLITS
from jaxrec.losses.likelihood import log_likelihood
from jaxrec.losses.preference import hybrid, implicit_reward
from jaxrec.losses.rewards import calibrated_rates, pair_weights, rate_reward
from jaxrec.run import Run
from jaxrec.systems.generative import context_batches
from jaxrec.systems.onesearch.config import PERSONALISATION, OneSearchConfig
from jaxrec.systems.onesearch.model import OneSearchAssembly, OneSearchCatalogue
from jaxrec.systems.onesearch.reward_model import levels_of
from jaxrec.systems.onesearch.training import bucket_lengths, read_search

NONE = -1

# ---- loss ------------------------------------------------------------------------------------------------------------


def preference_loss(
    assembly: OneSearchAssembly,
    config: OneSearchConfig,
    catalogue: OneSearchCatalogue,
    params: Any,
    extra: dict,
    batch: dict,
    key: jax.Array,
):
    """As `jaxrec.training.step.Loss` (Eq. 11-12); a batch of `packed_pairs` with `reference` float32 [B, L].

    `pairs_ordered` is the share of compared pairs whose chosen item has the larger implicit reward.
    """
    own = config.rewards
    policy = target_scores(assembly, catalogue, {"params": params}, batch, key)
    where = (batch["target"] >= 0) & batch["where"][:, None]
    bounds = {"largest": own.loss.largest_weight, "weighted": own.weighted}
    pairs = pair_weights(pair_rewards(batch, own.levels.base), chosen=batch["chosen"], where=where, **bounds)
    loss, compared = hybrid(policy, batch["reference"], pairs.weight, own.loss), pairs.weight > 0
    reward = implicit_reward(policy, batch["reference"], beta=own.loss.beta)
    ordered = compared & (reward[..., :, None] > reward[..., None, :])
    count, wanted = compared.any(-1).sum(), (compared | pairs.left_out).sum()
    metrics = {
        "loss": (loss.sum(), count),
        "pairs_left_out": (pairs.left_out.sum(), wanted),
        "pairs_ordered": (ordered.sum(), compared.sum()),
    }
    return loss.sum() / jnp.maximum(count, 1), (metrics, extra)


def referring_loss(
    assembly: OneSearchAssembly,
    config: OneSearchConfig,
    catalogue: OneSearchCatalogue,
    frozen: dict[str, dict],
    params: Any,
    extra: dict,
    batch: dict,
    key: jax.Array,
):
    """As `preference_loss`, which computes the reference's scores of the batch itself, from the frozen stage."""
    reference = target_scores(assembly, catalogue, frozen[PERSONALISATION], batch)
    return preference_loss(assembly, config, catalogue, params, extra, batch | {"reference": reference}, key)


def target_scores(
    assembly: OneSearchAssembly,
    catalogue: OneSearchCatalogue,
    variables: dict,
    batch: dict,
    key: jax.Array | None = None,
) -> jax.Array:
    """Log-likelihoods float32 [B, L] of the IDs of packed items, 0 for none; with dropout where there is a key."""
    train, where = key is not None, (batch["target"] >= 0) & batch["where"][:, None]
    apply = partial(assembly.model.apply, variables, rngs={"dropout": key} if train else None)
    context = apply(assembly.inputs(catalogue, batch), train, method="prefill")
    scored = apply(context, catalogue.codes[jnp.maximum(batch["target"], 0)], where, train, method="score")
    return log_likelihood(scored.log_probs, where)


def pair_rewards(batch: dict, base: tuple[float, ...]) -> jax.Array:
    """The rewards float32 [B, L] that pairs are compared by: r(q, i) of Eq. 6-8, or Rscores where `by_score`.

    batch: of `packed_pairs`; base: lambda of each level.
    """
    rates = calibrated_rates(*jnp.moveaxis(jnp.asarray(batch["counts"]), -1, 0))
    by_level = rate_reward(batch["level"], *rates, base=base)
    return jnp.where(batch["by_score"][:, None], batch["score"], by_level)


# ---- examples --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SearchExamples:
    """The searches of training with what tells of their items."""

    records: Records
    cuts: np.ndarray
    """int64 [n, 2]: record, and place of the search in it"""
    lengths: list[int]
    """[n]: the bucket of each query"""
    assembly: OneSearchAssembly
    config: OneSearchConfig
    """with the batches, optimiser and length of the phase"""
    levels: BehaviorLevels
    counts: RecentCounts

    def prompt(self, record: Record, place: int) -> Features:
        """The arrays of a search as at serving."""
        assembly = self.assembly
        read = read_search(assembly, record, place)
        return self.config.features.cut(read, 0, behaviors=len(assembly.behaviors), wanted=assembly.wanted)

    def counts_of(self, record: Record, place: int, items: np.ndarray) -> np.ndarray:
        """Exposures, clicks and orders float32 [n, 3] of items in the days before a search."""
        return self.counts.before(items, int(record["search_timestamp"][place]) // DAY)

    def take(self, rows: np.ndarray) -> dict[str, Any]:
        """The fields with some of the searches alone: int [m], rows of `cuts`."""
        return {**vars(self), "cuts": self.cuts[rows], "lengths": [self.lengths[row] for row in rows]}

    def batches(self) -> Iterator[Features]:
        """Batches without end, in an order that the seed decides."""
        return context_batches(self.records, self.cuts, self, self.config, self.lengths)


def search_examples(run: Run, assembly: OneSearchAssembly, config: OneSearchConfig, most: int = 0) -> SearchExamples:
    """The training searches of a run, those that led to nothing too; `most` of them, drawn by the seed, or 0 for all.

    Raises:
      UserError: there is no search, or no level can be told.
    """
    records, cuts, split = Records(assembly.examples, "train"), [], SPLITS.index("train")
    for at, record in enumerate(records):
        places = np.flatnonzero(record["search_split"] == split)
        cuts.append(np.stack([np.full(len(places), at), places], axis=1))
    cuts = np.concatenate(cuts).astype(np.int64)
    if 0 < most < len(cuts):
        cuts = cuts[np.sort(np.random.default_rng(config.seed).permutation(len(cuts))[:most])]
    levels = levels_of(run, config)
    counts = read_recent_counts(
        run.tables, tuple(config.data.behaviors), levels.labels, config.rewards.levels.recent_days
    )
    return SearchExamples(
        records, cuts, bucket_lengths(assembly, config, records, cuts), assembly, config, levels, counts
    )


@dataclass(frozen=True, eq=False)
class InteractionExamples(SearchExamples):
    """Phase two: searches with chosen items of the first three levels and rejected ones of the last three."""

    def __call__(self, record: Record, place: int, rng: np.random.Generator) -> Features:
        """The arrays of a search and of its targets, as `packed_pairs`."""
        settings = self.config.rewards.interactions
        # The reference's scores of these items may be computed once, so that the epoch must not change them.
        rng = np.random.default_rng([self.config.seed, record["user"], place])
        met, level = self.levels.of(record, place)
        positive = np.flatnonzero(level < POSITIVES)
        chosen = np.sort(rng.permutation(positive)[: settings.chosen])
        exposed = np.sort(rng.permutation(np.flatnonzero(level == EXPOSED))[: settings.exposed])
        categories = self.levels.categories(record, place)
        drawn = self.levels.draw(categories, (settings.unshown, settings.other), rng)
        items = np.concatenate([met[chosen], met[exposed], drawn[~np.isin(drawn, met)]])
        of_drawn = items[len(chosen) + len(exposed) :]
        level = np.concatenate([level[chosen], level[exposed], self.levels.unmet(of_drawn, categories)])
        kept = ~same_id(self.assembly.space.codes, items, met[positive])
        kept[: len(chosen)] = True
        items, level = items[kept], level[kept]
        size = settings.chosen + settings.rejected
        counts = self.counts_of(record, place, items)
        return self.prompt(record, place) | packed_pairs(items, level < POSITIVES, level, counts, size)


def interaction_examples(run: Run, assembly: OneSearchAssembly, config: OneSearchConfig) -> InteractionExamples:
    """Those of a run's training log; config: with the batches, optimiser and length of the phase.

    Raises:
      UserError: no search has an item of the first three levels.
    """
    log = search_examples(run, assembly, config, config.rewards.interactions.searches)
    kept = [
        row for row, (at, place) in enumerate(log.cuts) if (log.levels.of(log.records[at], place)[1] < POSITIVES).any()
    ]
    if not kept:
        raise UserError(
            f"{run.tables / 'events.parquet'}: no search of training led to a click or a purchase, so that no item is "
            "chosen; use a longer log, or leave out rewards.interactions"
        )
    return InteractionExamples(**log.take(np.array(kept)))


def packed_pairs(
    items: np.ndarray,
    chosen: np.ndarray,
    level: np.ndarray,
    counts: np.ndarray,
    size: int,
    score: np.ndarray | None = None,
) -> Features:
    """Items of a search as targets, padded to `size` L.

    target int32 [L], NONE in the padding; chosen bool [L]; level int32 [L]; counts float32 [L, 3]: exposures, clicks
    and orders of late; score float32 [L] and by_score bool []: whether pairs are compared by it.
    """
    return {
        "target": padded(items, size, NONE),
        "chosen": padded(chosen, size, 0, bool),
        "level": padded(level, size, NONE),
        "counts": padded(counts, size, 0, np.float32),
        "score": padded(np.zeros(0) if score is None else score, size, 0, np.float32),
        "by_score": np.bool_(score is not None),
    }


def same_id(codes: np.ndarray, items: np.ndarray, others: np.ndarray) -> np.ndarray:
    """bool [n]: items int [n] whose semantic ID one of `others` int [m] has too; codes int [I, M].

    A model gives such items one score, so that none of them can be preferred to another.
    """
    return (codes[items][:, None] == codes[others][None]).all(-1).any(1)
