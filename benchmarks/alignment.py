"""Aligned embeddings find held-out Swing pairs better than the encoder's own.

    python benchmarks/alignment.py DIR [--quick]

DIR holds a log in the layout of S3-Rec, as for configs/onemall_beauty.py. Recall@50 of held-out pairs (5%), training
partners left out, of the whole catalogue: the projection of `text/align.py`, with and without a free vector an item.
Of the items that are in most pairs: a projection, and MiniLM fine-tuned for 50 steps, both by `text/finetune.py`.
--quick leaves that out. The peer is MiniLM as it is. One JSON line a row; ratio = ours / peer.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
from shared.timing import parser, report

from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.sources import SequenceText
from jaxrec.text.align import AlignConfig, align, apply_all, pair_recall
from jaxrec.text.encoder import EncoderConfig, embed_texts
from jaxrec.text.finetune import FinetuneConfig, finetune
from jaxrec.text.pair_batches import TermConfig, TermsConfig, TextPairs
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

ITEMS = 500
TERMS = TermsConfig(i2i=TermConfig(batch_size=32, min_cosine=-1.0))
ENCODER = FinetuneConfig(
    terms=TERMS,
    held_out=0.15,
    optim=OptimConfig(learning_rate=5e-5, warmup=10, b2=0.999),
    training=LoopConfig(steps=50, log_every=10),
)
PROJECTION = replace(ENCODER, trains="projection", training=LoopConfig(steps=1000, log_every=100))


def read(path: Path, folder: Path) -> tuple[list[str], np.ndarray]:
    """The texts of the items, and their Swing pairs int [n, 2] from the train split."""
    prepare(SequenceText(path=path), PrepareConfig(), folder)
    pairs = pq.read_table(folder / "pairs.parquet")
    swing = pairs.filter(np.array(pairs["kind"].to_pylist()) == "swing")
    return pq.read_table(folder / "items.parquet")["text"].to_pylist(), np.stack(
        [swing["item"], swing["other"]], axis=1
    )


def recall(vectors: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Recall@50 of held-out pairs, both ways."""
    both_ways = [np.concatenate([pairs, pairs[:, ::-1]]) for pairs in (test, train)]
    return pair_recall(vectors, *both_ways, k=50, most=2 * len(test))


def compare_projection(text: np.ndarray, pairs: np.ndarray) -> None:
    held_out = np.random.default_rng(0).random(len(pairs)) < 0.05
    train, test = pairs[~held_out], pairs[held_out]
    raw = recall(text, train, test)
    for name, config in (
        ("principal components, not trained", AlignConfig(epochs=0, item_residual=False)),
        ("projection", AlignConfig(item_residual=False)),
        ("projection + a free vector an item", AlignConfig()),
    ):
        start = time.perf_counter()
        params = align(jax.random.key(0), text, train, replace(config, held_out=0.0)).params
        seconds = round(time.perf_counter() - start, 1)
        case = f"{len(text)} items, {len(train)} pairs: {name}"
        report(
            "alignment", case, recall(apply_all(params, text), train, test), raw, "MiniLM", "recall@50", seconds=seconds
        )


def densest(pairs: np.ndarray, items: int) -> tuple[np.ndarray, np.ndarray]:
    """The items that are in most pairs, int [ITEMS], and the pairs among them by their places there."""
    chosen = np.argsort(-np.bincount(pairs.ravel(), minlength=items), kind="stable")[:ITEMS]
    place = np.full(items, -1)
    place[chosen] = np.arange(ITEMS)
    inside = place[pairs]
    return chosen, inside[(inside >= 0).all(1)]


def compare_finetuning(texts: list[str], pairs: np.ndarray, folder: Path) -> None:
    chosen, inside = densest(pairs, len(texts))
    given = {"i2i": TextPairs(*inside.T)}
    for name, config in (("projection, 1000 steps", PROJECTION), ("MiniLM fine-tuned, 50 steps", ENCODER)):
        start = time.perf_counter()
        work = folder / config.trains
        figures = finetune([texts[i] for i in chosen], given, config, EncoderConfig(max_tokens=32), work).metrics
        seconds = round(time.perf_counter() - start, 1)
        case = f"{ITEMS} items, {figures['i2i_pairs']} pairs: {name}"
        before, after = figures["i2i_recall@50_before"], figures["i2i_recall@50_after"]
        report("finetuning", case, after, before, "MiniLM", "recall@50", seconds=seconds)


def main() -> None:
    command = parser(__doc__)
    command.add_argument("path", type=Path, metavar="DIR", help="the folder with the log")
    arguments = command.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        texts, pairs = read(arguments.path, Path(folder))
        compare_projection(embed_texts(texts), pairs)
        if not arguments.quick:
            compare_finetuning(texts, pairs, Path(folder))


if __name__ == "__main__":
    main()
