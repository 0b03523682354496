"""Quality of a set of semantic IDs: conflicts, use of the codes, and how well they preserve the embeddings.

Most figures need only the IDs, so they compare any quantizers, or IDs made elsewhere. Those of the loss need embeddings
and a function that decodes a prefix.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate
from operator import mul

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import UserError
from jaxrec.console import track
from jaxrec.semantic_ids.table.space import SemanticIds

Decode = Callable[[np.ndarray], np.ndarray]
"""Prefixes of IDs int32 [n, m], m <= M, to their decoded embeddings, f32 [n, D]."""
CHUNK_ROWS = 65_536
SEARCH_ROWS = 4096
"""Rows searched for neighbours at once; their distances to all queries stay in cache."""


def quality(
    space: SemanticIds,
    embeddings: np.ndarray | None = None,
    decode: Decode | None = None,
    pairs: np.ndarray | None = None,
) -> dict:
    """Every figure below, as plain numbers for quality.json; those without their input are left out.

    embeddings: f32 [I, D], the encoded embeddings. decode: decodes a prefix. pairs: int [n, 2], pairs of related items.

    Raises:
      UserError: there are no items, or not one embedding an item.
    """
    items = len(space.codes)
    if not items:
        raise UserError("there are no semantic IDs to measure: codes has no rows; tokenize a catalogue with items")
    if embeddings is not None and len(embeddings) != items:
        raise UserError(f"{len(embeddings)} embeddings do not fit {items} IDs: give one embedding an item")
    figures = {
        "items": items,
        "codebook_sizes": list(space.codebook_sizes),
        "distinct_ids": len(space.ids),
        **collisions(space.counts),
        "independent_coding_rate": independent_coding_rate(space.counts),
        "levels": [level_use(space.codes[:, level], size) for level, size in enumerate(space.codebook_sizes)],
        "prefixes": prefix_use(space),
        "bucket_sizes": bucket_sizes(space.counts),
    }
    if embeddings is not None:
        if decode is not None:
            figures["reconstruction_error"] = reconstruction_error(space.codes, embeddings, decode)
        figures |= neighbour_recall(space, embeddings, decode)
    if pairs is not None and len(pairs):
        figures["pairs_sharing_prefix"] = shared_prefixes(space, pairs)
    return figures


def collisions(counts: np.ndarray) -> dict[str, float]:
    """Collision figures, from the number of items of each ID in use, int [distinct].

    `conflict_rate`: share of items that share their ID with another item. `exclusive_rate`: share of IDs in use that
    belong to exactly one item (both OneMall Table 5). The paper gives no formulas; under this reading its 36% / 86% and
    11% / 95% fit together: with I items, (1 - conflict) I IDs are exclusive, hence .64 / .86 = .74 I distinct IDs, of
    which .10 I are shared by .36 I items, 3.5 each; and .89 / .95 leaves .05 I IDs for .11 I items, 2.3 each.

    `duplicate_rate`: 1 - distinct IDs / I, the usual "collision rate" of published ID tables. `largest_bucket`: items
    of the most crowded ID.
    """
    alone = int((counts == 1).sum())
    items = int(counts.sum())
    return {
        "conflict_rate": 1 - alone / items,
        "exclusive_rate": alone / len(counts),
        "duplicate_rate": 1 - len(counts) / items,
        "largest_bucket": int(counts.max()),
    }


def independent_coding_rate(counts: np.ndarray) -> float:
    """OneSearch's ICR (Tables 2 and 3), read as the share of IDs in use that belong to one item; counts as above.

    The paper gives no formula, and only this reading is consistent with one catalogue for all rows of Table 2.
    With 4096-1024-512 codes its CUR of 1.64%, 7.03% (last level balanced) and 0.51% (all balanced) of 2^31 IDs are 35,
    151 and 11 million IDs in use, so I >= 151 million; their ICR is 43.32%, 68.08% and 33.47%. Were ICR the distinct
    IDs over the items, I would be 81, 222 and 33 million; were it the share of items with an ID of their own, the last
    row would have at most 11 / .3347 = 33 million items. As a share of the IDs it implies only
    I >= (2 - .6808) 151 = 199 million. It equals `exclusive_rate`, under the name that readers of OneSearch know.
    """
    return float((counts == 1).mean())


def level_use(codes: np.ndarray, size: int) -> dict[str, float]:
    """Use of one level's codes int [I] of `size`: share in use, entropy in bits and its maximum, Gini, fullest."""
    counts = np.bincount(codes, minlength=size)
    return {
        "use": float((counts > 0).mean()),
        "entropy_bits": entropy(counts),
        "most_bits": math.log2(size),
        "gini": gini(counts),
        "largest": int(counts.max()),
    }


