"""OneSug's model, fitted to the queries of a log: what training, decoding and evaluation share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrec.catalogue.version import Version
from jaxrec.data.completions import UNKNOWN, Completions, completions
from jaxrec.data.examples import Records
from jaxrec.data.item_neighbours import load_neighbours
from jaxrec.data.popularity import DAY
from jaxrec.data.queries import table_texts
from jaxrec.data.suggestion_features import NOBODY, Own, SuggestionFeatureConfig
from jaxrec.data.token_sequences import NO_TOKENS
from jaxrec.data.words import normalised, typed
from jaxrec.evaluation.cases import Cases, History, prefix_cases, text_cases
from jaxrec.models.suggestion import SuggestionContext, SuggestionInputs, SuggestionModel, SuggestionVocabulary
from jaxrec.run import Run
from jaxrec.semantic_ids.related_queries import load_related
from jaxrec.systems.onesug.config import OneSugConfig
from jaxrec.systems.onesug.queries import (
    NEIGHBOURS,
    UNSEEN,
    KnownTexts,
    QueriesOfUser,
    RelatedOfPrefixes,
    Seen,
    query_rows,
)
from jaxrec.systems.phases import RELATED
from jaxrec.systems.pretrained import backbone_of
from jaxrec.systems.profiles import Profiles, load_profiles
from jaxrec.systems.recommender import GenerativeRecommender, Served, typed_text
from jaxrec.targets import TextSpace, load_text_space
from jaxrec.targets.texts import TARGETS
from jaxrec.text.tokenizer import TextTokenizer
from jaxrec.training.sharding import init_sharded

NEIGHBOURS_FILE = "neighbours.safetensors"


@dataclass(frozen=True, eq=False)
class OneSugAssembly:
    """The model, fitted to the queries of a run."""

    model: SuggestionModel
    space: TextSpace
    behaviors: tuple[str, ...]
    """names, weakest first"""
    wanted: np.ndarray
    """bool [behaviors]: the target behaviors"""
    features: SuggestionFeatureConfig
    """with the length of queries and the special tokens"""
    known: KnownTexts
    queries: np.ndarray
    """object [rows]: the texts of queries.parquet"""
    prefixes: np.ndarray
    """object [rows]: the texts of prefixes.parquet"""
    related: RelatedOfPrefixes | None = None
    """the related queries of prefixes; None: they are not read"""
    profiles: Profiles | None = None
    """what is known of users; None: it is not read"""
    examples: Any = None
    """folder of the example records"""
    catalogue: Any = None
    """nothing is read of the items"""

    @property
    def target_behaviors(self) -> list[int]:
        """Indices of the target behaviors."""
        return np.flatnonzero(self.wanted).tolist()

    @property
    def profile_columns(self) -> tuple[str, ...]:
        """The columns that a user's profile has."""
        return () if self.profiles is None else self.profiles.columns

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of what is typed."""
        return self.known.tokenizer

    def init(self, seed: int, mesh: Mesh | None = None) -> dict:
        """Fresh variables {"params"}: made on the devices where they stay, if there is a mesh."""
        cut = self.features.cut(self.read_texts({}), 0, behaviors=len(self.behaviors), wanted=self.wanted)

        def make():
            inputs = self.inputs({name: jnp.asarray(array)[None] for name, array in cut.items()})
            return self.model.init(jax.random.key(seed), inputs, jnp.zeros((1, 1, self.features.length), jnp.int32))

        return init_sharded(make, mesh)

    def inputs(self, arrays: dict[str, jax.Array]) -> SuggestionInputs:
        """The model's input from stacked arrays of `SuggestionFeatureConfig.cut`."""
        given = {"candidates": "candidate", "habits": "habits", "user": "user"} if self.model.copying else {}
        return SuggestionInputs(arrays["tokens"], **{name: arrays[array] for name, array in given.items()})

    # ---- texts -------------------------------------------------------------------------------------------------------

    def read_texts(self, history: History, seen: Seen = UNSEEN) -> History:
        """The history with what `SuggestionFeatureConfig.cut` reads of its texts.

        Searches are texts, or rows of queries.parquet as in a record; what is typed is a text.
        """
        known, begins = self.known.completions, typed(typed_text(history))
        numbers, more = self._numbered(history)
        read = self._prompt(history, begins, numbers, more, seen)
        if not self.features.candidates:
            return read
        span, times = known.of(begins), history.get("search_timestamp", np.zeros(0, np.int64))
        own, last = NOBODY, [times, history.get("timestamp", times[:0])]
        if len(numbers) and self.features.own:
            mine = (numbers >= span.start) & (numbers < span.stop)
            for at, text in enumerate(more, len(known)):
                mine |= (numbers == at) & text.startswith(begins)
            sessions, session = np.unique(history["search_session"], return_inverse=True)
            own = Own(numbers[mine], times[mine], session[mine], len(sessions), len(numbers))
        now = int(history.get("now", max(each.max(initial=0) for each in last)))
        past = np.unique(numbers[(numbers >= 0) & (numbers < len(known))])
        return read | {
            "own": own,
            "top": known.top(begins, self.features.popular, now // DAY, seen.session),
            "span": (span.start, span.stop),
            "characters": len(begins),
            "texts": QueriesOfUser(self.known, more, past, seen.ahead),
            "now": now,
        }

    def read_prompt(self, history: History, seen: Seen = UNSEEN) -> History:
        """As `read_texts`, with the prompt alone."""
        return self._prompt(history, typed(typed_text(history)), *self._numbered(history), seen)

    def _prompt(self, history: History, begins: str, numbers: np.ndarray, more: Sequence[str], seen: Seen) -> History:
        related = np.zeros(0, np.int64) if self.related is None else self.related.of(begins, self.known, seen)
        return history | {
            "typed_tokens": self.known.encoded(begins) if begins else NO_TOKENS,
            "near": related,
            "related": [self.known.read[number] for number in related[: self.features.related]],
            "earlier": self._earlier(numbers, more),
            "profile_tokens": NO_TOKENS if self.profiles is None else self.profiles.tokens_of(history),
        }

    def _numbered(self, history: History) -> tuple[np.ndarray, tuple[str, ...]]:
        """Numbers int64 [n] of past searches, and the texts of those behind the known ones; UNKNOWN for empty ones."""
        searched = history.get("search_query", np.zeros(0, np.int64))
        numbers, more = self.known.numbers(searched), {}
        if searched.dtype == object:
            for place in np.flatnonzero(numbers == UNKNOWN):
                if text := normalised(searched[place]):
                    numbers[place] = len(self.known.completions) + more.setdefault(text, len(more))
        return numbers, tuple(more)

    def _earlier(self, numbers: np.ndarray, more: Sequence[str]) -> list[np.ndarray]:
        """The tokens of the last distinct queries, the newest first."""
        found: dict[int, np.ndarray] = {}
        known = len(self.known.completions)
        for number in numbers[::-1].tolist():
            if len(found) >= self.features.earlier:
                break
            if number >= 0 and number not in found:
                found[number] = self.known.read[number] if number < known else self.known.encoded(more[number - known])
        return list(found.values())

    # ---- what the recommender asks for -------------------------------------------------------------------------------

    def cases(self, split: str) -> Cases:
        """One case a typed prefix of the split for which a suggested query was chosen."""
        cases = prefix_cases(Records(self.examples, split), split)
        return text_cases(cases, self.space, self.queries, self.prefixes)

    def serve(self, variables: dict, version: Version | None = None, before: Version | None = None) -> Served:
        """The variables: nothing else is read of a catalogue."""
        return Served(variables=variables)

    def context(self, served: Served, arrays: dict[str, jax.Array]) -> SuggestionContext:
        """B contexts from stacked arrays of `SuggestionFeatureConfig.cut`."""
        return self.model.apply(served.variables, self.inputs(arrays), method="prefill")

    def extend(self, served: Served, context: SuggestionContext, tokens: jax.Array | None, cache: Any, level: int):
        """One more token for every beam."""
        return self.model.apply(served.variables, context, tokens, cache, level, method="extend")

    def rescore(self, served: Served, context: SuggestionContext, likelihood_weight: float) -> None:
        """None: beams are ranked by their log-probabilities."""


def assemble(run: Run, config: OneSugConfig) -> OneSugAssembly:
    """Reads the queries of a run and shapes the model to them.

    Raises:
      UserError: a file is missing or damaged.
    """
    space, known = load_text_space(run.place(TARGETS)), completions(run.tables, config.completions)
    neighbours = load_neighbours(run.place(NEIGHBOURS) / NEIGHBOURS_FILE) if config.neighbours.kept else None
    length = space.config.max_length
    texts = KnownTexts(known, space.tokenizer, length, query_rows(run.tables, known), neighbours)
    backbone = backbone_of(run.place(TARGETS), config.model)
    vocabulary = SuggestionVocabulary(space.vocabulary or space.tokenizer.size)
    model = SuggestionModel(vocabulary.fit(backbone, length), vocabulary, config.copying)
    return OneSugAssembly(
        model=model,
        space=space,
        behaviors=tuple(config.data.behaviors),
        wanted=np.isin(config.data.behaviors, config.data.target_behaviors),
        features=replace(config.features, length=length, specials=vocabulary.special(0)),
        known=texts,
        queries=table_texts(run.tables, "queries"),
        prefixes=table_texts(run.tables, "prefixes"),
        related=related_queries(run, config, known) if config.related else None,
        profiles=load_profiles(run.tables, config.profile, space.tokenizer) if config.profile else None,
        examples=run.examples,
    )


def related_queries(run: Run, config: OneSugConfig, known: Completions) -> RelatedOfPrefixes:
    """Those of a run's phase `related`. What `known` doesn't know is related to nothing."""
    found = load_related(run.place(RELATED), config.text)
    return RelatedOfPrefixes(found, known.rows(found.texts))


def recommender(assembly: OneSugAssembly, variables: dict, config: OneSugConfig) -> GenerativeRecommender:
    """The trained model of a run, ready to suggest."""
    return GenerativeRecommender(assembly, variables, assembly.features, config.decoding)
