"""YouTubeDNN on Amazon Beauty: leave-one-out, full ranking.

    python train.py configs/youtubednn.py --run runs/youtubednn --data.path DIR

Time:    1 minute on an NVIDIA H100 that trained seven models at once; not measured on a CPU.
Figures: recall@10 / ndcg@10 .0467 / .0238 with all items ranked, .0535 / .0293 with the history left out. One seed,
         with early stopping, which this configuration no longer has (docs/baselines.md).

DIR: a folder in the layout of S3-Rec, as for configs/onemall_beauty.py.
Softmax over 1,024 negatives sampled by popularity, with logQ correction.
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
    # 85 steps are an epoch. No early stopping, so that the learning rate decays to the end; the best state on
    # validation is kept.
    training=LoopConfig(steps=8500, log_every=85, checkpoint_every=425, evaluate_every=425, patience=0),
)
