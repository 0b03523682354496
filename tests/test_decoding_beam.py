"""Beam search against exhaustive and plain Python search, on a toy model whose scores depend on the whole prefix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from jaxrec.config import UserError
from jaxrec.decoding.beam import BeamResult, beam_search, expand_items
from jaxrec.decoding.filters import build_filter
from jaxrec.decoding.trie import build_text_trie, build_trie

SIZES = (4, 6, 5)


TRACES = []


@functools.partial(jax.jit, static_argnames=("beam_width", "constrained", "rescore", "candidates", "per_prefix"))
def decode(
    tables, trie, allowed, weights=None, *, beam_width, constrained=True, rescore=None, candidates=None, per_prefix=None
):
    """Jitted once for all models of one shape; `weights` [B, ...] are there for `rescore` to read."""
    TRACES.append(1)
    batch, levels = tables[0].shape[0], len(tables)

    def extend(tokens, cache, level):
        prefix = cache["prefix"]
        if level == 0:
            return tables[0][:, None, :], cache
        prefix = prefix.at[..., level - 1].set(tokens)
        index = tuple(prefix[..., position] for position in range(level))
        return tables[level][(jnp.arange(batch)[:, None], *index)], {**cache, "prefix": prefix}

    cache = {"prefix": jnp.zeros((batch, 1, levels), jnp.int32)}
    if weights is not None:
        cache["weights"] = weights[:, None]
    return beam_search(
        extend, cache, trie, batch=batch, beam_width=beam_width, allowed=allowed, constrained=constrained,
        rescore=rescore, candidates=candidates, per_prefix=per_prefix,
    )  # fmt: skip


class ToyModel:
    """Log-probabilities looked up by request and by the whole prefix, which only the cache knows.

    With `quantum` the scores are its multiples and not normalised, so that many of them tie exactly.
    """

    def __init__(self, seed: int, batch: int, sizes: tuple[int, ...] = SIZES, quantum: float | None = None):
        self.batch, self.allowed, self.tables = batch, None, []
        generator = np.random.default_rng(seed)
        for level in range(len(sizes)):
            table = generator.normal(size=(batch, *sizes[: level + 1])).astype(np.float32)
            normalised = table - np.log(np.exp(table).sum(-1, keepdims=True))
            self.tables.append(np.round(table - 4) * np.float32(quantum) if quantum else normalised)

    def search(self, trie, beam_width, constrained=True, weights=None, **options) -> BeamResult:
        options |= {"beam_width": beam_width, "constrained": constrained}
        result = decode(self.tables, trie, self.allowed, weights, **options)
        return jax.tree.map(np.asarray, result)

    def score(self, row: int, code: np.ndarray) -> np.float32:
        """Float32 sum in the order of the levels, as the search adds them."""
        total = np.float32(0)
        for level in range(len(code)):
            total = np.float32(total + self.tables[level][(row, *code[: level + 1])])
        return total

    def oracle(self, row, ids, widths, second=None, pools=None, cap=None) -> list[tuple[np.float32, tuple[int, ...]]]:
        """Plain beam search over a list of IDs: best first, equal scores by ID.

        With `second(code) -> score of its last code`, the best of `pools` by log-probability are ranked by the sum of
        those. At most `cap` beams begin with one code.
        """
        beams, totals = [()], {(): np.float32(0)}
        for level, width in enumerate(widths):
            grown = {tuple(code[: level + 1].tolist()) for code in ids if tuple(code[:level].tolist()) in set(beams)}
            scores = {code: self.score(row, code) for code in grown}
            scores = {code: score for code, score in scores.items() if score > -np.inf}
            if second is not None:
                pool = sorted(scores, key=lambda code: (-scores[code], code))[: pools[level]]
                totals = {code: np.float32(totals[code[:-1]] + second(code)) for code in pool}
                scores = totals = {code: score for code, score in totals.items() if score > -np.inf}
            ranked, seen = [], {}
            for code in sorted(scores, key=lambda code: (-scores[code], code)):
                seen[code[0]] = seen.get(code[0], 0) + 1
                if cap is None or not level or seen[code[0]] <= cap:
                    ranked.append(code)
            beams = ranked[:width]
        return [(scores[code], code) for code in beams]


def random_codes(seed: int, count: int, sizes: tuple[int, ...] = SIZES) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, sizes, (count, len(sizes)))


def check(model: ToyModel, result: BeamResult, codes: np.ndarray, widths: list[int], allowed=None) -> None:
    """The result is the oracle's, and everything after it is marked as nothing."""
    leaves = np.unique(codes, axis=0)
    for row in range(model.batch):
        ids = leaves if allowed is None else np.unique(codes[allowed[row]], axis=0)
        expected = model.oracle(row, ids, widths)
        found = len(expected)
        np.testing.assert_array_equal(result.valid[row], np.arange(widths[-1]) < found)
        assert [tuple(code) for code in result.codes[row, :found].tolist()] == [code for _, code in expected]
        np.testing.assert_array_equal(result.log_probs[row, :found], np.array([s for s, _ in expected], np.float32))
        np.testing.assert_array_equal(leaves[result.leaf[row, :found]], result.codes[row, :found])
        assert (result.log_probs[row, found:] == -np.inf).all()
        assert (result.codes[row, found:] == -1).all()
        assert (result.leaf[row, found:] == -1).all()
    assert not result.nan.any()


