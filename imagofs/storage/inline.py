"""Reads and writes that are done in line, as far as they need no waiting: the fast path of files.

Reads come from the page cache (RWF_NOWAIT). Writes go into it, which takes no longer than a copy
until the kernel holds writers up because too much is dirty; that is noticed by the time it takes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from os import preadv as _preadv
from os import pwritev as _pwritev
from time import monotonic as _monotonic

from ..vectors import fill_views, split_views, total_length
from . import syscalls
from .base import Storage
from .residency import Residency

__all__ = ["InlineStorage"]

#: Two in-line writes in turn that took longer (seconds) were held up: the kernel lets writers wait
#: because too much is dirty. A single one may only have lost the processor for a moment. The next
#: ones go to threads ...
SLOW_WRITE = 0.01
#: ... for this long (seconds), or as many times as long as the last one took, whichever is more:
#: what is held up in line, and everything else with it, is a small part of the time.
PAUSE = 0.1
_PAUSE_FACTOR = 10
#: Slow writes with no more than this between them (seconds), a pause left out, are in turn.
_IN_TURN = 0.02

#: Large in-line writes (bytes) that were slower than this (seconds per byte), two in turn: the page
#: cache finds no memory, because it must drop something else, or because the host of a virtual
#: machine has to give it some. So many of the next large ones leave nothing in it (Linux 6.14);
#: then one tries again.
LARGE_WRITE = 64 << 10
DEAR_PER_BYTE = 1.25e-9
UNCACHED_WRITES = 128
_RWF_DONTCACHE = 0x80

#: A sync after no more bytes than this makes a file one that is synced often: from then on the
#: device is given what was written each time that it is this much, so that the sync waits for less.
_OFTEN = 64 << 20
_HAND_OVER = 1 << 20
_NEVER = 1 << 63

# Where the file system does not know RWF_NOWAIT, nobody can say whether a read waits. It is done in
# line all the same, which suits a tmpfs, unless several in turn took longer than this.
_SLOW_READ = 0.0005
_SLOW_READ_PER_BYTE = 1 / (1 << 30)
_SLOW_READS = 4


class InlineStorage(Storage):
    """The `*_nowait` methods on a file descriptor, and the size that they keep current.

    Of two writes at a time that do not change the size, one may be missing in what is counted here.
    """

    writes_in_threads = True

    def __init__(self, *, read_fd: int, write_fd: int, size: int) -> None:
        """Set what the fast path may use.

        A descriptor of -1 makes the system refuse; the fast path gives up then, and the slow one
        says why. So nothing needs to be asked on the way.
        """
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._size = size
        self._residency: Residency | None = None
        self._nowait_flags = os.RWF_NOWAIT
        self._read_inline_from = 0.0  # in-line reads and writes pause until these moments
        self._write_inline_from = 0.0
        self._slow_reads = 0
        self._slow_write_end = 0.0  # when the last slow in-line write ended
        self._dear_writes = 0
        self._uncached_writes = 0  # that are still to come
        self._dontcache = _RWF_DONTCACHE  # 0 where it is not known
        self._written = 0  # bytes written in line since the last hand-over or sync
        self._handed_over = 0  # bytes handed over since the last sync
        self._hand_over_at = _NEVER

    def size(self) -> int:
        """The size in bytes, kept current by this storage's own writes and resizes."""
        return self._size

    def readv_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        """Fill what the page cache has. See `Storage.readv_nowait`."""
        flags = self._nowait_flags
        if not flags:
            return self._readv_inline(views, offset)
        try:
            done = _preadv(self._read_fd, views, offset, flags)
        except BlockingIOError:
            return 0
        except (OSError, OverflowError) as error:
            return self._readv_refused(views, offset, error)
        if offset + done < self._size:
            return done
        return self._readv_at_end(views, offset)

    def _readv_refused(self, views: Sequence[memoryview], offset: int, error: Exception) -> int:
        if isinstance(error, OSError):
            if error.errno in syscalls.UNSUPPORTED:
                self._nowait_flags = 0
                return self._readv_inline(views, offset)
            if error.errno == errno.EINVAL and len(views) > syscalls.IOV_MAX and offset >= 0:
                return self.readv_nowait(views[: syscalls.IOV_MAX], offset)
        return 0

    def _readv_inline(self, views: Sequence[memoryview], offset: int) -> int:
        """Read without RWF_NOWAIT, as long as that turns out to be fast."""
        start = _monotonic()
        if start < self._read_inline_from:
            return 0
        try:
            done = _preadv(self._read_fd, views, offset)
        except (OSError, OverflowError):
            return 0
        taken = _monotonic() - start
        if taken > _SLOW_READ or self._slow_reads:
            self._judge_read(taken, done)
        if offset + done < self._size:
            return done
        return self._readv_at_end(views, offset)

    def _judge_read(self, taken: float, length: int) -> None:
        """Pause in-line reads if slow ones (in seconds) pile up."""
        if taken <= _SLOW_READ + length * _SLOW_READ_PER_BYTE:
            self._slow_reads = max(0, self._slow_reads - 1)
            return
        self._slow_reads += 2  # a single one may only have lost the processor for a moment
        if self._slow_reads >= _SLOW_READS:
            self._slow_reads = 0
            self._read_inline_from = _monotonic() + PAUSE

    def _readv_at_end(self, views: Sequence[memoryview], offset: int) -> int:
        """All up to the end is there: fill with zeroes what lies behind it."""
        total = total_length(views)
        inside = max(0, self._size - offset)
        if inside < total:
            fill_views(split_views([*views], inside)[1])
        return total

    def splice_fd(self, offset: int, length: int) -> int:
        """The file, if it has the range. See `Storage.splice_fd`."""
        # Where RWF_NOWAIT is not known, splice(2) may wait for more than pages (NFS: for a server).
        if not self._nowait_flags or offset + length > self._size:
            return -1
        return self._read_fd

    def page_cache_fd(self, offset: int, length: int) -> int:
        """The file, if the page cache has the range. See `Storage.page_cache_fd`."""
        fd = self.splice_fd(offset, length)
        if fd < 0:
            return -1
        if self._residency is None:
            self._residency = Residency(fd)
        return fd if self._residency.covers(offset, length) else -1

    def writev_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        """Write into the page cache, unless that was slow just now. See `Storage.writev_nowait`."""
        start = _monotonic()
        if start < self._write_inline_from:
            return 0
        flags = self._uncached_writes and self._uncached_flags(views)
        try:
            done = _pwritev(self._write_fd, views, offset, flags)
        except (OSError, OverflowError) as error:
            return self._writev_refused(views, offset, flags, error)
        if offset + done > self._size and done:
            self._size = offset + done
        self._written += done
        if self._written >= self._hand_over_at:
            self._hand_over()
        end = _monotonic()
        if done >= LARGE_WRITE:
            self._judge_large_write(done, end - start, flags)
        if end - start > SLOW_WRITE:
            in_turn = start - self._slow_write_end < _IN_TURN
            pause = max(PAUSE, (end - start) * _PAUSE_FACTOR) if in_turn else 0.0
            self._write_inline_from = self._slow_write_end = end + pause
        return done

    def _uncached_flags(self, views: Sequence[memoryview]) -> int:
        return self._dontcache if total_length(views) >= LARGE_WRITE else 0

    def _writev_refused(
        self, views: Sequence[memoryview], offset: int, flags: int, error: Exception
    ) -> int:
        if flags and isinstance(error, OSError) and error.errno in syscalls.UNSUPPORTED:
            self._dontcache = self._uncached_writes = 0
            return self.writev_nowait(views, offset)
        return 0

    def _judge_large_write(self, length: int, taken: float, flags: int) -> None:
        """Decide whether the next large writes are kept in the cache."""
        if flags:
            # Not below zero: another thread may have counted its write between the two look-ups.
            self._uncached_writes = max(self._uncached_writes - 1, 0)
        elif taken <= length * DEAR_PER_BYTE:
            self._dear_writes = 0
        else:
            self._dear_writes += 1
            if self._dear_writes > 1 and self._dontcache:
                self._uncached_writes = UNCACHED_WRITES

    def _hand_over(self) -> None:
        """Let the device begin with what was written. Errors are left to the next sync."""
        syscalls.start_write_out(self._write_fd)
        self._handed_over += self._written
        self._written = 0

    def _close_inline(self) -> None:
        """Give up the fast path."""
        self._read_fd = self._write_fd = -1
        if self._residency is not None:
            self._residency.close()

    def _note_sync(self) -> None:
        """Count a sync that has ended."""
        often = self._handed_over + self._written <= _OFTEN
        self._hand_over_at = _HAND_OVER if often else _NEVER
        self._written = self._handed_over = 0
