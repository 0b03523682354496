"""Results that are kept: `benchmarks/results/<name>.json`, a list of runs with what made them.

{"model", "seed", "data", "command", "commit", "device", "seconds",
 "rows": [{"split", "subset", "metric", "value", "count"}]}; the earliest have no device: one or two CPU cores.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrec.config import UserError
from jaxrec.files import read_json, write_json

FOLDER = Path(__file__).parent.parent / "results"
RUN = ("model", "seed", "data")
"""What tells runs apart. Of one run an entry of the same commit replaces the earlier one, and one with the same rows is
no other: it was measured before."""


def append(name: str, entries: list[dict[str, Any]], folder: Path = FOLDER) -> Path:
    """Adds runs to `<folder>/<name>.json`, with what made them; returns the path."""
    path = folder / f"{name}.json"
    kept = read_json(path) if path.exists() else []
    known = [(_run(entry), entry["rows"]) for entry in kept]
    fresh = [entry for entry in entries if (_run(entry), entry["rows"]) not in known]
    made = [{**provenance(), **entry} for entry in fresh]
    replaced = [(_run(entry), entry["commit"]) for entry in made]
    kept = [entry for entry in kept if (_run(entry), entry["commit"]) not in replaced]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, kept + made)
    return path


def make_folder(flag: str, path: Path) -> None:
    """Makes the folder that a flag names, before anything takes its time.

    Raises:
      UserError: it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: the folder {path} can't be made ({error.strerror}); give another one") from error


def moments(values: Sequence[float]) -> tuple[float, float, int]:
    """(mean, standard deviation over seeds, 0 of one, number) of a seed's value each."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, len(values)


def provenance() -> dict[str, str]:
    """What makes the results of this process: its command, commit and device."""
    return {"command": command(), "commit": commit(), "device": device()}


def device() -> str:
    """What this process computes on: "NVIDIA H100 80GB HBM3", or how many cores of a CPU it may use."""
    found = jax.devices()
    if found[0].platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"CPU, {cores} core{'s' * (cores != 1)}"
    return f"{len(found)} x {found[0].device_kind}" if len(found) > 1 else found[0].device_kind


def command() -> str:
    """The command line of this process; of absolute paths the last name alone, as they are one machine's."""
    return shlex.join(["python", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)])


def commit() -> str:
    """The commit of the working tree, "+" behind it where files differ from it; "unknown" outside of git."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + (
            "+" if _git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    root = Path(__file__).parent.parent.parent
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def _run(entry: dict[str, Any]) -> tuple:
    return tuple(entry[name] for name in RUN)
