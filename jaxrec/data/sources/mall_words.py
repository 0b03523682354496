"""Words of the synthetic mall: what a taste is called, what its items are called, what is typed to find them."""

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
    """'Blue running shoes no. 17', and for a video or a stream what it is."""
    return FORMATS[scenario].format(f"{COLORS[index % len(COLORS)].capitalize()} {kind} no. {index}")


def query_of(kind: str) -> str:
    """What is typed to find goods."""
    return kind
