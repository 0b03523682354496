"""The retriever: a run directory that answers requests.

It knows the catalogue, with what was published since the training (`python -m jaxrec.semantic_ids append --publish`),
and everything each user did up to the end of the log (the test sessions are history by now).
Whoever it knows nothing about gets the most popular items (or texts, of a run that answers with texts), marked as such.

The catalogue may change during serving (`Retriever.catalogue`, `Retriever.add`): every call of `answer` uses the
version that was current at its start.
"""

import dataclasses
import itertools
import logging
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.catalogue.live import LiveCatalogue
from jaxrec.catalogue.version import Predicate, Version
from jaxrec.config import UserError
from jaxrec.console import track
from jaxrec.data.words import normalised
from jaxrec.decoding.filters import LISTED, Allowed
from jaxrec.evaluation.baselines import Recommender
from jaxrec.evaluation.cases import History
from jaxrec.files import read_json
from jaxrec.run import Run
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.table.later import check_known, read_later
from jaxrec.semantic_ids.table.space import read_codes, rows_in
from jaxrec.semantic_ids.table.version_files import BOOKS, read_version
from jaxrec.semantic_ids.table.versions import CODES, trained_version
from jaxrec.serving.answers import ANSWERS, Answers
from jaxrec.serving.histories import InlineHistories, moment_of
from jaxrec.serving.schema import MAX_K, Answer, GeneratedText, Request
from jaxrec.serving.searches import UserSearches, own_searches
from jaxrec.targets import changed

LOG = logging.getLogger(__name__)
SPARE = 1 << 16
"""Number of new items that a recommender without semantic IDs has room for."""
NO_QUERIES = "reads no queries; leave query and prefix out of the request, and searches out of its history"
NO_PROFILE = "reads no {} of a user's profile; leave it out of the field profile"
NO_TEXT = "answers what was typed; give the field {}, which this request lacks"
NOTHING_ALLOWED = "the filters of this request allow no item of the catalogue"
DEPTHS = (10, 50, 100, MAX_K)
"""The depths of rankings; at most one program is compiled for each."""
AT_ONCE = 64
"""Requests in one call of the model; few, since a call may rank the whole catalogue for each of them."""
LIST_SIZES = tuple(LISTED**power + 1 for power in range(1, 20))
"""One more than the padded length of lists of blocked items."""


def batch_sizes(most: int) -> tuple[int, ...]:
    """The sizes to which batches are padded: 1, 8, 32, 128 ... below `most`, and `most`."""
    return (*itertools.takewhile(lambda size: size < most, (1, *(8 * 4**step for step in range(30)))), most)


@dataclasses.dataclass
class Prepared:
    """A request on its way to the model, or with its answer."""

    request: Request
    version: Version
    """of the catalogue, for the whole request"""
    depth: int
    """of the ranking"""
    history: Any = None
    """as the recommender takes it"""
    ignored: list[str] = dataclasses.field(default_factory=list)
    """item ids of the request that the catalogue does not know"""
    searched: set[str] = dataclasses.field(default_factory=set)
    """the user's searches, normalised"""
    allowed: Allowed | None = None
    """the answers that the request may get; None: all"""
    answer: Answer | UserError | None = None
    """where no model is needed"""

    @property
    def kind(self) -> tuple[bool, int, int, tuple[int, ...]]:
        """What requests of one call share: filters or none, depth, version, the shape of the history's arrays."""
        return self.allowed is not None, self.depth, self.version.number, getattr(self.history, "shape", ())


