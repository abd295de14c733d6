"""Entries of qcow2's tables, bit by bit. Pure functions and constants, no I/O.

Section names are those of the qcow2 specification (qemu, docs/interop/qcow2.rst).
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "COMPRESSED",
    "COPIED",
    "L1_RESERVED",
    "L2_RESERVED",
    "OFFSET_MASK",
    "READS_AS_ZERO",
    "CompressedRange",
    "compressed_range",
    "from_big_endian",
    "pack_refcounts",
    "to_big_endian",
    "unpack_refcounts",
]

#: L1 and L2 entries, bit 63: the refcount of what is pointed to is exactly one.
COPIED = 1 << 63
#: L2 entries, bit 62: a compressed cluster descriptor.
COMPRESSED = 1 << 62
#: L1 and L2 entries, bits 9 to 55: the host offset.
OFFSET_MASK = (1 << 56) - (1 << 9)
#: Standard cluster descriptors, bit 0 (version 3, no extended L2): reads as zero.
READS_AS_ZERO = 1 << 0

#: L1 entries: bits 0 to 8 and 56 to 62 are reserved.
L1_RESERVED = (1 << 9) - 1 | (1 << 63) - (1 << 56)
#: Standard cluster descriptors: bits 1 to 8 and 56 to 61 are reserved (62: another kind of entry).
L2_RESERVED = (1 << 9) - (1 << 1) | (1 << 62) - (1 << 56)
#: Refcount table entries: bits 0 to 8 are reserved.
REFTABLE_RESERVED = (1 << 9) - 1

_SWAP = sys.byteorder == "little"
_TYPE_CODES = {8: "B", 16: "H", 32: "I", 64: "Q"}


class CompressedRange(NamedTuple):
    """Where a compressed cluster's data is. It may end earlier than the last sector does.

    Attributes:
        host_offset: First byte, of any alignment.
        length: Bytes up to the end of the last 512-byte sector that it uses.
    """

    host_offset: int
    length: int


def compressed_range(entry: int, cluster_bits: int) -> CompressedRange:
    """Parse a "Compressed Clusters Descriptor"."""
    offset_bits = 62 - (cluster_bits - 8)
    host_offset = entry & (1 << offset_bits) - 1
    additional_sectors = entry >> offset_bits & (1 << cluster_bits - 8) - 1
    return CompressedRange(host_offset, (additional_sectors + 1) * 512 - (host_offset & 511))


def from_big_endian(data: Buffer) -> array[int]:
    """64-bit entries in the machine's byte order. The length is a multiple of 8 bytes."""
    table = array("Q")
    table.frombytes(data)
    if _SWAP:
        table.byteswap()
    return table


def to_big_endian(table: array[int]) -> bytes:
    """The bytes of a table of 64-bit entries as the file has them."""
    if _SWAP:
        table = table[:]
        table.byteswap()
    return table.tobytes()


def unpack_refcounts(block: Buffer, refcount_bits: int) -> array[int]:
    """One number per cluster from a "Refcount block" (or a part of whole bytes of one).

    Args:
        block: The bytes.
        refcount_bits: The width: 1, 2, 4, 8, 16, 32 or 64 bits.
    """
    if refcount_bits >= 8:
        counts = array(_TYPE_CODES[refcount_bits])
        counts.frombytes(block)
        if _SWAP and refcount_bits > 8:
            counts.byteswap()
        return counts
    # Within a byte the lowest bits belong to the first cluster.
    table = _NARROW[refcount_bits]
    return array("B", b"".join([table[byte] for byte in memoryview(block)]))


def pack_refcounts(counts: array[int], refcount_bits: int) -> bytes:
    """The inverse of `unpack_refcounts`; a whole number of bytes' worth of counts."""
    if refcount_bits > 8 and _SWAP:
        counts = counts[:]
        counts.byteswap()
    if refcount_bits >= 8:
        return counts.tobytes()
    per_byte = 8 // refcount_bits
    packed = bytearray(len(counts) // per_byte)
    for position in range(per_byte):
        shift = position * refcount_bits
        for index, count in enumerate(counts[position::per_byte]):
            packed[index] |= count << shift
    return bytes(packed)


_NARROW = {
    bits: tuple(
        bytes(byte >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)) for byte in range(256)
    )
    for bits in (1, 2, 4)
}
