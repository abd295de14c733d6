"""Rebuilding the refcounts of an image that a crash left dirty."""

from __future__ import annotations

import json
import random
import signal
import subprocess
from pathlib import Path

import pytest

from imagofs import PermissiveImplicitOpenGate, open_image
from imagofs.errors import CorruptImageError, UnsupportedError
from imagofs.format.qcow2.header import Header
from imagofs.format.qcow2.loading import read_header
from imagofs.format.qcow2.rebuilding import rebuild_refcounts
from imagofs.storage.base import StorageOpenOptions
from imagofs.storage.file import FileStorage
from imagofs.storage.memory import MemoryStorage
from tests import qemu
from tests.support.storages import Record, RecordingStorage, replay

KILL = f"sigraise {int(signal.SIGKILL)}"


def crash(image: Path, *commands: str) -> None:
    """Run qemu-io commands and end it by SIGKILL: with lazy refcounts the image stays dirty."""
    words = [word for command in (*commands, "flush", KILL) for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", *words, image], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done
    assert is_dirty(image)


def is_dirty(image: Path) -> bool:
    return bool(image.read_bytes()[79] & 1)


def damage(image: Path) -> int:
    """Corruptions and leaks that qemu-img finds."""
    report = json.loads(
        qemu.qemu_img("check", "-U", "--output=json", "-f", "qcow2", image, ok=(0, 2, 3))
    )
    return int(report.get("corruptions", 0)) + int(report.get("leaks", 0))


async def open_and_close(image: Path) -> None:
    async with await open_image(image, writable=True, gate=PermissiveImplicitOpenGate()):
        pass


async def rebuild(contents: bytes) -> MemoryStorage:
    storage = MemoryStorage(contents)
    await rebuild_refcounts(storage, await read_header(storage))
    return storage


GEOMETRIES = [
    {},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 512, "refcount_bits": 1},
    {"cluster_size": 1024, "refcount_bits": 2},
    {"cluster_size": 4096, "refcount_bits": 8},
    {"cluster_size": "2M", "refcount_bits": 32},
    {"cluster_size": 16384, "extended_l2": True, "refcount_bits": 4},
    {"compression_type": "zstd"},
]


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
async def test_writable_open_rebuilds_the_refcounts_of_a_dirty_image(tmp_path: Path, options):
    image = qemu.create(tmp_path / "a.qcow2", "16M", lazy_refcounts=True, **options)
    crash(
        image,
        "write -P 1 0 64k",
        "write -P 2 3M 70k",
        "write -c -P 3 5M 64k" if options.get("cluster_size") != "2M" else "write -P 3 5M 64k",
        "write -z 8M 1M",
        "discard 3M 16k",
        "write -P 4 12M 2M",
    )
    before = qemu.contents(image)
    assert damage(image)
    await open_and_close(image)
    assert not is_dirty(image)
    qemu.check(image)
    assert qemu.contents(image) == before
    # And it can be written to afterwards.
    async with await open_image(image, writable=True) as disk:
        await disk.write(b"x" * 100_000, 1 << 20)
    qemu.check(image)


async def test_snapshots_share_clusters_and_stay_as_they_are(tmp_path: Path):
    image = qemu.create(tmp_path / "a.qcow2", "8M", lazy_refcounts=True, writes=["write -P 1 0 4M"])
    qemu.qemu_img("snapshot", "-c", "one", image)
    crash(image, "write -P 2 1M 100k", "write -P 3 6M 1M")
    before = qemu.contents(image)
    await open_and_close(image)
    qemu.check(image)
    assert qemu.contents(image) == before
    qemu.qemu_img("snapshot", "-a", "one", image)
    assert qemu.contents(image)[: 4 << 20] == b"\1" * (4 << 20)
    qemu.check(image)


async def test_read_only_open_leaves_a_dirty_image_alone(tmp_path: Path):
    image = qemu.create(tmp_path / "a.qcow2", "8M", lazy_refcounts=True)
    crash(image, "write -P 7 0 100k")
    before = image.read_bytes()
    async with await open_image(image) as disk:
        buffer = bytearray(100 << 10)
        await disk.read(buffer, 0)
        assert buffer == b"\7" * len(buffer)
    assert image.read_bytes() == before


