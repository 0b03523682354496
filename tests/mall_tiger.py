"""A synthetic mall so small that the whole of TIGER runs in seconds; for `train.py tests/mall_tiger.py`."""

from jaxrec.data.item_sequences import ItemSequenceConfig
from jaxrec.data.sources import SyntheticMall
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.semantic_ids import SemanticIdConfig
from jaxrec.semantic_ids.quantizers.rqvae import RqVaeConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.systems.tiger.config import TigerConfig, TigerObjective
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = TigerConfig(
    data=SyntheticMall(users=150, items=120, tastes=12, sessions_per_user=8, exposures_per_session=4),
    batch_size=32,
    semantic_ids=SemanticIdConfig(RqVaeConfig((8, 8), hidden=(32,), steps=200, warm_steps=50), remainder=None),
    features=ItemSequenceConfig((12,)),
    users=20,
    positions="items",
    own_tokens=True,
    prior=True,
    model=EncoderDecoderConfig(width=32, heads=2, head_dim=16, hidden=64, encoder_layers=1, layers=1, causal=True),
    objective=TigerObjective(smoothing=0.05),
    optim=OptimConfig(learning_rate=8e-3, warmup=16),
    training=LoopConfig(steps=120, log_every=20, checkpoint_every=40, evaluate_every=40),
    decoding=DecodingConfig(beam_width=16, batch_size=32),
    validation=EvaluationConfig(split="valid", max_users=60),
    evaluation=EvaluationConfig(cutoffs=(5, 10), shown_users=2),
)
