"""Requests together: what is in a call, and when; by a clock that the tests set."""

import threading
from concurrent.futures import wait

import pytest

from jaxrec.serving.scheduler import (
    BATCH,
    KEYSTROKE,
    PAGE,
    REST,
    Pacing,
    Places,
    QueueFullError,
    Scheduler,
    ShuttingDownError,
    TooLateError,
    Worker,
)

WINDOW = 0.004


class Clock:
    """The time, as the test says."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Calls:
    """A worker's function that keeps its calls; `poison` fails every call that it is in."""

    def __init__(self, clock: Clock | None = None, seconds: float = 0.0):
        self.calls, self.clock, self.seconds = [], clock, seconds

    def __call__(self, payloads: list) -> list:
        self.calls.append(list(payloads))
        if self.clock is not None:
            self.clock.now += self.seconds
        if "poison" in payloads:
            raise FloatingPointError("the model gave NaN")
        return [f"answer to {payload}" for payload in payloads]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def calls():
    return Calls()


@pytest.fixture
def scheduler(calls, clock):
    return Scheduler({"a": Worker(calls, 4)}, Pacing(WINDOW), clock=clock, threaded=False)


def submit(scheduler, *payloads, lane="a", kind="x", **more):
    return [scheduler.submit(lane, payload, kind, **more) for payload in payloads]


def at(clock, seconds):
    clock.now = 100.0 + seconds


def busy(scheduler, clock, kind="x", lane="a"):
    """Requests of a kind come quickly: its window is open. Nothing is left waiting."""
    for _ in range(12):
        submit(scheduler, "before", kind=kind, lane=lane)
        clock.now += WINDOW / 10
    clock.now += WINDOW
    while scheduler.step():
        pass
    scheduler.workers[lane].run.calls.clear()


def test_what_waits_goes_together_and_each_gets_its_own_answer(scheduler, calls, clock):
    tickets = submit(scheduler, *range(6))
    clock.now += WINDOW
    assert [scheduler.step(), scheduler.step(), scheduler.step()] == [4, 2, None]
    assert calls.calls == [[0, 1, 2, 3], [4, 5]]
    assert [ticket.result.result() for ticket in tickets] == [f"answer to {number}" for number in range(6)]
    assert [ticket.together for ticket in tickets] == [4] * 4 + [2] * 2


def test_only_one_kind_is_in_a_call(scheduler, calls):
    for number, kind in enumerate("xyxzyx"):
        submit(scheduler, number, kind=kind)
    while scheduler.step():
        pass
    assert calls.calls == [[0, 2, 5], [1, 4], [3]]


def test_who_is_alone_does_not_wait(scheduler, clock):
    for _ in range(5):
        clock.now += 1.0
        submit(scheduler, "lone")
        assert scheduler.next_time() <= clock.now and scheduler.step() == 1


def test_a_first_request_does_not_wait(scheduler):
    submit(scheduler, "first")
    assert scheduler.step() == 1


def test_under_load_a_call_waits_for_others_but_not_longer_than_the_window(scheduler, clock, calls):
    busy(scheduler, clock)
    begin = clock.now
    submit(scheduler, 1)
    assert scheduler.step() is None and scheduler.next_time() == begin + WINDOW
    clock.now += WINDOW / 2
    submit(scheduler, 2)
    assert scheduler.step() is None and scheduler.next_time() == begin + WINDOW, "the oldest counts"
    clock.now = begin + WINDOW
    assert scheduler.step() == 2 and calls.calls == [[1, 2]]


def test_a_full_call_does_not_wait(scheduler, clock):
    busy(scheduler, clock)
    submit(scheduler, 1, 2, 3)
    assert scheduler.step() is None
    submit(scheduler, 4)
    assert scheduler.step() == 4


def test_the_window_closes_when_the_load_is_gone(scheduler, clock):
    busy(scheduler, clock)
    for _ in range(3):
        clock.now += 10.0
        submit(scheduler, "quiet")
        clock.now += WINDOW
        scheduler.step()
    clock.now += 10.0
    submit(scheduler, "quiet")
    assert scheduler.step() == 1


