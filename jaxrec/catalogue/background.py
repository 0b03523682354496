"""Work that gives way: in a thread that gets a core only when nobody who answers requests wants it."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

LOWEST = 19
"""The priority that Linux gives way with most; 0 is the usual one."""


def in_background(function: Callable[[], Result]) -> Result:
    """Returns `function()`, or raises what it raises, from a thread of its own that has the lowest priority.

    The thread is a new one each time, since a priority once lowered can't be raised again without privileges, and
    threads that it starts have its priority too. Where threads have none of their own (outside Linux) it has the usual
    one. The caller waits.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="background", initializer=_give_way) as thread:
        return thread.submit(function).result()


def _give_way() -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)