@pytest.mark.parametrize("beam_width", [1, 3, 20, 500])
@pytest.mark.parametrize("quantum", [None, 0.5])
def test_every_width_gives_the_oracles_ids_scores_and_order(beam_width, quantum):
    codes = random_codes(0, 60)
    model = ToyModel(1, batch=3, quantum=quantum)
    check(model, model.search(build_trie(codes, SIZES), beam_width), codes, [beam_width] * 3)


def test_a_beam_as_wide_as_the_catalogue_is_the_exhaustive_ranking():
    codes = random_codes(2, 80)
    ids = np.unique(codes, axis=0)
    model = ToyModel(3, batch=2)
    result = model.search(build_trie(codes, SIZES), len(ids))
    assert result.valid.all()
    for row in range(2):
        scores = np.array([model.score(row, code) for code in ids])
        np.testing.assert_array_equal(result.codes[row], ids[np.argsort(-scores, kind="stable")])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 30),
    shape=st.sampled_from([((7,), 3), ((1, 3), 9), ((9, 2, 5), 4), ((2, 3, 2, 3), 12)]),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    quantum=st.sampled_from([None, 1.0]),
)
def test_any_catalogue_gives_the_oracles_result(seed, count, shape, share, quantum):
    sizes, beam_width = shape
    codes = random_codes(seed, count, sizes)
    model = ToyModel(seed, batch=2, sizes=sizes, quantum=quantum)
    model.allowed = np.random.default_rng(seed).random((2, 32)) < share
    result = model.search(build_trie(codes, sizes, capacity=32), beam_width)
    check(model, result, codes, [beam_width] * len(sizes), model.allowed[:, :count])


def test_widths_of_their_own_for_each_level():
    codes = random_codes(4, 100)
    model = ToyModel(5, batch=2)
    check(model, model.search(build_trie(codes, SIZES), (2, 3, 9)), codes, [2, 3, 9])


def test_each_request_has_its_own_filter():
    codes = random_codes(6, 60)
    allowed = np.random.default_rng(0).random((4, 60)) < np.array([[0.5], [0.1], [1.0], [0.0]])
    for beam_width in (4, 100):
        model = ToyModel(7, batch=4)
        model.allowed = allowed
        result = model.search(build_trie(codes, SIZES), beam_width)
        check(model, result, codes, [beam_width] * 3, allowed)
        assert not result.valid[3].any()


def test_a_filter_sees_every_item_under_a_shared_id():
    codes = np.array([[0, 0, 0], [0, 0, 0], [1, 1, 1]])
    model = ToyModel(8, batch=3)
    model.allowed = np.array([[True, False, False], [False, True, True], [False, False, True]])
    result = model.search(build_trie(codes, SIZES), 5)
    assert [sorted(row[valid].tolist()) for row, valid in zip(result.leaf, result.valid, strict=True)] == [
        [0],
        [0, 1],
        [1],
    ]


