"""The mall's true rates against the log that was drawn from the same plan, and by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.data.popularity import DAY
from jaxrec.data.sources import SyntheticMall
from jaxrec.data.sources.synthetic_mall import START, _plant, _prices

SMALL = SyntheticMall(
    users=1200, items=40, tastes=4, tastes_per_user=2, sessions_per_user=5, exposures_per_session=3, surprise=0.3
)
MALLS = {
    "any": SMALL,
    "recommended": dataclasses.replace(SMALL, recommended=0.6),
    "searched": dataclasses.replace(SMALL, searched=0.7, results_per_search=4),
    "no announcement": dataclasses.replace(SMALL, browsed_per_session=0, searched=0.7, results_per_search=4),
}
FIRST_DAY = START // DAY


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number:0{len(str(count - 1))}d}" for number in range(count)]


def made(config: SyntheticMall):
    return config.environment(names("u", config.users), names("i", config.items))


def happened(config: SyntheticMall) -> dict[str, np.ndarray]:
    """bool [U, T, I]: which items each session shows, and which are clicked and bought in it, by the events table."""
    events = config.load().events.to_pyarrow()
    place = tuple(
        np.array([int(name[1:]) for name in events[column].to_pylist()])
        for column in ("user_id", "session_id", "item_id")
    )
    behavior, found = np.array(events["behavior"].to_pylist()), {}
    for name in ("exposure", "click", "purchase"):
        found[name] = np.zeros((config.users, config.sessions_per_user, config.items), bool)
        found[name][tuple(each[behavior == name] for each in place)] = True
    return found


@pytest.mark.parametrize("config", MALLS.values(), ids=MALLS)
def test_rates_are_the_frequencies_of_the_log(config):
    """In bins of the predicted rate, and item by item, clicks and purchases are as frequent as predicted."""
    found, environment = happened(config), made(config)
    users, days = np.divmod(np.arange(config.users * config.sessions_per_user), config.sessions_per_user)
    items = np.broadcast_to(np.arange(config.items), (len(users), config.items))
    rates = {name: np.asarray(value) for name, value in environment.rates(users, FIRST_DAY + days, items).items()}
    shown, clicked, bought = (found[name].reshape(items.shape) for name in ("exposure", "click", "purchase"))
    assert shown.sum() > 30_000 and bought.sum() > 9_000
    for given, happens, rate in ((shown, clicked, "ctr"), (shown, bought, "ctcvr"), (clicked, bought, "cvr")):
        assert (~happens[given][rates[rate][given] == 0]).all()
        of = {"bin": np.minimum(rates[rate] * 12, 11).astype(int), "item": items}
        for group in of.values():
            count = np.bincount(group[given])
            seen = np.bincount(group[given], happens[given], len(count))
            told = np.bincount(group[given], rates[rate][given], len(count))
            spread = np.bincount(group[given], (rates[rate] * (1 - rates[rate]))[given], len(count)) ** 0.5
            # Outcomes of one session depend on one another a little.
            assert (np.abs(seen - told) <= 5 * spread + 3).all(), (rate, (seen - told) / np.maximum(spread, 1))
    # Unconditionally too: how often items are shown and bought, and what the baskets are worth.
    price = _prices(config)
    worth = np.asarray(environment.revenue(users, FIRST_DAY + days, items)).sum(1)
    spent = (bought * price).sum(1)
    assert abs(spent.mean() - worth.mean()) < 4 * (spent - worth).std() / len(users) ** 0.5


def test_rates_by_hand():
    """A mall of two tastes of ten items: a shopper of both, whose announced taste is followed 8 times in 10."""
    config = SyntheticMall(
        users=3, items=20, tastes=2, tastes_per_user=2, sessions_per_user=3, exposures_per_session=2, surprise=0.2
    )
    mall, environment = _plant(config), made(config)
    user, session = 1, 2
    item = int(np.flatnonzero(mall.taste_of_item == mall.announced[user, session])[0])
    own = mall.share[mall.taste_of_item == mall.announced[user, session]]
    share, others = mall.share[item], np.delete(own, np.argmin(np.abs(own - mall.share[item])))
    second = share + sum(other * share / (1 - other) for other in others)
    third = second
    for a in range(9):
        for b in range(9):
            if a != b:
                p, q = others[a], others[b]
                third += p * q / (1 - p) * share / (1 - p - q)
    weight = dict(zip(mall.user_tastes[user], mall.user_weights[user], strict=True))[mall.taste_of_item[item]]
    bought = (0.8 + 0.2 * weight) * (share + second + third) / 3
    clicked = 1 - (1 - bought) * (1 - weight * third)
    shown = 1 - (1 - clicked) * (1 - 1 / 20) ** 2
    rates = environment.rates(np.array([user]), np.array([FIRST_DAY + session]), np.array([[item]]))
    expected = {
        "ctr": clicked / shown,
        "cvr": bought / clicked,
        "ctcvr": bought / shown,
        "price": _prices(config)[item],
    }
    assert rates.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(rates[name], [[value]], rtol=1e-5)


def test_an_environment_of_a_runs_own_order_of_users_and_items():
    environment, some = made(SMALL), SMALL.environment(["u0007", "u0003"], ["i31", "i02", "i17"])
    rates = jax.jit(lambda e, *asked: e.rates(*asked))(
        some, np.array([1, 0]), np.full(2, FIRST_DAY + 4), np.array([[0, 1], [2, 2]])
    )
    whole = environment.rates(np.array([3, 7]), np.full(2, FIRST_DAY + 4), np.array([[31, 2], [17, 17]]))
    for name, value in whole.items():
        np.testing.assert_allclose(rates[name], value, rtol=1e-6)
    with pytest.raises(UserError, match=r"the mall has no item 'i99': the tables are of another mall"):
        SMALL.environment(["u0007"], ["i02", "i99"])
