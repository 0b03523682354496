"""A trained model that recommends: histories in, ranked answers out, by beam search.

It knows a model only by its `Assembly`: how a history becomes a context, and how a beam gets one more token. It knows
what the tokens mean only by the assembly's target space (`jaxrec.targets`): items or texts. So every generative system
is searched, measured, served live and exported by the same code.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrec.catalogue.version import Version
from jaxrec.config import UserError, check_choice, check_least
from jaxrec.data.words import typed
from jaxrec.decoding.beam import Rescore
from jaxrec.decoding.filters import Allowed, ItemFilter, ItemOrder, stack
from jaxrec.decoding.trie import Trie
from jaxrec.decoding.typed import TypedText
from jaxrec.evaluation.cases import Cases, History
from jaxrec.evaluation.metrics import add, id_accuracy, token_accuracy, validity_rate
from jaxrec.models.prior import Prior, popularity_prior
from jaxrec.targets import Constrained, Found, TargetSpace
from jaxrec.text.token_bytes import PLACES

Item = TypeVar("Item")

FIRST = 10
"""Targets of a beam search without the trie whose validity is measured."""


@dataclass(frozen=True)
class DecodingConfig:
    """Beam search."""

    beam_width: int = 64
    """beams; where more answers are asked for, as many beams as answers"""
    batch_size: int = 32
    """histories that are decoded together, at most"""
    beam_widths: tuple[int, ...] = ()
    """beams of every level (RankGR: 500, 1400) in place of `beam_width`; never more than there are prefixes. Where more
    items are asked for, the last level has as many. Texts have no levels"""
    candidates: tuple[int, ...] = ()
    """candidates of every level that a rank head scores (RankGR's lambda: 1400, 1400); at least the beams, which is
    the default"""
    likelihood_weight: float = 0.0
    """weight of an ID's log-probability that is added to a rank head's score; 0, as published (RankGR Eq. 18): none"""
    constrained: Constrained = "listed"
    """what the beams may find: listed answers alone (listed), anything (free), or, of texts, those of the list and,
    where they are too few, any text below them (mixed). Without a list any text is an answer. A free ID that is no
    item's is dropped at the end, so that there are fewer items than were asked for"""
    completing: bool = False
    """texts begin with what was typed"""

    def __post_init__(self):
        check_choice(self, "decoding", "constrained", get_args(Constrained))
        check_least(self, "decoding", beam_width=1, batch_size=1, beam_widths=1, candidates=1, likelihood_weight=0)

    def check(self, space: TargetSpace, key: str = "decoding") -> None:
        """Whether the beam search fits the targets.

        key: where the configuration has this beam search.

        Raises:
          UserError: it doesn't.
        """
        if space.kind != "texts" and (self.completing or self.constrained == "mixed"):
            name = "completing" if self.completing else "constrained"
            raise UserError(
                f"configuration key '{key}.{name}' is {getattr(self, name)}, which is for texts, but this run "
                f"generates {space.kind}; leave it out"
            )
        if self.constrained == "mixed" and not len(space):
            raise UserError(
                f"configuration key '{key}.constrained' is mixed, but no text is listed: give a list, or leave it out"
            )
        for name in ("beam_widths", "candidates"):
            given, levels = getattr(self, name), space.levels
            if given and levels is None:
                raise UserError(
                    f"configuration key '{key}.{name}' gives a number a level, but {space.kind} have no levels; leave "
                    f"it out, and set {key}.beam_width"
                )
            if given and len(given) != levels:
                raise UserError(
                    f"configuration key '{key}.{name}' has {len(given)} numbers, but semantic IDs have {levels} "
                    "levels; give one for each"
                )


@flax.struct.dataclass(kw_only=True)
class Served:
    """Arrays that answers are computed from and no request changes; a system adds its own. A pytree, which is an
    argument of the compiled functions, not a constant in them."""

    variables: Any
    """the model's: {"params", ...}"""
    trie: Trie | None = None
    """the listed answers; None where nothing is listed, and before the recommender adds it"""
    token_lengths: jax.Array | None = None
    """int32 [V], bytes of every token where texts begin with what was typed; None elsewhere"""


class Assembly(Protocol):
    """A model fitted to one catalogue, as the recommender sees it.

    The assembly of a model that reads texts (a query, a prefix, the searches of a history) also has
    `read_texts(history)`: the history with the arrays that its features cut, such as `tokens`. Histories then hold
    texts (`jaxrec.data.searches.with_texts`). If no request makes sense without what was typed, it has `required_text`,
    "query" or "prefix"; and `tokenizer`, which is exported too, where its tokens are those of a tokenizer. With a
    `reader` it is exported so that texts are read without the run: that has `save(folder)`, its system `load_reader`.
    """

    space: TargetSpace
    """what the tokens of the model's targets mean"""
    wanted: np.ndarray
    """bool [behaviors]: the target behaviors"""
    examples: Any
    """folder of the example records"""

    @property
    def catalogue(self) -> Any:
        """What a training step reads of all items, a pytree of arrays."""
        ...

    @property
    def behaviors(self) -> tuple[str, ...]:
        """Names, weakest first."""
        ...

    @property
    def target_behaviors(self) -> list[int]:
        """Indices of the target behaviors."""
        ...

    def init(self, seed: int, mesh: Mesh | None = None) -> dict:
        """Fresh variables {"params", ...}: made on the devices where they stay, if there is a mesh."""
        ...

    def serve(self, variables: dict, version: Version | None = None, before: Version | None = None) -> Served:
        """The arrays that contexts and tokens are computed from, without the trie.

        version: a version of a live catalogue, whose first rows are the items that the model was trained on; arrays
        have room for its `capacity`. before: the version before, of the same capacity, if there was one.
        """
        ...

    def context(self, served: Any, arrays: dict[str, jax.Array]) -> Any:
        """B contexts from `serve`'s arrays and stacked arrays that the system's features (`cut`) made."""
        ...

    def extend(self, served: Any, context: Any, tokens: jax.Array | None, cache: Any, level: int):
        """As `jaxrec.decoding.beam_search` calls it."""
        ...

    def rescore(self, served: Any, context: Any, likelihood_weight: float) -> Rescore | None:
        """The function that rescores beams, or None: beams are then ranked by their log-probabilities.

        Its scores are added to `likelihood_weight` times the log-probabilities.
        """
        ...


class Reader(Protocol):
    """How a system cuts histories into arrays of few shapes; a configuration, such as `FeatureConfig`."""

    buckets: tuple[int, ...]

    def cut(self, record: History, session: int, *, behaviors: int, wanted: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of what comes before `session`."""
        ...

    def bucket_of(self, record: History, session: int) -> int:
        """Which of the buckets that cut is padded to."""
        ...


@dataclass(frozen=True)
class ReadHistory:
    """A history as the model reads it, before its arrays are cut."""

    history: History
    """with the arrays of its texts, where the model reads texts"""
    end: int
    """the session before which events count"""
    begin: dict[str, np.ndarray]
    """the arrays of what texts have to begin with; none where they need not"""
    shape: tuple[int, int]
    """of its arrays, which histories of one batch share: length bucket, words of `begin`"""


class GenerativeRecommender:
    """Recommends with a trained model. Histories are padded to few shapes: nothing recompiles after a warm-up."""

    def __init__(self, assembly: Assembly, variables: dict, feature_config: Reader, config: DecodingConfig):
        self.assembly, self.feature_config, self.config = assembly, feature_config, config
        config.check(assembly.space)
        self._variables = variables
        self._order: tuple[Trie, ItemOrder] | None = None
        self._signatures: dict[tuple, dict[str, np.ndarray]] = {}
        # Of this recommender: compiled functions of the class, with `self` static, would keep every one of them alive.
        self._search = jax.jit(self.retrieve, static_argnames=("width", "k"))
        self._measure = jax.jit(self._accuracies)

    @functools.cached_property
    def served(self) -> Served:
        """The arrays of the trained catalogue, and the trie of the listed answers."""
        return self.served_with(self._variables)

    def served_with(self, variables: dict) -> Served:
        """As `served`, of other variables of the same model, as while it is trained."""
        return self.assembly.serve(variables).replace(trie=self.trie, token_lengths=self._token_lengths)

    @functools.cached_property
    def trie(self) -> Trie | None:
        """The listed answers.

        Raises:
          UserError: no trie can be built of them.
        """
        return self.space.build_trie()

    @functools.cached_property
    def _token_lengths(self) -> jax.Array | None:
        return jnp.asarray(self.space.token_bytes.lengths) if self.config.completing else None

    @property
    def space(self) -> TargetSpace:
        """What the tokens of the model's targets mean."""
        return self.assembly.space

    @property
    def variables(self) -> dict:
        """The model's variables: {"params", ...}."""
        return self._variables

    @property
    def reads_queries(self) -> bool:
        """Whether the model reads the query or prefix of a request, and the searches of its history."""
        return hasattr(self.assembly, "read_texts")

    @property
    def required_text(self) -> str | None:
        """The field that every request has to have: "query", "prefix" or None."""
        return getattr(self.assembly, "required_text", None)

    @property
    def profile_columns(self) -> tuple[str, ...]:
        """What a history may tell of its user as `profile`, {column: value}; none where the model reads no profile."""
        return getattr(self.assembly, "profile_columns", ())

    def recommend(
        self,
        histories: Sequence[History | ReadHistory],
        k: int,
        exclude_history: bool = False,
        *,
        allowed: Sequence[Allowed] | None = None,
        served: Served | None = None,
        sizes: Sequence[int] | None = None,
        space: TargetSpace | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best answers to each history: int32 [B, k] (-1 = none) and their log-probabilities float32 [B, k].

        Histories may have been read before (`read`). `exclude_history` leaves out the answers that the history holds
        (items under a target behavior, or searched texts), also of those that `allowed` names. Items that share an ID
        share its score, by descending popularity. `allowed` says which answers each history may get, in the order of
        the trie of `served`, which is that of a version of a live catalogue (`serve_version`) or by default of the
        trained one. Batches are padded to one of
        `sizes`, which rise; by default to `config.batch_size`, for which the fewest programs are compiled. `space` is
        that of the version's texts where their list changes.
        """
        served, space = self.served if served is None else served, space or self.space
        readings, histories = histories, [as_history(each) for each in histories]
        held = [space.held(history, self.assembly.wanted) for history in histories] if exclude_history else None
        if held and served.trie is not None:
            allowed = _unseen(held, allowed, self._order_of(served.trie))
        answers = np.full((len(histories), k), -1, np.int32)
        scores = np.full((len(histories), k), -np.inf, np.float32)
        width = self.width(k)

        def searches():
            for rows, arrays in self.batches(readings, sizes):
                few = None if allowed is None else _stack([allowed[row] for row in rows], _batch_size(arrays))
                self._note(arrays, few, width, k)
                yield rows, self._search(served, arrays, few, width, k)

        for rows, search in _one_ahead(searches()):
            found: Found = jax.device_get(search)
            if found.nan.any():
                raise FloatingPointError("the model gave NaN; its parameters are damaged, train it again")
            begins = [typed(typed_text(histories[row])) for row in rows] if self.config.completing else ()
            if held and found.tokens is not None:
                # Not all of it was listed, so that the search could not leave it out.
                more = k + max(len(held[row]) for row in rows)
                of_batch, of_scores = _without([held[row] for row in rows], *space.read(found, more, begins), k)
            else:
                of_batch, of_scores = space.read(found, k, begins)
            answers[rows], scores[rows] = of_batch[: len(rows)], of_scores[: len(rows)]
        return answers, scores

    def diagnose(self, cases: Cases, served: Served | None = None) -> dict[str, tuple[float, float]]:
        """As (sum, count): teacher-forced accuracy of the targets' tokens, and `validity`.

        The accuracy is one a level (OneMall Table 1), or of all tokens together where targets have no levels. Validity
        is the share of listed targets among the first 10 of a beam search without the trie, with the beams of a search
        for 10 answers; it is left out where nothing is listed.
        """
        sums: dict[str, tuple[float, float]] = {}
        served = self.served if served is None else served
        for rows, arrays in self.batches(cases.histories):
            target = np.zeros((self.config.batch_size, cases.targets.shape[1]), np.int32)
            where = np.zeros_like(target, bool)
            target[: len(rows)] = np.where(cases.where[rows], cases.targets[rows], 0)
            where[: len(rows)] = cases.where[rows]
            real = np.arange(self.config.batch_size) < len(rows)
            tokens, real_tokens = self.space.tokens(target)
            measured = self._measure(served, arrays, tokens, real_tokens & where[..., None], where, real)
            sums = add(sums, jax.device_get(measured))
        return {name: (float(total), float(count)) for name, (total, count) in sums.items()}

    def width(self, k: int) -> int | tuple[int, ...]:
        """Beams where k answers are asked for: one number, or one a level."""
        if self.config.beam_widths:
            *before, last = self.config.beam_widths
            return (*before, max(last, k))
        return max(self.config.beam_width, k)

    def every_length(self) -> list[History]:
        """A history for each of the length buckets that histories, with what was typed, can fall into."""
        found: dict[tuple[int, int], History] = {}
        for length in self.feature_config.buckets:
            for behavior in range(len(self.assembly.behaviors)):
                for texts in self._sample_texts() if self.reads_queries else ({},):
                    history = repeated_item(length, behavior) | texts
                    read = self.assembly.read_texts(history) if self.reads_queries else history
                    typed_words = len(self._begin(history).get("typed", ()))
                    found.setdefault((self.feature_config.bucket_of(read, length), typed_words), history)
        return [found[bucket] for bucket in sorted(found)]

    def _sample_texts(self) -> list[History]:
        """Typed texts, and searches, of all lengths."""
        # A word is one token or several, so that some count of words falls into every bucket.
        counts = (0, *sorted({length // part for length in self.feature_config.buckets for part in (1, 2, 3, 4, 6)}))
        samples = [{"query": "a " * count} for count in counts]
        if self.config.completing:
            # Few bytes behind a long history; and, of the longest token, many bytes that are few tokens.
            longest = max(self.space.token_bytes.tokens, key=len).decode(errors="replace")
            searched = ({"search_query": np.array(["a " * count], object)} for count in counts)
            samples += [EMPTY_SEARCH | {"query": "a"} | search for search in searched]
            samples += [{"query": longest * count} for count in range(2, PLACES + 1)]
        return samples

    def _begin(self, history: History) -> dict[str, np.ndarray]:
        """The arrays of what texts have to begin with; none where they need not."""
        return self.space.begin(typed(typed_text(history))) if self.config.completing else {}

    def read(self, history: History) -> ReadHistory:
        """Reads a history's texts and finds the shape of its arrays."""
        if self.reads_queries:
            history = self.assembly.read_texts(history)
        end = int(history["session"][-1]) + 1 if len(history["session"]) else 0
        begin = self._begin(history)
        shape = self.feature_config.bucket_of(history, end), len(begin.get("typed", ()))
        return ReadHistory(history, end, begin, shape)

    def batches(self, histories: Sequence[History | ReadHistory], sizes: Sequence[int] | None = None):
        """Yields (rows, stacked features): histories of one shape, padded to the smallest of `sizes`.

        Where there are more than the largest, all batches have that size.
        """
        sizes = sizes or (self.config.batch_size,)
        reads = [each if isinstance(each, ReadHistory) else self.read(each) for each in histories]
        shapes = np.array([each.shape for each in reads])
        for shape in np.unique(shapes, axis=0) if reads else ():
            group = np.flatnonzero((shapes == shape).all(1))
            size = next((size for size in sizes if size >= len(group)), sizes[-1])
            for start in range(0, len(group), size):
                rows = group[start : start + size]
                cuts = [self._cut(reads[row].history, reads[row].end) | reads[row].begin for row in rows]
                filled = [cuts[index % len(cuts)] for index in range(size)]
                yield rows, {name: np.stack([arrays[name] for arrays in filled]) for name in cuts[0]}

    def _cut(self, history: History, end: int) -> dict:
        """The features of everything in a history that ends before session `end`."""
        wanted, behaviors = self.assembly.wanted, len(self.assembly.behaviors)
        return self.feature_config.cut(history, end, behaviors=behaviors, wanted=wanted)

    def _order_of(self, trie: Trie) -> ItemOrder:
        """The positions of answers in a trie; those of the last trie are kept."""
        if self._order is None or self._order[0] is not trie:
            self._order = trie, ItemOrder(trie)
        return self._order[1]

    def _note(self, arrays: dict, item_filter: ItemFilter | None, width: int | tuple, k: int) -> None:
        """Remembers which shapes were asked for, so that `warm_up` can ask for them again."""
        shapes = tuple((name, array.shape) for name, array in arrays.items())
        key = (shapes, item_filter is not None, width, k)
        if key not in self._signatures:
            self._signatures[key] = {name: np.zeros_like(array) for name, array in arrays.items()}

    def retrieve(
        self,
        served: Served,
        arrays: dict,
        allowed: jax.Array | ItemFilter | None,
        width: int | tuple[int, ...],
        k: int,
    ) -> Found:
        """The whole retrieval as a pure function of arrays: what is jitted here and exported by `jaxrec.export`.

        served: as `self.served`; arrays: stacked features of B histories; allowed: bool [B, I], a filter made
        of it, or None for everything. Scores are log-probabilities, or what a rank head made of them.
        """
        context, config = self.assembly.context(served, arrays), self.config
        # Of IDs the trie says which of those that were found are items.
        trie = None if config.constrained == "free" and self.space.kind == "texts" else served.trie
        begin = TypedText(arrays["typed"], arrays["typed_length"], served.token_lengths) if config.completing else None
        result = self.space.search(
            functools.partial(self.assembly.extend, served, context),
            trie,
            batch=_batch_size(arrays),
            width=width,
            k=k,
            allowed=allowed,
            rescore=self.assembly.rescore(served, context, config.likelihood_weight),
            candidates=config.candidates,
            constrained=config.constrained,
            typed=begin,
        )
        return self.space.expand(trie, result, k=k, allowed=allowed)

    # ---- a catalogue that changes ------------------------------------------------------------------------------------

    def serve_version(self, version: Version, before: Version | None) -> Served:
        """The arrays of a version of the catalogue, as `served`, with room for more items.

        The first version's rows are those that the model was trained on. A removed item changes no score of the others.
        """
        trie = version.trie if self.space.item_codes is not None else self._text_trie(version, before)
        if before is not None and version.codes is before.codes and version.capacity == before.capacity:
            return before.served.replace(trie=trie)
        grown = before is None or version.capacity != before.capacity
        served = self.assembly.serve(self._variables, version, None if grown else before)
        return served.replace(trie=trie, token_lengths=self._token_lengths)

    def _text_trie(self, version: Version, before: Version | None) -> Trie | None:
        """The trie of a version's list of texts, in the shapes of the one before if they have room for it."""
        earlier = (self.space, self.served) if before is None else (before.texts, before.served)
        if version.texts is None or version.texts is earlier[0]:
            return earlier[1].trie
        return version.texts.build_trie(like=earlier[1].trie)

    def warm_up(self, served: Served) -> None:
        """Runs every search that was asked for so far once, on arrays of zeros: whoever asks next need not wait."""
        for (_, filtered, width, k), arrays in list(self._signatures.items()):
            few = _stack([ItemOrder(served.trie).allowed()], _batch_size(arrays)) if filtered else None
            jax.block_until_ready(self._search(served, arrays, few, width, k))

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def _accuracies(self, served, arrays, tokens, real_tokens, where, real):
        """tokens int32 [B, L, M], real_tokens bool [B, L, M], where bool [B, L]: real targets; real bool [B]: cases."""
        context = self.assembly.context(served, arrays)
        extend = functools.partial(self.assembly.extend, served, context)
        log_probs, cache = extend(None, None, 0)
        log_probs = [jnp.broadcast_to(log_probs, (*where.shape, log_probs.shape[-1]))]
        cache = jax.tree.map(lambda x: jnp.repeat(x, where.shape[1], axis=1), cache)
        for level in range(1, tokens.shape[-1]):
            following, cache = extend(tokens[..., level - 1], cache, level)
            log_probs.append(following)
        if self.space.levels is None:
            measured = {"acc_token": token_accuracy(log_probs, tokens, real_tokens)}
        else:
            measured = id_accuracy(log_probs, tokens, where)
        if served.trie is None:
            return measured
        options = {"batch": _batch_size(arrays), "width": self.width(FIRST), "k": FIRST}
        first = self.space.search(extend, served.trie, **options, constrained="free").valid[:, :FIRST]
        return measured | {"validity": validity_rate(first, jnp.broadcast_to(real[:, None], first.shape))}


def _without(
    held: Sequence[np.ndarray], answers: np.ndarray, scores: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first k answers of each ranking [B, n] that its history does not hold, and their scores."""
    kept = np.full((len(held), k), -1, np.int32), np.full((len(held), k), -np.inf, np.float32)
    for row, mine in enumerate(held):
        new = np.flatnonzero(~np.isin(answers[row], mine))[:k]
        for values, all_values in zip(kept, (answers, scores), strict=True):
            values[row, : len(new)] = all_values[row, new]
    return kept


def typed_text(history: History) -> str:
    """What was typed last, as a text; none if nothing was."""
    return history.get("prefix", history.get("query", ""))


def as_history(given: History | ReadHistory) -> History:
    """A history as it was given, or with its texts read."""
    return given.history if isinstance(given, ReadHistory) else given


def _batch_size(arrays: dict[str, jax.Array]) -> int:
    return next(iter(arrays.values())).shape[0]


EMPTY_SEARCH = {"search_timestamp": np.zeros(1, np.int64), "search_session": np.zeros(1, np.int32)}


def repeated_item(length: int, behavior: int) -> History:
    """The history of somebody who met item 0 in each of `length` sessions."""
    return {
        "item": np.zeros(length, np.int32),
        "behavior": np.full(length, behavior, np.int8),
        "timestamp": np.zeros(length, np.int64),
        "session": np.arange(length, dtype=np.int32),
        "now": np.int64(0),
    }


def _unseen(held: list[np.ndarray], allowed: Sequence[Allowed] | None, order: ItemOrder) -> Sequence[Allowed] | None:
    """Those of `allowed` (None = all) that are not among the held answers; `allowed` itself where none are held."""
    if not any(map(len, held)):
        return allowed
    if allowed is None:
        return [order.allowed(blocked=answers) for answers in held]
    return [order.without(may, answers) for may, answers in zip(allowed, held, strict=True)]


def _stack(requests: list[Allowed], size: int) -> ItemFilter:
    """The filter of a batch, padded to `size` requests."""
    return stack([requests[row % len(requests)] for row in range(size)])


def filled_up(values: np.ndarray, rows: int) -> jax.Array:
    """values [n, ...] with zeros behind up to `rows`."""
    filled = np.zeros((rows, *values.shape[1:]), values.dtype)
    filled[: len(values)] = values
    return jnp.asarray(filled)


def with_later_prior(trained: Prior | None, version: Version, before: Version | None) -> Prior | None:
    """The popularity prior of a version's items, shaped like that of the version `before`; None for a model without."""
    if trained is None:
        return None
    like = None if before is None else before.served.prior
    return popularity_prior(version.codes, version.popularity, trained.sizes, capacity=version.capacity, like=like)


def with_later_embeddings(trained: np.ndarray, version: Version) -> np.ndarray:
    """The embeddings f32 [n, E] of a version's items: `trained`, and behind it those that came later, or zeros.

    Raises:
      UserError: they have another width.
    """
    count, width = len(version) - len(trained), trained.shape[1]
    given = np.zeros((count, width), np.float32)
    if version.embeddings.shape[1]:
        if version.embeddings.shape[1] != width:
            raise UserError(
                f"embeddings of new items have width {version.embeddings.shape[1]}, those of the run have "
                f"{width}: give such as its semantic IDs were made of"
            )
        given = np.nan_to_num(version.embeddings)
    return np.concatenate([trained, given])


def _one_ahead(iterator: Iterator[Item]) -> Iterator[Item]:
    """The same elements, each when the next is begun: the host prepares a batch while the device works on another."""
    before: list[Item] = []
    for element in iterator:
        yield from before
        before = [element]
    yield from before
