"""Opening a qcow2 image: reading the header and the resident tables, and what it refers to."""

from __future__ import annotations

from array import array
from types import NoneType
from typing import TYPE_CHECKING

import trio

from ...arguments import check_type
from ...errors import FormatError, ReadOnlyError, UnsupportedError
from ...opening import FROM_HEADER, FromHeader
from ...storage.base import Storage
from .bitmaps import read_bitmaps
from .driver import Qcow2
from .entries import OFFSET_MASK, from_big_endian
from .header import MAX_CLUSTER_BITS, Header, parse_header
from .metadata import Metadata
from .own import MOST_BITS, MOST_IN_A_SET, OwnClusters
from .snapshots import find_snapshot, read_snapshots

if TYPE_CHECKING:
    from ...access import FormatAccess
    from ...opening import OpenContext

__all__ = ["load", "read_header"]

_USUAL_CLUSTER = 1 << 16
_PIECE = 1 << 20


async def read_header(storage: Storage, *, encrypted_too: bool = False) -> Header:
    """Read and check the header, and that the resident tables lie in the file.

    Args:
        storage: The image file.
        encrypted_too: See `parse_header`.

    Raises:
        FormatError, UnsupportedError: As `parse_header`.
        StorageError: It cannot be read.
    """
    data = await storage.read_table(min(_USUAL_CLUSTER, storage.size()), 0)
    cluster_bits = int.from_bytes(data[20:24], "big")
    if 16 < cluster_bits <= MAX_CLUSTER_BITS and len(data) == _USUAL_CLUSTER:
        # Only a header with long extensions needs more; a name may be anywhere in the cluster.
        data = await storage.read_table(min(1 << cluster_bits, storage.size()), 0)
    header = parse_header(bytes(data), storage.filename, encrypted_too=encrypted_too)
    size = storage.size()
    for name, offset, length in (
        ("L1 table", header.l1_offset, header.l1_entries * 8),
        ("refcount table", header.reftable_offset, header.reftable_clusters << header.cluster_bits),
        ("snapshot table", header.snapshots_offset, min(header.snapshot_count, 1)),
    ):
        if length and offset + length > size:
            raise FormatError(
                f"the {name} ({length} bytes at {offset}) reaches past the end of the file "
                f"({size} bytes): truncated?",
                filename=storage.filename,
            )
    return header


async def _read_table(storage: Storage, host_offset: int, entries: int) -> array[int]:
    # Piece by piece into its place: a table of 32 MiB is not to be there twice, and might be while
    # an array grows.
    table, end = array("Q", [0]) * entries, host_offset + entries * 8
    with memoryview(table) as view:
        for position in range(host_offset, end, _PIECE):
            data = await storage.read_table(min(_PIECE, end - position), position)
            first = position - host_offset >> 3
            view[first : first + (len(data) >> 3)] = from_big_endian(data)
    return table


async def load(
    storage: Storage,
    *,
    context: OpenContext,
    writable: bool,
    snapshot: str | None = None,
    backing: FormatAccess | FromHeader | None = FROM_HEADER,
    data_file: Storage | FromHeader = FROM_HEADER,
) -> Qcow2:
    """Open the image in `storage`. If that fails, what was opened here is closed again.

    Raises:
        As `open_image`.
    """
    from ...access import FormatAccess

    check_type("backing", backing, FormatAccess, FromHeader, NoneType)
    check_type("data_file", data_file, Storage, FromHeader)
    check_type("the snapshot", snapshot, str, NoneType)
    header = await read_header(storage)
    if writable:
        _check_writable(storage, header, snapshot)
        if header.dirty:
            from .rebuilding import rebuild_refcounts  # loads most of the check: only if needed

            # Refcounts first: what they say decides on every write, and so do the COPIED flags.
            header = await rebuild_refcounts(storage, header)
    l1_offset, l1_entries, size = header.l1_offset, header.l1_entries, header.size
    if snapshot is not None:
        found = find_snapshot(
            await read_snapshots(storage, header), snapshot, header, storage.filename
        )
        l1_offset, l1_entries, size = found.l1_offset, found.l1_entries, found.disk_size
        if l1_offset + l1_entries * 8 > storage.size():
            raise FormatError(
                f"the L1 table of snapshot {snapshot!r} reaches past the end of the file",
                filename=storage.filename,
            )
    l1 = await _read_table(storage, l1_offset, l1_entries)
    # Reading needs no refcounts.
    reftable = array("Q")
    if writable:
        entries = header.reftable_clusters << header.cluster_bits - 3
        reftable = await _read_table(storage, header.reftable_offset, entries)
    data_storage = await _data_storage(storage, header, context, data_file, writable)
    opened_backing = None
    try:
        if isinstance(backing, FromHeader):
            if header.backing_file is not None:
                opener = context.below(data_storage) if writable else context
                opened_backing = await opener.open_backing(
                    header.backing_file, header.backing_format
                )
            backing = opened_backing
        metadata = Metadata(storage, data_storage, header, l1, reftable, context.cache)
        if writable:
            await _enter_own_clusters(metadata.own, storage, header, l1, reftable)
        return Qcow2(
            metadata,
            size=size,
            writable=writable,
            backing=backing,
            inflated=context.inflated,
        )
    except BaseException:
        with trio.CancelScope(shield=True):
            if opened_backing is not None:
                await opened_backing.close()
            if data_storage is not storage and isinstance(data_file, FromHeader):
                await data_storage.close()
        raise


