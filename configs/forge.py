"""FORGE on Amazon Beauty: TIGER's model on unique IDs with collaborative signal.

    python train.py configs/forge.py --run runs/forge --data.path DIR

Time:    32 minutes of training on one core.
Figures: recall@10 / ndcg@10 .0622 / .0329 with all items ranked, .0686 / .0375 with the history left out, all users,
         one seed.

DIR: a folder in the layout of S3-Rec, as for configs/onemall_beauty.py.
All but the IDs as in configs/tiger.py. Texts are aligned on pairs of items with common users in the training split
(with a free vector an item), and an item whose ID is occupied moves to the nearest free one, so that no fourth level is
needed.
"""

import dataclasses
from pathlib import Path

from jaxrec.config import load_config
from jaxrec.semantic_ids.table.collisions import CollisionConfig
from jaxrec.text.align import AlignConfig

config = dataclasses.replace(
    load_config(Path(__file__).parent / "tiger.py"),
    system="forge",
    align=AlignConfig(),
    collisions=CollisionConfig("nearest_free"),
)