async def test_flags_follow_the_rebuilt_refcounts(tmp_path: Path):
    """A cluster with two references must not keep its COPIED flag, or a write changes both."""
    image = qemu.create(
        tmp_path / "a.qcow2", "1M", lazy_refcounts=True, writes=["write -P 1 0 128k"]
    )
    data = bytearray(image.read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & (1 << 56) - 512
    data[l2 + 8 : l2 + 16] = data[l2 : l2 + 8]
    data[79] |= 1
    image.write_bytes(data)
    await open_and_close(image)
    qemu.check(image)
    qemu.qemu_io(image, "write -P 2 0 64k", "read -P 2 0 64k", "read -P 1 64k 64k")


async def test_image_with_other_damage_is_refused_and_not_changed(tmp_path: Path):
    image = qemu.create(tmp_path / "a.qcow2", "1M", lazy_refcounts=True, writes=["write 0 64k"])
    data = bytearray(image.read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & (1 << 56) - 512
    data[79] |= 1
    for wrong in (
        0x8000_0000_7000_0000,
        0x8000_0000_0005_0200,
        l1 | 1 << 63,
        0xC000_0000_0005_0000,
    ):
        data[l2 + 8 : l2 + 16] = wrong.to_bytes(8, "big")
        image.write_bytes(data)
        if wrong >> 62 == 3:
            await open_and_close(image)  # a flag too many on a compressed cluster loses nothing
            continue
        with pytest.raises(CorruptImageError, match="imagofs check --repair all"):
            await open_and_close(image)
        assert image.read_bytes() == data


async def test_more_references_than_the_width_can_count_are_refused():
    storage = MemoryStorage(b"")
    # Made by hand: qemu-img has no way to get there.
    header = Header(
        version=3,
        cluster_bits=9,
        size=1024,
        l1_entries=1,
        l1_offset=512,
        reftable_offset=1024,
        reftable_clusters=1,
        incompatible=1,
        refcount_order=0,
    )
    contents = bytearray(512 * 6)
    encoded = header.encode()
    contents[: len(encoded)] = encoded
    contents[512:520] = (2048 | 1 << 63).to_bytes(8, "big")
    contents[2048:2064] = (2560 | 1 << 63).to_bytes(8, "big") * 2
    storage = MemoryStorage(contents)
    with pytest.raises(UnsupportedError, match="2 references, but a refcount of 1 bits ends at 1"):
        await rebuild_refcounts(storage, header)
    assert storage.to_bytes() == contents


@pytest.mark.parametrize("new_table", [False, True], ids=["in place", "new table"])
async def test_power_cut_in_a_rebuild_leaves_a_dirty_image_that_the_next_one_finishes(
    tmp_path: Path, new_table
):
    image = qemu.create(tmp_path / "a.qcow2", "4M", lazy_refcounts=True, cluster_size=512)
    crash(image, "write -P 1 0 300k", "write -P 2 2M 200k")
    disk = qemu.contents(image)
    contents = bytearray(image.read_bytes())
    if new_table:  # an entry for a refcount block never came to the disk
        table = int.from_bytes(contents[48:56], "big")
        contents[table + 8 : table + 16] = bytes(8)
    initial = bytes(contents)
    recording = RecordingStorage(MemoryStorage(initial))
    header = await read_header(recording)
    rebuilt = await rebuild_refcounts(recording, header)
    assert (rebuilt.reftable_offset != header.reftable_offset) == new_table
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    log = recording.log
    cleaned = 0
    for cut in range(log.records[-1].began + 2):
        durable, at_risk = log.durable(cut), log.at_risk(cut)
        for _ in range(6):
            kept = [record for record in at_risk if chance.random() < 0.5]
            kept.sort(key=lambda record: record.began)
            left = replay(initial, in_order([*durable, *kept]))
            dirty = left[79] & 1
            if dirty:
                again = await rebuild(left)
            else:
                cleaned += 1
                again = MemoryStorage(left)
            image.write_bytes(again.to_bytes())
            if chance.random() < 0.1 or not dirty:
                qemu.check(image)
                assert qemu.contents(image) == disk
    assert cleaned


def in_order(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda record: record.began)


async def test_large_image_in_a_file_is_rebuilt_through_the_usual_storage(tmp_path: Path):
    image = qemu.create(tmp_path / "a.qcow2", "1G", lazy_refcounts=True, cluster_size=4096)
    crash(image, "write -P 5 0 40M", "write -P 6 700M 1M")
    options = StorageOpenOptions(writable=True, direct=True)
    storage = await FileStorage.open(image, options)
    async with storage:
        header = await rebuild_refcounts(storage, await read_header(storage))
    assert not header.dirty
    qemu.check(image)
    qemu.qemu_io(image, "read -P 5 0 40M", "read -P 6 700M 1M")
