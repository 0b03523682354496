"""Texts as tokens: sentencepiece trained on a run's own texts, or the tokenizer.json that comes with given weights.

    tokenizer = train_tokenizer(texts, TokenizerConfig(vocabulary=8000))
    rows = tokenizer.encode(texts)                 # lists of tokens, without the end token
    tokenizer.decode(rows) == texts                # any script, exactly: bytes stand for what was not in training
    save_tokenizer(tokenizer, folder); load_tokenizer(folder)

A tokenizer's folder holds its file (tokenizer.model or tokenizer.json) and text_tokenizer.json: which file, its sha256,
the end token.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from jaxrec.config import UserError, check_choice, check_least
from jaxrec.files import read_json, write_json

NOTES = "text_tokenizer.json"
PAD, END, UNKNOWN = 0, 1, 2
"""Tokens of a trained tokenizer; the 256 bytes follow."""
KNOWN_DECODERS = {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
"""Of a tokenizer.json: those that treat a token alike wherever it stands, but for a space in front of a text."""
BYTE = re.compile("<0x[0-9A-F]{2}>")
SPACE = "\u2581"
"""What sentencepiece writes for a space. As a character of a text it is written in bytes."""
FEW = 64
"""Texts that sentencepiece encodes one by one."""


@dataclass(frozen=True)
class TokenizerConfig:
    """How a run's tokenizer is trained."""

    vocabulary: int = 8000
    """tokens V: padding, the end, the unknown token, 256 bytes, the characters of the texts, and pieces of words"""
    kind: str = "bpe"
    """bpe, or unigram, which needs more texts for as many tokens"""
    coverage: float = 1.0
    """share of the texts' characters that are tokens of their own; rarer ones are written in bytes. For texts in
    Chinese, 0.9995 keeps the vocabulary for words"""

    def __post_init__(self):
        check_least(self, "tokenizer", vocabulary=1, coverage=0)
        check_choice(self, "tokenizer", "kind", ("bpe", "unigram"))
        if not 0 < self.coverage <= 1:
            raise UserError(f"configuration key 'tokenizer.coverage' is {self.coverage}; give a share up to 1")


class TextTokenizer(Protocol):
    """Texts to tokens and back."""

    size: int
    """tokens V"""
    end: int
    """the token that ends a text; no text holds it"""
    end_name: str
    """how that token is written in the tokenizer's file"""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts, without the end token. UserError for a text with half a character (a lone surrogate)."""
        ...

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of lists of tokens, without the end token; tokens that are no text are left out."""
        ...

    def token_bytes(self) -> list[bytes]:
        """The UTF-8 that each token [V] stands for in a text, wherever it stands; none for tokens that are no text.

        Raises:
          UserError: a token's text depends on the tokens around it.
        """
        ...

    def file(self) -> tuple[str, bytes]:
        """The name and content of the file that holds it."""
        ...


class SentencePiece:
    """A sentencepiece model with byte fallback: every text is tokens, and these are that text again."""

    def __init__(self, model: bytes):
        """UserError for bytes that are no such model."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError("this is no sentencepiece model; train the tokenizer again") from error
        self._model, self.size, self.end = model, self._processor.vocab_size(), self._processor.eos_id()
        if self.end < 0:
            raise UserError("this sentencepiece model has no end token; train one with eos_id")
        self.end_name = self._processor.id_to_piece(self.end)
        spelled = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space = spelled if self._processor.unk_id() not in spelled else []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """As `TextTokenizer.encode`."""
        check_characters(texts)
        plain = iter(self._encoded([text for text in texts if SPACE not in text or not self._space]))
        return [self._with_bytes(text) if SPACE in text and self._space else next(plain) for text in texts]

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        # A list starts threads: 130 microseconds, of which a text by itself takes 2.
        return [self._processor.encode(text) for text in texts] if len(texts) < FEW else self._processor.encode(texts)

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """As `TextTokenizer.decode`. Bytes that are no UTF-8 read as U+FFFD."""
        left_out = (self._processor.unk_id(), self._processor.pad_id(), self.end)
        rows = [[int(token) for token in row if 0 <= token < self.size and token not in left_out] for row in rows]
        return self._processor.decode(rows) if rows else []

    def token_bytes(self) -> list[bytes]:
        """As `TextTokenizer.token_bytes`."""
        model = self._processor
        found = []
        for token in range(self.size):
            piece = model.id_to_piece(token)
            if model.is_byte(token):
                found.append(bytes([int(piece[3:5], 16)]))  # <0x0A>
            elif model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
                found.append(b"")
            else:
                found.append(piece.replace(SPACE, " ").encode())
        return found

    def file(self) -> tuple[str, bytes]:
        """As `TextTokenizer.file`."""
        return "tokenizer.model", self._model

    def _with_bytes(self, text: str) -> list[int]:
        first, *others = self._processor.encode(text.split(SPACE))
        return first + [token for part in others for token in (*self._space, *part)]


class HuggingFaceTokenizer:
    """A tokenizer.json of Hugging Face, as it comes with weights. Whether texts return exactly is its own matter."""

    def __init__(self, content: bytes, end: str):
        """end: the token that ends a text, such as "</s>". UserError: no tokenizer, or one without this token."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises Exception itself
            raise UserError(f"this is no tokenizer.json ({error}); copy it from the weights again") from error
        found = self._tokenizer.token_to_id(end)
        if found is None:
            raise UserError(f"the tokenizer has no token {end!r}; name the one that ends a text of these weights")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._content, self.size = content, self._tokenizer.get_vocab_size()
        self.end, self.end_name = found, end

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """As `TextTokenizer.encode`; what a text holds of the end token's own letters is left out."""
        check_characters(texts)
        rows = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [[token for token in row.ids if token != self.end] for row in rows]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """As `TextTokenizer.decode`."""
        rows = [[int(token) for token in row if 0 <= token < self.size and token != self.end] for row in rows]
        return self._tokenizer.decode_batch(rows, skip_special_tokens=True)

    def token_bytes(self) -> list[bytes]:
        """As `TextTokenizer.token_bytes`; of tokens in bytes (ByteLevel), or with a mark for spaces (Metaspace)."""
        decoder = json.loads(self._content)["decoder"] or {}
        parts = decoder.get("decoders", [decoder])
        kinds = {part.get("type") for part in parts}
        if not kinds & {"ByteLevel", "Metaspace", "Replace"} or kinds - KNOWN_DECODERS:
            raise UserError(
                f"the decoder of this tokenizer.json ({', '.join(sorted(map(str, kinds)))}) is none whose tokens stand "
                "for the same text everywhere (ByteLevel, Metaspace): with it, answers can't be made to begin with "
                "what was typed"
            )
        added = self._tokenizer.get_added_tokens_decoder()
        left_out = {self.end, *(token for token, known in added.items() if known.special)}
        rows = [self._tokenizer.id_to_token(token) or "" for token in range(self.size)]
        rows = ["" if token in left_out else row for token, row in enumerate(rows)]
        if "ByteLevel" in kinds:
            return [_unmapped(row) for row in rows]
        if "ByteFallback" in kinds:
            return [bytes([int(row[3:5], 16)]) if BYTE.fullmatch(row) else _spaced(row, parts) for row in rows]
        return [_spaced(row, parts) for row in rows]

    def file(self) -> tuple[str, bytes]:
        """As `TextTokenizer.file`."""
        return "tokenizer.json", self._content


