"""What a keystroke costs in a trained run of query suggestion, and what its parts cost.

    python benchmarks/onesug.py --run runs/suggest [--peers PYTHON] [--quick]

- a keystroke: from the request to 16 suggestions, one user at a time, tokenizing included; queries of the test split
  are typed letter by letter. The median and the 99th percentile, against the compiled search of the same prompts alone,
  and over HTTP against the same in process.
- trie on and off: the search restricted to the listed queries, against any text.
- growth: a million listed queries (--quick: 100,000), words of the run's queries in random order, against a thousand.
- packed preference: a gradient of the list-wise loss (Eq. 9) with a chosen and 16 rejected queries as targets of one
  prompt, against 17 prompts of one target. Both gradients are held equal first.
- with --peers, a BART of the run's sizes (or of the default's) with 32 beams against transformers' `generate`: PYTHON
  is an interpreter with torch and transformers, in an environment of its own. Both find the same texts first.

All processors. Milliseconds; rows in turns are best of several.
"""

import http.client
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
from serving import command_of, server
from shared.beams import random_ids, same, search
from shared.peer_process import PeerProcess
from shared.t5 import make_contexts, make_t5
from shared.timing import best_of, parser, report

from jaxrec.config import UserError
from jaxrec.console import report_user_errors
from jaxrec.data.words import normalised
from jaxrec.decoding import build_trie
from jaxrec.losses.preference import HybridConfig, hybrid
from jaxrec.models.encoder_decoder import EncoderDecoder, bart_config
from jaxrec.models.huggingface import save_bart
from jaxrec.programs import keep_compiled_programs
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Request
from jaxrec.systems.onesug.preference import target_scores
from jaxrec.systems.recommender import GenerativeRecommender
from jaxrec.targets import TextSpace
from jaxrec.targets.text_list import text_space

SHOWN, BEAMS = 16, 32
REJECTED, PROMPTS = 16, 32
LONGEST_WORDS = 4
NOTHING = {name: np.zeros(0, np.int32) for name in ("item", "behavior", "timestamp", "session")}
"""The history of somebody unknown."""


def main() -> None:
    """Prints the rows."""
    command = parser(__doc__)
    command.add_argument("--run", type=Path, required=True, help="a trained run of query suggestion")
    command.add_argument("--peers", metavar="PYTHON", help="an interpreter with torch and transformers")
    args = command.parse_args()
    keep_compiled_programs()
    retriever = Retriever(args.run)
    if retriever.catalogue.current.texts is None:
        raise UserError(f"--run {args.run}: this is no run of a system that suggests queries")
    retriever.warm_up()
    requests = typed_requests(args.run, 60 if args.quick else 1000)
    measure_keystrokes(args.run, retriever, requests)
    repeats = 3 if args.quick else 9
    measure_list(retriever.recommender, requests, 100_000 if args.quick else 1_000_000, repeats)
    measure_packed(retriever.recommender, repeats)
    if args.peers:
        measure_transformers(args.peers, repeats)


# ---- a keystroke -----------------------------------------------------------------------------------------------------


def typed_requests(run: Path, count: int) -> list[dict]:
    """Users and prefixes: queries of the test split in a seeded order, each typed letter by letter."""
    log = pq.read_table(run / "tables" / "suggestions.parquet", columns=["user", "query", "split"])
    log = log.take(np.random.default_rng(0).permutation(np.flatnonzero(log["split"].to_numpy() == "test")))
    users = pq.read_table(run / "tables" / "users.parquet", columns=["user_id"])["user_id"]
    found: list[dict] = []
    for user, query in zip(log["user"].to_pylist(), log["query"].to_pylist(), strict=True):
        text, user_id = normalised(query), users[user].as_py()
        found += [{"user_id": user_id, "prefix": text[:end]} for end in range(1, len(text) + 1)]
        if len(found) >= count:
            return found[:count]
    return found


