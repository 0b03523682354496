"""OneSearch's model, fitted to a catalogue and a log's queries: what training, decoding and evaluation share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from jaxrec.catalogue.version import Version
from jaxrec.data.examples import Records
from jaxrec.data.item_neighbours import load_neighbours
from jaxrec.data.queries import table_texts
from jaxrec.data.search_features import SearchFeatureConfig
from jaxrec.data.search_statistics import search_statistics, training_searches
from jaxrec.evaluation.cases import Cases, History, cases_with_texts, search_cases
from jaxrec.models.personal_search import PersonalSearch, SearchContext, SearchInputs, SearchVocabulary, level_sums
from jaxrec.models.prior import Prior, popularity_prior
from jaxrec.models.user_ids import hashed_ids, user_ids
from jaxrec.run import Run
from jaxrec.semantic_ids.files.vectors import EMBEDDINGS, read_embeddings
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.table.version_files import BOOKS
from jaxrec.systems.generative import read_items
from jaxrec.systems.onesearch.config import TASKS, OneSearchConfig
from jaxrec.systems.onesearch.queries import NEIGHBOURS, PROMPTS, KnownQueries, load_queries
from jaxrec.systems.onesearch.reader import SearchReader
from jaxrec.systems.pretrained import backbone_of
from jaxrec.systems.profiles import load_profiles
from jaxrec.systems.recommender import GenerativeRecommender, Served, filled_up, with_later_prior
from jaxrec.targets import SemanticIdSpace
from jaxrec.text.tokenizer import TextTokenizer
from jaxrec.training.sharding import init_sharded


@struct.dataclass
class OneSearchCatalogue:
    """What a training step reads of all items: codes int32 [I, M], centroids float32 [K, E] of levels, the prior."""

    codes: jax.Array
    centroids: tuple[jax.Array, ...]
    prior: Prior | None = None


@struct.dataclass(kw_only=True)
class OneSearchServed(Served):
    """OneSearch's arrays: as `OneSearchCatalogue`."""

    codes: jax.Array
    centroids: tuple[jax.Array, ...]
    prior: Prior | None


