"""Mending the snapshot table and the bitmap directory.

A new snapshot table is durable before the header's fields switch to it in one write. Bitmaps are
mended where they are: one that lost something is marked as inconsistent first.
"""

from __future__ import annotations

from dataclasses import replace

from ...storage.base import Storage
from .bitmaps import IN_USE, Bitmap
from .check import Examination
from .check_counts import read_bytes, read_table
from .check_scan import BITMAP_DIRECTORY, bitmap_table, incomplete_extra_data
from .entries import to_big_endian
from .header import BITMAPS, MAX_L1_BYTES, Header
from .rebuilding import append, write_all, write_changes, write_fields
from .repair_entries import Losses

__all__ = ["mend_bitmaps", "mend_snapshots"]

_FIXED_BYTES = 40
_EXTRA_BYTES = 16
_MAX_TABLE_BYTES = 64 << 20
#: Bytes of extra data that other programs take.
_MAX_EXTRA_BYTES = 1024

# Where fields are in a bitmap directory entry.
_TABLE_OFFSET, _FLAGS = 0, 12


async def mend_snapshots(
    storage: Storage, header: Header, examination: Examination, losses: Losses
) -> tuple[Header, bool]:
    """Take snapshots out of the table that cannot be used, and complete the entries of others.

    Returns:
        The header as it is now, and whether something was changed; that is durable.
    """
    if not header.snapshot_count:
        return header, False
    scan = examination.scan
    found = {state.snapshot for state in scan.states}
    if len(found) == header.snapshot_count + 1 and not any(
        incomplete_extra_data(header, snapshot) for snapshot in scan.snapshots
    ):
        return header, False
    length = min(storage.size() - header.snapshots_offset, _MAX_TABLE_BYTES)
    if scan.snapshots:
        last = scan.snapshots[-1]
        length = last.entry_offset + last.length
    data = bytes(await read_bytes(storage, header.snapshots_offset, max(length, 0)))
    entries: list[bytes] = []
    position = 0
    for number in range(header.snapshot_count):
        entry, end = _entry(header, data, position)
        if entry is None:
            losses.notes.append(
                f"snapshots {number + 1} to {header.snapshot_count} are lost: the snapshot table "
                f"ends in something else"
            )
            break
        # A table that was read tells which L1 tables can be used.
        usable = number in found if scan.snapshots else _is_usable(header, entry, storage.size())
        if usable:
            entries.append(entry)
        else:
            losses.notes.append(f"snapshot {_name(entry)!r} is lost: so is its L1 table")
        position = end
    place = 0
    if entries:
        place = await append(storage, header, b"".join(entries))
        await storage.sync()
    header = replace(header, snapshot_count=len(entries), snapshots_offset=place)
    await write_fields(storage, header)
    return header, True


def _entry(header: Header, data: bytes, start: int) -> tuple[bytes | None, int]:
    """The bytes of the entry at `start`, with the extra data it needs, and where it ends."""
    if start + _FIXED_BYTES > len(data):
        return None, start
    fixed = data[start : start + _FIXED_BYTES]
    extra_length = int.from_bytes(fixed[36:40], "big")
    names = int.from_bytes(fixed[12:14], "big") + int.from_bytes(fixed[14:16], "big")
    end = start + _FIXED_BYTES + extra_length + names
    if end > len(data):
        return None, start
    extra = data[start + _FIXED_BYTES : start + _FIXED_BYTES + extra_length][:_MAX_EXTRA_BYTES]
    if header.version >= 3 and len(extra) < _EXTRA_BYTES:
        # The size of the saved machine state in 64 bits, and the disk's size.
        state_size = (
            extra if len(extra) >= 8 else int.from_bytes(fixed[32:36], "big").to_bytes(8, "big")
        )
        extra = state_size[:8] + header.size.to_bytes(8, "big")
    entry = fixed[:36] + len(extra).to_bytes(4, "big") + extra + data[end - names : end]
    return entry + bytes(-len(entry) % 8), end + -(end - start) % 8


def _is_usable(header: Header, entry: bytes, size: int) -> bool:
    l1_offset = int.from_bytes(entry[:8], "big")
    length = int.from_bytes(entry[8:12], "big") * 8
    return (
        l1_offset > 0
        and not l1_offset & header.cluster_size - 1
        and length <= MAX_L1_BYTES
        and l1_offset + length <= size
    )


def _name(entry: bytes) -> str:
    extra_length = int.from_bytes(entry[36:40], "big")
    start = _FIXED_BYTES + extra_length + int.from_bytes(entry[12:14], "big")
    return entry[start : start + int.from_bytes(entry[14:16], "big")].decode("utf-8", "replace")


# --- bitmaps --------------------------------------------------------------------------------------


async def mend_bitmaps(
    storage: Storage, header: Header, examination: Examination, losses: Losses
) -> tuple[Header, bool]:
    """Empty what bitmaps cannot keep. Returns as `mend_snapshots`.

    A bitmap that lost something is marked as inconsistent: programs do not trust it, and it can
    be removed. If the directory is broken all bitmaps are lost.
    """
    if header.bitmaps is None:
        return header, False
    scan = examination.scan
    directory = header.bitmaps
    if not scan.bitmaps or not scan.is_alone(
        BITMAP_DIRECTORY, directory.directory_offset, directory.directory_size
    ):
        losses.notes.append("all bitmaps are lost: the bitmap directory cannot be read")
        header = replace(header, autoclear=header.autoclear & ~BITMAPS, bitmaps=None)
        await write_fields(storage, header)
        return header, True
    changed = False
    for bitmap in scan.bitmaps:
        place = directory.directory_offset + bitmap.position
        if not scan.is_alone(bitmap_table(bitmap), bitmap.table_offset, bitmap.table_entries * 8):
            await _mark_inconsistent(storage, place, bitmap, losses)
            await _give_empty_table(storage, header, place, bitmap)
            changed = True
        else:
            table = await read_table(storage, bitmap.table_offset, bitmap.table_entries)
            new = table[:]
            for index, entry in enumerate(table):
                if entry and not scan.is_bitmap_entry_usable(bitmap, entry):
                    new[index] = 0
            if new != table:
                await _mark_inconsistent(storage, place, bitmap, losses)
                old, data = to_big_endian(table), to_big_endian(new)
                await write_changes(storage, bitmap.table_offset, old, data)
                changed = True
    if changed:
        await storage.sync()
    return header, changed


async def _mark_inconsistent(storage: Storage, place: int, bitmap: Bitmap, losses: Losses) -> None:
    losses.notes.append(f"bitmap {bitmap.name!r} lost something and is marked as inconsistent")
    if not bitmap.flags & IN_USE:
        await write_all(storage, place + _FLAGS, (bitmap.flags | IN_USE).to_bytes(4, "big"))
        await storage.sync()


async def _give_empty_table(storage: Storage, header: Header, place: int, bitmap: Bitmap) -> None:
    per_cluster = 8 * header.cluster_size << min(bitmap.granularity_bits, 31)
    entries = max(-(-header.size // per_cluster), 1)
    table = await append(storage, header, bytes(entries * 8))
    await storage.sync()
    await write_all(
        storage, place + _TABLE_OFFSET, table.to_bytes(8, "big") + entries.to_bytes(4, "big")
    )
