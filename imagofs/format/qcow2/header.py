"""The qcow2 header and its extensions: bytes to checked objects and back. Pure, no I/O.

Sections "Header", "Header extensions", "Feature name table" and "Bitmaps extension" of the
specification. Everything that can be judged by the header alone is refused here.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field, replace
from itertools import pairwise

from ...errors import EncryptedImageError, FormatError, UnsupportedError

__all__ = ["MAGIC", "BitmapsExtension", "Header", "parse_header"]

MAGIC = b"QFI\xfb"

_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")  # magic ... snapshots_offset: version 2's whole header
#: Where `Header.encode_fields` belongs: behind the place of the backing file's name.
FIELDS_OFFSET = 20
_VERSION3 = struct.Struct(">QQQII")  # the features, refcount_order, header_length
_COMPRESSION_TYPE_OFFSET = 104
_EXTENSION = struct.Struct(">II")

# Incompatible features, by the specification's bit numbers.
DIRTY = 1 << 0
CORRUPT = 1 << 1
EXTERNAL_DATA_FILE = 1 << 2
COMPRESSION_TYPE = 1 << 3
EXTENDED_L2 = 1 << 4
_KNOWN_INCOMPATIBLE = DIRTY | CORRUPT | EXTERNAL_DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2
# Compatible features.
LAZY_REFCOUNTS = 1 << 0
# Autoclear features.
BITMAPS = 1 << 0
RAW_EXTERNAL_DATA = 1 << 1
KNOWN_AUTOCLEAR = BITMAPS | RAW_EXTERNAL_DATA

_NAMES = {
    (0, 0): "dirty bit",
    (0, 1): "corrupt bit",
    (0, 2): "external data file",
    (0, 3): "compression type",
    (0, 4): "extended L2 entries",
    (1, 0): "lazy refcounts",
    (2, 0): "bitmaps",
    (2, 1): "raw external data",
}

# Header extension types.
END_OF_EXTENSIONS = 0
BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857
BITMAPS_EXTENSION = 0x23852875
FULL_DISK_ENCRYPTION = 0x0537BE77
DATA_FILE_NAME = 0x44415441

COMPRESSION_NAMES = {0: "zlib", 1: "zstd"}

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MIN_EXTENDED_L2_CLUSTER_BITS = 14
# Bounds that the specification leaves open; the same ones as qemu's, so that no image that qemu
# makes is refused and none can ask for more memory than this.
MAX_L1_BYTES = 32 << 20
MAX_REFTABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_BACKING_NAME = 1023


@dataclass(frozen=True, slots=True)
class BitmapsExtension:
    """ "Bitmaps extension".

    Attributes:
        count: Number of bitmaps.
        directory_size: Bytes of the bitmap directory.
        directory_offset: Its host offset.
    """

    count: int
    directory_size: int
    directory_offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. Sizes and offsets are bytes unless the name says otherwise."""

    version: int
    cluster_bits: int
    size: int
    l1_entries: int
    l1_offset: int
    reftable_offset: int
    reftable_clusters: int
    snapshot_count: int = 0
    snapshots_offset: int = 0
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    compression_type: int = 0
    bitmaps: BitmapsExtension | None = None
    header_length: int = 72
    #: 0 none, 1 AES, 2 LUKS; only `parse_header` with `encrypted_too` lets it be other than 0.
    crypt_method: int = 0
    #: Bytes of the header behind the fields that this version knows; kept as they are.
    unknown_fields: bytes = b""
    #: (type, data) of extensions that are kept as they are, feature names included.
    other_extensions: tuple[tuple[int, bytes], ...] = field(default=())

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        """Bits of a refcount."""
        return 1 << self.refcount_order

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries are 128 bits, with subclusters."""
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        """Whether guest data is in an external file."""
        return bool(self.incompatible & EXTERNAL_DATA_FILE)

    @property
    def data_file_raw(self) -> bool:
        """Whether the external data file read by itself shows the guest's contents."""
        return self.has_data_file and bool(self.autoclear & RAW_EXTERNAL_DATA)

    @property
    def dirty(self) -> bool:
        """Whether refcounts may be stale (lazy refcounts after a crash)."""
        return bool(self.incompatible & DIRTY)

    @property
    def corrupt(self) -> bool:
        """Whether somebody marked the image as corrupt."""
        return bool(self.incompatible & CORRUPT)

    @property
    def lazy_refcounts(self) -> bool:
        """Whether the image allows refcounts to be postponed."""
        return bool(self.compatible & LAZY_REFCOUNTS)

    @property
    def compression_name(self) -> str:
        """The compression's name: "zlib" (which is raw deflate) or "zstd"."""
        return COMPRESSION_NAMES[self.compression_type]

    @property
    def l2_entry_size(self) -> int:
        """Bytes of an L2 entry."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_bits(self) -> int:
        """log2 of the entries in an L2 table."""
        return self.cluster_bits - (4 if self.extended_l2 else 3)

    @property
    def l1_clusters(self) -> int:
        """Host clusters that the L1 table takes."""
        return self.l1_entries * 8 + self.cluster_size - 1 >> self.cluster_bits

    @property
    def l1_entries_needed(self) -> int:
        """L1 entries that the disk's size takes."""
        shift = self.cluster_bits + self.l2_bits
        return self.size + (1 << shift) - 1 >> shift

    def encode_fields(self) -> bytes:
        """The fixed fields from `FIELDS_OFFSET` on: all that may change while the image is open.

        What stands before, the place of the backing file's name, is not known here.
        """
        fields = _FIXED.pack(
            MAGIC,
            self.version,
            0,
            0,
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_entries,
            self.l1_offset,
            self.reftable_offset,
            self.reftable_clusters,
            self.snapshot_count,
            self.snapshots_offset,
        )
        if self.version >= 3:
            fields += _VERSION3.pack(
                self.incompatible,
                self.compatible,
                self.autoclear,
                self.refcount_order,
                self.header_length,
            )
        return fields[FIELDS_OFFSET:]

    def encode(self) -> bytes:
        """The header's cluster: fields, extensions, names.

        Raises:
            UnsupportedError: It does not fit one cluster.
        """
        header = self
        parts: list[bytes] = []
        if self.version >= 3:
            header_length = _COMPRESSION_TYPE_OFFSET + 8 + len(self.unknown_fields)
            header = replace(self, header_length=header_length)
            parts.append(bytes([self.compression_type]) + bytes(7) + self.unknown_fields)
        for kind, data in self._extensions():
            parts.append(_EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8))
        parts.append(_EXTENSION.pack(END_OF_EXTENSIONS, 0))
        name = os.fsencode(self.backing_file) if self.backing_file else b""
        fields = header.encode_fields()
        rest = b"".join(parts)
        name_offset = FIELDS_OFFSET + len(fields) + len(rest) if name else 0
        start = struct.pack(">4sIQI", MAGIC, self.version, name_offset, len(name))
        data = start + fields + rest + name
        if len(data) > self.cluster_size:
            raise UnsupportedError(
                f"the header takes {len(data)} bytes, more than a cluster of {self.cluster_size}; "
                f"use larger clusters or shorter names"
            )
        return data

    def _extensions(self) -> list[tuple[int, bytes]]:
        extensions: list[tuple[int, bytes]] = []
        if self.backing_format is not None:
            extensions.append((BACKING_FORMAT, os.fsencode(self.backing_format)))
        if self.data_file is not None:
            extensions.append((DATA_FILE_NAME, os.fsencode(self.data_file)))
        if self.bitmaps is not None:
            packed = struct.pack(
                ">IIQQ",
                self.bitmaps.count,
                0,
                self.bitmaps.directory_size,
                self.bitmaps.directory_offset,
            )
            extensions.append((BITMAPS_EXTENSION, packed))
        return extensions + list(self.other_extensions)


