"""The L1 table and the L2 tables of one image, in memory.

The L1 table is resident. L2 tables are loaded in slices of up to 4 KiB, as large as a page: the
clean ones live in the chain's `MetadataCache`, those that changed are held here until a flush has
written them. A slice is an `array('Q')` of entries in the machine's byte order; with extended L2
entries two neighbours belong together.

A slice is known by its number: the guest offset shifted by `slice_bits`.
"""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable
from typing import TypeVar
from weakref import WeakValueDictionary

from ...caching import MetadataCache
from ...errors import CorruptImageError
from ...storage.base import Storage
from .entries import COPIED, OFFSET_MASK, from_big_endian, to_big_endian
from .header import Header

__all__ = ["L2Tables", "Missing", "with_tables"]

_SLICE_BYTES = 4096
_LARGEST_STEP = 32 << 10  # between changed slices that are written together


class Missing(Exception):
    """A plain function needs a table that is not in memory: `await load()` and call it again."""

    def __init__(self, load: Callable[[], Awaitable[object]]) -> None:
        self.load = load


T = TypeVar("T")


async def with_tables(function: Callable[[], T]) -> T:
    """Call a plain function, loading what it misses, until it succeeds."""
    held = []  # so that all that was loaded is there together, however small the cache is
    while True:
        try:
            return function()
        except Missing as missing:
            held.append(await missing.load())


