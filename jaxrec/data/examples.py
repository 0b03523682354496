"""Example records: one user's events in order, stored as a TFDS dataset in ArrayRecord files, without TensorFlow.

    <folder>/users/1.0.0/                the TFDS dataset: splits train, valid, test; a record a user, in their order
    <folder>/sessions_<split>.parquet    record, session, split, start (events before it), count, behaviors (a bit each)
    <folder>/examples.json               the ordered behaviors, the number of records and events per split, and whether
                                         models are told the start time of a predicted session (`answer_time`)

A record of `train` holds the train events; of `valid` the train and valid events; of `test` all events. The sessions
file lets cuts be chosen without reading the records.

Where the tables hold searches or suggestions, a record holds the user's searches or suggestions too, in order of time
and of the same splits. They are stored as indices of texts (rows of queries.parquet and prefixes.parquet): a few bytes
each, whatever the texts. A log without them has records without their fields.
"""

import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import tqdm_utils

from jaxrec.config import UserError
from jaxrec.console import track
from jaxrec.data.tables import FEEDBACK, SPLITS
from jaxrec.files import read_json, write_json

Record = dict[str, Any]
"""user int; item int32, behavior int8, timestamp int64, session int32, split int8, each [T]; answer_time bool: whether
the start time of a predicted session is known to the model.

With searches: search_query int32 (row of queries.parquet), search_timestamp int64, search_session int32, search_split
int8, each [R] in order of time; search int32 [T]: the place in them of the search that led to the event, -1 for none.
With suggestions: suggestion_prefix int32 (row of prefixes.parquet), suggestion_query int32, suggestion_feedback int8
(index in FEEDBACK), suggestion_timestamp, suggestion_session, suggestion_split, each [G] in order of time."""

EVENT_DTYPES = {
    "item": np.int32,
    "behavior": np.int8,
    "timestamp": np.int64,
    "session": np.int32,
    "split": np.int8,
}
SEARCH_DTYPES = {
    "search_query": np.int32,
    "search_timestamp": np.int64,
    "search_session": np.int32,
    "search_split": np.int8,
}
SUGGESTION_DTYPES = {
    "suggestion_prefix": np.int32,
    "suggestion_query": np.int32,
    "suggestion_feedback": np.int8,
    "suggestion_timestamp": np.int64,
    "suggestion_session": np.int32,
    "suggestion_split": np.int8,
}


def write_examples(tables: Path, folder: Path, behaviors: Sequence[str], answer_time: bool = True) -> None:
    """Writes the records of all splits from the events, searches and suggestions of `tables`.

    Args:
      behaviors: names in rising order of strength; a record holds their indices.
      answer_time: as in `Record`.

    Raises:
      UserError: a column is missing, a behavior is unknown, or there are no train events (of a log without any: no
        train searches and suggestions).
    """
    logs = [_read_events(tables / "events.parquet", behaviors), *_read_queries(tables)]
    slices, counts = {}, {}
    for index, split in enumerate(SPLITS):
        slices[split] = _slices_of_split(logs, index)
        pq.write_table(_sessions(slices[split]), folder / f"sessions_{split}.parquet")
        counts[split] = {"records": len(slices[split]), **slices[split].sizes()}
    # A log of queries alone has no events in any split.
    trained = [log.kind for log in logs[:1] if len(log.user)] or [log.kind for log in logs[1:]]
    if not any(counts["train"][kind] for kind in trained):
        what = " and ".join(trained) or "events"
        raise UserError(f"{tables / 'events.parquet'} has no train {what}; use more data or another split")
    with _quiet():
        filled = {split: records for split, records in slices.items() if len(records)}
        builder = _Users(data_dir=str(folder), records=filled)
        config = tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
        builder.download_and_prepare(download_config=config, file_format="array_record")
    shutil.rmtree(folder / "downloads", ignore_errors=True)
    write_json(folder / "examples.json", {"behaviors": list(behaviors), "splits": counts, "answer_time": answer_time})