def feature_name_table() -> bytes:
    """The "Feature name table" of everything that this version knows."""
    return b"".join(
        struct.pack(">BB46s", kind, bit, name.encode()) for (kind, bit), name in _NAMES.items()
    )


def parse_header(
    data: bytes, filename: str | None = None, *, encrypted_too: bool = False
) -> Header:
    """Parse and check the header.

    Args:
        data: The file's first bytes: its first cluster, or all that there is of it.
        filename: For error messages.
        encrypted_too: Do not refuse an encrypted image: nothing but its header is of interest.

    Raises:
        FormatError: Not qcow2, truncated, or fields that cannot be right.
        EncryptedImageError: The guest data is encrypted.
        UnsupportedError: An unknown version, incompatible feature, or an excessive size.
    """

    def wrong(message: str) -> FormatError:
        return FormatError(message, filename=filename)

    if data[:4] != MAGIC:
        raise wrong("not a qcow2 image (no magic number)")
    if len(data) < _FIXED.size:
        raise wrong(f"the qcow2 header is truncated ({len(data)} bytes)")
    (
        _,
        version,
        backing_offset,
        backing_length,
        cluster_bits,
        size,
        crypt_method,
        l1_entries,
        l1_offset,
        reftable_offset,
        reftable_clusters,
        snapshot_count,
        snapshots_offset,
    ) = _FIXED.unpack_from(data)
    if version not in (2, 3):
        raise UnsupportedError(f"qcow2 version {version} is not supported", filename=filename)
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise wrong(f"a cluster size of 2^{cluster_bits} bytes; 2^9 to 2^21 are allowed")
    if crypt_method and not encrypted_too:
        kind = {1: "AES", 2: "LUKS"}.get(crypt_method, f"method {crypt_method}")
        raise EncryptedImageError(
            f"the image is encrypted ({kind}), which imagofs cannot read; decrypt it with "
            f"qemu-img convert",
            filename=filename,
        )

    incompatible = compatible = autoclear = compression_type = 0
    refcount_order, header_length = 4, _FIXED.size
    unknown_fields = b""
    if version >= 3:
        if len(data) < _COMPRESSION_TYPE_OFFSET:
            raise wrong(f"the qcow2 header is truncated ({len(data)} bytes)")
        incompatible, compatible, autoclear, refcount_order, header_length = _VERSION3.unpack_from(
            data, _FIXED.size
        )
        if header_length < _COMPRESSION_TYPE_OFFSET or header_length > 1 << cluster_bits:
            raise wrong(f"a header length of {header_length} bytes")
        if header_length > len(data):
            raise wrong(f"the qcow2 header is truncated ({len(data)} bytes)")
        if header_length > _COMPRESSION_TYPE_OFFSET:
            compression_type = data[_COMPRESSION_TYPE_OFFSET]
            unknown_fields = data[_COMPRESSION_TYPE_OFFSET + 8 : header_length]

    extensions = _parse_extensions(
        data, header_length, backing_offset or (1 << cluster_bits), filename
    )
    _check_features(incompatible, compression_type, cluster_bits, extensions, filename)
    if any(kind == FULL_DISK_ENCRYPTION for kind, _ in extensions) and not encrypted_too:
        raise EncryptedImageError("the image has an encryption header (LUKS)", filename=filename)
    if refcount_order > 6:
        raise wrong(f"a refcount width of 2^{refcount_order} bits; 1 to 64 bits are allowed")

    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        size=size,
        l1_entries=l1_entries,
        l1_offset=l1_offset,
        reftable_offset=reftable_offset,
        reftable_clusters=reftable_clusters,
        snapshot_count=snapshot_count,
        snapshots_offset=snapshots_offset,
        backing_file=_backing_name(data, backing_offset, backing_length, cluster_bits, filename),
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        refcount_order=refcount_order,
        compression_type=compression_type,
        header_length=header_length,
        crypt_method=crypt_method,
        unknown_fields=unknown_fields,
    )
    header = _with_extensions(header, extensions, filename)
    _check_tables(header, filename)
    return header


