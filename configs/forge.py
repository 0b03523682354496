"""FORGE on Amazon Beauty: TIGER's model on IDs that know what shoppers take together, and that no two items share.

    python train.py configs/forge.py --run runs/forge --data.path DIR

DIR as for configs/tiger.py, of which everything is taken but the IDs: texts are aligned on pairs of items that the same
shoppers took (with a free vector an item), and an item whose ID is taken moves to the nearest free one, which needs no
fourth level. Pairs are of the training split.
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
