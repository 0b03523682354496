"""RankGR: generative retrieval that learns the order of a session's items and ranks inside the beam.

Fu et al., "RankGR: Rank-Enhanced Generative Retrieval with Listwise Direct Preference Optimization in Recommendation"
(Alibaba 2026). A decoder of the Qwen2.5 architecture reads a history and generates the next item's semantic ID. Items
of a session are trained by level (purchase > click > exposure > pseudo-exposure), a rank head chooses the beams. Its
authors report on Amazon Clothing 2023 HR@20 .0227, @50 .0313, @100 .0468, @500 .0996.

    source ─▶ tables ─▶ semantic IDs ─▶ examples ─▶ training ─▶ evaluation ─▶ report
"""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from jaxrec.config import UserError, check_least, check_shares
from jaxrec.data.leveled_sessions import LeveledSessionConfig
from jaxrec.models.copying import check_labels
from jaxrec.models.rankgr import RankGRConfig
from jaxrec.systems.generative import GenerativeRunConfig


@dataclass(frozen=True)
class RankGRObjective:
    """What the model is trained for (RankGR Eq. 8-17)."""

    alpha: float = 1.0
    """Weight of listwise preferences beside next-token prediction (Eq. 11; RankGR's best: 1); 0 for none."""
    beta: float = 1.0
    """Scale of the log-probabilities that preferences compare (Eq. 8)."""
    levels: tuple[int, ...] = ()
    """The level of each behavior of the source, from 0 and never falling; empty: each is a level of its own."""
    level_weights: tuple[float, ...] = ()
    """Weight of each level's items in next-token prediction; empty: 1 for all, as published (Eq. 9)."""
    rank_from: int | None = None
    """The lowest level whose items are positives of the rank head: 0 for all, as published (Eq. 16 with Eq. 9); None:
    that of the target behaviors."""
    rank_weight: float = 1.0
    """Weight of the rank head's loss (Eq. 17: 1)."""
    smoothing: float = 0.0
    """Share of each label that is spread evenly, over its level or over the items."""

    def __post_init__(self):
        check_least(self, "objective", alpha=0, beta=0, rank_weight=0)
        check_shares(self, "objective", "smoothing")


@dataclass(frozen=True)
class RankGRRunConfig(GenerativeRunConfig):
    """Everything that decides a run of RankGR."""

    system: str = "rankgr"
    """Which system this configures."""
    pretrained: str = ""
    """A folder with a Qwen2 or Qwen2.5 in Hugging Face's layout, with which the backbone is initialised; its sizes
    replace those of `model.backbone`. Empty: fresh parameters."""
    min_history: int = 1
    """Events that must come before a session for it to be trained on."""
    sessions_per_user: int = 0
    """Only the last so many sessions of a user are trained on; 0 for all."""
    features: LeveledSessionConfig = field(default_factory=LeveledSessionConfig)
    """How much of the past the model reads, and what it learns from at once."""
    model: RankGRConfig = field(default_factory=RankGRConfig)
    """Sizes and parts of the model; vocabulary and levels follow from the IDs."""
    objective: RankGRObjective = field(default_factory=RankGRObjective)
    """Losses."""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, "", min_history=0, sessions_per_user=0)

    def check(self) -> None:
        """As `jaxrec.systems.generative.GenerativeRunConfig.check`."""
        super().check()
        check_labels(self.model.pointer, "model.pointer", self.objective.smoothing)
        checked_levels(self)

    # The weights themselves count, wherever they lie.
    of_phases: ClassVar[tuple[str, ...]] = (*GenerativeRunConfig.of_phases, "pretrained")


def checked_levels(config: RankGRRunConfig) -> np.ndarray:
    """The level of each behavior of the source, int [behaviors].

    Raises:
      UserError: `features` or `objective` ask for behaviors or levels that there aren't.
    """
    behaviors = tuple(config.data.behaviors)
    levels = behavior_levels(config.objective.levels, behaviors)
    highest = int(levels[-1])
    if config.features.weakest >= len(behaviors):
        raise UserError(
            f"configuration key 'features.weakest' is {config.features.weakest}, so that histories would hold nothing; "
            f"give 0 to {len(behaviors) - 1}, for {', '.join(behaviors)}"
        )
    if not 0 <= (config.objective.rank_from or 0) <= highest:
        raise UserError(
            f"configuration key 'objective.rank_from' is {config.objective.rank_from}; levels go from 0 to {highest}"
        )
    check_level_weights(config.objective.level_weights, highest + 1)
    return levels


def check_level_weights(given: tuple[float, ...], count: int) -> None:
    """Whether there is a weight for each of `count` levels, or none is given.

    Raises:
      UserError: there isn't.
    """
    if given and (len(given) != count or min(given) < 0):
        raise UserError(
            f"configuration key 'objective.level_weights' is {given}; give 0 or more for each of {count} levels"
        )


def behavior_levels(given: tuple[int, ...], behaviors: tuple[str, ...]) -> np.ndarray:
    """The level of each behavior, from the configuration or, without one, its place.

    Raises:
      UserError: not one a behavior, or not rising from 0 with their strength.
    """
    levels = np.array(given or range(len(behaviors)))
    if len(levels) != len(behaviors) or levels[0] < 0 or (np.diff(levels) < 0).any():
        raise UserError(
            f"configuration key 'objective.levels' is {given}; give one level from 0 for each of "
            f"{', '.join(behaviors)}, which never falls"
        )
    return levels
