"""RankGR on a synthetic mall with four levels: pseudo-exposure, exposure, click, and purchase with its cart.

python train.py configs/rankgr_mall.py --run runs/rankgr_mall
"""

from jaxrec.data.leveled_sessions import LeveledSessionConfig
from jaxrec.data.sources import SyntheticMall
from jaxrec.models.causal import CausalConfig
from jaxrec.models.rankgr import RankConfig, RankGRConfig
from jaxrec.semantic_ids import FsqConfig, ResidualConfig, SemanticIdConfig
from jaxrec.systems.rankgr.config import RankGRObjective, RankGRRunConfig
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = RankGRRunConfig(
    data=SyntheticMall(items=1000, tastes=50, sessions_per_user=10, exposures_per_session=4, recommended=0.6),
    batch_size=64,
    semantic_ids=SemanticIdConfig(ResidualConfig((32,)), FsqConfig((2,) * 6)),
    # Clicks and stronger are read: most of what was only shown is a guess.
    features=LeveledSessionConfig(buckets=(16, 48), weakest=2, targets=14),
    model=RankGRConfig(
        CausalConfig(width=64, heads=2, groups=2, head_dim=32, hidden=128, layers=2, rotary_base=1e4, dropout=0.1),
        rank=RankConfig(heads=2, hidden=64, candidates=32, targets=6, likelihood=False),
    ),
    # Next tokens of all levels alike, as published. The rank head learns to find what was clicked or bought, and LDPO tells
    # the one from the other.
    objective=RankGRObjective(alpha=3.0, levels=(0, 1, 2, 3, 3), rank_from=2),
    optim=OptimConfig(learning_rate=3e-3, warmup=50),
    training=LoopConfig(steps=240, log_every=40, checkpoint_every=120),
    # RankGR's own are 500, 1400 of 1400, 1400: of 8192 codes at the first level, of 500 x 8192 at the second.
    decoding=DecodingConfig(beam_widths=(8, 64), candidates=(8, 64), likelihood_weight=1.0),
)
