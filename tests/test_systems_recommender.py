"""Recommending with a generative model, against scoring every item of the catalogue."""

import dataclasses
import gc
import itertools
import weakref

import jax
import numpy as np
import pyarrow as pa
import pytest
from compilations import count_compilations
from onemall_parts import (
    FEATURES,
    ITEMS,
    MODEL,
    SIZES,
    make_arrays,
    make_assembly,
    make_history,
    make_variables,
)

from jaxrec.catalogue.live import LiveCatalogue
from jaxrec.config import UserError
from jaxrec.data.token_sequences import TokenSequenceConfig
from jaxrec.evaluation.cases import Cases
from jaxrec.models.prior import build_prior
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender
from jaxrec.targets import SemanticIdSpace

IDS = np.array(list(itertools.product(*map(range, SIZES))), np.int32)
TWO_LENGTHS = dataclasses.replace(FEATURES, buckets=(3, 6))
# Lengths that alternate between the two buckets, and more of one than a batch takes.
HISTORIES = [make_history(seed, events) for seed, events in enumerate([12, 2, 9, 3, 0, 14, 1, 10, 16, 11])]
LONG = [0, 2, 5, 7, 8, 9]


@pytest.fixture(scope="module")
def recommender() -> GenerativeRecommender:
    assembly = make_assembly(dataclasses.replace(MODEL, layers=1, queries=0))
    decoding = DecodingConfig(beam_width=len(IDS), batch_size=4)
    return GenerativeRecommender(assembly, make_variables(assembly), TWO_LENGTHS, decoding)


@pytest.fixture(scope="module")
def everything(recommender):
    """All items, ranked for everybody."""
    return recommender.recommend(HISTORIES, ITEMS)


@pytest.fixture(scope="module")
def log_probs(recommender) -> np.ndarray:
    """The log-probability of every ID after each history, [10, 24], by `score`."""
    assembly = recommender.assembly

    @jax.jit
    def score(variables, arrays, targets):
        context = assembly.model.apply(variables, assembly.inputs(assembly.catalogue, arrays), method="prefill")
        return assembly.model.apply(variables, context, targets, method="score").log_probs.sum(-1)

    rows = []
    for history in HISTORIES:
        config = dataclasses.replace(FEATURES, buckets=(3,) if longest(history) <= 3 else (6,))
        rows.append(score(recommender.variables, make_arrays([history], assembly, config), IDS[None])[0])
    return np.stack(rows)


def longest(history) -> int:
    return np.bincount(history["behavior"], minlength=1).max()


def seen(history) -> set[int]:
    return set(history["item"][history["behavior"] == 1].tolist())


def ranking(space, log_probs: np.ndarray) -> list[int]:
    """All items by the score of their ID, those of one ID by falling popularity, then by index."""
    score = {tuple(each): value for each, value in zip(IDS.tolist(), log_probs.tolist(), strict=True)}
    keys = [(-score[tuple(code)], -count) for code, count in zip(space.codes.tolist(), space.popularity, strict=True)]
    return sorted(range(ITEMS), key=lambda item: (*keys[item], item))


def test_histories_are_of_two_lengths():
    assert [row for row, history in enumerate(HISTORIES) if longest(history) > 3] == LONG


def test_it_ranks_as_an_exhaustive_search_does(recommender, everything, log_probs):
    items, scores = everything
    space = recommender.assembly.space
    assert space.counts.max() >= 4
    for row in range(len(HISTORIES)):
        assert items[row].tolist() == ranking(space, log_probs[row])
    of_item = [np.flatnonzero((code == IDS).all(-1))[0] for code in space.codes]
    np.testing.assert_allclose(scores, np.take_along_axis(log_probs[:, of_item], items, axis=1), atol=2e-5)
    # Users differ, so that a row in another's place would show.
    assert len({tuple(row) for row in items.tolist()}) == len(HISTORIES)


