"""RankGR's model, fitted to one catalogue: what training, decoding and evaluation share."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from jaxrec.catalogue.version import Version
from jaxrec.config import UserError, from_json, to_json
from jaxrec.data.features import AGES
from jaxrec.decoding.beam import Candidates, Rescore, reorder
from jaxrec.files import read_json, write_json
from jaxrec.models.causal import CausalConfig
from jaxrec.models.huggingface import load_qwen2
from jaxrec.models.prior import Prior, popularity_prior
from jaxrec.models.rankgr import RankContext, RankGR, RankGRConfig, RankInputs
from jaxrec.run import Run
from jaxrec.semantic_ids.files.vectors import EMBEDDINGS, read_embeddings
from jaxrec.systems.generative import read_items
from jaxrec.systems.rankgr.config import RankGRRunConfig, checked_levels
from jaxrec.systems.recommender import Served, filled_up, with_later_embeddings, with_later_prior
from jaxrec.targets import SemanticIdSpace
from jaxrec.training.sharding import init_sharded, shapes_of

BACKBONE = "backbone.json"
"""In the folder of the training: the sizes of the model, which can then be loaded without the pretrained weights."""


@struct.dataclass
class RankGRCatalogue:
    """What a training step reads of all items: codes int32 [I, M]; embeddings float32 [I, E] and the prior, or None."""

    codes: jax.Array
    embeddings: jax.Array | None = None
    prior: Prior | None = None


@struct.dataclass(kw_only=True)
class RankGRServed(Served):
    """RankGR's arrays: codes and vectors of all items, and the prior if the decoder begins with it."""

    codes: jax.Array
    """int32 [I, M]"""
    table: jax.Array
    """float32 [I, D], as histories hold the items"""
    vectors: jax.Array | None
    """[I, D], what a rank head of "softmax" compares states with; None for the other rank heads"""
    prior: Prior | None


