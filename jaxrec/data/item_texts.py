"""Texts of items that have none: the queries that led to them in training.

So no query of validation or test is in a text. A query counts as often as it led to the item, whatever its case and
spaces (`jaxrec.data.words.normalised`).
"""

from collections import Counter, defaultdict

import ibis
import pyarrow as pa
from ibis import _

from jaxrec.data.words import normalised


def texts_from_queries(items: pa.Table, events: ibis.Table, searches: ibis.Table, count: int) -> tuple[pa.Table, int]:
    """The items with every null title and text filled, and the number of those that no query filled.

    The title is the query that led to the item most often, the text the `count` most frequent ones; equally frequent
    ones in alphabetical order. An item that no query led to is named by its id.

    Args:
      items: item_id, title, text and any further columns.
      events: item_id and search_id of the events of training that count.
      searches: search_id, query.
    """
    led = events.inner_join(searches.select("search_id", "query"), "search_id")
    led = led.group_by(["item_id", "query"]).agg(n=_.count()).to_pyarrow()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item, query, n in zip(*(led[name].to_pylist() for name in ("item_id", "query", "n")), strict=True):
        counts[item][normalised(query)] += n
    titles, texts, without = [], [], 0
    for item, title, text in zip(*(items[name].to_pylist() for name in ("item_id", "title", "text")), strict=True):
        queries = [query for query, _ in sorted(counts[item].items(), key=lambda each: (-each[1], each[0]))]
        without += text is None and not queries
        titles.append((queries[0] if queries else item) if title is None else title)
        texts.append((". ".join(queries[:count]) or titles[-1]) if text is None else text)
    for name, values in (("title", titles), ("text", texts)):
        items = items.set_column(items.column_names.index(name), name, pa.array(values, pa.string()))
    return items, without
