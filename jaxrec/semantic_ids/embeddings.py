"""The item embeddings that are quantized: of a run's catalogue, and of later items, embedded in the same way.

    text ──encoder──▶ vectors ──alignment──▶ embeddings

With scenarios (OneMall §3.1.3) a short video's embedding is concatenated with its product's, and a live stream's is
computed by an item tower from the products it sells now (`jaxrec.text.scenarios`).

`AlignConfig` learns a projection of the vectors and a free vector an item, `FinetuneConfig` the encoder itself or a
projection. For new items the semantic_ids folder keeps

    text.json               the encoder (a package, a folder, or `encoder` for the folder below), its maximal length;
                            `aligned` false: its vectors as they are
    alignment.safetensors   the projection, where there is one
    encoder/                the encoder, where it was fine-tuned
    own.parquet             with scenarios: the items' own embeddings, without their products'; those of later items
                            are in own_later.parquet (`vectors`)
    item_tower.safetensors  with live streams: the parameters of the item tower
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxrec.config import UserError
from jaxrec.data.query_pairs import QueryPairConfig, query_pairs
from jaxrec.data.words import normalised
from jaxrec.files import read_json, write_json
from jaxrec.nn.finite import check_finite
from jaxrec.semantic_ids.files.items import open_items
from jaxrec.semantic_ids.files.vectors import OWN, read_own, write_own
from jaxrec.semantic_ids.table.versions import first_ids
from jaxrec.text import align, finetune
from jaxrec.text.align import AlignConfig
from jaxrec.text.encoder import EncoderConfig, embed_texts, load_encoder
from jaxrec.text.finetune import FinetuneConfig, SearchFinetuneConfig
from jaxrec.text.pair_batches import TextPairs
from jaxrec.text.scenarios import (
    LIVE_STREAM,
    TowersConfig,
    compose,
    encode_items,
    product_table,
    scenario_embeddings,
    tower_data,
    train_towers,
)

TEXT, ALIGNMENT, ENCODER = "text.json", "alignment.safetensors", "encoder"
TOWER = "item_tower.safetensors"
MEND = "run the tokenize phase again"


def finetune_items(
    tables: Path,
    folder: Path,
    text_config: EncoderConfig,
    config: FinetuneConfig,
    seed: int,
    metrics_path: Path | None = None,
) -> Path:
    """Fine-tunes the text encoder, or a projection, on the item pairs of a tables folder (OneMall §3.1.2).

    With a `SearchFinetuneConfig` also on the pairs of its searches (OneSearch §3.1.1).

    Resumes from the checkpoints in `folder`; returns the folder in it with the result, for `finetune.load`.
    metrics_path: the file that gets the log lines; None: metrics.jsonl in `folder`.

    Raises:
      UserError: the items bring embeddings of their own, or there are no pairs.
    """
    items = pq.read_table(tables / "items.parquet")
    _check_no_embeddings(items)
    pairs = read_pairs(tables / "pairs.parquet", config.kinds)
    texts, typed = read_texts(items), {"i2i": TextPairs(pairs[:, 0], pairs[:, 1])}
    if isinstance(config, SearchFinetuneConfig):
        texts, typed = with_queries(tables, texts, typed, config.queries)
    tuned = finetune.finetune(texts, typed, config, text_config, folder, seed, metrics_path)
    finetune.save(tuned, folder / "tuned")
    return folder / "tuned"


def with_queries(
    tables: Path, texts: list[str], typed: dict[str, TextPairs], config: QueryPairConfig
) -> tuple[list[str], dict[str, TextPairs]]:
    """The texts of items, then of queries, and their pairs of all terms; `typed` are those of items."""
    items = len(texts)
    queries = pq.read_table(tables / "queries.parquet", columns=["query"])["query"].to_pylist()
    # Rows of queries come behind those of items; of i2i neither end is a query, of q2q both are.
    found = {
        name: TextPairs(left + (items if name != "i2i" else 0), right + (items if name == "q2q" else 0), *value)
        for name, (left, right, *value) in query_pairs(tables, config).items()
    }
    both = zip((typed["i2i"].left, typed["i2i"].right), (found["i2i"].left, found["i2i"].right))
    found["i2i"] = TextPairs(*(np.concatenate(ends) for ends in both))
    return texts + [normalised(query) for query in queries], found


def embed_catalogue(
    key: jax.Array,
    tables: Path,
    folder: Path,
    text_config: EncoderConfig,
    align_config: AlignConfig | FinetuneConfig,
    tuned: Path | None = None,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """The embeddings of a tables folder's items, f32 [I, D], the pairs they were aligned on, int32 [n, 2], and figures.

    Args:
      folder: receives the files, listed above, with which new items are embedded.
      tuned: the folder that `finetune_items` returned; for a `FinetuneConfig` only.
    """
    items = pq.read_table(tables / "items.parquet")
    own = "embedding" in items.column_names
    pairs = read_pairs(tables / "pairs.parquet", pair_kinds(align_config))
    if isinstance(align_config, AlignConfig):
        path = tables / "items.parquet"
        vectors = open_items(path).scan().x if own else embed_texts(read_texts(items), text_config)
        categories = items["category"].to_numpy() if "category" in items.column_names else None
        alignment = align.align(key, vectors, pairs, align_config, categories)
        flat = flatten_dict(alignment.params, sep=".")
        save_file({name: np.asarray(value) for name, value in flat.items()}, folder / ALIGNMENT)
        embeddings, figures = align.apply_all(alignment.params, vectors), alignment.metrics
        text = {"model": None if own else text_config.model, "max_tokens": text_config.max_tokens}
        write_json(folder / TEXT, text)
    else:
        _check_no_embeddings(items)
        keep_encoder(folder, text_config, tuned)
        embeddings = embed_new(folder, read_texts(items), text_config=text_config)
        figures = read_json(tuned / finetune.METRICS_FILE)
    return embeddings, pairs, figures


def keep_encoder(folder: Path, text_config: EncoderConfig, tuned: Path | None = None) -> None:
    """Puts into `folder` what embeds texts, for `embed_new`.

    tuned: the folder of a fine-tuned encoder or projection, which is copied; None: the encoder as it came.
    """
    text = {"model": text_config.model, "max_tokens": text_config.max_tokens}
    if tuned is None:
        text["aligned"] = False
    elif (tuned / finetune.PROJECTION_FILE).is_file():
        shutil.copy(tuned / finetune.PROJECTION_FILE, folder / ALIGNMENT)
    else:
        shutil.copytree(tuned, folder / ENCODER)
        load_encoder.cache_clear()  # It caches encoders by folder, and the folder may have held another one.
        text["model"] = ENCODER
    write_json(folder / TEXT, text)


def embed_scenarios(key: jax.Array, tables: Path, folder: Path, own: np.ndarray, config: TowersConfig) -> np.ndarray:
    """Embeddings of all scenarios, unit f32 [I, 2 D], from the items' own, f32 [I, D] (OneMall §3.1.3).

    Where there are live streams, the towers are trained on the events first. `folder` receives the files with which
    new items are embedded.

    Raises:
      UserError: the items have no column `scenario`, or what `tower_data` refuses.
    """
    items = pq.read_table(tables / "items.parquet")
    if "scenario" not in items.column_names:
        raise UserError("items.parquet has no column `scenario`: add it to the items, or set --scenarios None")
    path, tower = tables / "live_streams.parquet", None
    live_streams = pq.read_table(path) if path.is_file() else None
    if LIVE_STREAM in items["scenario"].to_pylist():
        data = tower_data(own, items, pq.read_table(tables / "events.parquet"), live_streams, config)
        tower = jax.tree.map(np.asarray, train_towers(key, data, config)["item"])
        save_file(flatten_dict(tower, sep="."), folder / TOWER)
    write_own(folder / OWN, items["item_id"], own)
    return scenario_embeddings(own, items, live_streams, tower)


def with_products(folder: Path, own: np.ndarray, items: pa.Table) -> np.ndarray:
    """Scenario embeddings of new items, unit f32 [n, 2 D], from their own f32 [n, D]; without scenarios, `own` itself.

    Args:
      items: item_id, and scenario and product_ids (lists of str) where there are any; products are items of the run,
        from the start or appended since, or others of this table.

    Raises:
      UserError: a product is none of these, or a live stream is added to a run without live streams.
    """
    folder = Path(folder)
    if not has_scenarios(folder):
        return own
    products, vectors = np.full((len(own), 1), -1), own
    if "product_ids" in items.column_names:
        lists = _lists(items["product_ids"].combine_chunks())
        ids, vectors = _known(folder, lists.flatten(), items["item_id"].cast(pa.string()).combine_chunks(), own)
        products = product_table(lists, ids)
    inputs = compose(own, products, vectors)
    scenarios = items["scenario"].to_pylist() if "scenario" in items.column_names else []
    live = np.array([each == LIVE_STREAM for each in scenarios], bool)
    if live.any():
        if not (folder / TOWER).is_file():
            raise UserError(f"{folder} holds no {TOWER}: the run had no live streams to learn from; train it with some")
        tower = load_file(folder / TOWER)
        check_finite(tower, folder / TOWER, MEND)
        inputs[live] = encode_items(unflatten_dict(tower, sep="."), inputs[live])
    return inputs


def has_scenarios(folder: Path) -> bool:
    """Whether the items of a semantic_ids folder were embedded by their scenarios."""
    return (Path(folder) / OWN).is_file()


def encodes_texts(folder: Path) -> bool:
    """Whether a semantic_ids folder says how texts become embeddings."""
    path = Path(folder) / TEXT
    return path.is_file() and read_json(path)["model"] is not None


def embed_new(
    folder: Path, texts: Sequence[str], item_ids: Sequence[str] = (), text_config: EncoderConfig | None = None
) -> np.ndarray:
    """Embeddings of items from their texts, made as those of the catalogue were, f32 [n, D]; item_ids as `aligned`.

    text_config: how the encoder runs; which one, and how long texts are, the folder says.
    """
    vectors = embed_texts(texts, encoder_of(folder, text_config))
    return aligned(folder, vectors, item_ids) if is_aligned(folder) else vectors


def is_aligned(folder: Path) -> bool:
    """Whether the vectors of a folder's encoder are projected by an alignment."""
    return not (Path(folder) / ENCODER).is_dir() and read_json(Path(folder) / TEXT).get("aligned", True)


