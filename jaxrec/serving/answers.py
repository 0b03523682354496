"""What a retriever answers with: the catalogue's items, or texts. One class a kind of target space."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from jaxrec.catalogue.version import Predicate, Version
from jaxrec.config import UserError
from jaxrec.decoding.filters import Allowed
from jaxrec.evaluation.cases import History
from jaxrec.serving.schema import GeneratedText, Item, Request


class Answers(Protocol):
    """How requests restrict answers, and how answers are written."""

    filtered: bool
    """requests may filter answers"""

    def allowed(
        self, request: Request, within: Predicate | np.ndarray | None, history: History, version: Version
    ) -> Allowed | None:
        """The answers that the request may get; None = all. UserError for a filter that can't be followed."""
        ...

    def popular(self, version: Version, k: int, allowed: Allowed | None) -> tuple[np.ndarray, np.ndarray]:
        """At most k answers to somebody of whom nothing is known, and their popularity."""
        ...

    def listed(self, version: Version, answers: Sequence[int], scores: Sequence[float]) -> dict[str, list]:
        """The field of `jaxrec.serving.schema.Answer` that holds answers, and its content."""
        ...


class ItemAnswers:
    """Items of the catalogue's version."""

    filtered = True

    def __init__(self, target_behaviors: Sequence[int]):
        self.target_behaviors = target_behaviors

    def allowed(
        self, request: Request, within: Predicate | np.ndarray | None, history: History, version: Version
    ) -> Allowed | None:
        """As `Answers.allowed`."""
        blocked = [row for row in map(version.row, request.blocked or ()) if row is not None]
        only = None
        if request.allowed is not None:
            only = [row for row in map(version.row, request.allowed) if row is not None]
        if request.exclude_history:
            blocked.extend(history["item"][np.isin(history["behavior"], self.target_behaviors)].tolist())
        masks = [version.mask(each) for each in (request.filter, within) if each is not None and not _is_empty(each)]
        if not (masks or blocked or only is not None):
            return None
        mask = masks[0] & masks[1] if len(masks) == 2 else next(iter(masks), None)
        return version.order.allowed(mask, blocked=blocked, only=only)

    def popular(self, version: Version, k: int, allowed: Allowed | None) -> tuple[np.ndarray, np.ndarray]:
        """As `Answers.popular`."""
        items = version.most_popular(k, allowed)
        return items, version.popularity[items]

    def listed(self, version: Version, answers: Sequence[int], scores: Sequence[float]) -> dict[str, list]:
        """The items' ids and titles."""
        table = version.items.select(["item_id", "title"]).take(pa.array(answers, pa.int64()))
        return {
            "items": [
                Item(item_id=row["item_id"], title=row["title"] or "", score=score)
                for row, score in zip(table.to_pylist(), scores, strict=True)
            ]
        }


class TextAnswers:
    """Texts of the version's list, or any; a change of the items changes none."""

    filtered = False

    def __init__(self, target_behaviors: Sequence[int]):
        """target_behaviors: as for items; read by nothing."""

    def allowed(
        self, request: Request, within: Predicate | np.ndarray | None, history: History, version: Version
    ) -> None:
        """None.

        Raises:
          UserError: the request restricts items.
        """
        # As for items, an empty filter is none.
        given = {"filter": request.filter or None, "blocked": request.blocked, "allowed": request.allowed}
        names = [name for name, value in given.items() if value is not None]
        if request.exclude_history:
            names.append("exclude_history")
        if names or (within is not None and not _is_empty(within)):
            raise UserError(
                f"{(names or ['within'])[0]} restricts items, but this run answers with texts; leave it out"
            )

    def popular(self, version: Version, k: int, allowed: Allowed | None) -> tuple[np.ndarray, np.ndarray]:
        """As `Answers.popular`; nothing where there is no list."""
        texts = version.texts.most_popular(k)
        popularity = version.texts.popularity
        return texts, np.zeros(len(texts)) if popularity is None else popularity[texts]

    def listed(self, version: Version, answers: Sequence[int], scores: Sequence[float]) -> dict[str, list]:
        """The texts."""
        shown = version.texts.show(answers)
        vetted = [answer < len(version.texts) for answer in answers]
        return {
            "texts": [
                GeneratedText(text=text, score=score, vetted=known)
                for text, score, known in zip(shown, scores, vetted, strict=True)
            ]
        }


ANSWERS = {"items": ItemAnswers, "texts": TextAnswers}
"""By `TargetSpace.kind`."""


def _is_empty(predicate: Any) -> bool:
    return isinstance(predicate, Mapping | tuple) and not predicate
