"""Inflating: bounded, with the fastest library there is; and a bounded cache of what came out.

Streams come from strangers. Each function here makes exactly the length that it was asked for and
never holds more than that: a stream that would inflate to gigabytes costs what a good one costs.

The libraries are imported when the first compressed cluster is met, since most mounts never meet
one. All of them release the interpreter's lock while they inflate.

Measured on clusters of 64 KiB of prose, one thread, CPython 3.11, in MiB/s. Deflate: zlib 249,
zlib-ng 299, libdeflate 371, isal 420. Zstandard: the standard library's binding 370 to 510 (it sets
up and tears down a stream with its windows for each cluster, and the C library gives that memory
back to the system in between), zstandard 1460 (one context per thread, one pass).
"""

from __future__ import annotations

import os
import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import trio

from .background import in_the_background
from .errors import UnsupportedError

if TYPE_CHECKING:
    import outcome
    from typing_extensions import Buffer

__all__ = [
    "DEFAULT_INFLATED_BYTES",
    "InflateError",
    "InflateThreads",
    "Inflated",
    "InflatedCache",
    "deflate_library",
    "inflate_deflate",
    "inflate_zstd",
    "inflate_zstd_clusters",
]

DEFAULT_INFLATED_BYTES = 64 << 20

#: An inflated cluster. Both kinds are read alike, and neither ever changes.
Inflated: TypeAlias = bytes | memoryview

_NAMESPACE_BITS = 56  # room for every guest cluster of the smallest size
_ENTRY_OVERHEAD = 150  # bytes: the object's header, the key, a dictionary's slot
_MAX_THREADS = 4
_BUFFER_BYTES = 512 << 10
_START_BYTES = 512  # of deflate, for the tables that describe a block
_MAX_FRAMES = 64  # zstd frames that make one cluster; writers make one
_MAX_WINDOW_BITS = 23  # zstd: 8 MiB, what decoders are asked to support; clusters have 2 at most


class InflateError(ValueError):
    """A stream is broken, or does not inflate to the length that was asked for."""


# --- inflating ----------------------------------------------------------------------------------


def inflate_deflate(data: Buffer, length: int, whole_length: int = 0) -> bytes:
    """Inflate raw deflate (RFC 1951).

    Args:
        data: The stream; what follows its end is ignored.
        length: Bytes to make, above zero. A stream that goes on is cut there.
        whole_length: Bytes that all of it makes. If it is given, little more is inflated than
            `length`; 0: `length` is all, or not much less.

    Raises:
        InflateError: The stream is broken, as far as it was looked at, or ends earlier.
    """
    decompressobj, broken = deflate_library()
    stream = decompressobj(-zlib.MAX_WBITS)
    view = memoryview(data)
    first = view.nbytes
    if whole_length:
        # isal goes through all that it is given, so it is given little more than what is needed if
        # the stream is alike throughout.
        first = length * first * 9 // (whole_length * 8) + _START_BYTES
    try:
        inflated: bytes = stream.decompress(view[:first], length)
        if len(inflated) < length and first < view.nbytes:
            inflated += stream.decompress(view[first:], length - len(inflated))
    except broken as exc:
        raise InflateError(f"broken deflate stream ({exc})") from None
    if len(inflated) != length:
        raise InflateError(f"the deflate stream ends after {len(inflated)} of {length} bytes")
    return inflated


@cache
def deflate_library() -> tuple[Callable[[int], Any], tuple[type[Exception], ...]]:
    """`decompressobj` of the fastest library there is, and what that raises for broken streams."""
    try:
        isal = import_module("isal.isal_zlib")
    except ImportError:
        return zlib.decompressobj, (zlib.error,)
    return isal.decompressobj, (isal.error, zlib.error)


def inflate_zstd(data: Buffer, length: int) -> bytes:
    """Inflate Zstandard (RFC 8878): one frame, or a few that make `length` bytes together.

    Args:
        data: The frames; what follows the last one that is needed is ignored.
        length: Bytes to make, above zero. They must end where a frame ends.

    Raises:
        InflateError: A frame is broken, or they end earlier or later.
        UnsupportedError: No library is installed.
    """
    library = zstd_library()
    try:
        whole = library.whole_frame(data, length)
        if whole is not None:
            return whole
        view = memoryview(data)
        parts: list[bytes] = []
        missing = length
        for _ in range(_MAX_FRAMES):
            end = zstd_frame_end(view)
            # One byte more than there may be: it tells a frame that goes on.
            part = library.part_of_frame(view[:end], missing + 1)
            parts.append(part)
            missing -= len(part)
            view = view[end:]
            if missing <= 0 or not view.nbytes:
                break
    except library.broken as exc:
        raise InflateError(f"broken zstd stream ({exc})") from None
    if missing:
        what = "ends before" if missing > 0 else "goes on after"
        raise InflateError(f"the zstd stream {what} {length} bytes")
    return b"".join(parts)


