"""RankGR on JD's micro-behaviours: click, detail, cart, order.

    python train.py configs/rankgr_jd.py --run runs/rankgr_jd --data.path DIR

Time:    not measured.
Figures: recall@10 .109 ± .008 for carts and .341 ± .017 for orders, three seeds; before the rank head was trained
         with all positives of a session as labels (docs/rankgr.md).

DIR: files whose lines are shopping sessions (docs/sources.md). The targets are the next items carted or ordered; clicks
and details before them are the weaker levels. Items have no text but their category, so each has its own vector, and
IDs depend on co-occurrence.
"""

from pathlib import Path

from jaxrec.data.leveled_sessions import LeveledSessionConfig
from jaxrec.data.sources import JdMicro
from jaxrec.models.causal import CausalConfig
from jaxrec.models.rankgr import RankConfig, RankGRConfig
from jaxrec.semantic_ids import ResidualConfig, SemanticIdConfig
from jaxrec.semantic_ids.table.collisions import CollisionConfig
from jaxrec.systems.rankgr.config import RankGRObjective, RankGRRunConfig
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = RankGRRunConfig(
    data=JdMicro(path=Path("jd")),
    batch_size=64,
    semantic_ids=SemanticIdConfig(ResidualConfig((128, 128)), None),
    collisions=CollisionConfig("nearest_free"),
    features=LeveledSessionConfig(buckets=(16, 48), targets=12),
    model=RankGRConfig(
        CausalConfig(width=64, heads=2, groups=2, head_dim=32, hidden=128, layers=2, rotary_base=1e4, dropout=0.2),
        # Carted items were often viewed before.
        pointer=True,
        rank=RankConfig(heads=2, hidden=64, candidates=32, targets=3),
    ),
    # Most events of a session are clicks, few of them on target items.
    objective=RankGRObjective(alpha=1.0, level_weights=(0.1, 0.1, 1.0, 1.0)),
    optim=OptimConfig(learning_rate=3e-3, warmup=50),
    training=LoopConfig(steps=240, log_every=40, checkpoint_every=120),
    decoding=DecodingConfig(beam_widths=(16, 64), candidates=(16, 64), likelihood_weight=1.0),
)
