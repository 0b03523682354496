"""Weights with NaN or infinity: detected when they are read, since all results would be NaN too."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import UserError


def check_finite(tree: Any, file: Path, mend: str) -> None:
    """UserError when an array of floating-point numbers in a pytree read from a file holds NaN or infinity.

    Of arrays split over hosts only this host's part is checked.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not all(np.isfinite(part).all() for part in _parts(leaf)):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(f"{file}: {name} holds NaN or infinity: {mend}")


def _parts(array: np.ndarray | jax.Array) -> Iterator[np.ndarray]:
    """The pieces of an array in this host's memory, each once."""
    if not isinstance(array, jax.Array):
        yield array
        return
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            yield np.asarray(shard.data)
