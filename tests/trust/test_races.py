"""Races of two tasks, each made to happen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from imagofs.access import FormatAccess
from imagofs.errors import SyncLostError
from imagofs.fuse.disk import Disk
from imagofs.storage.memory import MemoryStorage
from tests.support.qcow2_oracle import Layout, check, read_disk
from tests.support.storages import FaultyStorage, SlowStorage, WrappedStorage
from tests.trust import crash
from tests.trust.history import SECTOR

SHAPE = crash.Shape("", 64 << 10, "cluster_size=512", ((0, 100),))


class GatedStorage(WrappedStorage):
    """Holds the first read that `holds` picks, with what it has read, until `gate` is set."""

    def __init__(self, inner: MemoryStorage) -> None:
        super().__init__(inner)
        self.gate = trio.Event()
        self.arrived = trio.Event()
        self.holds: Callable[[int], bool] | None = None

    async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
        await super().pure_readv(views, offset)
        if self.holds is not None and self.holds(offset):
            self.holds = None
            self.arrived.set()
            await self.gate.wait()


def forget(image: FormatAccess) -> None:
    """Make the cache forget what is clean, as it may at any time."""
    image._cache.young.clear()
    image._cache._old.clear()


@pytest.fixture
def files(tmp_path: Path) -> crash.Files:
    return crash.make(SHAPE, tmp_path)


async def test_a_slice_read_before_a_flush_is_not_kept_after_it(files: crash.Files) -> None:
    memory = MemoryStorage(files.image)
    storage = GatedStorage(memory)
    image = await crash.open_files(storage, None, files, writable=True)
    layout = Layout(files.image)
    table = layout.words(layout.l1_offset, 2)[1] & 0x00FFFFFFFFFFFE00  # of sectors 64 to 127
    buffer = bytearray(SECTOR)
    async with trio.open_nursery() as nursery:
        storage.holds = lambda offset: offset == table
        nursery.start_soon(image.read, buffer, 70 * SECTOR)
        await storage.arrived.wait()
        await image.write(b"\7" * SECTOR, 110 * SECTOR)
        await image.flush()
        forget(image)
        storage.gate.set()
    await image.read(buffer, 110 * SECTOR)
    assert buffer == b"\7" * SECTOR
    await image.write(b"\6" * SECTOR, 111 * SECTOR)  # writes the slice again
    await image.close()
    assert not check(memory.to_bytes()).errors
    disk = read_disk(memory.to_bytes())
    assert disk[110 * SECTOR : 112 * SECTOR] == b"\7" * SECTOR + b"\6" * SECTOR


async def test_a_block_read_before_a_flush_is_not_kept_after_it(files: crash.Files) -> None:
    memory = MemoryStorage(files.image)
    storage = GatedStorage(memory)
    image = await crash.open_files(storage, None, files, writable=True)
    layout = Layout(files.image)
    [block] = layout.words(layout.table_offset, 1)
    async with trio.open_nursery() as nursery:
        storage.holds = lambda offset: offset == block
        nursery.start_soon(image.discard_to_zero, 0, SECTOR)
        await storage.arrived.wait()
        await image.write(b"\7" * 4 * SECTOR, 104 * SECTOR)
        await image.flush()
        forget(image)
        storage.gate.set()
    await image.write(b"\6" * 4 * SECTOR, 110 * SECTOR)
    await image.close()
    verdict = check(memory.to_bytes())
    assert not verdict.errors
    assert not verdict.leaked
    disk = read_disk(memory.to_bytes())
    assert disk[104 * SECTOR : 108 * SECTOR] == b"\7" * 4 * SECTOR
    assert disk[110 * SECTOR : 114 * SECTOR] == b"\6" * 4 * SECTOR


async def test_no_host_cluster_is_reused_under_a_read(files: crash.Files) -> None:
    """The read has looked its cluster up; the cluster is discarded, flushed, and would be free."""

    class BeforeStorage(GatedStorage):
        """Holds a read before it reads."""

        async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
            if self.holds is not None and self.holds(offset):
                self.holds = None
                self.arrived.set()
                await self.gate.wait()
            await super().pure_readv(views, offset)

    memory = MemoryStorage(files.image)
    storage = BeforeStorage(memory)
    image = await crash.open_files(storage, None, files, writable=True)
    await image.read(bytearray(SECTOR), 2 * SECTOR)  # the tables are in memory now
    buffer = bytearray(SECTOR)
    async with trio.open_nursery() as nursery:
        storage.holds = lambda offset: True
        nursery.start_soon(image.read, buffer, SECTOR)
        await storage.arrived.wait()
        await image.discard_to_zero(SECTOR, SECTOR)
        nursery.start_soon(image.sync)
        await trio.testing.wait_all_tasks_blocked()
        for sector in range(102, 122):
            await image.write(b"\7" * SECTOR, sector * SECTOR)
        await trio.testing.wait_all_tasks_blocked()
        storage.gate.set()
    assert buffer == read_disk(files.image)[SECTOR : 2 * SECTOR]
    await image.close()
    assert not check(memory.to_bytes()).leaked


async def test_a_data_file_is_not_punched_under_a_read(tmp_path: Path) -> None:
    """What a running read looked up is the guest's, though the layer below shows by now."""
    shape = crash.Shape(
        "", 64 << 10, "cluster_size=4096", ((0, 100),), backing=64 << 10, data_file=True
    )
    files = crash.make(shape, tmp_path)
    assert files.data is not None
    before = read_disk(files.image, data=files.data, backing=files.backing)[:4096]
    gate, arrived = trio.Event(), trio.Event()

    class BeforeStorage(WrappedStorage):
        async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
            arrived.set()
            await gate.wait()
            await super().pure_readv(views, offset)

    data = BeforeStorage(MemoryStorage(files.data))
    image = await crash.open_files(MemoryStorage(files.image), data, files, writable=True)
    buffer = bytearray(4096)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.read, buffer, 0)
        await arrived.wait()
        nursery.start_soon(image.discard_to_backing, 0, 4096)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert buffer == before
    await image.read(buffer, 0)
    assert buffer == files.backing[:4096]
    await image.close()


