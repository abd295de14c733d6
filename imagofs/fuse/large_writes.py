"""Large WRITEs: the second thread does one while the next requests are received and done.

To receive a WRITE the kernel copies its data to us, and to do it the kernel copies them to the page
cache: so both of two processors work for who writes on and on.

What was handed over is not answered yet, so a READ or WRITE of the same bytes that is done
meanwhile may come before or behind it. Nothing else may be done with the image before `finish`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .buffers import MessageBuffer
    from .second_thread import SecondThread

__all__ = ["LargeWrite", "LargeWrites"]


class LargeWrite(NamedTuple):
    """A WRITE: the request's number, its data, their offset, and the buffer that they are in."""

    unique: int
    data: memoryview
    offset: int
    buffer: MessageBuffer


class LargeWrites:
    """Has WRITEs done by the second thread, one at a time. All methods are plain functions.

    Args:
        second: The thread.
        written: Called with a request's number and its bytes once they are written, in either
            thread. It must not raise.
        finished: Called by `finish`, with whether the WRITE is written, or why it failed.
    """

    def __init__(
        self,
        second: SecondThread,
        *,
        written: Callable[[int, int], None],
        finished: Callable[[LargeWrite, bool | Exception], None],
    ) -> None:
        self._second = second
        self._written = written
        self._finished = finished
        self._given: LargeWrite | None = None
        self._outcome: bool | Exception = False

    def hand_over(self, request: LargeWrite, write: Callable[[], bool]) -> bool:
        """Let the second thread do a WRITE; `finish` must follow.

        Args:
            request: The WRITE.
            write: Returns whether it has written the data.

        Returns:
            False: it does not.
        """

        def work() -> None:
            try:
                self._outcome = write()
            except Exception as error:
                self._outcome = error
                return
            if self._outcome:
                self._written(request.unique, len(request.data))

        if not self._second.give(work):
            return False
        self._given = request
        return True

    def finish_if_done(self) -> bool:
        """`finish` if that does not wait for the thread; what that has not begun with is done here.

        Returns:
            Whether nothing is handed over any more.
        """
        if not self._second.take_back() and self._second.is_busy:
            return False
        self.finish()
        return True

    def finish(self) -> None:
        """Return when what was handed over is done."""
        self._second.settle()
        if self._given is not None:
            request, self._given = self._given, None
            self._finished(request, self._outcome)
