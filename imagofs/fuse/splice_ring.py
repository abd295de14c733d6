"""Chains of splice(2) through io_uring(7), which a thread of the kernel works through.

One call begins all splices of a chain, each once the last is done; the first that fails or is short
ends it. That thread may wait for a file, and never needs the interpreter's lock.

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
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..reading import FileRange

__all__ = ["MOST_RANGES", "Done", "SpliceRing"]

# The same on every architecture that Python 3.11 runs on.
_IO_URING_SETUP, _IO_URING_ENTER, _IO_URING_REGISTER = 425, 426, 427

_SETUP_R_DISABLED = 1 << 6
_SETUP_COOP_TASKRUN = 1 << 8  # what is done interrupts nobody for that (Linux 5.19)
_FEAT_SINGLE_MMAP, _FEAT_CQE_SKIP = 1 << 0, 1 << 11

_REGISTER_RESTRICTIONS, _REGISTER_ENABLE_RINGS, _REGISTER_IOWQ_MAX_WORKERS = 11, 12, 19
_RESTRICTION = struct.Struct("=HBB12x")
_RESTRICTION_SQE_OP, _RESTRICTION_SQE_FLAGS_ALLOWED = 1, 2
_MAX_WORKERS = struct.Struct("=II")  # those that work on files, and others; of pipes: others

_OP_SPLICE = 30
_SQE_IO_LINK, _SQE_CQE_SKIP_SUCCESS = 1 << 2, 1 << 6
#: opcode, flags, ioprio, fd (to), off (to), splice_off_in, len, splice_flags, user_data, buf_index,
#: personality, splice_fd_in.
_SQE = struct.Struct("=BBHiQQIIQHHi16x")
_SQE_SIZE = _SQE.size
_NO_OFFSET = (1 << 64) - 1

_SQES_OFFSET = 0x10000000  # IORING_OFF_SQES

#: Ranges of one chain.
MOST_RANGES = 64
_ENTRIES = 128


class Done(NamedTuple):
    """How a chain ended.

    Attributes:
        number: The chain's.
        is_last: Whether its last splice was begun.
        result: What the last one that was begun moved (bytes), or minus its error's number.
    """

    number: int
    is_last: bool
    result: int


class SpliceRing:
    """Begins chains of splices. All methods are plain functions.

    Raises:
        OSError: The system has no such rings, or not for this process.
    """

    def __init__(self) -> None:
        import ctypes

        # `enter` returns at once, and keeps the interpreter's lock: to give it up and take it again
        # would cost more.
        libc = ctypes.PyDLL(None, use_errno=True)
        self._call: Any = libc.syscall
        self._error: Callable[[], int] = ctypes.get_errno
        #: The chains that are not done.
        self.under_way: set[int] = set()
        #: Nothing more is begun: the system has not taken what it was given.
        self.is_broken = False
        self._maps: list[mmap.mmap] = []
        self.fd = -1
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
        # One thread for all chains: to wake another for each takes longer than a chain.
        workers = ctypes.create_string_buffer(_MAX_WORKERS.pack(1, 1))
        self._checked(_IO_URING_REGISTER, self.fd, _REGISTER_IOWQ_MAX_WORKERS, workers, 2)
        self._checked(_IO_URING_REGISTER, self.fd, _REGISTER_ENABLE_RINGS, None, 0)

        entries, completions = parameters[0], parameters[1]
        # struct io_sqring_offsets and io_cqring_offsets: in bytes, here in words of 32 bits.
        self._tail, array = parameters[11] // 4, parameters[16] // 4
        self._head_done, self._tail_done = parameters[20] // 4, parameters[21] // 4
        self._done = parameters[25] // 4
        self._mask, self._mask_done = entries - 1, completions - 1
        size = 4 * max(array + entries, self._done + 4 * completions)
        self._words = memoryview(self._map(size, 0)).cast("I")
        for entry in range(entries):
            self._words[array + entry] = entry
        self._sqes = self._map(entries * _SQE_SIZE, _SQES_OFFSET)

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

    def begin(
        self,
        number: int,
        ranges: Sequence[FileRange],
        pipe: int,
        then: tuple[int, int, int] | None = None,
    ) -> bool:
        """Begin a chain, which `reap` tells the end of.

        Args:
            number: Of none that is under way.
            ranges: What to put into the pipe: one to 64. Their files stay open until it is done,
                and so do the pipe's ends.
            pipe: Where it goes in.
            then: Where it comes out, where to, and how many bytes: after the ranges.

        Returns:
            False: not begun.
        """
        if self.is_broken or not 0 < len(ranges) <= MOST_RANGES:
            return False
        words, sqes, mask = self._words, self._sqes, self._mask
        flags, data = _SQE_IO_LINK | _SQE_CQE_SKIP_SUCCESS, number << 1
        first = tail = words[self._tail]
        left = len(ranges) if then is None else len(ranges) + 1
        for fd, offset, length in ranges:
            left -= 1
            if not left:  # linked to nothing, and says that it is done
                flags, data = 0, data | 1
            splice = pipe, _NO_OFFSET, offset, length, 0, data, 0, 0, fd
            _SQE.pack_into(sqes, (tail & mask) * _SQE_SIZE, _OP_SPLICE, flags, 0, *splice)
            tail += 1
        if then is not None:
            output, to, length = then
            splice = to, _NO_OFFSET, _NO_OFFSET, length, 0, data | 1, 0, 0, output
            _SQE.pack_into(sqes, (tail & mask) * _SQE_SIZE, _OP_SPLICE, 0, 0, *splice)
            tail += 1
        words[self._tail] = tail & 0xFFFFFFFF
        if self._call(_IO_URING_ENTER, self.fd, tail - first, 0, 0, None, 0) != tail - first:
            # Out of memory, say. What it has taken may still go into the pipe: never used again.
            words[self._tail] = first
            self.is_broken = True
            return False
        self.under_way.add(number)
        return True

    def reap(self) -> Done | None:
        """A chain that is done, each once; None: no other is."""
        words = self._words
        while (head := words[self._head_done]) != words[self._tail_done]:
            place = self._done + 4 * (head & self._mask_done)
            data, result = words[place], words[place + 2]
            words[self._head_done] = head + 1 & 0xFFFFFFFF
            if (number := data >> 1) in self.under_way:
                self.under_way.remove(number)
                return Done(number, bool(data & 1), result - (result >> 31 << 32))
            # What was taken of a chain that was not begun.
        return None

    def close(self) -> None:
        """Close the ring. Nothing is under way."""
        if self._maps:
            self._words.release()
            for mapped in self._maps:
                mapped.close()
            self._maps.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
