"""Items that share a semantic ID: kept together, moved to the nearest free ID, or numbered by an extra level.

    resolved = resolve(codes, books.sizes, CollisionConfig("nearest_free"), embeddings=x, codebooks=books)
    space = SemanticIds(resolved.codes, resolved.sizes)
    print(describe(resolved.changed))

Items of one ID are ordered by falling popularity, then by index.

`nearest_free` works in passes. The surplus items of an ID search for a free ID under their prefix of M - 1 codes; those
that find none search under the prefix of M - 2 codes, and so on down to the first code, which never changes. Under a
prefix an item takes, level by level as in encoding, the nearest code with room below it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jaxrec.config import UserError
from jaxrec.semantic_ids.quantizers.codebooks import Codebooks, decode
from jaxrec.semantic_ids.quantizers.fsq import Fsq
from jaxrec.semantic_ids.quantizers.fsq import decode as decode_fsq
from jaxrec.semantic_ids.quantizers.opq import Opq
from jaxrec.semantic_ids.quantizers.residual import Residual
from jaxrec.semantic_ids.quantizers.rows import check_rows, check_width
from jaxrec.semantic_ids.table.space import SemanticIds

AT_ONCE = 1 << 22
"""Distances of items to codes computed at once."""
DECODED_AT_ONCE = 1 << 15
ROOM = 1 << 62
"""Replaces capacities beyond int64."""

Distances = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(items [n], their prefixes [n, m]) to the distances of each item to the next codes, f64 [n, K], up to a constant for
each item."""


@dataclass(frozen=True)
class CollisionConfig:
    """Policy for items that share a semantic ID."""

    policy: Literal["keep", "nearest_free", "extra_level"] = "keep"
    """keep: items share the ID, and decoding lists all of them; nearest_free: surplus items move to the nearest free
    ID; extra_level: one more code numbers the items of an ID (TIGER)."""
    capacity: int = 1
    """nearest_free: items that may share an ID."""
    extra_size: int = 0
    """extra_level: codes in that level, so that later items have room; 0: the number of items of the fullest ID."""


class Resolved(NamedTuple):
    """codes int32 [I, M] (one level more with extra_level), the codes in each level, and what changed, for JSON."""

    codes: np.ndarray
    sizes: tuple[int, ...]
    changed: dict


def check(config: CollisionConfig) -> None:
    """UserError when the configuration is invalid."""
    if config.policy not in ("keep", "nearest_free", "extra_level"):
        raise UserError(f"collisions.policy={config.policy!r}: it is one of 'keep', 'nearest_free', 'extra_level'")
    if config.capacity < 1:
        raise UserError(f"collisions.capacity={config.capacity}: let at least one item have an ID")
    if config.extra_size < 0:
        raise UserError(f"collisions.extra_size={config.extra_size}: give 0, or how many items an ID may have")


def resolve(
    codes: np.ndarray,
    sizes: tuple[int, ...],
    config: CollisionConfig,
    embeddings: np.ndarray | None = None,
    codebooks: Codebooks | None = None,
    popularity: np.ndarray | None = None,
    taken: np.ndarray | None = None,
) -> Resolved:
    """Apply a policy to the IDs of items.

    Args:
      codes: int [I, M], as encoded.
      sizes: codes in each level.
      config: the policy.
      embeddings: f32 [I, D], the encoded embeddings; codebooks: their encoder. For nearest_free only.
      popularity: [I], the order of items under an ID; None: by index alone.
      taken: int [J, M], IDs of other items, which keep them ([J, M + 1] with extra_level).
    Returns:
      Codes, sizes and a report of the changes; `describe` turns it into a sentence. Items for which nearest_free finds
      no free ID under their first code keep their ID and are counted as `without_room`.
    Raises:
      UserError: an invalid configuration, arrays that do not fit each other, a code outside its level, or an
        extra level that is too small.
    """
    check(config)
    sizes = tuple(int(size) for size in sizes)
    codes = SemanticIds(np.asarray(codes, np.int32), sizes).codes
    extra = config.policy == "extra_level"
    taken = np.zeros((0, len(sizes) + extra), np.int32) if taken is None else np.asarray(taken, np.int32)
    if taken.ndim != 2 or taken.shape[1] != len(sizes) + extra:
        raise UserError(f"taken IDs of shape {taken.shape} do not fit: {config.policy} has {len(sizes) + extra} levels")
    order = _order(len(codes), popularity)
    before = SemanticIds(np.concatenate([taken[:, : len(sizes)], codes]), sizes).counts
    changed: dict = {"policy": config.policy, "capacity": config.capacity, "extra_size": config.extra_size}
    changed["items"] = len(codes)
    if extra:
        codes, sizes = _number(codes, sizes, config.extra_size, order, taken)
        changed |= {"extra_size": sizes[-1], "moved": 0, "without_room": 0}
    elif config.policy == "nearest_free":
        x = _check_embeddings(codes, embeddings, codebooks)
        codes, moved = _nearest_free(codes, sizes, config.capacity, order, taken, x, codebooks)
        changed |= moved
    else:
        changed |= {"moved": 0, "without_room": 0}
    # Sorting a whole catalogue takes a while, and `keep` has changed nothing.
    after = before if config.policy == "keep" else SemanticIds(np.concatenate([taken, codes]), sizes).counts
    for name, counts in (("before", before), ("after", after)):
        changed |= {f"distinct_{name}": len(counts), f"largest_{name}": int(counts.max(initial=0))}
    return Resolved(codes, sizes, changed)


