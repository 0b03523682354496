"""The mall of `mall_cascade.py` with searches: what a search showed are the candidates; for its training in tests."""

from dataclasses import replace

from mall_cascade import config as sessions

from jaxrec.data.sources import SyntheticMall
from jaxrec.models.ranking.sim import SimConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.ranking.config import RecallConfig
from jaxrec.training.loop import LoopConfig

config = replace(
    sessions,
    data=SyntheticMall(
        *(120, 120, 12, 4, 6), exposures_per_session=2, browsed_per_session=1, searched=0.6, results_per_search=3
    ),
    recall=RecallConfig(("encoder", "popularity in query"), items=40, ranked=20),
    pre_ranking=None,
    ranking=replace(
        sessions.ranking,
        contexts="searches",
        towers=("ctr", "cvr", "ctcvr"),
        model=SimConfig("product", found=8, heads=1, head_dim=8, length=8, unit=8, hidden=(16,)),
    ),
    training=LoopConfig(steps=40, log_every=20, checkpoint_every=20, evaluate_every=20, monitor="gauc_ctcvr"),
    evaluation=EvaluationConfig(cutoffs=(5, 10), max_users=60, shown_users=2, baselines=False),
)
