"""Texts that begin with what was typed, listed texts above others, blocked texts: against exhaustive rankings."""

import itertools

import numpy as np
import pytest
from compilations import count_compilations
from text_parts import ITEMS, LETTERS, Letters, log_probs, make_history, make_space, make_text_model

from jaxrec.config import UserError
from jaxrec.data.blocked import Blocked
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender
from jaxrec.targets import TextSpace, changed, load_text_space, normalised, text_space
from jaxrec.text.tokenizer import TokenizerConfig, train_tokenizer

QUERIES = [
    "red shoes", "red shirt", "red", "redder", "rain boots", "rain coat", "Boots", "red  shoes for men", "ＲＥＤ dress",
    "红色 连衣裙", "红色 鞋", "حذاء رياضي", "حذاء", "café au lait", "café", "shoes 👟", "👟", "👟👞", "a b c",
]  # fmt: skip
TOKENIZER = train_tokenizer(map(normalised, QUERIES), TokenizerConfig(vocabulary=340))
HISTORY = make_history([1, 2])
CUTS = sorted({normalised(query)[:cut] for query in QUERIES for cut in range(len(normalised(query)) + 1)})


def make_listed(**decoding) -> GenerativeRecommender:
    return make_text_model(make_space(QUERIES, tokenizer=TOKENIZER, max_length=16), beam_width=64, **decoding)


@pytest.fixture(scope="module")
def listed() -> GenerativeRecommender:
    return make_listed(completing=True)


def asked(*prefixes: str) -> list[dict]:
    return [HISTORY | {"prefix": prefix} for prefix in prefixes]


def texts_of(model: GenerativeRecommender, answers: np.ndarray) -> list[list[str]]:
    return [model.space.show(row[row >= 0]) for row in answers]


def test_every_cut_of_every_query_finds_the_queries_that_begin_with_it(listed):
    """The ranking of all listed texts, filtered by how they read; also where a cut falls inside a token."""
    everything, scores = make_listed().recommend([HISTORY], len(QUERIES))
    inside = 0
    answers, completed = listed.recommend(asked(*CUTS), len(QUERIES))
    for cut, found, found_scores in zip(CUTS, answers, completed, strict=True):
        expected = [
            (number, score)
            for number, score in zip(everything[0], scores[0], strict=True)
            if normalised(listed.space.texts[number]).startswith(cut)
        ]
        assert expected, "a cut of a query begins that query"
        assert found[found >= 0].tolist() == [number for number, _ in expected], cut
        np.testing.assert_allclose(found_scores[: len(expected)], [score for _, score in expected], atol=1e-4)
        ends = np.cumsum([len(listed.space.token_bytes.tokens[token]) for token in TOKENIZER.encode([cut])[0]])
        (whole,) = TOKENIZER.encode([normalised(listed.space.texts[expected[0][0]])])
        inside += len(cut.encode()) not in np.cumsum([len(listed.space.token_bytes.tokens[token]) for token in whole])
        assert not len(ends) or ends[-1] == len(cut.encode())
    assert inside > 20


@pytest.mark.parametrize(
    "prefix, found",
    [
        ("RED ", {"red shoes", "red shirt", "red  shoes for men", "ＲＥＤ dress"}),
        ("red  s", {"red shoes", "red shirt", "red  shoes for men"}),
        ("\u3000cafe\u0301 ", {"café au lait"}),
        ("红", {"红色 连衣裙", "红色 鞋"}),
        ("حذاء ر", {"حذاء رياضي"}),
        ("redd\u200b", {"redder"}),
        *((text, set()) for text in ("x", "reddx", "👟 ", "b" * 31, "b" * 32, "b" * 10_000)),
    ],
)
def test_what_was_typed_is_compared_in_any_writing(listed, prefix, found):
    answers, scores = listed.recommend(asked(prefix), len(QUERIES))
    assert set(texts_of(listed, answers)[0]) == found and len(texts_of(listed, answers)[0]) == len(found)
    assert (scores[0, len(found) :] == -np.inf).all()


def test_a_query_is_what_was_typed_where_there_is_no_prefix_and_nothing_finds_all(listed):
    answers, _ = listed.recommend([HISTORY | {"query": "boo"}, HISTORY, *asked("", "  ")], len(QUERIES))
    assert texts_of(listed, answers)[0] == ["Boots"] and (answers[1:] >= 0).all()


def test_requests_of_one_batch_do_not_disturb_one_another(listed):
    """Long and short typed texts are in tables of different sizes, and in batches of their own."""
    prefixes = ["r", "red shoes for men and some more words", "", "red shoes", "b", "حذاء رياضي حذاء رياضي", "👟"]
    together, scores = listed.recommend(asked(*prefixes), 7)
    for prefix, answers, of_answers in zip(prefixes, together, scores, strict=True):
        alone, of_alone = listed.recommend(asked(prefix), 7)
        np.testing.assert_array_equal(answers, alone[0])
        np.testing.assert_allclose(of_answers, of_alone[0], atol=1e-5)


