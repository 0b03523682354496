"""SASRec with full cross-entropy on Amazon Beauty (leave-one-out, full ranking).

    python train.py configs/sasrec_ce.py --run runs/sasrec_ce --data.path DIR

DIR: a folder in the layout of S3-Rec, as for configs/onemall_beauty.py.
The paper's architecture, a loss over all items instead of one drawn for each target.
An epoch takes about 25 seconds on one or two cores, the whole about 25 to 40 minutes.
"""

from pathlib import Path

from jaxrec.data.sources import SequenceText
from jaxrec.models.sequential import SasRecConfig
from jaxrec.systems.sequential.config import FullSoftmax, SequentialConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = SequentialConfig(
    data=SequenceText(path=Path("beauty")),
    system="sasrec_ce",
    # Cosines instead of products: items of few events keep their place (CORE, Hou et al. 2022).
    model=SasRecConfig(width=128, layers=2, heads=4, hidden=512, dropout=0.4, temperature=0.08),
    objective=FullSoftmax(),
    batch_size=256,
    optim=OptimConfig(learning_rate=1e-3, warmup=100, weight_decay=0.05, final_fraction=0.05),
    # 85 steps are an epoch. The learning rate falls to the end, so that nothing stops before it; the best state on
    # validation is the one that is kept.
    training=LoopConfig(steps=4250, log_every=85, checkpoint_every=425, evaluate_every=425, patience=0),
)
