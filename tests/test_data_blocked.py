"""A block list: in any writing, whole texts and words, and nothing else."""

import pytest

from jaxrec.config import UserError
from jaxrec.data.blocked import NOTHING, Blocked


@pytest.mark.parametrize(
    "text",
    [
        "bad shoes",
        "Bad  SHOES",
        " bad-shoes!",
        "ＢＡＤ shoes",
        "bad\u00ad sho\u200bes",
        "bad\u3000shoes",
        "«bad» shoes",
    ],
)
def test_other_writings_of_a_blocked_text_are_blocked(text):
    assert Blocked(texts=("Bad shoes",)).holds(text) and Blocked(texts=(text,)).holds("bad shoes")


@pytest.mark.parametrize(
    "text", ["bad", "bad shoes for men", "good bad shoes", "badshoes", "bad shoe", "", " ", "bäd shoes"]
)
def test_a_text_is_blocked_as_a_whole(text):
    assert not Blocked(texts=("bad shoes",)).holds(text)


@pytest.mark.parametrize(
    "text, held",
    [
        ("red shoe", True), ("SHOE red", True), ("a shoe-box", True), ("red shoes", False), ("horseshoe", False),
        ("some very bad thing", True), ("very, bad!", True), ("bad very", False), ("very good bad", False),
        ("红色恶意连衣裙", True), ("恶红意", False), ("", False), ("👟", False),
    ],
)  # fmt: skip
def test_blocked_words_are_in_no_text(text, held):
    assert Blocked(words=("Shoe", "very bad", "恶意")).holds(text) == held


def test_a_text_without_words_is_compared_as_it_is():
    blocked = Blocked(texts=("👟",), words=("!!!",))
    assert blocked.holds("👟") and blocked.holds(" 👟\ufe0f".replace("\ufe0f", "")) and blocked.holds("!!!")
    assert not blocked.holds("👞") and not blocked.holds("👟 shoes")


def test_an_empty_list_blocks_nothing():
    assert not NOTHING and not NOTHING.holds("a") and Blocked(words=("a",))


@pytest.mark.parametrize("wrong", ["", "  ", "\u200b"])
def test_an_entry_that_says_nothing_is_refused(wrong):
    for name in ("texts", "words"):
        with pytest.raises(UserError, match=f"the block list's {name} hold .* which says nothing; leave it out"):
            Blocked(**{name: ("a", wrong)})
