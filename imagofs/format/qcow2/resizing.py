"""Changing the size of a qcow2 image's disk.

Growing: the L1 table first, if it is too short; then all that the guest would see in the new range
besides zeroes is taken away: the rest of the old last cluster, what a longer backing file has
there, mappings that somebody left behind the end. Then comes a sync, then the new size, in one
write of the header.

Shrinking: the guest loses the range at once; then the mappings are dropped and flushed, then the
size is written.

While that goes on, the driver's `reach` is the larger size, and `size()` the smaller one: requests
see the smaller disk. If it fails or is cancelled before the size is written, the disk has its old
size, and what was dropped is lost; what comes after that only returns space.
"""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from ...errors import OutOfRangeError, StorageError, UnsupportedError
from ...mapping import IndirectMapping, ZeroMapping
from ...storage.base import PreallocateMode, Storage
from ...vectors import zero_views
from ..base import DiscardTo
from .entries import OFFSET_MASK, to_big_endian
from .header import MAX_L1_BYTES
from .l2 import Missing, with_tables
from .metadata import Metadata
from .refcounts import TableFull
from .snapshots import read_snapshots

if TYPE_CHECKING:
    from .driver import Qcow2
    from .writing import Writer

__all__ = ["resize"]

_SECTOR = 512
_STEP = 1 << 20


async def resize(driver: Qcow2, writer: Writer, size: int, mode: PreallocateMode) -> None:
    """Set the disk's size; see `FormatDriver.resize`. The caller lets in one at a time.

    Raises:
        OutOfRangeError: No disk of this image can have the size.
        UnsupportedError: This image cannot be resized, or not so.
        StorageError: A storage failed. The disk has its old size.
    """
    old_size = driver.size()
    await _check(driver, size, mode)
    await writer.prepare()
    if size > old_size:
        await _grow(driver, writer, old_size, size, mode)
    elif size < old_size:
        await _shrink(driver, writer, old_size, size)


async def _check(driver: Qcow2, size: int, mode: PreallocateMode) -> None:
    header, filename = driver.header, driver.filename
    old_size = driver.size()
    if size < 0 or size % _SECTOR:
        raise OutOfRangeError(
            f"a disk of {size} bytes; it has whole sectors of 512 bytes", filename=filename
        )
    needed = replace(header, size=size).l1_entries_needed
    if needed * 8 > MAX_L1_BYTES:
        raise OutOfRangeError(
            f"a disk of {size} bytes is too large for clusters of {header.cluster_size} bytes",
            filename=filename,
        )
    if header.version < 3 and header.snapshot_count:
        raise UnsupportedError(
            "a version 2 image with snapshots cannot be resized; delete them, or upgrade it with "
            "qemu-img amend -o compat=v3",
            filename=filename,
        )
    if header.bitmaps is not None:
        raise UnsupportedError(
            "an image with persistent bitmaps cannot be resized; remove them with qemu-img bitmap",
            filename=filename,
        )
    if size < old_size:
        if mode is not PreallocateMode.NONE:
            raise UnsupportedError(
                "only an image that grows has room to preallocate", filename=filename
            )
        for snapshot in await read_snapshots(driver.metadata.storage, header):
            if snapshot.disk_size > size:
                raise UnsupportedError(
                    f"the snapshot {snapshot.name!r} needs {snapshot.disk_size} bytes; delete it "
                    f"before the image shrinks to {size}",
                    filename=filename,
                )
    elif size > old_size and header.backing_file is not None and driver.backing is None:
        raise UnsupportedError(
            f"the image was opened without its backing file {header.backing_file!r}, which might "
            f"show through the new range",
            filename=filename,
        )


# --- growing --------------------------------------------------------------------------------------


async def _grow(
    driver: Qcow2, writer: Writer, old_size: int, size: int, mode: PreallocateMode
) -> None:
    metadata = driver.metadata
    header = metadata.header
    entries = replace(header, size=size).l1_entries_needed
    if entries > len(metadata.l2.l1):
        await _grow_l1_table(metadata, entries)
    if header.data_file_raw and mode in (PreallocateMode.NONE, PreallocateMode.ZERO):
        # What is not mapped would not be read from the data file, though it is the disk.
        mode = PreallocateMode.FORMAT_ALLOCATE
    try:
        driver.set_sizes(old_size, size)
        if header.has_data_file:
            await _grow_data_file(driver, old_size, size)
        await _hide(driver, writer, old_size, size)
        if mode not in (PreallocateMode.NONE, PreallocateMode.ZERO):
            await _preallocate(driver, writer, old_size, size, mode)
        await _write_size(metadata, size)
    except BaseException:
        driver.set_sizes(old_size, old_size)
        raise
    driver.set_sizes(size, size)


