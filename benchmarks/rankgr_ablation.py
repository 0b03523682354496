"""What RankGR's two phases bring: Table 4, and the sweeps over alpha and lambda of Fig. 4 and 5, on multi-level logs.

    python benchmarks/rankgr_ablation.py [--config configs/rankgr_mall.py] [--data DIR] [--seeds 0,1,2] [--alphas 0,1,3]

Semantic IDs are made once; every variant is trained from several seeds and measured on validation and test. Alpha, and
the weight of the likelihood in the final score (for each variant its own), are those of the best mean recall@10 on
validation, of the weakest behavior that is looked for, which is the most frequent. "w/o IAP": alpha = 0, all else the
same; "w/o RSP": no rank head; "w/o both": neither. Two are no rows of Table 4: "head for targets", without LDPO too,
has a rank head that learns to find the items that are looked for alone, where the configuration's finds others as well;
"targets alone" has next tokens of those items alone, and neither phase.
RankGR's HR (Eq. 19) is the share of a user's items that was found: recall here. hr@10 is whether any was found.
--data puts a folder in place of the configuration's. What was trained gathers in OUT/rankgr_ablation-CONFIG.json, with
its seed, command, commit, device and rows (model, split, subset, metric, value); it is not trained again. subset: items
of that behavior in the held-out session. Figures go to --pictures (CONFIG_alpha.svg, CONFIG_lambda.svg). --quick: one
seed, few steps, kept in RUNS/quick. --no-lambda: without the sweep over lambda; --table: Table 4's rows alone.
"""

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from shared import results as kept
from shared.pictures import COLORS, axes, save
from shared.timing import parse_seeds, parser

from jaxrec.config import UserError, fingerprint, load_config, to_json
from jaxrec.console import console, report_user_errors
from jaxrec.data.examples import Records
from jaxrec.data.sources import SyntheticMall
from jaxrec.evaluation import make_cases, ranking_metrics
from jaxrec.evaluation.metrics import mean
from jaxrec.files import read_json, write_json
from jaxrec.programs import keep_compiled_programs
from jaxrec.run import Run
from jaxrec.systems.phases import prepare_with_ids
from jaxrec.systems.rankgr import training as rankgr_training
from jaxrec.systems.rankgr.config import RankGRRunConfig
from jaxrec.systems.rankgr.model import RankGRAssembly, assemble
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender
from jaxrec.training.stages import Task

CUTOFFS = (1, 5, 10, 20, 50)
SHOWN = ("recall@1", "recall@5", "recall@10", "recall@20", "hr@10")
CHOSEN_BY = "recall@10"
LISTED = 10
"""length of the lists that alpha, lambda and the weight of the likelihood are judged by"""
FULL, NO_IAP, NO_RSP, PLAIN = "RankGR", "w/o IAP", "w/o RSP", "w/o both"
FOCUSED, ALONE = "head for targets", "targets alone"


@dataclass(frozen=True)
class Sweep:
    """What is tried: the first alpha is 0, without LDPO."""

    alphas: tuple[float, ...] = (0.0, 1.0, 3.0)
    likelihoods: tuple[float, ...] = (0.0, 0.3, 1.0)
    """weights of the likelihood in the final score"""
    lambdas: tuple[int, ...] = (10, 20, 40, 80)
    """candidates of the last level, for lists of 10; empty: no sweep over lambda"""
    beside: bool = True
    """whether the two that are no rows of Table 4 are made too"""


QUICK = Sweep((0.0, 1.0), (0.0,), (), beside=False)


def with_alpha(config: RankGRRunConfig, alpha: float) -> RankGRRunConfig:
    """The configuration with another weight of LDPO."""
    return replace(config, objective=replace(config.objective, alpha=alpha))


def without_head(config: RankGRRunConfig) -> RankGRRunConfig:
    """The configuration without the refined scoring phase."""
    return replace(config, model=replace(config.model, rank=replace(config.model.rank, loss="none")))


def head_for_targets(config: RankGRRunConfig) -> RankGRRunConfig:
    """The configuration with a rank head that learns to find the items that are looked for alone."""
    return replace(config, objective=replace(config.objective, rank_from=None))


def targets_alone(config: RankGRRunConfig, assembly: RankGRAssembly) -> RankGRRunConfig:
    """A plain model that learns the items that are looked for alone."""
    weights = tuple(float(level >= assembly.positive) for level in range(int(assembly.levels[-1]) + 1))
    return without_head(replace(config, objective=replace(config.objective, alpha=0.0, level_weights=weights)))


