"""Faults, tried out: each call of a workload fails in turn, and a real disk is full.

A workload of `crash.py` is run once to count its calls of the storages. Then it is run again for
each of them, and that call fails: once or for a while, with EIO or ENOSPC, a write after its first
half too. Afterwards the error must have reached who asked; every sector holds what it may hold;
reads, writes and syncs go on and leave a clean image; or, after a sync that failed, only reads go
on, and nothing is written until the image is opened anew. What a sync covered is there in any case,
also after a power cut.

Then a file system is full under a real mount (needs root).

    python -m tests.trust.faults --seed 1
"""

from __future__ import annotations

import argparse
import errno
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from imagofs.errors import ImagofsError, StorageError, SyncLostError
from imagofs.format.qcow2.driver import Qcow2
from imagofs.storage.memory import MemoryStorage
from tests.support.qcow2_oracle import check, read_disk
from tests.support.storages import FaultyStorage, Log, RecordingStorage, SlowStorage
from tests.trust import crash, full_disk
from tests.trust.crash import Broken
from tests.trust.history import SECTOR, History, run_repeatably, tagged_range

#: What is not cancelled as well.
SHAPES = tuple(shape for shape in crash.SHAPES if not shape.cancels)
#: Operations of a workload; errors that are seen before a fault that lasts is over.
OPERATIONS = 40
_LASTS = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """What fails.

    Attributes:
        storage: 0 for the image, 1 for the data file.
        call: Number of the call, from 1.
        error: The errno.
        lasts: Until some errors were seen; otherwise the one call fails.
        partial: A write does its first half.
    """

    storage: int
    call: int
    error: int
    lasts: bool = False
    partial: bool = False

    def __str__(self) -> str:
        name = errno.errorcode[self.error]
        how = "".join(
            text for text, there in ((", lasting", self.lasts), (", half", self.partial)) if there
        )
        return f"{name} at call {self.call} of storage {self.storage}{how}"


class _CachedStorage(FaultyStorage):
    """Reads that need no waiting do not fail."""

    def readv_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        return self.inner.readv_nowait(views, offset)


