"""Alignment of the text encoder on a run's suggestions (OneSug §3.2.1, Eq. 1).

    p2q   a prefix and the queries that were chosen for it
    q2q   queries of one session, or of the same users: ItemCF and Swing, the semantically near ones

Everything is of the train split, and of texts alone: a run needs no items for it.
"""

from pathlib import Path

import pyarrow as pa

from jaxrec.data.query_pairs import asked_together
from jaxrec.data.suggestion_log import read_asked, read_suggestions
from jaxrec.text import finetune
from jaxrec.text.encoder import EncoderConfig
from jaxrec.text.finetune import SuggestionFinetuneConfig
from jaxrec.text.pair_batches import TextPairs
from jaxrec.text.prefixes import co_occurrence


def finetune_suggestions(
    tables: Path,
    folder: Path,
    text_config: EncoderConfig,
    config: SuggestionFinetuneConfig,
    seed: int,
    metrics_path: Path | None = None,
) -> Path:
    """Fine-tunes the text encoder, or a projection, on the suggestions of a tables folder (OneSug Eq. 1).

    Resumes from the checkpoints in `folder`; returns the folder in it with the result, for `finetune.load`.
    metrics_path: the file that gets the log lines; None: metrics.jsonl in `folder`.

    Raises:
      UserError: the tables have no suggestions, nobody chose one in training, or no pair is left.
    """
    texts, pairs = suggestion_pairs(tables, config)
    tuned = finetune.finetune(texts, pairs, config, text_config, folder, seed, metrics_path)
    finetune.save(tuned, folder / "tuned")
    return folder / "tuned"


def suggestion_pairs(tables: Path, config: SuggestionFinetuneConfig) -> tuple[list[str], dict[str, TextPairs]]:
    """Normalised texts and the pairs of p2q and q2q over them.

    Raises:
      UserError: the tables have no suggestions, or nobody chose one in training.
    """
    feedback = config.prefixes.feedback
    texts, p2q = co_occurrence(read_suggestions(tables, "train", feedback), config.prefixes).pairs()
    asked = read_asked(tables, feedback)
    queries = asked["query"].combine_chunks().dictionary_encode()
    log = pa.table({"user": asked["user"], "session": asked["session"], "item": queries.indices.cast(pa.int32())})
    left, right = asked_together(log, config.queries)
    q2q = TextPairs(left + len(texts), right + len(texts))
    return texts + queries.dictionary.to_pylist(), {"p2q": p2q, "q2q": q2q}
