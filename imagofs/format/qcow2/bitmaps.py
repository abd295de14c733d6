"""The bitmap directory of a qcow2 image, as far as writing must know it. Section "Bitmaps"."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import FormatError
from ...storage.base import Storage
from .header import Header

if TYPE_CHECKING:
    from .metadata import Metadata

__all__ = ["Bitmap", "mark_bitmaps_in_use", "parse_bitmaps", "read_bitmaps"]

_ENTRY = struct.Struct(">QIIBBHI")
_FLAGS_OFFSET = 12
#: Bitmap directory entry, flags: bit 0, the bitmap was not saved correctly.
IN_USE = 1 << 0
#: Bit 1: the bitmap records every write.
AUTO = 1 << 1


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One bitmap.

    Attributes:
        name: Its name.
        table_offset: Host offset of its table, in bytes.
        table_entries: Entries of the table.
        flags: `IN_USE` and `AUTO`.
        kind: 1 for a dirty tracking bitmap, the only one there is.
        granularity_bits: log2 of the guest bytes that one bit stands for.
        position: Where its entry begins in the directory, in bytes.
    """

    name: str
    table_offset: int
    table_entries: int
    flags: int
    kind: int
    granularity_bits: int
    position: int


def parse_bitmaps(directory: bytes, count: int, filename: str | None = None) -> list[Bitmap]:
    """Parse a bitmap directory.

    Raises:
        FormatError: Its entries do not fill it exactly.
    """
    bitmaps: list[Bitmap] = []
    position = 0
    while position < len(directory):
        if position + _ENTRY.size > len(directory):
            raise FormatError("the bitmap directory is truncated", filename=filename)
        table_offset, entries, flags, kind, granularity, name_length, extra = _ENTRY.unpack_from(
            directory, position
        )
        name_start = position + _ENTRY.size + extra
        end = name_start + name_length
        if end > len(directory):
            raise FormatError("a bitmap directory entry is malformed", filename=filename)
        name = directory[name_start:end].decode("utf-8", "replace")
        bitmaps.append(Bitmap(name, table_offset, entries, flags, kind, granularity, position))
        position = end + -(end - position) % 8
    if len(bitmaps) != count:
        raise FormatError(
            f"the bitmap directory has {len(bitmaps)} entries, the header says {count}",
            filename=filename,
        )
    return bitmaps


async def read_bitmaps(storage: Storage, header: Header) -> list[Bitmap]:
    """Read the bitmap directory.

    Raises:
        FormatError: It is malformed, or reaches past the end of the file.
        StorageError: It cannot be read.
    """
    extension = header.bitmaps
    if extension is None:
        return []
    if extension.directory_offset + extension.directory_size > storage.size():
        raise FormatError(
            "the bitmap directory reaches past the end of the file", filename=storage.filename
        )
    directory = await storage.read_table(extension.directory_size, extension.directory_offset)
    return parse_bitmaps(bytes(directory), extension.count, storage.filename)


async def mark_bitmaps_in_use(metadata: Metadata) -> None:
    """Say in the image, durably, that its recording bitmaps miss what is written from now on.

    Disabled bitmaps record nothing and stay valid.
    """
    extension = metadata.header.bitmaps
    assert extension is not None
    changed = False
    for bitmap in await read_bitmaps(metadata.storage, metadata.header):
        if bitmap.flags & AUTO and not bitmap.flags & IN_USE:
            flags = bitmap.flags | IN_USE
            place = extension.directory_offset + bitmap.position + _FLAGS_OFFSET
            await metadata.write(place, flags.to_bytes(4, "big"))
            changed = True
    if changed:
        await metadata.sync_now()
