"""Semantic IDs of items whose embeddings do not fit in memory.

    items = open_items(Path("items.npy"))
    books = fit(jax.random.key(0), items, config, sample_rows=1_000_000)
    for codes in encode(books, items): ...              # int32 [n, M]

Codebooks are fitted to a uniform sample of the rows, held in memory: some hundred rows a code are enough. Then the rows
are encoded block by block. Memory holds the sample, one block, and the ID and name of every item, but never all
embeddings.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxrec.config import UserError
from jaxrec.semantic_ids.files.items import Items, check_distinct, tracked
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.quantizers.codebooks import Codebooks, SemanticIdConfig
from jaxrec.semantic_ids.quantizers.rows import check_width
from jaxrec.semantic_ids.table import collisions
from jaxrec.semantic_ids.table.collisions import CollisionConfig, resolve
from jaxrec.semantic_ids.table.quality import neighbour_recall, quality, reconstruction_error
from jaxrec.semantic_ids.table.space import SemanticIds
from jaxrec.semantic_ids.tokenize import write_space


def fit(key: jax.Array, items: Items, config: SemanticIdConfig, sample_rows: int) -> Codebooks:
    """Fit every level to `sample_rows` of the items, drawn uniformly; to all items when there are no more.

    The codebooks are those of `codebooks.fit(key, sample, config)`.

    Raises:
      UserError: as `codebooks.fit` does, or a file of the items cannot be used.
    """
    codebooks.check(config, (min(sample_rows, len(items)), items.width))
    return codebooks.fit(key, items.sample(generator(key), sample_rows), config)


def generator(key: jax.Array) -> np.random.Generator:
    """The random generator that draws the sample of `fit`."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def encode(books: Codebooks, items: Items) -> Iterator[np.ndarray]:
    """The codes of all items in order, block by block, int32 [n, M]; the same as `codebooks.encode` of all at once.

    Balanced levels keep their bound only as far as their prices do: `codebooks.encode_catalogue` needs all rows.

    Raises:
      UserError: the items are of another width than the codebooks, or a file cannot be used.
    """
    check_width(np.empty((0, items.width)), books.width)
    for block in tracked(items.blocks(codebooks.ENCODED_AT_ONCE), "Encoding items", len(items)):
        yield codebooks.encode(books, block.x)


def write_ids(
    folder: Path,
    key: jax.Array,
    items: Items,
    id_config: SemanticIdConfig,
    collision_config: CollisionConfig,
    sample_rows: int,
) -> dict:
    """Quantize items and write everything about their IDs but their embeddings into `folder`.

    These are codebooks.safetensors, codes.parquet, quality.json and semantic_ids.html, which names items by their ids.
    The figures are those of all items; what needs embeddings is measured on the sample, and quality.json says so under
    `sample`. Returns the figures.

    Raises:
      UserError: the configuration is invalid or does not fit the items, an item is listed twice, or a file of the items
        cannot be used.
    """
    _check_collisions(collision_config, items, sample_rows)
    codebooks.check(id_config, (min(sample_rows, len(items)), items.width))
    scan = items.scan(generator(key), sample_rows)
    if items.named:
        check_distinct(scan.item_ids, items.path)
    books = codebooks.fit(key, scan.x, id_config)
    codes = np.concatenate(list(encode(books, items)))
    resolved = resolve(codes, books.sizes, collision_config, popularity=scan.counts)
    space = SemanticIds(resolved.codes, resolved.sizes, scan.counts)
    figures = quality(space) | _kept(space, scan.rows, scan.x, books) | {"collisions": resolved.changed}
    write_space(folder, books, space, scan.item_ids, figures)
    return figures


def _check_collisions(config: CollisionConfig, items: Items, sample_rows: int) -> None:
    collisions.check(config)
    if config.policy == "nearest_free":
        raise UserError(
            f"collisions.policy='nearest_free' needs all embeddings in memory, but {items.path} has {len(items):,} "
            f"items and in_memory={sample_rows:,}: choose 'keep' or 'extra_level', or raise in_memory"
        )


def _kept(space: SemanticIds, rows: np.ndarray, x: np.ndarray, books: Codebooks) -> dict:
    """The figures that need embeddings, of some items alone: rows int64 [n], x f32 [n, D]."""
    some, decode = SemanticIds(space.codes[rows], space.codebook_sizes), partial(codebooks.decode, books)
    figures = {"reconstruction_error": reconstruction_error(some.codes, x, decode)}
    figures |= neighbour_recall(some, x, decode)
    sampled = {"rows": len(rows), "of": len(space.codes), "figures": list(figures), "codebooks_fitted_to_it": True}
    return figures | {"sample": sampled}
