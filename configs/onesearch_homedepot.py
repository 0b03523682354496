"""OneSearch on judged pairs of Home Depot: customers' queries, graded relevance, no users.

    python train.py configs/onesearch_homedepot.py --run runs/homedepot --data.pairs FILE --data.products FILE

Time:    not measured; its 170,000 texts alone take about an hour to encode on two cores, once.
Figures: not measured.

FILE: `judgments.tsv` with the columns query, product_uid and relevance (1 to 3), and `products.tsv` with product_uid and
title, packed or not. Titles and parts of them are queries in training. A tenth of the queries is held out for the test:
no query of the test is seen in training.
"""

from pathlib import Path

from jaxrec.data.search_features import SearchFeatureConfig
from jaxrec.data.sources import JudgedPairs
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
    "optim": OptimConfig(learning_rate=2e-3, warmup=50),
    "training": LoopConfig(steps=1000, log_every=50, checkpoint_every=500, evaluate_every=0),
}

config = OneSearchConfig(
    data=JudgedPairs(
        Path("judgments.tsv"), Path("products.tsv"), item="product_uid", grade="relevance", product="product_uid"
    ),
    batch_size=128,
    # 54,667 items.
    semantic_ids=rq_opq((256, 128, 64), (32, 32)),
    tokenizer=TokenizerConfig(vocabulary=8000),
    # Nobody has a past.
    features=SearchFeatureConfig(
        buckets=(8, 16, 24), recent_queries=0, recent_items=0, long_length=1, related=0, popular=64
    ),
    prompt=PromptConfig("items", user_ids="none", long_queries=0),
    prior=True,
    model=EncoderDecoderConfig(
        width=192, heads=6, head_dim=32, hidden=512, encoder_layers=3, layers=2, dropout=0.1, scale_head=False
    ),
    content=ContentConfig(**of_tasks),
    co_occurrence=CoOccurrenceConfig(**of_tasks),
    objective=PersonalisationObjective(targets=4),
    optim=OptimConfig(learning_rate=1e-3, warmup=100),
    training=LoopConfig(steps=3000, log_every=50, checkpoint_every=1000, evaluate_every=1000, patience=0),
    decoding=DecodingConfig(beam_width=100, batch_size=32),
    validation=EvaluationConfig(split="valid", max_users=1000),
    evaluation=EvaluationConfig(cutoffs=(10, 50, 100)),
)
