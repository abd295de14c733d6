"""Storages for tests: slow, faulty, recording, strict. Each wraps another one.

None of them has a fast path of its own (`readv_nowait` and `writev_nowait` do nothing) unless it
says so, so that every request takes the path with awaits in it.
"""

from __future__ import annotations

import errno
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import trio

from imagofs.errors import StorageError
from imagofs.storage.base import PreallocateMode, Storage
from imagofs.vectors import is_address_aligned, split_views, total_length

#: Kinds of calls, as `FaultyStorage` counts them and `RecordingStorage` logs them.
KINDS = ("read", "write", "zero", "discard", "resize", "flush", "sync")


class WrappedStorage(Storage):
    """Does as `inner` does, through the `pure_*` methods of both."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.memory_alignment = inner.memory_alignment
        self.request_alignment = inner.request_alignment
        self.zero_alignment = inner.zero_alignment
        self.discard_alignment = inner.discard_alignment
        self.writable = inner.writable
        self.filename = inner.filename

    def size(self) -> int:
        return self.inner.size()

    def allocated_bytes(self) -> int:
        return self.inner.allocated_bytes()

    async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
        await self.inner.pure_readv(views, offset)

    async def pure_writev(self, views: Sequence[memoryview], offset: int) -> None:
        await self.inner.pure_writev(views, offset)

    async def pure_write_zeroes(self, offset: int, length: int, *, allocated: bool) -> None:
        await self.inner.pure_write_zeroes(offset, length, allocated=allocated)

    async def pure_discard(self, offset: int, length: int) -> None:
        await self.inner.pure_discard(offset, length)

    async def flush(self) -> None:
        await self.inner.flush()

    async def sync(self) -> None:
        await self.inner.sync()

    async def invalidate_cache(self) -> None:
        await self.inner.invalidate_cache()

    async def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        await self.inner.resize(size, preallocate)

    async def close(self) -> None:
        self.closed = True
        await self.inner.close()


class StrictStorage(WrappedStorage):
    """Demands alignments, and asserts that requests keep to them.

    Args:
        inner: The storage behind; it should have no alignments of its own.
        request: Alignment of offsets and lengths.
        memory: Alignment of buffers.
        zero: Alignment of zeroes.
        discard: Alignment of discards.
    """

    def __init__(
        self,
        inner: Storage,
        *,
        request: int = 4096,
        memory: int = 4096,
        zero: int = 4096,
        discard: int = 4096,
    ) -> None:
        super().__init__(inner)
        self.request_alignment = request
        self.memory_alignment = memory
        self.zero_alignment = zero
        self.discard_alignment = discard

    async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
        self._check_views(views, offset)
        assert total_length(views) % self.request_alignment == 0
        await super().pure_readv(views, offset)

    async def pure_writev(self, views: Sequence[memoryview], offset: int) -> None:
        self._check_views(views, offset)
        length = total_length(views)
        assert length % self.request_alignment == 0 or offset + length >= self.size()
        await super().pure_writev(views, offset)

    async def pure_write_zeroes(self, offset: int, length: int, *, allocated: bool) -> None:
        assert length > 0
        assert offset % self.zero_alignment == length % self.zero_alignment == 0
        await super().pure_write_zeroes(offset, length, allocated=allocated)

    async def pure_discard(self, offset: int, length: int) -> None:
        assert length > 0
        assert offset % self.discard_alignment == length % self.discard_alignment == 0
        assert offset + length <= self.size()
        await super().pure_discard(offset, length)

    def _check_views(self, views: Sequence[memoryview], offset: int) -> None:
        assert offset % self.request_alignment == 0
        assert views
        for view in views:
            assert view.ndim == 1
            assert view.format == "B"
            assert view.nbytes
            assert is_address_aligned(view, self.memory_alignment)
        for view in views[:-1]:
            assert view.nbytes % self.request_alignment == 0


class SlowStorage(WrappedStorage):
    """Yields before and after each call, and in the middle of each write.

    Attributes:
        delay: Seconds of each pause; 0 only yields.
        pauses: How many there were.
        on_pause: Called with the pause's number (from 1) as it begins. To cancel at the n-th await
            of an operation, cancel the scope here.
    """

    def __init__(
        self,
        inner: Storage,
        *,
        delay: float = 0.0,
        on_pause: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(inner)
        self.delay = delay
        self.on_pause = on_pause
        self.pauses = 0

    async def pause(self) -> None:
        """Wait; a test may call it for operations of its own."""
        self.pauses += 1
        if self.on_pause is not None:
            self.on_pause(self.pauses)
        await trio.sleep(self.delay)

    async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
        await self.pause()
        await super().pure_readv(views, offset)
        await self.pause()

    async def pure_writev(self, views: Sequence[memoryview], offset: int) -> None:
        await self.pause()
        unit = self.request_alignment
        half = (total_length(views) // 2) // unit * unit
        if half:
            head, tail = split_views(list(views), half)
            await super().pure_writev(head, offset)
            await self.pause()
            await super().pure_writev(tail, offset + half)
        else:
            await super().pure_writev(views, offset)
        await self.pause()

    async def pure_write_zeroes(self, offset: int, length: int, *, allocated: bool) -> None:
        await self.pause()
        await super().pure_write_zeroes(offset, length, allocated=allocated)
        await self.pause()

    async def pure_discard(self, offset: int, length: int) -> None:
        await self.pause()
        await super().pure_discard(offset, length)
        await self.pause()

    async def flush(self) -> None:
        await self.pause()
        await super().flush()
        await self.pause()

    async def sync(self) -> None:
        await self.pause()
        await super().sync()
        await self.pause()

    async def invalidate_cache(self) -> None:
        await self.pause()
        await super().invalidate_cache()
        await self.pause()

    async def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        await self.pause()
        await super().resize(size, preallocate)
        await self.pause()


class FaultyStorage(WrappedStorage):
    """Fails the n-th call of a kind, counted from 1.

    Set the attributes at any time, for example after an image was opened.

    Attributes:
        calls: How many calls of each kind there were, and of "any", which counts all together.
        kind: One of `KINDS`, or "any", or None: nothing fails.
        nth: Which call of that kind fails, counted like `calls`.
        forever: Whether the calls after it fail too.
        partial: Whether a failing write has written its first half.
        error: The errno.
        tear: A first half is a multiple of this, in bytes.
        failed: The kinds of the calls that failed, in order.
    """

    def __init__(
        self,
        inner: Storage,
        kind: str | None = None,
        nth: int = 1,
        *,
        error: int = errno.EIO,
        forever: bool = False,
        partial: bool = False,
        tear: int = 1,
    ) -> None:
        super().__init__(inner)
        self.calls: Counter[str] = Counter()
        self.kind = kind
        self.nth = nth
        self.error = error
        self.forever = forever
        self.partial = partial
        self.tear = tear
        self.failed: list[str] = []

    def fail_next(self, kind: str, *, error: int | None = None, forever: bool = False) -> None:
        """Let the next call of `kind` fail, and with `forever` all after it."""
        self.kind, self.nth, self.forever = kind, self.calls[kind] + 1, forever
        self.error = self.error if error is None else error

    def _fails(self, kind: str) -> bool:
        self.calls[kind] += 1
        self.calls["any"] += 1
        if self.kind not in (kind, "any"):
            return False
        count = self.calls[self.kind]
        return count == self.nth or (self.forever and count > self.nth)

    def _fault(self, kind: str) -> StorageError:
        self.failed.append(kind)
        fault = OSError(self.error, "injected fault")
        return StorageError.of(kind, fault, self.filename)

    def _call(self, kind: str) -> None:
        if self._fails(kind):
            raise self._fault(kind)

    async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
        self._call("read")
        await super().pure_readv(views, offset)

    async def pure_writev(self, views: Sequence[memoryview], offset: int) -> None:
        if self._fails("write"):
            if self.partial:
                unit = max(self.request_alignment, self.tear)
                half = (total_length(views) // 2) // unit * unit
                if half:
                    await super().pure_writev(split_views(list(views), half)[0], offset)
            raise self._fault("write")
        await super().pure_writev(views, offset)

    async def pure_write_zeroes(self, offset: int, length: int, *, allocated: bool) -> None:
        self._call("zero")
        await super().pure_write_zeroes(offset, length, allocated=allocated)

    async def pure_discard(self, offset: int, length: int) -> None:
        self._call("discard")
        await super().pure_discard(offset, length)

    async def flush(self) -> None:
        self._call("flush")
        await super().flush()

    async def sync(self) -> None:
        self._call("sync")
        await super().sync()

    async def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        self._call("resize")
        await super().resize(size, preallocate)


@dataclass(slots=True, eq=False)
class Record:
    """One change of a storage.

    Attributes:
        storage: The name of the storage that it went to.
        kind: "write", "zero", "discard", "resize" or "sync".
        offset: Where it begins, in bytes; the new size for a resize.
        length: Its length in bytes.
        data: What was written, for a write.
        began: When it began, on the log's clock.
        ended: When it succeeded; None while it runs, and if it failed or was cancelled.
    """

    storage: str
    kind: str
    began: int
    offset: int = 0
    length: int = 0
    data: bytes = b""
    ended: int | None = None

    def apply(self, image: bytearray) -> None:
        """Do to `image` what was done to the storage. A discard makes zeroes."""
        end = self.offset + self.length
        if self.kind == "resize":
            del image[self.offset :]
            image.extend(bytes(self.offset - len(image)))
            return
        if self.kind in ("write", "zero"):
            image.extend(bytes(max(0, end - len(image))))
        if self.kind == "write":
            image[self.offset : end] = self.data
        elif self.kind in ("zero", "discard"):
            end = min(end, len(image))
            image[self.offset : end] = bytes(max(0, end - self.offset))


@dataclass(slots=True)
class Log:
    """Records of one or several storages in the order in which they began, and their clock.

    A power cut at time `t` may leave any subset of the records that began before `t`, except that
    those in `durable(t)` are there.
    """

    records: list[Record] = field(default_factory=list)
    clock: Iterator[int] = field(default_factory=itertools.count)

    def durable(self, at: float = float("inf")) -> list[Record]:
        """Records that a sync of their storage covers: they ended before it began, and it ended
        before the time `at`."""
        syncs: dict[str, int] = {}
        for record in self.records:
            if record.kind == "sync" and record.ended is not None and record.ended < at:
                syncs[record.storage] = max(record.began, syncs.get(record.storage, -1))
        return [
            record
            for record in self.records
            if record.kind != "sync"
            and record.ended is not None
            and record.ended < syncs.get(record.storage, -1)
        ]

    def at_risk(self, at: float = float("inf")) -> list[Record]:
        """Records that began before the time `at` and that a power cut then may have lost."""
        safe = {id(record) for record in self.durable(at)}
        return [
            record
            for record in self.records
            if record.kind != "sync" and record.began < at and id(record) not in safe
        ]


def replay(initial: bytes, records: Iterable[Record]) -> bytes:
    """What `records`, applied in their order, make of `initial`."""
    image = bytearray(initial)
    for record in records:
        record.apply(image)
    return bytes(image)


class RecordingStorage(WrappedStorage):
    """Logs every change with its data. The fast path of `inner` is used, and logged.

    Args:
        inner: The storage that keeps the bytes.
        log: A log to share with other storages.
        name: What the records call this storage.
    """

    def __init__(self, inner: Storage, log: Log | None = None, name: str = "image") -> None:
        super().__init__(inner)
        self.log = Log() if log is None else log
        self.name = name

    def _begin(self, kind: str, offset: int = 0, length: int = 0, data: bytes = b"") -> Record:
        record = Record(self.name, kind, next(self.log.clock), offset, length, data)
        self.log.records.append(record)
        return record

    def _end(self, record: Record) -> None:
        record.ended = next(self.log.clock)

    def readv_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        return self.inner.readv_nowait(views, offset)

    def writev_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        done = self.inner.writev_nowait(views, offset)
        if done:
            data = b"".join(split_views(list(views), done)[0])
            self._end(self._begin("write", offset, done, data))
        return done

    async def pure_writev(self, views: Sequence[memoryview], offset: int) -> None:
        data = b"".join(views)
        record = self._begin("write", offset, len(data), data)
        await super().pure_writev(views, offset)
        self._end(record)

    async def pure_write_zeroes(self, offset: int, length: int, *, allocated: bool) -> None:
        record = self._begin("zero", offset, length)
        await super().pure_write_zeroes(offset, length, allocated=allocated)
        self._end(record)

    async def pure_discard(self, offset: int, length: int) -> None:
        record = self._begin("discard", offset, length)
        await super().pure_discard(offset, length)
        self._end(record)

    async def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        record = self._begin("resize", size)
        await super().resize(size, preallocate)
        self._end(record)

    async def sync(self) -> None:
        record = self._begin("sync")
        await super().sync()
        self._end(record)
