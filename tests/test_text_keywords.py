"""Keywords: which are kept, which are found (against naive matching), and Eq. 2 by hand."""

import re
import string

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.config import UserError
from jaxrec.data.words import normalised, words
from jaxrec.text.keywords import KeywordConfig, Keywords, enhance, mine

ITEMS = pa.table(
    {
        "item_id": ["a", "b", "c", "d"],
        "brand": ["Acme", "Sony Corp.", "acme", None],
        "category": ["Running Shoes", "TV", "Vintage running shoes", "Tv"],
        "text": ["Acme Runner 1", "Bravia by SONY", "Shoes, vintage", "TV stand"],
        "price": [1.0, 2.0, 3.0, 4.0],
    }
)
VIEWS = np.array([5, 3, 2, 1])


def listed(*texts):
    return Keywords(list(texts), ["any"] * len(texts), np.zeros(len(texts), np.int64))


def naive(keywords, text):
    """The longest first, of equal ones the first, without overlaps: by trying every place."""
    said, places = words(normalised(text)), []
    for row, keyword in enumerate(keywords):
        parts = keyword.split()
        places += [
            (-len(keyword), start, start + len(parts), row)
            for start in range(len(said) - len(parts) + 1)
            if said[start : start + len(parts)] == parts
        ]
    kept = []
    for _, begin, end, row in sorted(places):
        if all(begin >= other_end or end <= other_begin for other_begin, other_end, _ in kept):
            kept.append((begin, end, row))
    return [row for _, _, row in sorted(kept)]


WORDS = st.sampled_from(["red", "r", "redred", "wine", "vine", "é", "酒", "紅", "x1"])
PHRASES = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)
GLUED = st.lists(st.tuples(WORDS, st.sampled_from([" ", "  ", "-", "\n", ", ", "", "_", "\t", " \n "])), max_size=8)
TEXTS = GLUED.map(lambda parts: "".join(word.upper() + glue for word, glue in parts))


@given(st.lists(PHRASES, unique_by=lambda text: tuple(words(text)), max_size=12), st.lists(TEXTS, max_size=6))
def test_keywords_are_those_of_naive_matching(phrases, texts):
    keywords = [" ".join(words(phrase)) for phrase in phrases]
    assert listed(*keywords).match_many(texts) == [naive(keywords, text) for text in texts]


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=20) | st.text(string.printable, max_size=20))
def test_the_words_of_ascii_are_those_of_any_text(text):
    plain = normalised(text)
    assert normalised(plain) == plain
    if plain.isascii():
        assert words(plain) == re.findall("[a-z0-9]+", plain)
        assert words(plain) == words(plain + " \N{EM DASH}")


def test_whole_words_and_the_longest_first():
    found = listed("red", "red wine", "wine vinegar glass", "shoe")
    assert found.match_many(["Red-Wine vinegar glass!", "shoes", "a RED shoe, red", ""]) == [[0, 2], [], [0, 3, 0], []]


def test_a_character_of_han_is_a_word():
    assert words(normalised("Nike连衣裙 hat")) == ["nike", "连", "衣", "裙", "hat"]
    assert listed("连 衣 裙").match_many(["红色连衣裙"]) == [[0]]


def test_keywords_are_ranked_by_the_views_of_their_items():
    clicks = (["sony tv", "shoes running", "cheap acme"], np.array([1, 2, 0]))
    config = KeywordConfig(attributes=("brand", "category"), least_views=3)
    made = mine(ITEMS, VIEWS, clicks, config)
    rows = list(zip(made.texts, made.attributes, made.views.tolist(), strict=True))
    # `shoes running` is in no category in this order, but each of its words is.
    assert rows == [
        ("acme", "brand", 7),
        ("sony", "brand", 3),
        ("sony corp", "brand", 3),
        ("running", "category", 7),
        ("running shoes", "category", 7),
        ("shoes", "category", 7),
        ("tv", "category", 4),
    ]
    few = mine(ITEMS, VIEWS, clicks, KeywordConfig(attributes=("brand", "category"), ngrams=0, most=1))
    assert few.texts == ["acme", "running shoes"]


def test_items_have_the_keywords_of_their_columns_and_text():
    made = mine(ITEMS, VIEWS, ([], np.zeros(0, int)), KeywordConfig(attributes=("brand", "category"), least_views=1))
    found = [[made.texts[row] for row in rows] for rows in made.of_items(ITEMS)]
    assert found == [["acme", "running shoes"], ["sony corp", "tv"], ["acme", "vintage running shoes"], ["tv"]]
    assert made.of_items(ITEMS.select(["item_id"])) == [[]] * 4


def test_no_keywords():
    none = mine(ITEMS, VIEWS, ([], np.zeros(0, int)), KeywordConfig(least_views=100))
    assert none.texts == [] and none.match_many(["acme", ""]) == [[], []] and none.of_items(ITEMS) == [[]] * 4


def test_eq_2_by_hand():
    vectors = np.array([[1.0, 0.0], [0.0, 2.0], [4.0, 4.0]], np.float32)
    of_keywords = np.array([[0.0, 1.0], [2.0, 3.0]], np.float32)
    enhanced = enhance(vectors, of_keywords, [[0, 1], [], [1]])
    # 1/2 ((1, 0) + 1/2 ((0, 1) + (2, 3))); no keyword: itself; 1/2 ((4, 4) + (2, 3))
    np.testing.assert_array_equal(enhanced, np.array([[1.0, 1.0], [0.0, 2.0], [3.0, 3.5]], np.float32))
    assert enhanced.dtype == np.float32
    np.testing.assert_array_equal(enhance(vectors, np.zeros((0, 2)), [[], [], []]), vectors)
    with pytest.raises(UserError, match="2 lists of keywords do not fit 3 vectors"):
        enhance(vectors, of_keywords, [[], []])


def test_a_keyword_column_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"keywords.attributes names 'brnd', but items.parquet has no such column"):
        mine(ITEMS, VIEWS, ([], np.zeros(0, int)), KeywordConfig(attributes=("brnd",)))
    with pytest.raises(UserError, match=r"'price', but that column of items.parquet is double"):
        mine(ITEMS, VIEWS, ([], np.zeros(0, int)), KeywordConfig(attributes=("price",)))
    with pytest.raises(UserError, match=r"'keywords.most' is 0"):
        KeywordConfig(most=0)
