"""Ranking metrics: Recall, HR, NDCG and MRR at several cutoffs, all as (sum, count) pairs.

A ranking is an array of answers by number, best first, -1 where it has ended: of items by their indices, or of texts by
the numbers that their target space gives them, equal numbers for one text in any spelling (`jaxrec.targets`).
Everything follows from one matrix: which positions of the ranking are hits. Sums and counts add up over batches and
hosts; divide once, at the end (`mean`). Hits count items, never semantic IDs: an ID shared by several items is expanded
to its items before it comes here.
"""

from collections.abc import Sequence

import numpy as np

from jaxrec.config import UserError

CUTOFFS = (5, 10, 50, 100, 500)
METRICS = ("recall", "hr", "ndcg", "mrr")

SumCount = tuple[float, int]


def mean(pair: SumCount) -> float:
    """sum / count; 0 if count is 0."""
    total, count = pair
    return float(total) / float(count) if count else 0.0


def hit_matrix(ranked: np.ndarray, targets: np.ndarray, where: np.ndarray) -> np.ndarray:
    """bool [U, k]: the positions of `ranked` int32 [U, k] that hold a target of int32 [U, L] where `where` bool [U, L].

    A repeated item hits once, at its first position; -1 never hits.

    Raises:
      UserError: the numbers of users differ, or `where` is not shaped like `targets`.
    """
    if np.ndim(ranked) != 2 or np.ndim(targets) != 2 or len(ranked) != len(targets) or where.shape != targets.shape:
        raise UserError(
            f"ranked {list(np.shape(ranked))}, targets {list(np.shape(targets))} and where {list(np.shape(where))} do "
            "not fit: give rankings [users, k], and targets and where [users, L] with a row for each of these users"
        )
    hits = np.zeros(ranked.shape, bool)
    for target, keep in zip(targets.T, where.T, strict=True):
        hits |= (ranked == target[:, None]) & keep[:, None]
    hits &= ranked >= 0
    rows, positions = np.nonzero(hits)
    # nonzero is row-major, so the first index from unique is the best position of the item in its row.
    _, first = np.unique(np.stack([rows, ranked[rows, positions]]), axis=1, return_index=True)
    once = np.zeros_like(hits)
    once[rows[first], positions[first]] = True
    return once


def recall_at(hits: np.ndarray, num_targets: np.ndarray, k: int) -> np.ndarray:
    """f64 [U]: hits among the first k / number of targets; 0 where there is no target."""
    return hits[:, :k].sum(1) / np.maximum(num_targets, 1)


def hit_rate_at(hits: np.ndarray, num_targets: np.ndarray, k: int) -> np.ndarray:
    """f64 [U]: 1 where any of the first k is a target (HR@k, OneMall Table 1)."""
    return hits[:, :k].any(1).astype(np.float64)


def ndcg_at(hits: np.ndarray, num_targets: np.ndarray, k: int) -> np.ndarray:
    """f64 [U]: sum of 1/log2(1 + rank) over the hits, divided by the same for an ideal ranking of min(k, targets)
    hits."""
    discounts = 1.0 / np.log2(np.arange(k) + 2.0)
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])[np.minimum(num_targets, k)]
    gains = hits[:, :k] @ discounts[: hits.shape[1]]
    return np.divide(gains, ideal, out=np.zeros_like(gains), where=ideal > 0)


def mrr_at(hits: np.ndarray, num_targets: np.ndarray, k: int) -> np.ndarray:
    """f64 [U]: 1 / rank of the first hit among the first k, 0 without one."""
    top = hits[:, :k]
    return np.where(top.any(1), 1.0 / (top.argmax(1) + 1.0), 0.0) if top.shape[1] else np.zeros(len(hits))


PER_USER = dict(zip(METRICS, (recall_at, hit_rate_at, ndcg_at, mrr_at), strict=True))


def ranking_metrics(
    ranked: np.ndarray, targets: np.ndarray, where: np.ndarray, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, SumCount]:
    """All metrics of METRICS at all cutoffs, e.g. `{"recall@10": (sum over users, number of users), ...}`.

    `ranked` int32 [U, k] with -1 = none, `targets` int32 [U, L] distinct within a row, `where` bool [U, L]. A user
    without a target (an all-masked row) adds 0 to sum and count. A cutoff beyond k uses all k positions. UserError as
    for `hit_matrix`.
    """
    hits = hit_matrix(ranked, targets, where)
    num_targets = where.sum(1)
    count = int((num_targets > 0).sum())
    return {
        f"{name}@{k}": (float(per_user(hits, num_targets, k).sum()), count)
        for name, per_user in PER_USER.items()
        for k in cutoffs
    }


