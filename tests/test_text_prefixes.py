"""Prefixes: which queries they co-occur with, Eq. 2 by hand, and the alignment with the queries."""

import numpy as np
import pyarrow as pa
import pytest
from tiny_encoder import make_encoder

from jaxrec.config import UserError
from jaxrec.data.sources.synthetic_mall import SyntheticMall
from jaxrec.text import prefixes as text_prefixes
from jaxrec.text.encoder import EncoderConfig, embed_texts
from jaxrec.text.finetune import FinetuneConfig, embed, finetune
from jaxrec.text.pair_batches import TermConfig, TermsConfig, select
from jaxrec.text.prefixes import PrefixConfig, augment, co_occurrence, most_frequent
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig


def log_of(*rows: tuple[str, str, str]) -> pa.Table:
    return pa.table(
        {name: pa.array(column, pa.string()) for name, column in zip(("prefix", "query", "feedback"), zip(*rows))}
    )


def test_augment_by_hand():
    prefixes = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], np.float32)
    queries = np.array([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]], np.float32)
    table = np.array([[0, 1, -1], [-1, -1, -1], [2, -1, -1]])
    mixed = augment(prefixes, queries, table, weight=0.25)
    # 0.75 (1, 0) + 0.25 (0.5, 0.5); itself; 0.75 (0.6, 0.8) + 0.25 (-1, 0)
    np.testing.assert_allclose(mixed, [[0.875, 0.125], [0.0, 1.0], [0.2, 0.6]], rtol=1e-6)
    np.testing.assert_allclose(augment(prefixes, queries, table)[2], [-0.2, 0.4], rtol=1e-5)  # w = 0.5


def test_augment_against_a_loop(monkeypatch):
    rng = np.random.default_rng(0)
    prefixes, queries = rng.normal(size=(7, 4)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32)
    table = np.where(rng.random((7, 3)) < 0.5, rng.integers(0, 9, (7, 3)), -1)
    table[2] = -1
    expected = []
    for own, row in zip(prefixes, table):
        found = [queries[i] for i in row if i >= 0]
        expected.append(0.3 * own + 0.7 * np.mean(found, axis=0) if found else own)
    np.testing.assert_allclose(augment(prefixes, queries, table, 0.7), expected, atol=1e-6)
    monkeypatch.setattr(text_prefixes, "ROWS_AT_ONCE", 3)
    np.testing.assert_allclose(augment(prefixes, queries, table, 0.7), expected, atol=1e-6)


def test_the_most_frequent_by_hand():
    table = np.array([[4, 0, 2], [1, -1, -1], [-1, -1, -1], [5, 3, 7]])
    count = np.array([[3, 2, 2], [1, 0, 0], [0, 0, 0], [9, 9, 9]])
    assert most_frequent(table, count, 2).tolist() == [[4, 0], [1, -1], [-1, -1], [3, 5]]
    assert most_frequent(table, count, 4, min_count=3).tolist()[0] == [4, -1, -1, -1]
    # Once less: 0 falls behind 2; the only completion is none; what is no completion changes nothing.
    without = np.array([0, 1, 6, -1])
    assert most_frequent(table, count, 2, without=without).tolist() == [[4, 2], [-1, -1], [-1, -1], [3, 5]]
    assert most_frequent(table, count, 2, 2, np.array([2, 6, 6, 7])).tolist() == [[4, 0], [-1, -1], [-1, -1], [3, 5]]


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_the_weight_is_inside_zero_and_one(weight):
    with pytest.raises(UserError, match=r"prefixes\.weight="):
        augment(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros((1, 1), np.int32), weight)


def test_queries_of_a_prefix_are_the_most_frequent_that_were_taken():
    log = log_of(
        ("sm", "smartphone", "order"),
        ("sm", "smartphone", "click"),
        ("sm", "small lamp", "click"),
        ("sm", "smart watch", "click"),
        ("sm", "smoke", "show"),
        ("la", "lamp", "item_click"),
        ("xx", "xylophone", "not_show"),
        ("", "lamp", "order"),
        (None, "lamp", "order"),
        ("la", None, "order"),
    )
    found = co_occurrence(log, PrefixConfig(queries=2))
    assert found.prefixes == ["la", "sm", "xx"]
    assert found.queries == ["lamp", "small lamp", "smart watch", "smartphone"]
    # Of two queries with one click each the first in the alphabet; "xx" has none.
    assert found.table.tolist() == [[0, -1], [3, 1], [-1, -1]]
    assert found.count.tolist() == [[1, 0], [2, 1], [0, 0]]
    texts, pairs = found.pairs()
    named = {(texts[a], texts[b]) for a, b in zip(pairs.left, pairs.right)}
    assert named == {("la", "lamp"), ("sm", "smartphone"), ("sm", "small lamp")}
    twice = co_occurrence(log, PrefixConfig(min_count=2))
    assert (twice.table >= 0).sum(1).tolist() == [0, 1, 0]
    shown = co_occurrence(log, PrefixConfig(feedback=("show",)))
    assert shown.queries == ["smoke"]


def test_a_log_that_cannot_be_used_is_named():
    with pytest.raises(UserError, match="no column 'feedback'"):
        co_occurrence(pa.table({"prefix": ["a"], "query": ["b"]}))
    with pytest.raises(UserError, match=r"no query of the log has feedback order.*'show'.*prefixes\.feedback"):
        co_occurrence(log_of(("a", "b", "show")))
    with pytest.raises(UserError, match=r"prefixes\.queries=0"):
        co_occurrence(log_of(("a", "b", "order")), PrefixConfig(queries=0))


def test_alignment_finds_the_queries_of_prefixes_it_has_not_seen(tmp_path):
    """OneSug Eq. 1 on the prefixes of a synthetic mall, with a random encoder that reads letters."""
    found = co_occurrence(
        SyntheticMall(users=60, items=100, tastes=10, sessions_per_user=4, searched=1).load().suggestions.to_pyarrow()
    )
    texts, pairs = found.pairs()
    spelled = [" ".join(text.replace(" ", "_")) for text in texts]
    make_encoder(tmp_path / "encoder", " ".join(spelled).split())
    kept_back = np.random.default_rng(0).random(len(found.prefixes)) < 0.3
    train = select(pairs, ~kept_back[pairs.left])
    config = FinetuneConfig(
        terms=TermsConfig(p2q=TermConfig(batch_size=32, min_cosine=-1.0)),
        held_out=0.0,
        optim=OptimConfig(learning_rate=5e-3, warmup=5, weight_decay=0.0),
        training=LoopConfig(steps=100, log_every=10),
    )
    text_config = EncoderConfig(model=str(tmp_path / "encoder"), cache_dir=str(tmp_path / "cache"))
    tuned = finetune(spelled, {"p2q": train}, config, text_config, tmp_path / "work")

    def hits(vectors):
        """Share of the unseen prefixes of which the nearest query is one that they were completed to."""
        prefixes, queries = np.split(vectors, [len(found.prefixes)])
        nearest = (prefixes[kept_back] @ queries.T).argmax(1)
        return (found.table[kept_back] == nearest[:, None]).any(1).mean()

    before, after = hits(embed_texts(spelled, text_config)), hits(embed(tuned, spelled, text_config))
    assert after > max(0.5, before + 0.1), (before, after)
