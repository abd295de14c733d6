"""Repairs whose writes stay in memory: what would a repair lose, what else is wrong?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...errors import FormatError
from ...storage.base import PreallocateMode, Storage
from ...storage.memory import MemoryStorage
from .check_report import CheckResult, Finding, Kind
from .check_scan import Progress

__all__ = ["check_with_mended_header", "preview_repair"]

_PAGE = 1 << 16


async def preview_repair(storage: Storage) -> CheckResult:
    """What `check_image(storage, repair="all")` would return. Nothing is written to `storage`.

    Raises:
        As `check_image`.
    """
    from .check import check_image

    return await check_image(_Overlay(storage), repair="all")


async def check_with_mended_header(
    storage: Storage, error: FormatError, *, progress: Progress | None = None
) -> CheckResult:
    """Check an image whose header is refused, with those fields put right that a repair mends.

    Args:
        storage: The image file; only read.
        error: Why the header is refused.
        progress: As for `check_image`.

    Raises:
        FormatError: `error`, where the header is beyond repair.
        StorageError: Something cannot be read.
    """
    from .check import examine
    from .repair_entries import Losses
    from .repair_header import mend_header

    overlay = _Overlay(storage)
    header = await mend_header(overlay, error, Losses())
    result = (await examine(overlay, header, progress=progress)).result
    return replace(
        result,
        corruptions=result.corruptions + 1,
        findings=(Finding(Kind.HEADER, error.message), *result.findings),
    )


class _Overlay(Storage):
    """Shows `inner`, and keeps in memory what is written."""

    writable = True

    def __init__(self, inner: Storage) -> None:
        self._inner = inner
        self._size = inner.size()
        self._changed = MemoryStorage(self._size)
        #: Numbers of the pages that are in `_changed`.
        self._pages: set[int] = set()
        self.filename = inner.filename

    def size(self) -> int:
        return self._size

    def allocated_bytes(self) -> int:
        # Less than the size if the file is large in name only: what takes memory goes by it.
        return self._inner.allocated_bytes()

    async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
        for view in views:
            position = 0
            while position < view.nbytes:
                page = (offset + position) // _PAGE
                length = min((page + 1) * _PAGE - offset - position, view.nbytes - position)
                source = self._changed if page in self._pages else self._inner
                await source.readv([view[position : position + length]], offset + position)
                position += length
            offset += view.nbytes

    async def pure_writev(self, views: Sequence[memoryview], offset: int) -> None:
        end = offset + sum(view.nbytes for view in views)
        for page in range(offset // _PAGE, -(-end // _PAGE)):
            if page not in self._pages:
                data = bytearray(_PAGE)
                await self._inner.readv([memoryview(data)], page * _PAGE)
                await self._changed.writev([memoryview(data)], page * _PAGE)
                self._pages.add(page)
        await self._changed.writev(views, offset)
        self._size = max(self._size, end)

    async def pure_write_zeroes(self, offset: int, length: int, *, allocated: bool) -> None:
        zeroes = memoryview(bytes(min(length, _PAGE)))
        for position in range(0, length, _PAGE):
            await self.pure_writev([zeroes[: length - position]], offset + position)

    async def pure_discard(self, offset: int, length: int) -> None:
        """Discarded bytes are undefined; so they may stay."""

    async def flush(self) -> None:
        """Nothing gets anywhere."""

    async def sync(self) -> None:
        """Nothing gets anywhere."""

    async def invalidate_cache(self) -> None:
        """Nothing else changes this."""

    async def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        self._size = size

    async def close(self) -> None:
        """The storage below belongs to somebody else."""
