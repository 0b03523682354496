"""RankGR on a synthetic mall of four levels: pseudo-exposure, exposure, click, purchase with its cart.

    python train.py configs/rankgr_mall.py --run runs/rankgr_mall

Time:    not measured.
Figures: recall@10 .407 ± .013 and hr@10 .577 ± .025 for purchases, three seeds; before the rank head was trained with
         all positives of a session as labels (docs/rankgr.md).
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
    # Histories are clicks and stronger behaviors: most exposures are random.
    features=LeveledSessionConfig(buckets=(16, 48), weakest=2, targets=14),
    model=RankGRConfig(
        CausalConfig(width=64, heads=2, groups=2, head_dim=32, hidden=128, layers=2, rotary_base=1e4, dropout=0.1),
        rank=RankConfig(heads=2, hidden=64, candidates=32, targets=6, likelihood=False),
    ),
    # Next-token targets of all levels with equal weights, as published. The positives of the rank head are clicks and
    # purchases; LDPO separates the two.
    objective=RankGRObjective(alpha=3.0, levels=(0, 1, 2, 3, 3), rank_from=2),
    optim=OptimConfig(learning_rate=3e-3, warmup=50),
    training=LoopConfig(steps=240, log_every=40, checkpoint_every=120),
    # The paper: widths 500, 1400 and candidates 1400, 1400, of 8192 codes and of 500 x 8192.
    decoding=DecodingConfig(beam_widths=(8, 64), candidates=(8, 64), likelihood_weight=1.0),
)
