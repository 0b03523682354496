"""What a server tells of itself: Prometheus metrics, and a JSON line for each request, without personal data."""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from jaxrec.config import UserError
from jaxrec.serving.lanes import Lane
from jaxrec.serving.scheduler import Scheduler, Ticket

REQUESTS = logging.getLogger("jaxrec.serving.requests")
STAGES = ("prepare", "wait", "search", "write", "total")
"""prepare: parsing, histories, filters, on the host. wait: for the call. search: the call. write: titles and JSON.
total: from the complete body to the answer."""
SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16)
TOGETHER = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass
class Passage:
    """A request through a lane, as far as it is told: neither who asked, nor for what, nor from where."""

    route: str
    lane: str
    number: str
    """a random name, which the answer has in `X-Request-Id`"""
    status: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """by stage; a stage that was not reached is missing"""
    together: int | None = None
    """requests in its call"""
    version: int | None = None
    """of the catalogue"""
    k: int | None = None
    source: str | None = None
    """of the answer: model, popular, own"""

    def to_json(self) -> str:
        """A line of the log."""
        told = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request": self.number,
            "lane": self.lane,
            "route": self.route,
            "status": self.status,
            "ms": {stage: round(1e3 * seconds, 2) for stage, seconds in self.seconds.items()},
        }
        more = {"together": self.together, "version": self.version, "k": self.k, "source": self.source}
        return json.dumps(told | {name: value for name, value in more.items() if value is not None})


class ServingMetrics:
    """The metrics of a server, in a registry of its own; names begin with `jaxrec_`."""

    def __init__(self, lanes: Sequence[Lane]):
        self.registry = CollectorRegistry()
        given: dict[str, Any] = {"registry": self.registry}
        self.seconds = Histogram(
            "jaxrec_request_seconds", "Time of a request by stage", ("lane", "stage"), buckets=SECONDS, **given
        )
        self.requests = Counter(
            "jaxrec_requests", "Requests by status; 499: the client was gone", ("lane", "status"), **given
        )
        self.degraded = Counter(
            "jaxrec_degraded", "Answers that did not come from the model", ("lane", "reason"), **given
        )
        self.together = Histogram("jaxrec_call_requests", "Requests in a call", ("lane",), buckets=TOGETHER, **given)
        self.calls = Histogram("jaxrec_call_seconds", "Time of a call", ("lane",), buckets=SECONDS, **given)
        self.waiting = Gauge("jaxrec_waiting", "Requests whose call has not begun", ("lane",), **given)
        self.version = Gauge("jaxrec_catalogue_version", "Version of the catalogue", ("lane",), **given)
        self.ready = Gauge("jaxrec_ready", "1 where the programs are compiled", ("lane",), **given)
        for lane in lanes:
            # What is asked when the metrics are read, and all series from the start: a rate needs the zero before.
            self.version.labels(lane.name).set_function(lambda lane=lane: lane.retriever.catalogue.current.number)
            self.ready.labels(lane.name).set_function(lambda lane=lane: float(lane.ready))
            self.degraded.labels(lane.name, "popular")
            self.together.labels(lane.name)
            self.calls.labels(lane.name)
            for stage in STAGES:
                self.seconds.labels(lane.name, stage)
            for status in (200, 503, 504):
                self.requests.labels(lane.name, status)

    def watch_queue(self, scheduler: Scheduler) -> None:
        """Reads the queues' lengths from a scheduler."""
        for lane in scheduler.workers:
            self.waiting.labels(lane).set_function(lambda lane=lane: scheduler.waiting(lane))

    def call_ended(self, tickets: list[Ticket], seconds: float) -> None:
        """Counts a call."""
        self.together.labels(tickets[0].lane).observe(len(tickets))
        self.calls.labels(tickets[0].lane).observe(seconds)

    def passed(self, passage: Passage) -> None:
        """Counts a request, and writes it to the log."""
        self.requests.labels(passage.lane, passage.status).inc()
        for stage, seconds in passage.seconds.items():
            self.seconds.labels(passage.lane, stage).observe(seconds)
        if passage.source == "popular":
            self.degraded.labels(passage.lane, "popular").inc()
        if REQUESTS.isEnabledFor(logging.INFO):
            REQUESTS.info(passage.to_json())

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)


def log_requests(place: Path | None) -> None:
    """Writes a JSON line for each request to a file, or with `-` to stderr; None: nowhere.

    Raises:
      UserError: the file can't be written.
    """
    if place is None:
        return
    try:
        handler = logging.StreamHandler(sys.stderr) if str(place) == "-" else logging.FileHandler(place)
    except OSError as error:
        raise UserError(f"--log {place} can't be written: {error.strerror}; give another file, or -") from error
    handler.setFormatter(logging.Formatter("%(message)s"))
    REQUESTS.addHandler(handler)
    REQUESTS.setLevel(logging.INFO)
    REQUESTS.propagate = False