def test_a_lane_that_calls_for_one_never_waits(clock):
    calls = Calls()
    scheduler = Scheduler({"a": Worker(calls, 1)}, Pacing(WINDOW), clock=clock, threaded=False)
    for _ in range(12):
        submit(scheduler, "quick")
        assert scheduler.step() == 1


def test_what_waited_while_the_model_worked_has_waited_enough(clock):
    calls = Calls(clock, seconds=1.0)
    scheduler = Scheduler({"a": Worker(calls, 4)}, Pacing(WINDOW), clock=clock, threaded=False)
    busy(scheduler, clock)
    submit(scheduler, 1)
    clock.now += 1.0  # another call
    assert scheduler.step() == 1


def test_keystrokes_come_before_pages_and_these_before_batch_work(scheduler, calls):
    submit(scheduler, "batch", kind="b", priority=BATCH)
    submit(scheduler, "page", kind="p", priority=PAGE)
    submit(scheduler, "key", kind="k", priority=KEYSTROKE)
    while scheduler.step():
        pass
    assert calls.calls == [["key"], ["page"], ["batch"]]


def test_a_full_call_takes_the_urgent_ones_and_room_is_given_to_others_of_the_kind(scheduler, calls):
    submit(scheduler, *"abc", priority=BATCH)
    submit(scheduler, *"pq", priority=PAGE)
    assert scheduler.step() == 4 and calls.calls == [["p", "q", "a", "b"]]


def test_nobody_waits_for_ever(scheduler, clock, calls):
    """A second of waiting is one priority."""
    submit(scheduler, "batch", kind="b", priority=BATCH)
    at(clock, 1.9)
    submit(scheduler, "page", kind="p")
    assert scheduler.step() == 1 and calls.calls.pop() == ["batch"], "as urgent, and longer there"
    submit(scheduler, "batch", kind="b", priority=BATCH)
    at(clock, 2.0)
    submit(scheduler, "page", kind="q")
    scheduler.step()
    assert calls.calls.pop() == ["page"]


def test_priorities_hold_between_lanes(clock):
    pages, keys = Calls(), Calls()
    workers = {"recommend": Worker(pages, 4), "suggest": Worker(keys, 4)}
    scheduler = Scheduler(workers, Pacing(WINDOW), clock=clock, threaded=False)
    submit(scheduler, 1, 2, lane="recommend")
    submit(scheduler, 3, lane="suggest", priority=KEYSTROKE)
    assert scheduler.waiting("recommend") == 2 and scheduler.waiting("suggest") == 1
    assert scheduler.step() == 1 and keys.calls == [[3]] and not pages.calls, "one kind, but two lanes"
    assert scheduler.step() == 2 and pages.calls == [[1, 2]]


def test_late_work_is_dropped(scheduler, clock, calls):
    late, good = submit(scheduler, "late", deadline=101.0) + submit(scheduler, "good", deadline=103.0)
    at(clock, 1.0)
    assert scheduler.step() == 1 and calls.calls == [["good"]]
    with pytest.raises(TooLateError):
        late.result.result(0)
    assert good.result.result(0) == "answer to good"


def test_a_deadline_wakes_the_thread(scheduler, clock):
    busy(scheduler, clock)
    submit(scheduler, 1, deadline=clock.now + WINDOW / 4)
    assert scheduler.next_time() == clock.now + WINDOW / 4


def test_cancelled_work_is_dropped(scheduler, calls):
    gone, here = submit(scheduler, "gone", "here")
    (alone,) = submit(scheduler, "alone", kind="y")
    assert gone.result.cancel() and alone.result.cancel()
    assert scheduler.step() == 1 and scheduler.step() is None
    assert calls.calls == [["here"]] and here.result.done() and scheduler.waiting("a") == 0


