"""report.html of a run: one self-contained page that opens without a server.

Every section is made from one or two files of the run directory, and left out if they are missing:

    metrics.jsonl                                  training curves
    evaluation.json                                the comparison with the baselines
    evaluation/calibration.json                    how well probabilities are calibrated
    semantic_ids/codes.parquet, tables/items.parquet   the tree of semantic IDs
    semantic_ids/quality.json                      the quality of the IDs
    examples_shown.json                            generated items for some users
"""

import json
from collections import defaultdict
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from jaxrec.evaluation.comparison import (
    BY_QUERY,
    CALIBRATION,
    IMPRESSIONS,
    LOWER_IS_BETTER,
    REWARDS,
    SEMANTIC_IDS,
    SHOWN,
    SUGGESTIONS,
    TEACHER_FORCED,
    TEXTS,
    Row,
    SubsetColumn,
    group_of,
    grouped,
    is_system,
    pivot,
    shown_metrics,
    standings,
    unit_of,
    verdict,
)
from jaxrec.evaluation.judgments import JUDGED, JUDGED_ONLY
from jaxrec.evaluation.proxies import courses
from jaxrec.files import read_json
from jaxrec.page import Section, calibration_curve, curve, number, score_table, tiles, write
from jaxrec.run import EVALUATION, Run
from jaxrec.semantic_ids.table.page import PageItems, figure_tables, tree_section
from jaxrec.semantic_ids.table.versions import trained_space

SHOWN_METRICS = ("recall@5", *SHOWN)
SUBSET_TITLES = {
    "all": "Everything in the target session",
    "new": "Looking for something new",
    SEMANTIC_IDS: "Semantic IDs, code by code",
    TEXTS: "Texts, token by token",
    REWARDS: "What the policy is worth",
    "new_in_full_ranking": "New items inside the full ranking",
    SUGGESTIONS: "What is shown for a prefix",
    JUDGED: "Judged pairs",
    JUDGED_ONLY: "Judged pairs, judged items alone",
    IMPRESSIONS["ctr"]: "Clicks of what was shown",
    IMPRESSIONS["cvr"]: "Purchases of what was clicked",
    IMPRESSIONS["ctcvr"]: "Purchases of what was shown",
}
SUBSET_NOTES = {
    SEMANTIC_IDS: "how often the likeliest code is the true one, the codes before it being known; "
    "validity: the share of existing IDs among ten beams without the trie",
    TEXTS: "how often the likeliest token is the true one, the tokens before it being known; "
    "validity: the share of listed texts among ten beams without the trie",
    REWARDS: "means over the first items by the true and by the learned reward; spent: by the held-out basket on the "
    "first ten; distinct: share of the catalogue in all first tens",
    "all": "full ranking, repeat purchases count",
    "new": "what the user already had is taken out of every ranking, and only new targets count",
    "new_in_full_ranking": "the full ranking against new targets only",
    SUGGESTIONS: "full: prefixes with 16 answers, or with as many as were ranked; begins, duplicates: shares of the "
    "answers; saved: keystrokes, where the truth is among the first ten",
    JUDGED: "graded gains; an item that nobody judged has none",
    JUDGED_ONLY: "graded gains; items that nobody judged are taken out of every ranking",
    **dict.fromkeys(
        IMPRESSIONS.values(),
        "predicted probabilities; gauc: the mean of the users' AUCs, weighted by impressions; ece: calibration error",
    ),
}
WORDS = {
    "prefixes": {
        "all": ("Every chosen query", "full ranking"),
        "new": ("Queries new to the user", "the user's own searches are taken out of every ranking and of the targets"),
        "new_in_full_ranking": ("New queries inside the full ranking", "the full ranking against new targets only"),
    },
    "searches": {
        "all": ("Everything that a search led to", SUBSET_NOTES["all"]),
        "new": ("New to whoever searched", SUBSET_NOTES["new"]),
    },
}
"""Title and note of a subset where cases are no users."""
GROUP_NOTES = {
    BY_QUERY: "full ranking; head, torso, tail: each a third of the training searches, by how often the query was "
    "searched for; unseen: never in training",
    "by characters typed": "full ranking; by the characters of the prefix",
    "by prefix": "full ranking; top, middle, long tail: each a third of the training suggestions, by how often the "
    "prefix was typed; unseen: never in training",
    "by chosen query": "full ranking; unseen completions: neither searched for nor chosen in training; clicks, orders: "
    "what the chosen query led to",
}
"""By group of subsets."""
CURVE_POINTS = 400


def write_report(run_path: Path) -> Path:
    """Writes <run>/report.html from the files of the run directory, and returns its path.

    Raises:
      UserError: there is no run at `run_path`, one of its files can't be read, or its IDs are not of its items.
    """
    run, config = Run.load(Path(run_path))
    system = str(config.get("system", "model"))
    sections = (
        _comparison(run, system),
        _calibration(run),
        _examples(run),
        _curves(run),
        _quality(run),
        _id_tree(run),
    )
    report = run.path / "report.html"
    write(report, run.path.resolve().name, system, _headline(run, system), sections)
    return report


