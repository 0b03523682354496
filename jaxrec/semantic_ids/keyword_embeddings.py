"""Embeddings of items enhanced with core keywords (OneSearch §3.1.2), of a run's catalogue and of later items.

    tables ──mine──▶ keywords ──encoder, alignment──▶ vectors of keywords ──Eq. 2──▶ embeddings of items and queries

The semantic_ids folder keeps keywords.parquet: keyword, attribute, views, embedding.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.config import UserError
from jaxrec.data.query_pairs import clicked, has_searches, searched_items
from jaxrec.nn.finite import check_finite
from jaxrec.semantic_ids.embeddings import MEND, embed_new, encoder_of
from jaxrec.text.encoder import EncoderConfig
from jaxrec.text.keywords import KeywordConfig, Keywords, enhance, mine

KEYWORDS = "keywords.parquet"


class KeywordEmbeddings(NamedTuple):
    """The keywords of a run and their vectors, f32 [keywords, D]."""

    keywords: Keywords
    vectors: np.ndarray

    def of_items(self, own: np.ndarray, items: pa.Table) -> np.ndarray:
        """Enhanced embeddings of items, f32 [n, D], from their own, f32 [n, D]; items as `Keywords.of_items`."""
        return enhance(own, self.vectors, self.keywords.of_items(items))

    def of_queries(self, own: np.ndarray, queries: list[str]) -> np.ndarray:
        """Enhanced embeddings of queries, f32 [n, D], from their own, f32 [n, D]."""
        return enhance(own, self.vectors, self.keywords.match_many(queries))


def enhance_catalogue(
    tables: Path, folder: Path, own: np.ndarray, text_config: EncoderConfig, config: KeywordConfig
) -> tuple[np.ndarray, dict]:
    """The enhanced embeddings of a tables folder's items, f32 [I, D], and figures.

    Args:
      folder: holds what embeds texts as the items were embedded; receives keywords.parquet.
      own: f32 [I, D], the items' embeddings.

    Raises:
      UserError: the items were not embedded from texts, or as `mine`.
    """
    encoder_of(folder)
    items = pq.read_table(tables / "items.parquet")
    keywords = mine_keywords(tables, items, config)
    vectors = np.zeros((0, own.shape[1]), np.float32)
    if keywords.texts:
        vectors = embed_new(folder, keywords.texts, text_config=text_config)
    _write(folder / KEYWORDS, KeywordEmbeddings(keywords, vectors))
    found = keywords.of_items(items)
    kinds, counts = np.unique(keywords.attributes, return_counts=True)
    figures = {
        "keywords": len(keywords.texts),
        "by_attribute": dict(zip(kinds.tolist(), counts.tolist())),
        "items_with_keywords": sum(map(bool, found)) / len(found),
        "keywords_of_an_item": sum(map(len, found)) / len(found),
    }
    return enhance(own, vectors, found), figures


def mine_keywords(tables: Path, items: pa.Table, config: KeywordConfig) -> Keywords:
    """The keywords of a tables folder; page views are an item's events in the train split, of all behaviors.

    Raises:
      UserError: as `mine`.
    """
    train = pc.field("split") == "train"
    rows = pq.read_table(tables / "events.parquet", columns=["item"], filters=train)["item"].to_numpy()
    queries, chosen = [], np.zeros(0, np.int64)
    if has_searches(tables):
        clicks = clicked(searched_items(tables))
        texts = pq.read_table(tables / "queries.parquet", columns=["query"])["query"]
        queries, chosen = texts.take(clicks["query"]).to_pylist(), clicks["item"].to_numpy()
    return mine(items, np.bincount(rows, minlength=len(items)), (queries, chosen), config)


def has_keywords(folder: Path) -> bool:
    """Whether the embeddings of a semantic_ids folder are enhanced with keywords."""
    return (Path(folder) / KEYWORDS).is_file()


def load_keywords(folder: Path) -> KeywordEmbeddings | None:
    """The keywords of a semantic_ids folder; None where its embeddings are not enhanced.

    Raises:
      UserError: the file is damaged.
    """
    if not has_keywords(folder):
        return None
    path = Path(folder) / KEYWORDS
    try:
        table = pq.read_table(path)
        texts, attributes = table["keyword"].to_pylist(), table["attribute"].to_pylist()
        views, vectors = table["views"].to_numpy(), table["embedding"].combine_chunks()
        vectors = vectors.flatten().to_numpy().reshape(len(texts), vectors.type.list_size)
    except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
        raise UserError(f"{path} holds no keywords ({error}): {MEND}") from error
    check_finite(vectors, path, MEND)
    return KeywordEmbeddings(Keywords(texts, attributes, views), vectors)


def _write(path: Path, made: KeywordEmbeddings) -> None:
    width = made.vectors.shape[1]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(made.vectors.ravel(), pa.float32()), width)
    columns = {
        "keyword": pa.array(made.keywords.texts, pa.string()),
        "attribute": pa.array(made.keywords.attributes, pa.string()),
        "views": pa.array(made.keywords.views, pa.int64()),
        "embedding": vectors,
    }
    pq.write_table(pa.table(columns), path)