def test_a_request_that_fails_does_not_fail_the_others(scheduler, calls):
    bad, *good = submit(scheduler, "poison", 1, 2)
    scheduler.step()
    assert [ticket.result.result(0) for ticket in good] == ["answer to 1", "answer to 2"]
    with pytest.raises(FloatingPointError):
        bad.result.result(0)
    assert calls.calls == [["poison", 1, 2], ["poison"], [1], [2]]


def test_a_call_is_told_of(calls, clock):
    told = []
    workers = {"a": Worker(Calls(clock, seconds=0.5), 4)}
    observe = lambda tickets, seconds: told.append(([each.payload for each in tickets], seconds))  # noqa: E731
    scheduler = Scheduler(workers, clock=clock, threaded=False, observe=observe)
    submit(scheduler, 1, 2)
    scheduler.step()
    assert told == [([1, 2], 0.5)]


def test_rhythms_of_kinds_that_nobody_asks_for_are_forgotten(scheduler):
    for kind in range(1500):
        submit(scheduler, "once", kind=kind)
        scheduler.step()
    assert len(scheduler._paces) <= 1001


def test_places():
    places = Places(2, "waiting")
    with places.place(), places.place():
        with pytest.raises(QueueFullError, match="2 requests are waiting already; try again in a second"):
            places.check()
        with pytest.raises(QueueFullError), places.place():
            pass
    with places.place():
        places.check()


# ---- with its thread -------------------------------------------------------------------------------------------------


class Held(Calls):
    """Says when a call is in progress, and goes on when it may."""

    def __init__(self):
        super().__init__()
        self.inside, self.go_on = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, payloads):
        self.inside.release()
        assert self.go_on.acquire(timeout=30)
        return super().__call__(payloads)


@pytest.fixture
def held():
    return Held()


@pytest.fixture
def threaded(held):
    return Scheduler({"a": Worker(held, 4)}, Pacing(window=0.0))


def test_what_comes_during_a_call_is_the_next_call(threaded, held):
    first = submit(threaded, 0)
    assert held.inside.acquire(timeout=30)
    others = submit(threaded, 1, 2, 3)
    assert others[0].result.cancel() and not first[0].result.cancel(), "a call in progress is not cancelled"
    held.go_on.release(2)
    done, _ = wait([ticket.result for ticket in first + others[1:]], timeout=30)
    assert len(done) == 3 and held.calls == [[0], [2, 3]]


def test_the_thread_ends_when_there_is_no_work_and_begins_again(threaded, held, monkeypatch):
    monkeypatch.setattr("jaxrec.serving.scheduler.REST", 0.0)
    for number in range(2):
        held.go_on.release()
        (ticket,) = submit(threaded, number)
        assert ticket.result.result(30) == f"answer to {number}"
        if (thread := threaded._thread) is not None:
            thread.join(30)
        assert threaded._thread is None
    assert REST > 0


def test_what_is_in_progress_is_finished_when_it_ends(threaded, held):
    tickets = submit(threaded, 0)
    assert held.inside.acquire(timeout=30)
    tickets += submit(threaded, 1, 2)
    held.go_on.release(2)
    assert threaded.close(30) == 0
    assert [ticket.result.result(0) for ticket in tickets] == [f"answer to {number}" for number in range(3)]
    with pytest.raises(ShuttingDownError):
        submit(threaded, 3)


def test_what_is_not_finished_in_time_is_turned_away(threaded, held):
    (first,) = submit(threaded, 0)
    assert held.inside.acquire(timeout=30)
    waiting = submit(threaded, 1, 2)
    assert waiting[0].result.cancel()
    assert threaded.close(0.0) == 2
    with pytest.raises(ShuttingDownError):
        waiting[1].result.result(0)
    held.go_on.release()
    assert first.result.result(30) == "answer to 0", "the model was not interrupted"


def test_the_thread_of_what_is_closed_ends_at_once(threaded, held):
    held.go_on.release()
    (ticket,) = submit(threaded, 0)
    assert ticket.result.result(30) == "answer to 0"
    thread = threaded._thread
    threaded.close(30)
    threaded.join(30)
    assert not thread.is_alive() and threaded._thread is None
