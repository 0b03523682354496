"""A synthetic mall with suggestions so small that OneSug runs in seconds; for `train.py tests/mall_onesug.py`."""

from jaxrec.data.sources import SyntheticMall
from jaxrec.data.suggestion_features import SuggestionFeatureConfig
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.semantic_ids import ResidualConfig, SemanticIdConfig
from jaxrec.semantic_ids.related_queries import RelatedQueriesConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.onesug.config import OneSugConfig, PreferenceConfig
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.targets import TextSpaceConfig
from jaxrec.text.tokenizer import TokenizerConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = OneSugConfig(
    data=SyntheticMall(*(120, 120, 12, 4, 6), browsed_per_session=1, exposures_per_session=1, searched=0.6),
    batch_size=32,
    tokenizer=TokenizerConfig(vocabulary=360),
    texts=TextSpaceConfig(max_length=7),
    features=SuggestionFeatureConfig((16, 32), related=3, earlier=3, words=7, own=6, popular=10, near=2),
    related=RelatedQueriesConfig(SemanticIdConfig(ResidualConfig((4, 4)), None), related=4, min_cosine=0.2),
    model=EncoderDecoderConfig(width=32, heads=2, head_dim=16, hidden=64, encoder_layers=1, layers=1, scale_head=False),
    optim=OptimConfig(learning_rate=8e-3, warmup=8),
    training=LoopConfig(steps=48, log_every=12, checkpoint_every=24, evaluate_every=0),
    preference=PreferenceConfig(
        rejected=6,
        optim=OptimConfig(learning_rate=1e-3, warmup=4),
        training=LoopConfig(steps=24, log_every=6, checkpoint_every=12, evaluate_every=0),
    ),
    decoding=DecodingConfig(beam_width=16, batch_size=32, completing=True),
    validation=EvaluationConfig(split="valid", max_users=40),
    evaluation=EvaluationConfig(cutoffs=(1, 5, 10, 16), shown_users=2),
)
