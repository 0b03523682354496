"""Words of Complete Journey's products: its till-receipt capitals and abbreviations as readable text."""

import re
from typing import Any

# What the retailer's 30-character fields shorten; only abbreviations with one meaning across the catalogue.
ABBREVIATIONS = {
    "ACCES": "accessories", "ASST": "assorted", "BBQ": "barbecue", "BEV": "beverages", "BG": "bags", "BKD": "baked",
    "BRKFST": "breakfast", "CHIX": "chicken", "CHKN": "chicken", "CLEANG": "cleaning", "CND": "canned",
    "CONTAINR": "containers", "DNRS": "dinners", "DRSNG": "dressing", "EXC": "except", "FD": "food", "FLR": "floor",
    "FRSH": "fresh", "FRT": "fruit", "FRZ": "frozen", "FRZN": "frozen", "GM": "general merchandise", "HH": "household",
    "JCE": "juice", "MISC": "miscellaneous", "MXS": "mixes", "NDLS": "noodles", "PCKGD": "packaged", "PKG": "packaged",
    "PKGD": "packaged", "PLSTC": "plastic", "PNT": "peanut", "PREP": "prepared", "PROD": "products",
    "REFRGRATD": "refrigerated", "REFRIG": "refrigerated", "REFRIGRATD": "refrigerated", "RTE": "ready to eat",
    "SALD": "salad", "SHLF": "shelf", "SNDWCH": "sandwich", "SPRD": "spread", "SQZ": "squeeze", "STBL": "stable",
    "SUGR": "sugar", "TORT": "tortilla", "TRSH": "trash", "VEG": "vegetables", "WHLSM": "wholesome", "WTR": "water",
    "YOG": "yogurt",
}  # fmt: skip

# Types that say little without their category: 'Traditional' is an ice cream, 'Pails' too.
VAGUE = frozenset([
    "angus", "blends", "brushes", "butts", "cocktails", "cones", "cooked", "decor", "dry", "economy", "enhanced",
    "entrees", "external", "flank", "flavored/other", "fresh", "furniture", "internal", "kabobs", "kits",
    "kosher/specialty", "laundry", "lean", "loave", "mainstream", "microwave", "minuet", "miscellaneous", "other",
    "oven", "pails", "pantry", "patties", "pre-cooked", "premium", "primal", "quarts", "red", "ribs", "smoked/cooked",
    "sticks/enrobed", "traditional", "value", "wrap",
])  # fmt: skip


def readable(words: str | None) -> str:
    """Title case, abbreviations written out: 'FRZN MEAT/MEAT DINNERS' -> 'Frozen Meat/Meat Dinners'."""
    words = re.sub(r"\bW/(?=\w)", "with ", words or "")
    words = re.sub(r"\(INCLUDING$", "", words)
    words = re.sub(r"\s*&\s*", " & ", words)
    words = re.sub(r":\s*", ": ", words)
    words = re.sub(r"[A-Za-z]+", lambda word: ABBREVIATIONS.get(word.group(), word.group()), words)
    words = re.sub(r"\s+", " ", words).strip(" -:/")
    # A field that was cut inside brackets has lost the closing one.
    words += ")" * (words.count("(") - words.count(")"))
    return re.sub(r"[A-Za-z']+", lambda word: _title_case(word.group()), words)


def _title_case(word: str) -> str:
    return word if word in ("with", "to") else word[0].upper() + word[1:].lower()


def product_title(product: dict[str, Any]) -> str:
    """'Ice - Crushed/Cubed, 22 LB (National 2)'; a vague type stands behind its category, 'Bacon: Economy'."""
    kind = readable(product["product_type"])
    if kind.lower() in VAGUE:
        kind = f"{readable(product['product_category'])}: {kind}"
    size = f", {_size(product)}" if _size(product) else ""
    return f"{kind}{size} ({product['brand']} {product['manufacturer_id']})"


def product_text(product: dict[str, Any]) -> str:
    """What the encoder reads, the most telling first: type, category, department, brand, size, manufacturer."""
    names = (readable(product[key]).lower() for key in ("product_type", "product_category", "department"))
    kinds = ", ".join(dict.fromkeys(names))
    size = f", {_size(product).lower()}" if _size(product) else ""
    brand = "private label" if product["brand"] == "Private" else "national brand"
    return f"{kinds}. {brand}{size}, manufacturer {product['manufacturer_id']}"


def _size(product: dict[str, Any]) -> str:
    return re.sub(r"\s+", " ", product["package_size"] or "").strip()
