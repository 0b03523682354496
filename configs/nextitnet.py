"""NextItNet on Amazon Beauty (leave-one-out, full ranking).

    python train.py configs/nextitnet.py --run runs/nextitnet --data.path DIR

DIR: a folder in the layout of S3-Rec, as for configs/onemall_beauty.py.
Dilated causal convolutions; cross-entropy over all items.
"""

from pathlib import Path

from jaxrec.data.sources import SequenceText
from jaxrec.models.sequential import NextItNetConfig
from jaxrec.systems.sequential import SequentialConfig
from jaxrec.systems.sequential_training import FullSoftmax
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = SequentialConfig(
    data=SequenceText(path=Path("beauty")),
    system="nextitnet",
    model=NextItNetConfig(width=128, dilations=(1, 4), dropout=0.4),
    objective=FullSoftmax(),
    batch_size=256,
    optim=OptimConfig(learning_rate=1e-3, warmup=100, weight_decay=0.01),
    # 85 steps are an epoch.
    training=LoopConfig(steps=8500, log_every=85, checkpoint_every=425, evaluate_every=170, patience=8),
)
