"""How good the semantic IDs of each quantizer are on a log with text: collisions, use of the codes, neighbours found.

    python benchmarks/id_tables.py DIR [--quick] [--published FILE]

DIR holds a log in the layout of S3-Rec, as for configs/onemall_beauty.py. Items are embedded by MiniLM and aligned on
95% of the Swing pairs of the train split (`text/align.py`), then quantized by each way below, which are those of
OneMall, OneSearch (Tables 2 and 3), OneSug and TIGER, with codebooks scaled down to the catalogue. Collisions are kept.
`ours` is the share of items whose ID another item has too; the peer is the same share under the ID table in FILE
(JSON: item -> list of codes), before a last level that only tells items apart, or under residual k-means 3 x 256.
Beside it:

    duplicate   1 - distinct IDs / items
    icr         IDs in use that belong to one item, as a share of the IDs in use (OneSearch)
    cur         prefixes in use over all that the codebooks can spell, level by level (OneSearch)
    largest     items under the most crowded ID
    error       share of the variance that the codes leave
    recall, mrr of the other item of a held-out pair among ten: the exact embedding of one is held against what the IDs
                of all others decode to, items of one ID in every order (OneSearch Table 3: query against item)

--quick: the seven of the first table that are not trained by gradient.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import numpy as np
from alignment import read
from shared.timing import parser, report

from jaxrec.config import UserError
from jaxrec.console import console, report_user_errors
from jaxrec.semantic_ids import FsqConfig, OpqConfig, ResidualConfig, RqVaeConfig, SemanticIdConfig
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.table.quality import collisions, independent_coding_rate, prefix_use, reconstruction_error
from jaxrec.semantic_ids.table.space import SemanticIds
from jaxrec.text.align import AlignConfig, align, apply_all
from jaxrec.text.encoder import embed_texts

FIRST = "residual k-means 3 x 256"
QUANTIZERS = {
    FIRST: SemanticIdConfig(ResidualConfig((256,) * 3), None),
    "the same, last level balanced": SemanticIdConfig(ResidualConfig((256,) * 3, balanced=(3,)), None),
    "the same, all levels balanced": SemanticIdConfig(ResidualConfig((256,) * 3, balanced=(1, 2, 3)), None),
    "RQ-VAE 3 x 256": SemanticIdConfig(RqVaeConfig((256,) * 3), None),
    "residual k-means 2 x 256 + FSQ 2^8": SemanticIdConfig(ResidualConfig((256,) * 2), FsqConfig((2,) * 8)),
    "residual k-means 2 x 256 + OPQ 2 x 16": SemanticIdConfig(ResidualConfig((256,) * 2), OpqConfig((16,) * 2)),
    "residual k-means 3 x 256 + OPQ 2 x 256": SemanticIdConfig(ResidualConfig((256,) * 3), OpqConfig((256,) * 2)),
    "residual k-means 4 x 256": SemanticIdConfig(ResidualConfig((256,) * 4), None),
}
"""Ways of one budget, 24 bits, and two of more."""
SIZES = {"64-64-64": (64, 64, 64), "128-64-32": (128, 64, 32), "256-64-16": (256, 64, 16), "256-64-32": (256, 64, 32)}
"""OneSearch's 1024-1024-1024, 2048-1024-512, 4096-1024-256 and 4096-1024-512, each level a sixteenth."""
LARGEST = "256-64-32"


def main() -> None:
    """Prints the rows."""
    command = parser(__doc__)
    command.add_argument("path", type=Path, metavar="DIR", help="the folder with the log")
    command.add_argument("--published", type=Path, metavar="FILE", help="an ID table of the same items, JSON")
    args = command.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        texts, pairs = read(args.path, Path(folder))
    text = embed_texts(texts)
    held_out = np.random.default_rng(0).random(len(pairs)) < 0.05
    params = align(jax.random.key(0), text, pairs[~held_out], AlignConfig(held_out=0.0)).params
    aligned, test = apply_all(params, text), np.concatenate([pairs[held_out], pairs[held_out][:, ::-1]])
    cases = {name: (aligned, config) for name, config in configurations(args.quick).items()}
    cases[f"{FIRST}, of texts not aligned"] = (text, QUANTIZERS[FIRST])
    peer = None if args.published is None else (args.published.stem, published_conflicts(args.published, len(text)))
    for name, (x, config) in cases.items():
        figures = measure(x, config, test)
        peer = peer or (FIRST, figures["conflict"])
        report("conflict rate", name, figures["conflict"], *reversed(peer), "share of items", **figures)
    recall, rank = found(aligned, np.arange(len(aligned)), aligned, test)
    report("recall@10", "aligned embeddings, not quantized", recall, recall, "itself", "share of pairs", mrr=rank)


