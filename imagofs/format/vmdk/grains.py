"""Sparse extents: finding grains through two levels of tables, and inflating them.

Tables and inflated grains are kept in bounded caches. A grain directory is cached in pages, so
that neither opening an extent nor its memory depends on its size.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from typing import NamedTuple

import trio

from ...caching import MetadataCache
from ...errors import CorruptImageError, FormatError
from ...storage.base import Storage
from ..base import INDIRECT, MIXED, NOT_CACHED, SPECIAL, ZERO
from .descriptor import SECTOR
from .extents import RAW, Extent, Place
from .sparse import (
    ENTRY_BYTES,
    FOOTER_BYTES,
    HEADER_BYTES,
    MARKER_BYTES,
    SparseHeader,
    inflate_grain,
    parse_footer,
    parse_grain_marker,
    parse_header,
)

__all__ = ["GrainCache", "SparseExtent", "read_sparse_header"]

_PAGE_ENTRIES = 1024  # of a grain directory
_TABLES = 1 << 40  # tells the cache keys of grain tables from those of directory pages
_ZERO_ENTRY = 1
#: A worker thread gets several grains at a time: handing over costs as much as a small grain.
_BATCH_BYTES = 512 << 10


class GrainCache:
    """Inflated grains in order of use, up to `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._grains: OrderedDict[int, bytes] = OrderedDict()

    def get(self, key: int) -> bytes | None:
        """The grain at `key`, None if it is not kept."""
        grain = self._grains.get(key)
        if grain is not None:
            self._grains.move_to_end(key)
        return grain

    def put(self, key: int, grain: bytes) -> None:
        """Keep `grain` at `key`."""
        self._bytes += len(grain) - len(self._grains.pop(key, b""))
        self._grains[key] = grain
        while self._bytes > self._limit:
            self._bytes -= len(self._grains.popitem(last=False)[1])

    def clear(self) -> None:
        """Forget every grain."""
        self._grains.clear()
        self._bytes = 0


class _Deflated(NamedTuple):
    """A grain's deflated bytes, still to be inflated."""

    number: int
    host_offset: int
    data: memoryview


async def read_sparse_header(storage: Storage) -> SparseHeader:
    """Read an extent's header, or its footer where the header refers to it.

    Raises:
        FormatError: It is no sparse extent, is cut off, or says something that cannot be.
        UnsupportedError: It needs something that is not supported.
    """
    name = storage.filename
    data = bytearray(min(HEADER_BYTES, storage.size()))
    await storage.readv([memoryview(data)], 0)
    header = parse_header(bytes(data), filename=name)
    if header.directory_sector is None:
        footer_offset = storage.size() // SECTOR * SECTOR - FOOTER_BYTES
        data = bytearray(FOOTER_BYTES if footer_offset >= 0 else 0)
        await storage.readv([memoryview(data)], max(footer_offset, 0))
        header = parse_footer(bytes(data), filename=name)
    return header


class SparseExtent(Extent):
    """The bytes lie in grains of a storage that can only be read.

    Args:
        start: Guest offset of the first byte.
        length: Bytes of the extent.
        storage: Its file.
        header: What `read_sparse_header` returned.
        cache: Where tables are kept.
        grains: Where inflated grains are kept.
        type_name: Its type as the descriptor spells it.

    Raises:
        FormatError: The file is too short for what the header says.
    """

    def __init__(
        self,
        start: int,
        length: int,
        storage: Storage,
        header: SparseHeader,
        *,
        cache: MetadataCache,
        grains: GrainCache,
        type_name: str,
    ) -> None:
        super().__init__(start, length)
        self.type_name = type_name
        assert header.directory_sector is not None
        self.storage: Storage = storage
        self.header = header
        self._grain_bytes = header.grain_sectors * SECTOR
        self._table_span = header.table_entries * self._grain_bytes
        self._directory_offset = header.directory_sector * SECTOR
        self._cache = cache
        self._namespace = cache.namespace()
        self._grains = grains
        self.refresh()

    @property
    def unit_bytes(self) -> int:
        return self._grain_bytes

    @property
    def compressed(self) -> bool:
        """Whether grains are deflated."""
        return self.header.compressed

    def refresh(self) -> None:
        self._cache.drop_namespace(self._namespace)
        self._grains.clear()
        self._storage_size = self.storage.size()
        directory_bytes = self.header.directory_entries * ENTRY_BYTES
        for what, end in (
            ("metadata ends", self.header.overhead_sectors * SECTOR),
            ("grain directory ends", self._directory_offset + directory_bytes),
        ):
            if end > self._storage_size:
                raise FormatError(
                    f"truncated: the VMDK's {what} at {end}, and the file at {self._storage_size}",
                    filename=self.storage.filename,
                )

    # --- tables ---------------------------------------------------------------------------------

    def locate(self, guest_offset: int) -> Place:
        table, within = divmod(guest_offset - self.start, self._table_span)
        page = self._cache.get(self._namespace + table // _PAGE_ENTRIES)
        if page is None:
            return Place(NOT_CACHED, 0, 1)
        entry = page[table % _PAGE_ENTRIES]
        if self._is_no_place(entry):
            length = min(self._table_span - within, self.end - guest_offset)
            return Place(ZERO if entry else INDIRECT, 0, length)
        entries = self._cache.get(self._namespace + _TABLES + table)
        if entries is None:
            return Place(NOT_CACHED, 0, 1)
        index, within = divmod(within, self._grain_bytes)
        entry = entries[index]
        length = min(self._grain_bytes - within, self.end - guest_offset)
        if self._is_no_place(entry):
            return Place(ZERO if entry else INDIRECT, 0, length)
        host_offset = entry * SECTOR
        if self.header.compressed:
            fits = host_offset < self._storage_size
            return Place(SPECIAL if fits else MIXED, host_offset, length)
        host_offset += within
        fits = host_offset + length <= self._storage_size
        return Place(RAW if fits else MIXED, host_offset, length)

    def _is_no_place(self, entry: int) -> bool:
        return entry == 0 or (entry == _ZERO_ENTRY and self.header.zero_entries)

    async def load(self, guest_offset: int) -> None:
        header = self.header
        table = (guest_offset - self.start) // self._table_span
        page_key = self._namespace + table // _PAGE_ENTRIES
        page = self._cache.get(page_key)
        if page is None:
            first = table // _PAGE_ENTRIES * _PAGE_ENTRIES
            count = min(_PAGE_ENTRIES, header.directory_entries - first)
            page = await self._read_entries(self._directory_offset + first * ENTRY_BYTES, count)
            self._cache.put(page_key, page)
        entry = page[table % _PAGE_ENTRIES]
        if self._is_no_place(entry):
            return
        table_key = self._namespace + _TABLES + table
        if self._cache.get(table_key) is None:
            count = min(header.table_entries, header.grains - table * header.table_entries)
            if entry * SECTOR + count * ENTRY_BYTES > self._storage_size:
                raise self._corrupt(
                    f"the grain table of guest offset {guest_offset} is at host offset "
                    f"{entry * SECTOR}"
                )
            self._cache.put(table_key, await self._read_entries(entry * SECTOR, count))
        place = self.locate(guest_offset)
        if place.kind == MIXED:
            raise self._corrupt(
                f"{place.length} bytes of guest offset {guest_offset} are at host offset "
                f"{place.host_offset}"
            )

    async def _read_entries(self, host_offset: int, count: int) -> array[int]:
        entries = array("I", bytes(count * ENTRY_BYTES))
        view = memoryview(entries).cast("B")
        if self.storage.readv_nowait([view], host_offset) != view.nbytes:
            await self.storage.readv([view], host_offset)
        if sys.byteorder == "big":
            entries.byteswap()
        return entries

    def _corrupt(self, what: str) -> CorruptImageError:
        return CorruptImageError(
            f"{what}, which is behind the file's {self._storage_size} bytes",
            filename=self.storage.filename,
        )

    # --- deflated grains ------------------------------------------------------------------------

    def special_nowait(self, view: memoryview, guest_offset: int) -> bool:
        first, within = divmod(guest_offset - self.start, self._grain_bytes)
        count = -(-(within + view.nbytes) // self._grain_bytes)
        grains = [self._grains.get(self._namespace + first + index) for index in range(count)]
        if None in grains:
            return False
        _copy_grains([grain for grain in grains if grain is not None], within, view)
        return True

    async def read_special(self, view: memoryview, guest_offset: int) -> None:
        step = max(_BATCH_BYTES // self._grain_bytes, 1) * self._grain_bytes
        position = guest_offset - self.start
        while view.nbytes:
            length = min(step - position % step, view.nbytes)
            first, within = divmod(position, self._grain_bytes)
            count = -(-(within + length) // self._grain_bytes)
            _copy_grains(await self._inflated(first, count), within, view[:length])
            view = view[length:]
            position += length

    async def _inflated(self, first: int, count: int) -> list[bytes]:
        """Some grains, inflated: a batch at most."""
        grains = {n: self._grains.get(self._namespace + n) for n in range(first, first + count)}
        missing = [number for number, grain in grains.items() if grain is None]
        if missing:
            deflated = await self._read_deflated(missing)
            # Waits for the thread even if it is cancelled: nothing runs on behind its back.
            inflated = await trio.to_thread.run_sync(self._inflate, deflated)
            for number, grain in zip(missing, inflated, strict=True):
                grains[number] = grain
                self._grains.put(self._namespace + number, grain)
        return [grain for grain in grains.values() if grain is not None]

    def _inflate(self, deflated: list[_Deflated]) -> list[bytes]:
        """Inflate a batch; runs in a worker thread and touches nothing that is shared."""
        inflated = []
        for number, host_offset, data in deflated:
            needed = min(self._grain_bytes, self.end - self.start - number * self._grain_bytes)
            try:
                inflated.append(inflate_grain(data, self._grain_bytes, needed))
            except CorruptImageError as exc:
                raise self._damaged(number, host_offset, exc.message) from None
        return inflated

    async def _read_deflated(self, numbers: list[int]) -> list[_Deflated]:
        """The deflated bytes of some grains, in one read if they lie near each other."""
        places = [(number, await self._place_of(number)) for number in numbers]
        # Deflated data that is longer than twice the grain is nonsense, and so refused by others.
        longest = MARKER_BYTES + 2 * self._grain_bytes
        start = min(offset for _, offset in places)
        span = max(offset for _, offset in places) - start
        if span > len(places) * longest:
            return [await self._read_one(number, offset, longest) for number, offset in places]
        data = await self._read(start, span + longest)
        return [
            self._strip(number, offset, data[offset - start : offset - start + longest])
            for number, offset in places
        ]

    async def _place_of(self, number: int) -> int:
        """The host offset of a deflated grain."""
        guest_offset = self.start + number * self._grain_bytes
        while (place := self.locate(guest_offset)).kind != SPECIAL:
            if place.kind not in (NOT_CACHED, MIXED):
                raise self._damaged(number, place.host_offset, "it was changed behind our back")
            await self.load(guest_offset)
        return place.host_offset

    async def _read_one(self, number: int, host_offset: int, longest: int) -> _Deflated:
        return self._strip(number, host_offset, await self._read(host_offset, longest))

    async def _read(self, host_offset: int, length: int) -> memoryview:
        """Up to `length` bytes, less at the file's end."""
        view = memoryview(bytearray(min(length, self._storage_size - host_offset)))
        if self.storage.readv_nowait([view], host_offset) != view.nbytes:
            await self.storage.readv([view], host_offset)
        return view

    def _strip(self, number: int, host_offset: int, data: memoryview) -> _Deflated:
        """Check the marker and take it away."""
        if not self.header.markers:
            return _Deflated(number, host_offset, data)
        if data.nbytes < MARKER_BYTES:
            raise self._damaged(number, host_offset, "its marker is cut off")
        marker = parse_grain_marker(data)
        sector = number * self.header.grain_sectors
        # Sectors of the disk are meant; writers of split disks may count the extent's.
        if marker.first_sector not in (self.start // SECTOR + sector, sector):
            what = f"its marker names sector {marker.first_sector}"
            raise self._damaged(number, host_offset, what)
        end = MARKER_BYTES + marker.deflated_length
        if not MARKER_BYTES < end <= data.nbytes:
            what = f"its marker says that it has {marker.deflated_length} deflated bytes"
            raise self._damaged(number, host_offset, what)
        return _Deflated(number, host_offset, data[MARKER_BYTES:end])

    def _damaged(self, number: int, host_offset: int, what: str) -> CorruptImageError:
        guest_offset = self.start + number * self._grain_bytes
        return CorruptImageError(
            f"the grain of guest offset {guest_offset} at host offset {host_offset}: {what}",
            filename=self.storage.filename,
        )


def _copy_grains(grains: list[bytes], within: int, view: memoryview) -> None:
    """Fill `view` from consecutive grains, from byte `within` of the first one on."""
    position = 0
    for grain in grains:
        part = memoryview(grain)[within : within + view.nbytes - position]
        view[position : position + part.nbytes] = part
        position += part.nbytes
        within = 0
