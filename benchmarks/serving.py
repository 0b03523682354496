"""What a client of `serve.py --http` waits for: one client, eight, the first request of a depth, /healthz, the start.

    python benchmarks/serving.py [--quick] [--run runs/demo]

The server is the command itself, asked over loopback. Without --run a synthetic mall is trained for a few steps in a
temporary folder, as in batch_inference.py. `the model alone` is the compiled search of a batch of one in this process,
of the same users in turn with the requests, so that other work on the machine slows both. Times are medians. `start` is
from the command until the port is open, once with the programs in the cache and once with an empty cache (not in
--quick).
"""

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import jax
import numpy as np
from batch_inference import train_mall
from shared.timing import parser, report

from jaxrec.config import UserError
from jaxrec.console import console, report_user_errors
from jaxrec.programs import keep_compiled_programs
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Request

ROOT = Path(__file__).parent.parent
CLIENTS = 8


def main() -> None:
    """Prints the rows."""
    arguments = parser(__doc__)
    arguments.add_argument("--run", type=Path, help="a trained run")
    args = arguments.parse_args()
    count = 40 if args.quick else 200
    with tempfile.TemporaryDirectory() as folder:
        keep_compiled_programs()
        with redirect_stdout(sys.stderr):
            run = args.run or train_mall(Path(folder) / "run", args.quick)
            retriever = Retriever(run)
        if retriever.sizes is None:
            raise UserError(f"--run {run}: give a run of a system with semantic IDs")
        users = known_users(retriever, count)
        searches = [make_search(retriever, user) for user in users]
        with server(run) as (port, _):
            first, second = (timed(Client(port).ask, users[0], 50) for _ in range(2))
            alone = compare_one_client(Client(port), users, searches)
            compare_clients(port, users, alone)
        report("first request of a depth", "k=50, the first of all", first, second, "the second")
        if not args.quick:
            compare_starts(run, Path(folder) / "cache")


class Client:
    """One connection to the server."""

    def __init__(self, port: int):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def ask(self, user: str, k: int = 10) -> None:
        """Raises RuntimeError unless the answer comes from the model."""
        self.connection.request("POST", "/recommend", json.dumps({"user_id": user, "k": k}))
        answer = self.connection.getresponse()
        body = json.load(answer)
        if answer.status != 200 or body["source"] != "model":
            raise RuntimeError(f"status {answer.status}: {body}")

    def health(self) -> None:
        """GET /healthz."""
        self.connection.request("GET", "/healthz")
        self.connection.getresponse().read()


@contextmanager
def server(run: Path, **environment: str) -> Iterator[tuple[int, float]]:
    """The command that serves a run: its port, and the milliseconds until it was open."""
    command = [sys.executable, str(ROOT / "serve.py"), str(run), "--http", "127.0.0.1:0"]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if found := re.search(r"serving on http://127.0.0.1:(\d+)", line):
                break
            print(line, end="", file=sys.stderr)
        else:
            raise UserError(f"serve.py ended with status {process.wait()} before it served; its message is above")
        yield int(found[1]), 1e3 * (time.perf_counter() - start)
    finally:
        process.terminate()
        process.wait()


def known_users(retriever: Retriever, count: int) -> list[str]:
    """Users with a history, in a seeded order."""
    with_events = np.flatnonzero(np.diff(retriever.offsets))
    users = list(retriever.user_index)
    return [users[row] for row in np.random.default_rng(0).choice(with_events, count)]


def make_search(retriever: Retriever, user: str) -> Callable[[], object]:
    """The search of a batch of one for this user, everything around it done."""
    model, served = retriever.recommender, retriever.catalogue.current.served
    history, _ = retriever.history(Request(user_id=user))
    depth = retriever.depth(10)
    ((_, arrays),) = model.batches([history], (1,))
    return lambda: jax.device_get(model._search(served, arrays, None, model.width(depth), depth))


def timed(function: Callable[..., object], *arguments: object) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    function(*arguments)
    return 1e3 * (time.perf_counter() - start)


def compare_one_client(client: Client, users: list[str], searches: list[Callable[[], object]]) -> float:
    """Requests and searches in turn; returns the median of the searches."""
    searches[0]()  # compiles
    pairs = [(timed(client.ask, user), timed(search)) for user, search in zip(users, searches, strict=True)]
    ours, alone = np.median(pairs, axis=0)
    report("request over HTTP", "1 client", ours, alone, "the model alone")
    return alone


def compare_clients(port: int, users: list[str], alone: float) -> None:
    """Clients that ask without a pause, and /healthz beside them."""
    probe = Client(port)
    idle = float(np.median([timed(probe.health) for _ in range(20)]))
    beside: list[float] = []

    def ask_all(number: int) -> list[float]:
        client = Client(port)
        return [timed(client.ask, user) for user in users[number:] + users[:number]][: len(users) // 2]

    start = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask_all, number) for number in range(CLIENTS)]
        while not all(each.done() for each in asking):
            beside.append(timed(probe.health))
            time.sleep(0.01)
    seconds = time.perf_counter() - start
    waits = [wait for each in asking for wait in each.result()]
    second = {"requests_a_second": round(len(waits) / seconds, 1)}
    name = f"{CLIENTS} turns of the model alone"
    report("request over HTTP", f"{CLIENTS} clients", np.median(waits), CLIENTS * alone, name, **second)
    case = f"beside {CLIENTS} clients"
    report("/healthz", case, np.median(beside), idle, "beside nobody", longest=round(max(beside), 1))


def compare_starts(run: Path, cache: Path) -> None:
    """Two starts with a cache of their own."""
    waits = []
    for _ in range(2):
        with server(run, XDG_CACHE_HOME=str(cache)) as (_, wait):
            waits.append(wait)
    report("start", "until the port is open", waits[1], waits[0], "with an empty cache")


if __name__ == "__main__":
    console.stderr = True
    sys.exit(report_user_errors(main))
