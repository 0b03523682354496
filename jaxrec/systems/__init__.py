"""Systems: each puts the parts together for one published system, from a source to an evaluated run."""

from jaxrec.systems import onemall, rankgr, tiger

SYSTEMS = {"onemall": onemall, "rankgr": rankgr, "tiger": tiger, "forge": tiger}
"""Name -> module with `train(run, config)` and `load_recommender(run)`."""
