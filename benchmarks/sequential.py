"""Any list of models on one log, under one protocol: leave-one-out, all items ranked, the best state on validation.

    python benchmarks/sequential.py --data DIR --models sasrec_ce,tiger --seeds 0,1,2 [--quick] [--out results.json]

DIR holds sequences.txt (`user item item ...`, oldest first); items.jsonl ({"id", "title", "categories"}), without which
items have no text but their number; and timestamps.jsonl, if there is one. A model is the name of a file in configs/,
of which everything but the data, the seed and what is measured is used as it is; a configuration is chosen by its rows
of the validation split, and reported by those of the test split.

Every run keeps its folder (--runs), so that the same command goes on where it was stopped and trains nothing twice.
Beside the models stand popularity, Markov, ItemKNN and the others that are only counted, as stored and with the order
of ties shuffled: events of one time, such as one day, are stored in some order, which may be learnable. A trained
model has to be trained on a shuffled log to be judged on one: --shuffle-ties does that. No model is told when the item
that it predicts was taken, which would give something away here; --answer-time tells it, and rows say so.

Writes a list of rows {model, seed, split, subset, metric, value, count, seconds} to --out, a picture of quality against
seconds of training beside it, and adds the runs and what is counted to benchmarks/results/sequential.json. Seconds are
those of training with its validations; of what is only counted, those of counting.

--quick: the log's first 1,000 users, one layer, one length, and no training longer than 30 steps, only to see that
everything works; not kept among the results.
"""

import dataclasses
import itertools
import json
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from shared import results
from shared.pictures import COLORS, axes, save
from shared.timing import parse_seeds, parser

from jaxrec.config import UserError, fingerprint, load_config
from jaxrec.console import console, report_user_errors
from jaxrec.data.examples import Records
from jaxrec.data.sources import SequenceText
from jaxrec.data.sources.files import json_lines, text_lines
from jaxrec.evaluation import evaluate, evaluate_ties_shuffled, fit_baselines, make_cases
from jaxrec.evaluation.comparison import TIES_SHUFFLED
from jaxrec.files import read_json, write_json
from jaxrec.programs import keep_compiled_programs
from jaxrec.run import Run
from jaxrec.systems import load_recommender, train
from jaxrec.systems.comparison import draw

CONFIGS = Path(__file__).parent.parent / "configs"
CUTOFFS = (5, 10, 50)
SHOWN = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
SPLITS = ("valid", "test")
SUBSETS = {"all": "all items ranked", "new": "the history left out"}
ANSWER_TIME = " (answer's time told)"
MONITORED = "ndcg@10"
FIELDS = ("split", "subset", "metric", "value", "count")
QUICK_USERS, QUICK_STEPS = 1000, 30
WIDE = 118  # columns that no cell of a table is cut in
Row = dict[str, Any]


def main() -> None:
    """Trains what is not trained yet; writes and prints the rows."""
    command = parser(__doc__)
    command.add_argument("--data", type=Path, required=True, metavar="DIR", help="the folder with the log")
    command.add_argument("--models", required=True, help="names of files in configs/, with commas between")
    command.add_argument("--seeds", default="0", help="whole numbers, with commas between")
    command.add_argument("--runs", type=Path, default=Path("runs/sequential"), help="where run folders are kept")
    command.add_argument("--out", type=Path, help="file for the rows; default: results.json in --runs")
    command.add_argument("--shuffle-ties", action="store_true", help="train on a log with ties in random order")
    command.add_argument("--answer-time", action="store_true", help="tell models when the item they predict was taken")
    args = command.parse_args()
    models, seeds = parse_models(args.models), parse_seeds(args.seeds)
    keep_compiled_programs()
    kind = "-shuffled" * args.shuffle_ties + "-answer-time" * args.answer_time + "-quick" * args.quick
    folder = args.runs / (args.data.resolve().name + kind)
    if args.shuffle_ties and not (args.data / "timestamps.jsonl").is_file():
        raise UserError(
            f"--shuffle-ties: {args.data / 'timestamps.jsonl'} is missing, so there are no ties; leave it out"
        )
    out = args.out or folder / "results.json"
    results.make_folder("--out", out.parent)
    log = with_items(args.data, folder / "log", QUICK_USERS if args.quick else None)
    source = SequenceText(path=log, shuffle_ties=args.shuffle_ties)
    suffix = TIES_SHUFFLED * args.shuffle_ties + ANSWER_TIME * args.answer_time
    rows, curves, kept = [], {}, None
    for seed in seeds:
        for name in models:
            console.rule(f"{name}, seed {seed}")
            config = configured(name, source, seed, args.quick, args.answer_time)
            run = one_run(folder, name, seed, config)
            measured, seconds = measure(run, config), training_curve(run)[1]
            made = {"model": name + suffix, "seed": seed}
            rows += [{**made, **row, "seconds": seconds} for row in measured]
            curves.setdefault(name + suffix, []).append(training_curve(run)[0])
            if not args.quick:  # at once: the next model may take an hour
                entry = {**made, "data": args.data.resolve().name, "seconds": seconds, "rows": measured}
                kept = results.append("sequential", [entry])
    counted = count_baselines(run, folder / "baselines.json", source, suffix, args.answer_time)
    if not args.quick:
        results.append("sequential", as_entries(counted, args.data.resolve().name))
    write_json(out, counted + rows)
    draw_curves(curves, counted, out.with_suffix(".svg"))
    wide = Console(width=max(console.width, WIDE))
    for table in tables(counted + rows):
        wide.print(table)
    console.print(f"rows: {out}; picture: {out.with_suffix('.svg')}", markup=False)
    if kept:
        console.print(f"kept in {kept}", markup=False)


