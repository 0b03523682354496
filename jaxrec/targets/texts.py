"""The target space of texts: the tokens of a target spell a text that ends in the end token.

With a list of texts a trie over it constrains the search, and an answer is one of them. Without a list any text is an
answer.

**One text, one answer.** Texts are compared after `normalised`: Unicode NFKC, case folded, runs of white space as one
space. A list keeps one writing of each text, the most popular one, and a model is trained on, and searched for, the
tokens of the normalised text. A search without the trie may also spell one text by different tokens. Then the best
spelling's score is kept. The sum over all spellings is the text's probability, but a beam holds only some of them: the
sum would depend on the beam width, and order texts by how many spellings were kept by chance.
"""

import functools
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import UserError, check_least
from jaxrec.data.words import normalised
from jaxrec.decoding.beam import Rescore, expand_items
from jaxrec.decoding.filters import ItemFilter
from jaxrec.decoding.step import Extend
from jaxrec.decoding.text_beam import TextResult, text_search
from jaxrec.decoding.trie import Trie, build_text_trie
from jaxrec.files import read_json, write_json
from jaxrec.targets.semantic_ids import padded_truths
from jaxrec.targets.space import NONE, Found
from jaxrec.text.tokenizer import TextTokenizer, load_tokenizer, save_tokenizer

TARGETS = "targets"
"""The folder of a run that `TextSpace.save` writes into."""
TEXT_LIST, OPTIONS = "texts.jsonl", "text_space.json"
REMEMBERED = 1 << 20
"""Texts outside the list that keep their numbers after they were generated; of more, the oldest are forgotten."""
LISTED = {
    "texts": "line of texts.jsonl from 0, best first; -1 = none",
    "scores": "log-probability of the text, divided by its length to the power of the length penalty; -inf = none",
    "valid": "whether there is a text",
    "nan": "the model gave NaN for this request, which has no valid text then: weights or inputs are damaged",
}
FREE = {
    **{name: meaning for name, meaning in LISTED.items() if name != "texts"},
    "tokens": "tokens of a text with its end, -1 behind it, best first; several may spell one text",
}


@dataclass(frozen=True)
class TextSpaceConfig:
    """How texts are searched for."""

    max_length: int = 32
    """tokens of the longest text, its end included"""
    length_penalty: float = 0.0
    """scores are log-probabilities / length ** length_penalty: 0 ranks by log-probability, 1 by its mean over tokens"""
    spellings: int = 4
    """without a list: texts that are searched for an answer wanted, of which several may read alike"""

    def __post_init__(self):
        check_least(self, "texts", max_length=1, length_penalty=0, spellings=1)