def test_the_rows_of_a_batch_do_not_mix():
    """A peer trims beams over the flattened batch: with B > 1 requests got each other's."""
    codes = random_codes(9, 60)
    trie = build_trie(codes, SIZES)
    model = ToyModel(10, batch=5)
    together = model.search(trie, 6)
    for row in range(5):
        alone = ToyModel(10, batch=1)
        alone.tables = [table[row : row + 1] for table in model.tables]
        for of_all, of_one in zip(jax.tree.leaves(together), jax.tree.leaves(alone.search(trie, 6)), strict=True):
            np.testing.assert_array_equal(of_all[row], of_one[0])


def test_a_beam_wider_than_the_catalogue_pads_with_nothing():
    """STATIC returns 20 invalid IDs for 30 items and beam 50."""
    codes = np.unique(random_codes(11, 40), axis=0)[:30]
    model = ToyModel(12, batch=2)
    result = model.search(build_trie(codes, SIZES), 50)
    assert result.valid.sum(1).tolist() == [30, 30]
    check(model, result, codes, [50] * 3)


def test_a_beam_wider_than_the_codebook():
    """STATIC crashes when the beam exceeds the vocabulary."""
    codes = np.array(np.meshgrid(*map(np.arange, SIZES), indexing="ij")).reshape(3, -1).T
    model = ToyModel(13, batch=2)
    check(model, model.search(build_trie(codes, SIZES), 50), codes, [50] * 3)


def test_masked_codes_never_come_back_however_likely():
    """MiniOneRec's warpers run after the mask, so a code outside the trie could win."""
    sizes = (6, 6)
    codes = np.array([[1, 2], [1, 3], [4, 0]])
    model = ToyModel(14, batch=1, sizes=sizes)
    for table in model.tables:
        table[...] = -50.0
    model.tables[0][0, 5] = model.tables[1][0, 1, 5] = 0.0  # certain, and not in the catalogue
    result = model.search(build_trie(codes, sizes), 4)
    assert sorted(map(tuple, result.codes[0, :3].tolist())) == [(1, 2), (1, 3), (4, 0)]
    assert result.valid[0].tolist() == [True, True, True, False]


@pytest.mark.parametrize("sizes", [(300,), (40, 3000)])
def test_wide_codebooks_with_few_children(sizes):
    codes = random_codes(15, 50, sizes)
    model = ToyModel(16, batch=2, sizes=sizes)
    check(model, model.search(build_trie(codes, sizes), 20), codes, [20] * len(sizes))


def test_one_item():
    codes = np.array([[3, 5, 4]])
    model = ToyModel(17, batch=2)
    result = model.search(build_trie(codes, SIZES), 3)
    assert result.codes[:, 0].tolist() == [[3, 5, 4]] * 2
    assert result.valid.tolist() == [[True, False, False]] * 2


def test_ids_of_probability_zero_are_no_results():
    codes = np.array([[0, 0, 0], [1, 0, 0]])
    model = ToyModel(18, batch=1)
    model.tables[0][0, 1] = -np.inf
    result = model.search(build_trie(codes, SIZES), 2)
    assert result.codes.tolist() == [[[0, 0, 0], [-1, -1, -1]]]


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_and_infinity_are_reported_for_their_request_alone(constrained, level, poison):
    codes = random_codes(19, 60)
    model = ToyModel(20, batch=3)
    model.tables[level][1] = poison
    result = model.search(build_trie(codes, SIZES), 100, constrained=constrained)
    assert result.nan.tolist() == [False, True, False]
    assert result.valid.any(1).tolist() == [True, False, True]
    assert (result.log_probs[1] == -np.inf).all()
    assert not np.isnan(result.log_probs).any()


