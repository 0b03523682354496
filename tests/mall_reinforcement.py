"""The tiny mall of `tests/mall.py`, with reinforcement learning behind it."""

import dataclasses

from mall import config as supervised

from jaxrec.systems.onemall.config import ReinforcementConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = dataclasses.replace(
    supervised,
    training=LoopConfig(steps=60, log_every=20, checkpoint_every=30, evaluate_every=30),
    reinforcement=ReinforcementConfig(
        reward="environment",
        share=0.5,
        # Of 150 users a few are noise.
        lost_hits=0.5,
        candidates=32,
        drawn=16,
        refresh_every=5,
        batch_size=16,
        optim=OptimConfig(learning_rate=3e-3, warmup=4),
        training=LoopConfig(
            steps=24, log_every=4, checkpoint_every=8, evaluate_every=12, monitor="kept_reward@10", patience=0
        ),
    ),
)
