"""OneMall on a larger synthetic mall, with reinforcement learning by the mall's true rates: Eq. 8-10.

    python train.py configs/onemall_mall_rl.py --run runs/mall_rl                               # GRPO
    python train.py configs/onemall_mall_rl.py --run runs/mall_dpo --reinforcement.loss dpo     # DPO
    python train.py configs/onemall_mall_rl.py --run runs/mall_base --reinforcement None        # neither

Time:    not measured on an idle machine; on a busy one, four minutes of supervised training, six of reinforcement.
Figures: true reward of the first ten +10.1% on validation users, seed 0, GRPO; docs/rewards.md.
"""

from jaxrec.data.features import FeatureConfig
from jaxrec.data.sources import SyntheticMall
from jaxrec.models.cross_decoder import CrossDecoderConfig
from jaxrec.semantic_ids import CollisionConfig, FsqConfig, ResidualConfig, SemanticIdConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.onemall.config import OneMallConfig, ReinforcementConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = OneMallConfig(
    # Forty items a taste and four tastes a shopper: more than a hundred items that somebody may buy.
    data=SyntheticMall(users=800, items=800),
    semantic_ids=SemanticIdConfig(ResidualConfig((32, 16)), FsqConfig((2,) * 4)),
    # A reward is of an item, so every item has an ID of its own.
    collisions=CollisionConfig(policy="nearest_free"),
    features=FeatureConfig(history_lengths=(64,), past_length=32, targets=4, buckets=(64,)),
    model=CrossDecoderConfig(width=64, heads=2, hidden=64, experts=4, queries=4, recent=16),
    optim=OptimConfig(learning_rate=3e-3, warmup=50),
    training=LoopConfig(steps=800, log_every=50, checkpoint_every=200),
    validation=EvaluationConfig(split="valid", max_users=400),
    reinforcement=ReinforcementConfig(
        reward="environment",
        share=0.5,
        candidates=128,
        drawn=32,
        refresh_every=10,
        batch_size=32,
        optim=OptimConfig(learning_rate=1e-3, warmup=20),
        training=LoopConfig(
            steps=300,
            log_every=10,
            checkpoint_every=50,
            evaluate_every=0.1,
            patience=0,
            monitor="kept_reward@10",
        ),
    ),
)
