"""Texts as targets: searched with and without a list against exhaustive rankings; one text is one answer."""

import dataclasses
import itertools
import threading

import jax
import numpy as np
import pytest
from compilations import count_compilations
from hypothesis import given, settings
from hypothesis import strategies as st
from text_parts import FEATURES, ITEMS, LETTERS, Letters, log_probs, make_history, make_space, make_text_model

from jaxrec.config import UserError
from jaxrec.decoding.filters import ItemOrder
from jaxrec.evaluation.cases import Cases
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender
from jaxrec.targets import TextSpace, TextSpaceConfig, load_text_space, normalised, text_space
from jaxrec.targets.text_numbers import TextNumbers
from jaxrec.text.tokenizer import TokenizerConfig, train_tokenizer

LENGTH = 4
HISTORIES = [make_history(items) for items in ([0], [1, 2], [4, 3, 2], [2])]
LIST = ["a", "b", "ab", "ba", "a b", "aab", "bab"]


@pytest.fixture(scope="module")
def listed() -> GenerativeRecommender:
    return make_text_model(make_space(LIST, [3, 1, 4, 1, 5, 9, 2], max_length=LENGTH), beam_width=16)


@pytest.fixture(scope="module")
def free() -> GenerativeRecommender:
    """Beams for every prefix: 1 + 9 + 81 of the tokens that end no text, those that stand for items among them."""
    return make_text_model(make_space(max_length=3, spellings=25), beam_width=81)


def test_with_a_list_the_ranking_is_that_of_every_listed_text(listed):
    answers, scores = listed.recommend(HISTORIES, len(LIST) + 1)
    rows = [[*row, 0] for row in Letters().encode(LIST)]
    for history, ranked, score in zip(HISTORIES, answers, scores, strict=True):
        expected = log_probs(listed, history, rows)
        order = np.argsort(-expected, kind="stable")
        assert ranked.tolist() == [*order, -1]
        np.testing.assert_allclose(score[:-1], expected[order], atol=2e-5)
        assert listed.space.show(ranked[:2]) == [LIST[order[0]], LIST[order[1]]]
    assert len({tuple(ranked) for ranked in answers.tolist()}) > 1


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_length_penalty_divides_the_scores(penalty):
    model = make_text_model(make_space(LIST, max_length=LENGTH, length_penalty=penalty), beam_width=16)
    answers, scores = model.recommend(HISTORIES[:1], len(LIST))
    rows = [[*row, 0] for row in Letters().encode(LIST)]
    expected = log_probs(model, HISTORIES[0], rows) / np.array([len(row) for row in rows]) ** penalty
    np.testing.assert_allclose(scores[0], np.sort(expected)[::-1], atol=2e-5)
    assert answers[0].tolist() == np.argsort(-expected, kind="stable").tolist()


def best_spellings(model: GenerativeRecommender, history: dict) -> list[tuple[str, float]]:
    """All texts of two tokens at most, with the score of their best spelling, best first: by plain enumeration."""
    tokens = range(1, len(LETTERS) + ITEMS)
    rows = [[*row, 0] for count in range(3) for row in itertools.product(tokens, repeat=count)]
    best: dict[str, float] = {}
    for row, score in zip(rows, log_probs(model, history, rows).tolist(), strict=True):
        if text := normalised(Letters().decode([row])[0]):
            best[text] = max(best.get(text, -np.inf), score)
    return sorted(best.items(), key=lambda pair: -pair[1])


def test_without_a_list_the_ranking_is_that_of_every_text(free):
    count = len(best_spellings(free, HISTORIES[0]))
    answers, scores = free.recommend(HISTORIES, count + 1)
    for history, ranked, score in zip(HISTORIES, answers, scores, strict=True):
        expected = best_spellings(free, history)
        assert free.space.show(ranked[:-1]) == [text for text, _ in expected]
        np.testing.assert_allclose(score[:-1], [value for _, value in expected], atol=2e-5)
        assert ranked[-1] == -1 and score[-1] == -np.inf
    # "b" and "B" read alike, as do "a" and "a ": there were more spellings than answers.
    assert count == 6 < 91


def test_exclude_history_leaves_texts_alone(listed, free):
    for model in (listed, free):
        full = model.recommend(HISTORIES, 3)
        with count_compilations() as compiled:
            without = model.recommend(HISTORIES, 3, exclude_history=True)
        assert compiled == [], "a filter that leaves out nothing is none"
        np.testing.assert_array_equal(full[0], without[0])
        np.testing.assert_array_equal(full[1], without[1])


def test_a_filter_of_listed_texts_is_followed(listed):
    order = ItemOrder(listed.served.trie)
    answers, _ = listed.recommend(HISTORIES, len(LIST), allowed=[order.allowed(blocked=[0, 5])] * 4)
    assert all(sorted(row) == [-1, -1, 1, 2, 3, 4, 6] for row in answers.tolist())
    allowed = [order.allowed(blocked=[0, 5])] * 4
    again, _ = listed.recommend(HISTORIES, len(LIST), exclude_history=True, allowed=allowed)
    np.testing.assert_array_equal(again, answers)


