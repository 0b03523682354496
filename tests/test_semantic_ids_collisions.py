"""What is done about items that share an ID: by hand, and against slow plain oracles."""

import json
import math
from collections import Counter
from itertools import pairwise, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.config import UserError
from jaxrec.semantic_ids import Codebooks, FsqConfig, SemanticIds
from jaxrec.semantic_ids.quantizers import codebooks, fsq
from jaxrec.semantic_ids.quantizers.opq import Opq
from jaxrec.semantic_ids.quantizers.residual import Residual
from jaxrec.semantic_ids.quantizers.rqvae import RqVae
from jaxrec.semantic_ids.table import collisions
from jaxrec.semantic_ids.table.collisions import CollisionConfig, describe, resolve, squared_errors

NEAREST = CollisionConfig("nearest_free")
EXTRA = CollisionConfig("extra_level")


def books_of(*levels):
    """Residual codebooks from lists of vectors."""
    return Codebooks(Residual(tuple(jnp.asarray(level, jnp.float32) for level in levels), (None,) * len(levels)), None)


LINE = books_of([[0.0], [100.0]], [[0.0], [1.0], [10.0]])
"""Two levels on a line: 0, 1, 10 and 100, 101, 110."""


def random_case(seed, items=90, sizes=(2, 3, 4), width=3):
    """Items crowded into few IDs, with codebooks, embeddings and popularity."""
    rng = np.random.default_rng(seed)
    books = books_of(*(rng.normal(size=(size, width)) / (1 + level) for level, size in enumerate(sizes)))
    x = (rng.normal(size=(items, width)) * 0.7).astype(np.float32)
    return books, x, rng.integers(0, 5, items)


def counts_of(codes):
    return Counter(map(tuple, np.asarray(codes).tolist()))


def stand_for(books, codes, x):
    """Squared distances of x [D] to what IDs or prefixes of one length stand for."""
    if isinstance(books.hierarchy, Residual):
        levels = [np.asarray(level, np.float64) for level in books.hierarchy.centroids]
        return [((x - sum(level[c] for level, c in zip(levels, code))) ** 2).sum() for code in codes]
    return ((x - codebooks.decode(books, np.array(codes)).astype(np.float64)) ** 2).sum(1)


def slow_nearest_free(codes, sizes, x, books, capacity, popularity, taken=()):
    """One item after the other, over all IDs written out."""
    codes = [tuple(code) for code in np.asarray(codes).tolist()]
    order = sorted(range(len(codes)), key=lambda i: (-popularity[i], i))
    count = Counter(map(tuple, np.asarray(taken, int).reshape(-1, len(sizes)).tolist()))
    waiting = []
    for i in order:
        if count[codes[i]] < capacity:
            count[codes[i]] += 1
        else:
            waiting.append(i)
    for kept in range(len(sizes) - 1, min(1, len(sizes) - 1) - 1, -1):
        still = []
        for i in waiting:
            prefix = codes[i][:kept]
            while len(prefix) < len(sizes):
                below = [range(size) for size in sizes[len(prefix) + 1 :]]
                free = [
                    (*prefix, c)
                    for c in range(sizes[len(prefix)])
                    if any(count[(*prefix, c, *rest)] < capacity for rest in product(*below))
                ]
                if not free:
                    break
                prefix = free[int(np.argmin(stand_for(books, free, x[i])))]
            if len(prefix) == len(sizes):
                codes[i] = prefix
                count[prefix] += 1
            else:
                still.append(i)
        waiting = still
    return np.array(codes), len(waiting)


def test_keep_changes_nothing():
    codes = np.array([[0, 1], [0, 1], [1, 2]])
    kept = resolve(codes, (2, 3), CollisionConfig())
    np.testing.assert_array_equal(kept.codes, codes)
    assert kept.sizes == (2, 3) and kept.codes.dtype == np.int32
    assert (kept.changed["distinct_after"], kept.changed["largest_after"], kept.changed["moved"]) == (2, 2, 0)
    assert describe(kept.changed) == (
        "items keep their IDs: 2 distinct IDs (before: 2), at most 2 items an ID (before: 2)"
    )


