"""A trained model that recommends: histories in, ranked items out, by beam search over the catalogue's trie."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.data import features
from jaxrec.data.features import FeatureConfig
from jaxrec.decoding.beam import beam_search, expand_items
from jaxrec.decoding.trie import build_trie
from jaxrec.evaluation.cases import Cases, History
from jaxrec.evaluation.metrics import add, id_accuracy, validity_rate
from jaxrec.systems.onemall_model import Assembly

Item = TypeVar("Item")


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
        space = assembly.space
        self.assembly, self.feature_config, self.config = assembly, feature_config, config
        make_table = jax.jit(functools.partial(assembly.model.apply, method="item_table"))
        # What answers need and no request changes; an argument of the compiled functions, not a constant in them.
        self.served = {
            "variables": variables,
            "catalogue": assembly.catalogue,
            "table": make_table(variables, assembly.catalogue),
            "trie": build_trie(space.codes, space.codebook_sizes, order=space.popularity),
        }

    @property
    def variables(self) -> dict:
        """The model's variables: {"params", "balance"}."""
        return self.served["variables"]

    def recommend(self, histories: list[History], k: int, exclude_seen: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The k best items of each history: items int32 [B, k] (-1 = none) and log-probabilities float32 [B, k].

        `exclude_seen` leaves out the target items of the history. Items that share an ID share its score and stand in
        falling popularity.
        """
        items = np.full((len(histories), k), -1, np.int32)
        scores = np.full((len(histories), k), -np.inf, np.float32)
        width = max(self.config.beam_width, k)

        def searches():
            for rows, arrays in self._batches(histories):
                allowed = self._allowed([histories[row] for row in rows]) if exclude_seen else None
                yield rows, self._search(self.served, arrays, allowed, width, k)

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

    def _allowed(self, histories: list[History]) -> np.ndarray:
        """bool [B, I]: what each user doesn't have yet; the rows that fill the batch allow everything."""
        allowed = np.ones((self.config.batch_size, len(self.assembly.catalogue.codes)), bool)
        for row, history in enumerate(histories):
            allowed[row, history["item"][self.assembly.wanted[history["behavior"]]]] = False
        return allowed

    @functools.partial(jax.jit, static_argnames=("self", "width", "k"))
    def _search(self, served, arrays, allowed, width: int, k: int):
        return self.retrieve(served, arrays, allowed, width, k)

    def retrieve(self, served: dict, arrays: dict, allowed: jax.Array | None, width: int, k: int):
        """The whole retrieval as a pure function of arrays: what is jitted here and exported by `jaxrec.export`.

        served: as `self.served`; arrays: stacked features of B histories; allowed: bool [B, I] or None for everything.
        Returns items int32 [B, k] (-1 = none), log-probabilities float32 [B, k], and bool [B]: the model gave NaN.
        """
        result = self._beams(served, self._context(served, arrays), allowed, width)
        return *expand_items(served["trie"], result, k=k, allowed=allowed), result.nan

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
