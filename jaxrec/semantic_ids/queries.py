"""Semantic IDs of queries, from the codebooks of a run's items (OneSearch §3.1), and the vectors behind the codes.

    ids = load_query_ids(run / "semantic_ids")
    ids.codes(["running shoes", "never seen before"])     # int32 [2, M]

A query is embedded as an item's text is, and enhanced with the keywords in it. Queries are compared by their normalised
texts (`jaxrec.data.words`). The tokenize phase writes those of queries.parquet, in its order:

    query_codes.parquet            query, c1..cM int32
    query_embeddings.safetensors   `embeddings`, f32 [n, D]

Other queries are encoded when they are asked for. Queries may share an ID with one another and with items: what is done
about collisions of items does not apply, so an extra level of theirs is not among the M.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxrec.config import UserError
from jaxrec.data.words import normalised
from jaxrec.semantic_ids.embeddings import ALIGNMENT, ENCODER, TEXT, embed_new, encodes_texts, with_products
from jaxrec.semantic_ids.files.vectors import OWN, read_embeddings, write_embeddings
from jaxrec.semantic_ids.keyword_embeddings import KEYWORDS, KeywordEmbeddings, load_keywords
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.quantizers.codebooks import Codebooks
from jaxrec.semantic_ids.table.version_files import BOOKS
from jaxrec.semantic_ids.text_embedder import TextEmbedder, by_block
from jaxrec.text.encoder import EncoderConfig

QUERY_CODES, QUERY_EMBEDDINGS = "query_codes.parquet", "query_embeddings.safetensors"
BLOCK_TOKENS = 64
"""Tokens that are encoded at once, padding included: a request has few queries, mostly short."""


class QueryIds:
    """The IDs and embeddings of queries."""

    def __init__(self, folder: Path, text_config: EncoderConfig | None = None):
        """folder: the semantic_ids folder of a run; nothing else of the run is read.

        Raises:
          UserError: the items were not embedded from texts, or a file is missing or damaged.
        """
        self._folder = Path(folder)
        self._embedder = TextEmbedder(folder, text_config, BLOCK_TOKENS)
        self._keywords: KeywordEmbeddings | None = load_keywords(folder)
        self.codebooks: Codebooks = codebooks.load(self._folder / BOOKS)
        self._known, self._codes, self._embeddings = _read(self._folder, self.codebooks)

    @property
    def levels(self) -> int:
        """Codes in an ID of a query, M."""
        return len(self.codebooks.sizes)

    def has_id(self, texts: Sequence[str]) -> np.ndarray:
        """Which texts are queries at all, bool [n]: an empty one is none, and its codes are zeros."""
        return np.array([bool(normalised(text)) for text in texts], bool)

    def codes(self, texts: Sequence[str]) -> np.ndarray:
        """The IDs of queries, int32 [n, M]; zeros for an empty text."""
        return self._look_up(texts)[0]

    def embeddings(self, texts: Sequence[str]) -> np.ndarray:
        """The embeddings that are quantized (Eq. 2), f32 [n, D]; zeros for an empty text."""
        return self._look_up(texts)[1]

    def copy_to(self, folder: Path) -> None:
        """Copies what gives queries their IDs into a new folder, of which `load_query_ids` reads them without the run.

        An encoder that is named in text.json, a package or a folder of the user's, stays where it is.
        """
        folder.mkdir()
        for name in (TEXT, ALIGNMENT, BOOKS, KEYWORDS, OWN, QUERY_CODES, QUERY_EMBEDDINGS):
            if (self._folder / name).is_file():
                shutil.copy(self._folder / name, folder / name)
        if (self._folder / ENCODER).is_dir():
            shutil.copytree(self._folder / ENCODER, folder / ENCODER)

    def _look_up(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        asked = [normalised(text) for text in texts]
        codes = np.zeros((len(asked), self.levels), np.int32)
        vectors = np.zeros((len(asked), self.codebooks.width), np.float32)
        rows = np.array([self._known.get(text, -1) for text in asked], np.int64)
        known = rows >= 0
        codes[known], vectors[known] = self._codes[rows[known]], self._embeddings[rows[known]]
        if missing := sorted({text for text, there in zip(asked, known) if text and not there}):
            of_missing = self._embed(missing)
            found, place = self.quantize(of_missing), {text: row for row, text in enumerate(missing)}
            for row, text in enumerate(asked):
                if text in place:
                    codes[row], vectors[row] = found[place[text]], of_missing[place[text]]
        return codes, vectors

    def quantize(self, embeddings: np.ndarray) -> np.ndarray:
        """The codes of embeddings f32 [n, D], int32 [n, M]."""
        return by_block(lambda rows: codebooks.encode(self.codebooks, rows), embeddings)

    def enhanced(self, own: np.ndarray, texts: list[str]) -> np.ndarray:
        """Embeddings as items have them, f32 [n, D], from those of the normalised texts alone."""
        if self._keywords is not None:
            own = self._keywords.of_queries(own, texts)
        return with_products(self._folder, own, pa.table({"item_id": pa.array(texts, pa.string())}))

    def _embed(self, texts: list[str]) -> np.ndarray:
        """The embeddings of normalised texts, f32 [n, D]; the cache of embeddings doesn't learn what shoppers type."""
        return self.enhanced(self._embedder(texts), texts)


