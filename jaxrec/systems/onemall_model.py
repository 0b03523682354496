"""OneMall's model, fitted to one catalogue: what training, decoding and evaluation share."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh

from jaxrec.data.attributes import attribute_indices, later_attribute_indices
from jaxrec.data.features import AGES, FeatureConfig, cut
from jaxrec.data.popularity import PopularityByPeriod, read_popularity
from jaxrec.models.context import Catalogue, Features, Sequence
from jaxrec.models.cross_decoder import CrossDecoder
from jaxrec.models.prior import build_prior
from jaxrec.run import Run
from jaxrec.semantic_ids.space import SemanticIdSpace, read_codes
from jaxrec.semantic_ids.vectors import EMBEDDINGS, read_embeddings
from jaxrec.training.sharding import init_sharded

if TYPE_CHECKING:
    from jaxrec.systems.onemall import OneMallConfig


@dataclass(frozen=True, eq=False)
class Assembly:
    """The model and the catalogue that it speaks of."""

    model: CrossDecoder
    catalogue: Catalogue
    space: SemanticIdSpace
    popularity: PopularityByPeriod
    examples: Any
    """folder of the example records"""
    wanted: np.ndarray
    """bool [behaviors]: the target behaviors"""
    attributes_of: Callable[[pa.Table], np.ndarray] | None = None
    """the attributes int32 [n, A] of items that come later; None: all missing"""

    @property
    def behaviors(self) -> tuple[str, ...]:
        """Names, weakest first."""
        return self.model.behaviors

    @property
    def target_behaviors(self) -> list[int]:
        """Indices of the target behaviors."""
        return np.flatnonzero(self.wanted).tolist()

    def features(self, arrays: dict[str, jax.Array]) -> Features:
        """The model's input from the flat arrays of `jaxrec.data.features.cut`, stacked to batches."""

        def sequence(name: str) -> Sequence:
            return Sequence(arrays[f"{name}_item"], arrays[f"{name}_age"], arrays[f"{name}_mask"])

        history = {behavior: sequence(f"history_{index}") for index, behavior in enumerate(self.behaviors)}
        period = self.popularity.period(arrays["day"])
        return Features(history, sequence("past"), arrays["habit"], arrays["user"], period)

    def init(self, seed: int, mesh: Mesh | None = None) -> dict:
        """Fresh variables {"params", "balance"}: made on the devices where they stay, if there is a mesh."""

        def make():
            empty = {name: np.zeros(0, np.int32) for name in ("item", "behavior", "timestamp", "session")}
            shortest = FeatureConfig(buckets=(8,))
            arrays = cut({**empty, "now": 0}, 0, shortest, behaviors=len(self.behaviors), wanted=self.wanted)
            features = self.features(jax.tree.map(lambda x: jnp.asarray(x)[None], arrays))
            return self.model.init(jax.random.key(seed), features, jnp.zeros((1, 1), jnp.int32), self.catalogue)

        return nn.unbox(jax.jit(make)()) if mesh is None else init_sharded(make, mesh)


def assemble(run: Run, config: "OneMallConfig") -> Assembly:
    """Reads the catalogue of a run and shapes the model to it.

    Raises:
      UserError: a file is missing or doesn't fit the items, or an attribute is no column of the items table.
    """
    items = pq.read_table(run.tables / "items.parquet")
    counts = items["count"].to_numpy()
    item_ids = items["item_id"].to_pylist()
    space = read_codes(run.semantic_ids / "codes.parquet", item_ids, counts)
    attributes, sizes = attribute_indices(items, config.attributes)
    lately = read_popularity(run.tables, len(items), config.data.target_behaviors, config.popularity)
    # One event more for everybody, so that an item nobody took in training has a finite log-probability.
    log_q = np.log((counts + 1) / (counts + 1).sum())
    catalogue = Catalogue(
        codes=jnp.asarray(space.codes, jnp.int32),
        attributes=jnp.asarray(attributes, jnp.int32),
        embeddings=jnp.asarray(read_embeddings(run.semantic_ids / EMBEDDINGS, item_ids)),
        log_q=jnp.asarray(log_q, jnp.float32),
        prior=build_prior(space.codes, lately.weights, space.codebook_sizes),
    )
    behaviors = tuple(config.data.behaviors)
    model = CrossDecoder(config.model, behaviors, space.codebook_sizes, sizes, len(items), AGES)
    wanted = np.isin(behaviors, config.data.target_behaviors)
    later = functools.partial(later_attribute_indices, items.select(list(config.attributes)), config.attributes)
    return Assembly(model, catalogue, space, lately, run.examples, wanted, later)