async def test_two_that_grow_the_disk(files: crash.Files) -> None:
    """The one that wants less does not cut off what the other one got."""
    storage = SlowStorage(MemoryStorage(files.image))
    image = await crash.open_files(storage, None, files, writable=True)
    disk = Disk(image, writable=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(disk.truncate, 3 << 20, by_name=False))
        nursery.start_soon(partial(disk.truncate, 1 << 20, by_name=False))
        nursery.start_soon(disk.allocate, 0, (2 << 20) - SECTOR, SECTOR)
    assert disk.size == 3 << 20
    await image.close()


class FastFaultyStorage(FaultyStorage):
    """With the fast path of what is behind, which does not fail."""

    def readv_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        return self.inner.readv_nowait(views, offset)

    def writev_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        return self.inner.writev_nowait(views, offset)


async def assert_writing_has_ended(image: FormatAccess, memory: MemoryStorage) -> None:
    before = memory.to_bytes()
    view = memoryview(b"\7" * SECTOR)
    assert not image.write_nowait(view, 3 * SECTOR)
    for _ in range(2):
        with pytest.raises(SyncLostError):
            await image.write(view, 3 * SECTOR)
    assert memory.to_bytes() == before
    buffer = bytearray(SECTOR)
    await image.read(buffer, 3 * SECTOR)
    assert buffer != view
    with pytest.raises(SyncLostError):
        await image.close()


async def test_a_failed_sync_ends_writing_in_place(files: crash.Files) -> None:
    memory = MemoryStorage(files.image)
    storage = FastFaultyStorage(memory)
    image = await crash.open_files(storage, None, files, writable=True)
    await image.write(b"\6" * SECTOR, 3 * SECTOR)
    await image.read(bytearray(SECTOR), 3 * SECTOR)
    assert image.write_nowait(memoryview(b"\5" * SECTOR), 3 * SECTOR)
    storage.fail_next("sync")
    with pytest.raises(SyncLostError):
        await image.sync()
    await assert_writing_has_ended(image, memory)


async def test_a_sync_that_fails_within_a_write_ends_writing_in_place(tmp_path: Path) -> None:
    """The refcount table grows, which syncs."""
    shape = next(shape for shape in crash.SHAPES if shape.grows)
    files = crash.make(shape, tmp_path)
    memory = MemoryStorage(files.image)
    storage = FastFaultyStorage(memory)
    image = await crash.open_files(storage, None, files, writable=True)
    await image.write(b"\6" * SECTOR, 3 * SECTOR)
    assert image.write_nowait(memoryview(b"\5" * SECTOR), 3 * SECTOR)
    storage.fail_next("sync")
    with pytest.raises(SyncLostError):
        for sector in range(1000, 1100):
            await image.write(b"\6" * SECTOR, sector * SECTOR)
    await assert_writing_has_ended(image, memory)