@dataclass(frozen=True, eq=False)
class TextSpace:
    """Texts of a list, or any text; made by `text_space`. Listed texts have the numbers 0, 1, ..."""

    tokenizer: TextTokenizer
    texts: tuple[str, ...] = ()
    """as shown; distinct after `normalised`. Empty: any text is an answer"""
    popularity: np.ndarray | None = None
    """[texts], which of them are shown to somebody of whom nothing is known; None: as they stand"""
    config: TextSpaceConfig = TextSpaceConfig()
    vocabulary: int = 0
    """tokens V that the model gives probabilities; 0: the tokenizer's"""
    numbers: "TextNumbers" = field(init=False, repr=False)
    """the numbers of texts, listed or not"""

    kind = "texts"
    levels = None
    item_codes = None

    def __post_init__(self):
        check_vocabulary(self.vocabulary, self.tokenizer)
        object.__setattr__(self, "numbers", TextNumbers(normalised(text) for text in self.texts))
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
        rows = self.tokenizer.encode([normalised(text) for text in self.texts])
        for text, row in zip(self.texts, rows, strict=True):
            if len(row) >= self.config.max_length:
                raise UserError(
                    f"the listed text {text[:50]!r} has {len(row) + 1} tokens with its end, but "
                    f"texts.max_length is {self.config.max_length}: raise it or leave the text out"
                )
        ended = [[*row, self.tokenizer.end] for row in rows]
        return build_text_trie(ended, self._tokens, self.tokenizer.end, order=self.popularity, like=like)

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
        constrained: bool = True,
    ) -> TextResult:
        """`jaxrec.decoding.text_search`, as `TargetSpace.search`."""
        if rescore is not None or candidates or not isinstance(width, int):
            raise UserError(
                "texts are searched with one beam width and are not rescored: leave out beams a level and a rank head"
            )
        constrained = constrained and trie is not None
        return text_search(
            extend,
            None,
            batch=batch,
            beam_width=width,
            eos=self.tokenizer.end,
            max_length=self.config.max_length,
            length_penalty=self.config.length_penalty,
            trie=trie,
            allowed=allowed,
            constrained=constrained,
            results=k if constrained else k * self.config.spellings,
        )

    def expand(
        self, trie: Trie | None, result: TextResult, *, k: int, allowed: jax.Array | ItemFilter | None = None
    ) -> Found:
        """With a list its texts by number; without, the tokens of all that was found, for `read`."""
        if trie is not None:
            return Found(*expand_items(trie, result, k=k, allowed=allowed), result.nan)
        return Found(jnp.full(result.scores.shape, NONE), result.scores, result.nan, result.tokens)

    def read(self, found: Found, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `TargetSpace.read`. Texts outside the list get numbers after those of the list."""
        answers, scores = np.asarray(found.answers)[:, :k], np.asarray(found.scores)[:, :k]
        if found.tokens is None:
            return answers, scores
        count = len(answers)
        answers, scores = np.full((count, k), NONE, np.int32), np.full((count, k), -np.inf, np.float32)
        given = np.asarray(found.scores)
        rows, places = np.nonzero(given > -np.inf)
        texts = self.tokenizer.decode([tokens[tokens >= 0] for tokens in np.asarray(found.tokens)[rows, places]])
        best: list[dict[str, float]] = [{} for _ in range(count)]
        for row, score, text in zip(rows, given[rows, places], texts, strict=True):
            if text := normalised(text):
                best[row].setdefault(text, score)
        for row, distinct in enumerate(best):
            for place, (text, score) in enumerate(list(distinct.items())[:k]):
                answers[row, place], scores[row, place] = self.numbers.of(text), score
        return answers, scores

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
        rows = self.tokenizer.encode([normalised(text) for text in texts])
        tokens = np.zeros((len(rows), self.config.max_length), np.int32)
        lengths = np.minimum([len(row) + 1 for row in rows], self.config.max_length).astype(np.int64)
        for row, length, known in zip(tokens, lengths, rows, strict=True):
            row[:length] = [*known, self.tokenizer.end][:length]
        return tokens, np.arange(self.config.max_length) < lengths[:, None]

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
        """Texts by number, or tokens without a list; scores, which are valid, and whether the model gave NaN."""
        told = {"texts": found.answers} if found.tokens is None else {"tokens": found.tokens}
        return told | {"scores": found.scores, "valid": found.scores > -jnp.inf, "nan": found.nan}

    @property
    def meanings(self) -> dict[str, str]:
        """A sentence for each of `outputs`."""
        return LISTED if self.texts else FREE

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
        write_json(folder / OPTIONS, {"vocabulary": self.vocabulary} | vars(self.config))
        save_tokenizer(self.tokenizer, folder)

    @property
    def _tokens(self) -> int:
        return self.vocabulary or self.tokenizer.size


class TextNumbers:
    """Numbers of normalised texts: those of a list, true ones and generated ones. Safe to use from several threads.

    Generated texts are forgotten when there are too many, so that a server's memory doesn't grow; numbers are never
    given again.
    """

    def __init__(self, listed: Iterable[str], remembered: int = REMEMBERED):
        self._kept = {text: number for number, text in enumerate(dict.fromkeys(listed))}
        self._texts = dict(enumerate(self._kept))
        self._passing: OrderedDict[str, int] = OrderedDict()
        self._next, self._remembered, self._lock = len(self._kept), remembered, threading.Lock()

    def __len__(self) -> int:
        return len(self._texts)

    def of(self, text: str, for_good: bool = False) -> int:
        """The number of a text; a new one gets the next. `for_good`: it is never forgotten."""
        with self._lock:
            number = self._kept.get(text, self._passing.get(text))
            if number is None:
                number, self._next = self._next, self._next + 1
                self._texts[number] = text
            if for_good:
                self._kept[text] = number
                self._passing.pop(text, None)
            elif text not in self._kept:
                self._passing[text] = number
                self._passing.move_to_end(text)
                if len(self._passing) > self._remembered:
                    del self._texts[self._passing.popitem(last=False)[1]]
            return number

    def text(self, number: int) -> str:
        """The normalised text of a number.

        Raises:
          UserError: no text has it, or it was forgotten.
        """
        with self._lock:
            if number not in self._texts:
                raise UserError(f"no text has the number {number}, or it was generated too long ago")
            return self._texts[number]


def text_space(
    tokenizer: TextTokenizer,
    texts: Sequence[str] = (),
    popularity: Sequence[float] | None = None,
    config: TextSpaceConfig | None = None,
    vocabulary: int = 0,
) -> TextSpace:
    """The space of a vetted list of texts, or of any text where there is no list.

    Writings of one text become one answer: it is shown as the most popular one is written (of equal ones the first),
    and its popularity is the sum.

    Raises:
      UserError: a listed text is empty after `normalised`, the popularity is not one number a text, or the vocabulary
        has no room for the tokenizer's tokens.
    """
    if popularity is not None and len(popularity) != len(texts):
        raise UserError(f"there are {len(popularity)} numbers of popularity for {len(texts)} texts; give one for each")
    counts = np.zeros(len(texts)) if popularity is None else np.asarray(popularity, np.float64)
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        if not (key := normalised(text)):
            raise UserError(f"the list of texts holds an empty text in row {row} ({text!r}); leave it out")
        rows.setdefault(key, []).append(row)
    shown = tuple(texts[max(same, key=lambda row: counts[row])] for same in rows.values())
    sums = None if popularity is None else np.array([counts[same].sum() for same in rows.values()])
    return TextSpace(tokenizer, shown, sums, config or TextSpaceConfig(), vocabulary)


def check_vocabulary(vocabulary: int, tokenizer: TextTokenizer) -> None:
    """UserError where a model gives fewer tokens probabilities than the tokenizer has."""
    if vocabulary and vocabulary < tokenizer.size:
        raise UserError(f"the model has a vocabulary of {vocabulary}, but the tokenizer has {tokenizer.size} tokens")


def load_text_space(folder: Path) -> TextSpace:
    """The space that `TextSpace.save` wrote.

    Raises:
      UserError: a file is missing or damaged.
    """
    options = read_json(folder / OPTIONS)
    texts, popularity = [], []
    try:
        for line in (folder / TEXT_LIST).read_text(encoding="utf-8").split("\n")[:-1]:
            known = json.loads(line)
            texts.append(known["text"])
            popularity.append(known["popularity"])
        vocabulary = options.pop("vocabulary")
        config = TextSpaceConfig(**options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / TEXT_LIST} or {OPTIONS} is missing or damaged ({error}); train the run, or export it, again"
        ) from error
    counts = None if None in popularity or not popularity else np.array(popularity, np.float64)
    return TextSpace(load_tokenizer(folder), tuple(texts), counts, config, vocabulary)
