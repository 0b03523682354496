"""The judged pairs of a run's tables: judgments.parquet, one reading for training and for evaluation."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.config import UserError

FILE = "judgments.parquet"


@dataclass(frozen=True, eq=False)
class GradedPairs:
    """n judged pairs of one split, with the range of the grades of all splits."""

    query: np.ndarray
    """int32 [n], rows of queries.parquet"""
    item: np.ndarray
    """int32 [n]"""
    grade: np.ndarray
    """float64 [n]"""
    lowest: float
    """grade of the file"""
    highest: float
    """grade of the file"""


def graded_pairs(tables: Path, split: str) -> GradedPairs | None:
    """The judged pairs of a split; None where the tables have none of any.

    Raises:
      UserError: a pair has no grade.
    """
    path = Path(tables) / FILE
    if not path.is_file():
        return None
    table = pq.read_table(path, columns=["query_index", "item", "grade", "split"])
    grades = table["grade"].cast(pa.float64()).fill_null(np.nan).to_numpy()
    for row in np.flatnonzero(~np.isfinite(grades))[:1]:
        raise UserError(f"{path}: row {row} has no grade: give every judged pair a number")
    if not len(grades):
        return None
    mine = np.asarray(pc.equal(table["split"], split))
    query, item = (table[name].to_numpy()[mine] for name in ("query_index", "item"))
    return GradedPairs(query, item, grades[mine], float(grades.min()), float(grades.max()))
