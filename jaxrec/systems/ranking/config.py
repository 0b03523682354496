"""Ranking models: what decides one, as a stage of any system and in a run of its own.

    source ─▶ tables ─▶ semantic IDs ─▶ examples ─▶ pre_ranking ─▶ ranking ─▶ evaluation

A run of its own is a cascade: recall, pre-ranking, ranking (`cascade.py`). A reward model of another system is the
stage `ranking` of that system (`training.ranking_stage`), of a `RankingStageConfig`.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from jaxrec.config import UserError, check_choice, check_least
from jaxrec.data.period_counts import PeriodConfig
from jaxrec.data.ranking_features import LabelConfig, Labels, RankingFeatureConfig
from jaxrec.evaluation.impressions import MONITORED
from jaxrec.models.ranking.dcn import DcnConfig
from jaxrec.models.ranking.din import DinConfig
from jaxrec.models.ranking.inputs import InputConfig
from jaxrec.models.ranking.sim import SimConfig
from jaxrec.models.ranking.towers import TOWERS
from jaxrec.systems.generative import SemanticIdRunConfig
from jaxrec.systems.validation import check_training
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

PRE_RANKING, RANKING = "pre_ranking", "ranking"
CASCADE = "cascade"
"""The name of a run of its own, in configurations and in tables."""


@dataclass(frozen=True)
class RankingObjective:
    """Weights of the towers' losses, each a mean over the candidates that it is defined for."""

    ctr: float = 1.0
    """cross-entropy of clicks"""
    cvr: float = 1.0
    """cross-entropy of purchases among what was clicked; of no use without a tower `ctcvr`"""
    ctcvr: float = 1.0
    """cross-entropy of purchases among all that was shown: of the tower `ctcvr`, or of ctr * cvr (ESMM)"""
    price: float = 0.1
    """squared error of a purchase's log price"""
    search: float = 0.3
    """cross-entropy of the logit that SIM's soft search learns by"""

    def __post_init__(self):
        check_least(self, "ranking.objective", ctr=0, cvr=0, ctcvr=0, price=0, search=0)


@dataclass(frozen=True)
class RankingConfig:
    """A ranking model: its inputs, labels, towers and losses."""

    model: DinConfig | DcnConfig | SimConfig = field(default_factory=DinConfig)
    """Which model, and its sizes."""
    towers: tuple[str, ...] = ("ctr", "cvr", "price")
    """What is predicted: ctr, cvr, ctcvr, price; ctr and cvr without ctcvr are trained over the entire space (ESMM)"""
    contexts: Literal["sessions", "searches"] = "sessions"
    """what a context is: all that a session showed; or what one search showed, with its query"""
    attributes: tuple[str, ...] = ("category", "brand")
    """columns of the items table that are read; the first one is the category"""
    inputs: InputConfig = field(default_factory=InputConfig)
    """What is read of items and histories."""
    features: RankingFeatureConfig = field(default_factory=RankingFeatureConfig)
    """How much of a history is read."""
    counts: PeriodConfig = field(default_factory=PeriodConfig)
    """How often the counts that are known at a time are made anew."""
    labels: LabelConfig = field(default_factory=LabelConfig)
    """What was shown, and what followed."""
    objective: RankingObjective = field(default_factory=RankingObjective)
    """Losses."""

    def __post_init__(self):
        check_choice(self, "ranking", "contexts", ("sessions", "searches"))
        known, given = ", ".join(TOWERS), self.towers
        if not given or len(set(given)) < len(given) or not set(given) <= set(TOWERS):
            raise UserError(f"configuration key 'ranking.towers' is {given}; give some of {known}, each once")
        if given == ("price",):
            raise UserError("configuration key 'ranking.towers' is price alone, which ranks nothing; add another")
        if isinstance(self.model, SimConfig) and self.model.search == "category" and not self.attributes:
            raise UserError(
                "configuration key 'ranking.model.search' is 'category', and 'ranking.attributes' names no column: "
                "name the category first, or search by product"
            )

    @property
    def predicted(self) -> tuple[str, ...]:
        """Names of what the model gives, in the order of TOWERS: its towers, and ctcvr where it is a product."""
        product = {"ctcvr"} if {"ctr", "cvr"} <= set(self.towers) else set()
        return tuple(name for name in TOWERS if name in {*self.towers, *product})

    @property
    def ranked_by(self) -> str:
        """By which of these items are ranked: the purchase of what is shown, or else the click."""
        return next(name for name in ("ctcvr", "ctr", "cvr") if name in self.predicted)

    def check(self, behaviors: tuple[str, ...], place: str = RANKING) -> Labels:
        """The labels in a log with these behaviors, weakest first; `place` is the configuration's key.

        Raises:
          UserError: they don't give what the towers predict.
        """
        labels = Labels.of(self.labels, behaviors)
        needed = {"click": {"ctr", "cvr"}, "purchase": {"cvr", "ctcvr", "price"}}
        for name, towers in needed.items():
            wrong = [tower for tower in self.towers if tower in towers]
            if getattr(labels, name) is None and wrong:
                raise UserError(
                    f"configuration key '{place}.towers' has {wrong[0]}, and the log has no behavior "
                    f"{getattr(self.labels, name)!r} ({place}.labels.{name}); it has {', '.join(behaviors)}: leave "
                    f"{wrong[0]} out, or name another behavior"
                )
        if labels.exposure is None and not labels.sampled:
            raise UserError(
                f"configuration key '{place}.labels.sampled' is 0, and the log has no behavior "
                f"{self.labels.exposure!r}: without impressions nothing tells what was not taken; leave it out, so "
                f"that items are drawn, or name another behavior in {place}.labels.exposure"
            )
        return labels

    def metrics(self) -> tuple[str, ...]:
        """Names of what is measured on the validation split, such as auc_ctr."""
        return tuple(f"{metric}_{name}" for name in self.predicted if name != "price" for metric in MONITORED)


