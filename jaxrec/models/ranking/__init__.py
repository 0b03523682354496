"""Ranking models: one context, many candidates, a logit of each candidate for every tower (DIN, DCN-v2, SIM).

towers.py   the model: inputs, one of the three below, towers
inputs.py   what is known of candidates, history, query and time
din.py      target attention over the latest events
dcn.py      cross network over all features
sim.py      a search in the whole history, then exact attention over what was found
"""
