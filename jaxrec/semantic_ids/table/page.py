"""semantic_ids.html: the figures of a catalogue's IDs, their tree, and items that share codes.

`figure_tables` and `id_tree` are shown in the report of a run too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jaxrec.config import UserError
from jaxrec.page import INK, LINE, Section, facts, number, picture, table, tiles, write
from jaxrec.semantic_ids.table.quality import quality
from jaxrec.semantic_ids.table.space import SemanticIds

BRANCHES_SHOWN = (40, 12, 10)
"""Most branches shown below the root of the ID tree, below a first code, and items shown below a second."""
GROUPS_SHOWN, ITEMS_SHOWN = 6, 8
"""Most crowded IDs (and shared prefixes) shown, and items under each."""
CURVE_POINTS = 400
RECALLS = {
    "neighbour_recall@10": "of neighbours kept by what the IDs decode to",
    "neighbour_recall_by_id@10": "of neighbours kept by the IDs alone",
}


def write_page(
    path: Path,
    space: SemanticIds,
    item_ids: Sequence[str],
    titles: Sequence[str | None] | None = None,
    categories: Sequence[str | None] | None = None,
    counts: np.ndarray | None = None,
    figures: dict | None = None,
) -> None:
    """Write the page of a catalogue's IDs: one file without scripts that needs no network.

    item_ids: [I], shown for items without a title. titles, categories: [I] or None. counts: [I], popularity of each
    item; by default that of the space. figures: the result of `quality`; by default its figures of the IDs alone.

    Raises:
      UserError: a column is not as long as the space, or the disk is full.
    """
    figures = quality(space) if figures is None else figures
    catalogue = PageItems(space, item_ids, titles, categories, counts)
    sizes = " x ".join(map(str, space.codebook_sizes))
    sections = (
        _levels(space, figures),
        _kept(figures),
        _crowded(catalogue, figures),
        _neighbours(catalogue),
        tree_section(catalogue),
    )
    write(path, "Semantic IDs", f"{len(item_ids):,} items, codes {sizes}", tiles(_headline(figures)), sections)


@dataclass(frozen=True, eq=False)
class PageItems:
    """Items and their IDs in the order of the IDs, so that a prefix is a range of rows.

    item_ids, titles, categories: [I]; counts: [I], popularity of each item. All but the first may be None.

    Raises:
      UserError: a column is not as long as the space.
    """

    space: SemanticIds
    item_ids: Sequence[str]
    titles: Sequence[str | None] | None = None
    categories: Sequence[str | None] | None = None
    counts: np.ndarray | None = None

    def __post_init__(self):
        for name in ("item_ids", "titles", "categories", "counts"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.space.codes):
                raise UserError(
                    f"{len(column)} {name} do not fit {len(self.space.codes)} semantic IDs: give one for each item"
                )

    @cached_property
    def popularity(self) -> np.ndarray:
        """f64 [I]; all 0 when unknown."""
        known = self.space.popularity if self.counts is None else self.counts
        return np.zeros(len(self.item_ids)) if known is None else np.nan_to_num(np.asarray(known, np.float64))

    @cached_property
    def order(self) -> np.ndarray:
        """Items sorted by ID, then by falling popularity, int64 [I]."""
        return np.lexsort((-self.popularity, self.space.leaf))

    @cached_property
    def codes(self) -> np.ndarray:
        """The codes of `order`, int32 [I, M]."""
        return self.space.codes[self.order]

    def title(self, item: int) -> str:
        """The title of an item, or its id."""
        return (self.titles[item] if self.titles is not None else None) or str(self.item_ids[item])

    def popular(self, start: int, end: int, most: int) -> list[int]:
        """At most `most` items of a range of rows, the most popular first."""
        inside = self.order[start:end]
        return inside[np.lexsort((inside, -self.popularity[inside]))[:most]].tolist()

    def main_category(self, start: int, end: int) -> tuple[str, float]:
        """The most frequent category of a range of rows and its share; an empty name when most have none."""
        names, member = self._category
        counted = np.bincount(member[self.order[start:end]])
        return names[counted.argmax()], float(counted.max() / (end - start))

    @cached_property
    def _category(self) -> tuple[list[str], np.ndarray]:
        """Category names, the first of them empty, and the index of each item's category, int [I]."""
        if self.categories is None:
            return [""], np.zeros(len(self.item_ids), int)
        encoded = pa.array([name or None for name in self.categories], pa.string()).dictionary_encode()
        return ["", *encoded.dictionary.to_pylist()], encoded.indices.fill_null(-1).to_numpy() + 1