@pytest.mark.parametrize("constrained", [True, False])
def test_logits_are_refused_where_their_values_are_known(constrained):
    trie, model = build_trie(random_codes(19, 60), SIZES), ToyModel(20, batch=3)
    eager = functools.partial(decode.__wrapped__, trie=trie, allowed=None, beam_width=100, constrained=constrained)
    plain = model.search(trie, 100, constrained=constrained)
    np.testing.assert_array_equal(eager(model.tables).codes, plain.codes)
    model.tables[2][:, 1] -= 3  # Some of the probability may be missing, as of codes that are never said.
    assert eager(model.tables).valid.all(1).tolist() == plain.valid.all(1).tolist()
    model.tables[1][1] += 3
    with pytest.raises(
        UserError, match=r"logits at level 1, whose exponentials sum to e\^3 and not to 1: give log-prob"
    ):
        eager(model.tables)
    model.tables[0] = np.full((3, SIZES[0]), -0.5, np.float32)
    with pytest.raises(UserError, match=r"logits at level 0, whose exponentials sum to e\^0.886"):
        eager(model.tables)


@pytest.mark.parametrize("beam_width", [5, 120])
@pytest.mark.parametrize("filtered", [False, True])
def test_unconstrained_search_ranks_all_codes_and_marks_those_that_exist(beam_width, filtered):
    codes = random_codes(21, 60)
    every = np.array(np.meshgrid(*map(np.arange, SIZES), indexing="ij")).reshape(3, -1).T
    model = ToyModel(22, batch=2)
    allowed = np.random.default_rng(1).random((2, 60)) < (0.5 if filtered else 2)
    model.allowed = allowed if filtered else None
    result = model.search(build_trie(codes, SIZES), beam_width, constrained=False)
    leaves = np.unique(codes, axis=0)
    for row in range(2):
        expected = model.oracle(row, every, [beam_width] * 3)
        assert [tuple(code) for code in result.codes[row].tolist()] == [code for _, code in expected]
        np.testing.assert_array_equal(result.log_probs[row], np.array([s for s, _ in expected], np.float32))
        exists = set(map(tuple, codes[allowed[row]].tolist()))
        assert result.valid[row].tolist() == [code in exists for _, code in expected]
        valid = result.valid[row]
        np.testing.assert_array_equal(leaves[result.leaf[row][valid]], result.codes[row][valid])
        assert (result.leaf[row][~valid] == -1).all()
    assert result.valid.mean() < 0.9
    np.testing.assert_allclose(result.invalid_rate(), 1 - result.valid.mean(1), rtol=1e-6)


def test_a_catalogue_refresh_does_not_recompile():
    model = ToyModel(23, batch=2)
    TRACES.clear()
    trie = build_trie(random_codes(24, 40), SIZES, capacity=96)
    for seed, count in ((24, 40), (25, 96), (26, 1)):
        codes = random_codes(seed, count)
        check(model, model.search(build_trie(codes, SIZES, like=trie), 30), codes, [30] * 3)
    assert len(TRACES) == 1


