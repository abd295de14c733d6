"""Opening a VMDK: from a descriptor, or a sparse extent, to the driver.

Nothing is opened here but through an `Opener`: relative names, the gate and loops are its business.
"""

from __future__ import annotations

import os
from types import NoneType
from typing import TYPE_CHECKING, Protocol

import trio

from ...arguments import check_type
from ...caching import MetadataCache
from ...errors import ChainError, FormatError, ImagofsError, UnsupportedError
from ...gate import ImplicitOpenGate
from ...inflating import InflatedCache
from ...opening import FROM_HEADER, FromHeader, Locking, OpenContext, layer_storage
from ...storage.base import Storage, StorageOpenOptions
from ..base import close_all
from .descriptor import (
    MAX_DESCRIPTOR_BYTES,
    NO_PARENT,
    SECTOR,
    Access,
    Descriptor,
    ExtentLine,
    ExtentType,
    looks_like_descriptor,
    parse_descriptor,
)
from .driver import Vmdk
from .extents import Extent, FlatExtent, NoAccessExtent, ZeroExtent
from .grains import SparseExtent, read_sparse_header
from .sparse import SparseHeader, looks_like_sparse

if TYPE_CHECKING:
    from ...access import FormatAccess

__all__ = ["Opener", "open_path", "open_vmdk", "open_vmdk_layer"]

_FIRST_BYTES = 4096


class Opener(Protocol):
    """Opens what a descriptor refers to, if it may be opened."""

    async def open_extent(self, name: str, /, *, writable: bool) -> Storage:
        """Open an extent's file, named as in the descriptor."""
        ...

    async def open_backing(self, name: str, format_name: str | None, /) -> FormatAccess | None:
        """Open the parent, named as in the descriptor; None: go without it."""
        ...


async def open_vmdk_layer(
    storage: Storage, *, context: OpenContext, writable: bool, snapshot: str | None = None
) -> Vmdk:
    """Open `storage` as a layer of a chain; `open_vmdk` says the rest.

    Raises:
        UnsupportedError: A snapshot is asked for: a VMDK has none inside.
    """
    if snapshot is not None:
        raise UnsupportedError("a VMDK has no internal snapshots", filename=storage.filename)
    return await open_vmdk(
        storage,
        opener=context,
        writable=writable,
        cache=context.cache,
        inflated=context.inflated,
    )


async def open_path(
    image: str | os.PathLike[str] | Storage,
    *,
    writable: bool,
    backing: FormatAccess | FromHeader | None,
    options: StorageOpenOptions | None,
    gate: ImplicitOpenGate | None,
    lock: Locking,
) -> Vmdk:
    """`Vmdk.open`."""
    from ...access import FormatAccess

    check_type("backing", backing, FormatAccess, FromHeader, NoneType)
    async with layer_storage(image, writable=writable, options=options, gate=gate, lock=lock) as (
        storage,
        context,
    ):
        return await open_vmdk(
            storage,
            opener=context,
            writable=writable,
            backing=backing,
            cache=context.cache,
            inflated=context.inflated,
        )


