"""Embeddings of all scenarios: the halves by hand, states of live streams in time, and what the two towers learn."""

import zlib
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.config import UserError
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.sources.synthetic_mall import SyntheticMall
from jaxrec.text.scenarios import (
    TowerData,
    TowersConfig,
    compose,
    encode_items,
    init_towers,
    product_table,
    retrieval_recall,
    scenario_embeddings,
    tower_data,
    tower_loss,
    train_towers,
)

CONFIG = TowersConfig(hidden=64, batch_size=64, steps=300, learning_rate=3e-3, item_learning_rate=3e-4)
ROOT = np.sqrt(0.5)


def items_of(scenarios: list[str], products: list[list[str]]) -> pa.Table:
    lists = pa.array(products, pa.list_(pa.string()))
    return pa.table({"item_id": [f"i{n}" for n in range(len(scenarios))], "scenario": scenarios, "product_ids": lists})


def streams_of(*rows: tuple[str, int, list[str]]) -> pa.Table:
    names, times, products = zip(*rows)
    lists = pa.array(products, pa.list_(pa.string()))
    return pa.table({"item_id": list(names), "timestamp": list(times), "product_ids": lists})


def events_of(*rows: tuple[int, int, int, int, str, str]) -> pa.Table:
    names = ("user", "session", "item", "timestamp", "behavior", "split")
    return pa.table({name: list(column) for name, column in zip(names, zip(*rows))})


def test_halves_by_hand():
    vectors = np.array([[1, 0], [0, 1], [3, 4]], np.float32)  # the last is no unit vector
    own = np.array([[1, 0], [0, 2], [0, 1], [1, 0]], np.float32)
    products = np.array([[-1, -1], [0, -1], [0, 1], [2, -1]])
    made = compose(own, products, vectors)
    # A card; a video of product 0; a stream that sells 0 and 1; a video of product 2.
    sold, shown = [[1, 0], [1, 0], [ROOT, ROOT], [0.6, 0.8]], [[1, 0], [0, 1], [0, 1], [1, 0]]
    np.testing.assert_allclose(made, np.concatenate([sold, shown], axis=1) * ROOT, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-6)


def test_products_that_cancel_out_leave_no_nan():
    made = compose(np.eye(2, dtype=np.float32)[:1], np.array([[0, 1]]), np.array([[1, 0], [-1, 0]], np.float32))
    assert np.isfinite(made).all()


def test_cards_keep_their_geometry_and_a_video_lies_between_product_and_content():
    own = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    items = items_of(["product_card", "product_card", "short_video"], [[], [], ["i0"]])
    made = scenario_embeddings(own, items)
    np.testing.assert_allclose(made[0] @ made[1], own[0] @ own[1], atol=1e-6)
    np.testing.assert_allclose(made[2] @ made[0], (1 + own[2] @ own[0]) / 2, atol=1e-6)
    np.testing.assert_allclose(made[2] @ made[1], (own[0] @ own[1] + own[2] @ own[1]) / 2, atol=1e-6)


def test_without_a_known_product_an_item_is_a_card():
    own = np.eye(3, dtype=np.float32)
    items = items_of(["short_video", "product_card", "live_stream"], [["gone"], [], []])
    np.testing.assert_allclose(scenario_embeddings(own, items), np.tile(own, 2) * ROOT, atol=1e-6)
    bare = pa.table({"item_id": ["a", "b", "c"]})
    np.testing.assert_allclose(scenario_embeddings(own, bare), np.tile(own, 2) * ROOT, atol=1e-6)


def test_product_lists_become_numbers():
    lists = pa.chunked_array([pa.array([["b", "gone", "a"], None], pa.list_(pa.string())), pa.array([[], ["c"]])])
    assert product_table(lists, pa.array(["a", "b", "c"])).tolist() == [[1, 0], [-1, -1], [-1, -1], [2, -1]]