class L2Tables:
    """L1 and L2 of one image.

    Args:
        storage: The image file.
        header: Its header.
        l1: The L1 table's entries.
        cache: Where clean slices are kept.
    """

    def __init__(
        self, storage: Storage, header: Header, l1: array[int], cache: MetadataCache
    ) -> None:
        self._storage = storage
        self._cluster_size = header.cluster_size
        self.l1 = l1
        #: L1 indexes whose entries changed since they were last written.
        self.dirty_l1: set[int] = set()
        self.slice_bytes = min(_SLICE_BYTES, header.cluster_size)
        #: Words of an entry: 1, or 2 with extended L2.
        self.entry_words = header.l2_entry_size // 8
        self.cluster_bits = header.cluster_bits
        slice_entries = self.slice_bytes // header.l2_entry_size
        self.slice_mask = slice_entries - 1
        #: Guest bytes of a slice, log2.
        self.slice_bits = header.cluster_bits + slice_entries.bit_length() - 1
        #: Guest bytes of an L2 table, log2.
        self.l1_bits = header.cluster_bits + header.l2_bits
        self._slices_per_table_bits = self.l1_bits - self.slice_bits
        #: Changed slices by number. They are found here although the cache may forget them.
        self.dirty: dict[int, array[int]] = {}
        #: Slices that a flush is writing; they are found here too.
        self.writing: dict[int, array[int]] = {}
        #: Slices that anybody still holds: who needs several tables at a time gets all, however
        #: small the cache is.
        self._alive: WeakValueDictionary[int, array[int]] = WeakValueDictionary()
        #: How often changed tables were written. What was read from the file before is stale.
        self.flushes = 0
        self.cache = cache
        self.namespace = cache.namespace()

    # --- finding --------------------------------------------------------------------------------

    def slice_nowait(self, number: int) -> array[int] | None:
        """A slice that is in memory, or None. The slice of a missing L2 table is not in memory."""
        return (
            self.cache.get(self.namespace + number)
            or self.dirty.get(number)
            or self.writing.get(number)
            or self._alive.get(number)
        )

    def table_offset(self, guest_offset: int) -> int:
        """Host offset of the L2 table for `guest_offset`, 0 if there is none.

        Raises:
            CorruptImageError: The L1 entry cannot be right.
        """
        index = guest_offset >> self.l1_bits
        offset = self.l1[index] & OFFSET_MASK
        if offset and (
            offset & self._cluster_size - 1 or offset + self._cluster_size > self._storage.size()
        ):
            raise CorruptImageError(
                f"L1 entry {index} points to {offset:#x}, where no L2 table can be",
                filename=self._storage.filename,
            )
        return offset

    def load_slice_nowait(self, number: int) -> array[int] | None:
        """Bring a slice into memory if that needs no waiting. A plain function.

        Returns:
            None: `load_slice` says why.
        """
        try:
            place = self.slice_place(number)
        except CorruptImageError:
            return None
        data = self._storage.read_table_nowait(self.slice_bytes, place) if place else None
        return self._keep(number, from_big_endian(data)) if data else None

    def _keep(self, number: int, table: array[int]) -> array[int]:
        """Keep a slice as it is in the file."""
        self._alive[number] = table
        self.cache.put(self.namespace + number, table)
        return table

    async def load_slice(self, number: int) -> array[int] | None:
        """Bring a slice into memory; None where there is no L2 table.

        Raises:
            CorruptImageError: The L1 entry cannot be right.
            StorageError: It cannot be read.
        """
        while True:
            found = self.slice_nowait(number)
            if found is not None:
                return found
            place = self.slice_place(number)
            if place == 0:
                return None
            flushes = self.flushes
            data = await self._storage.read_table(self.slice_bytes, place)
            # Meanwhile somebody may have loaded it, changed it, or moved the table.
            found = self.slice_nowait(number)
            if found is not None:
                return found
            if self.slice_place(number) == place and self.flushes == flushes:
                return self._keep(number, from_big_endian(data))

    def slice_place(self, number: int) -> int:
        """Host offset of a slice, 0 where there is no L2 table."""
        table = self.table_offset(number << self.slice_bits)
        within = number & (1 << self._slices_per_table_bits) - 1
        return table + within * self.slice_bytes if table else 0

    def need_slice(self, number: int) -> array[int]:
        """A slice of an existing L2 table. A plain function.

        Raises:
            Missing: It is not in memory.
        """
        found = self.slice_nowait(number)
        if found is None:
            raise Missing(lambda: self.load_slice(number))
        return found

    # --- changing -------------------------------------------------------------------------------

    def change_slice(self, number: int) -> array[int]:
        """A slice about to be changed: held here, and written by the next flush.

        Raises:
            Missing: It is not in memory.
        """
        table = self.dirty.get(number)
        if table is None:
            table = self.dirty[number] = self.need_slice(number)
        return table

    def is_table_ours(self, guest_offset: int) -> bool:
        """Whether the L2 table exists and belongs to the active state alone."""
        entry = self.l1[guest_offset >> self.l1_bits]
        return bool(entry & COPIED and entry & OFFSET_MASK)

    def set_table(self, guest_offset: int, host_offset: int) -> None:
        """Point the L1 entry at a table of our own."""
        index = guest_offset >> self.l1_bits
        self.l1[index] = host_offset | COPIED
        self.dirty_l1.add(index)

    def drop_table(self, index: int) -> None:
        """Clear an L1 entry whose table maps nothing any more, and forget the table."""
        first = index << self._slices_per_table_bits
        for number in range(first, first + (1 << self._slices_per_table_bits)):
            self.dirty.pop(number, None)
            self.cache.drop(self.namespace + number)
            self._alive.pop(number, None)
        self.l1[index] = 0
        self.dirty_l1.add(index)

    def encoded(self) -> list[tuple[int, bytearray]]:
        """The changed slices as the file has them: (host offset, bytes).

        Where some of one table lie close together, what the file has between them comes along
        unchanged: a few bytes more cost less than a write more.
        """
        groups: list[list[int]] = []
        last = -1 << self._slices_per_table_bits  # in another table than any
        for number in sorted(self.dirty):
            same_table = not (number ^ last) >> self._slices_per_table_bits
            if same_table and (number - last) * self.slice_bytes <= _LARGEST_STEP:
                groups[-1].append(number)
            else:
                groups.append([number])
            last = number
        return [write for group in groups for write in self._encoded_together(group)]

    def _encoded_together(self, numbers: list[int]) -> list[tuple[int, bytearray]]:
        size, first = self.slice_bytes, numbers[0]
        place = self.slice_place(first)
        length = (numbers[-1] + 1 - first) * size
        data = self._storage.read_table_nowait(length, place) if numbers[1:] else bytearray(size)
        if data is None:
            return [write for number in numbers for write in self._encoded_together([number])]
        for number in numbers:
            start = (number - first) * size
            data[start : start + size] = to_big_endian(self.dirty[number])
        return [(place, data)]