class Records(Sequence[Record]):
    """Random access to the records of a split of an examples folder; decoded records are cached, up to `cache_bytes`.

    Raises:
      UserError: there is no such folder or split.

    Attributes:
      sessions: {column: array}, the sessions file.
      behaviors: names in rising order.
      answer_time: as in every record.
    """

    def __init__(self, folder: Path, split: str, cache_bytes: int = 1 << 30):
        if split not in SPLITS:
            raise UserError(f"there is no split {split!r}; it is one of {', '.join(SPLITS)}")
        about = read_json(Path(folder) / "examples.json")
        self.split, self.behaviors, self.answer_time = split, tuple(about["behaviors"]), about.get("answer_time", True)
        table = pq.read_table(Path(folder) / f"sessions_{split}.parquet")
        self.sessions = {name: table[name].to_numpy() for name in table.column_names}
        self._length = about["splits"][split]["records"]
        self._source = None
        if self._length:
            builder = tfds.builder_from_directory(str(Path(folder) / _Users.name / str(_Users.VERSION)))
            self._source = builder.as_data_source(split)
        self._cache: OrderedDict[int, Record] = OrderedDict()
        self._cache_bytes, self._free_bytes = cache_bytes, cache_bytes
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        index = int(index)
        if not 0 <= index < self._length:
            raise IndexError(index)
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index]
            record = dict(self._source[index])
            record["user"], record["answer_time"] = int(record["user"]), self.answer_time
            self._keep(index, record)
        return record

    def _keep(self, index: int, record: Record) -> None:
        size = _size(record)
        while self._cache and self._free_bytes < size:
            self._free_bytes += _size(self._cache.popitem(last=False)[1])
        if size <= self._free_bytes:
            self._cache[index] = record
            self._free_bytes -= size


@dataclass(frozen=True)
class _Log:
    """One kind of rows, sorted by user: events, searches or suggestions."""

    kind: str
    user: np.ndarray
    columns: dict[str, np.ndarray]
    """The columns of a record, one of them the split."""

    @property
    def split(self) -> np.ndarray:
        return next(column for name, column in self.columns.items() if name.endswith("split"))

    def take(self, keep: np.ndarray) -> "_Log":
        return _Log(self.kind, self.user[keep], {name: column[keep] for name, column in self.columns.items()})


class _Slices(Sequence[Record]):
    """The records of a split as slices of the columns of its logs. The first log is that of the events."""

    def __init__(self, logs: Sequence[_Log]):
        self.logs = logs
        self.users = np.unique(np.concatenate([log.user for log in logs]))
        self.starts = [np.searchsorted(log.user, self.users) for log in logs]
        self.ends = [np.searchsorted(log.user, self.users, side="right") for log in logs]

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> Record:
        record = {"user": self.users[index]}
        for log, starts, ends in zip(self.logs, self.starts, self.ends, strict=True):
            rows = slice(starts[index], ends[index])
            record |= {name: column[rows] for name, column in log.columns.items()}
            if log.kind == "searches":
                # From rows of the log to places in the record; every search of an event is of the same user.
                record["search"] = np.where(record["search"] < 0, -1, record["search"] - rows.start).astype(np.int32)
        return record

    @property
    def dtypes(self) -> dict[str, type]:
        """The arrays of a record."""
        return {name: column.dtype.type for log in self.logs for name, column in log.columns.items()}

    def sizes(self) -> dict[str, int]:
        """Rows of each log."""
        return {log.kind: len(log.user) for log in self.logs}


class _Users(tfds.core.GeneratorBasedBuilder):
    """Writes records as a TFDS dataset; its folder is named by the class's `name` and `VERSION`."""

    name = "users"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, data_dir: str, records: dict[str, _Slices]):
        self._records = records
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        # Tensor, since Sequence would decode to Python lists.
        dtypes = next(iter(self._records.values())).dtypes
        columns = {name: tfds.features.Tensor(shape=(None,), dtype=dtype) for name, dtype in dtypes.items()}
        features = tfds.features.FeaturesDict({"user": tfds.features.Scalar(dtype=np.int32), **columns})
        # In order of users: readers shuffle, and record numbers stay meaningful.
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Record]]]:
        return {split: self._generate_examples(split) for split in self._records}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Record]]:
        records = self._records[split]
        for index in track(range(len(records)), f"{split} examples"):
            yield index, records[index]

    def _log_download_bytes(self) -> None:
        """Nothing is downloaded."""

    def _log_download_done(self) -> None:
        """Nothing is downloaded."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of TFDS."""
    active = tqdm_utils._active
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tqdm_utils._active = active


