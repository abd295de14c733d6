"""The one hierarchy of errors, and the table that makes each an errno.

Every error carries the values that were wrong. The message is one line, names the file where
there is one, says what is wrong and, where something can be done, what to do.
"""

from __future__ import annotations

import errno
import functools
import os
from typing import Any

__all__ = [
    "ChainError",
    "ClosedError",
    "CorruptImageError",
    "EncryptedImageError",
    "FormatError",
    "GateDeniedError",
    "ImagofsError",
    "LockedError",
    "OutOfRangeError",
    "ReadOnlyError",
    "StorageError",
    "SyncLostError",
    "UnsupportedError",
    "WrongTypeError",
    "errno_of",
    "printable",
]

#: Of a message; a path may have 4096.
_MOST_LETTERS = 6000


class ImagofsError(Exception):
    """Base of everything that imagofs raises on purpose.

    Attributes:
        filename: The file that the error is about, or None.
        message: What is wrong and what to do, without the file's name.
    """

    default_errno = errno.EIO

    def __init__(self, message: str, *, filename: str | os.PathLike[str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.filename: str | None = None if filename is None else os.fspath(filename)

    def __str__(self) -> str:
        # Names come out of images: they may have anything in them, and 64 KiB of it.
        where = "" if self.filename is None else f"{self.filename}: "
        text = printable(where + self.message)
        return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]} ..."


class FormatError(ImagofsError):
    """The file is not an image of the expected format, or its header cannot be right."""

    default_errno = errno.EINVAL


class UnsupportedError(ImagofsError):
    """The image or the request needs something that imagofs, or this format, does not offer."""

    default_errno = errno.EOPNOTSUPP


class EncryptedImageError(UnsupportedError):
    """The image is encrypted; its contents would be shown as ciphertext."""


class CorruptImageError(ImagofsError):
    """A table entry that was met in an open image points where it must not."""

    default_errno = errno.EIO


class ChainError(ImagofsError):
    """The chain of backing files has a loop, is too deep, or a part of it cannot be opened."""

    default_errno = errno.ELOOP


class GateDeniedError(ImagofsError):
    """The gate refused to open a file that an image refers to."""

    default_errno = errno.EACCES


class LockedError(ImagofsError):
    """Another process uses the image in a way that excludes this one."""

    default_errno = errno.EBUSY


class ReadOnlyError(ImagofsError):
    """A change was asked of an image or storage that is open read-only."""

    default_errno = errno.EROFS


class ClosedError(ImagofsError, ValueError):
    """The image or storage was closed."""

    default_errno = errno.EBADF


class OutOfRangeError(ImagofsError, ValueError):
    """An offset, length or size that the image, the storage or the format cannot have."""

    default_errno = errno.EINVAL


class WrongTypeError(ImagofsError, TypeError):
    """An argument of a type that cannot be meant: no buffer, no integer, a buffer to be filled that
    is read-only."""

    default_errno = errno.EINVAL


class StorageError(ImagofsError, OSError):
    """A system call on a storage failed. `errno` is the system's."""

    def __init__(
        self,
        message: str,
        *,
        error: int = errno.EIO,
        filename: str | os.PathLike[str] | None = None,
    ) -> None:
        ImagofsError.__init__(self, message, filename=filename)
        self.errno = error

    def __reduce__(self) -> tuple[Any, ...]:
        # OSError's own would leave the file's name behind.
        rebuild = functools.partial(
            type(self), error=self.errno or errno.EIO, filename=self.filename
        )
        return rebuild, (self.message,)

    @classmethod
    def of(cls, action: str, error: OSError, filename: str | None) -> StorageError:
        """The error for a system call that failed while doing `action` ("read", "open" ...)."""
        reason = error.strerror or str(error)
        number = error.errno if error.errno is not None else errno.EIO
        return cls(f"cannot {action}: {reason}", error=number, filename=filename)


class SyncLostError(ImagofsError):
    """An earlier sync failed: written data may be gone, so nothing more is written.

    Reads go on. Reopen the image to write again.
    """

    default_errno = errno.EIO


def errno_of(error: BaseException) -> int:
    """The errno that a file system answers for `error`; EIO for what nobody foresaw."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, ImagofsError):
        return error.default_errno
    return errno.ENOMEM if isinstance(error, MemoryError) else errno.EIO


def printable(text: str) -> str:
    """A name out of an image with everything escaped that a terminal might act on."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
