"""The VMDK descriptor: the text that says which extents make up a disk, parsed without I/O.

"Virtual Disk Format 5.0", section "The Descriptor File". A descriptor is a file of its own, or
lies embedded in a sparse extent behind its header. Lines are comments (``#``), ``key=value``
pairs, or extents:

    ACCESS SECTORS TYPE ["NAME" [OFFSET]]        e.g.  RW 4192256 FLAT "disk-f001.vmdk" 0

Sizes and offsets count sectors of 512 bytes.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from ...errors import EncryptedImageError, FormatError, UnsupportedError

__all__ = [
    "MAX_DESCRIPTOR_BYTES",
    "MAX_EXTENTS",
    "NO_PARENT",
    "SECTOR",
    "Access",
    "Descriptor",
    "ExtentLine",
    "ExtentType",
    "HexField",
    "looks_like_descriptor",
    "parse_descriptor",
]

SECTOR = 512  #: bytes
MAX_DISK_BYTES = (1 << 63) - 1  #: what an offset of the host can express
MAX_DESCRIPTOR_BYTES = 1 << 20  #: real ones have some hundred bytes and a line per extent
#: An 8 TiB disk in extents of 2 GiB; each is an open file.
MAX_EXTENTS = 4096
NO_PARENT = 0xFFFFFFFF  #: parentCID of a disk that is no delta

_MAX_VERSION = 3
_SIGNATURE = b"# disk descriptorfile"


class Access(enum.Enum):
    """What may be done with an extent."""

    RW = "RW"
    RDONLY = "RDONLY"
    NOACCESS = "NOACCESS"


class ExtentType(enum.Enum):
    """Where an extent's bytes are."""

    FLAT = "FLAT"  #: As they are in a file, or in a part of it.
    VMFS = "VMFS"  #: As FLAT, named so on ESX hosts.
    SPARSE = "SPARSE"  #: In grains that a table locates.
    ZERO = "ZERO"  #: Nowhere: they read as zero.


@dataclass(frozen=True, slots=True)
class ExtentLine:
    """One extent.

    Attributes:
        access: What may be done with it.
        length_sectors: Its part of the disk.
        type: Where its bytes are; None for NOACCESS, whose bytes nobody asks for.
        name: The file, as the descriptor names it; None where there is none.
        offset_sectors: Where its bytes begin in the file.
    """

    access: Access
    length_sectors: int
    type: ExtentType | None
    name: str | None
    offset_sectors: int


