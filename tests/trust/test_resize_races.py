"""The disk changes its size again and again while tasks read, write, zero and discard it."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from imagofs.access import FormatAccess
from imagofs.errors import OutOfRangeError
from imagofs.format.qcow2.driver import Qcow2
from imagofs.format.qcow2.loading import load
from imagofs.format.raw import Raw
from imagofs.gate import PermissiveImplicitOpenGate
from imagofs.opening import FROM_HEADER, OpenContext, open_image
from imagofs.storage.file import FileStorage
from imagofs.storage.memory import MemoryStorage
from tests.conftest import NewImage
from tests.support.qcow2_oracle import check
from tests.support.storages import SlowStorage, WrappedStorage
from tests.trust import crash
from tests.trust.history import SECTOR, ZEROES, describe, run_repeatably, tagged_range
from tests.trust.test_concurrency import MoodySlowStorage

SEED = int(os.environ.get("IMAGOFS_RESIZE_SEED", "0")) or random.randrange(1, 1 << 30)
RUNS = int(os.environ.get("IMAGOFS_RESIZE_RUNS", "8"))
K = 1 << 10

SHAPES = (
    crash.Shape("plain", 200 * K, filled=((0, 300),)),
    crash.Shape("backing", 200 * K, filled=((0, 100),), backing=150 * K),
    crash.Shape(
        "subclusters",
        2 * K * K,
        "cluster_size=16384,extended_l2=on",
        ((0, 100),),
        backing=150 * K,
    ),
    crash.Shape("data file", 200 * K, "cluster_size=4096", ((0, 300),), data_file=True),
    crash.Shape("refcount blocks", 200 * K, "cluster_size=512,refcount_bits=64", ((0, 300),)),
    crash.Shape("compressed", 200 * K, "cluster_size=1024", ((0, 300),), compressed=True),
)


class Tasks:
    """Many tasks on one disk."""

    def __init__(self, image: FormatAccess, largest: int, seed: int) -> None:
        self.image, self.largest, self.seed = image, largest, seed
        self.sequence = itertools.count(10)

    async def change(self, number: int) -> None:
        """Write, zero, discard; what is cut off meanwhile is an error."""
        rnd, image = random.Random(f"{self.seed} {number}"), self.image
        for _ in range(20):
            first, count = self._range(rnd, [1, 3, 40, 400, 4000])
            start, length = first * SECTOR, count * SECTOR
            data = tagged_range(first, count, next(self.sequence))
            steps: list[Callable[[], Awaitable[object]]] = [
                partial(image.write, data, start),
                partial(image.write, data, start),
                partial(image.write_zeroes, start, length),
                partial(image.write_zeroes, start, length, allocate=True),
                partial(image.discard_to_zero, start, length),
                partial(image.discard_to_any, start, length),
                partial(image.discard_to_backing, start, length),
                partial(image.ensure_data_mapping, start, length),
                image.sync,
            ]
            try:
                await rnd.choice(steps)()
            except OutOfRangeError:
                assert start + length > image.size()

    async def read(self) -> None:
        """Read, and judge what comes."""
        rnd = random.Random(f"{self.seed} read")
        for _ in range(60):
            first, count = self._range(rnd, [1, 3, 40])
            data = bytearray(count * SECTOR)
            await self.image.read(data, first * SECTOR)
            judge(data, first)

    async def resize(self) -> None:
        """Change the size."""
        rnd = random.Random(f"{self.seed} resize")
        for _ in range(14):
            await trio.sleep(rnd.randrange(300))
            await self.image.resize(rnd.randrange(1, self.largest // SECTOR) * SECTOR)

    def _range(self, rnd: random.Random, counts: list[int]) -> tuple[int, int]:
        sectors = self.image.size() // SECTOR
        first = rnd.randrange(sectors)
        return first, min(sectors - first, rnd.choice(counts))


def judge(data: bytearray, first: int) -> None:
    """Each sector has zeroes, or what somebody wrote to this very sector."""
    for number in range(len(data) // SECTOR):
        found = bytes(data[number * SECTOR : (number + 1) * SECTOR])
        if found != ZEROES:
            assert describe(found).startswith(f"guest sector {first + number} of")


async def work(shape: crash.Shape, files: crash.Files, seed: int) -> None:
    """All tasks, then what is left behind."""
    rnd = random.Random(seed)
    memory = MemoryStorage(files.image)
    data = None if files.data is None else MoodySlowStorage(MemoryStorage(files.data), rnd)
    image = await crash.open_files(MoodySlowStorage(memory, rnd), data, files, writable=True)
    image.write_parallelism = 1 + seed % 2 * 3
    tasks = Tasks(image, 2 * shape.size, seed)
    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(tasks.change, number)
        nursery.start_soon(tasks.read)
        nursery.start_soon(tasks.resize)
    assert isinstance(image.driver, Qcow2)
    assert not image.driver.locks.entries
    disk = bytearray(image.size())
    await image.read(disk, 0)
    judge(disk, 0)
    await image.close()
    verdict = check(memory.to_bytes())
    assert not verdict.errors
    assert not verdict.leaked


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_tasks_while_the_size_changes(shape: crash.Shape, tmp_path: Path) -> None:
    files = crash.make(shape, tmp_path)
    for seed in range(SEED, SEED + RUNS):
        print(f"IMAGOFS_RESIZE_SEED={seed}")
        run_repeatably(work, shape, files, seed, seed=seed)


def test_what_growing_left_behind_the_end_goes_with_the_end(tmp_path: Path) -> None:
    """Version 2 hides a longer layer below with zeroes as data; then growing is cancelled."""
    shape = crash.Shape("", 150 * K, "cluster_size=512,compat=0.10", ((0, 250),), backing=200 * K)
    files = crash.make(shape, tmp_path)

    async def grow_and_shrink(at: int) -> bool:
        memory = MemoryStorage(files.image)
        slow = SlowStorage(memory)
        image = await crash.open_files(slow, None, files, writable=True)
        with trio.CancelScope() as scope:
            first = slow.pauses
            slow.on_pause = lambda pause: scope.cancel() if pause == first + at else None
            await image.resize(300 * K)
        slow.on_pause = None
        await image.resize(20 * K)
        await image.close()
        verdict = check(memory.to_bytes())
        assert not verdict.errors
        assert not verdict.leaked
        return scope.cancelled_caught

    cancelled = sum(trio.run(grow_and_shrink, at) for at in range(1, 400, 9))
    assert cancelled > 10


# --- one thing at a time --------------------------------------------------------------------------


class Held(WrappedStorage):
    """What is read from it, or written to it, waits for `go` once `hold` was called."""

    def hold(self) -> None:
        self.reached, self.go = trio.Event(), trio.Event()

    async def _wait(self) -> None:
        if hasattr(self, "go"):
            self.reached.set()
            await self.go.wait()

    async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
        await self._wait()
        await super().pure_readv(views, offset)

    async def pure_writev(self, views: Sequence[memoryview], offset: int) -> None:
        await self._wait()
        await super().pure_writev(views, offset)


@pytest.mark.timeout(60)
async def test_a_read_ends_where_the_disk_does_by_then(tmp_path: Path) -> None:
    """The layer below ends within a cluster, so that the range is read layer by layer."""
    files = crash.make(crash.Shape("", 64 * K, "cluster_size=65536"), tmp_path)
    below = Held(MemoryStorage(b"\7" * (20 * K)))
    below.hold()
    driver = await load(
        memory := MemoryStorage(files.image),
        context=OpenContext.of().within(memory),
        writable=True,
        backing=FormatAccess(Raw(below)),
        data_file=FROM_HEADER,
    )
    image = FormatAccess(driver)
    found = bytearray(64 * K)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.read, found, 0)
        await below.reached.wait()
        await image.resize(4 * K)
        below.go.set()
    assert set(found[: 4 * K]) == {7}
    assert not any(found[20 * K :])
    await image.close()


@pytest.mark.timeout(60)
async def test_a_map_ends_where_the_disk_does_by_then(new_image: NewImage) -> None:
    path = new_image("1M", writes=["write -q 0 64k", "write -q 128k 64k", "write -q 512k 64k"])
    async with await open_image(path, writable=True) as image:
        starts = []
        async with aclosing(image.map()) as mappings:
            async for start, _ in mappings:
                starts.append(start)
                if start == 64 * K:
                    await image.resize(192 * K)
        assert starts == [0, 64 * K, 128 * K]


@pytest.mark.parametrize("raw", [False, True], ids=["", "raw"])
async def test_growing_that_is_cancelled_takes_nothing_away(
    new_image: NewImage, tmp_path: Path, raw: bool
) -> None:
    """The data file is shorter than the disk; the write in between makes it longer."""
    path = new_image("1M", data_file=(data := tmp_path / "data"), data_file_raw=raw)
    os.truncate(data, 0)
    async with await open_image(path, writable=True, gate=PermissiveImplicitOpenGate()) as image:
        await image.write(b"0" * 512, 0)
        [storage] = image.driver.data_storages
        assert isinstance(storage, FileStorage)
        slow = [object() for _ in range(16)]  # requests that keep all its threads busy
        for request in slow:
            storage._writers.acquire_on_behalf_of_nowait(request)
        growing = trio.CancelScope()

        async def grow() -> None:
            with growing:
                await image.resize(2 * K * K)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(grow)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(image.write, b"x" * 65536, 512 * K)
            await trio.testing.wait_all_tasks_blocked()
            growing.cancel()
            await trio.testing.wait_all_tasks_blocked()
            for request in slow:
                storage._writers.release_on_behalf_of(request)
        assert growing.cancelled_caught
        await image.sync()
        found = bytearray(65536)
        await image.read(found, 512 * K)
        assert found == b"x" * 65536


async def test_a_raw_data_file_never_grows_while_the_disk_shrinks(
    new_image: NewImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = new_image(
        "8M", data_file=(data := tmp_path / "data"), data_file_raw=True, writes=["write 0 8M"]
    )
    sizes = []
    write_zeroes = FileStorage.pure_write_zeroes

    async def pure_write_zeroes(
        self: FileStorage, offset: int, length: int, *, allocated: bool
    ) -> None:
        await write_zeroes(self, offset, length, allocated=allocated)
        sizes.append(data.stat().st_size)

    monkeypatch.setattr(FileStorage, "pure_write_zeroes", pure_write_zeroes)
    async with await open_image(path, writable=True, gate=PermissiveImplicitOpenGate()) as image:
        await image.resize(6 * K * K)
    assert max(sizes) == 8 * K * K
    assert data.stat().st_size == 6 * K * K


async def test_a_write_does_not_make_a_raw_data_file_longer_than_the_disk(tmp_path: Path) -> None:
    shape = crash.Shape("", 1 * K * K, "cluster_size=65536,data_file_raw=on", data_file=True)
    files = crash.make(shape, tmp_path)
    assert files.data is not None
    data = Held(MemoryStorage(files.data))
    image = await crash.open_files(MemoryStorage(files.image), data, files, writable=True)
    driver = image.driver
    assert isinstance(driver, Qcow2)
    await image.discard_to_backing(0, shape.size)  # so that nothing is mapped
    may_write = trio.Event()
    set_sizes = driver.set_sizes

    def shrink(size: int, reach: int) -> None:
        set_sizes(size, reach)
        if not may_write.is_set():  # this is as early as anybody sees the smaller disk
            data.hold()
            may_write.set()

    driver.set_sizes = shrink  # type: ignore[method-assign]
    size = 512 * K + 4096
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            await may_write.wait()
            await image.write(b"x" * 512, 512 * K)

        nursery.start_soon(write)
        nursery.start_soon(image.resize, size)
        await may_write.wait()
        await trio.testing.wait_all_tasks_blocked()
        data.go.set()
    await image.close()
    assert data.size() == size
