"""A catalogue that changes: what each change does, what it refuses, and that shapes stay."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from jaxrec.catalogue.live import LiveCatalogue
from jaxrec.config import UserError

SIZES = (4, 3, 2)
IDS = [f"i{row}" for row in range(12)]
CODES = np.random.default_rng(0).integers(0, SIZES, (12, 3)).astype(np.int32)
CODES[8:] = CODES[2]  # five items share an ID
ITEMS = pa.table(
    {
        "item_id": IDS,
        "color": ["red", "blue", None] * 4,
        "price": np.arange(12.0),
        "stock": [True, False] * 6,
    }
)
NEW = pa.table({"item_id": ["n0", "n1"], "price": [3, 50]})
NEW_CODES = np.array([[3, 2, 1], [0, 0, 0]])


class Model:
    """Sums of codes as a table of the model's own, with room for new rows; counts what it is asked."""

    def __init__(self):
        self.warmed = []

    def serve_version(self, version, before):
        table = np.zeros(version.capacity, np.float32)
        table[: len(version)] = version.codes.sum(1)
        return {"table": jnp.asarray(table), "trie": version.trie}

    def warm_up(self, served):
        self.warmed.append(served["table"].shape[0])


@pytest.fixture
def live() -> LiveCatalogue:
    return LiveCatalogue(ITEMS, CODES, SIZES, popularity=np.arange(12) % 5, model=Model())


def leaves(version) -> dict[tuple, list[str]]:
    """ID -> items in order, read off the trie."""
    trie, found = jax.tree.map(np.asarray, version.trie), {}
    ids = version.items["item_id"].to_pylist()
    starts = trie.starts[-1]
    for leaf in range(int(trie.num_leaves)):
        rows = trie.items[starts[leaf] : starts[leaf + 1]]
        found[tuple(version.codes[rows[0]].tolist())] = [ids[row] for row in rows]
    return found


def expected_leaves(items: dict[str, tuple[tuple, float]]) -> dict[tuple, list[str]]:
    """By sorting: items as {item_id: (code, popularity)} in the order of their rows."""
    found = {}
    for item, (code, _) in sorted(items.items(), key=lambda pair: (pair[1][0], -pair[1][1])):
        found.setdefault(code, []).append(item)
    return found


def catalogue(changes: dict | None = None, without=()) -> dict:
    known = {item: (tuple(CODES[row].tolist()), row % 5) for row, item in enumerate(IDS)} | (changes or {})
    return {item: pair for item, pair in known.items() if item not in without}


def shapes(version) -> list:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((version.trie, version.served))]


def test_the_first_version(live):
    assert leaves(live.current) == expected_leaves(catalogue())
    assert live.versions == [{"version": 1, "parent": None, "action": "begin", "items": 12, "current": True}]
    assert live.current.popular[:3].tolist() == [4, 9, 3], "falling popularity, then the row"


def test_every_change_makes_the_version_that_sorting_says_in_the_same_shapes(live):
    first = live.current
    added = {"n0": ((3, 2, 1), 0.0), "n1": ((0, 0, 0), 7.0)}
    version = live.add(NEW, NEW_CODES, popularity=[0, 7])
    assert leaves(version) == expected_leaves(catalogue(added)) and version is live.current
    assert version.items["color"].to_pylist()[12:] == [None, None] and version.items["price"].to_pylist()[12:] == [
        3,
        50,
    ]
    assert version.popular[0] == 13 and version.row("n1") == 13 and first.row("n1") is None
    gone = ("i2", "n0")
    assert leaves(live.remove(gone)) == expected_leaves(catalogue(added, gone))
    assert live.current.row("i2") == 2, "a removed item is still known in histories"
    assert leaves(live.restore(["i2"])) == expected_leaves(catalogue(added, ["n0"]))
    added |= {"i9": (tuple(CODES[9].tolist()), 100.0)}
    assert leaves(live.reorder(["i9"], [100])) == expected_leaves(catalogue(added, ["n0"]))
    assert live.current.popular[0] == 9
    assert leaves(first) == expected_leaves(catalogue()), "a version never changes"
    assert shapes(live.current) == shapes(first) and live.model.warmed == []
    np.testing.assert_array_equal(live.current.served["table"][:14], np.concatenate([CODES, NEW_CODES]).sum(1))
    assert [each["action"] for each in live.versions] == ["add", "remove", "restore", "reorder"], (
        "the last four are kept"
    )


def test_attributes_change_and_masks_with_them(live):
    filters = ({"stock": True}, {"color": "red", "stock": True}, {"price": {"min": 3}})
    before = [live.current.mask(each) for each in filters]
    assert [mask.count for mask in before] == [6, 2, 9]
    version = live.update(pa.table({"item_id": ["i1", "i0"], "stock": [True, False], "price": [99.0, None]}))
    assert version.trie is live._kept[1].trie, "the trie is that of the version before"
    assert set(version.masks) == set(live._kept[1].masks), "masks are made before anybody asks"
    assert version.items["price"].to_pylist()[:3] == [None, 99.0, 2.0]
    rows = version.order.positions
    stock = np.array(version.items["stock"].to_pylist())
    np.testing.assert_array_equal(version.mask(filters[0]).holds(rows), stock)
    assert version.mask(filters[1]).count == 1 and version.mask(filters[2]).count == 10
    assert before[0].count == 6 and live._kept[1].mask(filters[0]) is before[0]
    version = live.update(pa.table({"item_id": ["i1"], "price": [1.0]}))
    assert version.mask(filters[0]) is live._kept[2].mask(filters[0]), "what did not change is not made again"