def test_nearest_free_by_hand():
    # Four items lie at 0 or near it, so all have <0,0>: the most popular stays, then 1 and 10 are taken in turn, and
    # the last finds nothing free: <1,..> begins with another code.
    x = np.array([[0.1], [0.0], [0.4], [0.2]], np.float32)
    codes = codebooks.encode(LINE, x)
    np.testing.assert_array_equal(codes, np.zeros((4, 2)))
    moved = resolve(codes, LINE.sizes, NEAREST, x, LINE, popularity=np.array([1, 9, 5, 1]))
    np.testing.assert_array_equal(moved.codes, [[0, 2], [0, 0], [0, 1], [0, 0]])
    changed = moved.changed
    assert (changed["moved"], changed["without_room"], changed["moved_at"]) == (2, 1, {"2": 2})
    # Before .1^2 and .4^2; after 9.9^2 and .6^2.
    assert changed["error_before"] == pytest.approx((0.01 + 0.16) / 2)
    assert changed["extra_error"] == pytest.approx((9.9**2 + 0.6**2 - 0.17) / 2, rel=1e-5)
    assert (changed["distinct_before"], changed["distinct_after"]) == (1, 3)
    assert (changed["largest_before"], changed["largest_after"]) == (4, 2)
    assert describe(changed) == (
        "2 of 4 items moved to the nearest free ID (2 from level 2 on), 49.1 of squared error more each than 0.085; "
        "1 found no room under their first code and stay: 3 distinct IDs (before: 1), at most 2 items an ID (before: 4)"
    )
    assert json.loads(json.dumps(changed)) == changed


def test_without_popularity_the_lower_index_stays():
    x = np.zeros((2, 1), np.float32)
    moved = resolve(np.zeros((2, 2)), LINE.sizes, NEAREST, x, LINE)
    np.testing.assert_array_equal(moved.codes, [[0, 0], [0, 1]])


def test_a_full_last_level_moves_the_level_above():
    # 2 x 2 x 2 codes. Under <0,0> lie 3 items: two places, and the third goes to <0,1>, at the code nearest to it.
    books = books_of([[0.0], [50.0]], [[0.0], [8.0]], [[0.0], [1.0]])
    x = np.array([[0.0], [0.1], [0.2]], np.float32)
    moved = resolve(np.zeros((3, 3)), books.sizes, NEAREST, x, books)
    np.testing.assert_array_equal(moved.codes, [[0, 0, 0], [0, 0, 1], [0, 1, 0]])
    assert moved.changed["moved_at"] == {"3": 1, "2": 1}


def test_a_single_level_is_searched_as_a_whole():
    books = books_of([[0.0], [1.0], [5.0]])
    x = np.array([[0.0], [0.1], [0.2], [0.3]], np.float32)
    moved = resolve(np.zeros((4, 1)), books.sizes, NEAREST, x, books)
    assert moved.codes.ravel().tolist() == [0, 1, 2, 0] and moved.changed["without_room"] == 1


