"""Which tokens may follow what was typed: against every sequence of tokens, and against the tokens' own texts."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxrec.config import UserError
from jaxrec.data.words import normalised, typed
from jaxrec.text.token_bytes import PLACES, TokenBytes, token_bytes
from jaxrec.text.tokenizer import HuggingFaceTokenizer, TokenizerConfig, train_tokenizer

TEXTS = ["red running shoes", "red shoes", "红色 连衣裙", "حذاء رياضي", "café au lait", "running shorts 👟", "redder"]
PIECES = ("▁", "▁re", "re", "d", "▁sho", "es", "s", "h", "o", "e", "r", "a", "b", "ab")


def metaspace(scheme: str = "always") -> HuggingFaceTokenizer:
    """Pieces with a mark for spaces, and bytes for all else, as converted sentencepiece models are."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    vocabulary |= {piece: 258 + place for place, piece in enumerate(PIECES)}
    scores = [(piece, -1.0 - (len(piece) < 2)) for piece in vocabulary]
    tokenizer = Tokenizer(models.Unigram(scores, 0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if scheme == "always" else [])])
    tokenizer.add_special_tokens(["</s>"])
    return HuggingFaceTokenizer(tokenizer.to_str().encode(), "</s>")


def byte_level() -> HuggingFaceTokenizer:
    """As those of Qwen2, BART and GPT-2."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("r", "e"), ("re", "d"), ("Ġ", "s"), ("Ġs", "h")]
    vocabulary |= {"".join(pair): 256 + place for place, pair in enumerate(merges)} | {"<end>": 260}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.add_tokens(["é!"])
    return HuggingFaceTokenizer(tokenizer.to_str().encode(), "<end>")


TOKENIZERS = {
    "bpe": train_tokenizer(TEXTS, TokenizerConfig(vocabulary=330)),
    "unigram": train_tokenizer(TEXTS, TokenizerConfig(vocabulary=290, kind="unigram")),
    "metaspace": metaspace(),
    "metaspace without a space in front": metaspace("never"),
    "byte level": byte_level(),
}


@pytest.fixture(params=list(TOKENIZERS), scope="module")
def tokenizer(request):
    return TOKENIZERS[request.param]


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=12))
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer, text):
    if isinstance(tokenizer, HuggingFaceTokenizer):
        text = normalised(text.replace("▁", ""))  # it reads the mark as a space, and puts none before a space
    known = token_bytes(tokenizer)
    (row,) = tokenizer.encode([text])
    spelled = b"".join(known.tokens[token] for token in row)
    assert spelled.removeprefix(known.lead).decode() == text
    assert tokenizer.decode([row]) == [text]


def test_tokens_that_are_no_text_have_no_bytes(tokenizer):
    known = token_bytes(tokenizer, tokenizer.size + 3)
    assert len(known.tokens) == tokenizer.size + 3 and not any(known.tokens[-3:])
    silent = {token for token in range(tokenizer.size) if not known.tokens[token]}
    assert tokenizer.end in silent and silent <= {0, 1, 2, tokenizer.end}
    assert set(range(256)) <= {token[0] for token in known.tokens if len(token) == 1}


def agree(token: bytes, rest: bytes) -> bool:
    size = min(len(token), len(rest))
    return bool(token) and token[:size] == rest[:size]


@settings(max_examples=60, deadline=None)
@given(text=st.sampled_from(TEXTS) | st.text(st.characters(codec="utf-8"), max_size=20), words=st.integers(1, 4))
def test_the_table_is_the_comparison_of_every_token(tokenizer, text, words):
    known = token_bytes(tokenizer, tokenizer.size + 2)
    rest = known.of(typed(text))
    table, length = known.going_on(rest, words)
    assert table.shape == (words, tokenizer.size + 2) and table.dtype == np.uint32
    if len(rest) >= PLACES * words:
        assert length == 1 and not table.any(), "nothing may follow"
        return
    assert length == len(rest)
    for place in range(PLACES * words):
        given_bits = (table[place // PLACES] >> np.uint32(place % PLACES)) & 1
        expected = [place == length or (place < length and agree(token, rest[place:])) for token in known.tokens]
        assert given_bits.tolist() == expected


def test_every_spelling_of_what_was_typed_gets_through_and_no_other():
    """All sequences of tokens of a tiny vocabulary, against the texts that they spell."""
    known = TokenBytes([b"", b"a", b"b", b"ab", b"ba", b"\xc3", b"\xa9", "éa".encode()])
    for text in ("a", "ab", "aba", "éab", "bb"):
        table, length = known.going_on(text.encode(), 1)
        for row in itertools.product(range(len(known.tokens)), repeat=4):
            written, through = 0, True
            for token in row:
                through &= bool(table[0, token] >> np.uint32(written) & 1)
                written = min(written + int(known.lengths[token]), length)
            spelled, silent = b"", False
            for token in row:  # a token that is no text comes only behind what was typed
                silent |= not known.tokens[token] and len(spelled) < length
                spelled += known.tokens[token]
            begins = spelled.startswith(text.encode()) or text.encode().startswith(spelled)
            assert through == (begins and not silent), (text, row)


def test_every_cut_of_a_text_lets_its_own_tokens_through(tokenizer):
    known = token_bytes(tokenizer)
    cuts_inside_a_token = 0
    for text in map(normalised, TEXTS):
        (row,) = tokenizer.encode([text])
        for cut in range(len(text) + 1):
            begin = typed(text[:cut])
            assert begin == text[:cut]
            table, length = known.going_on(known.of(begin), 3)
            written = 0
            for token in row:
                assert table[written // PLACES, token] >> np.uint32(written % PLACES) & 1, (text, cut, token)
                cuts_inside_a_token += written < length < written + known.lengths[token]
                written = min(written + int(known.lengths[token]), length)
            assert written == length
            assert table[length // PLACES, tokenizer.end] >> np.uint32(length % PLACES) & 1
    assert cuts_inside_a_token > 5


def test_the_words_of_a_table_hold_the_longest_text():
    known = TokenBytes([b"", b"a" * 16, b"b"], lead=b" ")
    assert [known.words(tokens) for tokens in (0, 1, 2, 4)] == [1, 1, 2, 3]
    longest = b" " + b"a" * 64
    assert known.going_on(longest, known.words(4))[1] == 65
    assert not known.going_on(b" " + b"a" * 96, known.words(4))[0].any()


@pytest.mark.parametrize("text", ["", " ", "\n\u3000"])
def test_nothing_typed_lets_everything_through(tokenizer, text):
    known = token_bytes(tokenizer)
    table, length = known.going_on(known.of(typed(text)), 1)
    assert length == 0 and (table & 1).all()


@pytest.mark.parametrize(
    "text, begin",
    [
        ("red", "red"), ("Red ", "red "), ("  RED\t\n", "red "), ("red  sh", "red sh"), ("ＲＥＤ\u3000", "red "),
        ("STRASSE", "strasse"), ("straß", "strass"), ("cafe\u0301", "café"), ("👟 ", "👟 "), (" ", ""), ("", ""),
    ],
)  # fmt: skip
def test_a_space_at_the_end_of_what_was_typed_is_kept(text, begin):
    assert typed(text) == begin


def test_a_tokenizer_whose_tokens_have_no_text_of_their_own_is_refused():
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[SEP]": 2, "[UNK]": 3}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    for decoder in (decoders.WordPiece(), None):
        content = json.loads(tokenizer.to_str())
        content["decoder"] = None if decoder is None else json.loads(decoder.__getstate__())
        given_tokenizer = HuggingFaceTokenizer(json.dumps(content).encode(), "[SEP]")
        with pytest.raises(UserError, match="can't be made to begin with what was typed"):
            token_bytes(given_tokenizer)
