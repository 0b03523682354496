"""YouTubeDNN on Amazon Beauty (leave-one-out, full ranking).

    python train.py configs/youtubednn.py --run runs/youtubednn --data.path DIR

DIR: a folder in the layout of S3-Rec, as for configs/onemall_beauty.py.
Softmax among 1,024 items drawn by popularity, corrected for that.
"""

from pathlib import Path

from jaxrec.data.sources import SequenceText
from jaxrec.models.sequential import YouTubeDnnConfig
from jaxrec.systems.sequential.config import SampledSoftmax, SequentialConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = SequentialConfig(
    data=SequenceText(path=Path("beauty")),
    system="youtubednn",
    model=YouTubeDnnConfig(width=128, hidden=(256,), dropout=0.3),
    objective=SampledSoftmax(negatives=1024),
    batch_size=256,
    optim=OptimConfig(learning_rate=1e-3, warmup=100, weight_decay=0.01, final_fraction=0.05),
    # 85 steps are an epoch. The learning rate falls to the end, so that nothing stops before it; the best state on
    # validation is the one that is kept.
    training=LoopConfig(steps=8500, log_every=85, checkpoint_every=425, evaluate_every=425, patience=0),
)
