"""Which parts of a file are in the page cache: mincore(2), on a mapping that nobody touches."""

from __future__ import annotations

import os
from mmap import PAGESIZE

from . import syscalls

__all__ = ["Residency"]

#: Room behind the end of the file, so that one that grows is not mapped anew all the time.
_SPARE_BYTES = 64 << 20


class Residency:
    """Says whether ranges of a file or block device are in the page cache, read and up to date.

    Args:
        fd: A descriptor that is open for reading, and stays open until `close`.
    """

    __slots__ = ("_address", "_end", "_fd", "_mincore", "_pages", "_pages_address")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._address = 0
        self._end = 0  # of what is mapped
        self._pages = bytearray()  # one byte per page of a range
        self._pages_address = 0
        self._mincore = syscalls.mincore()
        if not _tells_the_truth(fd):
            self._fd = -1

    def covers(self, offset: int, length: int) -> bool:
        """Whether all of a range, with `length` above zero, is there. A plain function.

        False as well where the system does not say.
        """
        end = offset + length
        if end > self._end and not self._map(end):
            return False
        start = offset & -PAGESIZE
        pages = (end - start + PAGESIZE - 1) // PAGESIZE
        if pages > len(self._pages):
            self._pages, self._pages_address = syscalls.addressable(pages)
        if self._mincore(self._address + start, end - start, self._pages_address):
            return False
        return self._pages.find(0, 0, pages) < 0

    def _map(self, end: int) -> bool:
        if self._fd < 0:
            return False
        self._unmap()
        size = end + end // 4 + _SPARE_BYTES
        address = syscalls.map_untouchable(self._fd, size)
        if address is None:
            self._fd = -1  # a limit of the address space, say: not asked again
            return False
        self._address, self._end = address, size
        return True

    def _unmap(self) -> None:
        if self._end:
            syscalls.unmap(self._address, self._end)
            self._address = self._end = 0

    def close(self) -> None:
        """Give the mapping back; nothing is covered any more."""
        self._unmap()
        self._fd = -1


def _tells_the_truth(fd: int) -> bool:
    """Whether mincore(2) does: of others' files that one may not write, it says all is there."""
    return os.fstat(fd).st_uid == os.geteuid() or os.access(
        f"/proc/self/fd/{fd}", os.W_OK, effective_ids=True
    )
