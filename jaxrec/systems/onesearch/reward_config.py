"""What decides the adaptive reward system of a OneSearch run (§3.4.2): levels, the reward model, the two phases.

    ... ─▶ personalisation ─▶ reward_model ─▶ reordered ─▶ interactions ─▶ evaluation

`reward_model` is the three-tower SIM. `reordered` is phase one: preferences of the reward model among the answers of
the stage `personalisation`. `interactions` is phase two: preferences of users alone. In both the stage
`personalisation` is the frozen reference.
"""

from dataclasses import asdict, dataclass, field

from jaxrec.config import UserError, check_least
from jaxrec.data.behavior_levels import BehaviorLevelConfig
from jaxrec.losses.preference import HybridConfig
from jaxrec.models.ranking.sim import SimConfig
from jaxrec.systems.ranking.config import RankingStageConfig
from jaxrec.systems.validation import MONITORED
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

REWARD_MODEL, REORDERED, INTERACTIONS = "reward_model", "reordered", "interactions"
RELEVANCE = "relevance"
"""The term of Eq. 10 that no tower predicts."""


@dataclass(frozen=True)
class RscoreWeights:
    """Rscore = ctr CTR + cvr CVR + ctcvr CTCVR + relevance S_Rel (Eq. 10)."""

    ctr: float = 1.0
    """lambda_1, weight of the probability of a click on an item that is shown"""
    cvr: float = 1.0
    """lambda_2, weight of the probability of a purchase after a click"""
    ctcvr: float = 1.0
    """lambda_3, weight of the probability of a purchase of an item that is shown"""
    relevance: float = 10.0
    """10 lambda_4, weight of the relevance of the item to the query"""

    def __post_init__(self):
        check_least(self, "rewards.weights", ctr=0, cvr=0, ctcvr=0, relevance=0)
        if not self.given():
            raise UserError(
                "configuration key 'rewards.weights' gives every term of the reward the weight 0; give one a weight"
            )

    def given(self) -> dict[str, float]:
        """The weights that are not 0, by the name of the term."""
        return {name: weight for name, weight in asdict(self).items() if weight}


def _optim() -> OptimConfig:
    return OptimConfig(learning_rate=2e-4, warmup=20)


def _loop() -> LoopConfig:
    return LoopConfig(steps=200, monitor="mrr@10")


@dataclass(frozen=True)
class ReorderedConfig:
    """Phase one: the answers of the stage `personalisation`, re-ordered by the reward model."""

    searches: int = 4096
    """searches of training whose answers are re-ordered, drawn by the seed; 0: all of them"""
    answers: int = 32
    """answers of the beam search that are re-ordered"""
    rejected: int = 12
    """rejected items of a search, of its answers: those that the reward moved back first, then those behind the chosen
    one"""
    batch_size: int = 64
    """Contexts in a training step, over all hosts."""
    optim: OptimConfig = field(default_factory=_optim)
    """Optimiser."""
    training: LoopConfig = field(default_factory=_loop)
    """Length of training, logging, checkpoints, evaluation on the validation split."""

    def __post_init__(self):
        check_least(self, "rewards.reordered", searches=0, answers=2, rejected=1, batch_size=1)


@dataclass(frozen=True)
class InteractionsConfig:
    """Phase two: what users did with the items of their searches."""

    searches: int = 0
    """searches of training that are looked through, drawn by the seed; 0: all of them"""
    chosen: int = 2
    """chosen items of a search, of the levels purchased, elsewhere and clicked; of more, so many are drawn"""
    exposed: int = 6
    """rejected items of a search that were exposed and not clicked; of more, so many are drawn"""
    unshown: int = 6
    """rejected items that are drawn from the categories of the search"""
    other: int = 2
    """rejected items that are drawn from other categories"""
    batch_size: int = 64
    """Contexts in a training step, over all hosts."""
    optim: OptimConfig = field(default_factory=_optim)
    """Optimiser."""
    training: LoopConfig = field(default_factory=_loop)
    """Length of training, logging, checkpoints, evaluation on the validation split."""

    def __post_init__(self):
        check_least(self, "rewards.interactions", searches=0, chosen=1, exposed=0, unshown=0, other=0, batch_size=1)
        if not self.rejected:
            raise UserError(
                "configuration keys 'rewards.interactions.exposed', 'unshown' and 'other' are all 0: there is nothing "
                "to reject; raise one"
            )

    @property
    def rejected(self) -> int:
        """Rejected items of a search."""
        return self.exposed + self.unshown + self.other


def _sim() -> RankingStageConfig:
    return RankingStageConfig(model=SimConfig(), towers=("ctr", "cvr", "ctcvr"), contexts="searches")


@dataclass(frozen=True)
class SearchRewardsConfig:
    """The adaptive reward system."""

    levels: BehaviorLevelConfig = field(default_factory=BehaviorLevelConfig)
    """The six levels of a search's items, and their rewards (Eq. 6-9)."""
    model: RankingStageConfig = field(default_factory=_sim)
    """The reward model: SIM with the towers ctr, cvr and ctcvr; its `labels` name the levels' behaviors."""
    weights: RscoreWeights = field(default_factory=RscoreWeights)
    """Weights of the reward (Eq. 10)."""
    loss: HybridConfig = field(default_factory=HybridConfig)
    """The hybrid loss (Eq. 11-12) of both phases."""
    weighted: bool = True
    """pairs are weighted by rw (Eq. 9); off, all equally"""
    reordered: ReorderedConfig | None = field(default_factory=ReorderedConfig)
    """Phase one; None: there is none."""
    interactions: InteractionsConfig | None = field(default_factory=InteractionsConfig)
    """Phase two; None: there is none."""
    stored_reference: bool = True
    """the reference's scores are computed once, before the first step; off, in every step"""

    def __post_init__(self):
        if self.model.contexts != "searches":
            raise UserError(
                f"configuration key 'rewards.model.contexts' is {self.model.contexts!r}; give searches, which are what "
                "is rewarded"
            )
        if self.reordered is None and self.interactions is None:
            raise UserError(
                "configuration keys 'rewards.reordered' and 'rewards.interactions' are both None: nothing learns from "
                "the rewards; give one, or leave out 'rewards'"
            )

    @property
    def phases(self) -> dict[str, ReorderedConfig | InteractionsConfig]:
        """The phases that there are, by the names of their stages, in order."""
        both = {REORDERED: self.reordered, INTERACTIONS: self.interactions}
        return {name: phase for name, phase in both.items() if phase is not None}

    def check(self, behaviors: tuple[str, ...]) -> None:
        """Whether a log with these behaviors has the rewards, and the trainings can be.

        Raises:
          UserError: it has not, or they can't.
        """
        self.model.check(behaviors, "rewards.model")
        if missing := sorted(set(self.weights.given()) - {*self.model.predicted, RELEVANCE}):
            raise UserError(
                f"configuration key 'rewards.model.towers' is {self.model.towers}, but the reward has a weight for "
                f"{missing[0]}; add that tower, or set rewards.weights.{missing[0]} to 0"
            )
        for name, phase in self.phases.items():
            phase.optim.check_steps(phase.training.steps, f"rewards.{name}.optim")
            phase.training.check_monitor(MONITORED)
