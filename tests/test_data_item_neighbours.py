import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.data.item_neighbours import NeighbourConfig, item_neighbours, load_neighbours

ITEMS = 12


def events(seed, users=30):
    rng = np.random.default_rng(seed)
    return rng.integers(0, users, 150), rng.integers(0, ITEMS, 150)


def plain(users, items, wanted, past):
    """The sum of cosines between the sets of users, one pair after the other."""
    sets = [set(users[items == item].tolist()) for item in range(ITEMS)]
    found = []
    for item in wanted:
        others = [other for other in set(past) if other != item and sets[item] and sets[other]]
        found.append(sum(len(sets[item] & sets[o]) / (len(sets[item]) * len(sets[o])) ** 0.5 for o in others))
    return found


def test_scores_are_sums_of_cosines():
    users, items = events(0)
    made = item_neighbours(users, items, ITEMS, NeighbourConfig(ITEMS))
    wanted, past = np.array([3, 0, 7]), np.array([1, 3, 5])
    np.testing.assert_allclose(made.scores(wanted, [past])[0], plain(users, items, wanted, past), rtol=1e-5)
    assert made.scores(np.array([0, ITEMS + 5]), [np.array([1, ITEMS + 5])])[0, 1] == 0
    assert not made.scores(wanted, [np.zeros(0, int)]).any()


def test_only_the_nearest_are_kept():
    users, items = events(1)
    whole = item_neighbours(users, items, ITEMS, NeighbourConfig(ITEMS))
    few = item_neighbours(users, items, ITEMS, NeighbourConfig(2))
    np.testing.assert_array_equal(few.other, whole.other[:, :2])
    cosine = whole.count / np.sqrt(np.maximum(whole.users[whole.other], 1))
    assert (np.diff(cosine, axis=1) <= 1e-6).all()


@pytest.mark.parametrize("seed", range(5))
def test_items_ahead_are_scored_as_by_a_log_that_ends_before_them(seed):
    users, items = events(seed)
    mine, past = users == 4, np.unique(items[users == 4])[::2]
    ahead = items[mine & ~np.isin(items, past)]
    made = item_neighbours(users, items, ITEMS, NeighbourConfig(ITEMS))
    before = ~mine | np.isin(items, past)
    shorter = item_neighbours(users[before], items[before], ITEMS, NeighbourConfig(ITEMS))
    wanted = np.arange(ITEMS)
    expected = shorter.scores(wanted, [past])[0]
    np.testing.assert_allclose(made.scores(wanted, [past], past, ahead)[0], expected, rtol=1e-5, atol=1e-6)
    # Looked at: some of it is taken later, some never. What was taken before may be taken again.
    seen = np.arange(1, ITEMS, 2)
    expected = shorter.scores(wanted, [seen])[0]
    again = np.concatenate([ahead, past])
    np.testing.assert_allclose(made.scores(wanted, [seen], past, again)[0], expected, rtol=1e-5, atol=1e-6)


def test_a_user_alone_brings_nothing_among_the_nearest():
    """Few are kept, others by a log that ends earlier: what is ahead must not look nearer than by that log."""
    found, expected = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        users, items = rng.integers(0, 12, 60), rng.integers(0, 30, 60)
        mine = users == 4
        past = np.unique(items[mine])[::2]
        ahead = np.setdiff1d(items[mine], past)
        made = item_neighbours(users, items, 30, NeighbourConfig(4))
        before = ~mine | np.isin(items, past)
        shorter = item_neighbours(users[before], items[before], 30, NeighbourConfig(4))
        found += made.scores(ahead, [past], past, ahead)[0].tolist()
        expected += shorter.scores(ahead, [past])[0].tolist()
    assert len(found) > 50
    assert np.mean(expected) > 0
    assert np.mean(found) <= np.mean(expected) + 1e-6
    # Nearly all of them are the same.
    assert np.mean(np.isclose(found, expected, atol=1e-6)) > 0.8


def test_it_is_saved_and_a_damaged_file_is_refused(tmp_path):
    made = item_neighbours(*events(2), ITEMS, NeighbourConfig(3))
    made.save(tmp_path / "n.safetensors")
    again = load_neighbours(tmp_path / "n.safetensors")
    for name, array in vars(made).items():
        np.testing.assert_array_equal(getattr(again, name), array)
    (tmp_path / "n.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="holds no neighbours"):
        load_neighbours(tmp_path / "n.safetensors")