def inflate_zstd_clusters(frames: list[memoryview], length: int) -> list[memoryview]:
    """Inflate several clusters without taking the interpreter's lock in between.

    Args:
        frames: For each what `inflate_zstd` takes.
        length: Bytes to make of each.

    Returns:
        The clusters, which share memory: it is kept while one of them is. An empty list if this
        cannot be done.

    Raises:
        Exception: One of them is broken, or needs `inflate_zstd`.
    """
    whole_frames = zstd_library().whole_frames
    return [] if whole_frames is None else whole_frames(frames, length)


def zstd_frame_end(data: memoryview) -> int:
    """Bytes of the frame that `data` begins with (RFC 8878, 3.1 "Frames").

    Raises:
        InflateError: It is no frame, or is cut off.
    """
    magic = int.from_bytes(data[:4], "little")
    if magic & ~15 == 0x184D2A50:  # a skippable frame
        end = 8 + int.from_bytes(data[4:8], "little")
    elif magic == 0xFD2FB528 and data.nbytes > 4:
        descriptor = data[4]
        single_segment = descriptor >> 5 & 1
        content_size_bytes = (single_segment, 2, 4, 8)[descriptor >> 6]
        dictionary_id_bytes = (0, 1, 2, 4)[descriptor & 3]
        end = 5 + (not single_segment) + dictionary_id_bytes + content_size_bytes
        last = False
        while not last and end + 3 <= data.nbytes:
            block = int.from_bytes(data[end : end + 3], "little")
            last = bool(block & 1)
            run_length = block >> 1 & 3 == 1  # one byte, repeated
            end += 3 + (1 if run_length else block >> 3)
        end += (descriptor >> 2 & 1) * 4  # the checksum
        if not last:
            end = data.nbytes + 1
    else:
        raise InflateError("broken zstd stream (no frame begins there)")
    if end > data.nbytes:
        raise InflateError("broken zstd stream (a frame is cut off)")
    return end


class _Zstd(NamedTuple):
    """What is used of a library.

    Attributes:
        whole_frame: Inflate the first frame, which makes `length` bytes; None if it does not, or
            if that cannot be known beforehand.
        whole_frames: The same for several at a time, None if the library cannot.
        part_of_frame: Inflate no more than `limit` bytes of the one frame that `data` is.
        broken: What these raise for broken frames.
    """

    whole_frame: Callable[[Buffer, int], bytes | None]
    whole_frames: Callable[[list[memoryview], int], list[memoryview]] | None
    part_of_frame: Callable[[Buffer, int], bytes]
    broken: type[Exception]


@cache
def zstd_library() -> _Zstd:
    try:
        return _with_zstandard(import_module("zstandard"))
    except ImportError:
        pass
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return _with_standard_library(import_module(name))
        except ImportError:
            continue
    raise UnsupportedError("zstd clusters need the Python package zstandard: install it")


def _with_zstandard(zstd: Any) -> _Zstd:
    contexts = threading.local()  # a context must not be used by two threads at a time

    def context() -> Any:
        try:
            return contexts.zstd
        except AttributeError:
            contexts.zstd = zstd.ZstdDecompressor(max_window_size=1 << _MAX_WINDOW_BITS)
            return contexts.zstd

    def whole_frame(data: Buffer, length: int) -> bytes | None:
        # Without this check as much memory would be taken as the frame claims to need.
        if zstd.frame_content_size(data) != length:
            return None
        inflated: bytes = context().decompress(data, allow_extra_data=True)
        return inflated

    def whole_frames(frames: list[memoryview], length: int) -> list[memoryview]:
        if any(zstd.frame_content_size(frame) != length for frame in frames):
            raise InflateError("a frame does not say that it makes a cluster")
        sizes = length.to_bytes(8, sys.byteorder) * len(frames)
        inflated = context().multi_decompress_to_buffer(frames, decompressed_sizes=sizes)
        return [memoryview(segment) for segment in inflated]

    def part_of_frame(data: Buffer, limit: int) -> bytes:
        with context().stream_reader(data) as reader:
            inflated: bytes = reader.read(limit)
        return inflated

    many = whole_frames if "multi_decompress_to_buffer" in zstd.backend_features else None
    return _Zstd(whole_frame, many, part_of_frame, zstd.ZstdError)


def _with_standard_library(zstd: Any) -> _Zstd:
    options = {zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_BITS}

    def whole_frame(data: Buffer, length: int) -> bytes | None:
        frame = zstd.ZstdDecompressor(options=options)
        inflated: bytes = frame.decompress(data, length)
        return inflated if frame.eof and len(inflated) == length else None

    def part_of_frame(data: Buffer, limit: int) -> bytes:
        inflated: bytes = zstd.ZstdDecompressor(options=options).decompress(data, limit)
        return inflated

    return _Zstd(whole_frame, None, part_of_frame, zstd.ZstdError)


