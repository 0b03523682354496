"""What RankGR's two phases bring: Table 4, and the sweeps over alpha and lambda of Fig. 4 and 5, on multi-level logs.

    python benchmarks/rankgr_ablation.py [--config configs/rankgr_mall.py] [--data DIR] [--seeds 0,1,2] [--quick]

Semantic IDs are made once; every variant is trained from several seeds. "w/o IAP": no LDPO, and next tokens of the
items that are looked for alone; "w/o RSP": no rank head; "w/o both": a plain generative model. --data puts a folder in
place of the configuration's. Rows (model, seed, split, subset, metric, value, seconds) gather in
OUT/rankgr_ablation.json, where what is done is not done again; subset: items of that behavior in the held-out session.
Figures go to OUT. --quick: one seed, few steps.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from shared.pictures import COLORS, axes, save

from jaxrec.config import fingerprint, load_config, to_json
from jaxrec.data.examples import Records
from jaxrec.evaluation import make_cases, ranking_metrics
from jaxrec.evaluation.metrics import mean
from jaxrec.run import Run, console, write_json
from jaxrec.systems.phases import prepare_with_ids
from jaxrec.systems.rankgr import RankGRRunConfig
from jaxrec.systems.rankgr_model import RankGRAssembly, assemble
from jaxrec.systems.rankgr_training import train_model
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender

CUTOFFS = (1, 5, 10, 20, 50)
ALPHAS = (0.0, 0.1, 0.3, 1.0, 3.0)
WIDENINGS = (1, 2, 4, 8, 16)
FULL = "RankGR"


def variants(config: RankGRRunConfig, positive: int) -> dict[str, RankGRRunConfig]:
    """The rows of Table 4; `positive` is the lowest level that is looked for."""
    weights = config.objective.level_weights or (1.0,) * (max(config.objective.levels, default=0) + 1)
    looked_for = tuple(weight if level >= positive else 0.0 for level, weight in enumerate(weights))
    plain = replace(config.objective, alpha=0.0, level_weights=looked_for)
    without_head = replace(config.model, rank=replace(config.model.rank, loss="none"))
    return {
        FULL: config,
        "w/o IAP": replace(config, objective=plain),
        "w/o RSP": replace(config, model=without_head),
        "w/o both": replace(config, objective=plain, model=without_head),
    }


def measure(model: GenerativeRecommender, split: str) -> Iterator[dict[str, Any]]:
    """Rows of hit rate, recall and NDCG for every behavior that is looked for or read, from clicks on."""
    assembly = model.assembly
    records = list(Records(assembly.examples, split))
    for behavior in range(model.feature_config.weakest, len(assembly.behaviors)):
        cases = make_cases(records, [behavior], split)
        if not len(cases):
            continue
        ranked, _ = model.recommend(cases.histories, max(CUTOFFS))
        for metric, pair in ranking_metrics(ranked, cases.targets, cases.where, CUTOFFS).items():
            yield {"split": split, "subset": assembly.behaviors[behavior], "metric": metric, "value": mean(pair)}


class Results:
    """Rows in a file, by what they were made from."""

    def __init__(self, path: Path):
        self.path, self.rows = path, json.loads(path.read_text()) if path.exists() else []

    def has(self, key: str) -> bool:
        """Whether the rows of a measurement are there."""
        return any(row["key"] == key for row in self.rows)

    def add(self, key: str, rows: list[dict]) -> None:
        """Adds the rows of one measurement and writes the file."""
        self.rows += [{**row, "key": key} for row in rows]
        write_json(self.path, self.rows)

    def spread(self, model: str, subset: str, metric: str) -> tuple[float, float]:
        """Mean and standard deviation over the seeds."""
        found = [r["value"] for r in self.rows if (r["model"], r["subset"], r["metric"]) == (model, subset, metric)]
        return float(np.mean(found)), float(np.std(found))

    def subsets(self) -> list[str]:
        """Those that there are."""
        return list(dict.fromkeys(row["subset"] for row in self.rows))


def run_one(run: Run, config: RankGRRunConfig, name: str, results: Results, sweep: bool = False) -> None:
    """Trains a variant and measures it; with `sweep` once more for every lambda."""
    key = fingerprint(config)
    if results.has(key):
        return
    begin = time.perf_counter()
    assembly = assemble(run, config)
    folder = run.path / "stages" / key
    folder.mkdir(parents=True, exist_ok=True)
    variables = {"params": train_model(assembly, config, folder, folder / "metrics.jsonl").params}
    seconds = time.perf_counter() - begin

    def rows(label: str, decoding: DecodingConfig) -> list[dict]:
        model = GenerativeRecommender(assembly, variables, config.features, decoding)
        about = {"model": label, "seed": config.seed, "seconds": round(seconds, 1)}
        return [about | row for row in measure(model, config.evaluation.split)]

    found = rows(name, config.decoding)
    if sweep:
        for each in WIDENINGS:
            found += rows(f"lambda {each}x", widened(config.decoding, each))
    results.add(key, found)


def widened(decoding: DecodingConfig, times: int) -> DecodingConfig:
    """The last level's beam as wide as its results, of so many times as many candidates."""
    widths = (*decoding.beam_widths[:-1], max(CUTOFFS))
    candidates = (*decoding.candidates[:-1], times * max(CUTOFFS))
    return replace(decoding, beam_widths=widths, candidates=candidates)