class Retriever:
    """Answers batches of requests; thread-safe.

    Attributes:
      sizes: what batches of the model are padded to; None for a model that pads by itself.
      answers: what the run answers with, items or texts.
      reads_queries: whether the model reads queries, prefixes and searches.
      required_text: the field that every request has to have, "query" or "prefix"; None: neither.
      ready: whether `warm_up` was called.
    """

    def __init__(self, run_path: Path, recommender: Recommender | None = None, *, batch_size: int | None = None):
        """Loads the run; `recommender` replaces the trained model, for tests and for baselines.

        `batch_size` replaces the run's `decoding.batch_size`.

        Raises:
          UserError: there is no run at `run_path`, or it is not finished or was replaced meanwhile; its system is
            unknown; a published item has no row in the run; a batch size was given for a model without one.
        """
        self.run, _ = Run.load(Path(run_path))
        self.ready = False
        self._lock = threading.Lock()
        with self.run.reading_trained() if recommender is None else nullcontext():
            self._read(recommender, batch_size)

    def _read(self, recommender: Recommender | None, batch_size: int | None) -> None:
        config = read_json(self.run.config_file)
        self.system = str(config.get("system"))
        for name in ("items.parquet", "users.parquet", "events.parquet", "statistics.json"):
            if not (self.run.tables / name).exists():
                raise UserError(f"{self.run.tables / name} is missing; run train.py again with --run {self.run.path}")
        items = pq.read_table(self.run.tables / "items.parquet")
        users = pq.read_table(self.run.tables / "users.parquet")["user_id"].to_pylist()
        self.user_index = {user_id: row for row, user_id in enumerate(users)}
        statistics = read_json(self.run.tables / "statistics.json")
        self.behaviors: list[str] = statistics["behaviors"]
        self.target_behaviors = [self.behaviors.index(name) for name in statistics["target_behaviors"]]
        # A model from which the time of the request is hidden gets the time of the last event, as in training.
        self.answer_time = bool(statistics.get("answer_time", True))
        self._read_events(len(users))
        self.recommender = recommender or self._load_recommender(config)
        self.reads_queries = bool(getattr(self.recommender, "reads_queries", False))
        self.required_text: str | None = getattr(self.recommender, "required_text", None)
        self.searches = UserSearches(self.run.tables, len(users)) if self.reads_queries else None
        if self.searches is not None:
            self.latest = max(self.latest, self.searches.latest)
        self.sizes = self._sizes(batch_size)
        space = getattr(self.recommender, "space", None)
        self.answers: Answers = ANSWERS["items" if space is None else space.kind](self.target_behaviors)
        known = None if space is None else space.item_codes
        self.catalogue = self._live(items, known)
        if known is not None:
            self._take_published(items)

    def _sizes(self, batch_size: int | None) -> tuple[int, ...] | None:
        config = getattr(self.recommender, "config", None)
        if config is None:
            if batch_size is not None:
                raise UserError(f"--batch-size is for models with semantic IDs, not for {self.system}; leave it out")
            return None
        if batch_size is not None:
            self.recommender.config = config = dataclasses.replace(config, batch_size=batch_size)
        return batch_sizes(config.batch_size)

    def _live(self, items: pa.Table, known: tuple[np.ndarray, tuple[int, ...]] | None) -> LiveCatalogue:
        """The catalogue of the run as its first version; known: the items' codes and codebook sizes."""
        counts = items["count"].fill_null(0).to_numpy()
        if known is None:
            # A recommender that doesn't generate IDs: every item is its own, only so that filters have an order.
            known = np.arange(len(items), dtype=np.int32)[:, None], (max(len(items), 1) + SPARE,)
        model = self.recommender if hasattr(self.recommender, "serve_version") else None
        space = getattr(self.recommender, "space", None)
        texts = space if space is not None and space.kind == "texts" else None
        return LiveCatalogue(items, *known, popularity=counts, model=model, texts=texts)

    def _take_published(self, items: pa.Table) -> None:
        """Applies the changes published after the training: items added, removed or re-encoded."""
        folder = self.run.semantic_ids
        if not (folder / CODES).is_file() or trained_version(folder) is None:
            return
        ids = pq.read_table(folder / CODES, columns=["item_id"])["item_id"].cast(pa.string()).combine_chunks()
        check_known(folder, ids)
        space, rows = read_codes(folder / CODES, ids), rows_in(ids, items["item_id"])
        came = np.flatnonzero(rows < 0)
        if len(came):
            table = read_later(folder)
            table = table.take(pa.array(rows_in(ids.take(pa.array(came)), table["item_id"])))
            books, codes = codebooks.load(folder / BOOKS), space.codes[came]
            self.catalogue.add(
                table.select(items.column_names),
                codes,
                popularity=table["count"].fill_null(0).to_numpy(),
                embeddings=codebooks.decode(books, codes[:, : len(books.sizes)]),
            )
        version = self.catalogue.current
        rows = np.array([version.row(item) for item in ids.to_pylist()])
        if len(rows) < len(version) or not np.array_equal(version.codes[rows], space.codes):
            self.catalogue.swap(pa.table({"item_id": ids}), space.codes, popularity=version.popularity[rows])

    def add(
        self,
        items: pa.Table,
        *,
        codes: np.ndarray | None = None,
        popularity: np.ndarray | None = None,
        embeddings: np.ndarray | None = None,
    ) -> Version:
        """Adds items with semantic IDs: they are recommended from now on, and known in histories.

        Args:
          items: `item_id` and any columns of items.parquet.
          codes: int [n, M]; None: those of the current version in the run's semantic_ids folder, as
            `python -m jaxrec.semantic_ids append` made them.
          popularity: [n], in the unit of the column `count`; None for 0.
          embeddings: float [n, D], in the space that was quantized; None: the embeddings decoded from the IDs.

        Raises:
          UserError: as `LiveCatalogue.add`, or an item without a semantic ID.
        """
        if codes is None and "item_id" in items.column_names:
            table = read_version(self.run.semantic_ids)
            item_ids = items["item_id"].to_pylist()
            codes = table.space(item_ids).codes
            if embeddings is None:
                encoded = table.encoded[table.rows(item_ids)]
                embeddings = codebooks.decode(codebooks.load(self.run.semantic_ids / BOOKS), encoded)
        return self.catalogue.add(items, codes, popularity=popularity, embeddings=embeddings)

    def change_texts(self, **changes: Any) -> Version:
        """Changes the list of texts that are answers, from now on; arguments as `jaxrec.targets.changed`.

        Raises:
          UserError: as `changed`, or this run answers with items.
        """
        return self.catalogue.relist(lambda space: changed(space, **changes))

    def _read_events(self, num_users: int) -> None:
        """All events as flat columns; the rows of user u are offsets[u]:offsets[u + 1]."""
        columns = ["user", "item", "behavior", "timestamp", "session"]
        events = pq.read_table(self.run.tables / "events.parquet", columns=columns, read_dictionary=["behavior"])
        behavior = pc.index_in(events["behavior"].cast(pa.string()), value_set=pa.array(self.behaviors))
        self.events = {name: events[name].to_numpy() for name in ("item", "timestamp", "session")}
        self.events["behavior"] = behavior.to_numpy().astype(np.int8)
        self.offsets = np.searchsorted(events["user"].to_numpy(), np.arange(num_users + 1))
        self.latest = int(self.events["timestamp"].max(initial=0))

    def _load_recommender(self, config: dict) -> Recommender:
        # Imported here: a system brings JAX along, and a wrong run directory should be refused before that.
        from jaxrec.systems import load_recommender

        return load_recommender(self.run)

    def answer(
        self,
        requests: Sequence[Request],
        at_once: int = AT_ONCE,
        *,
        within: Sequence[Predicate | np.ndarray | None] | None = None,
    ) -> list[Answer | UserError]:
        """One answer a request, in order; for a request that can't be answered, the UserError with the reason.

        The model gets up to `at_once` histories of one depth in a call; with many, it can fill its batches with
        histories of one length. `within` restricts every request further: bool [I] (row = item of the version), or a
        function of the items table that returns it (its mask is cached, so pass the same function object).
        """
        version = self.catalogue.current
        masks = [None] * len(requests) if within is None else within
        prepared = [self.prepare(*pair, version) for pair in zip(requests, masks, strict=True)]
        answers = [each.answer for each in prepared]
        rows = [row for row, answer in enumerate(answers) if answer is None]
        # Requests with and without filters, and of different depths, are different calls of the model.
        rows.sort(key=lambda row: prepared[row].kind[:2])
        for _, group in groupby(rows, key=lambda row: prepared[row].kind[:2]):
            same = list(group)
            for start in range(0, len(same), at_once):
                some = same[start : start + at_once]
                for row, found in zip(some, self.search([prepared[row] for row in some]), strict=True):
                    answers[row] = self.finish(prepared[row], found)
        return answers

    def prepare(
        self, request: Request, within: Predicate | np.ndarray | None = None, version: Version | None = None
    ) -> "Prepared":
        """What the host does before the model: the history, what is allowed; or the answer, where it needs no model.

        version: of the catalogue; None: the current one. A request that can't be answered has the UserError as answer.
        """
        version = version or self.catalogue.current
        prepared = Prepared(request, version, self.depth(request.k))
        try:
            history, prepared.ignored = self.history(request, version)
            prepared.searched = {normalised(text) for text in history.get("search_query", ())}
            if request.mode == "own":
                prepared.answer = self._own(history, request, version)
                return prepared
            prepared.allowed = self._allowed(request, within, history, version)
        except UserError as error:
            prepared.answer = error
        except Exception as error:  # an internal error must not fail the other requests
            LOG.exception("a request was refused")
            prepared.answer = UserError(f"this request can't be answered: {type(error).__name__}; the log says why")
        if prepared.answer is not None:
            return prepared
        if prepared.allowed is not None and not prepared.allowed.count:
            source = "model" if _is_known(history) else "popular"
            prepared.answer = Answer(items=[], source=source, ignored=prepared.ignored or None, note=NOTHING_ALLOWED)
        elif not _is_known(history):
            popular = self.answers.popular(version, request.k, prepared.allowed)
            prepared.answer = self._marked(prepared, self._answer(version, *popular, "popular", prepared.ignored))
        else:
            # Read here, where several threads are, and not where requests wait for one another.
            prepared.history = self.recommender.read(history) if hasattr(self.recommender, "read") else history
        return prepared

    def search(
        self, prepared: Sequence["Prepared"], sizes: Sequence[int] | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Calls the model for requests of one version, depth, and all with filters or all without.

        sizes: what batches are padded to, rising; None: `self.sizes`. Returns for each request what `finish` takes:
        int32 [k] answers (-1 = none) and their scores float32 [k].
        """
        first = prepared[0]
        allowed = None if first.allowed is None else [each.allowed for each in prepared]
        found = self._recommend(first.version, [each.history for each in prepared], first.depth, allowed, sizes)
        return list(zip(*found, strict=True))

    def finish(self, prepared: "Prepared", found: tuple[np.ndarray, np.ndarray]) -> Answer:
        """The answer to a request, of what `search` found."""
        best, scores = found
        best = best[: prepared.request.k]
        answer = self._answer(prepared.version, best, scores, "model", prepared.ignored)
        return self._marked(prepared, answer)

    def _marked(self, prepared: "Prepared", answer: Answer) -> Answer:
        """The answer, with the texts marked that the user searched for before."""
        for text in answer.texts or ():
            text.own = normalised(text.text) in prepared.searched
        return answer

    def _own(self, history: History, request: Request, version: Version) -> Answer:
        """The user's own searches that begin with the prefix; none that is blocked."""
        if version.texts is None:
            raise UserError("mode own gives searches, but this run answers with items; leave it out")
        space = version.texts
        found = own_searches(history, request.prefix or "", len(history.get("search_query", ())))
        texts = [
            GeneratedText(text=text, score=count, vetted=space.lists(text), own=True)
            for text, count in found
            if not space.blocked.holds(text)
        ]
        return Answer(texts=texts[: request.k], source="own")

    def depth(self, k: int) -> int:
        """The depth of a ranking for k items: the largest of the DEPTHS that need the same beams, to share a
        program."""
        first, *deeper = (depth for depth in DEPTHS if depth >= k)
        width = getattr(self.recommender, "width", None)
        return first if width is None else max([first, *(depth for depth in deeper if width(depth) == width(first))])

    def history(self, request: Request, version: Version | None = None) -> tuple[History, list[str]]:
        """(the history of the request's user, item ids that are not in the catalogue); the history may be empty.

        Where the model reads queries, the history also holds the user's searches and the typed text, as texts
        (`jaxrec.data.searches.with_texts`).

        Removed items stay in histories. Ids that the request blocks or allows are looked up too.

        Raises:
          UserError: an unknown behavior, a query or profile for a recommender that reads none, or no query for one
            that needs it.
        """
        if request.has_query and not self.reads_queries:
            raise UserError(f"the system {self.system!r} of this run {NO_QUERIES}")
        if self.required_text is not None and getattr(request, self.required_text) is None:
            raise UserError(f"the system {self.system!r} of this run {NO_TEXT.format(self.required_text)}")
        for name in sorted(set(request.profile or ()) - set(getattr(self.recommender, "profile_columns", ()))):
            raise UserError(f"the system {self.system!r} of this run {NO_PROFILE.format(name)}")
        version = version or self.catalogue.current
        ignored = [item for item in [*(request.blocked or ()), *(request.allowed or ())] if version.row(item) is None]
        if request.history is None:
            user = self.user_index.get(request.user_id)
            rows = slice(0, 0) if user is None else slice(self.offsets[user], self.offsets[user + 1])
            history = {name: column[rows] for name, column in self.events.items()}
            if user is not None:
                history["user"] = np.int32(user)
            if self.searches is not None:
                history |= self.searches.of_user(user, rows)
        else:
            history, unknown = self._inline(version).history(request.history)
            ignored = unknown + ignored
        typed = {"query": request.query, "prefix": request.prefix}
        history |= {name: text for name, text in typed.items() if text is not None}
        if request.profile is not None:
            history["profile"] = request.profile
        if not self.answer_time:
            return history, ignored
        return {**history, "now": np.int64(moment_of(history, self.latest, request.now))}, ignored

    def _allowed(
        self, request: Request, within: Predicate | np.ndarray | None, history: History, version: Version
    ) -> Allowed | None:
        """The answers that the request may get; None = all."""
        return self.answers.allowed(request, within, history, version)

    def _inline(self, version: Version) -> InlineHistories:
        """What makes histories of the events of a request."""
        return InlineHistories(version.row, self.behaviors, self.target_behaviors, self.latest, self.reads_queries)

    def _recommend(
        self,
        version: Version,
        histories: list[Any],
        depth: int,
        allowed: list[Allowed] | None,
        sizes: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Calls the model, one call at a time; the model pads histories of one length to a batch."""
        if version.served is None:
            return self._rank_and_drop(version, histories, depth, allowed)
        with self._lock:
            return self.recommender.recommend(
                histories, depth, allowed=allowed, served=version.served, sizes=sizes or self.sizes, space=version.texts
            )

    def _rank_and_drop(
        self, version: Version, histories: list[History], depth: int, allowed: list[Allowed] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """For a recommender without filters: a ranking of all items, from which disallowed ones are dropped."""
        everything = allowed is None and version.active.all()
        with self._lock:
            items, scores = self.recommender.recommend(histories, depth if everything else len(version))
        if everything:
            return items, scores
        kept_items = np.full((len(items), depth), -1, np.int32)
        kept_scores = np.full((len(items), depth), -np.inf, np.float32)
        for row in range(len(items) if allowed is None else len(allowed)):
            mine = version.order.allowed() if allowed is None else allowed[row]
            positions = version.order.places(items[row])
            keep = np.flatnonzero((positions >= 0) & mine.holds(np.maximum(positions, 0)))[:depth]
            kept_items[row, : len(keep)], kept_scores[row, : len(keep)] = items[row, keep], scores[row, keep]
        return kept_items, kept_scores

    def _answer(
        self, version: Version, answers: np.ndarray, scores: np.ndarray, source: str, ignored: list[str]
    ) -> Answer:
        pairs = [(int(answer), float(score)) for answer, score in zip(answers, scores, strict=False) if answer >= 0]
        listed = self.answers.listed(version, [answer for answer, _ in pairs], [score for _, score in pairs])
        return Answer(**listed, source=source, ignored=ignored or None)

    def warm_up(self, sizes: Sequence[int] = (1,)) -> None:
        """Warm-up: runs every program that batches of `sizes` requests can need, smallest first.

        There is one for each size, each length bucket of histories, each depth, with and without filters. Programs that
        are not in the cache (`jaxrec.programs`) are compiled.
        """
        version = self.catalogue.current
        lengths = self.recommender.every_length() if hasattr(self.recommender, "every_length") else []
        depths = sorted({self.depth(depth) for depth in DEPTHS})
        filters = (None, version.order.allowed()) if self.answers.filtered else (None,)
        calls = itertools.product(depths, sizes, lengths, filters)
        for depth, size, history, allowed in track(list(calls), "compile"):
            self._recommend(version, [history] * size, depth, None if allowed is None else [allowed] * size, (size,))
        # Accelerators pad lists of blocked items as well; the rest of an answer is warm after the first one.
        for history, size in itertools.product(lengths[:1] if self.answers.filtered else (), sizes):
            for listed in itertools.takewhile(lambda count: count < len(version.popular), LIST_SIZES):
                blocked = version.order.allowed(blocked=version.popular[:listed])
                self._recommend(version, [history] * size, depths[0], [blocked] * size, (size,))
        for item in version.most_popular(1):
            asked = {"history": [{"item_id": version.items["item_id"][int(item)].as_py()}]}
            if self.required_text is not None:
                asked[self.required_text] = "-"
            for more in ({}, {"exclude_history": True}) if self.answers.filtered else ({},):
                prepared = self.prepare(Request.model_validate(asked | more), None, version)
                if prepared.answer is None:
                    self.finish(prepared, self.search([prepared], sizes)[0])
        self.ready = True


def _is_known(history: History) -> bool:
    """Whether a history says anything to the model: an event, a search, or what was typed."""
    typed = "query" in history or bool(history.get("prefix", "").strip())
    return typed or len(history["item"]) > 0 or len(history.get("search_query", ())) > 0