@pytest.mark.parametrize("at_once", [4, 1 << 22])
@pytest.mark.parametrize(
    ("capacity", "sizes"), [(1, (2, 3, 4)), (1, (3, 5, 8)), (3, (2, 3, 4)), (2, (4, 9)), (4, (7,))]
)
def test_nearest_free_is_what_one_after_the_other_finds(monkeypatch, at_once, capacity, sizes):
    monkeypatch.setattr(collisions, "AT_ONCE", at_once)
    for seed in range(3):
        books, x, popularity = random_case(seed, sizes=sizes)
        codes = codebooks.encode(books, x)
        taken = codes[:20]  # With more than `capacity` under some IDs.
        config = CollisionConfig("nearest_free", capacity=capacity)
        moved = resolve(codes[20:], sizes, config, x[20:], books, popularity[20:], taken)
        slow, without_room = slow_nearest_free(codes[20:], sizes, x[20:], books, capacity, popularity[20:], taken)
        np.testing.assert_array_equal(moved.codes, slow)
        assert moved.changed["without_room"] == without_room
        went = (slow != codes[20:]).any(1)
        assert moved.changed["moved"] == went.sum() == sum(moved.changed["moved_at"].values()) > 0
        first = Counter(str((a != b).argmax() + 1) for a, b in zip(slow[went], codes[20:][went]))
        # A pass frees the first level that it names; the item may find its old code there and differ later only.
        assert max(first) <= max(moved.changed["moved_at"]) and min(first) >= min(moved.changed["moved_at"])


def other_quantizers():
    """Codebooks of other kinds than residual k-means alone, of width 4."""
    rng = np.random.default_rng(1)
    rotation = jnp.asarray(np.linalg.qr(rng.normal(size=(4, 4)))[0], jnp.float32)
    halves = Opq(rotation, tuple(jnp.asarray(rng.normal(size=(size, 2)), jnp.float32) for size in (7, 9)))
    first = books_of(rng.normal(size=(3, 4))).hierarchy
    x = rng.normal(size=(40, 4)).astype(np.float32)
    grid = fsq.fit(jax.random.key(0), x, FsqConfig((4, 5), steps=0))
    nonlinear = autoencoder((3, 4))
    return {
        "rq-opq": Codebooks(first, halves),
        "rq-fsq": Codebooks(first, grid),
        "opq": Codebooks(None, halves),
        "rqvae": Codebooks(nonlinear, None),
        "rqvae-opq": Codebooks(nonlinear, halves),
        "rqvae-fsq": Codebooks(nonlinear, grid),
    }


def autoencoder(sizes):
    """An RQ-VAE of width 4 with random weights: what its codes stand for is no sum of vectors."""
    rng = np.random.default_rng(2)

    def layers(*widths):
        shapes = list(pairwise(widths))
        drawn = {
            f"layer_{i}": {"kernel": rng.normal(size=s), "bias": rng.normal(size=s[1])} for i, s in enumerate(shapes)
        }
        return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), drawn)

    books = tuple(
        jnp.asarray(rng.normal(size=(size, 3)) / (1 + level), jnp.float32) for level, size in enumerate(sizes)
    )
    return RqVae({"encoder": layers(4, 8, 3), "decoder": layers(3, 8, 4)}, books, jnp.zeros(4), jnp.float32(1))


@pytest.mark.parametrize("kind", ["rq-opq", "rq-fsq", "opq", "rqvae", "rqvae-opq", "rqvae-fsq"])
def test_other_quantizers_move_to_the_nearest_too(kind):
    x = (np.random.default_rng(0).normal(size=(60, 4)) * 0.8).astype(np.float32)
    books = other_quantizers()[kind]
    codes = codebooks.encode(books, x)
    moved = resolve(codes, books.sizes, NEAREST, x, books)
    at_last = np.flatnonzero((moved.codes != codes).any(1) & (moved.codes[:, :-1] == codes[:, :-1]).all(1))
    # The first who moved under a prefix found the nearest of the IDs that nobody had at the start.
    nobodys = {tuple(code) for code in product(*map(range, books.sizes))} - {tuple(c) for c in codes.tolist()}
    seen = set()
    for item in at_last:
        prefix = tuple(codes[item, :-1])
        if prefix in seen:
            continue
        seen.add(prefix)
        free = np.array(sorted(code for code in nobodys if code[:-1] == prefix))
        far = ((x[item] - codebooks.decode(books, free)) ** 2).sum(1)
        assert tuple(moved.codes[item]) == tuple(free[far.argmin()])
    assert len(seen) > 1


