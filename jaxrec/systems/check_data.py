"""`train.py CONFIG --check`: what the data hold, whether the configuration fits them, and what a run would take."""

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxrec.config import UserError
from jaxrec.console import console
from jaxrec.data.prepare import survey
from jaxrec.data.prepare_report import print_report

DESCRIBED_A_SECOND = 60.0
"""Texts that the text encoder reads a second on two cores; those of earlier runs are kept."""
BASE_MEMORY = 1.8e9
"""Bytes of a process before it holds a model: Python, JAX, compiled programs, the text encoder."""


@dataclass(frozen=True)
class Rehearsal:
    """What a training takes, counted without it."""

    step_flops: float
    """FLOPs of the matrix products of a step."""
    search_flops: float
    """FLOPs of the matrix products of an answer to one user."""
    parameters: int
    """Numbers in the model."""
    activations: float
    """Bytes of what a step keeps for its gradients, about."""


def look(config: Any) -> dict[str, Any]:
    """The counts of the data of a configuration, as `jaxrec.data.prepare.survey`; once a process."""
    key = (config.data.fingerprint(), repr(config.prepare))
    if key not in _SEEN:
        _SEEN.clear()
        start = time.monotonic()
        found = survey(config.data, config.prepare)
        _SEEN[key] = found | {"seconds": time.monotonic() - start}
    return _SEEN[key]


_SEEN: dict[tuple[str, str], dict[str, Any]] = {}


def check_attributes(config: Any, counts: dict[str, Any]) -> None:
    """Checks that the columns that a model reads are columns of the items.

    Raises:
      UserError: one is not.
    """
    columns = counts["item_columns"]
    for name in getattr(config, "attributes", ()):
        if name not in columns:
            known = ", ".join(each for each in columns if each not in ("item_id", "title", "text"))
            raise UserError(f"configuration key 'attributes': the items have no column {name!r}; they have {known}")


def check_data(config: Any, rehearse: Any | None) -> None:
    """Prints what a run of a configuration would read, be and take.

    rehearse: rehearse(config, counts) -> Rehearsal, which raises UserError where the model does not fit the data; None
      where the system has none.

    Raises:
      UserError: the data can't be read, or the configuration doesn't fit them.
    """
    counts = look(config)
    print_report(counts)
    if not counts["train_targets"]:
        raise UserError("no event of a predicted behavior is left to train on; give more data, or another data.split")
    check_attributes(config, counts)
    rehearsed = None if rehearse is None else rehearse(config, counts)
    for line in _lines(config, counts, rehearsed):
        console.print(line, markup=False)


def _lines(config: Any, counts: dict[str, Any], rehearsed: Rehearsal | None) -> list[str]:
    lines = [f"sizes: {_sizes(config)}"]
    if rehearsed is None:
        return [*lines, f"time and memory: {config.system} has no estimate; nothing was written"]
    minutes, memory = _minutes(config, counts, rehearsed), _memory(counts, rehearsed)
    lines.append(f"model: {rehearsed.parameters:,} parameters, {rehearsed.step_flops / 1e9:,.1f} GFLOP a step")
    lines.append(
        f"estimate on this machine: {minutes:,.0f} minutes and {memory / 2**30:.1f} GiB of memory, without early "
        "stopping; other work on the machine makes it slower"
    )
    return [*lines, "the configuration fits the data; nothing was written"]


def _sizes(config: Any) -> str:
    """The sizes of a configuration that has them."""
    found = [f"steps {config.training.steps:,}", f"warm-up {config.optim.warmup:,}", f"batch {config.batch_size}"]
    model = getattr(config, "model", None)
    for name in ("width", "heads", "layers", "experts", "queries", "dropout", "context_dropout"):
        if hasattr(model, name):
            found.append(f"{name.replace('_', ' ')} {getattr(model, name)}")
    if hasattr(config, "semantic_ids"):
        parts = (config.semantic_ids.hierarchy, config.semantic_ids.remainder)
        given = [getattr(part, "sizes", getattr(part, "levels", None)) for part in parts if part is not None]
        found.append(f"codebooks {' and '.join(map(str, given))}")
    if hasattr(getattr(config, "features", None), "buckets"):
        found.append(f"buckets {config.features.buckets}")
    return ", ".join(found)


def _minutes(config: Any, counts: dict[str, Any], rehearsed: Rehearsal) -> float:
    """Minutes of preparation, text embeddings, training, validation and the final evaluation."""
    # Small products are further from the limit of the machine than those of width 128, which reach 40%.
    rate = _matmul_rate() * 0.4 * min(1.0, getattr(config.model, "width", 128) / 128)
    steps, every = config.training.steps, config.training.evaluation_steps
    validated = min(config.validation.max_users or counts["test_users"], counts["test_users"])
    tested = 2 * (config.evaluation.max_users or counts["test_users"])
    searched = tested + (validated * (steps // every) if every else 0)
    seconds = (steps * rehearsed.step_flops + searched * rehearsed.search_flops) / rate
    # Compiling takes some seconds for each shape of batch, of steps and of searches.
    compiled = 15.0 * len(getattr(config.features, "buckets", (1,))) + 40.0
    return (3 * counts["seconds"] + counts["items"] / DESCRIBED_A_SECOND + compiled + seconds) / 60


def _memory(counts: dict[str, Any], rehearsed: Rehearsal) -> float:
    """Bytes: a process, events, and of the model parameters, gradients, two moments and activations."""
    return BASE_MEMORY + 200.0 * counts["events"] + 4.0 * 4 * rehearsed.parameters + rehearsed.activations


def _matmul_rate() -> float:
    """FLOPs a second of a matrix product on this machine, the best of three."""
    size = 1024
    product = jax.jit(lambda x: x @ x)
    x = product(jax.numpy.asarray(np.ones((size, size), np.float32) / size)).block_until_ready()
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
