"""Host clusters with more references than a refcount of the image's width can count.

Nothing is lost: whoever comes too late gets a copy behind the end of the file.
"""

from __future__ import annotations

from array import array

from ...storage.base import Storage
from .check import Examination
from .check_counts import read_bytes
from .check_l2 import runs
from .check_scan import Scan
from .entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    compressed_range,
    from_big_endian,
    to_big_endian,
)
from .rebuilding import append, write_changes
from .repair_entries import Losses

__all__ = ["unshare"]


async def unshare(storage: Storage, examination: Examination, losses: Losses) -> bool:
    """Give copies of their own to references that cannot be counted.

    First L2 tables; data in the next pass, when all tables are countable.

    Returns:
        Whether something was changed; it is written, but not synced.
    """
    scan = examination.scan
    if not scan.counts.overflow:
        return False
    if await _copy_tables(storage, scan):
        return True
    return await _copy_data(storage, scan)


async def _copy_tables(storage: Storage, scan: Scan) -> bool:
    header = scan.header
    surplus = {
        offset: table.times - scan.counts.maximum
        for offset, table in scan.tables.items()
        if table.times > scan.counts.maximum
    }
    for state in scan.states if surplus else ():
        new = state.l1[:]
        # From the end, so that the lowest guest offsets keep the original.
        for index in range(len(new) - 1, -1, -1):
            offset = new[index] & OFFSET_MASK
            if surplus.get(offset, 0) > 0:
                surplus[offset] -= 1
                copy = await append(
                    storage, header, await read_bytes(storage, offset, header.cluster_size)
                )
                new[index] = new[index] & ~OFFSET_MASK | copy
        await storage.sync()
        await write_changes(storage, state.l1_offset, to_big_endian(state.l1), to_big_endian(new))
    return bool(surplus)


async def _copy_data(storage: Storage, scan: Scan) -> bool:
    header = scan.header
    # The structure is rebuilt, and not counted among those that must find room.
    surplus = dict(scan.counts.overflow)
    changed = False
    for offset, table in sorted(scan.tables.items(), reverse=True):
        data = await read_bytes(storage, offset, header.cluster_size)
        words = from_big_endian(data)
        step = header.l2_entry_size // 8
        for index in _affected(words[::step], scan, surplus):
            entry = words[index * step]
            clusters = _clusters(scan, entry)
            if any(surplus.get(cluster, 0) > 0 for cluster in clusters):
                words[index * step] = await _moved(storage, scan, entry)
                for cluster in clusters:
                    surplus[cluster] = surplus.get(cluster, 0) - table.times
        new = to_big_endian(words)
        if new != data:
            await storage.sync()
            await write_changes(storage, offset, bytes(data), new)
            changed = True
    return changed


def _affected(words: array[int], scan: Scan, surplus: dict[int, int]) -> list[int]:
    """Indexes of entries that refer to a cluster with a surplus."""
    found = []
    for index, number, entry in runs(words, scan.cluster_size):
        if entry & COMPRESSED:
            if any(cluster in surplus for cluster in _clusters(scan, entry)):
                found.append(index)
        elif entry & OFFSET_MASK:
            first = (entry & OFFSET_MASK) >> scan.cluster_bits
            found += [index + n for n in range(number) if first + n in surplus]
    return found


def _clusters(scan: Scan, entry: int) -> range:
    if not entry & COMPRESSED:
        first = (entry & OFFSET_MASK) >> scan.cluster_bits
        return range(first, first + 1)
    offset, length = compressed_range(entry & ~(COPIED | COMPRESSED), scan.cluster_bits)
    return range(offset >> scan.cluster_bits, (offset + length - 1 >> scan.cluster_bits) + 1)


async def _moved(storage: Storage, scan: Scan, entry: int) -> int:
    """The entry for a copy of what `entry` refers to."""
    header = scan.header
    if not entry & COMPRESSED:
        offset = entry & OFFSET_MASK
        data = await read_bytes(storage, offset, header.cluster_size)
        return entry & ~OFFSET_MASK | await append(storage, header, data)
    offset, length = compressed_range(entry & ~(COPIED | COMPRESSED), header.cluster_bits)
    place = await append(storage, header, await read_bytes(storage, offset, length))
    offset_bits = 62 - (header.cluster_bits - 8)
    return COMPRESSED | (length - 1 >> 9) << offset_bits | place
