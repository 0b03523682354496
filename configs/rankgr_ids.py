"""RankGR from semantic IDs alone on Amazon Beauty: without text embeddings in its items' vectors and without a prior.

    python train.py configs/rankgr_ids.py --run runs/rankgr_ids --data.path DIR

All else is configs/rankgr.py's. It shows what those two give, and stands beside configs/sasrec_ce.py, which has neither;
configs/sasrec_text.py has both. The semantic IDs themselves are made of the text embeddings in either.
"""

import dataclasses
from pathlib import Path

from jaxrec.config import load_config

_rankgr = load_config(Path(__file__).parent / "rankgr.py")
config = dataclasses.replace(_rankgr, model=dataclasses.replace(_rankgr.model, embeddings=False, prior=False))
