"""64 tasks on one image: every read finds, sector by sector, what a disk may show."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from imagofs.access import FormatAccess
from imagofs.format.qcow2.driver import Qcow2
from imagofs.storage.base import Storage, StorageOpenOptions
from imagofs.storage.file import FileStorage
from imagofs.storage.memory import MemoryStorage
from imagofs.vectors import split_views, total_length
from tests.support.qcow2_oracle import check, read_disk
from tests.support.storages import Log, WrappedStorage
from tests.trust import crash
from tests.trust.history import SECTOR, History, run_repeatably

SEED = int(os.environ.get("IMAGOFS_CONCURRENCY_SEED", "0")) or random.randrange(1, 1 << 30)
TASKS = 64
STEPS = int(os.environ.get("IMAGOFS_CONCURRENCY_STEPS", "6"))

SHAPES = {shape.name: shape for shape in crash.SHAPES if not (shape.grows or shape.largest)}


class MoodySlowStorage(WrappedStorage):
    """Takes its time, a random one, before and in each call; tears writes between sectors."""

    def __init__(self, inner: Storage, rnd: random.Random) -> None:
        super().__init__(inner)
        self._rnd = rnd

    async def _wait(self) -> None:
        await trio.sleep(self._rnd.choice([0, 0, 1, 5, 50]))

    async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
        await self._wait()
        await super().pure_readv(views, offset)
        await self._wait()

    async def pure_writev(self, views: Sequence[memoryview], offset: int) -> None:
        await self._wait()
        sectors = total_length(views) // SECTOR
        head, tail = split_views(list(views), self._rnd.randrange(sectors + 1) * SECTOR)
        await super().pure_writev(head, offset)
        await self._wait()
        await super().pure_writev(tail, offset + total_length(head))
        await self._wait()

    async def pure_write_zeroes(self, offset: int, length: int, *, allocated: bool) -> None:
        await self._wait()
        await super().pure_write_zeroes(offset, length, allocated=allocated)

    async def pure_discard(self, offset: int, length: int) -> None:
        await self._wait()
        await super().pure_discard(offset, length)

    async def sync(self) -> None:
        await self._wait()
        await super().sync()


def assert_idle(image: FormatAccess) -> None:
    """Nobody holds a lock, and no I/O is counted as running."""
    assert isinstance(image.driver, Qcow2)
    assert not image.driver.locks.entries
    assert not image.driver.metadata.epochs._active
    assert not image.driver.metadata._flushing.locked()


class Tasks:
    """Many tasks on one image."""

    def __init__(self, shape: crash.Shape, files: crash.Files, seed: int, cancel: bool) -> None:
        self.shape, self.files, self.seed, self.cancel = shape, files, seed, cancel
        self.atomic = not cancel and files.data is None
        initial = bytes(read_disk(files.image, data=files.data, backing=files.backing))
        self.history = History(initial, Log().clock)

    async def work(self, guest: crash.Guest, number: int) -> None:
        """One task."""
        rnd = random.Random(f"{self.seed} {number}")
        for _ in range(STEPS):
            with trio.CancelScope() as scope:
                if self.cancel and rnd.random() < 0.3:
                    scope.deadline = trio.current_time() + rnd.choice([0, 1, 7, 60, 300])
                if rnd.random() < 0.45:
                    await self.read(guest.image, rnd)
                else:
                    await guest.step(rnd)

    async def read(self, image: FormatAccess, rnd: random.Random) -> None:
        """Read some sectors and judge what came."""
        sectors = self.shape.size // SECTOR
        first = rnd.randrange(sectors)
        count = min(sectors - first, rnd.choice([1, 3, 20, 70]))
        buffer = bytearray(count * SECTOR)
        began = next(self.history.clock)
        if rnd.random() >= 0.2 or not image.read_nowait(memoryview(buffer), first * SECTOR):
            await image.read(buffer, first * SECTOR)
        self.history.note_read(first, buffer, began, atomic=self.atomic)

    async def run_in_memory(self) -> None:
        """On storages that take a time of their own for everything."""
        rnd = random.Random(self.seed)
        storage = MemoryStorage(self.files.image)
        data = None if self.files.data is None else MemoryStorage(self.files.data)
        slow_data = None if data is None else MoodySlowStorage(data, rnd)
        await self.run(MoodySlowStorage(storage, rnd), slow_data)
        self.judge(storage.to_bytes(), None if data is None else bytearray(data.to_bytes()))

    async def run_on_files(self, folder: Path, direct: bool) -> None:
        """On files, with what the page cache answers at once and with threads."""
        paths = [folder / "image", folder / "data"]
        storages = []
        for path, contents in zip(paths, (self.files.image, self.files.data), strict=True):
            if contents is not None:
                path.write_bytes(contents)
                options = StorageOpenOptions(writable=True, direct=direct)
                storages.append(await FileStorage.open(path, options))
        await self.run(storages[0], storages[1] if len(storages) > 1 else None)
        data = None if self.files.data is None else bytearray(paths[1].read_bytes())
        self.judge(paths[0].read_bytes(), data)

    async def run(self, storage: Storage, data: Storage | None) -> None:
        """All tasks."""
        image = await crash.open_files(storage, data, self.files, writable=True)
        guest = crash.Guest(image, self.shape, self.history, self.files)
        guest.allocates = not self.atomic
        async with trio.open_nursery() as nursery:
            for number in range(TASKS):
                nursery.start_soon(self.work, guest, number)
        assert_idle(image)
        whole = bytearray(self.shape.size)
        began = next(self.history.clock)
        await image.read(whole, 0)
        self.history.note_read(0, whole, began, atomic=self.atomic)
        await image.close()
        self.disk = bytes(whole)

    def judge(self, contents: bytes, data: bytearray | None) -> None:
        """What is left behind."""
        allowed = self.history.allowed(powered=True)
        assert crash.judge(self.files, contents, data, allowed) == 0, check(contents)
        assert read_disk(contents, data=data, backing=self.files.backing) == self.disk


@pytest.mark.parametrize("cancel", [False, True], ids=["", "cancelled"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reads_find_what_a_disk_may_show(shape: crash.Shape, cancel: bool, tmp_path: Path) -> None:
    print(f"IMAGOFS_CONCURRENCY_SEED={SEED}")
    tasks = Tasks(shape, crash.make(shape, tmp_path), SEED, cancel)
    run_repeatably(tasks.run_in_memory, seed=SEED)


FILE_SHAPES = ("size not of clusters", "snapshots", "compressed, snapshot", "backing", "data file")


@pytest.mark.parametrize("direct", [False, True], ids=["", "direct"])
@pytest.mark.parametrize("shape", [SHAPES[name] for name in FILE_SHAPES], ids=FILE_SHAPES)
async def test_the_same_on_files(shape: crash.Shape, direct: bool, tmp_path: Path) -> None:
    print(f"IMAGOFS_CONCURRENCY_SEED={SEED}")
    tasks = Tasks(shape, crash.make(shape, tmp_path), SEED, cancel=False)
    tasks.atomic = False  # a write to a file may be seen in part before it is done
    await tasks.run_on_files(tmp_path, direct)
