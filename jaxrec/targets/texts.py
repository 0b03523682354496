"""The target space of texts: the tokens of a target spell a text that ends in the end token.

With a list of vetted texts a trie over it constrains the search, and an answer is one of them. Without a list any text
is an answer. A mixed search gives the listed ones first, and any text below where these are too few.

**One text, one answer.** Texts are compared after `normalised`: Unicode NFKC, case folded, runs of white space as one
space. A list keeps one writing of each text, the most popular one, and a model is trained on, and searched for, the
tokens of the normalised text. A search without the trie may also spell one text by different tokens. Then the best
spelling's score is kept. The sum over all spellings is the text's probability, but a beam holds only some of them: the
sum would depend on the beam width, and order texts by how many spellings were kept by chance.

A blocked text is none of the list, and is left out of what a search wrote.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import UserError, check_least, to_json
from jaxrec.data.blocked import NOTHING, Blocked
from jaxrec.data.words import normalised
from jaxrec.decoding.beam import Rescore, expand_items
from jaxrec.decoding.filters import ItemFilter
from jaxrec.decoding.step import Extend
from jaxrec.decoding.text_beam import TextResult, text_search
from jaxrec.decoding.trie import Trie, build_text_trie
from jaxrec.decoding.typed import TypedText
from jaxrec.files import write_json
from jaxrec.targets.semantic_ids import padded_truths
from jaxrec.targets.space import NONE, Constrained, Found
from jaxrec.targets.text_numbers import TextNumbers
from jaxrec.text.token_bytes import PLACES, TokenBytes, token_bytes
from jaxrec.text.tokenizer import TextTokenizer, save_tokenizer

TARGETS = "targets"
"""The folder of a run that `TextSpace.save` writes into."""
TEXT_LIST, OPTIONS = "texts.jsonl", "text_space.json"
MEANINGS = {
    "texts": "line of texts.jsonl from 0, best first; -1 = none, or given by `tokens`",
    "tokens": "tokens of a text with its end, -1 behind it, best first; several may spell one text",
    "scores": "log-probability of the text, divided by its length to the power of the length penalty; -inf = none",
    "valid": "whether there is a text",
    "nan": "the model gave NaN for this request, which has no valid text then: weights or inputs are damaged",
}


@dataclass(frozen=True)
class TextSpaceConfig:
    """How texts are searched for."""

    max_length: int = 32
    """tokens of the longest text, its end included"""
    length_penalty: float = 0.0
    """scores are log-probabilities / length ** length_penalty: 0 ranks by log-probability, 1 by its mean over tokens"""
    spellings: int = 4
    """in a search of any text: texts that are searched for an answer wanted, of which several may read alike or be
    blocked"""

    def __post_init__(self):
        check_least(self, "texts", max_length=1, length_penalty=0, spellings=1)


@dataclass(frozen=True, eq=False)
class TextSpace:
    """Texts of a list, or any text; made by `text_list.text_space`. Listed texts have the numbers 0, 1, ..."""

    tokenizer: TextTokenizer
    texts: tuple[str, ...] = ()
    """as shown; distinct after `normalised`. Empty: any text is an answer"""
    popularity: np.ndarray | None = None
    """[texts], which of them are shown to somebody of whom nothing is known; None: as they stand"""
    config: TextSpaceConfig = TextSpaceConfig()
    vocabulary: int = 0
    """tokens V that the model gives probabilities; 0: the tokenizer's"""
    blocked: Blocked = NOTHING
    """what is never an answer; none of `texts`"""
    known: tuple[str, ...] = ()
    """[texts], as they are compared; empty: made of `texts`"""
    numbers: TextNumbers = field(init=False, repr=False)
    """the numbers of texts, listed or not"""

    kind = "texts"
    levels = None
    item_codes = None

    def __post_init__(self):
        check_vocabulary(self.vocabulary, self.tokenizer)
        object.__setattr__(self, "known", self.known or tuple(map(normalised, self.texts)))
        object.__setattr__(self, "numbers", TextNumbers(self.known))
        if len(self.numbers) != len(self.texts):
            raise UserError("the list holds a text twice, in one writing or another; make the space by `text_space`")

    def __len__(self) -> int:
        return len(self.texts)

    def build_trie(self, like: Trie | None = None) -> Trie | None:
        """The trie of the list, None without one; `like` as for `jaxrec.decoding.build_text_trie`.

        Raises:
          UserError: a text has more tokens than `config.max_length`.
        """
        if not self.texts:
            return None
        tokens, lengths = self.rows
        end = self.tokenizer.end
        return build_text_trie(tokens, self._tokens, end, lengths=lengths, order=self.popularity, like=like)

    @functools.cached_property
    def rows(self) -> "TextRows":
        """The tokens of the listed texts. UserError for a text that is too long."""
        return self.encoded(self.known)

    def lists(self, text: str) -> bool:
        """Whether a text is listed, in any writing."""
        number = self.numbers.known(normalised(text))
        return number is not None and number < len(self.texts)

    def encoded(self, texts: Sequence[str]) -> "TextRows":
        """The tokens of texts for the list, as they are compared. UserError for a text that is too long."""
        rows = self.tokenizer.encode(texts)
        for text, row in zip(texts, rows, strict=True):
            if len(row) >= self.config.max_length:
                raise UserError(
                    f"the listed text {text[:50]!r} has {len(row) + 1} tokens with its end, but "
                    f"texts.max_length is {self.config.max_length}: raise it or leave the text out"
                )
        tokens, lengths = self._ended(rows)
        return TextRows(tokens, lengths.astype(np.int32))

    def search(
        self,
        extend: Extend,
        trie: Trie | None,
        *,
        batch: int,
        width: int | tuple[int, ...],
        k: int,
        allowed: jax.Array | ItemFilter | None = None,
        rescore: Rescore | None = None,
        candidates: tuple[int, ...] = (),
        constrained: Constrained = "listed",
        typed: TypedText | None = None,
    ) -> "TextResult | Mixed":
        """`jaxrec.decoding.text_search`, as `TargetSpace.search`."""
        if rescore is not None or candidates or not isinstance(width, int):
            raise UserError(
                "texts are searched with one beam width and are not rescored: leave out beams a level and a rank head"
            )
        search = functools.partial(
            text_search,
            extend,
            None,
            batch=batch,
            beam_width=width,
            eos=self.tokenizer.end,
            max_length=self.config.max_length,
            length_penalty=self.config.length_penalty,
            typed=typed,
        )
        spellings = k * self.config.spellings
        if trie is None or constrained == "free":
            return search(trie=trie, allowed=allowed, constrained=False, results=spellings)
        listed = search(trie=trie, allowed=allowed, results=k)
        if constrained == "listed":
            return listed
        any_text = functools.partial(search, results=spellings)
        return Mixed(listed, _run_if(~listed.valid.all(), any_text))

    def expand(
        self, trie: Trie | None, result: "TextResult | Mixed", *, k: int, allowed: jax.Array | ItemFilter | None = None
    ) -> Found:
        """Listed texts by number; the tokens of whatever else was found, for `read`."""
        if isinstance(result, Mixed):
            listed, free = self.expand(trie, result.listed, k=k, allowed=allowed), self.expand(None, result.free, k=k)
            no_tokens = jnp.full((*listed.scores.shape, free.tokens.shape[-1]), NONE)
            both = (listed.answers, free.answers), (listed.scores, free.scores), (no_tokens, free.tokens)
            answers, scores, tokens = (jnp.concatenate(pair, axis=1) for pair in both)
            return Found(answers, scores, listed.nan | free.nan, tokens)
        if trie is not None:
            return Found(*expand_items(trie, result, k=k, allowed=allowed), result.nan)
        return Found(jnp.full(result.scores.shape, NONE), result.scores, result.nan, result.tokens)

    def read(self, found: Found, k: int, typed: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray]:
        """As `TargetSpace.read`. Texts outside the list get numbers after those of the list, and come after them."""
        given, scores = np.asarray(found.answers), np.asarray(found.scores)
        if found.tokens is None:
            return given[:, :k], scores[:, :k]
        written = given == NONE
        written &= scores > -np.inf
        best = [dict(zip(*pair, strict=True)) for pair in zip(given.tolist(), scores.tolist(), strict=True)]
        texts = self.tokenizer.decode([tokens[tokens >= 0] for tokens in np.asarray(found.tokens)[written]])
        for row, score, text in zip(np.nonzero(written)[0].tolist(), scores[written].tolist(), texts, strict=True):
            text = normalised(text)
            if self._may_be_shown(text) and text.startswith(typed[row] if row < len(typed) else ""):
                number = self.numbers.of(text)
                best[row][number] = max(score, best[row].get(number, -np.inf))
        answers = np.full((len(given), k), NONE, np.int32), np.full((len(given), k), -np.inf, np.float32)
        for row, found_scores in enumerate(best):
            found_scores.pop(NONE, None)
            # The sort keeps the order of equal ones.
            ranked = sorted(found_scores.items(), key=lambda pair: (pair[0] >= len(self.texts), -pair[1]))[:k]
            for place, pair in enumerate(ranked):
                answers[0][row, place], answers[1][row, place] = pair
        return answers

    def _may_be_shown(self, text: str) -> bool:
        """Whether a written text is a whole one and not blocked."""
        # Bytes that are no UTF-8 read as U+FFFD.
        return bool(text) and "\ufffd" not in text and not self.blocked.holds(text)

    def show(self, answers: Iterable[int], titles: Sequence[str] = ()) -> list[str]:
        """Listed texts as they are written in the list, others normalised."""
        return [self.texts[answer] if answer < len(self.texts) else self.numbers.text(answer) for answer in answers]

    def truths(self, rows: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of true texts, listed or not; two writings of a text are one truth, an empty text is none."""
        known = [dict.fromkeys(filter(None, map(normalised, row))) for row in rows]
        return padded_truths([[self.numbers.of(text, for_good=True) for text in row] for row in known])

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Texts as a model is trained on them: tokens int32 [n, M] with the end, 0 behind it, and mask bool [n, M].

        M is `config.max_length`; a longer text is cut, and then has no end.
        """
        tokens, lengths = self._ended(self.tokenizer.encode([normalised(text) for text in texts]))
        return tokens, np.arange(self.config.max_length) < lengths[:, None]

    def _ended(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [n, M] with the end, cut to M and 0 behind it, and lengths int64 [n]."""
        tokens = np.zeros((len(rows), self.config.max_length), np.int32)
        lengths = np.minimum([len(row) + 1 for row in rows], self.config.max_length).astype(np.int64)
        for row, length, known in zip(tokens, lengths, rows, strict=True):
            row[:length] = [*known, self.tokenizer.end][:length]
        return tokens, lengths

    @functools.cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of the tokens, by which answers begin with what was typed. UserError: as `token_bytes`."""
        return token_bytes(self.tokenizer, self._tokens)

    def begin(self, typed: str, room: bool = False) -> dict[str, np.ndarray]:
        """Arrays of a request whose answers begin with what was typed: `typed` uint32 [words, V], `typed_length` int32.

        There is one word if that has room for the typed text, as for most there is; otherwise, or where `room` is asked
        for, as many as the longest answer needs. No answer begins with a longer text.
        """
        rest = self.token_bytes.of(typed)
        short = len(rest) < PLACES and not room
        table, length = self.token_bytes.going_on(
            rest, 1 if short else self.token_bytes.words(self.config.max_length - 1)
        )
        return {"typed": table, "typed_length": np.int32(length)}

    def tokens(self, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `TargetSpace.tokens`; a number below 0 has no tokens."""
        answers = np.asarray(answers)
        flat = answers.reshape(-1)
        tokens, mask = self.encode(["" if answer < 0 else self.show([answer])[0] for answer in flat.tolist()])
        mask &= flat[:, None] >= 0
        return tokens.reshape(*answers.shape, -1), mask.reshape(*answers.shape, -1)

    def held(self, history: dict[str, np.ndarray], wanted: np.ndarray) -> np.ndarray:
        """The texts of its searches, of a history that holds texts (`jaxrec.data.searches.with_texts`)."""
        searched = dict.fromkeys(filter(None, map(normalised, history.get("search_query", ()))))
        return np.array([self.numbers.of(text) for text in searched], np.int32)

    def most_popular(self, k: int) -> np.ndarray:
        """The k most popular listed texts, equal ones as they stand, int64 [<= k]."""
        return self._by_popularity[:k]

    @functools.cached_property
    def _by_popularity(self) -> np.ndarray:
        popularity = np.zeros(len(self.texts)) if self.popularity is None else np.asarray(self.popularity)
        return np.argsort(-popularity, kind="stable")

    def outputs(self, found: Found) -> dict[str, jax.Array]:
        """Texts by number where there is a list, tokens of others, scores, which are valid, and NaN."""
        told = {"texts": found.answers} if self.texts else {}
        told |= {} if found.tokens is None else {"tokens": found.tokens}
        return told | {"scores": found.scores, "valid": found.scores > -jnp.inf, "nan": found.nan}

    @property
    def meanings(self) -> dict[str, str]:
        """A sentence for each of `outputs`."""
        return MEANINGS

    def describe(self, item_ids: Sequence[str]) -> dict[str, Any]:
        """Items that histories hold, listed texts, tokens; the fingerprint changes with any of them."""
        name, content = self.tokenizer.file()
        digest = hashlib.sha256(json.dumps([list(item_ids), list(self.texts), name]).encode() + content)
        return {
            "fingerprint": digest.hexdigest()[:16],
            "items": len(item_ids),
            "texts": len(self.texts),
            "vocabulary": self._tokens,
            "end": self.tokenizer.end,
            "max_length": self.config.max_length,
        }

    def save(self, folder: Path) -> None:
        """Writes texts.jsonl, text_space.json and the tokenizer; makes the folder where it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        popularity = [None] * len(self.texts) if self.popularity is None else np.asarray(self.popularity).tolist()
        pairs = zip(self.texts, popularity, strict=True)
        lines = (json.dumps({"text": text, "popularity": count}, ensure_ascii=False) + "\n" for text, count in pairs)
        (folder / TEXT_LIST).write_text("".join(lines), encoding="utf-8")
        options = {"vocabulary": self.vocabulary, "blocked": to_json(self.blocked)}
        write_json(folder / OPTIONS, options | vars(self.config))
        save_tokenizer(self.tokenizer, folder)

    @property
    def _tokens(self) -> int:
        return self.vocabulary or self.tokenizer.size


class TextRows(NamedTuple):
    """The tokens of listed texts."""

    tokens: np.ndarray
    """int32 [texts, M], 0 behind the end"""
    lengths: np.ndarray
    """int32 [texts], the end included"""


@flax.struct.dataclass
class Mixed:
    """What a search for listed texts found and, where these were too few for some request, one for any text."""

    listed: TextResult
    free: TextResult


def _run_if(wanted: jax.Array, search: Callable[[], TextResult]) -> TextResult:
    """A search's result, or without running it none, where `wanted` is False."""

    def none() -> TextResult:
        nothing = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(search))
        return nothing.replace(scores=jnp.full(nothing.scores.shape, -jnp.inf))

    return jax.lax.cond(wanted, search, none)


def check_vocabulary(vocabulary: int, tokenizer: TextTokenizer) -> None:
    """UserError where a model gives fewer tokens probabilities than the tokenizer has."""
    if vocabulary and vocabulary < tokenizer.size:
        raise UserError(f"the model has a vocabulary of {vocabulary}, but the tokenizer has {tokenizer.size} tokens")
