"""Requests together: a queue for each lane, and one thread that calls the model with what waits in them.

Requests that can share a call (one lane and one *kind*: version of the catalogue, depth, filters or none, shape of
the history) form a group. When the thread is free it takes, of the groups that are ready, the one with the most
urgent request: keystrokes before pages before batch work, and among equals the longest waiting. A group is ready when
it fills a call, or when its oldest request has waited for its window. The window adapts: it is zero while requests of
a kind come more rarely than `Pacing.window`, since nobody would join; while they come faster, a call waits for them
up to that long.

While the model works, further requests gather, so that a busy lane fills its calls without any window.

The scheduler knows neither HTTP nor models: a lane gives it `run`, a function of several payloads of one kind.
"""

import atexit
import heapq
import logging
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

LOG = logging.getLogger(__name__)
KEYSTROKE, PAGE, BATCH = range(3)
"""Priorities, the most urgent first."""
REST = 5.0
"""Seconds without work after which the thread ends; the next request starts another one."""
LAST_CALL = 10.0
"""Seconds that a call has to end when the process does."""
LIVING = weakref.WeakSet()
"""All schedulers."""


class QueueFullError(Exception):
    """A lane has as many requests as it may have."""


class TooLateError(Exception):
    """The deadline of a request passed before its call."""


class ShuttingDownError(Exception):
    """The process ends, and takes no further requests."""


@dataclass(frozen=True)
class Pacing:
    """How long requests wait for others; seconds."""

    window: float = 0.004
    """the longest that a request waits for others while the model is free"""
    patience: float = 1.0
    """waiting for which a request becomes one priority more urgent, so that none waits for ever"""


class Places:
    """The places of a lane or a server; thread-safe."""

    def __init__(self, limit: int, state: str):
        self.limit, self.inside = limit, 0
        self.state = state
        """the state of those who have a place, for the message"""
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises QueueFullError if there is no place."""
        if self.inside >= self.limit:
            raise QueueFullError(f"{self.limit} requests are {self.state} already; try again in a second")

    def check_half(self) -> None:
        """Raises QueueFullError if more than half of the places are taken: the rest are for more urgent requests."""
        if self.inside > max(1, self.limit // 2):
            raise QueueFullError(f"{self.inside} requests are {self.state} already, too many for batch work; try later")

    @contextmanager
    def place(self) -> Iterator[None]:
        """Holds a place; raises QueueFullError if there is none."""
        with self._lock:
            self.check()
            self.inside += 1
        try:
            yield
        finally:
            with self._lock:
                self.inside -= 1


@dataclass(eq=False)
class Ticket:
    """A request that waits for its call; its `result` can be cancelled until the call begins."""

    lane: str
    payload: Any
    kind: Hashable
    priority: int
    arrived: float
    """by the scheduler's clock, in seconds"""
    deadline: float | None
    """by the same clock; None: none"""
    result: Future = field(default_factory=Future)
    called: float | None = None
    """when its call began"""
    together: int = 0
    """requests in its call"""

    def rank(self, now: float, patience: float) -> tuple[int, float]:
        """Smaller is more urgent."""
        return self.priority - int((now - self.arrived) / patience), self.arrived


@dataclass(frozen=True)
class Worker:
    """What the scheduler knows of a lane."""

    run: Callable[[list[Any]], Sequence[Any]]
    """payloads of one kind -> one result each"""
    most: int
    """payloads in a call"""


@dataclass
class Pace:
    """The rhythm of a kind's requests: exponential means, in seconds."""

    last: float | None = None
    gap: float | None = None
    """between two arrivals"""

    def note(self, now: float, window: float) -> None:
        """An arrival. A long pause counts as two windows, so that a few quick requests are believed."""
        since = 2 * window if self.last is None else min(now - self.last, 2 * window)
        self.gap = since if self.gap is None else 0.75 * self.gap + 0.25 * since
        self.last = now


