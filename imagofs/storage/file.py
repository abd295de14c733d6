"""FileStorage: regular files and block devices.

What the page cache can answer is done in line (`readv_nowait`, `writev_nowait`), everything else in
worker threads. A thread is never abandoned: when a cancelled request returns, its thread has ended.

With `direct=True` aligned requests bypass the page cache. The last bytes of a file whose length is
no multiple of the alignment cannot be written that way; they go through a second, buffered
descriptor. The kernel keeps both views of the file coherent.
"""

from __future__ import annotations

import errno
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self, TypeVar, TypeVarTuple

import trio

from ..arguments import check_type, path_of
from ..errors import (
    ClosedError,
    ImagofsError,
    StorageError,
    SyncLostError,
    UnsupportedError,
)
from ..inflight import InFlight
from ..vectors import fill_views, split_views, total_length
from . import syscalls
from .base import PreallocateMode, StorageCreateOptions, StorageOpenOptions
from .descriptors import adopt_descriptor, check_kind, close_descriptors, open_descriptor
from .inline import InlineStorage
from .locks import ImageLock
from .space import SpaceCalls

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["FileStorage"]

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")

#: Threads that one storage has at work: for reads, and as many again for changes, so that writes
#: that a full page cache holds up leave the reads alone.
_THREADS = 16

_ZERO_STEP = 64 << 20
_DISCARD_UNIT = 4096


