"""What is known of users beside what they did: columns of users.parquet as a text of the prompt
(OneSearch §3.3, OneSug §3.3: U).

The text is the values of the columns in their order, "-" for a missing one. Users with the same values share a text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from jaxrec.config import UserError
from jaxrec.data.item_sequences import user_of
from jaxrec.data.words import distinct, normalised
from jaxrec.evaluation.cases import History
from jaxrec.text.tokenizer import TextTokenizer

MISSING = "-"


@dataclass(frozen=True, eq=False)
class Profiles:
    """The profiles of a log's users, and the tokens of any."""

    columns: tuple[str, ...]
    texts: tuple[str, ...]
    """distinct, normalised"""
    of_user: np.ndarray
    """int64 [users]: the number of a text"""
    tokenizer: TextTokenizer
    tokens: tuple[np.ndarray, ...] = field(init=False, repr=False)
    """int32 [t] of each text"""

    def __post_init__(self):
        rows = self.tokenizer.encode(list(self.texts))
        object.__setattr__(self, "tokens", tuple(np.array(row, np.int32) for row in rows))

    def tokens_of(self, history: History) -> np.ndarray:
        """int32 [t] of the profile that a request gives (`profile`), or of the log's; none of a stranger's."""
        given, user = history.get("profile"), user_of(history)
        if given is not None:
            return np.array(self.tokenizer.encode([profile_text(given, self.columns)])[0], np.int32)
        return self.tokens[self.of_user[user]] if user >= 0 else np.zeros(0, np.int32)


def profile_text(values: Mapping[str, str | None], columns: Sequence[str]) -> str:
    """The text of a profile."""
    return normalised(" ".join(values.get(name) or MISSING for name in columns))


def profile_texts(tables: Path, columns: Sequence[str]) -> list[str]:
    """The text of every user of the tables.

    Raises:
      UserError: the users have no such column.
    """
    known = [name for name in pq.read_schema(tables / "users.parquet").names if name != "user_id"]
    for name in columns:
        if name not in known:
            there = f"there are {', '.join(known)}" if known else "the source brings no profiles"
            raise UserError(f"configuration key 'profile': the users have no column {name!r}; {there}")
    rows = pq.read_table(tables / "users.parquet", columns=list(columns)).to_pylist()
    return [profile_text(row, columns) for row in rows]


def load_profiles(tables: Path, columns: Sequence[str], tokenizer: TextTokenizer) -> Profiles:
    """Raises UserError as `profile_texts`."""
    return Profiles(tuple(columns), *distinct(profile_texts(tables, columns)), tokenizer)
