"""Related queries of prefixes: the look-up from fine to coarse, and a prefix never typed before.

    python benchmarks/related_queries.py [--quick] [--queries N] [--width D]

Queries with IDs of 4 x 512 codes, drawn so that some codes are far more frequent than others, and unit vectors around
what the codes stand for; prefixes near to one query each. The look-up takes 10 of at most 64 candidates a level,
screened by relevance and diversity. The peer of a look-up finds the 10 nearest of all queries: one matrix product with
all vectors and a partial sort, without IDs, popularity or diversity; and faiss's flat index, where it is installed.

A prefix never typed before is tokenized, encoded by MiniLM, quantized and looked up, alone; its peer is one that was
typed in training, whose embedding is at hand.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from shared.timing import best_of, parser, report

from jaxrec.console import report_user_errors
from jaxrec.semantic_ids import ResidualConfig, SemanticIdConfig
from jaxrec.semantic_ids.related_index import Screen, build_index
from jaxrec.semantic_ids.related_queries import RelatedQueriesConfig, load_related
from jaxrec.semantic_ids.related_writing import write_related
from jaxrec.text.encoder import EncoderConfig

try:
    import faiss
except ImportError:
    faiss = None

SIZES, SCREEN, PREFIXES = (512,) * 4, Screen(10, 64, 0.3, 0.95), 1000
PEER = "exact 10 nearest, NumPy"


def make_queries(count: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """IDs int32 [Q, 4], unit vectors f32 [Q, width] and counts int64 [Q]."""
    # The square of a uniform number: the first tenth of the codes holds a third of the queries.
    codes = np.stack([(size * rng.random(count) ** 2).astype(np.int32) for size in SIZES], axis=1)
    vectors = rng.normal(scale=0.2, size=(count, width)).astype(np.float32)
    for level, scale in enumerate((1.0, 0.6, 0.4, 0.3)):
        vectors += rng.normal(scale=scale, size=(SIZES[level], width)).astype(np.float32)[codes[:, level]]
    return codes, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), rng.zipf(1.5, count)


def look_up(count: int, width: int, repeats: int) -> None:
    """The rows of the look-up over `count` queries."""
    rng = np.random.default_rng(0)
    codes, vectors, counts = make_queries(count, width, rng)
    began = time.perf_counter()
    index = build_index(vectors, codes, SIZES, counts)
    seconds = time.perf_counter() - began
    near = rng.integers(0, count, PREFIXES)
    asked = codes[near]
    for level in (1, 2, 3):  # prefixes that share three codes, two, one with the query they are near to
        asked[level - 1 :: 4, level:] = rng.integers(0, 512, asked[level - 1 :: 4, level:].shape)
    typed = vectors[near] + rng.normal(scale=0.5 / width**0.5, size=(PREFIXES, width)).astype(np.float32)

    def nearest() -> np.ndarray:
        return np.concatenate([
            np.argpartition(-(rows @ vectors.T), SCREEN.count, axis=1)[:, : SCREEN.count]
            for rows in np.array_split(typed, 20)
        ])  # fmt: skip

    case = f"P={PREFIXES} Q={count} D={width}"
    peers: dict[str, Callable] = {PEER: nearest}
    if faiss is not None:
        flat = faiss.IndexFlatIP(width)
        flat.add(vectors)
        peers["exact 10 nearest, faiss"] = lambda: flat.search(typed, SCREEN.count)
    ours, *theirs = best_of([lambda: index.search(asked, typed, SCREEN), *peers.values()], repeats)
    found = (index.search(asked, typed, SCREEN) >= 0).mean()
    for name, peer in zip(peers, theirs, strict=True):
        report("related_look_up", case, ours, peer, name, index_seconds=round(seconds, 2), filled=round(found, 3))
    one, peer = best_of(
        [
            lambda: [index.search(asked[row : row + 1], typed[row : row + 1], SCREEN) for row in range(20)],
            lambda: [np.argpartition(-(typed[row] @ vectors.T), SCREEN.count) for row in range(20)],
        ],
        repeats,
    )
    report("related_look_up", f"P=1 Q={count} D={width}", one / 20, peer / 20, PEER)


def unseen(calls: int) -> None:
    """A prefix never typed before, against one of the log."""
    words = [f"{color} {thing}" for color in ("red", "blue", "green", "white") for thing in ("shoes", "lamp", "cup")]
    rows = [(user, 0, text[:4], text, "click") for user, text in enumerate(words)]
    names = ("user", "session", "prefix", "query", "feedback")
    table = pa.table(
        dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)) | {"split": ["train"] * len(rows)}
    )
    with tempfile.TemporaryDirectory() as folder:
        tables, made = Path(folder) / "tables", Path(folder) / "related"
        tables.mkdir()
        made.mkdir()
        pq.write_table(table, tables / "suggestions.parquet")
        pq.write_table(table.select(["prefix"]), tables / "prefixes.parquet")
        text = EncoderConfig(cache_dir=str(Path(folder) / "cache"))
        codes = SemanticIdConfig(ResidualConfig((4, 4)), None)
        write_related(tables, made, text, RelatedQueriesConfig(codes, remembered=0), seed=0)
        related = load_related(made, text)
        began = time.perf_counter()
        related.warm_up()
        seconds = time.perf_counter() - began

    def times(prefixes: list[str]) -> np.ndarray:
        taken = []
        for prefix in prefixes:
            began = time.perf_counter()
            related.related([prefix])
            taken.append(1e3 * (time.perf_counter() - began))
        return np.percentile(taken, [50, 99])

    typed = [f"{word[:length]}" for word in ("waterproof jacket", "espresso machine") for length in range(1, 16)]
    new = times([f"{prefix}{number}" for number in range(calls) for prefix in typed[number % 30 : number % 30 + 1]])
    seen = times([row[2] for row in rows] * (calls // len(rows) + 1))
    name = "a prefix of the log, not remembered"
    report("related_unseen", "one prefix, p50", new[0], seen[0], name, warm_up_seconds=round(seconds, 1))
    report("related_unseen", "one prefix, p99", new[1], seen[1], name)


def main() -> None:
    """Prints the rows."""
    command = parser(__doc__)
    command.add_argument("--queries", type=int, default=0, help="0: a million, with --quick 100,000")
    command.add_argument("--width", type=int, default=64)
    args = command.parse_args()
    look_up(args.queries or (100_000 if args.quick else 1_000_000), args.width, 1 if args.quick else 3)
    unseen(60 if args.quick else 600)


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
