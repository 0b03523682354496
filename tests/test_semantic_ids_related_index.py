"""The look-up of related queries against a plain loop over all queries, and its order by hand."""

import numpy as np
import pytest

from jaxrec.semantic_ids.related_index import Screen, build_index


def make(rng, queries, sizes, width=16):
    """Queries and their IDs, with many shared codes, equal vectors and equal counts. Cosines are exact in float32."""
    codes = np.stack([rng.integers(0, size, queries) for size in sizes], axis=1).astype(np.int32)
    vectors = rng.choice([-0.25, 0.25], (queries, width)).astype(np.float32)
    vectors[1::7] = vectors[::7][: len(vectors[1::7])]
    vectors[3::5, : width // 2] = 0.25
    return codes, vectors, rng.integers(1, 5, queries)


def by_hand(codes, vectors, counts, code, vector, screen, without=()):
    """All queries, sorted by shared codes, cosine and count, taken one by one."""
    length = np.linalg.norm(vector)
    shared = [next((m for m, (a, b) in enumerate(zip(row, code)) if a != b), len(code)) for row in codes]
    taken = []
    for level in range(len(code), -1, -1):
        inside = [row for row in range(len(codes)) if shared[row] >= level]
        inside = sorted(inside, key=lambda row: (-counts[row], row))[: screen.candidates]
        cosine = {row: round(float(vectors[row] @ vector / length), 5) if length else 0.0 for row in inside}
        inside = [row for row in inside if shared[row] == level and row not in without]
        for row in sorted(inside, key=lambda row: (-cosine[row], -counts[row], row)):
            near = [round(float(vectors[row] @ vectors[other]), 5) for other in taken]
            if cosine[row] >= screen.min_cosine and max(near, default=-1) <= screen.max_cosine:
                taken.append(row)
    return (taken + [-1] * screen.count)[: screen.count]


@pytest.mark.parametrize(
    ("sizes", "screen"),
    [
        ((3, 3, 3), Screen(6, 10, 0.0, 0.9)),
        ((3, 3, 3), Screen(30, 100, -1.0, 1.0)),
        ((2, 300, 2, 2), Screen(5, 7, 0.25, 0.5)),
        ((5,), Screen(3, 1, -1.0, 0.9)),
        # 2^64 IDs: more than a number of 64 bits has.
        ((65536, 65536, 65536, 65536), Screen(8, 20, -0.25, 0.75)),
    ],
)
def test_the_look_up_is_that_of_a_loop(sizes, screen):
    rng = np.random.default_rng(len(sizes))
    codes, vectors, counts = make(rng, 90, sizes)
    index = build_index(vectors, codes, sizes, counts)
    asked = codes[:40].copy()
    asked[30:, 0] = (asked[30:, 0] + 1) % sizes[0]
    asked[20:30, -1] = 0
    found = rng.choice([-1.0, -0.5, 0.5, 1.0], (40, 16)).astype(np.float32)
    found[::3] = vectors[: len(found[::3])] * 2
    found[5] = 0
    without = np.where(rng.random((40, 2)) < 0.5, rng.integers(0, 90, (40, 2)), -1)
    expected = [by_hand(codes, vectors, counts, *each, screen, row) for *each, row in zip(asked, found, without)]
    ours = index.search(asked, found, screen, without)
    assert ours.dtype == np.int32 and (ours >= 0).any()
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(
        index.search(asked[:1], found[:1], screen), [by_hand(codes, vectors, counts, asked[0], found[0], screen)]
    )
    assert index.search(asked[:0], found[:0], screen).shape == (0, screen.count)


def test_finer_levels_come_first_then_nearer_then_more_popular():
    east, north, between = (1.0, 0.0), (0.0, 1.0), (0.6, 0.8)
    vectors = np.array([east, north, between, between, north, (0.8, 0.6)], np.float32)
    codes = np.array([[0, 0], [1, 1], [1, 1], [1, 1], [1, 0], [0, 1]], np.int32)
    counts = np.array([9, 1, 1, 3, 1, 1])
    index = build_index(vectors, codes, (2, 2), counts)
    found = index.search(np.array([[1, 1]]), np.array([[0.0, 3.0]]), Screen(6, 10, 0.5, 1.0))
    # North has the ID and is nearest; of two between, the more popular; then the one that shares a code; then (0.8,
    # 0.6); east is not relevant.
    assert found.tolist() == [[1, 3, 2, 4, 5, -1]]
    found = index.search(np.array([[1, 1]]), np.array([[0.0, 3.0]]), Screen(6, 10, 0.5, 0.9))
    assert found.tolist() == [[1, 3, -1, -1, -1, -1]], "each other one is near to one of these"
    assert index.find(np.array([[1, 1], [0, 1], [1, 0]])).tolist() == [[0, 1, 3], [0, 0, 1], [0, 1, 2]]
