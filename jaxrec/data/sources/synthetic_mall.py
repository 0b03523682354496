"""A synthetic mall: seeded logs with planted tastes, for which the best possible recall is known exactly.

Every item belongs to one taste (a kind of goods), with a planted share inside it. A user has a few tastes. In each
session the user buys from one taste and then browses the next: the extra clicks of a session announce the taste of the
next one, which follows with probability `1 - surprise` and is otherwise drawn anew from the user's tastes. A basket of
n items is n draws by share without replacement. So popularity and personal frequency know little, the last clicks know
most, and the distribution of the next basket given everything before it has a closed form.

The catalogue holds product cards, short videos that sell one product, and live streams that change what they sell.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from jaxrec.config import UserError, fingerprint, to_json
from jaxrec.data.popularity import DAY
from jaxrec.data.sources.mall_environment import MallEnvironment, inclusion, make_environment, places_of
from jaxrec.data.sources.mall_searches import Searches, plant_searches, results_of, searches_table, suggestions_table
from jaxrec.data.sources.mall_words import goods, identifiers, item_title
from jaxrec.data.tables import RawTables, Split, connect, store

START = 1_700_006_400  # a midnight, UTC
BASKET_SIZES = (1, 2, 3)
SCENARIOS = ("product_card", "short_video", "live_stream")


@dataclass(frozen=True)
class SyntheticMall:
    """Made-up shoppers with known tastes."""

    behaviors: ClassVar[tuple[str, ...]] = ("pseudo_exposure", "exposure", "click", "cart", "purchase")
    target_behaviors: ClassVar[tuple[str, ...]] = ("purchase",)

    users: int = 400
    """Number of shoppers."""
    items: int = 300
    """Size of the catalogue: 70% product cards, 20% short videos, 10% live streams."""
    tastes: int = 20
    """Number of tastes, each a kind of goods with about items / tastes items."""
    tastes_per_user: int = 4
    """How many tastes a shopper has."""
    sessions_per_user: int = 12
    """Visits, each with a purchase, about a day apart."""
    browsed_per_session: int = 3
    """Clicks that announce the taste of the next session."""
    exposures_per_session: int = 8
    """Items shown without a click; as many again were chosen to be shown and never seen (pseudo_exposure)."""
    recommended: float = 0.0
    """Share of the shown items (with the pseudo-exposures) that are of the shopper's tastes, as a recommender chooses
    and shows first; the others are of any taste. Shares inside a taste play no part: what is shown is a guess."""
    surprise: float = 0.1
    """Probability that a session follows another taste than the one that was announced."""
    skew: float = 0.8
    """The r-th item of a taste has a share of r^-skew."""
    split: Split = "last_session"
    """How validation and test are held out."""
    seed: int = 0
    """Seed of everything."""
    searched: float = 0.0
    """Probability that a session's basket is searched for; half as often the browsed items are, a tenth as often a
    search leads to nothing. With 0 there are no searches and no suggestions. The other logs do not depend on it."""
    results_per_search: int = 0
    """Items of the searched taste that each search shows, besides what is bought or clicked through it. The other logs
    do not depend on it."""

    def fingerprint(self) -> str:
        """Of this configuration, on which alone the logs depend; what tells of searches counts where there are any."""
        values = to_json(self)
        for name in ("searched", "results_per_search"):
            if not values[name] or not self.searched:
                del values[name]
        return fingerprint("synthetic_mall", values)

    def load(self) -> RawTables:
        """Makes the logs. Raises UserError for sizes that can't be."""
        self._check()
        mall, engine = _plant(self), connect()
        facts = {"best_possible": {f"recall@{k}": best_possible_recall(self, mall, k) for k in (1, 5, 10, 50)}}
        searches, tables = None, {}
        if self.searched:
            searches, size = self.plant_searches(), (self.users, self.sessions_per_user)
            tables = {"searches": searches_table(searches, *size), "suggestions": suggestions_table(searches, *size)}
            facts["best_possible_search"] = {f"recall@{k}": self.best_possible_search(k) for k in (1, 5, 10, 50)}
        return RawTables(
            engine,
            store(engine, _items(self, mall)),
            store(engine, _events(self, mall, searches)),
            **{name: store(engine, table) for name, table in tables.items()},
            extra={"live_streams": store(engine, _live_streams(self, mall))},
            facts=facts,
        )

    def plant_searches(self) -> Searches:
        """The searches and suggestions, with their planted truth."""
        mall = _plant(self)
        before_shown = max(10 * self.exposures_per_session - 5, 0)
        basket = mall.taste_of_item[mall.basket[..., 0]]
        browsed = mall.taste_of_item[mall.browsed[..., 0]] if self.browsed_per_session else np.full_like(basket, -1)
        rng = np.random.default_rng([self.seed, 5])
        return plant_searches(rng, (basket, browsed), _session_starts(self) + before_shown, self.tastes, self.searched)

    def best_possible_search(self, k: int) -> float:
        """Exact expected recall@k, on baskets of one taste, of an oracle who knows the shares and the searched taste.

        The mean over the tastes of the users' last baskets.
        """
        mall = _plant(self)
        worth = _worth(self, mall)
        best = [np.sort(worth[mall.taste_of_item == taste])[::-1][:k].sum() for taste in range(self.tastes)]
        return float(np.mean(np.array(best)[mall.taste_of_item[mall.basket[:, -1, 0]]]))

    def best_possible_recall(self, k: int) -> float:
        """Exact expected recall@k, on each user's last basket, of an oracle who knows the planted shares and tastes."""
        self._check()
        return best_possible_recall(self, _plant(self), k)

    def environment(self, user_ids: Sequence[str], item_ids: Sequence[str]) -> MallEnvironment:
        """The true rates and prices of a run's items for its users, by the identifiers of its tables.

        Raises:
          UserError: the mall has no such user or item.
        """
        names = identifiers("u", np.arange(self.users), self.users), identifiers("i", np.arange(self.items), self.items)
        users = places_of("user", user_ids, names[0].to_pylist())
        items = places_of("item", item_ids, names[1].to_pylist())
        return make_environment(self, _plant(self), BASKET_SIZES, _prices(self), START, users, items)

    def _check(self) -> None:
        if self.items < 10 * self.tastes:
            raise UserError(f"items={self.items} is too few for tastes={self.tastes}; give at least ten items a taste")
        if not 1 <= self.tastes_per_user <= self.tastes:
            raise UserError(f"tastes_per_user={self.tastes_per_user} must be between 1 and tastes={self.tastes}")
        if self.results_per_search < 0:
            raise UserError(f"results_per_search={self.results_per_search} is a number of items; give 0 or more")
        if self.users < 1 or self.sessions_per_user < 1:
            raise UserError("users and sessions_per_user must be at least 1")
        for name in ("surprise", "recommended", "searched"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} is a probability; give a number from 0 to 1")