def _check_writable(storage: Storage, header: Header, snapshot: str | None) -> None:
    if snapshot is not None:
        raise FormatError("a snapshot can only be read", filename=storage.filename)
    if header.corrupt:
        raise FormatError(
            "the image is marked corrupt and is not opened for writing; run "
            "'imagofs check --repair all' or 'qemu-img check -r all' on it",
            filename=storage.filename,
        )


async def _enter_own_clusters(
    own: OwnClusters, storage: Storage, header: Header, l1: array[int], reftable: array[int]
) -> None:
    """Enter the host clusters that hold metadata into `own`.

    Raises:
        FormatError: A table cannot be where its entry says, or lies over another one: writing
            would make it worse.
        UnsupportedError: There are too many tables in too long a file to keep all in mind.
    """
    bits, end = header.cluster_bits, storage.size()

    def wrong(what: str, offset: int) -> FormatError:
        return FormatError(
            f"the {what} at {offset:#x} is misplaced or lies over other metadata; open the image "
            f"read-only, or run imagofs check",
            filename=storage.filename,
        )

    def add(what: str, offset: int, length: int) -> None:
        clusters = range(offset >> bits, offset + length + header.cluster_size - 1 >> bits)
        if offset & header.cluster_size - 1 or offset + length > end or own.overlaps(clusters):
            raise wrong(what, offset)
        own.add_range(clusters)

    add("L1 table", header.l1_offset, header.l1_entries * 8)
    add("refcount table", header.reftable_offset, header.reftable_clusters << bits)
    snapshots = await read_snapshots(storage, header)
    if snapshots:
        # The file may end before the padding of the last entry does.
        length = sum(snapshot.length for snapshot in snapshots)
        add("snapshot table", header.snapshots_offset, min(length, end - header.snapshots_offset))
    for snapshot in snapshots:
        add(f"L1 table of snapshot {snapshot.name!r}", snapshot.l1_offset, snapshot.l1_entries * 8)
    if header.bitmaps is not None:
        add("bitmap directory", header.bitmaps.directory_offset, header.bitmaps.directory_size)
    for bitmap in await read_bitmaps(storage, header):
        add(f"table of bitmap {bitmap.name!r}", bitmap.table_offset, bitmap.table_entries * 8)

    # Single clusters last, so that no range needs to be compared with millions of them.
    tables = len(l1) - l1.count(0) + len(reftable) - reftable.count(0)
    if tables > MOST_IN_A_SET and end >> bits > MOST_BITS:
        raise UnsupportedError(
            f"{tables} tables in a file of {end} bytes are too many to write to; open the image "
            f"read-only, or convert it to larger clusters",
            filename=storage.filename,
        )
    mask, last = header.cluster_size - 1, end - header.cluster_size
    for what, entries in (("refcount block", reftable), ("L2 table", l1)):
        offset_mask = OFFSET_MASK if entries is l1 else -1
        for index, entry in enumerate(entries):
            offset = entry & offset_mask
            if offset:
                cluster = offset >> bits
                if offset & mask or offset > last or cluster in own:
                    raise wrong(f"{what} {index}", offset)
                own.add(cluster)


async def _data_storage(
    storage: Storage,
    header: Header,
    context: OpenContext,
    data_file: Storage | FromHeader,
    writable: bool,
) -> Storage:
    if not isinstance(data_file, FromHeader):
        if not header.has_data_file:
            raise UnsupportedError("the image has no external data file", filename=storage.filename)
        if writable and not data_file.writable:
            raise ReadOnlyError("the data file is open read-only", filename=data_file.filename)
        return data_file
    if not header.has_data_file:
        return storage
    if header.data_file is None:
        raise FormatError(
            "the image has an external data file but does not name it", filename=storage.filename
        )
    return await context.open_data_file(header.data_file, writable=writable)
