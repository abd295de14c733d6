"""Deflated grains: many readers at once, inflating ahead, cancelled reads."""

from __future__ import annotations

import random
import struct
import threading
from pathlib import Path

import pytest
import trio

from imagofs.access import FormatAccess
from imagofs.errors import CorruptImageError, StorageError
from imagofs.format.vmdk import Vmdk
from imagofs.format.vmdk.sparse import inflate_grain
from imagofs.inflating import InflatedCache
from imagofs.storage import FileStorage, StorageOpenOptions
from tests.vmdk.build import (
    GRAIN,
    GRAIN_SECTORS,
    SECTOR,
    FolderOpener,
    build_sparse,
    open_folder_vmdk,
    pattern,
    read_all,
)

COUNT = 300
GRAINS = {n: pattern(n + 1, GRAIN) for n in range(COUNT) if n % 7}
CONTENTS = b"".join(GRAINS.get(n, bytes(GRAIN)) for n in range(COUNT))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A deflated disk of 2.4 MB."""
    path = tmp_path / "disk.vmdk"
    path.write_bytes(build_sparse(GRAINS, COUNT * GRAIN_SECTORS, compressed=True))
    return path


@pytest.fixture
def inflations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The thread and the length of every grain that is inflated."""
    seen: list[tuple[str, int]] = []

    def noted(data: memoryview, grain_bytes: int, needed_bytes: int) -> bytes:
        seen.append((threading.current_thread().name, needed_bytes))
        return inflate_grain(data, grain_bytes, needed_bytes)

    monkeypatch.setattr("imagofs.format.vmdk.deflated.inflate_grain", noted)
    return seen


async def test_sequential_reads_are_inflated_ahead_and_once(disk, inflations):
    async with FormatAccess(await open_folder_vmdk(disk)) as image:
        data = bytearray()
        part = bytearray(4096)
        ready = 0
        for offset in range(0, image.size(), len(part)):
            if image.read_nowait(memoryview(part), offset):
                ready += 1
            else:
                await image.read(part, offset)
            data += part
            await trio.lowlevel.checkpoint()
        assert data == CONTENTS
        assert len(inflations) == len(GRAINS)
        assert all(name == "imagofs inflate" for name, _ in inflations)
        assert ready > image.size() // len(part) // 2


async def test_random_reads_inflate_only_what_is_asked_for(disk, inflations):
    async with FormatAccess(await open_folder_vmdk(disk)) as image:
        for number in (10, 200, 99, 50, 250):
            data = bytearray(100)
            await image.read(data, number * GRAIN + 77)
            assert data == CONTENTS[number * GRAIN + 77 :][:100]
        assert len(inflations) == 5


async def test_many_readers_share_the_work(disk, inflations):
    async with FormatAccess(await open_folder_vmdk(disk)) as image:

        async def reader(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(40):
                start = rng.randrange(image.size())
                length = min(rng.randrange(1, 20 * GRAIN), image.size() - start)
                data = bytearray(length)
                await image.read(data, start)
                assert data == CONTENTS[start : start + length]

        async with trio.open_nursery() as nursery:
            for seed in range(12):
                nursery.start_soon(reader, seed)
        assert len(inflations) < 2 * len(GRAINS)


async def test_a_tiny_cache_still_reads_right(disk):
    driver = await open_folder_vmdk(disk, inflated=InflatedCache(GRAIN))
    async with FormatAccess(driver) as image:
        assert await read_all(image) == CONTENTS
        assert await read_all(image, 3 * SECTOR + 1) == CONTENTS


async def test_cancelled_reads_strand_nobody(disk):
    async with FormatAccess(await open_folder_vmdk(disk)) as image:
        rng = random.Random(3)
        for _ in range(60):
            start = rng.randrange(image.size() - 16 * GRAIN)
            with trio.move_on_after(rng.choice([0, 0.0002, 0.001])):
                await image.read(bytearray(16 * GRAIN), start)
            with trio.fail_after(10):
                data = bytearray(2 * GRAIN)
                await image.read(data, start)
            assert data == CONTENTS[start : start + 2 * GRAIN]


async def test_two_disks_of_one_chain_share_the_cache(tmp_path, disk):
    inflated = InflatedCache(1 << 20)
    other = tmp_path / "other.vmdk"
    grains = {n: pattern(n + 5000, GRAIN) for n in range(COUNT)}
    other.write_bytes(build_sparse(grains, COUNT * GRAIN_SECTORS, compressed=True))
    async with (
        FormatAccess(await open_folder_vmdk(disk, inflated=inflated)) as one,
        FormatAccess(await open_folder_vmdk(other, inflated=inflated)) as two,
    ):
        for number in range(1, COUNT, 13):
            data = bytearray(GRAIN)
            await one.read(data, number * GRAIN)
            assert data == GRAINS.get(number, bytes(GRAIN))
            await two.read(data, number * GRAIN)
            assert data == grains[number]
        assert 0 < inflated.bytes_held() <= 1 << 20


async def test_damage_ahead_is_told_to_who_reads_it_only(tmp_path):
    data = bytearray(build_sparse(GRAINS, COUNT * GRAIN_SECTORS, compressed=True))
    broken = 23
    marker = struct.pack("<Q", broken * GRAIN_SECTORS)
    (place,) = (at for at in range(0, len(data), SECTOR) if data[at : at + 8] == marker)
    data[place + 14 : place + 20] = b"\xff" * 6
    path = tmp_path / "disk.vmdk"
    path.write_bytes(data)
    async with FormatAccess(await open_folder_vmdk(path)) as image:
        for number in range(40):
            part = bytearray(GRAIN)
            if number == broken:
                for _ in range(3):
                    with pytest.raises(CorruptImageError, match=f"offset {number * GRAIN} at"):
                        await image.read(part, number * GRAIN)
            else:
                await image.read(part, number * GRAIN)
                assert part == GRAINS.get(number, bytes(GRAIN))
            await trio.sleep(0.001)


async def test_a_storage_that_fails(disk, monkeypatch):
    driver = await open_folder_vmdk(disk)
    async with FormatAccess(driver) as image:
        data = bytearray(GRAIN)
        await image.read(data, GRAIN)

        async def failing(self: FileStorage, views: object, offset: int) -> None:
            raise StorageError("cannot read: made to fail")

        with monkeypatch.context() as patch:
            patch.setattr(FileStorage, "readv_nowait", lambda self, views, offset: 0)
            patch.setattr(FileStorage, "readv", failing)
            with pytest.raises(StorageError, match="made to fail"):
                await image.read(data, 100 * GRAIN)
            # What is in memory needs no storage.
            await image.read(data, GRAIN)
            assert data == GRAINS[1]
        await image.read(data, 100 * GRAIN)
        assert data == GRAINS[100]


async def test_without_the_page_cache(disk, tmp_path):
    class Direct(FolderOpener):
        async def open_extent(self, name: str, /, *, writable: bool) -> FileStorage:
            return await FileStorage.open(self.folder / name, StorageOpenOptions(direct=True))

    storage = await Direct(tmp_path).open_extent("disk.vmdk", writable=False)
    async with FormatAccess(await Vmdk.open(storage)) as image:
        assert await read_all(image) == CONTENTS
        assert await read_all(image, 5 * GRAIN + 3) == CONTENTS