@dataclass(frozen=True, eq=False)
class RankGRAssembly:
    """The model, fitted to the items of a run."""

    model: RankGR
    space: SemanticIdSpace
    behaviors: tuple[str, ...]
    """names, weakest first"""
    wanted: np.ndarray
    """bool [behaviors]: the target behaviors"""
    levels: np.ndarray
    """int [behaviors]: the level of each in the order of preference, from 0"""
    counts: np.ndarray
    """int64 [I]: how often each item was taken in training"""
    examples: Any = None
    """folder of the example records"""
    pretrained: dict | None = None
    """parameters that the backbone is initialised with"""
    embeddings: np.ndarray | None = None
    """float32 [I, E] that the IDs were made of, if the model reads them"""
    prior: Prior | None = None
    """the popularity of IDs, if it is added to the decoder's logits"""

    @property
    def target_behaviors(self) -> list[int]:
        """Indices of the target behaviors."""
        return np.flatnonzero(self.wanted).tolist()

    @property
    def positive(self) -> int:
        """The lowest level of a target behavior: items of this level or above are positives."""
        return int(self.levels[self.wanted].min())

    @property
    def catalogue(self) -> RankGRCatalogue:
        """What a training step reads of the items."""
        embeddings = None if self.embeddings is None else jnp.asarray(self.embeddings)
        return RankGRCatalogue(jnp.asarray(self.space.codes, jnp.int32), embeddings, self.prior)

    def init(self, seed: int, mesh: Mesh | None = None) -> dict:
        """Fresh variables {"params"}, with the pretrained backbone in them if there is one."""
        catalogue = shapes_of(self.catalogue)

        def make():
            one = jnp.zeros((1, 1), jnp.int32)
            arrays = {"item": one, "behavior": one, "gap": one, "mask": jnp.ones((1, 1), bool)}
            targets = jnp.zeros((1, 1, self.space.levels), jnp.int32)
            return self.model.lazy_init(jax.random.key(seed), self.inputs(catalogue, arrays), targets)

        fresh = init_sharded(make, mesh)
        # Outside of the compiled function, of which gigabytes of weights would be constants.
        return {"params": with_pretrained(fresh["params"], self.pretrained, seed)}

    def inputs(
        self, catalogue: RankGRCatalogue, arrays: dict[str, jax.Array], table: jax.Array | None = None
    ) -> RankInputs:
        """The model's input from stacked arrays of `LeveledSessionConfig.cut`; table as for `RankInputs`."""
        history = (arrays[name] for name in ("item", "behavior", "gap", "mask"))
        return RankInputs(*history, catalogue.codes, catalogue.embeddings, table, catalogue.prior)

    # ---- what the recommender asks for -------------------------------------------------------------------------------

    def serve(self, variables: dict, version: Version | None = None, before: Version | None = None) -> RankGRServed:
        """All items' vectors, of later ones made of their codes.

        Where items have vectors of their own, those that came later have the mean.
        """
        codes, embeddings, prior = self.space.codes.astype(np.int32), self.embeddings, self.prior
        if version is not None:
            prior = with_later_prior(prior, version, before)
            codes = filled_up(version.codes.astype(np.int32), version.capacity)
            if embeddings is not None:
                embeddings = filled_up(with_later_embeddings(embeddings, version), version.capacity)
        params = dict(variables["params"])
        if "item" in params and version is not None:
            own = np.asarray(params["item"]["table"])
            more = np.broadcast_to(own.mean(0), (len(codes) - len(own), own.shape[1]))
            params["item"] = {"table": jnp.concatenate([own, more])}
        codes, vectors = jnp.asarray(codes), None
        table = _item_table(self.model.clone(items=len(codes)), {"params": params}, codes, embeddings)
        if self.model.config.rank.loss == "softmax":
            vectors = self.model.apply(variables, table, method="item_vectors")
        return RankGRServed(variables=variables, codes=codes, table=table, vectors=vectors, prior=prior)

    def context(self, served: RankGRServed, arrays: dict[str, jax.Array]) -> RankContext:
        """B contexts from stacked arrays of `LeveledSessionConfig.cut`."""
        inputs = self.inputs(RankGRCatalogue(served.codes, prior=served.prior), arrays, served.table)
        return self.model.apply(served.variables, inputs, method="prefill")

    def extend(self, served: RankGRServed, context: RankContext, tokens: jax.Array | None, cache: Any, level: int):
        """One more code for every beam."""
        return self.model.apply(served.variables, context, tokens, cache, level, method="extend")

    def rescore(self, served: RankGRServed, context: RankContext, likelihood_weight: float) -> Rescore | None:
        """The rank head's scores in the beam (RankGR Eq. 18), or the items' at the end of it."""
        config = self.model.config.rank
        if config.loss == "none":
            return None
        variables, last = served.variables, self.space.levels - 1
        if config.loss == "softmax":
            query = self.model.apply(variables, context.own.state[:, 0], method="item_query")

            def by_item(candidates: Candidates, cache: dict) -> jax.Array:
                if candidates.level < last:
                    return candidates.log_probs
                first, _ = served.trie.leaf_ranges(jnp.maximum(candidates.nodes, 0))
                vectors = served.vectors[served.trie.items.at[first].get(mode="clip")]
                scores = jnp.einsum("BD,BCD->BC", query, vectors).astype(jnp.float32)
                return scores + likelihood_weight * candidates.log_probs

            return by_item
        memory = self.model.apply(variables, context, method="memory")

        def by_codes(candidates: Candidates, cache: dict) -> jax.Array:
            level = candidates.level
            # Once a beam, and a row of it for each of its candidates.
            prefixes = self.model.apply(variables, cache["states"], method="prefixes")
            prefixes = reorder(prefixes, candidates.parents)
            codes = jnp.maximum(candidates.codes[..., -1:], 0)
            alive = candidates.log_probs > -jnp.inf
            log_probs = jnp.where(alive, candidates.log_probs - candidates.parent_log_probs, 0.0)[..., None]
            logits = self.model.apply(variables, context, memory, prefixes, codes, log_probs, level, method="rank")
            scores = candidates.parent_scores + jax.nn.log_sigmoid(logits[..., 0])
            return scores + likelihood_weight * log_probs[..., 0]

        return by_codes


