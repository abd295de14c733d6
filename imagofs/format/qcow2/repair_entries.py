"""Mending entries of L1 and L2 tables: what can be kept of each is kept.

One pass changes entries only, never refcounts: those are rebuilt once no entry is wrong any more.
Who owns a host cluster that several things claim:

- The header, the L1 tables and the snapshot table win over everything.
- An L2 table wins over data, unless what lies there cannot be one.
- The refcount table and its blocks win over data if what they say is mostly right; else they are
  taken for data, and made anew elsewhere.
- Data wins over bitmaps. Data that two guest clusters share stays shared.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from ...storage.base import Storage
from .check import Examination
from .check_counts import read_bytes, read_table
from .check_l2 import odd_bits, runs
from .check_report import LostRange
from .check_scan import State, Table
from .clusters import ALLOCATED_BITS, SUBCLUSTERS, ZERO_SHIFT
from .entries import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    READS_AS_ZERO,
    compressed_range,
    from_big_endian,
    to_big_endian,
)
from .rebuilding import write_changes

__all__ = ["Losses", "mend_l1_tables", "mend_l2_tables"]


@dataclass(slots=True)
class Losses:
    """What a repair gives up."""

    ranges: list[LostRange] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, note: str) -> None:
        """Note something in words, once."""
        if note not in self.notes:
            self.notes.append(note)

    def add(self, lost: LostRange, disk_size: int) -> None:
        """Note a range, as far as it is on the disk; one that follows its predecessor prolongs it.

        Args:
            lost: The range.
            disk_size: Where the disk ends. What lies behind it is the saved machine state.
        """
        length = min(lost.guest_offset + lost.length, disk_size) - lost.guest_offset
        if length <= 0:
            self.note(f"a part of the saved machine state of snapshot {lost.snapshot!r} is lost")
            return
        lost = LostRange(lost.guest_offset, length, lost.snapshot)
        if self.ranges:
            last = self.ranges[-1]
            if (
                last.snapshot == lost.snapshot
                and last.guest_offset + last.length == lost.guest_offset
            ):
                length = last.length + lost.length
                self.ranges[-1] = LostRange(last.guest_offset, length, last.snapshot)
                return
        self.ranges.append(lost)


class _Mender:
    """What both kinds of tables need to know."""

    def __init__(self, storage: Storage, examination: Examination, losses: Losses) -> None:
        self.storage = storage
        self.scan = examination.scan
        self.stored = examination.stored
        self.losses = losses
        self.header = examination.scan.header
        self.odd = odd_bits(self.header.version, self.header.extended_l2, self.header.cluster_size)
        self.bits = self.header.cluster_bits
        self.mask = self.header.cluster_size - 1
        #: Clusters that something was found in.
        self.suspect = {
            finding.host_offset >> self.bits
            for finding in self.scan.report.findings
            if finding.host_offset is not None
        }

    def is_orphan(self, host_offset: int, times: int) -> bool:
        """Whether a cluster looks as if a damaged entry alone should point there.

        It is counted as in use, and nothing refers to it but `times` times that entry.
        """
        cluster = host_offset >> self.bits
        return (
            cluster < self.scan.clusters
            and cluster not in self.scan.own
            and self.scan.counts.get(cluster) <= times
            and self.stored.get(cluster) > 0
        )

    async def can_be_l2(self, host_offset: int) -> bool:
        """Whether most of what lies there could be entries of an L2 table."""
        table = await read_table(self.storage, host_offset, self.header.cluster_size // 8)
        words = table[:: self.header.l2_entry_size // 8]
        used = wrong = 0
        for _, number, entry in runs(words, self.header.cluster_size):
            if entry:
                used += number
                if entry & COMPRESSED:
                    offset, length = compressed_range(entry & ~COPIED, self.bits)
                    wrong += self.scan.is_beyond(offset, length)
                elif entry & self.odd or (entry & OFFSET_MASK) >> self.bits >= self.scan.clusters:
                    wrong += number
        return wrong * 4 <= used


# --- L1 -------------------------------------------------------------------------------------------


async def mend_l1_tables(storage: Storage, examination: Examination, losses: Losses) -> bool:
    """Mend the entries of all L1 tables.

    Returns:
        Whether something was changed; it is written, but not synced.
    """
    mender = _Mender(storage, examination, losses)
    changed = False
    for state in examination.scan.states:
        new = state.l1[:]
        for index, entry in enumerate(state.l1):
            if entry:
                new[index] = await _mend_l1_entry(mender, state, index, entry)
        if new != state.l1:
            old, data = to_big_endian(state.l1), to_big_endian(new)
            await write_changes(storage, state.l1_offset, old, data)
            changed = True
    return changed


async def _mend_l1_entry(mender: _Mender, state: State, index: int, entry: int) -> int:
    scan = mender.scan
    entry &= ~L1_RESERVED
    offset = entry & OFFSET_MASK
    if not offset:
        return 0
    if offset & mender.mask:
        aligned = offset & ~mender.mask
        if mender.is_orphan(aligned, 1) and await mender.can_be_l2(aligned):
            return entry & ~OFFSET_MASK | aligned
    elif offset in scan.tables:
        cluster = offset >> mender.bits
        alone = scan.counts.get(cluster) == scan.tables[offset].times
        if (alone and cluster not in mender.suspect) or await mender.can_be_l2(offset):
            return entry
    length = 1 << mender.bits + mender.header.l2_bits
    lost = LostRange(scan.guest_offset(index), length, state.name)
    mender.losses.add(lost, scan.disk_size(state))
    return 0


# --- L2 -------------------------------------------------------------------------------------------


async def mend_l2_tables(storage: Storage, examination: Examination, losses: Losses) -> bool:
    """Mend the entries of all L2 tables. Returns as `mend_l1_tables`."""
    mender = _Mender(storage, examination, losses)
    header = examination.scan.header
    first = header.reftable_offset >> header.cluster_bits
    taken = set(examination.scan.overlaps) - set(range(first, first + header.reftable_clusters))
    taken |= _genuine_structure(examination)
    changed = False
    for offset in sorted(examination.scan.tables):
        data = await read_bytes(storage, offset, mender.header.cluster_size)
        words = from_big_endian(data)
        step = mender.header.l2_entry_size // 8
        for index in _suspects(mender, words, step, taken):
            _mend(mender, offset, words, index, taken)
        new = to_big_endian(words)
        if new != data:
            await write_changes(storage, offset, bytes(data), new)
            changed = True
    return changed


def _genuine_structure(examination: Examination) -> set[int]:
    """Clusters of the refcount structure that something else claims, wrongly."""
    scan, stored = examination.scan, examination.stored
    header = scan.header
    genuine: set[int] = set()
    first = header.reftable_offset >> header.cluster_bits
    table_clusters = range(first, first + header.reftable_clusters)
    used = [entry for entry in stored.table if entry]
    if used and all(
        not entry & header.cluster_size - 1 and entry >> header.cluster_bits < scan.clusters
        for entry in used
    ):
        genuine.update(cluster for cluster in table_clusters if scan.counts.get(cluster) > 1)
    for index, entry in enumerate(stored.table):
        cluster = entry >> header.cluster_bits
        if entry and not entry & header.cluster_size - 1 and scan.counts.get(cluster) > 1:
            same = total = 0
            start = index << stored.block_bits
            end = min(start + (1 << stored.block_bits), scan.clusters)
            for piece in range(start, end, 1 << stored.piece_bits):
                for wanted, found in zip(
                    scan.counts.piece(piece), stored.piece(piece), strict=True
                ):
                    total += bool(wanted or found)
                    same += bool(wanted) and wanted == found
            if 2 * same >= total > 0:
                genuine.add(cluster)
    return genuine


def _suspects(mender: _Mender, words: array[int], step: int, taken: set[int]) -> Iterator[int]:
    """Indexes of entries that may have to be mended."""
    header = mender.header
    for index, number, entry in runs(words[::step], header.cluster_size):
        first = (entry & OFFSET_MASK) >> header.cluster_bits
        if (
            step == 2
            or entry & (COMPRESSED | mender.odd)
            or header.has_data_file
            or first + number > mender.scan.clusters
        ):
            yield from range(index, index + number)
        elif first and taken:
            yield from (n for n in range(index, index + number) if first + n - index in taken)


def _mend(
    mender: _Mender, table_offset: int, words: array[int], index: int, taken: set[int]
) -> None:
    table = mender.scan.tables[table_offset]
    extended = mender.header.extended_l2
    step = 2 if extended else 1
    entry = words[index * step]
    bitmap = words[index * step + 1] if extended else 0
    if entry & COMPRESSED:
        new, lost = _mend_compressed(mender, entry, taken)
    else:
        new, lost = _mend_standard(mender, table, entry, index, taken)
    if not extended:
        words[index] = _zeroed(mender) if lost else new
        if lost and not entry & READS_AS_ZERO:
            _lose(mender, table_offset, index, (1 << SUBCLUSTERS) - 1)
        return
    allocated, zero = bitmap & ALLOCATED_BITS, bitmap >> ZERO_SHIFT
    if entry & COMPRESSED:
        # With the descriptor gone everything is lost; with it, the bitmap means nothing.
        words[2 * index] = 0 if lost else new
        words[2 * index + 1] = ALLOCATED_BITS << ZERO_SHIFT if lost else 0
        if lost:
            _lose(mender, table_offset, index, ALLOCATED_BITS)
        return
    has_place = new & OFFSET_MASK or (mender.header.has_data_file and new & COPIED)
    gone = allocated & zero if has_place and not lost else allocated
    words[2 * index] = 0 if lost else new
    words[2 * index + 1] = (zero | gone) << ZERO_SHIFT | allocated & ~gone
    if gone:
        _lose(mender, table_offset, index, gone)


def _mend_compressed(mender: _Mender, entry: int, taken: set[int]) -> tuple[int, bool]:
    """The mended entry, and whether its data is lost."""
    entry &= ~COPIED
    offset, length = compressed_range(entry, mender.bits)
    clusters = range(offset >> mender.bits, (offset + length - 1 >> mender.bits) + 1)
    lost = (
        mender.header.has_data_file
        or mender.scan.is_beyond(offset, length)
        or not taken.isdisjoint(clusters)
    )
    return entry, lost


def _mend_standard(
    mender: _Mender, table: Table, entry: int, index: int, taken: set[int]
) -> tuple[int, bool]:
    """The mended entry, and whether what it points to is lost."""
    header = mender.header
    entry &= ~L2_RESERVED
    if header.extended_l2 or header.version < 3:
        entry &= ~READS_AS_ZERO
    offset = entry & OFFSET_MASK
    if header.has_data_file:
        guest_offset = mender.scan.guest_offset(table.l1_index, index)
        if offset & mender.mask or (header.data_file_raw and offset and offset != guest_offset):
            # In a data file the place is known, even if the entry does not say so.
            entry = entry & ~OFFSET_MASK | guest_offset | COPIED
        return entry, False
    if not offset:
        return entry, False
    if offset & mender.mask:
        aligned = offset & ~mender.mask
        if not mender.is_orphan(aligned, table.times):
            return entry, True
        return entry & ~OFFSET_MASK | aligned, False
    cluster = offset >> mender.bits
    return entry, cluster >= mender.scan.clusters or cluster in taken


def _zeroed(mender: _Mender) -> int:
    """What stands for data that is lost: zeroes, or where version 2 has no flag, nothing."""
    return READS_AS_ZERO if mender.header.version >= 3 else 0


def _lose(mender: _Mender, table_offset: int, index: int, subclusters: int) -> None:
    """Note what all states lose that share the table."""
    header, scan = mender.header, mender.scan
    size = header.cluster_size // SUBCLUSTERS if header.extended_l2 else header.cluster_size
    number = SUBCLUSTERS if header.extended_l2 else 1
    for state in scan.states:
        for l1_index, l1_entry in enumerate(state.l1):
            if l1_entry & OFFSET_MASK != table_offset:
                continue
            start = scan.guest_offset(l1_index, index)
            for position in range(number):
                if subclusters >> position & 1:
                    lost = LostRange(start + position * size, size, state.name)
                    mender.losses.add(lost, scan.disk_size(state))