def measure(model: GenerativeRecommender, split: str, longest: int = max(CUTOFFS)) -> Iterator[dict[str, Any]]:
    """Rows of what is shown of lists up to `longest`, for the strongest behavior of every level that is looked for or
    read."""
    cutoffs = tuple(each for each in CUTOFFS if each <= longest)
    assembly = model.assembly
    records = list(Records(assembly.examples, split))
    strongest = {level: behavior for behavior, level in enumerate(assembly.levels.tolist())}
    for behavior in (each for each in strongest.values() if each >= model.feature_config.weakest):
        cases = make_cases(records, [behavior], split)
        if not len(cases):
            continue
        ranked, _ = model.recommend(cases.histories, longest)
        found = ranking_metrics(ranked, cases.targets, cases.where, cutoffs)
        for metric in (each for each in SHOWN if each in found):
            value = mean(found[metric])
            yield {"split": split, "subset": assembly.behaviors[behavior], "metric": metric, "value": value}


FIELDS = ("model", "subset", "metric", "split")


def label(alpha: float, likelihood: float) -> str:
    """The name of the whole model in the rows."""
    return f"alpha {alpha:g}, likelihood {likelihood:g}"


def key_of(config: RankGRRunConfig) -> str:
    """Of the log's contents and of what isn't the default: neither its place nor a new field changes it."""
    return fingerprint(config.data.fingerprint(), {**stated(config), "data": None})


def stated(part: Any) -> Any:
    """What of a configuration, or of a part of one, isn't the default."""
    if not dataclasses.is_dataclass(part):
        return part
    found = {"": type(part).__name__}
    for each in dataclasses.fields(part):
        made = each.default_factory is not dataclasses.MISSING
        value, default = getattr(part, each.name), each.default_factory() if made else each.default
        if value != default:
            found[each.name] = stated(value)
    return found


class Results:
    """What was measured, in a file: a list of {"key", "seed", "seconds", "command", "commit", "device", "rows"}.

    Only what this process asks for is shown: other configurations and seeds may be in the file.
    """

    def __init__(self, path: Path):
        self.path, self.entries = path, read_json(path) if path.exists() else []
        self.asked: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the rows of a measurement, which is asked for, are there."""
        self.asked.add(key)
        return any(entry["key"] == key for entry in self.entries)

    def add(self, key: str, seed: int, seconds: float, rows: list[dict]) -> None:
        """Adds the rows of one measurement and writes the file."""
        self.entries.append({"key": key, "seed": seed, "seconds": seconds, **kept.provenance(), "rows": rows})
        write_json(self.path, self.entries)

    def of(self, model: str, subset: str, metric: str, split: str = "test") -> np.ndarray:
        """float [seeds], in the seeds' order."""
        wanted = (model, subset, metric, split)
        found = {seed: row["value"] for seed, row in self._rows() if tuple(row[name] for name in FIELDS) == wanted}
        return np.array([found[seed] for seed in sorted(found)])

    def subsets(self) -> list[str]:
        """Those that there are."""
        return list(dict.fromkeys(row["subset"] for _, row in self._rows()))

    def _rows(self) -> Iterator[tuple[int, dict]]:
        wanted = (entry for entry in self.entries if entry["key"] in self.asked)
        return ((entry["seed"], row) for entry in wanted for row in entry["rows"])


def run_one(run: Run, config: RankGRRunConfig, name: str, results: Results, sweep: Sweep) -> None:
    """Trains a variant and measures it on validation and test, with a head once for every weight of the likelihood."""
    key = key_of(config)
    if results.has(key):
        return
    names = {name: 0.0}
    if config.model.rank.loss != "none":  # names of variants with a head begin with what they are
        names = {name + label(config.objective.alpha, weight): weight for weight in sweep.likelihoods}
    make, seconds = trained(run, config)
    rows = []
    for each, weight in names.items():
        # One for both splits: what it compiled serves the next.
        model = make(replace(config.decoding, likelihood_weight=weight))
        rows += [{"model": each, **row} for split in ("valid", "test") for row in measure(model, split)]
    results.add(key, config.seed, seconds, rows)


def sweep_lambda(run: Run, config: RankGRRunConfig, likelihood: float, results: Results, lambdas: Sequence) -> None:
    """Measures what was trained on test, once for every lambda of the last level."""
    key = f"{key_of(config)} lambda"
    if results.has(key):
        return
    make, seconds = trained(run, config)
    rows = []
    for each in lambdas:
        model = make(with_lambda(replace(config.decoding, likelihood_weight=likelihood), each))
        rows += [{"model": f"lambda {each}", **row} for row in measure(model, "test", LISTED)]
    results.add(key, config.seed, seconds, rows)


