"""A pipe through which replies go from the page cache to the kernel, their data never copied by us.

splice(2) puts references to pages of the page cache into the pipe, and the connection to the kernel
takes a message out of it as it takes one out of memory.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .protocol import MAX_WRITE

if TYPE_CHECKING:
    from ..reading import FileRange

__all__ = ["ReplyPipe"]

#: Room for each page of the largest reply, its header, and a page that is cut in two for each of
#: 64 ranges: twice the reply's size. More than 1 MiB would need a right.
_PIPE_BYTES = 2 * MAX_WRITE
#: It could not be filled this often in turn: a file system does not know how.
_PATIENCE = 16


class ReplyPipe:
    """Sends replies to a connection.

    Args:
        connection: The descriptor, an open /dev/fuse.
    """

    def __init__(self, connection: int) -> None:
        self._connection = connection
        self._output = self._input = -1
        self._patience = _PATIENCE

    def send(self, header: bytes, ranges: Iterable[FileRange]) -> bool:
        """Send a reply. A plain function.

        Args:
            header: Of the reply, whose length counts the data.
            ranges: The data.

        Returns:
            False: nothing was sent, and nothing is lost.

        Raises:
            OSError: The kernel refused it, as it does when the request was aborted.
        """
        if not self._patience or (self._input < 0 and not self._open()):
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
        try:
            os.splice(self._output, self._connection, total)
        except OSError:
            self.close()
            raise
        return True

    def close(self) -> None:
        """Close the pipe; the next reply opens another."""
        if self._input >= 0:
            os.close(self._output)
            os.close(self._input)
            self._output = self._input = -1

    def _open(self) -> bool:
        try:
            self._output, self._input = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            fcntl.fcntl(self._input, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:  # the user has too much in pipes
            self._patience = 0
            self.close()
            return False
        return True


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
