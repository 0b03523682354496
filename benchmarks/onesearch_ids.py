"""What keywords, balance and OPQ do to the IDs of items and queries: OneSearch's Tables 2 and 3.

    python benchmarks/onesearch_ids.py [--data DIR] [--seeds 0,1,2] [--quick]

The items of Complete Journey, or of a log in DIR (docs/sources.md), embedded by MiniLM with a projection that is
aligned on searches and item pairs (Eq. 1), with and without the keywords of --attributes (Eq. 2). Codebooks are scaled
down: each level has a sixteenth of the paper's codes. Collisions are kept. One JSON line a row, the mean over --seeds
of the quantizers; `ours` is ICR, the share of the IDs in use that belong to one item, the peer the same without
keywords, balance and OPQ. Items with equal texts have equal embeddings, as queries have; the last rows are aligned on
item pairs alone, and give each item a free vector besides (`AlignConfig`, the default of a run).

    cur          prefixes in use over all that the codebooks can spell: L1, L1*L2, ... total
    conflict     share of items whose ID another item has too
    recall, mrr  of the bought item among ten, over the searches of the test split: the exact embedding of the query is
                 held against what the IDs decode to, items of one ID in every order (Table 3)
    relevant     share of these ten whose category is that of the bought item

The queries of Complete Journey are derived from --queries: the query names the category (or type) of what was bought,
so recall depends on which item of it is found, and popularity plays no part here. --quick: one seed, Table 3 alone.
Figures are added to --out.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from id_tables import SIZES, id_figures
from shared import results
from shared.timing import parse_seeds, parser, report

from jaxrec.console import console, report_user_errors
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.query_pairs import has_searches
from jaxrec.data.sources import CompleteJourney, Folder
from jaxrec.data.words import normalised
from jaxrec.semantic_ids import RqVaeConfig, SemanticIdConfig, rq_opq
from jaxrec.semantic_ids.embeddings import embed_catalogue, embed_new, finetune_items
from jaxrec.semantic_ids.keyword_embeddings import enhance_catalogue, load_keywords
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.quantizers.residual import ResidualConfig
from jaxrec.semantic_ids.table.quality import reconstruction_error
from jaxrec.semantic_ids.table.space import SemanticIds
from jaxrec.text.align import AlignConfig
from jaxrec.text.encoder import EncoderConfig
from jaxrec.text.finetune import SearchFinetuneConfig
from jaxrec.text.keywords import KeywordConfig
from jaxrec.text.pair_batches import TermConfig, TermsConfig
from jaxrec.training.loop import LoopConfig

BATCHES = {"q2q": 256, "i2i": 256, "q2i": 256, "rank": 32}
LARGEST = "256-64-32"
PARTS = (16, 16)
KEYWORDS, BALANCED, OPQ = " + keywords", " + l3 balanced", " + OPQ 16-16"
FREE = ", free vectors"
ALIGNMENT = SearchFinetuneConfig(
    trains="projection",
    projection_width=64,
    terms=TermsConfig(**{name: TermConfig(batch_size=size, min_cosine=-1.0) for name, size in BATCHES.items()}),
    training=LoopConfig(steps=1000, log_every=200),
)


class Vectors(NamedTuple):
    """Embeddings of items f32 [I, D] and of queries f32 [Q, D]."""

    items: np.ndarray
    queries: np.ndarray


class Log(NamedTuple):
    """What is measured: the bought item of each test search int [n], its query int [n], the category of each item."""

    query: np.ndarray
    item: np.ndarray
    category: np.ndarray


def main() -> None:
    """Prints the rows."""
    command = parser(__doc__)
    command.add_argument("--data", type=Path, metavar="DIR", help="a folder with a log, in place of Complete Journey")
    command.add_argument("--queries", choices=("category", "product_type"), default="category")
    command.add_argument("--attributes", default="product_type,category,brand,package_size", metavar="A,B")
    command.add_argument("--seeds", default="0,1,2")
    command.add_argument("--out", type=Path, default=results.FOLDER)
    args = command.parse_args()
    seeds = [0] if args.quick else parse_seeds(args.seeds)
    source = Folder(path=args.data) if args.data else CompleteJourney(queries=args.queries)
    keywords = KeywordConfig(attributes=tuple(args.attributes.split(",")))
    with tempfile.TemporaryDirectory() as folder:
        tables = Path(folder) / "tables"
        tables.mkdir()
        prepare(source, PrepareConfig(), tables)
        vectors = {free: embeddings(tables, Path(folder) / f"ids{free}", keywords, free) for free in (False, True)}
        log = read_log(tables)
    peer = None
    for name, config in configurations(args.quick).items():
        of_case = vectors[FREE in name][KEYWORDS in name]
        rows = [measured(of_case, config, log, seed) for seed in seeds]
        average = {key: np.mean([row[key] for row in rows], axis=0) for key in rows[0]}
        shown = {key: np.round(value, 5).tolist() for key, value in average.items()}
        peer = peer or (name, shown["icr"])
        report("ICR", name, shown["icr"], *reversed(peer), "share of IDs", **shown)
        made = type(source).__name__ + (f", queries={args.queries}" if not args.data else "")
        results.append("onesearch_ids", list(entries(name, made, seeds, rows)), args.out)
    for free, both in vectors.items():
        for keyed, of_case in zip(("", KEYWORDS), both):
            distinct, leaf = np.unique(of_case.items, axis=0, return_inverse=True)
            space, found = SemanticIds(leaf[:, None], (len(distinct),)), search(distinct, leaf, of_case.queries, log)
            icr = id_figures(space)["icr"]
            report("ICR", f"not quantized{keyed}{FREE * free}", icr, *reversed(peer), "share of IDs", **found)


def configurations(quick: bool) -> dict[str, SemanticIdConfig]:
    """What to fit, by name: Table 2 in its order, then Table 3."""
    table = {}
    for name, sizes in SIZES.items():
        table[name] = table[name + KEYWORDS] = SemanticIdConfig(ResidualConfig(sizes), None)
    for name in ("256-64-16", LARGEST):
        table[name + KEYWORDS + BALANCED] = SemanticIdConfig(ResidualConfig(SIZES[name], balanced=(3,)), None)
    every = SemanticIdConfig(ResidualConfig(SIZES[LARGEST], balanced=(1, 2, 3)), None)
    table[f"{LARGEST}{KEYWORDS} + all balanced"] = every
    table3 = {
        LARGEST: SemanticIdConfig(ResidualConfig(SIZES[LARGEST]), None),
        LARGEST + KEYWORDS + BALANCED: table[LARGEST + KEYWORDS + BALANCED],
        LARGEST + BALANCED + OPQ: rq_opq(SIZES[LARGEST], PARTS),
        LARGEST + KEYWORDS + BALANCED + OPQ: rq_opq(SIZES[LARGEST], PARTS),
    }
    if quick:
        return table3
    table3 |= {name + FREE: config for name, config in table3.items()}
    return table | table3 | {f"RQ-VAE {LARGEST}{KEYWORDS}": SemanticIdConfig(RqVaeConfig(SIZES[LARGEST]), None)}


def embeddings(tables: Path, folder: Path, keywords: KeywordConfig, free: bool) -> tuple[Vectors, Vectors]:
    """The embeddings without and with keywords; free: aligned on item pairs alone, with a free vector an item."""
    folder.mkdir()
    text, key, work = EncoderConfig(), jax.random.key(0), folder.with_name("alignment")
    align = AlignConfig() if free or not has_searches(tables) else ALIGNMENT
    tuned = finetune_items(tables, work, text, align, seed=0) if align is ALIGNMENT else None
    own, _, aligned = embed_catalogue(key, tables, folder, text, align, tuned)
    console.print(f"alignment: {aligned}", markup=False)
    enhanced, figures = enhance_catalogue(tables, folder, own, text, keywords)
    queries: list[str] = []
    if has_searches(tables):
        queries = [normalised(query) for query in pq.read_table(tables / "queries.parquet")["query"].to_pylist()]
    of_queries = embed_new(folder, queries) if queries else np.zeros((0, own.shape[1]), np.float32)
    console.print(f"keywords: {figures}", markup=False)
    of_keywords = load_keywords(folder)
    return Vectors(own, of_queries), Vectors(enhanced, of_keywords.of_queries(of_queries, queries))


def read_log(tables: Path) -> Log:
    """The items that searches of the test split led to."""
    items = pq.read_table(tables / "items.parquet")
    category = items["category"].to_pylist() if "category" in items.column_names else [""] * len(items)
    category = np.unique([each or "" for each in category], return_inverse=True)[1]
    if not has_searches(tables):
        return Log(np.zeros(0, np.int64), np.zeros(0, np.int64), category)
    test = (pc.field("split") == "test") & (pc.field("search") >= 0)
    events = pq.read_table(tables / "events.parquet", columns=["item", "search", "split"], filters=test)
    events = events.group_by(["search", "item"]).aggregate([]).sort_by([("search", "ascending"), ("item", "ascending")])
    query = pq.read_table(tables / "searches.parquet", columns=["query_index"])["query_index"]
    return Log(query.take(events["search"].cast(pa.int64())).to_numpy(), events["item"].to_numpy(), category)


def measured(vectors: Vectors, config: SemanticIdConfig, log: Log, seed: int) -> dict[str, Any]:
    """The figures of one way to quantize."""
    begin = time.monotonic()
    books = codebooks.fit(jax.random.key(seed), vectors.items, config)
    codes = codebooks.encode_catalogue(books, vectors.items, config)
    space, decode = SemanticIds(codes, books.sizes), partial(codebooks.decode, books)
    figures = id_figures(space) | {"error": reconstruction_error(codes, vectors.items, decode)[-1]}
    figures |= search(decode(space.ids), space.leaf, vectors.queries, log)
    return figures | {"query_ids": query_ids(books, vectors.queries), "seconds": time.monotonic() - begin}


def query_ids(books: codebooks.Codebooks, queries: np.ndarray) -> float:
    """Distinct IDs of queries, as a share of the queries."""
    return len(np.unique(codebooks.encode(books, queries), axis=0)) / max(len(queries), 1)


def search(decoded: np.ndarray, leaf: np.ndarray, queries: np.ndarray, log: Log, rows: int = 256) -> dict[str, float]:
    """Recall, MRR and relevance at 10 of test searches, whose queries are held against decoded IDs f32 [distinct, D].

    leaf: int [I], the ID of each item. Items of one ID are found in every order, equally likely.
    """
    if not len(log.query):
        return {}
    counts = np.bincount(leaf, minlength=len(decoded))
    of_category = np.zeros((len(decoded), log.category.max() + 1), np.float32)
    np.add.at(of_category, (leaf, log.category), 1)
    asked, place = np.unique(log.query, return_inverse=True)
    total = np.zeros(3)
    squares = (decoded**2).sum(1)
    for start in range(0, len(asked), rows):
        some = np.flatnonzero((place >= start) & (place < start + rows))
        order = np.argsort(squares - 2 * queries[asked[start : start + rows]] @ decoded.T, axis=1, kind="stable")
        above = np.cumsum(counts[order], axis=1) - counts[order]
        taken = np.clip(10 - above, 0, counts[order]) / counts[order]
        rank = np.argsort(order, axis=1)
        mine = place[some] - start
        before = above[mine, rank[mine, leaf[log.item[some]]]]
        tied = counts[leaf[log.item[some]]]
        places = before[:, None] + 1 + np.arange(10)
        weight = ((np.arange(10) < tied[:, None]) & (places <= 10)) / tied[:, None]
        first = order[:, :10]  # an ID has one item or more
        share = np.einsum("qk,qkc->qc", taken[:, :10], of_category[first]) / 10
        total += weight.sum(), (weight / places).sum(), share[mine, log.category[log.item[some]]].sum()
    return dict(zip(("recall@10", "mrr@10", "relevant@10"), (total / len(log.query)).tolist()))


def entries(name: str, data: str, seeds: list[int], rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The results to keep: a run a seed."""
    for seed, row in zip(seeds, rows):
        flat = {key: value for key, value in row.items() if key not in ("cur", "seconds")}
        flat |= {f"cur_{level + 1}": value for level, value in enumerate(row["cur"])}
        kept = [
            {"split": "test", "subset": "all", "metric": metric, "value": round(float(value), 6)}
            for metric, value in flat.items()
        ]
        yield {"model": name, "seed": seed, "data": data, "seconds": round(row["seconds"], 1), "rows": kept}


if __name__ == "__main__":
    console.stderr = True
    sys.exit(report_user_errors(main))
