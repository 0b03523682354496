"""A synthetic mall so small that an item-level baseline runs in seconds; for `train.py tests/mall_sequential.py`."""

from jaxrec.data.sources import SyntheticMall
from jaxrec.models.sequential import SasRecConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.sequential.config import SequentialConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = SequentialConfig(
    data=SyntheticMall(users=150, items=120, tastes=12, sessions_per_user=8, exposures_per_session=4),
    model=SasRecConfig(width=32, layers=1, heads=2, hidden=32, dropout=0.2, embeddings=True, prior=True),
    batch_size=32,
    lengths=(8, 16),
    optim=OptimConfig(learning_rate=8e-3, warmup=10),
    training=LoopConfig(steps=200, log_every=20, checkpoint_every=30, evaluate_every=20, patience=3),
    evaluation=EvaluationConfig(cutoffs=(5, 10), shown_users=2),
)