@functools.partial(jax.jit, static_argnums=0)
def _item_table(model: RankGR, variables: dict, codes: jax.Array, embeddings: Any) -> jax.Array:
    return model.apply(variables, codes, embeddings, method="item_table")


def assemble(run: Run, config: RankGRRunConfig, folder: Path | None = None) -> RankGRAssembly:
    """Reads the IDs of a run and shapes the model to them; `folder` is that of a training that has begun.

    Raises:
      UserError: a file is missing or doesn't fit the items, an item has no semantic ID, the levels don't fit the
        behaviors, no behavior is read, items share IDs that the rank head takes for one item's, or the folder with
        pretrained weights isn't one of a Qwen2.
    """
    item_ids, counts, space, behaviors, wanted = read_items(run, config)
    levels = checked_levels(config)
    _check(config, space)
    backbone, pretrained = config.model.backbone, None
    known = None if folder is None else folder / BACKBONE
    if known is not None and known.exists():
        backbone = from_json(CausalConfig, read_json(known))
    elif config.pretrained:
        loaded, pretrained = load_qwen2(config.pretrained)
        kept = ("dropout", "target_dropout", "dtype", "restrict")
        backbone = replace(loaded, **{name: getattr(backbone, name) for name in kept})
    backbone = fit_vocabulary(backbone, space.codebook_sizes)
    model = RankGR(replace(config.model, backbone=backbone), len(item_ids), len(behaviors), AGES)
    embeddings = read_embeddings(run.semantic_ids / EMBEDDINGS, item_ids) if config.model.embeddings else None
    prior = popularity_prior(space.codes, counts, space.codebook_sizes) if config.model.prior else None
    return RankGRAssembly(model, space, behaviors, wanted, levels, counts, run.examples, pretrained, embeddings, prior)


def _check(config: RankGRRunConfig, space: SemanticIdSpace) -> None:
    # Only where it matters: the distinct IDs of a large catalogue take their time.
    if config.model.rank.loss == "softmax" and (shared := len(space.codes) - len(space.ids)):
        raise UserError(
            f"configuration key 'model.rank.loss': softmax scores one item an ID, but {shared} of {len(space.codes)} "
            'items have another one\'s; set collisions.policy to "nearest_free", or model.rank.loss to bce'
        )


def fit_vocabulary(config: CausalConfig, sizes: tuple[int, ...]) -> CausalConfig:
    """The configuration with a vocabulary of the codes alone, a slice for every level; histories hold no words."""
    offsets = np.cumsum([0, *sizes])
    levels = tuple(zip(offsets[:-1].tolist(), sizes, strict=True))
    return replace(config, vocabulary=int(offsets[-1]), levels=levels)


def with_pretrained(params: dict, pretrained: dict | None, seed: int) -> dict:
    """Fresh parameters with those of a Qwen2 in their place, on their devices; codes begin near the mean of its words.

    Its words themselves are left out: histories hold none.
    """
    if pretrained is None:
        return params
    tables, fresh = ("embed", "head"), params["backbone"]
    known = {name: pretrained[name] for name in fresh if name not in tables}
    for index, name in enumerate(tables):
        if name in fresh:
            words = np.asarray(pretrained.get(name, pretrained["embed"])["table"], np.float32)
            noise = np.random.default_rng([seed, index]).standard_normal(fresh[name]["table"].shape, np.float32)
            known[name] = {"table": words.mean(0) + words.std(0) * noise}
    placed = jax.tree.map(lambda old, new: jax.device_put(np.asarray(new, old.dtype), old.sharding), fresh, known)
    return {**params, "backbone": placed}


def write_backbone(folder: Path, config: RankGRConfig) -> None:
    """Notes the sizes of the model beside its checkpoints."""
    write_json(folder / BACKBONE, to_json(config.backbone))


def assemble_trained(run: Run, config: RankGRRunConfig) -> RankGRAssembly:
    """As `assemble`, of a trained run; the pretrained weights are not needed any more."""
    return assemble(run, config, run.path / run.training)
