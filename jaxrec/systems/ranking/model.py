"""A ranking model fitted to the items of a run: contexts from histories, predictions of candidates.

    ranker = assemble_ranker(run, config, config.ranking)    # of a run of any system with semantic IDs
    ranker, params = load_ranker(path)                       # trained in a run of its own

    arrays = stack([ranker.read(history) for history in histories])
    ranker.rewards(params, arrays, candidates)               # {"ctr", "cvr", "ctcvr", "price"}: float32 [B, L]

Whatever is known of a context is in its arrays, so that candidates cost one pass of the model and no look-up.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jax.sharding import Mesh

from jaxrec.config import UserError, fingerprint, from_json
from jaxrec.data.attributes import attribute_indices
from jaxrec.data.examples import Record
from jaxrec.data.period_counts import Periods, item_features
from jaxrec.data.queries import table_texts
from jaxrec.data.query_items import QueryItems, query_items
from jaxrec.data.ranking_features import AGES, Labels, RankingFeatureConfig
from jaxrec.data.search_statistics import training_searches
from jaxrec.data.searches import before_search, before_session
from jaxrec.data.tables import training_events
from jaxrec.data.words import distinct, normalised
from jaxrec.evaluation.cases import History, question_of
from jaxrec.models.ranking.inputs import ItemSizes, RankedItems, RankingContext
from jaxrec.models.ranking.towers import RankingModel, probabilities
from jaxrec.run import Run, stage_path
from jaxrec.semantic_ids.embeddings import encodes_texts
from jaxrec.semantic_ids.files.vectors import EMBEDDINGS, read_embeddings
from jaxrec.semantic_ids.queries import QueryIds, load_query_ids
from jaxrec.systems.generative import SemanticIdRunConfig, read_items
from jaxrec.systems.ranking.config import CASCADE, RANKING, CascadeConfig, RankingConfig
from jaxrec.training.sharding import init_sharded, shapes_of
from jaxrec.training.stages import best_variables

Arrays = dict[str, Any]
"""The arrays of contexts, by the names of `jaxrec.data.ranking_features`."""


@dataclass(frozen=True, eq=False)
class RankedQueries:
    """What queries had led to, and their embeddings, of the log's queries and of any other."""

    of_row: np.ndarray
    """int64 [rows of queries.parquet]: the numbers of distinct texts"""
    known: QueryItems
    vectors: np.ndarray
    """float32 [Q, E], of the distinct texts"""
    ids: QueryIds | None
    """embeds other texts; None where items' embeddings were not made of texts: queries then have vectors of zeros"""

    def of(self, query: str | np.integer, day: int, most: int) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        """(embedding, items, what is told of them) of a text or a row of queries.parquet; no embedding without text."""
        text = normalised(query) if isinstance(query, str) else ""
        number = self.known.numbers.get(text, -1) if isinstance(query, str) else int(self.of_row[query])
        items, told = self.known.before(number, day, most)
        if number >= 0:
            return self.vectors[number], items, told
        if not text:
            return None, items, told
        return (np.zeros(self.vectors.shape[1]) if self.ids is None else self.ids.embeddings([text])[0]), items, told


