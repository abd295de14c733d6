"""Large WRITEs: the second thread does one while the next requests are received and done.

To receive a WRITE the kernel copies its data to us, and to do it the kernel copies them to the page
cache: so both of two processors work for who writes on and on.

What was handed over is not answered yet, so a READ or WRITE of the same bytes that is done
meanwhile may come before or behind it. Nothing else may be done with the image before `finish`.
"""

from __future__ import annotations

from collections.abc import Callable

from .second_thread import SecondThread

__all__ = ["LargeWrites"]


class LargeWrites:
    """Has WRITEs done by the second thread, one at a time. All methods are plain functions.

    Args:
        second: The thread.
        answer: Called with a request's number and its bytes once they are written, in either
            thread. It must not raise.
    """

    def __init__(self, second: SecondThread, answer: Callable[[int, int], None]) -> None:
        self._second = second
        self._answer = answer
        self._outcome: bool | Exception = False

    def hand_over(self, unique: int, size: int, write: Callable[[], bool]) -> bool:
        """Let the second thread do a WRITE; `finish` must follow.

        Args:
            unique: The request's number.
            size: Its bytes.
            write: Returns whether it has written them.

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
                self._answer(unique, size)

        return self._second.give(work)

    def is_done(self) -> bool:
        """Whether `finish` would not wait for the thread. What it has not begun with is done."""
        return self._second.take_back() or not self._second.is_busy

    def finish(self) -> bool:
        """Return when what was handed over is done.

        Returns:
            Whether it is written and answered.

        Raises:
            Exception: What `write` raised.
        """
        self._second.settle()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome
