"""The descriptor's parser: pure functions on bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagofs.errors import EncryptedImageError, FormatError, ImagofsError, UnsupportedError
from imagofs.format import FORMATS, probe_format
from imagofs.format.vmdk.descriptor import (
    MAX_DESCRIPTOR_BYTES,
    MAX_DISK_BYTES,
    MAX_EXTENTS,
    NO_PARENT,
    SECTOR,
    Access,
    ExtentLine,
    ExtentType,
    looks_like_descriptor,
    parse_descriptor,
)
from tests.vmdk.build import pack_descriptor, pack_header

# As hosted products write it, with carriage returns, blanks and things that nobody needs here.
VERBOSE = b"""# Disk DescriptorFile\r
version=1\r
encoding="windows-1252"\r
CID=9b1b2c3d\r
parentCID=ffffffff\r
isNativeSnapshot="no"\r
createType="twoGbMaxExtentFlat"\r
\r
# Extent description\r
RW 4192256 FLAT "caf\xe9-f001.vmdk" 0\r
\tRDONLY  63   FLAT\t"odd name [1].vmdk"   128  \r
NOACCESS 1 FLAT "secret" 0\r
RW 10 ZERO\r
\r
# The Disk Data Base\r
#DDB\r
ddb.uuid = "60 00 C2 9d"\r
ddb.adapterType="lsilogic"\r
"""


def test_what_a_real_descriptor_says():
    descriptor = parse_descriptor(VERBOSE)
    assert descriptor.version == 1
    assert descriptor.create_type == "twoGbMaxExtentFlat"
    assert descriptor.cid == 0x9B1B2C3D
    assert descriptor.parent_cid == NO_PARENT
    assert descriptor.parent_name is None
    assert descriptor.change_track_path is None
    assert descriptor.extents == (
        ExtentLine(Access.RW, 4192256, ExtentType.FLAT, "café-f001.vmdk", 0),
        ExtentLine(Access.RDONLY, 63, ExtentType.FLAT, "odd name [1].vmdk", 128),
        ExtentLine(Access.NOACCESS, 1, None, "secret", 0),
        ExtentLine(Access.RW, 10, ExtentType.ZERO, None, 0),
    )
    field = descriptor.cid_field
    assert field is not None and VERBOSE[field.position :][: field.digits] == b"9b1b2c3d"


def test_a_short_content_id_is_found_where_it_is():
    # qemu-img writes the number without leading zeroes.
    data = pack_descriptor("RW 1 ZERO", cid="567e91e")
    field = parse_descriptor(data).cid_field
    assert field is not None
    assert data[field.position : field.position + field.digits] == b"567e91e"


def test_names_keep_bytes_that_are_wrong_in_their_encoding():
    data = pack_descriptor('RW 1 FLAT "a\udcff\udcc3.vmdk" 0')
    name = parse_descriptor(data).extents[0].name
    assert name is not None and name.encode("utf-8", "surrogateescape") == b"a\xff\xc3.vmdk"


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("UTF-8", "диск.vmdk"),
        ("windows-1251", "диск.vmdk"),
        ("GBK", "磁盘.vmdk"),
        ("Shift_JIS", "ディスク.vmdk"),
    ],
)
def test_encodings(encoding, name):
    codec = {"GBK": "gbk", "windows-1251": "cp1251"}.get(encoding, encoding)
    data = pack_descriptor(more=[f'encoding="{encoding}"']) + f'RW 1 FLAT "{name}" 0\n'.encode(
        codec
    )
    assert parse_descriptor(data).extents[0].name == name


def test_an_unknown_encoding_counts_as_utf_8():
    data = pack_descriptor('RW 1 FLAT "ü" 0', more=['encoding="idna"'])
    assert parse_descriptor(data).extents[0].name == "ü"


def test_what_follows_a_nul_byte_is_padding():
    data = pack_descriptor("RW 8 ZERO") + b'\0\0RW 8 FLAT "other" 0\n'
    assert [line.length_sectors for line in parse_descriptor(data).extents] == [8]


def test_extents_without_sectors_are_left_out():
    data = pack_descriptor('RW 0 FLAT "nothing" 0', "RW 8 ZERO", "NOACCESS 0")
    assert [line.length_sectors for line in parse_descriptor(data).extents] == [8]


@pytest.mark.parametrize(
    "line",
    [
        'RW 100 FLAT "\\\\.\\PhysicalDrive0" 63 partitionUUID 1234-56',
        'RW 100 FLAT "/dev/sda1" 63 deviceIdentifier "t10.ATA"',
        'RW 100 VMFS "disk-flat.vmdk"',
        'RW 100 VMFS "disk-flat.vmdk" 0',
        'rw 100 flat "lower.vmdk" 5',
        'RW 100 FLAT "no-offset.vmdk"',
        "NOACCESS 100",
        'NOACCESS 100 VMFSRDM "never opened"',
    ],
)
def test_lines_that_are_understood(line):
    assert len(parse_descriptor(pack_descriptor(line)).extents) == 1


@pytest.mark.parametrize(
    "line",
    [
        "RW",
        "RW x ZERO",
        "RW -8 ZERO",
        "RW 1_0 ZERO",
        "RW ٣ ZERO",  # digits, but not ASCII's
        "RW 100",
        'RW 100 FLAT ""',
        "RW 100 FLAT",
        "RW 100 FLAT unquoted 0",
        'RW 100 FLAT "unclosed 0',
        'RW 100 FLAT "x" -1',
        'RW 100 FLAT "x" 0x10',
        'RW 100 FLAT "x" 0 0',
        'RW 100 ZERO "x"',
        'RW 100 SPARSE "x" 0',
        "RW 18446744073709551616 ZERO",
        f"RW {MAX_DISK_BYTES // SECTOR + 1} ZERO",
        f'RW 2 FLAT "x" {MAX_DISK_BYTES // SECTOR - 1}',
    ],
)
def test_lines_that_are_refused(line):
    with pytest.raises(FormatError, match="descriptor"):
        parse_descriptor(pack_descriptor(line), filename="/d.vmdk")


def test_the_sum_of_extents_is_bounded():
    half = MAX_DISK_BYTES // SECTOR // 2
    lines = [f"RW {half} ZERO", f"RW {half} ZERO"]
    assert len(parse_descriptor(pack_descriptor(*lines)).extents) == 2
    with pytest.raises(FormatError, match="more than"):
        parse_descriptor(pack_descriptor(*lines, "RW 2 ZERO"))


def test_the_number_of_extents_is_bounded():
    lines = ["RW 1 ZERO"] * MAX_EXTENTS
    assert len(parse_descriptor(pack_descriptor(*lines)).extents) == MAX_EXTENTS
    with pytest.raises(UnsupportedError, match="extents"):
        parse_descriptor(pack_descriptor(*lines, "RW 1 ZERO"))


def test_an_overlong_descriptor_is_refused():
    data = pack_descriptor("RW 1 ZERO")
    parse_descriptor(data + b"#" * (MAX_DESCRIPTOR_BYTES - len(data)))
    with pytest.raises(FormatError, match="longer"):
        parse_descriptor(data + b"#" * (MAX_DESCRIPTOR_BYTES - len(data) + 1))


@pytest.mark.parametrize("kind", ["VMFSSPARSE", "SESPARSE", "VMFSRDM", "VMFSRAW", "VSANSPARSE"])
def test_extents_of_other_types_are_refused_by_name(kind):
    with pytest.raises(UnsupportedError, match=kind):
        parse_descriptor(pack_descriptor(f'RW 100 {kind} "x"'))


@pytest.mark.parametrize(
    "create_type", ["vmfsSparse", "seSparse", "vmfsRawDeviceMap", "vmfsPassthroughRawDeviceMap", ""]
)
def test_disks_of_other_types_are_refused_by_name(create_type):
    data = pack_descriptor("RW 1 ZERO", create_type=None, more=[f'createType="{create_type}"'])
    with pytest.raises(UnsupportedError, match=repr(create_type)):
        parse_descriptor(data)


@pytest.mark.parametrize(
    "create_type",
    [
        "monolithicFlat",
        "monolithicSparse",
        "twoGbMaxExtentFlat",
        "2GbMaxExtentSparse",
        "vmfs",
        "vmfsThin",
        "custom",
        "fullDevice",
        "partitionedDevice",
        "streamOptimized",
        None,
    ],
)
def test_disks_of_known_types(create_type):
    data = pack_descriptor("RW 1 ZERO", create_type=create_type)
    assert parse_descriptor(data).create_type == create_type


@pytest.mark.parametrize("version", ["0", "4", "5", "4294967297"])
def test_other_versions_are_refused(version):
    with pytest.raises(UnsupportedError, match=f"version {version}"):
        parse_descriptor(pack_descriptor(version=version))


@pytest.mark.parametrize("version", [None, "", "one", "-1", "1.0"])
def test_a_version_is_needed(version):
    with pytest.raises(FormatError, match="version"):
        parse_descriptor(pack_descriptor(version=version))


@pytest.mark.parametrize(
    "line",
    ['encryptionKeys="vmware:key/list/(pair/())"', "keyID=AES", 'ddb.iofilters = "vmwarevmcrypt"'],
)
def test_encrypted_disks_are_refused(line):
    with pytest.raises(EncryptedImageError):
        parse_descriptor(pack_descriptor("RW 1 ZERO", version="5", more=[line]))


@pytest.mark.parametrize("cid", ["", "123456789", "xyz", "0x12", "-1", "1 2"])
@pytest.mark.parametrize("key", ["cid", "parent_cid"])
def test_wrong_content_ids_are_refused(key, cid):
    with pytest.raises(FormatError, match="content ID"):
        parse_descriptor(pack_descriptor("RW 1 ZERO", **{key: cid}))


@pytest.mark.parametrize("key", ["CID", "parentCID", "createType", "parentFileNameHint", "version"])
def test_two_values_for_one_key_are_refused(key):
    values = {"version": ("1", "2"), "createType": ('"vmfs"', '"custom"')}
    first, second = values.get(key, ("12345678", "87654321"))
    version = None if key == "version" else "1"
    plain = {"cid": None, "parent_cid": None, "create_type": None, "version": version}
    same = pack_descriptor(more=[f"{key}={first}", f"{key}={first}"], **plain)
    parse_descriptor(same)
    with pytest.raises(FormatError, match=f"two values for {key}"):
        parse_descriptor(pack_descriptor(more=[f"{key}={first}", f"{key}={second}"], **plain))


@pytest.mark.parametrize(
    ("first_bytes", "expected"),
    [
        (b"# Disk DescriptorFile\nversion=1\n", True),
        (b"# DISK DESCRIPTORFILE\r\n", True),
        (b"# a comment\n\n \t\nversion=1\n", True),
        (b"version = 3\r\nCID=1\n", True),
        (b"#!/bin/sh\nexport version=1\n", False),
        (b"version=1", False),
        (b"version=one\n", False),
        (b"", False),
        (b"# only\n# comments\n", False),
        (b"\0" * 512, False),
        (b"KDMV" + b"\0" * 508, False),
    ],
)
def test_recognising_a_descriptor(first_bytes, expected):
    assert looks_like_descriptor(first_bytes) is expected


_WORDS = (
    *(b"RW", b"RDONLY", b"NOACCESS", b"FLAT", b"ZERO", b"SPARSE", b'"', b'"x"', b" ", b"\t", b"\n"),
    *(b"=", b"#", b"\r", b"\0", b"0", b"9" * 30, b"512", b"version=1", b"CID=", b"parentCID="),
    *(b'createType="custom"', b"parentFileNameHint", b"encoding=gbk", b"\xff", b"\xe2\x80\xa8"),
)


@given(st.lists(st.sampled_from(_WORDS) | st.binary(max_size=6), max_size=60).map(b"".join))
def test_any_bytes_are_parsed_or_refused(data):
    looks_like_descriptor(data)
    for text in (data, b"# Disk DescriptorFile\nversion=1\n" + data):
        try:
            descriptor = parse_descriptor(text)
        except ImagofsError as exc:
            assert "\n" not in str(exc)
            continue
        total = sum(line.length_sectors for line in descriptor.extents)
        assert 0 <= total * SECTOR <= MAX_DISK_BYTES
        for line in descriptor.extents:
            assert line.length_sectors > 0 and line.offset_sectors >= 0
            assert (line.name is None) == (
                line.type is ExtentType.ZERO or (line.type is None and line.name is None)
            )
        if descriptor.cid_field is not None:
            field = descriptor.cid_field
            assert int(text[field.position :][: field.digits], 16) == descriptor.cid


@pytest.mark.parametrize(
    ("first_bytes", "expected"),
    [
        (VERBOSE, "vmdk"),
        (b"\n# made by hand\nversion=1\nCID=1\n", "vmdk"),
        (pack_header(), "vmdk"),
        (b"COWD" + bytes(508), "vmdk"),
        (b"\xbe\xba\xfe\xca" + bytes(508), "vmdk"),
        (b"\xca\xfe\xba\xbe" + bytes(508), "raw"),
        (bytes(100) + VERBOSE, "raw"),
        (b"#!/bin/sh\necho version=1\n", "raw"),
    ],
)
def test_probing(first_bytes, expected):
    assert probe_format(first_bytes[:4096]) == expected
    assert FORMATS["vmdk"].recognises(first_bytes[:4096]) is (expected == "vmdk")
