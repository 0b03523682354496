"""Checkpoints: a state and the position of its data; a crash, a full disk or a damaged file loses little.

    <folder>/00000200/state/         the pytree, by Orbax
    <folder>/00000200/manifest.json  step, notes (iterator state and the like), size and checksum of every file
    <folder>/best/...                the same for the best state in the evaluations

The manifest is written last: a folder without one is an incomplete save, which is ignored and later removed.
"""

import logging
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxrec.config import UserError
from jaxrec.console import console
from jaxrec.files import disk_full, read_json, write_json
from jaxrec.nn.finite import check_finite
from jaxrec.run import MANIFEST

DIVERGED = (
    "the training diverged; train into another --run with a lower learning rate, or delete that folder to go on from "
    "the checkpoint before it"
)
BEST = "best"
"""The folder, inside a stage's, of the best parameters in its evaluations."""


def save(folder: Path, step: int, state: Any, notes: dict[str, Any], *, keep: int = 2) -> None:
    """Saves a pytree of arrays and removes all checkpoints but the newest `keep`.

    Args:
      notes: JSON values of the state, such as an iterator's position.

    Raises:
      UserError: the disk is full. The earlier checkpoints are untouched.
    """
    path = _path(folder, step)
    try:
        _clear(path)
        with _quiet(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path / "state", state)
            checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            write_json(path / MANIFEST, {"step": step, "notes": notes, "files": _checksums(path / "state")})
    except Exception as error:
        if not disk_full(error):
            raise
        shutil.rmtree(path, ignore_errors=True)
        raise UserError(
            f"the disk is full: checkpoint {path} could not be written, those before it are kept; "
            "free some space and run it again"
        ) from error
    if jax.process_index() == 0:
        _remove_old(folder, keep)


def restore(folder: Path, like: Any, parts: Sequence[str] = ()) -> tuple[Any, dict[str, Any], int] | None:
    """Reads the newest intact checkpoint, and prints a line if a newer one is damaged.

    Args:
      like: a pytree with the shapes, dtypes and shardings wanted; None for the parameters alone, on one device.

    Returns:
      (state, notes, step), or None if there is no checkpoint.

    Raises:
      UserError: there are checkpoints, but none can be read; or the newest has other shapes than `like`, or NaN or
        infinity, as after a diverged training.
    """
    reasons = []
    for step in reversed(steps(folder)):
        path = _path(folder, step)
        reason = _damage(path)
        if reason is None:
            try:
                with _quiet():
                    _check_shapes(path, like)
                    state = _read(path, like, parts)
                # Not damaged: the files are as saved, and resuming from an earlier checkpoint would diverge again.
                check_finite(state, path, DIVERGED)
            except UserError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if reason is None:
            if reasons:
                console.print(f"{'; '.join(reasons)}; going on from the checkpoint of step {step}", markup=False)
            return state, read_json(path / MANIFEST)["notes"], step
        reasons.append(f"the checkpoint of step {step} is damaged ({reason})")
    if reasons:
        raise UserError(f"{folder}: {'; '.join(reasons)}; delete that folder to train this stage from the start")
    return None


def load_parts(folder: Path, *parts: str) -> dict[str, Any]:
    """Reads some parts of the state (such as "params") of the newest intact checkpoint, on one device, for serving.

    Raises:
      UserError: there is no checkpoint, or none can be read.
    """
    if not steps(folder):
        raise UserError(f"{folder} holds no checkpoint; run train.py on this run directory first")
    return restore(folder, None, parts)[0]


def load_best(folder: Path, *parts: str) -> dict[str, Any]:
    """As `load_parts`, for the best state ("params" and "extra") of an evaluated stage, else for the newest.

    If the best state is damaged, the newest one is read and a line is printed.

    Raises:
      UserError: there is no checkpoint, or none can be read.
    """
    best = Path(folder) / BEST
    if not steps(best):
        return load_parts(folder, *parts)
    try:
        return load_parts(best, *parts)
    except UserError as error:
        if not steps(folder):
            raise
        message = f"{best} can't be read: the last state is taken in place of the best ({error})"
        console.print(message, markup=False)
        return load_parts(folder, *parts)


def steps(folder: Path) -> list[int]:
    """The steps of the finished checkpoints in a folder, rising."""
    return sorted(int(path.parent.name) for path in Path(folder).glob(f"*/{MANIFEST}") if path.parent.name.isdigit())


def _path(folder: Path, step: int) -> Path:
    return Path(folder).absolute() / f"{step:08d}"


def _clear(path: Path) -> None:
    if jax.process_index() == 0:
        # The manifest first: a partly removed folder must not look complete.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    if jax.process_count() > 1:
        ocp.multihost.sync_global_processes("jaxrec_checkpoint_cleared")


def _remove_old(folder: Path, keep: int) -> None:
    kept = {_path(folder, step) for step in steps(folder)[-keep:]}
    for path in Path(folder).absolute().iterdir():
        if path.is_dir() and path.name.isdigit() and path not in kept:
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)


def _checksums(folder: Path) -> dict[str, list[int]]:
    """{file: [bytes, CRC-32]}; with several hosts sizes alone, since one host would have to read the files of all."""
    result = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        checksum = zlib.crc32(path.read_bytes()) if jax.process_count() == 1 else 0
        result[str(path.relative_to(folder))] = [path.stat().st_size, checksum]
    return result


def _damage(path: Path) -> str | None:
    """The damage of a checkpoint's files as text, or None."""
    try:
        manifest = read_json(path / MANIFEST)
        files, _, _ = manifest["files"], manifest["notes"], manifest["step"]
    except (UserError, KeyError, TypeError, UnicodeDecodeError):
        return f"{MANIFEST} can't be read"
    for name, (size, checksum) in files.items():
        file = path / "state" / name
        if not file.is_file():
            return f"state/{name} is missing"
        if file.stat().st_size != size:
            return f"state/{name} has {file.stat().st_size} bytes instead of {size}"
        if checksum and zlib.crc32(file.read_bytes()) != checksum:
            return f"state/{name} has changed since it was written"
    return None


def _check_shapes(path: Path, like: Any) -> None:
    """UserError if a checkpoint has other shapes than `like`; that is no damage, so there is no fall-back."""
    if like is None:
        return
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path / "state").item_metadata
    if metadata is None:
        raise ValueError("its metadata can't be read")
    saved = metadata.tree
    saved = {_name(key): tuple(leaf.shape) for key, leaf in jax.tree_util.tree_leaves_with_path(saved)}
    wanted = {_name(key): tuple(leaf.shape) for key, leaf in jax.tree_util.tree_leaves_with_path(like)}
    for name in [*wanted, *saved]:
        if wanted.get(name) != saved.get(name):
            raise UserError(
                f"{path}: {name} is {saved.get(name, 'missing')} there and {wanted.get(name, 'missing')} in this "
                "configuration; give another --run, or delete that folder"
            )


def _name(key: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(key, simple=True, separator="/")


def _read(path: Path, like: Any, parts: Sequence[str]) -> Any:
    if like is not None:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path / "state").item_metadata.tree
        wanted = {part: tree[part] for part in parts}
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        as_array = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=one_device), wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_array, partial_restore=True)
        return checkpointer.restore(path / "state", args=args)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses tracebacks printed by Orbax's threads for errors that Orbax raises as well."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
