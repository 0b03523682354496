"""Semantic IDs on the command line: `python -m jaxrec.semantic_ids COMMAND --help`.

fit --items items.parquet --out ids        codebooks, IDs, figures and a page, from files of embeddings
append | remove | reencode FOLDER ITEMS    a new version of the IDs for items that came, left or changed
rollback FOLDER VERSION                    back to an earlier version
versions | drift FOLDER                    the list of versions; whether the codebooks still fit
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import jax
import tyro

from jaxrec.config import UserError, choose_types
from jaxrec.console import console, report_user_errors
from jaxrec.files import disk_full, sync, writing
from jaxrec.semantic_ids import commands, streaming
from jaxrec.semantic_ids.files.items import Items, check_distinct, open_items
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.quantizers.codebooks import SemanticIdConfig
from jaxrec.semantic_ids.table import collisions
from jaxrec.semantic_ids.table.collisions import CollisionConfig, describe
from jaxrec.semantic_ids.tokenize import write_ids

COMMANDS = {
    "append": commands.append,
    "remove": commands.remove,
    "reencode": commands.reencode,
    "rollback": commands.rollback,
    "versions": commands.show_versions,
    "drift": commands.show_drift,
}


@dataclass(frozen=True)
class FitConfig:
    """Give every item of the input files a semantic ID."""

    items: Path
    """Parquet with item_id and embedding (a list of numbers), and optionally title, category, and count (popularity);
    a .npy matrix, whose row numbers are the item ids; or a folder of either, its files following each other by name."""
    out: Path
    """Folder to make, with codebooks.safetensors, codes.parquet, quality.json and semantic_ids.html."""
    semantic_ids: SemanticIdConfig = field(default_factory=SemanticIdConfig)
    """Quantizers."""
    collisions: CollisionConfig = field(default_factory=CollisionConfig)
    """Policy for items that share an ID."""
    seed: int = 0
    """Seed of all random numbers."""
    in_memory: int = 1_000_000
    """The most embeddings held in memory. With more items, the codebooks are fitted to a sample of this size and the
    items are encoded block by block; then no embeddings.safetensors is written, and the page has no titles."""


def main() -> None:
    """Runs the command that the arguments name."""
    command, *args = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
    elif command == "fit":
        fit(parse_fit(args))
    elif command in COMMANDS:
        tyro.cli(COMMANDS[command], args=args, prog=f"jaxrec.semantic_ids {command}")
    else:
        raise UserError(f"there is no command {command!r}; it is one of fit, {', '.join(COMMANDS)}")


def parse_fit(args: list[str]) -> FitConfig:
    """The arguments of `fit`; a quantizer is chosen by its name, `--semantic-ids.remainder OpqConfig`."""
    default, rest = choose_types(FitConfig(tyro.MISSING, tyro.MISSING), args)
    return tyro.cli(
        FitConfig,
        default=default,
        args=rest,
        prog="jaxrec.semantic_ids fit",
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )


def fit(config: FitConfig) -> dict:
    """Fits codebooks and writes the folder; returns the figures of quality.json.

    Raises:
      UserError: the file or the configuration is unusable, or the folder exists already or cannot be made.
    """
    if config.out.exists():
        raise UserError(f"{config.out} is there already: give another --out, or delete it")
    if config.in_memory < 1:
        raise UserError(f"in_memory={config.in_memory}: let memory hold at least one embedding")
    items = open_items(config.items)
    write = _write_in_memory if len(items) <= config.in_memory else _write_by_block
    partial = config.out.with_name(f"{config.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(config.out):
            _make(partial, config.out)
            figures = write(partial, items, config)
            for path in (*partial.iterdir(), partial):
                sync(path)
            partial.rename(config.out)
            sync(config.out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sampled = f", fitted to {config.in_memory:,} of them" if "sample" in figures else ""
    console.print(
        f"{len(items):,} items{sampled}, {figures['distinct_ids']:,} distinct IDs, "
        f"conflict rate {figures['conflict_rate']:.1%}; {describe(figures['collisions'])}. "
        f"Look at {config.out / 'semantic_ids.html'}.",
        markup=False,
    )
    return figures


def _make(folder: Path, out: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        if disk_full(error):
            raise
        raise UserError(f"{out} cannot be written ({error.strerror}): give another --out") from error


def _write_in_memory(folder: Path, items: Items, config: FitConfig) -> dict:
    collisions.check(config.collisions)
    codebooks.check(config.semantic_ids, (len(items), items.width))
    scan = items.scan()
    check_distinct(scan.item_ids, items.path)
    return write_ids(
        folder, jax.random.key(config.seed), scan.item_ids, scan.x, config.semantic_ids, config.collisions,
        titles=items.column("title"), categories=items.column("category"), popularity=scan.counts,
    )  # fmt: skip


def _write_by_block(folder: Path, items: Items, config: FitConfig) -> dict:
    key = jax.random.key(config.seed)
    return streaming.write_ids(folder, key, items, config.semantic_ids, config.collisions, config.in_memory)


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