def trained(run: Run, config: RankGRRunConfig) -> tuple[Callable[..., GenerativeRecommender], float]:
    """What makes a recommender of a decoding, and the seconds that training took.

    What was trained before is read from its checkpoint.
    """
    begin = time.perf_counter()
    assembly = assemble(run, config)
    folder = run.path / "stages" / key_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    task = Task("train", folder, folder / "metrics.jsonl")
    variables = {"params": rankgr_training.fit(assembly, config, task).params}

    def make(decoding: DecodingConfig) -> GenerativeRecommender:
        return GenerativeRecommender(assembly, variables, config.features, decoding)

    return make, round(time.perf_counter() - begin, 1)


def with_lambda(decoding: DecodingConfig, candidates: int) -> DecodingConfig:
    """As many candidates at the last level, of which the rank head chooses the list."""
    widths = (*decoding.beam_widths[:-1], LISTED)
    return replace(decoding, beam_widths=widths, candidates=(*decoding.candidates[:-1], candidates))


def print_table(results: Results, names: dict[str, str]) -> None:
    """Table 4 on test, as Markdown: mean and spread of every variant, and its distance from the whole."""
    for subset in results.subsets():
        console.print(f"| {subset} | " + " | ".join(names) + " |", markup=False)
        console.print("|---" * (1 + len(names)) + "|", markup=False)
        for metric in SHOWN:
            whole = results.of(names[FULL], subset, metric).mean()
            cells = []
            for shown, name in names.items():
                average, deviation, _ = kept.moments(results.of(name, subset, metric))
                change = f" ({average / whole - 1:+.0%})" if whole and shown != FULL else ""
                cells.append(f"{average:.3f} ± {deviation:.3f}{change}")
            console.print(f"| {metric} | " + " | ".join(cells) + " |", markup=False)


def plot(results: Results, names: dict[float, str], words: str, path: Path) -> None:
    """recall@10 of every subset against what was swept, with the seeds' spread."""
    figure, (place,) = axes(1, width=3.6)
    for color, subset in zip(COLORS, results.subsets(), strict=False):
        means, spreads, _ = zip(*(kept.moments(results.of(name, subset, CHOSEN_BY)) for name in names.values()))
        place.errorbar(range(len(names)), means, spreads, color=color, marker="o", markersize=3, label=subset)
    place.set_xticks(range(len(names)), [f"{each:g}" for each in names])
    place.set_xlabel(words)
    place.set_ylabel(CHOSEN_BY)
    place.legend(frameon=False, fontsize=8, labelcolor="#808890")
    save(figure, path)


