"""Vmdk: a disk that a descriptor puts together from extents.

Flat extents are read and written in place. Sparse ones, deflated or not, are read-only. A delta
shows its parent wherever it has no grains of its own.

Each VMDK has a content ID, and a delta remembers its parent's: so it is found out when a parent was
changed under its deltas. The descriptor gets a new ID, synced, before the first byte is written.
"""

from __future__ import annotations

import os
import secrets
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

from ...errors import ReadOnlyError, UnsupportedError
from ...gate import ImplicitOpenGate
from ...mapping import (
    EofMapping,
    IndirectMapping,
    RawMapping,
    ShallowMapping,
    SpecialMapping,
    ZeroMapping,
)
from ...opening import FROM_HEADER, FromHeader, Locking
from ...storage.base import PreallocateMode, Storage, StorageOpenOptions
from ...storage.blockers import RangeLocks
from ...vectors import split_views, total_length
from ..base import (
    IN_PLACE,
    INDIRECT,
    MIXED,
    NOT_CACHED,
    SPECIAL,
    ZERO,
    DiscardTo,
    FormatDriver,
    close_all,
)
from .descriptor import NO_PARENT, Descriptor
from .extents import RAW, Extent, ZeroExtent
from .grains import SparseExtent

if TYPE_CHECKING:
    from ...access import FormatAccess

__all__ = ["Vmdk"]

_LARGEST_GRANULE = 1 << 30
#: Where extents do not begin at multiples of this, the granules that they share are MIXED.
_SMALLEST_FLAT_GRANULE = 64 << 10
_SMALLEST_GRANULE = 4 << 10
#: Content ID of a disk that was never written since it was made.
_UNWRITTEN = 0xFFFFFFFE


class _Piece(NamedTuple):
    """A part of a request that lies in one extent."""

    extent: Extent
    guest_offset: int
    length: int


