"""TIGER on Amazon Beauty: leave-one-out, one item a session.

    python train.py configs/tiger.py --run runs/tiger --data.path DIR

Time:    34 to 46 minutes of training on one core.
Figures: recall@10 / ndcg@10 .0528 ± .0019 / .0279 ± .0012 with all items ranked, .0587 ± .0017 / .0320 ± .0012 with
         the history left out, all users, three seeds.

DIR: a folder in the layout of S3-Rec, as for configs/onemall_beauty.py.
IDs as published: an RQ-VAE of 3 x 256 codes on the texts alone, and one more level that numbers the items of an ID. The
model differs from the published one, which takes days on a CPU: it is narrower; a position of the context is an item,
with its own token, instead of a code; the decoder is initialised with the popularity of IDs; and the encoder is causal,
so that one pass over a user's sequence trains on all of its items. The published model is

    --positions codes --own-tokens False --prior False --model.causal False --model.scale-head True --model.heads 6
    --model.head-dim 64 --model.hidden 1024 --model.layers 4 --model.encoder-layers 4 --model.dropout 0.1
    --objective.without-user 0
"""

from pathlib import Path

from jaxrec.data.item_sequences import ItemSequenceConfig
from jaxrec.data.sources import SequenceText
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.systems.tiger.config import TigerConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = TigerConfig(
    data=SequenceText(path=Path("beauty")),
    batch_size=128,
    features=ItemSequenceConfig((3, 4, 6, 9, 13, 20)),
    positions="items",
    own_tokens=True,
    prior=True,
    model=EncoderDecoderConfig(
        width=128,
        heads=4,
        head_dim=32,
        hidden=512,
        encoder_layers=3,
        layers=2,
        dropout=0.2,
        decoder_dropout=0.1,
        causal=True,
        # T5's head of unit variance needs a learning rate ten times as high.
        scale_head=False,
    ),
    optim=OptimConfig(learning_rate=2e-3, warmup=200, weight_decay=0.05),
    # No early stopping, so that the learning rate decays to the end; the best state on validation is kept.
    training=LoopConfig(steps=6000, log_every=50, checkpoint_every=1000, evaluate_every=1000, patience=0),
    decoding=DecodingConfig(beam_width=32, batch_size=64),
    # Beams of 500 for all 22,363 users would take longer than the training; 0 evaluates all of them.
    evaluation=EvaluationConfig(max_users=5000),
)