# --- the cache ----------------------------------------------------------------------------------


class InflatedCache:
    """Inflated clusters by integer key, up to `limit` bytes, shared by all layers of a chain.

    Two generations, so that a hit in the young one moves nothing. When that has grown to half the
    limit, it joins the old one, whose oldest clusters make room; what is asked for there becomes
    young again. Beside them is what was inflated ahead of sequential reads: first in, first out,
    read or not, so that a pass over the disk displaces nothing. As long as there is room that
    nothing else needs, what leaves joins the old generation: the next pass finds it there.

    Args:
        limit: Bytes that are kept. A cache too small for one cluster still keeps the newest.
    """

    __slots__ = (
        "_ahead_bytes",
        "_buffers",
        "_namespaces",
        "_old",
        "_used_bytes",
        "_used_limit",
        "_young_bytes",
        "ahead",
        "ahead_limit",
        "limit",
        "threads",
        "young",
    )

    def __init__(self, limit: int = DEFAULT_INFLATED_BYTES) -> None:
        self.limit = limit
        #: Bytes of `limit` for what was inflated ahead.
        self.ahead_limit = limit // 4
        #: The fast path looks here and in `ahead` by itself, and calls `get` if it finds nothing.
        self.young: dict[int, bytes] = {}
        #: What was inflated ahead, oldest first. Change it with the methods only.
        self.ahead: dict[int, Inflated] = {}
        #: The threads that fill this cache.
        self.threads = InflateThreads()
        self._used_limit = limit - self.ahead_limit
        self._old: dict[int, Inflated] = {}
        self._used_bytes = self._young_bytes = self._ahead_bytes = 0
        self._buffers: list[bytearray] = []
        self._namespaces = count()

    def namespace(self) -> int:
        """A number to add to own keys (0 to 2**56 - 1), so that they differ from others'."""
        return next(self._namespaces) << _NAMESPACE_BITS

    def bytes_held(self) -> int:
        """Bytes that are kept now, bookkeeping included."""
        return self._used_bytes + self._ahead_bytes

    def get(self, key: int) -> Inflated | None:
        """The cluster at `key`, None if it is not cached. It counts as used."""
        found = self.young.get(key) or self.ahead.get(key)
        if found is not None:
            return found
        data = self._old.pop(key, None)
        if data is None:
            return None
        own = bytes(data)  # alone: what it shared memory with may leave before it
        self._enter(key, own)
        return own

    def kept(self, keys: range) -> set[int]:
        """Those of `keys` that a cluster is kept at, used or not."""
        return self.young.keys() & keys | self._old.keys() & keys | self.ahead.keys() & keys

    def put(self, key: int, data: bytes) -> None:
        """Keep `data` at `key`, in the place of what was there."""
        self.drop(key)
        self._used_bytes += _cost(data)
        self._enter(key, data)
        # One out for one in: the allocator then uses the same, warm memory again. A generation
        # forgotten as a whole would be given back to the system and cleared again page by page.
        while self._used_bytes > self._used_limit and self._old:
            self._used_bytes -= _cost(self._old.pop(next(iter(self._old))))

    def _enter(self, key: int, data: bytes) -> None:
        """Make `data` the newest of the young generation."""
        cost = _cost(data)
        if self._young_bytes + cost > self._used_limit // 2:
            self._old.update(self.young)
            self.young, self._young_bytes = {}, 0
        self.young[key] = data
        self._young_bytes += cost

    def put_inflated(self, clusters: Mapping[int, Inflated], *, ahead: bool) -> None:
        """Keep clusters by their keys: as `put_ahead` does, or else each as `put` does."""
        if ahead:
            self.put_ahead(clusters)
        else:
            for key, data in clusters.items():
                self.put(key, bytes(data))

    def put_ahead(self, clusters: Mapping[int, Inflated]) -> None:
        """Keep clusters by their keys until something newer needs the room.

        Those that share memory are put together: so they leave, and it is free.
        """
        for kept in (self.young, self._old, self.ahead):
            if not kept.keys().isdisjoint(clusters):
                for key in clusters:
                    self.drop(key)
        ahead = self.ahead
        ahead.update(clusters)
        self._ahead_bytes += sum(map(len, clusters.values())) + len(clusters) * _ENTRY_OVERHEAD
        while self._ahead_bytes > self.ahead_limit and len(ahead) > 1:
            oldest = next(iter(ahead))
            left = ahead.pop(oldest)
            cost = _cost(left)
            self._ahead_bytes -= cost
            if self._used_bytes + cost <= self._used_limit:
                self._used_bytes += cost
                self._old[oldest] = left

    def drop(self, key: int) -> None:
        """Forget the cluster at `key`."""
        young = self.young.pop(key, None)
        if young is not None:
            self._young_bytes -= _cost(young)
            self._used_bytes -= _cost(young)
        old = self._old.pop(key, None)
        if old is not None:
            self._used_bytes -= _cost(old)
        ahead = self.ahead.pop(key, None)
        if ahead is not None:
            self._ahead_bytes -= _cost(ahead)

    def drop_range(self, first_key: int, keys: int) -> None:
        """Forget the clusters at `keys` consecutive keys, in time bounded by what is cached."""
        if not (self.young or self._old or self.ahead):
            return  # written images without compressed clusters come by with every allocation
        end = first_key + keys
        if keys <= 64:
            for key in range(first_key, end):
                self.drop(key)
            return
        for generation in (self.young, self._old, self.ahead):
            for key in [key for key in generation if first_key <= key < end]:
                self.drop(key)

    def take_buffer(self, length: int) -> bytearray:
        """A buffer of at least `length` bytes for compressed data. Its contents are undefined.

        Buffers are used again: the system would have to clear new ones page by page.
        """
        if length <= _BUFFER_BYTES:
            try:
                return self._buffers.pop()
            except IndexError:
                pass
        return bytearray(max(length, _BUFFER_BYTES))

    def give_buffer(self, buffer: bytearray) -> None:
        """Give back what `take_buffer` returned, from any thread. Nobody uses it any more."""
        if len(self._buffers) < _MAX_THREADS and len(buffer) == _BUFFER_BYTES:
            self._buffers.append(buffer)

    def drop_buffers(self) -> None:
        """Keep no buffers to be used again."""
        self._buffers.clear()