def test_the_same_request_gives_the_same_bits():
    codes = random_codes(27, 60)
    first, second = (ToyModel(28, batch=2).search(build_trie(codes, SIZES), 9) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_wrong_calls_are_named():
    trie = build_trie(random_codes(29, 10), SIZES)
    with pytest.raises(UserError, match="beam_width is 0"):
        ToyModel(0, batch=1).search(trie, 0)
    with pytest.raises(UserError, match="each of 3 levels"):
        ToyModel(0, batch=1).search(trie, (4, 4))
    with pytest.raises(UserError, match=r"log_probs \(1, 1, 7\) at level 0: expected \[B, W, K\] = \(1, 1, 4\)"):
        beam_search(lambda *_: (jnp.zeros((1, 1, 7)), ()), (), trie, batch=1, beam_width=2)
    model = ToyModel(0, batch=2)
    model.allowed = np.ones((3, 10), bool)
    with pytest.raises(UserError, match="3 rows for 2 requests"):
        model.search(trie, 2)


def expansion_oracle(codes, order, result, k, allowed):
    """Items of each request's IDs in beam order, by plain loops."""
    leaves = np.unique(codes, axis=0)
    rows = []
    for row in range(len(result.leaf)):
        found = []
        for leaf, score, valid in zip(result.leaf[row], result.log_probs[row], result.valid[row], strict=True):
            if valid:
                items = np.flatnonzero((codes == leaves[leaf]).all(1) & allowed[row])
                found += [(item, score) for item in sorted(items.tolist(), key=lambda item: (-order[item], item))]
        rows.append((found + [(-1, -np.inf)] * k)[:k])
    return rows


@pytest.mark.parametrize("k", [1, 7, 40, 150])
@pytest.mark.parametrize("share", [None, 0.6, 0.0])
def test_items_come_in_beam_order_and_then_in_the_stated_order(k, share):
    codes = random_codes(30, 120, (3, 4, 4))  # 48 IDs at most: every ID is shared
    generator = np.random.default_rng(31)
    order = generator.integers(0, 4, 120)
    trie = build_trie(codes, (3, 4, 4), order=order, capacity=130)
    allowed = generator.random((2, 120)) < (1.0 if share is None else share)
    model = ToyModel(32, batch=2, sizes=(3, 4, 4))
    # Searched without the filter, so that IDs without any allowed item have to be skipped too.
    result = model.search(trie, 25)
    given_filter = None if share is None else jnp.asarray(allowed)
    items, scores = jax.jit(lambda *a: expand_items(*a, k=k, allowed=given_filter))(trie, result)
    for row, expected in enumerate(expansion_oracle(codes, order, result, k, allowed)):
        assert items[row].tolist() == [item for item, _ in expected]
        np.testing.assert_array_equal(scores[row], np.array([score for _, score in expected], np.float32))


def test_items_of_an_unconstrained_search_come_from_its_valid_ids():
    codes = random_codes(33, 60)
    trie = build_trie(codes, SIZES)
    model = ToyModel(34, batch=2)
    result = model.search(trie, 30, constrained=False)
    items, _ = expand_items(trie, result, k=60)
    for row, expected in enumerate(expansion_oracle(codes, np.zeros(60), result, 60, np.ones((2, 60), bool))):
        assert items[row].tolist() == [item for item, _ in expected]


def test_asking_for_no_items_is_refused():
    trie = build_trie(random_codes(35, 5), SIZES)
    with pytest.raises(UserError, match="k is 0"):
        expand_items(trie, ToyModel(36, batch=1).search(trie, 2), k=0)


# ---- full levels, rescoring, caps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("beam_width", [3, 200])
@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("quantum", [None, 0.5])
def test_levels_with_bits_give_the_oracles_result(beam_width, share, quantum):
    """Levels where most codes follow are searched by bits, with a filter by children: both are the oracle's."""
    sizes = (32, 64)
    codes = random_codes(40, 1700, sizes)
    trie = build_trie(codes, sizes)
    assert all(bits is not None for bits in trie.bits)
    model = ToyModel(41, batch=2, sizes=sizes, quantum=quantum)
    if share is not None:
        model.allowed = np.random.default_rng(42).random((2, 1700)) < share
    check(model, model.search(trie, beam_width), codes, [beam_width] * 2, model.allowed)


WEIGHTS = np.random.default_rng(50).normal(size=(3, 6)).astype(np.float32)


def rank_scores(candidates, cache):
    """A score of the last code alone, added up over the levels as in RankGR Eq. 18."""
    assert candidates.parents.shape == candidates.codes.shape[:2]
    code = jnp.maximum(candidates.codes[..., -1], 0)
    return candidates.parent_scores + jnp.asarray(WEIGHTS)[candidates.level, code]


def second(code: tuple[int, ...]) -> np.float32:
    return WEIGHTS[len(code) - 1, code[-1]]


@pytest.mark.parametrize(
    ("widths", "pools"), [((3, 4, 5), (4, 9, 12)), ((5, 5, 5), (5, 5, 5)), ((40, 40, 99), (50, 50, 99))]
)
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("cap", [None, 2])
@pytest.mark.parametrize("quantum", [None, 1.0])
def test_rescoring_ranks_the_best_candidates_of_the_model(widths, pools, filtered, cap, quantum):
    """RankGR §3.3.2: the best lambda by log-probability, of them the best by the sum of the rank scores."""
    codes = random_codes(51, 70)
    model = ToyModel(52, batch=2, quantum=quantum)
    if filtered:
        model.allowed = np.random.default_rng(53).random((2, 70)) < 0.4
    options = {"rescore": rank_scores, "candidates": pools, "per_prefix": cap}
    result = model.search(build_trie(codes, SIZES), widths, **options)
    for row in range(2):
        ids = np.unique(codes if model.allowed is None else codes[model.allowed[row]], axis=0)
        expected = model.oracle(row, ids, widths, second, pools, cap)
        found = len(expected)
        assert result.valid[row].tolist() == [place < found for place in range(widths[-1])]
        assert [tuple(code) for code in result.codes[row, :found].tolist()] == [code for _, code in expected]
        np.testing.assert_array_equal(result.scores[row, :found], np.array([s for s, _ in expected], np.float32))
        own = np.array([model.score(row, np.array(code)) for _, code in expected], np.float32)
        np.testing.assert_array_equal(result.log_probs[row, :found], own)


DRAWN_SIZES, DRAWN_CAPACITY, DRAWN_BATCH = (4, 3, 5), 32, 2
# One compilation each; everything else that a search depends on is drawn.
OPTIONS = {
    "widths": {"beam_width": (2, 5, 9)},
    "capped": {"beam_width": (3, 4, 6), "per_prefix": 2},
    "free": {"beam_width": (3, 4, 8), "constrained": False},
    "free, capped": {"beam_width": (4, 6, 5), "constrained": False, "per_prefix": 1},
    "rescored": {"beam_width": (2, 4, 6), "candidates": (3, 7, 9), "rescore": True},
    "rescored, capped": {"beam_width": (3, 5, 6), "candidates": (4, 8, 12), "rescore": True, "per_prefix": 2},
    "rescored, free": {"beam_width": (4, 5, 8), "candidates": (4, 10, 20), "rescore": True, "constrained": False},
    "rescored, exhaustive": {"beam_width": 60, "rescore": True},
}


def drawn_scores(candidates, cache):
    """As `rank_scores`, with the weights of each request."""
    weights = jnp.take_along_axis(cache["weights"], candidates.parents[:, :, None, None], axis=1)[
        :, :, candidates.level
    ]
    code = jnp.maximum(candidates.codes[..., -1:], 0)
    return candidates.parent_scores + jnp.take_along_axis(weights, code, axis=-1)[..., 0]


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, DRAWN_CAPACITY),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    quantum=st.sampled_from([None, 1.0]),
    impossible=st.sampled_from([0.0, 0.2]),
)
def test_any_search_with_any_options_gives_the_oracles_result(name, seed, count, share, quantum, impossible):
    """Also where scores tie, and where the model or `rescore` says that something can't be."""
    options = dict(OPTIONS[name])
    free, is_rescored = not options.get("constrained", True), options.pop("rescore", False)
    widths = np.broadcast_to(options["beam_width"], 3).tolist()
    pools = list(options.get("candidates", widths))
    generator = np.random.default_rng(seed)
    codes = random_codes(seed, count, DRAWN_SIZES)
    model = ToyModel(seed, DRAWN_BATCH, DRAWN_SIZES, quantum)
    for table in model.tables:
        table[generator.random(table.shape) < impossible] = -np.inf
    model.allowed = generator.random((DRAWN_BATCH, DRAWN_CAPACITY)) < share
    if is_rescored:
        weights = generator.normal(size=(DRAWN_BATCH, 3, max(DRAWN_SIZES))).astype(np.float32)
        weights = np.round(weights) if quantum else weights
        weights[generator.random(weights.shape) < impossible / 2] = -np.inf
        options |= {"rescore": drawn_scores, "weights": weights}
    result = model.search(build_trie(codes, DRAWN_SIZES, like=drawn_shapes()), **options)
    leaves = np.unique(codes, axis=0)
    every = np.array(np.meshgrid(*map(np.arange, DRAWN_SIZES), indexing="ij")).reshape(3, -1).T
    for row in range(DRAWN_BATCH):
        allowed = np.unique(codes[model.allowed[row, :count]], axis=0)

        def second_of_row(code, row=row):
            return weights[row, len(code) - 1, code[-1]]

        expected = model.oracle(
            row, every if free else allowed, widths, second_of_row if is_rescored else None, pools,
            options.get("per_prefix"),
        )  # fmt: skip
        found, ids = len(expected), [code for _, code in expected]
        assert [tuple(code) for code in result.codes[row, :found].tolist()] == ids
        assert (result.codes[row, found:] == -1).all() and not result.valid[row, found:].any()
        np.testing.assert_array_equal(result.scores[row, :found], np.array([s for s, _ in expected], np.float32))
        np.testing.assert_array_equal(result.log_probs[row, :found], [model.score(row, code) for code in ids])
        exists = set(map(tuple, allowed.tolist()))
        assert result.valid[row, :found].tolist() == [code in exists for code in ids]
        real = result.valid[row]
        np.testing.assert_array_equal(leaves[result.leaf[row, real]], result.codes[row, real])
    assert not result.nan.any()


