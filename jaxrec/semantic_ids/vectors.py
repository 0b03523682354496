"""Vectors of the items in a semantic_ids folder.

embeddings.safetensors  `embeddings`, f32 [I, D]: what was quantized, and in its metadata of which items
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrec.config import UserError, fingerprint

EMBEDDINGS = "embeddings.safetensors"


def write_embeddings(path: Path, item_ids: list[str] | pa.Array | pa.ChunkedArray, x: np.ndarray) -> None:
    """Write the embeddings x f32 [I, D] of items [I]."""
    save_file({"embeddings": np.ascontiguousarray(x)}, path, metadata={"items": _fingerprint(item_ids)})


def read_embeddings(path: Path, item_ids: list[str] | pa.Array | pa.ChunkedArray) -> np.ndarray:
    """What `write_embeddings` wrote, f32 [I, D]; item_ids: the items that its rows are taken for.

    Raises:
      UserError: the file is missing or damaged, or has the embeddings of other items, or of these in another order.
        Of a file that does not say which items it has, only their number is compared.
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


def _fingerprint(item_ids: list[str] | pa.Array | pa.ChunkedArray) -> str:
    return fingerprint(item_ids if isinstance(item_ids, list) else item_ids.to_pylist())
