"""What clients of `serve.py --http` wait for: under load, alone, the first request of a depth, /healthz, the start.

    python benchmarks/serving.py [--quick] [--run runs/demo]

The server is a process of its own, asked over loopback by this one. `a request under load`: 1, 16 and 64 clients ask
without a pause; ours is the time of all divided by their number, and the peer the same for calls of the model in this
process, at the batch size that is best for it. Beside it: requests a second, milliseconds until half and 99% of the
answers were there, and requests in a call. The stub is a model that takes 10 ms for a call of up to 32, as an
accelerator might, so that what is left is the server's own.

Without --run a synthetic mall is trained for a few steps in a temporary folder, as in batch_inference.py; its load is
not measured with --quick. `the model alone` is the compiled search of a batch of one in this process, of the same users
in turn with the requests, so that other work on the machine slows both. Times are medians. `start` is from the command
until the port is open, once with the programs in the cache and once with an empty cache (not in --quick).
"""

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from batch_inference import train_mall
from shared.timing import parser, report

from jaxrec.config import UserError
from jaxrec.console import console, report_user_errors
from jaxrec.programs import keep_compiled_programs
from jaxrec.serving.http import serve
from jaxrec.serving.lanes import call_sizes
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Request

ROOT = Path(__file__).parent.parent
CLIENTS = 8
LOADS = (1, 16, 64)
CALL_SECONDS, CALL_SIZE = 0.01, 32
"""Of the stub."""


def main() -> None:
    """Prints the rows."""
    arguments = parser(__doc__)
    arguments.add_argument("--run", type=Path, help="a trained run")
    arguments.add_argument("--stub", type=Path, help=argparse.SUPPRESS)  # the process that serves the stub
    args = arguments.parse_args()
    if args.stub is not None:
        console.stderr = False  # the address is read from there
        serve(Retriever(args.stub, Stub()), "127.0.0.1:0")
        return
    count = 40 if args.quick else 200
    with tempfile.TemporaryDirectory() as folder:
        path = write_stub_run(Path(folder) / "stub")
        with server([__file__, "--stub", str(path)]) as (port, _):
            compare_loads("stub", port, Retriever(path, Stub()), (CALL_SIZE,), args.quick)
    with tempfile.TemporaryDirectory() as folder:
        keep_compiled_programs()
        with redirect_stdout(sys.stderr):
            run = args.run or train_mall(Path(folder) / "run", args.quick)
            retriever = Retriever(run)
        if retriever.sizes is None:
            raise UserError(f"--run {run}: give a run of a system with semantic IDs")
        users = known_users(retriever, count)
        searches = [make_search(retriever, user) for user in users]
        with server(command_of(run)) as (port, _):
            if args.run or not args.quick:
                compare_loads(str(args.run or "a mall"), port, retriever, retriever.sizes, args.quick)
            first, second = (timed(Client(port).ask, users[0], 50) for _ in range(2))
            alone = compare_one_client(Client(port), users, searches, call_sizes(retriever)[-1])
            compare_clients(port, users, alone)
        report("first request of a depth", "k=50, the first of all", first, second, "the second")
        if not args.quick:
            compare_starts(run, Path(folder) / "cache")


def command_of(run: Path) -> list[str]:
    """The command that serves a run."""
    return [str(ROOT / "serve.py"), str(run), "--http", "127.0.0.1:0"]


