"""Decoding: a catalogue's targets as a trie, and exact searches over it, each a single jitted function.

- `trie.py`: arrays from codes or texts; every node is a range of sorted targets and of items.
- `filters.py`: a set of allowed items for each request, counted and selected in constant time.
- `top.py`: exact top-k of long rows.
- `step.py`: one level of any search: candidates, and the choice among them.
- `beam.py`: beam search over IDs, optionally rescored by a second model, and the expansion of IDs to items.
- `text_beam.py`: beam search over texts of different lengths.
- `rollout.py`: samples of IDs without replacement.
"""

from jaxrec.decoding.beam import BeamResult, Candidates, Rescore, beam_search, expand_items
from jaxrec.decoding.filters import Allowed, ItemFilter, ItemOrder, Mask, build_filter, stack
from jaxrec.decoding.rollout import Rollouts, rollout
from jaxrec.decoding.text_beam import TextResult, text_search
from jaxrec.decoding.trie import Trie, build_text_trie, build_trie

__all__ = [
    "Allowed",
    "BeamResult",
    "Candidates",
    "ItemFilter",
    "ItemOrder",
    "Mask",
    "Rescore",
    "Rollouts",
    "TextResult",
    "Trie",
    "beam_search",
    "build_filter",
    "build_text_trie",
    "build_trie",
    "expand_items",
    "rollout",
    "stack",
    "text_search",
]
