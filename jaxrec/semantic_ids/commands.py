"""Changes of a catalogue on the command line: each function reads files, changes the versions and prints a summary.

Items are a parquet file, or a folder of them, with columns `item_id`, `embedding` (a list of numbers) and optionally
`count`, the popularity that orders the items of one ID; `remove` reads `item_id` alone. In a run, `append` also keeps
the columns of the run's items.parquet, such as `title`, for serving.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional

from jaxrec.config import UserError
from jaxrec.console import console
from jaxrec.semantic_ids.embeddings import aligned, embed_new, encodes_texts, has_scenarios, with_products
from jaxrec.semantic_ids.files import items as files
from jaxrec.semantic_ids.files.vectors import EMBEDDINGS
from jaxrec.semantic_ids.keyword_embeddings import load_keywords
from jaxrec.semantic_ids.table import changes as catalogue
from jaxrec.semantic_ids.table import version_files, versions
from jaxrec.semantic_ids.table.drift import drift, drift_table
from jaxrec.semantic_ids.table.later import count_untitled, is_text, items_of_run, read_rows


def append(folder: Positional[Path], items: Positional[Path], text: bool = False, publish: bool = False) -> None:
    """Assigns IDs to the items of a parquet file and prints how many items are new.

    Args:
      folder: the semantic_ids folder of a run.
      items: parquet with item_id, embedding, and optionally count.
      text: embed the items as the run embedded its own, from `text` or, where that column is missing, from `embedding`,
        the text encoder's vectors.
      publish: replace codes.parquet too. In a run, serve.py recommends the items from its next start on; give the file
        a `title` then, and the other columns of the run's items.parquet.
    """
    rows = read_rows(folder, items)
    if publish:
        versions.check_publishable(folder, () if rows is None else rows["item_id"])
    made = catalogue.append(folder, *(read_text_items(folder, items) if text else read_items(items)), rows=rows)
    said = [f"{made[name]:,} {word}" for name, word in (("added", "new"), ("returned", "came back")) if made[name]]
    if made["known"]:
        said.append(f"{made['known']:,} were there and keep their IDs")
    console.print(f"Version {made['version']}: {', '.join(said)}.")
    if rows is not None and (untitled := count_untitled(folder, rows["item_id"])):
        console.print(f"{untitled:,} of these items have no title: serve.py shows them without one.")
    if made["added"]:
        console.print(f"Collisions: {made['collisions']['text']}.", markup=False)
    if publish:
        _publish(folder)


def remove(folder: Positional[Path], items: Positional[Path], publish: bool = False) -> None:
    """Removes the items of a parquet file (item_id) from the catalogue; `append` brings them back with their IDs."""
    item_ids = read_ids(items)
    if publish:
        versions.check_publishable(folder, item_ids)
    made = catalogue.remove(folder, item_ids)
    gone = f", {made['known']:,} had left before" if made["known"] else ""
    console.print(f"Version {made['version']}: {made['removed']:,} items left{gone}.")
    if publish:
        _publish(folder)


def reencode(folder: Positional[Path], items: Positional[Path], text: bool = False, publish: bool = False) -> None:
    """Re-encodes items whose embeddings changed and prints the share of codes that changed; arguments as `append`."""
    if publish:
        versions.check_publishable(folder)
    made = catalogue.reencode(folder, *(read_text_items(folder, items) if text else read_items(items)))
    levels = ", ".join(f"{share:.1%}" for share in made["changed_codes"])
    console.print(
        f"Version {made['version']}: {made['changed']:,} of {made['encoded']:,} items have another ID "
        f"({made['changed_share']:.1%}). Codes that changed, level by level: {levels}; of all, "
        f"{made['changed_codes_mean']:.1%}."
    )
    if publish:
        _publish(folder)


def rollback(folder: Positional[Path], version: Positional[int], publish: bool = False) -> None:
    """Makes another version the current one."""
    if publish:
        versions.check_publishable(folder, version=version)
    record = versions.roll_back(folder, version)
    console.print(f"Version {version} of {record['time']} counts now, with {record['figures']['items']:,} items.")
    if publish:
        _publish(folder)


def show_versions(folder: Positional[Path], as_json: bool = False) -> None:
    """Prints the versions, or their records as one JSON list."""
    records = version_files.list_versions(folder)
    if as_json:
        print(json.dumps(records))
        return
    if not records:
        console.print(f"{version_files.versions(folder)} holds no versions yet; append makes the first.", markup=False)
        return
    title = f"Versions of {escape(str(folder))}; * counts"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("", "version", "of", "time (UTC)", "action"):
        table.add_column(name)
    for name in ("items", "inactive", "distinct IDs"):
        table.add_column(name, justify="right")
    for record in records:
        figures = record["figures"]
        numbers = [f"{figures[name]:,}" for name in ("items", "inactive", "distinct_ids")]
        mark, parent = "*" if record["current"] else "", str(record["parent"] or "-")
        time = record["time"][:16].replace("T", " ")
        table.add_row(mark, str(record["version"]), parent, time, record["action"], *numbers)
    console.print(table)


def show_drift(folder: Positional[Path], as_json: bool = False) -> None:
    """Prints how the use of the IDs changed over the versions, or the rows as one JSON list."""
    rows = drift(folder)
    if as_json:
        print(json.dumps(rows))
        return
    console.print(drift_table(rows))
    for row in rows:
        if row["hint"]:
            console.print(row["hint"])


def read_items(path: Path) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """item_id, embedding f32 [n, D], and count [n] or None, of a parquet file, or of a folder of them.

    Raises:
      UserError: as `files.open_items` and `Items.blocks`; the items have no ids, or one is listed twice.
    """
    items = files.open_items(path)
    if not items.named:
        raise UserError(f"{path} has no item ids: give a parquet file with item_id and embedding")
    scan = items.scan()
    files.check_distinct(scan.item_ids, path)
    return scan.item_ids.to_pylist(), scan.x, scan.counts


def read_text_items(folder: Path, path: Path) -> tuple[list[str], np.ndarray, np.ndarray | None, np.ndarray | None]:
    """As `read_items`, embedded as the run of a semantic_ids folder embedded its items.

    Reads `text` where the run encoded texts and the file has that column, else `embedding`: the encoder's vectors
    before any alignment. In a run with scenarios it also reads `scenario` and `product_ids`, and the last value
    returned is the items' own embeddings, f32 [n, D]; else it is None.

    Raises:
      UserError: as `read_items`; neither column is usable, or the column `text` does not hold text.
    """
    keywords = load_keywords(folder)
    attributes = [] if keywords is None else list(dict.fromkeys(keywords.keywords.attributes))
    wanted = ["scenario", "product_ids", *attributes, *(["text", "count"] if encodes_texts(folder) else [])]
    table = files.read_table(path, ["item_id"], wanted)
    if "text" in table.column_names:
        ids, counts = table["item_id"].to_pylist(), files.counts_of(table, path)
        own = embed_new(folder, _texts(path, table), ids)
        if keywords is not None:
            own = keywords.of_items(own, table)
    elif keywords is not None:
        raise UserError(
            f"{path} has no column 'text', in which the keywords of this run's items are found: give it one"
        )
    else:
        ids, x, counts = read_items(path)
        own = aligned(folder, x, ids)
    return ids, with_products(folder, own, table), counts, own if has_scenarios(folder) else None


def read_ids(path: Path) -> list[str]:
    """The column item_id of a parquet file, or of a folder of them; UserError as `files.read_table`."""
    return files.read_table(path, ["item_id"])["item_id"].to_pylist()


def _texts(path: Path, table: pa.Table) -> list[str]:
    column = table["text"]
    if not is_text(column.type):
        raise UserError(f"{path}: column 'text' is {column.type}, but must be text")
    for row in np.flatnonzero(column.is_null().to_numpy())[:1]:
        raise UserError(
            f"{path}: item_id {table['item_id'][row].as_py()!r} (row {row}) has no text: give every item one"
        )
    return column.to_pylist()


def _publish(folder: Path) -> None:
    console.print(f"{versions.publish(folder)} holds these IDs now.", markup=False)
    if items_of_run(folder):
        console.print(
            "serve.py answers with these items from its next start on. The model stays the one that was trained; to "
            "train on them, tokenize into a new run.",
            markup=False,
        )
    elif (folder / EMBEDDINGS).exists() and version_files.current_number(folder) > 1:
        console.print(
            f"{EMBEDDINGS} stays as it was tokenized: a model of this run would see it beside the new IDs; tokenize "
            "into a new run to train on them.",
            markup=False,
        )