def base_config(arguments: argparse.Namespace) -> RankGRRunConfig:
    """The configuration that variants are made of."""
    config = load_config(arguments.config)
    if not isinstance(config, RankGRRunConfig):
        raise UserError(f"--config: {arguments.config} is no configuration of RankGR; give one, such as rankgr_jd.py")
    if arguments.steps is not None and arguments.steps < 1:
        raise UserError(f"--steps is {arguments.steps}; give 1 or more")
    if arguments.data and not hasattr(config.data, "path"):
        raise UserError(f"--data: the log of {arguments.config} isn't read from a folder; leave --data out")
    if arguments.data:
        config = replace(config, data=replace(config.data, path=arguments.data))
    steps = arguments.steps or (30 if arguments.quick else config.training.steps)
    # All variants are trained for as many steps, and measured in their last state.
    training = replace(config.training, steps=steps, checkpoint_every=steps, evaluate_every=0, patience=0)
    warmup = min(config.optim.warmup, steps // 4)
    if arguments.quick:  # compiling takes longer than training
        backbone, buckets = replace(config.model.backbone, layers=1), config.features.buckets[-1:]
        model, features = replace(config.model, backbone=backbone), replace(config.features, buckets=buckets)
        config = replace(config, model=model, features=features)
        if isinstance(config.data, SyntheticMall):
            config = replace(config, data=replace(config.data, users=100))
    return replace(config, training=training, optim=replace(config.optim, warmup=warmup))


def parse_alphas(text: str) -> tuple[float, ...]:
    """Numbers that rise from 0.

    Raises:
      UserError: they don't, or there is none above 0.
    """
    try:
        alphas = tuple(float(each) for each in text.split(","))
    except ValueError:
        alphas = ()
    if len(alphas) < 2 or alphas[0] != 0 or not all(a < b < math.inf for a, b in itertools.pairwise(alphas)):
        raise UserError(f"--alphas is {text!r}; give numbers that rise from 0, such as 0,1,3")
    return alphas


def main() -> None:
    """The command line."""
    command = parser(__doc__)
    command.add_argument("--config", type=Path, default=Path("configs/rankgr_mall.py"))
    command.add_argument("--data", type=Path, help="folder of the log, for sources that read one")
    command.add_argument("--seeds", default="0,1,2")
    command.add_argument("--steps", type=int, help="training steps; default: the configuration's")
    command.add_argument("--out", type=Path, default=kept.FOLDER, help="folder for the results")
    command.add_argument("--runs", type=Path, default=Path("runs/rankgr_ablation"), help="for IDs and checkpoints")
    command.add_argument("--pictures", type=Path, default=Path("docs/pictures"), help="folder for the figures")
    command.add_argument("--alphas", default="0,1,3", help="weights of LDPO that are tried, from 0 on")
    command.add_argument("--table", action="store_true", help="the rows of Table 4 alone, without lambda")
    command.add_argument("--no-lambda", action="store_true", help="without the sweep over lambda")
    arguments = command.parse_args()
    if arguments.quick:  # only to see that everything works: nothing to keep
        arguments.out = arguments.pictures = arguments.runs / "quick"
    keep_compiled_programs()
    config = base_config(arguments)
    seeds = parse_seeds("0" if arguments.quick else arguments.seeds)
    kept.make_folder("--out", arguments.out)
    about = arguments.config.stem
    results = Results(arguments.out / f"rankgr_ablation-{about}.json")
    run = Run.open(arguments.runs / fingerprint(to_json(config)), config)
    sweep = QUICK if arguments.quick else Sweep(parse_alphas(arguments.alphas), beside=not arguments.table)
    if (
        arguments.no_lambda or arguments.table or not config.decoding.candidates
    ):  # without, a level's candidates are its beams
        sweep = replace(sweep, lambdas=())
    names, whole = run_all(run, config, seeds, results, sweep)
    console.print(f"chosen on validation: {FULL} {names[FULL]}; {NO_IAP} {names[NO_IAP]}", markup=False)
    print_table(results, names)
    plot(results, whole, "alpha", arguments.pictures / f"{about}_alpha.svg")
    if lambdas := {each: f"lambda {each}" for each in sweep.lambdas}:
        plot(results, lambdas, "candidates of the last level (lambda)", arguments.pictures / f"{about}_lambda.svg")


def run_all(
    run: Run, config: RankGRRunConfig, seeds: list[int], results: Results, sweep: Sweep
) -> tuple[dict[str, str], dict[float, str]]:
    """Trains and measures everything; what the rows call each variant, and the whole model of each alpha."""
    prepare_with_ids(run, config)
    assembly = assemble(run, config)
    frequent = assembly.behaviors[assembly.target_behaviors[0]]
    # Without rank_from the configuration's own head is that of "head for targets".
    focused = sweep.beside and config.objective.rank_from is not None

    def score(name: str) -> float:
        return results.of(name, frequent, CHOSEN_BY, "valid").mean()

    def chosen(kind: str, alpha: float) -> float:
        return max(sweep.likelihoods, key=lambda each: score(kind + label(alpha, each)))

    for seed in seeds:
        for alpha in sweep.alphas:
            run_one(run, with_alpha(replace(config, seed=seed), alpha), "", results, sweep)
    likelihoods = {alpha: chosen("", alpha) for alpha in sweep.alphas}
    whole = {alpha: label(alpha, likelihood) for alpha, likelihood in likelihoods.items()}
    alpha = max(sweep.alphas[1:], key=lambda each: score(whole[each]))
    names = {FULL: whole[alpha], NO_IAP: whole[0.0], NO_RSP: f"{NO_RSP}, alpha {alpha:g}", PLAIN: PLAIN}
    for seed in seeds:
        seeded = replace(config, seed=seed)
        plain = with_alpha(seeded, 0.0)
        run_one(run, without_head(with_alpha(seeded, alpha)), names[NO_RSP], results, sweep)
        run_one(run, without_head(plain), PLAIN, results, sweep)
        if sweep.beside:
            run_one(run, targets_alone(seeded, assembly), ALONE, results, sweep)
        if focused:
            run_one(run, head_for_targets(plain), f"{FOCUSED}, ", results, sweep)
        if sweep.lambdas:
            sweep_lambda(run, with_alpha(seeded, alpha), likelihoods[alpha], results, sweep.lambdas)
    if focused:
        names[FOCUSED] = f"{FOCUSED}, {label(0.0, chosen(f'{FOCUSED}, ', 0.0))}"
    if sweep.beside:
        names[ALONE] = ALONE
    return names, whole


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
