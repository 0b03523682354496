"""The phases that systems begin with: source ─▶ tables ─▶ semantic IDs or text embeddings, and ─▶ examples."""

from typing import Any

import pyarrow.parquet as pq

from jaxrec.config import fingerprint
from jaxrec.data.examples import write_examples
from jaxrec.data.prepare import prepare, tells_answer_time
from jaxrec.run import Run
from jaxrec.semantic_ids.embeddings import finetune_items
from jaxrec.semantic_ids.table.versions import check_replaceable, replacing
from jaxrec.semantic_ids.tokenize import embed, tokenize
from jaxrec.text.encoder import EncoderConfig, load_encoder
from jaxrec.text.finetune import FinetuneConfig

ALIGNMENT = "stages/alignment"


def prepare_with_ids(run: Run, config: Any) -> tuple[str, str]:
    """Makes tables, semantic IDs and examples where they are not there yet; fingerprints of the IDs and the examples.

    config: a system's, with the fields data, prepare, text, align, scenarios, semantic_ids, collisions and seed, as
    `jaxrec.systems.onemall.config.OneMallConfig` has them.
    """
    tables = prepare_tables(run, config)
    encoder = _encoder(run, config.text)
    id_configs = (config.align, config.semantic_ids, config.collisions)
    scenarios = () if config.scenarios is None else (config.scenarios,)
    id_inputs = fingerprint(tables, *encoder, *id_configs, *scenarios, config.seed)
    check_replaceable(run.semantic_ids, id_inputs)
    _finetune(run, config, tables, encoder)
    ids = run.phase(
        "semantic_ids",
        id_inputs,
        lambda folder: tokenize(
            run.tables,
            folder,
            config.text,
            *id_configs,
            config.seed,
            tuned=run.place(ALIGNMENT) / "tuned",
            scenarios=config.scenarios,
        ),
        replacing=lambda folder: replacing(folder, id_inputs),
    )
    return ids, prepare_examples(run, config, tables)


def prepare_with_embeddings(run: Run, config: Any) -> tuple[str, str]:
    """As `prepare_with_ids`, for systems that read the text embeddings alone, the same ones that IDs would be made of.

    config: with the fields data, prepare, text, align and seed.
    """
    tables = prepare_tables(run, config)
    encoder = _encoder(run, config.text)
    _finetune(run, config, tables, encoder)
    embeddings = run.phase(
        "embeddings",
        fingerprint(tables, *encoder, config.align, config.seed),
        lambda folder: embed(
            run.tables, folder, config.text, config.align, config.seed, tuned=run.place(ALIGNMENT) / "tuned"
        ),
    )
    return embeddings, prepare_examples(run, config, tables)


def prepare_tables(run: Run, config: Any) -> str:
    """The first phase of every system: cleaned tables of the source; their fingerprint."""
    return run.phase(
        "tables",
        fingerprint(config.data.fingerprint(), config.prepare),
        lambda folder: prepare(config.data, config.prepare, folder),
    )


def prepare_examples(run: Run, config: Any, tables: str) -> str:
    """Example records of the tables with this fingerprint; their own."""
    told = tells_answer_time(config.data, config.prepare)
    return run.phase(
        "examples", fingerprint(tables), lambda folder: write_examples(run.tables, folder, config.data.behaviors, told)
    )


def _finetune(run: Run, config: Any, tables: str, encoder: tuple) -> None:
    """The stage that fine-tunes the text encoder, where the configuration asks for one."""
    if isinstance(config.align, FinetuneConfig):
        run.stage(
            ALIGNMENT,
            fingerprint(tables, *encoder, config.align, config.seed),
            lambda folder: finetune_items(run.tables, folder, config.text, config.align, config.seed),
        )


def _encoder(run: Run, text: EncoderConfig) -> tuple:
    """What the vectors of the items' texts depend on; nothing, where the items bring embeddings of their own."""
    if "embedding" in pq.read_schema(run.tables / "items.parquet").names:
        return ()
    # Not by its name alone: a folder may hold another encoder by now.
    return text.model, load_encoder(text.model).fingerprint, text.max_tokens
