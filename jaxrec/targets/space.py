"""The Protocol of target spaces: what the tokens of a target mean.

A model writes tokens. A target space says what they stand for: how to search for them, which answers a search result
holds, how an answer reads, and which answers are the true ones. An answer is a number. What lists answers by number is
the space's matter: the catalogue's items, or a list of texts.

    extend ──▶ search ──▶ expand ──▶ Found ──▶ read ──▶ answers int32 [B, k], scores float32 [B, k] ──▶ show
               └── inside jit, arrays alone ──┘    └──────────── on the host ───────────────────────────┘
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import flax.struct
import jax
import numpy as np

from jaxrec.decoding.beam import Rescore
from jaxrec.decoding.filters import ItemFilter
from jaxrec.decoding.step import Extend
from jaxrec.decoding.trie import Trie
from jaxrec.decoding.typed import TypedText

NONE = -1
"""No answer."""
Constrained = Literal["listed", "free", "mixed"]
"""Which targets a search may find: those of listed answers; any; or, below the listed ones, any."""


@flax.struct.dataclass
class Found:
    """The k best answers of each of B requests, best first."""

    answers: jax.Array
    """int32 [B, k], numbers of listed answers; -1 = none, or given by `tokens`."""
    scores: jax.Array
    """float32 [B, k], falling, those of listed answers before the others; -inf = none."""
    nan: jax.Array
    """bool [B], the model gave NaN for this request, which then has no answer."""
    tokens: jax.Array | None = None
    """int32 [B, k, M], what a search without the trie wrote, -1 behind its end; `TargetSpace.read` makes answers of it.
    None where `answers` says everything. There may be more than k, of which several are one answer."""


class TargetSpace(Protocol):
    """What the tokens of a target mean.

    len(space) is the number of listed answers, which have the numbers from 0 on. Arrays that depend on the list are in
    the trie, which is an argument of compiled functions.
    """

    kind: str
    """What answers are, and the name of their list in what is served and exported: "items" or "texts"."""
    levels: int | None
    """Tokens of every target; None where targets end by themselves."""
    item_codes: tuple[np.ndarray, tuple[int, ...]] | None
    """Codes int32 [I, M] and codebook sizes where answers are the catalogue's items, for catalogues that change; None
    where a change of the catalogue changes no answer."""

    def __len__(self) -> int: ...

    def build_trie(self) -> Trie | None:
        """The listed answers as a trie; None where nothing is listed, and any target is an answer."""
        ...

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
    ) -> Any:
        """The beam search for k answers of each of B requests, inside jit. Its result is `expand`'s argument.

        Args:
          extend: as in `jaxrec.decoding.beam_search`.
          trie: as `build_trie` made it.
          batch: B.
          width: beams, or beams of every level.
          k: answers wanted.
          allowed: which listed answers each request may get: bool [B, len(self)] or a filter.
          rescore: scores beams in place of their log-probabilities; None: nothing does.
          candidates: of every level, what `rescore` scores; empty: as many as beams.
          constrained: which targets may be found. With a trie and "free", `valid` of the result says which are in it.
          typed: answers have to begin with it; for answers that are texts.

        Raises:
          UserError: an option that this space has no meaning for.
        """
        ...

    def expand(self, trie: Trie | None, result: Any, *, k: int, allowed: jax.Array | ItemFilter | None = None) -> Found:
        """The first k answers of a search result, inside jit; `allowed` as in `search`."""
        ...

    def read(self, found: Found, k: int, typed: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray]:
        """k answers int32 [B, k] (-1 = none) and scores float32 [B, k] (-inf = none), on the host.

        typed: [<= B], what answers to the first requests have to begin with, as the search had it.
        """
        ...

    def show(self, answers: Iterable[int], titles: Sequence[str]) -> list[str]:
        """How answers read; titles: of the catalogue's items."""
        ...

    def truths(self, rows: Sequence[Sequence[Any]]) -> tuple[np.ndarray, np.ndarray]:
        """True answers as the data name them, as numbers int32 [U, L], distinct in a row, and where bool [U, L].

        Equal numbers are the same answer: by them, metrics decide which answers of a ranking are right.
        """
        ...

    def tokens(self, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of answers int [...]: int32 [..., M] and their mask bool [..., M], as a model is teacher-forced."""
        ...

    def held(self, history: dict[str, np.ndarray], wanted: np.ndarray) -> np.ndarray:
        """The answers that a history already holds under the behaviors `wanted` bool [behaviors]."""
        ...

    def outputs(self, found: Found) -> dict[str, jax.Array]:
        """What an exported program answers, by names of `meanings`."""
        ...

    @property
    def meanings(self) -> dict[str, str]:
        """What each of `outputs` is, in a sentence."""
        ...

    def describe(self, item_ids: Sequence[str]) -> dict[str, Any]:
        """The list of answers in an artefact's manifest, with a fingerprint of 16 digits; item_ids: of the catalogue.

        Raises:
          UserError: the items are not those of the space.
        """
        ...

    def save(self, folder: Path) -> None:
        """Writes what answers are shown with, but for the catalogue's items; makes the folder where it is missing."""
        ...
