"""A tiny catalogue, contexts and assembly for the tests of OneMall's model and recommender."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.data.features import AGES, FeatureConfig, cut
from jaxrec.data.popularity import PopularityByPeriod
from jaxrec.models.cross_decoder import CatalogueArrays, CrossDecoder, CrossDecoderConfig
from jaxrec.models.prior import build_prior
from jaxrec.systems.onemall.model import OneMallAssembly
from jaxrec.targets import SemanticIdSpace

BEHAVIORS = ("click", "purchase")
SIZES = (4, 3, 2)
ITEMS = 20
DAY = 86_400
NOW = 1_702_000_000
FEATURES = FeatureConfig(history_lengths=(6,), past_length=6, targets=4, buckets=(6,))
MODEL = CrossDecoderConfig(width=16, heads=2, layers=2, hidden=16, experts=4, queries=2, recent=4, item_queries=2)


def make_assembly(config: CrossDecoderConfig = MODEL) -> OneMallAssembly:
    """Twenty items under fewer IDs, so that some share one, with rising and equal popularity."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, SIZES, (ITEMS, len(SIZES))).astype(np.int32)
    codes[17:] = codes[3]  # four items share an ID
    popularity = rng.integers(0, 5, ITEMS)
    attributes = rng.integers(0, (3, 5), (ITEMS, 2)).astype(np.int32)
    log_q = np.log((popularity + 1) / (popularity + 1).sum()).astype(np.float32)
    # Two periods of very different popularity; make_history asks in either.
    lately = PopularityByPeriod(np.exp(2 * rng.normal(size=(2, ITEMS))), NOW // DAY, 5)
    prior = build_prior(codes, lately.weights, SIZES)
    catalogue = CatalogueArrays(
        codes=jnp.asarray(codes),
        attributes=jnp.asarray(attributes),
        embeddings=jnp.asarray(rng.normal(size=(ITEMS, 6)), jnp.float32),
        log_q=jnp.asarray(log_q),
        prior=prior,
    )
    model = CrossDecoder(config, BEHAVIORS, SIZES, (3, 5), ITEMS, AGES)
    space = SemanticIdSpace(codes, SIZES, popularity)
    return OneMallAssembly(model, catalogue, space, lately, None, np.array([False, True]))


def make_variables(assembly: OneMallAssembly) -> dict:
    """Random variables, each decided by its name, so that distributions are far from uniform and no bias is zero.

    `assembly.init` would have to be compiled.
    """

    def draw(path, shape):
        name = jax.tree_util.keystr(path)
        noise = 0.3 * np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape.shape)
        return jnp.asarray(noise + name.endswith("['scale']"), jnp.float32)

    return jax.tree.map_with_path(draw, jax.eval_shape(lambda: assembly.init(0)))


def make_history(seed: int, events: int) -> dict:
    """What a user did, as `recommend` takes it."""
    rng = np.random.default_rng(seed)
    session = np.sort(rng.integers(0, 1 + events // 2, events)).astype(np.int32)
    return {
        "item": rng.integers(0, ITEMS, events).astype(np.int32),
        "behavior": rng.integers(0, 2, events).astype(np.int8),
        "timestamp": 1_700_000_000 + 50_000 * session.astype(np.int64),
        "session": session,
        "now": np.int64(NOW + 7 * DAY * (seed % 2)),
    }


def make_arrays(
    histories: list[dict], assembly: OneMallAssembly, features: FeatureConfig = FEATURES
) -> dict[str, np.ndarray]:
    """The stacked feature arrays of histories, before the session that would follow."""
    cuts = [cut(each, 10**6, features, behaviors=len(BEHAVIORS), wanted=assembly.wanted) for each in histories]
    return {name: np.stack([each[name] for each in cuts]) for name in cuts[0]}
