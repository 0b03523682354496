"""Decoding: a catalogue's semantic IDs as a trie, and exact beam search over it, in one jitted function.

- `trie.py`: arrays from codes; every node is a range of sorted IDs and of items.
- `filters.py`: a different set of allowed items for every request, counted and selected in constant time.
- `beam.py`: the search itself, and the expansion of IDs to items.
"""

from jaxrec.decoding.beam import BeamResult, beam_search, expand_items
from jaxrec.decoding.filters import ItemFilter, build_filter
from jaxrec.decoding.trie import Trie, build_trie

__all__ = ["BeamResult", "ItemFilter", "Trie", "beam_search", "build_filter", "build_trie", "expand_items"]