def _headline(run: Run, system: str) -> str:
    """The top of the page: the verdict on the system, the size of the data, the system against the best baseline."""
    shown, found = [], standings(_evaluation_rows(run), system)
    statistics = run.tables / "statistics.json"
    if statistics.exists():
        counts = read_json(statistics)
        shown += [
            (number(counts[key]), key) for key in ("users", "items", "events") if isinstance(counts.get(key), int)
        ]
    shown += [(f"{each.value:.4f}", f"{each.what}, {each.difference} against {each.baseline}") for each in found]
    first = f'<p class="verdict">{escape(verdict(found, system))}.</p>' if found else ""
    first += "".join(f'<p class="verdict">{escape(str(course))}.</p>' for course in courses(run.metrics_file))
    return first + (tiles(shown) if shown else "")


def _comparison(run: Run, system: str) -> Section | None:
    rows = _evaluation_rows(run)
    if not rows:
        return None
    parts = []
    others = sorted((row for row in rows if not group_of(row["subset"])), key=_place)
    for (split, subset), group in groupby(others, key=lambda row: (row["split"], row["subset"])):
        group = list(group)
        values, counts = pivot(group)
        metrics = [
            metric for metric in shown_metrics(subset, SHOWN_METRICS) if any(metric in row for row in values.values())
        ]
        unit = unit_of(group, subset in TEACHER_FORCED.values())
        title, told = WORDS.get(unit, {}).get(subset, (SUBSET_TITLES.get(subset, subset), SUBSET_NOTES.get(subset, "")))
        note = f"{split}, {max(counts.values()):,.0f} {unit}; {told}".rstrip("; ")
        parts.append(f"<h3>{escape(title)} <small>{escape(note)}</small></h3>")
        ours = [model for model in values if is_system(model, system)]
        parts.append(score_table(values, metrics, ours, LOWER_IS_BETTER))
    parts += [_group(*key, columns, system) for key, columns in grouped(rows).items()]
    note = f"Every model ranks the whole catalogue for the same {unit_of(rows)}. The best of a column stands in color."
    return "comparison", "Comparison", note, "\n".join(parts)


def _group(split: str, group: str, columns: list[SubsetColumn], system: str) -> str:
    """The table of a group of subsets."""
    titles = [f"{column.title}, {column.metric} ({column.count:,.0f})" for column in columns]
    values: dict[str, dict[str, float]] = {}
    for title, column in zip(titles, columns, strict=True):
        for model, value in column.values.items():
            values.setdefault(model, {})[title] = value
    head = f"<h3>{escape(group.capitalize())} <small>{escape(f'{split}; {GROUP_NOTES[group]}')}</small></h3>"
    return head + score_table(values, titles, [model for model in values if is_system(model, system)])


def _calibration(run: Run) -> Section | None:
    """Of every probability of a ranking model, what was predicted against what was observed."""
    path = run.path / EVALUATION / CALIBRATION
    found = read_json(path) if path.exists() else {}
    figures = [
        calibration_curve(f"{model}: {name}", list(zip(bins["predicted"], bins["observed"], strict=True)))
        for model, curves in found.items()
        for name, bins in curves.items()
        if bins["count"]
    ]
    if not figures:
        return None
    note = "Bins of equally many impressions: the share that was taken, over the probability that was predicted."
    return "calibration", "Calibration", note, f'<div class="curves">{"".join(figures)}</div>'


def _curves(run: Run) -> Section | None:
    """A group of curves for each stage, in the order of training."""
    stages = {name: defaultdict(list) for name in run.stages_there()}
    if run.metrics_file.exists():
        for line in run.metrics_file.read_text().splitlines():
            for stage, name, point in _points(line):
                stages.setdefault(stage, defaultdict(list))[name].append(point)
    groups = [_stage_curves(stage, series, len(stages) > 1) for stage, series in stages.items() if series]
    if not groups:
        return None
    return "training", "Training", "As logged, over training steps.", "".join(groups)


def _stage_curves(stage: str, series: dict[str, list], titled: bool) -> str:
    names = sorted(series, key=lambda name: ("loss" not in name, name))
    figures = "".join(curve(f"{stage} {name}".strip(), _thinned(sorted(series[name]))) for name in names)
    title = f"<h3>Stage {escape(stage)}</h3>" if titled and stage else ""
    return f'{title}<div class="curves">{figures}</div>'


