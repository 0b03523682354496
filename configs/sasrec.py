"""SASRec as published on Amazon Beauty: leave-one-out, full ranking.

    python train.py configs/sasrec.py --run runs/sasrec --data.path DIR

Time:    2 minutes on an NVIDIA H100 that trained seven models at once; not measured on a CPU.
Figures: recall@10 / ndcg@10 .0610 / .0260 with all items ranked, .0693 / .0376 with the history left out. One seed,
         with early stopping, which this configuration no longer has (docs/baselines.md).

DIR: a folder in the layout of S3-Rec, as for configs/onemall_beauty.py.
Binary cross-entropy of each target against one random negative, drawn from the items outside the user's history.
"""

from pathlib import Path

from jaxrec.data.sources import SequenceText
from jaxrec.models.sequential import SasRecConfig
from jaxrec.systems.sequential.config import Binary, SequentialConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = SequentialConfig(
    data=SequenceText(path=Path("beauty")),
    system="sasrec",
    model=SasRecConfig(width=128, layers=2, heads=2, hidden=256, dropout=0.4),
    objective=Binary(negatives=1),
    batch_size=256,
    optim=OptimConfig(learning_rate=1e-3, warmup=100, weight_decay=0.01, final_fraction=0.05),
    # 85 steps are an epoch. No early stopping, so that the learning rate decays to the end; the best state on
    # validation is kept.
    training=LoopConfig(steps=8500, log_every=85, checkpoint_every=425, evaluate_every=425, patience=0),
)
