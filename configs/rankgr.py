"""RankGR on Amazon Beauty (leave-one-out, one item a session), from a folder in the layout of S3-Rec.

    python train.py configs/rankgr.py --run runs/rankgr --data.path DIR

DIR holds sequences.txt, items.jsonl and, if there is one, timestamps.jsonl (see configs/onemall_beauty.py). The log has
one level, purchases, so pseudo-exposures are drawn and the rank head scores items by themselves. With
--pretrained FOLDER it begins from a Qwen2 or Qwen2.5 in Hugging Face's layout.
"""

from pathlib import Path

from jaxrec.data.leveled_sessions import LeveledSessionConfig
from jaxrec.data.sources import SequenceText
from jaxrec.models.causal import CausalConfig
from jaxrec.models.rankgr import RankConfig, RankGRConfig
from jaxrec.semantic_ids import ResidualConfig, SemanticIdConfig
from jaxrec.semantic_ids.table.collisions import CollisionConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.rankgr.config import RankGRObjective, RankGRRunConfig
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = RankGRRunConfig(
    data=SequenceText(path=Path("beauty")),
    batch_size=128,
    # A user's sequence is one example: every item of the latest 50 is a target after those before it, and the last one.
    sessions_per_user=1,
    features=LeveledSessionConfig(buckets=(2, 4, 7, 12, 24, 50), targets=1, next_items=50, sampled=1),
    semantic_ids=SemanticIdConfig(ResidualConfig((256, 256, 256)), None),
    # The rank head scores one item an ID.
    collisions=CollisionConfig("nearest_free"),
    model=RankGRConfig(
        # The history is easily learnt by heart, which ID follows is not.
        CausalConfig(
            width=128,
            heads=4,
            groups=4,
            head_dim=32,
            hidden=256,
            layers=2,
            rotary_base=1e4,
            dropout=0.4,
            target_dropout=0.1,
        ),
        embeddings=True,
        prior=True,
        rank=RankConfig(loss="softmax", temperature=0.08),
    ),
    objective=RankGRObjective(alpha=0.1),
    optim=OptimConfig(learning_rate=1.5e-3, warmup=100, weight_decay=0.05, final_fraction=0.05),
    # 174 steps are an epoch. Batches of 256 and half as many steps learn less from as many epochs. The learning rate falls
    # to the end, so that nothing stops before it; the best state on validation is the one that is kept.
    training=LoopConfig(steps=5220, log_every=174, checkpoint_every=870, evaluate_every=870, patience=0),
    # The rank head orders what the beam has found; on validation, 200 beams find nothing that these don't.
    decoding=DecodingConfig(beam_width=100, batch_size=64, likelihood_weight=0.5),
    validation=EvaluationConfig(split="valid", max_users=2000),
)
