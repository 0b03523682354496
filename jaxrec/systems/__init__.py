"""Systems: each puts the parts together for one published system, from a source to an evaluated run."""

from jaxrec.systems import onemall, sequential, tiger

SYSTEMS = {"onemall": onemall, "tiger": tiger, "forge": tiger} | dict.fromkeys(sequential.NAMES, sequential)
"""Name -> module with `train(run, config)` and `load_recommender(run)`."""
