"""RankGR from semantic IDs alone on Amazon Beauty: no text embeddings in the item vectors, no prior.

    python train.py configs/rankgr_ids.py --run runs/rankgr_ids --data.path DIR

Time:    not measured.
Figures: not measured.

DIR: a folder in the layout of S3-Rec, as for configs/onemall_beauty.py.
All else as in configs/rankgr.py. Compare it with that configuration for the effect of embeddings and prior, and with
configs/sasrec_ce.py for the architecture: their inputs are the same. The pair with both inputs is configs/rankgr.py and
configs/sasrec_text.py. Its semantic IDs are quantized text embeddings too.
"""

import dataclasses
from pathlib import Path

from jaxrec.config import load_config

_rankgr = load_config(Path(__file__).parent / "rankgr.py")
config = dataclasses.replace(_rankgr, model=dataclasses.replace(_rankgr.model, embeddings=False, prior=False))
