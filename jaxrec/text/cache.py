"""A cache of embeddings on disk, keyed by the hash of the encoder and the text.

A store is a folder of immutable shards. A shard's name is the sha256 of its bytes, and it is written by an atomic
rename. So a kill leaves at most a temporary file, two processes never damage each other's work, and damage is detected
when a shard is read.
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from jaxrec.config import UserError
from jaxrec.console import console
from jaxrec.files import disk_full

SHARD_ROWS = 2048


def default_cache_dir() -> Path:
    """$JAXREC_CACHE, or jaxrec's folder in the user's cache folder."""
    if chosen := os.environ.get("JAXREC_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxrec"


class EmbeddingCache:
    """Vectors f32 [., width] by 32-byte key, in `<folder>/<name>/`."""

    def __init__(self, folder: Path, name: str, width: int):
        self.folder, self.width = folder / name, width
        self._keys: list[bytes] = []
        self._vectors: list[np.ndarray] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the embedding cache {self.folder} cannot be created ({error.strerror}): set "
                "text.cache_dir or $JAXREC_CACHE to a folder that can be written"
            ) from error

    def read(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The vectors f32 [len(keys), width] (zero where unknown), and which are known, bool [len(keys)].

        A damaged shard is named on the console and deleted; its texts become unknown and are encoded again.
        """
        vectors, known = np.zeros((len(keys), self.width), np.float32), np.zeros(len(keys), bool)
        wanted = {key: i for i, key in enumerate(keys)}
        for path in sorted(self.folder.glob("*.safetensors")):
            if (shard := self._read_shard(path)) is None:
                continue
            stored = [wanted.get(key.tobytes(), -1) for key in shard["keys"]]
            rows = np.array(stored, np.int64)
            vectors[rows[rows >= 0]] = shard["vectors"][rows >= 0]
            known[rows[rows >= 0]] = True
        return vectors, known

    def add(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        """Add vectors f32 [len(keys), width]; they are written shard by shard, and at `flush`."""
        self._keys.extend(keys)
        self._vectors.append(vectors)
        if len(self._keys) >= SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the vectors added since the last shard; UserError when the disk is full."""
        if not self._keys:
            return
        keys = np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, 32)
        raw = save({"keys": keys, "vectors": np.concatenate(self._vectors).astype(np.float32)})
        try:
            write_atomically(self.folder / f"{hashlib.sha256(raw).hexdigest()}.safetensors", raw)
        except OSError as error:
            raise UserError(
                f"the embedding cache {self.folder} cannot be written ({error.strerror}): make room, or "
                "set text.cache_dir or $JAXREC_CACHE to another folder"
            ) from error
        self._keys, self._vectors = [], []

    def _read_shard(self, path: Path) -> dict[str, np.ndarray] | None:
        try:
            raw = path.read_bytes()
        except FileNotFoundError:  # another process found it damaged and deleted it
            return None
        if hashlib.sha256(raw).hexdigest() == path.stem:
            shard = load(raw)
            if shard["vectors"].shape == (len(shard["keys"]), self.width):
                return shard
        console.print(f"The cached embeddings in {path} are damaged: deleted, and encoded again.")
        path.unlink(missing_ok=True)
        return None


def write_files(folder: Path, files: dict[str, bytes], what: str) -> None:
    """Write files in order into a folder, which is created if missing; each file is complete or absent.

    Raises:
      UserError: `what` can't be saved there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, raw in files.items():
            write_atomically(folder / name, raw)
    except OSError as error:
        mend = "free some space" if disk_full(error) else "choose a folder that can be written"
        raise UserError(f"{what} can't be saved in {folder} ({error.strerror}): {mend}") from error


def write_atomically(path: Path, raw: bytes) -> None:
    """Write a file so that it is complete or absent after a crash at any moment."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
