"""Draws context_and_targets.svg: one context that is read once, and many short targets scored against it.

python docs/pictures/context_and_targets.py
"""

from html import escape
from pathlib import Path

EVENTS = (("viewed", "oat milk"), ("searched", "“granola”"), ("bought", "granola"), ("bought", "oat milk"))
TARGETS = (
    ("bought next", (12, 3, 7), "#2e7d32", "likelihood"),
    ("bought too", (12, 9, 1), "#2e7d32", "likelihood"),
    ("seen, not bought", (40, 3, 2), "#c62828", "preference"),
    ("sampled", (7, 7, 0), "#6a1b9a", "rollout"),
    ("beam", (12, 3, None), "#1565c0", "search"),
)
WIDTH, HEIGHT = 920, 330
BOX, GAP, TOP = 34, 8, 92


def text(
    x: float, y: float, words: str, size: int = 13, anchor: str = "middle", colour: str = "#333", **more: str
) -> str:
    """A line of text."""
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{extra}>{escape(words)}</text>'
    )


def box(x: float, y: float, width: float, height: float, fill: str, line: str) -> str:
    """A rounded rectangle."""
    place = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="5"'
    return f'<rect {place} fill="{fill}" stroke="{line}" stroke-width="1.3"/>'


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str = "#888") -> str:
    """A line with a head."""
    return (
        f'<path d="M{x1},{y1} C{(x1 + x2) / 2},{y1} {(x1 + x2) / 2},{y2} {x2},{y2}" fill="none" stroke="{colour}" '
        'stroke-width="1.4" marker-end="url(#head)"/>'
    )


def context() -> list[str]:
    """The events of a user, and the context that `prefill` makes of them."""
    parts = [text(105, 30, "one context", 16, font_weight="bold"), text(105, 50, "read once: prefill", colour="#777")]
    for row, (kind, what) in enumerate(EVENTS):
        y = TOP + row * (BOX + GAP)
        parts += [box(30, y, 150, BOX, "#fff8e1", "#f9a825"), text(105, y + 21, f"{kind} {what}")]
    middle = TOP + (len(EVENTS) * (BOX + GAP) - GAP) / 2
    parts += [
        arrow(184, middle, 236, middle),
        box(242, TOP, 84, len(EVENTS) * (BOX + GAP) - GAP, "#fffde7", "#f57f17"),
        text(284, middle - 6, "keys and"),
        text(284, middle + 12, "values"),
        text(284, middle + 34, "[B, S, N, H]", 11, colour="#777"),
    ]
    return parts


def targets() -> list[str]:
    """The targets, each with its codes, and what a loss or a search takes of them."""
    parts = [
        text(560, 30, "many short targets", 16, font_weight="bold"),
        text(560, 50, "each attends to the context and to itself: score, extend", colour="#777"),
    ]
    middle = TOP + (len(EVENTS) * (BOX + GAP) - GAP) / 2
    for row, (name, codes, colour, use) in enumerate(TARGETS):
        y = TOP - 16 + row * (BOX + GAP)
        parts += [arrow(330, middle, 470, y + BOX / 2, "#f9a825"), text(560, y + 21, name, anchor="start")]
        for place, code in enumerate(codes):
            x = 474 + place * 28
            parts.append(box(x, y + 5, 24, 24, "white", colour))
            parts.append(text(x + 12, y + 21, "?" if code is None else str(code), 11, colour=colour))
        parts += [arrow(690, y + BOX / 2, 760, y + BOX / 2), text(770, y + 21, use, anchor="start", colour=colour)]
    parts.append(
        text(
            560,
            TOP - 16 + len(TARGETS) * (BOX + GAP) + 14,
            "semantic IDs: [B, L, M] log-probabilities",
            11,
            colour="#777",
        )
    )
    return parts


def draw() -> str:
    """The whole picture."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#888"/></marker></defs>'
    )
    return "\n".join([head, *context(), *targets(), "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw())
