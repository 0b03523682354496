"""OneSearch on Amazon Beauty, leave-one-out: an item's query is its category path (Van Gysel et al. 2016; Ai et al. 2017).

    python train.py configs/onesearch_beauty.py --run runs/search_beauty --data.path DIR

Time:    not measured.
Figures: not measured.

DIR: a folder in the layout of S3-Rec, as for configs/onemall_beauty.py. Nobody typed these 242 queries. Nobody has an
item twice, so that nothing of the past is copied as such: what counts is what goes with it.
"""

from pathlib import Path

from jaxrec.data.search_features import SearchFeatureConfig
from jaxrec.data.sources import SequenceText
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.models.personal_search import PromptConfig
from jaxrec.semantic_ids.quantizers.codebooks import rq_opq
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.onesearch.config import ContentConfig, CoOccurrenceConfig, OneSearchConfig, PersonalisationObjective
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.text.tokenizer import TokenizerConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

of_tasks = {
    "optim": OptimConfig(learning_rate=2e-3, warmup=30),
    "training": LoopConfig(steps=400, log_every=50, checkpoint_every=400, evaluate_every=0),
}

config = OneSearchConfig(
    data=SequenceText(path=Path("beauty"), queries="category"),
    batch_size=128,
    # 12,101 items.
    semantic_ids=rq_opq((128, 64, 32), (32, 32)),
    tokenizer=TokenizerConfig(vocabulary=4000),
    features=SearchFeatureConfig(buckets=(12,), recent_items=10, long_length=32, related=8, popular=128),
    prompt=PromptConfig("items"),
    prior=True,
    model=EncoderDecoderConfig(
        width=128, heads=4, head_dim=32, hidden=512, encoder_layers=3, layers=2, dropout=0.2, scale_head=False
    ),
    content=ContentConfig(**of_tasks),
    co_occurrence=CoOccurrenceConfig(**of_tasks),
    objective=PersonalisationObjective(targets=1),
    optim=OptimConfig(learning_rate=1e-3, warmup=100, weight_decay=0.05),
    training=LoopConfig(steps=3000, log_every=50, checkpoint_every=1000, evaluate_every=1000, patience=0),
    decoding=DecodingConfig(beam_width=50, batch_size=64),
    validation=EvaluationConfig(split="valid", max_users=2000, exclude_history=True),
    evaluation=EvaluationConfig(cutoffs=(1, 5, 10, 50)),
)
