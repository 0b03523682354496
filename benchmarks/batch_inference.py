"""Time of 1,000 lines of `serve.py --requests`, against one request at a time, and what a line costs where.

    python benchmarks/batch_inference.py [--quick] [--run runs/demo]

Without --run a synthetic mall is trained for a few steps in a temporary folder (--quick: one layer): how good the
answers are doesn't matter here, how long they take does. Requests are users of the run in a seeded order, every fourth
with a history of its own in the request. Both peers go through the same retriever: the first pads each request to a
whole batch; the second pads nothing, as the server does. `parts` gives the milliseconds of 1,000 lines,
each part alone: what is not `model` is on the host, beside the device or in its way. `peak memory` is the process's,
after all lines and after a tenth of them.
"""

import contextlib
import dataclasses
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from shared.timing import parser, report

from jaxrec.config import load_config
from jaxrec.console import console, report_user_errors, track
from jaxrec.run import Run
from jaxrec.serving.batch import answer_file
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Request, parse_request
from jaxrec.systems import train

MALL = Path(__file__).parent.parent / "configs" / "onemall_mall.py"
STEPS = 20
WINDOW = 1024  # so that there are several


def main() -> None:
    """Prints the rows."""
    arguments = parser(__doc__)
    arguments.add_argument("--run", type=Path, help="a trained run")
    args = arguments.parse_args()
    lines, alone = (2_000, 10) if args.quick else (100_000, 200)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as output:
        output.enter_context(contextlib.redirect_stdout(sys.stderr))
        retriever = Retriever(args.run or train_mall(Path(folder) / "run", args.quick))
        requests = write_requests(Path(folder) / "in.jsonl", retriever, lines)
        answer = partial(answer_file, retriever, requests, Path(folder) / "out.jsonl", window_lines=WINDOW)
        few = write_requests(Path(folder) / "few.jsonl", retriever, lines // 10)
        answer_file(retriever, few, Path(folder) / "few_out.jsonl", window_lines=WINDOW)  # compiles
        memory = peak_memory()
        with counted_compilations() as compiled:
            seconds = timed(answer)
        memory = peak_memory(), memory
        some = [parse_request(line) for line in requests.read_bytes().splitlines()[:alone]]
        config = retriever.recommender.config
        retriever.sizes = (config.batch_size,)
        padded = 1e6 * time_alone(retriever, some) / alone
        parts = time_parts(retriever, requests, min(lines, 2_000))
        retriever.sizes = (1,)
        single = 1e6 * time_alone(retriever, some) / alone
    items = len(retriever.catalogue.current)
    case = f"{lines} lines, batches of {config.batch_size}, {config.beam_width} beams, {items} items"
    total = 1e6 * seconds / lines
    report("1,000 lines", case, total, padded, "one request at a time", compilations=len(compiled))
    report("1,000 lines", case, total, single, "one request at a time, batch size 1")
    report("1,000 lines", case, total, parts["model"], "the model alone", **parts)
    report("peak memory", case, *memory, "a tenth of the lines", "MiB")


def train_mall(path: Path, quick: bool) -> Path:
    """A run that is trained a little."""
    config, steps = load_config(MALL), 2 if quick else STEPS
    if quick:  # compiling takes longer than anything that is measured
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=1))
    training = dataclasses.replace(
        config.training, steps=steps, log_every=steps, checkpoint_every=steps, evaluate_every=0
    )
    evaluation = dataclasses.replace(config.evaluation, max_users=32)
    optim = dataclasses.replace(config.optim, warmup=steps // 2)
    config = dataclasses.replace(config, training=training, evaluation=evaluation, optim=optim)
    train(Run.open(path, config), config)
    return path


def write_requests(path: Path, retriever: Retriever, lines: int) -> Path:
    """Users in a seeded order, every fourth request with the user's history written out."""
    rng = np.random.default_rng(0)
    users = list(retriever.user_index)
    item_ids = retriever.catalogue.current.items["item_id"].to_pylist()
    with path.open("w", encoding="utf-8") as file:
        for number, user in enumerate(rng.integers(0, len(users), lines)):
            request = {"user_id": users[user]}
            if number % 4 == 0:
                history, _ = retriever.history(Request(user_id=users[user]))
                columns = (history[name].tolist() for name in ("item", "behavior", "timestamp"))
                events = [
                    {
                        "item_id": item_ids[item],
                        "behavior": retriever.behaviors[behavior],
                        "timestamp": second,
                    }
                    for item, behavior, second in zip(*columns, strict=True)
                ]
                request = {"history": events}
            file.write(json.dumps(request) + "\n")
    return path


def timed(function: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_memory() -> float:
    """MiB that this process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def time_alone(retriever: Retriever, requests: list[Request]) -> float:
    """Seconds that the requests take one after the other, compiled before."""
    for request in requests:  # every length bucket
        retriever.answer([request])
    return timed(lambda: [retriever.answer([request])[0].to_json() for request in track(requests, "one at a time")])


def time_parts(retriever: Retriever, path: Path, count: int) -> dict[str, float]:
    """Milliseconds of 1,000 lines: parsing, looking up histories, making features, the model, writing JSON."""
    model, lines = retriever.recommender, path.read_bytes().splitlines()[:count]
    requests: list[Request] = []
    parse = timed(lambda: requests.extend(map(parse_request, lines)))
    found: list = []
    history = timed(lambda: found.extend(retriever.history(request)[0] for request in requests))
    known = [each for each in found if len(each["item"])]
    batches: list = []
    features = timed(lambda: batches.extend(model.batches(known)))
    depth = retriever.depth(Request.model_fields["k"].default)

    def search() -> None:
        for _, arrays in batches:
            jax.block_until_ready(model._search(model.served, arrays, None, model.width(depth), depth))

    search()
    device = timed(search)
    answers = retriever.answer(requests, at_once=count)
    to_json = timed(lambda: [answer.to_json() for answer in answers])
    seconds = {"parse": parse, "history": history, "features": features, "model": device, "json": to_json}
    return {name: round(1e6 * value / count, 1) for name, value in seconds.items()}


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """The compilations that happen inside."""
    seen: list[str] = []

    def listen(event: str, _: float, **about: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


if __name__ == "__main__":
    console.stderr = True
    sys.exit(report_user_errors(main))