def load_query_ids(folder: Path, text_config: EncoderConfig | None = None) -> QueryIds:
    """The IDs of queries of a run's semantic_ids folder.

    text_config: how the encoder runs; which one, and how long texts are, the folder says.

    Raises:
      UserError: the items were not embedded from texts, or a file is missing or damaged.
    """
    return QueryIds(folder, text_config)


def write_query_ids(tables: Path, folder: Path, text_config: EncoderConfig) -> dict | None:
    """Writes the IDs and embeddings of queries.parquet into a semantic_ids folder with codebooks; returns figures.

    None, and no files, for tables without queries, or where items brought embeddings of their own.
    """
    path = Path(tables) / "queries.parquet"
    if not (path.is_file() and encodes_texts(folder)):
        return None
    ids, queries = QueryIds(folder, text_config), pq.read_table(path, columns=["query"])["query"].to_pylist()
    texts = [normalised(query) for query in queries]
    # Remembered in the cache of embeddings, unlike the queries of requests.
    own = embed_new(folder, texts, text_config=text_config)
    vectors = np.array(ids.enhanced(own, texts))
    codes = ids.quantize(vectors)
    empty = ~ids.has_id(texts)
    codes[empty], vectors[empty] = 0, 0
    columns = {"query": pa.array(queries, pa.string())}
    columns |= {f"c{level + 1}": pa.array(codes[:, level], pa.int32()) for level in range(ids.levels)}
    pq.write_table(pa.table(columns), folder / QUERY_CODES)
    write_embeddings(folder / QUERY_EMBEDDINGS, queries, vectors)
    return {"queries": len(queries), "distinct_ids": len(np.unique(codes, axis=0))}


def _read(folder: Path, books: Codebooks) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """The known queries: the row of each normalised text, codes int32 [n, M], embeddings f32 [n, D]."""
    path = folder / QUERY_CODES
    if not path.is_file():
        return {}, np.zeros((0, len(books.sizes)), np.int32), np.zeros((0, books.width), np.float32)
    try:
        table = pq.read_table(path)
        queries = table["query"].to_pylist()
        codes = np.stack([table[f"c{level + 1}"].to_numpy() for level in range(len(books.sizes))], axis=1)
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}): run the tokenize phase again") from error
    return (
        {normalised(q): row for row, q in enumerate(queries)},
        codes,
        read_embeddings(folder / QUERY_EMBEDDINGS, queries),
    )