def tree_section(catalogue: PageItems) -> Section:
    """The IDs from coarse to fine, as nested sections that open."""
    note = "Codes from coarse to fine; the fullest branches first, the most popular items of each. Open one to go down."
    return "tree", "The tree of semantic IDs", note, f'<div class="card">{_branches(catalogue, 0, None, 0)}</div>'


def figure_tables(figures: dict) -> str:
    """Figures of `quality`, with any others in the dict, as tables; missing ones are left out."""
    tabled = ("codebook_sizes", "levels", "prefixes", "bucket_sizes", "reconstruction_error", "pairs_sharing_prefix")
    rest = {name: value for name, value in figures.items() if name not in tabled}
    parts = [_level_table(figures), _prefix_table(figures)]
    if rest:
        values = ((name.replace("_", " "), number(value)) for name, value in _flat(rest))
        parts.append(f"<h3>IDs as a whole</h3>{facts(values)}")
    return "\n".join(parts)


def _headline(figures: dict) -> list[tuple[str, str]]:
    return [
        (number(figures["items"]), "items"),
        (number(figures["distinct_ids"]), "distinct IDs"),
        (percent(figures["conflict_rate"]), "of items share their ID (conflict)"),
        (percent(figures["independent_coding_rate"]), "of IDs are one item's (ICR)"),
        (percent(figures["prefixes"][-1]["utilization"]), "of possible IDs in use (CUR total)"),
    ]


def percent(share: float) -> str:
    """A share in percent, to four digits."""
    return f"{100 * share:.4g}%"


def _level_table(figures: dict) -> str:
    rows = [
        (
            f"{level + 1}",
            number(size),
            _shown(use, "use", percent),
            f"{_shown(use, 'entropy_bits', '{:.2f}'.format)} of {_shown(use, 'most_bits', '{:.2f}'.format)}",
            _shown(use, "gini", "{:.3f}".format),
            _shown(use, "largest", number),
        )
        for level, (size, use) in enumerate(zip(figures.get("codebook_sizes", ()), figures.get("levels", ())))
    ]
    head = ("level", "codes", "in use", "entropy, bits", "Gini", "items of fullest")
    return f"<h3>Each level alone</h3>{table(head, rows)}" if rows else ""


def _prefix_table(figures: dict) -> str:
    prefixes = figures.get("prefixes", ())
    columns: list[tuple[str, list[str]]] = [
        ("prefixes", [number(row["distinct"]) for row in prefixes]),
        ("CUR", [percent(row["utilization"]) for row in prefixes]),
        ("entropy, bits", [f"{row['entropy_bits']:.2f}" for row in prefixes]),
        ("conflict", [percent(row["conflict_rate"]) for row in prefixes]),
        ("exclusive", [percent(row["exclusive_rate"]) for row in prefixes]),
        ("items of fullest", [number(row["largest_bucket"]) for row in prefixes]),
        ("variance lost", [percent(lost) for lost in figures.get("reconstruction_error", ())]),
    ]
    for name, shares in figures.get("pairs_sharing_prefix", {}).items():
        columns.append((f"shared by {name}" if name == "pairs" else f"by {name} pairs", list(map(percent, shares))))
    columns = [(name, cells) for name, cells in columns if prefixes and len(cells) == len(prefixes)]
    names = ["1" if m == 0 else f"1 to {m + 1}" for m in range(len(prefixes))]
    rows = zip(names, *(cells for _, cells in columns), strict=True)
    return f"<h3>Levels together</h3>{table(['levels', *(name for name, _ in columns)], rows)}" if prefixes else ""


