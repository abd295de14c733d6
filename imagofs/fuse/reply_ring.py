"""Replies that the kernel gathers and sends by itself, one at a time: `splice_ring.py`.

One call hands over a whole reply: a splice of each of its ranges into a pipe, and one of the pipe
into the connection. A thread of the kernel works through them while ours answers the next request,
whose data are in a pipe by then if they could be expected (`replies_ahead.py`). That thread may
wait for a file, so nobody has to ask before whether the page cache has what is needed.

The order matters: what a reply refers to must not change until it is sent. So this is for images
that nobody writes to.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING

from .answers import ENDED
from .replies_ahead import RepliesAhead
from .reply_pipe import open_pipe
from .splice_ring import MOST_RANGES, SpliceRing

if TYPE_CHECKING:
    from ..reading import FileRange

__all__ = ["ReplyRing", "open_reply_ring"]

_REPLY = 0  # the chain's number; the others are those of the replies ahead

#: A chain that took longer waited for a file (seconds). Who reads alone would have its pieces read
#: one after the other; tasks read several at a time.
_SLOW = 0.002
#: A reply could not be gathered this often in turn: a file system does not know how, or the system
#: lets the kernel have no thread for it.
_PATIENCE = 16
#: Errors of a send that say that nobody waits for the reply any more.
_GONE = frozenset({errno.ENOENT, *ENDED})


class ReplyRing:
    """Gathers and sends replies, one at a time. All methods are plain functions.

    Args:
        connection: The descriptor, an open /dev/fuse.
        failed: Called in `reap` with the request whose reply was not sent: answer it.
        not_sent: Called in `reap` with why the kernel refused a whole reply, as it does when the
            request was aborted; then `failed` is called too, unless nobody waits any more.

    Raises:
        OSError: The system has no such rings, or not for this process.
    """

    def __init__(
        self,
        connection: int,
        *,
        failed: Callable[[tuple[int, int, int]], None],
        not_sent: Callable[[OSError], None],
    ) -> None:
        self._connection = connection
        self._failed = failed
        self._not_sent = not_sent
        self._splices = SpliceRing()
        #: What is gathered before it is asked for.
        self.ahead = RepliesAhead(self._splices, _REPLY + 1)
        #: What is not done yet: empty, or `reap` has to be called.
        self.under_way = self._splices.under_way
        #: Whether a reply is under way.
        self.is_busy = False
        self._request = (0, 0, 0)
        self._total = 0
        self._begun = 0.0
        self._patience = _PATIENCE
        self._output = self._input = -1

    @property
    def fd(self) -> int:
        """A descriptor that is readable once `reap` finds something."""
        return self._splices.fd

    def is_sending(self, unique: int) -> bool:
        """Whether the reply to a request is under way."""
        return self.is_busy and self._request[0] == unique

    def may_send(self) -> bool:
        """Whether a reply would be begun at once: none is under way, and no file waited for."""
        return not self.is_busy and not (self.under_way and self.ahead.is_late())

    def send(
        self,
        header: bytes,
        ranges: Sequence[FileRange],
        request: tuple[int, int, int],
    ) -> bool:
        """Begin to send a reply. `is_busy` is false, and then true.

        Args:
            header: Of the reply, whose length counts the data.
            ranges: The data. Their files stay open until it is sent.
            request: For `failed`: its number first, its length in bytes last.

        Returns:
            False: nothing was, or will be, sent.
        """
        if self._splices.is_broken or not self._patience or len(ranges) > MOST_RANGES:
            return False
        if self._input < 0 and not self._open_pipe():
            return False
        total = os.write(self._input, header) + request[2]
        send = self._output, self._connection, total
        self._begun = monotonic()
        if not self._splices.begin(_REPLY, ranges, self._input, send):
            return False  # nor will any other
        self._request, self._total = request, total
        self.is_busy = True
        return True

    def reap(self) -> bool:
        """Look what is done.

        Returns:
            Whether anything took so long that the page cache cannot have had all of it.
        """
        slow = False
        while (done := self._splices.reap()) is not None:
            number, is_last, result = done
            begun = self._begun
            if number != _REPLY:
                begun = self.ahead.filled(done)
            else:
                self.is_busy = False
                if result == self._total:
                    self._patience = _PATIENCE
                else:
                    self._fail(-result if is_last and result < 0 else 0)
            slow = slow or monotonic() - begun > _SLOW
        return slow

    def _fail(self, refused: int) -> None:
        """Deal with a reply that was not sent: `refused` says why, 0 if it was not gathered."""
        self._close_pipe()  # with what is in it
        if refused:
            self._not_sent(OSError(refused, os.strerror(refused)))
        if refused not in _GONE:
            # A file that could not be read or ends before, or no memory.
            self._patience -= 1
            self._failed(self._request)

    def _open_pipe(self) -> bool:
        try:
            ends = open_pipe()
        except OSError:
            return False
        if ends is None:  # the user has too much in pipes
            self._patience = 0
            return False
        self._output, self._input = ends
        return True

    def _close_pipe(self) -> None:
        if self._input >= 0:
            os.close(self._output)
            os.close(self._input)
            self._output = self._input = -1

    def close(self) -> None:
        """Close the ring and the pipes. Nothing is under way."""
        self._splices.close()
        self.ahead.close()
        self._close_pipe()


def open_reply_ring(
    connection: int,
    *,
    failed: Callable[[tuple[int, int, int]], None],
    not_sent: Callable[[OSError], None],
) -> ReplyRing | None:
    """A `ReplyRing`, or None where there is none, or where it is of no use."""
    # What the kernel writes is read without a barrier: on x86, loads keep their order.
    if os.uname().machine != "x86_64" or len(os.sched_getaffinity(0)) < 2:
        return None
    try:
        return ReplyRing(connection, failed=failed, not_sent=not_sent)
    except (OSError, ValueError):
        return None