def test_the_most_popular_texts_are_sorted_once():
    space = make_space(LIST, [3, 1, 4, 1, 5, 9, 2])
    assert space.most_popular(4).tolist() == [5, 4, 2, 0] and space.most_popular(9).tolist() == [5, 4, 2, 0, 6, 1, 3]
    assert np.shares_memory(space.most_popular(2), space.most_popular(3))
    assert make_space(LIST).most_popular(2).tolist() == [0, 1]


def test_writings_of_a_text_are_one_answer_written_as_the_most_popular():
    space = make_space([" Ab", "b", "ab", "aB  ", "ＡＢ"], [1, 2, 5, 4, 0])
    assert space.texts == ("ab", "b")
    assert space.popularity.tolist() == [10, 2]
    assert make_space(["B", "b"]).texts == ("B",), "the first of equal ones"
    assert space.most_popular(5).tolist() == [0, 1]
    assert make_space(["b", "a"]).most_popular(1).tolist() == [0]
    truths, where = space.truths([["AB", "ab ", "B"], [], ["", "bb"]])
    assert truths[:, :2].tolist() == [[0, 1], [-1, -1], [2, -1]]
    assert where.tolist() == [[True, True], [False, False], [True, False]]
    assert space.show([0, 1, 2]) == ["ab", "b", "bb"]


def test_a_text_outside_the_list_is_a_text_too():
    space = make_space(["a"])
    ((number,),), _ = space.truths([["Bb"]])
    assert number >= len(space) and space.show([number]) == ["bb"]
    tokens, mask = space.tokens(np.array([[number, -1]]))
    assert tokens[0, 0, :3].tolist() == [2, 2, 0] and mask.sum(-1).tolist() == [[3, 0]]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalised(normalised(text)) == normalised(text)
    assert normalised(f"  {text}\n\t") == normalised(text)
    assert normalised(text.replace(" ", "  ")) == normalised(text)


@pytest.mark.parametrize(
    "left, right",
    [
        ("Red  Shoes ", "red shoes"),
        ("ＲＥＤ", "red"),
        ("STRASSE", "straße"),
        ("cafe\u0301", "café"),
        ("a\u00a0b", "a b"),
        ("a\x07b\x00", "a b"),
        ("soft\u00adware\ufeff", "software"),
        ("\u202eשלום", "שלום"),
        ("zero\u200bwidth", "zero width"),
    ],
)
def test_what_is_one_text(left, right):
    assert normalised(left) == normalised(right)


@pytest.mark.parametrize(
    "left, right", [("cafe", "café"), ("red shoes", "redshoes"), ("红", "紅"), ("👟", "👞"), ("👩\u200d🚀", "👩🚀")]
)
def test_what_is_not(left, right):
    assert normalised(left) != normalised(right)


def test_encoding_ends_texts_and_cuts_long_ones():
    space = make_space(max_length=3)
    tokens, mask = space.encode(["A", "abb", ""])
    assert tokens.tolist() == [[1, 0, 0], [1, 2, 2], [0, 0, 0]]
    assert mask.tolist() == [[True, True, False], [True] * 3, [True, False, False]]


def test_the_accuracy_of_tokens_and_validity_against_counting():
    texts = ["".join(letters) for count in (1, 2) for letters in itertools.product("ab", repeat=count)]
    model = make_text_model(make_space(texts, max_length=3), seed=1, beam_width=81)
    typed = [["ab", "b"], ["aa"], ["a"], ["ba"]]
    truths, where = model.space.truths(typed)
    found = model.diagnose(Cases(np.arange(4), HISTORIES, truths, where, where))
    right = count = valid = 0
    every = [[*row, 0] for n in range(3) for row in itertools.product(range(1, 10), repeat=n)]
    listed = [[*row, 0] for row in Letters().encode(texts)]
    for history, row in zip(HISTORIES, typed, strict=True):
        for text in row:
            tokens = [*Letters().encode([text])[0], 0]
            for place, token in enumerate(tokens):
                tried = [[*tokens[:place], other] for other in range(model.space.vocabulary)]
                right += int(np.argmax(log_probs(model, history, tried)) == token)
                count += 1
        best = np.argsort(-log_probs(model, history, every))[:10]
        valid += sum(every[index] in listed for index in best)
    assert found == {"acc_token": (right, count), "validity": (valid, 40)}
    assert valid > 0


def test_without_a_list_nothing_is_invalid(free):
    truths, where = free.space.truths([["a"]])
    assert set(free.diagnose(Cases(np.arange(1), HISTORIES[:1], truths, where, where))) == {"acc_token"}


