"""Tokenizers: texts of any script come back exactly; the same texts give the same; wrong files are named."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxrec.config import UserError
from jaxrec.text.tokenizer import (
    HuggingFaceTokenizer,
    SentencePiece,
    TokenizerConfig,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

TEXTS = [
    "红色 连衣裙 夏季",
    "حذاء رياضي",
    "red running shoes",
    "red shoes",
    "blue jeans",
    "running shorts",
    "red dress",
]
KINDS = (TokenizerConfig(vocabulary=310), TokenizerConfig(vocabulary=292, kind="unigram"))


@pytest.fixture(scope="module", params=KINDS, ids=lambda config: config.kind)
def trained(request) -> SentencePiece:
    return train_tokenizer(TEXTS, request.param)


@pytest.mark.parametrize(
    "text",
    [
        *TEXTS, "夏季红裙子新款", "أحذية", "👟👩‍👩‍👧‍👦🏽", "cafe\u0301 vs café", "नमस्ते", "", " ", "  two  spaces ",
        "a\tb\r\nc\u2028d\u00a0e", "nul\x00", "\u2581 \u2581\u2581x\u2581", "<s></s><unk><pad><0x41>", "\ufeffbom",
        "ﬁ ①",
    ],
)  # fmt: skip
def test_texts_come_back_exactly(trained, text):
    (row,) = trained.encode([text])
    assert trained.decode([row]) == [text]
    assert all(2 < token < trained.size for token in row), "neither padding, end nor unknown"


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8")), max_size=4))
def test_any_texts_come_back_exactly(trained, texts):
    assert trained.decode(trained.encode(texts)) == texts


def test_words_of_the_texts_are_few_tokens():
    tokenizer = train_tokenizer(TEXTS, KINDS[0])
    (words,), (others,) = tokenizer.encode(["red running"]), tokenizer.encode(["qqq qqqqqqq"])
    assert len(words) <= 6 < len(others)


def test_the_same_texts_give_the_same_tokenizer(trained):
    config = next(config for config in KINDS if config.vocabulary == trained.size)
    assert train_tokenizer(iter(TEXTS), config).file() == trained.file()
    assert train_tokenizer([*TEXTS, "more"], config).file() != trained.file()


def test_tokens_that_are_no_text_are_left_out(trained):
    (row,) = trained.encode(["red"])
    assert trained.decode([[0, *row, 1, 2, trained.size, -1]]) == ["red"]


def test_rare_characters_are_bytes_where_the_coverage_leaves_them_out():
    few = train_tokenizer(["ab" * 500 + "裙"], TokenizerConfig(vocabulary=264, coverage=0.99))
    assert len(few.encode(["裙"])[0]) == 3 and few.decode(few.encode(["裙ab"])) == ["裙ab"]


def test_saved_and_read_back(trained, tmp_path):
    save_tokenizer(trained, tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.size, again.end, again.encode(TEXTS)) == (trained.size, trained.end, trained.encode(TEXTS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text_tokenizer.json", "tokenizer.model"]


@pytest.fixture
def given_json() -> bytes:
    """A byte-level tokenizer as those of Qwen2 and GPT-2 are."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary | {"re": 256, "<end>": 257}, [("r", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.enable_truncation(4)
    return tokenizer.to_str().encode()


def test_a_tokenizer_that_came_with_weights(given_json, tmp_path):
    tokenizer = HuggingFaceTokenizer(given_json, "<end>")
    assert (tokenizer.size, tokenizer.end) == (258, 257)
    assert tokenizer.decode(tokenizer.encode(TEXTS)) == TEXTS, "not cut"
    assert tokenizer.encode(["red"])[0][0] == 256
    assert 257 not in tokenizer.encode(["a<end>b"])[0] and tokenizer.decode([[256, 257, 300]]) == ["re"]
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.end, again.encode(TEXTS)) == (257, tokenizer.encode(TEXTS))
    with pytest.raises(UserError, match="no token '</s>'"):
        HuggingFaceTokenizer(given_json, "</s>")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        HuggingFaceTokenizer(b"{}", "<end>")


@pytest.mark.parametrize(
    ("texts", "config", "message"),
    [
        ([], TokenizerConfig(), "trained on no text"),
        (["", ""], TokenizerConfig(), "trained on no text"),
        (
            TEXTS,
            TokenizerConfig(vocabulary=5000),
            r"'tokenizer\.vocabulary' is 5000, but these texts make \d+ tokens at",
        ),
        (TEXTS, TokenizerConfig(vocabulary=5000, kind="unigram"), r"is 5000, but these texts make \d+ tokens at most"),
        (TEXTS, TokenizerConfig(vocabulary=100), r"is 100, but the bytes and the characters of these texts take \d+"),
        (["fine", "half \ud800"], TokenizerConfig(), "text 1 holds half a character .* at place 5"),
    ],
)
def test_texts_that_make_no_tokenizer_are_named(texts, config, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, config)


def test_the_stated_most_is_the_most():
    with pytest.raises(UserError) as refused:
        train_tokenizer(TEXTS, TokenizerConfig(vocabulary=5000))
    most = int(str(refused.value).split("make ")[1].split()[0])
    assert train_tokenizer(TEXTS, TokenizerConfig(vocabulary=most)).size == most


@pytest.mark.parametrize("bad", [{"vocabulary": 0}, {"kind": "word"}, {"coverage": 0.0}, {"coverage": 1.5}])
def test_a_configuration_that_cant_be_is_named(bad):
    with pytest.raises(UserError, match=rf"tokenizer\.{next(iter(bad))}'"):
        TokenizerConfig(**bad)


def test_half_a_character_is_refused(trained):
    with pytest.raises(UserError, match="text 1 holds half a character"):
        trained.encode(["whole", "\udfff"])


def test_damaged_files_are_named(tmp_path):
    save_tokenizer(train_tokenizer(TEXTS, KINDS[0]), tmp_path)
    model, notes = tmp_path / "tokenizer.model", tmp_path / "text_tokenizer.json"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model is damaged"):
        load_tokenizer(tmp_path)
    model.write_bytes(b"no model")
    known = json.loads(notes.read_text())
    notes.write_text(json.dumps(known | {"sha256": hashlib.sha256(b"no model").hexdigest()}))
    with pytest.raises(UserError, match="no sentencepiece model"):
        load_tokenizer(tmp_path)
    model.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model can't be read"):
        load_tokenizer(tmp_path)
    notes.write_text('{"file": "../else"}')
    with pytest.raises(UserError, match="names no tokenizer's file"):
        load_tokenizer(tmp_path)
    notes.unlink()
    with pytest.raises(UserError, match=r"text_tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