@pytest.mark.parametrize("capacity", [1, 2])
def test_an_rqvae_moves_to_what_one_after_the_other_finds(monkeypatch, capacity):
    monkeypatch.setattr(collisions, "DECODED_AT_ONCE", 20)
    books = Codebooks(autoencoder((3, 4, 5)), None)
    rng = np.random.default_rng(3)
    x, popularity = rng.normal(size=(60, 4)).astype(np.float32), rng.integers(0, 5, 60)
    codes = codebooks.encode(books, x)
    taken = codes[:10]
    config = CollisionConfig("nearest_free", capacity=capacity)
    moved = resolve(codes[10:], books.sizes, config, x[10:], books, popularity[10:], taken)
    slow, without_room = slow_nearest_free(codes[10:], books.sizes, x[10:], books, capacity, popularity[10:], taken)
    np.testing.assert_array_equal(moved.codes, slow)
    assert moved.changed["without_room"] == without_room
    assert moved.changed["moved"] == (slow != codes[10:]).any(1).sum() > 5
    assert len(moved.changed["moved_at"]) > 1
    before, after = (squared_errors(books, some, x[10:]) for some in (codes[10:], moved.codes))
    went = (slow != codes[10:]).any(1)
    assert moved.changed["extra_error"] == pytest.approx((after - before)[went].mean(), rel=1e-5)


def test_codebooks_that_are_no_sum_are_decoded(monkeypatch):
    books, x, popularity = random_case(5)
    codes = codebooks.encode(books, x)
    fast = resolve(codes, books.sizes, NEAREST, x, books, popularity)
    monkeypatch.setattr(collisions, "level_vectors", lambda part: None)
    monkeypatch.setattr(collisions, "DECODED_AT_ONCE", 20)
    slow = resolve(codes, books.sizes, NEAREST, x, books, popularity)
    np.testing.assert_array_equal(slow.codes, fast.codes)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=24),
    st.integers(1, 3),
    st.integers(0, 23),
)
def test_no_id_is_too_full_where_there_is_room(rows, capacity, settled):
    sizes, codes = (2, 2, 3), np.array(rows)
    books, x, popularity = random_case(0, items=len(codes), sizes=sizes)
    taken, mine = codes[:settled], slice(settled, None)
    config = CollisionConfig("nearest_free", capacity=capacity)
    moved = resolve(codes[mine], sizes, config, x[mine], books, popularity[mine], taken)
    before, after = counts_of(taken), counts_of(np.concatenate([taken, moved.codes]))
    assert (moved.codes[:, 0] == codes[mine, 0]).all()
    places = capacity * math.prod(sizes[1:])
    for first in (0, 1):
        in_way = sum(max(n - capacity, 0) for code, n in before.items() if code[0] == first)
        full = sum(min(n, capacity) for code, n in after.items() if code[0] == first)
        over = sum(n - capacity for code, n in after.items() if code[0] == first and n > capacity)
        assert over == in_way or full == places
    assert moved.changed["largest_after"] <= max(capacity, moved.changed["largest_before"])
    # Items that were not too many stay where they were.
    stayed = Counter(map(tuple, codes[mine][(moved.codes == codes[mine]).all(1)].tolist()))
    for code, n in counts_of(codes[mine]).items():
        assert stayed[code] >= min(n, max(capacity - before[code], 0))


def test_extra_level_by_hand():
    codes = np.array([[0, 1], [0, 1], [1, 2], [0, 1]])
    numbered = resolve(codes, (2, 3), EXTRA, popularity=np.array([1, 5, 0, 1]))
    np.testing.assert_array_equal(numbered.codes, [[0, 1, 1], [0, 1, 0], [1, 2, 0], [0, 1, 2]])
    assert numbered.sizes == (2, 3, 3) and numbered.codes.dtype == np.int32
    assert describe(numbered.changed) == (
        "an extra level of 3 codes numbers the items of an ID: "
        "4 distinct IDs (before: 2), at most 1 items an ID (before: 3)"
    )
    assert resolve(codes, (2, 3), CollisionConfig("extra_level", extra_size=8)).sizes == (2, 3, 8)


