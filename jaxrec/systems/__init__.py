"""Systems: each puts the parts together for one published system, from a source to an evaluated run.

A system is a package: `config.py` what decides a run, `model.py` the model fitted to a run's items, `training.py` its
losses and batches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxrec.evaluation.baselines import Recommender
from jaxrec.run import Run
from jaxrec.systems.onemall import model as onemall_model
from jaxrec.systems.onemall import training as onemall_training
from jaxrec.systems.rankgr import model as rankgr_model
from jaxrec.systems.rankgr import training as rankgr_training
from jaxrec.systems.sequential import model as sequential_model
from jaxrec.systems.sequential import training as sequential_training
from jaxrec.systems.sequential.config import NAMES
from jaxrec.systems.tiger import model as tiger_model
from jaxrec.systems.tiger import training as tiger_training


class System(NamedTuple):
    """How a system is trained and loaded."""

    train: Callable[[Run, Any], None]
    """(run, config): runs every phase that is not done yet, and prints the comparison table"""
    load_recommender: Callable[[Run], Recommender]
    """the trained model of a run, in its best state"""


TIGER = System(tiger_training.train, tiger_model.load_recommender)
SEQUENTIAL = System(sequential_training.train, sequential_model.load_recommender)

SYSTEMS = {
    "onemall": System(onemall_training.train, onemall_model.load_recommender),
    "rankgr": System(rankgr_training.train, rankgr_model.load_recommender),
    "tiger": TIGER,
    "forge": TIGER,
} | dict.fromkeys(NAMES, SEQUENTIAL)
"""By the name that a configuration gives as its `system`."""
