"""What the parts of OneSug's prefix2query enhancement bring: how often the chosen query is among the related ones.

    python benchmarks/related_answers.py [--clicks FILE] [--steps N] [--quick]

The synthetic mall, or clicks of a search as configs/onesearch_bestbuy.py reads them, with a prefix cut from every query
(nobody typed it). For each prefix of the last days ten related queries are looked up; `ours` is the share of prefixes
whose query is among them. Rows:

    as published        Eq. 2, RQ-VAE of 4 x 512 codes (--sizes), the look-up from fine to coarse; MiniLM as it came
    aligned             the encoder aligned on prefixes and queries before (Eq. 1): a projection of its vectors, or,
                        with --encoder, the encoder itself
    without Eq. 2       prefixes have their own embeddings
    without IDs         the ten nearest of all queries to the same embeddings, screened by relevance and diversity

`train` is the share over the training examples as a training reads them, `with_itself` with what their own sessions
told. Figures are added to --out. --quick: a mall of 60 users, the first row alone.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from shared import results
from shared.timing import parser, report

from jaxrec.console import report_user_errors
from jaxrec.data.prefix_cuts import PrefixCutConfig
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.sources import ClickLog, SyntheticMall
from jaxrec.data.suggestion_log import read_suggestions
from jaxrec.files import read_json
from jaxrec.semantic_ids import RqVaeConfig, SemanticIdConfig
from jaxrec.semantic_ids.related_queries import RelatedQueries, RelatedQueriesConfig, load_related
from jaxrec.semantic_ids.related_writing import MEASURED, write_related
from jaxrec.text.align import evenly
from jaxrec.text.encoder import EncoderConfig
from jaxrec.text.finetune import SuggestionFinetuneConfig
from jaxrec.text.pair_batches import TermConfig, TermsConfig
from jaxrec.text.prefixes import PrefixConfig
from jaxrec.text.suggestions import finetune_suggestions
from jaxrec.training.loop import LoopConfig

PUBLISHED = "as published"


def main() -> None:
    """Prints the rows."""
    command = parser(__doc__)
    command.add_argument("--clicks", type=Path, metavar="FILE", help="in place of the mall")
    command.add_argument("--sizes", default="512,512,512,512", help="codes of each level; the mall: 16,16,16,16")
    command.add_argument("--steps", type=int, default=500, help="steps of the alignment")
    command.add_argument("--encoder", action="store_true", help="align the encoder itself too")
    command.add_argument("--out", type=Path, default=results.FOLDER)
    args = command.parse_args()
    sizes = tuple(int(size) for size in args.sizes.split(",")) if args.clicks else (16,) * 4
    with tempfile.TemporaryDirectory() as folder:
        tables = Path(folder) / "tables"
        tables.mkdir()
        data = make_tables(tables, args.clicks, args.quick)
        peer, kept = None, []
        for name, made, seconds in variants(tables, Path(folder), sizes, args):
            figures = read_json(made / "quality.json")["answers"]
            peer = peer or figures["held_out"]
            shown = {part: round(value, 4) for part, value in figures.items()}
            report("related_answers", name, shown["held_out"], peer, PUBLISHED, "share of prefixes", **shown)
            nearest = {"held_out": nearest_answers(tables, load_related(made))}
            name_of = f"{name}, without IDs"
            report("related_answers", name_of, nearest["held_out"], peer, PUBLISHED, "share of prefixes")
            kept += [entry(name, data, seconds, figures), entry(name_of, data, seconds, nearest)]
    if not args.quick:
        results.append("related_answers", kept, args.out)


def make_tables(folder: Path, clicks: Path | None, quick: bool) -> str:
    """Prepares the log; returns its name."""
    if clicks is None:
        users, tastes = (60, 10) if quick else (400, 60)
        mall = SyntheticMall(
            users, 10 * tastes, tastes, 4, 8, browsed_per_session=1, exposures_per_session=1, searched=0.8
        )
        prepare(mall, PrepareConfig(), folder)
        return "the mall"
    source = ClickLog(clicks, time="query_time", event_time="click_time", item="sku")
    prepare(source, PrepareConfig(suggestions=PrefixCutConfig(shown=0, not_shown=0, random=0)), folder)
    return clicks.name


def variants(
    tables: Path, folder: Path, sizes: tuple[int, ...], args: Any
) -> Iterator[tuple[str, RelatedQueries, float]]:
    """The name of each row, the folder of its related queries, and the seconds that they took to make."""
    ids = SemanticIdConfig(RqVaeConfig(sizes, **({"steps": 100, "warm_steps": 50} if args.quick else {})), None)
    config, text = RelatedQueriesConfig(ids), EncoderConfig()

    def made(name: str, config: RelatedQueriesConfig, tuned: Path | None = None) -> tuple[str, Path, float]:
        began, place = time.monotonic(), folder / f"related-{name}"
        place.mkdir()
        write_related(tables, place, text, config, 0, tuned)
        return name, place, time.monotonic() - began

    yield made(PUBLISHED, config)
    if args.quick:
        return
    yield made("without Eq. 2", replace(config, prefixes=PrefixConfig(weight=1e-6)))
    for trains in ("projection", *(["encoder"] if args.encoder else [])):
        tuned = finetune_suggestions(tables, folder / trains, text, alignment(trains, args.steps), seed=0)
        yield made(f"aligned {trains}", config, tuned)


def alignment(trains: str, steps: int) -> SuggestionFinetuneConfig:
    """A projection is cheap: it has larger batches."""
    p2q = TermConfig(batch_size=256 if trains == "projection" else 32, min_cosine=-1.0)
    terms = TermsConfig(p2q=p2q, q2q=replace(p2q, min_cosine=0.6))
    return SuggestionFinetuneConfig(trains=trains, terms=terms, training=LoopConfig(steps=steps, log_every=100))


def nearest_answers(tables: Path, related: RelatedQueries) -> float:
    """The share of held-out prefixes whose query is among the nearest of all queries, screened as the related ones."""
    limits, all_vectors = related.config, related.index.vectors
    chosen = limits.prefixes.feedback
    typed = read_suggestions(tables, "valid", chosen)
    typed = typed.filter(pc.equal(typed["feedback"], chosen[0]))
    typed = typed.take(evenly(np.arange(len(typed)), MEASURED))
    hits = 0
    for vector, answer in zip(related.embeddings(typed["prefix"].to_pylist()), typed["query"].to_pylist(), strict=True):
        cosine = all_vectors @ (vector / max(np.linalg.norm(vector), 1e-12))
        taken: list[int] = []
        for row in np.argsort(-cosine, kind="stable"):
            if len(taken) == limits.related or cosine[row] < limits.min_cosine:
                break
            if not taken or (all_vectors[taken] @ all_vectors[row]).max() <= limits.max_cosine:
                taken.append(int(row))
        hits += answer in {related.texts[row] for row in taken}
    return hits / len(typed)


def entry(name: str, data: str, seconds: float, figures: dict[str, float]) -> dict[str, Any]:
    """The result to keep."""
    rows = [
        {"split": "valid" if part == "held_out" else "train", "subset": part, "metric": "answers", "value": value}
        for part, value in figures.items()
    ]
    return {"model": name, "seed": 0, "data": data, "seconds": round(seconds, 1), "rows": rows}


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
