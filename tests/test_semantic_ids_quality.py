"""Figures of semantic IDs: by hand, and against slow plain oracles."""

import json
import math
from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.semantic_ids import SemanticIds
from jaxrec.semantic_ids.table import quality as figures
from jaxrec.semantic_ids.table.quality import (
    bucket_sizes,
    collisions,
    entropy,
    gini,
    independent_coding_rate,
    level_use,
    nearest,
    neighbour_recall,
    prefix_use,
    quality,
    recall_by_prefix,
    reconstruction_error,
    shared_prefixes,
)

CODES = np.array([[1, 0], [0, 2], [1, 0], [0, 2], [0, 2], [1, 1]], np.int32)
SPACE = SemanticIds(CODES, (2, 3))
COUNTS = np.array([3, 2, 1])
"""Items under <0,2>, <1,0> and <1,1>."""


@pytest.fixture(scope="module")
def crowd():
    """60 items of 3 levels with few codes, so that prefixes and whole IDs are shared, and their embeddings."""
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, size, 60) for size in (3, 4, 5)], axis=1).astype(np.int32)
    return SemanticIds(codes, (3, 4, 5)), rng.normal(size=(60, 4)).astype(np.float32)


def test_collisions_by_hand():
    # One of six items has an ID to itself; one of three IDs belongs to one item; three IDs fall three short of six.
    np.testing.assert_array_equal(SPACE.counts, COUNTS)
    assert collisions(COUNTS) == {
        "conflict_rate": pytest.approx(5 / 6),
        "exclusive_rate": pytest.approx(1 / 3),
        "duplicate_rate": pytest.approx(1 / 2),
        "largest_bucket": 3,
    }
    assert independent_coding_rate(COUNTS) == pytest.approx(1 / 3)


def test_level_use_by_hand():
    # Of 64 ordered pairs of codes 2 * 2 * 6 differ, by 2: a mean difference of 48 / 64, over twice the mean of 1 / 2.
    assert level_use(np.array([0, 0, 3, 3]), 8) == {
        "use": 0.25,
        "entropy_bits": 1.0,
        "most_bits": 3.0,
        "gini": 0.75,
        "largest": 2,
    }


def test_gini_is_half_the_relative_mean_difference():
    assert gini(np.array([7, 7, 7])) == 0
    assert gini(np.array([0, 0, 0, 9])) == 0.75
    assert gini(np.array([5])) == 0
    counts = np.random.default_rng(0).integers(0, 50, 31)
    slow = np.abs(counts[:, None] - counts).mean() / (2 * counts.mean())
    assert gini(counts) == pytest.approx(slow)


def test_prefix_use_by_hand():
    first, both = prefix_use(SPACE)
    assert (first["distinct"], first["utilization"], first["entropy_bits"], first["largest_bucket"]) == (2, 1, 1, 3)
    assert (both["distinct"], both["utilization"], both["largest_bucket"]) == (3, 0.5, 3)
    assert both["entropy_bits"] == pytest.approx(1 / 2 + math.log2(3) / 3 + math.log2(6) / 6)
    assert both.items() >= collisions(COUNTS).items()


def test_prefix_use_counts_as_a_dictionary_does(crowd):
    space, _ = crowd
    for m, row in enumerate(prefix_use(space), start=1):
        counts = np.array(list(Counter(map(tuple, space.codes[:, :m].tolist())).values()))
        assert row["distinct"] == len(counts) and row["utilization"] == len(counts) / math.prod((3, 4, 5)[:m])
        assert row.items() >= collisions(counts).items() and row["entropy_bits"] == pytest.approx(entropy(counts))


def test_utilization_of_more_ids_than_64_bits_count():
    sizes = (2**31 - 1,) * 5
    codes = np.random.default_rng(0).integers(0, 2**31 - 1, (7, 5)).astype(np.int32)
    assert prefix_use(SemanticIds(codes, sizes))[-1]["utilization"] == pytest.approx(7 / 2.0**155)


