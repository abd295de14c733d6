"""Cancellation at every await, and a fault at every call, of every operation.

Each operation is run once to count its awaits and its calls; then again and again on a new copy of
the image, cancelled at the n-th await, or with the n-th call failing. Afterwards no lock is held,
each sector has its old or its new contents, the image goes on working, a flush leaves neither
errors nor leaks, and snapshots are as they were.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import trio

from imagofs.access import FormatAccess
from imagofs.errors import StorageError, SyncLostError
from imagofs.format.qcow2.driver import Qcow2
from imagofs.storage.memory import MemoryStorage
from tests.support.qcow2_oracle import check, read_disk
from tests.support.storages import FaultyStorage, SlowStorage
from tests.trust import crash
from tests.trust.history import SECTOR, describe, tagged_range

#: Every n-th point is tried; 1 tries all.
STRIDE = int(os.environ.get("IMAGOFS_INTERRUPT_STRIDE", "1"))

SHAPES = (
    crash.Shape("plain", 80 << 10, filled=((0, 40), (100, 30))),
    crash.Shape("snapshot", 80 << 10, filled=((0, 120),), snapshots=1),
    crash.Shape(
        "compressed", 80 << 10, "cluster_size=1024", ((0, 150),), compressed=True, snapshots=1
    ),
    crash.Shape("backing", 80 << 10, filled=((20, 60),), backing=40 << 10),
    crash.Shape("version 2", 80 << 10, "cluster_size=512,compat=0.10", ((20, 60),)),
    crash.Shape(
        "subclusters",
        256 << 10,
        "cluster_size=16384,extended_l2=on",
        ((8, 300),),
        snapshots=1,
        backing=200 << 10,
    ),
    crash.Shape("data file", 80 << 10, filled=((20, 60),), data_file=True),
)

#: Nearly all that the refcount table can count is in use.
FULL = crash.Shape(
    "full",
    1 << 20,
    "cluster_size=512,refcount_bits=64",
    ((0, 2000),),
    snapshots=2,
    rewritten=978,
)


FIRST, COUNT = 30, 80
START, LENGTH = FIRST * SECTOR, COUNT * SECTOR
NEW = tagged_range(FIRST, COUNT, 50)
OTHER = tagged_range(FIRST, COUNT, 60)

Step = Callable[[FormatAccess], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Operation:
    """What is interrupted.

    Attributes:
        run: The operation.
        start: Where the disk changes by it, in bytes.
        new: What is there afterwards; None: what the layer below has.
        before: What is done before, undisturbed.
        size: The disk's new size, if it changes.
    """

    run: Step
    start: int = 0
    new: bytes | None = b""
    before: Step | None = None
    size: int | None = None


async def write_and_discard(image: FormatAccess) -> None:
    """So that a flush has everything to do."""
    await image.write(OTHER, START)
    await image.flush()
    await image.write(NEW, START)
    await image.discard_to_zero(START + 4096, 8192)


async def take_new_clusters(image: FormatAccess) -> None:
    """Until the refcount table grows."""
    for first in range(1000, 1090, 30):
        await image.write(tagged_range(first, 30, 50), first * SECTOR)


async def write_zeroes(image: FormatAccess) -> None:
    await image.write_zeroes(START + 100, LENGTH - 100)


async def allocate_zeroes(image: FormatAccess) -> None:
    await image.write_zeroes(START + 100, LENGTH - 100, allocate=True)


async def map_to_write(image: FormatAccess) -> None:
    mapping = await image.ensure_data_mapping(85 * SECTOR + 100, 5000)
    assert mapping.writable


async def read_anew(image: FormatAccess) -> None:
    await image.invalidate_cache()
    await image.read(bytearray(LENGTH), START)


_ZEROES = bytes(LENGTH - 100)
OPERATIONS = {
    "write": Operation(lambda image: image.write(NEW, START), START, NEW),
    "small write": Operation(lambda i: i.write(NEW[:700], START + 300), START + 300, NEW[:700]),
    "zeroes": Operation(write_zeroes, START + 100, _ZEROES),
    "allocated zeroes": Operation(allocate_zeroes, START + 100, _ZEROES),
    "discard": Operation(lambda i: i.discard_to_zero(START, LENGTH), START, bytes(LENGTH)),
    "discard to any": Operation(lambda i: i.discard_to_any(START, LENGTH), START, bytes(LENGTH)),
    "discard to backing": Operation(lambda i: i.discard_to_backing(START, LENGTH), START, None),
    "map": Operation(map_to_write),
    "read": Operation(read_anew),
    "flush": Operation(lambda image: image.flush(), before=write_and_discard),
    "sync": Operation(lambda image: image.sync(), before=write_and_discard),
    # So far that the L1 table moves, if clusters are small.
    "grow": Operation(lambda image: image.resize(3 << 20), size=3 << 20),
    "shrink": Operation(lambda image: image.resize(60 << 10), size=60 << 10),
}

#: An image does not become smaller than its snapshots.
CASES = [
    pytest.param(shape, operation, id=f"{shape.name}-{name}")
    for shape in SHAPES
    for name, operation in OPERATIONS.items()
    if not (name == "shrink" and shape.snapshots)
]

GROWTH = Operation(take_new_clusters, 1000 * SECTOR, tagged_range(1000, 90, 50))


@cache
def files_of(shape: crash.Shape) -> crash.Files:
    """The image of a shape, made once."""
    with tempfile.TemporaryDirectory(prefix="imagofs-interrupted-") as folder:
        return crash.make(shape, Path(folder))


class Trial:
    """One run of an operation that is interrupted, on an image of its own."""

    def __init__(self, shape: crash.Shape, operation: Operation) -> None:
        self.shape = shape
        self.files = files_of(shape)
        self.operation = operation
        self.memory = MemoryStorage(self.files.image)
        self.data = None if self.files.data is None else MemoryStorage(self.files.data)
        self.storages = [FaultyStorage(SlowStorage(self.memory))]
        if self.data is not None:
            self.storages.append(FaultyStorage(SlowStorage(self.data)))
        self.pauses = 0
        self.image: FormatAccess

    async def begin(self) -> None:
        """Open the image, and do what comes before."""
        data = self.storages[1] if self.data is not None else None
        self.image = await crash.open_files(self.storages[0], data, self.files, writable=True)
        if self.operation.before is not None:
            await self.operation.before(self.image)
        self.before = await self.read()
        new, start = self.operation.new, self.operation.start
        if new is None:  # whole clusters
            cluster = self.shape.cluster
            end = (start + LENGTH) // cluster * cluster
            start = -(-start // cluster) * cluster
            new = self.files.backing.ljust(end, b"\0")[start:end]
        self.after = self.before[:start] + new + self.before[start + len(new) :]
        if self.operation.size is not None:
            # A disk that was to become smaller may have lost what lies behind its new end.
            below = self.files.backing.ljust(len(self.before), b"\0")
            self.after = self.before[: self.operation.size] + below[self.operation.size :]

    def watch_pauses(self, act: Callable[[int], object]) -> None:
        """Call `act` with the number of each await of the storages from now on."""

        def pause(number: int) -> None:
            self.pauses += 1
            act(self.pauses)

        for storage in self.storages:
            assert isinstance(storage.inner, SlowStorage)
            storage.inner.on_pause = pause

    def calls(self) -> list[int]:
        """How many calls there were, of each storage."""
        return [storage.calls["any"] for storage in self.storages]

    async def read(self) -> bytes:
        """The whole disk."""
        disk = bytearray(self.image.size())
        await self.image.read(disk, 0)
        return bytes(disk)

    # --- afterwards -------------------------------------------------------------------------------

    async def assert_idle(self) -> None:
        """Nobody holds a lock, and no I/O is counted as running."""
        driver = self.image.driver
        assert isinstance(driver, Qcow2)
        assert not driver.locks.entries
        # What is read for compressed clusters goes on for the next reader.
        with trio.fail_after(5):
            await driver.metadata.epochs.wait_for_earlier()
        assert not driver.metadata._flushing.locked()
        assert driver._writer is not None
        assert not driver._writer._making_table.locked()
        assert not driver._writer._preparing.locked()
        assert not driver.metadata.refcounts.growing

    def assert_old_or_new(self, disk: bytes) -> None:
        """Each byte is as it was before the operation, or as it is after it."""
        if disk in (self.before, self.after):
            return
        if self.operation.size is not None:
            assert len(disk) in (len(self.before), self.operation.size)
            assert not any(disk[len(self.before) :])
            disk = disk[: len(self.before)]
        for start in range(0, len(disk), SECTOR):
            end = start + SECTOR
            found, old, new = disk[start:end], self.before[start:end], self.after[start:end]
            if found not in (old, new):
                both = zip(found, old, new, strict=True)
                assert all(byte in (one, other) for byte, one, other in both), (
                    f"sector {start // SECTOR} holds {describe(found)}, it was {describe(old)} "
                    f"and was to be {describe(new)}"
                )

    def assert_sound(self, disk: bytes | None, *, leaks: bool = False) -> None:
        """What is in the storages is right, and `disk` is there."""
        contents = self.memory.to_bytes()
        verdict = check(contents)
        assert not verdict.errors
        assert leaks or not verdict.leaked
        if disk is not None:
            data = None if self.data is None else self.data.to_bytes()
            assert read_disk(contents, data=data, backing=self.files.backing) == disk
        for number, before in enumerate(self.files.snapshots):
            assert read_disk(contents, backing=self.files.backing, snapshot=number) == before

    async def assert_usable(self) -> None:
        """Reads, a flush, another write, close: all as if nothing had been."""
        await self.assert_idle()
        disk = await self.read()
        self.assert_old_or_new(disk)
        await self.image.flush()
        self.assert_sound(disk)
        await self.image.write(OTHER, START)
        await self.image.discard_to_zero(START, 4096)
        await self.image.close()
        self.assert_sound(disk[:START] + bytes(4096) + OTHER[4096:] + disk[START + LENGTH :])

    async def assert_ended(self) -> None:
        """After a sync that failed: reads go on, nothing else does."""
        await self.assert_idle()
        image = self.image
        disk = await self.read()
        self.assert_old_or_new(disk)
        assert not image.write_nowait(memoryview(NEW)[:SECTOR], START)
        attempts: list[Step] = [
            lambda image: image.write(NEW, START),
            lambda image: image.write(NEW[:SECTOR], 0),
            lambda image: image.discard_to_zero(START, LENGTH),
            lambda image: image.ensure_data_mapping(START, LENGTH),
            lambda image: image.flush(),
            lambda image: image.sync(),
        ]
        written = self.memory.to_bytes()
        for attempt in attempts:
            with pytest.raises(SyncLostError):
                await attempt(image)
        with pytest.raises(SyncLostError):
            await image.close()
        assert image.closed
        assert self.memory.to_bytes() == written
        self.assert_sound(None, leaks=True)


async def count(shape: crash.Shape, operation: Operation) -> tuple[int, list[tuple[int, int]]]:
    """Awaits of an operation; the first and the last call of each storage."""
    trial = Trial(shape, operation)
    await trial.begin()
    trial.watch_pauses(lambda number: None)
    before = trial.calls()
    await operation.run(trial.image)
    pauses, after = trial.pauses, trial.calls()
    disk = await trial.read()
    assert len(disk) == (operation.size or len(trial.before))
    assert disk[: len(trial.after)] == trial.after[: len(disk)]
    await trial.image.close()
    return pauses, list(zip(before, after, strict=True))


async def cancel_everywhere(shape: crash.Shape, operation: Operation, stride: int) -> int:
    """Cancel an operation at each of its awaits in turn; return how often that ended it."""
    ended = 0
    pauses, _ = await count(shape, operation)
    for number in range(1, pauses + 1, stride):
        trial = Trial(shape, operation)
        await trial.begin()
        with trio.CancelScope() as scope:
            trial.watch_pauses(lambda n, at=number, s=scope: s.cancel() if n == at else None)  # type: ignore[misc]
            await operation.run(trial.image)
        ended += scope.cancelled_caught
        await trial.assert_usable()
    return ended


async def fail_everywhere(
    shape: crash.Shape, operation: Operation, stride: int, *, forever: bool
) -> int:
    """Let each call of an operation fail in turn; return how many did."""
    failed = 0
    _, ranges = await count(shape, operation)
    for index, (first, last) in enumerate(ranges):
        for number in range(first + 1, last + 1, stride):
            trial = Trial(shape, operation)
            await trial.begin()
            storage = trial.storages[index]
            storage.error = errno.ENOSPC if number % 2 else errno.EIO
            storage.kind, storage.nth, storage.forever = "any", number, forever
            storage.partial = number % 3 == 0
            syncs = storage.calls["sync"]
            error: Exception | None = None
            try:
                await operation.run(trial.image)
            except (StorageError, SyncLostError) as exc:
                error = exc
            # Once the disk has its size, giving space back may fail in silence.
            assert error or (operation.size and trial.image.size() == operation.size)
            failed += 1
            if forever:
                with pytest.raises((StorageError, SyncLostError)):
                    await trial.image.sync()
            storage.kind = None
            if isinstance(error, SyncLostError):
                assert storage.calls["sync"] > syncs
                await trial.assert_ended()
            elif (
                forever
                and isinstance(trial.image.driver, Qcow2)
                and (trial.image.driver.metadata.lost is not None)
            ):
                await trial.assert_ended()
            else:
                await trial.assert_usable()
    return failed


@pytest.mark.parametrize(("shape", "operation"), CASES)
async def test_cancelled_at_every_await(shape: crash.Shape, operation: Operation) -> None:
    assert await cancel_everywhere(shape, operation, STRIDE)


@pytest.mark.parametrize(("shape", "operation"), CASES)
@pytest.mark.parametrize("forever", [False, True], ids=["once", "for a while"])
async def test_each_call_fails(shape: crash.Shape, operation: Operation, forever: bool) -> None:
    assert await fail_everywhere(shape, operation, STRIDE, forever=forever)


async def test_growth_of_the_refcount_table_is_cancelled() -> None:
    assert await cancel_everywhere(FULL, GROWTH, 9 * STRIDE)


@pytest.mark.parametrize("forever", [False, True], ids=["once", "for a while"])
async def test_growth_of_the_refcount_table_fails(forever: bool) -> None:
    assert await fail_everywhere(FULL, GROWTH, 9 * STRIDE, forever=forever)
