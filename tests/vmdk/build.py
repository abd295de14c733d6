"""VMDKs made byte by byte, and an opener that finds files in a folder."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from imagofs.access import FormatAccess
from imagofs.format.vmdk import Vmdk, open_vmdk
from imagofs.storage import FileStorage, Storage, StorageOpenOptions

SECTOR = 512
GRAIN_SECTORS = 16
GRAIN = GRAIN_SECTORS * SECTOR
GD_AT_END = (1 << 64) - 1

FLAG_NEWLINE = 1 << 0
FLAG_REDUNDANT = 1 << 1
FLAG_ZERO = 1 << 2
FLAG_COMPRESSED = 1 << 16
FLAG_MARKERS = 1 << 17

#: Stands for a grain whose table entry says that it reads as zero.
ZERO_GRAIN = b""


def pack_header(**fields: Any) -> bytes:
    """A sparse header of one sector; every field may be set."""
    values = {
        "magic": b"KDMV",
        "version": 1,
        "flags": FLAG_NEWLINE,
        "capacity": 0,
        "grain": GRAIN_SECTORS,
        "descriptor": 0,
        "descriptor_size": 0,
        "table_entries": 512,
        "redundant_directory": 0,
        "directory": 1,
        "overhead": 1,
        "unclean": 0,
        "newlines": b"\n \r\n",
        "compression": 0,
    }
    assert fields.keys() <= values.keys()
    values.update(fields)
    return struct.pack("<4sIIQQQQIQQQB4sH", *values.values()).ljust(SECTOR, b"\0")


def pack_descriptor(
    *extents: str,
    cid: str | None = "12345678",
    parent_cid: str | None = "ffffffff",
    parent: str | None = None,
    create_type: str | None = "custom",
    version: str | None = "1",
    more: Iterable[str] = (),
) -> bytes:
    """A descriptor's text; None leaves a line out."""
    lines = ["# Disk DescriptorFile"]
    for key, value in (
        ("version", version),
        ("CID", cid),
        ("parentCID", parent_cid),
        ("createType", create_type and f'"{create_type}"'),
        ("parentFileNameHint", parent and f'"{parent}"'),
    ):
        if value is not None:
            lines.append(f"{key}={value}")
    lines += ["", "# Extent description", *extents, "", "#DDB", 'ddb.adapterType = "ide"', *more]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def pad(data: bytes) -> bytes:
    """`data` up to a whole number of sectors."""
    return data + bytes(-len(data) % SECTOR)


def build_sparse(
    grains: Mapping[int, bytes],
    capacity_sectors: int,
    *,
    grain_sectors: int = GRAIN_SECTORS,
    table_entries: int = 8,
    compressed: bool = False,
    markers: bool = True,
    footer: bool = False,
    first_sector: int = 0,
    descriptor: bytes = b"",
    **fields: Any,
) -> bytes:
    """A sparse extent.

    Args:
        grains: Contents by number; `ZERO_GRAIN` for entry 1; what is missing has entry 0. Tables
            without an entry have a directory entry of 0.
        capacity_sectors: The extent's length.
        grain_sectors: Sectors of a grain.
        table_entries: Entries of a table.
        compressed: Deflate the grains.
        markers: Put markers before deflated grains.
        footer: The header says that the directory is at the end.
        first_sector: Where the disk's part begins, as markers count it.
        descriptor: Embedded behind the header.
        fields: Of the header, in place of what is right.
    """
    count = -(-capacity_sectors // grain_sectors)
    tables = -(-count // table_entries)
    flags = FLAG_NEWLINE | FLAG_ZERO
    if compressed:
        flags |= FLAG_COMPRESSED | (FLAG_MARKERS if markers else 0)
    text = pad(descriptor)
    # A grain at sector 1 would have the entry that says zero.
    body = bytearray(SECTOR) + (text or bytes(SECTOR))
    overhead = len(body) // SECTOR
    entries: dict[int, int] = {}
    for number, data in grains.items():
        if data == ZERO_GRAIN:
            entries[number] = 1
            continue
        entries[number] = len(body) // SECTOR
        if compressed:
            deflated = zlib.compress(data, 6)
            if markers:
                sector = first_sector + number * grain_sectors
                deflated = struct.pack("<QI", sector, len(deflated)) + deflated
            body += pad(deflated)
        else:
            body += data.ljust(grain_sectors * SECTOR, b"\0")
    directory: list[int] = []
    for table in range(tables):
        numbers = range(table * table_entries, (table + 1) * table_entries)
        if not any(number in entries for number in numbers):
            directory.append(0)
            continue
        if markers and compressed:
            body += struct.pack("<QII", 1, 0, 1).ljust(SECTOR, b"\0")
        directory.append(len(body) // SECTOR)
        body += pad(struct.pack(f"<{table_entries}I", *(entries.get(n, 0) for n in numbers)))
    if markers and compressed:
        body += struct.pack("<QII", 1, 0, 2).ljust(SECTOR, b"\0")
    directory_sector = len(body) // SECTOR
    body += pad(struct.pack(f"<{tables}I", *directory))
    header = {
        "version": 3 if compressed else 1,
        "flags": flags,
        "capacity": capacity_sectors,
        "grain": grain_sectors,
        "descriptor": 1 if text else 0,
        "descriptor_size": len(text) // SECTOR,
        "table_entries": table_entries,
        "directory": directory_sector,
        "overhead": overhead,
        "compression": int(compressed),
    } | fields
    if footer:
        body += struct.pack("<QII", 1, 0, 3).ljust(SECTOR, b"\0")
        body += pack_header(**header)
        body += bytes(SECTOR)
        header["directory"] = GD_AT_END
    body[:SECTOR] = pack_header(**header)
    return bytes(body)


class FolderOpener:
    """Opens what is in one folder, and notes what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, bool]] = []
        self.opened: list[Storage] = []

    async def open_extent(self, name: str, /, *, writable: bool) -> Storage:
        self.asked.append((name, writable))
        storage = await FileStorage.open(self.folder / name, StorageOpenOptions(writable=writable))
        self.opened.append(storage)
        return storage

    async def open_backing(self, name: str, format_name: str | None, /) -> FormatAccess:
        assert format_name == "vmdk"
        self.asked.append((name, False))
        return FormatAccess(await open_folder_vmdk(self.folder / name))


async def open_folder_vmdk(
    path: Path, *, writable: bool = False, opener: FolderOpener | None = None, **how: Any
) -> Vmdk:
    """Open the VMDK at `path`, whose other files are beside it."""
    storage = await FileStorage.open(path, StorageOpenOptions(writable=writable))
    try:
        return await open_vmdk(
            storage, opener=opener or FolderOpener(path.parent), writable=writable, **how
        )
    except BaseException:
        await storage.close()
        raise


async def read_all(image: FormatAccess, step: int = 1 << 20) -> bytes:
    """The whole disk, in requests of `step` bytes."""
    data = bytearray(image.size())
    for offset in range(0, len(data), step):
        await image.read(memoryview(data)[offset : offset + step], offset)
    return bytes(data)


def pattern(seed: int, length: int) -> bytes:
    """Bytes that differ from sector to sector and compress well."""
    sectors = (
        struct.pack("<II", seed, number) * (SECTOR // 8) for number in range(-(-length // SECTOR))
    )
    return b"".join(sectors)[:length]
