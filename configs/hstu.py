"""HSTU on Amazon Beauty: leave-one-out, full ranking.

    python train.py configs/hstu.py --run runs/hstu --data.path DIR

Time:    2 minutes on an NVIDIA H100 that trained seven models at once; not measured on a CPU.
Figures: recall@10 / ndcg@10 .0715 / .0417 with all items ranked, .0771 / .0470 with the history left out. One seed,
         with early stopping and the time of the target as an input, neither of which this configuration has
         (docs/baselines.md).

DIR: a folder in the layout of S3-Rec, as for configs/onemall_beauty.py.
Attention without softmax, with biases for position and time; cross-entropy over all items.
"""

from pathlib import Path

from jaxrec.data.sources import SequenceText
from jaxrec.models.sequential import HstuConfig
from jaxrec.systems.sequential.config import FullSoftmax, SequentialConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = SequentialConfig(
    data=SequenceText(path=Path("beauty")),
    system="hstu",
    model=HstuConfig(width=128, layers=2, heads=2, dropout=0.4),
    objective=FullSoftmax(),
    batch_size=256,
    optim=OptimConfig(learning_rate=1e-3, warmup=100, weight_decay=0.01, final_fraction=0.05),
    # 85 steps are an epoch. No early stopping, so that the learning rate decays to the end; the best state on
    # validation is kept.
    training=LoopConfig(steps=4250, log_every=85, checkpoint_every=425, evaluate_every=425, patience=0),
)
