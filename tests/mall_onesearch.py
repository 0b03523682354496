"""A synthetic mall with searches so small that OneSearch runs in seconds; for `train.py tests/mall_onesearch.py`."""

from jaxrec.data.ranking_features import LabelConfig, RankingFeatureConfig
from jaxrec.data.search_features import SearchFeatureConfig
from jaxrec.data.sources import SyntheticMall
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.models.personal_search import PromptConfig
from jaxrec.models.ranking.inputs import InputConfig
from jaxrec.models.ranking.sim import SimConfig
from jaxrec.semantic_ids import FsqConfig, ResidualConfig, SemanticIdConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.onesearch.config import ContentConfig, CoOccurrenceConfig, OneSearchConfig, TextLengths
from jaxrec.systems.onesearch.reward_config import InteractionsConfig, ReorderedConfig, SearchRewardsConfig
from jaxrec.systems.ranking.config import RankingStageConfig
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.text.align import AlignConfig
from jaxrec.text.tokenizer import TokenizerConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

optim, short = (
    OptimConfig(learning_rate=8e-3, warmup=8),
    LoopConfig(steps=24, log_every=8, checkpoint_every=12, evaluate_every=0),
)
of_phase = {
    "batch_size": 16,
    "optim": OptimConfig(learning_rate=1e-3, warmup=4),
    "training": LoopConfig(steps=16, log_every=4, checkpoint_every=8, evaluate_every=0),
}

config = OneSearchConfig(
    data=SyntheticMall(
        *(120, 120, 12, 4, 6), exposures_per_session=2, browsed_per_session=1, searched=0.6, results_per_search=3
    ),
    batch_size=32,
    align=AlignConfig(width=16, hidden=32),
    semantic_ids=SemanticIdConfig(ResidualConfig((12,)), FsqConfig((2, 2, 2, 2), steps=200)),
    tokenizer=TokenizerConfig(vocabulary=360),
    texts=TextLengths(read=12, written=8),
    features=SearchFeatureConfig((8,), 0, 2, 3, 6, long_length=16, related=8, popular=16, short_items=4, weakest=2),
    prompt=PromptConfig("items", long_queries=2, long_heads=2),
    prior=True,
    model=EncoderDecoderConfig(width=32, heads=2, head_dim=16, hidden=64, encoder_layers=1, layers=1, scale_head=False),
    content=ContentConfig(optim=optim, training=short),
    co_occurrence=CoOccurrenceConfig(optim=optim, training=short),
    rewards=SearchRewardsConfig(
        model=RankingStageConfig(
            model=SimConfig("category", found=8, heads=1, head_dim=8, length=8, unit=8, hidden=(16,)),
            towers=("ctr", "cvr", "ctcvr"),
            contexts="searches",
            inputs=InputConfig(width=8),
            features=RankingFeatureConfig((24,), weakest=2, led=16),
            labels=LabelConfig(candidates=12),
            batch_size=16,
            optim=optim,
            training=LoopConfig(steps=24, log_every=8, checkpoint_every=12, evaluate_every=12, monitor="gauc_ctcvr"),
        ),
        reordered=ReorderedConfig(searches=160, answers=12, rejected=6, **of_phase),
        interactions=InteractionsConfig(**of_phase),
    ),
    optim=optim,
    training=LoopConfig(steps=48, log_every=12, checkpoint_every=24, evaluate_every=0),
    decoding=DecodingConfig(beam_width=16, batch_size=32),
    validation=EvaluationConfig(split="valid", max_users=40),
    evaluation=EvaluationConfig(cutoffs=(1, 5, 10), baselines=False, shown_users=2),
)