def test_another_whole_catalogue(live):
    live.add(NEW, NEW_CODES)
    items = pa.table({"item_id": ["i5", "n1", "new", "i0"], "price": [1.0, 2.0, 3.0, 4.0], "color": ["red"] * 4})
    codes = np.array([[1, 1, 1], [2, 2, 0], [3, 0, 1], [1, 1, 1]])
    version = live.swap(items, codes, popularity=[1, 0, 0, 2])
    assert leaves(version) == {(1, 1, 1): ["i0", "i5"], (2, 2, 0): ["n1"], (3, 0, 1): ["new"]}
    assert (version.row("i5"), version.row("n1"), version.row("new")) == (5, 13, 14)
    assert version.items["price"].to_pylist()[5] == 1.0 and version.items["stock"].to_pylist()[5] is False
    assert version.mask({"color": "red"}).count == 4 and version.mask({"color": "blue"}).count == 0
    assert shapes(version) == shapes(live._kept[1])
    assert leaves(live.restore(["i1"]))[tuple(CODES[1].tolist())] == ["i1"]


def test_rolling_back_and_on(live):
    live.remove(["i3"])
    live.add(NEW, NEW_CODES)
    third = live.current
    assert live.rollback(1) is live.current and live.current.number == 1
    assert leaves(live.current) == expected_leaves(catalogue())
    # A row that a version left behind has given to another item.
    other = live.add(pa.table({"item_id": ["m0"]}), [[1, 1, 1]])
    assert (other.number, other.parent, other.row("m0"), other.row("n0")) == (4, 1, 12, None)
    assert other.items["item_id"].to_pylist()[12] == "m0"
    assert (third.row("n0"), third.row("m0")) == (12, None)
    assert live.rollback(3) is third and [each["current"] for each in live.versions] == [False, False, True, False]
    with pytest.raises(UserError, match="no version 9 of the catalogue to go back to: kept are 1, 2, 3, 4"):
        live.rollback(9)
    assert live.current is third


def test_the_version_that_was_rolled_back_to_is_kept_as_the_latest(live):
    for row in range(3):
        live.remove([f"i{row}"])
    assert live.rollback(1).number == 1
    live.remove(["i5"])
    assert [each["version"] for each in live.versions] == [1, 3, 4, 5], "version 2 was current longest ago"
    assert live.rollback(1).number == 1
    with pytest.raises(UserError, match="no version 2 of the catalogue to go back to: kept are 1, 3, 4, 5"):
        live.rollback(2)


def test_items_stay_in_one_piece(live):
    def pieces(version) -> set[int]:
        return {column.num_chunks for column in version.items.columns}

    items = live.current.items
    chunked = pa.concat_tables([items.slice(0, 5), items.slice(5)])
    assert pieces(LiveCatalogue(chunked, CODES, SIZES).current) == {1}
    assert pieces(live.add(NEW, NEW_CODES)) == {1}
    assert pieces(live.update(pa.table({"item_id": ["i1"], "price": [1.0]}))) == {1}
    assert live.current.items["item_id"].to_pylist()[:12] == items["item_id"].to_pylist()