def _check_features(
    incompatible: int,
    compression_type: int,
    cluster_bits: int,
    extensions: list[tuple[int, bytes]],
    filename: str | None,
) -> None:
    unknown = incompatible & ~_KNOWN_INCOMPATIBLE
    if unknown:
        names = dict(_NAMES)
        for kind, data in extensions:
            if kind == FEATURE_NAMES:
                names.update(_parse_feature_names(data))
        listed = ", ".join(
            names.get((0, bit), f"bit {bit}") for bit in range(64) if unknown >> bit & 1
        )
        raise UnsupportedError(
            f"the image needs incompatible features that imagofs does not know: {listed}",
            filename=filename,
        )
    if compression_type not in COMPRESSION_NAMES:
        raise UnsupportedError(
            f"compression type {compression_type} is not supported", filename=filename
        )
    if bool(compression_type) != bool(incompatible & COMPRESSION_TYPE):
        raise FormatError(
            f"the compression type ({compression_type}) and its feature bit contradict each other",
            filename=filename,
        )
    if incompatible & EXTENDED_L2 and cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS:
        raise FormatError(
            f"extended L2 entries with clusters of {1 << cluster_bits} bytes; 16384 are needed",
            filename=filename,
        )


def _parse_feature_names(data: bytes) -> dict[tuple[int, int], str]:
    names = {}
    for position in range(0, len(data) - 47, 48):
        name = data[position + 2 : position + 48].rstrip(b"\0").decode("utf-8", "replace")
        names[data[position], data[position + 1]] = name if name.isprintable() else repr(name)
    return names


def _parse_extensions(
    data: bytes, start: int, end: int, filename: str | None
) -> list[tuple[int, bytes]]:
    """All extensions up to the end marker or the backing file's name."""
    extensions: list[tuple[int, bytes]] = []
    position = start
    end = min(end, len(data))
    while position < end:
        if position + _EXTENSION.size > end:
            raise FormatError("a header extension does not fit the header", filename=filename)
        kind, length = _EXTENSION.unpack_from(data, position)
        position += _EXTENSION.size
        if kind == END_OF_EXTENSIONS:
            break
        if length > end - position:
            raise FormatError(
                f"the header extension {kind:#010x} of {length} bytes does not fit the header",
                filename=filename,
            )
        extensions.append((kind, data[position : position + length]))
        position += length + -length % 8
    return extensions


