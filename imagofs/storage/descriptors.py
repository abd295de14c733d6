"""Descriptors of what can be a storage: regular files and block devices, nothing else."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from ..errors import ReadOnlyError, StorageError
from .base import StorageOpenOptions

__all__ = ["adopt_descriptor", "check_kind", "close_descriptors", "open_descriptor"]

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
}


def check_kind(mode: int, filename: str | None) -> None:
    """Refuse what is neither a regular file nor a block device, by its `st_mode`.

    Raises:
        StorageError: It is something else; the message says what.
    """
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return
    kind = _KINDS.get(stat.S_IFMT(mode), "of an unknown kind")
    number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise StorageError(
        f"is {kind}, and neither a regular file nor a block device", error=number, filename=filename
    )


def open_descriptor(filename: str, options: StorageOpenOptions) -> int:
    """Open `filename` close-on-exec, without ever waiting for another process.

    The caller looks with `check_kind` at what it got.

    Raises:
        StorageError: The system refuses it, or it is neither a file nor a block device.
    """
    flags = os.O_RDWR if options.writable else os.O_RDONLY
    action = "open for writing" if options.writable else "open"
    if options.direct:
        flags |= os.O_DIRECT
        action += " with direct=True"
    try:
        # Opening a device or a FIFO can have effects by itself: look before. O_NONBLOCK keeps a
        # FIFO that came in between from hanging.
        check_kind(os.stat(filename).st_mode, filename)
        fd = os.open(filename, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        os.set_blocking(fd, True)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError.of(action, error, filename) from error
    except ValueError as error:  # a NUL in the name
        raise StorageError(f"cannot {action}: {error}", filename=filename) from error
    return fd


def adopt_descriptor(
    fd: int, options: StorageOpenOptions | None, filename: str | None
) -> StorageOpenOptions:
    """Make a foreign descriptor fit `options`, and say what it offers.

    O_APPEND goes, since it makes writes ignore their offset; O_DIRECT comes if it is wanted.

    Raises:
        ReadOnlyError: It should be writable, and is not.
        StorageError: It cannot be read, or is no descriptor.
    """
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_ACCMODE == os.O_WRONLY or flags & os.O_PATH:
            raise StorageError("is not open for reading", error=errno.EBADF, filename=filename)
        has_write = flags & os.O_ACCMODE == os.O_RDWR
        if options is None:
            options = StorageOpenOptions(writable=has_write)
        elif options.writable and not has_write:
            raise ReadOnlyError("the descriptor is open read-only", filename=filename)
        direct = options.direct or bool(flags & os.O_DIRECT)
        wanted = (flags | (os.O_DIRECT if direct else 0)) & ~os.O_APPEND
        if wanted != flags:
            fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
    except StorageError:
        raise
    except (OSError, ValueError, OverflowError) as error:  # the latter two for impossible numbers
        reason = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))
        raise StorageError.of("use the descriptor", reason, filename) from error
    return StorageOpenOptions(writable=options.writable, direct=direct)


def close_descriptors(*fds: int) -> None:
    """Close all of `fds`.

    Raises:
        OSError: One of them could not be closed properly; the first such error.
    """
    failure: OSError | None = None
    for fd in fds:
        try:
            os.close(fd)
        except OSError as error:
            failure = failure or error
    if failure is not None:
        raise failure