@dataclass(frozen=True)
class Mall:
    """The planted truth and the actions of the shoppers. U users, T sessions, I items, J tastes of a user."""

    taste_of_item: np.ndarray
    """int64 [I]"""
    share: np.ndarray
    """float64 [I], sums to one in every taste."""
    scenario: np.ndarray
    """int64 [I], index in SCENARIOS."""
    sells: np.ndarray
    """int64 [I], the product of a short video; the item itself otherwise."""
    user_tastes: np.ndarray
    """int64 [U, J]"""
    user_weights: np.ndarray
    """float64 [U, J], the probability of each taste when a session is a surprise (and of each announcement)."""
    announced: np.ndarray
    """int64 [U, T], the taste that the clicks before the session point to."""
    basket: np.ndarray
    """int64 [U, T, 3], items bought, -1 where there are fewer."""
    browsed: np.ndarray
    """int64 [U, T, n], items of the taste announced for the session after."""
    shown: np.ndarray
    """int64 [U, T, 2 n], of any taste or of the user's: the first half exposure, the second pseudo_exposure."""


def best_possible_recall(config: SyntheticMall, mall: Mall, k: int) -> float:
    """Expected recall@k on the last session of the k items that the planted probabilities favour, averaged over users.

    Given all before the session, a basket has each of BASKET_SIZES with equal probability and is of taste z with
    P(z) = (1 - surprise) [z announced] + surprise w(z). Recall is linear in the items, so item i is worth
    P(taste of i) mean_n(inclusion_n(i) / n), and the k items worth most are the best list.
    """
    worth = _worth(config, mall)
    rows = np.arange(config.users)
    belief = np.zeros((config.users, config.tastes))
    belief[rows[:, None], mall.user_tastes] = config.surprise * mall.user_weights
    belief[rows, mall.announced[:, -1]] += 1 - config.surprise
    total = 0.0
    for user_belief in belief:  # a row at a time: [U, I] need not fit in memory
        values = user_belief[mall.taste_of_item] * worth
        total += np.sort(values)[::-1][:k].sum()
    return float(total / config.users)