@dataclass(frozen=True, eq=False)
class Ranker:
    """A ranking model, fitted to one catalogue."""

    model: RankingModel
    items: RankedItems
    item_ids: str
    """fingerprint of the catalogue's item ids, in their order"""
    features: RankingFeatureConfig
    labels: Labels
    periods: Periods
    """of the items' counts"""
    behaviors: tuple[str, ...]
    """names, weakest first"""
    wanted: np.ndarray
    """bool [behaviors]: the target behaviors"""
    popularity: np.ndarray
    """int64 [I]: how often each item was taken in training"""
    examples: Any
    """folder of the example records"""
    queries: RankedQueries | None = None
    """None where a context is a session"""

    @property
    def target_behaviors(self) -> list[int]:
        """Indices of the target behaviors."""
        return np.flatnonzero(self.wanted).tolist()

    def init(self, seed: int, mesh: Mesh | None = None) -> dict:
        """Fresh variables {"params"}: made on the devices where they stay, if there is a mesh."""
        items, arrays = shapes_of(self.items), stack([self.read(EMPTY)])

        def make():
            context = self.context(jax.tree.map(jnp.asarray, arrays))
            return self.model.lazy_init(jax.random.key(seed), items, context, jnp.zeros((1, 1), jnp.int32))

        return init_sharded(make, mesh)

    # ---- contexts ----------------------------------------------------------------------------------------------------

    def read(self, history: History, size: int | None = None) -> Arrays:
        """The arrays of one context: all of a history, as cases and requests hold it; size: as for the features."""
        arrays = self.features.read(history, self.wanted, size)
        if self.queries is None:
            return arrays
        found = self.queries.of(history.get("query", ""), int(arrays["asked_day"]), self.features.led)
        return arrays | self.features.of_query(*found, self.queries.vectors.shape[1])

    def before_session(self, record: Record, session: int) -> History:
        """What was known when a session of a record began, with `now` and `user`."""
        moment = int(record["timestamp"][record["session"] == session].min())
        history = before_session(record, session, moment)
        return history | question_of(record, history, moment)

    def before_search(self, record: Record, search: int) -> History:
        """What was known at a search (its place in the record), with `now`, `user` and the query."""
        history = before_search(record, search) | {"query": record["search_query"][search]}
        return history | question_of(record, history, record["search_timestamp"][search])

    def context(self, arrays: Arrays) -> RankingContext:
        """The model's input from stacked arrays of `read`."""
        seen = (arrays[f"seen_{name}"] for name in ("item", "behavior", "age", "mask"))
        query = {}
        if self.queries is not None:
            names = {"query": "query_vector", "asked": "asked", "led_item": "led_item", "led": "led"}
            query = {name: arrays[column] for name, column in names.items()}
        return RankingContext(*seen, self.periods.of(arrays["asked_day"]), arrays["asking_user"], **query)

    # ---- predictions -------------------------------------------------------------------------------------------------

    def logits(
        self,
        params: Any,
        arrays: Arrays,
        candidates: jax.Array,
        items: RankedItems | None = None,
        train: bool = False,
        rngs: dict | None = None,
    ) -> dict[str, jax.Array]:
        """{tower: float32 [B, L]} of candidates int32 [B, L]; items as for `rewards`."""
        items = self.items if items is None else items
        return self.model.apply({"params": params}, items, self.context(arrays), candidates, train, rngs=rngs)

    def rewards(
        self, params: Any, arrays: Arrays, candidates: jax.Array, items: RankedItems | None = None
    ) -> dict[str, jax.Array]:
        """Probabilities ctr, cvr and ctcvr, and the expected price of a purchase: float32 [B, L] each, in one pass.

        A pure function: inside a compiled step give it `items`, `ranker.items` bound to the step as an argument, or
        they become constants in it. What the model's towers don't give is left out.

        Args:
          params: the parameters of the ranking model.
          arrays: stacked arrays of `read`; others in them are ignored.
          candidates: int32 [B, L]; places without an item must hold any number of an item.
        """
        return probabilities(self.logits(params, arrays, candidates, items), self.model.sizes.price)

    def predict(self, params: Any, arrays: Arrays, candidates: np.ndarray) -> dict[str, np.ndarray]:
        """`rewards`, compiled, on the host."""
        context = self.context(jax.tree.map(jnp.asarray, _own(arrays)))
        return jax.device_get(_predict(self.model, params, self.items, context, candidates))

    def check_items(self, item_ids: Sequence[str], whose: str) -> None:
        """Raises UserError unless the model was trained on these items, in this order."""
        if self.item_ids != fingerprint(list(item_ids)):
            raise UserError(
                f"the ranking model was trained on another catalogue of {self.model.sizes.items} items than the "
                f"{len(item_ids)} of {whose}; train it on the same tables"
            )


EMPTY = {name: np.zeros(0, np.int32) for name in ("item", "behavior", "timestamp", "session")}
"""The history of somebody who did nothing yet."""


def stack(contexts: Sequence[Arrays]) -> Arrays:
    """The arrays of B contexts of one length bucket."""
    return {name: np.stack([each[name] for each in contexts]) for name in contexts[0]}


