"""A thread that does one thing at a time for another, which may take it back."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

from ..background import in_the_background

__all__ = ["SecondThread"]


class SecondThread:
    """Lets a second processor do what the system does for one without the interpreter's lock.

    It is for work of 0.1 ms, in which waking a thread is worth it, and may not be noticed: so the
    thread drives nobody off a processor, and if none is free for it, who gave the work takes it
    back. All methods are plain functions, for one and the same thread.
    """

    __slots__ = ("_closed", "_given", "_may_start", "_thread", "_wake", "_working", "is_busy")

    def __init__(self) -> None:
        #: Work was given that is not done.
        self.is_busy = False
        self._given: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._wake = threading.Lock()  # held while there is nothing to be done
        self._wake.acquire()
        self._working = threading.Lock()  # held by the thread at work
        self._closed = False
        self._may_start = len(os.sched_getaffinity(0)) > 1

    def give(self, work: Callable[[], None]) -> bool:
        """Have `work` done, which must not raise.

        Returns:
            False: it will not be done, since there is no thread, or it is not done with the last.
        """
        if self.is_busy or not (self._thread or self._start()):
            return False
        self.is_busy = True
        self._given.append(work)
        self._wake_up()
        return True

    def take_back(self) -> bool:
        """Do what was given, unless the thread has begun with it.

        Returns:
            Whether it was done here.
        """
        try:
            work = self._given.popleft()
        except IndexError:
            return False
        work()
        self.is_busy = False
        return True

    def settle(self) -> None:
        """Return when what was given is done."""
        if not self.take_back() and self.is_busy:
            with self._working:
                pass

    def close(self) -> None:
        """Return when what was given is done and the thread has ended."""
        self.settle()
        self._may_start = False
        self._closed = True
        if self._thread is not None:
            self._wake_up()
            self._thread.join()
            self._thread = None

    def _wake_up(self) -> None:
        if self._wake.locked():
            self._wake.release()

    def _start(self) -> bool:
        if self._may_start:
            thread = threading.Thread(target=self._run, name="imagofs second", daemon=True)
            try:
                thread.start()
                self._thread = thread
            except RuntimeError:  # the system has no thread left
                self._may_start = False
        return self._may_start

    def _run(self) -> None:
        with in_the_background():
            while not self._closed:
                self._wake.acquire()
                with self._working:
                    self.take_back()