@dataclass(frozen=True, slots=True)
class HexField:
    """Where a hexadecimal number stands in the descriptor.

    Attributes:
        position: Bytes from the descriptor's start.
        digits: How many it has.
    """

    position: int
    digits: int


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a descriptor says.

    Attributes:
        version: 1 to 3.
        create_type: The kind of disk, None where it is not said.
        cid: Content ID: a number that changes with the contents; None where it is not said.
        cid_field: Where `cid` stands.
        parent_cid: The parent's content ID when the delta was made, `NO_PARENT`, or None.
        parent_name: The parent as the descriptor names it, None without one.
        change_track_path: The file that records which blocks changed, None without one.
        extents: The extents in the disk's order; those of no sectors are left out.
    """

    version: int
    create_type: str | None
    cid: int | None
    cid_field: HexField | None
    parent_cid: int | None
    parent_name: str | None
    change_track_path: str | None
    extents: tuple[ExtentLine, ...]


#: Kinds of disks whose extents may be of types that are known here.
_CREATE_TYPES = frozenset(
    {
        "2gbmaxextentflat",
        "2gbmaxextentsparse",
        "custom",
        "fulldevice",
        "monolithicflat",
        "monolithicsparse",
        "partitioneddevice",
        "streamoptimized",
        "twogbmaxextentflat",
        "twogbmaxextentsparse",
        "vmfs",
        "vmfseagerzeroedthick",
        "vmfspreallocated",
        "vmfsthin",
    }
)

#: Encodings that a descriptor may name, with Python's names for them.
_ENCODINGS = {
    "big5": "big5",
    "euc-jp": "euc_jp",
    "euc-kr": "euc_kr",
    "gb18030": "gb18030",
    "gb2312": "gb2312",
    "gbk": "gbk",
    "shift_jis": "shift_jis",
    "windows-31j": "cp932",
    "windows-936": "cp936",
    "windows-949": "cp949",
    "windows-950": "cp950",
    **{f"windows-{page}": f"cp{page}" for page in (874, *range(1250, 1259))},
    **{f"iso-8859-{part}": f"iso8859_{part}" for part in (1, 2, 5, 7, 9, 15)},
}

_SINGLE_KEYS = frozenset(
    {
        "version",
        "cid",
        "parentcid",
        "createtype",
        "parentfilenamehint",
        "changetrackpath",
    }
)

_ENCODING_LINE = re.compile(rb"^[ \t]*encoding[ \t]*=[ \t]*\"?([A-Za-z0-9_-]{1,40})", re.I | re.M)
_CID_LINE = re.compile(rb"^[ \t]*CID[ \t]*=[ \t]*\"?([0-9A-Fa-f]{1,8})\"?[ \t]*\r?$", re.I | re.M)
_VERSION_LINE = re.compile(rb"[ \t]*version[ \t]*=[ \t]*[0-9]+[ \t]*\r?\n", re.I)
_HEX = re.compile(r"[0-9A-Fa-f]{1,8}")
_NUMBER = re.compile(r"[0-9]{1,19}")
_EXTENT_LINE = re.compile(
    r"""(?P<access>RW|RDONLY|NOACCESS)
        [ \t]+ (?P<length>[0-9]{1,19})
        (?: [ \t]+ (?P<type>[A-Z]{1,20})
            (?: [ \t]+ "(?P<name>[^"]*)"
                (?: [ \t]+ (?P<offset>[0-9]{1,19})
                    # Devices on Windows hosts: says the same once more in Windows' terms.
                    (?: [ \t]+ (?:partitionUUID|deviceIdentifier) [ \t] .* )?
                )?
            )?
        )?""",
    re.VERBOSE | re.I,
)
_ACCESS_WORD = re.compile(r"(RW|RDONLY|NOACCESS)(?=[ \t]|$)", re.I)


def looks_like_descriptor(first_bytes: bytes) -> bool:
    """Whether a file that begins with `first_bytes` is a descriptor.

    Its first line is the signature, or the first line that is neither empty nor a comment is
    the version.
    """
    if first_bytes[: len(_SIGNATURE)].lower() == _SIGNATURE:
        return True
    position = 0
    while position < len(first_bytes):
        end = first_bytes.find(b"\n", position)
        if end < 0:
            return False
        line = first_bytes[position : end + 1]
        stripped = line.strip()
        if stripped and not stripped.startswith(b"#"):
            return _VERSION_LINE.fullmatch(line) is not None
        position = end + 1
    return False


def parse_descriptor(data: bytes, *, filename: str | None = None) -> Descriptor:
    """Parse a descriptor. What follows a NUL byte is padding.

    Args:
        data: The text's bytes.
        filename: The file that they come from, for errors.

    Raises:
        FormatError: It is no descriptor, or says something that cannot be.
        UnsupportedError: It describes a disk of a kind that is not supported.
        EncryptedImageError: The disk is encrypted.
    """
    if len(data) > MAX_DESCRIPTOR_BYTES:
        raise FormatError(
            f"the VMDK descriptor is longer than {MAX_DESCRIPTOR_BYTES} bytes", filename=filename
        )
    data = data.partition(b"\0")[0]
    values: dict[str, str] = {}
    extents: list[ExtentLine] = []
    total_sectors = 0
    for number, raw_line in enumerate(_decode(data).split("\n"), 1):
        line = raw_line.strip(" \t\r")
        if not line or line.startswith("#"):
            continue
        if _ACCESS_WORD.match(line):
            extent = _parse_extent(line, number, filename)
            total_sectors += extent.length_sectors
            if total_sectors > MAX_DISK_BYTES // SECTOR:
                raise FormatError(
                    f"the VMDK descriptor's extents have more than {MAX_DISK_BYTES} bytes",
                    filename=filename,
                )
            if extent.length_sectors:
                extents.append(extent)
            if len(extents) > MAX_EXTENTS:
                raise UnsupportedError(
                    f"the VMDK descriptor names more than {MAX_EXTENTS} extents", filename=filename
                )
            continue
        key, separator, value = line.partition("=")
        if separator:
            _enter(values, key.strip(" \t"), _unquoted(value), filename)
    return _build(values, tuple(extents), data, filename)


def _decode(data: bytes) -> str:
    """The text; bytes that are wrong in its encoding stay what they are in file names."""
    match = _ENCODING_LINE.search(data)
    name = match[1].decode("ascii").lower() if match else "utf-8"
    return data.decode(_ENCODINGS.get(name, "utf-8"), "surrogateescape")


def _unquoted(value: str) -> str:
    value = value.strip(" \t")
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return value[1:-1]
    return value


def _enter(values: dict[str, str], key: str, value: str, filename: str | None) -> None:
    # Some readers take the first of two values and some the last: what is meant cannot be known.
    folded = key.lower()
    if folded in _SINGLE_KEYS and values.get(folded, value) != value:
        raise FormatError(
            f"the VMDK descriptor has two values for {key}: {values[folded]!r:.100} and "
            f"{value!r:.100}",
            filename=filename,
        )
    values[folded] = value


def _build(
    values: dict[str, str], extents: tuple[ExtentLine, ...], data: bytes, filename: str | None
) -> Descriptor:
    version = values.get("version")
    if version is None or not _NUMBER.fullmatch(version):
        raise FormatError(
            f"a VMDK descriptor needs a version, here it is {version!r:.100}", filename=filename
        )
    # An encrypted disk is called so whatever its version is.
    filters = values.get("ddb.iofilters", "").lower()
    if "encryptionkeys" in values or "keyid" in values or "vmcrypt" in filters:
        raise EncryptedImageError(
            "the VMDK disk is encrypted, which is not supported", filename=filename
        )
    if not 1 <= int(version) <= _MAX_VERSION:
        raise UnsupportedError(
            f"the VMDK descriptor has version {version}, known are 1 to {_MAX_VERSION}",
            filename=filename,
        )
    create_type = values.get("createtype")
    if create_type is not None and create_type.lower() not in _CREATE_TYPES:
        raise UnsupportedError(
            f"a VMDK disk of the type {create_type!r:.100} is not supported", filename=filename
        )
    cid_match = _CID_LINE.search(data)
    return Descriptor(
        version=int(version),
        create_type=create_type,
        cid=_content_id(values, "cid", filename),
        cid_field=HexField(cid_match.start(1), len(cid_match[1])) if cid_match else None,
        parent_cid=_content_id(values, "parentcid", filename),
        parent_name=values.get("parentfilenamehint") or None,
        change_track_path=values.get("changetrackpath") or None,
        extents=extents,
    )


def _content_id(values: dict[str, str], key: str, filename: str | None) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    if not _HEX.fullmatch(value):
        raise FormatError(
            f"the VMDK descriptor's content ID {value!r:.100} is not 1 to 8 hexadecimal digits",
            filename=filename,
        )
    return int(value, 16)


def _parse_extent(line: str, number: int, filename: str | None) -> ExtentLine:
    match = _EXTENT_LINE.fullmatch(line)
    if match is None:
        raise _bad_line("cannot be understood", line, number, filename)
    access = Access(match["access"].upper())
    length_sectors = int(match["length"])
    name, offset = match["name"], match["offset"]
    if access is Access.NOACCESS:
        return ExtentLine(access, length_sectors, None, name, 0)
    if match["type"] is None:
        raise _bad_line("has no type", line, number, filename)
    try:
        kind = ExtentType(match["type"].upper())
    except ValueError:
        raise UnsupportedError(
            f"line {number} of the VMDK descriptor: extents of the type {match['type']} are not "
            f"supported",
            filename=filename,
        ) from None
    if kind is ExtentType.ZERO:
        if name is not None:
            raise _bad_line("names a file that a ZERO extent has not", line, number, filename)
    elif not name:
        raise _bad_line("names no file", line, number, filename)
    elif kind is ExtentType.SPARSE and offset is not None:
        raise _bad_line("has an offset that a SPARSE extent has not", line, number, filename)
    offset_sectors = int(offset or 0)
    if offset_sectors + length_sectors > MAX_DISK_BYTES // SECTOR:
        raise _bad_line(f"ends beyond {MAX_DISK_BYTES} bytes", line, number, filename)
    return ExtentLine(access, length_sectors, kind, name, offset_sectors)


def _bad_line(what: str, line: str, number: int, filename: str | None) -> FormatError:
    return FormatError(
        f"line {number} of the VMDK descriptor {what}: {line[:200]!r}", filename=filename
    )
