"""Sources: one file for each place that logs come from."""

from jaxrec.data.sources.complete_journey import CompleteJourney
from jaxrec.data.sources.folder import Folder
from jaxrec.data.sources.sequence_text import SequenceText
from jaxrec.data.sources.synthetic_mall import SyntheticMall

__all__ = ["CompleteJourney", "Folder", "SequenceText", "SyntheticMall"]