def _read_events(path: Path, behaviors: Sequence[str]) -> _Log:
    """The events; behaviors and splits as indices."""
    names = ["user", *EVENT_DTYPES]
    try:
        schema = pq.read_schema(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; run train.py again on this run directory") from error
    if missing := [name for name in names if name not in schema.names]:
        raise UserError(f"{path} has no column {missing[0]!r}; delete the folder {path.parent} to have it made again")
    table = pq.read_table(path, columns=[*names, *(["search"] if "search" in schema.names else [])])
    events = {name: table[name].to_numpy() for name in ("user", "item", "timestamp", "session")}
    events["behavior"] = _indices(table["behavior"], behaviors, path, "behavior")
    events["split"] = _indices(table["split"], SPLITS, path, "split")
    columns = {name: events[name].astype(dtype, copy=False) for name, dtype in EVENT_DTYPES.items()}
    if "search" in table.column_names:
        columns["search"] = table["search"].to_numpy().astype(np.int32, copy=False)
    return _Log("events", events["user"].astype(np.int32, copy=False), columns)


def _read_queries(tables: Path) -> Iterator[_Log]:
    """The searches and the suggestions, where there are any; texts, feedback and splits as indices."""
    for kind, dtypes in (("searches", SEARCH_DTYPES), ("suggestions", SUGGESTION_DTYPES)):
        path = tables / f"{kind}.parquet"
        if not path.is_file():
            continue
        table = pq.read_table(path)
        found = {
            "query": table["query_index"].to_numpy(),
            "timestamp": table["timestamp"].to_numpy(),
            "session": table["session"].to_numpy(),
            "split": _indices(table["split"], SPLITS, path, "split"),
        }
        if kind == "suggestions":
            found["prefix"] = table["prefix_index"].to_numpy()
            found["feedback"] = _indices(table["feedback"], FEEDBACK, path, "feedback")
        columns = {name: found[name.split("_")[1]].astype(dtype, copy=False) for name, dtype in dtypes.items()}
        yield _Log(kind, table["user"].to_numpy(), columns)


def _indices(column: pa.ChunkedArray, names: Sequence[str], path: Path, field: str) -> np.ndarray:
    found = pc.index_in(column, pa.array(names, column.type))
    if found.null_count:
        row = int(np.flatnonzero(found.is_null().to_numpy())[0])
        value, known = column[row].as_py(), ", ".join(names)
        raise UserError(f"{path}, row {row}: {field} {value!r} is unknown; it must be one of {known}")
    return found.to_numpy()


def _slices_of_split(logs: Sequence[_Log], index: int) -> _Slices:
    """The rows up to split `index` of the users who have a row in that split."""
    has = np.zeros(max(log.user.max(initial=-1) for log in logs) + 1, bool)
    for log in logs:
        has[log.user[log.split == index]] = True
    keep = {log.kind: has[log.user] & (log.split <= index) for log in logs}
    kept = [log.take(keep[log.kind]) for log in logs]
    if "searches" in keep:
        # An event may be kept without the search that led to it, where the sessions of a user overlap in time.
        row = np.where(keep["searches"], np.cumsum(keep["searches"]) - 1, -1)
        events = kept[0].columns
        events["search"] = np.where(events["search"] < 0, -1, row[events["search"]]).astype(np.int32)
    return _Slices(kept)


def _sessions(records: _Slices) -> pa.Table:
    """One row a session of every record."""
    columns, starts = records.logs[0].columns, records.starts[0]
    session, behavior = columns["session"], columns["behavior"]
    record = np.repeat(np.arange(len(records), dtype=np.int32), records.ends[0] - starts)
    changes = (np.diff(record, prepend=-1) != 0) | (np.diff(session, prepend=-1) != 0)
    first = np.flatnonzero(changes)
    bits = np.left_shift(np.uint64(1), behavior.astype(np.uint64))
    return pa.table(
        {
            "record": record[first],
            "session": session[first],
            "split": columns["split"][first],
            "start": (first - starts[record[first]]).astype(np.int32),
            "count": np.diff(first, append=len(session)).astype(np.int32),
            "behaviors": np.bitwise_or.reduceat(bits, first) if len(first) else bits,
        }
    )


def _size(record: Record) -> int:
    # About 500 bytes for the dictionary and the headers of its arrays.
    return 500 + sum(value.nbytes for value in record.values() if isinstance(value, np.ndarray))