async def _grow_data_file(driver: Qcow2, old_size: int, size: int) -> None:
    """Bring the data file to the new size; a raw one has zeroes in all of the new range."""
    storage = driver.data_storages[0]
    # Nothing is written meanwhile: a resize that is cancelled sets the old length again.
    async with driver.locks.hold(0, size + 1):
        if driver.header.data_file_raw and storage.size() > old_size:
            await storage.resize(old_size)
        if storage.size() < size:
            await storage.resize(size, PreallocateMode.ZERO)


async def _hide(driver: Qcow2, writer: Writer, old_size: int, size: int) -> None:
    """See that the range that is added reads as zero."""
    covered = 0 if driver.backing is None else min(driver.backing.size(), size)
    unit = driver.header.cluster_size
    first = min(-(-old_size // unit) * unit, size)
    position = old_size
    while position < first:
        mapping = await driver.get_mapping(position, first - position)
        shows = not isinstance(mapping, ZeroMapping)
        if isinstance(mapping, IndirectMapping):
            shows = position < covered
        if shows:
            await writer.write_zeroes(position, mapping.length, allocate=False)
        position += mapping.length
    if covered > first:
        await writer.write_zeroes(first, covered - first, allocate=False)
        first = min(-(-covered // unit) * unit, size)
    # Growing that was given up may have left mappings there.
    end = min(size, _mapped_end(driver.metadata))
    if first < end:
        await writer.discard(first, end - first, DiscardTo.BACKING)


async def _preallocate(
    driver: Qcow2, writer: Writer, old_size: int, size: int, mode: PreallocateMode
) -> None:
    """Map the clusters that are new as a whole, and do with their space what `mode` says."""
    unit = driver.header.cluster_size
    start = -(-old_size // unit) * unit
    # An image file has whole clusters; a data file ends with the disk.
    end = size if driver.header.has_data_file else -(-size // unit) * unit
    if start < end:
        await writer.map_zeroes(start, end - start, _reserve(driver.data_storages[0], mode))


def _reserve(storage: Storage, mode: PreallocateMode) -> Callable[[int, int], Awaitable[None]]:
    """What makes a range of the storage read as zero, as `mode` wants it."""

    async def write(host_offset: int, length: int) -> None:
        for start in range(0, length, _STEP):
            views = zero_views(min(_STEP, length - start))
            await storage.writev(views, host_offset + start)

    if mode is PreallocateMode.WRITE_DATA:
        return write
    if mode is PreallocateMode.FULL_ALLOCATE:
        return storage.write_allocated_zeroes
    return storage.write_zeroes


async def _write_size(metadata: Metadata, size: int) -> None:
    """Write the new size into the header, behind a flush of all that it needs."""
    async with metadata.settled():
        with trio.CancelScope(shield=True):
            await metadata.change_header(replace(metadata.header, size=size))


# --- shrinking ------------------------------------------------------------------------------------


async def _shrink(driver: Qcow2, writer: Writer, old_size: int, size: int) -> None:
    metadata = driver.metadata
    unit = driver.header.cluster_size
    first = -(-size // unit) * unit
    # Growing that was given up may have left mappings behind the end. They go as well.
    end = max(old_size, _mapped_end(metadata))
    try:
        driver.set_sizes(size, end)
        # Whoever asked before is let through; whoever asks from now on sees the smaller disk.
        await driver.changes.wait_for_earlier()
        if first < end:
            await writer.discard(first, end - first, DiscardTo.BACKING)
            # No flush may be writing a table that goes.
            async with metadata.settled():
                _drop_tables(metadata, size)
        await _write_size(metadata, size)
    except BaseException:
        driver.set_sizes(old_size, old_size)
        raise
    driver.set_sizes(size, size)
    if driver.header.has_data_file:
        await metadata.epochs.wait_for_earlier()
        storage = driver.data_storages[0]
        # A write that was let in earlier may reach up to the end of the last cluster.
        async with driver.locks.hold(0, end + 1):
            if storage.size() > size:
                await storage.resize(size)
    await _cut_file(driver)


def _mapped_end(metadata: Metadata) -> int:
    """Where the last L2 table ends, in bytes of the guest's disk; 0 where there is none."""
    l2 = metadata.l2
    indexes = reversed(range(len(l2.l1)))
    return next((index + 1 << l2.l1_bits for index in indexes if l2.l1[index] & OFFSET_MASK), 0)


async def _cut_file(driver: Qcow2) -> None:
    """Let the image file end behind the last cluster that is used."""
    metadata = driver.metadata
    storage = metadata.storage
    # Nothing is allocated while all guest ranges are held.
    async with driver.locks.hold(0, driver.size() + 1), metadata.settled():
        idle, clusters = await with_tables(metadata.refcounts.tail)
        end = clusters << metadata.header.cluster_bits
        if end >= storage.size():
            return
        try:
            if idle:
                # Behind the first of them the table has no others.
                place = metadata.header.reftable_offset + idle[-1] * 8
                old = to_big_endian(metadata.refcounts.table[idle[-1] : idle[0] + 1])
                await metadata.overwrite(place, bytes(len(old)), old)
                metadata.refcounts.forget_blocks(idle)
            await storage.resize(end)
        except (UnsupportedError, StorageError):
            pass  # the disk has its size, and what the file has too much is a hole


def _drop_tables(metadata: Metadata, size: int) -> None:
    """Take away the L2 tables that lie behind the end as a whole; they map nothing any more."""
    l2 = metadata.l2
    first = size + (1 << l2.l1_bits) - 1 >> l2.l1_bits
    for index in range(first, len(l2.l1)):
        host_offset = l2.l1[index] & OFFSET_MASK
        if host_offset:
            l2.drop_table(index)
            cluster = host_offset >> metadata.header.cluster_bits
            metadata.own.discard(cluster)
            metadata.refcounts.dropped[cluster] += 1


# --- the L1 table ---------------------------------------------------------------------------------


async def _grow_l1_table(metadata: Metadata, entries: int) -> None:
    """Make the L1 table longer, in its place if it fits there.

    A new table's clusters are counted, durably, before anything refers to it. It gets what the old
    one has on disk, whose targets are durable; entries that changed since are written by the next
    flush. The header's fields switch to it in one write; then the old one is dropped.
    """
    header = metadata.header
    bits = header.cluster_bits
    if entries * 8 <= header.l1_clusters << bits:
        async with metadata.settled():
            old_end = metadata.header.l1_entries * 8
            await metadata.write(header.l1_offset + old_end, bytes(entries * 8 - old_end))
            await _switch_l1_table(metadata, header.l1_offset, entries)
        return
    clusters = entries * 8 + header.cluster_size - 1 >> bits
    first = await _allocate_run(metadata, clusters)
    metadata.own.add_range(range(first, first + clusters))
    try:
        async with metadata.settled():
            old = range(header.l1_offset >> bits, (header.l1_offset >> bits) + header.l1_clusters)
            table = bytearray(clusters << bits)
            if header.l1_entries:
                view = memoryview(table)[: header.l1_entries * 8]
                await metadata.storage.readv([view], header.l1_offset)
            await metadata.write(first << bits, memoryview(table))
            await _switch_l1_table(metadata, first << bits, entries)
    except BaseException:
        if metadata.header.l1_offset != first << bits:
            metadata.own.remove_range(range(first, first + clusters))
            metadata.refcounts.give_back([(first, clusters)])
        raise
    metadata.own.remove_range(old)
    metadata.refcounts.dropped.update(old)


async def _switch_l1_table(metadata: Metadata, l1_offset: int, entries: int) -> None:
    with trio.CancelScope(shield=True):
        await metadata.change_header(
            replace(metadata.header, l1_offset=l1_offset, l1_entries=entries)
        )
        metadata.l2.l1.extend([0] * (entries - len(metadata.l2.l1)))


async def _allocate_run(metadata: Metadata, clusters: int) -> int:
    """Allocate host clusters behind each other; the number of the first."""
    while True:
        try:
            run = metadata.refcounts.allocate_run(clusters)
        except Missing as missing:
            await missing.load()
        except TableFull:
            await metadata.grow_refcount_table()
        else:
            if run is not None:
                return run[0]
            break
    while True:
        async with metadata.settled():
            first = await _make_area(metadata, clusters)
        if first is not None:
            return first
        await metadata.grow_refcount_table()


async def _make_area(metadata: Metadata, clusters: int) -> int | None:
    """Allocate more host clusters than a block counts: behind all others, with blocks of their own.

    The blocks lie in front, each counted by one of them. An entry of the refcount table is only
    written once the block that counts its block can be found.

    Returns:
        The number of the first cluster; None if the refcount table has too few entries.
    """
    refcounts, header = metadata.refcounts, metadata.header
    bits, block_bits = header.cluster_bits, refcounts.block_bits
    index = max(number for number, entry in enumerate(refcounts.table) if entry) + 1
    blocks = 1
    while blocks + clusters > blocks << block_bits:
        blocks += 1
    if index + blocks > len(refcounts.table):
        return None
    start = index << block_bits
    used = blocks + clusters
    new_blocks = {
        index + number: refcounts.full_block(used - (number << block_bits))
        for number in range(blocks)
    }
    refcounts.add_blocks(new_blocks, start, start + used)
    metadata.own.add_range(range(start, start + blocks))
    encoded = b"".join(map(refcounts.encoded_block, new_blocks.values()))
    entries = array("Q", [start + number << bits for number in range(blocks)])
    try:
        await metadata.write(start << bits, encoded)
        await metadata.sync_now()
        done, following = 0, 1
        while done < blocks:
            place = header.reftable_offset + (index + done) * 8
            await metadata.write(place, to_big_endian(entries[done:following]))
            await metadata.sync_now()
            done, following = following, min(following << block_bits, blocks)
    except BaseException:
        refcounts.are_not_written(new_blocks)
        refcounts.give_back([(start + blocks, clusters)])
        raise
    return start + blocks
