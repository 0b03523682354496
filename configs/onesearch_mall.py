"""OneSearch on the synthetic mall, whose best possible recall is known.

    python train.py configs/onesearch_mall.py --run runs/search_mall

Time:    not measured.
Figures: not measured.

A shopper searches for a kind of goods. `best_possible_search` in the run's statistics is what an oracle reaches who
knows the shares of the goods and the searched taste.
"""

from jaxrec.data.search_features import SearchFeatureConfig
from jaxrec.data.sources import SyntheticMall
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.models.personal_search import PromptConfig
from jaxrec.semantic_ids import FsqConfig, ResidualConfig, SemanticIdConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.onesearch.config import ContentConfig, CoOccurrenceConfig, OneSearchConfig
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.text.tokenizer import TokenizerConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

of_tasks = {
    "optim": OptimConfig(learning_rate=2e-3, warmup=30),
    "training": LoopConfig(steps=200, log_every=25, checkpoint_every=200, evaluate_every=0),
}

config = OneSearchConfig(
    data=SyntheticMall(searched=0.6),
    batch_size=64,
    semantic_ids=SemanticIdConfig(ResidualConfig((16, 16)), FsqConfig((2, 2, 2, 2))),
    tokenizer=TokenizerConfig(vocabulary=500),
    # Clicks and stronger are read.
    features=SearchFeatureConfig(buckets=(8,), long_length=64, related=32, popular=32, weakest=2),
    prompt=PromptConfig("items"),
    prior=True,
    model=EncoderDecoderConfig(
        width=96, heads=4, head_dim=24, hidden=192, encoder_layers=2, layers=2, dropout=0.1, scale_head=False
    ),
    content=ContentConfig(**of_tasks),
    co_occurrence=CoOccurrenceConfig(**of_tasks),
    optim=OptimConfig(learning_rate=2e-3, warmup=30),
    training=LoopConfig(steps=300, log_every=25, checkpoint_every=150),
    decoding=DecodingConfig(beam_width=32, batch_size=64),
    evaluation=EvaluationConfig(cutoffs=(1, 5, 10, 50)),
)