def _shown(record: dict, key: str, form: Callable[[Any], str]) -> str:
    return form(record[key]) if key in record else "-"


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Nested dicts as (dotted name, value) pairs; a short list on one line."""
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list):
        shown = ", ".join(number(inner) for inner in value[:8])
        return [(name, shown + (f", … ({len(value)} values)" if len(value) > 8 else ""))]
    return [(name, value)]


def _levels(space: SemanticIds, figures: dict) -> Section:
    drawn = "".join(
        _use_picture(level + 1, np.bincount(space.codes[:, level], minlength=size))
        for level, size in enumerate(space.codebook_sizes)
    )
    note = (
        "How evenly codes are used. Gini is 0 when each code has as many items; CUR is the share of prefixes that "
        "exist, of all that the codebooks can spell. Pictures: items under each code, the fullest first; the dashed "
        "line is even use."
    )
    return "levels", "Use of the codes", note, f'<div class="curves">{drawn}</div>{figure_tables(figures)}'


def _use_picture(level: int, counts: np.ndarray) -> str:
    falling = np.sort(counts)[::-1]
    # More points are invisible and only make the page large.
    ranks = np.unique(np.linspace(0, len(falling) - 1, min(len(falling), CURVE_POINTS)).round().astype(int))

    def draw(axes: Any) -> None:
        axes.fill_between(ranks + 1, falling[ranks], color=LINE, alpha=0.18, linewidth=0)
        axes.plot(ranks + 1, falling[ranks], color=LINE, linewidth=1.4, solid_joinstyle="round")
        axes.axhline(counts.mean(), color=INK, alpha=0.6, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xlim(0, len(falling))
        axes.set_ylim(0)
        axes.locator_params(nbins=4)
        axes.yaxis.set_major_formatter("{x:,.0f}")

    used = int((counts > 0).sum())
    return picture(f"Level {level}", f"{used:,} of {len(counts):,} codes in use", draw)


def _kept(figures: dict) -> Section | None:
    drawn = []
    if lost := figures.get("reconstruction_error"):
        drawn.append(_by_level("Variance lost", f"{percent(lost[-1])} after level {len(lost)}", lost))
    if shared := figures.get("pairs_sharing_prefix"):
        drawn.append(_by_level("Pairs sharing a prefix", "dashed: any two", shared["pairs"], shared["random"]))
    recalls = [(percent(figures[name]), what) for name, what in RECALLS.items() if name in figures]
    if not drawn and not recalls:
        return None
    note = (
        "Variance lost is the part of the embeddings that the first levels leave unexplained; neighbours are the ten "
        "items with the nearest embeddings."
    )
    if sample := figures.get("sample"):
        note += f" Measured on {number(sample['rows'])} items, drawn at random."
    body = (tiles(recalls) if recalls else "") + f'<div class="curves">{"".join(drawn)}</div>'
    return "kept", "What is kept of the embeddings", note, body


def _by_level(title: str, caption: str, values: list[float], beside: list[float] | None = None) -> str:
    levels = range(1, len(values) + 1)

    def draw(axes: Any) -> None:
        axes.plot(levels, values, color=LINE, linewidth=1.6, marker="o", markersize=4)
        if beside is not None:
            axes.plot(levels, beside, color=INK, alpha=0.6, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.set_xticks(levels)
        axes.set_ylim(0, 1.1 * max(*values, *(beside or ()), 1e-9))
        axes.locator_params(axis="y", nbins=4)
        axes.yaxis.set_major_formatter(lambda share, _: percent(share))

    return picture(title, caption, draw)


def _crowded(catalogue: PageItems, figures: dict) -> Section:
    counts, ends = catalogue.space.counts, np.cumsum(catalogue.space.counts)
    fullest = np.lexsort((np.arange(len(counts)), -counts))[:GROUPS_SHOWN]
    groups = [(int(ends[leaf] - counts[leaf]), int(ends[leaf])) for leaf in fullest if counts[leaf] > 1]
    shared, under = int((counts > 1).sum()), int(counts[counts > 1].sum())
    note = (
        f"{number(shared)} of {number(len(counts))} IDs stand for more than one item, {number(under)} items in all; "
        "the fullest IDs first."
    )
    levels = catalogue.space.levels
    cards = "".join(_group(catalogue, *group, levels) for group in groups)
    body = f'{_bucket_picture(figures["bucket_sizes"])}<div class="groups">{cards}</div>'
    return "crowded", "Items under one ID", note if shared else "Every item has an ID of its own.", body


def _bucket_picture(bins: list[dict]) -> str:
    names = [str(row["to"]) if row["from"] == row["to"] else f"{row['from']}-{row['to']}" for row in bins]

    def draw(axes: Any) -> None:
        bars = axes.bar(names, [row["items"] for row in bins], color=LINE, width=0.7)
        axes.bar_label(bars, [number(row["items"]) for row in bins], color=INK, padding=2, fontsize=8)
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.15)
        axes.locator_params(axis="y", nbins=4)
        axes.yaxis.set_major_formatter("{x:,.0f}")

    drawn = picture("Items", "by how many stand under their ID", draw)
    rows = [(name, number(row["ids"]), number(row["items"])) for name, row in zip(names, bins, strict=True)]
    return (
        f'<div class="columns"><div>{drawn}</div><div>{table(("items under an ID", "IDs", "items"), rows)}</div></div>'
    )


def _neighbours(catalogue: PageItems) -> Section | None:
    """The most popular groups of items with different IDs that share the longest prefix any two IDs share."""
    ids, counts = catalogue.space.ids, catalogue.space.counts
    for length in range(catalogue.space.levels - 1, 0, -1):
        begins = np.flatnonzero(np.r_[True, (ids[1:, :length] != ids[:-1, :length]).any(1)])
        several = np.flatnonzero(np.diff(np.r_[begins, len(ids)]) > 1)
        if len(several):
            break
    else:
        return None
    begin = (np.cumsum(counts) - counts)[begins]
    popular = np.add.reduceat(catalogue.popularity[catalogue.order], begin)[several]
    if popular.any():
        chosen = several[np.argsort(-popular, kind="stable")[:GROUPS_SHOWN]]
    else:
        chosen = several[np.unique(np.linspace(0, len(several) - 1, GROUPS_SHOWN).round().astype(int))]
    end = np.r_[begin[1:], len(catalogue.order)]
    groups = "".join(_group(catalogue, int(begin[place]), int(end[place]), length) for place in chosen)
    title = f"Items that share the first {length} of {catalogue.space.levels} codes"
    note = f"{number(len(several))} such prefixes have several IDs below them; {len(chosen)} of them as examples."
    return "prefixes", title, note, f'<div class="groups">{groups}</div>'


def _group(catalogue: PageItems, start: int, end: int, length: int) -> str:
    """A card with the items of rows start to end, which share their first `length` codes."""
    prefix = escape(catalogue.space.to_text(catalogue.codes[start, :length]))
    category, share = catalogue.main_category(start, end)
    about = f" <small>{escape(category)} {share:.0%}</small>" if category else ""
    items = _items(catalogue, start, end, ITEMS_SHOWN, with_id=length < catalogue.space.levels)
    return f'<div class="card"><h3><code>{prefix}</code> {_how_many(end - start)}{about}</h3>{items}</div>'


def _branches(catalogue: PageItems, start: int, end: int | None, level: int) -> str:
    """The branches of rows start to end as nested details; at the second level (or the last) the items themselves."""
    end = len(catalogue.order) if end is None else end
    if level == min(2, catalogue.space.levels):
        return _items(catalogue, start, end, BRANCHES_SHOWN[level], with_id=True)
    begins = start + np.r_[0, np.flatnonzero(np.diff(catalogue.codes[start:end, level])) + 1]
    ends = np.r_[begins[1:], end]
    fullest = np.lexsort((begins, begins - ends))[: BRANCHES_SHOWN[level]]
    parts = []
    for branch in fullest:
        first, last = int(begins[branch]), int(ends[branch])
        label = escape(catalogue.space.to_text(catalogue.codes[first, : level + 1]))
        gist = _gist(catalogue, first, last)
        summary = f"<code>{label}</code> {_how_many(last - first)} <span class=more>{gist}</span>"
        parts.append(f"<details><summary>{summary}</summary>{_branches(catalogue, first, last, level + 1)}</details>")
    return "".join(parts) + _and_more(len(begins) - len(fullest), "p")


def _items(catalogue: PageItems, start: int, end: int, most: int, with_id: bool) -> str:
    lines = []
    for item in catalogue.popular(start, end, most):
        code = f"<code>{escape(catalogue.space.to_text(catalogue.space.codes[item]))}</code> " if with_id else ""
        lines.append(f"<li>{code}{escape(_cut(catalogue.title(item), 100))}</li>")
    return f'<ul class="plain">{"".join(lines)}{_and_more(end - start - len(lines), "li")}</ul>'


def _gist(catalogue: PageItems, start: int, end: int) -> str:
    """A summary of a branch: its most frequent category, and the titles of its most popular items."""
    category, share = catalogue.main_category(start, end)
    titles = list(dict.fromkeys(catalogue.title(item) for item in catalogue.popular(start, end, 12)))[:3]
    head = f"{category} {share:.0%} · " if category else ""
    return escape(head + " · ".join(_cut(title, 48) for title in titles))


def _cut(title: str, most: int) -> str:
    return title if len(title) <= most else f"{title[: most - 1]}…"


def _and_more(count: int, tag: str) -> str:
    return f'<{tag} class="more">and {count:,} more</{tag}>' if count > 0 else ""


def _how_many(items: int) -> str:
    return "1 item" if items == 1 else f"{items:,} items"
