"""A synthetic mall so small that the whole of RankGR runs in seconds; for `train.py tests/mall_rankgr.py`."""

from jaxrec.data.leveled_sessions import LeveledSessionConfig
from jaxrec.data.sources import SyntheticMall
from jaxrec.models.causal import CausalConfig
from jaxrec.models.rankgr import RankConfig, RankGRConfig
from jaxrec.semantic_ids import FsqConfig, ResidualConfig, SemanticIdConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.rankgr.config import RankGRObjective, RankGRRunConfig
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.text.align import AlignConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = RankGRRunConfig(
    data=SyntheticMall(users=150, items=120, tastes=12, sessions_per_user=8, exposures_per_session=4),
    batch_size=32,
    align=AlignConfig(width=16, hidden=32),
    semantic_ids=SemanticIdConfig(ResidualConfig((12,)), FsqConfig((2, 2, 2, 2), steps=200)),
    # Clicks and stronger are read.
    features=LeveledSessionConfig(buckets=(24,), weakest=2, targets=12, next_items=8),
    model=RankGRConfig(
        CausalConfig(width=32, heads=2, groups=2, head_dim=16, hidden=64, layers=1),
        pointer=True,
        rank=RankConfig(heads=2, hidden=32, candidates=6, targets=4),
    ),
    objective=RankGRObjective(levels=(0, 1, 2, 3, 3), level_weights=(0.0, 0.0, 1.0, 2.0)),
    optim=OptimConfig(learning_rate=8e-3, warmup=16),
    training=LoopConfig(steps=120, log_every=15, checkpoint_every=24, evaluate_every=0),
    decoding=DecodingConfig(beam_widths=(12, 32), candidates=(12, 64), batch_size=32),
    evaluation=EvaluationConfig(cutoffs=(5, 10), shown_users=2),
)
