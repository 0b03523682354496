"""Related queries of what somebody typed: OneSug's prefix2query representation enhancement (§3.2).

    prefix ──encoder──▶ e_p ──completions (Eq. 2)──▶ e*_p ──RQ-VAE (Eq. 3)──▶ ID ──look-up, fine to coarse──▶ queries

    related = load_related(run / "related")
    rows = related.related(["smart", "never typed before"])     # int32 [2, m], rows of related.texts, -1 for none
    related.related(["smart"], without=["smartphone"])          # for a training example whose answer is "smartphone"

Texts are compared in their normalised form (`jaxrec.data.words`). A prefix of the tables has its embedding in the
folder; another one is encoded when it is asked for, alone, so that its embedding doesn't depend on other requests. One
that was never typed in training has no completions and keeps its own embedding, as one does that was completed by its
own example alone. An empty prefix has no related queries. `jaxrec.semantic_ids.related_writing` makes the folder:

    related.json                    the configuration
    related_queries.parquet         query, sessions: the sessions of training that searched or chose it, c1..cM
    query_embeddings.safetensors    `embeddings`, f32 [Q, D]
    prefixes.parquet                prefix, c1..cM, completions: rows of queries; counts: the sessions of each
    prefix_embeddings.safetensors   `embeddings`, f32 [P, D]: of the prefixes alone, before Eq. 2
    codebooks.safetensors, quality.json, and what embeds texts (`jaxrec.semantic_ids.embeddings`)
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxrec.config import UserError, check_least, from_json
from jaxrec.data.words import normalised
from jaxrec.files import read_json
from jaxrec.semantic_ids.files.vectors import read_embeddings
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.quantizers.codebooks import Codebooks, SemanticIdConfig
from jaxrec.semantic_ids.quantizers.rqvae import RqVaeConfig
from jaxrec.semantic_ids.related_index import QueryIndex, Screen, build_index
from jaxrec.semantic_ids.text_embedder import TextEmbedder, by_block
from jaxrec.text.encoder import LENGTHS, EncoderConfig
from jaxrec.text.prefixes import PrefixConfig, augment, most_frequent

CONFIG, BOOKS = "related.json", "codebooks.safetensors"
QUERIES, QUERY_VECTORS = "related_queries.parquet", "query_embeddings.safetensors"
PREFIXES, PREFIX_VECTORS = "prefixes.parquet", "prefix_embeddings.safetensors"
MEND = "make the run's phase `related` again"
ROWS_AT_ONCE = 1 << 14
"""Prefixes whose embeddings are held at once."""
QUANTIZED_AT_ONCE = 8
"""Prefixes that are quantized at once: a request mostly has one."""
WARM_TOKENS = 32
"""Length of the longest text that `warm_up` compiles for; what is typed is rarely longer."""
LONGEST_REMEMBERED = 200
"""Characters of the longest prefix whose related queries are remembered."""


@dataclass(frozen=True)
class RelatedQueriesConfig:
    """Related queries of prefixes."""

    semantic_ids: SemanticIdConfig = field(default_factory=lambda: SemanticIdConfig(RqVaeConfig(), None))
    """Quantizers of prefixes and queries: an RQ-VAE of 4 x 512 codes (OneSug §4.1.4)."""
    prefixes: PrefixConfig = field(default_factory=PrefixConfig)
    """The completions in a prefix's embedding (Eq. 2)."""
    related: int = 10
    """Related queries of a prefix: OneSug's m."""
    min_sessions: int = 1
    """A query that fewer sessions of training searched or chose is no related query."""
    candidates: int = 64
    """Candidates of a level: of the queries that share as many codes, the most popular ones."""
    min_cosine: float = 0.4
    """Relevance: queries whose cosine with the enhanced prefix is lower are left out, also those of the same ID."""
    max_cosine: float = 0.95
    """Diversity: a query whose cosine with a better one is higher is left out."""
    fit_cosine: float = -1.0
    """Codebooks are fitted to the prefixes, and to queries whose cosine with a prefix that they complete is this or
    more (§3.2.2 names no number); -1 takes all queries."""
    remembered: int = 100_000
    """Prefixes whose related queries a server remembers, the last ones asked for."""

    def __post_init__(self):
        check_least(self, "related", related=1, min_sessions=1, candidates=1, remembered=0)
        for name in ("min_cosine", "max_cosine", "fit_cosine"):
            if not -1 <= (given := getattr(self, name)) <= 1:
                raise UserError(f"configuration key 'related.{name}' is {given}; give a cosine, from -1 to 1")


