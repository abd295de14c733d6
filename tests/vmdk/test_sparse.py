"""Headers, footers, markers and deflated grains: pure functions on bytes."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagofs.errors import CorruptImageError, FormatError, ImagofsError, UnsupportedError
from imagofs.format import FORMATS
from imagofs.format.vmdk.sparse import (
    FOOTER_BYTES,
    GrainMarker,
    SparseHeader,
    inflate_grain,
    parse_footer,
    parse_grain_marker,
    parse_header,
)
from tests.vmdk.build import (
    FLAG_COMPRESSED,
    FLAG_MARKERS,
    FLAG_NEWLINE,
    FLAG_ZERO,
    GD_AT_END,
    SECTOR,
    build_sparse,
    pack_descriptor,
    pack_header,
    pattern,
)


def test_what_a_header_says():
    data = pack_header(
        version=3,
        flags=FLAG_NEWLINE | FLAG_ZERO | FLAG_COMPRESSED | FLAG_MARKERS,
        capacity=1_000_001,
        grain=128,
        descriptor=1,
        descriptor_size=20,
        table_entries=512,
        directory=26,
        overhead=128,
        compression=1,
    )
    header = parse_header(data)
    assert header == SparseHeader(
        version=3,
        capacity_sectors=1_000_001,
        grain_sectors=128,
        table_entries=512,
        descriptor_sector=1,
        descriptor_sectors=20,
        directory_sector=26,
        overhead_sectors=128,
        zero_entries=True,
        compressed=True,
        markers=True,
    )
    assert header.grains == 7813
    assert header.directory_entries == 16


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"magic": b"VMDK"}, FormatError, "KDMV"),
        ({"version": 0}, UnsupportedError, "version 0"),
        ({"version": 4}, UnsupportedError, "version 4"),
        ({"version": (1 << 32) - 1}, UnsupportedError, "version"),
        ({"flags": 1 << 18}, UnsupportedError, "0x40000"),
        ({"flags": 1 << 31}, UnsupportedError, "incompatible"),
        ({"newlines": b"\n \n\n"}, FormatError, "line ends"),
        ({"newlines": b"\r\n \r"}, FormatError, "line ends"),
        ({"compression": 2}, UnsupportedError, "method 2"),
        ({"flags": FLAG_COMPRESSED}, FormatError, "no compression"),
        ({"flags": FLAG_MARKERS}, FormatError, "no compression"),
        ({"capacity": 1 << 54}, FormatError, "capacity"),
        ({"capacity": (1 << 64) - 1}, FormatError, "capacity"),
        ({"grain": 0}, FormatError, "grains of 0"),
        ({"grain": 3}, FormatError, "power of two"),
        ({"grain": 127}, FormatError, "power of two"),
        ({"grain": 1 << 22}, FormatError, "power of two"),
        ({"grain": 1 << 63}, FormatError, "power of two"),
        ({"grain": 8192, "compression": 1}, FormatError, "power of two"),
        ({"table_entries": 0}, FormatError, "tables of 0"),
        ({"table_entries": 513}, FormatError, "513"),
        ({"table_entries": (1 << 32) - 1}, FormatError, "tables"),
        ({"capacity": (1 << 25) * 16 * 512 + 1}, FormatError, "grain directory"),
        ({"capacity": (1 << 54) - 1, "grain": 1, "table_entries": 1}, FormatError, "directory"),
        ({"descriptor": 1, "descriptor_size": 0}, FormatError, "descriptor of 0"),
        ({"descriptor": 1, "descriptor_size": 2049}, FormatError, "descriptor of 2049"),
        ({"descriptor": 1, "descriptor_size": (1 << 64) - 1}, FormatError, "descriptor"),
        ({"descriptor": (1 << 64) - 1, "descriptor_size": 1}, FormatError, "descriptor"),
    ],
)
def test_headers_that_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        parse_header(pack_header(**fields), filename="/x.vmdk")


@pytest.mark.parametrize(
    "fields",
    [
        {"flags": 0, "newlines": b"\0\0\0\0"},
        {"flags": FLAG_NEWLINE | 0xFFF8},  # unknown compatible bits
        {"capacity": (1 << 25) * 16 * 512},
        {"capacity": 0},
        {"grain": 1, "table_entries": 1, "capacity": 1},
        {"grain": 4096, "compression": 1},
        {"version": 2, "descriptor": 1, "descriptor_size": 2048},
    ],
)
def test_headers_at_their_limits(fields):
    assert parse_header(pack_header(**fields)).version == fields.get("version", 1)


@pytest.mark.parametrize("length", [0, 3, 4, 78, 79, 511])
def test_truncated_headers(length):
    with pytest.raises(FormatError):
        parse_header(pack_header()[:length])


@pytest.mark.parametrize(
    ("magic", "name"), [(b"COWD", "vmfsSparse"), (b"\xbe\xba\xfe\xca\0\0\0\0", "seSparse")]
)
def test_other_sparse_formats_are_refused_by_name(magic, name):
    with pytest.raises(UnsupportedError, match=name):
        parse_header(magic.ljust(SECTOR, b"\0"))
    assert FORMATS["vmdk"].recognises(magic.ljust(SECTOR, b"\0"))


def test_probing():
    assert FORMATS["vmdk"].recognises(pack_header())
    assert FORMATS["vmdk"].recognises(pack_descriptor())
    assert not FORMATS["vmdk"].recognises(b"QFI\xfb" + bytes(508))
    assert not FORMATS["vmdk"].recognises(b"")


def test_the_footer_counts():
    data = build_sparse({0: pattern(1, 8192)}, 64, compressed=True, footer=True)
    assert parse_header(data[:SECTOR]).directory_sector is None
    footer = parse_footer(data[-FOOTER_BYTES:])
    assert footer.directory_sector == len(data) // SECTOR - 4


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (8, 1),  # footer marker: size
        (12, 2),  # footer marker: type of a grain directory
        (512, 0),  # footer: magic
        (1024, 1),  # end of stream: value
        (1032, 1),  # end of stream: size
        (1036, 1),  # end of stream: type
    ],
)
def test_broken_footers(position, value):
    data = bytearray(build_sparse({}, 64, compressed=True, footer=True)[-FOOTER_BYTES:])
    data[position] = value
    with pytest.raises(FormatError):
        parse_footer(bytes(data))


def test_a_footer_that_refers_to_a_footer():
    data = bytearray(build_sparse({}, 64, compressed=True, footer=True)[-FOOTER_BYTES:])
    data[SECTOR : 2 * SECTOR] = pack_header(directory=GD_AT_END)
    with pytest.raises(FormatError, match="names no grain directory"):
        parse_footer(bytes(data))


@pytest.mark.parametrize("length", [0, 512, FOOTER_BYTES - 1])
def test_truncated_footers(length):
    with pytest.raises(FormatError, match="too short"):
        parse_footer(bytes(length))


def test_markers():
    assert parse_grain_marker(b"x" + struct.pack("<QI", 1 << 40, 77), 1) == GrainMarker(1 << 40, 77)


@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_inflating(level):
    plain = pattern(3, 65536)
    deflated = zlib.compress(plain, level)
    assert inflate_grain(deflated, 65536, 65536) == plain
    assert inflate_grain(memoryview(deflated + b"padding"), 65536, 65536) == plain
    assert inflate_grain(zlib.compress(plain[:1000]), 65536, 1000) == plain[:1000]


@pytest.mark.parametrize(
    ("deflated", "message"),
    [
        (b"", "cut off"),
        (zlib.compress(bytes(4096))[:-1], "cut off"),
        (zlib.compress(bytes(4096))[:-1] + b"x", "damaged"),
        (b"no zlib stream at all", "damaged"),
        (zlib.compress(b""), "0 bytes"),
        (zlib.compress(bytes(4095)), "4095 bytes"),
        (zlib.compress(bytes(4097)), "more than 4096"),
        (zlib.compress(bytes(64 << 20)), "more than 4096"),
        (zlib.compress(b"x" * 4096)[2:-4], "damaged"),  # without zlib's header
    ],
)
def test_deflated_data_that_is_refused(deflated, message):
    with pytest.raises(CorruptImageError, match=message):
        inflate_grain(deflated, 4096, 4096)


@given(
    st.binary(max_size=600)
    | st.builds(
        lambda data, at, byte: data[:at] + bytes([byte]) + data[at + 1 :],
        st.binary(max_size=5000).map(zlib.compress),
        st.integers(0, 400),
        st.integers(0, 255),
    ),
)
def test_any_bytes_inflate_as_zlib_says_or_are_refused(deflated):
    inflater = zlib.decompressobj()
    try:
        expected = inflater.decompress(deflated, 4097)
        right = inflater.eof and len(expected) <= 4096
    except zlib.error:
        right, expected = False, b""
    try:
        assert inflate_grain(deflated, 4096, 0) == expected
        assert right
    except CorruptImageError:
        assert not right


@given(st.data())
def test_any_header_is_parsed_or_refused(data):
    header = bytearray(pack_header(capacity=1000))
    for _ in range(data.draw(st.integers(0, 4))):
        position = data.draw(st.integers(0, 78))
        value = data.draw(st.binary(min_size=1, max_size=8))
        header[position : position + len(value)] = value
    try:
        parsed = parse_header(bytes(header[:SECTOR]))
    except ImagofsError as exc:
        assert "\n" not in str(exc)
        return
    assert parsed.directory_entries <= 1 << 25
    span = parsed.directory_entries * parsed.table_entries * parsed.grain_sectors
    assert span >= parsed.capacity_sectors
    assert parsed.descriptor_sectors <= 2048 or parsed.descriptor_sector == 0