def parse_models(text: str) -> list[str]:
    """The names of an argument such as "sasrec_ce,tiger".

    Raises:
      UserError: one is no file in configs/.
    """
    known = sorted(path.stem for path in CONFIGS.glob("*.py"))
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--models: there is no configs/{unknown[0]}.py; give some of {', '.join(known)}")
    if not names:
        raise UserError(f"--models is empty; give some of {', '.join(known)}")
    return list(dict.fromkeys(names))


def with_items(data: Path, folder: Path, users: int | None = None) -> Path:
    """The log's folder; or one with its first users and what is known of them and their items, if so many are given.

    Items have at least a line each: their number, if there is no items.jsonl.
    """
    sequences, given, times = (data / name for name in ("sequences.txt", "items.jsonl", "timestamps.jsonl"))
    if not sequences.is_file():
        raise UserError(f"--data: {sequences} is missing; write `user item item ...`, one user a line")
    if given.is_file() and users is None:
        return data
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line for _, line in itertools.islice(text_lines(sequences), users)]
    (folder / sequences.name).write_text("".join(lines), encoding="utf-8")
    names = {line.split()[0] for line in lines if line.split()}
    items = dict.fromkeys(item for line in lines for item in line.split()[1:])
    known = ({"id": item, "title": f"Item {item}"} for item in items)
    if given.is_file():
        known = (row for _, row in json_lines(given) if str(row.get("id")) in items)
    _write_lines(folder / given.name, known)
    if times.is_file():
        _write_lines(folder / times.name, (row for _, row in json_lines(times) if str(row.get("u")) in names))
    return folder


