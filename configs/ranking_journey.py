"""The cascade on Complete Journey: recall by personal frequency, popularity and the encoder, DCN-v2, then DIN.

    python train.py configs/ranking_journey.py --run runs/ranking

Time:    not measured.
Figures: not measured.

There are no clicks: what is predicted is the purchase of a product that was promoted in the store, or drawn from the
catalogue, since most purchases are of products that were not promoted.
"""

from jaxrec.data.period_counts import PeriodConfig
from jaxrec.data.ranking_features import LabelConfig, RankingFeatureConfig
from jaxrec.data.sources import CompleteJourney
from jaxrec.models.ranking.dcn import DcnConfig
from jaxrec.models.ranking.din import DinConfig
from jaxrec.semantic_ids import FsqConfig, ResidualConfig, SemanticIdConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.ranking.config import CascadeConfig, RankingConfig, RankingStageConfig, RecallConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

of_both = {
    "towers": ("ctcvr", "price"),
    "attributes": ("category", "department", "product_type", "brand"),
    "features": RankingFeatureConfig(buckets=(128, 512)),
    "counts": PeriodConfig(days=3),
    "labels": LabelConfig(candidates=64, sampled=32, sessions=24),
}
optim = OptimConfig(learning_rate=2e-3, warmup=50)

config = CascadeConfig(
    data=CompleteJourney(),
    batch_size=32,
    semantic_ids=SemanticIdConfig(ResidualConfig((128, 128)), FsqConfig((2,) * 8)),
    recall=RecallConfig(("personal frequency", "recent popularity", "itemknn", "encoder"), items=500, ranked=200),
    pre_ranking=RankingStageConfig(
        **of_both,
        model=DcnConfig(length=64),
        batch_size=32,
        optim=optim,
        training=LoopConfig(steps=600, log_every=50, checkpoint_every=300, monitor="auc_ctcvr"),
    ),
    ranking=RankingConfig(**of_both, model=DinConfig(length=64)),
    optim=optim,
    training=LoopConfig(steps=1000, log_every=50, checkpoint_every=500, monitor="auc_ctcvr"),
    validation=EvaluationConfig(split="valid", max_users=500),
)
