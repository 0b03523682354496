"""OneSearch and what each of its parts brings: Tables 2, 5, 6 and 7, on any log with searches.

    python benchmarks/onesearch_ablation.py [--config configs/onesearch.py] [--data path=FILE ...]
        [--variants whole,no_short] [--seeds 0,1,2] [--quick]

A variant is the configuration with one part taken out (`VARIANTS`); "whole" is the configuration as it is. All variants
are trained with the same seeds, steps and schedule, and measured on validation and test. --data sets fields of the
configuration's source, such as `path`. Runs keep their folders (--runs), so that the same command goes on where it was
stopped and trains nothing twice. Rows {split, subset, metric, value, count} of the model and of the baselines are added
to benchmarks/results/onesearch.json with seed, seconds, command, commit and device; a table of test rows is printed.
--quick: few steps and searches, only to see that everything works; not kept.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared import results
from shared.ablation import parse_variants, table_of, with_files
from shared.timing import parse_seeds, parser

from jaxrec.config import UserError, load_config
from jaxrec.console import console, report_user_errors
from jaxrec.files import read_json
from jaxrec.programs import keep_compiled_programs
from jaxrec.run import Run
from jaxrec.semantic_ids.quantizers.codebooks import SemanticIdConfig
from jaxrec.systems import check, load_recommender, train
from jaxrec.systems.comparison import compare
from jaxrec.systems.onesearch.config import OneSearchConfig

ROOT = Path(__file__).parent.parent
SHOWN = (
    ("all", "recall@10"),
    ("all", "mrr@10"),
    ("new", "recall@10"),
    ("new", "mrr@10"),
    ("unseen_queries", "recall@10"),
)
QUICK_STEPS, QUICK_SEARCHES = 4, 40


def part(name: str, **changes: Any) -> Callable[[OneSearchConfig], OneSearchConfig]:
    """The configuration with other values in one of its parts."""
    return lambda config: replace(config, **{name: replace(getattr(config, name), **changes)})


def ids(change: Callable[[SemanticIdConfig], SemanticIdConfig]) -> Callable[[OneSearchConfig], OneSearchConfig]:
    """The configuration with other semantic IDs."""
    return lambda config: replace(config, semantic_ids=change(config.semantic_ids))


VARIANTS: dict[str, Callable[[OneSearchConfig], OneSearchConfig]] = {
    "whole": lambda config: config,
    "hashed_user_ids": part("prompt", user_ids="hashed"),
    "no_user_ids": part("prompt", user_ids="none"),
    "no_short": part("features", recent_queries=0, recent_items=0),
    "no_long": part("prompt", long_queries=0),
    "no_window": part("objective", windowed=0.0),
    "no_keywords": lambda config: replace(config, keywords=None),
    "no_balance": ids(lambda config: replace(config, hierarchy=replace(config.hierarchy, balanced=()))),
    "no_opq": ids(lambda config: replace(config, remainder=None)),
    "no_copying": part("prompt", copying=False),
    "generated_alone": lambda config: replace(
        config,
        prompt=replace(config.prompt, copying=False, long_queries=0, user_ids="none", query_ids=False),
        prior=False,
    ),
}
"""Table 6: user IDs, short and long sequences, window; Tables 2 and 7: keywords, balance, OPQ; the rest is ours.
"generated_alone" is TIGER given the query: IDs, the query's words and the last items, nothing else."""


def main() -> None:
    """Trains what is not trained yet; keeps and prints the rows."""
    command = parser(__doc__)
    command.add_argument("--config", type=Path, default=ROOT / "configs" / "onesearch.py")
    command.add_argument("--data", nargs="*", default=[], metavar="FIELD=FILE", help="fields of the source")
    command.add_argument("--variants", default="whole", help=f"some of {', '.join(VARIANTS)}, with commas between")
    command.add_argument("--seeds", default="0", help="whole numbers, with commas between")
    command.add_argument(
        "--runs", type=Path, default=Path("runs/onesearch_ablation"), help="where run folders are kept"
    )
    args = command.parse_args()
    variants, seeds = parse_variants(args.variants, VARIANTS), parse_seeds(args.seeds)
    base = with_data(load_config(args.config), args.data, args.quick)
    keep_compiled_programs()
    entries = []
    for seed in seeds:
        for name in variants:
            console.rule(f"{args.config.stem}, {name}, seed {seed}")
            config = replace(VARIANTS[name](base), seed=seed)
            entry = measured(args.runs / f"{args.config.stem}-{name}-{seed}{'-quick' * args.quick}", config)
            entries.append({"model": name, "seed": seed, "data": args.config.stem, **entry})
            if not args.quick:
                results.append("onesearch", entries[-1:])
    console.print(table_of(entries, base.system, SHOWN))


def with_data(config: Any, pairs: list[str], quick: bool) -> OneSearchConfig:
    """The configuration with the given files, and with few steps and searches where it shall be quick."""
    if not isinstance(config, OneSearchConfig):
        raise UserError(f"--config: this is a configuration of {config.system}; give one of onesearch")
    config = with_files(config, pairs)
    if not quick:
        return config
    steps = {"steps": QUICK_STEPS, "checkpoint_every": QUICK_STEPS, "evaluate_every": 0, "log_every": 1}
    shorter = {
        name: replace(getattr(config, name), training=replace(getattr(config, name).training, **steps),
                      optim=replace(getattr(config, name).optim, warmup=1))
        for name in ("content", "co_occurrence")
    }  # fmt: skip
    config = replace(config, **shorter, optim=replace(config.optim, warmup=1))
    evaluation = replace(config.evaluation, max_users=QUICK_SEARCHES, cutoffs=(10,))
    return replace(config, training=replace(config.training, **steps), evaluation=evaluation)


def measured(folder: Path, config: OneSearchConfig) -> dict[str, Any]:
    """Trains a run if it is not trained, and measures it: {"seconds", "rows"}, of the model alone and of baselines."""
    check(folder, config)
    run, start = Run.open(folder, config), time.monotonic()
    train(run, config)
    seconds = round(time.monotonic() - start, 1)
    rows = read_json(run.path / "evaluation.json")
    validation = run.path / "validation"
    if not (validation / "evaluation.json").exists():
        validation.mkdir(exist_ok=True)
        compare(run, load_recommender(run), replace(config.evaluation, split="valid", baselines=False), validation)
    return {"seconds": seconds, "rows": rows + read_json(validation / "evaluation.json")}


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
