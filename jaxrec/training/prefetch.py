"""Batches made in a thread while the device computes."""

import queue
import threading
from typing import Any, Protocol

from jaxrec.config import UserError


class BatchIterator(Protocol):
    """An iterator over batches whose position is JSON values."""

    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


class Prefetch:
    """Makes batches in a thread, one ahead; `position` is the iterator's state after the last batch returned."""

    def __init__(self, iterator: BatchIterator, ahead: int = 1):
        self.iterator = iterator
        self.position = iterator.get_state()
        self.queue: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True, name="batches")

    def __enter__(self) -> "Prefetch":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        while self.thread.is_alive():
            # The thread may be waiting for room in the queue.
            while not self.queue.empty():
                self.queue.get_nowait()
            self.thread.join(0.05)

    def get(self, step: int) -> Any:
        """The next batch, for step `step`."""
        batch, position, error = self.queue.get()
        if isinstance(error, StopIteration):
            raise UserError(f"the data ended before step {step}; lower training.steps or give epochs=None to `batches`")
        if error is not None:
            raise error
        self.position = position
        return batch

    def _work(self) -> None:
        while not self.stopped.is_set():
            try:
                item = (next(self.iterator), self.iterator.get_state(), None)
            except BaseException as error:  # passed to the training thread
                item = (None, None, error)
            self.queue.put(item)
            if item[2] is not None:
                return
