"""OneMall on Amazon Beauty: leave-one-out, one item a session.

    python train.py configs/onemall_beauty.py --run runs/beauty --data.path DIR

Time:    21 to 24 minutes of training on one core.
Figures: recall@10 / ndcg@10 .0782 ± .0013 / .0443 ± .0009 with all items ranked, .0836 ± .0010 / .0483 ± .0007 with
         the history left out, all users, three seeds; with the day of the target as an input, which this
         configuration no longer has (docs/baselines.md).

DIR: a folder in the layout of S3-Rec, with sequences.txt (`user item item ...`), items.jsonl ({"id", "title",
"categories"}) and optionally timestamps.jsonl. --data.shuffle-ties puts events of one day into random order before
splitting: 43% of the users have their last two items on one day, stored in the order of their IDs, which a model can
learn.
"""

from pathlib import Path

from jaxrec.data.features import FeatureConfig
from jaxrec.data.sources import SequenceText
from jaxrec.models.cross_decoder import CrossDecoderConfig
from jaxrec.semantic_ids import FsqConfig, ResidualConfig, SemanticIdConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.onemall.config import OneMallConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = OneMallConfig(
    data=SequenceText(path=Path("beauty")),
    attributes=("category",),
    batch_size=256,
    semantic_ids=SemanticIdConfig(ResidualConfig((128, 128)), FsqConfig((2,) * 8)),
    # Most histories are short.
    features=FeatureConfig(history_lengths=(32,), past_length=32, targets=1, buckets=(4, 8, 16, 32)),
    # No user has an item twice, so there are no habits; contexts are easily memorised.
    model=CrossDecoderConfig(
        width=128,
        heads=4,
        layers=2,
        hidden=256,
        experts=8,
        queries=4,
        recent=32,
        places=True,
        habit=False,
        dropout=0.2,
        context_dropout=0.4,
    ),
    optim=OptimConfig(learning_rate=2e-3, warmup=100, weight_decay=0.1),
    # 512 steps are an epoch. No early stopping, so that the learning rate decays to the end; the best state is kept.
    training=LoopConfig(steps=4608, log_every=64, checkpoint_every=512, evaluate_every=512, patience=0),
    # Beams of 500 for all 22,363 users would take longer than the training; 0 evaluates all of them.
    evaluation=EvaluationConfig(max_users=5000),
)