def test_a_live_stream_is_what_it_sells_at_the_time():
    own = np.eye(4, dtype=np.float32)
    items = items_of(["product_card", "product_card", "live_stream", "live_stream"], [[]] * 4)
    streams = streams_of(("i2", 200, ["i1"]), ("i3", 150, ["i0"]), ("i2", 100, ["i0"]), ("gone", 1, ["i0"]))
    log = [
        (0, 0, 0, 50, "click", "train"),
        (0, 0, 2, 99, "click", "train"),  # before its first change: it shows itself
        (0, 1, 2, 100, "click", "train"),
        (0, 1, 2, 120, "purchase", "train"),  # met in this session already
        (0, 2, 0, 130, "exposure", "train"),  # no behavior that counts
        (0, 2, 2, 199, "click", "train"),
        (0, 3, 2, 500, "click", "test"),
        (1, 4, 3, 500, "click", "train"),  # another user, who has no history
        (1, 5, 0, 501, "click", "valid"),
    ]
    data = tower_data(own, items, events_of(*log), streams, TowersConfig(history=2))
    # Rows 4.. are the changes by item and time: i2 at 100, i2 at 200, i3 at 150.
    assert data.item.tolist() == [0, 1, 2, 3, 2, 2, 3]
    assert data.current.tolist() == [0, 1, 5, 6]
    assert data.target.tolist() == [2, 4, 4, 5, 0]
    assert data.history.tolist() == [[-1, 0], [0, 2], [2, 4], [4, 4], [-1, 6]]
    assert data.held_out.tolist() == [False, False, False, True, True]
    np.testing.assert_allclose(data.inputs[5], np.array([0, 1, 0, 0, 0, 0, 1, 0]) * ROOT, atol=1e-6)
    np.testing.assert_array_equal(scenario_embeddings(own, items, streams), data.inputs[data.current])


def test_the_towers_begin_as_the_identity():
    rng = np.random.default_rng(0)
    inputs = compose(rng.normal(size=(5, 3)).astype(np.float32), np.full((5, 1), -1), np.zeros((1, 3), np.float32))
    params = init_towers(jax.random.key(0), 6, CONFIG)
    np.testing.assert_allclose(encode_items(params["item"], inputs), inputs, atol=1e-6)


def test_the_loss_against_a_loop():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(6, 4)).astype(np.float32)
    inputs /= np.linalg.norm(inputs, axis=1, keepdims=True)
    item, log_q = np.array([0, 1, 2, 3, 3, 3]), np.log(np.array([0.4, 0.1, 0.2, 0.3, 0.3, 0.3]))
    history, target = np.array([[-1, 1], [2, 3], [0, 5], [4, 0]]), np.array([0, 3, 4, 2])
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), init_towers(jax.random.key(0), 4, CONFIG))

    def tower(part, x):
        return np.asarray(jax.nn.gelu(x @ part["up"]["kernel"] + part["up"]["bias"]) @ part["down"]["kernel"])

    expected = []
    vectors = inputs + tower(params["item"], inputs)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in range(4):
        seen = [inputs[h] for h in history[row] if h >= 0]
        user = np.mean(seen, axis=0) + tower(params["user"], np.concatenate([np.mean(seen, axis=0), seen[-1]]))
        scores = vectors[target] @ (user / np.linalg.norm(user)) / 0.5 - log_q[target]
        others = [c for c in range(4) if c == row or item[target[c]] != item[target[row]]]
        expected.append(np.log(np.exp(scores[others]).sum()) - scores[row])
    arrays = (jnp.asarray(x) for x in (inputs, item, log_q, history, target))
    np.testing.assert_allclose(tower_loss(params, *arrays, 0.5), expected, rtol=1e-4)


class Mall(NamedTuple):
    own: np.ndarray
    items: pa.Table
    streams: pa.Table
    live: np.ndarray
    data: TowerData


@pytest.fixture(scope="module")
def mall(tmp_path_factory):
    """A mall's tables, and embeddings that know the words of an item's title."""
    folder = tmp_path_factory.mktemp("mall")
    source = SyntheticMall(users=150, items=200, tastes=10, sessions_per_user=10, exposures_per_session=2)
    prepare(source, PrepareConfig(), folder)
    items, events, streams = (pq.read_table(folder / f"{name}.parquet") for name in ("items", "events", "live_streams"))

    def of_word(word):
        return np.random.default_rng(zlib.crc32(word.encode())).normal(size=32)

    own = np.stack([sum(map(of_word, title.split())) for title in items["title"].to_pylist()]).astype(np.float32)
    live = np.flatnonzero(np.array(items["scenario"].to_pylist()) == "live_stream")
    return Mall(own, items, streams, live, tower_data(own, items, events, streams, CONFIG))