def test_an_extra_level_that_is_too_small_says_what_it_needs():
    codes = np.array([[0, 1], [0, 1], [1, 2], [0, 1]])
    with pytest.raises(UserError, match="extra_size=2 is too small: the ID <0,1> needs 3 numbers"):
        resolve(codes, (2, 3), CollisionConfig("extra_level", extra_size=2))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 9)), max_size=20, unique=True),
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=20),
)
def test_new_items_take_the_lowest_free_numbers(taken, rows):
    taken, codes = np.array(taken, int).reshape(-1, 3), np.array(rows, int).reshape(-1, 2)
    numbered = resolve(codes, (2, 2), EXTRA, taken=taken)
    used = {tuple(code) for code in taken.tolist()}
    for code in codes.tolist():
        used.add((*code, next(n for n in range(99) if (*code, n) not in used)))
    assert used == {tuple(code) for code in np.concatenate([taken, numbered.codes]).tolist()}
    assert numbered.sizes[-1] == max([code[-1] for code in used], default=0) + 1


def test_a_hundred_thousand_items_with_many_surplus():
    rng = np.random.default_rng(0)
    books = books_of(*(rng.normal(size=(128, 8)) / 2**level for level in range(3)))
    x = (rng.normal(size=(100_000, 8)) * 0.9).astype(np.float32)
    codes = codebooks.encode(books, x)
    moved = resolve(codes, books.sizes, NEAREST, x, books)
    assert moved.changed["moved"] > 10_000 and moved.changed["without_room"] == 0
    assert SemanticIds(moved.codes, moved.sizes).counts.max() == 1
    again = resolve(codes, books.sizes, NEAREST, x, books)
    np.testing.assert_array_equal(again.codes, moved.codes)


def test_no_items():
    empty = np.zeros((0, 2), np.int32)
    for config in (CollisionConfig(), NEAREST, EXTRA):
        found = resolve(empty, (2, 3), config, np.zeros((0, 1), np.float32), LINE)
        assert len(found.codes) == 0 and found.codes.shape[1] == len(found.sizes)
        assert "0" in describe(found.changed)


def test_squared_errors_by_hand():
    codes, x = np.array([[0, 1], [1, 2]]), np.array([[3.0], [108.0]], np.float32)
    np.testing.assert_allclose(squared_errors(LINE, codes, x), [4, 4])


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (CollisionConfig("move"), {}, "policy='move'"),
        (CollisionConfig("nearest_free", capacity=0), {}, "capacity=0"),
        (CollisionConfig("extra_level", extra_size=-1), {}, "extra_size=-1"),
        (NEAREST, {}, "needs the items' embeddings and the codebooks"),
        (NEAREST, {"embeddings": np.zeros((3, 1)), "codebooks": LINE}, "3 embeddings do not fit 2 IDs"),
        (NEAREST, {"embeddings": np.zeros((2, 3)), "codebooks": LINE}, "3 wide"),
        (NEAREST, {"embeddings": np.array([[0], [np.nan]]), "codebooks": LINE}, "row 1 .* holds NaN"),
        (EXTRA, {"popularity": np.zeros(3)}, r"popularity of shape \(3,\) does not fit 2 items"),
        (EXTRA, {"popularity": np.array([1, np.nan])}, "not NaN"),
        (EXTRA, {"taken": np.zeros((1, 2))}, "taken IDs"),
    ],
)
def test_what_cannot_be_is_named(config, arguments, message):
    with pytest.raises(UserError, match=message):
        resolve(np.zeros((2, 2), int), (2, 3), config, **arguments)


def test_a_code_outside_its_level_is_named():
    with pytest.raises(UserError, match="item 1 has code 3 at level 2"):
        resolve(np.array([[0, 0], [0, 3]]), (2, 3), EXTRA)
