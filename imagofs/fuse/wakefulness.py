"""Keeping idle processors awake while somebody waits for one reply after another.

Who sends one request at a time sleeps until the reply is there, and so does its processor. To wake
that takes 20 us and more in a virtual machine, where the host has to do it, and all the rest 10.
Linux lets whoever may open `/dev/cpu_dma_latency` ask that it does not come to that ("PM quality of
service"): while one such request stands, processors that have nothing to do poll, all of them. It
ends with the descriptor, however this process ends.

So it is asked for only as long as it gains something, which is tried out. A daemon that is stopped
(SIGSTOP), or waits for a file system that does not answer, cannot withdraw it. A few writes of four
bytes are all the I/O here.
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

#: Where there are more processors, too many of them would poll for the one that is needed.
_MOST_PROCESSORS = 4

_SPANS = 16  # spans whose median is one figure to compare: a round
_LONGEST_NANOSECONDS = 150_000  # for one request; waking is little of what takes longer
_GAIN = 1.15  # so many times as fast it must be, at least
#: For how many rounds it is kept before it is tried anew, four times as many each time: one trial
#: proves little, as the speed of a machine varies.
_KEPT_ROUNDS = 4
_MOST_KEPT_ROUNDS = 1024
#: How many rounds pass after a trial that gained nothing, twice as many each time; or as few as it
#: takes until requests last so many times as long. (Between holds they were seen to be as fast
#: without one for a while.)
_REST_ROUNDS = 4
_MOST_REST_ROUNDS = 128
_SLOWER = 1.3


class Wakefulness:
    """Whether idle processors are kept awake. All of it is for one thread, and plain functions.

    Args:
        device: An open `/dev/cpu_dma_latency`, which `close` closes.
    """

    __slots__ = (
        "_before",
        "_device",
        "_held_since",
        "_is_tried",
        "_keep",
        "_last",
        "_left",
        "_passed",
        "_rest",
        "_times",
        "is_held",
    )

    def __init__(self, device: int) -> None:
        self.is_held = False
        self._device = device  # -1: closed
        self._last = 0
        self._times: list[int] = []  # of the spans of this round
        self._before = 0  # median of the last round before it was asked for
        self._is_tried = False  # it is not known yet whether it gains something
        self._left = 0  # rounds until it is tried again
        self._keep = _KEPT_ROUNDS
        self._rest = _REST_ROUNDS
        self._passed = self._held_since = 0.0

    @property
    def seconds(self) -> float:
        """How long processors were kept awake, all in all."""
        return self._passed + (monotonic() - self._held_since if self.is_held else 0)

    def span(self, now: int, requests: int, alone: int) -> None:
        """Note that some requests came since the last call.

        Args:
            now: The time (nanoseconds).
            requests: How many, the same number each time.
            alone: How many of them came when nothing else was to be done.
        """
        elapsed = now - self._last
        self._last = now
        if alone * 4 < requests * 3:
            self.let_go()
        elif elapsed > requests * _LONGEST_NANOSECONDS:
            if self.is_held:
                self.let_go()
        else:
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
            if self._is_tried:
                self._give_up()  # or short bursts would be nothing but trials
            else:
                self._withdraw()

    def close(self) -> None:
        """Let go, for good."""
        self.let_go()
        if self._device >= 0:
            os.close(self._device)
            self._device = -1

    def _decide(self, took: int) -> None:
        """Try, keep, or give it up for a while, after a round whose spans took so long."""
        if self._is_tried:
            if took * _GAIN <= self._before:
                self._is_tried = False
                self._left = self._keep
                self._keep = min(4 * self._keep, _MOST_KEPT_ROUNDS)
                self._rest = _REST_ROUNDS
            else:
                self._give_up()
        elif self._left and (self.is_held or took < self._before * _SLOWER):
            self._left -= 1
        elif self.is_held:
            self._withdraw()
        else:
            self._try(took)

    def _try(self, before: int) -> None:
        self._before = before
        if self._write(_NONE):
            self.is_held = self._is_tried = True
            self._held_since = monotonic()

    def _give_up(self) -> None:
        self._withdraw()
        self._is_tried = False
        self._left = self._rest
        self._rest = min(2 * self._rest, _MOST_REST_ROUNDS)
        self._keep = _KEPT_ROUNDS

    def _withdraw(self) -> None:
        self._passed = self.seconds
        self.is_held = False
        self._write(_ANY)

    def _write(self, request: bytes) -> bool:
        if self._device < 0:
            return False
        try:
            os.write(self._device, request)
        except OSError as error:
            log.debug("processors are not kept awake any more: %s: %s", DEVICE, error)
            os.close(self._device)  # which withdraws what was asked for
            self._device = -1
        return self._device >= 0


def open_wakefulness(wanted: bool | Literal["auto"]) -> Wakefulness | None:
    """Get ready to keep processors awake, while this process may still open the device.

    Args:
        wanted: "auto": on a machine with few processors, and if it is possible.

    Returns:
        None: not wanted.

    Raises:
        StorageError: It is wanted, and not possible.
    """
    if not wanted or (wanted == "auto" and (os.cpu_count() or 1) > _MOST_PROCESSORS):
        return None
    try:
        return Wakefulness(os.open(DEVICE, os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        if wanted == "auto":
            log.debug("processors are not kept awake: %s: %s", DEVICE, error.strerror)
            return None
        raise StorageError(
            f"cannot keep processors awake: {error.strerror}; awake=auto does what can be done",
            error=error.errno or errno.EIO,
            filename=DEVICE,
        ) from None
