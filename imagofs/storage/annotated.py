"""AnnotatedStorage: another storage with a tag, which the mappings of an image carry through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..arguments import check_type
from .base import PreallocateMode, Storage
from .blockers import WriteBlockers

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..vectors import IoVector

__all__ = ["AnnotatedStorage"]


class AnnotatedStorage(Storage):
    """`inner` with a `tag` beside it; in every other way it behaves as `inner` does.

    `RawMapping.storage` of an image that was opened on it is this object, so that its user finds
    the tag there: which file it is, which device it stands for, and so on.

    Args:
        inner: The storage that does the work. Closing this closes it.
        tag: Anything.

    Raises:
        WrongTypeError: `inner` is no storage.
    """

    def __init__(self, inner: Storage, tag: Any) -> None:
        check_type("the inner storage", inner, Storage)
        self.inner = inner
        self.tag = tag
        self.memory_alignment = inner.memory_alignment
        self.request_alignment = inner.request_alignment
        self.zero_alignment = inner.zero_alignment
        self.discard_alignment = inner.discard_alignment
        self.writable = inner.writable
        self.filename = inner.filename
        self.closed = inner.closed

    def __repr__(self) -> str:
        return f"AnnotatedStorage({self.inner!r}, {self.tag!r})"

    def size(self) -> int:
        """See `Storage.size`."""
        return self.inner.size()

    def allocated_bytes(self) -> int:
        """See `Storage.allocated_bytes`."""
        return self.inner.allocated_bytes()

    def readv_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        """See `Storage.readv_nowait`."""
        return self.inner.readv_nowait(views, offset)

    def writev_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        """See `Storage.writev_nowait`."""
        return self.inner.writev_nowait(views, offset)

    # The public methods are passed on as well: unaligned writes through both objects then wait for
    # each other.

    def write_blockers(self) -> WriteBlockers:
        """See `Storage.write_blockers`."""
        return self.inner.write_blockers()

    async def readv(self, buffers: Iterable[Buffer] | IoVector, offset: int) -> None:
        """See `Storage.readv`."""
        await self.inner.readv(buffers, offset)

    async def writev(self, buffers: Iterable[Buffer] | IoVector, offset: int) -> None:
        """See `Storage.writev`."""
        await self.inner.writev(buffers, offset)

    async def write_zeroes(self, offset: int, length: int) -> None:
        """See `Storage.write_zeroes`."""
        await self.inner.write_zeroes(offset, length)

    async def write_allocated_zeroes(self, offset: int, length: int) -> None:
        """See `Storage.write_allocated_zeroes`."""
        await self.inner.write_allocated_zeroes(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        """See `Storage.discard`."""
        await self.inner.discard(offset, length)

    async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
        """See `Storage.pure_readv`."""
        await self.inner.pure_readv(views, offset)

    async def pure_writev(self, views: Sequence[memoryview], offset: int) -> None:
        """See `Storage.pure_writev`."""
        await self.inner.pure_writev(views, offset)

    async def pure_write_zeroes(self, offset: int, length: int, *, allocated: bool) -> None:
        """See `Storage.pure_write_zeroes`."""
        await self.inner.pure_write_zeroes(offset, length, allocated=allocated)

    async def pure_discard(self, offset: int, length: int) -> None:
        """See `Storage.pure_discard`."""
        await self.inner.pure_discard(offset, length)

    async def flush(self) -> None:
        """See `Storage.flush`."""
        await self.inner.flush()

    async def sync(self) -> None:
        """See `Storage.sync`."""
        await self.inner.sync()

    async def sync_around(self, writes: Sequence[tuple[int, Buffer]], *, again: bool) -> None:
        """See `Storage.sync_around`."""
        await self.inner.sync_around(writes, again=again)

    async def extent_at(self, offset: int) -> tuple[bool, int]:
        """See `Storage.extent_at`."""
        return await self.inner.extent_at(offset)

    async def invalidate_cache(self) -> None:
        """See `Storage.invalidate_cache`."""
        await self.inner.invalidate_cache()

    async def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        """See `Storage.resize`."""
        await self.inner.resize(size, preallocate)

    async def close(self) -> None:
        """Close `inner`."""
        self.closed = True
        await self.inner.close()

    def resolve_relative_path(self, name: str) -> str:
        """See `Storage.resolve_relative_path`."""
        return self.inner.resolve_relative_path(name)