def of_stage_loop() -> LoopConfig:
    """The default length of a ranking model's training."""
    return LoopConfig(steps=1000, checkpoint_every=500, monitor="auc_ctr")


@dataclass(frozen=True)
class RankingStageConfig(RankingConfig):
    """A ranking model with its training, as a stage of a system."""

    batch_size: int = 64
    """Contexts in a training step, over all hosts."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    training: LoopConfig = field(default_factory=of_stage_loop)
    """Length of training; its `monitor` is a metric of the validation split's impressions, such as auc_ctr."""

    def check(self, behaviors: tuple[str, ...], place: str = RANKING) -> Labels:
        """As `RankingConfig.check`, of the training too."""
        self.optim.check_steps(self.training.steps, f"{place}.optim")
        self.training.check_monitor(self.metrics())
        return super().check(behaviors, place)


@dataclass(frozen=True)
class RecallConfig:
    """The first part of a cascade: which items are ranked at all."""

    channels: tuple[str, ...] = ("encoder",)
    """what recalls, in turns: encoder (the items nearest to the latest ones, or to the query), or a baseline by its
    name in tables, such as itemknn"""
    items: int = 500
    """items that are recalled"""
    seeds: int = 10
    """latest items that the encoder's neighbours are of"""
    ranked: int = 100
    """of them, the first so many by the pre-ranking model are ranked; the others follow in its order"""

    def __post_init__(self):
        check_least(self, "recall", items=1, seeds=1, ranked=1)
        if not self.channels:
            raise UserError("configuration key 'recall.channels' is empty; give one or more, such as encoder")


@dataclass(frozen=True)
class CascadeConfig(SemanticIdRunConfig):
    """Everything that decides a run of recall, pre-ranking and ranking; the last one's training is `training`."""

    system: str = CASCADE
    """Which system this configures."""
    batch_size: int = 64
    """Contexts in a training step, over all hosts."""
    training: LoopConfig = field(default_factory=of_stage_loop)
    """Length of the ranking model's training; its `monitor` is a metric of the validation split's impressions."""
    recall: RecallConfig = field(default_factory=RecallConfig)
    """Which items are ranked."""
    pre_ranking: RankingStageConfig | None = field(default_factory=lambda: RankingStageConfig(model=DcnConfig()))
    """The model that chooses what is ranked; None: the order of recall does."""
    ranking: RankingConfig = field(default_factory=RankingConfig)
    """The model that ranks."""

    of_evaluation: ClassVar[tuple[str, ...]] = (*SemanticIdRunConfig.of_evaluation, "recall")

    @property
    def query_ids(self) -> bool:
        """Whether queries are embedded."""
        return self.ranking.contexts == "searches"

    @property
    def last_stage(self) -> RankingStageConfig:
        """The ranking model with its training."""
        return RankingStageConfig(
            **vars(self.ranking), batch_size=self.batch_size, optim=self.optim, training=self.training
        )

    def check(self) -> None:
        """As `jaxrec.systems.config.RunConfig.check`, by the metrics of impressions."""
        behaviors = tuple(self.data.behaviors)
        if self.pre_ranking is not None:
            self.pre_ranking.check(behaviors, PRE_RANKING)
            if self.pre_ranking.contexts != self.ranking.contexts:
                raise UserError(
                    f"configuration keys 'pre_ranking.contexts' and 'ranking.contexts' are "
                    f"{self.pre_ranking.contexts!r} and {self.ranking.contexts!r}; give both the same"
                )
        self.ranking.check(behaviors)
        check_training(self, metrics=self.ranking.metrics())