class Scheduler:
    """Gathers requests into calls, one call at a time; thread-safe.

    Without its own thread (`threaded=False`, for tests) the calls are made by `step`.
    """

    def __init__(
        self,
        workers: dict[str, Worker],
        pacing: Pacing | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        threaded: bool = True,
        observe: Callable[[list[Ticket], float], None] = lambda tickets, seconds: None,
    ):
        """observe: is told of every call that has ended: its tickets, and how long it took, in seconds."""
        self.workers, self.pacing, self.clock, self.observe = workers, pacing or Pacing(), clock, observe
        self.closing = False
        self.threaded = threaded
        self._thread: threading.Thread | None = None
        self._calling = False
        self._waiting: dict[tuple[str, Hashable], list[Ticket]] = {}
        self._paces: dict[tuple[str, Hashable], Pace] = {}
        self._changed = threading.Condition()
        LIVING.add(self)

    # ---- asking ------------------------------------------------------------------------------------------------------

    def submit(
        self, lane: str, payload: Any, kind: Hashable, *, priority: int = PAGE, deadline: float | None = None
    ) -> Ticket:
        """Queues a payload.

        deadline: by the scheduler's clock; a ticket that is still waiting then gets a TooLateError.

        Raises:
          ShuttingDownError: `close` was called.
        """
        with self._changed:
            if self.closing:
                raise ShuttingDownError("the server is shutting down; ask another one")
            ticket = Ticket(lane, payload, kind, priority, self.clock(), deadline)
            self._paces.setdefault((lane, kind), Pace()).note(ticket.arrived, self.pacing.window)
            self._waiting.setdefault((lane, kind), []).append(ticket)
            if self.threaded and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="device", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return ticket

    def waiting(self, lane: str) -> int:
        """Tickets of a lane whose call has not begun."""
        with self._changed:
            return sum(len(tickets) for (of, _), tickets in self._waiting.items() if of == lane)

    def close(self, seconds: float) -> int:
        """Takes no further tickets, and waits for those it has, at most so long; how many were turned away then."""
        with self._changed:
            self.closing = True
            self._changed.notify_all()
            if self.threaded:
                self._changed.wait_for(lambda: not self._waiting and not self._calling, timeout=seconds)
            left = [ticket for tickets in self._waiting.values() for ticket in tickets]
            self._waiting.clear()
        for ticket in left:
            _fail(ticket, ShuttingDownError("the server is shutting down; ask another one"))
        return len(left)

    def join(self, seconds: float) -> None:
        """Waits for the thread of a closed scheduler, at most so long."""
        with self._changed:
            thread = self._thread
        if thread is not None:
            thread.join(seconds)

    # ---- calling -----------------------------------------------------------------------------------------------------

    def step(self) -> int | None:
        """Makes the next call, if a group is ready; how many tickets were in it, None if there was no call."""
        with self._changed:
            tickets, late, _ = self._take(self.clock())
        self._turn_away(late)
        if not tickets:
            return None
        self._call(tickets)
        return len(tickets)

    def next_time(self) -> float | None:
        """When a group will be ready or a ticket too late, by the clock; None while nothing waits."""
        with self._changed:
            return self._next(self.clock())

    def _work(self) -> None:
        """The thread: calls while there is work."""
        while True:
            with self._changed:
                tickets, late, until = self._take(self.clock())
                if not tickets and not late:
                    self._changed.notify_all()  # `close`, in case what waited was cancelled
                    if self.closing and until is None:
                        self._thread = None
                        return
                    if until is not None:
                        self._changed.wait(max(0.0, until - self.clock()))
                    elif not self._changed.wait(REST) and not self._waiting:
                        self._thread = None
                        return
                    continue
                self._calling = bool(tickets)
            self._turn_away(late)
            if tickets:
                self._call(tickets)
            with self._changed:
                self._calling = False
                self._changed.notify_all()

    def _take(self, now: float) -> tuple[list[Ticket], list[Ticket], float | None]:
        """(the tickets of the next call, those that are too late, when to look again); cancelled ones are dropped."""
        late, ready = [], []
        for key, tickets in list(self._waiting.items()):
            late += [each for each in tickets if each.deadline is not None and each.deadline <= now]
            kept = [each for each in tickets if not each.result.cancelled() and each not in late]
            if not kept:
                del self._waiting[key]
                continue
            self._waiting[key] = kept
            if self.closing or len(kept) >= self.workers[key[0]].most or self._until(key, kept) <= now:
                ready.append((min(each.rank(now, self.pacing.patience) for each in kept), len(ready), key))
        if not ready:
            return [], late, self._next(now)
        key = min(ready)[2]
        tickets, most = self._waiting[key], self.workers[key[0]].most
        urgent = heapq.nsmallest(most, tickets, key=lambda each: each.rank(now, self.pacing.patience))
        rest = [each for each in tickets if each not in urgent]
        if rest:
            self._waiting[key] = rest
        else:
            del self._waiting[key]
            self._drop_old_paces(key)
        taken = [each for each in urgent if each.result.set_running_or_notify_cancel()]
        return taken, late, self._next(now)

    def _until(self, key: tuple[str, Hashable], tickets: list[Ticket]) -> float:
        """When a group that doesn't fill a call is ready."""
        arrived, window, gap = min(each.arrived for each in tickets), self.pacing.window, self._paces[key].gap
        return arrived + window if self.workers[key[0]].most > 1 and gap is not None and gap < window else arrived

    def _next(self, now: float) -> float | None:
        times = [self._until(*group) for group in self._waiting.items()]
        times += [each.deadline for tickets in self._waiting.values() for each in tickets if each.deadline is not None]
        return min(times, default=None)

    def _drop_old_paces(self, key: tuple[str, Hashable]) -> None:
        """Drops the rhythms of kinds that have not been asked for lately, such as those of earlier versions."""
        if len(self._paces) > 1000:
            old = [other for other, pace in self._paces.items() if other != key and other not in self._waiting]
            for other in old:
                del self._paces[other]

    def _call(self, tickets: list[Ticket]) -> None:
        start = self.clock()
        for ticket in tickets:
            ticket.called, ticket.together = start, len(tickets)
        results = self._results(tickets)
        try:
            self.observe(tickets, self.clock() - start)
        except Exception:  # the thread has to live
            LOG.exception("a call was not counted")
        for ticket, result in zip(tickets, results, strict=True):
            if isinstance(result, BaseException):
                ticket.result.set_exception(result)
            else:
                ticket.result.set_result(result)

    def _results(self, tickets: list[Ticket]) -> list[Any]:
        """The result of each, or its error; what fails together is tried alone, so that one cannot fail the others."""
        run = self.workers[tickets[0].lane].run
        try:
            results = list(run([ticket.payload for ticket in tickets]))
            if len(results) != len(tickets):
                raise RuntimeError(f"{len(results)} results for {len(tickets)} requests")
            return results
        except Exception as error:
            if len(tickets) == 1:
                return [error]
            LOG.warning("a call with %d requests failed (%s); trying each alone", len(tickets), type(error).__name__)
        return [result for ticket in tickets for result in self._results([ticket])]

    def _turn_away(self, late: list[Ticket]) -> None:
        for ticket in late:
            _fail(ticket, TooLateError("the deadline passed before the model was free"))


@atexit.register
def _end_all() -> None:
    """Ends the threads: one that is in the model while the interpreter goes would crash the process."""
    for scheduler in list(LIVING):
        scheduler.close(0.0)
        scheduler.join(LAST_CALL)


def _fail(ticket: Ticket, error: Exception) -> None:
    """Gives a waiting ticket an error, unless it was cancelled meanwhile."""
    if ticket.result.set_running_or_notify_cancel():
        ticket.result.set_exception(error)