class FileStorage(InlineStorage):
    """A regular file or a block device. Made by `open`, `from_fd` and `create`.

    A failed `sync` means that the kernel may have dropped what was written: from then on every
    change and every sync raises `SyncLostError`, while reads go on.
    """

    def __init__(self, fd: int, filename: str | None, *, writable: bool, direct: bool) -> None:
        """Take over `fd`, a descriptor that fits the other arguments; for the classmethods."""
        self._fd = -1  # nothing to close if this fails
        status = os.fstat(fd)
        check_kind(status.st_mode, filename)
        #: Whether it is a block device, whose size is fixed.
        self.is_block_device = stat.S_ISBLK(status.st_mode)
        if writable and self.is_block_device and syscalls.is_read_only_device(fd):
            raise StorageError(
                "cannot open for writing: the device is read-only",
                error=errno.EROFS,
                filename=filename,
            )
        # O_DIRECT waits for the device always.
        super().__init__(
            read_fd=-1 if direct else fd,
            write_fd=fd if writable and not direct else -1,
            size=os.lseek(fd, 0, os.SEEK_END) if self.is_block_device else status.st_size,
        )
        self.filename = filename
        self.writable = writable
        if self.is_block_device:
            self.zero_alignment = self.discard_alignment = syscalls.logical_block_size(fd)
        else:
            self.discard_alignment = _DISCARD_UNIT
        self._buffered_fd = fd
        if direct:
            self.memory_alignment, self.request_alignment = syscalls.direct_alignments(fd)
            mode = os.O_RDWR if writable else os.O_RDONLY
            self._buffered_fd = os.open(f"/proc/self/fd/{fd}", mode | os.O_CLOEXEC)
        self._fd = fd
        self._space = SpaceCalls(self._buffered_fd, self.is_block_device)
        self._sync_lost = False
        self._sync_turn = trio.Lock()
        self._syncs_begun = self._syncs_done = 0
        self._readers = trio.CapacityLimiter(_THREADS)
        self._writers = trio.CapacityLimiter(_THREADS)
        self._in_flight = InFlight()
        self._lock: ImageLock | None = None

    # --- opening ------------------------------------------------------------------------------

    @classmethod
    async def open(
        cls, path: str | os.PathLike[str], options: StorageOpenOptions | None = None
    ) -> Self:
        """Open a file or block device, in a thread.

        Raises:
            StorageError: It does not exist, is neither a file nor a block device, or the system
                refuses it (with `direct`: the file system may not know O_DIRECT).
            WrongTypeError: `path` is no path, or `options` are none.
        """
        return await trio.to_thread.run_sync(cls.open_now, path, options)

    @classmethod
    def open_now(
        cls, path: str | os.PathLike[str], options: StorageOpenOptions | None = None
    ) -> Self:
        """`open` as a plain function, for where nothing else needs to run."""
        options = StorageOpenOptions() if options is None else options
        check_type("the options", options, StorageOpenOptions)
        filename = os.path.abspath(path_of(path))
        fd = open_descriptor(filename, options)
        try:
            return cls._of(fd, filename, options)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def from_fd(
        cls,
        fd: int,
        options: StorageOpenOptions | None = None,
        *,
        filename: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Take over an open descriptor of a file or block device. A plain function.

        On success the storage owns `fd`, makes it close-on-exec and closes it; on an error it stays
        the caller's.

        Args:
            fd: The descriptor.
            options: None: as the descriptor was opened. `direct` sets O_DIRECT if it is not set; a
                descriptor that has it stays direct in any case.
            filename: The file's name, from which relative names in the image count.

        Raises:
            ReadOnlyError: It should be writable, and is not.
            StorageError: It is neither a file nor a block device open for reading.
            WrongTypeError: `fd` is no int.
        """
        check_type("the descriptor", fd, int)
        name = None if filename is None else os.path.abspath(path_of(filename))
        options = adopt_descriptor(fd, options, name)
        storage = cls._of(fd, name, options)
        os.set_inheritable(fd, False)
        return storage

    @classmethod
    def _of(cls, fd: int, filename: str | None, options: StorageOpenOptions) -> Self:
        try:
            return cls(fd, filename, writable=options.writable, direct=options.direct)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError.of("use", error, filename) from error

    @classmethod
    async def create(
        cls, path: str | os.PathLike[str], options: StorageCreateOptions | None = None
    ) -> Self:
        """Create a file and open it as `options.open_options` say.

        With `overwrite` an existing file is emptied first, unless a process that takes image locks
        uses it. A block device exists already and keeps its size, so `overwrite` is needed, and
        its first `size` bytes are treated as `preallocate` says.

        A new file is removed again if this fails or is cancelled.

        Raises:
            LockedError: The file to overwrite is in use.
            OutOfRangeError: The size is negative, or a block device has less.
            StorageError: It exists and `overwrite` is false, or the system refuses.
            WrongTypeError: `path` is no path, `options` are none, or the size is no int.
        """
        from .create import create_file

        filename = os.path.abspath(path_of(path))
        options = StorageCreateOptions() if options is None else options
        check_type("the options", options, StorageCreateOptions)
        check_type("the size", options.size, int)
        check_type("the preallocation", options.preallocate, PreallocateMode)
        return await create_file(cls, filename, options)

    # --- facts --------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The descriptor, which stays this storage's own.

        Raises:
            ClosedError: The storage was closed.
        """
        if self.closed:
            self._refuse(0)
        return self._fd

    def allocated_bytes(self) -> int:
        """Bytes of host space that the file takes; a block device's size."""
        if self.is_block_device:
            return self._size
        try:
            return os.fstat(self._fd).st_blocks * 512
        except OSError as error:
            if self.closed:
                self._refuse(0)
            raise self._error("stat", error) from error

    async def extent_at(self, offset: int) -> tuple[bool, int]:
        """What the file system says; all is data where it cannot tell. See `Storage.extent_at`."""
        _, end = await super().extent_at(offset)
        try:
            return await self._in_thread(
                self._readers, syscalls.extent_at, self._buffered_fd, offset, end
            )
        except OSError as error:
            raise self._error("look for holes", error) from error

    # --- the slow path ------------------------------------------------------------------------

    async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views` in a thread. See `Storage.pure_readv`.

        Raises:
            StorageError: The system refused, or the file has become shorter than `size()`.
        """
        wanted = min(total_length(views), self._size - offset)
        done = 0
        if wanted > 0:
            alignment = self.request_alignment
            try:
                done = await self._in_thread(
                    self._readers, syscalls.read_full, self._fd, views, offset, wanted, alignment
                )
            except OSError as error:
                raise self._error("read", error) from error
            # Asked again: the storage may have been resized meanwhile.
            inside = max(0, self._size - offset)
            if done < min(wanted, inside):
                raise StorageError(
                    f"ends early: it has {self._true_size()} bytes now, and had {self._size}",
                    filename=self.filename,
                )
            done = min(done, inside)
        fill_views(split_views([*views], done)[1])

    async def pure_writev(self, views: Sequence[memoryview], offset: int) -> None:
        """Write `views` in a thread. See `Storage.pure_writev`."""
        self._check_sync()
        end = offset + total_length(views)
        if end == offset:
            return
        try:
            await self._in_thread(self._writers, self._write, views, offset, end)
        except OSError as error:
            self._size_after_failure()
            raise self._error("write", error) from error
        if end > self._size:
            self._size = end

    def _write(self, views: Sequence[memoryview], offset: int, end: int) -> None:
        """For a thread: write, and what cannot be written directly through the page cache."""
        tail = (end - offset) % self.request_alignment
        if not tail:
            syscalls.write_full(self._fd, views, offset)
            return
        head, rest = split_views([*views], end - offset - tail)
        syscalls.write_full(self._fd, head, offset)
        syscalls.write_full(self._buffered_fd, rest, end - tail)

    async def pure_write_zeroes(self, offset: int, length: int, *, allocated: bool) -> None:
        """Zero the range in a thread: by a hole, by `allocated` extents, or by writing zeroes."""
        self._check_sync()
        end = offset + length
        if self.is_block_device and end > self._size:  # not every call refuses it
            raise StorageError(
                f"cannot write zeroes up to {end}: the device has {self._size} bytes",
                error=errno.ENOSPC,
                filename=self.filename,
            )
        try:
            if not await self._in_thread(
                self._writers, self._space.zero, offset, length, allocated
            ):
                # In steps, so that a cancellation takes effect in between.
                for start in range(offset, end, _ZERO_STEP):
                    step = min(end - start, _ZERO_STEP)
                    await self._in_thread(
                        self._writers, syscalls.write_zero_bytes, self._buffered_fd, start, step
                    )
                    if start + step > self._size:
                        self._size = start + step
        except OSError as error:
            self._size_after_failure()
            raise self._error("write zeroes", error) from error
        if end > self._size:
            self._size = end

    async def pure_discard(self, offset: int, length: int) -> None:
        """Punch the range out, or discard it from the device; nothing where neither is known."""
        self._check_sync()
        try:
            await self._in_thread(self._writers, self._space.discard, offset, length)
        except OSError as error:
            raise self._error("discard", error) from error

    async def flush(self) -> None:
        """Nothing to do: this object keeps no buffers.

        Raises:
            ClosedError: The storage was closed.
        """
        if self.closed:
            self._refuse(0)

    async def sync(self) -> None:
        """Make durable what was written before the call (fdatasync).

        Tasks that wait at the same time share one system call, never one that began before they
        asked. A cancelled sync made no promise.

        Raises:
            ClosedError: The storage was closed.
            StorageError: The system could not; written data may be lost.
            SyncLostError: An earlier sync failed.
        """
        if self.closed:
            self._refuse(0)
        self._check_sync()
        if not self.writable:
            return
        needed = self._syncs_begun + 1
        # One at a time: the kernel tells an error to one caller only, and the others' success
        # would be a lie.
        async with self._sync_turn:
            self._check_sync()
            if self._syncs_done >= needed:
                return
            self._syncs_begun = number = self._syncs_begun + 1
            try:
                await self._in_thread(self._writers, self._fdatasync)
            except OSError as error:
                raise self._error("sync", error) from error
            self._syncs_done = number
            self._note_sync()

    def _fdatasync(self) -> None:
        """For a thread."""
        try:
            os.fdatasync(self._fd)
        except OSError:
            self._sync_lost = True
            self._write_fd = -1
            raise

    async def sync_around(self, writes: Sequence[tuple[int, Buffer]], *, again: bool) -> None:
        """In one go in a thread. See `Storage.sync_around`."""
        if self.closed or not self.writable or self.request_alignment > 1:
            await super().sync_around(writes, again=again)
            return
        async with self._sync_turn:
            self._check_sync()
            self._syncs_begun = number = self._syncs_begun + 1
            try:
                await self._in_thread(self._writers, self._sync_and_write, writes, again)
            except OSError as error:
                self._size_after_failure()
                if self._sync_lost:
                    message = self._error("sync", error).message
                    raise SyncLostError(message, filename=self.filename) from error
                self._syncs_done = number
                raise self._error("write", error) from error
            self._syncs_done = number
            self._note_sync()
            for offset, data in writes:
                self._size = max(self._size, offset + memoryview(data).nbytes)

    def _sync_and_write(self, writes: Sequence[tuple[int, Buffer]], again: bool) -> None:
        """For a thread."""
        self._fdatasync()
        for offset, data in writes:
            syscalls.write_full(self._fd, [memoryview(data)], offset)
        if again:
            self._fdatasync()

    async def invalidate_cache(self) -> None:
        """Let the kernel drop the file's clean pages, and ask for its size anew."""
        if self.closed:
            self._refuse(0)
        try:
            self._size = await self._in_thread(self._readers, self._drop_pages)
        except OSError as error:
            raise self._error("drop the cache", error) from error

    def _drop_pages(self) -> int:
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return self._true_size()

    async def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        """Set the length of a file. New space reads as zero in every mode.

        Nothing else may write past the smaller of both sizes meanwhile. If growing fails or is
        cancelled, the old size is set again.

        Raises:
            OutOfRangeError: `size` is not one that a file can have.
            UnsupportedError: A block device has one size.
            StorageError: The system refused.
        """
        self._check_range(0, size)
        self._check_sync()
        if self.is_block_device:
            if size != self._size:
                raise UnsupportedError(
                    f"a block device of {self._size} bytes cannot be resized to {size}",
                    filename=self.filename,
                )
            return
        old_size = self._size
        if size < old_size:
            self._size = size  # at once, so that no read misses what is being cut off
        try:
            if preallocate is PreallocateMode.WRITE_DATA and size > old_size:
                await self._write_zero_bytes(old_size, size)
            else:
                full = preallocate is PreallocateMode.FULL_ALLOCATE
                await self._in_thread(self._writers, self._set_length, old_size, size, full)
        except BaseException as error:
            if size > old_size:
                self._set_length_back(old_size)
            self._size = self._true_size()
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise self._error("resize", error) from error
            raise
        self._size = size

    def _set_length(self, old_size: int, size: int, full: bool) -> None:
        """For a thread: set the length; `full` reserves what is new."""
        if full and size > old_size:
            # Where the file system cannot, the C library writes to each block instead.
            os.posix_fallocate(self._buffered_fd, old_size, size - old_size)
        else:
            os.ftruncate(self._fd, size)

    def _set_length_back(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
        except OSError:
            pass  # what made the resize fail is worth more to know

    # --- locks and the end --------------------------------------------------------------------

    def lock(self, writable: bool) -> None:
        """Take qemu's locks on the image file, so that no other process writes under this one.

        A plain function that does not wait. Asked again, it changes the kind. The locks go with
        `unlock`, or when the storage is closed.

        Args:
            writable: Hold it for writing, against everybody else; otherwise only against writers.

        Raises:
            ClosedError: The storage was closed.
            LockedError: Another process holds the file in a way that excludes this one.
            UnsupportedError: The file system has no such locks.
        """
        if self.closed:
            self._refuse(0)
        if self._lock is None:
            self._lock = ImageLock(self._fd, self.filename)
        self._lock.acquire(writable)

    def unlock(self) -> None:
        """Give the locks back that `lock` took. Does nothing where there are none."""
        if self._lock is not None and not self.closed:
            self._lock.release()

    async def close(self) -> None:
        """Close the descriptors once the requests in flight have ended. Does not sync.

        A cancellation does not keep the file open: it takes effect afterwards.

        Raises:
            StorageError: The system reported an error; the storage is closed all the same.
        """
        if self.closed:
            return
        self.closed = True
        self._close_inline()
        with trio.CancelScope(shield=True):
            await self._in_flight.ended()
            try:
                await trio.to_thread.run_sync(close_descriptors, *self._take_fds())
            except OSError as error:
                raise StorageError.of("close", error, self.filename) from error

    def __del__(self) -> None:
        if self._fd < 0:
            return
        self._close_inline()
        close_descriptors(*self._take_fds())
        text = f"{self.filename}: was not closed"
        warnings.warn(text, ResourceWarning, stacklevel=1, source=self)

    def _take_fds(self) -> set[int]:
        """The descriptors, which the caller closes."""
        fds = {self._fd, self._buffered_fd}
        self._fd = self._buffered_fd = -1
        return fds

    # --- helpers ------------------------------------------------------------------------------

    async def _in_thread(
        self,
        limiter: trio.CapacityLimiter,
        function: Callable[[*_Arguments], _Result],
        *arguments: *_Arguments,
    ) -> _Result:
        """Run `function` in a thread to its end; a cancellation takes effect before or after."""
        with self._in_flight:
            return await trio.to_thread.run_sync(function, *arguments, limiter=limiter)

    def _true_size(self) -> int:
        if self.is_block_device:
            return os.lseek(self._fd, 0, os.SEEK_END)
        return os.fstat(self._fd).st_size

    def _size_after_failure(self) -> None:
        """A failed write may have made the file longer."""
        if not self.closed:
            self._size = max(self._size, self._true_size())

    def _check_sync(self) -> None:
        if self._sync_lost:
            raise SyncLostError(
                "an earlier sync failed, so written data may be lost; reopen it to write again",
                filename=self.filename,
            )

    def _error(self, action: str, error: OSError) -> ImagofsError:
        if self.closed:
            return ClosedError("the storage was closed meanwhile", filename=self.filename)
        return StorageError.of(action, error, self.filename)
