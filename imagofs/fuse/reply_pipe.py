"""A pipe through which replies go from the page cache to the kernel, their data never copied by us.

splice(2) puts references to pages of the page cache into the pipe, and the connection to the kernel
takes a message out of it as it takes one out of memory.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from .protocol import MAX_WRITE

if TYPE_CHECKING:
    from ..reading import FileRange

__all__ = ["ReplyPipe", "open_pipe"]

#: Room for each page of the largest reply, its header, and a page that is cut in two for each of
#: 64 ranges: twice the reply's size. More than 1 MiB would need a right.
_PIPE_BYTES = 2 * MAX_WRITE
#: It could not be filled this often in turn: a file system does not know how.
_PATIENCE = 16


class ReplyPipe:
    """Sends replies to a connection, one at a time. All methods are plain functions.

    Args:
        connection: The descriptor, an open /dev/fuse.
        failed: Called with why the kernel refused a reply, as it does when the request was aborted,
            and with the reply's header.
    """

    def __init__(self, connection: int, failed: Callable[[OSError, bytes], None]) -> None:
        self._connection = connection
        self._failed = failed
        self._output = self._input = -1
        self._header = b""
        self._length = 0  # bytes of the reply that is in the pipe, its header included
        self._patience = _PATIENCE

    def fill(self, header: bytes, ranges: Iterable[FileRange]) -> bool:
        """Put a reply into the pipe.

        Args:
            header: Of the reply, whose length counts the data.
            ranges: The data.

        Returns:
            Whether it can be sent; if not, nothing is in the pipe.
        """
        if not self.open():
            return False
        try:
            total = os.write(self._input, header)
            for fd, offset, length in ranges:
                done = os.splice(fd, self._input, length, offset)
                if done < length:
                    _fill(self._input, fd, offset + done, length - done)
                total += length
        except OSError:
            self._patience -= 1
            self.close()  # with what is in it
            return False
        self._patience = _PATIENCE
        self._header, self._length = header, total
        return True

    def fill_from(self, header: bytes, output: int, size: int) -> bool:
        """Put a reply into the pipe whose data are in another one.

        Args:
            header: Of the reply, whose length counts the data.
            output: Where the data come out of the other pipe.
            size: Their length in bytes.

        Returns:
            Whether it can be sent; if not, nothing is in the pipe.
        """
        if not self.open():
            return False
        try:
            self._length = os.write(self._input, header) + os.splice(output, self._input, size)
        except OSError:
            self._length = 0
        if self._length != len(header) + size:
            self.close()
            return False
        self._header = header
        return True

    def send(self) -> None:
        """Send the reply that is in the pipe."""
        try:
            os.splice(self._output, self._connection, self._length)
        except OSError as error:
            self.close()
            self._failed(error, self._header)

    def close(self) -> None:
        """Close the pipe; the next reply opens another."""
        if self._input >= 0:
            os.close(self._output)
            os.close(self._input)
            self._output = self._input = -1

    def open(self) -> bool:
        """Open the pipe if it is not, and if that may be of use."""
        if self._input >= 0 or not self._patience:
            return self._patience > 0
        try:
            ends = open_pipe()
        except OSError:
            return False
        if ends is None:
            self._patience = 0
            return False
        self._output, self._input = ends
        return True


def open_pipe() -> tuple[int, int] | None:
    """A pipe with room for any reply: where it comes out, and where it goes in.

    Returns:
        Its ends, neither of which ever blocks; None if the user has too much in pipes.

    Raises:
        OSError: There are too many descriptors.
    """
    ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError:
        for end in ends:
            os.close(end)
        return None
    return ends


def _fill(pipe: int, fd: int, offset: int, length: int) -> None:
    """Put the rest of a range into the pipe.

    Raises:
        OSError: It has no room, or the file ends before.
    """
    while length:
        done = os.splice(fd, pipe, length, offset)
        if not done:
            raise OSError(errno.EIO, "the file ends before")
        offset += done
        length -= done
