"""Sparse extents: grains that two levels of tables locate.

Tables are kept in a bounded cache. A grain directory is cached in pages, so that neither opening
an extent nor its memory depends on its size.
"""

from __future__ import annotations

import sys
from array import array

from ...caching import MetadataCache
from ...errors import CorruptImageError, FormatError
from ...inflating import InflatedCache
from ...storage.base import Storage
from ..base import INDIRECT, MIXED, NOT_CACHED, SPECIAL, ZERO
from .deflated import DeflatedGrains
from .descriptor import SECTOR
from .extents import RAW, Extent, Place
from .sparse import (
    ENTRY_BYTES,
    FOOTER_BYTES,
    HEADER_BYTES,
    SparseHeader,
    parse_footer,
    parse_header,
)

__all__ = ["SparseExtent", "read_sparse_header"]

_PAGE_ENTRIES = 1024  # of a grain directory
_TABLES = 1 << 40  # tells the cache keys of grain tables from those of directory pages
_ZERO_ENTRY = 1


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
        inflated: Where inflated grains are kept.
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
        inflated: InflatedCache,
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
        self._deflated = DeflatedGrains(
            storage,
            inflated,
            grain_bytes=self._grain_bytes,
            length=length,
            start=start,
            markers=header.markers,
            place_nowait=self._place_nowait,
            place=self._place,
        )
        self.refresh()

    @property
    def unit_bytes(self) -> int:
        return self._grain_bytes

    @property
    def compressed(self) -> bool:
        """Whether grains are deflated."""
        return self.header.compressed

    def forget(self) -> None:
        self._deflated.forget()

    def refresh(self) -> None:
        self._cache.drop_namespace(self._namespace)
        self.forget()
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

    def run(self, guest_offset: int) -> Place:
        place = self.locate(guest_offset)
        if place.kind in (NOT_CACHED, MIXED):
            return place
        table, within = divmod(guest_offset - self.start, self._table_span)
        entries = self._cache.get(self._namespace + _TABLES + table)
        if entries is None:
            return self._run_of_tables(place, table, guest_offset)
        index, within = divmod(within, self._grain_bytes)
        count = self._alike(entries, index, place.kind)
        if place.kind == RAW:
            # What is there of the file; `locate` has seen that the first grain is.
            first = place.host_offset - within
            count = max(min(count, (self._storage_size - first) // self._grain_bytes), 1)
        length = min(count * self._grain_bytes - within, self.end - guest_offset)
        return place._replace(length=length)

    def _run_of_tables(self, place: Place, table: int, guest_offset: int) -> Place:
        """The run of a place for which there is no table."""
        page = self._cache.get(self._namespace + table // _PAGE_ENTRIES)
        assert page is not None
        rest = page[table % _PAGE_ENTRIES :]
        count = next((n for n, entry in enumerate(rest) if entry != rest[0]), len(rest))
        end = self.start + (table + count) * self._table_span
        return place._replace(length=min(end, self.end) - guest_offset)

    def _alike(self, entries: array[int], index: int, kind: int) -> int:
        """How many entries from `index` on go on alike."""
        first = entries[index]
        rest = enumerate(entries[index:])
        if kind == SPECIAL:
            last = (self._storage_size - 1) // SECTOR
            least = 2 if self.header.zero_entries else 1
            differ = (n for n, entry in rest if not least <= entry <= last)
        else:
            step = self.header.grain_sectors if kind == RAW else 0
            differ = (n for n, entry in rest if entry != first + n * step)
        return next(differ, len(entries) - index)

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
        return self._deflated.read_nowait(view, guest_offset - self.start)

    async def read_special(self, view: memoryview, guest_offset: int) -> None:
        await self._deflated.read(view, guest_offset - self.start)

    def _place_nowait(self, number: int) -> int | None:
        place = self.locate(self.start + number * self._grain_bytes)
        return place.host_offset if place.kind == SPECIAL else None

    async def _place(self, number: int) -> int:
        guest_offset = self.start + number * self._grain_bytes
        while (place := self.locate(guest_offset)).kind != SPECIAL:
            if place.kind not in (NOT_CACHED, MIXED):
                raise CorruptImageError(
                    f"the grain of guest offset {guest_offset} was deflated, and is not any more",
                    filename=self.storage.filename,
                )
            await self.load(guest_offset)
        return place.host_offset
