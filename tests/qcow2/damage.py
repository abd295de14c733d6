"""Images of several kinds, and ways to damage them by editing bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests import qemu

COPIED, COMPRESSED = 1 << 63, 1 << 62
OFFSET = (1 << 56) - 512
MIB = 1 << 20

# Where fields of the header are.
L1_ENTRIES, L1_OFFSET, REFTABLE, REFTABLE_CLUSTERS = 36, 40, 48, 56
SNAPSHOTS, SNAPSHOT_TABLE, INCOMPATIBLE, AUTOCLEAR = 60, 64, 72, 88


class Image:
    """The bytes of an image, to be looked at and damaged."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.cluster = 1 << self.u32(20)
        self.entry_size = 16 if self.u32(4) > 2 and self.data[79] & 16 else 8

    def u32(self, offset: int) -> int:
        return int.from_bytes(self.data[offset : offset + 4], "big")

    def u64(self, offset: int) -> int:
        return int.from_bytes(self.data[offset : offset + 8], "big")

    def put(self, offset: int, value: int, size: int = 8) -> None:
        self.data[offset : offset + size] = value.to_bytes(size, "big")

    @property
    def l1(self) -> int:
        return self.u64(L1_OFFSET)

    @property
    def reftable(self) -> int:
        return self.u64(REFTABLE)

    @property
    def end(self) -> int:
        """The first cluster behind the end of the file."""
        return len(self.data) + -len(self.data) % self.cluster

    def l1_place(self, guest_offset: int) -> int:
        per_table = self.cluster // self.entry_size * self.cluster
        return self.l1 + guest_offset // per_table * 8

    def l2_table(self, guest_offset: int) -> int:
        return self.u64(self.l1_place(guest_offset)) & OFFSET

    def place(self, guest_offset: int) -> int:
        """Where the L2 entry of a guest offset is."""
        entries = self.cluster // self.entry_size
        index = guest_offset // self.cluster % entries
        return self.l2_table(guest_offset) + index * self.entry_size

    def entry(self, guest_offset: int) -> int:
        return self.u64(self.place(guest_offset))

    def host(self, guest_offset: int) -> int:
        return self.entry(guest_offset) & OFFSET

    def block(self, index: int = 0) -> int:
        return self.u64(self.reftable + index * 8)

    def set_refcount(self, host_offset: int, count: int) -> None:
        """Of an image with 16 bits each."""
        index, within = divmod(host_offset // self.cluster, self.cluster // 2)
        self.put(self.block(index) + within * 2, count, 2)

    def refcount(self, host_offset: int) -> int:
        index, within = divmod(host_offset // self.cluster, self.cluster // 2)
        place = self.block(index) + within * 2
        return int.from_bytes(self.data[place : place + 2], "big")

    def snapshot_entry(self) -> int:
        return self.u64(SNAPSHOT_TABLE)

    def bitmap_extension(self) -> int:
        return bytes(self.data).index(struct.pack(">II", 0x23852875, 24))

    def bitmap_directory(self) -> int:
        return self.u64(self.bitmap_extension() + 24)


# --- the images -----------------------------------------------------------------------------------

#: What `make` writes: data with a pattern for each 64 KiB.
WRITES = [f"write -P {n + 1} {n * 64}k 64k" for n in range(8)]
SIZE = 4 * MIB


def make(path: Path, *, snapshot: bool = False, compressed: bool = True, **options) -> Path:
    qemu.create(path, SIZE, writes=WRITES, **options)
    if compressed:
        qemu.qemu_io(path, *(f"write -c -P {n + 30} {2048 + n * 64}k 64k" for n in range(4)))
    if snapshot:
        qemu.qemu_img("snapshot", "-c", "one", path)
        qemu.qemu_io(path, "write -P 90 128k 64k", "write -P 91 1M 64k")
        qemu.qemu_img("snapshot", "-c", "two", path)
        qemu.qemu_io(path, "write -P 92 192k 64k")
    return path


def _bitmaps(path: Path) -> None:
    make(path, compressed=False)
    qemu.qemu_img("bitmap", "--add", "-g", "64k", path, "kept")
    qemu.qemu_img("bitmap", "--add", "-g", "4096", path, "other")
    qemu.qemu_io(path, "write -P 77 3M 512k")


KINDS: dict[str, Callable[[Path], object]] = {
    "plain": lambda path: make(path),
    "uncompressed": lambda path: make(path, compressed=False),
    "snapshots": lambda path: make(path, snapshot=True),
    "bitmaps": _bitmaps,
    "small": lambda path: make(path, cluster_size=512),
    "extended": lambda path: make(path, cluster_size=16384, extended_l2=True, compressed=False),
    "version 2": lambda path: make(path, compat="0.10", snapshot=True),
    "1 bit": lambda path: make(path, refcount_bits=1, cluster_size=4096),
    "2 bits": lambda path: make(path, refcount_bits=2, cluster_size=4096),
    "data file": lambda path: make(
        path, compressed=False, data_file=str(path) + ".raw", data_file_raw=True
    ),
}


@dataclass
class Base:
    """An image before it is damaged, and what its guest sees."""

    data: bytes
    contents: bytes


class Bases:
    """Makes each kind of image once.

    Args:
        folder: Where; the data files stay there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Base] = {}

    def __getitem__(self, kind: str) -> Base:
        if kind not in self._made:
            path = self._folder / f"{kind.replace(' ', '-')}.qcow2"
            KINDS[kind](path)
            self._made[kind] = Base(path.read_bytes(), qemu.contents(path))
        return self._made[kind]


# --- the damage -----------------------------------------------------------------------------------


@dataclass
class Case:
    """One kind of damage.

    Attributes:
        damage: Makes it.
        kind: The image that it is made in.
        lost: (offset, length) of what no repair can keep; reads as zeroes afterwards.
        gives_up: qemu-img check -r all does not get the image clean, or does not even open it.
        notes: A part of what the repair says beside that.
        follows: False where qemu-img takes something else for a table, and counts what is in it.
        expect: What the damage by itself does to what the guest sees.
    """

    damage: Callable[[Image], object]
    kind: str = "plain"
    lost: list[tuple[int, int]] = field(default_factory=list)
    gives_up: bool = False
    notes: str = ""
    follows: bool = True
    expect: Callable[[bytearray], object] | None = None


def copies(target: int, source: int, length: int) -> Callable[[bytearray], None]:
    """The guest sees in one place what is in another."""

    def expect(contents: bytearray) -> None:
        contents[target : target + length] = contents[source : source + length]

    return expect


def entry(guest_offset: int, value: Callable[[Image], int]) -> Callable[[Image], None]:
    """Damage of the L2 entry of a guest offset."""
    return lambda image: image.put(image.place(guest_offset), value(image))


def l1_entry(guest_offset: int, value: Callable[[Image], int]) -> Callable[[Image], None]:
    return lambda image: image.put(image.l1_place(guest_offset), value(image))


def reftable_entry(value: Callable[[Image], int], index: int = 0) -> Callable[[Image], None]:
    return lambda image: image.put(image.reftable + index * 8, value(image))


def header_field(offset: int, value: Callable[[Image], int], size: int = 8):
    return lambda image: image.put(offset, value(image), size)


def bits(offset: int, mask: int) -> Callable[[Image], None]:
    return lambda image: image.put(offset, image.u64(offset) ^ mask)


def refcount(place: Callable[[Image], int], count: int) -> Callable[[Image], None]:
    return lambda image: image.set_refcount(place(image), count)


def leaked_cluster(image: Image) -> None:
    image.data += bytes(image.end - len(image.data) + image.cluster)
    image.set_refcount(image.end - image.cluster, 1)


def fill(start: Callable[[Image], int], length: int, pattern: bytes) -> Callable[[Image], None]:
    def damage(image: Image) -> None:
        place = start(image)
        image.data[place : place + length] = (pattern * length)[:length]

    return damage


def shared_by_two(image: Image) -> None:
    """Two guest clusters name one host cluster, whose refcount knows of one."""
    image.put(image.place(MIB), image.entry(0))


def many_share(image: Image) -> None:
    for number in range(9):
        image.put(image.place(MIB + number * image.cluster), image.entry(0))


def snapshot_field(offset: int, value: int, size: int) -> Callable[[Image], None]:
    """Damage of the first snapshot's entry."""
    return lambda image: image.put(image.snapshot_entry() + offset, value, size)


def incomplete_snapshot(image: Image) -> None:
    """Take the extra data out of the only snapshot's entry."""
    place = image.snapshot_entry()
    extra = image.u32(place + 36)
    names = bytes(image.data[place + 40 + extra : place + 40 + extra + 4])
    image.put(SNAPSHOTS, 1, 4)
    image.put(place + 36, 0, 4)
    image.data[place + 40 : place + 44] = names
    image.data[place + 44 : place + 200] = bytes(156)


def bitmap_entry(value: Callable[[Image], int]) -> Callable[[Image], None]:
    """Damage of an entry of the first bitmap's table."""
    return lambda image: image.put(image.u64(image.bitmap_directory()), value(image))


def second_word(guest_offset: int, value: int) -> Callable[[Image], None]:
    return lambda image: image.put(image.place(guest_offset) + 8, value)


def truncated(image: Image) -> None:
    """Cut off the last data cluster."""
    ends = sorted(image.host(n * 65536) for n in range(8))
    del image.data[ends[-1] :]


CASES: dict[str, Case] = {
    # Refcounts.
    "leaked cluster": Case(leaked_cluster),
    "refcount 0 of data": Case(refcount(lambda i: i.host(0), 0)),
    "refcount 0 of an L2 table": Case(refcount(lambda i: i.l2_table(0), 0)),
    "refcount 0 of the L1 table": Case(refcount(lambda i: i.l1, 0)),
    "refcount 0 of the header": Case(refcount(lambda i: 0, 0)),
    "refcount 0 of a refcount block": Case(refcount(lambda i: i.block(), 0)),
    "refcount too high": Case(refcount(lambda i: i.host(65536), 5)),
    "refcount of a compressed cluster too low": Case(
        refcount(lambda i: i.host(2 * MIB) & ~65535, 1)
    ),
    "refcounts all 0": Case(fill(lambda i: i.block(), 65536, b"\0")),
    "refcounts all at their maximum": Case(fill(lambda i: i.block(), 65536, b"\xff")),
    "refcounts wrong, with snapshots": Case(
        fill(lambda i: i.block(), 64, b"\0\1"), kind="snapshots"
    ),
    # The refcount table.
    "refcount table entry 0": Case(reftable_entry(lambda i: 0)),
    "refcount block misaligned": Case(reftable_entry(lambda i: i.block() + 4096)),
    "refcount block behind the end": Case(reftable_entry(lambda i: i.end + 10 * i.cluster)),
    "refcount block far behind the end": Case(reftable_entry(lambda i: 1 << 50)),
    "refcount table entry with reserved bits": Case(reftable_entry(lambda i: i.block() | 4)),
    "refcount block in the L1 table": Case(reftable_entry(lambda i: i.l1)),
    "refcount block in an L2 table": Case(reftable_entry(lambda i: i.l2_table(0))),
    "refcount block in data": Case(reftable_entry(lambda i: i.host(65536))),
    "refcount block in the refcount table": Case(reftable_entry(lambda i: i.reftable)),
    "two entries for one refcount block": Case(
        reftable_entry(lambda i: i.block(0), index=1), kind="small"
    ),
    "a refcount block too many": Case(reftable_entry(lambda i: i.host(0), index=50), kind="small"),
    "refcount table misaligned": Case(
        header_field(REFTABLE, lambda i: i.reftable + 512), gives_up=True
    ),
    "refcount table behind the end": Case(header_field(REFTABLE, lambda i: i.end + (1 << 30))),
    "refcount table over the L1 table": Case(header_field(REFTABLE, lambda i: i.l1), follows=False),
    "refcount table over data": Case(header_field(REFTABLE, lambda i: i.host(0))),
    "refcount table at 0": Case(header_field(REFTABLE, lambda i: 0), follows=False),
    "refcount table of no clusters": Case(header_field(REFTABLE_CLUSTERS, lambda i: 0, 4)),
    "refcount table too large": Case(
        header_field(REFTABLE_CLUSTERS, lambda i: 1 << 30, 4), gives_up=True
    ),
    # L2 entries.
    "two guest clusters in one host cluster": Case(shared_by_two, expect=copies(MIB, 0, 65536)),
    "data in the L1 table": Case(entry(0, lambda i: i.l1 | COPIED), lost=[(0, 65536)]),
    "data in its own L2 table": Case(
        entry(65536, lambda i: i.l2_table(0) | COPIED), lost=[(65536, 65536)]
    ),
    "data in the refcount block": Case(
        entry(65536, lambda i: i.block() | COPIED), lost=[(65536, 65536)]
    ),
    "data in the refcount table": Case(
        entry(65536, lambda i: i.reftable | COPIED), lost=[(65536, 65536)]
    ),
    "data in the snapshot table": Case(
        entry(0, lambda i: i.snapshot_entry() | COPIED), kind="snapshots", lost=[(0, 65536)]
    ),
    "data misaligned": Case(entry(131072, lambda i: i.entry(131072) | 512), gives_up=True),
    "data misaligned by much": Case(
        entry(131072, lambda i: i.entry(131072) | 0xFE00), gives_up=True
    ),
    "data misaligned and elsewhere": Case(
        entry(131072, lambda i: i.host(0) | 1024 | COPIED), lost=[(131072, 65536)], gives_up=True
    ),
    "zero cluster misaligned": Case(entry(3 * MIB, lambda i: i.end + 512 | 1 | COPIED)),
    "reserved low bit": Case(entry(0, lambda i: i.entry(0) | 4), gives_up=True),
    "reserved high bits": Case(entry(0, lambda i: i.entry(0) | 7 << 56), gives_up=True),
    "reserved bits without a cluster": Case(entry(3 * MIB, lambda i: 0x10), gives_up=True),
    "data behind the end": Case(
        entry(0, lambda i: i.end + 64 * MIB | COPIED), lost=[(0, 65536)], gives_up=True
    ),
    "data just behind the end": Case(
        entry(0, lambda i: i.end | COPIED), lost=[(0, 65536)], gives_up=True
    ),
    "data far behind the end": Case(
        entry(0, lambda i: OFFSET & ~65535 | COPIED), lost=[(0, 65536)], gives_up=True
    ),
    "no COPIED flag": Case(entry(65536, lambda i: i.entry(65536) & ~COPIED)),
    "a COPIED flag on what a snapshot shares": Case(
        entry(0, lambda i: i.entry(0) | COPIED), kind="snapshots"
    ),
    "truncated file": Case(truncated, lost=[(458752, 65536)], kind="uncompressed", gives_up=True),
    # Compressed clusters.
    "compressed with a COPIED flag": Case(entry(2 * MIB, lambda i: i.entry(2 * MIB) | COPIED)),
    "compressed behind the end": Case(
        entry(2 * MIB, lambda i: i.entry(2 * MIB) + (1 << 40)),
        lost=[(2 * MIB, 65536)],
        gives_up=True,
    ),
    "compressed in the L1 table": Case(
        entry(2 * MIB, lambda i: COMPRESSED | i.l1 + 100), lost=[(2 * MIB, 65536)]
    ),
    # L1 entries.
    "no COPIED flag of an L2 table": Case(l1_entry(0, lambda i: i.l2_table(0))),
    "L2 table misaligned": Case(
        l1_entry(0, lambda i: i.l2_table(0) | COPIED | 2048), gives_up=True, follows=False
    ),
    "reserved bits of an L1 entry": Case(
        l1_entry(0, lambda i: i.l2_table(0) | COPIED | 0x7F << 56 | 5), gives_up=True
    ),
    "L2 table behind the end": Case(
        l1_entry(0, lambda i: i.end + MIB | COPIED), lost=[(0, SIZE)], gives_up=True
    ),
    "L2 table in the L1 table": Case(l1_entry(0, lambda i: i.l1 | COPIED), lost=[(0, SIZE)]),
    "L2 table in the refcount block": Case(
        l1_entry(32768, lambda i: i.block() | COPIED), lost=[(32768, 32768)], kind="small"
    ),
    "L2 table in data": Case(
        l1_entry(0, lambda i: i.host(65536) | COPIED), lost=[(0, 32768)], kind="small"
    ),
    "one L2 table for two ranges": Case(
        l1_entry(3 * MIB, lambda i: i.u64(i.l1_place(0))),
        kind="small",
        expect=copies(3 * MIB, 0, 32768),
    ),
    "a COPIED flag and no L2 table": Case(
        l1_entry(3 * MIB, lambda i: COPIED), kind="small", follows=False
    ),
    "garbage for an L2 table": Case(
        fill(lambda i: i.l2_table(0), 512, bytes(range(3, 250))), lost=[(0, 32768)], kind="small"
    ),
    # Snapshots.
    "snapshot table behind the end": Case(
        header_field(SNAPSHOT_TABLE, lambda i: i.end + MIB),
        kind="snapshots",
        follows=False,
        notes="all snapshots are lost",
    ),
    "snapshot table misaligned": Case(
        header_field(SNAPSHOT_TABLE, lambda i: i.snapshot_entry() + 8),
        kind="snapshots",
        gives_up=True,
        notes="all snapshots are lost",
    ),
    "no snapshots, but a table somewhere": Case(
        header_field(SNAPSHOT_TABLE, lambda i: 77), gives_up=True
    ),
    "snapshot's L1 table misaligned": Case(
        snapshot_field(0, 0x12345, 8), kind="snapshots", gives_up=True, notes="'one' is lost"
    ),
    "snapshot's L1 table behind the end": Case(
        snapshot_field(0, 1 << 40, 8), kind="snapshots", gives_up=True, notes="'one' is lost"
    ),
    "snapshot's L1 table too large": Case(
        snapshot_field(8, 0xFFFF_FFF0, 4), kind="snapshots", gives_up=True, notes="'one' is lost"
    ),
    "snapshot's L1 table in the active one": Case(
        lambda i: i.put(i.snapshot_entry(), i.l1),
        kind="snapshots",
        follows=False,
        notes="'one' is lost",
    ),
    "snapshot without extra data": Case(incomplete_snapshot, kind="snapshots"),
    "garbage behind the first snapshot": Case(
        fill(lambda i: i.snapshot_entry() + 72, 200, b"\xff"),
        kind="snapshots",
        notes="snapshots 2 to 2 are lost",
    ),
    "too many snapshots in the header": Case(
        header_field(SNAPSHOTS, lambda i: 9, 4),
        kind="snapshots",
        notes="'' is lost",
    ),
    # Bitmaps.
    "bitmap's cluster misaligned": Case(
        bitmap_entry(lambda i: 0x10200), kind="bitmaps", gives_up=True, notes="'kept' lost some"
    ),
    "bitmap in the L1 table": Case(
        bitmap_entry(lambda i: i.l1), kind="bitmaps", notes="'kept' lost some"
    ),
    "bitmap's table misaligned": Case(
        lambda i: i.put(i.bitmap_directory(), 0x10200),
        kind="bitmaps",
        gives_up=True,
        notes="'kept' lost some",
    ),
    "bitmap directory broken": Case(
        fill(lambda i: i.bitmap_directory(), 24, b"\xff"),
        kind="bitmaps",
        gives_up=True,
        notes="all bitmaps are lost",
    ),
    "bitmaps that somebody forgot": Case(bits(AUTOCLEAR, 1), kind="bitmaps"),
    # Subclusters.
    "subcluster allocated and zero": Case(
        second_word(0, 1 << 32 | (1 << 32) - 1), kind="extended", lost=[(0, 512)]
    ),
    "subclusters allocated without a cluster": Case(
        second_word(3 * MIB, 0xFF), kind="extended", lost=[(3 * MIB, 4096)], gives_up=True
    ),
    "bit 0 of an extended entry": Case(entry(0, lambda i: i.entry(0) | 1), kind="extended"),
    "subclusters in the L1 table": Case(
        entry(16384, lambda i: i.l1 | COPIED), kind="extended", lost=[(16384, 16384)]
    ),
    # Version 2.
    "a zero flag in version 2": Case(entry(0, lambda i: i.entry(0) | 1), kind="version 2"),
    "data behind the end in version 2": Case(
        entry(0, lambda i: i.end + 64 * MIB | COPIED),
        kind="version 2",
        lost=[(0, 65536)],
        gives_up=True,
    ),
    # More references than the width can count.
    "one bit, two guest clusters": Case(
        shared_by_two, kind="1 bit", gives_up=True, expect=copies(MIB, 0, 4096)
    ),
    "two bits, many guest clusters": Case(
        many_share,
        kind="2 bits",
        gives_up=True,
        expect=lambda contents: [copies(MIB + n * 4096, 0, 4096)(contents) for n in range(9)],
    ),
    "one bit, two compressed clusters": Case(
        lambda i: i.put(i.place(MIB), i.entry(2 * MIB)),
        kind="1 bit",
        gives_up=True,
        expect=copies(MIB, 2 * MIB, 4096),
    ),
    "one bit, two ranges in one L2 table": Case(
        l1_entry(0, lambda i: i.u64(i.l1_place(2 * MIB))),
        kind="1 bit",
        gives_up=True,
        expect=copies(0, 2 * MIB, 2 * MIB),
    ),
    # External data file.
    "data file without a COPIED flag": Case(
        entry(65536, lambda i: i.entry(65536) & ~COPIED), kind="data file"
    ),
    "elsewhere in a raw data file": Case(entry(0, lambda i: 65536 | COPIED), kind="data file"),
    # Bits of the header.
    "bitmaps' bit without bitmaps": Case(bits(AUTOCLEAR, 1)),
    "raw data file's bit without a data file": Case(bits(AUTOCLEAR, 2)),
    "bitmaps' extension broken": Case(
        lambda i: i.put(i.bitmap_extension() + 8, 0, 4),
        kind="bitmaps",
        gives_up=True,
        notes="all bitmaps are lost",
    ),
    "corrupt bit": Case(bits(INCOMPATIBLE, 2)),
    "dirty bit": Case(bits(INCOMPATIBLE, 1)),
}
