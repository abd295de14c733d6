"""NullStorage: reads as zero and forgets what is written."""

from __future__ import annotations

from collections.abc import Sequence

from ..arguments import check_type
from ..errors import OutOfRangeError
from ..vectors import fill_views, total_length
from .base import MAX_OFFSET, PreallocateMode, Storage

__all__ = ["NullStorage"]


class NullStorage(Storage):
    """A storage of `size` zero bytes. Writes change nothing but the size, when they pass the end.

    Nothing here ever waits or yields.

    Args:
        size: The size in bytes.

    Raises:
        OutOfRangeError: `size` is negative or beyond what a storage can have.
        WrongTypeError: It is no int.
    """

    def __init__(self, size: int = 0) -> None:
        check_type("the size", size, int)
        if not 0 <= size <= MAX_OFFSET:
            raise OutOfRangeError(f"a storage cannot have {size} bytes")
        self.writable = True
        self._size = size

    def size(self) -> int:
        """The size in bytes."""
        return self._size

    def allocated_bytes(self) -> int:
        """Nothing is kept: 0."""
        return 0

    async def extent_at(self, offset: int) -> tuple[bool, int]:
        """One hole. See `Storage.extent_at`."""
        _, end = await super().extent_at(offset)
        return False, end

    def readv_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        """Fill all of `views` with zeroes."""
        if self.closed or offset < 0:
            return 0
        fill_views(views)
        return total_length(views)

    def writev_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        """Take all of `views`."""
        if self.closed or not 0 <= offset < MAX_OFFSET:
            return 0
        return self._grow(offset, total_length(views))

    async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views` with zeroes."""
        fill_views(views)

    async def pure_writev(self, views: Sequence[memoryview], offset: int) -> None:
        """Forget `views`; the storage may grow."""
        self._grow(offset, total_length(views))

    async def pure_write_zeroes(self, offset: int, length: int, *, allocated: bool) -> None:
        """All is zero already, and no space is ever taken; the storage may grow."""
        self._grow(offset, length)

    async def pure_discard(self, offset: int, length: int) -> None:
        """No space is taken."""

    async def flush(self) -> None:
        """Nothing is buffered."""
        if self.closed:
            self._refuse(0)

    async def sync(self) -> None:
        """Nothing is kept."""
        if self.closed:
            self._refuse(0)

    async def invalidate_cache(self) -> None:
        """Nothing is cached."""
        if self.closed:
            self._refuse(0)

    async def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        """Set the size; every mode comes to the same."""
        self._check_range(0, size)
        self._size = size

    async def close(self) -> None:
        """Refuse requests from now on."""
        self.closed = True

    def _grow(self, offset: int, length: int) -> int:
        if length and offset + length > self._size:
            self._size = offset + length
        return length
