"""Keeping idle processors awake while somebody waits for one reply after another.

Who sends one request at a time sleeps until the reply is there, and so does its processor. To wake
that takes 20 us and more in a virtual machine, where the host has to do it, and all the rest 10.
Linux lets whoever may open `/dev/cpu_dma_latency` ask that it does not come to that ("PM quality of
service"): while one such request stands, processors that have nothing to do poll, all of them. It
ends with the descriptor, however this process ends.

So it is asked for only as long as it gains something, which is tried out, and nobody is to wait for
it: a few of these writes are all the I/O there is.
"""

from __future__ import annotations

import errno
import logging
import os
from time import monotonic
from typing import Final, Literal

from ..errors import StorageError

__all__ = ["DEVICE", "Wakefulness", "open_wakefulness"]

log = logging.getLogger(__name__)

DEVICE: Final = "/dev/cpu_dma_latency"
#: The longest time that waking a processor may take (microseconds): none, or any.
_NONE: Final = (0).to_bytes(4, "little")
_ANY: Final = (-1).to_bytes(4, "little", signed=True)

#: Where there are more processors, those that have nothing to do with it would poll in vain. Up to
#: here that costs no more than is saved, as all is done in half the time.
_MOST_PROCESSORS = 4

_SPANS = 16  # spans whose median is one figure to compare: a round
_LONGEST_NANOSECONDS = 150_000  # for one request; waking is little of what takes longer
_GAIN = 1.15  # so many times as fast it must be, at least
#: After a trial that gained nothing so many rounds pass until the next, twice as many each time; or
#: as few as it takes until requests last so many times as long: the scheduler may have had both
#: sides on one processor, which nobody needs to wake.
_REST_ROUNDS = 4
_MOST_REST_ROUNDS = 128
_SLOWER = 1.3
_KEPT_ROUNDS = 1024  # after which it is tried anew


class Wakefulness:
    """Whether idle processors are kept awake. All of it is for one thread, and plain functions.

    Args:
        device: An open `/dev/cpu_dma_latency`, which `close` closes.
        span_requests: Requests between two calls of `span`.
    """

    __slots__ = (
        "_before",
        "_device",
        "_held_since",
        "_is_tried",
        "_last",
        "_left",
        "_passed",
        "_rest",
        "_span_requests",
        "_times",
        "is_held",
    )

    def __init__(self, device: int, span_requests: int) -> None:
        self.is_held = False
        self._device = device
        self._span_requests = span_requests
        self._last = 0
        self._times: list[int] = []  # of spans, to be compared
        self._before = 0  # median of those before it was asked for
        self._is_tried = False  # it is not known yet whether it gains something
        self._left = 0  # rounds until it is tried again
        self._rest = _REST_ROUNDS
        self._passed = self._held_since = 0.0

    @property
    def seconds(self) -> float:
        """How long processors were kept awake, all in all."""
        return self._passed + (monotonic() - self._held_since if self.is_held else 0)

    def span(self, now: int, alone: int) -> None:
        """Note that `span_requests` more were sent.

        Args:
            now: The time (nanoseconds).
            alone: How many of them came when nothing else was to be done.
        """
        elapsed = now - self._last
        self._last = now
        number = self._span_requests
        if alone * 4 < number * 3 or elapsed > number * _LONGEST_NANOSECONDS:
            self.let_go()
            return
        self._times.append(elapsed)
        if len(self._times) == _SPANS:
            took = sorted(self._times)[_SPANS // 2]
            self._times.clear()
            self._decide(took)

    def let_go(self) -> None:
        """Nobody waits for a reply now: processors may sleep."""
        self._times.clear()
        if self.is_held:
            self._left = 0
            self._passed = self.seconds
            self.is_held = False
            self._write(_ANY)

    def close(self) -> None:
        """Let go, and close the device."""
        self.let_go()
        os.close(self._device)

    def _decide(self, took: int) -> None:
        """Try, keep, or give it up for a while, after a round whose spans took so long."""
        if self.is_held and self._is_tried:
            self._is_tried = False
            if took * _GAIN <= self._before:
                self._left = _KEPT_ROUNDS
                self._rest = _REST_ROUNDS
            else:
                self.let_go()
                self._left = self._rest
                self._rest = min(2 * self._rest, _MOST_REST_ROUNDS)
        elif self._left and (self.is_held or took < self._before * _SLOWER):
            self._left -= 1
        elif self.is_held:
            self.let_go()
        else:
            self._before = took
            if self._write(_NONE):
                self.is_held = self._is_tried = True
                self._held_since = monotonic()

    def _write(self, request: bytes) -> bool:
        try:
            os.write(self._device, request)
        except OSError as error:
            log.debug("%s: %s", DEVICE, error)
            self._left = _MOST_REST_ROUNDS
            return False
        return True


def open_wakefulness(wanted: bool | Literal["auto"], span_requests: int) -> Wakefulness | None:
    """Get ready to keep processors awake, while this process may still open the device.

    Args:
        wanted: "auto": on a machine with few processors, and if it is possible.
        span_requests: See `Wakefulness`.

    Returns:
        None: not wanted.

    Raises:
        StorageError: It is wanted, and not possible.
    """
    if not wanted or (wanted == "auto" and (os.cpu_count() or 1) > _MOST_PROCESSORS):
        return None
    try:
        return Wakefulness(os.open(DEVICE, os.O_WRONLY | os.O_CLOEXEC), span_requests)
    except OSError as error:
        if wanted == "auto":
            log.debug("processors are not kept awake: %s: %s", DEVICE, error.strerror)
            return None
        raise StorageError(
            f"cannot keep processors awake: {error.strerror}; awake=auto does what can be done",
            error=error.errno or errno.EIO,
            filename=DEVICE,
        ) from None