class Vmdk(FormatDriver):
    """An open VMDK, without its parent. `open_vmdk` makes it.

    Args:
        storage: The descriptor's file, or the sparse extent that it is embedded in.
        extents: The disk's parts in order, without gaps.
        descriptor: What the descriptor says; None for a lone extent without one.
        descriptor_offset: Where the descriptor begins in `storage`, in bytes.
        backing: The parent.
        writable: The descriptor may be written, and the extents that say so.
    """

    format_name = "vmdk"

    def __init__(
        self,
        storage: Storage,
        extents: Sequence[Extent],
        *,
        descriptor: Descriptor | None,
        descriptor_offset: int = 0,
        backing: FormatAccess | None = None,
        writable: bool = False,
    ) -> None:
        super().__init__()
        self.writable = writable
        self.backing = backing
        self.extents = tuple(extents)
        self.descriptor = descriptor
        self.cid = descriptor.cid if descriptor else None
        self._storage = storage
        self._size = extents[-1].end if extents else 0
        self._starts = [extent.start for extent in extents]
        used = (extent.storage for extent in extents)
        self.data_storages = tuple(dict.fromkeys(s for s in used if s is not None))
        self._storages = tuple(dict.fromkeys((storage, *self.data_storages)))
        self._codes = [
            self.data_storages.index(extent.storage) | (IN_PLACE if extent.writable else 0)
            if extent.storage is not None
            else 0
            for extent in extents
        ]
        self.granularity = _granularity(extents) if len(self.data_storages) <= 256 else 0
        self._descriptor_offset = descriptor_offset
        self._locks = RangeLocks()
        self._announcing = trio.Lock()
        #: Whether the descriptor has the content ID of what is written now.
        self._announced = descriptor is None or descriptor.cid_field is None

    @classmethod
    async def open(
        cls,
        image: str | os.PathLike[str] | Storage,
        *,
        writable: bool = False,
        backing: FormatAccess | FromHeader | None = FROM_HEADER,
        storage_options: StorageOpenOptions | None = None,
        gate: ImplicitOpenGate | None = None,
        lock: Locking = False,
    ) -> Vmdk:
        """Open a VMDK: a descriptor, or a sparse extent.

        Args:
            image: A path, or an open storage, which the driver owns from then on.
            writable: Open for writing what is flat; UnsupportedError where something is not.
            backing: The parent: the one that the descriptor names, none, or this one, whose
                content ID is not checked.
            storage_options: How files are opened; `writable` of it is not looked at.
            gate: Decides on the extents and the parent; None: refuse with the way to allow them.
            lock: See `open_image`.

        Raises:
            FormatError: Not a VMDK, truncated, or with fields that cannot be right.
            UnsupportedError: It needs something that imagofs does not offer; so for encryption.
            ChainError: An extent or the parent cannot be opened, or the parent was changed.
            GateDeniedError: The gate refuses a file.
            StorageError: The file cannot be opened or read.
        """
        from .open import open_path

        return await open_path(
            image,
            writable=writable,
            backing=backing,
            options=storage_options,
            gate=gate,
            lock=lock,
        )

    # --- facts ----------------------------------------------------------------------------------

    def size(self) -> int:
        return self._size

    @property
    def storages(self) -> tuple[Storage, ...]:
        return self._storages

    @property
    def cluster_size(self) -> int | None:
        """Bytes of a grain of the first sparse extent, None if all are flat."""
        sparse = (extent for extent in self.extents if isinstance(extent, SparseExtent))
        return next((extent.unit_bytes for extent in sparse), None)

    def details(self) -> dict[str, Any]:
        """What `qemu-img info` calls format-specific data."""
        descriptor = self.descriptor
        compressed = any(isinstance(e, SparseExtent) and e.compressed for e in self.extents)
        create_type = "streamOptimized" if compressed else "monolithicSparse"
        details: dict[str, Any] = {
            "create-type": (descriptor and descriptor.create_type) or create_type
        }
        if descriptor is not None:
            if self.cid is not None:
                details["cid"] = self.cid
            parent_cid = descriptor.parent_cid
            details["parent-cid"] = NO_PARENT if parent_cid is None else parent_cid
        details["extents"] = [_extent_details(extent) for extent in self.extents]
        return details

    # --- reading --------------------------------------------------------------------------------

    def entry_at(self, guest_offset: int) -> int:
        number = bisect_right(self._starts, guest_offset) - 1
        kind, host_offset, length = self.extents[number].locate(guest_offset)
        if kind == NOT_CACHED:
            return kind
        left = self.granularity - (guest_offset & self.granularity - 1)
        if length < left and guest_offset + length < self._size:
            return MIXED
        return host_offset | self._codes[number] if kind == RAW else kind

    async def get_mapping(self, guest_offset: int, max_length: int) -> ShallowMapping:
        max_length = min(max_length, self._size - guest_offset)
        if max_length <= 0:
            return EofMapping()
        extent = self._extent_at(guest_offset)
        place = extent.run(guest_offset)
        while place.kind in (NOT_CACHED, MIXED):
            await extent.load(guest_offset)
            place = extent.run(guest_offset)
        length = min(place.length, max_length)
        if place.kind == RAW:
            assert extent.storage is not None
            return RawMapping(length, extent.storage, place.host_offset, extent.writable)
        if place.kind == SPECIAL:
            return SpecialMapping(length, self, guest_offset)
        if place.kind == INDIRECT and self.backing is not None:
            return IndirectMapping(length, self.backing, guest_offset)
        return ZeroMapping(length, explicit=place.kind == ZERO)

    def special_nowait(self, view: memoryview, guest_offset: int) -> bool:
        position = 0
        for extent, offset, length in self._pieces(guest_offset, view.nbytes):
            if not extent.special_nowait(view[position : position + length], offset):
                return False
            position += length
        return True

    async def readv_special(self, views: Sequence[memoryview], guest_offset: int) -> None:
        for view in views:
            position = 0
            for extent, offset, length in self._pieces(guest_offset, view.nbytes):
                await extent.read_special(view[position : position + length], offset)
                position += length
            guest_offset += view.nbytes

    def _extent_at(self, guest_offset: int) -> Extent:
        return self.extents[bisect_right(self._starts, guest_offset) - 1]

    def _pieces(self, guest_offset: int, length: int) -> Iterator[_Piece]:
        """The parts of a range, extent by extent."""
        end = guest_offset + length
        number = bisect_right(self._starts, guest_offset) - 1
        while guest_offset < end:
            extent = self.extents[number]
            stop = min(end, extent.end)
            yield _Piece(extent, guest_offset, stop - guest_offset)
            guest_offset = stop
            number += 1

    # --- writing --------------------------------------------------------------------------------

    def can_write_nowait(self, guest_offset: int, length: int) -> bool:
        return self._announced and self._locks.is_free(guest_offset, guest_offset + length)

    async def writev(self, views: Sequence[memoryview], guest_offset: int) -> None:
        length = total_length(views)
        pieces = self._writable_pieces(guest_offset, length)
        await self._announce_change()
        rest = list(views)
        async with self._locks.hold(guest_offset, guest_offset + length):
            for extent, offset, piece_length in pieces:
                parts, rest = split_views(rest, piece_length)
                storage, host_offset = _place_in_storage(extent, offset)
                await storage.writev(parts, host_offset)

    async def write_zeroes(self, guest_offset: int, length: int, *, allocate: bool = False) -> None:
        pieces = self._writable_pieces(guest_offset, length, zeroes=not allocate)
        if pieces:
            await self._announce_change()
        async with self._locks.hold(guest_offset, guest_offset + length):
            for extent, offset, piece_length in pieces:
                storage, host_offset = _place_in_storage(extent, offset)
                if allocate:
                    await storage.write_allocated_zeroes(host_offset, piece_length)
                else:
                    await storage.write_zeroes(host_offset, piece_length)

    async def discard(self, guest_offset: int, length: int, to: DiscardTo) -> None:
        if to is DiscardTo.ZERO:
            await self.write_zeroes(guest_offset, length)
            return
        if to is DiscardTo.BACKING:
            raise UnsupportedError(
                "a flat VMDK extent cannot show a layer below", filename=self.filename
            )
        pieces = self._writable_pieces(guest_offset, length, zeroes=True)
        if pieces:
            await self._announce_change()
        async with self._locks.hold(guest_offset, guest_offset + length):
            for extent, offset, piece_length in pieces:
                storage, host_offset = _place_in_storage(extent, offset)
                await storage.discard(host_offset, piece_length)

    async def ensure_data_mapping(
        self, guest_offset: int, length: int, *, overwrite: bool
    ) -> RawMapping:
        piece = next(self._pieces(guest_offset, length))
        self._writable_pieces(guest_offset, piece.length)
        await self._announce_change()
        storage, host_offset = _place_in_storage(piece.extent, guest_offset)
        return RawMapping(piece.length, storage, host_offset, writable=True)

    async def resize(self, size: int, preallocate: PreallocateMode = PreallocateMode.NONE) -> None:
        raise UnsupportedError("a VMDK cannot be resized", filename=self.filename)

    def _writable_pieces(
        self, guest_offset: int, length: int, *, zeroes: bool = False
    ) -> list[_Piece]:
        """The parts of a range that is about to be written, before anything is.

        Args:
            guest_offset: Where the range starts.
            length: Its bytes.
            zeroes: What is written may be left out where it reads as zero anyway.

        Raises:
            ReadOnlyError: A part cannot be written.
        """
        if not self.writable:
            raise self._read_only()
        pieces = []
        for piece in self._pieces(guest_offset, length):
            if zeroes and isinstance(piece.extent, ZeroExtent):
                continue
            if not piece.extent.writable:
                raise ReadOnlyError(
                    f"the extent at guest offset {piece.extent.start} cannot be written",
                    filename=self.filename,
                )
            pieces.append(piece)
        return pieces

    async def _announce_change(self) -> None:
        """Give the descriptor a new content ID, once, before the first write.

        A cancelled or failed call leaves the old or the new ID; the next one tries again.
        """
        if self._announced:
            return
        async with self._announcing:
            if not self._announced:
                await self._write_content_id()

    async def _write_content_id(self) -> None:
        assert self.descriptor is not None and self.descriptor.cid_field is not None
        field = self.descriptor.cid_field
        cid = self.cid
        while cid in (self.cid, NO_PARENT, _UNWRITTEN):
            cid = secrets.randbelow(16**field.digits)
        text = f"{cid:0{field.digits}x}".encode()
        await self._storage.writev([memoryview(text)], self._descriptor_offset + field.position)
        await self._storage.sync()
        self.cid = cid
        self._announced = True

    # --- durability -----------------------------------------------------------------------------

    async def flush(self) -> None:
        for storage in self._writable_storages():
            await storage.flush()

    async def sync(self) -> None:
        for storage in self._writable_storages():
            await storage.sync()

    def _writable_storages(self) -> list[Storage]:
        return [storage for storage in self._storages if storage.writable]

    async def invalidate_cache(self) -> None:
        for storage in self._storages:
            await storage.invalidate_cache()
        for extent in self.extents:
            extent.refresh()
        self._changed(0, max(self._size, 1))

    async def close(self) -> None:
        for extent in self.extents:
            extent.forget()
        await close_all(self._storages)