def _worth(config: SyntheticMall, mall: Mall) -> np.ndarray:
    """The expected recall that each item adds to a list when the basket is of its taste: float64 [I]."""
    worth = np.zeros(config.items)
    for taste in range(config.tastes):
        inside = np.flatnonzero(mall.taste_of_item == taste)
        worth[inside] = np.mean([inclusion(mall.share[inside], size) / size for size in BASKET_SIZES], axis=0)
    return worth


@functools.lru_cache(maxsize=2)
def _plant(config: SyntheticMall) -> Mall:
    rng = np.random.default_rng(config.seed)
    taste_of_item = rng.permutation(np.arange(config.items) % config.tastes)
    share = _shares(rng, taste_of_item, config)
    scenario, sells = _scenarios(rng, taste_of_item)
    shape = (config.users, config.sessions_per_user)
    order = np.argsort(rng.random((config.users, config.tastes)), axis=1)
    user_tastes = order[:, : config.tastes_per_user]
    user_weights = rng.dirichlet(np.full(config.tastes_per_user, 2.0), config.users)
    # One more announcement than sessions: the clicks of the last session point to one that never comes.
    announced = _draw_tastes(rng, user_tastes, user_weights, config.sessions_per_user + 1)
    other = _draw_tastes(rng, user_tastes, user_weights, config.sessions_per_user)
    actual = np.where(rng.random(shape) < config.surprise, other, announced[:, :-1])
    basket = _draw_items(rng, taste_of_item, share, actual, max(BASKET_SIZES))
    size = rng.choice(BASKET_SIZES, shape)
    basket = np.where(np.arange(max(BASKET_SIZES)) < size[..., None], basket, -1)
    browsed = _draw_items(rng, taste_of_item, share, announced[:, 1:], config.browsed_per_session)
    shown = _draw_shown(rng, taste_of_item, user_tastes, user_weights, config)
    return Mall(
        taste_of_item, share, scenario, sells, user_tastes, user_weights, announced[:, :-1], basket, browsed, shown
    )


def _shares(rng: np.random.Generator, taste_of_item: np.ndarray, config: SyntheticMall) -> np.ndarray:
    share = np.zeros(config.items)
    for taste in range(config.tastes):
        inside = rng.permutation(np.flatnonzero(taste_of_item == taste))
        weight = np.arange(1, len(inside) + 1) ** -config.skew
        share[inside] = weight / weight.sum()
    return share