def prefix_use(space: SemanticIds) -> list[dict[str, float]]:
    """Figures of the IDs cut to their first 1, 2, ... M codes: those of `collisions`, and three more.

    `distinct`: prefixes in use. `utilization`: their share of all possible prefixes (OneSearch's CUR of L1, L1*L2, ...,
    total). `entropy_bits`: information of the prefix about an item; log2 I if IDs are unique.
    """
    capacities = accumulate(space.codebook_sizes, mul)  # Python integers: five levels of 8192 overflow int64.
    return [
        {
            "distinct": len(counts),
            "utilization": len(counts) / capacity,
            "entropy_bits": entropy(counts),
            **collisions(counts),
        }
        for counts, capacity in zip(prefix_counts(space), capacities, strict=True)
    ]


def prefix_counts(space: SemanticIds) -> Iterator[np.ndarray]:
    """Items under each prefix of 1, 2, ... M codes that is in use, in rising order of the prefix, int64 [prefixes]."""
    for begins in _prefix_begins(space.ids).T:
        yield np.add.reduceat(space.counts, np.flatnonzero(begins))


def bucket_sizes(counts: np.ndarray) -> list[dict[str, int]]:
    """Histogram of how crowded IDs are, from the items under each, int [distinct].

    Bins of 1, 2, 3-4, 5-8, 9-16, ... items, each with its IDs and the items under them; empty bins between
    others are kept, so that the list can be plotted directly.
    """
    edges = 2 ** np.arange(int(counts.max()).bit_length() + 1)
    bins = np.searchsorted(edges, counts)
    ids, items = np.bincount(bins), np.bincount(bins, counts)
    return [
        {"from": int(edge) // 2 + 1, "to": int(edge), "ids": int(some), "items": int(under)}
        for edge, some, under in zip(edges, ids, items, strict=False)
    ]


def entropy(counts: np.ndarray) -> float:
    """Shannon entropy in bits of counts int [K]; codes without items add nothing."""
    share = counts[counts > 0] / counts.sum()
    return float((share * np.log2(1 / share)).sum())


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of counts int [K], unused codes among them: 0 when even, 1 - 1 / K with all items on one code.

    The mean absolute difference of two codes drawn with replacement, over twice the mean.
    """
    rising = np.sort(counts)
    total = int(rising.sum())
    weighted = int((np.arange(1, len(rising) + 1) * rising).sum())
    return (2 * weighted - (len(rising) + 1) * total) / (len(rising) * total)


def reconstruction_error(codes: np.ndarray, embeddings: np.ndarray, decode: Decode) -> list[float]:
    """Share of the embeddings' variance that the first 1, 2, ... M levels leave unexplained."""
    mean = embeddings.mean(0, dtype=np.float64).astype(np.float32)
    variance, lost = 0.0, np.zeros(codes.shape[1])
    for start in _tracked(range(0, len(codes), CHUNK_ROWS), "reconstruction error"):
        x, some = embeddings[start : start + CHUNK_ROWS], codes[start : start + CHUNK_ROWS]
        variance += np.sum((x - mean) ** 2, dtype=np.float64)
        lost += [np.sum((x - decode(some[:, : m + 1])) ** 2, dtype=np.float64) for m in range(len(lost))]
    return (lost / (variance or 1.0)).tolist()


def neighbour_recall(
    space: SemanticIds, embeddings: np.ndarray, decode: Decode | None = None, k: int = 10, most: int = 1000
) -> dict[str, float]:
    """Share of items' k nearest neighbours that stay among the k nearest when IDs replace the embeddings.

    Over at most `most` evenly spaced items; distances are Euclidean, ties go to the lower index; 1 for a single item.
    `neighbour_recall@k` (with `decode`): nearest by decoded embedding. `neighbour_recall_by_id@k`: nearest by the ID
    alone, the longest shared prefix first; see `recall_by_prefix`.
    """
    items = len(embeddings)
    names = [f"neighbour_recall@{k}"] * (decode is not None) + [f"neighbour_recall_by_id@{k}"]
    if items == 1:
        return dict.fromkeys(names, 1.0)
    rows = np.linspace(0, items - 1, min(items, most)).astype(int)
    k = min(k, items - 1)
    true = nearest(embeddings, rows, k)
    recalls = [recall_by_prefix(space, rows, true)]
    if decode is not None:
        kept = nearest(np.asarray(decode(space.codes)), rows, k)
        recalls.insert(0, (true[:, :, None] == kept[:, None, :]).any(2))
    return {name: float(recall.mean()) for name, recall in zip(names, recalls, strict=True)}


def recall_by_prefix(space: SemanticIds, rows: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Expected share of `neighbours` among the first k others by length of shared prefix, f64 [n].

    rows: int [n], query items. neighbours: int [n, k], the true neighbours, never the item itself. Items with equally
    long shared prefixes are in random order, and the expectation over all such orders is exact: if `above` items share
    a longer prefix than a neighbour and `tied` an equally long one, the neighbour is found with probability
    (k - above) / tied, clipped to [0, 1].
    """
    k = neighbours.shape[1]
    # Others that share at least 0, 1, ... M codes with each query item, and 0 for M + 1, [n, M + 2].
    begins = _prefix_begins(space.ids)
    leaves = space.leaf[rows]
    sharing = [np.full(len(rows), len(space.codes))]
    sharing += [np.add.reduceat(space.counts, np.flatnonzero(new))[np.cumsum(new)[leaves] - 1] for new in begins.T]
    sharing = np.stack([*sharing, np.ones(len(rows), int)], axis=1) - 1
    shared = np.logical_and.accumulate(space.codes[rows][:, None] == space.codes[neighbours], axis=2).sum(2)
    above = np.take_along_axis(sharing, shared + 1, axis=1)
    tied = np.take_along_axis(sharing, shared, axis=1) - above
    return np.clip((k - above) / tied, 0, 1).mean(1)


def nearest(x: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """The k nearest other rows of x f32 [I, D] for each of `rows`, nearest first, int32 [len(rows), k]; k < I."""
    center = x.mean(0)
    queries = jnp.asarray(x[rows] - center)
    found = (jnp.full((len(rows), k), -jnp.inf), jnp.zeros((len(rows), k), jnp.int32))
    for start in _tracked(range(0, len(x), SEARCH_ROWS), "neighbours"):
        found = _search(found, queries, rows, x[start : start + SEARCH_ROWS] - center, start)
    return np.asarray(found[1])


def shared_prefixes(space: SemanticIds, pairs: np.ndarray) -> dict[str, list[float]]:
    """Share of pairs [n, 2] whose IDs agree in their first 1, 2, ... M codes, and that of all pairs of two items."""
    codes, items = space.codes, len(space.codes)
    agree = np.logical_and.accumulate(codes[pairs[:, 0]] == codes[pairs[:, 1]], axis=1).mean(0)
    chance = [float((counts * (counts - 1)).sum()) / max(items * (items - 1), 1) for counts in prefix_counts(space)]
    return {"pairs": agree.tolist(), "random": chance}


@partial(jax.jit, donate_argnums=0)
def _search(
    found: tuple[jax.Array, jax.Array], queries: jax.Array, rows: jax.Array, some: jax.Array, start: int
) -> tuple[jax.Array, jax.Array]:
    """The nearest so far (negative distances, rows), [n, k] each, and those in `some` rows of x from `start` on."""
    distances = jnp.sum(some * some, axis=1) - 2 * queries @ some.T
    places = jnp.arange(len(some), dtype=jnp.int32) + start
    closeness = jnp.where(places == rows[:, None], -jnp.inf, -distances)
    near, place = jax.lax.top_k(closeness, min(found[0].shape[1], len(some)))
    # Earlier results come first: top_k prefers the first of equal values, which is the lower row.
    both, where = jnp.concatenate([found[0], near], axis=1), jnp.concatenate([found[1], places[place]], axis=1)
    near, place = jax.lax.top_k(both, found[0].shape[1])
    return near, jnp.take_along_axis(where, place, axis=1)


def _prefix_begins(ids: np.ndarray) -> np.ndarray:
    """Where a prefix of 1, 2, ... M codes begins in sorted distinct IDs [distinct, M], same shape."""
    begins = np.ones(ids.shape, bool)
    begins[1:] = np.logical_or.accumulate(ids[1:] != ids[:-1], axis=1)
    return begins


def _tracked(steps: range, what: str) -> Iterable[int]:
    """`steps` under a progress bar, when there are many."""
    return track(steps, what) if len(steps) > 8 else steps
