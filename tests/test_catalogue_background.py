"""Work in the background: its result, its errors, its priority."""

import os
import sys
import threading

import pytest

from jaxrec.catalogue.background import LOWEST, in_background


def test_the_result_and_the_error_come_back():
    assert in_background(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 / 0)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_only_its_own_thread_gives_way():
    def priority():
        return threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    me, before = priority()
    first, lowered = in_background(priority)
    assert first != me and lowered == LOWEST
    assert priority() == (me, before)
    assert in_background(priority)[1] == LOWEST  # again, though a priority can't be raised
