"""Training a ranking model on impressions: all that a session or a search showed are candidates of one context.

ranking_stage(run, config, config.ranking, data)      a stage of any system with semantic IDs
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxrec.config import UserError
from jaxrec.console import console
from jaxrec.data.examples import Record, Records
from jaxrec.data.pipeline import Features, batches, cut_index
from jaxrec.data.tables import SPLITS
from jaxrec.evaluation.impressions import calibration, impression_metrics
from jaxrec.losses.ranking import binary_cross_entropy, entire_space, log_price_error
from jaxrec.models.ranking.inputs import RankedItems
from jaxrec.models.ranking.towers import SEARCH
from jaxrec.run import Run
from jaxrec.systems.generative import SemanticIdRunConfig
from jaxrec.systems.ranking.config import RANKING, RankingConfig, RankingObjective, RankingStageConfig
from jaxrec.systems.ranking.model import Ranker, assemble_ranker
from jaxrec.training.loop import TrainState
from jaxrec.training.stages import Stage, Task, minimise
from jaxrec.training.step import Loss


def ranking_stage(
    run: Run,
    config: SemanticIdRunConfig,
    of_stage: RankingStageConfig,
    data: Callable[[], Sequence[Any]],
    name: str = RANKING,
    needs: tuple[str, ...] = (),
    further: Callable[[], "Further"] | None = None,
) -> Stage:
    """The training of a ranking model as a stage of a system.

    Args:
      config: the system's; `validation` says how many users the model is validated on.
      data: runs the phases that make tables, semantic IDs and examples, as the system's other stages do.
      name: of the stage; its best variables are those of a `Task`'s `frozen[name]`.
      needs: as for `Stage`.
      further: makes, when the training begins, what names further candidates of training contexts. What decides it is
        the caller's to put into the stage's settings.
    """
    settings = (of_stage, config.seed, config.mesh, config.validation)

    def train(task: Task) -> None:
        ranker = assemble_ranker(run, config, of_stage)
        mine = replace(config, optim=of_stage.optim, training=of_stage.training)
        evaluate = None
        if of_stage.training.evaluate_every:
            evaluate = make_validation(ranker, of_stage, config.validation.max_users, config.validation.seed)
        batches = training_batches(ranker, of_stage, config.seed, further and further())
        minimise(bound_loss(ranker, of_stage.objective), ranker.init, batches, mine, task, evaluate=evaluate)

    return Stage(name, settings, data, train, needs=needs)


# ---- loss ------------------------------------------------------------------------------------------------------------


def bound_loss(ranker: Ranker, objective: RankingObjective) -> Loss:
    """`mean_loss` of a ranker, with its items as an argument of the compiled step."""
    return Partial(partial(mean_loss, ranker, objective), ranker.items)


def mean_loss(
    ranker: Ranker,
    objective: RankingObjective,
    items: RankedItems,
    params: Any,
    extra: dict,
    batch: dict,
    key: jax.Array,
):
    """As `jaxrec.training.step.Loss`; a batch of `training_batches`. Tells the loss of each tower."""
    logits = ranker.logits(params, batch, batch["candidate"], items, True, {"dropout": key})
    terms = losses(ranker, objective, items, logits, batch)
    means = {name: value.sum() / jnp.maximum(where.sum(), 1) for name, (value, where) in terms.items()}
    total = sum(getattr(objective, name) * mean for name, mean in means.items())
    shown = (batch["candidate_where"] & batch["where"][:, None]).sum()
    metrics = {f"loss_{name}": (value.sum(), where.sum()) for name, (value, where) in terms.items()}
    return total, (metrics | {"loss": (total * shown, shown)}, extra)


def losses(
    ranker: Ranker, objective: RankingObjective, items: RankedItems, logits: dict[str, jax.Array], batch: dict
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Of each loss with a weight its values float32 [B, L], and the candidates bool [B, L] that it is defined for."""
    where = batch["candidate_where"] & batch["where"][:, None]
    clicked, purchased = outcomes(ranker, batch["candidate_behavior"])
    found = {}
    if "ctr" in logits:
        found["ctr"] = binary_cross_entropy(logits["ctr"], clicked, where=where), where
    if "cvr" in logits and ("ctcvr" in logits or "ctr" not in logits):
        found["cvr"] = binary_cross_entropy(logits["cvr"], purchased, where=where & clicked), where & clicked
    if "ctcvr" in logits:
        found["ctcvr"] = binary_cross_entropy(logits["ctcvr"], purchased, where=where), where
    elif "ctr" in logits and "cvr" in logits:
        found["ctcvr"] = entire_space(logits["ctr"], logits["cvr"], purchased, where=where), where
    if "price" in logits:
        mean, deviation = ranker.model.sizes.price
        price = (items.log_price[batch["candidate"]] - mean) / deviation
        bought = where & purchased & jnp.isfinite(price)
        found["price"] = log_price_error(logits["price"], price, where=bought), bought
    if SEARCH in logits:
        label = clicked if "ctr" in logits else purchased
        found["search"] = binary_cross_entropy(logits[SEARCH], label, where=where), where
    return {name: pair for name, pair in found.items() if getattr(objective, name)}