def test_bucket_sizes_by_hand():
    bins = bucket_sizes(np.array([1, 1, 2, 3, 4, 4, 9, 16]))
    assert [(row["from"], row["to"], row["ids"], row["items"]) for row in bins] == [
        (1, 1, 2, 2), (2, 2, 1, 2), (3, 4, 3, 11), (5, 8, 0, 0), (9, 16, 2, 25),
    ]  # fmt: skip
    assert [(row["to"], row["ids"]) for row in bucket_sizes(np.array([1]))] == [(1, 1)]
    assert bucket_sizes(np.array([17]))[-1] == {"from": 17, "to": 32, "ids": 1, "items": 17}


def test_shared_prefixes_by_hand():
    pairs = np.array([[0, 2], [0, 5], [0, 1], [1, 3]])
    shares = shared_prefixes(SPACE, pairs)
    assert shares["pairs"] == [0.75, 0.5]
    # Of 15 pairs of items 3 + 3 share the first code, and 3 + 1 both.
    assert shares["random"] == pytest.approx([6 / 15, 4 / 15])


def test_random_pairs_are_all_pairs(crowd):
    space, _ = crowd
    every = np.array(list(combinations(range(60), 2)))
    shares = shared_prefixes(space, every)
    assert shares["random"] == pytest.approx(shares["pairs"])


def test_reconstruction_error_by_hand():
    x = np.array([[0.0], [2.0], [4.0]], np.float32)
    prefixes = {1: np.array([[1.0], [1.0], [4.0]], np.float32), 2: x}
    # The variance is 4 + 0 + 4; the first level leaves 1 + 1 + 0 of it.
    errors = reconstruction_error(np.zeros((3, 2), np.int32), x, lambda codes: prefixes[codes.shape[1]])
    assert errors == [0.25, 0.0]


def test_reconstruction_error_in_chunks(crowd, monkeypatch):
    space, x = crowd
    books = [np.random.default_rng(level).normal(size=(size, 4)) for level, size in enumerate(space.codebook_sizes)]

    def decode(codes):
        return sum(books[level][codes[:, level]] for level in range(codes.shape[1]))

    slow = [((x - decode(space.codes[:, :m])) ** 2).sum() / ((x - x.mean(0)) ** 2).sum() for m in (1, 2, 3)]
    monkeypatch.setattr(figures, "CHUNK_ROWS", 7)
    assert reconstruction_error(space.codes, x, decode) == pytest.approx(slow)


@pytest.mark.parametrize("chunk", [7, 4096])
def test_nearest_is_what_sorting_finds(monkeypatch, chunk):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(50, 3)).astype(np.float32) + 10
    x[40:] = x[:10]  # Ten pairs of equal rows: equally near to others, the lower index first.
    rows = np.array([0, 3, 17, 45, 49])
    distances = ((x[rows, None].astype(np.float64) - x) ** 2).sum(2)
    distances[np.arange(5), rows] = np.inf
    monkeypatch.setattr(figures, "SEARCH_ROWS", chunk)
    np.testing.assert_array_equal(nearest(x, rows, 12), np.argsort(distances, axis=1, kind="stable")[:, :12])


def recall_of_every_order(codes, item, neighbours):
    """Mean over all orders of the others of the recall of ranking them by shared prefix, ties as in that order."""
    others = [other for other in range(len(codes)) if other != item]
    shared = np.logical_and.accumulate(codes == codes[item], axis=1).sum(1)
    recalls = []
    for order in permutations(others):
        ranked = sorted(order, key=lambda other: -shared[other])[: len(neighbours)]
        recalls.append(len(set(ranked) & set(neighbours)) / len(neighbours))
    return np.mean(recalls)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_recall_by_prefix_is_the_mean_over_all_orders_of_ties(k):
    rng = np.random.default_rng(k)
    codes = rng.integers(0, 2, (7, 3)).astype(np.int32)
    rows = np.array([0, 2, 5])
    neighbours = np.stack([rng.permutation([i for i in range(7) if i != row])[:k] for row in rows])
    slow = [recall_of_every_order(codes, row, near.tolist()) for row, near in zip(rows, neighbours, strict=True)]
    np.testing.assert_allclose(recall_by_prefix(SemanticIds(codes, (2, 2, 2)), rows, neighbours), slow)