def print_table(results: Results, names: list[str]) -> None:
    """Table 4: mean and spread of every variant, and its distance from the whole."""
    for subset in results.subsets():
        for metric in ("hr@1", "hr@5", "hr@10", "hr@20"):
            whole, _ = results.spread(FULL, subset, metric)
            cells = []
            for name in names:
                value, deviation = results.spread(name, subset, metric)
                change = f" ({(value / whole - 1):+.1%})" if whole and name != FULL else ""
                cells.append(f"{name} {value:.4f} ± {deviation:.4f}{change}")
            console.print(f"{subset:>10} {metric:>6}   " + "   ".join(cells), markup=False)


def plot(results: Results, names: dict[float, str], label: str, path: Path) -> None:
    """HR@10 of every subset against what was swept, with the seeds' spread."""
    figure, (place,) = axes(1, width=3.6)
    for color, subset in zip(COLORS, results.subsets(), strict=False):
        values = np.array([results.spread(name, subset, "hr@10") for name in names.values()])
        x = np.arange(len(names))
        place.errorbar(x, values[:, 0], values[:, 1], color=color, marker="o", markersize=3, label=subset)
    place.set_xticks(range(len(names)), [f"{each:g}" for each in names])
    place.set_xlabel(label)
    place.set_ylabel("HR@10")
    place.legend(frameon=False, fontsize=8, labelcolor="#808890")
    save(figure, path)


def base_config(arguments: argparse.Namespace) -> RankGRRunConfig:
    """The configuration that variants are made of."""
    config = load_config(arguments.config)
    if arguments.data:
        config = replace(config, data=replace(config.data, path=arguments.data))
    steps = arguments.steps or (60 if arguments.quick else config.training.steps)
    training = replace(config.training, steps=steps, checkpoint_every=steps)
    warmup = min(config.optim.warmup, steps // 4)
    return replace(config, training=training, optim=replace(config.optim, warmup=warmup))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/rankgr_mall.py"))
    parser.add_argument("--data", type=Path, help="folder of the log, for sources that read one")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, help="training steps; default: the configuration's")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/rankgr_ablation"), help="folder for IDs and checkpoints"
    )
    parser.add_argument("--no-sweeps", action="store_true", help="only the table")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    config = base_config(arguments)
    seeds = [int(seed) for seed in (arguments.seeds if not arguments.quick else "0").split(",")]
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out / ("rankgr_ablation_quick.json" if arguments.quick else "rankgr_ablation.json"))
    run = Run.open(arguments.runs / fingerprint(to_json(config)), config)
    prepare_with_ids(run, config)
    assembly: RankGRAssembly = assemble(run, config)
    named = variants(config, assembly.positive)
    for seed in seeds:
        for name, variant in named.items():
            run_one(run, replace(variant, seed=seed), name, results, sweep=name == FULL and not arguments.no_sweeps)
    print_table(results, list(named))
    if arguments.no_sweeps:
        return
    alphas = (0.0, 1.0) if arguments.quick else ALPHAS
    names = {alpha: f"alpha {alpha:g}" for alpha in alphas}
    for seed in seeds:
        for alpha, name in names.items():
            # A seed of its own where the whole model has this alpha already: rows are known by their configuration.
            objective = replace(config.objective, alpha=alpha)
            run_one(run, replace(config, seed=seed + 1000, objective=objective), name, results)
    plot(results, names, "alpha", arguments.out / "rankgr_alpha.svg")
    lambdas = {each * max(CUTOFFS): f"lambda {each}x" for each in WIDENINGS}
    plot(results, lambdas, "candidates of the last level (lambda)", arguments.out / "rankgr_lambda.svg")


if __name__ == "__main__":
    main()
