"""What RankGR's rank head adds to a beam search, with four candidates for every beam that is kept.

    python benchmarks/rank_head.py [--quick]

Random parameters and 100,000 random IDs of 3 x 256 codes; contexts of 50 items are read within the time. Peer: the same
backbone and beams, chosen by likelihood alone. `bce` scores four times as many candidates as beams at every level
(lambda = 4 x beam); `softmax` scores them at the last one. One JSON line a row, both timed in turns, best of several.
"""

from functools import partial

import jax
import numpy as np
from shared.timing import best_of, parser, report

from jaxrec.data.features import AGES
from jaxrec.decoding import beam_search, build_trie
from jaxrec.models.causal import CausalConfig
from jaxrec.models.rankgr import RankConfig, RankGR, RankGRConfig
from jaxrec.systems.rankgr.model import RankGRAssembly, fit_vocabulary
from jaxrec.targets import SemanticIdSpace

SIZES, ITEMS, LENGTH, CANDIDATES = (256, 256, 256), 100_000, 50, 4
SMALL = CausalConfig(width=128, heads=4, groups=4, head_dim=32, hidden=256, layers=2, rotary_base=1e4)
LARGE = CausalConfig(width=256, heads=4, groups=2, head_dim=64, hidden=1024, layers=4, rotary_base=1e4)
HEADS = {
    "no rank head": RankConfig(loss="none"),
    "bce": RankConfig(loss="bce", hidden=128),
    "softmax": RankConfig(loss="softmax", temperature=0.08),
}


def make_search(backbone: CausalConfig, rank: RankConfig, batch: int, width: int):
    """A compiled search, of contexts that differ, without arguments."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, SIZES, (ITEMS, len(SIZES))).astype(np.int32)
    model = RankGR(RankGRConfig(fit_vocabulary(backbone, SIZES), rank=rank), ITEMS, 1, AGES)
    counts = np.ones(ITEMS, np.int64)
    one = np.zeros(1, int)
    assembly = RankGRAssembly(model, SemanticIdSpace(codes, SIZES), ("purchase",), one == 0, one, counts)
    served = assembly.serve(assembly.init(0)).replace(trie=build_trie(codes, SIZES))
    arrays = {
        "item": rng.integers(0, ITEMS, (batch, LENGTH)).astype(np.int32),
        "behavior": np.zeros((batch, LENGTH), np.int32),
        "gap": rng.integers(0, AGES, (batch, LENGTH)).astype(np.int32),
        "mask": np.ones((batch, LENGTH), bool),
    }
    ranked = {} if rank.loss == "none" else {"candidates": CANDIDATES * width}

    @jax.jit
    def search(served, arrays):
        context = assembly.context(served, arrays)
        return beam_search(
            partial(assembly.extend, served, context),
            None,
            served.trie,
            batch=batch,
            beam_width=width,
            rescore=assembly.rescore(served, context, 0.5 if rank.loss == "softmax" else 0.0),
            **ranked,
        )

    return partial(search, served, arrays)


def main() -> None:
    """Prints the rows."""
    quick = parser(__doc__).parse_args().quick
    for name, backbone in {"D=128, 2 layers": SMALL, "D=256, 4 layers": LARGE}.items():
        for batch, width in [(1, 32), (8, 32)] if quick else [(1, 32), (1, 128), (8, 32), (8, 128), (8, 512)]:
            searches = {head: make_search(backbone, rank, batch, width) for head, rank in HEADS.items()}
            plain, *times = best_of(list(searches.values()), 3 if quick else 7)
            for head, time in zip(list(HEADS)[1:], times, strict=True):
                case = f"{name}, B={batch} W={width} lambda={CANDIDATES * width}"
                report(f"beam with the rank head, {head}", case, time, plain, "the same beam without")


if __name__ == "__main__":
    main()
