"""The disk changes its size again and again while tasks read, write, zero and discard it."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from imagofs.access import FormatAccess
from imagofs.errors import OutOfRangeError
from imagofs.format.qcow2.driver import Qcow2
from imagofs.storage.memory import MemoryStorage
from tests.support.qcow2_oracle import check
from tests.support.storages import SlowStorage
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
