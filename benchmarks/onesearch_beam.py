"""What the trie changes in a trained run of a search system: quality, validity and time of the beam (OneSearch §3.3).

    python benchmarks/onesearch_beam.py --run runs/search [--beams 50,512] [--searches 1000] [--quick]

The same test searches, drawn by the seed of the run's evaluation, with the beams restricted to the catalogue (ours) and
free (peer), where answers that are no items are dropped. Validity: the share of items among the results of the free
beam. Quality: recall and MRR at 10, and recall at 350 where there are so many beams. Time: milliseconds a search in
batches of the run's size, best of two turns. Where queries are names of categories (Complete Journey, Beauty), a third
search is restricted to the items of the category by a filter. `peak memory` is the process's after the widest beam.
"""

import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from shared.timing import parser, report

from jaxrec.config import UserError
from jaxrec.console import report_user_errors
from jaxrec.data.words import normalised
from jaxrec.decoding.filters import Allowed, ItemOrder
from jaxrec.evaluation import Cases
from jaxrec.evaluation.metrics import mean, ranking_metrics
from jaxrec.programs import keep_compiled_programs
from jaxrec.run import Run
from jaxrec.systems import load_recommender
from jaxrec.systems.comparison import EvaluationConfig, cases_of, draw
from jaxrec.systems.recommender import GenerativeRecommender
from jaxrec.targets import Constrained

DEPTH, CUTOFFS = 350, (10, 350)


def main() -> None:
    """Prints the rows."""
    command = parser(__doc__)
    command.add_argument("--run", type=Path, required=True, help="a trained run")
    command.add_argument("--beams", default="50,512", help="numbers of beams, with commas between")
    command.add_argument("--searches", type=int, default=1000, help="searches that are measured")
    args = command.parse_args()
    beams = parse_beams(args.beams)[: 1 if args.quick else None]
    keep_compiled_programs()
    run, _ = Run.load(args.run)
    model = load_recommender(run)
    if model.required_text != "query":
        raise UserError(f"--run {args.run}: this is no run of a system that answers searches")
    cases = draw(cases_of(model.assembly, "test"), EvaluationConfig(max_users=64 if args.quick else args.searches))
    for width in beams:
        measure(run, model, cases, width)


def parse_beams(text: str) -> list[int]:
    """Numbers of beams. Raises UserError where one is no whole number above 0."""
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise UserError(f"--beams {text!r}: give whole numbers above 0 with commas between, such as 50,512")
    return [int(part) for part in parts]


def measure(run: Run, model: GenerativeRecommender, cases: Cases, width: int) -> None:
    """The rows of one number of beams."""
    case, depth = f"{len(cases)} searches, {width} beams", min(width, DEPTH)
    made = [with_beams(model, width, constrained) for constrained in ("listed", "free")]
    (on, fast), (off, slow) = (timed(each, cases, depth) for each in made)
    report("a search, trie on and off", case, fast, slow, "the free beam")
    validity = float((off[:, :10] >= 0).mean()), float((off >= 0).mean())
    shown = ("recall@10", "mrr@10", *([f"recall@{DEPTH}"] if depth == DEPTH else []))
    metrics = [quality(each, cases) for each in (on, off)]
    for name in shown:
        compare(f"{name}, trie on and off", case, *(each[name] for each in metrics), "the free beam", *validity)
    allowed = categories(run, made[0], cases)
    if allowed is not None:
        inside, seconds = timed(made[0], cases, depth, allowed)
        found = quality(inside, cases)
        for name in shown:
            compare(f"{name}, inside the category", case, found[name], metrics[0][name], "the whole catalogue")
        report("a search, inside the category", case, seconds, fast, "the whole catalogue")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"peak memory so far: {memory:,.0f} MiB", file=sys.stderr)


def with_beams(model: GenerativeRecommender, width: int, constrained: Constrained) -> GenerativeRecommender:
    """The same model with another beam."""
    config = replace(model.config, beam_width=width, beam_widths=(), candidates=(), constrained=constrained)
    return GenerativeRecommender(model.assembly, model.variables, model.feature_config, config)


def timed(
    model: GenerativeRecommender, cases: Cases, depth: int, allowed: list[Allowed] | None = None
) -> tuple[np.ndarray, float]:
    """The rankings int32 [U, depth], and milliseconds a search: the better of two turns after one that compiles."""
    batch, found = model.config.batch_size, []
    model.recommend(cases.histories[:batch], depth, allowed=None if allowed is None else allowed[:batch])
    for _ in range(2):
        start = time.perf_counter()
        ranked, _ = model.recommend(cases.histories, depth, allowed=allowed)
        found.append(1e3 * (time.perf_counter() - start) / len(cases))
    return ranked, min(found)


def quality(ranked: np.ndarray, cases: Cases) -> dict[str, float]:
    """Means of all metrics."""
    found = ranking_metrics(ranked, cases.targets, cases.where, CUTOFFS)
    return {name: mean(pair) for name, pair in found.items()}


def categories(run: Run, model: GenerativeRecommender, cases: Cases) -> list[Allowed] | None:
    """The items of the category that each query names; None where some query names none."""
    path = run.tables / "items.parquet"
    if "category" not in pq.read_schema(path).names:
        return None
    column = pq.read_table(path, columns=["category"])["category"].to_pylist()
    names = np.array([normalised(name or "") for name in column], object)
    asked = [normalised(history["query"]) for history in cases.histories]
    if not set(asked) <= set(names):
        return None
    order = ItemOrder(model.served.trie)
    masks = {name: order.allowed(order.mask(names == name)) for name in set(asked)}
    return [masks[name] for name in asked]


def compare(claim: str, case: str, ours: float, peer: float, peer_name: str, *validity: float) -> None:
    """A row of a metric; with the validity of the first 10 and of all results of the peer."""
    more = dict(zip(("validity@10", "validity"), validity, strict=False))
    if peer:
        report(claim, case, ours, peer, peer_name, "share", **more)


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
