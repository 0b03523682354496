"""A synthetic mall so small that a cascade runs in seconds; for `train.py tests/mall_cascade.py`."""

from jaxrec.data.ranking_features import LabelConfig, RankingFeatureConfig
from jaxrec.data.sources import SyntheticMall
from jaxrec.models.ranking.dcn import DcnConfig
from jaxrec.models.ranking.din import DinConfig
from jaxrec.models.ranking.inputs import InputConfig
from jaxrec.semantic_ids import FsqConfig, ResidualConfig, SemanticIdConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.ranking.config import CascadeConfig, RankingConfig, RankingStageConfig, RecallConfig
from jaxrec.text.align import AlignConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

shared = {
    "inputs": InputConfig(width=8),
    "features": RankingFeatureConfig(buckets=(8, 24), weakest=2),
    "labels": LabelConfig(candidates=12),
}
optim = OptimConfig(learning_rate=8e-3, warmup=10)

config = CascadeConfig(
    data=SyntheticMall(users=150, items=120, tastes=12, sessions_per_user=8, exposures_per_session=4),
    batch_size=32,
    align=AlignConfig(width=16, hidden=32),
    semantic_ids=SemanticIdConfig(ResidualConfig((12,)), FsqConfig((2, 2, 2, 2), steps=200)),
    recall=RecallConfig(("encoder", "popularity"), items=40, seeds=4, ranked=20),
    pre_ranking=RankingStageConfig(
        **shared,
        model=DcnConfig(length=8, crosses=1, hidden=(16,)),
        batch_size=32,
        optim=optim,
        training=LoopConfig(steps=40, log_every=20, checkpoint_every=20, evaluate_every=20, monitor="auc_ctcvr"),
    ),
    ranking=RankingConfig(**shared, model=DinConfig(length=8, unit=8, hidden=(16,))),
    optim=optim,
    training=LoopConfig(steps=120, log_every=20, checkpoint_every=30, evaluate_every=40, monitor="auc_ctcvr"),
    evaluation=EvaluationConfig(cutoffs=(5, 10), shown_users=2),
)
