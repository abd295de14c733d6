"""An independent look at qcow2 images: counts their references and reads their disk.

Plain functions over bytes that share no code with imagofs, so that a mistake there is not repeated
here. Made for small images, thousands of times: what a power cut may leave of one. Bitmaps and
encryption are not known.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

Bytes = bytes | bytearray | memoryview

_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_OFFSET = 0x00FFFFFFFFFFFE00
_EXTERNAL_DATA = 1 << 2
_EXTENDED_L2 = 1 << 4


class Snapshot(NamedTuple):
    """Where a snapshot's L1 table is, and the size of its disk in bytes."""

    l1_offset: int
    l1_entries: int
    size: int


@dataclass(slots=True)
class Verdict:
    """What `check` found.

    Attributes:
        errors: What loses data, in words.
        leaked: Host clusters whose refcount is too high.
    """

    errors: list[str] = field(default_factory=list)
    leaked: list[int] = field(default_factory=list)


class Layout:
    """The fields of an image's header, and its tables.

    Args:
        image: The whole image file.
    """

    def __init__(self, image: Bytes) -> None:
        self.image = image
        fixed = struct.unpack_from(">4sIQIIQIIQQIIQ", image)
        assert fixed[0] == b"QFI\xfb", "no qcow2 image"
        (_, self.version, _, _, self.bits, self.size, _, self.l1_entries, self.l1_offset) = fixed[
            :9
        ]
        (self.table_offset, self.table_clusters, self.snapshot_count, self.snapshots) = fixed[9:]
        self.incompatible, order = 0, 4
        if self.version >= 3:
            self.incompatible, _, _, order, _ = struct.unpack_from(">QQQII", image, 72)
        self.cluster = 1 << self.bits
        self.refcount_bits = 1 << order
        self.data_file = bool(self.incompatible & _EXTERNAL_DATA)
        self.extended = bool(self.incompatible & _EXTENDED_L2)

    def words(self, offset: int, count: int) -> tuple[int, ...]:
        """`count` big-endian 64-bit words; zeroes behind the end of the file."""
        missing = offset + count * 8 - len(self.image)
        if missing <= 0:
            return struct.unpack_from(f">{count}Q", self.image, offset)
        return struct.unpack(
            f">{count}Q", bytes(self.image[offset:]) + bytes(min(missing, count * 8))
        )

    def snapshot_list(self) -> tuple[list[Snapshot], int]:
        """The snapshots, and the length of their table in bytes."""
        found, position = [], self.snapshots
        for _ in range(self.snapshot_count):
            l1_offset, l1_entries, id_length, name_length = struct.unpack_from(
                ">QIHH", self.image, position
            )
            (extra,) = struct.unpack_from(">I", self.image, position + 36)
            size = self.words(position + 48, 1)[0] if extra >= 16 else self.size
            found.append(Snapshot(l1_offset, l1_entries, size))
            position += 40 + extra + id_length + name_length
            position += -position % 8
        return found, position - self.snapshots

    def refcounts(self) -> dict[int, int]:
        """All stored refcounts that are not 0, by host cluster."""
        per_block = self.cluster * 8 // self.refcount_bits
        found: dict[int, int] = {}
        table = self.words(self.table_offset, self.table_clusters * self.cluster // 8)
        for index, offset in enumerate(table):
            if offset:
                # A block of 2 MiB has up to 16 million counts, and nearly all of them are zero.
                block = bytes(self.image[offset : offset + self.cluster]).rstrip(b"\0")
                block += bytes(-len(block) % 8)
                for number, count in enumerate(_unpack(block, self.refcount_bits)):
                    if count:
                        found[index * per_block + number] = count
        return found


def _unpack(block: bytes, bits: int) -> tuple[int, ...]:
    if bits >= 8:
        code = {8: "B", 16: "H", 32: "I", 64: "Q"}[bits]
        return struct.unpack(f">{len(block) * 8 // bits}{code}", block)
    mask = (1 << bits) - 1
    return tuple(byte >> shift & mask for byte in block for shift in range(0, 8, bits))


def _compressed_place(entry: int, bits: int) -> tuple[int, int]:
    """Host offset and length of a compressed cluster, up to the end of its last sector."""
    shift = 62 - (bits - 8)
    offset = entry & (1 << shift) - 1
    sectors = (entry & _COMPRESSED - 1) >> shift
    return offset, (sectors + 1) * 512 - offset % 512


def check(image: Bytes) -> Verdict:
    """Compare the stored refcounts and the COPIED flags with the references that there are."""
    layout = Layout(image)
    verdict = Verdict()
    counted: Counter[int] = Counter()
    bits, cluster = layout.bits, layout.cluster

    def count(offset: int, length: int) -> None:
        counted.update(range(offset >> bits, (offset + length - 1 >> bits) + 1))

    count(0, 1)
    count(layout.table_offset, layout.table_clusters * cluster)
    stored = layout.refcounts()
    for offset in layout.words(layout.table_offset, layout.table_clusters * cluster // 8):
        if offset:
            if offset % cluster:
                verdict.errors.append(f"refcount block at {offset:#x}")
            count(offset, cluster)
    snapshots, table_length = layout.snapshot_list()
    if table_length:
        count(layout.snapshots, table_length)
    states = [Snapshot(layout.l1_offset, layout.l1_entries, layout.size), *snapshots]
    for number, state in enumerate(states):
        if state.l1_entries:
            count(state.l1_offset, state.l1_entries * 8)
        for entry in layout.words(state.l1_offset, state.l1_entries):
            table = entry & _OFFSET
            if not table:
                continue
            if table % cluster or table + cluster > len(image):
                verdict.errors.append(f"L2 table at {table:#x}")
                continue
            count(table, cluster)
            if number == 0 and bool(entry & _COPIED) != (stored.get(table >> bits) == 1):
                verdict.errors.append(f"COPIED flag of the L2 table at {table:#x}")
            _count_entries(layout, table, number == 0, stored, count, verdict)
    for number in counted.keys() | stored.keys():
        have, need = stored.get(number, 0), counted[number]
        if have < need:
            verdict.errors.append(f"cluster {number:#x}: refcount {have}, {need} references")
        elif have > need:
            verdict.leaked.append(number)
    return verdict


def _count_entries(
    layout: Layout,
    table: int,
    active: bool,
    stored: dict[int, int],
    count: Callable[[int, int], None],
    verdict: Verdict,
) -> None:
    """Count the references of one L2 table."""
    words = layout.words(table, layout.cluster // 8)
    for entry in words[::2] if layout.extended else words:
        if not entry:
            continue
        if entry & _COMPRESSED:
            count(*_compressed_place(entry, layout.bits))
            if entry & _COPIED:
                verdict.errors.append(f"COPIED flag of a compressed cluster {entry:#x}")
            continue
        host = entry & _OFFSET
        if not host or layout.data_file:
            continue
        if host % layout.cluster:
            verdict.errors.append(f"data cluster at {host:#x}")
            continue
        count(host, layout.cluster)
        if active and bool(entry & _COPIED) != (stored.get(host >> layout.bits) == 1):
            verdict.errors.append(f"COPIED flag of the cluster at {host:#x}")


def data_clusters(image: Bytes) -> dict[int, int]:
    """Host offset by guest offset of every standard cluster with a host offset, no subclusters."""
    layout = Layout(image)
    found = {}
    per_table = layout.cluster // 8
    for index, l1_entry in enumerate(layout.words(layout.l1_offset, layout.l1_entries)):
        if l1_entry & _OFFSET:
            for number, entry in enumerate(layout.words(l1_entry & _OFFSET, per_table)):
                if entry & _OFFSET and not entry & _COMPRESSED:
                    found[(index * per_table + number) << layout.bits] = entry & _OFFSET
    return found


def read_disk(
    image: Bytes, *, data: Bytes | None = None, backing: bytes = b"", snapshot: int | None = None
) -> bytearray:
    """The guest's disk.

    Args:
        image: The image file.
        data: The external data file, where there is one.
        backing: The whole disk of the layer below; zeroes follow its end.
        snapshot: The number of the snapshot to read; None for the active state.
    """
    layout = Layout(image)
    state = Snapshot(layout.l1_offset, layout.l1_entries, layout.size)
    if snapshot is not None:
        state = layout.snapshot_list()[0][snapshot]
    disk = bytearray(backing[: state.size])
    disk += bytes(state.size - len(disk))
    source = image if data is None else data
    cluster, step = layout.cluster, 2 if layout.extended else 1
    guest = 0
    for l1_entry in layout.words(state.l1_offset, state.l1_entries):
        table = l1_entry & _OFFSET
        if table:
            words = layout.words(table, cluster // 8)
            for position in range(0, len(words), step):
                entry = words[position]
                if step == 2:
                    _read_subclusters(layout, disk, guest, entry, words[position + 1], source)
                elif entry:
                    _read_cluster(layout, disk, guest, entry, source)
                guest += cluster
        else:
            guest += cluster * (cluster // 8 // step)
    return disk


def _put(disk: bytearray, guest: int, length: int, source: Bytes, host: int) -> None:
    length = min(length, len(disk) - guest)
    if length > 0:
        piece = source[host : host + length]
        disk[guest : guest + len(piece)] = piece
        disk[guest + len(piece) : guest + length] = bytes(length - len(piece))


def _read_cluster(layout: Layout, disk: bytearray, guest: int, entry: int, source: Bytes) -> None:
    if entry & _COMPRESSED:
        offset, length = _compressed_place(entry, layout.bits)
        inflated = zlib.decompressobj(-15).decompress(
            bytes(layout.image[offset : offset + length]), layout.cluster
        )
        _put(disk, guest, layout.cluster, inflated, 0)
    elif entry & 1 and layout.version >= 3:
        _put(disk, guest, layout.cluster, b"", 0)
    elif entry & _OFFSET or (layout.data_file and entry & _COPIED):
        _put(disk, guest, layout.cluster, source, entry & _OFFSET)


def _read_subclusters(
    layout: Layout, disk: bytearray, guest: int, entry: int, bitmap: int, source: Bytes
) -> None:
    if entry & _COMPRESSED:
        _read_cluster(layout, disk, guest, entry, source)
        return
    size = layout.cluster // 32
    for number in range(32):
        if bitmap >> number & 1:
            _put(disk, guest + number * size, size, source, (entry & _OFFSET) + number * size)
        elif bitmap >> 32 + number & 1:
            _put(disk, guest + number * size, size, b"", 0)
