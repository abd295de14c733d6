"""The snapshot table of a qcow2 image: parsing and finding. Section "Snapshots"."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ...errors import FormatError
from ...storage.base import Storage
from .header import MAX_L1_BYTES, Header

__all__ = ["Snapshot", "find_snapshot", "parse_snapshots", "read_snapshots"]

_FIXED = struct.Struct(">QIHHIIQII")
_MAX_TABLE_BYTES = 64 << 20
_MAX_EXTRA_DATA = 1024
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Snapshot:
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


def parse_snapshots(
    data: bytes, count: int, disk_size: int, filename: str | None = None
) -> list[Snapshot]:
    """Parse a snapshot table.

    Args:
        data: Its bytes; more may follow.
        count: Entries in it.
        disk_size: The disk's size, for entries that do not say theirs.
        filename: For error messages.

    Raises:
        FormatError: An entry does not fit `data`, or cannot be right.
    """
    snapshots: list[Snapshot] = []
    position = 0
    for number in range(count):
        start = position
        if position + _FIXED.size > len(data):
            raise FormatError(f"the entry of snapshot {number} is truncated", filename=filename)
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
        ) = _FIXED.unpack_from(data, position)
        position += _FIXED.size
        end = position + extra_length + id_length + name_length
        if extra_length > _MAX_EXTRA_DATA or end > len(data):
            raise FormatError(f"the entry of snapshot {number} is malformed", filename=filename)
        extra = data[position : position + extra_length]
        position += extra_length
        snapshot_size, icount = disk_size, None
        if extra_length >= 8 and (large_size := int.from_bytes(extra[:8], "big")):
            vm_state_size = large_size
        if extra_length >= 16:
            snapshot_size = int.from_bytes(extra[8:16], "big")
        if extra_length >= 24:
            value = int.from_bytes(extra[16:24], "big")
            icount = None if value == (1 << 64) - 1 else value
        identifier = data[position : position + id_length].decode("utf-8", "replace")
        name = data[position + id_length : end].decode("utf-8", "replace")
        position = end + -(end - start) % 8
        snapshots.append(
            Snapshot(
                identifier,
                name,
                l1_offset,
                l1_entries,
                snapshot_size,
                vm_state_size,
                date,
                date_nsec,
                vm_clock_nsec,
                icount,
                start,
                position - start,
                extra_length,
            )
        )
    return snapshots


async def read_snapshots(storage: Storage, header: Header) -> list[Snapshot]:
    """Read the snapshot table, a chunk at a time since its length is nowhere written down.

    Raises:
        FormatError: It is malformed, or reaches past the end of the file.
        StorageError: It cannot be read.
    """
    if not header.snapshot_count:
        return []
    data = bytearray()
    limit = min(_MAX_TABLE_BYTES, max(0, storage.size() - header.snapshots_offset))
    while True:
        length = min(_CHUNK + len(data), limit - len(data))
        data += await storage.read_table(length, header.snapshots_offset + len(data))
        try:
            return parse_snapshots(
                bytes(data), header.snapshot_count, header.size, storage.filename
            )
        except FormatError:
            if len(data) >= limit:
                raise


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
