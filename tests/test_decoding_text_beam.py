"""Text search against the exhaustive ranking and a plain Python search."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.config import UserError
from jaxrec.decoding.beam import expand_items
from jaxrec.decoding.text_beam import TextResult, text_search
from jaxrec.decoding.trie import build_text_trie, build_trie
from jaxrec.decoding.typed import TypedText
from jaxrec.text.token_bytes import TokenBytes

V, EOS, LENGTH = 5, 2, 4


@functools.partial(jax.jit, static_argnames=("beam_width", "length_penalty", "max_length", "constrained", "results"))
def decode(
    tables, trie, allowed, typed=None, *, beam_width, length_penalty, max_length=LENGTH, constrained=True, results=None
):
    batch = len(tables[0])

    def extend(tokens, prefix, level):
        if level == 0:
            return tables[0][:, None], prefix
        prefix = prefix.at[..., level - 1].set(tokens)
        return tables[level][(jnp.arange(batch)[:, None], *(prefix[..., place] for place in range(level)))], prefix

    cache = jnp.zeros((batch, 1, max_length), jnp.int32)
    return text_search(
        extend, cache, batch=batch, beam_width=beam_width, eos=EOS, max_length=max_length, trie=trie, allowed=allowed,
        length_penalty=length_penalty, constrained=constrained, results=results, typed=typed,
    )  # fmt: skip


class ToyModel:
    """Log-probabilities of the next token by request and whole prefix; multiples of `quantum` tie exactly."""

    def __init__(self, seed: int, batch: int = 2, quantum: float | None = None):
        generator = np.random.default_rng(seed)
        self.tables = []
        for level in range(LENGTH):
            table = generator.normal(size=(batch, *(V,) * (level + 1))).astype(np.float32)
            normalised = table - np.log(np.exp(table).sum(-1, keepdims=True))
            self.tables.append(np.round(table - 4) * np.float32(quantum) if quantum else normalised)

    def search(self, beam_width, length_penalty, trie=None, allowed=None, typed=None, **options) -> TextResult:
        result = decode(
            self.tables, trie, allowed, typed, beam_width=beam_width, length_penalty=length_penalty, **options
        )
        return jax.tree.map(np.asarray, result)

    def log_prob(self, row: int, text: tuple[int, ...]) -> np.float32:
        total = np.float32(0)
        for level in range(len(text)):
            total = np.float32(total + self.tables[level][(row, *text[: level + 1])])
        return total

    def oracle(self, row: int, texts: set[tuple[int, ...]], width: int, alpha: float, typed: bytes = b"") -> list:
        """The same search by plain loops: [(score, log-probability, text)], best first."""
        alive, ended = [()], []
        for length in range(1, LENGTH + 1):
            ended += [(*beam, EOS) for beam in alive if (*beam, EOS) in texts and spelled(beam).startswith(typed)]
            prefixes = {text[:length] for text in texts if len(text) > length and text[: length - 1] in set(alive)}
            prefixes = {each for each in prefixes if agree(spelled(each), typed)}
            alive = sorted(prefixes, key=lambda text: (-self.log_prob(row, text), text))[:width]
        scored = []
        for text in ended:
            log_prob = self.log_prob(row, text)
            scored.append((np.float32(log_prob / np.float32(len(text)) ** np.float32(alpha)), log_prob, text))
        return sorted(scored, key=lambda found: (-found[0], len(found[2]), found[2]))


BYTES = TokenBytes([b"a", b"ba", b"", b"ab", b"b"])
"""What each token stands for; many sequences spell one text."""


def spelled(tokens: tuple[int, ...]) -> bytes:
    return b"".join(BYTES.tokens[token] for token in tokens)


def agree(text: bytes, typed: bytes) -> bool:
    return text.startswith(typed) or typed.startswith(text)


def typed_text(*texts: bytes, words: int = 1) -> TypedText:
    tables, lengths = zip(*(BYTES.going_on(text, words) for text in texts), strict=True)
    return TypedText(np.stack(tables), np.array(lengths, np.int32), BYTES.lengths)


def every_text(length: int = LENGTH) -> set[tuple[int, ...]]:
    others = [token for token in range(V) if token != EOS]
    return {(*text, EOS) for n in range(length) for text in itertools.product(others, repeat=n)}


def some_texts(seed: int, count: int) -> list[tuple[int, ...]]:
    texts = sorted(every_text())
    return [texts[place] for place in np.random.default_rng(seed).integers(0, len(texts), count)]


def check(model: ToyModel, result: TextResult, texts, width, alpha, results=None, typed=(b"", b"")) -> None:
    for row in range(len(result.valid)):
        expected = model.oracle(row, texts[row] if isinstance(texts, list) else texts, width, alpha, typed[row])
        expected = expected[: width if results is None else results]
        assert result.valid[row].tolist() == [place < len(expected) for place in range(result.valid.shape[1])]
        for place, (score, log_prob, text) in enumerate(expected):
            assert tuple(result.tokens[row, place, : len(text)].tolist()) == text
            assert result.lengths[row, place] == len(text)
            assert (result.tokens[row, place, len(text) :] == -1).all()
            assert result.log_probs[row, place] == log_prob
            np.testing.assert_allclose(result.scores[row, place], score, rtol=1e-6)
        assert (result.scores[row, len(expected) :] == -np.inf).all()
        assert (result.tokens[row, len(expected) :] == -1).all()
    assert not result.nan.any()


@pytest.mark.parametrize("width", [1, 3, 30, 200])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_free_search_is_the_oracle(width, alpha):
    model = ToyModel(0)
    check(model, model.search(width, alpha), every_text(), width, alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0, 2.0])
def test_a_wide_beam_is_the_exhaustive_ranking(alpha):
    """Every text that ends in time: 1 + 4 + 16 + 64 of them."""
    model = ToyModel(1)
    result = model.search(64, alpha, results=85)
    assert result.valid.all()
    texts = sorted(every_text())
    for row in range(2):
        scores = np.array([model.log_prob(row, text) / len(text) ** alpha for text in texts])
        np.testing.assert_allclose(result.scores[row], np.sort(scores)[::-1], rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 30),
    width=st.sampled_from([2, 40]),
    alpha=st.sampled_from([0.0, 1.0]),
    quantum=st.sampled_from([None, 1.0]),
    filtered=st.booleans(),
)
def test_any_list_of_queries_gives_the_oracles_result(seed, count, width, alpha, quantum, filtered):
    rows = some_texts(seed, count)
    trie = build_text_trie(rows, V, EOS, max_length=LENGTH, capacity=32, like=LIKE)
    allowed = np.random.default_rng(seed).random((2, 32)) < (0.5 if filtered else 2)
    model = ToyModel(seed, quantum=quantum)
    result = model.search(width, alpha, trie, allowed)
    texts = [{text for text, keep in zip(rows, allowed[row], strict=False) if keep} for row in range(2)]
    check(model, result, texts, width, alpha)
    leaves = sorted(set(rows))
    for row in range(2):
        for place in np.flatnonzero(result.valid[row]):
            assert leaves[result.leaf[row, place]] == tuple(result.tokens[row, place, : result.lengths[row, place]])


# All of them fit its shapes, so that the search compiles once.
LIKE = build_text_trie([*sorted(every_text(3)), (0, 1, 3, EOS)], V, EOS, max_length=LENGTH, capacity=32)


def test_texts_and_ids_of_other_lengths_do_not_mix_in_a_filter():
    """Between the last child of one prefix and the first of the next stand texts that have ended before."""
    rows = [(0, EOS), (0, 1, EOS), (1, EOS), (3, EOS), (4, 0, EOS)]
    trie = build_text_trie(rows, V, EOS, max_length=LENGTH)
    allowed = np.array([[False, False, True, True, False], [False, True, False, False, True]])
    result = ToyModel(2).search(9, 0.0, trie, allowed)
    assert [sorted(result.leaf[row][result.valid[row]].tolist()) for row in range(2)] == [[2, 3], [0, 4]]


def test_a_short_text_is_kept_though_longer_prefixes_are_likelier():
    """A search whose finished texts compete with prefixes for its W places loses it."""
    model = ToyModel(3, batch=1)
    for table in model.tables:
        table[...] = -5.0
    model.tables[0][0, EOS] = -1.0
    model.tables[0][0, 0] = -0.1
    model.tables[0][0, 1] = -0.2
    result = model.search(2, 0.0)
    assert tuple(result.tokens[0, 0]) == (EOS, -1, -1, -1)
    assert result.log_probs[0, 0] == -1


TYPED = [b"", b"a", b"ab", b"ba", b"aba", b"abab", b"bbbb", b"ababab", b"abababa"]


@pytest.mark.parametrize("words", [1, 3])
@pytest.mark.parametrize("with_trie", [True, False])
@pytest.mark.parametrize("width", [3, 70])
def test_every_text_begins_with_what_was_typed(words, with_trie, width):
    """As the oracle, which compares spelled texts; with a wide beam, as every text filtered by what it begins with."""
    model, rows = ToyModel(10), some_texts(7, 40)
    trie = build_text_trie(rows, V, EOS, max_length=LENGTH, capacity=60) if with_trie else None
    texts = set(rows) if with_trie else every_text()
    found = 0
    for first, second in zip(TYPED, TYPED[::-1], strict=True):
        result = model.search(width, 0.5, trie, typed=typed_text(first, second, words=words), results=85)
        check(model, result, texts, width, 0.5, 85, (first, second))
        for row, begin in enumerate((first, second)):
            expected = {text for text in texts if spelled(text).startswith(begin)}
            there = {tuple(each[:n]) for each, n in zip(result.tokens[row].tolist(), result.lengths[row]) if n}
            assert there == expected if width == 70 else there <= expected
            found += len(there)
    assert found > 30


def test_longer_than_every_text_is_typed_and_nothing_is_found():
    result = ToyModel(11).search(9, 0.0, typed=typed_text(b"a" * 31, b"a" * 32))
    assert not result.valid.any() and not result.nan.any()


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("results", [1, 3, 16])
def test_stopping_early_changes_no_result(alpha, results):
    """The end is likely, so that the best texts are short; and the search without a bound is the same."""
    model = ToyModel(12)
    for table in model.tables:
        table[..., EOS] += 3
        table -= np.log(np.exp(table).sum(-1, keepdims=True))
    check(model, model.search(20, alpha, results=results), every_text(), 20, alpha, results)


def count_steps(model: ToyModel, **options) -> int:
    """Steps that a search takes, of LENGTH."""
    steps = []

    def extend(tokens, prefix, level):
        jax.debug.callback(lambda: steps.append(level))
        if level == 0:
            return jnp.asarray(model.tables[0])[:, None], prefix
        prefix = prefix.at[..., level - 1].set(tokens)
        places = (prefix[..., place] for place in range(level))
        return jnp.asarray(model.tables[level])[(jnp.arange(2)[:, None], *places)], prefix

    cache = jnp.zeros((2, 1, LENGTH), jnp.int32)
    options = {"batch": 2, "beam_width": 4, "eos": EOS, "max_length": LENGTH} | options
    jax.block_until_ready(jax.jit(lambda: text_search(extend, cache, **options))())
    jax.effects_barrier()
    return len(steps)


def test_a_search_stops_when_no_prefix_can_be_better():
    model = ToyModel(13)
    assert count_steps(model) == LENGTH
    for table in model.tables:
        table[...] = np.log(0.05)
        table[..., EOS] = np.log(0.8)
    assert count_steps(model, results=1) == 1
    assert count_steps(model, results=4) == 2, "four of the two lengths, none longer is likelier"
    assert count_steps(model, results=30) == LENGTH, "so many have not ended before"
    # Divided by a power of its length, the score of a long text could still be higher.
    assert count_steps(model, results=1, length_penalty=3.0) == LENGTH
    trie = build_text_trie([(0, EOS), (1, EOS)], V, EOS, max_length=LENGTH)
    assert count_steps(model, results=9, trie=trie) == 2, "no listed text goes on"


@pytest.mark.parametrize("filtered", [False, True])
def test_free_search_marks_what_the_list_holds(filtered):
    rows = some_texts(5, 25)
    trie = build_text_trie(rows, V, EOS)
    allowed = np.random.default_rng(0).random((2, 25)) < (0.5 if filtered else 2)
    model = ToyModel(4)
    result = model.search(30, 1.0, trie, allowed, constrained=False)
    for row in range(2):
        known = {text for text, keep in zip(rows, allowed[row], strict=True) if keep}
        expected = model.oracle(row, every_text(), 30, 1.0)[:30]
        assert [tuple(t[:n]) for t, n in zip(result.tokens[row], result.lengths[row], strict=True)] == [
            text for _, _, text in expected
        ]
        assert result.valid[row].tolist() == [text in known for _, _, text in expected]
        assert ((result.leaf[row] >= 0) == result.valid[row]).all()
    assert 0 < result.valid.mean() < 1


def test_equal_rows_are_one_text_whose_items_all_come_back():
    rows = [(0, EOS), (1, EOS), (0, EOS), (0, EOS)]
    trie = build_text_trie(rows, V, EOS, order=np.array([1, 0, 3, 2]))
    result = ToyModel(6, batch=1).search(3, 0.0, trie)
    items, _ = expand_items(trie, jax.tree.map(jnp.asarray, result), k=4)
    place = result.leaf[0].tolist().index(0)
    assert items[0].tolist() == ([2, 3, 0, 1] if place == 0 else [1, 2, 3, 0])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("level", [0, 3])
@pytest.mark.parametrize("with_trie", [True, False])
def test_nan_and_infinity_are_reported_for_their_request_alone(poison, level, with_trie):
    model = ToyModel(8)
    model.tables[level][1] = poison
    trie = build_text_trie(sorted(every_text()), V, EOS) if with_trie else None
    result = model.search(64, 0.0, trie)
    assert result.nan.tolist() == [False, True]
    assert result.valid.any(1).tolist() == [True, False]
    assert not np.isnan(result.scores).any()


def test_a_new_list_of_queries_does_not_recompile():
    model = ToyModel(9)
    trie = build_text_trie(sorted(every_text())[:40], V, EOS, max_length=LENGTH, capacity=60)
    sizes = []
    for count in (40, 11):
        refreshed = build_text_trie(sorted(every_text())[-count:], V, EOS, like=trie)
        model.search(7, 0.5, refreshed)
        sizes.append(decode._cache_size())
    assert sizes[0] == sizes[1]


def test_wrong_calls_are_named():
    model, texts = ToyModel(0), build_text_trie([(0, EOS)], V, EOS)
    for options, message in (
        ({"beam_width": 0}, "beam_width is 0"),
        ({"beam_width": 1, "max_length": 0}, "max_length is 0"),
        ({"beam_width": 1, "results": 0}, "results is 0"),
        ({"beam_width": 1, "trie": build_trie(np.array([[0]]), (V,))}, "texts end in None, the search's in 2"),
        ({"beam_width": 1, "allowed": np.ones((2, 1), bool)}, "give the trie too"),
        ({"beam_width": 1, "allowed": np.ones((3, 1), bool), "trie": texts}, "3 rows for 2 requests"),
    ):
        with pytest.raises(UserError, match=message):
            model.search(length_penalty=0.0, **options)