def test_prefixes_of_one_size_compile_once(listed):
    listed.recommend(asked("r"), 5)
    with count_compilations() as compiled:
        listed.recommend(asked("red sho", "", "红色"), 5)
    assert compiled == []


# ---- any text --------------------------------------------------------------------------------------------------------

LIST = ["ab", "ba", "a b"]
EVERY = range(1, len(LETTERS) + ITEMS)


def make_letters(texts=(), blocked=None, **decoding) -> GenerativeRecommender:
    """Texts of two letters, three with a list; beams for every prefix of two, and results for every spelling."""
    space = text_space(
        Letters(),
        texts,
        config=make_space(max_length=4 if texts else 3, spellings=25).config,
        vocabulary=Letters.size + ITEMS,
        blocked=blocked or Blocked(),
    )
    return make_text_model(space, beam_width=81, **decoding)


@pytest.fixture(scope="module")
def any_text() -> GenerativeRecommender:
    return make_letters(completing=True)


@pytest.mark.parametrize("prefix", ["", "a", "A", "b", "ab", "a ", "bb"])
def test_any_text_begins_with_what_was_typed(any_text, prefix):
    """Spellings in which a letter reads like a typed one but is written with other bytes are not searched."""
    model = any_text
    answers, scores = model.recommend(asked(prefix), 9)
    begin = "a " if prefix == "a " else normalised(prefix)
    found = dict(zip(texts_of(model, answers)[0], scores[0].tolist(), strict=False))
    rows = [[*row, 0] for count in range(3) for row in itertools.product(EVERY, repeat=count)]
    expected: dict[str, float] = {}
    for row, score in zip(rows, log_probs(model, HISTORY, rows).tolist(), strict=True):
        # Tokens of items are no letters: they come only behind what was typed.
        written = ["".join(LETTERS[token] for token in row[:size] if 0 < token < len(LETTERS)) for size in range(3)]
        silent = [token >= len(LETTERS) for token in row]
        legal = all(len(text) >= len(begin) for text, quiet in zip(written, silent, strict=False) if quiet)
        text = normalised(written[-1])
        if written[-1].startswith(begin) and text.startswith(begin) and text and legal:
            expected[text] = max(expected.get(text, -np.inf), score)
    assert found.keys() == expected.keys() and found == pytest.approx(expected, abs=2e-5)
    assert all(text.startswith(begin) for text in found)


def test_mixed_answers_are_the_listed_ones_and_below_them_any_text():
    model, k = make_letters(LIST, constrained="mixed"), 6
    free = make_letters(LIST, constrained="free")
    alone = make_letters(LIST)
    mixed, scores = model.recommend([HISTORY], k)
    listed, of_listed = alone.recommend([HISTORY], k)
    others, of_others = free.recommend([HISTORY], 3 * k)
    assert (listed[0] >= 0).sum() == 3
    assert mixed[0, :3].tolist() == listed[0, :3].tolist()
    known = [(number, score) for number, score in zip(others[0], of_others[0], strict=True) if number >= len(LIST)]
    expected = [model.space.numbers.text(number) for number in mixed[0, 3:]]
    assert expected == free.space.show([number for number, _ in known])[: k - 3]
    np.testing.assert_allclose(scores[0, 3:], [score for _, score in known][: k - 3], atol=2e-5)
    # The listed ones have the better of the two scores: some other spelling can be likelier than the list's.
    better = dict(zip(others[0].tolist(), of_others[0].tolist(), strict=True))
    for number, score in zip(listed[0, :3].tolist(), of_listed[0, :3].tolist(), strict=True):
        assert dict(zip(mixed[0].tolist(), scores[0].tolist(), strict=True))[number] == pytest.approx(
            max(score, better.get(number, -np.inf)), abs=2e-5
        )
    assert len(set(model.space.show(mixed[0]))) == k, "no text comes twice"