@dataclass(frozen=True, eq=False)
class OneSearchAssembly:
    """The model, fitted to the items and queries of a run."""

    model: PersonalSearch
    space: SemanticIdSpace
    behaviors: tuple[str, ...]
    """names, weakest first"""
    wanted: np.ndarray
    """bool [behaviors]: the target behaviors"""
    reader: SearchReader
    """what reads the texts of a history"""
    rows: np.ndarray
    """object [rows]: the texts of queries.parquet"""
    centroids: tuple[np.ndarray, ...] = ()
    """float32 [K, E] a level"""
    prior: Prior | None = None
    """the popularity of IDs, if it is added to the decoder's logits"""
    examples: Any = None
    """folder of the example records"""
    folder: Any = None
    """the run directory"""

    required_text: ClassVar[str] = "query"

    @property
    def target_behaviors(self) -> list[int]:
        """Indices of the target behaviors."""
        return np.flatnonzero(self.wanted).tolist()

    @property
    def features(self) -> SearchFeatureConfig:
        """With the levels of the IDs."""
        return self.reader.features

    @property
    def queries(self) -> KnownQueries:
        """The queries of the log."""
        return self.reader.queries

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of what is typed."""
        return self.queries.tokenizer

    @property
    def profile_columns(self) -> tuple[str, ...]:
        """What a request may tell of its user."""
        return self.reader.profile_columns

    def read_texts(self, history: History, without: Sequence[int] = (), ahead: Sequence[int] = ()) -> History:
        """As `SearchReader.read_texts`."""
        return self.reader.read_texts(history, without, ahead)

    @property
    def catalogue(self) -> OneSearchCatalogue:
        """What a training step reads of the items."""
        codes = jnp.asarray(self.space.codes, jnp.int32)
        return OneSearchCatalogue(codes, tuple(map(jnp.asarray, self.centroids)), self.prior)

    def init(self, seed: int, mesh: Mesh | None = None) -> dict:
        """Fresh variables {"params"}: made on the devices where they stay, if there is a mesh."""
        empty = {name: np.zeros(0, np.int32) for name in ("item", "behavior", "timestamp", "session")}
        cut = self.features.cut(self.read_texts(empty), 0, behaviors=len(self.behaviors), wanted=self.wanted)

        def make():
            inputs = self.inputs(self.catalogue, {name: jnp.asarray(array)[None] for name, array in cut.items()})
            return self.model.init(jax.random.key(seed), inputs, jnp.zeros((1, 1, self.space.levels), jnp.int32))

        return init_sharded(make, mesh)

    def inputs(self, catalogue: OneSearchCatalogue | OneSearchServed, arrays: dict[str, jax.Array]) -> SearchInputs:
        """The model's input from stacked arrays of `SearchFeatureConfig.cut`."""
        prompt, codes = self.model.prompt, catalogue.codes

        def coded(name: str) -> jax.Array:
            item = arrays[name]
            return jnp.where(item[..., None] >= 0, codes[jnp.maximum(item, 0)], -1)

        if prompt.user_ids == "behavior":
            both = [user_id(coded(name)) for name in ("short_item", "long_item")]
        else:
            who, sizes = arrays["who"], self.space.codebook_sizes
            both = [jnp.where(who[:, None] >= 0, hashed_ids(2 * who + at, sizes), -1) for at in range(2)]
        long = None
        if prompt.long_queries:
            sequences = jnp.stack([coded(name) for name in ("click_item", "order_item", "related_item")], axis=1)
            # All three at once: a third of the program.
            sums = level_sums(sequences.reshape(-1, *sequences.shape[2:]), catalogue.centroids)
            long = sums.reshape(*sequences.shape[:2], *sums.shape[1:])
        return SearchInputs(
            query=arrays["tokens"],
            query_codes=arrays["query_codes"],
            user_codes=jnp.stack(both, axis=1),
            recent_queries=arrays["recent_codes"],
            recent_items=coded("recent_item"),
            long=long,
            candidates=coded("candidate") if prompt.copying else None,
            habits=arrays["habits"],
            user=arrays["user"],
            profile=arrays["profile"] if arrays["profile"].shape[1] else None,
            prior=catalogue.prior,
        )

    # ---- what the recommender asks for -------------------------------------------------------------------------------

    def cases(self, split: str) -> Cases:
        """One case a search of the split that led to target items."""
        cases = search_cases(Records(self.examples, split), self.target_behaviors, split)
        return cases_with_texts(cases, self.rows)

    def serve(self, variables: dict, version: Version | None = None, before: Version | None = None) -> OneSearchServed:
        """A new item is its codes, and needs nothing else; no query led to it yet."""
        codes, prior = self.space.codes.astype(np.int32), self.prior
        if version is not None:
            codes = filled_up(version.codes.astype(np.int32), version.capacity)
            prior = with_later_prior(prior, version, before)
        catalogue = self.catalogue
        return OneSearchServed(
            variables=variables, codes=jnp.asarray(codes), centroids=catalogue.centroids, prior=prior
        )

    def context(self, served: OneSearchServed, arrays: dict[str, jax.Array]) -> SearchContext:
        """B contexts from stacked arrays of `SearchFeatureConfig.cut`."""
        return self.model.apply(served.variables, self.inputs(served, arrays), method="prefill")

    def extend(self, served: OneSearchServed, context: SearchContext, tokens: jax.Array | None, cache: Any, level: int):
        """One more code for every beam."""
        return self.model.apply(served.variables, context, tokens, cache, level, method="extend")

    def rescore(self, served: OneSearchServed, context: SearchContext, likelihood_weight: float) -> None:
        """None: beams are ranked by their log-probabilities."""


