"""Threads that leave the processors to those who need one at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["in_the_background"]


@contextmanager
def in_the_background() -> Iterator[None]:
    """Run the calling thread as one that drives nobody else off a processor when it wakes.

    Whoever reads, and trio's thread that answers, need one for a moment only, and at once.
    """
    normal = os.sched_getscheduler(0) == os.SCHED_OTHER
    if normal:
        with suppress(OSError):  # a sandbox may forbid it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        if normal:
            with suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
