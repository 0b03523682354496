"""How good a set of semantic IDs is: conflicts, use of the codes, and what is kept of the embeddings."""

import numpy as np

from jaxrec.semantic_ids.codebooks import Codebooks, decode
from jaxrec.semantic_ids.space import SemanticIdSpace


def quality(
    space: SemanticIdSpace, codebooks: Codebooks, embeddings: np.ndarray, pairs: np.ndarray | None = None
) -> dict:
    """Every figure below, as plain numbers for quality.json.

    embeddings: f32 [I, D], what was encoded. pairs: int [n, 2], items that go together.
    """
    return {
        "items": len(space.codes),
        "codebook_sizes": list(space.codebook_sizes),
        "distinct_ids": len(space.ids),
        **collisions(space),
        "levels": [level_use(space.codes[:, level], size) for level, size in enumerate(space.codebook_sizes)],
        "reconstruction_error": reconstruction_error(space.codes, codebooks, embeddings),
        "neighbour_recall@10": neighbour_recall(space.codes, codebooks, embeddings),
        **({} if pairs is None or not len(pairs) else {"pairs_sharing_prefix": shared_prefixes(space.codes, pairs)}),
    }


def collisions(space: SemanticIdSpace) -> dict[str, float]:
    """How far IDs tell items apart (OneMall Table 5).

    `conflict_rate`: share of items whose ID another item has too. `exclusive_rate`: share of distinct IDs that belong
    to exactly one item. The paper gives no formulas; under this reading its 36% / 86% and 11% / 95% fit together: with
    I items, (1 - conflict) I IDs are exclusive, hence .64 / .86 = .74 I distinct IDs, of which .10 I are shared
    by .36 I items, 3.5 each; and .89 / .95 leaves .05 I IDs for .11 I items, 2.3 each.
    `largest_bucket`: items under the most crowded ID.
    """
    alone = space.counts == 1
    return {
        "conflict_rate": float(1 - alone.sum() / len(space.codes)),
        "exclusive_rate": float(alone.mean()),
        "largest_bucket": int(space.counts.max()),
    }


def level_use(codes: np.ndarray, size: int) -> dict[str, float]:
    """Use of one level's codes int [I]: share used at all, entropy in bits beside its most, items under the fullest."""
    counts = np.bincount(codes, minlength=size)
    share = counts[counts > 0] / counts.sum()
    return {
        "use": float((counts > 0).mean()),
        "entropy_bits": float(-(share * np.log2(share)).sum()),
        "most_bits": float(np.log2(size)),
        "largest": int(counts.max()),
    }


def reconstruction_error(codes: np.ndarray, codebooks: Codebooks, embeddings: np.ndarray) -> list[float]:
    """Share of the embeddings' variance that the first 1, 2, ... M levels leave unexplained."""
    variance = np.maximum(((embeddings - embeddings.mean(0)) ** 2).sum(), 1e-12)
    return [
        float(((embeddings - decode(codebooks, codes[:, :m])) ** 2).sum() / variance)
        for m in range(1, codes.shape[1] + 1)
    ]


def neighbour_recall(
    codes: np.ndarray, codebooks: Codebooks, embeddings: np.ndarray, k: int = 10, most: int = 1000
) -> float:
    """Share of items' k nearest neighbours that are still among the k nearest when IDs stand for the embeddings.

    Over at most `most` evenly spaced items; distances are Euclidean, ties go to the lower index.
    """
    sample = np.linspace(0, len(codes) - 1, min(len(codes), most)).astype(int)
    k = min(k, len(codes) - 1)
    true, kept = (_nearest(x, sample, k) for x in (embeddings, decode(codebooks, codes)))
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(true, kept, strict=True)])) if k else 1.0


def shared_prefixes(codes: np.ndarray, pairs: np.ndarray) -> dict[str, list[float]]:
    """Share of pairs [n, 2] whose IDs agree in their first 1, 2, ... M codes, and the same for random pairs."""

    def agree(left, right):
        return np.logical_and.accumulate(codes[left] == codes[right], axis=1).mean(0).tolist()

    rng = np.random.default_rng(0)
    return {"pairs": agree(pairs[:, 0], pairs[:, 1]), "random": agree(*rng.integers(0, len(codes), (2, 100_000)))}


def _nearest(x: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """The k nearest other rows of each of `rows`, int [len(rows), k]."""
    nearest = []
    for start in range(0, len(rows), 256):
        some = rows[start : start + 256]
        distances = (x**2).sum(1) - 2 * x[some] @ x.T
        distances[np.arange(len(some)), some] = np.inf
        nearest.append(np.argsort(distances, axis=1, kind="stable")[:, :k])
    return np.concatenate(nearest)