def measure_keystrokes(run: Path, retriever: Retriever, requests: list[dict]) -> None:
    """The rows of whole requests."""
    asked = [Request.model_validate(request | {"k": SHOWN}) for request in requests]
    searches = [prepared(retriever, request) for request in asked]
    alone, whole, over_http = [], [], []
    with server(command_of(run)) as (port, _):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        for request, search_alone, given in zip(asked, searches, requests, strict=True):
            alone.append(seconds_of(search_alone))
            whole.append(seconds_of(partial(retriever.answer, [request])))
            over_http.append(seconds_of(partial(ask, connection, given)))
    case = f"{len(requests)} keystrokes, one user at a time, {retriever.recommender.config.beam_width} beams"
    for name, share in (("p50", 50), ("p99", 99)):
        ours, bare, web = (1e3 * float(np.percentile(each, share)) for each in (whole, alone, over_http))
        report(f"a keystroke, {name}", case, ours, bare, "the compiled search alone")
        report(f"a keystroke over HTTP, {name}", case, web, ours, "the same in process")


def prepared(retriever: Retriever, request: Request) -> Callable[[], object]:
    """The compiled search of a request, everything around it done."""
    model, served = retriever.recommender, retriever.catalogue.current.served
    history, _ = retriever.history(request)
    depth = retriever.depth(SHOWN)
    ((_, arrays),) = model.batches([history], (1,))
    return lambda: jax.device_get(model._search(served, arrays, None, model.width(depth), depth))


def ask(connection: http.client.HTTPConnection, given: dict) -> None:
    """One request. Raises RuntimeError unless it is answered."""
    connection.request("GET", "/suggest?" + urlencode(given | {"k": SHOWN}))
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {body.decode()}")


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# ---- the list --------------------------------------------------------------------------------------------------------