def describe(changed: dict) -> str:
    """A sentence that says what `resolve` changed."""
    ids = (
        f"{changed['distinct_after']:,} distinct IDs (before: {changed['distinct_before']:,}), "
        f"at most {changed['largest_after']:,} items an ID (before: {changed['largest_before']:,})"
    )
    if changed["policy"] == "extra_level":
        return f"an extra level of {changed['extra_size']:,} codes numbers the items of an ID: {ids}"
    if changed["policy"] == "keep":
        return f"items keep their IDs: {ids}"
    text = f"{changed['moved']:,} of {changed['items']:,} items moved to the nearest free ID"
    if changed["moved"]:
        levels = ", ".join(f"{count:,} from level {level} on" for level, count in changed["moved_at"].items())
        text += (
            f" ({levels}), {changed['extra_error']:.4g} of squared error more each than {changed['error_before']:.4g}"
        )
    if changed["without_room"]:
        text += f"; {changed['without_room']:,} found no room under their first code and stay"
    return f"{text}: {ids}"


def level_vectors(part: Residual | Fsq | Opq) -> list[np.ndarray] | None:
    """One f64 [K, D] a level, if a quantizer decodes to a sum of one vector a level; else None."""
    if isinstance(part, Residual):
        return [np.asarray(centroids, np.float64) for centroids in part.centroids]
    if isinstance(part, Fsq):
        return [np.asarray(decode_fsq(part, np.arange(part.sizes[0])[:, None]), np.float64)]
    if not isinstance(part, Opq):
        return None
    # A sub-space adds its code, rotated back; the sub-spaces are orthogonal.
    ends = np.cumsum([codebook.shape[1] for codebook in part.codebooks])
    axes = np.split(np.asarray(part.rotation, np.float64), ends[:-1], axis=1)
    return [np.asarray(codebook, np.float64) @ some.T for codebook, some in zip(part.codebooks, axes)]