def _with_extensions(
    header: Header, extensions: list[tuple[int, bytes]], filename: str | None
) -> Header:
    other: list[tuple[int, bytes]] = []
    for kind, data in extensions:
        if kind == BACKING_FORMAT:
            header = replace(header, backing_format=_text(data, "backing format", filename))
        elif kind == DATA_FILE_NAME and header.has_data_file:
            header = replace(header, data_file=_text(data, "data file name", filename))
        elif kind == BITMAPS_EXTENSION:
            header = replace(header, bitmaps=_parse_bitmaps(header, data, filename))
        else:
            other.append((kind, data))
    return replace(header, other_extensions=tuple(other))


def _parse_bitmaps(header: Header, data: bytes, filename: str | None) -> BitmapsExtension | None:
    if not header.autoclear & BITMAPS:
        return None  # stale: some program that knows no bitmaps wrote to the image
    if len(data) != 24:
        raise FormatError(f"a bitmaps extension of {len(data)} bytes", filename=filename)
    count, reserved, directory_size, directory_offset = struct.unpack(">IIQQ", data)
    if reserved or not count or not directory_size:
        raise FormatError("the bitmaps extension is malformed", filename=filename)
    if directory_offset % header.cluster_size or directory_size > 64 << 20 or count > 65535:
        raise FormatError(
            f"the bitmap directory ({count} bitmaps, {directory_size} bytes at {directory_offset}) "
            f"cannot be right",
            filename=filename,
        )
    return BitmapsExtension(count, directory_size, directory_offset)


def _backing_name(
    data: bytes, offset: int, length: int, cluster_bits: int, filename: str | None
) -> str | None:
    if not offset:
        return None
    if length > MAX_BACKING_NAME or offset > (1 << cluster_bits) - length:
        raise FormatError(
            f"a backing file name of {length} bytes at {offset} cannot be right", filename=filename
        )
    if offset + length > len(data):
        raise FormatError("the backing file name is truncated", filename=filename)
    return _text(data[offset : offset + length], "backing file name", filename) or None


def _text(data: bytes, what: str, filename: str | None) -> str:
    if b"\0" in data:
        raise FormatError(f"the {what} has a zero byte in it", filename=filename)
    return os.fsdecode(data)  # names of files are bytes, whatever the locale


def _check_tables(header: Header, filename: str | None) -> None:
    """Refuse tables that cannot be where or as large as the header says."""
    mask = header.cluster_size - 1

    def wrong(message: str) -> FormatError:
        return FormatError(message, filename=filename)

    for name, offset in (
        ("L1 table", header.l1_offset),
        ("refcount table", header.reftable_offset),
        ("snapshot table", header.snapshots_offset if header.snapshot_count else 0),
    ):
        if offset & mask or offset >> 56:
            raise wrong(f"the {name}'s offset {offset:#x} is not that of a cluster")
    if header.l1_entries * 8 > MAX_L1_BYTES:
        raise wrong(f"an L1 table of {header.l1_entries} entries is too large")
    if header.l1_entries < header.l1_entries_needed:
        raise wrong(
            f"the L1 table has {header.l1_entries} entries, a disk of {header.size} bytes needs "
            f"{header.l1_entries_needed}"
        )
    if not header.l1_offset and header.l1_entries:
        raise wrong("the L1 table lies over the header")
    if not header.reftable_clusters or not header.reftable_offset:
        raise wrong("the image has no refcount table")
    if header.reftable_clusters << header.cluster_bits > max(
        MAX_REFTABLE_BYTES, header.cluster_size
    ):
        raise wrong(f"a refcount table of {header.reftable_clusters} clusters is too large")
    if header.snapshot_count > MAX_SNAPSHOTS:
        raise wrong(f"{header.snapshot_count} snapshots; {MAX_SNAPSHOTS} are possible")
    if header.snapshot_count and not header.snapshots_offset:
        raise wrong("the snapshot table lies over the header")
    if header.snapshot_count and header.has_data_file:
        raise wrong("internal snapshots with an external data file")
    tables = sorted(
        (start, start + length, name)
        for start, length, name in (
            (0, 1, "header"),
            (header.l1_offset, header.l1_entries * 8, "L1 table"),
            (
                header.reftable_offset,
                header.reftable_clusters << header.cluster_bits,
                "refcount table",
            ),
            (header.snapshots_offset, min(header.snapshot_count, 1), "snapshot table"),
        )
        if length
    )
    for (_, end, first), (start, _, second) in pairwise(tables):
        if start < end:
            raise wrong(f"the {first} and the {second} overlap")
