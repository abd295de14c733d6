"""Making an image's refcounts anew from its references.

Nothing but refcounts and COPIED flags is changed, so no data can be lost: an image in which
anything else is wrong is refused. The order, with a sync between each two:

    1. refcounts: in their blocks if those are sound, else in a new table and new blocks behind
       the end of the file, which then take the old ones' place by one write of the header's fields
    2. COPIED flags
    3. the dirty bit is cleared

Where the image has a dirty bit it is set all the while. A power cut before 3 leaves references
as they were and a mixture of old and new refcounts; doing it again ends it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import replace

import trio

from ...errors import CorruptImageError, UnsupportedError
from ...storage.base import Storage
from .check_counts import Counts, StoredCounts, differences, read_bytes, read_table
from .check_l2 import runs
from .check_report import REBUILT, Report
from .check_scan import Progress, Scan
from .entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    from_big_endian,
    pack_refcounts,
    to_big_endian,
)
from .header import DIRTY, FIELDS_OFFSET, MAX_REFTABLE_BYTES, Header

__all__ = [
    "append",
    "correct_copied_flags",
    "free_runs",
    "packed",
    "rebuild_refcounts",
    "write_all",
    "write_changes",
    "write_fields",
]

_SECTOR = 512
_TABLES_PER_TURN = 64


async def rebuild_refcounts(
    storage: Storage,
    header: Header,
    *,
    progress: Progress | None = None,
    trust_structure: bool = True,
) -> Header:
    """Compute the refcounts of an image from its references, store them, clear the dirty bit.

    Cancelled, it leaves the image as a power cut does: no worse than it was, and still dirty.

    Args:
        storage: The image file, writable; nobody else uses it.
        header: Its header.
        progress: Told how far the walk over the L2 tables is.
        trust_structure: If data lies over the refcount table or its blocks it is not known which
            of the two is right, and the image is refused. False: the data is.

    Returns:
        The header as it is now: without the dirty bit, perhaps with another refcount table.

    Raises:
        CorruptImageError: More than refcounts is wrong; nothing was changed.
        UnsupportedError: A cluster has more references than its refcount can hold, or no refcount
            table that qcow2 allows could count for so large a file; nothing was changed.
        StorageError: Something cannot be read or written.
    """
    report = Report()
    scan = Scan(storage, header, report, progress=progress)
    await scan.run()
    table = await read_table(
        storage, header.reftable_offset, header.reftable_clusters << header.cluster_bits - 3
    )
    what = _hindrance(scan)
    if what is None and trust_structure and any(map(scan.counts.get, _structure(scan, table))):
        what = "something lies over the refcount table or its blocks"
    if what is not None:
        raise CorruptImageError(
            f"the refcounts cannot be rebuilt, since more is wrong: {what}; open the image "
            f"read-only, or run 'imagofs check --repair all' on it",
            filename=storage.filename,
        )
    stored = StoredCounts(header, scan.clusters, table, flat=scan.counts.flat is not None)
    await stored.load(storage)
    header = await store_refcounts(storage, scan, stored)
    await correct_copied_flags(storage, scan)
    if header.dirty:
        header = replace(header, incompatible=header.incompatible & ~DIRTY)
        await write_fields(storage, header)
    for first, number in free_runs(scan.counts, stored):
        await storage.discard(first << header.cluster_bits, number << header.cluster_bits)
    return header


def _hindrance(scan: Scan) -> str | None:
    """What else than refcounts and flags is wrong."""
    for finding in scan.report.findings:
        if finding.kind not in REBUILT:
            return finding.message
    for cluster, what in scan.overlaps.items():
        return f"{what} lies over {scan.own[cluster]}"
    return None


def free_runs(counts: Counts, stored: Counts) -> Iterator[tuple[int, int]]:
    """(first, number) of host clusters that have no references, though the stored counts say so."""
    first = number = 0
    for start in sorted(stored.starts()):
        for position, references, _ in differences(counts.piece(start), stored.piece(start)):
            if not references:
                if number and first + number == start + position:
                    number += 1
                    continue
                if number:
                    yield first, number
                first, number = start + position, 1
    if number:
        yield first, number


async def store_refcounts(storage: Storage, scan: Scan, stored: StoredCounts) -> Header:
    """Store what `scan` counted, durably. The refcount structure must not be marked yet.

    Returns:
        The header as it is now.

    Raises:
        UnsupportedError: As `rebuild_refcounts`.
        StorageError: Something cannot be written.
    """
    header = scan.header
    if scan.counts.overflow:
        cluster, surplus = next(iter(scan.counts.overflow.items()))
        raise UnsupportedError(
            f"the cluster at {cluster << header.cluster_bits:#x} has "
            f"{scan.counts.maximum + surplus} references, but a refcount of "
            f"{header.refcount_bits} bits ends at {scan.counts.maximum}; 'imagofs check --repair "
            f"all' makes copies",
            filename=storage.filename,
        )
    if _can_stay(scan, stored):
        _count_structure(scan, stored)
        await _store_in_place(storage, scan.counts, stored)
        return header
    return await _store_anew(storage, header, scan.counts)


def _structure(scan: Scan, table: array[int]) -> list[int]:
    """The host clusters of the refcount table and its blocks."""
    header = scan.header
    first = header.reftable_offset >> header.cluster_bits
    clusters = list(range(first, first + header.reftable_clusters))
    return clusters + [entry >> header.cluster_bits for entry in table if entry]


def _can_stay(scan: Scan, stored: StoredCounts) -> bool:
    """Whether the structure is sound and has a block for each cluster in use."""
    mask = scan.header.cluster_size - 1
    if any(entry & mask or entry >> 56 for entry in stored.table):
        return False
    clusters = _structure(scan, stored.table)
    if len(set(clusters)) < len(clusters) or max(clusters) >= scan.clusters:
        return False
    if any(scan.counts.get(cluster) for cluster in clusters):
        return False
    used = {start >> stored.block_bits for start in scan.counts.starts()}
    used.update(cluster >> stored.block_bits for cluster in clusters)
    return all(index < len(stored.table) and stored.table[index] for index in used)


def _count_structure(scan: Scan, stored: StoredCounts) -> None:
    for cluster in _structure(scan, stored.table):
        scan.counts.add(cluster, 1)


async def _store_in_place(storage: Storage, counts: Counts, stored: StoredCounts) -> None:
    bits = counts.refcount_bits
    changed = False
    for start in sorted({*counts.starts(), *stored.starts()}):
        new, old = counts.piece(start), stored.piece(start)
        if new == old:
            continue
        await write_changes(storage, stored.place(start), packed(old, bits), packed(new, bits))
        changed = True
    if changed:
        await storage.sync()


def packed(counts: array[int], bits: int) -> bytes:
    """A piece of refcounts as the file has it."""
    # A chunk may end within a byte, where the file does.
    return pack_refcounts(counts + array(counts.typecode, [0]) * (-len(counts) % 8), bits)


async def _store_anew(storage: Storage, header: Header, counts: Counts) -> Header:
    """Write a new table and new blocks behind the end of the file, and switch to them."""
    bits = header.cluster_bits
    block_bits = bits + 3 - header.refcount_order
    first = counts.clusters
    used = {start >> block_bits for start in counts.starts()}
    table_clusters, blocks = 1, used
    while True:
        end = first + len(blocks) + table_clusters
        wanted = used | set(range(first >> block_bits, (end - 1 >> block_bits) + 1))
        needed = (max(wanted) * 8 >> bits) + 1
        if wanted == blocks and needed == table_clusters:
            break
        blocks, table_clusters = wanted, max(needed, table_clusters)
    if table_clusters << bits > max(MAX_REFTABLE_BYTES, header.cluster_size):
        raise UnsupportedError(
            f"the refcounts need a table of {table_clusters << bits} bytes, more than any program "
            f"reads",
            filename=storage.filename,
        )
    table = array("Q", bytes(table_clusters << bits))
    for position, index in enumerate(sorted(blocks)):
        table[index] = first + position << bits
    for index in sorted(blocks):
        data = _block(header, counts, index, first, first + len(blocks) + table_clusters)
        await write_all(storage, table[index], data)
    place = first + len(blocks) << bits
    await write_all(storage, place, to_big_endian(table))
    await storage.sync()
    header = replace(header, reftable_offset=place, reftable_clusters=table_clusters)
    await write_fields(storage, header)
    return header


def _block(header: Header, counts: Counts, index: int, new: int, end: int) -> bytes:
    """The bytes of a block; clusters from `new` up to `end` count 1."""
    entries = 1 << header.cluster_bits + 3 - header.refcount_order
    start = index * entries
    block = array(counts.typecode, [0]) * entries
    for position in range(0, min(entries, counts.clusters - start), 1 << counts.piece_bits):
        piece = counts.piece(start + position)
        block[position : position + len(piece)] = piece
    low, high = max(new - start, 0), min(end - start, entries)
    if low < high:
        block[low:high] = array(counts.typecode, [1]) * (high - low)
    return pack_refcounts(block, header.refcount_bits)


# --- COPIED flags ---------------------------------------------------------------------------------


async def correct_copied_flags(storage: Storage, scan: Scan) -> int:
    """Set the flag in the active L1 and L2 tables where the refcount is 1, and nowhere else.

    Args:
        storage: The image file.
        scan: A walk with all references counted.

    Returns:
        How many flags were wrong. All is durable.
    """
    header, counts = scan.header, scan.counts
    wrong = 0
    state = scan.states[0]
    l1 = state.l1[:]
    for index, entry in enumerate(l1):
        offset = entry & OFFSET_MASK
        if offset in scan.tables:
            l1[index] = _with_flag(entry, counts.get(offset >> header.cluster_bits) == 1)
            wrong += l1[index] != entry
    for done, (offset, table) in enumerate(sorted(scan.tables.items()), 1):
        if not done % _TABLES_PER_TURN:
            await trio.lowlevel.checkpoint()
        data = await read_bytes(storage, offset, header.cluster_size)
        words = from_big_endian(data)
        changed = 0
        step = header.l2_entry_size // 8
        for index, flag in _flags_to_change(words[::step], header, counts, active=table.active):
            words[index * step] = _with_flag(words[index * step], flag)
            changed += 1
        if changed:
            await write_changes(storage, offset, bytes(data), to_big_endian(words))
            wrong += changed
    await write_changes(storage, state.l1_offset, to_big_endian(state.l1), to_big_endian(l1))
    if wrong:
        await storage.sync()
    return wrong


def _with_flag(entry: int, copied: bool) -> int:
    return entry | COPIED if copied else entry & ~COPIED


def _flags_to_change(
    words: array[int], header: Header, counts: Counts, *, active: int
) -> Iterator[tuple[int, bool]]:
    """Indexes of entries with a wrong flag, and the right one."""
    for index, number, entry in runs(words, header.cluster_size):
        copied = bool(entry & COPIED)
        if entry & COMPRESSED:
            # In no state may such an entry have the flag.
            if copied:
                yield index, False
        elif not active or (not entry & OFFSET_MASK and not header.has_data_file):
            continue
        elif header.has_data_file:
            if not copied and entry & OFFSET_MASK:
                yield from ((position, True) for position in range(index, index + number))
        else:
            first = (entry & OFFSET_MASK) >> header.cluster_bits
            if counts.are_all_one(first, number) if copied else counts.is_none_one(first, number):
                continue
            for position in range(number):
                if (counts.get(first + position) == 1) != copied:
                    yield index + position, not copied


# --- writing --------------------------------------------------------------------------------------


async def append(storage: Storage, header: Header, data: bytes | bytearray) -> int:
    """Write whole clusters behind the end of the file; nothing refers to them yet.

    Returns:
        Their host offset.
    """
    place = storage.size() + -storage.size() % header.cluster_size
    await write_all(storage, place, data + bytes(-len(data) % header.cluster_size))
    return place


async def write_all(
    storage: Storage, host_offset: int, data: bytes | bytearray | memoryview
) -> None:
    """Write `data`, without waiting where that works."""
    view = memoryview(data)
    if storage.writev_nowait((view,), host_offset) != view.nbytes:
        await storage.writev([view], host_offset)


async def write_changes(storage: Storage, host_offset: int, old: bytes, new: bytes) -> None:
    """Write the sectors of `new` that differ from `old`; both have the same length."""
    if old == new:
        return
    view = memoryview(new)
    start = None
    for position in range(0, len(new), _SECTOR):
        if old[position : position + _SECTOR] != new[position : position + _SECTOR]:
            start = position if start is None else start
        elif start is not None:
            await write_all(storage, host_offset + start, view[start:position])
            start = None
    if start is not None:
        await write_all(storage, host_offset + start, view[start:])


async def write_fields(storage: Storage, header: Header) -> None:
    """Put the header's fields in place, in one write, and make them durable."""
    await write_all(storage, FIELDS_OFFSET, header.encode_fields())
    await storage.sync()
