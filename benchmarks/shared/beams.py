"""What benchmarks of the beam search share: the search in one call, random IDs, and the comparison with another's."""

from functools import partial

import jax
import numpy as np

from jaxrec.decoding import BeamResult, Trie, beam_search
from jaxrec.models.encoder_decoder import EncoderDecoder
from jaxrec.models.vocabulary import ContextTokens


@partial(jax.jit, static_argnames=("model", "beam_width", "constrained"))
def search(
    model: EncoderDecoder,
    variables: dict,
    tokens: jax.Array,
    mask: jax.Array,
    trie: Trie,
    allowed=None,
    *,
    beam_width: int,
    constrained=True,
) -> BeamResult:
    """The beams of every context, its encoding included."""
    context = model.apply(variables, ContextTokens(tokens, mask), method="prefill")

    def extend(codes, cache, level):
        return model.apply(variables, context, codes, cache, level, method="extend")

    return beam_search(
        extend, None, trie, batch=len(tokens), beam_width=beam_width, allowed=allowed, constrained=constrained
    )


def random_ids(count: int, size: int, levels: int) -> np.ndarray:
    """About `count` distinct IDs int [I, levels] of codes below `size`, sorted."""
    drawn = np.unique(np.random.default_rng(0).integers(0, size**levels, count))
    return np.stack([drawn // size**level % size for level in range(levels)[::-1]], axis=1)


def same(tokens: jax.Array, scores: jax.Array, peer: dict) -> None:
    """AssertionError unless a peer's `tokens` and `scores` are ours.

    Scores to 1e-4 in order; IDs as sets, where those that tie with the last within 1e-4 may differ.
    """
    scores, theirs = np.asarray(scores), np.array(peer["scores"])
    np.testing.assert_allclose(scores, theirs, atol=1e-4)
    for ours_row, their_row, row in zip(np.asarray(tokens), np.array(peer["tokens"]), scores, strict=True):
        clear = row > row[-1] + 2e-4
        ours_ids, their_ids = (set(map(tuple, ids.tolist())) for ids in (ours_row[clear], their_row))
        assert ours_ids <= their_ids, sorted(ours_ids - their_ids)[:3]
