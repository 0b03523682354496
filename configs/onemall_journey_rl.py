"""OneMall on Complete Journey, with reinforcement learning by what households spent: GRPO (`--reinforcement.loss dpo`).

    python train.py configs/onemall_journey_rl.py --run runs/journey_rl

The supervised stage is that of `make demo`: a run of configs/onemall.py goes on with it. Nothing estimates a reward:
of the candidates of a context, what the household did buy next is worth its price, all else nothing.

Time:    8 to 10 minutes for the supervised stage, on two cores.
Figures: not measured yet.
"""

import dataclasses
from pathlib import Path

from jaxrec.config import load_config
from jaxrec.systems.onemall.config import ReinforcementConfig, RewardWeights
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = dataclasses.replace(
    load_config(Path(__file__).parent / "onemall.py"),
    reinforcement=ReinforcementConfig(
        reward="spend",
        weights=RewardWeights(ctr=0.0, ctcvr=0.0, egpm=1.0),
        share=0.25,
        candidates=256,
        drawn=64,
        refresh_every=10,
        batch_size=48,
        optim=OptimConfig(learning_rate=3e-4, warmup=20),
        training=LoopConfig(
            steps=200, log_every=10, checkpoint_every=50, evaluate_every=0.1, patience=0, monitor="kept_reward@10"
        ),
    ),
)
