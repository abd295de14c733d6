"""Replies that the kernel gathers and sends by itself: chains of splice(2) through io_uring(7).

One call hands over a whole reply: a splice of each of its ranges into a pipe, and one of the pipe
into the connection, each begun once the last is done. A thread of the kernel works through them
while ours answers the next request. It may wait for a file, so nobody has to ask before whether the
page cache has what is needed; and it never needs the interpreter's lock.

The order matters: what a reply refers to must not change until it is sent. So this is for images
that nobody writes to.

The ring is bound to splices before anything is done with it: whoever might get hold of the process
can do nothing else with it, and no second one can be made once the daemon has given up its rights.

Numbers and layouts: io_uring_setup(2), io_uring_enter(2), io_uring_register(2), and the kernel's
header linux/io_uring.h.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from .answers import ENDED
from .reply_pipe import open_pipe

if TYPE_CHECKING:
    from ..reading import FileRange

__all__ = ["ReplyRing", "open_reply_ring"]

# The same on every architecture that Python 3.11 runs on.
_IO_URING_SETUP, _IO_URING_ENTER, _IO_URING_REGISTER = 425, 426, 427

_SETUP_R_DISABLED = 1 << 6
_SETUP_COOP_TASKRUN = 1 << 8  # what is done interrupts nobody for that (Linux 5.19)
_FEAT_SINGLE_MMAP, _FEAT_CQE_SKIP = 1 << 0, 1 << 11

_REGISTER_RESTRICTIONS, _REGISTER_ENABLE_RINGS = 11, 12
_RESTRICTION = struct.Struct("=HBB12x")
_RESTRICTION_SQE_OP, _RESTRICTION_SQE_FLAGS_ALLOWED = 1, 2

_OP_SPLICE = 30
_SQE_IO_LINK, _SQE_CQE_SKIP_SUCCESS = 1 << 2, 1 << 6
#: opcode, flags, ioprio, fd (to), off (to), splice_off_in, len, splice_flags, user_data, buf_index,
#: personality, splice_fd_in.
_SQE = struct.Struct("=BBHiQQIIQHHi16x")
_SQE_WORDS = _SQE.size // 8
_OFFSET_WORD, _LENGTH_WORD, _FILE_WORD = 2, 3, 5  # of 64 bits; each holds nothing else that is set
_NO_OFFSET = (1 << 64) - 1

_SQES_OFFSET = 0x10000000  # IORING_OFF_SQES

#: Splices of one reply, the last one included.
_MOST_SPLICES = 65
_ENTRIES = 128
_SEND = _MOST_SPLICES - 1  # the entry that sends

#: A reply that took longer waited for a file (seconds). Who reads alone would have its pieces read
#: one after the other; tasks read several at a time.
_SLOW = 0.002
#: It could not be gathered this often in turn: a file system does not know how, or the system lets
#: the kernel have no thread for it.
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
        import ctypes

        self._failed = failed
        self._not_sent = not_sent
        # `enter` returns at once, and keeps the interpreter's lock: to give it up and take it again
        # would cost more.
        libc = ctypes.PyDLL(None, use_errno=True)
        self._call: Any = libc.syscall
        self._error: Callable[[], int] = ctypes.get_errno
        #: Whether a reply is under way.
        self.is_busy = False
        self._request = (0, 0, 0)
        self._total = 0
        self._begun = 0.0
        self._broken = False
        self._patience = _PATIENCE
        self._maps: list[mmap.mmap] = []
        self._output = self._input = self.fd = -1
        self._connection = connection
        try:
            self._open(ctypes)
        except BaseException:
            self.close()
            raise

    def _open(self, ctypes: Any) -> None:
        parameters = (ctypes.c_uint32 * 30)()
        parameters[2] = _SETUP_R_DISABLED | _SETUP_COOP_TASKRUN
        self.fd = self._checked(_IO_URING_SETUP, _ENTRIES, parameters)
        if not parameters[5] & _FEAT_SINGLE_MMAP or not parameters[5] & _FEAT_CQE_SKIP:
            raise OSError(errno.EOPNOTSUPP, "an old io_uring")
        restrictions = _RESTRICTION.pack(_RESTRICTION_SQE_OP, _OP_SPLICE, 0) + _RESTRICTION.pack(
            _RESTRICTION_SQE_FLAGS_ALLOWED, _SQE_IO_LINK | _SQE_CQE_SKIP_SUCCESS, 0
        )
        self._checked(_IO_URING_REGISTER, self.fd, _REGISTER_RESTRICTIONS, restrictions, 2)
        self._checked(_IO_URING_REGISTER, self.fd, _REGISTER_ENABLE_RINGS, None, 0)

        entries, completions = parameters[0], parameters[1]
        # struct io_sqring_offsets and io_cqring_offsets: in bytes, here in words of 32 bits.
        self._tail, array = parameters[11] // 4, parameters[16] // 4
        self._head_done, self._tail_done = parameters[20] // 4, parameters[21] // 4
        self._done = parameters[25] // 4
        self._mask, self._mask_done = entries - 1, completions - 1
        size = 4 * max(array + entries, self._done + 4 * completions)
        self._words = memoryview(self._map(size, 0)).cast("I")
        self._array = array
        self._sqes = self._map(entries * _SQE.size, _SQES_OFFSET)
        self._sqe_words = memoryview(self._sqes).cast("Q")

    def _map(self, size: int, offset: int) -> mmap.mmap:
        mapped = mmap.mmap(self.fd, size, mmap.MAP_SHARED, offset=offset)
        self._maps.append(mapped)
        return mapped

    def _checked(self, *arguments: Any) -> int:
        result = int(self._call(*arguments))
        if result < 0:
            error = self._error()
            raise OSError(error, os.strerror(error))
        return result

    def _open_pipe(self) -> bool:
        """Open a pipe, and write what is the same in the splices of all replies."""
        try:
            ends = open_pipe()
        except OSError:
            return False
        if ends is None:  # the user has too much in pipes
            self._broken = True
            return False
        self._output, self._input = ends
        flags = _SQE_IO_LINK | _SQE_CQE_SKIP_SUCCESS
        to_pipe = (_OP_SPLICE, flags, 0, self._input, _NO_OFFSET, 0, 0, 0, 0, 0, 0, 0)
        for entry in range(_SEND):
            _SQE.pack_into(self._sqes, entry * _SQE.size, *to_pipe)
        send = (_OP_SPLICE, 0, 0, self._connection, _NO_OFFSET, _NO_OFFSET, 0, 0, 1, 0, 0)
        _SQE.pack_into(self._sqes, _SEND * _SQE.size, *send, self._output)
        return True

    def _close_pipe(self) -> None:
        if self._input >= 0:
            os.close(self._output)
            os.close(self._input)
            self._output = self._input = -1

    def send(
        self, header: bytes, ranges: Sequence[FileRange], request: tuple[int, int, int]
    ) -> bool:
        """Begin to send a reply. `is_busy` is false, and then true.

        Args:
            header: Of the reply, whose length counts the data.
            ranges: The data. Their files stay open until it is sent.
            request: For `failed`.

        Returns:
            False: nothing was, or will be, sent.
        """
        if self._broken or len(ranges) >= _MOST_SPLICES:
            return False
        if self._input < 0 and not self._open_pipe():
            return False
        words, sqes, array, mask = self._words, self._sqe_words, self._array, self._mask
        total = os.write(self._input, header)
        first = tail = words[self._tail]
        entry = word = 0
        for fd, offset, length in ranges:
            sqes[word + _OFFSET_WORD] = offset
            sqes[word + _LENGTH_WORD] = length
            sqes[word + _FILE_WORD] = fd << 32
            words[array + (tail & mask)] = entry
            entry += 1
            tail += 1
            word += _SQE_WORDS
            total += length
        sqes[_SEND * _SQE_WORDS + _LENGTH_WORD] = total
        words[array + (tail & mask)] = _SEND
        words[self._tail] = tail + 1 & 0xFFFFFFFF
        taken = self._call(_IO_URING_ENTER, self.fd, entry + 1, 0, 0, None, 0)
        if taken != entry + 1:
            # Out of memory, say. What it has taken may still go into the pipe: never used again.
            words[self._tail] = first
            self._broken = True
            return False
        self._request, self._total = request, total
        self._begun = monotonic()
        self.is_busy = True
        return True

    def reap(self) -> bool:
        """Look whether the reply under way is sent.

        Returns:
            Whether it took so long that the page cache cannot have had all of it.
        """
        words = self._words
        head = words[self._head_done]
        if head == words[self._tail_done]:
            return False
        place = self._done + 4 * (head & self._mask_done)
        is_send, result = words[place], words[place + 2]
        words[self._head_done] = head + 1 & 0xFFFFFFFF
        if not self.is_busy:  # what was taken of a reply that was not begun
            return False
        self.is_busy = False
        if result == self._total:
            self._patience = _PATIENCE
        else:
            self._fail((1 << 32) - result if is_send and result >> 31 else 0)
        return monotonic() - self._begun > _SLOW

    def _fail(self, refused: int) -> None:
        """Deal with a reply that was not sent: `refused` says why, 0 if it was not gathered."""
        self._close_pipe()  # with what is in it
        if refused:
            self._not_sent(OSError(refused, os.strerror(refused)))
        if refused not in _GONE:
            # A file that could not be read or ends before, or no memory.
            self._patience -= 1
            self._broken = self._broken or not self._patience
            self._failed(self._request)

    def close(self) -> None:
        """Close the ring and the pipe. Nothing is under way."""
        self._close_pipe()
        if self._maps:
            self._words.release()
            if len(self._maps) > 1:
                self._sqe_words.release()
            for mapped in self._maps:
                mapped.close()
            self._maps.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


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
