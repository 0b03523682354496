"""The tokenize phase: tables in, semantic IDs out."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxrec.semantic_ids.embeddings import embed_catalogue, embed_scenarios
from jaxrec.semantic_ids.files.vectors import EMBEDDINGS, write_embeddings
from jaxrec.semantic_ids.keyword_embeddings import enhance_catalogue
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.quantizers.codebooks import Codebooks, SemanticIdConfig
from jaxrec.semantic_ids.queries import write_query_ids
from jaxrec.semantic_ids.table import collisions
from jaxrec.semantic_ids.table.collisions import CollisionConfig, resolve
from jaxrec.semantic_ids.table.page import write_page
from jaxrec.semantic_ids.table.quality import quality
from jaxrec.semantic_ids.table.space import ItemIds, SemanticIds, write_codes
from jaxrec.text.align import AlignConfig
from jaxrec.text.encoder import EncoderConfig
from jaxrec.text.finetune import FinetuneConfig
from jaxrec.text.keywords import KeywordConfig, check_attributes
from jaxrec.text.scenarios import TowersConfig


def tokenize(
    tables: Path,
    folder: Path,
    text_config: EncoderConfig,
    align_config: AlignConfig | FinetuneConfig,
    id_config: SemanticIdConfig,
    collision_config: CollisionConfig,
    seed: int,
    tuned: Path | None = None,
    scenarios: TowersConfig | None = None,
    keywords: KeywordConfig | None = None,
    query_ids: bool = False,
) -> None:
    """Encode, align and quantize the items of a tables folder (OneMall §3.1).

    Writes codebooks.safetensors, codes.parquet, embeddings.safetensors (`embeddings`, aligned, f32 [I, D]),
    quality.json, semantic_ids.html and what embeds new items (`jaxrec.semantic_ids.embeddings`) into `folder`.

    Args:
      tuned: for a `FinetuneConfig`, the folder that `finetune_items` returned for these tables.
      scenarios: the configuration of scenario embeddings (`embed_scenarios`); None: texts alone.
      keywords: the keywords that embeddings are enhanced with (OneSearch Eq. 2); None: none.
      query_ids: also give the tables' queries IDs, where there are any (`jaxrec.semantic_ids.queries`).

    Raises:
      UserError: a table cannot be used, or the configuration does not fit it.
    """
    align_key, id_key = _keys(seed)
    items = pq.read_table(tables / "items.parquet")
    collisions.check(collision_config)
    if keywords is not None:
        check_attributes(items, keywords)
    # The width is unknown before items are embedded; `codebooks.fit` checks it then. Every size divides 0.
    codebooks.check(id_config, (len(items), 0))
    embeddings, pairs, figures = embed_catalogue(align_key, tables, folder, text_config, align_config, tuned)
    more = {"alignment": figures}
    if keywords is not None:
        embeddings, more["keywords"] = enhance_catalogue(tables, folder, embeddings, text_config, keywords)
    if scenarios is not None:
        tower_key = jax.random.fold_in(jax.random.key(seed), 2)
        embeddings = embed_scenarios(tower_key, tables, folder, embeddings, scenarios)
    titles, categories, popularity = (_column(items, name) for name in ("title", "category", "count"))
    write_ids(
        folder, id_key, items["item_id"].to_pylist(), embeddings, id_config, collision_config,
        titles=titles, categories=categories, popularity=popularity, pairs=pairs, more=more,
    )  # fmt: skip
    if query_ids:
        write_query_ids(tables, folder, text_config)


def embed(
    tables: Path,
    folder: Path,
    text_config: EncoderConfig,
    align_config: AlignConfig | FinetuneConfig,
    seed: int,
    tuned: Path | None = None,
) -> None:
    """Encode and align the items of a tables folder as `tokenize` does, without quantizing them.

    Writes embeddings.safetensors (`embeddings`, aligned, f32 [I, D]) and what embeds new items into `folder`.
    """
    items = pq.read_table(tables / "items.parquet", columns=["item_id"])
    embeddings, _, _ = embed_catalogue(_keys(seed)[0], tables, folder, text_config, align_config, tuned)
    write_embeddings(folder / EMBEDDINGS, items["item_id"].to_pylist(), embeddings)


def _keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The keys of the alignment and of the quantizers."""
    align_key, id_key = jax.random.split(jax.random.key(seed))
    return align_key, id_key


def write_ids(
    folder: Path,
    key: jax.Array,
    item_ids: ItemIds,
    embeddings: np.ndarray,
    id_config: SemanticIdConfig,
    collision_config: CollisionConfig,
    *,
    titles: Sequence[str | None] | None = None,
    categories: Sequence[str | None] | None = None,
    popularity: np.ndarray | None = None,
    pairs: np.ndarray | None = None,
    more: dict | None = None,
) -> dict:
    """Quantize the embeddings f32 [I, D] of a catalogue and write everything about its IDs into `folder`.

    These are codebooks.safetensors, codes.parquet, embeddings.safetensors, quality.json (with `more` in it) and
    semantic_ids.html; returns the figures of quality.json.

    Raises:
      UserError: the configuration is invalid, or does not fit the embeddings.
    """
    collisions.check(collision_config)
    books = codebooks.fit(key, embeddings, id_config)
    codes = codebooks.encode_catalogue(books, embeddings, id_config)
    resolved = resolve(codes, books.sizes, collision_config, embeddings, books, popularity)
    space = SemanticIds(resolved.codes, resolved.sizes, popularity)
    figures = quality(space, embeddings, partial(codebooks.decode, books), pairs)
    figures |= {"collisions": resolved.changed, **(more or {})}
    write_space(folder, books, space, item_ids, figures, titles, categories)
    write_embeddings(folder / EMBEDDINGS, item_ids, embeddings)
    return figures


def write_space(
    folder: Path,
    books: Codebooks,
    space: SemanticIds,
    item_ids: ItemIds,
    figures: dict,
    titles: Sequence[str | None] | None = None,
    categories: Sequence[str | None] | None = None,
) -> None:
    """Write codebooks.safetensors, codes.parquet, quality.json and semantic_ids.html into `folder`."""
    write_page(folder / "semantic_ids.html", space, item_ids, titles, categories, figures=figures)
    codebooks.save(books, folder / "codebooks.safetensors")
    write_codes(folder / "codes.parquet", item_ids, space)
    (folder / "quality.json").write_text(json.dumps(figures, indent=1) + "\n")


def _column(items: pa.Table, name: str) -> np.ndarray | None:
    return items[name].to_numpy() if name in items.column_names else None
