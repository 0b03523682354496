"""OneMall's model, fitted to one catalogue: what training, decoding and evaluation share.

For a catalogue that changes while it is served (`jaxrec.catalogue.live`) it makes the arrays of every version: rows of
items that came later are made of their codes, attributes and embedding, as all rows are; where the model has a vector
for every item, theirs is the mean.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import struct
from jax.sharding import Mesh

from jaxrec.catalogue.version import Version
from jaxrec.data.attributes import attribute_indices, later_attribute_indices
from jaxrec.data.features import AGES, FeatureConfig, cut
from jaxrec.data.popularity import PopularityByPeriod, read_popularity
from jaxrec.models.cross_decoder import (
    CatalogueArrays,
    ContextFeatures,
    CrossContext,
    CrossDecoder,
    CrossInputs,
    EventSequence,
)
from jaxrec.models.prior import Prior, build_prior
from jaxrec.run import Run
from jaxrec.semantic_ids.files.vectors import EMBEDDINGS, read_embeddings
from jaxrec.systems.generative import read_items
from jaxrec.systems.onemall.config import OneMallConfig
from jaxrec.systems.recommender import Served, filled_up, with_later_embeddings
from jaxrec.targets import SemanticIdSpace
from jaxrec.training.sharding import init_sharded, shapes_of

PATCH = 1024
"""Rows of items that came later are made so many at once; of more, all rows are made again."""


@struct.dataclass(kw_only=True)
class OneMallServed(Served):
    """OneMall's arrays: of all items what the model reads, and its vector of each."""

    catalogue: CatalogueArrays
    table: jax.Array
    """float32 [I, D]"""


@dataclass(frozen=True, eq=False)
class OneMallAssembly:
    """The model, fitted to the items of a run."""

    model: CrossDecoder
    catalogue: CatalogueArrays
    space: SemanticIdSpace
    popularity: PopularityByPeriod
    examples: Any
    """folder of the example records"""
    wanted: np.ndarray
    """bool [behaviors]: the target behaviors"""
    attributes_of: Callable[[pa.Table], np.ndarray] | None = None
    """the attributes int32 [n, A] of items that come later; None: all missing"""
    folder: Path | None = None
    """the run directory"""

    @property
    def behaviors(self) -> tuple[str, ...]:
        """Names, weakest first."""
        return self.model.behaviors

    @property
    def target_behaviors(self) -> list[int]:
        """Indices of the target behaviors."""
        return np.flatnonzero(self.wanted).tolist()

    def inputs(
        self,
        catalogue: CatalogueArrays,
        arrays: dict[str, jax.Array],
        table: jax.Array | None = None,
        where: jax.Array | None = None,
    ) -> CrossInputs:
        """The model's input from the flat arrays of `jaxrec.data.features.cut`, stacked to batches.

        table and where as for `CrossInputs`.
        """

        def sequence(name: str) -> EventSequence:
            return EventSequence(arrays[f"{name}_item"], arrays[f"{name}_age"], arrays[f"{name}_mask"])

        history = {behavior: sequence(f"history_{index}") for index, behavior in enumerate(self.behaviors)}
        period = self.popularity.period(arrays["day"])
        features = ContextFeatures(history, sequence("past"), arrays["habit"], arrays["user"], period)
        return CrossInputs(features, catalogue, table, where)

    def init(self, seed: int, mesh: Mesh | None = None) -> dict:
        """Fresh variables {"params", "balance"}: made on the devices where they stay, if there is a mesh."""

        catalogue = shapes_of(self.catalogue)

        def make():
            empty = {name: np.zeros(0, np.int32) for name in ("item", "behavior", "timestamp", "session")}
            shortest = FeatureConfig(buckets=(8,))
            arrays = cut({**empty, "now": 0}, 0, shortest, behaviors=len(self.behaviors), wanted=self.wanted)
            inputs = self.inputs(catalogue, jax.tree.map(lambda x: jnp.asarray(x)[None], arrays))
            targets = jnp.zeros((1, 1, self.space.levels), jnp.int32)
            return self.model.lazy_init(jax.random.key(seed), inputs, targets)

        return init_sharded(make, mesh)

    # ---- what the recommender asks for -------------------------------------------------------------------------------

    def serve(self, variables: dict, version: Version | None = None, before: Version | None = None) -> OneMallServed:
        """The arrays of the trained catalogue, or of a version.

        Trained rows are as they were, but for their codes; later ones are made of what was given with them.
        """
        if version is None:
            table = _make_table(self.model, variables, self.catalogue)
            return OneMallServed(variables=variables, catalogue=self.catalogue, table=table)
        changed = np.arange(len(version))
        if before is not None:
            same = np.zeros(len(version), bool)
            same[: len(before)] = (version.codes[: len(before)] == before.codes).all(1)
            changed = np.flatnonzero(~same)
        catalogue = self._catalogue(version, None if before is None else before.served.catalogue.prior)
        if before is None or len(changed) > PATCH:
            table = self.table(variables, catalogue, np.arange(version.capacity))
        else:
            rows = np.resize(changed, PATCH)
            table = _put(before.served.table, rows, self.table(variables, catalogue, rows))
        return OneMallServed(variables=variables, catalogue=catalogue, table=table)

    def context(self, served: OneMallServed, arrays: dict[str, jax.Array]) -> CrossContext:
        """B contexts from stacked arrays of `jaxrec.data.features.cut`."""
        return self.model.apply(served.variables, self.inputs(served.catalogue, arrays, served.table), method="prefill")

    def extend(self, served: OneMallServed, context: CrossContext, tokens: jax.Array | None, cache: Any, level: int):
        """One more code for every beam."""
        return self.model.apply(served.variables, context, tokens, cache, level, method="extend")

    def rescore(self, served: OneMallServed, context: CrossContext, likelihood_weight: float) -> None:
        """None: beams are ranked by their log-probabilities."""

    def table(self, variables: dict, catalogue: CatalogueArrays, rows: np.ndarray) -> jax.Array:
        """The model's vectors of some rows: float32 [n, D]."""
        params = dict(variables["params"])
        if "item" in params:
            trained = np.asarray(params["item"]["table"])
            vectors = np.broadcast_to(trained.mean(0), (len(rows), trained.shape[1])).copy()
            vectors[rows < len(trained)] = trained[rows[rows < len(trained)]]
            params["item"] = {"table": jnp.asarray(vectors)}
        columns = (catalogue.codes, catalogue.attributes, catalogue.embeddings, catalogue.log_q)
        some = CatalogueArrays(*(jnp.asarray(np.asarray(column)[rows]) for column in columns))
        return _make_table(self.model, {**variables, "params": params}, some)

    def _catalogue(self, version: Version, like: Prior | None) -> CatalogueArrays:
        """Trained rows as they were, but for their codes; later ones from what was given; zeros up to the capacity."""
        trained = self.catalogue
        first, count = len(trained.codes), len(version)
        later = version.items.slice(first)
        attributes = np.asarray(trained.attributes)
        embeddings = with_later_embeddings(np.asarray(trained.embeddings), version)
        more = np.zeros((count - first, attributes.shape[1]), np.int32)
        if len(later) and self.attributes_of is not None:
            more = self.attributes_of(later)
        weights = self.popularity.weights
        # As popular, at any time, as an item that sold so much over the whole log.
        total = (version.popularity[:first] + 1).sum()
        added = np.broadcast_to((version.popularity[first:] + 1) / total, (len(weights), count - first))
        return CatalogueArrays(
            codes=filled_up(version.codes, version.capacity),
            attributes=filled_up(np.concatenate([attributes, more]), version.capacity),
            embeddings=filled_up(embeddings, version.capacity),
            log_q=filled_up(np.asarray(trained.log_q), version.capacity),
            prior=build_prior(
                version.codes,
                np.concatenate([weights, added], axis=1),
                self.space.codebook_sizes,
                capacity=version.capacity,
                like=like,
            ),
        )


