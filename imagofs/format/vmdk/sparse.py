"""Hosted sparse extents ("KDMV"): header, footer, markers, grains; parsed without I/O.

"Virtual Disk Format 5.0", sections "Hosted Sparse Extents" and "Stream-Optimized Compressed Sparse
Extents". All numbers are little-endian; offsets and sizes count sectors of 512 bytes.

    header      one sector
    descriptor  text, embedded
    directory   32-bit entries: where each grain table is
    tables      32-bit entries: where each grain is; 0: nowhere, 1: it reads as zero (version 2)
    grains      `grain_sectors` each, as they are, or deflated behind a marker

A directory whose place was not known when the header was written is named by a footer: a copy of
the header in the last sector but one.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from ...errors import CorruptImageError, FormatError, UnsupportedError
from ...inflating import deflate_library
from .descriptor import MAX_DESCRIPTOR_BYTES, MAX_DISK_BYTES, SECTOR

__all__ = [
    "ENTRY_BYTES",
    "FOOTER_BYTES",
    "HEADER_BYTES",
    "MARKER_BYTES",
    "GrainMarker",
    "SparseHeader",
    "inflate_grain",
    "looks_like_sparse",
    "parse_footer",
    "parse_grain_marker",
    "parse_header",
]

HEADER_BYTES = 512
FOOTER_BYTES = 3 * 512  #: footer marker, footer, end-of-stream marker
MARKER_BYTES = 12  #: before a deflated grain: its first sector on the disk, and its length
ENTRY_BYTES = 4  #: of a grain directory or a grain table

_MAGIC = b"KDMV"
_MAX_VERSION = 3
_MAX_GRAIN_SECTORS = 1 << 21
#: A deflated grain is inflated as a whole, in memory.
_MAX_DEFLATED_GRAIN_SECTORS = (2 << 20) // SECTOR
_MAX_TABLE_ENTRIES = 512
_MAX_DIRECTORY_ENTRIES = 1 << 25
_GD_AT_END = (1 << 64) - 1

_NEWLINE_TEST = 1 << 0
_ZERO_ENTRIES = 1 << 2
_COMPRESSED = 1 << 16
_MARKERS = 1 << 17
_INCOMPATIBLE = 0xFFFF << 16
_KNOWN_INCOMPATIBLE = _COMPRESSED | _MARKERS

_NEWLINES = b"\n \r\n"
_DEFLATE = 1

_END_OF_STREAM_MARKER = 0
_FOOTER_MARKER = 3

_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")
_METADATA_MARKER = struct.Struct("<QII")
_GRAIN_MARKER = struct.Struct("<QI")

#: Sparse formats of ESX hosts, by their first bytes.
_FOREIGN = {
    b"COWD": "vmfsSparse (COWD)",
    b"\xbe\xba\xfe\xca\0\0\0\0": "seSparse",
}


@dataclass(frozen=True, slots=True)
class SparseHeader:
    """What a header (or a footer) says. The limits that do not depend on the file were checked.

    Attributes:
        version: 1 to 3.
        capacity_sectors: The extent's part of the disk.
        grain_sectors: Sectors of a grain, a power of two.
        table_entries: Entries of a grain table.
        descriptor_sector: Where the embedded descriptor is; 0: there is none.
        descriptor_sectors: Its length.
        directory_sector: Where the grain directory is; None: the footer says it.
        overhead_sectors: Sectors of metadata at the file's start.
        zero_entries: Table entry 1 means that the grain reads as zero.
        compressed: Grains are deflated.
        markers: Deflated grains stand behind a marker.
    """

    version: int
    capacity_sectors: int
    grain_sectors: int
    table_entries: int
    descriptor_sector: int
    descriptor_sectors: int
    directory_sector: int | None
    overhead_sectors: int
    zero_entries: bool
    compressed: bool
    markers: bool

    @property
    def grains(self) -> int:
        """How many grains the extent has; the last one may be shorter."""
        return -(-self.capacity_sectors // self.grain_sectors)

    @property
    def directory_entries(self) -> int:
        """How many entries the grain directory has."""
        return -(-self.grains // self.table_entries)


@dataclass(frozen=True, slots=True)
class GrainMarker:
    """What stands before a deflated grain.

    Attributes:
        first_sector: Where the grain is on the disk.
        deflated_length: Bytes that follow the marker.
    """

    first_sector: int
    deflated_length: int


def looks_like_sparse(first_bytes: bytes) -> bool:
    """Whether a file that begins with `first_bytes` is a sparse extent of any kind."""
    return first_bytes.startswith((_MAGIC, *_FOREIGN))


def parse_header(data: bytes, *, filename: str | None = None) -> SparseHeader:
    """Parse the first sector of an extent, or its footer.

    Raises:
        FormatError: It is no such header, or says something that cannot be.
        UnsupportedError: It is of a format, version or feature that is not supported.
    """
    for magic, name in _FOREIGN.items():
        if data.startswith(magic):
            raise UnsupportedError(
                f"a VMDK extent of the format {name} is not supported", filename=filename
            )
    if data[:4] != _MAGIC:
        raise FormatError(
            "not a sparse VMDK extent: it does not begin with KDMV", filename=filename
        )
    if len(data) < HEADER_BYTES:
        raise FormatError("truncated: ends within the VMDK header", filename=filename)
    (
        _magic,
        version,
        flags,
        capacity_sectors,
        grain_sectors,
        descriptor_sector,
        descriptor_sectors,
        table_entries,
        _redundant_directory_sector,
        directory_sector,
        overhead_sectors,
        _unclean_shutdown,
        newlines,
        compression,
    ) = _HEADER.unpack_from(data)
    if not 1 <= version <= _MAX_VERSION:
        raise UnsupportedError(
            f"the sparse VMDK header has version {version}, known are 1 to {_MAX_VERSION}",
            filename=filename,
        )
    if unknown := flags & _INCOMPATIBLE & ~_KNOWN_INCOMPATIBLE:
        raise UnsupportedError(
            f"the sparse VMDK header has unknown incompatible flags {unknown:#x}",
            filename=filename,
        )
    if flags & _NEWLINE_TEST and newlines != _NEWLINES:
        raise FormatError(
            "the VMDK was damaged by a transfer that converts line ends: copy it again as binary",
            filename=filename,
        )
    if compression > _DEFLATE:
        raise UnsupportedError(
            f"the VMDK's grains are compressed by the unknown method {compression}",
            filename=filename,
        )
    compressed = compression == _DEFLATE
    if flags & (_COMPRESSED | _MARKERS) and not compressed:
        raise FormatError(
            "the VMDK header says compressed, and that there is no compression", filename=filename
        )
    _check_geometry(capacity_sectors, grain_sectors, table_entries, compressed, filename)
    if descriptor_sector and not (
        0 < descriptor_sectors <= MAX_DESCRIPTOR_BYTES // SECTOR
        and descriptor_sector < MAX_DISK_BYTES // SECTOR
    ):
        raise FormatError(
            f"the VMDK header has a descriptor of {descriptor_sectors} sectors at sector "
            f"{descriptor_sector}",
            filename=filename,
        )
    header = SparseHeader(
        version=version,
        capacity_sectors=capacity_sectors,
        grain_sectors=grain_sectors,
        table_entries=table_entries,
        descriptor_sector=descriptor_sector,
        descriptor_sectors=descriptor_sectors,
        directory_sector=None if directory_sector == _GD_AT_END else directory_sector,
        overhead_sectors=overhead_sectors,
        zero_entries=bool(flags & _ZERO_ENTRIES),
        compressed=compressed,
        markers=bool(flags & _MARKERS),
    )
    if header.directory_entries > _MAX_DIRECTORY_ENTRIES:
        raise FormatError(
            f"the VMDK's grain directory would have {header.directory_entries} entries, more than "
            f"{_MAX_DIRECTORY_ENTRIES}",
            filename=filename,
        )
    return header


def _check_geometry(
    capacity_sectors: int,
    grain_sectors: int,
    table_entries: int,
    compressed: bool,
    filename: str | None,
) -> None:
    if capacity_sectors > MAX_DISK_BYTES // SECTOR:
        raise FormatError(
            f"the VMDK header has a capacity of {capacity_sectors} sectors", filename=filename
        )
    largest = _MAX_DEFLATED_GRAIN_SECTORS if compressed else _MAX_GRAIN_SECTORS
    if not 1 <= grain_sectors <= largest or grain_sectors & grain_sectors - 1:
        raise FormatError(
            f"the VMDK header has grains of {grain_sectors} sectors, not of a power of two up to "
            f"{largest}",
            filename=filename,
        )
    if not 1 <= table_entries <= _MAX_TABLE_ENTRIES:
        raise FormatError(
            f"the VMDK header has grain tables of {table_entries} entries, not of 1 to "
            f"{_MAX_TABLE_ENTRIES}",
            filename=filename,
        )


def parse_footer(data: bytes, *, filename: str | None = None) -> SparseHeader:
    """Parse the last three sectors of a stream: footer marker, footer, end-of-stream marker.

    Raises:
        FormatError: They are something else, as in a stream that was cut off.
        UnsupportedError: As `parse_header`.
    """
    if len(data) != FOOTER_BYTES:
        raise FormatError("truncated: too short for a VMDK footer", filename=filename)
    _, footer_size, footer_type = _METADATA_MARKER.unpack_from(data)
    end_value, end_size, end_type = _METADATA_MARKER.unpack_from(data, 2 * SECTOR)
    if (footer_size, footer_type, end_value, end_size, end_type) != (
        0,
        _FOOTER_MARKER,
        0,
        0,
        _END_OF_STREAM_MARKER,
    ):
        raise FormatError(
            "truncated: the VMDK's grain directory is named by a footer, and the file does not end "
            "with one",
            filename=filename,
        )
    header = parse_header(data[SECTOR : 2 * SECTOR], filename=filename)
    if header.directory_sector is None:
        raise FormatError("the VMDK footer names no grain directory", filename=filename)
    return header


def parse_grain_marker(data: bytes | memoryview, offset: int = 0) -> GrainMarker:
    """The marker at `offset` of `data`, which must hold `MARKER_BYTES` there."""
    return GrainMarker(*_GRAIN_MARKER.unpack_from(data, offset))


def inflate_grain(deflated: bytes | memoryview, grain_bytes: int, needed_bytes: int) -> bytes:
    """Inflate one grain, with no more memory than a grain has.

    Args:
        deflated: A zlib stream (RFC 1950); what follows its end is padding.
        grain_bytes: The longest that it may become.
        needed_bytes: The shortest: the disk may end within its last grain.

    Raises:
        CorruptImageError: It is no such stream, is cut off, or becomes too long or too short.
    """
    decompressobj, damaged = deflate_library()
    inflater = decompressobj(zlib.MAX_WBITS)
    try:
        # One byte more than there may be: so the end of the stream is met, or it is too long.
        inflated: bytes = inflater.decompress(deflated, grain_bytes + 1)
    except damaged as exc:
        raise CorruptImageError(f"its deflated data is damaged ({exc})") from None
    if len(inflated) > grain_bytes:
        raise CorruptImageError(f"it inflates to more than {grain_bytes} bytes")
    if not inflater.eof:
        raise CorruptImageError("its deflated data is cut off")
    if len(inflated) < needed_bytes:
        raise CorruptImageError(
            f"it inflates to {len(inflated)} bytes, and {needed_bytes} are needed"
        )
    return inflated