def _scenarios(rng: np.random.Generator, taste_of_item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scenario of every item, and for short videos a product of the same taste."""
    scenario, sells = np.zeros(len(taste_of_item), np.int64), np.arange(len(taste_of_item))
    for taste in np.unique(taste_of_item):
        inside = rng.permutation(np.flatnonzero(taste_of_item == taste))
        videos, streams = len(inside) // 5, len(inside) // 10
        scenario[inside[:videos]] = 1
        scenario[inside[videos : videos + streams]] = 2
        sells[inside[:videos]] = rng.choice(inside[videos + streams :], videos)
    return scenario, sells


def _draw_tastes(rng: np.random.Generator, tastes: np.ndarray, weights: np.ndarray, sessions: int) -> np.ndarray:
    """One of each user's tastes for every session, int64 [U, sessions]."""
    place = (rng.random((len(tastes), sessions))[..., None] > np.cumsum(weights, axis=1)[:, None, :-1]).sum(-1)
    return np.take_along_axis(tastes, place, axis=1)


def _draw_shown(
    rng: np.random.Generator, taste_of_item: np.ndarray, tastes: np.ndarray, weights: np.ndarray, config: SyntheticMall
) -> np.ndarray:
    """The items chosen by a recommender that knows the users' tastes, but not the taste of today: int64 [U, T, 2 n].

    It puts items of the user's tastes first, so that they are shown rather than chosen in vain.
    """
    size = (config.sessions_per_user, 2 * config.exposures_per_session)
    shown = rng.integers(0, config.items, (len(tastes), *size))
    if not config.recommended:
        return shown
    taste = _draw_tastes(rng, tastes, weights, size[0] * size[1]).reshape(shown.shape)
    order, count = np.argsort(taste_of_item, kind="stable"), np.bincount(taste_of_item, minlength=config.tastes)
    chosen = order[(np.cumsum(count) - count)[taste] + (rng.random(shown.shape) * count[taste]).astype(np.int64)]
    known = np.sort(rng.random(shown.shape) >= config.recommended, axis=-1) == 0
    return np.where(known, chosen, shown)


def _draw_items(
    rng: np.random.Generator, taste_of_item: np.ndarray, share: np.ndarray, taste: np.ndarray, size: int
) -> np.ndarray:
    """`size` draws by share without replacement from the items of each taste, int64 [U, T, size] (Gumbel top-k)."""
    drawn = np.empty((*taste.shape, size), np.int64)
    for each in np.unique(taste):
        inside = np.flatnonzero(taste_of_item == each)
        where = np.nonzero(taste == each)
        keys = np.log(share[inside]) + rng.gumbel(size=(len(where[0]), len(inside)))
        drawn[where] = inside[np.argsort(-keys, axis=1)[:, :size]]
    return drawn


def _session_starts(config: SyntheticMall) -> np.ndarray:
    """Unix seconds, int64 [U, T]: one session a day, in the morning hours."""
    rng = np.random.default_rng([config.seed, 1])
    return (
        START
        + DAY * np.arange(config.sessions_per_user)
        + rng.integers(0, DAY // 4, (config.users, 1 + config.sessions_per_user))[:, 1:]
    )


def _events(config: SyntheticMall, mall: Mall, searches: Searches | None = None) -> pa.Table:
    """A session, ten seconds a step: chosen in vain, shown, clicked, carted, bought (after all but the first)."""
    half = config.exposures_per_session
    basket, browsed = [(mall.basket, 0)], [(mall.browsed, 1)]
    steps = [
        ("pseudo_exposure", [(mall.shown[..., half:], None)]),
        ("exposure", [(mall.shown[..., :half], None), *browsed, *basket]),
        ("click", [*basket, *browsed]),
        ("cart", basket),
        ("purchase", basket),
    ]
    starts, parts, offset = _session_starts(config), [], 0
    for behavior, blocks in steps:
        items = np.concatenate([block for block, _ in blocks], axis=-1)
        user, session, place = np.nonzero(items >= 0)
        item = items[user, session, place]
        parts.append(
            pa.table(
                {
                    "user_id": identifiers("u", user, config.users),
                    "item_id": identifiers("i", item, config.items),
                    "timestamp": starts[user, session] + 10 * (offset + place),
                    "behavior": pa.array(np.full(len(user), behavior), pa.string()),
                    "session_id": identifiers("s", session, config.sessions_per_user),
                    "scenario": pa.array(np.array(SCENARIOS)[mall.scenario[item]], pa.string()),
                }
            )
        )
        if searches is not None:
            led = np.concatenate([_led(searches, block, of) for block, of in blocks], axis=-1)[user, session, place]
            led = pa.array(led, mask=led < 0)
            parts[-1] = parts[-1].append_column("search_id", searches.ids().take(led))
        offset += items.shape[-1]
    if searches is not None and config.results_per_search:
        parts.append(_results(config, mall, searches))
    return pa.concat_tables(parts)


def _results(config: SyntheticMall, mall: Mall, searches: Searches) -> pa.Table:
    """The exposures of the results of searches, a second after each."""
    rng = np.random.default_rng([config.seed, 6])
    shown = results_of(rng, searches, mall.taste_of_item, config.results_per_search)
    search, place = np.nonzero(shown >= 0)
    item = shown[search, place]
    return pa.table(
        {
            "user_id": identifiers("u", searches.user[search], config.users),
            "item_id": identifiers("i", item, config.items),
            "timestamp": searches.timestamp[search] + 1,
            "behavior": pa.array(["exposure"] * len(item), pa.string()),
            "session_id": identifiers("s", searches.session[search], config.sessions_per_user),
            "scenario": pa.array(np.array(SCENARIOS)[mall.scenario[item]], pa.string()),
            "search_id": searches.ids().take(pa.array(search)),
        }
    )


def _led(searches: Searches, items: np.ndarray, kind: int | None) -> np.ndarray:
    """The number of the search that led to each of some items of a session: int64 [U, T, n], -1 for none."""
    led = np.full(items.shape[:2], -1) if kind is None else searches.led[..., kind]
    return np.broadcast_to(led[..., None], items.shape)


def _items(config: SyntheticMall, mall: Mall) -> pa.Table:
    names = identifiers("i", np.arange(config.items), config.items).to_pylist()
    kinds = [goods(taste) for taste in mall.taste_of_item]
    titles = [
        item_title(kind, index, SCENARIOS[s]) for index, (kind, s) in enumerate(zip(kinds, mall.scenario, strict=True))
    ]
    sold = [[names[mall.sells[i]]] if mall.scenario[i] == 1 else [] for i in range(config.items)]
    return pa.table(
        {
            "item_id": names,
            "title": titles,
            "text": [f"{title}. {kind}" for title, kind in zip(titles, kinds, strict=True)],
            "category": kinds,
            "brand": [f"Maker {taste % 7}" for taste in mall.taste_of_item],
            "price": pa.array(_prices(config)),
            "scenario": [SCENARIOS[s] for s in mall.scenario],
            "product_ids": pa.array(sold, pa.list_(pa.string())),
        }
    )


def _prices(config: SyntheticMall) -> np.ndarray:
    return np.round(5 + 95 * np.random.default_rng([config.seed, 3]).random(config.items), 2)


def _live_streams(config: SyntheticMall, mall: Mall) -> pa.Table:
    """The products of every live stream from each midnight on: up to five product cards of its taste, drawn anew."""
    rng = np.random.default_rng([config.seed, 4])
    names = identifiers("i", np.arange(config.items), config.items).to_pylist()
    columns: dict[str, list] = {"item_id": [], "timestamp": [], "product_ids": []}
    for stream in np.flatnonzero(mall.scenario == 2):
        cards = np.flatnonzero((mall.taste_of_item == mall.taste_of_item[stream]) & (mall.scenario == 0))
        for day in range(config.sessions_per_user):
            columns["item_id"].append(names[stream])
            columns["timestamp"].append(START + DAY * day)
            columns["product_ids"].append([names[i] for i in rng.permutation(cards)[:5]])
    types = {"item_id": pa.string(), "timestamp": pa.int64(), "product_ids": pa.list_(pa.string())}
    return pa.table({name: pa.array(columns[name], of) for name, of in types.items()})
