"""NextItNet on Amazon Beauty: leave-one-out, full ranking.

    python train.py configs/nextitnet.py --run runs/nextitnet --data.path DIR

Time:    1 minute on an NVIDIA H100 that trained seven models at once; not measured on a CPU.
Figures: recall@10 / ndcg@10 .0737 / .0350 with all items ranked, .0813 / .0484 with the history left out. One seed,
         with early stopping, which this configuration no longer has (docs/baselines.md).

DIR: a folder in the layout of S3-Rec, as for configs/onemall_beauty.py.
Dilated causal convolutions; cross-entropy over all items.
"""

from pathlib import Path

from jaxrec.data.sources import SequenceText
from jaxrec.models.sequential import NextItNetConfig
from jaxrec.systems.sequential.config import FullSoftmax, SequentialConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = SequentialConfig(
    data=SequenceText(path=Path("beauty")),
    system="nextitnet",
    model=NextItNetConfig(width=128, dilations=(1, 4), dropout=0.4),
    objective=FullSoftmax(),
    batch_size=256,
    optim=OptimConfig(learning_rate=1e-3, warmup=100, weight_decay=0.01, final_fraction=0.05),
    # 85 steps are an epoch. No early stopping, so that the learning rate decays to the end; the best state on
    # validation is kept.
    training=LoopConfig(steps=4250, log_every=85, checkpoint_every=425, evaluate_every=425, patience=0),
)
