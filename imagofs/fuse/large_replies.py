"""Large replies: the kernel copies one in a second thread, while the next is made ready.

To take a reply out of its pipe the kernel copies all of it, which takes longer than everything else
that a large READ needs. So, if another request is there by then, a second thread does it, and both
of two processors work for a reader that would wait for one of them. To look for that request takes
a moment: for who reads alone, in pieces of one READ, it is done now and then only.

What is in a pipe are the pages themselves: who changes them, or gives them to somebody else,
changes the reply. So nothing may be done to a writable image before `settle`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from .reply_pipe import ReplyPipe

if TYPE_CHECKING:
    from ..reading import FileRange
    from .second_thread import SecondThread

__all__ = ["LARGE_READ_BYTES", "LargeReplies"]

#: A READ of at least this much is answered from where its bytes are in memory, if they are.
LARGE_READ_BYTES = 128 << 10
#: After so many replies in turn that nothing followed, as many are sent at once before the next
#: that waits for another request.
_ALONE = 4
_SENT_AT_ONCE = 16


class LargeReplies:
    """Sends replies whose data are in the page cache. All methods are plain functions.

    Args:
        connection: The descriptor, an open /dev/fuse.
        second: The thread.
        failed: See `ReplyPipe`; called in either thread.
    """

    def __init__(
        self, connection: int, second: SecondThread, failed: Callable[[OSError, bytes], None]
    ) -> None:
        self._second = second
        self._pipe = ReplyPipe(connection, failed)
        self._other = ReplyPipe(connection, failed)  # the second thread's
        self._prepared = False  # a reply is in `_pipe`
        self._alone = 0  # replies in turn that nothing followed, or that were sent at once

    @property
    def is_sending(self) -> bool:
        """Whether a reply was handed over and is not sent yet."""
        return self._second.is_busy

    def prepare(self, header: bytes, ranges: Iterable[FileRange]) -> bool:
        """Make a reply ready, or send it. `hand_over` or `finish` must be called before the next.

        Args:
            header: Of the reply, whose length counts the data.
            ranges: The data.

        Returns:
            False: nothing was, or will be, sent.
        """
        if not self._pipe.fill(header, ranges):
            return False
        if self._alone < _ALONE:
            self._prepared = True
        else:
            self._pipe.send()
            self._alone += 1
            if self._alone == _ALONE + _SENT_AT_ONCE:
                self._alone = _ALONE - 1
        return True

    def send_gathered(self, header: bytes, size: int, output: int) -> bool:
        """Send a reply at once.

        Args:
            header: Of the reply, whose length counts the data.
            size: Bytes of data.
            output: Where they come out of a pipe.

        Returns:
            False: it was not, and will not be, sent.
        """
        if not self._pipe.fill_from(header, output, size):
            return False
        self._pipe.send()
        return True

    def hand_over(self) -> None:
        """Let the second thread send what was prepared, if it has sent the last."""
        if not self._prepared:
            return
        self._prepared = False
        self._alone = 0
        # Without another pipe the next reply would be copied.
        if self._other.open() and self._second.give(self._pipe.send):
            self._pipe, self._other = self._other, self._pipe
        else:
            self._pipe.send()

    def finish(self) -> bool:
        """Send what was prepared, and what was handed over if the thread has not begun with it.

        Returns:
            Whether there was anything.
        """
        prepared = self._prepared
        if prepared:
            self._prepared = False
            self._alone += 1
            self._pipe.send()
        return self._second.take_back() or prepared

    def settle(self) -> None:
        """Return when all is sent."""
        self.finish()
        self._second.settle()

    def close(self) -> None:
        """Close the pipes, once all is sent."""
        self.settle()
        self._pipe.close()
        self._other.close()
