"""Storage: a range of bytes with alignment, below every format.

A driver implements the `pure_*` methods for aligned requests only; the public methods of this
class validate, align through bounce buffers and keep unaligned read-modify-write cycles apart
from their neighbours (see `blockers.py`).

Two families of methods exist. The `async` ones do what they are asked, with a thread where the
system call may wait. The `*_nowait` ones are plain functions for the fast path: they do at once
what can be done without waiting, and say how far they came.
"""

from __future__ import annotations

import enum
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Self

from ..errors import (
    ClosedError,
    ImagofsError,
    OutOfRangeError,
    ReadOnlyError,
    SyncLostError,
    UnsupportedError,
    WrongTypeError,
)
from ..vectors import flat_views, zero_views
from .blockers import WriteBlockers

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..vectors import IoVector

__all__ = ["PreallocateMode", "Storage", "StorageCreateOptions", "StorageOpenOptions"]


#: No byte of a storage lies behind this offset: a signed 64-bit file offset, less some room so that
#: adding the length of a buffer cannot get past it.
MAX_OFFSET = (1 << 63) - (1 << 48)

_WRITE_STEP = 1 << 20


class PreallocateMode(enum.Enum):
    """What growing does with the new space.

    For a storage NONE, ZERO, FORMAT_ALLOCATE (as ZERO), FULL_ALLOCATE and WRITE_DATA have a
    meaning; for a format all five.
    """

    NONE = "none"  #: Nothing is promised about the new range's contents or space.
    ZERO = "zero"  #: The new range reads as zero.
    FORMAT_ALLOCATE = "format_allocate"  #: The format maps it; the storage may stay sparse.
    FULL_ALLOCATE = "full_allocate"  #: Space is reserved all the way down.
    WRITE_DATA = "write_data"  #: Zeroes are really written.


@dataclass(frozen=True, slots=True)
class StorageOpenOptions:
    """How a storage is opened.

    Attributes:
        writable: Open for reading and writing.
        direct: Bypass the host's page cache (O_DIRECT).
    """

    writable: bool = False
    direct: bool = False


@dataclass(frozen=True, slots=True)
class StorageCreateOptions:
    """How a storage is created.

    Attributes:
        size: Bytes of the new storage.
        preallocate: What is done with its space.
        overwrite: Replace what exists; otherwise that is an error.
        open_options: How it is opened once it exists.
        mode: Permission bits of a new file, before the umask.
    """

    size: int = 0
    preallocate: PreallocateMode = PreallocateMode.ZERO
    overwrite: bool = False
    open_options: StorageOpenOptions = StorageOpenOptions(writable=True)
    mode: int = 0o666


