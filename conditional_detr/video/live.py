"""Hold the newest item of a source that is faster than its consumer, and drop the others; play files like cameras."""

import threading
import time
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

from conditional_detr.video.frames import Frame

Item = TypeVar("Item")


class NewestItem(Generic[Item]):
    """The newest item that a thread has read.

    Attributes:
        dropped: number of items that were replaced by a newer one before the consumer took them.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._changed = threading.Condition()
        self._item: Item | None = None
        self._failure: BaseException | None = None
        self._ended = False

    def read(self, items: Iterator[Item]) -> Generator[Item, None, None]:
        """Run an iterator in a thread, and yield the newest item whenever the consumer asks for one.

        Args:
            items: read without waiting for the consumer.

        Returns:
            A generator of the items that were not dropped; the last one is among them. An exception of the iterator is
            raised after them.
        """
        thread = threading.Thread(target=self._run, args=(items,), name="conditional_detr", daemon=True)
        thread.start()
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._item is not None or self._ended)
                    item, self._item = self._item, None
                if item is None:
                    break
                yield item
            if self._failure is not None:
                raise self._failure
        finally:
            self._ended = True
            thread.join()

    def _run(self, items: Iterator[Item]) -> None:
        failure: BaseException | None = None
        try:
            for item in items:
                if self._ended:  # the consumer has gone
                    break
                with self._changed:
                    self.dropped += self._item is not None
                    self._item = item
                    self._changed.notify()
        except BaseException as error:  # also of an interpreter that ends
            failure = error
        finally:
            if isinstance(items, Generator):
                items.close()
        with self._changed:
            self._failure, self._ended = failure, True
            self._changed.notify()


def paced(frames: Generator[Frame, None, None]) -> Generator[Frame, None, None]:
    """Yield the frames of a file at their times, as a camera would."""
    begin: float | None = None
    for frame in frames:
        begin = time.monotonic() - frame.time if begin is None else begin
        time.sleep(max(begin + frame.time - time.monotonic(), 0))
        yield frame
