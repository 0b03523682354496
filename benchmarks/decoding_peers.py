"""Constrained beam search on a T5 of 4.6M parameters against transformers and CTranslate2, with the same weights.

    python benchmarks/decoding_peers.py --peers PYTHON [--quick]

PYTHON is an interpreter with torch, transformers, ctranslate2 and sentencepiece, in an environment of its own. 80 input
tokens, IDs of four levels of 256 codes, 100,000 of them in the catalogue; log-probabilities are normalised over the
whole vocabulary of 1,100 tokens, as the peers do. Ours is always with the trie on. The peers are transformers with
`prefix_allowed_tokens_fn`, and CTranslate2, which knows no constraints: it finds any tokens. Before anything is timed,
ours with the trie is held to transformers with the constraint, and ours without to CTranslate2: the same IDs, scores to
1e-4. All take turns, one and two threads, best of several, milliseconds a batch. --quick: two threads, small beams.

Rows of claim `share of matmul peak` have the time that the FLOPs of the same search take at the measured peak as peer.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

if "--threads" in sys.argv:
    # Before jax is loaded, which counts the processors that it may use.
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(sys.argv[sys.argv.index("--threads") + 1])]))

import jax
import jax.numpy as jnp
import numpy as np
from shared.t5 import CONFIG, FIRST, LEVELS, SIZE, make_contexts, make_t5
from shared.timing import best_of, parser, report

from jaxrec.config import UserError
from jaxrec.decoding import BeamResult, Trie, beam_search, build_trie
from jaxrec.models.encoder_decoder import EncoderDecoder
from jaxrec.models.huggingface import save_t5
from jaxrec.run import report_user_errors
from jaxrec.training.flops import matmul_flops

QUICK = ((1, 10), (1, 50))
CASES = (*QUICK, (8, 50), (8, 512))
ITEMS = 100_000
END = 1


@partial(jax.jit, static_argnames="beam_width")
def search(variables: dict, tokens: jax.Array, mask: jax.Array, trie: Trie, *, beam_width: int) -> BeamResult:
    """The beams of every context, with the trie on."""
    model = EncoderDecoder(CONFIG)
    context = model.apply(variables, tokens, mask, method="prefill")

    def extend(codes, cache, level):
        return model.apply(variables, context, codes, cache, level, method="extend")

    return beam_search(extend, None, trie, batch=len(tokens), beam_width=beam_width)


@partial(jax.jit, static_argnames="beam_width")
def search_freely(variables: dict, tokens: jax.Array, mask: jax.Array, trie: Trie, *, beam_width: int) -> BeamResult:
    """As CTranslate2 searches: any token at every level but the end, which is left out before the softmax."""
    model = EncoderDecoder(replace(CONFIG, levels=None))
    context = model.apply(variables, tokens, mask, method="prefill")

    def extend(codes, cache, level):
        log_probs, cache = model.apply(variables, context, codes, cache, level, method="extend")
        return jax.nn.log_softmax(log_probs.at[..., END].set(-jnp.inf)), cache

    return beam_search(extend, None, trie, batch=len(tokens), beam_width=beam_width, constrained=False)


class Peers:
    """The process that the peers run in."""

    def __init__(self, python: str, folder: Path, threads: int):
        script = Path(__file__).parent / "shared" / "t5_peers.py"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
        self.process = subprocess.Popen(
            [python, script, folder, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=clean | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        self.answer()

    def answer(self) -> dict:
        """The next line that the process writes."""
        line = self.process.stdout.readline()
        if not line:
            raise UserError("the peers' process ended: --peers needs torch, transformers, ctranslate2, sentencepiece")
        return json.loads(line)

    def run(self, peer: str, batch: int, beams: int) -> dict:
        """One run of a peer."""
        print(json.dumps({"peer": peer, "batch": batch, "beams": beams}), file=self.process.stdin, flush=True)
        return self.answer()


def main() -> None:
    """Runs itself once for each number of threads."""
    command = parser(__doc__)
    command.add_argument("--peers", metavar="PYTHON", help="an interpreter with torch, transformers and ctranslate2")
    command.add_argument("--threads", type=int, help="do one number of threads only")
    args = command.parse_args()
    if not args.peers:
        raise UserError("--peers is missing: give the python of an environment with torch, transformers, ctranslate2")
    if args.threads:
        return measure(args.peers, args.threads, QUICK if args.quick else CASES, 3 if args.quick else 5)
    for threads in (2,) if args.quick else (1, 2):
        subprocess.run([sys.executable, *sys.argv, "--threads", str(threads)], check=True)


def measure(python: str, threads: int, cases: tuple, repeats: int) -> None:
    """All rows of one number of threads."""
    codes = np.unique(np.random.default_rng(0).integers(0, SIZE, (ITEMS, LEVELS)), axis=0)
    tokens = codes + FIRST + SIZE * np.arange(LEVELS)
    tries = build_trie(codes, (SIZE,) * LEVELS), build_trie(tokens, (CONFIG.vocabulary,) * LEVELS)
    variables = make_t5()
    contexts, mask = make_contexts(max(batch for batch, _ in cases))
    with tempfile.TemporaryDirectory() as folder:
        save_t5(Path(folder), CONFIG, variables["params"])
        np.save(Path(folder) / "contexts.npy", np.asarray(contexts, np.int64))
        np.save(Path(folder) / "ids.npy", tokens)
        peers = Peers(python, Path(folder), threads)
        peak = matmul_peak()
        for batch, beams in cases:
            some = variables, contexts[:batch], mask[:batch]
            hold_equal(peers, some, tries, batch, beams)
            compare(peers, some, tries[0], batch, beams, threads, repeats, peak)
        peers.process.stdin.close()


def hold_equal(peers: Peers, some: tuple, tries: tuple[Trie, Trie], batch: int, beams: int) -> None:
    """AssertionError unless ours and each peer find the same IDs with the same scores."""
    ours = search(*some, tries[0], beam_width=beams)
    same(ours.codes + FIRST + SIZE * np.arange(LEVELS), ours.log_probs, peers.run("trie", batch, beams))
    free = search_freely(*some, tries[1], beam_width=beams)
    same(free.codes, free.log_probs, peers.run("ctranslate2", batch, beams))


def same(tokens: jax.Array, scores: jax.Array, peer: dict) -> None:
    """Scores to 1e-4 in order; IDs as sets, where those that tie with the last within 1e-4 may differ."""
    scores, theirs = np.asarray(scores), np.array(peer["scores"])
    np.testing.assert_allclose(scores, theirs, atol=1e-4)
    for ours_row, their_row, row in zip(np.asarray(tokens), np.array(peer["tokens"]), scores, strict=True):
        clear = row > row[-1] + 2e-4
        ours_ids, their_ids = (set(map(tuple, ids.tolist())) for ids in (ours_row[clear], their_row))
        assert ours_ids <= their_ids, sorted(ours_ids - their_ids)[:3]


def compare(peers: Peers, some: tuple, trie: Trie, batch: int, beams: int, threads: int, repeats: int, peak: float):
    """Times one case in turns."""
    times = {"trie": [], "ctranslate2": []}
    run = partial(search, *some, trie, beam_width=beams)
    ours = []
    for turn in range(repeats):
        ours += best_of([run], 2)
        for name, taken in times.items():
            # What takes many seconds is not repeated.
            if not turn or min(taken) < 5000:
                taken.append(peers.run(name, batch, beams)["milliseconds"])
    case = f"B={batch} W={beams}, {threads} thread" + "s" * (threads > 1)
    report("trie on, against transformers", case, min(ours), min(times["trie"]), "generate, prefix_allowed_tokens_fn")
    report("trie on, against CTranslate2", case, min(ours), min(times["ctranslate2"]), "CTranslate2, unconstrained")
    floor = 1e3 * matmul_flops(partial(search, beam_width=beams), *some, trie) / peak
    share = {"share": round(floor / min(ours), 3)}
    report("share of matmul peak", case, min(ours), floor, "its FLOPs at the matmul peak", **share)


def matmul_peak() -> float:
    """FLOP/s of a large product."""
    square = jnp.ones((2048, 2048))
    return 2 * 2048**3 / best_of([jax.jit(lambda: square @ square)], 5)[0] * 1e3


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