def graded_ndcg_at(ranked: np.ndarray, items: np.ndarray, gains: np.ndarray, k: int) -> np.ndarray:
    """f64 [U]: NDCG@k of graded answers, as trec_eval: sum of gain / log2(1 + rank) over the best possible sum.

    ranked int32 [U, n] with -1 = none; items int32 [U, L] are judged, distinct within a row, -1 in the padding; gains
    f32 [U, L] >= 0. Items without a judgment have the gain 0; a repeated item counts at its first position. 0 where no
    gain is above 0.
    """
    discounts = 1.0 / np.log2(np.arange(k) + 2.0)
    place, there = _places(ranked, items)
    rows, positions = np.nonzero(there)
    _, first = np.unique(np.stack([rows, ranked[rows, positions]]), axis=1, return_index=True)
    rows, positions = rows[first], positions[first]
    found = np.zeros(ranked.shape)
    found[rows, positions] = gains[rows, place[rows, positions]]
    ideal = -np.sort(-np.where(items >= 0, gains, 0), axis=1)
    best, reached = (values[:, :k] @ discounts[: values.shape[1]] for values in (ideal, found))
    return np.divide(reached, best, out=np.zeros(len(ranked)), where=best > 0)


def condensed(ranked: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Rankings int32 [U, n] without the answers that are not in items int32 [U, L], the others moved up; -1 behind.

    Condensed lists (Sakai, 2007): no answer is counted as irrelevant only because nobody judged it.
    """
    _, keep = _places(ranked, items)
    order = np.argsort(~keep, axis=1, kind="stable")
    return np.take_along_axis(np.where(keep, ranked, -1), order, axis=1)


def _places(ranked: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each answer of ranked [U, n] stands in its row of items [U, L], int64 [U, n], and whether it does, bool."""
    size = max(ranked.max(initial=0), items.max(initial=0)) + 2
    asked, known = (np.arange(len(rows))[:, None] * size + rows + 1 for rows in (ranked.astype(np.int64), items))
    order = np.argsort(known, axis=None)
    flat = known.ravel()[order]
    row = np.minimum(np.searchsorted(flat, asked), max(len(flat) - 1, 0))
    there = (flat[row] == asked) & (ranked >= 0) if len(flat) else np.zeros(ranked.shape, bool)
    return (order[row] % items.shape[1] if len(flat) else np.zeros(ranked.shape, np.int64)), there


def add(left: dict[str, SumCount], right: dict[str, SumCount]) -> dict[str, SumCount]:
    """Adds (sum, count) pairs key by key; keys of one side only are kept."""
    zero = (0.0, 0)
    return {
        key: (left.get(key, zero)[0] + right.get(key, zero)[0], left.get(key, zero)[1] + right.get(key, zero)[1])
        for key in {**left, **right}
    }


def id_accuracy(log_probs: Sequence, codes, where) -> dict[str, tuple]:
    """Teacher-forced accuracy@1 of every level of a semantic ID (Acc-SID1..M, OneMall Table 1), as (sum, count).

    `log_probs`: one [..., K_m] array a level (or logits), computed given the true codes of the earlier levels; `codes`
    int32 [..., M]; `where` bool [...]. NumPy or traced JAX arrays.

    Raises:
      UserError: the leading dimensions differ.
    """
    for shape in (where.shape, *(scores.shape[:-1] for scores in log_probs)):
        if shape != codes.shape[:-1]:
            raise UserError(
                f"codes {list(codes.shape)} and where {list(where.shape)} do not fit log_probs of "
                f"{[list(scores.shape) for scores in log_probs]}: give all of them the same dimensions but for the last"
            )
    return {
        f"acc_sid{level + 1}": (((scores.argmax(-1) == codes[..., level]) & where).sum(), where.sum())
        for level, scores in enumerate(log_probs)
    }


def token_accuracy(log_probs: Sequence, tokens, where) -> tuple:
    """Teacher-forced accuracy@1 of the tokens of texts, as (sum, count) over all tokens.

    `log_probs`: one [..., V] array a token (logits will do), each computed given the true tokens before; `tokens` int32
    [..., M]; `where` bool [..., M].
    """
    right = [(scores.argmax(-1) == tokens[..., place]) & where[..., place] for place, scores in enumerate(log_probs)]
    return sum(each.sum() for each in right), where.sum()


def validity_rate(valid, where=None) -> tuple:
    """(sum, count) of the generated targets that are listed: `valid` bool [B, W], of those where `where` bool [B, W].

    UserError if the shapes differ.
    """
    if where is None:
        return valid.sum(), valid.size
    if where.shape != valid.shape:
        raise UserError(
            f"where {list(where.shape)} is not shaped like valid {list(valid.shape)}: give one value a target"
        )
    return (valid & where).sum(), where.sum()
