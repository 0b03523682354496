"""OneSug on the synthetic mall: typed prefixes with feedback on what was suggested.

    python train.py configs/onesug_mall.py --run runs/suggest_mall

Time:    not measured.
Figures: not measured.
"""

from jaxrec.data.sources import SyntheticMall
from jaxrec.data.suggestion_features import SuggestionFeatureConfig
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.semantic_ids.related_queries import RelatedQueriesConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.onesug.config import OneSugConfig, PreferenceConfig
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.targets import TextSpaceConfig
from jaxrec.text.tokenizer import TokenizerConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = OneSugConfig(
    data=SyntheticMall(searched=0.6),
    batch_size=64,
    tokenizer=TokenizerConfig(vocabulary=400),
    texts=TextSpaceConfig(max_length=8),
    features=SuggestionFeatureConfig((16, 32, 64), related=4, words=8, own=8, popular=16, near=8),
    related=RelatedQueriesConfig(),
    model=EncoderDecoderConfig(
        width=96, heads=4, head_dim=24, hidden=192, encoder_layers=2, layers=2, dropout=0.1, scale_head=False
    ),
    optim=OptimConfig(learning_rate=2e-3, warmup=30),
    training=LoopConfig(steps=300, log_every=25, checkpoint_every=150, evaluate_every=100, monitor="mrr@10"),
    preference=PreferenceConfig(
        optim=OptimConfig(learning_rate=2e-4, warmup=10),
        training=LoopConfig(steps=100, log_every=25, checkpoint_every=100, evaluate_every=50, monitor="mrr@10"),
    ),
    decoding=DecodingConfig(beam_width=32, batch_size=64, completing=True),
    evaluation=EvaluationConfig(cutoffs=(1, 10, 16)),
)