@functools.cache
def drawn_shapes():
    """A trie in whose shapes every catalogue fits: all the codes there are follow some node."""
    return build_trie(np.argwhere(np.ones(DRAWN_SIZES))[:DRAWN_CAPACITY], DRAWN_SIZES, capacity=DRAWN_CAPACITY)


def test_rescoring_reads_the_state_of_the_beam_a_candidate_grew_from():
    codes = random_codes(54, 80)
    seen = []

    def rescore(candidates, cache):
        if candidates.level == 2:
            prefix = jnp.take_along_axis(cache["prefix"], candidates.parents[..., None], axis=1)
            seen.append((prefix[..., :2], candidates.codes, candidates.log_probs > -jnp.inf))
        return candidates.log_probs

    model = ToyModel(55, batch=2)
    with jax.disable_jit():
        model.search(build_trie(codes, SIZES), 6, rescore=rescore)
    [(prefix, grown, alive)] = seen
    np.testing.assert_array_equal(prefix[alive], grown[..., :2][alive])


def test_what_rescoring_says_of_the_excluded_does_not_count():
    """It can drop a candidate, and not bring one back."""
    codes = np.array([[0, 0, 0], [1, 1, 1], [2, 2, 2]])
    model = ToyModel(56, batch=2)
    model.allowed = np.array([[True, True, False], [True, True, True]])

    def rescore(candidates, cache):
        return jnp.where(candidates.codes[..., 0] == 1, -jnp.inf, 100.0)

    result = model.search(build_trie(codes, SIZES), 8, rescore=rescore)
    assert [sorted(leaf[valid].tolist()) for leaf, valid in zip(result.leaf, result.valid, strict=True)] == [
        [0],
        [0, 2],
    ]
    assert not result.nan.any()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_and_infinity_of_rescoring_are_reported(poison):
    codes = random_codes(57, 40)

    def rescore(candidates, cache):
        row = jnp.arange(2)[:, None] == 1
        return jnp.where(row & (candidates.level == 1), poison, candidates.log_probs)

    result = ToyModel(58, batch=2).search(build_trie(codes, SIZES), 9, rescore=rescore)
    assert result.nan.tolist() == [False, True]
    assert result.valid.any(1).tolist() == [True, False]


