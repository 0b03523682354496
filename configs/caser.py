"""Caser on Amazon Beauty: leave-one-out, full ranking.

    python train.py configs/caser.py --run runs/caser --data.path DIR

Time:    2 minutes on an NVIDIA H100 that trained seven models at once; not measured on a CPU.
Figures: recall@10 / ndcg@10 .0499 / .0280 with all items ranked, .0522 / .0299 with the history left out. One seed,
         with early stopping, which this configuration no longer has (docs/baselines.md).

DIR: a folder in the layout of S3-Rec, as for configs/onemall_beauty.py.
Convolutions over the last five items; cross-entropy over all items.
"""

from pathlib import Path

from jaxrec.data.sources import SequenceText
from jaxrec.models.sequential import CaserConfig
from jaxrec.systems.sequential.config import FullSoftmax, SequentialConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = SequentialConfig(
    data=SequenceText(path=Path("beauty")),
    system="caser",
    model=CaserConfig(width=128, window=5, dropout=0.4),
    objective=FullSoftmax(),
    batch_size=256,
    optim=OptimConfig(learning_rate=1e-3, warmup=100, weight_decay=0.01, final_fraction=0.05),
    # 85 steps are an epoch. No early stopping, so that the learning rate decays to the end; the best state on
    # validation is kept.
    training=LoopConfig(steps=4250, log_every=85, checkpoint_every=425, evaluate_every=425, patience=0),
)
