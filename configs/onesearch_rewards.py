"""OneSearch with its reward system on Complete Journey: reward model, re-ordered answers, what households took.

    python train.py configs/onesearch_rewards.py --run runs/search_rewards
    python train.py configs/onesearch_rewards.py --run runs/search_rewards --reorder 50     # serves them re-ordered

The supervised stages are those of configs/onesearch.py: a run of it goes on with them (--run runs/search).

Time:    not measured; 24 minutes of it for configs/onesearch.py.
Figures: not measured.

A basket shows what was bought alone, so the log has three of the six levels: purchased, not shown of the category, and
other. With no exposures and no clicks every item has the same calibrated rates (Eq. 6-7), and rewards differ by level
alone. For the same reason the reward model has one tower: the purchase of a product that was bought, against products
that are drawn. A source with exposures, clicks and purchases of searches has all of it: see configs/onesearch_mall.py
with `--rewards SearchRewardsConfig --data.results-per-search 6`.
"""

import dataclasses
from pathlib import Path

from jaxrec.config import load_config
from jaxrec.data.period_counts import PeriodConfig
from jaxrec.data.ranking_features import LabelConfig, RankingFeatureConfig
from jaxrec.models.ranking.sim import SimConfig
from jaxrec.systems.onesearch.reward_config import (
    InteractionsConfig,
    ReorderedConfig,
    RscoreWeights,
    SearchRewardsConfig,
)
from jaxrec.systems.ranking.config import RankingStageConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

of_phase = {
    "batch_size": 64,
    "optim": OptimConfig(learning_rate=2e-4, warmup=20),
    "training": LoopConfig(
        steps=200, log_every=20, checkpoint_every=100, evaluate_every=50, patience=0, monitor="mrr@10"
    ),
}

config = dataclasses.replace(
    load_config(Path(__file__).parent / "onesearch.py"),
    rewards=SearchRewardsConfig(
        model=RankingStageConfig(
            model=SimConfig("category", found=16, length=32),
            towers=("ctcvr",),
            contexts="searches",
            attributes=("category", "product_type", "brand"),
            features=RankingFeatureConfig(buckets=(128, 512)),
            counts=PeriodConfig(days=7),
            # What is drawn counts as shown and not bought.
            labels=LabelConfig(exposure="none", candidates=48, sampled=32, sessions=200),
            batch_size=64,
            optim=OptimConfig(learning_rate=2e-3, warmup=50),
            training=LoopConfig(
                steps=600, log_every=50, checkpoint_every=200, evaluate_every=200, patience=0, monitor="auc_ctcvr"
            ),
        ),
        # All answers are of the category that was searched for: how near a title is to its name says little more.
        weights=RscoreWeights(ctr=0.0, cvr=0.0, ctcvr=1.0, relevance=1.0),
        # One beam search of 32 for each of them, before the first step.
        reordered=ReorderedConfig(searches=4096, answers=32, rejected=12, **of_phase),
        interactions=InteractionsConfig(chosen=2, exposed=0, unshown=10, other=2, **of_phase),
    ),
)
