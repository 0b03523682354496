"""Target spaces: what the tokens of a target mean.

- `space.py`: the Protocol that recommender, metrics, report, server and export know.
- `semantic_ids.py`: items by their semantic IDs.
- `texts.py`: texts of a list, or any text.
"""

from jaxrec.data.words import normalised
from jaxrec.targets.semantic_ids import SemanticIdSpace
from jaxrec.targets.space import Found, TargetSpace
from jaxrec.targets.texts import TextSpace, TextSpaceConfig, load_text_space, text_space

__all__ = [
    "Found",
    "SemanticIdSpace",
    "TargetSpace",
    "TextSpace",
    "TextSpaceConfig",
    "load_text_space",
    "normalised",
    "text_space",
]
