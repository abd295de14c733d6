"""The kinds of corrupt images that qemu's own tests describe: refused or read-only, never worse.

Each row names the behaviour, and the number of the test of qemu (tests/qemu-iotests) that has the
idea; the images are made here. qemu-io is asked too: what it does not write, imagofs does not.
What those tests have that is no image's fault is tested elsewhere: failing calls (026, 217) by
`make faults`, conversions (122), sizes of caches (103) in tests/qcow2/test_small_caches.py.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from imagofs import (
    CheckResult,
    FileStorage,
    ImagofsError,
    PermissiveImplicitOpenGate,
    check_image,
    open_image,
)
from tests import qemu
from tests.qcow2.damage import (
    COMPRESSED,
    COPIED,
    INCOMPATIBLE,
    L1_ENTRIES,
    L1_OFFSET,
    MIB,
    REFTABLE,
    REFTABLE_CLUSTERS,
    SNAPSHOT_TABLE,
    SNAPSHOTS,
    Image,
)

HEADER_LENGTH, BACKING_OFFSET, BACKING_LENGTH = 100, 8, 16
CLUSTER = 65536
ONES = (1 << 32) - 1


@dataclass
class Row:
    """A corrupt image.

    Attributes:
        damage: Makes it of a good one.
        reads: It can be opened for reading.
        writes: It can be opened for writing, and a write at `at` succeeds; None: it can be opened,
            and the write is refused.
        at: Guest offset of the write.
        base: The good image.
    """

    damage: Callable[[Image], object]
    reads: bool = True
    writes: bool | None = False
    at: int = 0
    base: str = "plain"


def put(*numbers: tuple[int, int, int]) -> Callable[[Image], None]:
    """Numbers at offsets of the header, with their sizes."""

    def damage(image: Image) -> None:
        for offset, value, size in numbers:
            image.put(offset, value, size)

    return damage


def extension(length: int, name_offset: int) -> Callable[[Image], None]:
    """The first header extension is of an unknown kind and says that it has `length` bytes."""

    def damage(image: Image) -> None:
        start = image.u32(HEADER_LENGTH)
        image.put(start, 0x12345678, 4)
        image.put(start + 4, length, 4)
        image.put(BACKING_OFFSET, name_offset)

    return damage


def l2(value: Callable[[Image], int], at: int = 0) -> Callable[[Image], None]:
    return lambda image: image.put(image.place(at), value(image))


def l1(value: Callable[[Image], int]) -> Callable[[Image], None]:
    return lambda image: image.put(image.l1, value(image))


def block(value: Callable[[Image], int], index: int = 0) -> Callable[[Image], None]:
    """Another entry of the refcount table."""
    return lambda image: image.put(image.reftable + index * 8, value(image))


def free(place: Callable[[Image], int]) -> Callable[[Image], None]:
    """A cluster that is in use is counted as free."""
    return lambda image: image.set_refcount(place(image), 0)


def all_free(image: Image) -> None:
    image.data[image.block() : image.block() + CLUSTER] = bytes(CLUSTER)


def snapshot(offset: int, value: int, size: int) -> Callable[[Image], None]:
    """A field of the first snapshot's entry."""
    return lambda image: image.put(image.snapshot_entry() + offset, value, size)


def many(count: int, entry: bytes) -> Callable[[Image], None]:
    """A snapshot table at 1 MiB."""

    def damage(image: Image) -> None:
        image.data += bytes(MIB - len(image.data)) + entry * count
        image.put(SNAPSHOT_TABLE, MIB)
        image.put(SNAPSHOTS, count, 4)

    return damage


def no_data_file_name(image: Image) -> None:
    at = bytes(image.data).index(struct.pack(">I", 0x44415441))
    image.put(at, 0x12345678, 4)


def backing_format(name: bytes) -> Callable[[Image], None]:
    def damage(image: Image) -> None:
        start = image.u32(HEADER_LENGTH)
        rest = bytes(image.data[start : start + 1024])
        packed = struct.pack(">II", 0xE2792ACA, len(name)) + name + bytes(-len(name) % 8)
        image.data[start : start + 1024 + len(packed)] = packed + rest
        image.data[4096:4100] = b"base"
        image.put(BACKING_OFFSET, 4096)
        image.put(BACKING_LENGTH, 4, 4)

    return damage


def compressed_sectors(number: int) -> Callable[[Image], None]:
    """A compressed cluster's data is said to have another length."""

    def damage(image: Image) -> None:
        place = image.place(2 * MIB)
        offset = image.u64(place) & (1 << 54) - 1
        image.put(place, COMPRESSED | number << 54 | offset)

    return damage


