"""Speed of OneSearch's parts.

    python benchmarks/onesearch.py [--peers PYTHON] [--quick]

The search: a BART of 4.6M parameters, 80 input tokens, IDs of five levels of 256 codes behind 1,000 tokens of text;
the encoding of the context included. All processors, best of several in turns, milliseconds a batch.

- trie on and off: over a million items (--quick: 100,000), each level normalised over its own codes
- with --peers, against transformers' `generate` with `prefix_allowed_tokens_fn` over 100,000 items, both normalised
  over the whole vocabulary: PYTHON is an interpreter with torch and transformers, in an environment of its own. Before
  anything is timed, both find the same IDs, with scores that agree to 1e-4.
"""

import os
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from shared.beams import random_ids, same, search
from shared.peer_process import PeerProcess
from shared.t5 import make_contexts, make_t5
from shared.timing import best_of, parser, report

from jaxrec.console import report_user_errors
from jaxrec.decoding import build_trie
from jaxrec.models.encoder_decoder import EncoderDecoder, bart_config
from jaxrec.models.huggingface import save_bart

TEXT, LEVELS, SIZE = 1000, 5, 256
CONFIG = bart_config(
    vocabulary=TEXT + LEVELS * SIZE,
    width=192,
    heads=4,
    head_dim=48,
    hidden=768,
    encoder_layers=4,
    layers=4,
    levels=tuple((TEXT + level * SIZE, SIZE) for level in range(LEVELS)),
    max_positions=128,
)
ITEMS, FEWER = 1_000_000, 100_000
WIDE, PEER_CASE = ((1, 512), (8, 512)), (8, 50)


def main() -> None:
    """All rows."""
    command = parser(__doc__)
    command.add_argument("--peers", metavar="PYTHON", help="an interpreter with torch and transformers")
    args = command.parse_args()
    measure_trie(args.quick)
    if args.peers:
        measure_transformers(args.peers, 3 if args.quick else 5)


def measure_trie(quick: bool) -> None:
    """What the trie costs the beam."""
    items, cases = (FEWER, WIDE[:1]) if quick else (ITEMS, WIDE)
    trie = build_trie(random_ids(items, SIZE, LEVELS), (SIZE,) * LEVELS)
    for batch, beams in cases:
        run = partial(
            search, EncoderDecoder(CONFIG), make_t5(config=CONFIG), *make_contexts(batch), trie, beam_width=beams
        )
        on, off = best_of([run, partial(run, constrained=False)], 3 if quick else 15)
        report("trie on and off", f"items={items} B={batch} W={beams}", on, off, "our unconstrained beam")


def measure_transformers(python: str, repeats: int) -> None:
    """The beam with the trie against transformers', which normalises over the whole vocabulary."""
    config, (batch, beams) = replace(CONFIG, restrict=False), PEER_CASE
    codes = random_ids(FEWER, SIZE, LEVELS)
    tokens = codes + TEXT + SIZE * np.arange(LEVELS)
    variables, (contexts, mask) = make_t5(config=config), make_contexts(batch)
    run = partial(
        search, EncoderDecoder(config), variables, contexts, mask, build_trie(codes, (SIZE,) * LEVELS), beam_width=beams
    )
    with tempfile.TemporaryDirectory() as folder:
        save_bart(Path(folder), config, variables["params"])
        np.save(Path(folder) / "contexts.npy", np.asarray(contexts, np.int64))
        np.save(Path(folder) / "ids.npy", tokens)
        threads = len(os.sched_getaffinity(0))
        peer = PeerProcess(python, "beam_peers.py", Path(folder), threads, "torch and transformers")
        found, ours, theirs = run(), [], []
        same(
            found.codes + TEXT + SIZE * np.arange(LEVELS),
            found.log_probs,
            peer.ask(peer="trie", batch=batch, beams=beams),
        )
        for _ in range(repeats):
            ours += best_of([run], 2)
            theirs.append(peer.ask(peer="trie", batch=batch, beams=beams)["milliseconds"])
        peer.close()
    name = f"items={FEWER} B={batch} W={beams}"
    report("trie on, against transformers", name, min(ours), min(theirs), "BART generate, prefix_allowed_tokens_fn")


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
