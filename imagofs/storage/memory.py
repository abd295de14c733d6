"""MemoryStorage: bytes in this process's memory, kept sparsely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import OutOfRangeError
from ..vectors import fill_view, flat_view, total_length
from .base import MAX_OFFSET, PreallocateMode, Storage

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["MemoryStorage"]

_PAGE = 4096


class MemoryStorage(Storage):
    """A storage in memory. Pages that were never written take no room.

    Nothing here ever waits or yields. After `close`, `to_bytes` still works.

    Args:
        contents: The first contents (copied), or a size in bytes that reads as zero.
        writable: Whether it may be changed.

    Raises:
        OutOfRangeError: The size is negative or beyond what a storage can have.
        WrongTypeError: `contents` is neither an int nor a buffer.
    """

    zero_alignment = 1
    discard_alignment = _PAGE

    def __init__(self, contents: int | Buffer = 0, *, writable: bool = True) -> None:
        self.writable = writable
        self._pages: dict[int, bytearray] = {}
        if isinstance(contents, int):
            if not 0 <= contents <= MAX_OFFSET:
                raise OutOfRangeError(f"a storage cannot have {contents} bytes")
            self._size = contents
        else:
            view = flat_view(contents)
            self._size = view.nbytes
            self._write([view], 0)

    def to_bytes(self) -> bytes:
        """A copy of everything."""
        contents = bytearray(self._size)
        self._read([memoryview(contents)], 0)
        return bytes(contents)

    def size(self) -> int:
        """The size in bytes."""
        return self._size

    def allocated_bytes(self) -> int:
        """Bytes of the pages that exist."""
        return len(self._pages) * _PAGE

    async def extent_at(self, offset: int) -> tuple[bool, int]:
        """Pages that exist are data. See `Storage.extent_at`."""
        _, end = await super().extent_at(offset)
        number = offset // _PAGE
        is_data = number in self._pages
        if is_data:
            while number in self._pages:
                number += 1
        else:
            behind = [page for page in self._pages if page > number]
            number = min(behind, default=-(-end // _PAGE))
        return is_data, min(number * _PAGE, end)

    def readv_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        """Fill all of `views`."""
        return 0 if self.closed or offset < 0 else self._read(views, offset)

    def writev_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        """Write all of `views`."""
        if self.closed or not self.writable or not 0 <= offset < MAX_OFFSET:
            return 0
        return self._write(views, offset)

    async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views`."""
        self._read(views, offset)

    async def pure_writev(self, views: Sequence[memoryview], offset: int) -> None:
        """Write `views`; the storage may grow."""
        self._write(views, offset)

    async def pure_write_zeroes(self, offset: int, length: int, *, allocated: bool) -> None:
        """Drop whole pages (unless `allocated`), and fill parts of pages; the storage may grow."""
        for number, start, stop in _parts(offset, length):
            if allocated or stop - start < _PAGE:
                page = self._pages.get(number)
                if page is not None:
                    fill_view(memoryview(page)[start:stop])
                elif allocated:
                    self._pages[number] = bytearray(_PAGE)
            else:
                self._pages.pop(number, None)
        self._size = max(self._size, offset + length)

    async def pure_discard(self, offset: int, length: int) -> None:
        """Drop the pages."""
        self._drop(offset // _PAGE, (offset + length) // _PAGE)

    async def flush(self) -> None:
        """Nothing is buffered."""
        if self.closed:
            self._refuse(0)

    async def sync(self) -> None:
        """This is as durable as it gets."""
        if self.closed:
            self._refuse(0)

    async def invalidate_cache(self) -> None:
        """Nothing is cached."""
        if self.closed:
            self._refuse(0)

    async def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        """Set the size. FULL_ALLOCATE and WRITE_DATA make the new pages exist."""
        self._check_range(0, size)
        if size < self._size:
            keep = size % _PAGE
            page = self._pages.get(size // _PAGE)
            if page is not None and keep:
                fill_view(memoryview(page)[keep:])  # so that a later growth shows zeroes
            self._drop(-(-size // _PAGE), -(-self._size // _PAGE))
        elif preallocate in (PreallocateMode.FULL_ALLOCATE, PreallocateMode.WRITE_DATA):
            await self.write_allocated_zeroes(self._size, size - self._size)
        self._size = size

    async def close(self) -> None:
        """Refuse requests from now on."""
        self.closed = True

    def _read(self, views: Sequence[memoryview], offset: int) -> int:
        pages = self._pages
        start_offset = offset
        for view in views:
            position = 0
            for number, start, stop in _parts(offset, view.nbytes):
                target = view[position : position + stop - start]
                page = pages.get(number)
                # Pages hold zeroes behind the end of the storage.
                if page is None:
                    fill_view(target)
                else:
                    target[:] = memoryview(page)[start:stop]
                position += stop - start
            offset += view.nbytes
        return offset - start_offset

    def _write(self, views: Sequence[memoryview], offset: int) -> int:
        pages = self._pages
        length = total_length(views)
        for view in views:
            position = 0
            for number, start, stop in _parts(offset, view.nbytes):
                page = pages.get(number)
                if page is None:
                    page = pages[number] = bytearray(_PAGE)
                page[start:stop] = view[position : position + stop - start]
                position += stop - start
            offset += view.nbytes
        if length and offset > self._size:
            self._size = offset
        return length

    def _drop(self, first: int, last: int) -> None:
        """Drop the pages from number `first` up to, not including, `last`."""
        if last - first < len(self._pages):
            for number in range(first, last):
                self._pages.pop(number, None)
        else:
            for number in [number for number in self._pages if first <= number < last]:
                del self._pages[number]


def _parts(offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    """The pieces of a range: the page's number, and where the piece starts and stops in it."""
    end = offset + length
    while offset < end:
        number, start = divmod(offset, _PAGE)
        stop = min(_PAGE, start + end - offset)
        yield number, start, stop
        offset += stop - start
