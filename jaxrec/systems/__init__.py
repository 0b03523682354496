"""Systems: each puts the parts together for one published system, from a source to an evaluated run."""

from jaxrec.systems import onemall, rankgr, sequential, tiger

SYSTEMS = {"onemall": onemall, "rankgr": rankgr, "tiger": tiger, "forge": tiger} | dict.fromkeys(
    sequential.NAMES, sequential
)
"""Name -> module with `train(run, config)` and `load_recommender(run)`."""