def test_neighbours_are_kept_by_codes_that_keep_everything():
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    own = SemanticIds(np.arange(40, dtype=np.int32)[:, None], (40,))
    assert neighbour_recall(own, x, lambda codes: x[codes[:, 0]])["neighbour_recall@10"] == 1.0
    same = SemanticIds(np.zeros((40, 1), np.int32), (40,))
    recalls = neighbour_recall(same, x, lambda codes: x[codes[:, 0]])
    assert recalls["neighbour_recall@10"] < 0.6
    # Whether all share an ID or none does, ten of 39 others are as good as drawn.
    assert recalls["neighbour_recall_by_id@10"] == pytest.approx(10 / 39)
    assert neighbour_recall(own, x) == {"neighbour_recall_by_id@10": pytest.approx(10 / 39)}


def test_neighbours_by_id_are_those_of_the_cluster():
    x = np.concatenate([np.arange(4), 100 + np.arange(4)])[:, None].astype(np.float32)
    clusters = SemanticIds(np.repeat([0, 1], 4)[:, None].astype(np.int32), (2,))
    assert neighbour_recall(clusters, x, k=3) == {"neighbour_recall_by_id@3": 1.0}


def test_quality_of_ids_alone_and_of_a_digit_against_duplicates():
    bare = quality(SPACE)
    assert (bare["items"], bare["distinct_ids"], bare["codebook_sizes"]) == (6, 3, [2, 3])
    assert "neighbour_recall_by_id@10" not in bare and "reconstruction_error" not in bare
    digits = np.array([[0], [0], [1], [1], [2], [0]], np.int32)
    told_apart = quality(SemanticIds(np.hstack([CODES, digits]), (2, 3, 3)))
    assert told_apart["conflict_rate"] == told_apart["duplicate_rate"] == 0
    assert told_apart["prefixes"][:2] == bare["prefixes"]  # Cut before the digit, they are the IDs as they were.
    assert told_apart["prefixes"][1]["duplicate_rate"] == pytest.approx(1 - 3 / 6)


def test_quality_is_plain_json(crowd):
    space, x = crowd
    made = quality(space, x, lambda codes: np.zeros((len(codes), 4), np.float32), np.array([[0, 1], [2, 3]]))
    assert json.loads(json.dumps(made)) == made
    assert made["reconstruction_error"] == pytest.approx([(x**2).sum() / ((x - x.mean(0)) ** 2).sum()] * 3)
    assert {"neighbour_recall@10", "neighbour_recall_by_id@10", "pairs_sharing_prefix"} <= made.keys()
    assert quality(space, x)["neighbour_recall_by_id@10"] == made["neighbour_recall_by_id@10"]


def test_a_single_item_has_figures():
    one = SemanticIds(np.zeros((1, 2), np.int32), (4, 4))
    made = quality(one, np.ones((1, 3), np.float32), lambda codes: np.ones((len(codes), 3), np.float32))
    assert made["neighbour_recall@10"] == made["neighbour_recall_by_id@10"] == 1.0
    assert made["conflict_rate"] == 0 and made["reconstruction_error"] == [0, 0]


def test_what_cannot_be_measured_is_named(crowd):
    with pytest.raises(UserError, match="no semantic IDs to measure"):
        quality(SemanticIds(np.zeros((0, 2), np.int32), (4, 4)))
    with pytest.raises(UserError, match="59 embeddings do not fit 60 IDs"):
        quality(crowd[0], crowd[1][:59])