def assemble_ranker(run: Run, config: SemanticIdRunConfig, ranking: RankingConfig) -> Ranker:
    """Reads the catalogue of a run and what its log told at any time, and shapes a ranking model to them.

    Raises:
      UserError: a file is missing or doesn't fit the items, an attribute is no column of the items table, or the log
        lacks what the towers predict.
    """
    items = pq.read_table(run.tables / "items.parquet")
    item_ids, popularity, space, behaviors, wanted = read_items(run, config)
    labels = ranking.check(behaviors)
    attributes, sizes = attribute_indices(items, ranking.attributes)
    log_price, scale = _log_prices(items)
    events = training_events(run.tables, behaviors, ["item", "behavior", "timestamp"])
    behavior = pc.index_in(events["behavior"], pa.array(behaviors, events["behavior"].type)).to_numpy()
    shape = (len(items), len(behaviors))
    counts, periods = item_features(
        events["item"].to_numpy(), behavior, events["timestamp"].to_numpy(), shape, ranking.counts
    )
    embeddings = read_embeddings(run.semantic_ids / EMBEDDINGS, item_ids)
    ranked = RankedItems(
        embeddings=jnp.asarray(embeddings),
        codes=jnp.asarray(space.codes, jnp.int32),
        attributes=jnp.asarray(attributes, jnp.int32),
        log_price=jnp.asarray(log_price),
        counts=jnp.asarray(counts),
    )
    fitted = ItemSizes(len(items), tuple(space.codebook_sizes), sizes, len(behaviors), AGES, scale)
    return Ranker(
        model=RankingModel(ranking.model, ranking.inputs, fitted, ranking.towers),
        items=ranked,
        item_ids=fingerprint(item_ids),
        features=ranking.features,
        labels=labels,
        periods=periods,
        behaviors=behaviors,
        wanted=wanted,
        popularity=popularity,
        examples=run.examples,
        queries=_read_queries(run, config, ranking, embeddings) if ranking.contexts == "searches" else None,
    )


def load_ranker(path: Path, stage: str = RANKING) -> tuple[Ranker, Any]:
    """The ranking model of a finished run of its own, with its parameters; see `Ranker.check_items` before its use.

    stage: `ranking`, or `pre_ranking`.

    Raises:
      UserError: there is no such run, it is not finished, or it is of another system.
    """
    run, values = Run.load(Path(path))
    if values.get("system") != CASCADE:
        raise UserError(f"{path} is a run of {values.get('system')!r}; give one of {CASCADE!r}, which trains rankings")
    run.check_trained()
    config = from_json(CascadeConfig, values)
    ranking = config.ranking if stage == RANKING else config.pre_ranking
    if ranking is None:
        raise UserError(f"{path} has no stage {stage}; its configuration's {stage} is None")
    return assemble_ranker(run, config, ranking), best_variables(run.path / stage_path(stage))["params"]


def _read_queries(
    run: Run, config: SemanticIdRunConfig, ranking: RankingConfig, embeddings: np.ndarray
) -> RankedQueries:
    searched = training_searches(run.tables, config.data.target_behaviors)
    texts, of_row = distinct(table_texts(run.tables, "queries"))
    columns = (searched[name].to_numpy() for name in ("item", "timestamp"))
    known = query_items(texts, of_row[searched["query_index"].to_numpy()], *columns, ranking.counts)
    if encodes_texts(run.semantic_ids):
        ids = load_query_ids(run.semantic_ids, config.text)
        return RankedQueries(of_row, known, ids.embeddings(list(texts)), ids)
    return RankedQueries(of_row, known, np.zeros((len(texts), embeddings.shape[1]), np.float32), None)


def _log_prices(items: pa.Table) -> tuple[np.ndarray, tuple[float, float]]:
    """float32 [I], NaN where no price above 0 is known; mean and standard deviation of the known ones."""
    if "price" not in items.column_names:
        return np.full(len(items), np.nan, np.float32), (0.0, 1.0)
    prices = items["price"].cast(pa.float64()).to_numpy(zero_copy_only=False)
    known = np.isfinite(prices) & (prices > 0)
    found = np.where(known, np.log(np.where(known, prices, 1.0)), np.nan).astype(np.float32)
    if not known.any():
        return found, (0.0, 1.0)
    return found, (float(found[known].mean()), max(float(found[known].std()), 1e-3))


def _own(arrays: Arrays) -> Arrays:
    """Those of the arrays that `Ranker.context` reads."""
    own = ("seen_", "ask", "query_vector", "led")
    return {name: array for name, array in arrays.items() if name.startswith(own)}


# The model is its sizes; a ranker, with its arrays, would be kept alive by the compiled function.
@functools.partial(jax.jit, static_argnums=0)
def _predict(
    model: RankingModel, params: Any, items: RankedItems, context: RankingContext, candidates: jax.Array
) -> dict[str, jax.Array]:
    return probabilities(model.apply({"params": params}, items, context, candidates), model.sizes.price)