async def open_vmdk(
    storage: Storage,
    *,
    opener: Opener,
    writable: bool = False,
    backing: FormatAccess | FromHeader | None = FROM_HEADER,
    cache: MetadataCache | None = None,
    inflated: InflatedCache | None = None,
) -> Vmdk:
    """Open the VMDK whose descriptor, or sparse extent, is in `storage`.

    If it fails, or is cancelled, everything that was opened is closed again, but not `storage`.

    Args:
        storage: The file. The driver closes it.
        opener: Opens extents and the parent.
        writable: Open for writing; every extent that the descriptor calls RW must be flat.
        backing: The parent: as the descriptor says, none, or this one, whose content ID is not
            checked then.
        cache: Where tables are kept; None: a cache of its own.
        inflated: Where inflated grains are kept; None: a cache of its own.

    Raises:
        FormatError: Not a VMDK, truncated, or with fields that cannot be right.
        UnsupportedError: It needs something that is not supported; so for encryption.
        ChainError: An extent or the parent cannot be opened, or the parent was changed since.
        GateDeniedError: The gate refuses a file.
        StorageError: A storage cannot be read.
    """
    name = storage.filename
    cache = cache or MetadataCache()
    header, descriptor, descriptor_offset = await _read_descriptor(storage)
    if writable:
        _check_writing(header, descriptor, name)
    assembly = _Assembly(opener, cache, inflated or InflatedCache(), name)
    parent: FormatAccess | None = None
    try:
        if header is not None:
            assembly.add_sparse(storage, header, None, "")
        else:
            assert descriptor is not None
            await assembly.add_lines(descriptor.extents, writable)
        if isinstance(backing, FromHeader):
            backing = parent = await _open_parent(opener, descriptor, name)
        return Vmdk(
            storage,
            assembly.extents,
            descriptor=descriptor,
            descriptor_offset=descriptor_offset,
            backing=backing,
            writable=writable,
        )
    except BaseException:
        await _close_quietly(assembly.opened)
        if parent is not None:
            with trio.CancelScope(shield=True):
                await parent.close()
        raise


async def _read_descriptor(
    storage: Storage,
) -> tuple[SparseHeader | None, Descriptor | None, int]:
    """What describes the disk: a sparse header, a descriptor, or both; and the latter's offset.

    The header is None where the descriptor alone says which extents there are.
    """
    name = storage.filename
    size = storage.size()
    first = await _read(storage, 0, min(size, _FIRST_BYTES))
    if looks_like_sparse(first):
        header = await read_sparse_header(storage)
        offset = header.descriptor_sector * SECTOR
        length = header.descriptor_sectors * SECTOR if offset else 0
        if offset + length > size:
            raise FormatError(
                f"truncated: the VMDK's descriptor ends at {offset + length}, and the file at "
                f"{size}",
                filename=name,
            )
        text = await _read(storage, offset, length)
        if not text.strip(b"\0"):
            return header, None, 0
        descriptor = parse_descriptor(text, filename=name)
        if header.capacity_sectors == 0 and descriptor.extents:
            # The header is a mere wrapping of the descriptor.
            return None, descriptor, offset
        if len(descriptor.extents) > 1:
            raise UnsupportedError(
                f"a sparse VMDK extent whose own descriptor names {len(descriptor.extents)} "
                f"extents is not supported",
                filename=name,
            )
        return header, descriptor, offset
    if not looks_like_descriptor(first):
        raise FormatError("not a VMDK: neither a descriptor nor a sparse extent", filename=name)
    if size > MAX_DESCRIPTOR_BYTES:
        raise FormatError(
            f"a VMDK descriptor of {size} bytes, more than {MAX_DESCRIPTOR_BYTES}", filename=name
        )
    return None, parse_descriptor(await _read(storage, 0, size), filename=name), 0


async def _read(storage: Storage, offset: int, length: int) -> bytes:
    data = bytearray(length)
    if length:
        await storage.readv([memoryview(data)], offset)
    return bytes(data)


def _check_writing(
    header: SparseHeader | None, descriptor: Descriptor | None, name: str | None
) -> None:
    if header is not None or any(
        line.type is ExtentType.SPARSE and line.access is Access.RW
        for line in (descriptor.extents if descriptor else ())
    ):
        raise UnsupportedError(
            "sparse and stream-optimized VMDKs can only be read: open it read-only", filename=name
        )
    if descriptor is not None and descriptor.change_track_path is not None:
        raise UnsupportedError(
            "the VMDK's changes are tracked in a file that imagofs cannot write "
            f"({descriptor.change_track_path!r:.100}): open it read-only",
            filename=name,
        )


