"""Lanes: the runs that one process serves, the routes of each, and its place in the scheduler.

A run that answers with texts suggests. One that answers with items recommends, or searches if its model needs a query,
or does both if its model reads queries and needs none. A single run has every route, and refuses what it can't answer
in a sentence of its own; several runs have those that they can answer, and no route has two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import jax
import numpy as np

from jaxrec.config import UserError
from jaxrec.console import console
from jaxrec.serving.retriever import Prepared, Retriever
from jaxrec.serving.scheduler import Worker
from jaxrec.serving.schema import Request

ROUTES = ("recommend", "search", "suggest")
TOGETHER_ON_CPU = 1
"""Requests in a call on CPU by default: a call computes as many, and one that is alone would pay for it."""

PROBED = 64
"""Users of whom a full call is made, to see whether they get the bits that each gets alone."""


@dataclass(frozen=True)
class NamedRun:
    """A run on the command line: `runs/a`, or `search=runs/a` to say what it is asked for."""

    path: Path
    route: str | None = None

    @classmethod
    def parse(cls, text: str) -> "NamedRun":
        """Of an argument; a prefix that is no route belongs to the path."""
        route, sign, path = text.partition("=")
        return cls(Path(path), route) if sign and route in ROUTES else cls(Path(text))


@dataclass
class Lane:
    """A run that is served: its routes, the catalogue of its own, and the batch sizes that are compiled for it."""

    name: str
    """the first of its routes that its run can answer"""
    routes: tuple[str, ...]
    retriever: Retriever
    sizes: tuple[int, ...]
    """what its calls are padded to. One size: an answer has the same bits, alone or with others. With more, a request
    alone is computed by itself, and its scores may differ in the last digits"""

    @property
    def ready(self) -> bool:
        """Whether its programs are compiled."""
        return self.retriever.ready

    @property
    def worker(self) -> Worker:
        """Its calls."""
        return Worker(self.search, self.sizes[-1])

    def search(self, prepared: list[Prepared]) -> list:
        """One call of the model."""
        return self.retriever.search(prepared, self.sizes)

    def warm_up(self) -> None:
        """Compiles what the lane can need, and says so if its answers are not the same bits alone and with others."""
        self.retriever.warm_up(self.sizes)
        if len(self.sizes) == 1 and self.depends_on_others():
            console.print(
                f"{self.name}: scores depend in their last digits on the other requests of a call of {self.sizes[0]}; "
                "another --batch-size may not have this"
            )

    def depends_on_others(self) -> bool:
        """Whether some users of the run get other bits in a full call, in two orders, than each alone."""
        text = {} if self.retriever.required_text is None else {self.retriever.required_text: "-"}
        requests = [Request(user_id=user, **text) for user in islice(self.retriever.user_index, PROBED)]
        kinds: dict[tuple, list[Prepared]] = {}
        for prepared in map(self.retriever.prepare, requests):
            if prepared.answer is None:
                kinds.setdefault(prepared.kind, []).append(prepared)
        if not kinds:
            return False
        some = max(kinds.values(), key=len)[: self.sizes[-1]]
        alone = [self.search([each])[0] for each in some]
        together, turned = self.search(some), self.search([*some[1:], some[0]])
        turned = [turned[-1], *turned[:-1]]
        return not all(
            np.array_equal(mine, other)
            for others in (together, turned)
            for pair in zip(alone, others, strict=True)
            for mine, other in zip(*pair, strict=True)
        )


def call_sizes(retriever: Retriever, together: int | None = None, alone: bool = False) -> tuple[int, ...]:
    """The batch sizes that are compiled for a run.

    together: requests in a call at most; None: 1 on CPU, elsewhere the run's `decoding.batch_size`. alone: whether a
    batch of one is compiled too. A model that pads by itself is asked for one request at a time.
    """
    if retriever.sizes is None:
        return (1,)
    if together is None:
        most = retriever.sizes[-1]
        together = min(TOGETHER_ON_CPU, most) if jax.default_backend() == "cpu" else most
    return (1, together) if alone and together > 1 else (together,)


def abilities(retriever: Retriever) -> tuple[str, ...]:
    """The routes that a run can answer."""
    if retriever.catalogue.current.texts is not None:
        return ("suggest",)
    if retriever.required_text == "query":
        return ("search",)
    return ("recommend", "search") if retriever.reads_queries else ("recommend",)


def make_lanes(
    retrievers: Sequence[Retriever],
    names: Sequence[str | None] = (),
    *,
    together: int | None = None,
    alone: bool = False,
) -> list[Lane]:
    """The lanes of some runs; names: the route that a run is for, None: all that it can answer.

    A single run without a name has all routes. A run that was named for a route takes it from the others.

    Raises:
      UserError: two runs answer one route, a run is left without a route, or can't answer the one it was named for.
    """
    names = [*names, *[None] * (len(retrievers) - len(names))]
    can = [abilities(each) for each in retrievers]
    for retriever, name, able in zip(retrievers, names, can, strict=True):
        if name is not None and name not in able:
            raise UserError(
                f"{name}={retriever.run.path}: this run can {' and '.join(able)}, not {name}; leave {name}= out"
            )
    if len(retrievers) == 1 and names[0] is None:
        return [Lane(can[0][0], ROUTES, retrievers[0], call_sizes(retrievers[0], together, alone))]
    taken = [name for name in names if name is not None]
    lanes = []
    for retriever, name, able in zip(retrievers, names, can, strict=True):
        routes = (name,) if name is not None else tuple(route for route in able if route not in taken)
        if not routes:
            raise UserError(f"{retriever.run.path} has no route left, since another run was named for {able[0]}")
        lanes.append(Lane(routes[0], routes, retriever, call_sizes(retriever, together, alone)))
    for route in ROUTES:
        paths = [str(lane.retriever.run.path) for lane in lanes if route in lane.routes]
        if len(paths) > 1:
            raise UserError(
                f"{' and '.join(paths)} both {route}: serve one of them, or say which one is asked, as in "
                f"{route}={paths[0]}"
            )
    return lanes