def outcomes(ranker: Ranker, behavior: Any) -> tuple[Any, Any]:
    """Whether candidates with these strongest behaviors int [...] were clicked and purchased, bool [...] each.

    What the log has no behavior for is False everywhere.
    """
    nothing = len(ranker.behaviors)
    labels = ranker.labels
    return tuple(behavior >= (nothing if each is None else each) for each in (labels.click, labels.purchase))


# ---- examples --------------------------------------------------------------------------------------------------------


Further = Callable[[Record, int], np.ndarray]
"""(record, place of a context) -> bool [T]: events whose items are candidates of the context too, as if it had shown
them"""


def training_batches(
    ranker: Ranker, ranking: RankingStageConfig, seed: int, further: Further | None = None
) -> Iterator[Features]:
    """Batches of contexts with their candidates, without end, in an order that the seed decides.

    Raises:
      UserError: no context has a candidate.
    """
    records = Records(ranker.examples, "train")
    cuts = context_cuts(ranker, ranking, records, ranking.labels.sessions)
    if not len(cuts):
        names = ranker.behaviors[ranker.labels.weakest :]
        where = "search led to" if ranking.contexts == "searches" else "session of training has"
        raise UserError(f"the log has no impressions: no {where} an event of {', '.join(names)}; use a longer log")
    if ranker.labels.sampled:
        why = "the log has no exposures" if ranker.labels.exposure is None else "ranking.labels.sampled"
        console.print(
            f"ranking: {ranker.labels.sampled} of {ranker.labels.candidates} candidates of a context are drawn and "
            f"count as shown and not taken ({why}): probabilities are relative to that sample",
            markup=False,
        )
    return context_batches(ranker, ranking, records, cuts, ranking.batch_size, seed, further)


def context_cuts(ranker: Ranker, ranking: RankingConfig, records: Records, most: int = 0) -> np.ndarray:
    """(record, session) of every session of a split that showed something, or (record, search) of every such search.

    Of train only the last `most` of a record, if that is not 0; of valid and test, sessions: the first of each record.
    """
    names = ranker.behaviors[ranker.labels.weakest :]
    if ranking.contexts == "sessions":
        return cut_index(records, names, min_history=0, max_per_record=most or None)
    split, found = SPLITS.index(records.split), []
    for at, record in enumerate(records):
        shown = (record["behavior"] >= ranker.labels.weakest) & (record["split"] == split)
        led = np.unique(record["search"][shown])
        led = led[led >= 0][-most:]
        found.append(np.stack([np.full(len(led), at), led], axis=1))
    return np.concatenate(found).astype(np.int64) if found else np.zeros((0, 2), np.int64)


def context_batches(
    ranker: Ranker,
    ranking: RankingConfig,
    records: Records,
    cuts: np.ndarray,
    batch_size: int,
    seed: int,
    further: Further | None = None,
    **options: Any,
) -> Iterator[Features]:
    """Batches of contexts with candidates; options as for `jaxrec.data.pipeline.batches`."""
    searches = ranking.contexts == "searches"
    before = ranker.before_search if searches else ranker.before_session
    draw = _sampler(ranker.popularity, ranking.labels.sampled_power)

    def example(record: Record, place: int, rng: np.random.Generator) -> Features:
        where = record["search" if searches else "session"] == place
        if further is not None:
            where |= further(record, place)
        drawn = draw(rng, ranker.labels.sampled)
        impressions = ranker.labels.impressions(record, where)
        return ranker.read(before(record, place)) | ranker.labels.example(*impressions, drawn, rng)

    lengths = [ranker.features.bucket_of(before(records[at], place), ranker.wanted) for at, place in cuts.tolist()]
    buckets = np.searchsorted(ranker.features.buckets, np.array(lengths, np.int64))
    return batches(
        records,
        cuts,
        example,
        batch_size=batch_size,
        seed=seed,
        buckets=buckets,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        **options,
    )


