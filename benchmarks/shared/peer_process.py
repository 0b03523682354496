"""A process in another environment that runs what a benchmark is compared with: a JSON line in, a JSON line out."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from jaxrec.config import UserError


class PeerProcess:
    """`PYTHON shared/<script> FOLDER THREADS`, which says a line when it is ready and then answers every line."""

    def __init__(self, python: str, script: str, folder: Path, threads: int, needs: str):
        """needs: the libraries that the environment must hold, for the message when the process ends."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
        self._needs = needs
        self._process = subprocess.Popen(
            [python, Path(__file__).parent / script, folder, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=clean | {"OMP_NUM_THREADS": str(threads)},
        )
        self._answer()

    def ask(self, **question: Any) -> dict:
        """The process's answer.

        Raises:
          UserError: the process ended.
        """
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"the peers' process ended: --peers needs {self._needs}")
        return json.loads(line)
