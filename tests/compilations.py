"""Counts what JAX compiles, by its own events."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

TRACED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
"""Recorded for every function and every new set of shapes, whether or not a cache on disk then has the binary."""


@contextmanager
def count_compilations() -> Iterator[list[str]]:
    """A list that grows by one for each compilation in any thread, until the block ends."""
    found: list[str] = []
    inside = True

    def listen(event: str, _: float, **about: object) -> None:
        if inside and event == TRACED:
            found.append(str(about.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        inside = False