def _spaced(piece: str, decoders: Sequence[dict]) -> bytes:
    """The UTF-8 of a piece in which decoders put a space for a mark."""
    for part in decoders:
        if part["type"] == "Metaspace":
            piece = piece.replace(part["replacement"], " ")
        elif part["type"] == "Replace":
            piece = piece.replace(part["pattern"]["String"], part["content"])
    return piece.encode()


def _unmapped(piece: str) -> bytes:
    """The bytes of a piece in which each character stands for a byte; an added token is written as it reads."""
    if all(character in OF_CHARACTERS for character in piece):
        return bytes(OF_CHARACTERS[character] for character in piece)
    return piece.encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's character of each byte: itself where it can be printed, otherwise the next one from 256 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}


OF_CHARACTERS = _byte_characters()


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> SentencePiece:
    """A sentencepiece tokenizer of texts, which are read as they are. The same texts in the same order give the same.

    Raises:
      UserError: there are no texts, the texts make fewer tokens than the vocabulary or have more characters, or a text
        holds half a character.
    """
    texts = [text for text in texts if text]
    if not texts:
        raise UserError("the tokenizer is trained on no text: every text is empty; give texts")
    check_characters(texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=config.vocabulary,
            model_type=config.kind,
            character_coverage=config.coverage,
            byte_fallback=True,
            # Texts come back as they were: spaces at either end or doubled, and every form of a character.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            pad_id=PAD,
            eos_id=END,
            unk_id=UNKNOWN,
            bos_id=-1,
            max_sentence_length=2**30,
            num_threads=1,  # with more, sums are added in another order
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_explained(str(error), config)) from error
    return SentencePiece(model.getvalue())


def _explained(message: str, config: TokenizerConfig) -> str:
    """What sentencepiece says, as one sentence with the configuration key."""
    key = f"configuration key 'tokenizer.vocabulary' is {config.vocabulary}"
    if "too high" in message:
        most = message.rsplit("<=", 1)[1].strip(" .")
        return f"{key}, but these texts make {most} tokens at most; give at most that, or more texts"
    if "smaller than required_chars" in message:
        least = message.rsplit(" vs ", 1)[1].split(".")[0]
        return (
            f"{key}, but the bytes and the characters of these texts take {least} already; give more, or a lower "
            "tokenizer.coverage"
        )
    return f"the tokenizer can't be trained on these texts: {message}"


def check_characters(texts: Sequence[str]) -> None:
    """UserError for a text with half a character (a lone surrogate), which has no bytes."""
    for row, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"text {row} holds half a character (a lone surrogate) at place {error.start}; give whole ones"
            ) from error


def save_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Writes a tokenizer into a folder that is there."""
    name, content = tokenizer.file()
    (folder / name).write_bytes(content)
    notes = {"file": name, "sha256": hashlib.sha256(content).hexdigest(), "end": tokenizer.end_name}
    write_json(folder / NOTES, notes)


def load_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer that `save_tokenizer` wrote.

    Raises:
      UserError: a file is missing, damaged, or no tokenizer.
    """
    notes = read_json(folder / NOTES)
    readers = {"tokenizer.model": lambda content, _: SentencePiece(content), "tokenizer.json": HuggingFaceTokenizer}
    if not isinstance(notes, dict) or notes.get("file") not in readers:
        raise UserError(
            f"{folder / NOTES} names no tokenizer's file ({', '.join(readers)}); train the run, or export it, again"
        )
    path = folder / notes["file"]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); train the run, or export it, again") from error
    if hashlib.sha256(content).hexdigest() != notes.get("sha256"):
        raise UserError(f"{path} is damaged: its sha256 is not that of {NOTES}; train the run, or export it, again")
    return readers[notes["file"]](content, notes.get("end"))