def _cost(data: Inflated) -> int:
    return len(data) + _ENTRY_OVERHEAD


# --- threads ------------------------------------------------------------------------------------


class InflateThreads:
    """Runs work in trio's worker threads, no more at a time than there are processors.

    The work belongs to nobody: a task that waits for its end may be cancelled, and the work goes
    on. A thread that is done takes the next work by itself, so that all goes on while trio's thread
    is busy with something else. Trio's thread is woken only for what somebody waits for, or when
    there is no more to do: it would take the interpreter's lock just when the others need it.

    Args:
        limit: Threads at a time; None: one per processor, up to 4.
    """

    __slots__ = ("_done", "_later", "_lock", "_running", "_told", "_urgent", "limit")

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit or min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        self._lock = threading.Lock()
        self._running = 0
        self._done: deque[Callable[[], None]] = deque()
        self._told: trio.lowlevel.TrioToken | None = None  # whose loop will call `settle`
        self._urgent: deque[_Work] = deque()
        self._later: deque[_Work] = deque()

    def submit(
        self, work: Callable[[], None], done: Callable[[], None], awaited: Callable[[], bool]
    ) -> None:
        """Call `work` in a thread and then, some time, in trio's thread, `done`. A plain function.

        Args:
            work: Must not raise, nor wait for anything.
            done: Must not raise. Not called if trio's loop has ended meanwhile.
            awaited: Whether somebody waits for `done`; called in any thread. If so, the work
                overtakes what nobody waits for. Whoever begins to wait calls `settle` then.
        """
        self.settle()
        urgent = awaited()
        with self._lock:
            token = trio.lowlevel.current_trio_token()
            (self._urgent if urgent else self._later).append(_Work(work, done, awaited, token))
            if self._running >= self.limit:
                return
            self._running += 1
        try:
            trio.lowlevel.start_thread_soon(self._work_in_thread, _ignore, "imagofs inflate")
        except RuntimeError:  # the system has no thread left
            self._work()

    def settle(self) -> None:
        """In trio's thread: call `done` for all work that is done by now."""
        self._told = None
        while self._done:
            self._done.popleft()()

    def _work_in_thread(self) -> None:
        with in_the_background():
            self._work()

    def _work(self) -> None:
        """Do all the work that there is."""
        while (work := self._next()) is not None:
            work.work()
            self._done.append(work.done)
            # Told once for all that is done until it looks.
            no_more = not (self._urgent or self._later)
            if (no_more or work.awaited()) and self._told is not work.token:
                self._told = work.token
                try:
                    work.token.run_sync_soon(self.settle)
                except trio.RunFinishedError:
                    pass

    def _next(self) -> _Work | None:
        with self._lock:
            if self._urgent:
                return self._urgent.popleft()
            if self._later:
                return self._later.popleft()
            self._running -= 1
            return None


class _Work(NamedTuple):
    work: Callable[[], None]
    done: Callable[[], None]
    awaited: Callable[[], bool]
    token: trio.lowlevel.TrioToken


def _ignore(_: outcome.Outcome[None]) -> None:
    """Nobody waits for a thread's end."""