def _points(line: str) -> list[tuple[str, str, tuple[float, float]]]:
    """(stage, name, (step, value)) of every finite number on a line of metrics.jsonl; empty for an incomplete line.

    The stage is "" for a line without one.
    """
    try:
        logged = json.loads(line)
    except json.JSONDecodeError:
        return []
    if not isinstance(logged, dict) or "step" not in logged:
        return []
    return [
        (str(logged.get("stage", "")), key, (logged["step"], value))
        for key, value in logged.items()
        if key not in ("step", "time", "wall_time", "timestamp")
        and isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)
    ]  # fmt: skip


def _thinned(points: list) -> list:
    """At most CURVE_POINTS points, evenly spaced, with the last: more are invisible and only make the page large."""
    rows = np.unique(np.linspace(0, len(points) - 1, min(len(points), CURVE_POINTS)).round().astype(int))
    return [points[row] for row in rows]


def _quality(run: Run) -> Section | None:
    path = run.semantic_ids / "quality.json"
    if not path.exists():
        return None
    note = "Conflicts are items that share a whole ID with another; several items under one ID are all listed."
    return "quality", "Quality of the semantic IDs", note, figure_tables(read_json(path))


def _id_tree(run: Run) -> Section | None:
    codes_path, items_path = run.semantic_ids / "codes.parquet", run.tables / "items.parquet"
    if not (codes_path.exists() and items_path.exists()):
        return None
    wanted = ("item_id", "title", "category", "count")
    items = pq.read_table(items_path, columns=[name for name in pq.read_schema(items_path).names if name in wanted])
    item_ids, titles, categories, counts = (
        items[name].to_pylist() if name in items.column_names else None for name in wanted
    )
    return tree_section(PageItems(trained_space(run.semantic_ids, item_ids), item_ids, titles, categories, counts))


def _examples(run: Run) -> Section | None:
    path = run.path / "examples_shown.json"
    if not path.exists():
        return None
    cards = "".join(_example(shown) for shown in read_json(path))
    if any("prefix" in shown for shown in read_json(path)):
        note = "Who typed what, what the model generates, and what was chosen: generated, it is a hit."
        return "examples", "Some prefixes", note, cards
    if any("query" in shown for shown in read_json(path)):
        note = "Who searched for what, what the model generates, and what the search led to: generated, it is a hit."
        return "examples", "Some searches", note, cards
    note = "What some users had, oldest first, and what the model generates next. A hit is what the user did take next."
    return "examples", "Generated for some users", note, cards


TYPED = {"query": "Searched for", "prefix": "Typed"}
GENERATED = {"query": ("Generated", "The search led to"), "prefix": ("Generated", "Chosen")}
GENERATED_NEXT = ("Generated next", "Then actually taken")


def _example(shown: dict[str, Any]) -> str:
    asked = next((name for name in TYPED if name in shown), "")
    typed = f"<p>{TYPED[asked]}: {escape(shown[asked])}</p>" if asked else ""
    history, searches = shown["history"][-15:], shown.get("searches", [])
    earlier = len(shown["history"]) - len(history)
    before = f'<p class="more">{earlier:,} earlier</p>' if earlier else ""
    columns = []
    if asked == "prefix":
        columns.append(("Last searches", f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in searches)}</ul>"))
    elif searches:
        typed += f'<p class="more">Searched for before: {escape(", ".join(searches))}</p>'
    if history or asked != "prefix":
        columns.append(("History", f"{before}<ul>{''.join(f'<li>{escape(title)}</li>' for title in history)}</ul>"))
    generated, taken = GENERATED.get(asked, GENERATED_NEXT)
    columns.append((generated, f"<ol>{''.join(map(_generated, shown['generated']))}</ol>"))
    feedback = shown.get("feedback", [""] * len(shown["targets"]))
    actual = "".join(map(_taken, shown["targets"], feedback))
    columns.append((taken, f"<ul>{actual}</ul>"))
    parts = "".join(f"<div><h4>{title}</h4>{content}</div>" for title, content in columns)
    return (
        f'<div class="card"><h3>User {escape(str(shown["user"]))}</h3>{typed}<div class="columns">{parts}</div></div>'
    )


def _taken(title: str, feedback: str) -> str:
    chip = f' <span class="chip">{escape(feedback.replace("_", " "))}</span>' if feedback else ""
    return f"<li>{escape(title)}{chip}</li>"


def _generated(item: dict[str, Any]) -> str:
    chips = "".join(f' <span class="chip {kind}">{kind}</span>' for kind in ("hit", "new") if item.get(kind))
    mark = ' class="is-hit"' if item.get("hit") else ""
    return f'<li{mark}>{escape(item["title"])} <span class="score">{item["score"]:.2f}</span>{chips}</li>'


def _evaluation_rows(run: Run) -> list[Row]:
    path = run.path / "evaluation.json"
    return read_json(path) if path.exists() else []


def _place(row: Row) -> tuple[str, int, str]:
    known = list(SUBSET_TITLES)
    return row["split"], known.index(row["subset"]) if row["subset"] in known else len(known), row["subset"]
