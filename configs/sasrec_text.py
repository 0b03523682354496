"""SASRec with what RankGR has beside the events, text embeddings and a popularity prior, on Amazon Beauty.

    python train.py configs/sasrec_text.py --run runs/sasrec_text --data.path DIR

All else is configs/sasrec_ce.py's. An item's vector is its own row and a projection of its aligned text embedding, the
one that semantic IDs are made of in configs/rankgr.py; the log-probability of an item under popularity is added to its
score.
"""

import dataclasses
from pathlib import Path

from jaxrec.config import load_config

_sasrec = load_config(Path(__file__).parent / "sasrec_ce.py")
config = dataclasses.replace(
    _sasrec, system="sasrec_text", model=dataclasses.replace(_sasrec.model, embeddings=True, prior=True)
)
