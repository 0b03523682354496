"""Target spaces: what the tokens of a target mean.

- `space.py`: the Protocol that recommender, metrics, report, server and export know.
- `semantic_ids.py`: items by their semantic IDs.
- `texts.py`: texts of a list, or any text.
- `text_list.py`: their list: made, changed, read back.
- `text_numbers.py`: the numbers of texts, listed or not.
"""

from jaxrec.data.words import normalised
from jaxrec.targets.semantic_ids import SemanticIdSpace
from jaxrec.targets.space import Constrained, Found, TargetSpace
from jaxrec.targets.text_list import changed, load_text_space, text_space
from jaxrec.targets.texts import TextSpace, TextSpaceConfig

__all__ = [
    "Constrained",
    "Found",
    "SemanticIdSpace",
    "TargetSpace",
    "TextSpace",
    "TextSpaceConfig",
    "changed",
    "load_text_space",
    "normalised",
    "text_space",
]
