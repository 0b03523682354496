"""The log of a training: metrics.jsonl, TensorBoard, and the share of the machine's peak."""

import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tensorboardX

from jaxrec.console import console
from jaxrec.training.flops import Flops

TIMING_FIELDS = ("seconds", "targets_per_second", "peak_share", "peak_share_exact")
"""The fields of a line that differ between repetitions of a training."""

PARTIAL = (
    "The loss has matrix products in a loop or a branch of which only the data decide how often it is run: "
    "they are not counted, so that the share of the machine's peak is in truth higher than logged."
)


@functools.cache
def measure_peak() -> float:
    """FLOP/s of a 2048 x 2048 float32 `jnp.dot`, the best of a few: the peak of the machine's matmul (~0.25 s)."""
    size = 2048
    x = jnp.ones((size, size), jnp.float32)
    dot = jax.jit(jnp.dot)
    dot(x, x).block_until_ready()
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        dot(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    # Devices of one CPU share its cores; the FLOP/s of other devices add up.
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return 2 * size**3 / best * devices


class Meter:
    """Converts sums into a log line, with the rates of training."""

    def __init__(self, flops_per_step: float | Callable[[Any], float | Flops] | None):
        self.flops_per_step = flops_per_step
        self.peak = measure_peak() if flops_per_step else None
        self.started = self.since = time.perf_counter()
        self.flops, self.exact, self.told = 0.0, True, False

    def add(self, batch: Any) -> None:
        """Counts a step's FLOPs; logs once if the count is only a lower bound."""
        if not self.flops_per_step:
            return
        flops = self.flops_per_step(batch) if callable(self.flops_per_step) else self.flops_per_step
        flops = flops if isinstance(flops, Flops) else Flops(flops)
        if not (flops.exact or self.told):
            console.print(PARTIAL)
            self.told = True
        self.flops, self.exact = self.flops + flops.count, self.exact and flops.exact

    def read(self, sums: dict[str, list[float]], step: int) -> dict[str, Any]:
        now = time.perf_counter()
        seconds = now - self.since
        shown = {name: total / max(count, 1) for name, (total, count) in sums.items() if not name.startswith("_")}
        line = {"step": step, **shown, "targets_per_second": round(sums["loss"][1] / seconds, 1)}
        if self.peak:
            line["peak_share"] = round(self.flops / seconds / self.peak, 4)
            if not self.exact:
                line["peak_share_exact"] = False
        line["seconds"] = round(now - self.started, 3)
        self.since, self.flops, self.exact = now, 0.0, True
        return line

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes saving and evaluation from the rate of training."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start


class Log:
    """metrics.jsonl and TensorBoard. Lines of this stage after step `begun` are dropped."""

    def __init__(self, path: Path, stage: str, begun: int, on_log: Callable[[dict[str, Any]], None] | None):
        self.path, self.stage, self.on_log = Path(path), stage, on_log
        # The metrics are those of all hosts, so one host writes.
        self.writes = jax.process_index() == 0
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_lines(self.path, stage, begun)
            folder = self.path.parent / "tensorboard" / stage
            self.board = tensorboardX.SummaryWriter(str(folder), purge_step=begun + 1 if begun else None)

    def __enter__(self) -> "Log":
        if self.writes:
            self.file = self.path.open("a")
        return self

    def __exit__(self, *_: object) -> None:
        if self.writes:
            self.file.close()
            self.board.close()

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line; numbers go to TensorBoard too."""
        line = {"stage": self.stage, **line}
        if self.writes:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self.board.add_scalar(name, value, line["step"])
        if self.on_log:
            self.on_log(line)

    def sync(self) -> None:
        """Waits until all lines are on the disk: a checkpoint must not exist before the lines of its steps."""
        if self.writes:
            os.fsync(self.file.fileno())


def _drop_lines(path: Path, stage: str, begun: int) -> None:
    """Removes the lines of a stage after step `begun`, all of them if it is 0, and an incomplete last line."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if line.get("stage") != stage or (begun and line.get("step", 0) <= begun):
            kept.append(text)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(f"{text}\n" for text in kept))
    partial.rename(path)
