"""RankGR on Amazon Beauty: leave-one-out, one item a session.

    python train.py configs/rankgr.py --run runs/rankgr --data.path DIR

Time:    38 to 46 minutes of training on one core.
Figures: recall@10 / ndcg@10 .0844 ± .0024 / .0443 ± .0015 with all items ranked, .0952 ± .0013 / .0543 ± .0017 with
         the history left out, three seeds.

DIR: a folder in the layout of S3-Rec, as for configs/onemall_beauty.py.
The log has one level, purchases, so pseudo-exposures are sampled, and the rank head scores items independently.
--pretrained FOLDER initialises the decoder from a Qwen2 or Qwen2.5 in Hugging Face's layout.
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
    # A user's sequence is one example: each of the latest 50 items is a target, given the items before it.
    sessions_per_user=1,
    features=LeveledSessionConfig(buckets=(2, 4, 7, 12, 24, 50), targets=1, next_items=50, sampled=1),
    semantic_ids=SemanticIdConfig(ResidualConfig((256, 256, 256)), None),
    # The rank head scores one item an ID.
    collisions=CollisionConfig("nearest_free"),
    model=RankGRConfig(
        # Histories are easily memorised; target IDs are not.
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
    # 174 steps are an epoch. Batches of 256 with half as many steps are worse. No early stopping, so that the learning
    # rate decays to the end; the best state on validation is kept.
    training=LoopConfig(steps=5220, log_every=174, checkpoint_every=870, evaluate_every=870, patience=0),
    # The rank head orders the results of the beam; on validation, 200 beams give the same lists.
    decoding=DecodingConfig(beam_width=100, batch_size=64, likelihood_weight=0.5),
    validation=EvaluationConfig(split="valid", max_users=2000),
)
