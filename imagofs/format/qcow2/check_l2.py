"""Following the entries of one L2 table during a check.

Healthy entries come in runs, and a run costs hardly more than one entry does: that is what makes
a large image quick to check.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .check_report import Kind
from .clusters import ALLOCATED_BITS, ZERO_SHIFT
from .entries import (
    COMPRESSED,
    COPIED,
    L2_RESERVED,
    OFFSET_MASK,
    READS_AS_ZERO,
    compressed_range,
)

if TYPE_CHECKING:
    from .check_scan import Scan, Table

__all__ = ["L2Walk", "odd_bits", "runs"]

_NO_BITMAPS = array("Q")


def runs(words: array[int], cluster_size: int) -> Iterator[tuple[int, int, int]]:
    """Cut L2 entries into (index, number, first entry) of what belongs together.

    In a run of entries with a host offset each one's is a cluster behind its predecessor's and all
    other bits are the same. In one of entries without a host offset all are the same. A compressed
    cluster stands alone.
    """
    start, first = 0, -1
    expected, step = -1, 0
    index = 0
    for index, entry in enumerate(words):
        if entry == expected:
            expected += step
            continue
        if index:
            yield start, index - start, first
        start, first = index, entry
        if entry & COMPRESSED:
            expected = -1
        elif entry & (OFFSET_MASK | COPIED):
            step = cluster_size
            expected = entry + step
        else:
            step = 0
            expected = entry
    if len(words):
        yield start, index + 1 - start, first


def odd_bits(version: int, extended_l2: bool, cluster_size: int) -> int:
    """Bits that no entry of a standard cluster may have set."""
    odd = L2_RESERVED | cluster_size - 1 & OFFSET_MASK
    return odd | READS_AS_ZERO if extended_l2 or version < 3 else odd


class L2Walk:
    """The walk along one L2 table.

    Args:
        scan: What counts, and keeps what was found.
        offset: Host offset of the table.
        table: Who refers to it.
    """

    def __init__(self, scan: Scan, offset: int, table: Table) -> None:
        header = scan.header
        self._scan = scan
        self._offset = offset
        self._table = table
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._odd = odd_bits(header.version, header.extended_l2, header.cluster_size)
        self._data_file = header.has_data_file
        self._data_file_raw = header.data_file_raw
        # The flags of an active table are looked at.
        self._stored = scan.stored if table.active else None
        #: Where the next allocated cluster would be if nothing were fragmented; 0 at the start.
        self._next = 0

    def follow(self, words: array[int], bitmaps: array[int] = _NO_BITMAPS) -> None:
        """Follow all entries.

        Args:
            words: The table's entries, or the first words of extended ones.
            bitmaps: The second words of extended ones.
        """
        for index, number, entry in runs(words, self._cluster_size):
            if entry & COMPRESSED:
                self._compressed(index, entry)
            elif entry & OFFSET_MASK or (entry & COPIED and self._data_file):
                if entry & self._odd:
                    for position in range(index, index + number):
                        self._odd_entry(position, words[position])
                else:
                    self._clusters(index, number, entry)
            elif entry & self._odd:
                for position in range(index, index + number):
                    self._reserved(position, words[position])
            if bitmaps:
                self._subclusters(index, entry, bitmaps[index : index + number])

    def _wrong(self, kind: Kind, index: int, what: str, *, times: int | None = None) -> None:
        table, scan = self._table, self._scan
        times = table.times if times is None else times
        if scan.report.is_full():
            scan.report.count_corruption(kind, times)
            return
        guest_offset = scan.guest_offset(table.l1_index, index)
        state = scan.states[table.state].name
        whose = "" if state is None else f" of snapshot {state!r}"
        scan.report.corruption(
            kind,
            f"guest offset {guest_offset:#x}{whose}: {what} (entry {index} of the L2 table at "
            f"{self._offset:#x})",
            times=times,
            host_offset=self._offset + index * scan.header.l2_entry_size,
            guest_offset=guest_offset if state is None else None,
        )

    def _compressed(self, index: int, entry: int) -> None:
        scan, table = self._scan, self._table
        if self._data_file:
            self._wrong(Kind.ENTRY, index, f"compressed, with an external data file: {entry:#018x}")
            return
        if entry & COPIED:
            self._wrong(Kind.COPIED, index, f"compressed, with a COPIED flag: {entry:#018x}")
        offset, length = compressed_range(entry & ~(COPIED | COMPRESSED), self._cluster_bits)
        if scan.is_beyond(offset, length):
            self._wrong(
                Kind.ENTRY,
                index,
                f"its compressed data ({length} bytes at {offset:#x}) reaches past the end of the "
                f"file",
            )
        else:
            first = offset >> self._cluster_bits
            last = offset + length - 1 >> self._cluster_bits
            self._count(index, first, last + 1 - first)
        scan.allocated += table.active
        scan.compressed += table.active
        scan.fragmented += table.active

    def _clusters(self, index: int, number: int, entry: int) -> None:
        """A run of allocated clusters without odd bits."""
        scan, active = self._scan, self._table.active
        offset = entry & OFFSET_MASK
        scan.allocated += number * active
        if self._next and offset != self._next:
            scan.fragmented += active
        self._next = offset + (number << self._cluster_bits)
        if self._data_file:
            self._in_data_file(index, number, entry)
            return
        first = offset >> self._cluster_bits
        if first + number > scan.clusters:
            there = max(0, scan.clusters - first)
            for position in range(there, number):
                self._wrong(
                    Kind.ENTRY,
                    index + position,
                    f"its cluster at {offset + (position << self._cluster_bits):#x} is behind the "
                    f"end of the file",
                )
        else:
            there = number
        if there:
            self._count(index, first, there)
        if self._stored is not None:
            self.check_copied(index, number, first, bool(entry & COPIED))

    def _count(self, index: int, first: int, number: int) -> None:
        if not self._scan.counts.add(first, number, self._table.times):
            for cluster in range(first, first + number):
                self.is_shared(index, cluster)

    def is_shared(self, index: int, cluster: int) -> None:
        """A host cluster has other references too: it must not be metadata."""
        scan = self._scan
        if cluster in scan.own:
            guest_offset = scan.guest_offset(self._table.l1_index, index)
            scan.overlaps.setdefault(cluster, f"data of guest offset {guest_offset:#x}")

    def check_copied(self, index: int, number: int, first: int, copied: bool) -> None:
        """Compare the flag of a run of entries of an active table with the stored refcounts."""
        stored = self._stored
        assert stored is not None
        if number == 1 and (stored.get(first) == 1) == copied:
            return
        if copied and stored.are_all_one(first, number):
            return
        if not copied and stored.is_none_one(first, number):
            return
        for position in range(number):
            cluster = first + position
            if (stored.get(cluster) == 1) != copied and not stored.is_unreadable(cluster):
                self._wrong(
                    Kind.COPIED,
                    index + position,
                    f"{'a' if copied else 'no'} COPIED flag, the refcount of its cluster at "
                    f"{cluster << self._cluster_bits:#x} is {stored.get(cluster)}",
                    times=self._table.active,
                )

    def _in_data_file(self, index: int, number: int, entry: int) -> None:
        """Clusters of the external data file have no refcounts; their flag is always set."""
        guest_offset = self._scan.guest_offset(self._table.l1_index, index)
        for position in range(number):
            if not entry & COPIED:
                self._wrong(Kind.COPIED, index + position, "no COPIED flag, with a data file")
            if self._data_file_raw and entry & OFFSET_MASK != guest_offset:
                self._wrong(
                    Kind.ENTRY,
                    index + position,
                    f"it is elsewhere in the raw data file: {entry & OFFSET_MASK:#x}",
                )

    def _odd_entry(self, index: int, entry: int) -> None:
        """An allocated cluster with bits set that must not be."""
        scan, active = self._scan, self._table.active
        offset = entry & OFFSET_MASK
        self._reserved(index, entry)
        scan.allocated += active
        if self._next and offset != self._next:
            scan.fragmented += active
        self._next = offset + self._cluster_size
        if offset & self._cluster_size - 1:
            self._wrong(Kind.ENTRY, index, f"its offset {offset:#x} is not that of a cluster")
        if self._data_file:
            return
        first = offset >> self._cluster_bits
        if scan.is_beyond(offset, self._cluster_size):
            self._wrong(
                Kind.ENTRY, index, f"its cluster at {offset:#x} is behind the end of the file"
            )
        else:
            last = offset + self._cluster_size - 1 >> self._cluster_bits
            self._count(index, first, last + 1 - first)
        if self._stored is not None:
            self.check_copied(index, 1, first, bool(entry & COPIED))

    def _reserved(self, index: int, entry: int) -> None:
        if entry & self._odd & ~(self._cluster_size - 1 & OFFSET_MASK):
            self._wrong(Kind.ENTRY, index, f"reserved bits are set: {entry:#018x}")

    def _subclusters(self, index: int, entry: int, bitmaps: array[int]) -> None:
        """The second words of a run of extended entries."""
        allocated = entry & OFFSET_MASK or (entry & COPIED and self._data_file)
        if allocated and not entry & COMPRESSED:
            if bitmaps.count(ALLOCATED_BITS) == len(bitmaps):
                return
            wrong = "subclusters are allocated and zero at once"
        elif entry & COMPRESSED:
            wrong = "compressed, with subclusters"
        else:
            wrong = "subclusters are allocated in no cluster"
        for position, bitmap in enumerate(bitmaps):
            if entry & COMPRESSED:
                contradicts = bitmap
            elif allocated:
                contradicts = bitmap & bitmap >> ZERO_SHIFT & ALLOCATED_BITS
            else:
                contradicts = bitmap & ALLOCATED_BITS
            if contradicts:
                self._wrong(Kind.ENTRY, index + position, f"{wrong}: {bitmap:#018x}")