class _Assembly:
    """Puts extents together; knows what it opened for that."""

    def __init__(
        self, opener: Opener, cache: MetadataCache, inflated: InflatedCache, name: str | None
    ) -> None:
        self._opener = opener
        self._cache = cache
        self._inflated = inflated
        self._name = name
        self._storages: dict[str, Storage] = {}
        self._end = 0
        self.extents: list[Extent] = []

    @property
    def opened(self) -> list[Storage]:
        """Every storage that was opened."""
        return list(self._storages.values())

    async def add_lines(self, lines: tuple[ExtentLine, ...], writable: bool) -> None:
        """Open the extents that a descriptor names, each file once."""
        written = {line.name for line in lines if line.access is Access.RW} if writable else set()
        for line in lines:
            length = line.length_sectors * SECTOR
            if line.access is Access.NOACCESS:
                self._add(NoAccessExtent(self._end, length, self._name))
            elif line.type is ExtentType.ZERO:
                self._add(ZeroExtent(self._end, length))
            else:
                assert line.type is not None and line.name is not None
                storage = self._storages.get(line.name)
                if storage is None:
                    storage = await self._opener.open_extent(
                        line.name, writable=line.name in written
                    )
                    self._storages[line.name] = storage
                if line.type is ExtentType.SPARSE:
                    header = await read_sparse_header(storage)
                    self.add_sparse(storage, header, length, line.type.value)
                else:
                    self._add(
                        FlatExtent(
                            self._end,
                            length,
                            storage,
                            line.offset_sectors * SECTOR,
                            writable=writable and line.access is Access.RW,
                            type_name=line.type.value,
                        )
                    )

    def add_sparse(
        self, storage: Storage, header: SparseHeader, length: int | None, type_name: str
    ) -> None:
        """Add a sparse extent; `length` is what the descriptor gives it, in bytes."""
        capacity = header.capacity_sectors * SECTOR
        if length is None:
            length = capacity
        elif (
            not length
            <= capacity
            <= -(-length // SECTOR // header.grain_sectors) * (header.grain_sectors * SECTOR)
        ):
            raise FormatError(
                f"the VMDK extent has {capacity} bytes, and {length} in the descriptor",
                filename=storage.filename,
            )
        if length:
            self._add(
                SparseExtent(
                    self._end,
                    length,
                    storage,
                    header,
                    cache=self._cache,
                    inflated=self._inflated,
                    type_name=type_name,
                )
            )

    def _add(self, extent: Extent) -> None:
        self.extents.append(extent)
        self._end = extent.end


async def _open_parent(
    opener: Opener, descriptor: Descriptor | None, name: str | None
) -> FormatAccess | None:
    """The parent that a delta names, if it is the one that the delta was made from."""
    if descriptor is None:
        return None
    expected, parent_name = descriptor.parent_cid, descriptor.parent_name
    if expected in (None, NO_PARENT):
        if parent_name is not None:
            raise FormatError(
                f"the VMDK descriptor names the parent {parent_name!r:.200}, and no parentCID to "
                f"know it by",
                filename=name,
            )
        return None
    if parent_name is None:
        raise FormatError(
            f"the VMDK is a delta of a parent with the content ID {expected:08x}, and does not "
            f"name it",
            filename=name,
        )
    parent = await opener.open_backing(parent_name, "vmdk")
    if parent is None:
        return None
    driver = parent.driver
    if not isinstance(driver, Vmdk) or driver.cid != expected:
        found = f"{driver.cid:08x}" if isinstance(driver, Vmdk) and driver.cid else "none"
        with trio.CancelScope(shield=True):
            await parent.close()
        raise ChainError(
            f"its parent {parent_name!r:.200} was changed since this delta was made: its content "
            f"ID is {found}, expected is {expected:08x}",
            filename=name,
        )
    return parent


async def _close_quietly(storages: list[Storage]) -> None:
    """Close what an open that failed leaves; what counts is why it failed."""
    try:
        await close_all(storages)
    except ImagofsError:
        pass