def configurations(quick: bool) -> dict[str, SemanticIdConfig]:
    """What to fit, by name; those of OneSearch Table 2 in its order."""
    if quick:
        return {name: config for name, config in QUANTIZERS.items() if "RQ-VAE" not in name}
    table = {f"Table 2: {name}": SemanticIdConfig(ResidualConfig(sizes), None) for name, sizes in SIZES.items()}
    for levels, what in (((3,), "l3 balanced"), ((1, 2, 3), "all balanced")):
        config = ResidualConfig(SIZES[LARGEST], balanced=levels)
        table[f"Table 2: {LARGEST} {what}"] = SemanticIdConfig(config, None)
    last = ResidualConfig(SIZES[LARGEST], balanced=(3,))
    table["Table 3: RQ-VAE 256-64-32"] = SemanticIdConfig(RqVaeConfig(SIZES[LARGEST]), None)
    blocks = RqVaeConfig(SIZES[LARGEST], linear=False)
    table["Table 3: RQ-VAE 256-64-32, blocks alone as in the papers"] = SemanticIdConfig(blocks, None)
    table["Table 3: RQ-OPQ, l3 balanced + 16-16"] = SemanticIdConfig(last, OpqConfig((16, 16)))
    return QUANTIZERS | table


def measure(x: np.ndarray, config: SemanticIdConfig, test: np.ndarray) -> dict:
    """The figures of one way to quantize x f32 [I, D]; test: int [n, 2], who should find whom."""
    books = codebooks.fit(jax.random.key(0), x, config)
    codes = codebooks.encode_catalogue(books, x, config)
    space = SemanticIds(codes, books.sizes)
    recall, rank = found(codebooks.decode(books, space.ids), space.leaf, x, test)
    return id_figures(space) | {
        "error": round(reconstruction_error(codes, x, partial(codebooks.decode, books))[-1], 4),
        "recall@10": recall,
        "mrr@10": rank,
    }


def id_figures(space: SemanticIds) -> dict:
    """What the IDs alone tell."""
    shared = collisions(space.counts)
    return {
        "distinct": len(space.ids),
        "duplicate": round(shared["duplicate_rate"], 4),
        "conflict": round(shared["conflict_rate"], 4),
        "icr": round(independent_coding_rate(space.counts), 4),
        "cur": [float(f"{each['utilization']:.3g}") for each in prefix_use(space)],
        "largest": shared["largest_bucket"],
    }


def found(decoded: np.ndarray, leaf: np.ndarray, x: np.ndarray, test: np.ndarray) -> tuple[float, float]:
    """Recall@10 and MRR@10 of pairs int [n, 2]: whether x of the left finds the right among what the IDs decode to.

    decoded: f32 [distinct, D], what each ID stands for; leaf: int [I], the ID of each item. Items of one ID are found
    in every order, equally likely; the searching item takes no place.
    """
    counts = np.bincount(leaf, minlength=len(decoded))
    left, right = test.T
    distances = (decoded**2).sum(1) - 2 * x[left] @ decoded.T
    # The searching item is not among the items of its own ID.
    rows = np.arange(len(test))
    nearer = distances < distances[rows, leaf[right]][:, None]
    above = nearer @ counts - nearer[rows, leaf[left]]
    tied = counts[leaf[right]] - (leaf[left] == leaf[right])
    places = above[:, None] + 1 + np.arange(10)
    weight = (np.arange(10) < tied[:, None]) & (places <= 10)
    recall = (weight / tied[:, None]).sum(1).mean()
    rank = (weight / tied[:, None] / places).sum(1).mean()
    return round(float(recall), 4), round(float(rank), 4)


def published_conflicts(path: Path, items: int) -> float:
    """The share of conflicting items under a published table, without a last level that only tells items apart."""
    try:
        codes = np.array(list(json.loads(path.read_text()).values()), np.int64)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no ID table: expected JSON of item -> list of codes ({error})") from error
    if len(codes) != items:
        raise UserError(f"{path} has IDs of {len(codes)} items, but the log has {items}: they are not of one catalogue")
    counts = np.unique(codes, axis=0, return_counts=True)[1]
    if len(counts) == items:  # Told apart by a last level; what was there before it counts.
        counts = np.unique(codes[:, :-1], axis=0, return_counts=True)[1]
    return collisions(counts)["conflict_rate"]


if __name__ == "__main__":
    console.stderr = True
    sys.exit(report_user_errors(main))
