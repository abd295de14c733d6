"""What no image may make imagofs do, whoever made it: take long, take memory, touch other files."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from imagofs import ImplicitOpenGate, ImplicitOpenRequest
from imagofs.gate import AllowDirectories

__all__ = [
    "CACHES",
    "MEMORY",
    "REPAIR_FACTOR",
    "REPAIR_MEMORY",
    "SECONDS",
    "Finding",
    "RecordingGate",
    "Stuck",
    "bounded",
    "collect_what_is_large",
    "limit_memory",
    "slowness",
]

#: Seconds of processor time for each thing that is done with an image; see `slowness`.
SECONDS = 2.0
#: Of an empty loop, on a processor of 2020 that has nothing else to do.
_SECONDS_PER_ROUND = 20e-9
#: Bytes that one image may take beyond the caches.
MEMORY = 64 << 20
#: The same for a repair, and for its preview, which keeps in memory what it would write.
REPAIR_MEMORY = 256 << 20
#: A repair walks over the image several times.
REPAIR_FACTOR = 4
#: Bytes of each of the two caches that the images are opened with.
CACHES = 1 << 20

# Only where the interpreter's own modules are may files be opened that no gate was asked about.
_OWN = tuple({sys.prefix, sys.base_prefix, sys.exec_prefix, str(Path(__file__).parents[2])})
_STARTS_A_PROGRAM = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
_REFUSED_EVENTS = (*_STARTS_A_PROGRAM, "socket.connect", "socket.bind")

_libc = ctypes.CDLL(None)
_watchers: list[Callable[[str, tuple[Any, ...]], None]] = []
_hooked = False
_status_file = os.open("/proc/self/status", os.O_RDONLY)
_size_before = 0  # of the process, when `bounded` began


class Finding(AssertionError):
    """Something that no image may make happen, happened."""


class Stuck(BaseException):
    """The time is over. No `except Exception` stops it."""


class RecordingGate(ImplicitOpenGate):
    """Lets pass what is below one directory, and notes what that was.

    Args:
        directory: The directory.

    Attributes:
        passed: The paths that were let pass.
        writable: Those of them that are to be opened for writing.
    """

    def __init__(self, directory: Path) -> None:
        self._inner = AllowDirectories([directory])
        self.passed: set[str] = set()
        self.writable: set[str] = set()

    def check(self, request: ImplicitOpenRequest) -> None:
        """Refuse what lies elsewhere."""
        self._inner.check(request)
        self.passed.add(request.path)
        if request.writable:
            self.writable.add(request.path)


@contextmanager
def bounded(
    allowed: Callable[[], set[str]], seconds: float = SECONDS, memory: int = MEMORY
) -> Iterator[None]:
    """Run the body within all bounds.

    Args:
        allowed: The files that may be opened by now.
        seconds: Of processor time, all threads together; `slowness` makes more of them.
        memory: Bytes, beyond the caches.

    Raises:
        Finding: The body broke a bound.
        Stuck: It took longer; raised within the body.
    """
    touched: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _REFUSED_EVENTS:
            touched.append(f"{event} {arguments[:2]!r}")
        elif event == "open":
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else ""
            if path and path not in allowed() and not path.startswith((*_OWN, "/proc/self/fd/")):
                touched.append(f"open {path!r}")

    global _size_before
    _set_up()
    _give_back()
    _forget_the_peak()
    before = _size_before = _status("VmRSS")
    began = time.process_time()
    _watchers.append(watch)
    try:
        with _time_limit(seconds):
            yield
    finally:
        _watchers.remove(watch)
    taken = time.process_time() - began
    peak = _status("VmHWM") - before
    if touched:
        raise Finding(f"opened or started what nobody allowed: {touched}")
    if peak > memory + 2 * CACHES:
        raise Finding(f"took {peak >> 20} MiB of memory")
    if taken > seconds and taken > seconds * slowness():  # the signal came too late to be seen
        raise Finding(f"took {taken:.1f} s of processor time")


def collect_what_is_large() -> None:
    """Let go of what was closed, where there is much of it.

    An L1 table may have 32 MiB, and the bound is for one image: not for how long the garbage
    collector leaves several of them.
    """
    if _status("VmRSS") - _size_before > MEMORY // 4:
        gc.collect()


def slowness() -> float:
    """How many times as long as a processor of 2020 this one needs now, from 1 to 10.

    A machine that shares its processors with others was seen to be at 1 and at 8 within a minute.
    """
    rounds = 20_000
    began = time.thread_time()
    for _ in range(rounds):
        pass
    return min(max((time.thread_time() - began) / (rounds * _SECONDS_PER_ROUND), 1.0), 10.0)


def _set_up() -> None:
    """Once per process: the hook, and large pieces of memory that go back to the system."""
    global _hooked
    if _hooked:
        return
    _hooked = True
    # glibc would let this threshold grow, and keep what was freed: a second peak would not be seen.
    m_mmap_threshold = -3
    _libc.mallopt(m_mmap_threshold, 1 << 18)
    sys.addaudithook(_hook)  # never to be removed


def _give_back() -> None:
    """Leave the body no memory of what ran before: freed or used in it, it would hide as much."""
    gc.collect(1)
    _libc.malloc_trim(0)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _watchers:
        watch(event, arguments)


def _forget_the_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _status(field: str) -> int:
    """A number of bytes from this process's status."""
    text = os.pread(_status_file, 4096, 0).decode("ascii")
    start = text.index(field) + len(field) + 1
    return int(text[start : start + 30].split()[0]) << 10


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `Stuck` in the body when it has used that much processor time, or waits for ever."""
    began = time.process_time()

    def ring(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGPROF:
            left = seconds * slowness() - (time.process_time() - began)
            if left > 0:
                signal.setitimer(signal.ITIMER_PROF, left)
                return
        kind = "waited too long" if number == signal.SIGALRM else "used too much processor time"
        raise Stuck(f"{kind} (bound: {seconds} s)")

    timers = (
        (signal.ITIMER_PROF, signal.SIGPROF, seconds),
        (signal.ITIMER_REAL, signal.SIGALRM, 60),
    )
    before = [signal.signal(number, ring) for _, number, _ in timers]
    try:
        for timer, _, limit in timers:
            signal.setitimer(timer, limit)
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def limit_memory(size: int) -> None:
    """Let the kernel refuse this process more than `size` bytes of address space."""
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