def test_exclude_history_leaves_out_exactly_what_was_bought(recommender, log_probs):
    items, scores = recommender.recommend([HISTORIES[row] for row in LONG], ITEMS, exclude_history=True)
    for place, row in enumerate(LONG):
        bought = seen(HISTORIES[row])
        expected = [item for item in ranking(recommender.assembly.space, log_probs[row]) if item not in bought]
        assert bought
        assert items[place].tolist() == expected + [-1] * len(bought)
        assert np.isneginf(scores[place, len(expected) :]).all()


def test_who_else_is_in_the_batch_does_not_matter(recommender, everything):
    items, scores = everything
    for row in (0, 1, 4, 9):
        alone_items, alone_scores = recommender.recommend([HISTORIES[row]], ITEMS)
        assert alone_items[0].tolist() == items[row].tolist()
        np.testing.assert_allclose(alone_scores[0], scores[row], atol=2e-5)
    order = [7, 3, 0, 5]
    shuffled, _ = recommender.recommend([HISTORIES[row] for row in order], ITEMS)
    assert shuffled.tolist() == items[order].tolist()


def test_the_size_of_a_batch_makes_no_difference(recommender, everything, monkeypatch):
    """Of six and four histories, one a bucket, those of sizes 1 and 2 are in three and two batches of two."""
    rows, search = [], recommender._search
    monkeypatch.setattr(recommender, "_search", lambda *of: (rows.append(len(of[1]["user"])), search(*of))[1])
    items, scores = recommender.recommend(HISTORIES, ITEMS, sizes=(1, 2))
    assert rows == [2] * 5
    np.testing.assert_array_equal(items, everything[0])
    np.testing.assert_allclose(scores, everything[1], atol=2e-5)
    items, _ = recommender.recommend(HISTORIES[:1], ITEMS, sizes=(1, 2))
    np.testing.assert_array_equal(items, everything[0][:1])
    recommender.recommend(HISTORIES[:1], ITEMS)
    assert rows[5:] == [1, 4], "by default there is one size"


def test_a_history_for_every_length(recommender):
    features = recommender.feature_config
    assert [longest(history) for history in recommender.every_length()] == list(features.buckets)
    # Of the weak behavior 2 events are read: only the other one fills the longer bucket.
    short = dataclasses.replace(features, history_lengths=(2, 6))
    parts = recommender.assembly, recommender.variables
    assert [longest(history) for history in GenerativeRecommender(*parts, short, DecodingConfig()).every_length()] == [
        *features.buckets
    ]
    # No history falls into a bucket beyond what is read.
    unread = dataclasses.replace(features, history_lengths=(3,), past_length=3)
    assert len(GenerativeRecommender(*parts, unread, DecodingConfig()).every_length()) == 1