class Stub:
    """Answers with the first items, in a time that does not depend on how many ask."""

    config = SimpleNamespace(batch_size=CALL_SIZE)

    def recommend(self, histories: list, k: int, exclude_history: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """As `jaxrec.evaluation.baselines.Recommender.recommend`."""
        time.sleep(CALL_SECONDS)
        items = np.tile(np.arange(k, dtype=np.int32), (len(histories), 1))
        return items, -items.astype(np.float32)


def write_stub_run(path: Path, items: int = 1000, users: int = 100) -> Path:
    """The tables of a run, as far as serving reads them: each user met one item."""
    tables = path / "tables"
    tables.mkdir(parents=True)
    names = [f"i{row}" for row in range(items)]
    pq.write_table(pa.table({"item_id": names, "title": names, "count": [1] * items}), tables / "items.parquet")
    pq.write_table(pa.table({"user_id": [f"u{row}" for row in range(users)]}), tables / "users.parquet")
    rows = np.arange(users, dtype=np.int32)
    events = {"user": rows, "item": rows, "behavior": ["click"] * users, "timestamp": rows.astype(np.int64)}
    pq.write_table(pa.table(events | {"session": np.zeros(users, np.int32)}), tables / "events.parquet")
    (tables / "statistics.json").write_text(json.dumps({"behaviors": ["click"], "target_behaviors": ["click"]}))
    (path / "config.json").write_text(json.dumps({"system": "stub"}))
    return path


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
def server(command: list[str], **environment: str) -> Iterator[tuple[int, float]]:
    """A script that serves: its port, and the milliseconds until it was open."""
    start = time.perf_counter()
    command = [sys.executable, *command]
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


def compare_loads(model: str, port: int, retriever: Retriever, sizes: tuple[int, ...], quick: bool) -> None:
    """A row for each number of clients, against the model in this process."""
    users = known_users(retriever, 256)
    rounds = 3 if quick else 10
    best, size = min((model_alone(retriever, users, size, rounds), size) for size in sizes)
    for clients in LOADS:
        count = (16 if quick else 64) * max(clients, 4)
        before = calls_of(port)
        seconds, waits = ask_all(port, users, clients, count)
        calls, asked = (after - earlier for after, earlier in zip(calls_of(port), before, strict=True))
        half, most = (round(float(each), 2) for each in np.percentile(waits, (50, 99)))
        more = {"requests_a_second": round(count / seconds, 1), "p50": half, "p99": most}
        more["together"] = round(asked / calls, 1)
        case = f"{model}, {clients} clients" if clients > 1 else f"{model}, 1 client"
        report("a request under load", case, 1e3 * seconds / count, best, f"in process, batches of {size}", **more)


def model_alone(retriever: Retriever, users: list[str], size: int, rounds: int) -> float:
    """Milliseconds of a request in calls of `size`, median, everything around the calls done."""
    prepared = [retriever.prepare(Request(user_id=user)) for user in users]
    of_kind = [each for each in prepared if each.kind == prepared[0].kind]
    some = [of_kind[row % len(of_kind)] for row in range(size)]
    retriever.search(some, (size,))  # compiles
    return float(np.median([timed(retriever.search, some, (size,)) for _ in range(rounds)])) / size


def ask_all(port: int, users: list[str], clients: int, count: int) -> tuple[float, list[float]]:
    """(seconds of all, milliseconds of each) of `count` requests by clients that ask without a pause."""

    def ask_some(number: int) -> list[float]:
        client = Client(port)
        return [timed(client.ask, users[row % len(users)]) for row in range(number, count, clients)]

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        waits = [wait for each in pool.map(ask_some, range(clients)) for wait in each]
    return time.perf_counter() - start, waits


def calls_of(port: int) -> tuple[float, float]:
    """(calls, requests in them) of a server so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found = (re.search(rf"^jaxrec_call_requests_{name}\{{.*\}} (\S+)$", text, re.M) for name in ("count", "sum"))
    return tuple(float(each[1]) for each in found)


def compare_one_client(client: Client, users: list[str], searches: list[Callable[[], object]], size: int) -> float:
    """Requests, in calls of `size`, and searches in turn; returns the median of the searches."""
    searches[0]()  # compiles
    pairs = [(timed(client.ask, user), timed(search)) for user, search in zip(users, searches, strict=True)]
    ours, alone = np.median(pairs, axis=0)
    report("request over HTTP", f"1 client, calls of {size}", ours, alone, "the model alone")
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
        with server(command_of(run), XDG_CACHE_HOME=str(cache)) as (_, wait):
            waits.append(wait)
    report("start", "until the port is open", waits[1], waits[0], "with an empty cache")


if __name__ == "__main__":
    console.stderr = True
    sys.exit(report_user_errors(main))
