"""The cascade on a synthetic mall: recall, DCN-v2 pre-ranking, DIN ranking, and the best possible recall known.

    python train.py configs/ranking_mall.py --run runs/ranking_mall

Time:    not measured.
Figures: recall@10 / mrr@10 .508 / .308 with labels of impressions alone, .611 / .414 with 16 sampled items a context;
         one seed. docs/ranking.md has the table.

Every session shows items, of which some are clicked and some bought: impressions with what followed are the labels.
"""

from jaxrec.data.ranking_features import RankingFeatureConfig
from jaxrec.data.sources import SyntheticMall
from jaxrec.models.ranking.dcn import DcnConfig
from jaxrec.models.ranking.din import DinConfig
from jaxrec.semantic_ids import FsqConfig, ResidualConfig, SemanticIdConfig
from jaxrec.systems.ranking.config import CascadeConfig, RankingConfig, RankingStageConfig, RecallConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

# Clicks, carts and purchases are read: what was browsed last announces the next session.
features = RankingFeatureConfig(buckets=(32, 96), weakest=2)
optim = OptimConfig(learning_rate=3e-3, warmup=50)

config = CascadeConfig(
    data=SyntheticMall(),
    semantic_ids=SemanticIdConfig(ResidualConfig((16, 16)), FsqConfig((2,) * 4)),
    recall=RecallConfig(("encoder", "personal frequency", "popularity"), items=200, ranked=60),
    pre_ranking=RankingStageConfig(
        model=DcnConfig(),
        features=features,
        optim=optim,
        training=LoopConfig(steps=400, log_every=50, checkpoint_every=200, monitor="auc_ctcvr"),
    ),
    ranking=RankingConfig(model=DinConfig(), features=features),
    optim=optim,
    training=LoopConfig(steps=600, log_every=50, checkpoint_every=200, monitor="auc_ctcvr"),
)
