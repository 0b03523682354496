"""Background work: a thread of the lowest priority, which gets a core only when requests need none."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

LOWEST = 19
"""The lowest priority of Linux; 0 is the usual one."""


def in_background(function: Callable[[], Result]) -> Result:
    """Returns `function()`, or raises its exception, from a new thread of the lowest priority; the caller waits.

    The thread is new each time, since a lowered priority can't be raised again without privileges, and threads that it
    starts inherit it. Outside Linux, where threads have no priority of their own, it has the usual one.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="background", initializer=_give_way) as thread:
        return thread.submit(function).result()


def _give_way() -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)
