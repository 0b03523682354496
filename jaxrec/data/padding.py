"""Few shapes: lengths in buckets, and arrays that are padded to them (NumPy only)."""

import numpy as np

from jaxrec.config import UserError


def check_buckets(buckets: tuple[int, ...], key: str = "features.buckets") -> None:
    """Raises UserError, which names the configuration's key, unless buckets are rising lengths of 1 or more."""
    if not buckets or min(buckets) < 1 or list(buckets) != sorted(set(buckets)):
        raise UserError(f"configuration key '{key}' is {buckets}; give rising lengths of 1 or more")


def bucket(buckets: tuple[int, ...], count: int) -> int:
    """The smallest bucket that holds `count`, or else the last."""
    return next((size for size in buckets if size >= count), buckets[-1])


def padded(values: np.ndarray, size: int) -> np.ndarray:
    """int32 [size]: the values, then zeros."""
    out = np.zeros(size, np.int32)
    out[: len(values)] = values
    return out