def _write_lines(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def configured(name: str, source: SequenceText, seed: int, quick: bool, answer_time: bool = False) -> Any:
    """configs/<name>.py on this log, with this seed, measured on all users and without the baselines."""
    config = load_config(CONFIGS / f"{name}.py")
    evaluation = dataclasses.replace(config.evaluation, split="test", cutoffs=CUTOFFS, baselines=False, max_users=0)
    config = shortened(config, QUICK_STEPS) if quick else config
    prepare = dataclasses.replace(config.prepare, answer_time=answer_time)
    return dataclasses.replace(config, data=source, seed=seed, prepare=prepare, evaluation=evaluation)


def shortened(part: Any, steps: int) -> Any:
    """A configuration, or a part of one, where no training is longer than so many steps, and little is compiled."""
    most = {"steps": steps, "warm_steps": steps, "evaluate_every": steps, "warmup": steps // 5, "epochs": 0.1}
    most |= {"layers": 1, "encoder_layers": 1}
    changed = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = shortened(value, steps)
        elif field.name in ("buckets", "lengths") and isinstance(value, tuple):
            changed[field.name] = value[-1:]
        elif field.name in most:
            changed[field.name] = min(value, most[field.name])
    return dataclasses.replace(part, **changed)


def one_run(folder: Path, name: str, seed: int, config: Any) -> Run:
    """The finished run of a configuration; what is the same in all runs is copied from one that has it."""
    path = folder / f"{name}-{seed}"
    for part in ("tables", "examples"):
        others = [other for other in folder.glob(f"*/{part}") if (other / "fingerprint.json").exists()]
        if others and not (path / part).exists():
            shutil.copytree(others[0], path / f"{part}.copy", dirs_exist_ok=True)
            (path / f"{part}.copy").rename(path / part)
    run = Run.open(path, config)
    train(run, config)
    return run


def measure(run: Run, config: Any) -> list[Row]:
    """Rows of both splits: that of the test from the run's evaluation, that of validation made once."""
    system, kept = config.system, run.path / "valid.json"
    inputs = read_json(run.path / "evaluation" / "fingerprint.json")["inputs"]
    if not kept.exists() or read_json(kept)["inputs"] != inputs:
        model = load_recommender(run)
        cases = make_cases(Records(run.examples, "valid"), model.assembly.target_behaviors, "valid")
        cases = draw(cases, config.evaluation)
        found = evaluate({system: model}, cases, split="valid", cutoffs=CUTOFFS)
        write_json(kept, {"inputs": inputs, "rows": found})
    rows = read_json(kept)["rows"] + read_json(run.path / "evaluation.json")
    return [{name: row[name] for name in FIELDS} for row in rows]


def training_curve(run: Run) -> tuple[list[tuple[float, float]], float]:
    """(seconds of training, what is monitored) of every validation of a run, and all its seconds.

    A run that was stopped counts its time again from 0; what was done twice because of that is not counted.
    """
    before = last = 0.0
    points = []
    for line in map(json.loads, run.metrics_file.read_text().splitlines()):
        if "seconds" in line:
            before, last = (before + last, line["seconds"]) if line["seconds"] < last else (before, line["seconds"])
        if f"valid/{MONITORED}" in line:
            points.append((before + last, line[f"valid/{MONITORED}"]))
    return points, round(before + last, 1)


def count_baselines(run: Run, kept: Path, source: SequenceText, suffix: str, answer_time: bool) -> list[Row]:
    """Rows of what is only counted, as stored and with shuffled ties; made once for a log and what models are told."""
    inputs = fingerprint(source.fingerprint(), suffix, answer_time)
    if kept.exists() and read_json(kept)["inputs"] == inputs:
        return read_json(kept)["rows"]
    items, rows = pq.read_metadata(run.tables / "items.parquet").num_rows, []
    targets = [source.behaviors.index(name) for name in source.target_behaviors]
    for split in SPLITS:
        begun, records = time.perf_counter(), list(Records(run.examples, split))
        models = {f"{name}{suffix}": model for name, model in fit_baselines(records, items, targets).items()}
        seconds = round(time.perf_counter() - begun, 1)
        cases = make_cases(records, targets, split)
        found = evaluate(models, cases, split=split, cutoffs=CUTOFFS)
        if not source.shuffle_ties:
            shuffled = evaluate_ties_shuffled(records, items, targets, split=split, cutoffs=CUTOFFS)
            found += [{**row, "model": f"{row['model']}{suffix}"} for row in shuffled]
        rows += [{"seed": 0, **row, "seconds": seconds} for row in found]
    write_json(kept, {"inputs": inputs, "rows": rows})
    return rows


def as_entries(rows: list[Row], data: str) -> list[dict[str, Any]]:
    """Rows of many models as entries of the results, one a model and seed."""
    made: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        about = {"model": row["model"], "seed": row["seed"], "data": data, "seconds": row["seconds"]}
        entry = made.setdefault((row["model"], row["seed"]), about | {"rows": []})
        entry["rows"].append({name: row[name] for name in FIELDS})
    return list(made.values())


def spread(rows: list[Row]) -> dict[tuple[str, str, str], dict[str, tuple[float, float, int]]]:
    """{(split, subset, model): {metric: (mean, standard deviation, seeds)}}; also of "seconds"."""
    values = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        place = values[row["split"], row["subset"], row["model"]]
        place[row["metric"]][row["seed"]] = row["value"]
        place["seconds"][row["seed"]] = row["seconds"]
    return {
        place: {metric: results.moments(list(by_seed.values())) for metric, by_seed in metrics.items()}
        for place, metrics in values.items()
    }


def tables(rows: list[Row]) -> list[Table]:
    """One table a split and subset: mean and, of several seeds, standard deviation."""
    found, made = spread(rows), []
    for split, subset in itertools.product(SPLITS, SUBSETS):
        table = Table(title=f"{split}, {SUBSETS[subset]}", title_justify="left")
        table.add_column("model", no_wrap=True)
        for name in ("seeds", *SHOWN, "seconds"):
            table.add_column(name, justify="right", no_wrap=True)
        for (of_split, of_subset, model), metrics in found.items():
            if (of_split, of_subset) == (split, subset):
                cells = [_cell(metrics[metric], 4) for metric in SHOWN]
                table.add_row(model, str(metrics["seconds"][2]), *cells, _cell(metrics["seconds"], 0))
        made.append(table)
    return made


def draw_curves(curves: dict[str, list[list[tuple[float, float]]]], counted: list[Row], path: Path) -> None:
    """Validation against seconds of training, a line a run; Markov as a level to beat."""
    figure, [axis] = axes(1, width=6.4, height=3.6)
    for index, (name, lines) in enumerate(curves.items()):
        style = {"color": COLORS[index % len(COLORS)], "linestyle": ("-", "--", ":")[index // len(COLORS) % 3]}
        for number, points in enumerate(points for points in lines if points):
            axis.plot(*zip(*points), label=None if number else name, linewidth=1.2, **style)
    levels = [row for row in counted if row["model"].startswith("markov") and row["split"] == "valid"]
    for row in (row for row in levels if row["subset"] == "all" and row["metric"] == MONITORED):
        axis.axhline(row["value"], color="#808890", linewidth=0.8, linestyle=":")
        axis.annotate(row["model"], (0.99, row["value"]), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                      fontsize=7, color="#808890")  # fmt: skip
    axis.set_xlabel("seconds of training")
    axis.set_ylabel(f"validation {MONITORED}")
    if any(any(lines) for lines in curves.values()):
        axis.legend(frameon=False, fontsize=7, labelcolor="#808890")
    save(figure, path)


def _cell(moments: tuple[float, float, int], digits: int) -> str:
    average, deviation, count = moments
    return f"{average:.{digits}f}" + (f" ± {deviation:.{digits}f}" if count > 1 else "")


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
