"""Metrics of predicted probabilities: AUC, GAUC, log-loss and calibration (NumPy).

They judge a ranking model on what was shown, where recall and NDCG (`jaxrec.evaluation.metrics`) judge lists. All of
them are of flat arrays: a row is one item that was shown to one user.
"""

from dataclasses import dataclass

import numpy as np

from jaxrec.config import UserError

BINS = 10
"""bins of a calibration curve"""
MONITORED = ("auc", "gauc", "likelihood")
"""What a training can be judged by: higher is better. The likelihood is minus the log-loss."""


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The probability that a positive row has a higher score than a negative one; equal scores count half.

    scores [n]; labels bool [n]. NaN where there is no positive or no negative row.
    """
    _check(scores, labels)
    labels = np.asarray(labels, bool)
    positives = int(labels.sum())
    pairs = positives * (len(labels) - positives)
    # The sum of the positives' ranks, less what they have among themselves (Mann-Whitney's U).
    total = _ranks(np.asarray(scores))[labels].sum() - positives * (positives + 1) / 2
    return float(total / pairs) if pairs else float("nan")


def gauc(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[float, int]:
    """The mean of the groups' AUCs, each weighted by its rows, and the number of groups that have one.

    groups int [n], such as users. A group with positive or with negative rows alone has no AUC and is left out (Zhou et
    al. 2018, "Deep Interest Network", Eq. 7, weighted by impressions). NaN where no group has one.
    """
    _check(scores, labels, groups)
    _, group = np.unique(groups, return_inverse=True)
    # Each group's scores in a range of their own: one sort ranks within all groups.
    order = np.lexsort((scores, group))
    scores, labels, group = np.asarray(scores)[order], np.asarray(labels, bool)[order], group[order]
    size = np.bincount(group)
    before = np.cumsum(size) - size
    changes = np.flatnonzero(np.diff(group, prepend=-1) | (np.diff(scores, prepend=np.nan) != 0))
    ranks = _midranks(changes, len(scores)) - before[group]
    positives = np.bincount(group, labels, len(size))
    pairs = positives * (size - positives)
    total = np.bincount(group, ranks * labels, len(size)) - positives * (positives + 1) / 2
    there = pairs > 0
    if not there.any():
        return float("nan"), 0
    return float(np.average(total[there] / pairs[there], weights=size[there])), int(there.sum())


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The mean of -log of the probability that each row's label was given; probabilities are kept off 0 and 1 by 1e-7.

    NaN without rows.
    """
    _check(probabilities, labels)
    p = np.clip(np.asarray(probabilities, np.float64), 1e-7, 1 - 1e-7)
    return float(-np.log(np.where(np.asarray(labels, bool), p, 1 - p)).mean()) if len(p) else float("nan")


@dataclass(frozen=True, eq=False)
class Calibration:
    """Bins of about equally many rows, by rising probability."""

    predicted: np.ndarray
    """float64 [bins]: mean probability"""
    observed: np.ndarray
    """float64 [bins]: share of positive rows"""
    count: np.ndarray
    """int64 [bins]: rows"""

    @property
    def error(self) -> float:
        """Expected calibration error: the mean of |predicted - observed|, weighted by rows; NaN without rows."""
        gap = np.abs(self.predicted - self.observed)
        return float(np.average(gap, weights=self.count)) if len(gap) else float("nan")


def calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Calibration:
    """The calibration of probabilities [n] against labels bool [n], in at most `bins` bins.

    Rows of one probability are in one bin, so there are fewer bins where probabilities are few.
    """
    _check(probabilities, labels)
    p = np.asarray(probabilities, np.float64)
    order = np.argsort(p, kind="stable")
    p, labels = p[order], np.asarray(labels, bool)[order]
    edges = (len(p) * np.arange(bins + 1)) // bins
    starts = np.unique(np.searchsorted(p, p[edges[:-1]])) if len(p) else np.zeros(0, np.int64)
    count = np.diff(starts, append=len(p))
    sums = [np.add.reduceat(each, starts) if len(p) else np.zeros(0) for each in (p, labels.astype(np.float64))]
    return Calibration(*(total / np.maximum(count, 1) for total in sums), count)


def impression_metrics(probabilities: np.ndarray, labels: np.ndarray, users: np.ndarray) -> dict[str, float]:
    """All of them by name: auc, gauc, log_loss, ece; those that are NaN are left out."""
    found = {
        "auc": auc(probabilities, labels),
        "gauc": gauc(probabilities, labels, users)[0],
        "log_loss": log_loss(probabilities, labels),
        "ece": calibration(probabilities, labels).error,
    }
    return {name: value for name, value in found.items() if not np.isnan(value)}


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks from 1 of scores [n], the mean of theirs for equal ones."""
    order = np.argsort(scores, kind="stable")
    changes = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)
    ranks = np.empty(len(scores))
    ranks[order] = _midranks(changes, len(scores))
    return ranks


def _midranks(starts: np.ndarray, size: int) -> np.ndarray:
    """The rank from 1 of each of `size` sorted rows, where runs of equal ones begin at `starts`."""
    ends = np.append(starts[1:], size)
    return np.repeat((starts + ends + 1) / 2, ends - starts)


def _check(scores: np.ndarray, *others: np.ndarray) -> None:
    if any(len(each) != len(scores) for each in others):
        raise UserError(f"scores, labels and groups have {[len(scores), *map(len, others)]} rows; give one of each")
    if np.isnan(np.asarray(scores, np.float64)).any():
        raise UserError("scores hold NaN, which can't be ranked: the model's parameters are damaged, train it again")