def test_a_mixed_search_of_enough_listed_texts_is_that_of_the_list():
    mixed, listed = make_letters(LIST, constrained="mixed"), make_letters(LIST)
    for found, expected in zip(mixed.recommend([HISTORY], 3), listed.recommend([HISTORY], 3), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_mixed_answers_begin_with_what_was_typed_and_leave_out_the_history():
    model = make_letters(LIST, constrained="mixed", completing=True)
    answers, _ = model.recommend(asked("a"), 5)
    found = texts_of(model, answers)[0]
    assert set(found[:2]) == {"ab", "a b"} and len(found) > 2 and all(text.startswith("a") for text in found)
    history = HISTORY | {"prefix": "a", "search_query": np.array(["AB", found[2]], object)}
    without, _ = model.recommend([history], 5, exclude_history=True)
    kept = [text for text in found if text not in ("ab", found[2])]
    assert texts_of(model, without)[0][: len(kept)] == kept and not {"ab", found[2]} & set(texts_of(model, without)[0])


# ---- blocked ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constrained", ["free", "mixed"])
def test_blocked_texts_are_not_shown(constrained):
    """The ranking of everything else; the next ones move up."""
    blocked = Blocked(texts=("AB",), words=("bb",))
    vetted = [*LIST, "bb", "b b"]
    full = make_letters(vetted, constrained=constrained)
    everything = texts_of(full, full.recommend([HISTORY], 14)[0])[0]
    model = make_letters(vetted, blocked, constrained=constrained)
    assert model.space.texts == ("ba", "a b", "b b")
    answers, _ = model.recommend([HISTORY], 14)
    expected = [text for text in everything if text != "ab" and "bb" not in text.split()]
    assert texts_of(model, answers)[0][: len(expected)] == expected and {"ab", "bb"} <= set(everything)


def test_a_blocked_text_leaves_the_list_and_its_other_writings_too():
    space = text_space(Letters(), [" Ab", "b", "aB"], [1, 2, 5], blocked=Blocked(texts=("ＡＢ",)))
    assert space.texts == ("b",) and space.popularity.tolist() == [2]
    with pytest.raises(UserError, match="every text of the list is blocked"):
        text_space(Letters(), ["ab"], blocked=Blocked(words=("ab",)))


def test_the_block_list_is_saved(tmp_path):
    blocked = Blocked(texts=("AB",), words=("b a", "红"))
    text_space(TOKENIZER, ["a", "ab"], blocked=blocked).save(tmp_path)
    again = load_text_space(tmp_path)
    assert (again.blocked, again.texts) == (blocked, ("a",))


def test_half_a_character_is_no_answer():
    """Bytes that are no UTF-8 are written by a model that was trained on nothing."""
    space = text_space(train_tokenizer(["é"], TokenizerConfig(vocabulary=260)), vocabulary=265)
    model = make_text_model(space, beam_width=8)
    answers, _ = model.recommend([HISTORY], 8)
    assert not any("\ufffd" in text for text in texts_of(model, answers)[0])


# ---- a list that changes ---------------------------------------------------------------------------------------------


def same_space(left: TextSpace, right: TextSpace) -> None:
    """Equal lists, and tries with the same texts."""
    assert (left.texts, left.known, left.blocked) == (right.texts, right.known, right.blocked)
    assert (left.popularity is None) == (right.popularity is None)
    assert left.popularity is None or left.popularity.tolist() == right.popularity.tolist()
    for values, others in zip(left.rows, right.rows, strict=True):
        np.testing.assert_array_equal(values, others)


@pytest.mark.parametrize("popularity", [None, [3, 1, 2]])
def test_a_changed_list_is_that_of_a_new_space(popularity):
    space = make_space(LIST, popularity, max_length=5)
    counts = [0, 0, 0] if popularity is None else popularity
    new = changed(space, add=["bb", "BA", "Bb"], popularity=[1, 7, 4], remove=["A  B"])
    same_space(new, make_space(["ab", "Bb", "BA"], [counts[0], 5, 7], max_length=5))
    assert space.texts == tuple(LIST) and new.show([1]) == ["Bb"]
    assert changed(space, remove=["ab"]).popularity is None or popularity
    same_space(changed(new, add=LIST), make_space(["Bb", *LIST], [5, 0, 0, 0], max_length=5))
    found = changed(space, add=["bb", "aa"], blocked=Blocked(texts=("ba", "AA")))
    same_space(
        found, text_space(Letters(), ["ab", "a b", "bb"], popularity and [3, 2, 0], space.config, 10, found.blocked)
    )
    assert changed(found, add=["ba"]).texts == found.texts, "still blocked"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"remove": ["bb"]}, "'bb' can't be removed: it is not listed"),
        ({"remove": ["ab"], "add": ["AB"]}, "'ab' can't be removed: it is to be added too"),
        ({"remove": LIST}, "no text would be left in the list"),
        ({"blocked": Blocked(texts=tuple(LIST))}, "no text would be left in the list"),
        ({"add": [" "]}, "empty text in row 0"),
        ({"add": ["bbbb"]}, "'bbbb' has 5 tokens with its end, but texts.max_length is 4"),
        ({"add": ["bb"], "popularity": [1, 2]}, "2 numbers of popularity for 1 texts"),
    ],
)
def test_wrong_changes_of_a_list_are_named(changes, message):
    space = make_space(LIST, max_length=4)
    with pytest.raises(UserError, match=message):
        changed(space, **changes)
    with pytest.raises(UserError, match="there is no list to change"):
        changed(make_space(), add=["ab"])


# ---- wrong -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: make_letters(constrained="mixed"), r"'decoding\.constrained' is mixed, but no text is listed"),
        (
            lambda: DecodingConfig(constrained="some"),
            r"'decoding\.constrained' is 'some'; give one of listed, free, mixed",
        ),
    ],
)
def test_wrong_configurations_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