def assemble(run: Run, config: OneMallConfig) -> OneMallAssembly:
    """Reads the catalogue of a run and shapes the model to it.

    Raises:
      UserError: a file is missing or doesn't fit the items, or an attribute is no column of the items table.
    """
    items = pq.read_table(run.tables / "items.parquet")
    item_ids, counts, space, behaviors, wanted = read_items(run, config)
    attributes, sizes = attribute_indices(items, config.attributes)
    lately = read_popularity(run.tables, len(items), config.data.target_behaviors, config.popularity)
    # One event more for everybody, so that an item nobody took in training has a finite log-probability.
    log_q = np.log((counts + 1) / (counts + 1).sum())
    catalogue = CatalogueArrays(
        codes=jnp.asarray(space.codes, jnp.int32),
        attributes=jnp.asarray(attributes, jnp.int32),
        embeddings=jnp.asarray(read_embeddings(run.semantic_ids / EMBEDDINGS, item_ids)),
        log_q=jnp.asarray(log_q, jnp.float32),
        prior=build_prior(space.codes, lately.weights, space.codebook_sizes),
    )
    model = CrossDecoder(config.model, behaviors, space.codebook_sizes, sizes, len(items), AGES)
    later = functools.partial(later_attribute_indices, items.select(list(config.attributes)), config.attributes)
    return OneMallAssembly(model, catalogue, space, lately, run.examples, wanted, later, run.path)


# The model is its sizes; an assembly, with its arrays, would be kept alive by the compiled function.
@functools.partial(jax.jit, static_argnums=0)
def _make_table(model: CrossDecoder, variables: dict, catalogue: CatalogueArrays) -> jax.Array:
    return model.clone(items=len(catalogue.codes)).apply(variables, catalogue, method="item_table")


@jax.jit
def _put(table: jax.Array, rows: jax.Array, vectors: jax.Array) -> jax.Array:
    """A copy of the table with other vectors at rows int32 [n], which may repeat with the same vector."""
    return table.at[rows].set(vectors)
