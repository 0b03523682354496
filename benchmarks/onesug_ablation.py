"""OneSug and what each of its parts brings: Tables 2 and 3, and Fig. 5, on any log with suggestions.

    python benchmarks/onesug_ablation.py [--config configs/onesug_mall.py] [--data path=FILE ...]
        [--variants whole,no_pre] [--seeds 0,1,2] [--related 0,5,10,20] [--beams 16,32,64,128,256] [--quick]

A variant is the configuration with one part taken out or replaced:

    whole            as the configuration is: list-wise, with margin, rewards' weights and related queries (PRE)
    no_margin        the preferences without the margin loss: their terms linear, delta = 0
    no_rw            pairs weighted equally, all else as in whole
    pairs            pair-wise: one rejected query for each chosen one
    pairs_no_margin  the same without the margin
    pairs_no_rw      the same without rewards' weights too: plain DPO, with PRE
    no_rwr           no preference stage: the likelihood alone, with PRE
    no_pre           no related queries
    gra_dpo          plain DPO without PRE (Table 2)
    gra_sft          the likelihood alone, without PRE (Table 2; "w/o PRE&RWR" in Table 3)
    no_copying       no copying of candidates, which is ours

--related trains the whole with other numbers of related queries (Fig. 5a); --beams searches the whole with other widths
(Fig. 5b), with the milliseconds of a prefix searched for in batches. Variants of one seed share what they have in
common: tables, tokenizer and the likelihood stage are made once. Runs keep their folders (--runs), so that the same
command goes on where it was stopped. Rows {model, split, subset, metric, value, count} of the variant and of the
baselines are added to benchmarks/results/onesug.json with data, seed, seconds, command, commit and device; a table of
test rows is printed, and plots go to --pictures. --data sets fields of the configuration's source, such as `path`.
--quick: a tiny mall and few steps, only to see that everything works; not kept.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from shared import results
from shared.ablation import parse_variants, table_of, with_files
from shared.pictures import COLORS, GREY, axes, save
from shared.timing import parse_seeds, parser

from jaxrec.config import UserError, load_config
from jaxrec.console import console, report_user_errors
from jaxrec.data.sources import SyntheticMall
from jaxrec.evaluation.comparison import Row
from jaxrec.files import read_json
from jaxrec.programs import keep_compiled_programs
from jaxrec.run import Run
from jaxrec.systems import check, load_recommender, train
from jaxrec.systems.comparison import cases_of, compare, draw
from jaxrec.systems.onesug.config import PREFERENCE, OneSugConfig
from jaxrec.systems.recommender import GenerativeRecommender

ROOT = Path(__file__).parent.parent
CUTOFFS = (10, 16)
SHOWN = [(subset, f"{name}@16") for subset in ("all", "new", "clicks", "orders") for name in ("hr", "mrr")]
PLOTTED = ("hr@16", "mrr@16")
TIMED = 256
"""Prefixes whose search is timed."""
QUICK_STEPS, QUICK_PREFIXES = 4, 20

Change = Callable[[OneSugConfig], OneSugConfig]


def preference(loss: dict[str, Any] | None = None, **changes: Any) -> Change:
    """The configuration with other values in its preference stage, and in the loss of it."""

    def change(config: OneSugConfig) -> OneSugConfig:
        if config.preference is None:
            raise UserError("--config: the configuration has no preference stage, so none can be changed; give one")
        of_loss = replace(config.preference.loss, **loss or {})
        return replace(config, preference=replace(config.preference, loss=of_loss, **changes))

    return change


def without_preference(config: OneSugConfig) -> OneSugConfig:
    """The likelihood alone."""
    return replace(config, preference=None)


def related(count: int, config: OneSugConfig) -> OneSugConfig:
    """The configuration with another number of related queries; of 0 none are copied either."""
    near = config.features.near if count else 0
    return replace(config, features=replace(config.features, related=count, near=near))


def chain(*changes: Change) -> Change:
    """All of them, one after the other."""

    def change(config: OneSugConfig) -> OneSugConfig:
        for each in changes:
            config = each(config)
        return config

    return change


NO_MARGIN = {"form": "linear", "margin": 0.0}
PAIRS = {"compare": "pairs"}
PLAIN_DPO = preference(PAIRS | NO_MARGIN, rejected=1, weighted=False)
NO_PRE = partial(related, 0)
VARIANTS: dict[str, Change] = {
    "whole": lambda config: config,
    "no_margin": preference(NO_MARGIN),
    "no_rw": preference(weighted=False),
    "pairs": preference(PAIRS, rejected=1),
    "pairs_no_margin": preference(PAIRS | NO_MARGIN, rejected=1),
    "pairs_no_rw": PLAIN_DPO,
    "no_rwr": without_preference,
    "no_pre": NO_PRE,
    "gra_dpo": chain(PLAIN_DPO, NO_PRE),
    "gra_sft": chain(without_preference, NO_PRE),
    "no_copying": lambda config: replace(config, copying=False),
}
WITHOUT_PRE = ("no_pre", "gra_dpo", "gra_sft")


def main() -> None:
    """Trains what is not trained yet; keeps, prints and plots the rows."""
    command = parser(__doc__)
    command.add_argument("--config", type=Path, default=ROOT / "configs" / "onesug_mall.py")
    command.add_argument("--data", nargs="*", default=[], metavar="FIELD=FILE", help="fields of the source")
    command.add_argument("--variants", default="whole", help=f"some of {', '.join(VARIANTS)}, with commas between")
    command.add_argument("--seeds", default="0", help="whole numbers, with commas between")
    command.add_argument("--related", default="", help="numbers of related queries, with commas between")
    command.add_argument("--beams", default="", help="beam widths, with commas between")
    command.add_argument("--runs", type=Path, default=Path("runs/onesug_ablation"), help="where run folders are kept")
    command.add_argument("--pictures", type=Path, default=Path("docs/pictures"), help="folder for the plots")
    args = command.parse_args()
    variants, seeds = parse_variants(args.variants, VARIANTS), parse_seeds(args.seeds)
    base = base_config(args.config, args.data, args.quick)
    if set(variants).intersection(WITHOUT_PRE) and not base.features.related:
        raise UserError("--variants: the configuration has no related queries that could be left out; set more than 0")
    sizes, widths = parse_numbers("--related", args.related, 0), parse_numbers("--beams", args.beams, 1)
    changes = {name: VARIANTS[name] for name in variants}
    changes |= {f"related_{size}": partial(related, size) for size in sizes}
    pictures = args.runs / "quick" if args.quick else args.pictures
    results.make_folder("--pictures", pictures)
    keep_compiled_programs()
    entries = []

    def keep(entry: dict[str, Any]) -> None:
        entries.append({"data": args.config.stem, **entry})
        if not args.quick:
            results.append("onesug", entries[-1:])

    for seed in seeds:
        for name, change in changes.items():
            console.rule(f"{args.config.stem}, {name}, seed {seed}")
            keep({"model": name, "seed": seed, **measured(args, name, replace(change(base), seed=seed))})
        if widths:
            run = trained(args, "whole", replace(base, seed=seed))[0]
            for entry in searched(run, base, widths):
                keep({"seed": seed, **entry})
    console.print(table_of(entries, base.system, SHOWN))
    plot(entries, base.system, {"related": sizes, "beams": widths}, pictures / f"{args.config.stem}_sweeps.svg")


def parse_numbers(flag: str, text: str, least: int) -> list[int]:
    """Rising whole numbers of a flag; none of an empty text.

    Raises:
      UserError: one is no whole number, or less than `least`.
    """
    try:
        numbers = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError as error:
        raise UserError(f"{flag} {text!r}: give whole numbers with commas between, such as 10,20") from error
    if numbers and numbers[0] < least:
        raise UserError(f"{flag} {text!r}: give numbers of {least} or more")
    return numbers


def base_config(path: Path, pairs: Sequence[str], quick: bool) -> OneSugConfig:
    """The configuration of a file with the given files in its source; of a tiny mall where it shall be quick.

    Raises:
      UserError: it is no configuration of OneSug.
    """
    config = load_config(path)
    if not isinstance(config, OneSugConfig):
        raise UserError(f"--config: this is a configuration of {config.system}; give one of onesug")
    cutoffs = tuple(sorted({*config.evaluation.cutoffs, *CUTOFFS}))
    config = replace(with_files(config, pairs), evaluation=replace(config.evaluation, cutoffs=cutoffs))
    if not quick:
        return config
    mall = SyntheticMall(*(60, 60, 6, 3, 6), browsed_per_session=1, exposures_per_session=1, searched=0.6)
    prepare = replace(config.prepare, suggestions=None)
    config = replace(shorter(config), data=mall, prepare=prepare, batch_size=8)
    if config.preference is not None:
        config = replace(config, preference=shorter(config.preference))
    few = {name: replace(getattr(config, name), max_users=QUICK_PREFIXES) for name in ("evaluation", "validation")}
    return replace(config, **few, tokenizer=replace(config.tokenizer, vocabulary=340))


def shorter(part: Any) -> Any:
    """A configuration, or one of a stage, with few steps and no validation in between."""
    steps = {"steps": QUICK_STEPS, "checkpoint_every": QUICK_STEPS, "evaluate_every": 0, "log_every": 1}
    optim, training = replace(part.optim, warmup=1), replace(part.training, **steps, patience=0)
    return replace(part, optim=optim, training=training)


def trained(args: Any, name: str, config: OneSugConfig) -> tuple[Run, float]:
    """The run of a variant, trained where it is not, and the seconds that it took.

    A new run begins as a copy of one that is there: what its stages have in common is not made again.
    """
    place = args.runs / ("quick" if args.quick else "")
    folder = place / f"{args.config.stem}-{name}-{config.seed}"
    check(folder, config)
    others = sorted(place.glob(f"{args.config.stem}-*-{config.seed}/examples"))
    if others and not folder.exists():
        results_of = ("evaluation*", "validation", "beams_*", "examples_shown.json", "report.html", "metrics.jsonl")
        mine = shutil.ignore_patterns(*results_of, PREFERENCE)
        unfinished = folder.with_name(f".{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(others[0].parent, unfinished, ignore=mine)
        unfinished.rename(folder)
    run, start = Run.open(folder, config), time.monotonic()
    train(run, config)
    return run, round(time.monotonic() - start, 1)


def measured(args: Any, name: str, config: OneSugConfig) -> dict[str, Any]:
    """Trains a variant and measures it: {"seconds", "rows"}, of test beside the baselines and of validation alone."""
    run, seconds = trained(args, name, config)
    validation = run.path / "validation"
    if not (validation / "evaluation.json").exists():
        validation.mkdir(exist_ok=True)
        settings = replace(config.evaluation, split="valid", baselines=False)
        compare(run, load_recommender(run), settings, validation)
    rows = read_json(run.path / "evaluation.json") + read_json(validation / "evaluation.json")
    return {"seconds": seconds, "rows": rows}


def searched(run: Run, config: OneSugConfig, widths: Iterable[int]) -> Iterable[dict[str, Any]]:
    """{"model", "seconds", "rows"} of the trained run with other beam widths, on test."""
    known = load_recommender(run)
    cases = draw(cases_of(known.assembly, "test"), config.evaluation).histories[:TIMED]
    settings = replace(config.evaluation, split="test", baselines=False, shown_users=0)
    for width in widths:
        start, decoding = time.monotonic(), replace(known.config, beam_width=width)
        model = GenerativeRecommender(known.assembly, known.variables, known.feature_config, decoding)
        folder = run.path / f"beams_{width}"
        folder.mkdir(exist_ok=True)
        compare(run, model, settings, folder)
        begin = time.perf_counter()  # compiled by now
        model.recommend(cases, max(config.evaluation.cutoffs))
        milliseconds = 1e3 * (time.perf_counter() - begin) / len(cases)
        timed: Row = {"model": config.system, "split": "test", "subset": "all", "metric": "ms_a_prefix"}
        rows = [*read_json(folder / "evaluation.json"), {**timed, "value": milliseconds, "count": len(cases)}]
        yield {"model": f"beams_{width}", "seconds": round(time.monotonic() - start, 1), "rows": rows}


def plot(entries: Sequence[dict[str, Any]], system: str, swept: dict[str, Sequence[int]], path: Path) -> None:
    """HR@16 and MRR@16 of test over what was swept (Fig. 5), with the spread of seeds; milliseconds beside beams."""
    swept = {name: numbers for name, numbers in swept.items() if len(numbers) > 1}
    if not swept:
        return
    words = {"related": "related queries", "beams": "beams"}
    figure, places = axes(len(swept), width=3.8)
    for place, (name, numbers) in zip(places, swept.items(), strict=True):
        for color, metric in zip(COLORS, PLOTTED, strict=False):
            points = [results.moments(values_of(entries, system, f"{name}_{each}", metric)) for each in numbers]
            means, spreads, _ = zip(*points, strict=True)
            style = {"color": color, "marker": "o", "markersize": 3, "label": metric}
            place.errorbar(range(len(numbers)), means, spreads, **style)
        labels = [f"{each}" for each in numbers]
        if name == "beams":
            times = [results.moments(values_of(entries, system, f"beams_{each}", "ms_a_prefix"))[0] for each in numbers]
            labels = [f"{label}\n{each:.1f} ms" for label, each in zip(labels, times, strict=True)]
        place.set_xticks(range(len(numbers)), labels)
        place.set_xlabel(words[name])
        place.legend(frameon=False, fontsize=8, labelcolor=GREY)
    save(figure, path)


def values_of(entries: Sequence[dict[str, Any]], system: str, model: str, metric: str) -> list[float]:
    """A metric of all test cases, one value a seed."""
    wanted = (system, "test", "all", metric)
    return [
        row["value"]
        for entry in entries
        if entry["model"] == model
        for row in entry["rows"]
        if tuple(row[name] for name in ("model", "split", "subset", "metric")) == wanted
    ]


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