class Storage(ABC):
    """A range of bytes that can be read, and perhaps written, discarded and resized.

    Offsets and lengths are bytes. Closed storages raise `ClosedError`.
    """

    #: Addresses of buffers given to `pure_*` are multiples of this (bytes, a power of two).
    memory_alignment: int = 1
    #: Offsets and lengths given to `pure_readv` and `pure_writev` are multiples of this.
    request_alignment: int = 1
    #: `write_zeroes` is efficient for multiples of this.
    zero_alignment: int = 1
    #: `discard` returns space for multiples of this.
    discard_alignment: int = 1
    #: Whether the storage was opened for writing.
    writable: bool = False
    #: Whether `writev_nowait` may be called by several threads at a time, inside of `size`.
    writes_in_threads: bool = False
    #: The file's absolute name, or None for what has none.
    filename: str | None = None
    #: Set by `close`: requests raise `ClosedError` from then on.
    closed: bool = False

    _blockers: WriteBlockers | None = None

    @abstractmethod
    def size(self) -> int:
        """The current size in bytes. A plain function: never waits."""

    def allocated_bytes(self) -> int:
        """Bytes of host space that the storage takes (st_blocks * 512 for files)."""
        return self.size()

    async def extent_at(self, offset: int) -> tuple[bool, int]:
        """Whether bytes are kept at `offset`, and where that changes.

        Args:
            offset: In bytes, below `size()`.

        Returns:
            True and the end of what may be data, or False and the end of a hole, which reads as
            zero. The end is above `offset` and at most `size()`.

        Raises:
            ClosedError: The storage was closed.
            OutOfRangeError: `offset` is negative, or not below `size()`.
            StorageError: The system refused.
            WrongTypeError: `offset` is no int.
        """
        _check_types(offset, 0)
        size = self.size()
        if self.closed or not 0 <= offset < size:
            self._refuse(offset)
        return True, size

    # --- the fast path -------------------------------------------------------------------

    def readv_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        """Fill as much of the flat `views` as needs no waiting.

        Returns:
            Bytes filled from the start; less than asked (0 too) means "not without waiting",
            never an error: the caller asks `readv` then.
        """
        return 0

    def writev_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        """Write as much of the flat `views` as needs no waiting.

        Returns:
            Bytes written from the start; the caller gives the rest to `writev`.
        """
        return 0

    def page_cache_fd(self, offset: int, length: int) -> int:
        """A descriptor that a range can be spliced from without waiting, if there is one.

        Args:
            offset: Of the range, not negative.
            length: Bytes, above zero.

        Returns:
            The descriptor, at whose `offset` all of the range is in the page cache; -1: read it.
            It is the storage's own, and good until anything else runs.
        """
        return -1

    def splice_fd(self, offset: int, length: int) -> int:
        """A descriptor that a range can be spliced from, though that may wait, if there is one.

        Args:
            offset: Of the range, not negative.
            length: Bytes, above zero.

        Returns:
            The descriptor, at whose `offset` the range is; -1: read it. It is the storage's own,
            and good until that is closed.
        """
        return -1

    # --- what a driver implements -----------------------------------------------------------
    #
    # Called with checked arguments only: the storage is open (and writable, where it changes
    # something), offsets are not negative, lengths of zeroes and discards are above zero (vectors
    # may be empty), and each view's address, each view's length and the offset are multiples of
    # the alignments.
    #
    # A task that is cancelled in one of these leaves the range with old bytes, new bytes or a mix
    # of both, and nobody is still writing to it once the task is gone.

    @abstractmethod
    async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill the aligned flat `views` from `offset`. Bytes past the end read as zero."""

    @abstractmethod
    async def pure_writev(self, views: Sequence[memoryview], offset: int) -> None:
        """Write the aligned flat `views` at `offset`. Writing past the end grows the storage
        where it can grow.

        A write that ends at or behind `size()` may end unaligned (in its last view), so that
        neither a file whose length is no multiple of `request_alignment` nor one that grows by an
        unaligned write gets padded.
        """

    @abstractmethod
    async def pure_write_zeroes(self, offset: int, length: int, *, allocated: bool) -> None:
        """Make the range read as zero; with `allocated`, keep or reserve its space.

        Offset and length are multiples of `zero_alignment`. As a write does, it grows the storage.
        """

    @abstractmethod
    async def pure_discard(self, offset: int, length: int) -> None:
        """Give the range's space back; its contents are undefined afterwards.

        Offset and length are multiples of `discard_alignment`, and the range lies inside `size()`.
        The storage's size never changes by it.
        """

    @abstractmethod
    async def flush(self) -> None:
        """Push buffers that this object keeps down to the system (not durable yet)."""

    @abstractmethod
    async def sync(self) -> None:
        """Make everything that was written durable (fdatasync)."""

    async def sync_around(self, writes: Sequence[tuple[int, Buffer]], *, again: bool) -> None:
        """Sync; only then write; then, if `again`, sync anew. For what must not come too early.

        A cancellation may take effect before, after, or between two of the steps.

        Args:
            writes: (offset, bytes) of each write. Power cuts may take any of them, unless `again`.
            again: What is written is durable too when this returns.

        Raises:
            SyncLostError: A sync failed, now or earlier.
            Otherwise as `writev`: a write failed; all that was written before is durable.
        """
        await self._sync_or_lose()
        for offset, data in writes:
            view = memoryview(data)
            if self.writev_nowait((view,), offset) != view.nbytes:
                await self.writev((view,), offset)
        if again:
            await self._sync_or_lose()

    async def _sync_or_lose(self) -> None:
        try:
            await self.sync()
        except ImagofsError as exc:
            raise SyncLostError(exc.message, filename=self.filename) from exc

    @abstractmethod
    async def invalidate_cache(self) -> None:
        """Forget what is cached, so that changes by others are seen."""

    @abstractmethod
    async def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        """Set the size in bytes; what a larger size adds follows `preallocate`."""

    @abstractmethod
    async def close(self) -> None:
        """Release the storage. Does not sync. Closing twice is fine."""

    def resolve_relative_path(self, name: str) -> str:
        """The absolute path of `name` as this storage's contents mean it.

        Relative names count from the directory of this storage's file.

        Raises:
            UnsupportedError: The name is relative and the storage has no file name.
        """
        if os.path.isabs(name):
            return name
        if self.filename is None:
            raise UnsupportedError(f"the relative name {name!r} has no directory to start from")
        return os.path.join(os.path.dirname(self.filename), name)

    # --- what everybody calls -----------------------------------------------------------------

    async def readv(self, buffers: Iterable[Buffer] | IoVector, offset: int) -> None:
        """Fill `buffers`, one after the other, with the bytes from `offset` on. Any alignment.

        Bytes past the end read as zero. A read that failed or was cancelled leaves the buffers
        with undefined contents.

        Raises:
            ClosedError: The storage was closed.
            OutOfRangeError: `offset` is negative or beyond what an offset can be.
            StorageError: The system refused, or the storage ends earlier than `size()` says.
            WrongTypeError: They are no writable buffers, or `offset` no int.
        """
        views = flat_views(buffers)
        if any(view.readonly for view in views):
            raise WrongTypeError("a read needs writable buffers", filename=self.filename)
        _check_types(offset, 0)
        if self.closed or not 0 <= offset < MAX_OFFSET:
            self._refuse(offset)
        if self.request_alignment == 1 and self.memory_alignment == 1:
            await self.pure_readv(views, offset)
        else:
            from . import bounce

            await bounce.readv(self, views, offset)

    async def read(self, buffer: Buffer | IoVector | Iterable[Buffer], offset: int) -> None:
        """Fill `buffer`, or several one after the other, as `readv` does, with its errors."""
        await self.readv(flat_views(buffer), offset)

    async def write(self, buffer: Buffer | IoVector | Iterable[Buffer], offset: int) -> None:
        """Write `buffer`, or several one after the other, as `writev` does, with its errors."""
        await self.writev(flat_views(buffer), offset)

    async def read_table(self, length: int, offset: int) -> bytearray:
        """`length` bytes from `offset` on, in line if that needs no waiting: for metadata."""
        data = self.read_table_nowait(length, offset)
        if data is None:
            data = bytearray(length)
            await self.readv([memoryview(data)], offset)
        return data

    def read_table_nowait(self, length: int, offset: int) -> bytearray | None:
        """`length` bytes from `offset` on if that needs no waiting, else None. A plain function."""
        data = bytearray(length)
        if length and self.readv_nowait((memoryview(data),), offset) != length:
            return None
        return data

    async def writev(self, buffers: Iterable[Buffer] | IoVector, offset: int) -> None:
        """Write `buffers`, one after the other, at `offset`. Any alignment; past the end the
        storage grows.

        A write that failed or was cancelled leaves in each sector the old or the new bytes, and
        writes no more when this returns.

        Raises:
            ClosedError: The storage was closed.
            ReadOnlyError: The storage is open read-only.
            OutOfRangeError: `offset` is negative or beyond what an offset can be.
            SyncLostError: An earlier sync failed.
            StorageError: The system refused.
            WrongTypeError: They are no buffers, or `offset` no int.
        """
        views = flat_views(buffers)
        _check_types(offset, 0)
        if self.closed or not self.writable or not 0 <= offset < MAX_OFFSET:
            self._refuse(offset, write=True)
        if self.request_alignment == 1 and self.memory_alignment == 1:
            await self.pure_writev(views, offset)
        else:
            from . import bounce

            await bounce.writev(self, views, offset)

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Make `length` bytes read as zero, by the cheapest way. Errors as for `writev`."""
        await self._write_zeroes(offset, length, allocated=False)

    async def write_allocated_zeroes(self, offset: int, length: int) -> None:
        """Make `length` bytes read as zero, and keep their space. Errors as for `writev`."""
        await self._write_zeroes(offset, length, allocated=True)

    async def discard(self, offset: int, length: int) -> None:
        """Give space back, as far as whole units of `discard_alignment` lie in the range.

        What is discarded has undefined contents afterwards, what is not keeps its own. A range
        past the end is left alone. Errors as for `writev`.
        """
        self._check_range(offset, length)
        unit = self.discard_alignment
        end = min(offset + length, self.size())
        low, high = offset + -offset % unit, end - end % unit
        # No blocker: a read-modify-write of the same block can only put back what was there.
        if low < high:
            await self.pure_discard(low, high - low)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def write_blockers(self) -> WriteBlockers:
        """What keeps read-modify-write cycles apart from other writes (see `blockers.py`).

        Only storages with a `request_alignment` above 1 use it. A driver that writes without
        these methods (in `writev_nowait`, say) must respect it.
        """
        if self._blockers is None:
            self._blockers = WriteBlockers()
        return self._blockers

    async def _write_zeroes(self, offset: int, length: int, *, allocated: bool) -> None:
        self._check_range(offset, length)
        unit, end = self.zero_alignment, offset + length
        low, high = offset + -offset % unit, end - end % unit
        if low >= high:
            await self._write_zero_bytes(offset, end)
            return
        await self._write_zero_bytes(offset, low)
        if self.request_alignment == 1:
            await self.pure_write_zeroes(low, high - low, allocated=allocated)
        else:
            async with self.write_blockers().weak(low, high):
                await self.pure_write_zeroes(low, high - low, allocated=allocated)
        await self._write_zero_bytes(high, end)

    async def _write_zero_bytes(self, start: int, end: int) -> None:
        """Write zeroes as data from `start` up to `end`."""
        while start < end:
            step = min(end - start, _WRITE_STEP)
            await self.writev(zero_views(step), start)
            start += step

    def _check_range(self, offset: int, length: int) -> None:
        """Check the arguments of a change."""
        _check_types(offset, length)
        if (
            self.closed
            or not self.writable
            or offset < 0
            or length < 0
            or offset + length > MAX_OFFSET
        ):
            self._refuse(offset, length, write=True)

    def _refuse(self, offset: int, length: int = 0, *, write: bool = False) -> NoReturn:
        """Raise what is wrong with a request: it was already found wrong."""
        if self.closed:
            raise ClosedError("the storage is closed", filename=self.filename)
        if write and not self.writable:
            raise ReadOnlyError("the storage is open read-only", filename=self.filename)
        what = f"offset {offset}" if not length else f"{length} bytes at offset {offset}"
        raise OutOfRangeError(f"{what}: outside of what a storage can have", filename=self.filename)


def _check_types(offset: int, length: int) -> None:
    if not isinstance(offset, int) or not isinstance(length, int):
        raise WrongTypeError(f"an offset or length is no int: {offset!r}, {length!r}")
