"""SASRec with full cross-entropy on Amazon Beauty: leave-one-out, full ranking.

    python train.py configs/sasrec_ce.py --run runs/sasrec_ce --data.path DIR

Time:    22 to 38 minutes of training on one or two cores.
Figures: recall@10 / ndcg@10 .0769 ± .0009 / .0403 ± .0006 with all items ranked, .0868 ± .0005 / .0515 ± .0003 with
         the history left out, three seeds.

DIR: a folder in the layout of S3-Rec, as for configs/onemall_beauty.py.
The paper's architecture, with cross-entropy over all items instead of one negative a target.
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
    # Cosine instead of dot product, which favours frequent items (CORE, Hou et al. 2022).
    model=SasRecConfig(width=128, layers=2, heads=4, hidden=512, dropout=0.4, temperature=0.08),
    objective=FullSoftmax(),
    batch_size=256,
    optim=OptimConfig(learning_rate=1e-3, warmup=100, weight_decay=0.05, final_fraction=0.05),
    # 85 steps are an epoch. No early stopping, so that the learning rate decays to the end; the best state on
    # validation is kept.
    training=LoopConfig(steps=4250, log_every=85, checkpoint_every=425, evaluate_every=425, patience=0),
)
