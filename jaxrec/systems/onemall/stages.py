"""The stages of a OneMall run: supervised, and reinforcement learning behind it where it is configured."""

from typing import Any

from jaxrec.evaluation import Cases
from jaxrec.evaluation.comparison import REWARDS, Row
from jaxrec.run import TRAINING, Run, stage_path
from jaxrec.systems import generative
from jaxrec.systems.onemall.config import OneMallConfig
from jaxrec.systems.onemall.reinforcement import of_model, reinforcement_stage
from jaxrec.systems.onemall.reward_measure import RewardMeasure
from jaxrec.systems.onemall.rewards import make_reward
from jaxrec.systems.onemall.training import supervised_stages
from jaxrec.training.stages import Stage, best_variables


def stages(run: Run, config: OneMallConfig) -> tuple[Stage, ...]:
    """The stages in their order; the last one is served.

    The supervised stage is that of a run without reinforcement, which can go on with it.
    """
    first = supervised_stages(run, config)
    return first if config.reinforcement is None else (*first, reinforcement_stage(run, config))


def recommender(assembly: Any, variables: dict, config: OneMallConfig) -> generative.GenerativeRecommender:
    """The trained model of a run, without what reinforcement learning keeps beside it."""
    return generative.recommender(assembly, of_model(variables), config)


def measure(run: Run, config: OneMallConfig, model: generative.GenerativeRecommender, cases: Cases) -> list[Row]:
    """What the policy is worth beside the supervised stage that it began as; nothing without reinforcement."""
    if config.reinforcement is None or not len(cases):
        return []
    reward = make_reward(run, config, config.reinforcement.reward)
    measured = RewardMeasure(run, model.assembly, config, reward, config.decoding)
    before = of_model(best_variables(run.path / stage_path(TRAINING)))
    found = {config.system: model.variables, f"{config.system} before reinforcement": before}
    return [
        {
            "model": name,
            "split": config.evaluation.split,
            "subset": REWARDS,
            "metric": metric,
            "value": value,
            "count": len(cases),
        }
        for name, variables in found.items()
        for metric, value in measured.measure(variables, before, cases).items()
    ]
