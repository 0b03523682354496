"""Runs that are stopped on their way: in this process, or killed as processes of their own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from jaxrec.training.log import TIMING_FIELDS

ROOT = Path(__file__).parent.parent


class StoppedError(BaseException):
    """As if the process were killed."""


def stopping(stops):
    """A fault point that stops each time that it comes to the next of these steps."""

    def fault(point: str) -> None:
        if stops and point == stops[0]:
            stops.pop(0)
            raise StoppedError

    return fault


def train_whole_and_killed(folder: Path, config: str, step: int) -> None:
    """Two runs of one configuration of tests/: `whole`, and `killed` after this step and run again.

    What each printed is in NAME.txt.
    """
    for name, point, status in (("whole", "", 0), ("killed", f"step:{step}", -signal.SIGKILL), ("killed", "", 0)):
        environment = {**os.environ, "JAXREC_KILL_AT": point}
        command = [sys.executable, "train.py", f"tests/{config}", "--run", str(folder / name)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr + done.stdout
        (folder / f"{name}.txt").write_text(done.stdout)


def untimed_lines(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, without what tells time."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING_FIELDS} for line in lines]