class RelatedQueries:
    """Looks up related queries. May be used by several threads."""

    def __init__(self, folder: Path, text_config: EncoderConfig | None = None):
        """folder: as `write_related` made it; nothing else of the run is read.

        text_config: how the encoder runs; which one, and how long texts are, the folder says.

        Raises:
          UserError: a file is missing or damaged.
        """
        folder = Path(folder)
        self.config: RelatedQueriesConfig = from_json(RelatedQueriesConfig, read_json(folder / CONFIG))
        self.codebooks: Codebooks = codebooks.load(folder / BOOKS)
        self._embedder = TextEmbedder(folder, text_config, batch_tokens=1)
        queries, prefixes = _read(folder / QUERIES), _read(folder / PREFIXES)
        self.texts: list[str] = queries["query"].to_pylist()
        """The queries, normalised and sorted; Q of them."""
        self.sessions: np.ndarray = queries["sessions"].to_numpy()
        """int64 [Q], the sessions of training that searched or chose a query."""
        vectors = read_embeddings(folder / QUERY_VECTORS, self.texts)
        sizes = self.codebooks.sizes
        self.index: QueryIndex = build_index(vectors, _codes(queries, len(sizes)), sizes, self.sessions)
        self._query_rows = {text: row for row, text in enumerate(self.texts)}
        known = prefixes["prefix"].to_pylist()
        self._prefix_rows = {text: row for row, text in enumerate(known)}
        self._prefix_vectors = read_embeddings(folder / PREFIX_VECTORS, known)
        self._prefix_codes = _codes(prefixes, len(sizes))
        self._completed, self._counts = (_matrix(prefixes[name]) for name in ("completions", "counts"))
        self._remembered: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = Lock()
        limits = self.config
        self._screen = Screen(limits.related, limits.candidates, limits.min_cosine, limits.max_cosine)

    def related(
        self,
        prefixes: Sequence[str],
        without: Sequence[str] | None = None,
        sessions: Sequence[Sequence[str]] | None = None,
    ) -> np.ndarray:
        """The related queries of prefixes, best first, int32 [P, m], rows of `texts`, padded with -1.

        Of a training example, what its session alone told is left out, since no server knows it: a query of the session
        is no related query if fewer than `min_sessions` other sessions knew it.

        Args:
          prefixes: as they were typed.
          without: the answer of each prefix's training example, "" for none. It is one of the session's queries, and
            counts once less among the completions (Eq. 2).
          sessions: further queries of each example's session.
        """
        asked = [normalised(prefix) for prefix in prefixes]
        rows = np.array([self._prefix_rows.get(text, -1) for text in asked], np.int64)
        answers = np.full(len(asked), -1)
        if without is not None:
            answers = np.array([self._query_rows.get(normalised(text), -1) for text in without], np.int64)
        completions, same = self._completions(rows, answers)
        hidden = self._known_once(answers, sessions)
        # Most sessions change nothing: then their examples share one look-up.
        own = np.where(same, -1, answers).tolist()
        keys = list(zip(asked, own, map(tuple, hidden.tolist())))
        usual = [mine < 0 and max(told, default=-1) < 0 for _, mine, told in keys]
        first: dict[tuple, int] = {}
        place = np.array([first.setdefault(key, at) for at, key in enumerate(keys)], np.int64)
        found = np.full((len(asked), self.config.related), -1, np.int32)
        missing = [at for (text, *_), at in first.items() if text and not (usual[at] and self._recall(text, found[at]))]
        for start in range(0, len(missing), ROWS_AT_ONCE):
            some = missing[start : start + ROWS_AT_ONCE]
            codes, vectors = self._quantized([asked[at] for at in some], rows[some], completions[some], same[some])
            found[some] = self.index.search(codes, vectors, self._screen, hidden[some])
        self._remember((asked[at], found[at]) for at in missing if usual[at])
        return found[place]

    def _known_once(self, answers: np.ndarray, sessions: Sequence[Sequence[str]] | None) -> np.ndarray:
        """The queries of each example's session that too few others knew, int [P, A], padded with -1."""
        told = [{answer} for answer in answers.tolist()]
        for mine, texts in zip(told, sessions or [()] * len(told), strict=True):
            mine.update(self._query_rows.get(normalised(text), -1) for text in texts)
        rare = [sorted(at for at in mine if at >= 0 and self.sessions[at] <= self.config.min_sessions) for mine in told]
        hidden = np.full((len(rare), max(map(len, rare), default=0)), -1)
        for row, mine in zip(hidden, rare, strict=True):
            row[: len(mine)] = mine
        return hidden

    def codes(self, prefixes: Sequence[str]) -> np.ndarray:
        """The IDs of prefixes, int32 [P, M]; zeros for an empty one."""
        return self._asked(prefixes)[0]

    def embeddings(self, prefixes: Sequence[str]) -> np.ndarray:
        """The enhanced embeddings of prefixes (Eq. 2), f32 [P, D]; zeros for an empty one."""
        return self._asked(prefixes)[1]

    def warm_up(self) -> None:
        """Compiles what a prefix never seen before needs, for texts of up to WARM_TOKENS tokens."""
        lengths = [length for length in LENGTHS if length <= WARM_TOKENS]
        vectors = self._embedder([" ".join(["a"] * (length - 2)) for length in lengths])
        quantize(self.codebooks, vectors)

    def _asked(self, prefixes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        asked = [normalised(prefix) for prefix in prefixes]
        rows = np.array([self._prefix_rows.get(text, -1) for text in asked], np.int64)
        codes, vectors = self._quantized(asked, rows, *self._completions(rows, np.full(len(rows), -1)))
        empty = np.array([not text for text in asked], bool)
        codes[empty], vectors[empty] = 0, 0
        return codes, vectors

    def _completions(self, rows: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The completions of prefixes without their answers, int32 [P, k], and whether they are those with them."""
        limits = self.config.prefixes
        found = np.full((len(rows), limits.queries), -1, np.int32)
        same, known = np.ones(len(rows), bool), np.flatnonzero(rows >= 0)
        table, count = self._completed[rows[known]], self._counts[rows[known]]
        found[known] = most_frequent(table, count, limits.queries, limits.min_count, answers[known])
        usual = most_frequent(table, count, limits.queries, limits.min_count)
        same[known] = (np.sort(found[known], axis=1) == np.sort(usual, axis=1)).all(1)
        return found, same

    def _quantized(
        self, texts: list[str], rows: np.ndarray, completions: np.ndarray, same: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The IDs int32 [P, M] and embeddings f32 [P, D] of normalised prefixes, as `_completions` of `rows`."""
        vectors = self._prefix_vectors[rows]
        if len(unknown := np.flatnonzero(rows < 0)):
            vectors[unknown] = self._embedder([texts[at] for at in unknown])
        vectors = augment(vectors, self.index.vectors, completions, self.config.prefixes.weight)
        codes = self._prefix_codes[rows]
        if len(other := np.flatnonzero((rows < 0) | ~same)):
            codes[other] = quantize(self.codebooks, vectors[other])
        return codes, vectors

    def _recall(self, text: str, into: np.ndarray) -> bool:
        """Copies remembered related queries of a prefix, if there are any."""
        with self._lock:
            if (kept := self._remembered.get(text)) is None:
                return False
            self._remembered.move_to_end(text)
        into[:] = kept
        return True

    def _remember(self, found: Iterable[tuple[str, np.ndarray]]) -> None:
        with self._lock:
            for text, rows in found:
                if len(text) <= LONGEST_REMEMBERED:
                    self._remembered[text] = rows.copy()
            while len(self._remembered) > self.config.remembered:
                self._remembered.popitem(last=False)


def load_related(folder: Path, text_config: EncoderConfig | None = None) -> RelatedQueries:
    """The related queries of a folder that `write_related` made.

    text_config: how the encoder runs; which one, and how long texts are, the folder says.

    Raises:
      UserError: a file is missing or damaged.
    """
    return RelatedQueries(folder, text_config)


def quantize(books: Codebooks, vectors: np.ndarray) -> np.ndarray:
    """The IDs of prefixes from their embeddings f32 [P, D], int32 [P, M], alike for one prefix and for many."""
    return by_block(partial(codebooks.encode, books), vectors, QUANTIZED_AT_ONCE)


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read ({error}): {MEND}") from error


def _codes(table: pa.Table, levels: int) -> np.ndarray:
    return np.stack([table[f"c{level + 1}"].to_numpy() for level in range(levels)], axis=1)


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of lists of one length as [n, length]."""
    lists = column.combine_chunks()
    return lists.flatten().to_numpy().reshape(-1, lists.type.list_size)
