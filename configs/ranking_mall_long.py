"""Ranking models on a synthetic mall with long histories: SIM searches in hundreds of events, DIN reads the latest 32.

    python train.py configs/ranking_mall_long.py --run runs/sim
    python train.py configs/ranking_mall_long.py --run runs/din --ranking.model DinConfig

Time:    not measured.
Figures: not measured.

Half of the sessions follow none of what was browsed last but any of a shopper's eight tastes, which only the whole
history tells. What tells it beside attention, counts of the candidate's category in the history, is left out: with
`ranking.inputs.crosses` every model knows them.
"""

from jaxrec.data.ranking_features import LabelConfig, RankingFeatureConfig
from jaxrec.data.sources import SyntheticMall
from jaxrec.models.ranking.inputs import InputConfig
from jaxrec.models.ranking.sim import SimConfig
from jaxrec.semantic_ids import FsqConfig, ResidualConfig, SemanticIdConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.ranking.config import CascadeConfig, RankingConfig, RecallConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = CascadeConfig(
    data=SyntheticMall(
        users=400, items=600, tastes=60, tastes_per_user=8, sessions_per_user=50, browsed_per_session=2, surprise=0.5
    ),
    batch_size=32,
    semantic_ids=SemanticIdConfig(ResidualConfig((32, 16)), FsqConfig((2,) * 4)),
    recall=RecallConfig(("encoder", "personal frequency", "popularity"), items=200, ranked=200),
    pre_ranking=None,
    ranking=RankingConfig(
        model=SimConfig(),
        inputs=InputConfig(crosses=False),
        features=RankingFeatureConfig(buckets=(512,), weakest=2),
        labels=LabelConfig(candidates=16, sessions=12),
    ),
    optim=OptimConfig(learning_rate=3e-3, warmup=50),
    training=LoopConfig(steps=600, log_every=50, checkpoint_every=200, evaluate_every=150, monitor="auc_ctcvr"),
    evaluation=EvaluationConfig(max_users=100, cutoffs=(10, 50), baselines=False),
)
