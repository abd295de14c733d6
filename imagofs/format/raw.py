"""Raw: a file, or a window of one, that is the disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any, Unpack

from ..arguments import check_type
from ..errors import OutOfRangeError, ReadOnlyError, UnsupportedError
from ..gate import ImplicitOpenGate
from ..mapping import EofMapping, RawMapping, ShallowMapping
from ..storage.base import PreallocateMode, Storage, StorageOpenOptions
from ..storage.blockers import RangeLocks
from .base import IN_PLACE, MIXED, DiscardTo, FormatDriver

if TYPE_CHECKING:
    from ..creating import CreateOptions
    from ..opening import Locking, OpenContext

__all__ = ["Raw", "open_raw"]


class Raw(FormatDriver):
    """The bytes of `storage`, or a window of them, as a disk.

    Args:
        storage: Where the bytes are.
        offset: Where the window begins in the storage, in bytes.
        size: Bytes of the window; None: up to the storage's end, however that moves.
        writable: Whether it may be written; None: as the storage.

    Raises:
        OutOfRangeError: The window does not lie in the storage.
        ReadOnlyError: It should be writable, and the storage is not.
        WrongTypeError: No storage, or offset and size are no ints.
    """

    format_name = "raw"

    def __init__(
        self,
        storage: Storage,
        *,
        offset: int = 0,
        size: int | None = None,
        writable: bool | None = None,
    ) -> None:
        super().__init__()
        check_type("the storage", storage, Storage)
        check_type("the offset", offset, int)
        check_type("the size", size, int, NoneType)
        if writable and not storage.writable:
            raise ReadOnlyError("the storage is open read-only", filename=storage.filename)
        end = storage.size()
        if offset < 0 or offset > end or (size is not None and not 0 <= size <= end - offset):
            raise OutOfRangeError(
                f"a window of {size} bytes at {offset} does not lie in its {end} bytes",
                filename=storage.filename,
            )
        self._storage = storage
        #: Where the disk begins in the storage, in bytes.
        self.offset = offset
        self._size = size
        self._locks = RangeLocks()
        self.writable = storage.writable if writable is None else writable
        self.data_storages = (storage,)
        if offset % storage.zero_alignment == 0:
            self.zero_granularity = storage.zero_alignment
        # An entry has no room for host offsets that are no multiple of 512.
        self.granularity = 1 << 30 if offset % 512 == 0 else 0

    @classmethod
    async def open(
        cls,
        image: str | os.PathLike[str] | Storage,
        *,
        writable: bool = False,
        storage_options: StorageOpenOptions | None = None,
        gate: ImplicitOpenGate | None = None,
        lock: Locking = False,
        offset: int = 0,
        size: int | None = None,
    ) -> Raw:
        """Open a file, or take a storage, as a raw image. The gate is never asked.

        Raises:
            LockedError: Another process uses the file in a way that excludes this.
            OutOfRangeError: The window does not lie in the storage.
            ReadOnlyError: It should be writable, and the storage is not.
            StorageError: The file cannot be opened.
            WrongTypeError: An argument of another type.
        """
        from ..opening import layer_storage

        async with layer_storage(
            image, writable=writable, options=storage_options, gate=gate, lock=lock
        ) as (storage, _):
            return cls(storage, offset=offset, size=size, writable=writable)

    @classmethod
    async def create(
        cls,
        image: str | os.PathLike[str] | Storage,
        size: int,
        **options: Unpack[CreateOptions],
    ) -> None:
        """Create a raw image, durably. It is not opened.

        Args:
            image: The file to make, or an empty storage, which stays open and the caller's.
            size: The disk's size in bytes, rounded up to a multiple of 512.
            options: `preallocate`, `overwrite` and `mode` of `CreateOptions`.

        Raises:
            As `create_image`.
        """
        from ..creating import create_image

        await create_image(image, "raw", size, **options)

    def size(self) -> int:
        return self._storage.size() - self.offset if self._size is None else self._size

    @property
    def storages(self) -> tuple[Storage, ...]:
        return (self._storage,)

    def entry_at(self, guest_offset: int) -> int:
        if not self.granularity:
            return MIXED
        return guest_offset + self.offset | (IN_PLACE if self.writable else 0)

    async def get_mapping(self, guest_offset: int, max_length: int) -> ShallowMapping:
        length = min(max_length, self.size() - guest_offset)
        if length <= 0:
            return EofMapping()
        return RawMapping(length, self._storage, guest_offset + self.offset, self.writable)

    def can_write_nowait(self, guest_offset: int, length: int) -> bool:
        return self._locks.is_free(guest_offset, guest_offset + length)

    async def writev(self, views: Sequence[memoryview], guest_offset: int) -> None:
        length = sum(view.nbytes for view in views)
        async with self._locks.hold(guest_offset, guest_offset + length):
            await self._storage.writev(views, guest_offset + self.offset)

    async def write_zeroes(self, guest_offset: int, length: int, *, allocate: bool = False) -> None:
        async with self._locks.hold(guest_offset, guest_offset + length):
            if allocate:
                await self._storage.write_allocated_zeroes(guest_offset + self.offset, length)
            else:
                await self._storage.write_zeroes(guest_offset + self.offset, length)

    async def discard(self, guest_offset: int, length: int, to: DiscardTo) -> None:
        if to is DiscardTo.ZERO:
            await self.write_zeroes(guest_offset, length)
        elif to is DiscardTo.ANY:
            async with self._locks.hold(guest_offset, guest_offset + length):
                await self._storage.discard(guest_offset + self.offset, length)
        else:
            raise UnsupportedError("a raw image has no layer below", filename=self.filename)

    async def ensure_data_mapping(
        self, guest_offset: int, length: int, *, overwrite: bool
    ) -> RawMapping:
        return RawMapping(length, self._storage, guest_offset + self.offset, writable=True)

    async def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        if self._size is not None:
            raise UnsupportedError("a window of a file has a fixed size", filename=self.filename)
        mode = PreallocateMode.ZERO if preallocate is PreallocateMode.NONE else preallocate
        await self._storage.resize(size + self.offset, mode)

    async def flush(self) -> None:
        await self._storage.flush()

    async def sync(self) -> None:
        if self.writable:
            await self._storage.sync()

    async def invalidate_cache(self) -> None:
        await self._storage.invalidate_cache()

    async def close(self) -> None:
        await self._storage.close()

    def details(self) -> dict[str, Any]:
        return {}


async def open_raw(
    storage: Storage, *, context: OpenContext, writable: bool, snapshot: str | None
) -> Raw:
    """Open the storage of a chain's layer as raw."""
    if snapshot is not None:
        raise UnsupportedError("a raw image has no snapshots", filename=storage.filename)
    return Raw(storage, writable=writable)