def squared_errors(codebooks: Codebooks, codes: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Squared distances of embeddings x f32 [I, D] to the embeddings that their IDs int [I, M] decode to, f32 [I]."""
    blocks = [slice(start, start + DECODED_AT_ONCE) for start in range(0, len(x), DECODED_AT_ONCE)]
    found = [np.sum((x[some] - decode(codebooks, codes[some])) ** 2, axis=1) for some in blocks]
    return np.concatenate([np.zeros(0, np.float32), *found])


def _order(items: int, popularity: np.ndarray | None) -> np.ndarray:
    """Items by falling popularity, then by index, int64 [I]."""
    if popularity is None:
        return np.arange(items)
    popularity = np.asarray(popularity, np.float64)
    if popularity.shape != (items,) or np.isnan(popularity).any():
        raise UserError(
            f"popularity of shape {popularity.shape} does not fit {items} items: give each one number, and not NaN"
        )
    return np.argsort(-popularity, kind="stable")


def _check_embeddings(codes: np.ndarray, embeddings: np.ndarray | None, codebooks: Codebooks | None) -> np.ndarray:
    if embeddings is None or codebooks is None:
        raise UserError("collisions.policy='nearest_free' needs the items' embeddings and the codebooks: give both")
    x = np.asarray(check_rows(embeddings, 0))
    check_width(x, codebooks.width)
    if len(x) != len(codes):
        raise UserError(f"{len(x)} embeddings do not fit {len(codes)} IDs: give one embedding an item")
    return x


def _groups(rows: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """A number for each distinct row of codes [n, m], int64 [n]; m may be 0."""
    if not rows.shape[1]:
        return np.zeros(len(rows), np.int64)
    return SemanticIds(rows, sizes[: rows.shape[1]]).leaf.astype(np.int64)


def _rank(groups: np.ndarray) -> np.ndarray:
    """The number of earlier rows of the same group, int64 [n]."""
    order = np.argsort(groups, kind="stable")
    first = np.searchsorted(groups[order], groups[order])
    rank = np.empty(len(groups), np.int64)
    rank[order] = np.arange(len(groups)) - first
    return rank


def _number(
    codes: np.ndarray, sizes: tuple[int, ...], extra_size: int, order: np.ndarray, taken: np.ndarray
) -> tuple[np.ndarray, tuple[int, ...]]:
    """One more code for each item: the lowest free numbers under its ID, by falling popularity, then index."""
    levels = len(sizes)
    groups = _groups(np.concatenate([taken[:, :levels], codes]), sizes)
    theirs, mine = groups[: len(taken)], groups[len(taken) :][order]
    # Under an ID with the taken numbers t0 < t1 < ..., the free number of rank r is r + the number of t_j - j <= r.
    pairs = np.unique(theirs << 32 | taken[:, levels])
    below = pairs - _rank(pairs >> 32)
    rank = _rank(mine)
    passed = np.searchsorted(below, mine << 32 | rank, side="right") - np.searchsorted(below, mine << 32)
    numbers = np.empty(len(codes), np.int32)
    numbers[order] = rank + passed
    needed = max(int(numbers.max(initial=0)), int(taken[:, levels].max(initial=0))) + 1
    if extra_size and needed > extra_size:
        fullest = codes[numbers.argmax()] if len(codes) else taken[taken[:, levels].argmax(), :levels]
        raise UserError(
            f"collisions.extra_size={extra_size} is too small: the ID <{','.join(map(str, fullest))}> needs {needed} "
            f"numbers; tokenize with an extra_size of at least {needed}"
        )
    return np.concatenate([codes, numbers[:, None]], axis=1), (*sizes, extra_size or needed)


def _nearest_free(
    codes: np.ndarray,
    sizes: tuple[int, ...],
    capacity: int,
    order: np.ndarray,
    taken: np.ndarray,
    x: np.ndarray,
    codebooks: Codebooks,
) -> tuple[np.ndarray, dict]:
    """The codes after the moves, and the report of them."""
    # Under each ID the first few have a place: `taken` IDs, then items in order.
    everyone = np.concatenate([taken, codes[order]])
    has_place = _rank(_groups(everyone, sizes)) < capacity
    occupied, surplus = everyone[has_place], order[~has_place[len(taken) :]]
    moved = codes.copy()
    waiting, moved_at = surplus, {}
    for kept in range(len(sizes) - 1, min(1, len(sizes) - 1) - 1, -1):
        found, waiting = _pass(moved, waiting, kept, sizes, capacity, occupied, x, codebooks)
        occupied = np.concatenate([occupied, moved[found]])
        if len(found):
            moved_at[str(kept + 1)] = len(found)
    went = np.setdiff1d(surplus, waiting)
    report = {"moved": len(went), "without_room": len(waiting), "moved_at": moved_at}
    if len(went):
        before, after = (squared_errors(codebooks, some[went], x[went]) for some in (codes, moved))
        report["error_before"] = float(before.mean(dtype=np.float64))
        report["extra_error"] = float((after - before).mean(dtype=np.float64))
    return moved, report


def _pass(
    codes: np.ndarray,
    waiting: np.ndarray,
    kept: int,
    sizes: tuple[int, ...],
    capacity: int,
    occupied: np.ndarray,
    x: np.ndarray,
    codebooks: Codebooks,
) -> tuple[np.ndarray, np.ndarray]:
    """Moves items under their first `kept` codes where there is room; changes codes, returns moved and waiting items.

    Choosing level by level for all items at once equals choosing for one item after the other: the free codes under a
    prefix depend only on earlier items there, and room below a code is a free ID for every item that takes the code.
    """
    found = waiting
    for level in range(kept, len(sizes)):
        room = min(capacity * math.prod(sizes[level + 1 :]), ROOM)
        distances = _distances(codebooks, x, level)
        code = _choose(codes[found, :level], found, sizes[: level + 1], room, occupied, distances)
        if level == kept:
            waiting, found, code = found[code < 0], found[code >= 0], code[code >= 0]
        codes[found, level] = code
    return found, waiting


def _choose(
    prefixes: np.ndarray,
    items: np.ndarray,
    sizes: tuple[int, ...],
    room: int,
    occupied: np.ndarray,
    distances: Distances,
) -> np.ndarray:
    """In order, each item takes the nearest next code with room; int64 [n], -1 where none has room.

    prefixes: int [n, m] of the items [n]. sizes: of m + 1 levels. occupied: int [J, M], IDs that take up room.
    Items under different prefixes are independent: the first items of all prefixes choose together, then the second,
    ...
    """
    k, level = sizes[-1], prefixes.shape[1]
    numbers = _groups(np.concatenate([prefixes, occupied[:, :level]]), sizes)
    groups, inverse = np.unique(numbers[: len(items)], return_inverse=True)
    place = np.full(int(numbers.max(initial=0)) + 1, -1)
    place[groups] = np.arange(len(groups))
    theirs = place[numbers[len(items) :]]
    filled = np.sort(theirs[theirs >= 0] * k + occupied[theirs >= 0, level])
    rank, chosen = _rank(inverse), np.full(len(items), -1)
    by_group = np.argsort(inverse, kind="stable")
    step = max(1, AT_ONCE // k)
    for start in range(0, len(groups), step):
        begin, end = np.searchsorted(inverse[by_group], [start, start + step])
        mine = by_group[begin:end]
        mine = mine[np.argsort(rank[mine], kind="stable")]
        begin, end = np.searchsorted(filled, [start * k, (start + step) * k])
        used = np.bincount(filled[begin:end] - start * k, minlength=min(step, len(groups) - start) * k).reshape(-1, k)
        for some in np.split(mine, range(step, len(mine), step)):
            far = distances(items[some], prefixes[some])
            for turn in np.split(np.arange(len(some)), np.flatnonzero(np.diff(rank[some])) + 1):
                slots = inverse[some[turn]] - start
                open_ = np.where(used[slots] < room, far[turn], np.inf)
                best = open_.argmin(1)
                free = np.isfinite(open_[np.arange(len(turn)), best])
                chosen[some[turn[free]]] = best[free]
                used[slots[free], best[free]] += 1
    return chosen


def _distances(codebooks: Codebooks, x: np.ndarray, level: int) -> Distances:
    """Distances to the codes of a level, from the residual of the earlier quantizers and levels."""
    before, part = 0, codebooks.parts[0]
    if level >= len(part.sizes):
        before, part = len(part.sizes), codebooks.parts[1]
    vectors = level_vectors(part)
    if vectors is None:
        return lambda items, prefixes: _decoded_distances(codebooks, x[items], prefixes)
    candidates = vectors[level - before]
    squares = np.sum(candidates**2, axis=1)

    def distances(items: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        rest = x[items].astype(np.float64)
        if before:
            rest -= decode(codebooks, prefixes[:, :before])
        for above, known in zip(vectors, prefixes[:, before:].T):
            rest -= above[known]
        return squares - 2 * rest @ candidates.T

    return distances


def _decoded_distances(codebooks: Codebooks, x: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
    """Distances by decoding every prefix with every next code, for codebooks that are no sum of vectors."""
    k = codebooks.sizes[prefixes.shape[1]]
    found = np.empty((len(x), k))
    step = max(1, DECODED_AT_ONCE // k)
    codes = np.tile(np.arange(k, dtype=np.int32), step)[:, None]
    for start in range(0, len(x), step):
        # The last block is padded with its last row: one shape, so that decoding compiles once.
        rows = np.minimum(np.arange(start, start + step), len(x) - 1)
        vectors = decode(codebooks, np.concatenate([np.repeat(prefixes[rows], k, axis=0), codes], axis=1))
        vectors = vectors.reshape(step, k, -1).astype(np.float64)
        far = np.sum(vectors**2, axis=2) - 2 * np.einsum("nd,nkd->nk", x[rows].astype(np.float64), vectors)
        found[start : start + step] = far[: len(x) - start]
    return found