@pytest.mark.parametrize("cap", [1, 3, 100])
@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("quantum", [None, 1.0])
def test_at_most_so_many_results_begin_with_one_code(cap, constrained, quantum):
    codes = random_codes(60, 90)
    every = np.array(np.meshgrid(*map(np.arange, SIZES), indexing="ij")).reshape(3, -1).T
    model = ToyModel(61, batch=2, quantum=quantum)
    result = model.search(build_trie(codes, SIZES), 8, constrained, per_prefix=cap)
    for row in range(2):
        expected = model.oracle(row, np.unique(codes, axis=0) if constrained else every, [8] * 3, cap=cap)
        found = len(expected)
        assert [tuple(code) for code in result.codes[row, :found].tolist()] == [code for _, code in expected]
        assert (result.codes[row, found:] == -1).all()
        assert np.bincount(result.codes[row, :found, 0]).max() <= cap


def test_wrong_rescoring_calls_are_named():
    trie, model = build_trie(random_codes(62, 10), SIZES), ToyModel(0, batch=1)
    for options, message in (
        ({"candidates": 9}, "without `rescore`"),
        ({"candidates": (9, 3, 9), "rescore": rank_scores}, "candidates is 3 at level 1, whose beam is 4 wide"),
        ({"candidates": (9, 9), "rescore": rank_scores}, "one for each of 3 levels"),
        ({"rescore": lambda asked, cache: asked.log_probs[:, :1]}, r"rescore gave scores \(1, 1\) at level 0"),
        ({"per_prefix": 0}, "per_prefix is 0"),
    ):
        with pytest.raises(UserError, match=message):
            model.search(trie, 4, **options)
    with pytest.raises(UserError, match="use text_search"):
        model.search(build_text_trie([[0, 1]], 5, 1), 4)