def encoder_of(folder: Path, text_config: EncoderConfig | None = None) -> EncoderConfig:
    """`text_config`, or the default one, with the encoder of a semantic_ids folder and its maximal length.

    Raises:
      UserError: the folder's items were not embedded from texts.
    """
    made = read_json(Path(folder) / TEXT)
    if made["model"] is None:
        raise UserError(f"the items of {folder} brought embeddings of their own: no text can be embedded like them")
    model = str(Path(folder) / ENCODER) if made["model"] == ENCODER else made["model"]
    return replace(text_config or EncoderConfig(), model=model, max_tokens=made["max_tokens"])


def aligned(folder: Path, text: np.ndarray, item_ids: Sequence[str] = ()) -> np.ndarray:
    """Text embeddings f32 [n, D] of items, projected by the run's alignment to f32 [n, width].

    Args:
      item_ids: [n]; the learned residual of an item of the run is added, so that the same text gets the same embedding
        again. Without item_ids all items are treated as new.

    Raises:
      UserError: there is no alignment, or the embeddings have another width than those it was trained on.
    """
    params = read_alignment(folder)
    path, width = Path(folder) / ALIGNMENT, len(params["mean"])
    if text.shape[1] != width:
        raise UserError(
            f"the text embeddings are {text.shape[1]} wide, but the alignment of {path} takes {width}: "
            "encode the texts with the encoder of this run"
        )
    if "residual" not in params or not len(item_ids):
        return np.asarray(jax.jit(align.apply)(params, text))
    first = first_ids(folder)
    if len(first) != len(params["residual"]):
        raise UserError(
            f"{path} knows {len(params['residual'])} items, but the first version of the IDs has {len(first)}: "
            "restore the files of this run"
        )
    params["residual"] = np.pad(params["residual"], ((0, 1), (0, 0)))  # The last row is for new items.
    rows = pc.index_in(pa.array(item_ids, pa.string()), first).fill_null(len(first)).to_numpy()
    return np.asarray(jax.jit(align.apply)(params, text, rows))