class Trial:
    """One run of a workload with a fault, or without."""

    def __init__(self, shape: crash.Shape, files: crash.Files, seed: int, fault: Fault | None):
        self.shape, self.files, self.seed, self.fault = shape, files, seed, fault
        self.log = Log()
        self.memories = [MemoryStorage(files.image)]
        if files.data is not None:
            self.memories.append(MemoryStorage(files.data))
        # Slices are written together only where the page cache has what lies between them.
        faulty = _CachedStorage if shape.slice_bytes else FaultyStorage
        self.storages = [
            faulty(RecordingStorage(self._slow(memory), self.log, name), tear=SECTOR)
            for memory, name in zip(self.memories, ("image", "data"), strict=False)
        ]
        initial = bytes(read_disk(files.image, data=files.data, backing=files.backing))
        self.history = History(initial.ljust(shape.largest, b"\0"), self.log.clock)
        self.errors: list[ImagofsError] = []
        self.silent = False
        #: Calls of each storage while the image was opened: they do not fail.
        self.opening: list[int] = []

    def _slow(self, memory: MemoryStorage) -> MemoryStorage | SlowStorage:
        return SlowStorage(memory, delay=1.0) if self.shape.concurrent > 1 else memory

    @property
    def calls(self) -> list[int]:
        """Calls of each storage so far."""
        return [storage.calls["any"] for storage in self.storages]

    @property
    def failed_kind(self) -> str | None:
        """The kind of the call that failed first, None if none has."""
        return next((s.failed[0] for s in self.storages if s.failed), None)

    async def run(self) -> None:
        """The workload, then everything that must hold."""
        data = self.storages[1] if len(self.storages) > 1 else None
        self.image = await crash.open_files(self.storages[0], data, self.files, writable=True)
        self.opening = self.calls
        if self.fault is not None:
            storage = self.storages[self.fault.storage]
            storage.kind, storage.nth, storage.forever = "any", self.fault.call, self.fault.lasts
            storage.error, storage.partial = self.fault.error, self.fault.partial
        self.guest = crash.Guest(self.image, self.shape, self.history, self.files)
        async with trio.open_nursery() as nursery:
            for number in range(self.shape.concurrent):
                nursery.start_soon(self._work, number)
        self.worked = self.calls
        self._clear()
        if self.is_lost:
            await self._judge_lost()
        else:
            await self._judge_alive()

    async def _work(self, number: int) -> None:
        rnd = random.Random(f"{self.seed} {number} {self.shape.name}")
        for _ in range(OPERATIONS // self.shape.concurrent):
            await self._try(lambda: self.guest.step(rnd))
            if self.shape.grows:
                await self._try(lambda: self.guest.write(rnd.randrange(1000, 1990), 2))

    async def _try(self, step: Callable[[], object]) -> None:
        failed = sum(len(storage.failed) for storage in self.storages)
        try:
            await step()  # type: ignore[misc]
        except (StorageError, SyncLostError) as error:
            self.errors.append(error)
            self.guest.size = self.image.size()
            if len(self.errors) >= _LASTS:
                self._clear()
        else:
            now = sum(len(storage.failed) for storage in self.storages)
            if now > failed and self.shape.concurrent == 1:
                self._silent()

    def _silent(self) -> None:
        """A call failed and nobody was told. That is right where nothing is lost by it."""
        # What is read ahead is read again by who needs it; and space that is not given back once
        # the disk has its new size is a leak, no more.
        kinds = {kind for storage in self.storages for kind in storage.failed}
        self.silent = True
        if kinds != {"read"} and not self.shape.largest:
            raise Broken(f"nobody was told that {kinds} failed")

    def _clear(self) -> None:
        for storage in self.storages:
            storage.kind = None

    @property
    def is_lost(self) -> bool:
        """Whether a sync failed."""
        driver = self.image.driver
        assert isinstance(driver, Qcow2)
        return driver.metadata.lost is not None

    async def _read(self) -> bytearray:
        disk = bytearray(self.image.size())
        await self.image.read(disk, 0)
        return disk

    async def _judge_alive(self) -> None:
        """Everything goes on."""
        crash._judge_disk(bytes(await self._read()), self.history.allowed(powered=True))
        await self.guest.write(0, min(7, self.guest.size // SECTOR))
        await self.image.sync()
        self._judge_cuts()
        await self.image.close()
        if self._judge_files(powered=True) and not self.shape.largest:
            raise Broken("clusters leaked")

    async def _judge_lost(self) -> None:
        """Reads go on, nothing else does, until the image is opened anew."""
        crash._judge_disk(bytes(await self._read()), self.history.allowed(powered=True))
        before = [memory.to_bytes() for memory in self.memories]
        new = tagged_range(0, 1, 99)
        assert not self.image.write_nowait(memoryview(new), 0)
        for attempt in (
            partial(self.image.write, new, 0),
            partial(self.image.discard_to_zero, 0, SECTOR),
            self.image.flush,
            self.image.sync,
            self.image.close,
        ):
            try:
                await attempt()
            except SyncLostError:
                continue
            raise Broken(f"{attempt} went on after a sync had failed")
        if before != [memory.to_bytes() for memory in self.memories]:
            raise Broken("something was written after a sync had failed")
        self._judge_files(powered=False)
        self._judge_cuts()
        await self._open_anew()

    async def _open_anew(self) -> None:
        memories = [MemoryStorage(memory.to_bytes()) for memory in self.memories]
        data = memories[1] if len(memories) > 1 else None
        image = await crash.open_files(memories[0], data, self.files, writable=True)
        await image.write(tagged_range(0, 1, 99), 0)
        await image.close()
        if check(memories[0].to_bytes()).errors:
            raise Broken("it is corrupt after it was opened anew")

    def _judge_files(self, *, powered: bool) -> int:
        data = bytearray(self.memories[1].to_bytes()) if len(self.memories) > 1 else None
        allowed = self.history.allowed(powered=powered)
        return crash.judge(
            self.files, self.memories[0].to_bytes(), data, self._reach(data, allowed)
        )

    def _reach(self, data: bytearray | None, allowed: list[set[bytes]]) -> list[set[bytes]]:
        # A raw data file is as long as the disk; the history reaches as far as the disk ever did.
        return allowed if data is None else allowed[: len(data) // SECTOR]

    def _judge_cuts(self) -> None:
        """Power cuts at some moments, each with some of what was not synced."""
        rnd = random.Random(self.seed)
        syncs = [record.began for record in self.log.records if record.kind == "sync"]
        moments = [*rnd.sample(syncs, min(2, len(syncs))), float("inf")]
        for at in moments:
            durable, at_risk = self.log.durable(at), self.log.at_risk(at)
            for part in (0.0, 0.5, 0.9):
                chosen = [record for record in at_risk if rnd.random() < part]
                records = sorted([*durable, *chosen], key=lambda record: record.began)
                image, data = crash.build(self.files, records)
                allowed = self.history.allowed(at)
                crash.judge(self.files, image, data, self._reach(data, allowed))


@dataclass(slots=True)
class Tally:
    """Counts for the report."""

    calls: int = 0
    faults: int = 0
    told: int = 0
    lost: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add another one's."""
        self.calls += other.calls
        self.faults += other.faults
        self.told += other.told
        self.lost += other.lost
        self.kinds.update(other.kinds)
        self.broken += other.broken

    def __str__(self) -> str:
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(self.kinds.items()))
        return (
            f"{self.faults} faults at {self.calls} calls ({kinds}): {self.told} told at once, "
            f"{self.lost} ended writing, {len(self.broken)} broken"
        )


def faults_at(storage: int, call: int) -> list[Fault]:
    """The faults that are tried at one call."""
    return [
        Fault(storage, call, errno.EIO),
        Fault(storage, call, errno.ENOSPC, partial=True),
        Fault(storage, call, errno.ENOSPC, lasts=True, partial=call % 2 == 0),
    ]


def try_shape(shape: crash.Shape, seed: int, folder: Path, limit: int | None = None) -> Tally:
    """Let every call of a workload fail.

    Args:
        shape: The image and the workload.
        seed: Of the workload.
        folder: For files.
        limit: Let so many faults happen, chosen at random; None: try all.
    """
    with shape.slices():
        return _try_shape(shape, seed, folder, limit)


def _try_shape(shape: crash.Shape, seed: int, folder: Path, limit: int | None) -> Tally:
    files = crash.make(shape, folder)
    plain = Trial(shape, files, seed, None)
    run_repeatably(plain.run, seed=seed)
    every = [
        fault
        for storage, (first, last) in enumerate(zip(plain.opening, plain.worked, strict=True))
        for call in range(first + 1, last + 1)
        for fault in faults_at(storage, call)
    ]
    tally = Tally(calls=len(every) // 3)
    if limit is not None:
        random.Random(seed).shuffle(every)
    for fault in every:
        if tally.faults == limit:
            break
        trial = Trial(shape, files, seed, fault)
        try:
            run_repeatably(trial.run, seed=seed)
        except* Exception as group:
            tally.broken.append(
                f"{shape.name}, seed {seed}, {fault} ({trial.failed_kind}): {group.exceptions[0]!r}"
            )
        # What is inflated ahead, and so read, is up to threads: not every call comes again there. A
        # sample takes another fault instead.
        if limit is not None and shape.compressed and trial.failed_kind is None:
            continue
        tally.faults += 1
        tally.told += bool(trial.errors)
        tally.lost += trial.is_lost
        tally.kinds[trial.failed_kind or "none"] += 1
    return tally


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Let every call of qcow2 workloads fail.")
    parser.add_argument("--seed", type=int, default=1, help="of the first workloads")
    parser.add_argument("--rounds", type=int, default=2, help="workloads of each image")
    parser.add_argument("--limit", type=int, help="faults per workload (default: all)")
    arguments = parser.parse_args()
    total = Tally()
    full = full_disk.Count()
    full_disks = 0
    with tempfile.TemporaryDirectory(prefix="imagofs-faults-", dir="/var/tmp") as name:
        folder = Path(name)
        for seed in range(arguments.seed, arguments.seed + arguments.rounds):
            for shape in SHAPES:
                began = time.perf_counter()
                tally = try_shape(shape, seed, folder, arguments.limit)
                total.add(tally)
                seconds = time.perf_counter() - began
                print(f"{shape.name}, seed {seed}: {tally}, {seconds:.1f} s", flush=True)
                for line in tally.broken[:5]:
                    print(f"BROKEN: {line}", flush=True)
            for kind in full_disk.KINDS:
                for tries in (full_disk.try_kind, full_disk.try_kill):
                    if tries is full_disk.try_kill and not kind.is_killed:
                        continue
                    how = "killed" if tries is full_disk.try_kill else "room again"
                    what = f"full disk, {how}, {kind.name}, seed {seed}"
                    try:
                        with tempfile.TemporaryDirectory(dir=folder) as own:
                            count = tries(kind, seed, Path(own))
                    except Exception as error:
                        total.broken.append(f"{what}: {error!r}")
                        print(f"BROKEN: {total.broken[-1]}", flush=True)
                        continue
                    full.add(count)
                    full_disks += 1
                    print(f"{what}: {count}", flush=True)
    print(f"{full_disks} full disks: {full}")
    print(f"{total}; first seed {arguments.seed}")
    return 1 if total.broken else 0


if __name__ == "__main__":
    sys.exit(main())
