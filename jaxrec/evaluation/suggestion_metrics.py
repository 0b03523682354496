"""What is shown for a prefix, whatever the truth: enough, fitting and distinct answers, and the keys that they save.

    full         share of prefixes with SHOWN answers (the full recall rate of OneSug Table 5)
    begins       share of answers that begin with what was typed
    duplicates   share of answers whose text stands at an earlier place already
    saved        keystrokes saved: 1 - typed characters / characters of the truth, where the truth is among the first
                 SAVED_WITHIN answers, else 0, and 0 where more was typed than the truth has; of several truths the one
                 that saves most. The mean over prefixes

The first three are of the first SHOWN answers, or of as many as were ranked. Texts are compared, and their characters
counted, after `jaxrec.data.words.normalised`; a space at the end of what was typed counts (`jaxrec.data.words.typed`).
"""

from collections.abc import Sequence

import numpy as np

from jaxrec.data.words import normalised, typed
from jaxrec.evaluation.metrics import SumCount, hit_matrix
from jaxrec.targets import TextSpace

SHOWN, SAVED_WITHIN = 16, 10


def suggestion_metrics(
    ranked: np.ndarray, targets: np.ndarray, where: np.ndarray, prefixes: Sequence[str], space: TextSpace
) -> dict[str, SumCount]:
    """The metrics of rankings int32 [U, k] (-1 = none) of numbers of `space`, as (sum, count).

    Args:
      targets, where: int32 [U, L] and bool [U, L], as for `jaxrec.evaluation.metrics.ranking_metrics`.
      prefixes: [U], what was typed.
    """
    starts = [typed(prefix) for prefix in prefixes]
    numbers = np.unique(np.concatenate([ranked[ranked >= 0], targets[where]]))
    texts = dict(zip(numbers.tolist(), map(normalised, space.show(numbers.tolist())), strict=True))
    shown = ranked[:, :SHOWN]
    answers = [[texts[number] for number in row[row >= 0].tolist()] for row in shown]
    count = sum(map(len, answers))
    begins = sum(text.startswith(start) for start, row in zip(starts, answers, strict=True) for text in row)
    return {
        "full": (float(sum(len(row) == shown.shape[1] for row in answers)), len(answers)),
        "begins": (float(begins), count),
        "duplicates": (float(sum(len(row) - len(set(row)) for row in answers)), count),
        "saved": (_saved(ranked[:, :SAVED_WITHIN], targets, where, starts, texts), len(answers)),
    }


def _saved(
    ranked: np.ndarray, targets: np.ndarray, where: np.ndarray, starts: Sequence[str], texts: dict[int, str]
) -> float:
    """The sum over prefixes."""
    saved = np.zeros(len(ranked))
    for row, place in zip(*np.nonzero(hit_matrix(ranked, targets, where)), strict=True):
        share = 1 - len(starts[row]) / len(texts[int(ranked[row, place])])
        saved[row] = max(saved[row], share)
    return float(saved.sum())