SNAPSHOT_ENTRY = struct.pack(">QIHHIIQII", 0, 0, 0, 0, 0, 0, 0, 0, 16) + bytes(16)
LONG_ENTRY = struct.pack(">QIHHIIQII", 0, 0, 65535, 65535, 0, 0, 0, 0, 1024) + bytes(132096)

ROWS: dict[str, Row] = {
    # Where tables lie over each other.
    "060: an L2 table that is the L1 table": Row(l1(lambda i: i.l1 | COPIED)),
    "060: data in a refcount block": Row(l2(lambda i: i.block() | COPIED), writes=None),
    "060: data in the header, which says that there is none": Row(
        l2(lambda i: COPIED), writes=True
    ),
    "060: data in the L1 table": Row(l2(lambda i: i.l1 | COPIED), writes=None),
    "060: data in an active L2 table": Row(l2(lambda i: i.l2_table(0) | COPIED), writes=None),
    "060: data in a snapshot's L1 table": Row(
        l2(lambda i: i.u64(i.snapshot_entry()) | COPIED), writes=None, base="snapshots"
    ),
    "060: data in the snapshot table": Row(
        l2(lambda i: i.snapshot_entry() | COPIED), writes=None, base="snapshots"
    ),
    "060: an L2 table counts as free": Row(free(lambda i: i.l2_table(0)), writes=None, at=8 * MIB),
    "060: the header counts as free": Row(free(lambda i: 0), writes=None, at=8 * MIB),
    "137: the first count is gone": Row(free(lambda i: 0), writes=None, at=9 * MIB),
    "060: all counts are 0": Row(all_free, writes=None, at=8 * MIB),
    "060: no refcount block": Row(block(lambda i: 0), writes=None, at=8 * MIB),
    "060: copy on write from a cluster that is too far": Row(
        l2(lambda i: 1 << 45), writes=None, base="snapshots"
    ),
    # What is misaligned.
    "060: a misaligned L2 table": Row(l1(lambda i: i.l2_table(0) + 512 | COPIED)),
    "060: misaligned data": Row(l2(lambda i: i.host(0) + 512 | COPIED), writes=None),
    "060: a misaligned cluster of zeroes": Row(
        l2(lambda i: i.host(0) + 512 | COPIED | 1), writes=None
    ),
    "060: a misaligned refcount block": Row(block(lambda i: i.block() + 512)),
    "060: a refcount block behind the end": Row(block(lambda i: 1 << 40)),
    "060: a refcount block that counts itself twice": Row(block(lambda i: i.block(), 1)),
    # Headers.
    "080: a huge header": Row(put((HEADER_LENGTH, ONES, 4)), reads=False),
    "080: a large header": Row(put((HEADER_LENGTH, ONES >> 1, 4)), reads=False),
    "080: a huge extension, a name at the end": Row(
        extension(ONES >> 1, (1 << 64) - 1), reads=False
    ),
    "080: a huge extension, a name in it": Row(extension(ONES >> 1, 116), reads=False),
    "080: a huge extension": Row(extension(ONES >> 1, 0), reads=False),
    "080: a huge name": Row(put((BACKING_OFFSET, 4096, 8), (BACKING_LENGTH, ONES, 4)), reads=False),
    "080: a huge refcount table": Row(put((REFTABLE_CLUSTERS, ONES, 4)), reads=False),
    "080: a large refcount table": Row(put((REFTABLE_CLUSTERS, 0x20001, 4)), reads=False),
    "080: a misaligned refcount table": Row(put((REFTABLE, 0x1234567890ABCDEF, 8)), reads=False),
    "080: a refcount table at the end of all numbers": Row(
        put((REFTABLE, (1 << 64) - CLUSTER, 8), (REFTABLE_CLUSTERS, 0x7F, 4)), reads=False
    ),
    "080: a huge L1 table": Row(put((L1_ENTRIES, ONES, 4)), reads=False),
    "080: a large L1 table": Row(put((L1_ENTRIES, ONES >> 1, 4)), reads=False),
    "080: an L1 table at the end of all numbers": Row(
        put((L1_OFFSET, (1 << 63) - CLUSTER, 8), (L1_ENTRIES, 65535, 4)), reads=False
    ),
    "080: a misaligned L1 table": Row(put((L1_OFFSET, 0x1234567890ABCDEF, 8)), reads=False),
    "080: no L1 table, but a snapshot": Row(put((L1_ENTRIES, 0, 4)), reads=False, base="snapshots"),
    "080: data at the end of all numbers": Row(
        l2(lambda i: (1 << 56) - CLUSTER | COPIED), writes=None
    ),
    # Snapshots.
    "080: four billion snapshots": Row(put((SNAPSHOTS, ONES, 4)), reads=False),
    "080: two billion snapshots": Row(put((SNAPSHOTS, ONES >> 1, 4)), reads=False),
    "080: a snapshot table at the end of all numbers": Row(
        put((SNAPSHOT_TABLE, (1 << 64) - CLUSTER, 8), (SNAPSHOTS, 65535, 4)), reads=False
    ),
    "080: snapshots that are not there": Row(
        put((SNAPSHOT_TABLE, 16 * MIB, 8), (SNAPSHOTS, 500, 4)), reads=False
    ),
    "080: a snapshot's L1 table misaligned": Row(snapshot(0, 0x400200, 8), base="snapshots"),
    "080: a snapshot's L1 table too large": Row(snapshot(8, 1 << 28, 4), base="snapshots"),
    "261: more extra data than there may be": Row(snapshot(36, CLUSTER, 4), base="snapshots"),
    "261: a snapshot table that is too large": Row(many(509, LONG_ENTRY)),
    "261: too many snapshots": Row(many(65537, SNAPSHOT_ENTRY), reads=False),
    # Refcount structures that a repair must make anew.
    "108: no refcount table": Row(put((REFTABLE, 0, 8), (REFTABLE_CLUSTERS, 0, 4)), reads=False),
    "108: a refcount block that would be negative": Row(block(lambda i: (1 << 63) - CLUSTER, 1)),
    "108: a refcount block at the end of all numbers": Row(block(lambda i: (1 << 64) - CLUSTER, 1)),
    "138: data at a multiple of 2^32 clusters": Row(l2(lambda i: 1 << 55 | COPIED), writes=None),
    # What an image refers to.
    "114: a backing format that nobody knows": Row(backing_format(b"foo"), reads=False),
    "244: a data file without a name": Row(no_data_file_name, reads=False, base="data file"),
    "244: compressed data in a data file": Row(
        l2(lambda i: COMPRESSED | 65536), writes=None, base="data file"
    ),
    # Compressed clusters.
    "214: a compressed cluster that is cut off": Row(
        compressed_sectors(0), writes=None, at=2 * MIB + 512
    ),
    "214: a compressed cluster that is said to be long": Row(
        compressed_sectors(255), writes=None, at=2 * MIB + 512
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("good")

    def base(kind: str) -> Path:
        path = folder / kind.replace(" ", "-")
        if not path.exists():
            options = {"data_file": f"{path}.data"} if kind == "data file" else {}
            writes = ["write -P 1 0 192k", "write -P 2 1M 64k"]
            if not options:
                # Noise: it does not fit a sector.
                noise = folder / "noise"
                noise.write_bytes(bytes(n * n % 251 for n in range(CLUSTER)))
                writes.append(f"write -c -s {noise} 2M 64k")
            qemu.create(path, "64M", writes=writes, **options)
            if kind == "snapshots":
                qemu.qemu_img("snapshot", "-c", "one", path)
                qemu.qemu_io(path, "write -P 3 1M 64k")
        return path

    return base


def qemu_writes(path: Path, at: int) -> bool:
    """Whether qemu-io writes to the image, and finds no fault with that."""
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)
    words = ["qemu-io", "-f", "qcow2", "-c", f"write -P 9 {at} 512", str(copy)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    marked = Image(copy.read_bytes()).data[INCOMPATIBLE + 7] & 2
    return done.returncode == 0 and "wrote 512/512" in done.stdout and not marked


async def check(path: Path) -> CheckResult | None:
    async with await FileStorage.open(path) as storage:
        try:
            return await check_image(storage)
        except ImagofsError:
            return None


@pytest.mark.parametrize("name", ROWS)
async def test_corrupt_images_are_refused_or_only_read(
    name: str, bases: Callable[[str], Path], tmp_path: Path
):
    row = ROWS[name]
    image = Image(bases(row.base).read_bytes())
    row.damage(image)
    path = tmp_path / "image"
    path.write_bytes(image.data)
    shutil.copyfile(bases("plain"), tmp_path / "base")
    gate = PermissiveImplicitOpenGate()
    before = await check(path)

    try:
        async with await open_image(path, gate=gate) as access:
            try:
                await access.read(bytearray(512), row.at)
            except ImagofsError:
                pass  # what is wrong cannot be read
        assert row.reads
    except ImagofsError:
        assert not row.reads
    assert path.read_bytes() == image.data

    written: bool | None = False
    try:
        async with await open_image(path, writable=True, gate=gate) as access:
            written = None
            await access.write(b"\x09" * 512, row.at)
            await access.sync()
            written = True
    except ImagofsError:
        pass
    assert written is row.writes
    if not written:
        assert path.read_bytes() == image.data
    after = await check(path)
    if before is not None:
        assert after is not None and after.corruptions <= before.corruptions

    path.write_bytes(image.data)
    if not qemu_writes(path, row.at):
        assert not written
