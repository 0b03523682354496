"""OneMall on a shop's own export, with sizes that its data decide: docs/own_data.md.

    python train.py configs/shop.py --check --data.path EXPORT        # what the columns are, what is dropped, how long
    python train.py configs/shop.py --run runs/shop --data.path EXPORT

Time:    --check estimates it; some minutes on two cores for a shop of a few thousand purchases.
Figures: none to expect of other people's data; the table at the end has the baselines beside the model.

Any field of the command line holds in place of what the data decide, such as --training.steps 500.
"""

import dataclasses
from pathlib import Path

from jaxrec.data.features import FeatureConfig
from jaxrec.data.sources import Folder
from jaxrec.models.cross_decoder import CrossDecoderConfig
from jaxrec.semantic_ids import FsqConfig, ResidualConfig, SemanticIdConfig
from jaxrec.systems.check_data import check_attributes, look
from jaxrec.systems.onemall.config import OneMallConfig
from jaxrec.systems.sizes import sizes_of
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

config = OneMallConfig(data=Folder(Path("my_shop")), attributes=("category", "brand", "price"))


def complete(config: OneMallConfig) -> OneMallConfig:
    """The configuration with the sizes for its data (`jaxrec.systems.sizes`)."""
    counts = look(config)
    check_attributes(config, counts)
    sizes = sizes_of(counts["items"], counts["users"], counts["train_targets"])
    weaker = len(config.data.behaviors) - len(config.data.target_behaviors)
    return dataclasses.replace(
        config,
        batch_size=sizes.batch,
        semantic_ids=SemanticIdConfig(ResidualConfig((sizes.codes,) * 2), FsqConfig((2,) * sizes.digits)),
        features=FeatureConfig(
            history_lengths=(*sizes.buckets[::-1][:2][-weaker:], sizes.history) if weaker else (sizes.history,),
            past_length=sizes.buckets[-1],
            targets=16,
            target_sessions=3,
            buckets=sizes.buckets,
        ),
        model=CrossDecoderConfig(
            width=sizes.width,
            heads=sizes.heads,
            hidden=2 * sizes.width,
            experts=sizes.experts,
            queries=sizes.queries,
            recent=sizes.buckets[1],
            item_embedding=sizes.item_vectors,
            dropout=sizes.dropout,
            context_dropout=sizes.context_dropout,
        ),
        optim=OptimConfig(warmup=sizes.warmup),
        training=LoopConfig(
            steps=sizes.steps, log_every=max(1, sizes.steps // 20), checkpoint_every=max(1, sizes.steps // 5)
        ),
    )
