"""OneSearch on clicks of Best Buy's search (Xbox games, 2011): typed queries, items without texts.

    python train.py configs/onesearch_bestbuy.py --run runs/bestbuy --data.path FILE

Time:    36 minutes on two cores beside other work.
Figures: hit@10 / mrr@10 .869 / .695; recall@10 of queries unseen in training .566; one seed.

FILE: `clicks.tsv` with the columns user, query_time, click_time, sku and query, packed or not. An item's text is made of
the training queries that led to it. Nine users of ten have one search, so that the past plays hardly any part.
"""

from pathlib import Path

from jaxrec.data.search_features import SearchFeatureConfig
from jaxrec.data.sources import ClickLog
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
    data=ClickLog(Path("clicks.tsv"), time="query_time", event_time="click_time", item="sku"),
    batch_size=128,
    # 413 items.
    semantic_ids=rq_opq((32, 16, 8), (8, 8)),
    tokenizer=TokenizerConfig(vocabulary=2000),
    features=SearchFeatureConfig(buckets=(8, 16), recent_queries=2, recent_items=2, long_length=16, related=8),
    prompt=PromptConfig("items"),
    prior=True,
    model=EncoderDecoderConfig(
        width=128, heads=4, head_dim=32, hidden=256, encoder_layers=2, layers=2, dropout=0.1, scale_head=False
    ),
    content=ContentConfig(**of_tasks),
    co_occurrence=CoOccurrenceConfig(**of_tasks),
    objective=PersonalisationObjective(targets=2),
    optim=OptimConfig(learning_rate=1e-3, warmup=50),
    training=LoopConfig(steps=1200, log_every=50, checkpoint_every=400, evaluate_every=400, patience=0),
    decoding=DecodingConfig(beam_width=50, batch_size=64),
    validation=EvaluationConfig(split="valid", max_users=2000),
    evaluation=EvaluationConfig(cutoffs=(1, 5, 10, 50)),
)
