"""The layout of HTML pages: escaped HTML, inline SVG pictures, one style sheet; no script, no network."""

import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jaxrec.files import writing

Section = tuple[str, str, str, str]
"""anchor, title, note on how to read it, HTML."""
INK, LINE = "#010203", "#040506"
"""Placeholder colors for matplotlib; the page's colors replace them, so that curves follow light and dark mode."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1c2430; --soft: #647084; --rule: #e3e7ed;
  --accent: #2f6bd8; --bar: #2f6bd81c; --hit: #16794c; --hit-bg: #16794c1a; --new: #96600a; --new-bg: #b9770e1f; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1a1f28; --ink: #dde3ec; --soft: #8d99ab;
  --rule: #2a313d; --accent: #7aa7ff; --bar: #7aa7ff24; --hit: #5fd39b; --hit-bg: #5fd39b22; --new: #e5b45c;
  --new-bg: #e5b45c22; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
header p, .note, figcaption, .more { color: var(--soft); }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .25rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
h3 small { font-weight: 400; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; margin: 1rem 0; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.verdict { font-size: 1.1rem; font-weight: 600; margin: 1rem 0 0; max-width: 56rem; }
.note { margin: 0 0 1rem; max-width: 48rem; }
.card, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.card { padding: 1rem 1.25rem; margin: 0 0 1rem; }
.scroll { overflow-x: auto; padding: .25rem .5rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.tiles .card { margin: 0; padding: .8rem 1rem; }
.tiles b { display: block; font-size: 1.45rem; font-weight: 600; line-height: 1.3; }
.tiles span { color: var(--soft); font-size: .85rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: var(--soft); font-size: .85rem; }
th, td { text-align: right; padding: .42rem .7rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
td.value { background: linear-gradient(90deg, var(--accent) var(--share), var(--rule) var(--share)) no-repeat
  right .7rem bottom .2rem / 3.6rem 2px; }
td.best { font-weight: 700; color: var(--accent); }
tr.system td:first-child { font-weight: 650; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: .75rem; }
figure { margin: 0; padding: .75rem; } figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; padding: 0 .25rem .25rem; } figcaption b { color: var(--ink); font-weight: 600; }
details { border-top: 1px solid var(--rule); } details:first-of-type { border-top: 0; }
details details { margin-left: 1.4rem; }
summary { cursor: pointer; padding: .45rem 0; } summary:hover { color: var(--accent); }
summary .more { font-size: .88rem; }
code { font: .85em ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--bar); border-radius: 5px;
  padding: .1em .45em; }
ul, ol { margin: .25rem 0 .75rem; padding-left: 1.5rem; } ul.plain { list-style: none; padding-left: 1.4rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 0 2rem; }
.columns h4 { margin: .5rem 0 .25rem; font-size: .85rem; font-weight: 500; color: var(--soft); }
.columns li, .groups li { overflow-wrap: anywhere; }
.groups { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: .75rem; margin: .75rem 0; }
.groups .card { margin: 0; } .groups h3 { margin: 0 0 .4rem; } .groups small { display: block; margin-top: .2rem; }
.groups ul { padding-left: 0; margin-bottom: 0; }
.groups li { font-size: .92rem; padding: .1rem 0; }
.score { color: var(--soft); font-size: .82rem; font-variant-numeric: tabular-nums; }
.chip { font-size: .75rem; border-radius: 99px; padding: .08rem .55rem; white-space: nowrap; }
.hit { color: var(--hit); background: var(--hit-bg); } .new { color: var(--new); background: var(--new-bg); }
li.is-hit { font-weight: 600; }
"""


def write(path: Path, title: str, subtitle: str, headline: str, sections: Iterable[Section | None]) -> None:
    """Write a page as one file, atomically: title, links to its sections, headline (HTML), sections.

    Raises:
      UserError: the disk is full.
    """
    there = [part for part in sections if part]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _, _ in there)
    head = f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header><nav>{links}</nav>"
    html = page(f"{title} · jaxrec", "\n".join([head, headline, *(section(*part) for part in there)]))
    partial = path.with_name(f"{path.name}.partial")
    with writing(path.parent):
        partial.write_text(html, encoding="utf-8")
        partial.replace(path)


