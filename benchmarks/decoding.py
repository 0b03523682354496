"""What a trie costs in beam search: against no trie, against a Python dictionary, with filters, as catalogues grow.

    python benchmarks/decoding.py [--quick]

The model is a table of log-probabilities of each code given the code before: the times are those of the search itself;
`decoding_peers.py` has them with a transformer. One JSON line a row; ratio = ours / peer, both timed in turns in the
same run, best of several.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from shared.timing import best_of, parser, report

from jaxrec.decoding import (
    BeamResult,
    Rollouts,
    TextResult,
    Trie,
    beam_search,
    build_filter,
    build_text_trie,
    build_trie,
    rollout,
    text_search,
)

LEVELS = 3
END = 1


def make_model(seed: int, batch: int, codebook_size: int) -> tuple[jax.Array, jax.Array]:
    """(first-code log-probabilities [B, K], transition log-probabilities [K, K])."""
    generator = np.random.default_rng(seed)
    draw = partial(generator.standard_normal, dtype=np.float32)
    first, transitions = draw((batch, codebook_size)), draw((codebook_size, codebook_size))
    return jax.nn.log_softmax(first, axis=-1), jax.nn.log_softmax(transitions, axis=-1)


@partial(jax.jit, static_argnames=("beam_width", "constrained"))
def decode(model, trie: Trie, allowed=None, *, beam_width: int, constrained: bool = True) -> BeamResult:
    first, transitions = model

    def extend(tokens, cache, level):
        return (first[:, None, :] if level == 0 else transitions[tokens]), cache

    return beam_search(
        extend, (), trie, batch=len(first), beam_width=beam_width, allowed=allowed, constrained=constrained
    )


@partial(jax.jit, static_argnames=("samples",))
def sample(model, trie: Trie, key: jax.Array, *, samples: int) -> Rollouts:
    first, transitions = model

    def extend(tokens, cache, level):
        return (first[:, None, :] if level == 0 else transitions[tokens]), cache

    return rollout(extend, (), trie, key, batch=len(first), samples=samples)


def build_dictionary(codes: np.ndarray) -> dict[tuple[int, ...], list[int]]:
    """The usual CPU trie: prefix -> codes that may follow."""
    children: dict[tuple[int, ...], set[int]] = {}
    for code in codes.tolist():
        for level in range(len(code)):
            children.setdefault(tuple(code[:level]), set()).add(code[level])
    return {prefix: sorted(tokens) for prefix, tokens in children.items()}


def decode_with_dictionary(model, children, beam_width: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks each beam's scores by `prefix_allowed_tokens`, one host call a beam and level, as `generate` does."""
    first, transitions = model
    codes, log_probs = [], []
    for row in range(len(first)):
        beams, scores = [()], np.zeros(1, np.float32)
        for level in range(LEVELS):
            step = first[row : row + 1] if level == 0 else transitions[[beam[-1] for beam in beams]]
            masked = np.full(step.shape, -np.inf, np.float32)
            for index, beam in enumerate(beams):
                tokens = children[beam]
                masked[index, tokens] = step[index, tokens] + scores[index]
            flat = masked.reshape(-1)
            width = min(beam_width, int(np.isfinite(flat).sum()))
            chosen = np.argpartition(-flat, width - 1)[:width]
            chosen = chosen[np.argsort(-flat[chosen], kind="stable")]
            beams = [(*beams[index // step.shape[1]], int(index % step.shape[1])) for index in chosen]
            scores = flat[chosen]
        codes.append(beams)
        log_probs.append(scores)
    return np.array(codes), np.array(log_probs)


def compare(count: int, codebook_size: int, batch: int, beam_width: int, repeats: int, dictionary: bool) -> None:
    """All rows of one case."""
    case = f"items={count} K={codebook_size} B={batch} W={beam_width}"
    generator = np.random.default_rng(0)
    codes = generator.integers(0, codebook_size, (count, LEVELS))
    model = make_model(1, batch, codebook_size)
    trie = build_trie(codes, (codebook_size,) * LEVELS)
    allowed = jnp.asarray(generator.random((batch, count)) < 0.5)
    built = jax.jit(build_filter)(trie, allowed)
    search = partial(decode, model, trie, beam_width=beam_width)
    draw = partial(sample, model, trie, jax.random.key(0), samples=beam_width)
    free = partial(search, constrained=False)
    constrained, free, filtered, built_too, drawn = best_of(
        [search, free, partial(search, built), partial(search, allowed), draw], repeats
    )
    report("trie_on_vs_off", case, constrained, free, "our unconstrained beam")
    report("filter_on_vs_off", case, filtered, constrained, "no filter")
    report("filter_and_its_build", case, built_too, constrained, "no filter")
    report("rollout_vs_beam", case, drawn, constrained, "beam of the same width")
    if dictionary:
        children, host_model = build_dictionary(codes), jax.tree.map(np.asarray, model)
        peer = partial(decode_with_dictionary, host_model, children, beam_width)
        result, (peer_codes, peer_scores) = search(), peer()
        assert result.valid.all()
        np.testing.assert_allclose(result.log_probs, peer_scores, atol=1e-4)
        np.testing.assert_array_equal(result.codes, peer_codes)
        ours, theirs = best_of([search, peer], min(repeats, 2))
        report("trie_vs_dictionary", case, ours, theirs, "Python dictionary of prefixes, NumPy top-k")


def compare_builds(count: int, codebook_size: int, levels: int, dictionary: bool) -> None:
    """Items a second, bytes an item; beside a Python dictionary of prefixes where there is time for it."""
    codes = np.random.default_rng(2).integers(0, codebook_size, (count, levels))
    sizes = (codebook_size,) * levels
    [ours] = best_of([lambda: jax.tree.leaves(build_trie(codes, sizes))], 1)
    case = f"items={count} K={codebook_size} M={levels}"
    more = {
        "items_a_second": round(1000 * count / ours),
        "bytes_an_item": round(build_trie(codes, sizes).nbytes() / count, 1),
    }
    if dictionary:
        [peer] = best_of([lambda: build_dictionary(codes) and None], 0)
        report("build", case, ours, peer, "Python dictionary of prefixes", **more)
    else:
        report("build", case, ours, count / 1000, "a million items a second", **more)


def compare_catalogues(small: int, large: int, batch: int, beam_width: int, repeats: int) -> None:
    """The same model and width, so that only the number of items differs."""
    sizes = (256,) * LEVELS
    model = make_model(1, batch, 256)
    case = f"items={large} K=256 B={batch} W={beam_width}"
    tries = [build_trie(np.random.default_rng(3).integers(0, 256, (count, LEVELS)), sizes) for count in (small, large)]
    searches = [partial(decode, model, trie, beam_width=beam_width) for trie in tries]
    fewer, more = best_of(searches, repeats)
    report("catalogue_growth", case, more, fewer, f"items={small}")


@partial(jax.jit, static_argnames=("beam_width", "max_length"))
def decode_texts(model, trie: Trie | None, *, beam_width: int, max_length: int) -> TextResult:
    first, transitions = model

    def extend(tokens, cache, level):
        return (first[:, None, :] if level == 0 else transitions[tokens]), cache

    return text_search(
        extend,
        (),
        batch=len(first),
        beam_width=beam_width,
        eos=END,
        max_length=max_length,
        length_penalty=1.0,
        trie=trie,
    )


def compare_texts(count: int, vocabulary: int, batch: int, beam_width: int, repeats: int) -> None:
    """Queries of two to eight tokens and an end."""
    generator = np.random.default_rng(6)
    lengths = generator.integers(2, 9, count)
    rows = [[*generator.integers(END + 1, vocabulary, length), END] for length in lengths]
    trie, model = build_text_trie(rows, vocabulary, END), make_model(1, batch, vocabulary)
    search = partial(decode_texts, model, beam_width=beam_width, max_length=trie.levels)
    on, off = best_of([partial(search, trie), partial(search, None)], repeats)
    case = f"texts={count} V={vocabulary} M<={trie.levels} B={batch} W={beam_width}"
    report("text_trie_on_vs_off", case, on, off, "our unconstrained text search")


def main() -> None:
    quick = parser(__doc__).parse_args().quick
    repeats = 3 if quick else 7
    catalogues = [(10_000, 256), (100_000, 256)]
    if not quick:
        catalogues += [(1_000_000, 256), (1_000_000, 2048), (10_000_000, 256), (1_000_000, 8192)]
    for count, codebook_size in catalogues:
        for beam_width in (10, 512) if count <= 100_000 else (512,):
            compare(count, codebook_size, 8, beam_width, repeats if count <= 100_000 else 3, count <= 100_000)
    for count, codebook_size, levels in ((100_000, 256, 3), (1_000_000, 2048, 3), (1_000_000, 8192, 4)):
        compare_builds(count, codebook_size, levels, dictionary=count <= 100_000)
    if not quick:
        compare_builds(10_000_000, 256, 3, dictionary=False)
        compare_builds(10_000_000, 2048, 4, dictionary=False)
    compare_texts(10_000 if quick else 100_000, 2048, 8, 64, repeats)
    compare_catalogues(10_000, 100_000 if quick else 10_000_000, 8, 500, repeats)


if __name__ == "__main__":
    main()
