"""Few shapes: lengths in buckets, and arrays that are padded to them (NumPy only)."""

from collections.abc import Sequence

import numpy as np

from jaxrec.config import UserError


def check_buckets(buckets: tuple[int, ...], key: str = "features.buckets") -> None:
    """Raises UserError, which names the configuration's key, unless buckets are rising lengths of 1 or more."""
    if not buckets or min(buckets) < 1 or list(buckets) != sorted(set(buckets)):
        raise UserError(f"configuration key '{key}' is {buckets}; give rising lengths of 1 or more")


def bucket(buckets: tuple[int, ...], count: int) -> int:
    """The smallest bucket that holds `count`, or else the last."""
    return next((size for size in buckets if size >= count), buckets[-1])


def padded(
    values: np.ndarray | Sequence[int], size: int, fill: int | str = 0, dtype: type | np.dtype = np.int32
) -> np.ndarray:
    """[size, ...] of a dtype: the values [n, ...], n of them or fewer, then `fill`."""
    out = np.full((size, *np.shape(values)[1:]), fill, dtype)
    out[: len(values)] = values
    return out
