"""The phases that systems begin with: source ─▶ tables ─▶ semantic IDs or text embeddings, and ─▶ examples.

The text encoder may be fine-tuned in between: the stage `alignment`.
"""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jaxrec.config import UserError, fingerprint
from jaxrec.data.examples import write_examples
from jaxrec.data.prepare import prepare, tells_answer_time
from jaxrec.run import Run, stage_path
from jaxrec.semantic_ids.embeddings import finetune_items
from jaxrec.semantic_ids.related_writing import write_related
from jaxrec.semantic_ids.table.versions import check_replaceable, replacing
from jaxrec.semantic_ids.tokenize import embed, tokenize
from jaxrec.text.encoder import EncoderConfig, load_encoder
from jaxrec.text.finetune import FinetuneConfig, SuggestionFinetuneConfig
from jaxrec.text.suggestions import finetune_suggestions
from jaxrec.training.stages import Stage, Task

ALIGNMENT = "alignment"
"""The stage that fine-tunes the text encoder."""
RELATED = "related"
"""The phase, and the folder, of the related queries of prefixes."""


def alignment(run: Run, config: Any, with_ids: bool) -> tuple[Stage, ...]:
    """The stage that fine-tunes the text encoder; none where the configuration asks for no fine-tuning.

    with_ids: semantic IDs are made of the embeddings; the stage is refused where those there can't be replaced.
    """
    if not isinstance(config.align, FinetuneConfig):
        return ()

    on_suggestions = isinstance(config.align, SuggestionFinetuneConfig)

    def data() -> tuple[Any, ...]:
        tables = prepare_tables(run, config)
        encoder = _inputs_of(config.text) if on_suggestions else _encoder(run, config.text)
        if with_ids:
            check_replaceable(run.semantic_ids, _id_inputs(config, tables, encoder))
        return tables, *encoder

    def train(task: Task) -> None:
        finetune = finetune_suggestions if on_suggestions else finetune_items
        finetune(run.tables, task.folder, config.text, config.align, config.seed, task.metrics_path)

    return (Stage(ALIGNMENT, (config.align, config.seed), data, train),)


def prepare_with_ids(run: Run, config: Any) -> tuple[str, str]:
    """Makes tables, semantic IDs and examples where they are not there yet; fingerprints of the IDs and the examples.

    config: a system's, with the fields data, prepare, text, align, scenarios, keywords, query_ids, semantic_ids,
    collisions and seed, as `jaxrec.systems.generative.GenerativeRunConfig` has them. Where it fine-tunes the text
    encoder, the stage `alignment` comes before.
    """
    check_items(config)
    tables = prepare_tables(run, config)
    id_configs = (config.align, config.semantic_ids, config.collisions)
    id_inputs = _id_inputs(config, tables, _encoder(run, config.text))
    check_replaceable(run.semantic_ids, id_inputs)
    ids = run.phase(
        "semantic_ids",
        id_inputs,
        lambda folder: tokenize(
            run.tables,
            folder,
            config.text,
            *id_configs,
            config.seed,
            tuned=_tuned(run),
            scenarios=config.scenarios,
            keywords=config.keywords,
            query_ids=config.query_ids,
        ),
        replacing=lambda folder: replacing(folder, id_inputs),
    )
    return ids, prepare_examples(run, config, tables)


def prepare_with_embeddings(run: Run, config: Any) -> tuple[str, str]:
    """As `prepare_with_ids`, for systems that read the text embeddings alone, the same ones that IDs would be made of.

    config: with the fields data, prepare, text, align and seed.
    """
    check_items(config)
    tables = prepare_tables(run, config)
    embeddings = run.phase(
        "embeddings",
        fingerprint(tables, *_encoder(run, config.text), config.align, config.seed),
        lambda folder: embed(run.tables, folder, config.text, config.align, config.seed, tuned=_tuned(run)),
    )
    return embeddings, prepare_examples(run, config, tables)


def prepare_related(run: Run, config: Any) -> str:
    """Makes the related queries of prefixes (`jaxrec.semantic_ids.related_queries`); their fingerprint.

    config: with the fields data, prepare, text, align, related and seed. Where it fine-tunes the text encoder, the
    stage `alignment` comes before; otherwise the encoder is used as it came. No items are needed.
    """
    tuned = _tuned(run) if isinstance(config.align, FinetuneConfig) else None
    inputs = (prepare_tables(run, config), *_inputs_of(config.text), tuned and config.align, config.related)
    return run.phase(
        RELATED,
        fingerprint(*inputs, config.seed),
        lambda folder: write_related(run.tables, folder, config.text, config.related, config.seed, tuned),
    )


def check_items(config: Any) -> None:
    """UserError where the log has no items and no events, as a log of queries alone."""
    if not config.data.target_behaviors:
        raise UserError(
            f"{type(config.data).__name__} is a log of queries without items, which {config.system} can't recommend; "
            "give it data with events"
        )


def prepare_tables(run: Run, config: Any) -> str:
    """The first phase of every system: cleaned tables of the source; their fingerprint."""
    return run.phase(
        "tables",
        fingerprint(config.data.fingerprint(), config.prepare.inputs()),
        lambda folder: prepare(config.data, config.prepare, folder),
    )


def prepare_examples(run: Run, config: Any, tables: str) -> str:
    """Example records of the tables with this fingerprint; their own."""
    told = tells_answer_time(config.data, config.prepare)
    return run.phase(
        "examples", fingerprint(tables), lambda folder: write_examples(run.tables, folder, config.data.behaviors, told)
    )


def _id_inputs(config: Any, tables: str, encoder: tuple) -> str:
    """The fingerprint of all that semantic IDs are made from."""
    # What a run does without is left out, as in runs that were made before it could be configured.
    optional = [each for each in (config.scenarios, config.keywords) if each is not None]
    optional += ["query_ids"] * config.query_ids
    id_configs = (config.align, config.semantic_ids, config.collisions)
    return fingerprint(tables, *encoder, *id_configs, *optional, config.seed)


def _tuned(run: Run) -> Path:
    """The folder with the fine-tuned text encoder, where there is one."""
    return run.place(stage_path(ALIGNMENT)) / "tuned"


def _encoder(run: Run, text: EncoderConfig) -> tuple:
    """What the vectors of the items' texts depend on; nothing, where the items bring embeddings of their own."""
    if "embedding" in pq.read_schema(run.tables / "items.parquet").names:
        return ()
    return _inputs_of(text)


def _inputs_of(text: EncoderConfig) -> tuple:
    """What vectors of a text encoder depend on."""
    # Not by its name alone: a folder may hold another encoder by now.
    return text.model, load_encoder(text.model).fingerprint, text.max_tokens
