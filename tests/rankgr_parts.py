"""A tiny catalogue, histories and assembly for the tests of RankGR's model and recommender."""

import dataclasses
import functools

import jax
import numpy as np

from jaxrec.data.features import AGES
from jaxrec.data.leveled_sessions import LeveledSessionConfig
from jaxrec.models.causal import CausalConfig
from jaxrec.models.prior import popularity_prior
from jaxrec.models.rankgr import RankConfig, RankGR, RankGRConfig
from jaxrec.systems.rankgr.config import behavior_levels
from jaxrec.systems.rankgr.model import RankGRAssembly, fit_vocabulary
from jaxrec.targets import SemanticIdSpace

BEHAVIORS = ("exposure", "click", "purchase")
SIZES = (4, 3, 2)
ITEMS = 20
FEATURES = LeveledSessionConfig(buckets=(3, 6), weakest=1, targets=4, next_items=3)
BACKBONE = CausalConfig(width=12, heads=2, groups=1, head_dim=6, hidden=16, layers=2, rotary_base=100.0)
MODEL = RankGRConfig(BACKBONE, rank=RankConfig(heads=2, hidden=10, candidates=3))


@functools.cache
def make_assembly(config: RankGRConfig = MODEL) -> RankGRAssembly:
    """Twenty items under fewer IDs, so that some share one."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, SIZES, (ITEMS, len(SIZES))).astype(np.int32)
    codes[17:] = codes[3]
    counts = rng.integers(0, 5, ITEMS)
    config = dataclasses.replace(config, backbone=fit_vocabulary(config.backbone, SIZES))
    model = RankGR(config, ITEMS, len(BEHAVIORS), AGES)
    wanted = np.array([False, False, True])
    space = SemanticIdSpace(codes, SIZES, counts)
    embeddings = rng.normal(size=(ITEMS, 6)).astype(np.float32) if config.embeddings else None
    levels = behavior_levels((), BEHAVIORS)
    prior = popularity_prior(codes, counts, SIZES) if config.prior else None
    return RankGRAssembly(model, space, BEHAVIORS, wanted, levels, counts, embeddings=embeddings, prior=prior)


@functools.cache
def make_variables(config: RankGRConfig = MODEL) -> dict:
    """Random variables: every parameter matters."""
    params = make_assembly(config).init(0)["params"]
    keys = jax.tree.unflatten(
        jax.tree.structure(params), list(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    )
    return {"params": jax.tree.map(lambda p, key: p + 0.3 * jax.random.normal(key, p.shape), params, keys)}


def make_record(seed: int, events: int) -> dict:
    """What a user did, as `recommend` takes it; any behavior, a few items a session."""
    rng = np.random.default_rng(seed)
    session = np.sort(rng.integers(0, 1 + events // 2, events)).astype(np.int32)
    return {
        "item": rng.integers(0, ITEMS, events).astype(np.int32),
        "behavior": rng.integers(0, 3, events).astype(np.int8),
        "timestamp": 1_700_000_000 + 50_000 * session.astype(np.int64),
        "session": session,
    }


def make_arrays(records: list[dict], features: LeveledSessionConfig) -> dict[str, np.ndarray]:
    """The stacked feature arrays of whole records."""
    cuts = [features.cut(each, 10**6, behaviors=3, wanted=np.array([False, False, True])) for each in records]
    return {name: np.stack([each[name] for each in cuts]) for name in cuts[0]}
