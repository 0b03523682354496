"""The vetted list of queries: the queries of training that a shop may suggest, cleaned and counted.

    vetted = vetted_queries(run.tables, VettedQueriesConfig(answered_only=True, block_list=Path("blocked.txt")))
    space = text_space(tokenizer, vetted.texts, vetted.counts, blocked=vetted.blocked)

A query is in its normalised form (`jaxrec.data.words`): case and white space are one, control characters and what can't
be seen are out. A query whose words hold the words of a blocked line, one after the other, is left out.
"""

import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.config import UserError, check_least, fingerprint
from jaxrec.data.blocked import NOTHING, Blocked, compared
from jaxrec.data.sources.files import digest, text_lines
from jaxrec.data.words import normalised, words

KEY = "vetted"
"""The prefix of the configuration keys in messages."""


@dataclass(frozen=True)
class VettedQueriesConfig:
    """Which queries of training are kept."""

    min_count: int = 1
    """Least count of a query, over all its writings: its searches in training or, without any, its choices."""
    answered_only: bool = False
    """Whether queries are dropped whose searches led to no event in training: those that seem to have no results."""
    block_list: Path | None = None
    """A UTF-8 file of blocked words and texts, one a line; None: nothing is blocked."""

    def __post_init__(self):
        check_least(self, KEY, min_count=1)

    def fingerprint(self) -> str:
        """Of the block list's content and this configuration, the place of the file left out."""
        path = None if self.block_list is None else Path(self.block_list)
        listed = digest(path) | {"name": ""} if path is not None and path.is_file() else None
        return fingerprint("vetted_queries", self.min_count, self.answered_only, listed)


@dataclass(frozen=True)
class VettedQueries:
    """The kept queries, the most frequent first, equally frequent ones in alphabetical order."""

    texts: tuple[str, ...]
    """Distinct normalised texts."""
    counts: np.ndarray
    """int64 [texts], how often each was searched or chosen in training."""
    dropped: dict[str, int]
    """Distinct normalised queries that were left out, by reason."""
    blocked: Blocked = NOTHING
    """what must not be shown, listed or not"""


def vetted_queries(tables: Path, config: VettedQueriesConfig = VettedQueriesConfig()) -> VettedQueries:
    """The vetted list of a prepared folder.

    Raises:
      UserError: the folder holds no queries, the block list can't be read, the log tells of no events although
        `answered_only` asks for them, or nothing is left.
    """
    path = Path(tables) / "queries.parquet"
    if not path.is_file():
        raise UserError(f"{path} is missing; use a log with searches or suggestions")
    blocked = NOTHING if config.block_list is None else block_list(Path(config.block_list))
    table = pq.read_table(path, columns=["query", "count", "chosen"])
    counts = np.where(table["count"].to_numpy() > 0, table["count"].to_numpy(), table["chosen"].to_numpy())
    answered = _answered(Path(tables), table.num_rows) if config.answered_only else np.ones(table.num_rows, bool)
    total: Counter[str] = Counter()
    with_results: set[str] = set()
    for row in np.flatnonzero(counts):
        text = normalised(table["query"][int(row)].as_py())
        total[text] += int(counts[row])
        if answered[row]:
            with_results.add(text)
    reasons = {
        "empty": lambda text: not text,
        "rarer than min_count": lambda text: total[text] < config.min_count,
        "led to no event": lambda text: text not in with_results,
        "blocked": blocked.holds,
    }
    dropped = dict.fromkeys(reasons, 0)
    kept = []
    for text in total:
        reason = next((name for name, is_out in reasons.items() if is_out(text)), None)
        if reason is None:
            kept.append(text)
        else:
            dropped[reason] += 1
    if not kept:
        why = ", ".join(f"{count} {name}" for name, count in dropped.items() if count) or "none was searched"
        raise UserError(f"no query of training is left for the vetted list ({why}); loosen {KEY}, or use more data")
    kept.sort(key=lambda text: (-total[text], text))
    return VettedQueries(tuple(kept), np.array([total[text] for text in kept], np.int64), dropped, blocked)


def block_list(path: Path) -> Blocked:
    """The block list of a file: no text may be one of its lines, or hold the words of one side by side.

    Raises:
      UserError: the file is missing, can't be read, or is no UTF-8.
    """
    try:
        lines = sorted({normalised(line) for _, line in text_lines(path)})
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{KEY}.block_list: {path} can't be read ({error}); give a text file") from error
    lines = [line for line in lines if compared(line)]
    return Blocked(
        texts=tuple(line for line in lines if not words(line)), words=tuple(line for line in lines if words(line))
    )


def _answered(tables: Path, queries: int) -> np.ndarray:
    """Whether a search for each query led to an event in training, bool [queries]."""
    searches, events = tables / "searches.parquet", tables / "events.parquet"
    led = np.zeros(queries, bool)
    if searches.is_file() and "search" in pq.read_schema(events).names:
        table = pq.read_table(events, columns=["search", "split"])
        rows = table.filter(pc.and_(pc.equal(table["split"], "train"), pc.greater_equal(table["search"], 0)))["search"]
        query = pq.read_table(searches, columns=["query_index"])["query_index"]
        led[query.to_numpy()[np.unique(rows.to_numpy())]] = True
    if not led.any():
        raise UserError(
            f"{events}: no search led to an event in training, so {KEY}.answered_only would leave no query; set it to "
            "False, or use a log that tells what searches led to"
        )
    return led
