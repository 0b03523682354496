"""What reinforcement learning brings: the supervised stage, DPO and GRPO behind it, by true reward (OneMall Table 4).

    python benchmarks/rewards_study.py [--data mall,journey] [--models dpo,grpo] [--seeds 0,1,2] [--runs DIR] [--quick]

mall      configs/onemall_mall_rl.py: the reward is the mall's own, and so is the truth
journey   configs/onemall_journey_rl.py: the reward is what was spent; the truth is what the last basket spends on items
          of the first ten

The supervised stage is trained once a seed, and the others go on with copies of it. Runs stay in DIR; without it they
are in a temporary folder. A table of the test users is printed, and kept in benchmarks/results/rewards.json; --quick
measures a tiny mall and keeps nothing.
"""

import dataclasses
import shutil
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.table import Table
from shared.results import append, make_folder, moments
from shared.timing import parse_seeds, parser

from jaxrec.config import UserError, load_config
from jaxrec.console import console, report_user_errors
from jaxrec.data.sources import SyntheticMall
from jaxrec.evaluation import Cases
from jaxrec.evaluation.comparison import REWARDS, SHOWN_OF_REWARDS
from jaxrec.programs import keep_compiled_programs
from jaxrec.run import TRAINING, Run, stage_path
from jaxrec.systems import load_recommender, train
from jaxrec.systems.comparison import cases_of
from jaxrec.systems.onemall.config import OneMallConfig
from jaxrec.systems.onemall.model import assemble
from jaxrec.systems.onemall.reinforcement import of_model
from jaxrec.systems.onemall.reward_measure import RewardMeasure
from jaxrec.systems.onemall.rewards import fuse, make_reward
from jaxrec.training.stages import best_variables

CONFIGS = Path(__file__).parent.parent / "configs"
DATA = {"mall": "onemall_mall_rl.py", "journey": "onemall_journey_rl.py"}
MODELS = ("dpo", "grpo")
BEST = "best possible"
SHOWN = tuple(name for name in SHOWN_OF_REWARDS if name not in ("reward@10", "reward@100"))


def configuration(data: str, seed: int, quick: bool) -> OneMallConfig:
    """The configuration of a log and a seed, which is that of the mall too."""
    config = dataclasses.replace(load_config(CONFIGS / DATA[data]), seed=seed)
    if data == "mall":
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=seed))
    if not quick:
        return config
    own = config.reinforcement
    shorter = {"evaluate_every": 0.5, "log_every": 10}
    return dataclasses.replace(
        config,
        data=SyntheticMall(users=60, items=80, tastes=8, sessions_per_user=6, exposures_per_session=4, seed=seed),
        semantic_ids=load_config(CONFIGS / "onemall_mall.py").semantic_ids,
        model=dataclasses.replace(config.model, width=16, hidden=16, layers=1, experts=1, queries=2),
        batch_size=16,
        training=dataclasses.replace(config.training, steps=40, **shorter),
        optim=dataclasses.replace(config.optim, warmup=10),
        reinforcement=dataclasses.replace(
            own, batch_size=16, candidates=16, drawn=8, training=dataclasses.replace(own.training, steps=30, **shorter)
        ),
    )


def study(data: str, seed: int, models: list[str], runs: Path, quick: bool) -> list[dict]:
    """The entries of one log and seed: base, the models behind it and, in the mall, the best possible list."""
    config = configuration(data, seed, quick)
    base = runs / f"{data}-{seed}-base"
    started = time.perf_counter()
    train(Run.open(base, config), config, until=TRAINING)
    seconds = {"base": time.perf_counter() - started}
    for model in models:
        run = runs / f"{data}-{seed}-{model}"
        if not run.exists():
            shutil.copytree(base, run, ignore=shutil.ignore_patterns(".lock"))
        own = dataclasses.replace(config, reinforcement=dataclasses.replace(config.reinforcement, loss=model))
        started = time.perf_counter()
        train(Run.open(run, own), own)
        seconds[model] = time.perf_counter() - started
    return measured(config, {name: runs / f"{data}-{seed}-{name}" for name in seconds}, seconds, f"{data}", seed)


