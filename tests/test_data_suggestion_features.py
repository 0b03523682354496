from itertools import chain

import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.data.completions import Top
from jaxrec.data.suggestion_features import HABITS, NONE, USER, Own, SuggestionFeatureConfig

DAY = 86_400
CONFIG = SuggestionFeatureConfig((8, 16, 32), 6, 2, 3, 3, 2, own=3, popular=3, near=1, length=4, specials=100)
CLS, SEP, NEXT = 100, 101, 102
NOTHING = np.zeros(0, bool)


class Queries:
    """Queries 0 to 9, of as many characters as ten times their number and ten more."""

    def tokens(self, numbers):
        return np.stack([[number, 1, NONE, NONE] for number in numbers]).astype(np.int32)

    def lengths(self, numbers):
        return 10 + 10 * numbers

    def near(self, numbers):
        return numbers.astype(np.float32) / 10


def asked(**more):
    top = Top(np.array([5, 2, 7, 6]), np.array([0.5, 0.25, 0.15, 0.1], np.float32), np.full(4, 0.25, np.float32), 20)
    own = Own(np.array([2, 3, 2]), np.array([0, 10, 20]) * DAY, np.array([0, 1, 3]), 5, 9)
    history = {
        "typed_tokens": [1, 2],
        "earlier": [[3], [4, 5], [6, 7, 8, 9]],
        "related": [[10], [11], [12]],
        "top": top,
    }
    history |= {"own": own, "near": np.array([2, 8, 9]), "texts": Queries(), "span": (2, 8), "characters": 6}
    return {**history, "now": 30 * DAY, "profile_tokens": [20, 21, 22], **more}


def cut(record, config=CONFIG):
    return config.cut(record, 0, behaviors=0, wanted=NOTHING)


def test_the_prompt_is_that_of_equation_5():
    """CLS prefix SEP related SEP earlier SEP profile, and only as much of each as is configured."""
    related, earlier = [10, NEXT, 11], [3, NEXT, 4, 5, NEXT, 6, 7, 8]
    assert CONFIG.prompt(asked()) == [CLS, 1, 2, SEP, *related, SEP, *earlier, SEP, 20, 21]
    assert CONFIG.prompt({}) == [CLS, SEP, SEP, SEP]
    for name, part in (("related", [SEP, *related]), ("earlier", [SEP, *earlier]), ("profile", [SEP, 20, 21])):
        off = SuggestionFeatureConfig(**vars(CONFIG) | {name: 0})
        parts = {"related": [SEP, *related], "earlier": [SEP, *earlier], "profile": [SEP, 20, 21]} | {name: [SEP]}
        assert off.prompt(asked()) == [CLS, 1, 2, *chain.from_iterable(parts.values())], part
    tokens = cut(asked())["tokens"]
    assert len(tokens) == 32 and tokens[19:].tolist() == [NONE] * 13 and tokens[18] == 21
    assert len(cut(asked(related=[], earlier=[]))["tokens"]) == 8


@pytest.mark.parametrize(
    ("most", "left"),
    [
        (19, [[10, NEXT, 11], [3, NEXT, 4, 5]]),
        (14, [[10, NEXT, 11], [3]]),
        (12, [[10, NEXT, 11], []]),
        (10, [[10], []]),
    ],
)
def test_of_a_long_prompt_the_oldest_queries_are_left_out_first(most, left):
    config = SuggestionFeatureConfig(**vars(CONFIG) | {"buckets": (most - 1,)})
    related, earlier = left
    assert config.prompt(asked()) == [CLS, 1, 2, SEP, *related, SEP, *earlier, SEP, 20, 21]
    longer = config.prompt(asked(typed_tokens=list(range(50, 90))))
    assert len(longer) <= most - 1 and longer[1:5] == [50, 51, 52, 53]


def test_candidates_are_the_users_own_and_then_what_is_most_popular_and_related():
    found = cut(asked())
    assert found["candidate"][:, 0].tolist() == [2, 3, 5, 7, 6, 8, NONE]
    assert found["candidate"][0].tolist() == [2, 1, NONE, NONE] and found["habits"].shape == (7, HABITS)
    two, three, five, _, _, eight = found["habits"][:6]
    # Query 2: twice, last ten days ago, a session ago of five; searched for in two of five sessions.
    late = np.exp(-np.array([30, 10]) / 30).sum()
    expected = [np.log(2.2501), 1, np.log(3), np.log(11), np.log(2), 2 / 5, 2 / 3, np.log1p(late)]
    expected += [np.log(0.2501), np.log(0.2501), 0, 1, 1, 6 / 30, np.log(0.21)]
    np.testing.assert_allclose(two, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(three[[0, 1, 5, 8]], [np.log(1.0001), 1, 1 / 4, np.log(1e-4)], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(five[[0, 1, 2, 8, 11, 12]], [np.log(0.5001), 0, 0, np.log(0.5001), 1, 0], rtol=1e-5)
    np.testing.assert_allclose(eight[[0, 11, 12]], [np.log(1e-4), 0, 1 / 2], rtol=1e-5)
    assert not found["habits"][6:].any()
    np.testing.assert_allclose(found["user"], np.log1p([9, 3, 2, 6, 20, 6]), rtol=1e-5)
    assert found["user"].shape == (USER,)


def test_candidates_begin_in_the_order_of_the_own_history_then_popularity():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        share = np.sort(rng.dirichlet(np.ones(20)))[::-1].astype(np.float32)
        top = Top(rng.permutation(40)[:20], share, share, 50)
        query = np.sort(rng.integers(0, 40, rng.integers(0, 12)))
        own = Own(query, np.arange(len(query)), np.arange(len(query)), len(query), len(query))
        config = SuggestionFeatureConfig(own=12, popular=20, length=4)
        found = cut(asked(own=own, top=top, near=np.zeros(0, np.int64)), config)
        there = found["candidate"][:, 0] >= 0
        order = found["candidate"][there, 0][np.argsort(-found["habits"][there, 0], kind="stable")]
        count, shares = np.bincount(query, minlength=40), np.zeros(40)
        shares[top.rows] = share
        expected = [at for at in np.lexsort((-shares, -count)) if count[at] or shares[at]]
        assert order.tolist() == expected[: len(order)] and set(query) <= set(order)


def test_without_candidates_there_is_a_prompt_alone():
    config = SuggestionFeatureConfig((16,), own=0, popular=0)
    assert set(cut({"typed_tokens": [1]}, config)) == {"tokens"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"own": -1}, r"features\.own' is -1"), ({"typed": 0}, r"features\.typed"), ({"buckets": (8, 4)}, "rising")],
)
def test_numbers_without_a_meaning_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        SuggestionFeatureConfig(**changes)