def measure_list(model: GenerativeRecommender, requests: list[dict], many: int, repeats: int) -> None:
    """The rows of what the list of queries costs; the search of one prompt."""
    free = with_space(model, model.space, "free")
    run = partial(one_search, prefix=requests[len(requests) // 2]["prefix"])
    on, off = best_of([run(model), run(free)], repeats)
    case = f"{len(model.space.texts):,} listed, {model.config.beam_width} beams"
    report("a search, trie on and off", case, on, off, "any text")
    words = sorted({word for text in model.space.texts for word in text.split()})
    few, more = (run(with_space(model, random_space(model.space, words, count), "listed")) for count in (1000, many))
    long, short = best_of([more, few], repeats)
    report("a search, growth of the list", f"{many:,} listed", long, short, "1,000 listed")


def one_search(model: GenerativeRecommender, prefix: str) -> Callable[[], object]:
    """The compiled search of somebody unknown who typed a prefix."""
    ((_, arrays),) = model.batches([NOTHING | {"prefix": prefix}], (1,))
    return lambda: jax.device_get(model._search(model.served, arrays, None, model.width(SHOWN), SHOWN))


def with_space(model: GenerativeRecommender, space: TextSpace, constrained: str) -> GenerativeRecommender:
    """The same model with another list."""
    config = replace(model.config, constrained=constrained)
    return GenerativeRecommender(replace(model.assembly, space=space), model.variables, model.feature_config, config)


def random_space(space: TextSpace, words: list[str], count: int) -> TextSpace:
    """A list of `count` texts of 1 to LONGEST_WORDS of the words, those short enough to be written."""
    texts: dict[str, None] = {}
    for drawn in draws(words):
        if len(texts) >= count:
            break
        lengths = map(len, space.tokenizer.encode(drawn))
        texts |= {text: None for text, tokens in zip(drawn, lengths, strict=True) if tokens < space.config.max_length}
    return text_space(space.tokenizer, list(texts)[:count], None, space.config, space.vocabulary)


def draws(words: list[str]) -> Iterator[list[str]]:
    """Texts of random words, 50,000 at once, without end."""
    rng = np.random.default_rng(0)
    while True:
        rows = rng.integers(0, len(words), (50_000, LONGEST_WORDS))
        yield [
            " ".join(words[at] for at in row[:length])
            for row, length in zip(rows.tolist(), rng.integers(1, LONGEST_WORDS + 1, len(rows)).tolist(), strict=True)
        ]


# ---- the preference --------------------------------------------------------------------------------------------------


def measure_packed(model: GenerativeRecommender, repeats: int) -> None:
    """The row of packed targets: the gradient of Eq. 9 for PROMPTS prompts."""
    packed, count = made_batch(model), 1 + REJECTED
    apart = {name: jnp.repeat(array, count, axis=0) for name, array in packed.items()}
    apart |= {name: packed[name].reshape(-1, 1, *packed[name].shape[2:]) for name in ("target", "real")}
    weight = jnp.zeros((PROMPTS, count, count)).at[:, 0, 1:].set(1.0)

    def loss(params, batch):
        scores = target_scores(model.assembly, {"params": params}, batch).reshape(PROMPTS, count)
        return hybrid(scores, jax.lax.stop_gradient(scores) - 0.1, weight, HybridConfig()).sum() / PROMPTS

    gradient, params = jax.jit(jax.grad(loss)), model.variables["params"]
    for ours, other in zip(*(jax.tree.leaves(gradient(params, batch)) for batch in (packed, apart)), strict=True):
        assert jnp.abs(ours - other).max() < 1e-3 * jnp.abs(other).max() + 1e-5, "gradients differ"
    ours, other = best_of([partial(gradient, params, packed), partial(gradient, params, apart)], repeats)
    case = f"{PROMPTS} prompts of {packed['tokens'].shape[1]} tokens, {REJECTED} rejected"
    report("packed preference", case, ours, other, f"{count} prompts of one target")


def made_batch(model: GenerativeRecommender) -> dict[str, jax.Array]:
    """PROMPTS prompts of the run's longest bucket with a chosen and REJECTED other listed queries as targets."""
    rng, assembly = np.random.default_rng(0), model.assembly
    rows = []
    for _ in range(PROMPTS):
        texts = [assembly.space.texts[at] for at in rng.permutation(len(assembly.space.texts))[: 1 + REJECTED]]
        history = NOTHING | {
            "prefix": texts[0][:3],
            "search_query": np.array(texts, object),
            "search_timestamp": np.arange(len(texts)),
            "search_session": np.arange(len(texts)),
        }
        read = assembly.read_texts(history)
        options = {"behaviors": len(assembly.behaviors), "wanted": assembly.wanted}
        target, real = assembly.space.encode(texts)
        cut = assembly.features.cut(read, 0, **options, size=assembly.features.buckets[-1])
        rows.append(cut | {"target": target, "real": real})
    batch = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
    return batch | {"where": jnp.ones(PROMPTS, bool)}


# ---- another library -------------------------------------------------------------------------------------------------


def measure_transformers(python: str, repeats: int) -> None:
    """The beam with the trie against transformers' with the same constraint, and without."""
    vocabulary, levels, size = 1000, 7, 256
    config = bart_config(
        vocabulary=vocabulary,
        width=128,
        heads=4,
        head_dim=32,
        hidden=256,
        encoder_layers=2,
        layers=2,
        levels=((0, vocabulary),) * levels,
        max_positions=128,
    )
    ids, variables = random_ids(100_000, size, levels) + 3, make_t5(config=config)
    contexts, mask = make_contexts(1)
    contexts = jnp.asarray(np.asarray(contexts) % (vocabulary - 3) + 3)
    trie = build_trie(ids, (vocabulary,) * levels)
    run = partial(search, EncoderDecoder(config), variables, contexts, mask, trie, beam_width=BEAMS)
    with tempfile.TemporaryDirectory() as folder:
        save_bart(Path(folder), config, variables["params"])
        np.save(Path(folder) / "contexts.npy", np.asarray(contexts, np.int64))
        np.save(Path(folder) / "ids.npy", ids)
        threads = len(os.sched_getaffinity(0))
        peer = PeerProcess(python, "beam_peers.py", Path(folder), threads, "torch and transformers")
        found, ours = run(), []
        same(found.codes, found.log_probs, peer.ask(peer="trie", batch=1, beams=BEAMS))
        theirs: dict[str, list[float]] = {"trie": [], "transformers": []}
        for _ in range(repeats):
            ours += best_of([run], 2)
            for name, times in theirs.items():
                times.append(peer.ask(peer=name, batch=1, beams=BEAMS)["milliseconds"])
        peer.close()
    case = f"B=1 W={BEAMS}, {levels} tokens of {vocabulary}, 100,000 listed"
    for name, label in (("trie", "BART generate, prefix_allowed_tokens_fn"), ("transformers", "BART generate, free")):
        report("a search, against transformers", case, min(ours), min(theirs[name]), label)


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
