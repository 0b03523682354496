"""The catalogue's own distribution over semantic IDs, as the place where a decoder starts.

A decoder with random weights thinks every code equally likely, and spends most of a short training on learning which
IDs exist and how popular they are. Both are known beforehand. The prior is the tree of the catalogue's IDs with the
log-probability of every edge under popularity; added to the decoder's logits, it lets the decoder learn what is
particular to a user. Codes that no item has keep a small probability: what is not in the catalogue is unlikely, not
impossible.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

FLOOR = -12.0  # log-probability of a code that no item has, given the codes before it


@struct.dataclass
class Prior:
    """Per level, the edges of the tree in the order of their parents (compressed rows).

    first int32 [nodes + 2]: where a node's edges begin, the last node having none; tokens int32, children int32, each
    [edges + branching]: the code and the node below every edge; log_probs float32 [P, edges + branching]: the edge's
    log-probability in each period, popularity being a matter of time.
    """

    first: tuple[jax.Array, ...]
    tokens: tuple[jax.Array, ...]
    children: tuple[jax.Array, ...]
    log_probs: tuple[jax.Array, ...]
    sizes: tuple[int, ...] = struct.field(pytree_node=False)
    branching: tuple[int, ...] = struct.field(pytree_node=False)

    def logits(self, level: int, nodes: jax.Array, period: jax.Array | None = None) -> jax.Array:
        """Log-probabilities of the next code: nodes int32 [B, L] and period int32 [B] -> float32 [B, L, K].

        The period is the first by default.
        """
        period = jnp.zeros(nodes.shape[:1], jnp.int32) if period is None else period
        edges, real = self._edges(level, nodes)
        tokens = jnp.where(real, self.tokens[level][edges], self.sizes[level])
        row, column = jnp.arange(nodes.shape[0])[:, None, None], jnp.arange(nodes.shape[1])[:, None]
        dense = jnp.full((*nodes.shape, self.sizes[level]), FLOOR)
        return dense.at[row, column, tokens].set(self.log_probs[level][period[:, None, None], edges], mode="drop")

    def step(
        self, level: int, nodes: jax.Array, tokens: jax.Array, period: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Go down by a code: nodes, tokens int32 [B, L] -> (nodes of the next level, log-probabilities of the edges).

        A code that no item has leads to the last node, which has no edges. The period is the first by default.
        """
        period = jnp.zeros(nodes.shape[:1], jnp.int32) if period is None else period
        edges, real = self._edges(level, nodes)
        match = real & (self.tokens[level][edges] == tokens[..., None])
        edge = jnp.take_along_axis(edges, match.argmax(-1, keepdims=True), axis=-1)[..., 0]
        found = match.any(-1)
        nowhere = len(self.first[level + 1]) - 2 if level + 1 < len(self.sizes) else 0
        log_probs = jnp.where(found, self.log_probs[level][period[:, None], edge], FLOOR)
        return jnp.where(found, self.children[level][edge], nowhere), log_probs

    def after(
        self,
        level: int,
        nodes: jax.Array | None,
        tokens: jax.Array | None,
        shape: tuple[int, int],
        period: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Nodes int32 [B, L] of prefixes that end with tokens int32 [B, L] of level - 1, and the logits after them.

        nodes int32 [B, L] are those of the prefixes without the tokens. At level 0 there are neither, and `shape` is
        (B, L). The period is the first by default.
        """
        nodes = self.step(level - 1, nodes, tokens, period)[0] if level else jnp.zeros(shape, jnp.int32)
        return nodes, self.logits(level, nodes, period)

    def along(self, targets: jax.Array, period: jax.Array | None = None) -> list[jax.Array]:
        """The logits of every level of targets int32 [B, L, M], each after the codes before it: float32 [B, L, K].

        The first level's are [B, 1, K], being the same for all targets, or [1, 1, K] without a period int32 [B], which
        is the first by default.
        """
        nodes = jnp.zeros((1 if period is None else targets.shape[0], 1), jnp.int32)
        found = [self.logits(0, nodes, period)]
        for level in range(1, targets.shape[-1]):
            nodes, _ = self.step(level - 1, nodes, targets[..., level - 1], period)
            found.append(self.logits(level, nodes, period))
        return found

    def _edges(self, level: int, nodes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The edges of each node: int32 [..., branching], and which of these are real."""
        edges = self.first[level][nodes][..., None] + jnp.arange(self.branching[level])
        return edges, edges < self.first[level][nodes + 1][..., None]


def popularity_prior(codes: np.ndarray, counts: np.ndarray, sizes: tuple[int, ...], **room: Any) -> Prior:
    """The prior, of one period, of items with codes int [I, M] that were taken counts int [I] times.

    `room` as for `build_prior`.
    """
    # One event more for everybody, so that an item nobody took has a finite log-probability.
    return build_prior(codes, counts[None] + 1.0, sizes, **room)


def build_prior(
    codes: np.ndarray,
    weights: np.ndarray,
    sizes: tuple[int, ...],
    *,
    capacity: int | None = None,
    like: Prior | None = None,
) -> Prior:
    """The prior of a catalogue: codes int [I, M], popularity by period as weights float [P, I] > 0, codebook sizes.

    With a `capacity` of items the arrays have room for the IDs of so many, so that a larger catalogue has the same
    shapes; its branching is at least that of `like`, an earlier prior.
    """
    order = np.lexsort(codes.T[::-1])
    codes, weights = codes[order], weights[:, order].astype(np.float64)
    parents, fields = np.zeros(len(codes), np.int64), {"first": [], "tokens": [], "children": [], "log_probs": []}
    branching = []
    for level in range(len(sizes)):
        key = parents * sizes[level] + codes[:, level]
        edges, start, node = np.unique(key, return_index=True, return_inverse=True)
        owner = parents[start]
        count = np.bincount(owner)
        mass = np.add.reduceat(weights, start, axis=1)
        above = np.add.reduceat(mass, np.cumsum(count) - count, axis=1)
        width, room = int(count.max()), 0
        if capacity is not None:
            width = max(min(sizes[level], max(8, 2 ** (width - 1).bit_length())), like.branching[level] if like else 0)
            room = min(capacity, math.prod(sizes[: level + 1])) - len(edges)
        branching.append(width)
        pad = (0, width + room)
        # Nodes that are room have no edges, like the last.
        first = np.concatenate([[0], np.cumsum(count), [len(edges)] * (1 + _room(capacity, sizes, level, len(count)))])
        log_probs = np.log(mass) - np.log(above[:, owner])
        fields["first"].append(jnp.asarray(first, jnp.int32))
        fields["tokens"].append(jnp.asarray(np.pad(edges % sizes[level], pad), jnp.int32))
        fields["children"].append(jnp.asarray(np.pad(np.arange(len(edges)), pad), jnp.int32))
        fields["log_probs"].append(jnp.asarray(np.pad(log_probs, ((0, 0), pad)), jnp.float32))
        parents = node.reshape(-1)
    return Prior(
        **{name: tuple(value) for name, value in fields.items()}, sizes=tuple(sizes), branching=tuple(branching)
    )


def _room(capacity: int | None, sizes: tuple[int, ...], level: int, nodes: int) -> int:
    """How many more nodes than there are above a level could be there."""
    return 0 if capacity is None else min(capacity, math.prod(sizes[:level])) - nodes
