"""Contrastive alignment: the loss by hand, its masks against loops, and what training does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.losses.contrastive import pair_loss
from jaxrec.text.align import (
    AlignConfig,
    align,
    apply,
    apply_all,
    honest_negatives,
    init,
    measure,
    pair_recall,
    partner_table,
)

CONFIG = AlignConfig(width=8, hidden=16, batch_size=64, epochs=60, residual_decay=0.1, learning_rate=1e-2, held_out=0.1)


def test_loss_of_two_pairs_by_hand():
    scores = jnp.array([[2.0, 1.0], [0.0, 3.0]])
    log_q = jnp.log(jnp.array([[0.5, 0.25], [0.125, 0.5]]))
    loss = pair_loss(scores, log_q, jnp.ones((2, 2), bool))
    e = np.exp
    right = [-np.log(e(2) * 8 / (e(2) * 8 + e(1) * 2)), -np.log(e(3) * 2 / (e(0) * 8 + e(3) * 2))]
    left = [-np.log(e(2) * 2 / (e(2) * 2 + e(0) * 4)), -np.log(e(3) * 4 / (e(1) * 2 + e(3) * 4))]
    np.testing.assert_allclose(loss, (np.array(right) + left) / 2, rtol=1e-5)


def test_a_pair_without_negatives_costs_nothing():
    loss = pair_loss(jnp.array([[2.0, 50.0], [50.0, 3.0]]), jnp.zeros((2, 2)), jnp.zeros((2, 2), bool))
    np.testing.assert_allclose(loss, 0, atol=1e-6)


def test_negatives_against_a_loop():
    rng = np.random.default_rng(0)
    pairs = np.unique(np.sort(rng.integers(0, 12, (20, 2)), axis=1), axis=0)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    left, right = pairs[rng.integers(0, len(pairs), 16)].T
    known = {tuple(pair) for pair in pairs} | {tuple(pair[::-1]) for pair in pairs}
    expected = [
        [
            (left[b], right[c]) not in known and left[b] not in (right[c], left[c]) and right[b] != right[c]
            for c in range(16)
        ]
        for b in range(16)
    ]
    table = partner_table(pairs.astype(np.int32), 12)
    where = honest_negatives(left, right, (table[left][:, None, :] == right[None, :, None]).any(-1))
    np.testing.assert_array_equal(where, expected)


@pytest.fixture(scope="module")
def shop():
    """120 items: 30 texts, each of four items; an item goes with the items of its hidden kind, two of each text."""
    rng = np.random.default_rng(0)
    text = np.repeat(rng.normal(size=(30, 16)), 4, axis=0).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    item = np.arange(120)
    kind = (item // 4 % 5) * 2 + item % 2
    left, right = np.nonzero((kind[:, None] == kind) & (item[:, None] < item))
    return text, np.stack([left, right], axis=1), kind


def test_training_finds_held_out_pairs_and_splits_equal_texts(shop):
    text, pairs, kind = shop
    fitted = align(jax.random.key(0), text, pairs, CONFIG, categories=kind)
    assert fitted.metrics["same_category@10_after"] > fitted.metrics["same_category@10_before"] + 0.3
    vectors = apply_all(fitted.params, text)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    same_kind, other_kind = ((vectors[::4] * vectors[i::4]).sum(1).mean() for i in (2, 1))  # all with the same text
    assert same_kind > other_kind + 0.2


def test_without_residuals_the_text_alone_decides(shop):
    text, pairs, _ = shop
    config = AlignConfig(width=8, hidden=16, batch_size=64, epochs=1, item_residual=False)
    vectors = apply_all(align(jax.random.key(0), text, pairs, config).params, text)
    np.testing.assert_array_equal(vectors[0], vectors[1])


def test_an_item_without_pairs_and_a_new_item_follow_their_text(shop):
    text, pairs, _ = shop
    alone = pairs[(pairs != 0).all(1)]
    params = align(jax.random.key(0), text, alone, CONFIG).params
    np.testing.assert_allclose(apply_all(params, text)[0], apply(params, text[:1])[0], atol=1e-6)


def test_the_same_key_gives_the_same_bits(shop):
    text, pairs, _ = shop
    one, two = (
        apply_all(align(jax.random.key(3), text, pairs, AlignConfig(epochs=1, batch_size=64)).params, text)
        for _ in range(2)
    )
    np.testing.assert_array_equal(one, two)


def test_held_out_recall_leaves_training_partners_out():
    text = np.eye(4, dtype=np.float32)
    text[1] = text[0] * 0.9 + text[1] * 0.1
    params = {
        "mean": jnp.zeros(4),
        "linear": jnp.eye(4),
        "up": {"kernel": jnp.zeros((4, 1)), "bias": jnp.zeros(1)},
        "down": {"kernel": jnp.zeros((1, 4))},
    }
    test = np.array([[0, 2]])
    # Item 1 is nearest to item 0; as a training partner it does not take the one place.
    assert measure(params, text, np.array([[0, 3]]), test, k=1)["pair_recall@1"] == 0.5
    assert measure(params, text, np.array([[0, 1]]), test, k=1)["pair_recall@1"] == 1.0


@pytest.mark.parametrize("scores", [2**26, 20])
def test_recall_against_a_loop(monkeypatch, scores):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(15, 4)).astype(np.float32)
    test, known, candidates = rng.integers(0, 15, (9, 2)), rng.integers(0, 15, (20, 2)), rng.random(15) < 0.8
    found = []
    for left, right in test:
        gone = {left} | {b for a, b in known if a == left} | set(np.flatnonzero(~candidates))
        nearer = [
            other for other in set(range(15)) - gone if vectors[left] @ vectors[other] > vectors[left] @ vectors[right]
        ]
        found.append(len(nearer) < 3)
    monkeypatch.setattr("jaxrec.text.align.SCORES", scores)
    assert pair_recall(vectors, test, known, k=3, candidates=candidates) == np.mean(found)
    assert 0 < np.mean(found) < 1


def test_recall_of_some_pairs_looks_at_no_more():
    """Of three pairs two are measured, the first and the last, which is found."""
    vectors = np.array([[1, 0], [0.9, 0.1], [0.8, 0.3], [0, 1]], np.float32)
    test, none = np.array([[0, 3], [0, 2], [0, 1]]), np.zeros((0, 2), int)
    assert pair_recall(vectors, test, none, k=1, most=3) == pytest.approx(1 / 3)
    assert pair_recall(vectors, test, none, k=1, most=2) == 0.5


def test_recall_among_some_candidates_by_hand():
    vectors = np.full((50, 2), np.nan, np.float32)
    vectors[[10, 20, 30]] = [[1, 0], [0.9, 0.1], [0, 1]]
    candidates = np.isin(np.arange(50), [20, 30])
    test, known = np.array([[10, 30], [10, 20]]), np.array([[10, 40], [0, 20]])
    assert pair_recall(vectors, test, known, k=1, candidates=candidates) == 0.5
    # As a partner that is known, 20 leaves the one place to 30.
    assert pair_recall(vectors, test[:1], np.array([[10, 20]]), k=1, candidates=candidates) == 1.0


@pytest.mark.parametrize("scores", [2**26, 5])
def test_neighbours_of_the_same_category_by_hand(monkeypatch, scores):
    monkeypatch.setattr("jaxrec.text.align.SCORES", scores)
    text = np.eye(3, dtype=np.float32)
    params = init(jax.random.key(0), text, AlignConfig(width=3, hidden=4))
    none = np.zeros((0, 2), int)
    measured = measure(params, text, none, none, np.array(["a", "a", "b"]))
    # Each has the two others: the first two one of their category among them, the third none.
    assert measured == {"same_category@10": pytest.approx(1 / 3)}
    assert measure(params, text[:1], none, none, np.array(["a"])) == {}


def test_an_item_in_the_middle_of_all_spoils_no_gradient():
    """Its vector is zero, as it was before anything was learned."""
    text = np.array([[1, 0], [-1, 0], [0, 0]], np.float32)
    params = init(jax.random.key(0), text, AlignConfig(width=2, hidden=4))
    gradient = jax.grad(lambda params: apply(params, text, jnp.arange(3))[:, 0].sum())(params)
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), gradient))


def test_bad_input_is_named(shop):
    text, pairs, _ = shop
    broken = text.copy()
    broken[7, 3] = np.nan
    with pytest.raises(UserError, match="item 7"):
        align(jax.random.key(0), broken, pairs, CONFIG)
    with pytest.raises(UserError, match="item 500"):
        align(jax.random.key(0), text, np.array([[0, 500]]), CONFIG)


@pytest.mark.parametrize("left_out", ["pairs", "epochs"])
def test_without_pairs_or_passes_the_texts_geometry_stays(shop, left_out):
    text, pairs, _ = shop
    pairs = pairs[:0] if left_out == "pairs" else pairs
    config = AlignConfig(width=16, epochs=0 if left_out == "epochs" else 3)
    vectors = apply_all(align(jax.random.key(0), text, pairs, config).params, text)
    centred = text - text.mean(0)
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-4)
