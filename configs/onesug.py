"""OneSug on Complete Journey: what this household is about to look for, from the first letters on.

    python train.py configs/onesug.py --run runs/suggest

Time:    the likelihood takes 5 to 10 minutes on two cores, beside other work.
Figures: after 400 steps of the likelihood alone, MRR@16 .907 of 2,000 test prefixes (own searches, then recent: .896).

Nobody typed these queries: a search is the name of one of 1,013 product types that are in the basket, and a prefix is
cut from it at random. The last basket of each household is held out.
"""

from jaxrec.data.prefix_cuts import PrefixCutConfig
from jaxrec.data.prepare import PrepareConfig
from jaxrec.data.sources import CompleteJourney
from jaxrec.data.suggestion_features import SuggestionFeatureConfig
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.semantic_ids.related_queries import RelatedQueriesConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.onesug.config import LikelihoodObjective, OneSugConfig, PreferenceConfig
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.targets import TextSpaceConfig
from jaxrec.text.tokenizer import TokenizerConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = OneSugConfig(
    # What was on display plays no part here.
    data=CompleteJourney(queries="product_type", exposures_per_session=0),
    prepare=PrepareConfig(suggestions=PrefixCutConfig(last_sessions=8)),
    batch_size=128,
    tokenizer=TokenizerConfig(vocabulary=2000),
    texts=TextSpaceConfig(max_length=16),
    features=SuggestionFeatureConfig((32, 64), related=4, earlier=8, words=6, own=24, popular=32, near=8),
    related=RelatedQueriesConfig(),
    model=EncoderDecoderConfig(
        width=128, heads=4, head_dim=32, hidden=256, encoder_layers=2, layers=2, dropout=0.1, scale_head=False
    ),
    objective=LikelihoodObjective(targets=1, recut=0.3),
    optim=OptimConfig(learning_rate=2e-3, warmup=50),
    training=LoopConfig(steps=600, log_every=50, checkpoint_every=200, evaluate_every=200, monitor="mrr@10"),
    preference=PreferenceConfig(
        rejected=7,
        optim=OptimConfig(learning_rate=2e-4, warmup=20),
        training=LoopConfig(steps=150, log_every=25, checkpoint_every=150, evaluate_every=50, monitor="mrr@10"),
    ),
    decoding=DecodingConfig(beam_width=32, batch_size=64, completing=True),
    validation=EvaluationConfig(split="valid", max_users=1000),
    evaluation=EvaluationConfig(cutoffs=(1, 10, 16), max_users=6000),
)
