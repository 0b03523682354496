"""Constrained beam search on a T5 of 4.6M parameters: against transformers and CTranslate2, and what its parts cost.

    python benchmarks/decoding_peers.py [--peers PYTHON] [--quick]

80 input tokens, IDs of four levels of 256 codes, 100,000 of them in the catalogue; log-probabilities are normalised
over the whole vocabulary of 1,100 tokens, as the peers do. One and two threads (--quick: two, small cases), best of
several, milliseconds a batch.

Without --peers: the whole search with the trie on against off, with a filter of its own for each request (built before)
against none, with a thousand times more items, and as beams grow from 10 to 512. Rows of claim `share of matmul peak`
have the time that the FLOPs of the same search take at the measured peak as peer.

With --peers also other libraries, all taking turns: PYTHON is an interpreter with torch, transformers, ctranslate2 and
sentencepiece, in an environment of its own. Ours is always with the trie on. transformers has its
`prefix_allowed_tokens_fn`; CTranslate2 knows no constraints and finds any tokens. Before anything is timed, ours with
the trie is held to transformers with the constraint, and ours without to CTranslate2: the same IDs, scores to 1e-4.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

if "--threads" in sys.argv:
    # Before jax is loaded, which counts the processors that it may use.
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(sys.argv[sys.argv.index("--threads") + 1])]))

import jax
import jax.numpy as jnp
import numpy as np
from shared.beams import random_ids, same, search
from shared.peer_process import PeerProcess
from shared.t5 import CONFIG, FIRST, LEVELS, SIZE, make_contexts, make_t5
from shared.timing import best_of, parser, report

from jaxrec.console import report_user_errors
from jaxrec.decoding import BeamResult, ItemFilter, Trie, beam_search, build_filter, build_trie
from jaxrec.models.encoder_decoder import EncoderDecoder
from jaxrec.models.huggingface import save_t5
from jaxrec.models.vocabulary import ContextTokens
from jaxrec.training.flops import matmul_flops

MODEL = EncoderDecoder(CONFIG)
QUICK = ((1, 10), (1, 50))
CASES = (*QUICK, (8, 50), (8, 512))
ITEMS = 100_000
END = 1
WIDTHS = (10, 32, 100, 256, 512)
GROWTH = (10_000, 10_000_000)


@partial(jax.jit, static_argnames="beam_width")
def search_freely(variables: dict, tokens: jax.Array, mask: jax.Array, trie: Trie, *, beam_width: int) -> BeamResult:
    """As CTranslate2 searches: any token at every level but the end, which is left out before the softmax."""
    model = EncoderDecoder(replace(CONFIG, levels=None))
    context = model.apply(variables, ContextTokens(tokens, mask), method="prefill")

    def extend(codes, cache, level):
        log_probs, cache = model.apply(variables, context, codes, cache, level, method="extend")
        return jax.nn.log_softmax(log_probs.at[..., END].set(-jnp.inf)), cache

    return beam_search(extend, None, trie, batch=len(tokens), beam_width=beam_width, constrained=False)


def main() -> None:
    """Runs itself once for each number of threads."""
    command = parser(__doc__)
    command.add_argument("--peers", metavar="PYTHON", help="an interpreter with torch, transformers and ctranslate2")
    command.add_argument("--threads", type=int, help="do one number of threads only")
    args = command.parse_args()
    if not args.threads:
        for threads in (2,) if args.quick else (1, 2):
            subprocess.run([sys.executable, *sys.argv, "--threads", str(threads)], check=True)
        return
    peak = matmul_peak()
    if args.peers:
        measure_peers(args.peers, args.threads, QUICK if args.quick else CASES, 3 if args.quick else 5, peak)
    measure_parts(args.threads, args.quick, peak)


def measure_peers(python: str, threads: int, cases: tuple, repeats: int, peak: float) -> None:
    """The rows against other libraries, of one number of threads."""
    codes = random_ids(ITEMS, SIZE, LEVELS)
    tokens = codes + FIRST + SIZE * np.arange(LEVELS)
    tries = build_trie(codes, (SIZE,) * LEVELS), build_trie(tokens, (CONFIG.vocabulary,) * LEVELS)
    variables = make_t5()
    contexts, mask = make_contexts(max(batch for batch, _ in cases))
    with tempfile.TemporaryDirectory() as folder:
        save_t5(Path(folder), CONFIG, variables["params"])
        np.save(Path(folder) / "contexts.npy", np.asarray(contexts, np.int64))
        np.save(Path(folder) / "ids.npy", tokens)
        peers = PeerProcess(
            python, "beam_peers.py", Path(folder), threads, "torch, transformers, ctranslate2, sentencepiece"
        )
        for batch, beams in cases:
            some = variables, contexts[:batch], mask[:batch]
            hold_equal(peers, some, tries, batch, beams)
            compare(peers, some, tries[0], batch, beams, threads, repeats, peak)
        peers.close()


def measure_parts(threads: int, quick: bool, peak: float) -> None:
    """The rows of ours alone: trie, filter, catalogue, beams."""
    batch, widths = (1, WIDTHS[:3]) if quick else (8, WIDTHS)
    fewer, more = (GROWTH[0], GROWTH[1] // 10) if quick else GROWTH
    small, trie, large = (
        build_trie(random_ids(count, SIZE, LEVELS), (SIZE,) * LEVELS) for count in (fewer, ITEMS, more)
    )
    built = [random_filter(one, batch) for one in (trie, large)]
    run = partial(search, MODEL, make_t5(), *make_contexts(batch), beam_width=widths[-1])
    calls = [partial(run, trie), partial(run, trie, constrained=False), partial(run, trie, built[0])]
    calls += [partial(run, small), partial(run, large), partial(run, large, built[1])]
    on, off, filtered, little, much, much_filtered = best_of(calls, 3)

    def name(items: int, beams: int) -> str:
        return f"items={items} B={batch} W={beams}, {threads} thread{'s' * (threads > 1)}"

    report("trie on and off", name(ITEMS, widths[-1]), on, off, "our unconstrained beam")
    report("filter on and off", name(ITEMS, widths[-1]), filtered, on, "no filter")
    report("filter on and off", name(more, widths[-1]), much_filtered, much, "no filter")
    report("catalogue growth", name(more, widths[-1]), much, little, f"items={fewer}")
    for beams, taken in zip(
        widths, best_of([partial(run, trie, beam_width=beams) for beams in widths], 3), strict=True
    ):
        share_of_peak(name(ITEMS, beams), taken, partial(run, trie, beam_width=beams), peak)


def random_filter(trie: Trie, batch: int) -> ItemFilter:
    """One that allows another half of the items to every request."""
    allowed = np.random.default_rng(1).integers(0, 2, (batch, trie.capacity), dtype=np.int8).astype(bool)
    return jax.jit(build_filter)(trie, jnp.asarray(allowed))


def hold_equal(peers: PeerProcess, some: tuple, tries: tuple[Trie, Trie], batch: int, beams: int) -> None:
    """AssertionError unless ours and each peer find the same IDs with the same scores."""
    ours = search(MODEL, *some, tries[0], beam_width=beams)
    same(
        ours.codes + FIRST + SIZE * np.arange(LEVELS), ours.log_probs, peers.ask(peer="trie", batch=batch, beams=beams)
    )
    free = search_freely(*some, tries[1], beam_width=beams)
    same(free.codes, free.log_probs, peers.ask(peer="ctranslate2", batch=batch, beams=beams))


def compare(
    peers: PeerProcess, some: tuple, trie: Trie, batch: int, beams: int, threads: int, repeats: int, peak: float
):
    """Times one case in turns."""
    times = {"trie": [], "ctranslate2": []}
    run = partial(search, MODEL, *some, trie, beam_width=beams)
    ours = []
    for turn in range(repeats):
        ours += best_of([run], 2)
        for name, taken in times.items():
            # What takes many seconds is not repeated.
            if not turn or min(taken) < 5000:
                taken.append(peers.ask(peer=name, batch=batch, beams=beams)["milliseconds"])
    case = f"B={batch} W={beams}, {threads} thread" + "s" * (threads > 1)
    report("trie on, against transformers", case, min(ours), min(times["trie"]), "generate, prefix_allowed_tokens_fn")
    report("trie on, against CTranslate2", case, min(ours), min(times["ctranslate2"]), "CTranslate2, unconstrained")
    share_of_peak(case, min(ours), run, peak)


def share_of_peak(case: str, milliseconds: float, function: Callable[[], BeamResult], peak: float) -> None:
    """The row of a search against its own FLOPs."""
    floor = 1e3 * matmul_flops(function) / peak
    share = {"share": round(floor / milliseconds, 3)}
    report("share of matmul peak", case, milliseconds, floor, "its FLOPs at the matmul peak", **share)


def matmul_peak() -> float:
    """FLOP/s of a large product."""
    square = jnp.ones((2048, 2048))
    return 2 * 2048**3 / best_of([jax.jit(lambda: square @ square)], 5)[0] * 1e3


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
