"""OneSug on any log of whole queries: columns user, time and query in CSV, TSV, JSONL or parquet.

    python train.py configs/onesug_queries.py --run runs/suggest_queries --data.path FILE

Time:    not measured.
Figures: not measured.

Names of columns, the form of times and the encoding are fields of `data` (`--data.user`, `--data.time_format`, ...).
Prefixes are cut from the queries at random; what the most popular completions would have shown is the feedback. Sizes
are for logs of thousands to a million searches.
"""

from pathlib import Path

from jaxrec.data.prefix_cuts import PrefixCutConfig
from jaxrec.data.prepare import PrepareConfig
from jaxrec.data.sources import SearchLog
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
    data=SearchLog(Path("searches.tsv")),
    prepare=PrepareConfig(suggestions=PrefixCutConfig()),
    batch_size=128,
    tokenizer=TokenizerConfig(vocabulary=2000),
    texts=TextSpaceConfig(max_length=20),
    features=SuggestionFeatureConfig((32, 64), related=4, earlier=8, words=8, own=16, popular=32, near=8),
    related=RelatedQueriesConfig(),
    model=EncoderDecoderConfig(
        width=128, heads=4, head_dim=32, hidden=256, encoder_layers=2, layers=2, dropout=0.1, scale_head=False
    ),
    objective=LikelihoodObjective(targets=1, recut=0.5),
    optim=OptimConfig(learning_rate=2e-3, warmup=50),
    training=LoopConfig(steps=1000, log_every=50, checkpoint_every=250, evaluate_every=250, monitor="mrr@10"),
    preference=PreferenceConfig(
        rejected=7,
        optim=OptimConfig(learning_rate=2e-4, warmup=20),
        training=LoopConfig(steps=200, log_every=20, checkpoint_every=100, evaluate_every=50, monitor="mrr@10"),
    ),
    decoding=DecodingConfig(beam_width=32, batch_size=64, completing=True, constrained="mixed"),
    validation_decoding=DecodingConfig(beam_width=16, batch_size=64, completing=True),
    validation=EvaluationConfig(split="valid", max_users=1000),
    evaluation=EvaluationConfig(cutoffs=(1, 10, 16)),
)