def user_id(codes: jax.Array) -> jax.Array:
    """Eq. 3 of codes int32 [B, T, M], -1 in the padding: int32 [B, M], -1 where there are no items."""
    mask = codes[..., 0] >= 0
    return jnp.where(mask.any(-1, keepdims=True), user_ids(codes, mask), -1)


def run_centroids(run: Run, space: SemanticIdSpace, item_ids: Sequence[str]) -> tuple[np.ndarray, ...]:
    """The centroids of Eq. 4: of the run's codebooks or, of quantizers without centroids, of its items.

    Raises:
      UserError: the codebooks are missing or damaged.
    """
    books = codebooks.load(run.semantic_ids / BOOKS)
    if codebooks.has_centroids(books):
        return tuple(codebooks.centroids(books))
    embeddings = read_embeddings(run.semantic_ids / EMBEDDINGS, item_ids)
    return level_centroids(space.codes, space.codebook_sizes, embeddings)


def level_centroids(codes: np.ndarray, sizes: tuple[int, ...], embeddings: np.ndarray) -> tuple[np.ndarray, ...]:
    """The centroid of every code, float32 [K, E] a level: the mean of what the levels before leave of its items.

    That is what residual k-means begins with; a code without items has zeros.
    """
    rest, found = embeddings.astype(np.float64), []
    for level, size in enumerate(sizes):
        code = codes[:, level]
        count = np.bincount(code, minlength=size)
        table = np.zeros((size, rest.shape[1]))
        np.add.at(table, code, rest)
        table /= np.maximum(count, 1)[:, None]
        rest = rest - table[code]
        found.append(table.astype(np.float32))
    return tuple(found)


def assemble(run: Run, config: OneSearchConfig) -> OneSearchAssembly:
    """Reads IDs, queries and statistics of a run and shapes the model to them.

    Raises:
      UserError: a file is missing or doesn't fit the items.
    """
    item_ids, counts, space, behaviors, wanted = read_items(run, config)
    queries, rows = load_queries(run, space.levels), table_texts(run.tables, "queries")
    backbone = backbone_of(run.place(PROMPTS), config.model)
    words = backbone.vocabulary if config.pretrained else queries.tokenizer.size
    vocabulary = SearchVocabulary(words, len(TASKS), space.codebook_sizes)
    model = PersonalSearch(vocabulary.fit(backbone), vocabulary, config.prompt)
    searched = training_searches(run.tables, config.data.target_behaviors)
    columns = (searched[name].to_numpy() for name in ("search", "item", "timestamp"))
    numbers = queries.of_row[searched["query_index"].to_numpy()]
    reader = SearchReader(
        queries=queries,
        statistics=search_statistics(queries.texts, numbers, *columns, config.statistics),
        features=fitted(config, space).features,
        neighbours=load_neighbours(run.place(PROMPTS) / NEIGHBOURS) if config.neighbours.kept else None,
        profiles=load_profiles(run.tables, config.profile, queries.tokenizer) if config.profile else None,
    )
    return OneSearchAssembly(
        model=model,
        space=space,
        behaviors=behaviors,
        wanted=wanted,
        reader=reader,
        rows=rows,
        centroids=run_centroids(run, space, item_ids),
        prior=popularity_prior(space.codes, counts, space.codebook_sizes) if config.prior else None,
        examples=run.examples,
        folder=run.path,
    )


def fitted(config: OneSearchConfig, space: SemanticIdSpace) -> OneSearchConfig:
    """The configuration whose features know the levels of the IDs, and whether profiles are read."""
    read = config.features.profile if config.profile else 0
    return replace(config, features=replace(config.features, levels=space.levels, profile=read))


def recommender(assembly: OneSearchAssembly, variables: dict, config: OneSearchConfig) -> GenerativeRecommender:
    """The trained model of a run, ready to answer searches."""
    return GenerativeRecommender(assembly, variables, assembly.features, config.decoding)
