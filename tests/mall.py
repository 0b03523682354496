"""A synthetic mall so small that the whole of OneMall runs in seconds; for `train.py tests/mall.py`."""

from jaxrec.data.features import FeatureConfig
from jaxrec.data.sources import SyntheticMall
from jaxrec.models.cross_decoder import CrossDecoderConfig
from jaxrec.semantic_ids import FsqConfig, ResidualConfig, SemanticIdConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.onemall.config import OneMallConfig
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.text.align import AlignConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = OneMallConfig(
    data=SyntheticMall(users=150, items=120, tastes=12, sessions_per_user=8, exposures_per_session=4),
    batch_size=32,
    align=AlignConfig(width=16, hidden=32),
    semantic_ids=SemanticIdConfig(ResidualConfig((12,)), FsqConfig((2, 2, 2, 2), steps=200)),
    features=FeatureConfig(history_lengths=(24,), past_length=16, targets=4, buckets=(24,)),
    model=CrossDecoderConfig(width=32, heads=2, layers=1, hidden=32, experts=4, queries=4, recent=8),
    optim=OptimConfig(learning_rate=8e-3, warmup=16),
    training=LoopConfig(steps=240, log_every=15, checkpoint_every=48, evaluate_every=120),
    decoding=DecodingConfig(beam_width=16, batch_size=32),
    evaluation=EvaluationConfig(cutoffs=(5, 10), shown_users=2),
)