def _granularity(extents: Sequence[Extent]) -> int:
    """The largest power of two such that (nearly) every granule lies in one unit of an extent."""
    sparse = [extent for extent in extents if isinstance(extent, SparseExtent)]
    edges = _LARGEST_GRANULE
    for extent in extents:
        edges |= extent.start
    smallest = _SMALLEST_FLAT_GRANULE
    for extent in sparse:
        edges |= extent.unit_bytes
        smallest = min(smallest, max(extent.unit_bytes, _SMALLEST_GRANULE))
    if sparse:
        # Grains that begin in the middle of granules would make all of them MIXED.
        smallest = _SMALLEST_GRANULE
    return max(edges & -edges, smallest)


def _place_in_storage(extent: Extent, guest_offset: int) -> tuple[Storage, int]:
    """Where a writable extent has its byte at `guest_offset`."""
    assert extent.storage is not None
    return extent.storage, extent.locate(guest_offset).host_offset


def _extent_details(extent: Extent) -> dict[str, Any]:
    details: dict[str, Any] = {
        "virtual-size": extent.end - extent.start,
        "format": extent.type_name,
    }
    if extent.storage is not None:
        details["filename"] = extent.storage.filename
    if isinstance(extent, SparseExtent):
        details["cluster-size"] = extent.unit_bytes
        if extent.compressed:
            details["compressed"] = True
    return details
