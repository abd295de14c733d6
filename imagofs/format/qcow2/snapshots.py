"""The snapshot table of a qcow2 image: parsing and finding. Section "Snapshots"."""

from __future__ import annotations

import struct
import sys
from typing import NamedTuple

from ...errors import FormatError
from ...storage.base import Storage
from .header import MAX_L1_BYTES, Header

__all__ = ["Snapshot", "find_snapshot", "parse_snapshot", "read_snapshots"]

_FIXED = struct.Struct(">QIHHIIQII")
_MAX_TABLE_BYTES = 64 << 20
_MAX_EXTRA_DATA = 1024
_CHUNK = 1 << 18
#: Memory for names and IDs. qemu makes none of more than 255 and 127 bytes: 65,536 of them fit.
_MAX_NAME_BYTES = 32 << 20


# Made five times as fast as a frozen dataclass, and there may be 65,536 of them.
class Snapshot(NamedTuple):
    """One internal snapshot.

    Attributes:
        id: Its unique ID, a string of digits as a rule.
        name: Its name.
        l1_offset: Host offset of its L1 table.
        l1_entries: Entries of its L1 table.
        disk_size: The guest disk's size then, in bytes.
        vm_state_size: Bytes of the saved state of the machine, 0 for none.
        date: Seconds since 1970.
        date_nsec: Nanoseconds of the date.
        vm_clock_nsec: Time that the machine had run, in nanoseconds.
        icount: Instructions that the machine had run; None where that was not recorded.
        entry_offset: Where its entry begins in the snapshot table, in bytes.
        length: Bytes of its entry with the padding.
        extra_length: Bytes of the entry's extra data.
    """

    id: str
    name: str
    l1_offset: int
    l1_entries: int
    disk_size: int
    vm_state_size: int
    date: int
    date_nsec: int
    vm_clock_nsec: int
    icount: int | None = None
    entry_offset: int = 0
    length: int = 0
    extra_length: int = 0


def parse_snapshot(
    data: bytes | bytearray,
    position: int,
    *,
    number: int,
    entry_offset: int,
    disk_size: int,
    filename: str | None = None,
) -> Snapshot | None:
    """Parse one entry of a snapshot table.

    Args:
        data: A part of the table.
        position: Where the entry begins in it.
        number: The entry's number, for error messages.
        entry_offset: Where it begins in the table.
        disk_size: The disk's size, for an entry that does not say its own.
        filename: For error messages.

    Returns:
        The snapshot; None if `data` ends before it does.

    Raises:
        FormatError: It cannot be right.
    """
    start = position
    position += _FIXED.size
    if position > len(data):
        return None
    (
        l1_offset,
        l1_entries,
        id_length,
        name_length,
        date,
        date_nsec,
        vm_clock_nsec,
        vm_state_size,
        extra_length,
    ) = _FIXED.unpack_from(data, start)
    if extra_length > _MAX_EXTRA_DATA:
        raise FormatError(f"the entry of snapshot {number} is malformed", filename=filename)
    end = position + extra_length + id_length + name_length
    if end > len(data):
        return None
    extra = data[position : position + extra_length]
    position += extra_length
    icount = None
    if extra_length >= 8 and (large_size := int.from_bytes(extra[:8], "big")):
        vm_state_size = large_size
    if extra_length >= 16:
        disk_size = int.from_bytes(extra[8:16], "big")
    if extra_length >= 24:
        value = int.from_bytes(extra[16:24], "big")
        icount = None if value == (1 << 64) - 1 else value
    return Snapshot(
        data[position : position + id_length].decode("utf-8", "replace"),
        data[position + id_length : end].decode("utf-8", "replace"),
        l1_offset,
        l1_entries,
        disk_size,
        vm_state_size,
        date,
        date_nsec,
        vm_clock_nsec,
        icount,
        entry_offset,
        end + -(end - start) % 8 - start,
        extra_length,
    )


async def read_snapshots(storage: Storage, header: Header) -> list[Snapshot]:
    """Read the snapshot table, a chunk at a time since its length is nowhere written down.

    Raises:
        FormatError: It is malformed, reaches past the end of the file, or takes too much memory.
        StorageError: It cannot be read.
    """
    snapshots: list[Snapshot] = []
    data, first, position = bytearray(), 0, 0  # `data` begins at `first` in the table
    limit = min(_MAX_TABLE_BYTES, max(0, storage.size() - header.snapshots_offset))
    name_bytes = 0
    while len(snapshots) < header.snapshot_count:
        snapshot = parse_snapshot(
            data,
            position,
            number=len(snapshots),
            entry_offset=first + position,
            disk_size=header.size,
            filename=storage.filename,
        )
        if snapshot is not None:
            snapshots.append(snapshot)
            position += snapshot.length
            name_bytes += sys.getsizeof(snapshot.id) + sys.getsizeof(snapshot.name)
            if name_bytes > _MAX_NAME_BYTES:
                raise FormatError(
                    "the names of the snapshots are longer than those of qemu can be",
                    filename=storage.filename,
                )
            continue
        # The padding of the last entry may lie behind what was read.
        del data[:position]
        first += position
        position = 0
        length = min(_CHUNK, limit - first - len(data))
        if length <= 0:
            raise FormatError(
                f"the entry of snapshot {len(snapshots)} is truncated", filename=storage.filename
            )
        data += await storage.read_table(length, header.snapshots_offset + first + len(data))
    return snapshots


def find_snapshot(
    snapshots: list[Snapshot], name_or_id: str, header: Header, filename: str | None
) -> Snapshot:
    """The snapshot of an ID or, failing that, of a name.

    Raises:
        FormatError: There is none, or its L1 table cannot be right.
    """
    for attribute in ("id", "name"):
        for snapshot in snapshots:
            if getattr(snapshot, attribute) == name_or_id:
                _check_l1(snapshot, header, filename)
                return snapshot
    names = ", ".join(repr(snapshot.name) for snapshot in snapshots[:20]) or "none"
    raise FormatError(f"no snapshot {name_or_id!r}; there are: {names}", filename=filename)


def _check_l1(snapshot: Snapshot, header: Header, filename: str | None) -> None:
    bits = header.cluster_bits + header.l2_bits
    needed = snapshot.disk_size + (1 << bits) - 1 >> bits
    if (
        snapshot.l1_offset & header.cluster_size - 1
        or not snapshot.l1_offset
        or snapshot.l1_entries * 8 > MAX_L1_BYTES
        or snapshot.l1_entries < needed
    ):
        raise FormatError(
            f"the L1 table of snapshot {snapshot.name!r} ({snapshot.l1_entries} entries at "
            f"{snapshot.l1_offset:#x}) cannot be right",
            filename=filename,
        )