def read_alignment(folder: Path) -> dict:
    """The parameters for `align.apply` of a semantic_ids folder; UserError where there is no alignment."""
    path = Path(folder) / ALIGNMENT
    if (Path(folder) / ENCODER).is_dir():
        raise UserError(
            f"the embeddings of {folder} are those of an encoder that was fine-tuned: give the items' texts, as a "
            "column 'text'"
        )
    try:
        params = unflatten_dict(load_file(path), sep=".")
        len(params["mean"])
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(
            f"{path} holds no alignment ({error}): give the embeddings that the codebooks encode"
        ) from error
    check_finite(params, path, MEND)
    return params


def read_texts(items: pa.Table) -> list[str]:
    """The items' column `text`."""
    if "text" not in items.column_names:
        raise UserError(
            "items.parquet has neither a column `text` nor a column `embedding`: "
            "prepare the tables again with one of them"
        )
    return [text or "" for text in items["text"].to_pylist()]


def _check_no_embeddings(items: pa.Table) -> None:
    """UserError where items bring embeddings of their own, which a fine-tuned encoder would not make."""
    if "embedding" in items.column_names:
        raise UserError(
            "items.parquet has embeddings of its own, which no text encoder made: align them with --align AlignConfig, "
            "or leave the column out"
        )


def pair_kinds(config: AlignConfig | FinetuneConfig) -> tuple[str, ...]:
    """The kinds of item pairs that an alignment is trained on."""
    return (config.kind,) if isinstance(config, AlignConfig) else config.kinds


