"""RankGR on a synthetic mall with four levels: pseudo-exposure, exposure, click, and purchase with its cart.

python train.py configs/rankgr_mall.py --run runs/rankgr_mall
"""

from jaxrec.data.leveled_sessions import LeveledSessionConfig
from jaxrec.data.sources import SyntheticMall
from jaxrec.models.causal import CausalConfig
from jaxrec.models.rankgr import RankConfig, RankGRConfig
from jaxrec.semantic_ids import FsqConfig, ResidualConfig, SemanticIdConfig
from jaxrec.systems.rankgr import ObjectiveConfig, RankGRRunConfig
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = RankGRRunConfig(
    data=SyntheticMall(),
    batch_size=64,
    semantic_ids=SemanticIdConfig(ResidualConfig((16,)), FsqConfig((2,) * 6)),
    # Clicks and stronger are read: what was only shown is chance here.
    features=LeveledSessionConfig(buckets=(64,), weakest=2, targets=24),
    model=RankGRConfig(
        CausalConfig(width=64, heads=2, groups=2, head_dim=32, hidden=128, layers=2, rotary_base=1e4, dropout=0.1),
        rank=RankConfig(heads=2, hidden=64, candidates=16, targets=3),
    ),
    objective=ObjectiveConfig(levels=(0, 1, 2, 3, 3), level_weights=(0.1, 0.1, 1.0, 1.0)),
    optim=OptimConfig(learning_rate=3e-3, warmup=50),
    training=LoopConfig(steps=600, log_every=50, checkpoint_every=200),
    # RankGR's own are 500, 1400 of 1400, 1400 (of 8192 codes a level).
    decoding=DecodingConfig(beam_widths=(16, 128), candidates=(16, 512)),
)
