"""Sources: one file for each place that logs come from."""

from jaxrec.data.sources.click_log import ClickLog
from jaxrec.data.sources.complete_journey import CompleteJourney
from jaxrec.data.sources.folder import Folder
from jaxrec.data.sources.jd_micro import JdMicro
from jaxrec.data.sources.judged_pairs import JudgedPairs
from jaxrec.data.sources.kuai_search import KuaiSearch
from jaxrec.data.sources.search_log import SearchLog
from jaxrec.data.sources.sequence_text import SequenceText
from jaxrec.data.sources.suggestion_lines import SuggestionLines
from jaxrec.data.sources.synthetic_mall import SyntheticMall

AnySource = (
    CompleteJourney
    | SequenceText
    | Folder
    | SyntheticMall
    | JdMicro
    | ClickLog
    | JudgedPairs
    | KuaiSearch
    | SearchLog
    | SuggestionLines
)
"""What a system's configuration may name after `--data`."""

__all__ = [
    "AnySource",
    "ClickLog",
    "CompleteJourney",
    "Folder",
    "JdMicro",
    "JudgedPairs",
    "KuaiSearch",
    "SearchLog",
    "SequenceText",
    "SuggestionLines",
    "SyntheticMall",
]