def read_pairs(path: Path, kinds: Sequence[str]) -> np.ndarray:
    """Pairs of some kinds from pairs.parquet, int32 [n, 2]; none when the file is not there."""
    if not path.is_file():
        return np.zeros((0, 2), np.int32)
    pairs = pq.read_table(path)
    there = pc.unique(pairs["kind"]).to_pylist()
    for kind in kinds:
        if there and kind not in there:
            raise UserError(
                f"{path} has no pairs of kind {kind!r} (it has {', '.join(map(repr, there))}): set align.kind, or "
                "align.kinds of a fine-tuning"
            )
    pairs = pairs.filter(pc.is_in(pairs["kind"], pa.array(list(kinds), pa.string())))
    return np.stack([pairs["item"].to_numpy(), pairs["other"].to_numpy()], axis=1).astype(np.int32)


def _lists(column: pa.Array) -> pa.Array:
    """The column product_ids as lists of texts."""
    try:
        return column.cast(pa.list_(pa.string()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"column 'product_ids' is {column.type}, but must be a list of item ids") from error


def _known(folder: Path, named: pa.Array, item_ids: pa.Array, own: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    """Items and their own embeddings, those of `named` included; of an item listed twice, the first counts."""
    there, vectors = read_own(folder, pc.unique(named), own.shape[1])
    ids = pa.concat_arrays([item_ids, there])
    if len(unknown := named.filter(pc.invert(pc.is_in(named, ids)))):
        raise UserError(
            f"product_ids names {unknown[0].as_py()!r}, whose own embedding is not at hand: append that item with "
            "--text first, give it in the same file, or leave it out"
        )
    return ids, np.concatenate([own, vectors])
