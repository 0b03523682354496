"""Ranking models side by side: AUC of DCN-v2, DIN and SIM on one log, with and without their parts.

    python benchmarks/ranking.py [--config configs/ranking_mall_long.py] [--variants sim,din] [--seeds 0,1,2] [--quick]

A variant is the configuration with another model or without one of its inputs (`VARIANTS`). All are trained with the
same seeds, steps and schedule, and judged on the test split's impressions. Runs keep their folders (--runs), so that
the same command goes on where it was stopped and trains nothing twice. Rows {split, subset, metric, value, count} are
added to benchmarks/results/ranking.json with seed, seconds, command, commit and device; a table of means is printed.
--quick: few steps, only to see that everything works; not kept.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from shared import results
from shared.timing import parse_seeds, parser

from jaxrec.config import UserError, load_config
from jaxrec.console import console, report_user_errors
from jaxrec.evaluation.comparison import IMPRESSIONS
from jaxrec.files import read_json
from jaxrec.models.ranking.dcn import DcnConfig
from jaxrec.models.ranking.din import DinConfig
from jaxrec.models.ranking.sim import SimConfig
from jaxrec.programs import keep_compiled_programs
from jaxrec.run import Run
from jaxrec.systems import check, train
from jaxrec.systems.ranking.config import CASCADE, RANKING, CascadeConfig

ROOT = Path(__file__).parent.parent
SHOWN = (("ctcvr", "auc"), ("ctcvr", "gauc"), ("ctcvr", "log_loss"), ("ctr", "auc"), ("ctr", "gauc"), ("ctr", "ece"))
QUICK_STEPS = 4


def inputs(**changes: Any) -> Callable[[CascadeConfig], CascadeConfig]:
    """The configuration with other inputs of the ranking model."""
    return lambda config: with_ranking(config, inputs=replace(config.ranking.inputs, **changes))


def with_ranking(config: CascadeConfig, **changes: Any) -> CascadeConfig:
    """The configuration with other values in its ranking model."""
    return replace(config, ranking=replace(config.ranking, **changes))


VARIANTS: dict[str, Callable[[CascadeConfig], CascadeConfig]] = {
    "whole": lambda config: config,
    "dcn": lambda config: with_ranking(config, model=DcnConfig()),
    "din": lambda config: with_ranking(config, model=DinConfig()),
    "sim": lambda config: with_ranking(config, model=SimConfig()),
    "sim_product": lambda config: with_ranking(config, model=SimConfig("product")),
    "dcn_crosses": lambda config: inputs(crosses=True)(with_ranking(config, model=DcnConfig())),
    "din_crosses": lambda config: inputs(crosses=True)(with_ranking(config, model=DinConfig())),
    "sim_crosses": lambda config: inputs(crosses=True)(with_ranking(config, model=SimConfig())),
    "no_counts": inputs(counts=False),
    "no_ids": inputs(ids=False),
    "no_codes": inputs(codes=False),
    "three_towers": lambda config: with_ranking(config, towers=("ctr", "cvr", "ctcvr", "price")),
}


def main() -> None:
    """Trains what is not trained yet; keeps and prints the rows."""
    command = parser(__doc__)
    command.add_argument("--config", type=Path, default=ROOT / "configs" / "ranking_mall_long.py")
    command.add_argument(
        "--variants", default="dcn,din,sim", help=f"some of {', '.join(VARIANTS)}, with commas between"
    )
    command.add_argument("--seeds", default="0", help="whole numbers, with commas between")
    command.add_argument("--runs", type=Path, default=Path("runs/ranking"), help="where run folders are kept")
    args = command.parse_args()
    variants, seeds, base = parse_variants(args.variants), parse_seeds(args.seeds), load_config(args.config)
    if not isinstance(base, CascadeConfig):
        raise UserError(f"--config: this is a configuration of {base.system}; give one of {CASCADE}")
    keep_compiled_programs()
    entries = []
    for seed in seeds:
        for name in variants:
            console.rule(f"{args.config.stem}, {name}, seed {seed}")
            config = quick(replace(VARIANTS[name](base), seed=seed), args.quick)
            entry = measured(args.runs / f"{args.config.stem}-{name}-{seed}{'-quick' * args.quick}", config)
            entries.append({"model": name, "seed": seed, "data": args.config.stem, **entry})
            if not args.quick:
                results.append("ranking", entries[-1:])
    console.print(table_of(entries))


def parse_variants(text: str) -> list[str]:
    """Names of `VARIANTS`. Raises UserError where one is unknown."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"--variants: there is no {unknown[0]!r}; give some of {', '.join(VARIANTS)}")
    return names or ["whole"]


def quick(config: CascadeConfig, wanted: bool) -> CascadeConfig:
    """The configuration with few steps and users, where it shall be quick."""
    if not wanted:
        return config
    steps = {"steps": QUICK_STEPS, "checkpoint_every": QUICK_STEPS, "evaluate_every": 0, "log_every": 1}
    first = config.pre_ranking
    if first is not None:
        first = replace(first, training=replace(first.training, **steps), optim=replace(first.optim, warmup=1))
    return replace(
        config,
        data=replace(config.data, users=40),
        pre_ranking=first,
        training=replace(config.training, **steps),
        optim=replace(config.optim, warmup=1),
        evaluation=replace(config.evaluation, max_users=20, cutoffs=(10,)),
    )


def measured(folder: Path, config: CascadeConfig) -> dict[str, Any]:
    """Trains a run if it is not trained: {"seconds", "rows"}."""
    check(folder, config)
    run, start = Run.open(folder, config), time.monotonic()
    train(run, config)
    return {"seconds": round(time.monotonic() - start, 1), "rows": read_json(run.path / "evaluation.json")}


def table_of(entries: list[dict[str, Any]]) -> Table:
    """Means over seeds of the ranking models' metrics on what was shown."""
    found: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        for row in entry["rows"]:
            if row["model"] == f"{CASCADE}, {RANKING}":
                found[entry["model"]][row["subset"], row["metric"]].append(row["value"])
    table = Table(title="test impressions", title_justify="left")
    table.add_column("variant")
    for probability, metric in SHOWN:
        table.add_column(f"{metric} {probability}", justify="right")
    for name, values in found.items():
        cells = (values.get((IMPRESSIONS[probability], metric)) for probability, metric in SHOWN)
        table.add_row(name, *("-" if not each else "{:.4f} ± {:.4f}".format(*results.moments(each)) for each in cells))
    return table


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
