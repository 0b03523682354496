"""SASRec with RankGR's inputs on Amazon Beauty: text embeddings and a popularity prior.

    python train.py configs/sasrec_text.py --run runs/sasrec_text --data.path DIR

Time:    not measured.
Figures: not measured.

DIR: a folder in the layout of S3-Rec, as for configs/onemall_beauty.py.
All else as in configs/sasrec_ce.py. An item's vector is the sum of its own row and a projection of its aligned text
embedding, the one that configs/rankgr.py quantizes; the log-probability of the item under popularity is added to its
score.
"""

import dataclasses
from pathlib import Path

from jaxrec.config import load_config

_sasrec = load_config(Path(__file__).parent / "sasrec_ce.py")
config = dataclasses.replace(
    _sasrec, system="sasrec_text", model=dataclasses.replace(_sasrec.model, embeddings=True, prior=True)
)
