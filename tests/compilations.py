"""Counts what JAX compiles, by its own events, and looks into it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np

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


def constant_shapes(function: Callable, *args: object) -> list[tuple[int, ...]]:
    """The shapes of the arrays that the program of a function would have in itself, not being arguments of it."""
    return [
        np.shape(value) for value in jax.make_jaxpr(lambda function, *args: function(*args))(function, *args).consts
    ]
