"""The tokenize phase: tables in, semantic IDs out."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from jaxrec.config import UserError
from jaxrec.semantic_ids import codebooks
from jaxrec.semantic_ids.codebooks import Codebooks, SemanticIdConfig
from jaxrec.semantic_ids.collisions import CollisionConfig, resolve
from jaxrec.semantic_ids.page import write_page
from jaxrec.semantic_ids.quality import quality
from jaxrec.semantic_ids.space import SemanticIdSpace, write_codes
from jaxrec.text.align import AlignConfig, align, apply_all
from jaxrec.text.encoder import EncoderConfig, embed_texts


def tokenize(
    tables: Path,
    folder: Path,
    text_config: EncoderConfig,
    align_config: AlignConfig,
    id_config: SemanticIdConfig,
    collision_config: CollisionConfig,
    seed: int,
) -> None:
    """Encode, align and quantize the items of a tables folder (OneMall §3.1).

    Writes codebooks.safetensors, codes.parquet, embeddings.safetensors (`embeddings`, aligned, f32 [I, D]),
    alignment.safetensors (to encode new items), quality.json and semantic_ids.html into `folder`.

    Raises:
      UserError: a table cannot be used, or the configuration does not fit it.
    """
    align_key, id_key = jax.random.split(jax.random.key(seed))
    items = pq.read_table(tables / "items.parquet")
    text = read_embeddings(items, text_config)
    pairs = read_pairs(tables / "pairs.parquet", align_config.kind)
    item_ids = items["item_id"].to_pylist()
    titles, categories, popularity = (_column(items, name) for name in ("title", "category", "count"))
    alignment = align(align_key, text, pairs, align_config, categories)
    write_ids(
        folder, id_key, item_ids, apply_all(alignment.params, text), id_config, collision_config,
        titles=titles, categories=categories, popularity=popularity, pairs=pairs, more={"alignment": alignment.metrics},
    )  # fmt: skip
    save_file(
        {name: np.asarray(value) for name, value in flatten_dict(alignment.params, sep=".").items()},
        folder / "alignment.safetensors",
    )


def write_ids(
    folder: Path,
    key: jax.Array,
    item_ids: list[str] | pa.ChunkedArray,
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
      UserError: the configuration does not fit the embeddings.
    """
    books = codebooks.fit(key, embeddings, id_config)
    codes = codebooks.encode_catalogue(books, embeddings, id_config)
    resolved = resolve(codes, books.sizes, collision_config, embeddings, books, popularity)
    space = SemanticIdSpace(resolved.codes, resolved.sizes, popularity)
    figures = quality(space, embeddings, partial(codebooks.decode, books), pairs)
    figures |= {"collisions": resolved.changed, **(more or {})}
    write_space(folder, books, space, item_ids, figures, titles, categories)
    save_file({"embeddings": np.ascontiguousarray(embeddings)}, folder / "embeddings.safetensors")
    return figures


def write_space(
    folder: Path,
    books: Codebooks,
    space: SemanticIdSpace,
    item_ids: list[str] | pa.ChunkedArray,
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


def read_embeddings(items: pa.Table, config: EncoderConfig) -> np.ndarray:
    """The items' own `embedding` column where there is one, else their encoded `text`, f32 [I, D]."""
    if "embedding" not in items.column_names:
        if "text" not in items.column_names:
            raise UserError(
                "items.parquet has neither a column `text` nor a column `embedding`: "
                "prepare the tables again with one of them"
            )
        return embed_texts([text or "" for text in items["text"].to_pylist()], config)
    widths = pc.list_value_length(items["embedding"]).to_numpy()
    if len(odd := np.flatnonzero(~(widths == widths[0]))):
        raise UserError(
            f"items.parquet: the embedding in row {odd[0]} is {widths[odd[0]]} wide, that in row 0 is "
            f"{widths[0]}: give every item an embedding of the same width"
        )
    return items["embedding"].combine_chunks().flatten().to_numpy().astype(np.float32).reshape(len(items), -1)


def read_pairs(path: Path, kind: str) -> np.ndarray:
    """Pairs of one kind from pairs.parquet, int32 [n, 2]; none when the file is not there."""
    if not path.is_file():
        return np.zeros((0, 2), np.int32)
    pairs = pq.read_table(path)
    kinds = pc.unique(pairs["kind"]).to_pylist()
    if kinds and kind not in kinds:
        raise UserError(f"{path} has no pairs of kind {kind!r} (it has {', '.join(map(repr, kinds))}): set align.kind")
    pairs = pairs.filter(pc.equal(pairs["kind"], kind))
    return np.stack([pairs["item"].to_numpy(), pairs["other"].to_numpy()], axis=1).astype(np.int32)
