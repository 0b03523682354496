"""Words of the synthetic mall: names of tastes, titles of items, queries."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

NOUNS = (
    "running shoes", "coffee beans", "garden tools", "phone cases", "board games", "winter coats", "cat food",
    "acoustic guitars", "baby strollers", "camping tents", "face creams", "office chairs", "bicycle helmets",
    "kitchen knives", "wool scarves", "desk lamps", "fishing rods", "hair dryers", "picture frames", "sun glasses",
    "travel bags", "water bottles", "yoga mats", "tea pots", "rain boots",
)  # fmt: skip
STYLES = ("", "vintage", "compact", "luxury", "eco", "sport", "kids", "professional", "handmade", "outlet")
COLORS = ("red", "blue", "green", "black", "white", "grey", "yellow", "orange")
FORMATS = {"product_card": "{}", "short_video": "Video: {}", "live_stream": "Live: {}"}


def goods(taste: int) -> str:
    """The kind of goods of a taste: 'running shoes', and past the first words 'vintage running shoes'."""
    style, noun = divmod(int(taste), len(NOUNS))
    words = STYLES[style] if style < len(STYLES) else f"series {style}"
    return f"{words} {NOUNS[noun]}".strip()


def item_title(kind: str, index: int, scenario: str) -> str:
    """'Blue running shoes no. 17', with the format of a video or a stream."""
    return FORMATS[scenario].format(f"{COLORS[index % len(COLORS)].capitalize()} {kind} no. {index}")


def queries_of(kind: str) -> tuple[str, ...]:
    """The queries for a kind of goods, the most frequent first; some begin alike, so that a prefix leaves a choice."""
    return kind, f"{kind} sale", f"cheap {kind}", f"best {kind}"


def identifiers(prefix: str, index: Sequence[int] | np.ndarray, size: int) -> pa.Array:
    """Identifiers whose text order is their number order: i007."""
    width = len(str(size - 1))
    return pa.array([f"{prefix}{i:0{width}d}" for i in range(size)], pa.string()).take(pa.array(index))
