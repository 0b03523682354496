"""What requests notice of a catalogue that changes: latencies while versions are swapped, and the first after a swap.

    python benchmarks/swap.py [--quick]

A thread asks without a pause (a batch of eight with filters: masks, search, items); in `during swaps` another thread
removes and restores items as fast as it can, which sorts the whole catalogue each time. Peer: the same thread with
nobody beside it. The model is a table of log-probabilities, so that the times are those of search and catalogue.
"""

import threading
import time
from functools import partial

import jax
import numpy as np
from decoding import decode, make_model
from filters import BATCH, LEVELS, make_catalogue
from shared.timing import best_of, parser, report

from jaxrec.catalogue import LiveCatalogue
from jaxrec.decoding import BeamResult, build_trie, expand_items, stack

K = 10
items_of = jax.jit(partial(expand_items, k=K))


def answer(live: LiveCatalogue, model, beam_width: int) -> tuple[jax.Array, BeamResult]:
    """One batch, with the version that is current when it begins."""
    version = live.current
    filters = stack([version.allowed({"in_stock": True}, blocked=[row, row + 1]) for row in range(BATCH)])
    result = decode(model, version.trie, filters, beam_width=beam_width)
    return jax.block_until_ready(items_of(version.trie, result, allowed=filters))


def latencies(ask, seconds: float) -> np.ndarray:
    """Milliseconds of one request after the other."""
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        ask()
        found.append(1e3 * (time.perf_counter() - start))
    return np.array(found)


def compare_latencies(live: LiveCatalogue, ask, case: str, seconds: float) -> None:
    stop, swaps = threading.Event(), []

    def change() -> None:
        while not stop.is_set():
            start = time.perf_counter()
            for step in (live.remove, live.restore):
                step(["0", "1", "2"])
            swaps.append(1e3 * (time.perf_counter() - start) / 2)

    alone = latencies(ask, seconds)
    thread = threading.Thread(target=change)
    thread.start()
    beside = latencies(ask, seconds)
    stop.set()
    thread.join()
    about = {"requests": len(beside), "versions": 2 * len(swaps), "ms_a_version": round(float(np.median(swaps)), 1)}
    for name, take in (("median", np.median), ("99 of 100", lambda x: np.percentile(x, 99)), ("longest", np.max)):
        report("request_during_swaps", f"{case} {name}", take(beside), take(alone), "nobody changes anything", **about)


def compare_first_requests(live: LiveCatalogue, ask, model, case: str, beam_width: int) -> None:
    """The first request after a change: ours in the old shapes, the peer with arrays that just fit."""
    version = live.remove(["5", "6", "7"])
    start = time.perf_counter()
    ask()
    ours = 1e3 * (time.perf_counter() - start)
    rows = version.active
    fitting = build_trie(version.codes[rows], live.codebook_sizes, capacity=int(rows.sum()))
    start = time.perf_counter()
    jax.block_until_ready(decode(model, fitting, beam_width=beam_width))
    report("first_request_after_a_swap", case, ours, 1e3 * (time.perf_counter() - start), "arrays of exactly the items")


def main() -> None:
    quick = parser(__doc__).parse_args().quick
    beam_width = 64
    for count, codebook_size, seconds in ((100_000, 256, 3),) if quick else ((100_000, 256, 5), (1_000_000, 2048, 15)):
        live, model = make_catalogue(count, codebook_size), make_model(1, BATCH, codebook_size)
        ask = partial(answer, live, model, beam_width)
        case = f"items={count} K={codebook_size} M={LEVELS} B={BATCH} W={beam_width}"
        best_of([ask], 1)
        compare_latencies(live, ask, case, seconds)
        compare_first_requests(live, ask, model, case, beam_width)


if __name__ == "__main__":
    main()
