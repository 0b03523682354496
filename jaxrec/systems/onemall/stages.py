"""The stages of a OneMall run: supervised; where they are configured a ranking model and reinforcement learning."""

import functools
from pathlib import Path

from jaxrec.evaluation.comparison import REWARDS, Row
from jaxrec.run import TRAINING, Run, stage_path
from jaxrec.systems import generative
from jaxrec.systems.comparison import cases_of, draw
from jaxrec.systems.onemall.config import OneMallConfig
from jaxrec.systems.onemall.model import OneMallAssembly
from jaxrec.systems.onemall.reinforcement import of_model, reinforcement_stage
from jaxrec.systems.onemall.reward_measure import RewardMeasure
from jaxrec.systems.onemall.rewards import make_reward
from jaxrec.systems.onemall.training import supervised_stages
from jaxrec.systems.phases import ALIGNMENT, prepare_with_ids
from jaxrec.systems.ranking.training import ranking_stage
from jaxrec.training.stages import Stage, best_variables


def stages(run: Run, config: OneMallConfig) -> tuple[Stage, ...]:
    """The stages in their order; the last one is served.

    The supervised stage is that of a run without reinforcement, which can go on with it.
    """
    first = supervised_stages(run, config)
    if config.reinforcement is None:
        return first
    data = functools.partial(prepare_with_ids, run, config)
    rewards, needs = config.reward_model, tuple(stage.name for stage in first if stage.name == ALIGNMENT)
    ranking = () if rewards is None else (ranking_stage(run, config, rewards, data, needs=needs),)
    return *first, *ranking, reinforcement_stage(run, config, data)


class ReinforcedRecommender(generative.GenerativeRecommender):
    """The policy of a run with reinforcement, beside the supervised stage that it began as."""

    def __init__(self, assembly: OneMallAssembly, variables: dict, config: OneMallConfig):
        super().__init__(assembly, of_model(variables), config.features, config.decoding)
        self.run_config = config

    @functools.cached_property
    def before(self) -> dict:
        """The variables of the supervised stage."""
        return best_variables(self.assembly.folder / stage_path(TRAINING))

    @property
    def variants(self) -> dict[str, generative.GenerativeRecommender]:
        """The supervised stage, by the name of its rows."""
        name = f"{self.run_config.system} before reinforcement"
        return {name: generative.recommender(self.assembly, self.before, self.run_config)}

    def further_rows(self, split: str, folder: Path) -> list[Row]:
        """What both are worth."""
        run, config = Run(self.assembly.folder), self.run_config
        cases = draw(cases_of(self.assembly, split), config.evaluation)
        if not len(cases):
            return []
        reward = make_reward(run, config)
        measured = RewardMeasure(run, self.assembly, config, reward, config.decoding)
        found = {config.system: self.variables, next(iter(self.variants)): self.before}
        row = {"split": split, "subset": REWARDS, "count": len(cases)}
        return [
            {"model": name, **row, "metric": metric, "value": value}
            for name, variables in found.items()
            for metric, value in measured.measure(variables, self.before, cases).items()
        ]


def recommender(assembly: OneMallAssembly, variables: dict, config: OneMallConfig) -> generative.GenerativeRecommender:
    """The trained model of a run."""
    if config.reinforcement is None:
        return generative.recommender(assembly, variables, config)
    return ReinforcedRecommender(assembly, variables, config)