def page(title: str, body: str) -> str:
    """A whole document; `title` is plain text, `body` is HTML."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(anchor: str, title: str, note: str, body: str) -> str:
    """A titled part of the page, with a note on how to read it."""
    return f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n<p class="note">{escape(note)}</p>\n{body}\n</section>'


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """(value, label) pairs in large type."""
    cards = (f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in values)
    return f'<div class="tiles">{"".join(cards)}</div>'


def score_table(
    values: dict[str, dict[str, float]],
    metrics: Sequence[str],
    highlighted: Iterable[str] = (),
    lower: Iterable[str] = (),
) -> str:
    """One row a model, one column a metric; a bar behind each value; the best of each column is marked.

    lower: the metrics of which less is better.
    """
    best = {}
    for metric in metrics:
        found = [row[metric] for row in values.values() if metric in row]
        best[metric] = (min if metric in lower else max)(found, default=0.0)
    head = "".join(f"<th>{escape(metric)}</th>" for metric in metrics)
    rows = []
    for model, row in values.items():
        cells = "".join(_score_cell(row.get(metric), best[metric]) for metric in metrics)
        mark = ' class="system"' if model in highlighted else ""
        rows.append(f"<tr{mark}><td>{escape(model)}</td>{cells}</tr>")
    return f'<div class="card scroll"><table><tr><th>model</th>{head}</tr>{"".join(rows)}</table></div>'


def _score_cell(value: float | None, best: float) -> str:
    if value is None:
        return "<td>-</td>"
    share = 100 * min(value / best, best / value) if best > 0 and value > 0 else 0
    marked = " best" if value == best and best > 0 else ""
    return f'<td class="value{marked}" style="--share:{share:.0f}%">{value:.4f}</td>'


def facts(values: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    return table((), values)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain text, with an optional head; the first column is aligned left, the others right."""
    lines = ["".join(f"<th>{escape(name)}</th>" for name in head)] if head else []
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f'<div class="card scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def number(value: object) -> str:
    """A formatted value: thousands separated, fractions to four digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def curve(title: str, points: Sequence[tuple[float, float]]) -> str:
    """A line over training steps as inline SVG."""
    steps, values = zip(*points, strict=True)

    def draw(axes: Any) -> None:
        axes.plot(steps, values, color=LINE, linewidth=1.6, marker="o" if len(points) < 4 else None, markersize=4)
        axes.ticklabel_format(axis="y", scilimits=(-4, 6))
        axes.locator_params(nbins=4)

    return picture(title, f"{number(values[-1])} at step {number(steps[-1])}", draw)


def calibration_curve(title: str, points: Sequence[tuple[float, float]]) -> str:
    """Observed shares over predicted probabilities, with the line of equal ones, as inline SVG."""
    predicted, observed = zip(*points, strict=True)
    most = max(*predicted, *observed)

    def draw(axes: Any) -> None:
        axes.plot([0, most], [0, most], color=INK, alpha=0.35, linewidth=1)
        axes.plot(predicted, observed, color=LINE, linewidth=1.6, marker="o", markersize=3)
        axes.locator_params(nbins=4)

    return picture(title, f"{len(points)} bins", draw)


def picture(title: str, caption: str, draw: Callable[[Any], None]) -> str:
    """A matplotlib picture, drawn by `draw` in INK and LINE, as inline SVG with title and caption."""
    # Imported here: it takes a second, and only pages need it.
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.6, 1.9), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set(color=INK, alpha=0.35)
        axes.tick_params(colors=INK, length=2, which="both")
        axes.grid(color=INK, alpha=0.1)
        axes.set_axisbelow(True)
        draw(axes)
        drawn = io.StringIO()
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=none)
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(LINE, "var(--accent)")
    return f"<figure><figcaption><b>{escape(title)}</b> {escape(caption)}</figcaption>{svg}</figure>"