def test_arrays_grow_when_there_is_no_more_room_and_are_warmed_up_before_anybody_sees_them(live):
    assert live.current.capacity == 16
    seen = []
    live.model.warm_up = lambda served: seen.append((served["table"].shape[0], live.current.number))
    names = [f"x{row}" for row in range(5)]
    version = live.add(pa.table({"item_id": names}), np.zeros((5, 3), int))
    assert version.capacity == 24 and version.trie.capacity == 24 and seen == [(24, 1)]
    assert len(leaves(version)[(0, 0, 0)]) >= 5
    live.remove(names[:2])
    assert shapes(live.current) == shapes(version) and len(seen) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda live: live.add(NEW.slice(0, 0), NEW_CODES[:0]), "there are no items: give at least one item_id"),
        (lambda live: live.add(pa.table({"id": ["a"]}), NEW_CODES[:1]), "no column item_id; they have id"),
        (lambda live: live.add(pa.table({"item_id": ["a", "a"]}), NEW_CODES), "item_id 'a' is listed twice"),
        (lambda live: live.add(pa.table({"item_id": ["a", None]}), NEW_CODES), "row 1 of the items has item_id None"),
        (lambda live: live.add(pa.table({"item_id": ["i3", "a"]}), NEW_CODES), "'i3' is there already; update it"),
        (lambda live: live.add(NEW, NEW_CODES + 2), "item_id 'n0' has the code 5 at level 1, whose codebook is 0..3"),
        (lambda live: live.add(NEW, NEW_CODES[:, :2]), r"codes are int64\[2, 2\]: 2 items need integers \[2, 3\]"),
        (lambda live: live.add(NEW, NEW_CODES / 2), "codes are float64"),
        (lambda live: live.add(NEW.append_column("size", [[1, 2]]), NEW_CODES), "add: the catalogue has no column 'si"),
        (lambda live: live.add(pa.table({"item_id": ["a"], "price": ["x"]}), [[0, 0, 0]]), "'price' holds string, but"),
        (lambda live: live.add(NEW, NEW_CODES, popularity=[1]), "popularity of shape .1,. does not fit 2 items"),
        (lambda live: live.add(NEW, NEW_CODES, embeddings=[[1], [np.nan]]), "embeddings of shape .2, 1. do not fit"),
        (lambda live: live.remove(["zz"]), "remove: item_id 'zz' is not in the catalogue"),
        (lambda live: live.remove(["i1", "i1"]), "item_id 'i1' is listed twice"),
        (lambda live: live.remove(IDS), "no item would be left"),
        (lambda live: live.restore(["i1"]), "restore: item_id 'i1' is there already"),
        (lambda live: live.update(pa.table({"item_id": ["n0"], "price": [1]})), "update: item_id 'n0' is not in"),
        (lambda live: live.update(pa.table({"item_id": ["i0"], "size": [1]})), "update: the catalogue has no column"),
        (lambda live: live.update(pa.table({"item_id": ["i0"], "stock": ["no"]})), "'stock' holds string"),
        (lambda live: live.reorder(["i0"], [np.nan]), "popularity of shape .1,. does not fit 1 items"),
        (lambda live: live.swap(NEW, NEW_CODES - 1), "item_id 'n1' has the code -1 at level 1"),
    ],
)  # fmt: skip
def test_what_is_refused_changes_nothing(live, change, message):
    before, versions = live.current, live.versions
    with pytest.raises(UserError, match=message):
        change(live)
    assert live.current is before and live.versions == versions
    assert leaves(before) == expected_leaves(catalogue()) and before.row("n0") is None
    assert leaves(live.add(NEW, NEW_CODES)) == expected_leaves(
        catalogue({"n0": ((3, 2, 1), 0.0), "n1": ((0, 0, 0), 0.0)})
    )


def test_a_model_that_fails_changes_nothing(live):
    def fails(version, before):
        raise UserError("no room")

    before, live.model.serve_version = live.current, fails
    with pytest.raises(UserError, match="no room"):
        live.add(NEW, NEW_CODES)
    assert live.current is before and before.row("n0") is None and len(live.versions) == 1


def test_adding_what_was_removed(live):
    live.remove(["i3"])
    with pytest.raises(UserError, match="add: item_id 'i3' is removed; restore it instead"):
        live.add(pa.table({"item_id": ["i3"]}), [[0, 0, 0]])
    with pytest.raises(UserError, match="remove: item_id 'i3' is removed already"):
        live.remove(["i3"])


def test_predicates_of_python(live):
    version = live.current

    def dear(items: pa.Table) -> np.ndarray:
        return items["price"].to_numpy() > 8

    assert version.mask(dear).count == 3 and version.mask(dear) is version.mask(dear)
    assert version.mask(np.arange(12) == 4).count == 1
    assert version.allowed(dear, blocked=[9, 9, 2]).count == 2 and version.allowed(only=[1, 1, 99]).count == 1
    assert live.remove(["i10"]).mask(dear).count == 2
    with pytest.raises(UserError, match=r"bool\[3\], but version 2 of the catalogue has 12 rows: give bool \[12\]"):
        live.current.mask(np.ones(3, bool))
    with pytest.raises(UserError, match=r"filter.size: the items have no such column; they have color, item_id, price"):
        version.mask({"size": 3})
    with pytest.raises(UserError, match=r"filter.price is 'x', but the column holds numbers"):
        version.mask({"price": "x"})


def test_popular_items_that_are_allowed(live):
    version = live.current
    order = version.popular.tolist()
    for blocked in ([], [4, 4, 9], order[:-1], order):
        allowed = version.allowed(blocked=blocked)
        left = [row for row in order if row not in blocked]
        for k in (1, 3, 100):
            assert version.most_popular(k, allowed).tolist() == left[:k]
    assert version.most_popular(2).tolist() == order[:2]


def test_few_masks_are_kept(live, monkeypatch):
    monkeypatch.setattr("jaxrec.catalogue.version.MASKS", 3)
    for price in range(6):
        live.current.mask({"price": price})
    assert len(live.current.masks) == 3


def test_several_threads_change_it_one_after_the_other(live):
    def change(worker: int) -> None:
        for turn in range(5):
            live.remove([IDS[worker]])
            live.restore([IDS[worker]])
            live.add(pa.table({"item_id": [f"t{worker}-{turn}"]}), [[worker, 0, 0]])

    threads = [threading.Thread(target=change, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert live.current.number == 1 + 3 * 15 and live.current.active.all() and len(live.current) == 12 + 15
    ids = live.current.items["item_id"].to_pylist()
    assert [live.current.row(item) for item in ids] == list(range(27))
