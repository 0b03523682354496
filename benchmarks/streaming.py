"""Semantic IDs of embeddings larger than memory: the command's peak memory and its speed, 10 million rows of width 64.

    python benchmarks/streaming.py [--quick]

Seeded rows are written into a temporary .npy file by blocks; then `python -m jaxrec.semantic_ids fit` runs on it in a
process of its own, with three levels of 1024 codes fitted to IN_MEMORY of the rows. `peak memory` is that process's
largest resident set, for which 4 GiB are the bound, however many rows there are. `rows/s` is over the whole command:
reading, fitting, encoding, figures and page; the peer is encoding alone, of rows in memory, with the same codebooks.
The rows take 2.4 GiB on the disk of TMPDIR. --quick: 500,000 rows, of which a fifth is fitted to.
"""

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from shared.timing import best_of, parser, report

from jaxrec.config import UserError
from jaxrec.console import console, report_user_errors, track
from jaxrec.semantic_ids.quantizers import codebooks

WIDTH, LEVELS = 64, (1024, 1024, 1024)
ROWS, IN_MEMORY = 10_000_000, 1_000_000
QUICK_ROWS, QUICK_IN_MEMORY = 500_000, 100_000
LIMIT_GIB = 4
BLOCK_ROWS = 1 << 16


def main() -> None:
    """Prints the rows."""
    args = parser(__doc__).parse_args()
    rows, in_memory = (QUICK_ROWS, QUICK_IN_MEMORY) if args.quick else (ROWS, IN_MEMORY)
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "items.npy", Path(folder) / "ids"
        write_rows(path, rows)
        seconds, gib = run_fit(path, out, in_memory)
        encoding = measure_encoding(codebooks.load(out / "codebooks.safetensors"), np.load(path, mmap_mode="r"))
    case = f"{rows} x {WIDTH}, {len(LEVELS)} x {LEVELS[0]}, fitted to {in_memory}"
    file = round(4 * rows * WIDTH / 2**30, 3)
    report("peak memory", case, gib, LIMIT_GIB, "the bound", "GiB", file_gib=file)
    report("rows/s", case, rows / seconds, encoding, "encoding alone, in memory", "rows/s", seconds=round(seconds, 1))


def write_rows(path: Path, rows: int) -> None:
    """Seeded Gaussians with falling variances, f32 [rows, WIDTH], a block at a time."""
    needed = 4 * rows * (WIDTH + 32)
    if (free := shutil.disk_usage(path.parent).free) < needed:
        raise UserError(
            f"{path.parent} has {free / 1e9:.1f} GB free, but the rows and their IDs may take {needed / 1e9:.1f}: "
            "set TMPDIR to a folder on a larger disk"
        )
    scale = np.geomspace(1, 0.2, WIDTH, dtype=np.float32)
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, WIDTH)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in track(range(0, rows, BLOCK_ROWS), "Writing rows"):
            block = rng.standard_normal((min(BLOCK_ROWS, rows - start), WIDTH), np.float32)
            file.write((block * scale).tobytes())


def run_fit(path: Path, out: Path, in_memory: int) -> tuple[float, float]:
    """Seconds that the command took, and its largest resident set in GiB."""
    options = {"items": path, "out": out, "in-memory": in_memory, "semantic-ids.remainder": None}
    command = [sys.executable, "-m", "jaxrec.semantic_ids", "fit"]
    command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    command += ["--semantic-ids.hierarchy.sizes", *map(str, LEVELS)]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"the command ended with {done.returncode}: {' '.join(command)}")
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def measure_encoding(books: codebooks.Codebooks, x: np.ndarray) -> float:
    """Rows a second that `encode` takes of rows in memory."""
    some = np.array(x[: 4 * BLOCK_ROWS])
    (milliseconds,) = best_of([lambda: codebooks.encode(books, some)], 2)
    return 1000 * len(some) / milliseconds


if __name__ == "__main__":
    console.stderr = True
    sys.exit(report_user_errors(main))
