"""The phases that every system with semantic IDs begins with: source ─▶ tables ─▶ semantic IDs, and ─▶ examples."""

from typing import Any

import pyarrow.parquet as pq

from jaxrec.config import fingerprint
from jaxrec.data.examples import write_examples
from jaxrec.data.prepare import prepare
from jaxrec.run import Run
from jaxrec.semantic_ids.embeddings import finetune_items
from jaxrec.semantic_ids.tokenize import tokenize
from jaxrec.semantic_ids.versions import check_replaceable
from jaxrec.text.encoder import EncoderConfig, load_encoder
from jaxrec.text.finetune import FinetuneConfig

ALIGNMENT = "stages/alignment"


def prepare_with_ids(run: Run, config: Any) -> tuple[str, str]:
    """Makes tables, semantic IDs and examples where they are not there yet; fingerprints of the IDs and the examples.

    config: a system's, with the fields data, prepare, text, align, scenarios, semantic_ids, collisions and seed, as
    `jaxrec.systems.onemall.OneMallConfig` has them.
    """
    source = config.data
    tables = run.phase(
        "tables",
        fingerprint(source.fingerprint(), config.prepare),
        lambda folder: prepare(source, config.prepare, folder),
    )
    encoder = _encoder(run, config.text)
    id_configs = (config.align, config.semantic_ids, config.collisions)
    scenarios = () if config.scenarios is None else (config.scenarios,)
    id_inputs = fingerprint(tables, *encoder, *id_configs, *scenarios, config.seed)
    check_replaceable(run.semantic_ids, id_inputs)
    if isinstance(config.align, FinetuneConfig):
        run.stage(
            ALIGNMENT,
            fingerprint(tables, *encoder, config.align, config.seed),
            lambda folder: finetune_items(run.tables, folder, config.text, config.align, config.seed),
        )
    ids = run.phase(
        "semantic_ids",
        id_inputs,
        lambda folder: tokenize(
            run.tables,
            folder,
            config.text,
            *id_configs,
            config.seed,
            tuned=run.path / ALIGNMENT / "tuned",
            scenarios=config.scenarios,
        ),
    )
    examples = run.phase(
        "examples", fingerprint(tables), lambda folder: write_examples(run.tables, folder, source.behaviors)
    )
    return ids, examples


def _encoder(run: Run, text: EncoderConfig) -> tuple:
    """What the vectors of the items' texts depend on; nothing, where the items bring embeddings of their own."""
    if "embedding" in pq.read_schema(run.tables / "items.parquet").names:
        return ()
    # Not by its name alone: a folder may hold another encoder by now.
    return text.model, load_encoder(text.model).fingerprint, text.max_tokens
