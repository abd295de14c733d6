"""Creating files for `FileStorage.create`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

import trio

from ..errors import OutOfRangeError, StorageError, UnsupportedError
from .base import MAX_OFFSET, PreallocateMode, StorageCreateOptions, StorageOpenOptions

if TYPE_CHECKING:
    from .file import FileStorage

__all__ = ["create_file"]

_File = TypeVar("_File", bound="FileStorage")


async def create_file(kind: type[_File], filename: str, options: StorageCreateOptions) -> _File:
    """`FileStorage.create` for the class `kind` and an absolute name."""
    if not 0 <= options.size < MAX_OFFSET:
        raise OutOfRangeError(f"a file cannot have {options.size} bytes", filename=filename)
    storage, is_new = await trio.to_thread.run_sync(_make, kind, filename, options)
    try:
        try:
            await _fill(storage, options)
            if options.open_options == StorageOpenOptions(writable=True):
                return storage
        except BaseException:
            await storage.close()
            raise
        await storage.close()
        return await kind.open(filename, options.open_options)
    except BaseException:
        if is_new:
            try:
                os.unlink(filename)
            except OSError:
                pass  # gone, or no longer ours to remove
        raise


def _make(kind: type[_File], filename: str, options: StorageCreateOptions) -> tuple[_File, bool]:
    """Make the file, or open what is to be overwritten; and whether it is new."""
    writable = StorageOpenOptions(writable=True)
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(filename, flags, options.mode)
    except FileExistsError as error:
        if not options.overwrite:
            raise StorageError.of("create", error, filename) from error
        # What is a FIFO, a directory and so on is refused there.
        return kind.open_now(filename, writable), False
    except (OSError, ValueError) as error:
        reason = error if isinstance(error, OSError) else OSError(0, str(error))
        raise StorageError.of("create", reason, filename) from error
    try:
        return kind.from_fd(fd, writable, filename=filename), True
    except BaseException:
        os.close(fd)
        raise


async def _fill(storage: FileStorage, options: StorageCreateOptions) -> None:
    """Bring the file to its size and contents."""
    if not storage.size():
        await storage.resize(options.size, options.preallocate)
        return
    try:
        storage.lock(writable=True)
    except UnsupportedError:
        pass  # then there is nobody who could hold it
    try:
        if not storage.is_block_device:
            await storage.resize(0)
            await storage.resize(options.size, options.preallocate)
        elif options.size > storage.size():
            raise OutOfRangeError(
                f"the device has {storage.size()} bytes, {options.size} are needed",
                filename=storage.filename,
            )
        elif options.preallocate in (PreallocateMode.ZERO, PreallocateMode.FORMAT_ALLOCATE):
            await storage.write_zeroes(0, options.size)
        elif options.preallocate is not PreallocateMode.NONE:
            await storage.write_allocated_zeroes(0, options.size)
    finally:
        storage.unlock()
