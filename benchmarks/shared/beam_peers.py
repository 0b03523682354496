"""Beam search by transformers and CTranslate2, in an environment of their own, started by the benchmarks of the beam.

    PYTHON benchmarks/shared/beam_peers.py FOLDER THREADS

FOLDER holds a T5 or a BART in Hugging Face's layout, contexts.npy int [B, S] and ids.npy int [I, M], the tokens of
every valid target. A line of JSON on standard input asks for one run: {"peer": "transformers" | "trie" | "ctranslate2",
"batch", "beams"}; the line that answers has `milliseconds`, `tokens` [B, W, M] and `scores` [B, W], summed
log-probabilities.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models

END = 1


def main() -> None:
    """Answers lines until there are no more."""
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    model.generation_config.forced_eos_token_id = None  # BART's texts end, our targets don't
    contexts, ids = np.load(folder / "contexts.npy"), np.load(folder / "ids.npy")
    children = prefix_dictionary(ids)
    translator = cache(partial(convert, folder, model.config.vocab_size, threads))
    levels = ids.shape[1]
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        rows, beams = contexts[: asked["batch"]], asked["beams"]
        if asked["peer"] == "ctranslate2":
            run = partial(translate, translator(), rows, beams, levels)
        else:
            run = partial(generate, model, rows, beams, levels, children if asked["peer"] == "trie" else None)
        print(json.dumps(timed(run)), flush=True)


def timed(run: Callable[[], tuple[list, list]]) -> dict:
    """One run and its time."""
    start = time.perf_counter()
    tokens, scores = run()
    return {"milliseconds": 1e3 * (time.perf_counter() - start), "tokens": tokens, "scores": scores}


def prefix_dictionary(ids: np.ndarray) -> dict[tuple[int, ...], list[int]]:
    """prefix -> tokens that may follow, as users of `prefix_allowed_tokens_fn` keep it."""
    children: dict[tuple[int, ...], set[int]] = {}
    for row in ids.tolist():
        for level, token in enumerate(row):
            children.setdefault(tuple(row[:level]), set()).add(token)
    return {prefix: sorted(tokens) for prefix, tokens in children.items()}


@torch.inference_mode()
def generate(model, rows: np.ndarray, beams: int, levels: int, children: dict | None = None) -> tuple[list, list]:
    """`levels` tokens without an end token, constrained where there are `children`."""
    constraint = None if children is None else lambda _, sent: children[tuple(sent[1:].tolist())]
    made = model.generate(
        torch.from_numpy(rows),
        attention_mask=torch.ones(rows.shape, dtype=torch.long),
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        min_new_tokens=levels,
        max_new_tokens=levels,
        length_penalty=0.0,
        prefix_allowed_tokens_fn=constraint,
        output_scores=True,
        return_dict_in_generate=True,
    )
    tokens = made.sequences[:, 1:].reshape(len(rows), beams, levels)
    return tokens.tolist(), made.sequences_scores.reshape(len(rows), beams).tolist()


def convert(folder: Path, vocabulary: int, threads: int):
    """The model for CTranslate2; its tokens are the numbers as words."""
    import ctranslate2  # which not every benchmark asks for

    words = Tokenizer(models.WordLevel({str(token): token for token in range(vocabulary)}, unk_token="2"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", eos_token=str(END), unk_token="2"
    )
    tokenizer.save_pretrained(folder)
    converted = folder / "ctranslate2"
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted))
    return ctranslate2.Translator(str(converted), device="cpu", inter_threads=1, intra_threads=threads)


def translate(translator, rows: np.ndarray, beams: int, levels: int) -> tuple[list, list]:
    """`levels` tokens of the whole vocabulary but the end token."""
    made = translator.translate_batch(
        [[str(token) for token in row] for row in rows.tolist()],
        beam_size=beams,
        num_hypotheses=beams,
        min_decoding_length=levels,
        max_decoding_length=levels,
        length_penalty=0.0,
        return_scores=True,
    )
    tokens = [[[int(token) for token in hypothesis] for hypothesis in row.hypotheses] for row in made]
    return tokens, [row.scores for row in made]


if __name__ == "__main__":
    main()
