"""A trained model that recommends: histories in, ranked items out, by beam search over the catalogue's trie.

For a catalogue that changes while it is served (`jaxrec.decoding.live`) it makes the arrays of every version: rows of
items that came later are made of their codes, attributes and embedding, as all rows are; where the model has a vector
for every item, theirs is the mean.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import UserError
from jaxrec.data import features
from jaxrec.data.features import FeatureConfig
from jaxrec.decoding.beam import beam_search, expand_items
from jaxrec.decoding.filters import Allowed, ItemFilter, ItemOrder, stack
from jaxrec.decoding.live import Version
from jaxrec.decoding.trie import build_trie
from jaxrec.evaluation.cases import Cases, History
from jaxrec.evaluation.metrics import add, id_accuracy, validity_rate
from jaxrec.models.context import Catalogue
from jaxrec.models.prior import build_prior
from jaxrec.semantic_ids.space import SemanticIdSpace
from jaxrec.systems.onemall_model import Assembly

Item = TypeVar("Item")

PATCH = 1024
"""Rows of items that came later are made so many at once; of more, all rows are made again."""


@dataclass(frozen=True)
class DecodingConfig:
    """Beam search."""

    beam_width: int = 64
    """beams; where more items are asked for, as many beams as items"""
    batch_size: int = 32
    """histories that are decoded together"""


class GenerativeRecommender:
    """Recommends with a trained model. Histories are padded to few shapes: nothing recompiles after a warm-up."""

    def __init__(self, assembly: Assembly, variables: dict, feature_config: FeatureConfig, config: DecodingConfig):
        self.assembly, self.feature_config, self.config = assembly, feature_config, config
        self._variables = variables
        self._signatures: dict[tuple, dict[str, np.ndarray]] = {}

    @functools.cached_property
    def served(self) -> dict:
        """What answers need and no request changes; an argument of the compiled functions, not a constant in them."""
        assembly, space = self.assembly, self.assembly.space
        return {
            "variables": self._variables,
            "catalogue": assembly.catalogue,
            "table": jax.jit(functools.partial(assembly.model.apply, method="item_table"))(
                self._variables, assembly.catalogue
            ),
            "trie": build_trie(space.codes, space.codebook_sizes, order=space.popularity),
        }

    @functools.cached_property
    def order(self) -> ItemOrder:
        """Where items stand in the trie of `served`."""
        return ItemOrder(self.served["trie"])

    @property
    def space(self) -> SemanticIdSpace:
        """The semantic IDs of the items that the model was trained on."""
        return self.assembly.space

    @property
    def variables(self) -> dict:
        """The model's variables: {"params", "balance"}."""
        return self._variables

    def recommend(
        self,
        histories: list[History],
        k: int,
        exclude_seen: bool = False,
        *,
        allowed: Sequence[Allowed] | None = None,
        served: dict | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best items of each history: items int32 [B, k] (-1 = none) and log-probabilities float32 [B, k].

        `exclude_seen` leaves out the target items of the history. Items that share an ID share its score and stand in
        falling popularity. `allowed` says which items each history may get, in the order of the trie of `served`, which
        is that of a version of a live catalogue (`serve_version`) or by default of the trained one.
        """
        served = self.served if served is None else served
        if exclude_seen:
            allowed = self._unseen(histories)
        items = np.full((len(histories), k), -1, np.int32)
        scores = np.full((len(histories), k), -np.inf, np.float32)
        width = max(self.config.beam_width, k)

        def searches():
            for rows, arrays in self._batches(histories):
                few = None if allowed is None else self._stack([allowed[row] for row in rows])
                self._note(arrays, few, width, k)
                yield rows, self._search(served, arrays, few, width, k)

        for rows, search in _one_ahead(searches()):
            found_items, found_scores, nan = jax.device_get(search)
            if nan.any():
                raise FloatingPointError("the model gave NaN; its parameters are damaged, train it again")
            items[rows], scores[rows] = found_items[: len(rows)], found_scores[: len(rows)]
        return items, scores

    def diagnose(self, cases: Cases) -> dict[str, tuple[float, float]]:
        """As (sum, count): accuracy of each level given the true ones before it (OneMall Table 1), and `validity`.

        That is the share of existing IDs among the first 10 of a beam search without the trie.
        """
        sums: dict[str, tuple[float, float]] = {}
        for rows, arrays in self._batches(cases.histories):
            target = np.zeros((self.config.batch_size, cases.targets.shape[1]), np.int32)
            where = np.zeros_like(target, bool)
            target[: len(rows)] = np.where(cases.where[rows], cases.targets[rows], 0)
            where[: len(rows)] = cases.where[rows]
            real = np.arange(self.config.batch_size) < len(rows)
            sums = add(sums, jax.device_get(self._measure(self.served, arrays, target, where, real)))
        return {name: (float(total), float(count)) for name, (total, count) in sums.items()}

    def _batches(self, histories: list[History]):
        """Yields (rows, stacked features): histories of one length bucket, filled up to the batch size."""
        ends = [int(history["session"][-1]) + 1 if len(history["session"]) else 0 for history in histories]
        pairs = list(zip(histories, ends, strict=True))
        buckets = np.array([features.bucket_of(history, end, self.feature_config) for history, end in pairs])
        for bucket in np.unique(buckets):
            group = np.flatnonzero(buckets == bucket)
            for start in range(0, len(group), self.config.batch_size):
                rows = group[start : start + self.config.batch_size]
                cuts = [self._cut(*pairs[row]) for row in rows]
                filled = [cuts[index % len(cuts)] for index in range(self.config.batch_size)]
                yield rows, {name: np.stack([arrays[name] for arrays in filled]) for name in cuts[0]}

    def _cut(self, history: History, end: int) -> dict:
        """The features of everything in a history that ends before session `end`."""
        wanted, behaviors = self.assembly.wanted, len(self.assembly.behaviors)
        return features.cut(history, end, self.feature_config, behaviors=behaviors, wanted=wanted)

    def _unseen(self, histories: list[History]) -> list[Allowed]:
        """What each user doesn't have yet."""
        seen = (history["item"][self.assembly.wanted[history["behavior"]]] for history in histories)
        return [self.order.allowed(blocked=items) for items in seen]

    def _stack(self, requests: list[Allowed]) -> ItemFilter:
        """The filter of a batch, filled up to the batch size."""
        return stack([requests[row % len(requests)] for row in range(self.config.batch_size)])

    def _note(self, arrays: dict, item_filter: ItemFilter | None, width: int, k: int) -> None:
        """Remembers which shapes were asked for, so that `warm_up` can ask for them again."""
        shapes = tuple((name, array.shape) for name, array in arrays.items())
        key = (shapes, item_filter is not None, width, k)
        if key not in self._signatures:
            self._signatures[key] = {name: np.zeros_like(array) for name, array in arrays.items()}

    @functools.partial(jax.jit, static_argnames=("self", "width", "k"))
    def _search(self, served, arrays, allowed, width: int, k: int):
        return self.retrieve(served, arrays, allowed, width, k)

    def retrieve(self, served: dict, arrays: dict, allowed: jax.Array | ItemFilter | None, width: int, k: int):
        """The whole retrieval as a pure function of arrays: what is jitted here and exported by `jaxrec.export`.

        served: as `self.served`; arrays: stacked features of B histories; allowed: bool [B, I], a filter made
        of it, or None for everything.
        Returns items int32 [B, k] (-1 = none), log-probabilities float32 [B, k], and bool [B]: the model gave NaN.
        """
        result = self._beams(served, self._context(served, arrays), allowed, width)
        return *expand_items(served["trie"], result, k=k, allowed=allowed), result.nan

    # ---- a catalogue that changes ------------------------------------------------------------------------------------

    def serve_version(self, version: Version, before: Version | None) -> dict:
        """The arrays of a version of the catalogue, as `served`, with room for more items.

        The first version's rows are those that the model was trained on. A removed item changes no score of the others.
        """
        if before is not None and version.codes is before.codes and version.capacity == before.capacity:
            return {**before.served, "trie": version.trie}
        fresh = before is None or version.capacity != before.capacity
        changed = np.arange(len(version))
        if not fresh:
            same = np.zeros(len(version), bool)
            same[: len(before)] = (version.codes[: len(before)] == before.codes).all(1)
            changed = np.flatnonzero(~same)
        catalogue = self._catalogue(version, None if before is None else before.served["catalogue"].prior)
        if fresh or len(changed) > PATCH:
            table = self._table(version, catalogue, np.arange(version.capacity))
        else:
            rows = np.resize(changed, PATCH)
            table = _put(before.served["table"], rows, self._table(version, catalogue, rows))
        return {"variables": self._variables, "catalogue": catalogue, "table": table, "trie": version.trie}

    def warm_up(self, served: dict) -> None:
        """Runs every search that was asked for so far once, on arrays of zeros: whoever asks next need not wait."""
        for (_, filtered, width, k), arrays in list(self._signatures.items()):
            few = self._stack([ItemOrder(served["trie"]).allowed()]) if filtered else None
            jax.block_until_ready(self._search(served, arrays, few, width, k))

    def _catalogue(self, version: Version, like: Any) -> Catalogue:
        """Trained rows as they were, but for their codes; later ones from what was given; zeros up to the capacity."""
        trained, assembly = self.assembly.catalogue, self.assembly
        first, count = len(trained.codes), len(version)
        later = version.items.slice(first)
        attributes, embeddings = np.asarray(trained.attributes), np.asarray(trained.embeddings)
        given = np.zeros((count - first, embeddings.shape[1]), np.float32)
        if version.embeddings.shape[1]:
            if version.embeddings.shape[1] != given.shape[1]:
                raise UserError(
                    f"embeddings of new items have width {version.embeddings.shape[1]}, those of the run have "
                    f"{given.shape[1]}: give such as its semantic IDs were made of"
                )
            given = np.nan_to_num(version.embeddings)
        more = np.zeros((count - first, attributes.shape[1]), np.int32)
        if len(later) and assembly.attributes_of is not None:
            more = assembly.attributes_of(later)
        weights = assembly.popularity.weights
        # As popular, at any time, as an item that sold so much over the whole log.
        total = (version.popularity[:first] + 1).sum()
        added = np.broadcast_to((version.popularity[first:] + 1) / total, (len(weights), count - first))
        return Catalogue(
            codes=_filled_up(version.codes, version.capacity),
            attributes=_filled_up(np.concatenate([attributes, more]), version.capacity),
            embeddings=_filled_up(np.concatenate([embeddings, given]), version.capacity),
            log_q=_filled_up(np.asarray(trained.log_q), version.capacity),
            prior=build_prior(
                version.codes,
                np.concatenate([weights, added], axis=1),
                assembly.space.codebook_sizes,
                capacity=version.capacity,
                like=like,
            ),
        )

    def _table(self, version: Version, catalogue: Catalogue, rows: np.ndarray) -> jax.Array:
        """The model's vectors of some rows: float32 [n, D]."""
        params = dict(self._variables["params"])
        if "item" in params:
            trained = np.asarray(params["item"]["table"])
            vectors = np.broadcast_to(trained.mean(0), (len(rows), trained.shape[1])).copy()
            vectors[rows < len(trained)] = trained[rows[rows < len(trained)]]
            params["item"] = {"table": jnp.asarray(vectors)}
        columns = (catalogue.codes, catalogue.attributes, catalogue.embeddings, catalogue.log_q)
        some = Catalogue(*(jnp.asarray(np.asarray(column)[rows]) for column in columns))
        return self._make_table({**self._variables, "params": params}, some)

    @functools.partial(jax.jit, static_argnames=("self",))
    def _make_table(self, variables, catalogue):
        model = self.assembly.model.clone(items=len(catalogue.codes))
        return model.apply(variables, catalogue, method="item_table")

    # ---- measuring ---------------------------------------------------------------------------------------------------

    @functools.partial(jax.jit, static_argnames=("self",))
    def _measure(self, served, arrays, target, where, real):
        context = self._context(served, arrays)
        codes = self.assembly.catalogue.codes[target]
        log_probs, cache = self._extend(served, context, None, None, 0)
        log_probs = [jnp.broadcast_to(log_probs, (*target.shape, log_probs.shape[-1]))]
        cache = jax.tree.map(lambda x: jnp.repeat(x, target.shape[1], axis=1), cache)
        for level in range(1, codes.shape[-1]):
            following, cache = self._extend(served, context, codes[..., level - 1], cache, level)
            log_probs.append(following)
        free = self._beams(served, context, None, self.config.beam_width, constrained=False)
        return id_accuracy(log_probs, codes, where) | {
            "validity": validity_rate(free.valid[:, :10], jnp.broadcast_to(real[:, None], free.valid[:, :10].shape))
        }

    def _context(self, served, arrays):
        assembly = self.assembly
        inputs, table = assembly.features(arrays), served["table"]
        return assembly.model.apply(served["variables"], inputs, served["catalogue"], table=table, method="prefill")

    def _extend(self, served, context, tokens, cache, level: int):
        return self.assembly.model.apply(served["variables"], context, tokens, cache, level, method="extend")

    def _beams(self, served, context, allowed, width: int, constrained: bool = True):
        extend = functools.partial(self._extend, served, context)
        batch = context.state.shape[0]
        return beam_search(
            extend, None, served["trie"], batch=batch, beam_width=width, allowed=allowed, constrained=constrained
        )


def _one_ahead(iterator: Iterator[Item]) -> Iterator[Item]:
    """The same elements, each when the next is begun: the host prepares a batch while the device works on another."""
    before: list[Item] = []
    for element in iterator:
        yield from before
        before = [element]
    yield from before


@jax.jit
def _put(table: jax.Array, rows: jax.Array, vectors: jax.Array) -> jax.Array:
    """A copy of the table with other vectors at rows int32 [n], which may repeat with the same vector."""
    return table.at[rows].set(vectors)


def _filled_up(values: np.ndarray, rows: int) -> jax.Array:
    filled = np.zeros((rows, *values.shape[1:]), values.dtype)
    filled[: len(values)] = values
    return jnp.asarray(filled)