def _sampler(popularity: np.ndarray, power: float) -> Callable[[np.random.Generator, int], np.ndarray]:
    """draw(rng, count): distinct items int32 [<= count], by popularity to a power."""
    bounds = np.cumsum((popularity + 1.0) ** power)

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        items = np.searchsorted(bounds, rng.random(count) * bounds[-1], side="right")
        return np.unique(np.minimum(items, len(bounds) - 1)).astype(np.int32)

    return draw


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Impressions:
    """What was shown, what followed, and what a model predicted: n flat rows."""

    user: np.ndarray
    """int64 [n]"""
    clicked: np.ndarray
    """bool [n]"""
    purchased: np.ndarray
    """bool [n]"""
    predicted: dict[str, np.ndarray]
    """float32 [n], by `RankingConfig.predicted`"""

    def of(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(probabilities, labels, users) of the impressions that a probability is defined for."""
        keep = self.clicked if name == "cvr" else np.ones(len(self.user), bool)
        label = self.clicked if name == "ctr" else self.purchased
        return self.predicted[name][keep], label[keep], self.user[keep]

    def metrics(self) -> dict[str, dict[str, float]]:
        """auc, gauc, log_loss and ece of every probability; those that are not defined here are left out."""
        return {name: impression_metrics(*self.of(name)) for name in self.predicted if name != "price"}


def predict_impressions(ranker: Ranker, params: Any, some: Sequence[Features]) -> Impressions:
    """Of batches of `context_batches`; drawn candidates are among them only where the log has no exposures."""
    rows: list[tuple] = []
    for batch in some:
        keep = batch["candidate_where"] & batch["where"][:, None]
        if ranker.labels.exposure is not None:
            keep = keep & (batch["candidate_behavior"] >= 0)
        found = ranker.predict(params, batch, batch["candidate"])
        clicked, purchased = outcomes(ranker, batch["candidate_behavior"])
        user = np.broadcast_to(batch["asking_user"][:, None], keep.shape)
        rows.append((user[keep], clicked[keep], purchased[keep], {name: each[keep] for name, each in found.items()}))
    user, clicked, purchased, predicted = zip(*rows, strict=True)
    columns = (np.concatenate(each) for each in (user, clicked, purchased))
    return Impressions(*columns, {name: np.concatenate([each[name] for each in predicted]) for name in predicted[0]})


def measured_batches(
    ranker: Ranker, ranking: RankingConfig, split: str, most: int = 0, seed: int = 0, batch_size: int = 64
) -> list[Features]:
    """The contexts of a split in order, of `most` drawn ones at most where that is not 0; [] where there are none."""
    records = Records(ranker.examples, split)
    cuts = context_cuts(ranker, ranking, records)
    if 0 < most < len(cuts):
        cuts = cuts[np.sort(np.random.default_rng(seed).permutation(len(cuts))[:most])]
    if not len(cuts):
        return []
    in_order = {"shuffle": False, "drop_remainder": False, "epochs": 1}
    return list(context_batches(ranker, ranking, records, cuts, batch_size, seed, **in_order))


def calibration_curves(found: Impressions) -> dict[str, dict[str, list[float]]]:
    """By probability, the bins of `jaxrec.evaluation.impressions.calibration` as lists."""
    names = [name for name in found.predicted if name != "price"]
    curves = {name: calibration(*found.of(name)[:2]) for name in names}
    return {name: {key: value.tolist() for key, value in vars(curve).items()} for name, curve in curves.items()}


def make_validation(
    ranker: Ranker, ranking: RankingConfig, most: int, seed: int
) -> Callable[[TrainState], dict[str, float]]:
    """evaluate(state) -> {"auc_ctr": ..., ...} on the validation split, for `jaxrec.training.loop.fit`.

    Instead of the log-losses it tells likelihoods, which are higher where a model is better.
    """
    some = cache(lambda: measured_batches(ranker, ranking, "valid", most, seed))

    def evaluate(state: TrainState) -> dict[str, float]:
        if not some():
            return {}
        found = predict_impressions(ranker, state.params, some()).metrics()
        values = {}
        for name, of in found.items():
            of["likelihood"] = -of.pop("log_loss")
            values |= {f"{metric}_{name}": value for metric, value in of.items()}
        return values

    return evaluate
