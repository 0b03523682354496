"""Systems: each puts the parts together for one published system, from a source to an evaluated run."""

from jaxrec.systems import onemall, sequential

SYSTEMS = {"onemall": onemall} | dict.fromkeys(sequential.NAMES, sequential)
"""Name -> module with `train(run, config)` and `load_recommender(run)`."""
