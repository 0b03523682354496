"""Semantic IDs on the command line: `python -m jaxrec.semantic_ids COMMAND --help`.

fit --items items.parquet --out ids        codebooks, IDs, figures and a page, from a parquet file of embeddings
append | remove | reencode FOLDER ITEMS    a new version of the IDs for items that came, left or changed
rollback FOLDER VERSION                    back to an earlier version
versions | drift FOLDER                    what there is, and whether the codebooks still fit
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import jax
import pyarrow.parquet as pq
import tyro

from jaxrec.config import UserError, choose_types
from jaxrec.run import console, report_user_errors, writing
from jaxrec.semantic_ids import commands
from jaxrec.semantic_ids.codebooks import SemanticIdConfig
from jaxrec.semantic_ids.collisions import CollisionConfig, describe
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
    """Give every item of a parquet file a semantic ID."""

    items: Path
    """Parquet with item_id and embedding (a list of numbers); optionally title, category, and count (popularity)."""
    out: Path
    """Folder to make, with codebooks.safetensors, codes.parquet, quality.json and semantic_ids.html."""
    semantic_ids: SemanticIdConfig = field(default_factory=SemanticIdConfig)
    """Quantizers."""
    collisions: CollisionConfig = field(default_factory=CollisionConfig)
    """What is done about items that share an ID."""
    seed: int = 0
    """Seed of everything that is drawn."""


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
      UserError: the file or the configuration cannot be used, or the folder is there already.
    """
    if config.out.exists():
        raise UserError(f"{config.out} is there already: give another --out, or delete it")
    ids, x, popularity = commands.read_items(config.items)
    table = pq.read_table(config.items)
    titles, categories = (
        table[name].to_pylist() if name in table.column_names else None for name in ("title", "category")
    )
    partial = config.out.with_name(f"{config.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(config.out):
            partial.mkdir(parents=True)
            figures = write_ids(
                partial, jax.random.key(config.seed), ids, x, config.semantic_ids, config.collisions,
                titles=titles, categories=categories, popularity=popularity,
            )  # fmt: skip
            partial.rename(config.out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    console.print(
        f"{len(ids):,} items, {figures['distinct_ids']:,} distinct IDs, conflict rate {figures['conflict_rate']:.1%}; "
        f"{describe(figures['collisions'])}. Look at {config.out / 'semantic_ids.html'}.",
        markup=False,
    )
    return figures


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
