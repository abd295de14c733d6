"""Which layer has what, as `qemu-img map` tells it: more than the mapping that reads need.

A mapping says where bytes come from. This says also where host space is kept for what reads as
zero, and where a file has holes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import trio

from .format.qcow2.clusters import COMPRESSED_DATA, DATA, ZEROES
from .format.qcow2.driver import Qcow2
from .format.qcow2.status import cluster_run, is_preallocated
from .format.raw import Raw
from .format.vmdk import Vmdk
from .mapping import EofMapping, RawMapping, SpecialMapping, ZeroMapping

if TYPE_CHECKING:
    from .access import FormatAccess
    from .format.base import FormatDriver
    from .storage.base import Storage

__all__ = ["ChainMap", "MapEntry"]

_LOOKUPS_PER_TURN = 256
_SECTOR = 512


@dataclass(frozen=True, slots=True)
class MapEntry:
    """A guest range that is alike throughout.

    Attributes:
        start: Guest offset of its first byte.
        length: Bytes.
        depth: The layer that has it; 0 is the top one.
        present: Some layer says something of it; otherwise nothing is allocated anywhere.
        zero: It reads as zero.
        data: It is read from a file.
        compressed: It is compressed there.
        offset: Host offset of its first byte, None where there is no such thing.
        filename: The file that `offset` counts in.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool = False
    offset: int | None = None
    filename: str | None = None

    def is_continued_by(self, other: MapEntry) -> bool:
        """Whether `other`, which lies behind, only prolongs it."""
        offset = None if self.offset is None else self.offset + self.length
        return replace(
            other, start=self.start, length=self.length, offset=self.offset
        ) == self and (other.offset == offset)


class _Status(NamedTuple):
    """What one layer says of a range; neither data nor zero: ask the layer below."""

    length: int
    data: bool = False
    zero: bool = False
    compressed: bool = False
    storage: Storage | None = None
    offset: int | None = None


class ChainMap:
    """Looks at the layers of an open image. Nothing is changed.

    Args:
        access: The image. Changes that wait for a flush are seen or not.
    """

    def __init__(self, access: FormatAccess) -> None:
        self.layers: list[FormatDriver] = access.layers()
        self._preallocated: dict[FormatDriver, bool] = {}

    async def entries(self) -> AsyncIterator[MapEntry]:
        """The whole disk as the guest sees it, neighbours merged.

        Raises:
            CorruptImageError: A table entry is wrong.
            StorageError: A storage failed.
        """
        async for entry in self._merged(0, follow=True):
            yield entry

    async def layer_entries(self, depth: int) -> AsyncIterator[MapEntry]:
        """What one layer says by itself, whatever lies above it; `present` where it says anything.

        Raises:
            As `entries`.
        """
        async for entry in self._merged(depth, follow=False):
            yield entry

    async def _merged(self, depth: int, *, follow: bool) -> AsyncIterator[MapEntry]:
        held: MapEntry | None = None
        position, end, lookups = 0, self.layers[depth].size(), 0
        while position < end:
            entry = await self._entry(depth, position, end - position, follow=follow)
            position += entry.length
            if held is not None and held.is_continued_by(entry):
                held = replace(held, length=held.length + entry.length)
            else:
                if held is not None:
                    yield held
                held = entry
            lookups += 1
            if not lookups % _LOOKUPS_PER_TURN:
                await trio.lowlevel.checkpoint()
        if held is not None:
            yield held

    async def _entry(
        self, depth: int, guest_offset: int, max_length: int, *, follow: bool
    ) -> MapEntry:
        """The first part of a range."""
        while True:
            layer = self.layers[depth]
            status = await self._status(layer, guest_offset, max_length)
            present = status.data or status.zero
            zero = status.zero
            below = layer.backing
            if not present and (below is None or guest_offset >= _size_below(below.driver)):
                zero = True
            if present or zero or not follow:
                filename = status.storage.filename if status.storage is not None else None
                return MapEntry(
                    start=guest_offset,
                    length=status.length,
                    depth=depth,
                    present=present,
                    zero=zero,
                    data=status.data,
                    compressed=status.compressed,
                    offset=status.offset,
                    filename=filename,
                )
            depth += 1
            max_length = status.length

    async def _status(self, layer: FormatDriver, guest_offset: int, max_length: int) -> _Status:
        if isinstance(layer, Qcow2):
            return await self._qcow2_status(layer, guest_offset, max_length)
        mapping = await layer.get_mapping(guest_offset, max_length)
        match mapping:
            case RawMapping():
                status = _Status(
                    mapping.length, data=True, storage=mapping.storage, offset=mapping.offset
                )
                if isinstance(layer, Raw):
                    return await _with_holes(status, hole_is_data=False)
                return await _with_holes(status) if _is_flat(layer, guest_offset) else status
            case SpecialMapping():
                return _Status(mapping.length, data=True, compressed=True)
            case ZeroMapping():
                return _Status(mapping.length, zero=mapping.explicit)
            case EofMapping() if isinstance(layer, Raw):
                length = min(max_length, _size_below(layer) - guest_offset)
                offset = guest_offset + layer.offset
                return _Status(length, zero=True, storage=layer.storages[0], offset=offset)
        return _Status(mapping.length)

    async def _qcow2_status(self, layer: Qcow2, guest_offset: int, max_length: int) -> _Status:
        run = await cluster_run(layer, guest_offset, max_length)
        status = _Status(
            run.length,
            data=run.kind in (DATA, COMPRESSED_DATA),
            zero=run.kind == ZEROES,
            compressed=run.kind == COMPRESSED_DATA,
            storage=None if run.host_offset is None else layer.data_storages[0],
            offset=run.host_offset,
        )
        if run.kind != DATA:
            return status
        if layer not in self._preallocated:
            self._preallocated[layer] = await is_preallocated(layer)
        return await _with_holes(status) if self._preallocated[layer] else status


def _size_below(layer: FormatDriver) -> int:
    """The size of a layer below the top, as qemu counts it: a raw file's in whole sectors."""
    size = layer.size()
    return size + -size % _SECTOR if isinstance(layer, Raw) else size


async def _with_holes(status: _Status, *, hole_is_data: bool = True) -> _Status:
    """Look whether the file has a hole where the data should be."""
    storage, offset = status.storage, status.offset
    assert storage is not None
    assert offset is not None
    if offset >= storage.size():
        return status._replace(zero=True, data=hole_is_data)
    is_data, end = await storage.extent_at(offset)
    if not is_data:
        status = status._replace(zero=True, data=hole_is_data)
        if hole_is_data and end == storage.size():
            return status  # what lies behind the end reads as zero as well
    return status._replace(length=min(status.length, end - offset))


def _is_flat(layer: FormatDriver, guest_offset: int) -> bool:
    """Whether a VMDK keeps the range in a file that is the disk itself."""
    from .format.vmdk.extents import FlatExtent

    return isinstance(layer, Vmdk) and any(
        isinstance(extent, FlatExtent) and extent.start <= guest_offset < extent.end
        for extent in layer.extents
    )