# ---- one function ----------------------------------------------------------------------------------------------------


def primitives(jaxpr) -> set[str]:
    """Names of all primitives, of inner functions too."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for inner in jaxprs_in_params(equation.params):
            names |= primitives(inner)
    return names


@pytest.mark.parametrize("options", [{}, {"constrained": False}, {"rescore": rank_scores}, {"per_prefix": 2}])
def test_no_step_goes_back_to_the_host(options):
    trie, model = build_trie(random_codes(63, 40), SIZES), ToyModel(64, batch=2)
    allowed = jnp.ones((2, 40), bool)
    traced = jax.make_jaxpr(functools.partial(decode.__wrapped__, beam_width=5, **options))(model.tables, trie, allowed)
    names = primitives(traced.jaxpr)
    assert "top_k" in names
    assert not [name for name in names if "callback" in name or name in ("infeed", "outfeed", "device_put")]


def test_a_filter_built_before_is_as_good():
    codes = random_codes(65, 60)
    trie, model = build_trie(codes, SIZES), ToyModel(66, batch=2)
    model.allowed = np.random.default_rng(67).random((2, 60)) < 0.5
    fresh = model.search(trie, 9)
    model.allowed = build_filter(trie, jnp.asarray(model.allowed))
    jax.tree.map(np.testing.assert_array_equal, fresh, model.search(trie, 9))
    items, _ = expand_items(trie, jax.tree.map(jnp.asarray, fresh), k=5, allowed=model.allowed)
    assert (items >= 0).all()


# ---- peers' bugs -----------------------------------------------------------------------------------------------------


def test_peers_temperature_or_penalty_after_the_mask_does_not_bring_back_what_it_excluded():
    """MiniOneRec applies logits warpers to masked scores: -inf / temperature, plus a finite penalty, can win again.

    Here whatever happens to log-probabilities happens before the trie looks at them, and `rescore` can't undo it.
    """
    sizes = (6, 6)
    codes = np.array([[1, 2], [1, 3], [4, 0]])
    model = ToyModel(70, batch=1, sizes=sizes)
    model.tables = [table / 0.01 + 1000 for table in model.tables]  # flattened or sharpened, shifted: any warper
    result = model.search(build_trie(codes, sizes), 6, rescore=lambda asked, cache: 0 * asked.nodes + 1e6)
    assert sorted(map(tuple, result.codes[0, :3].tolist())) == [(1, 2), (1, 3), (4, 0)]
    assert result.valid[0].tolist() == [True] * 3 + [False] * 3


def test_peers_a_shared_id_gives_all_its_items_not_the_first():
    codes = np.array([[0, 1, 2], [3, 0, 0], [0, 1, 2], [0, 1, 2]])
    trie = build_trie(codes, SIZES, order=np.array([5, 0, 9, 7]))
    result = ToyModel(71, batch=1).search(trie, 2)
    items, scores = expand_items(trie, jax.tree.map(jnp.asarray, result), k=4)
    shared = result.leaf[0].tolist().index(0)
    assert items[0].tolist() == ([2, 3, 0, 1] if shared == 0 else [1, 2, 3, 0])
    assert len(set(scores[0].tolist())) == 2