class ReadsLetters:
    """An assembly whose tokens are pairs of letters of what was typed."""

    behaviors, space = ("purchase",), SemanticIdSpace(np.zeros((1, 1), np.int32), (1,))

    def read_texts(self, history):
        return {**history, "tokens": np.zeros(len(history.get("query", "")) // 2 + 1, np.int32)}


def test_a_typed_text_for_every_length():
    features = TokenSequenceConfig((4, 8, 32))
    found = GenerativeRecommender(ReadsLetters(), {}, features, DecodingConfig()).every_length()
    buckets = [features.bucket_of(ReadsLetters().read_texts(history), 0) for history in found]
    assert buckets == [4, 8, 32] and all(history["query"] for history in found[1:])


def test_nobody_asks(recommender):
    items, scores = recommender.recommend([], ITEMS)
    assert items.shape == scores.shape == (0, ITEMS)
    assert items.dtype == np.int32
    assert scores.dtype == np.float32


def test_only_the_last_of_given_beams_grows_with_what_is_asked_for(recommender):
    given = (2,) * (recommender.space.levels - 1) + (4,)
    parts = recommender.assembly, recommender.variables, recommender.feature_config
    wide = GenerativeRecommender(*parts, DecodingConfig(beam_widths=given))
    assert wide.width(3) == given
    assert wide.width(9) == (*given[:-1], 9)


@pytest.mark.parametrize("bad", [{"beam_width": 0}, {"batch_size": 0}, {"beam_widths": (4, 0)}])
def test_decoding_that_cant_be_is_named(bad):
    with pytest.raises(UserError, match=rf"decoding\.{next(iter(bad))}'"):
        DecodingConfig(**bad)


def test_a_damaged_model_is_told(recommender, monkeypatch):
    damaged = jax.tree.map(lambda x: x * np.nan, recommender.variables)
    monkeypatch.setattr(recommender, "served", recommender.served.replace(variables=damaged))
    with pytest.raises(FloatingPointError, match="NaN"):
        recommender.recommend(HISTORIES[:1], ITEMS)


def test_diagnose_against_counting(recommender, log_probs):
    """Level by level from the sums over all IDs; validity from the ten most likely IDs."""
    rng = np.random.default_rng(0)
    targets, where = rng.integers(0, ITEMS, (6, 3)), rng.random((6, 3)) < 0.7
    where[0] = [True, False, False]
    cases = Cases(np.arange(6), [HISTORIES[row] for row in LONG], np.where(where, targets, -1), where, where)
    found = recommender.diagnose(cases)

    codes, right = recommender.assembly.space.codes, np.zeros(3)
    existing = {tuple(code) for code in codes.tolist()}
    valid = 0
    for row, case in enumerate(LONG):
        joint = np.exp(log_probs[case])
        for target in targets[row][where[row]]:
            for level in range(3):
                begins = (IDS[:, :level] == codes[target, :level]).all(-1)
                mass = [joint[begins & (IDS[:, level] == code)].sum() for code in range(SIZES[level])]
                right[level] += np.argmax(mass) == codes[target, level]
        valid += sum(tuple(IDS[index].tolist()) in existing for index in np.argsort(-log_probs[case])[:10])
    assert [found[f"acc_sid{level + 1}"] for level in range(3)] == [(hits, where.sum()) for hits in right]
    assert found["validity"] == (valid, 60)


def test_diagnose_searches_with_the_beams_of_every_level(recommender, log_probs):
    """With one beam for the first two levels, all IDs found begin with the most probable code after the other."""
    parts = recommender.assembly, recommender.variables, recommender.feature_config
    narrow = GenerativeRecommender(*parts, DecodingConfig(beam_widths=(1, 1, 2), batch_size=4))
    targets, where = np.zeros((6, 1), np.int64), np.ones((6, 1), bool)
    cases = Cases(np.arange(6), [HISTORIES[row] for row in LONG], targets, where, where)
    existing, valid = {tuple(code) for code in recommender.space.codes.tolist()}, 0
    for case in LONG:
        prefix, joint = (), np.exp(log_probs[case])
        for level in range(2):
            begins = [(IDS[:, : level + 1] == (*prefix, code)).all(-1) for code in range(SIZES[level])]
            prefix = (*prefix, int(np.argmax([joint[each].sum() for each in begins])))
        valid += sum((*prefix, code) in existing for code in range(SIZES[2]))
    # Ten are asked for, the places without a beam hold none.
    found, asked_for = narrow.diagnose(cases)["validity"]
    assert 0 < found == valid < asked_for


def test_nothing_keeps_a_recommender_alive_that_was_used(recommender):
    assembly = dataclasses.replace(recommender.assembly)
    used = GenerativeRecommender(assembly, recommender.variables, TWO_LENGTHS, recommender.config)
    used.recommend(HISTORIES[:1], 3)
    used.diagnose(Cases(np.arange(1), HISTORIES[:1], np.zeros((1, 1), np.int64), *np.ones((2, 1, 1), bool)))
    alive = weakref.ref(used), weakref.ref(assembly)
    del used, assembly
    gc.collect()
    assert [each() for each in alive] == [None, None]


def test_a_training_that_is_measured_again_compiles_nothing(recommender):
    """As `jaxrec.systems.validation` does: the items' vectors are made of other parameters every time."""
    assembly = recommender.assembly

    def measure(factor: float):
        served = assembly.serve(jax.tree.map(lambda x: x * factor, recommender.variables))
        return recommender.recommend(HISTORIES, 3, served=served.replace(trie=recommender.served.trie))

    measure(1.0)
    with count_compilations() as compiled:
        measure(0.5)
    assert compiled == []


# ---- filters, and a catalogue that changes ---------------------------------------------------------------------------


def items_of(names) -> pa.Table:
    names = list(names)
    return pa.table({"item_id": names, "even": [row % 2 == 0 for row in range(len(names))]})


def open_catalogue(recommender, **options) -> LiveCatalogue:
    space = recommender.space
    items = items_of(f"i{row}" for row in range(ITEMS))
    return LiveCatalogue(
        items, space.codes, space.codebook_sizes, popularity=space.popularity, model=recommender, **options
    )


def ask(recommender, version, allowed=None, k=ITEMS):
    return recommender.recommend(HISTORIES, k, allowed=allowed, served=version.served)


@pytest.mark.parametrize("filtered", [True, False])
def test_history_is_left_out_of_what_is_allowed_in_the_order_of_what_is_served(recommender, filtered):
    live = open_catalogue(recommender)
    codes, popularity = np.roll(recommender.space.codes, 5, axis=0), recommender.space.popularity
    version = live.swap(live.current.items, codes, popularity=popularity)
    bools = np.random.default_rng(0).random((len(HISTORIES), ITEMS)) < 0.7
    allowed = [version.allowed(row) for row in bools] if filtered else None
    items, _ = recommender.recommend(HISTORIES, ITEMS, exclude_history=True, allowed=allowed, served=version.served)
    may, left_out = ask(recommender, version, allowed)[0], 0
    for history, row, every in zip(HISTORIES, items, may.tolist(), strict=True):
        expected = [item for item in every if item >= 0 and item not in seen(history)]
        assert row.tolist() == expected + [-1] * (ITEMS - len(expected))
        left_out += sum(item in seen(history) for item in every)
    assert left_out > 5


def test_each_history_gets_what_its_own_filter_allows(recommender, log_probs):
    version = open_catalogue(recommender).current
    generator = np.random.default_rng(0)
    bools = generator.random((len(HISTORIES), ITEMS)) < generator.choice([0.2, 0.6, 1.0], (len(HISTORIES), 1))
    bools[3] = False
    items, scores = ask(recommender, version, [version.allowed(row) for row in bools])
    for row, allowed in enumerate(bools):
        expected = [item for item in ranking(recommender.space, log_probs[row]) if allowed[item]]
        assert items[row].tolist() == expected + [-1] * (ITEMS - len(expected))
        assert np.isneginf(scores[row, len(expected) :]).all()


def test_the_first_version_ranks_as_the_model_does(recommender, everything):
    items, scores = ask(recommender, open_catalogue(recommender).current)
    np.testing.assert_array_equal(items, everything[0])
    np.testing.assert_allclose(scores, everything[1], atol=1e-5)


def test_removed_items_are_gone_and_nothing_else_changes(recommender, everything):
    live = open_catalogue(recommender)
    before = ask(recommender, live.current)
    gone = {2, 5, 18}
    items, scores = ask(recommender, live.remove([f"i{row}" for row in gone]))
    for row in range(len(HISTORIES)):
        keep = [place for place, item in enumerate(before[0][row]) if item not in gone]
        assert items[row].tolist() == [*before[0][row][keep], *[-1] * 3]
        np.testing.assert_array_equal(scores[row, : len(keep)], before[1][row][keep])
    items, scores = ask(recommender, live.rollback(1))
    np.testing.assert_array_equal(items, before[0])
    np.testing.assert_array_equal(scores, before[1])


NEW_ROWS = np.array([[3, 2, 1], [0, 1, 1]], np.int32)
EMBEDDINGS = np.random.default_rng(7).normal(size=(2, 6)).astype(np.float32)


def test_new_items_are_scored_and_read_by_codes_and_embedding(recommender):
    """Against a model that was made for the larger catalogue, with the mean as the new items' own vectors."""
    live = open_catalogue(recommender)
    version = live.add(items_of(["n0", "n1"]), NEW_ROWS, popularity=[3, 1], embeddings=EMBEDDINGS)
    old = recommender.assembly
    codes = np.concatenate([old.space.codes, NEW_ROWS])
    popularity = np.concatenate([old.space.popularity, [3, 1]])
    share = (popularity + 1) / (old.space.popularity + 1).sum()
    weights = np.concatenate([old.popularity.weights, np.tile(share[ITEMS:], (2, 1))], axis=1)
    catalogue = dataclasses.replace(
        old.catalogue,
        codes=codes,
        attributes=np.concatenate([old.catalogue.attributes, np.zeros((2, 2), np.int32)]),
        embeddings=np.concatenate([old.catalogue.embeddings, EMBEDDINGS]),
        log_q=np.zeros(ITEMS + 2, np.float32),
        prior=build_prior(codes, weights, SIZES),
    )
    larger = dataclasses.replace(
        old,
        model=old.model.clone(items=ITEMS + 2),
        catalogue=jax.tree.map(jax.numpy.asarray, catalogue),
        space=SemanticIdSpace(codes, SIZES, popularity),
    )
    table = recommender.variables["params"]["item"]["table"]
    params = {**recommender.variables["params"], "item": {"table": np.concatenate([table, [table.mean(0)] * 2])}}
    oracle = GenerativeRecommender(
        larger, {**recommender.variables, "params": params}, recommender.feature_config, recommender.config
    )
    histories = [{**history, "item": history["item"].copy()} for history in HISTORIES[:6]]
    for history in histories:
        history["item"][: len(history["item"]) // 2] = ITEMS + 1
    expected, expected_scores = oracle.recommend(histories, ITEMS + 2)
    items, scores = recommender.recommend(histories, ITEMS + 2, served=version.served)
    np.testing.assert_array_equal(items, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    assert (items == ITEMS).any(1).all() and (items == ITEMS + 1).any(1).all()
    # Another ID for a known item: its vector in histories changes with it, as in a table made anew.
    swapped = live.swap(version.items, np.concatenate([NEW_ROWS[:1], codes[1:]]), popularity=popularity)
    fresh = old.table(recommender.variables, swapped.served.catalogue, np.arange(ITEMS + 2))
    np.testing.assert_allclose(swapped.served.table[: ITEMS + 2], fresh, atol=1e-6)
    assert np.abs(swapped.served.table[0] - version.served.table[0]).max() > 1e-3


def test_changes_compile_nothing_and_growth_is_compiled_before_anybody_asks(recommender):
    live = open_catalogue(recommender, capacity=24)
    everybody = [live.current.allowed()] * len(HISTORIES)
    ask(recommender, live.current), ask(recommender, live.current, everybody)
    live.add(items_of(["n0"]), NEW_ROWS[:1], embeddings=EMBEDDINGS[:1])
    shapes = jax.tree.map(np.shape, live.current.served)
    with count_compilations() as compiled:
        for _ in range(2):
            for change in (lambda: live.remove(["i3", "n0"]), lambda: live.restore(["i3", "n0"]),
                           lambda: live.add(items_of([f"m{live.current.number}"]), NEW_ROWS[1:]),
                           lambda: live.update(items_of(["i2", "i4", "i3"]))):  # fmt: skip
                version = change()
                ask(recommender, version)
                ask(recommender, version, [version.allowed({"even": True}, blocked=[1, 1])] * len(HISTORIES))
        assert jax.tree.map(np.shape, live.current.served) == shapes
    assert compiled == []
    more = items_of([f"x{row}" for row in range(4)])
    with count_compilations() as growing:
        version = live.add(more, np.zeros((4, 3), np.int32))
    assert growing and version.capacity > 24
    with count_compilations() as compiled:
        ask(recommender, version, k=ITEMS)
        ask(recommender, version, [version.allowed({"even": True})] * len(HISTORIES))
    assert compiled == []


def test_embeddings_of_another_width_are_refused(recommender):
    live = open_catalogue(recommender)
    with pytest.raises(UserError, match="embeddings of new items have width 2, those of the run have 6"):
        live.add(items_of(["n0"]), NEW_ROWS[:1], embeddings=[[1, 2]])
    assert live.current.number == 1