@pytest.fixture(scope="module")
def trained(mall):
    return train_towers(jax.random.key(0), mall.data, CONFIG)


def test_held_out_retrieval_beats_popularity_and_chance(mall, trained):
    live, data = mall.live, mall.data
    shown = data.item[data.target]
    test = np.flatnonzero(data.held_out & np.isin(shown, live))
    train = shown[~data.held_out & np.isin(shown, live)]
    popular = live[np.argsort(-np.bincount(train, minlength=len(mall.items))[live])]
    for k in (1, 3):
        recall = retrieval_recall(trained, data, test, data.current[live], k)
        untrained = retrieval_recall(init_towers(jax.random.key(0), 64, CONFIG), data, test, data.current[live], k)
        popularity = np.isin(shown[test], popular[:k]).mean()
        assert len(test) > 100
        assert recall > 1.7 * popularity and recall > untrained + 0.1 and recall > 4 * k / len(live)


def test_a_lower_learning_rate_moves_live_streams_less(mall, trained):
    own, items, streams, live, data = mall
    before = scenario_embeddings(own, items, streams)
    fast = train_towers(jax.random.key(0), data, replace(CONFIG, item_learning_rate=CONFIG.learning_rate))

    def moved(towers):
        after = scenario_embeddings(own, items, streams, towers["item"])
        cards = np.setdiff1d(np.arange(len(items)), live)
        np.testing.assert_array_equal(after[cards], before[cards])
        return np.linalg.norm(after[live] - before[live], axis=1).mean()

    assert 0 < moved(trained) < 0.5 * moved(fast)


def test_a_stream_that_changes_is_encoded_anew_by_the_tower_alone(mall, trained):
    own, items, streams, live, _ = mall
    stream, card = live[0], items["item_id"].to_pylist().index(streams["product_ids"][0].as_py()[0])
    change = streams_of((items["item_id"][int(stream)].as_py(), 2_000_000_000, [items["item_id"][card].as_py()]))
    embeddings = scenario_embeddings(own, items, pa.concat_tables([streams, change]), trained["item"])
    by_hand = encode_items(trained["item"], compose(own[[stream]], np.array([[card]]), own))
    np.testing.assert_allclose(embeddings[stream], by_hand[0], atol=1e-6)
    assert np.abs(embeddings - scenario_embeddings(own, items, streams, trained["item"])).max(1).nonzero()[0] == [
        stream
    ]


def test_training_goes_on_and_the_same_key_gives_the_same_bits(mall):
    data, config = mall.data, replace(CONFIG, steps=20)
    one, two = (train_towers(jax.random.key(1), data, config) for _ in range(2))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))
    further = train_towers(jax.random.key(2), data, config, one)
    assert not np.array_equal(further["item"]["down"]["kernel"], two["item"]["down"]["kernel"])
    np.testing.assert_array_equal(one["item"]["down"]["kernel"], two["item"]["down"]["kernel"])  # it took a copy


def test_bad_input_is_named(mall):
    own, items, streams, _, data = mall
    with pytest.raises(UserError, match="199 embeddings and 200 items"):
        scenario_embeddings(own[1:], items, streams)
    with pytest.raises(UserError, match=r"towers\.item_learning_rate=0\.1"):
        train_towers(jax.random.key(0), data, replace(CONFIG, item_learning_rate=0.1))
    events = events_of((0, 0, 0, 1, "click", "train"))
    with pytest.raises(UserError, match=r"two events of click, sale.*towers\.behaviors"):
        tower_data(own, items, events, streams, replace(CONFIG, behaviors=("click", "sale")))
    with pytest.raises(UserError, match="held out"):
        train_towers(jax.random.key(0), data._replace(held_out=np.ones(len(data.target), bool)), CONFIG)
    with pytest.raises(UserError, match="64 wide, these are 10 wide"):
        encode_items(init_towers(jax.random.key(0), 64, CONFIG)["item"], np.zeros((1, 10), np.float32))
