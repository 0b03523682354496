"""Vectors of the items in a semantic_ids folder.

embeddings.safetensors  `embeddings`, f32 [I, D]: the quantized embeddings; the items are in its metadata
own.parquet             with scenarios: item_id, embedding: the items' own embeddings, without their products'
own_later.parquet       the same for items added or changed later; it takes precedence over own.parquet
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrec.config import UserError, fingerprint
from jaxrec.files import fault_point, sync, writing
from jaxrec.semantic_ids.table.space import ItemIds, as_strings

EMBEDDINGS, OWN, OWN_LATER = "embeddings.safetensors", "own.parquet", "own_later.parquet"


def write_embeddings(path: Path, item_ids: ItemIds, x: np.ndarray) -> None:
    """Write the embeddings x f32 [I, D] of items [I]."""
    save_file({"embeddings": np.ascontiguousarray(x)}, path, metadata={"items": _fingerprint(item_ids)})


def read_embeddings(path: Path, item_ids: ItemIds) -> np.ndarray:
    """Read the embeddings f32 [I, D] that `write_embeddings` wrote; item_ids [I]: the expected items.

    Raises:
      UserError: the file is missing or damaged, or has other items or another order. A file without item ids is
        checked for their number only.
    """
    try:
        with safe_open(path, "np") as file:
            x, made = file.get_tensor("embeddings"), (file.metadata() or {}).get("items")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} holds no embeddings ({error}): run the tokenize phase again") from error
    if len(x) != len(item_ids) or made not in (None, _fingerprint(item_ids)):
        raise UserError(
            f"{path} has the embeddings of another list of items ({len(x)} of them) than these {len(item_ids)}: "
            "tokenize the tables again, into a new run where items were appended to the IDs of this one"
        )
    return x


def write_own(path: Path, item_ids: ItemIds, own: np.ndarray) -> None:
    """Write the own embeddings f32 [I, D] of items [I]."""
    offsets = pa.array(np.arange(0, own.size + 1, own.shape[1]), pa.int64())
    vectors = pa.LargeListArray.from_arrays(offsets, pa.array(own.ravel(), pa.float32()))
    pq.write_table(pa.table({"item_id": as_strings(item_ids), "embedding": vectors}), path)


def keep_own(folder: Path, item_ids: ItemIds, own: np.ndarray) -> None:
    """Keep the own embeddings f32 [n, D] of items added or changed; the caller holds the lock of the versions.

    The file is written whole or not at all. Fault point: `partial:own`, before the rename.
    """
    folder = Path(folder)
    path, partial = folder / OWN_LATER, folder / f".{OWN_LATER}.partial"
    ids = as_strings(item_ids)
    if path.exists():
        earlier = pq.read_table(path)
        earlier = earlier.filter(pc.invert(pc.is_in(earlier["item_id"], ids)))
        own = np.concatenate([_matrix(earlier["embedding"], own.shape[1]), own])
        ids = pa.concat_arrays([*earlier["item_id"].chunks, ids])
    with writing(path):
        write_own(partial, ids, own)
        sync(partial)
        fault_point("partial:own")
        partial.rename(path)
        sync(folder)


def read_own(folder: Path, item_ids: pa.Array, width: int) -> tuple[pa.Array, np.ndarray]:
    """The items of item_ids (string [N]) with an own embedding, string [n], and their embeddings, f32 [n, width].

    The newest embedding of an item comes first. Only the rows of these items are held in memory.
    """
    tables = [
        pq.read_table(path, filters=pc.field("item_id").isin(item_ids))
        for path in (Path(folder) / OWN_LATER, Path(folder) / OWN)
        if path.is_file()
    ]
    ids = [chunk for table in tables for chunk in table["item_id"].chunks]
    vectors = [np.zeros((0, width), np.float32), *(_matrix(table["embedding"], width) for table in tables)]
    return pa.chunked_array(ids, pa.string()).combine_chunks(), np.concatenate(vectors)


def _fingerprint(item_ids: ItemIds) -> str:
    return fingerprint(as_strings(item_ids).to_pylist())


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """A column of lists as f32 [n, width]."""
    values = [np.zeros(0, np.float32), *(chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks)]
    return np.concatenate(values).reshape(-1, width)
