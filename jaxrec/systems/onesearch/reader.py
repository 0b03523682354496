"""What reads a search: its query and the searches of its past, with what the log tells of them.

A reader is fitted to a run's log. It can be saved beside an exported model, which then answers queries without the run:

    queries.jsonl              the distinct queries of the log
    statistics.safetensors     what each led to
    neighbours.safetensors     which items the same users take, if that is read
    query_ids/                 what gives a query its ID, if queries have any
    reader.json                the configuration of the statistics, and the columns of profiles

Users of the log, their searches and their profiles are not part of it: a request brings its own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxrec.config import from_json, to_json
from jaxrec.data.item_neighbours import ItemNeighbours, load_neighbours
from jaxrec.data.popularity import DAY
from jaxrec.data.search_features import SearchFeatureConfig
from jaxrec.data.search_statistics import SearchStatistics, SearchStatisticsConfig, load_statistics
from jaxrec.data.words import normalised
from jaxrec.evaluation.cases import History
from jaxrec.files import read_json, write_json
from jaxrec.semantic_ids.queries import load_query_ids
from jaxrec.systems.onesearch.queries import NEIGHBOURS, KnownQueries
from jaxrec.systems.profiles import Profiles
from jaxrec.text.tokenizer import TextTokenizer

QUERIES, STATISTICS, QUERY_IDS, NOTES = "queries.jsonl", "statistics.safetensors", "query_ids", "reader.json"


@dataclass(frozen=True, eq=False)
class SearchReader:
    """Reads the texts of histories."""

    queries: KnownQueries
    statistics: SearchStatistics
    features: SearchFeatureConfig
    """with the levels of the IDs"""
    neighbours: ItemNeighbours | None = None
    """which items the same users take; None: it is not read"""
    profiles: Profiles | None = None
    """what is known of users; None: it is not read"""

    @property
    def profile_columns(self) -> tuple[str, ...]:
        """What a request may tell of its user."""
        return () if self.profiles is None else self.profiles.columns

    def read_texts(self, history: History, without: Sequence[int] = (), ahead: Sequence[int] = ()) -> History:
        """The history with what `SearchFeatureConfig.cut` reads of its texts.

        Queries are texts, or rows of queries.parquet as in a record. Of training examples, `without` are the items of
        the search itself, which is left out of what the query led to, and `ahead` all that the user takes from then on.
        """
        asked, searched = history.get("query", ""), history.get("search_query", np.zeros(0, np.int64))
        typed = isinstance(asked, str)
        asked = normalised(asked) if typed else asked
        number = int(self.queries.numbers([asked] if typed else np.array([asked]))[0]) if asked != "" else -1
        text = asked if typed else self.queries.texts[number]
        numbers = self.queries.numbers(searched)
        same = numbers == number
        if number < 0:  # of texts outside the log there are those that are the same
            same = np.array([at < 0 and normalised(each) == asked for at, each in zip(numbers, searched)], bool)
        last = range(max(len(searched) - self.features.recent_queries, 0), len(searched))
        codes = [
            self.queries.code_table[numbers[at]] if numbers[at] >= 0 else self.queries.codes_of(searched[at])
            for at in last
        ]
        empty = np.zeros((0, self.features.levels), np.int32)
        read = {
            "tokens": self.queries.tokens_of(text) if text else np.zeros(0, np.int32),
            "query_codes": self.queries.codes_of(text) if text else np.full(self.features.levels, -1, np.int32),
            "recent_codes": np.stack(codes) if codes else empty,
            "same": self._same(history, same) if text else np.ones(len(history["item"]), bool),
            "led_to": self._led_to(history, number, text, without),
        }
        if self.profiles is not None:
            read["profile_tokens"] = self.profiles.tokens_of(history)
        if self.neighbours is not None:
            read |= {"neighbours": self.neighbours, "ahead": np.asarray(ahead, np.int32)}
        return {**history, **read}

    def _same(self, history: History, same: np.ndarray) -> np.ndarray:
        """bool [T]: events that searches for the same query led to."""
        if "search" not in history:
            return np.zeros(len(history["item"]), bool)
        return np.append(same, False)[history["search"]]

    def _led_to(self, history: History, number: int, text: str, without: Sequence[int]):
        times = history["timestamp"]
        now = int(history.get("now", times.max(initial=0)))
        query = number if text else self.statistics.everything
        return self.statistics.led_to(query, now // DAY, without=without, text=text)

    def save(self, folder: Path) -> None:
        """Writes the files of a new folder, as above; the tokenizer is the caller's to keep."""
        folder.mkdir()
        lines = (json.dumps({"query": text}, ensure_ascii=False) + "\n" for text in self.queries.texts)
        (folder / QUERIES).write_text("".join(lines), encoding="utf-8")
        self.statistics.save(folder / STATISTICS)
        if self.neighbours is not None:
            self.neighbours.save(folder / NEIGHBOURS)
        if self.queries.ids is not None:
            self.queries.ids.copy_to(folder / QUERY_IDS)
        config = to_json(self.statistics.config)
        write_json(folder / NOTES, {"statistics": config, "profile": list(self.profile_columns)})


def load_reader(folder: Path, features: SearchFeatureConfig, tokenizer: TextTokenizer) -> SearchReader:
    """What `SearchReader.save` wrote; the profiles of no user.

    Raises:
      UserError: a file is missing or damaged.
    """
    notes = read_json(folder / NOTES)
    with (folder / QUERIES).open(encoding="utf-8") as lines:
        texts = tuple(json.loads(line)["query"] for line in lines)
    config = from_json(SearchStatisticsConfig, notes["statistics"])
    ids = load_query_ids(folder / QUERY_IDS) if (folder / QUERY_IDS).is_dir() else None
    columns = tuple(notes["profile"])
    return SearchReader(
        queries=KnownQueries(texts, np.zeros(0, np.int64), features.levels, tokenizer, ids),
        statistics=load_statistics(folder / STATISTICS, texts, config),
        features=features,
        neighbours=load_neighbours(folder / NEIGHBOURS) if (folder / NEIGHBOURS).is_file() else None,
        profiles=Profiles(columns, (), np.zeros(0, np.int64), tokenizer) if columns else None,
    )
