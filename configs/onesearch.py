"""OneSearch on Complete Journey: the categories of a basket as searches.

    python train.py configs/onesearch.py --run runs/search

Time:    24 minutes on two cores beside other work.
Figures: recall@10 / mrr@10 .661 / .445 for all searches, .454 / .226 for products new to the household; one seed.
         docs/onesearch.md has the table with the baselines.

Nobody typed these queries: a search is the name of one of 225 categories, and what it led to are the products of it in
the basket. Which product of the category is bought is what is measured.
"""

from jaxrec.data.search_features import SearchFeatureConfig
from jaxrec.data.sources import CompleteJourney
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.models.personal_search import PromptConfig
from jaxrec.semantic_ids.quantizers.codebooks import rq_opq
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.onesearch.config import ContentConfig, CoOccurrenceConfig, OneSearchConfig, PersonalisationObjective
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.text.keywords import KeywordConfig
from jaxrec.text.tokenizer import TokenizerConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

of_tasks = {
    "optim": OptimConfig(learning_rate=2e-3, warmup=30),
    "training": LoopConfig(steps=200, log_every=50, checkpoint_every=200, evaluate_every=0),
}

config = OneSearchConfig(
    # What was on display plays no part here.
    data=CompleteJourney(queries="category", exposures_per_session=0),
    batch_size=96,
    keywords=KeywordConfig(("product_type", "category", "brand", "package_size")),
    # 10,374 items (OneSearch at full scale: 4096, 1024, 512 | 256, 256).
    semantic_ids=rq_opq((128, 64, 32), (32, 32)),
    tokenizer=TokenizerConfig(vocabulary=2000),
    features=SearchFeatureConfig(buckets=(8,)),
    # An ID a position, a popularity prior and copying: a small model on two cores.
    prompt=PromptConfig("items"),
    prior=True,
    model=EncoderDecoderConfig(
        width=128,
        heads=4,
        head_dim=32,
        hidden=256,
        encoder_layers=2,
        layers=2,
        dropout=0.1,
        scale_head=False,
    ),
    content=ContentConfig(**of_tasks),
    co_occurrence=CoOccurrenceConfig(**of_tasks),
    objective=PersonalisationObjective(),
    optim=OptimConfig(learning_rate=2e-3, warmup=50),
    training=LoopConfig(steps=1200, log_every=50, checkpoint_every=400, evaluate_every=600, patience=0),
    decoding=DecodingConfig(beam_width=50, batch_size=64),
    validation=EvaluationConfig(split="valid", max_users=500),
    evaluation=EvaluationConfig(cutoffs=(10, 50)),
)