def measured(config: OneMallConfig, runs: dict[str, Path], seconds: dict[str, float], data: str, seed: int) -> list:
    """Entries for `shared.results`: the values of every run on the test users."""
    first = Run.load(runs["base"])[0]
    before = of_model(best_variables(first.path / stage_path(TRAINING)))
    entries, measure = [], None
    for name, path in runs.items():
        variables = before if name == "base" else load_recommender(Run(path)).variables
        if measure is None:
            reward = make_reward(first, config)
            measure = RewardMeasure(first, assemble(first, config), config, reward, config.decoding)
            cases = cases_of(measure.assembly, "test")
        entries.append(_entry(name, seed, data, seconds[name], measure.measure(variables, before, cases), len(cases)))
    if measure.truth is not None:
        values = measure.worth(_best_lists(measure, cases), cases)
        entries.append(_entry(BEST, seed, data, 0.0, values, len(cases)))
    return entries


def _best_lists(measure: RewardMeasure, cases: Cases, k: int = 100) -> np.ndarray:
    """int32 [U, k]: the items of the largest true reward for each case."""
    every = np.arange(len(measure.assembly.space.codes))
    user = np.array([history["user"] for history in cases.histories])
    day = np.array([int(history["now"]) // 86_400 for history in cases.histories])
    lists = np.empty((len(cases), min(k, len(every))), np.int32)
    for start in range(0, len(cases), 64):
        rows = slice(start, start + 64)
        items = jnp.asarray(np.broadcast_to(every, (len(user[rows]), len(every))))
        rewards = np.asarray(fuse(measure.truth.state.rates(user[rows], day[rows], items), measure.own.truth))
        lists[rows] = np.argsort(-rewards, axis=1, kind="stable")[:, : lists.shape[1]]
    return lists


def _entry(model: str, seed: int, data: str, seconds: float, values: dict[str, float], count: int) -> dict:
    rows = [
        {"split": "test", "subset": REWARDS, "metric": name, "value": value, "count": count}
        for name, value in values.items()
    ]
    return {"model": model, "seed": seed, "data": data, "seconds": round(seconds, 1), "rows": rows}


def table(entries: list[dict], data: str) -> Table:
    """Means over seeds, with the deviation where there are several, and the change against base."""
    names = list(dict.fromkeys(entry["model"] for entry in entries))
    values = {
        name: {
            metric: [row["value"] for entry in entries if entry["model"] == name for row in entry["rows"]
                     if row["metric"] == metric]
            for metric in (*SHOWN, "kl")
        }
        for name in names
    }  # fmt: skip
    shown = [metric for metric in (*SHOWN, "kl") if values["base"][metric]]
    drawn = Table(title=f"{data}, test users, {len(values['base'][shown[0]])} seeds", title_justify="left")
    for column in ("model", *shown):
        drawn.add_column(column, justify="left" if column == "model" else "right")
    for name in names:
        drawn.add_row(name, *(_cell(values[name][metric], values["base"][metric]) for metric in shown))
    return drawn


def _cell(values: list[float], base: list[float]) -> str:
    if not values:
        return ""
    mean, deviation, count = moments(values)
    spread = f" ± {deviation:.3g}" if count > 1 else ""
    before = float(np.mean(base))
    change = f" ({mean / before - 1:+.1%})" if before and mean != before else ""
    return f"{mean:.4g}{spread}{change}"


def parse_names(flag: str, text: str, known: tuple[str, ...]) -> list[str]:
    """The names of an argument such as "dpo,grpo".

    Raises:
      UserError: one is unknown.
    """
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{flag} {text!r}: there is no {unknown[0]!r}; give some of {', '.join(known)}")
    return names


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--data", default="mall", help="mall, journey or both, with a comma between")
    command.add_argument("--models", default=",".join(MODELS))
    command.add_argument("--seeds", default="0")
    command.add_argument("--runs", type=Path, help="where the runs stay")
    args = command.parse_args()
    data, models = parse_names("--data", args.data, tuple(DATA)), parse_names("--models", args.models, MODELS)
    seeds = parse_seeds(args.seeds)
    keep_compiled_programs()
    with tempfile.TemporaryDirectory() as temporary:
        runs = args.runs or Path(temporary)
        make_folder("--runs", runs)
        for each in ["mall"] if args.quick else data:
            entries = [entry for seed in seeds for entry in study(each, seed, models, runs, args.quick)]
            console.print(table(entries, each))
            if not args.quick:
                console.print(f"kept: {append('rewards', entries)}", markup=False)


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
