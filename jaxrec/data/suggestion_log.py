"""What people typed and searched, by normalised texts (`jaxrec.data.words`), once a session."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.config import UserError
from jaxrec.data.words import normalised


def read_suggestions(tables: Path, split: str, chosen: Sequence[str]) -> pa.Table:
    """The suggestions of a split, sorted, each row once: user, session, prefix, query, feedback.

    Feedback of `chosen` is all given as the first of them, so that a query chosen twice for a prefix in one session is
    one row.

    Raises:
      UserError: the folder has no suggestions.
    """
    path = Path(tables) / "suggestions.parquet"
    if not path.is_file():
        raise UserError(f"{tables} has no suggestions.parquet: give a log of typed prefixes and suggested queries")
    columns = ["user", "session", "prefix", "query", "feedback"]
    rows = pq.read_table(path, columns=columns, filters=pc.field("split") == split)
    taken = pc.is_in(rows["feedback"], pa.array(chosen, pa.string()))
    feedback = pc.if_else(taken, pa.scalar(chosen[0], pa.string()), rows["feedback"])
    rows = rows.set_column(columns.index("feedback"), "feedback", feedback)
    rows = _normalised(rows, "prefix", "query").group_by(columns).aggregate([])
    return rows.sort_by([(name, "ascending") for name in columns])


def read_asked(tables: Path, chosen: Sequence[str]) -> pa.Table:
    """The queries that were searched, or chosen among suggestions, in training: user, session, query; sorted, distinct.

    Raises:
      UserError: the folder has no suggestions.
    """
    columns = ["user", "session", "query"]
    rows = read_suggestions(tables, "train", chosen)
    asked = [rows.filter(pc.equal(rows["feedback"], chosen[0])).select(columns)]
    path = Path(tables) / "searches.parquet"
    if path.is_file():
        searches = pq.read_table(path, columns=columns, filters=pc.field("split") == "train")
        asked.append(_normalised(searches, "query"))
    together = pa.concat_tables(asked)
    together = together.filter(pc.greater(pc.utf8_length(together["query"]), 0))
    return together.group_by(columns).aggregate([]).sort_by([(name, "ascending") for name in columns])


def _normalised(table: pa.Table, *columns: str) -> pa.Table:
    """The table with the texts of some columns normalised; each distinct text is read once."""
    for name in columns:
        texts = table[name].combine_chunks().dictionary_encode()
        folded = pa.array([normalised(text) for text in texts.dictionary.to_pylist()], pa.string())
        table = table.set_column(table.column_names.index(name), name, folded.take(texts.indices))
    return table
