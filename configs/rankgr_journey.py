"""RankGR on Complete Journey: opportunity of exposure, purchase, coupon purchase.

    python train.py configs/rankgr_journey.py --run runs/rankgr_journey

Time:    not measured.
Figures: recall@10 .140 for all baskets, one seed; before the rank head was trained with all positives of a session as
         labels (docs/rankgr.md).

The weakest level is a product promoted in the store in the week of a visit; a purchase is preferred to it. On this log
--model.rank.loss none is the better model.
"""

from jaxrec.data.leveled_sessions import LeveledSessionConfig
from jaxrec.data.sources import CompleteJourney
from jaxrec.models.causal import CausalConfig
from jaxrec.models.rankgr import RankConfig, RankGRConfig
from jaxrec.semantic_ids import FsqConfig, ResidualConfig, SemanticIdConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.rankgr.config import RankGRObjective, RankGRRunConfig
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = RankGRRunConfig(
    # Of several hundred promoted products a visit hardly any was viewed: a few are sampled.
    data=CompleteJourney(exposures_per_session=8),
    batch_size=32,
    sessions_per_user=8,
    semantic_ids=SemanticIdConfig(ResidualConfig((128, 128)), FsqConfig((2,) * 8)),
    # Histories are purchases alone.
    features=LeveledSessionConfig(buckets=(64, 256), weakest=1, targets=16),
    model=RankGRConfig(
        CausalConfig(width=64, heads=2, groups=2, head_dim=32, hidden=128, layers=2, rotary_base=1e4, dropout=0.1),
        # Most of a basket was in a basket before.
        pointer=True,
        rank=RankConfig(heads=2, hidden=64, candidates=32, targets=3),
    ),
    # Opportunities of exposure are compared with purchases, but are no next-token targets.
    objective=RankGRObjective(alpha=1.0, level_weights=(0.0, 1.0, 1.0)),
    optim=OptimConfig(learning_rate=3e-3, warmup=50),
    training=LoopConfig(steps=600, log_every=50, checkpoint_every=300),
    decoding=DecodingConfig(beam_widths=(16, 64, 64), candidates=(16, 64, 64), likelihood_weight=1.0),
    validation=EvaluationConfig(split="valid", max_users=1000),
)