def test_saved_and_read_back(tmp_path):
    texts = ["红色 连衣裙", "red\u2028shoes", 'a "b"\\n', "👟"]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocabulary=290))
    config = TextSpaceConfig(max_length=9, length_penalty=0.5, spellings=2)
    for popularity in (None, [4.0, 3.0, 2.0, 1.5]):
        folder = tmp_path / "run" / "targets"
        text_space(tokenizer, texts, popularity, config, vocabulary=300).save(folder)
        again = load_text_space(folder)
        assert (again.texts, again.config, again.vocabulary) == (tuple(texts), config, 300)
        assert (None if again.popularity is None else again.popularity.tolist()) == popularity
        assert again.encode(texts)[0].tolist() == text_space(tokenizer, texts, config=config).encode(texts)[0].tolist()
    assert not list(folder.glob("*.pickle"))
    (folder / "texts.jsonl").write_text('{"text": "a"\n')
    message = r"texts\.jsonl or text_space\.json is missing or damaged \(.*\); train the run, or export it, again"
    with pytest.raises(UserError, match=message):
        load_text_space(folder)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: make_space(["a", " "]), "holds an empty text in row 1"),
        (lambda: make_space(["a"], [1, 2]), "2 numbers of popularity for 1 texts"),
        (
            lambda: make_space(["aaaa"], max_length=4).build_trie(),
            "'aaaa' has 5 tokens with its end, but texts.max_length",
        ),
        (lambda: text_space(Letters(), vocabulary=2), "vocabulary of 2, but the tokenizer has 5"),
        (lambda: TextSpace(Letters(), ("a", "A")), "holds a text twice"),
        (lambda: TextSpaceConfig(max_length=0), "texts.max_length"),
        (lambda: make_space(["a"]).show([7]), "no text has the number 7"),
    ],
)
def test_wrong_calls_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_texts_have_no_levels(listed):
    parts = listed.assembly, listed.variables, FEATURES
    with pytest.raises(UserError, match=r"'decoding\.beam_widths' gives a number a level, but texts have no levels"):
        GenerativeRecommender(*parts, DecodingConfig(beam_widths=(2, 2)))
    with pytest.raises(UserError, match="not rescored"):
        listed.space.search(None, listed.served.trie, batch=1, width=2, k=1, rescore=lambda *_: None)


def test_a_damaged_model_is_told(free, monkeypatch):
    damaged = jax.tree.map(lambda x: x * np.nan, free.variables)
    monkeypatch.setattr(free, "served", free.served.replace(variables=damaged))
    with pytest.raises(FloatingPointError, match="NaN"):
        free.recommend(HISTORIES[:1], 3)


def test_another_list_of_the_same_size_compiles_nothing(listed):
    other = make_space([*LIST[:-1], "bbb"], max_length=LENGTH)
    trie = other.build_trie(like=listed.served.trie)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(trie)]
    assert shapes == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(listed.served.trie)]


def test_generated_texts_are_forgotten_and_true_ones_are_not():
    numbers = TextNumbers(["a"], remembered=2)
    truth = numbers.of("true", for_good=True)
    first = numbers.of("one")
    assert [numbers.of(text) for text in ("one", "two", "three", "a", "true")] == [first, 3, 4, 0, truth]
    with pytest.raises(UserError, match=f"number {first}"):
        numbers.text(first)
    assert numbers.of("one") == 5, "a number is never given again"
    assert numbers.text(truth) == "true" and numbers.of("four") == 6 and len(numbers) == 4
    kept = numbers.of("four", for_good=True)
    for text in "xyz":
        numbers.of(text)
    assert numbers.text(kept) == "four"


def test_numbers_given_by_several_threads_agree():
    numbers, found = TextNumbers(()), [{} for _ in range(4)]

    def work(mine: dict) -> None:
        mine.update({text: numbers.of(text) for text in map(str, range(500))})

    threads = [threading.Thread(target=work, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2] == found[3]
    assert sorted(found[0].values()) == list(range(500))


def test_the_fingerprint_changes_with_items_texts_and_tokenizer():
    space = make_space(["a", "b"])
    original = space.describe(["1"])["fingerprint"]
    assert original == make_space(["a", "b"]).describe(["1"])["fingerprint"]
    others = [space.describe(["2"]), make_space(["b", "a"]).describe(["1"])]
    others.append(
        dataclasses.replace(space, tokenizer=train_tokenizer(["a"], TokenizerConfig(260)), vocabulary=0).describe(["1"])
    )
    assert original not in [other["fingerprint"] for other in others]


def test_a_text_is_held_where_it_was_searched_for():
    space = make_space(["ab", "b"])
    held = space.held({"search_query": np.array(["B", "aa", " b ", "", "AA"], object)}, np.zeros(0, bool))
    assert space.show(held) == ["b", "aa"] and held.dtype == np.int32
    assert space.held({"item": np.zeros(3, np.int32)}, np.zeros(0, bool)).tolist() == []


@pytest.mark.parametrize("kind", ["listed", "free"])
def test_what_was_searched_for_is_left_out(kind, request):
    """As the ranking with everything, without it; others move up."""
    model = request.getfixturevalue(kind)
    everything, scores = model.recommend(HISTORIES, 7)
    searched = [model.space.show(row[[0, 2]]) for row in everything]
    histories = [
        {**each, "search_query": np.array(texts, object)} for each, texts in zip(HISTORIES, searched, strict=True)
    ]
    answers, of_new = model.recommend(histories, 5, exclude_history=True)
    np.testing.assert_array_equal(answers, everything[:, [1, 3, 4, 5, 6]])
    np.testing.assert_allclose(of_new, scores[:, [1, 3, 4, 5, 6]], atol=1e-5)
