"""The crash rule, tried out: what a power cut may leave of an image, built and looked at.

A workload runs on storages that log every change. For each moment between two syncs, subsets of
the changes that no sync covered are applied to what was durable (all subsets where there are few,
random ones and torn writes where there are many). Each image that comes out must have nothing worse
than leaks, each guest sector must hold what it may hold by then, and snapshots must be untouched.
Some of them are written to again, without a repair, until the next power cut (`second_life.py`).

So are what creating an image and repairing one leave (`crash_others.py`).

    python -m tests.trust.crash --images 100000 --seed 1
"""

from __future__ import annotations

import argparse
import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from imagofs.access import FormatAccess
from imagofs.format.qcow2 import l2
from imagofs.format.qcow2.check import check_image
from imagofs.format.qcow2.loading import load
from imagofs.format.raw import Raw
from imagofs.opening import FROM_HEADER, OpenContext
from imagofs.storage.base import Storage
from imagofs.storage.memory import MemoryStorage
from tests.support.qcow2_oracle import Layout, check, read_disk
from tests.support.storages import Log, Record, RecordingStorage, SlowStorage
from tests.trust.history import (
    SECTOR,
    ZEROES,
    History,
    Sync,
    describe,
    run_repeatably,
    tagged_range,
)

GARBAGE = b"\xee" * SECTOR
_ALL_SUBSETS = 12  # changes: up to so many, every subset is tried
_RANDOM_SUBSETS = 500  # where there are more


# --- images ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """An image to begin with.

    Attributes:
        name: For the report.
        size: Bytes of the disk.
        options: `qemu-img create` options.
        filled: The part of the disk that is written before, in sectors: (first, count).
        zeroed: Then zeroes are written over these clusters, which keep their old bytes.
        compressed: The contents are written compressed.
        snapshots: Internal snapshots that are taken of it.
        rewritten: Sectors that are written again after each snapshot.
        backing: Bytes of the layer below; None: there is none.
        data_file: The guest data is in an external file.
        concurrent: Tasks that write at the same time.
        cancels: Some of what they do is cancelled.
        operations: Length of the workload.
        grows: The refcount table must grow.
        largest: Bytes up to which the disk is resized; 0: it never is.
        slice_bytes: Bytes of a slice of an L2 table; 0: as ever, and small tables have only one.
    """

    name: str
    size: int
    options: str = "cluster_size=512"
    filled: tuple[tuple[int, int], ...] = ()
    zeroed: tuple[tuple[int, int], ...] = ()
    compressed: bool = False
    snapshots: int = 0
    rewritten: int = 5
    backing: int | None = None
    data_file: bool = False
    concurrent: int = 1
    cancels: bool = False
    operations: int = 60
    grows: bool = False
    largest: int = 0
    slice_bytes: int = 0

    @contextmanager
    def slices(self) -> Iterator[None]:
        """While it runs, slices have the shape's size: several of a table are written together."""
        usual = l2._SLICE_BYTES
        l2._SLICE_BYTES = self.slice_bytes or usual
        try:
            yield
        finally:
            l2._SLICE_BYTES = usual

    @property
    def cluster(self) -> int:
        """Bytes of a cluster."""
        text = dict(word.split("=") for word in self.options.split(","))["cluster_size"]
        return int(text)


SHAPES = (
    Shape("small clusters", 96 << 10, filled=((0, 40), (100, 30))),
    Shape(
        "size not of clusters",
        (96 << 10) - 1536,
        "cluster_size=4096",
        ((3, 120),),
        zeroed=((24, 80),),
    ),
    Shape("snapshots", 96 << 10, filled=((0, 120),), snapshots=2),
    Shape("several slices", 96 << 10, filled=((0, 20), (60, 10), (120, 40)), slice_bytes=64),
    Shape("wide clusters", 256 << 10, "cluster_size=16384", ((10, 200),)),
    Shape("compressed", 96 << 10, "cluster_size=1024", ((0, 150),), compressed=True),
    Shape(
        "compressed, snapshot",
        96 << 10,
        "cluster_size=4096",
        ((0, 150),),
        compressed=True,
        snapshots=1,
    ),
    Shape("backing", 96 << 10, filled=((20, 60),), backing=(64 << 10) + 512),
    Shape("version 2", 96 << 10, "cluster_size=512,compat=0.10", ((20, 60),)),
    Shape(
        "version 2, backing",
        96 << 10,
        "cluster_size=512,compat=0.10",
        ((20, 60),),
        backing=96 << 10,
    ),
    # A refcount block counts 64 clusters.
    Shape("refcount blocks", 192 << 10, "cluster_size=512,refcount_bits=64", ((0, 20),)),
    Shape("one bit", 96 << 10, "cluster_size=512,refcount_bits=1", ((0, 60),)),
    Shape("subclusters", 512 << 10, "cluster_size=16384,extended_l2=on", ((8, 300),)),
    Shape(
        "subclusters, backing, snapshot",
        512 << 10,
        "cluster_size=16384,extended_l2=on,refcount_bits=8",
        ((8, 300),),
        snapshots=1,
        backing=300 << 10,
    ),
    Shape("data file", 96 << 10, "cluster_size=512", ((20, 60),), data_file=True),
    Shape(
        "data file, backing",
        96 << 10,
        "cluster_size=1024",
        ((20, 120),),
        backing=80 << 10,
        data_file=True,
    ),
    Shape("raw data file", (96 << 10) - 512, "cluster_size=1024,data_file_raw=on", data_file=True),
    Shape("concurrent", 96 << 10, filled=((0, 60),), concurrent=6, operations=120),
    Shape(
        "concurrent, snapshot, backing",
        96 << 10,
        "cluster_size=2048",
        ((0, 60),),
        snapshots=1,
        backing=96 << 10,
        concurrent=6,
        operations=120,
    ),
    Shape(
        "cancelled",
        96 << 10,
        filled=((0, 100),),
        snapshots=1,
        concurrent=5,
        cancels=True,
        operations=120,
    ),
    Shape(
        "cancelled, compressed, subclusters",
        384 << 10,
        "cluster_size=16384,extended_l2=on",
        ((8, 300),),
        compressed=True,
        concurrent=5,
        cancels=True,
        operations=100,
    ),
    # Behind 2 MiB the L1 table needs another cluster.
    Shape("resized", 1900 << 10, filled=((20, 60), (3000, 100)), largest=2200 << 10),
    Shape(
        "resized, backing",
        60 << 10,
        "cluster_size=4096",
        ((3, 60),),
        backing=100 << 10,
        largest=120 << 10,
    ),
    # Nearly all of what the refcount table can count is in use.
    Shape(
        "refcount table grows",
        1 << 20,
        "cluster_size=512,refcount_bits=64",
        ((0, 2000),),
        snapshots=2,
        rewritten=978,
        grows=True,
        operations=24,
    ),
)


@dataclass(slots=True)
class Files:
    """What an image consists of."""

    image: bytes
    data: bytes | None = None
    raw: bool = False  # the data file read by itself is the disk
    backing: bytes = b""
    snapshots: list[bytes] = field(default_factory=list)


def _run(*argv: str | Path) -> None:
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"


def make(shape: Shape, folder: Path) -> Files:
    """Make an image with qemu-img, with garbage in all its host clusters that are free."""
    image, data, flat = folder / "image", folder / "data", folder / "flat"
    for path in (image, data):
        path.unlink(missing_ok=True)
    options = shape.options + (f",data_file={data}" if shape.data_file else "")
    contents = bytearray(shape.size)
    for first, count in shape.filled:
        contents[first * SECTOR : (first + count) * SECTOR] = tagged_range(first, count, 0)
    flat.write_bytes(contents)
    files = Files(b"")
    if shape.compressed:
        _run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, flat, image)
    else:
        _run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, str(shape.size))
        for first, count in shape.filled:
            piece = folder / "piece"
            piece.write_bytes(contents[first * SECTOR : (first + count) * SECTOR])
            command = f"write -s {piece} {first * SECTOR} {count * SECTOR}"
            _run("qemu-io", "-f", "qcow2", "-c", command, image)
    for first, count in shape.zeroed:
        command = f"write -z {first * SECTOR} {count * SECTOR}"
        _run("qemu-io", "-f", "qcow2", "-c", command, image)
    for number in range(shape.snapshots):
        _run("qemu-img", "snapshot", "-c", f"s{number}", image)
        # So that the snapshots differ.
        piece = folder / "piece"
        first, count = number * 9, shape.rewritten
        piece.write_bytes(tagged_range(first, count, 1 + number))
        command = f"write -s {piece} {first * SECTOR} {count * SECTOR}"
        _run("qemu-io", "-f", "qcow2", "-c", command, image)
    raw = bytearray(image.read_bytes())
    raw += bytes(-len(raw) % shape.cluster)
    used = Layout(raw).refcounts()
    for cluster in range(len(raw) // shape.cluster):
        if cluster not in used:
            start = cluster * shape.cluster
            raw[start : start + shape.cluster] = GARBAGE * (shape.cluster // SECTOR)
    files.image = bytes(raw) + GARBAGE * 7
    if shape.data_file:
        # qemu-img makes it longer than the disk, of whole clusters.
        files.data = data.read_bytes()[: shape.size]
        files.raw = "data_file_raw=on" in shape.options
    if shape.backing is not None:
        files.backing = tagged_range(0, shape.backing // SECTOR, 2)
    files.snapshots = [
        bytes(read_disk(files.image, backing=files.backing, snapshot=number))
        for number in range(shape.snapshots)
    ]
    return files


# --- workloads ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Trace:
    """What a workload left behind."""

    files: Files
    log: Log
    history: History


async def open_files(
    storage: Storage, data: Storage | None, files: Files, *, writable: bool
) -> FormatAccess:
    """Open an image whose layers are storages. The layer below is opened if it has any bytes."""
    context = OpenContext.of(metadata_bytes=1 << 17)
    backing = FormatAccess(Raw(MemoryStorage(files.backing))) if files.backing else None
    driver = await load(
        storage,
        context=context.within(storage),
        writable=writable,
        backing=backing,
        data_file=FROM_HEADER if data is None else data,
    )
    return FormatAccess(driver, cache=context.cache)


class Guest:
    """Carries out random operations and keeps their history."""

    def __init__(self, image: FormatAccess, shape: Shape, history: History, files: Files) -> None:
        self.image = image
        self.shape = shape
        self.history = history
        self.files = files
        self.size = shape.size
        self.sequence = itertools.count(10)
        #: Whether it writes zeroes that keep their host space.
        self.allocates = True

    async def step(self, rnd: random.Random) -> None:
        """Do one thing."""
        sectors = self.size // SECTOR
        per_cluster = self.shape.cluster // SECTOR
        first = rnd.randrange(sectors)
        count = rnd.choice([1, 2, per_cluster, rnd.randrange(1, 3 * per_cluster + 8)])
        if rnd.random() < 0.4:
            first = first // per_cluster * per_cluster
        count = min(count, sectors - first)
        kind = rnd.choices(
            ["write", "zero", "allocate", "discard", "unmap", "flush", "sync", "forget", "resize"],
            [50, 8, 3 * self.allocates, 12, 6, 6, 9, 6, 9 * bool(self.shape.largest)],
        )[0]
        image, start, length = self.image, first * SECTOR, count * SECTOR
        if kind == "forget":
            # A cache may forget what is clean at any time.
            image._cache.young.clear()
            image._cache._old.clear()
        elif kind == "resize":
            await self.resize(rnd.randrange(1, self.shape.largest // SECTOR) * SECTOR)
        elif kind == "flush":
            await image.flush()
        elif kind == "sync":
            began = next(self.history.clock)
            await image.sync()
            self.history.syncs.append(Sync(began, next(self.history.clock)))
        elif kind == "write":
            cut = rnd.randrange(length + 1) if rnd.random() < 0.3 else 0
            await self.write(first, count, cut)
        elif kind == "zero":
            await self._do(self._zeroes(first, count), lambda: image.write_zeroes(start, length))
        elif kind == "allocate":
            await self._do(
                self._zeroes(first, count),
                lambda: image.write_zeroes(start, length, allocate=True),
            )
        elif kind == "discard":
            to_any = rnd.random() < 0.5
            discard = image.discard_to_any if to_any else image.discard_to_zero
            zeroes = self._zeroes(first, count)
            await self._do(zeroes, lambda: discard(start, length), certain=not to_any)
        else:
            values = self._below(first, count)
            await self._do(values, lambda: image.discard_to_backing(start, length))

    async def write(self, first: int, count: int, cut: int = 0) -> None:
        """Write `count` sectors from `first` on, from two buffers if `cut` is not 0."""
        data = tagged_range(first, count, next(self.sequence))
        values = {
            first + number: data[number * SECTOR : (number + 1) * SECTOR] for number in range(count)
        }
        buffers = [data[:cut], data[cut:]] if cut else [data]
        await self._do(values, lambda: self.image.writev(buffers, first * SECTOR))

    async def resize(self, size: int) -> None:
        """Make the disk larger or smaller."""
        if size < self.size:
            # What is cut off may show the layer below until the size is written.
            below = self.files.backing.ljust(self.size, b"\0")
            values = {
                sector: below[sector * SECTOR : (sector + 1) * SECTOR]
                for sector in range(size // SECTOR, self.size // SECTOR)
            }
        else:
            values = self._zeroes(self.size // SECTOR, (size - self.size) // SECTOR)
        await self._do(values, lambda: self.image.resize(size))
        self.size = size

    async def _do(
        self,
        values: dict[int, bytes],
        change: Callable[[], Awaitable[None]],
        *,
        certain: bool = True,
    ) -> None:
        operation = self.history.begin(values, certain=certain)
        done = False
        try:
            await change()
            done = True
        finally:
            self.history.end(operation, done=done)

    def _zeroes(self, first: int, count: int) -> dict[int, bytes]:
        return dict.fromkeys(range(first, first + count), ZEROES)

    def _below(self, first: int, count: int) -> dict[int, bytes]:
        """What the whole clusters of a range show once the layer below shows through."""
        per_cluster = self.shape.cluster // SECTOR
        end = first + count
        first = -(-first // per_cluster) * per_cluster
        if end != self.size // SECTOR:
            end = end // per_cluster * per_cluster
        below = self.files.backing.ljust(self.size, b"\0")
        return {
            sector: below[sector * SECTOR : (sector + 1) * SECTOR] for sector in range(first, end)
        }


async def run_workload(shape: Shape, files: Files, seed: int) -> Trace:
    """Run one workload and record it."""
    log = Log()

    def recorded(contents: bytes, name: str) -> RecordingStorage:
        inner: Storage = MemoryStorage(contents)
        if shape.concurrent > 1:
            # Only a storage that waits lets several operations be under way.
            inner = SlowStorage(inner, delay=1.0)
        return RecordingStorage(inner, log, name)

    storage = recorded(files.image, "image")
    data = None if files.data is None else recorded(files.data, "data")
    image = await open_files(storage, data, files, writable=True)
    initial = bytes(read_disk(files.image, data=files.data, backing=files.backing))
    history = History(initial.ljust(shape.largest, b"\0"), log.clock)
    guest = Guest(image, shape, history, files)

    async def work(number: int) -> None:
        rnd = random.Random(f"{seed} {number} {shape.name}")
        for _ in range(shape.operations // shape.concurrent):
            with trio.CancelScope() as scope:
                if shape.cancels and rnd.random() < 0.3:
                    scope.deadline = trio.current_time() + rnd.randrange(20)
                await guest.step(rnd)
            if shape.grows:
                # Sectors that a snapshot shares: each takes a new cluster.
                await guest.write(rnd.randrange(1000, 1990), 2)

    async with trio.open_nursery() as nursery:
        for number in range(shape.concurrent):
            nursery.start_soon(work, number)
    began = next(log.clock)
    await image.close()
    history.syncs.append(Sync(began, next(log.clock)))
    return Trace(files, log, history)


# --- power cuts -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Cut:
    """A moment of a trace: what is durable, and what may or may not be there."""

    at: float
    durable: list[Record]
    at_risk: list[Record]


def cuts(trace: Trace) -> Iterator[Cut]:
    """The moments that differ: as each sync begins, and the end."""
    times: list[float] = [record.began for record in trace.log.records if record.kind == "sync"]
    seen: set[tuple[int, int, float]] = set()
    for at in [*times, float("inf")]:
        durable, at_risk = trace.log.durable(at), trace.log.at_risk(at)
        covered = max((sync.began for sync in trace.history.syncs if sync.ended < at), default=-1)
        key = len(durable), len(at_risk), covered
        if key not in seen:
            seen.add(key)
            yield Cut(at, durable, at_risk)


def subsets(cut: Cut, rnd: random.Random, limit: int | None) -> Iterator[list[Record]]:
    """What may be there of `cut.at_risk`.

    Every subset if there are at most 12 changes, else 500 random ones; where there is a `limit`
    that is lower, so many random ones.
    """
    records = cut.at_risk
    number = len(records)
    if number <= _ALL_SUBSETS and (limit is None or 1 << number <= limit):
        for chosen in itertools.product((False, True), repeat=number):
            yield [record for record, there in zip(records, chosen, strict=True) if there]
        if number > 2:  # the torn ones of this moment
            for _ in range(1 << min(number, 5)):
                yield [_torn(r, rnd) for r in records if rnd.random() < 0.8]
        return
    yield []
    yield records
    for _ in range((_RANDOM_SUBSETS if limit is None else limit) - 2):
        style = rnd.randrange(5)
        if style == 0:  # all but a few
            missing = set(rnd.sample(range(number), rnd.randrange(1, min(4, number) + 1)))
            chosen_records = [r for i, r in enumerate(records) if i not in missing]
        elif style == 1:  # a few
            there = set(rnd.sample(range(number), rnd.randrange(1, min(4, number) + 1)))
            chosen_records = [r for i, r in enumerate(records) if i in there]
        elif style == 2:  # a beginning
            chosen_records = records[: rnd.randrange(number + 1)]
        else:
            part = rnd.random()
            chosen_records = [r for r in records if rnd.random() < part]
        yield [_torn(record, rnd) if rnd.random() < 0.1 else record for record in chosen_records]


def _torn(record: Record, rnd: random.Random) -> Record:
    """Some sectors of a record."""
    if record.length <= SECTOR or record.kind == "resize":
        return record
    pieces = []
    position, end = record.offset, record.offset + record.length
    part = rnd.random()
    while position < end:
        stop = min(end, (position // SECTOR + 1) * SECTOR)
        if rnd.random() < part:
            pieces.append((position, stop))
        position = stop
    return _Torn(record, pieces)


class _Torn(Record):
    """A record of which only `pieces` came to be."""

    def __init__(self, record: Record, pieces: list[tuple[int, int]]) -> None:
        super().__init__(record.storage, record.kind, record.began, record.offset, record.length)
        self.data = record.data
        self._pieces = pieces

    def apply(self, image: bytearray) -> None:
        for start, stop in self._pieces:
            data = self.data[start - self.offset : stop - self.offset]
            Record(self.storage, self.kind, 0, start, stop - start, data).apply(image)


def build(files: Files, records: list[Record]) -> tuple[bytearray, bytearray | None]:
    """The image and the data file after `records`, applied in the order in which they began."""
    image = bytearray(files.image)
    data = None if files.data is None else bytearray(files.data)
    apply_to(image, data, records)
    return image, data


def apply_to(image: bytearray, data: bytearray | None, records: list[Record]) -> None:
    """Apply `records`."""
    for record in records:
        if record.storage == "image":
            record.apply(image)
        else:
            assert data is not None
            record.apply(data)


# --- judging --------------------------------------------------------------------------------------


class Broken(AssertionError):
    """A crash image breaks the rule."""


def judge(
    files: Files,
    image: bytes | bytearray,
    data: bytearray | None,
    allowed: list[set[bytes]],
    allowed_raw: list[set[bytes]] | None = None,
) -> int:
    """Look at one crash image; return the number of leaked clusters.

    Args:
        files: What it was before.
        image: The image's file.
        data: The data file, if it has one.
        allowed: What the guest's sectors may hold.
        allowed_raw: What a raw data file may hold; None: the same.

    Raises:
        Broken: It is corrupt, or a sector holds what it must not hold.
    """
    verdict = check(image)
    if verdict.errors:
        raise Broken("; ".join(verdict.errors[:5]))
    _judge_disk(bytes(read_disk(image, data=data, backing=files.backing)), allowed)
    if data is not None and files.raw:
        if len(data) != len(allowed) * SECTOR:
            raise Broken(f"the raw data file has {len(data)} bytes")
        _judge_disk(bytes(data), allowed_raw or allowed)
    for number, before in enumerate(files.snapshots):
        if read_disk(image, backing=files.backing, snapshot=number) != before:
            raise Broken(f"snapshot {number} changed")
    return len(verdict.leaked)


def _judge_disk(disk: bytes, allowed: list[set[bytes]]) -> None:
    for sector, values in zip(range(len(disk) // SECTOR), allowed, strict=False):
        contents = disk[sector * SECTOR : (sector + 1) * SECTOR]
        if contents not in values:
            expected = ", ".join(sorted(describe(value) for value in values))
            raise Broken(f"guest sector {sector} holds {describe(contents)}, allowed: {expected}")


async def judge_by_imagofs(
    files: Files, image: bytearray, data: bytearray | None, disk: bytearray
) -> None:
    """The crash image opened, checked and read by imagofs itself."""
    storage = MemoryStorage(image)
    result = await check_image(storage)
    if result.corruptions or result.check_errors:
        raise Broken(f"imagofs check: {result.findings[:3]}")
    data_storage = None if data is None else MemoryStorage(data)
    access = await open_files(storage, data_storage, files, writable=False)
    contents = bytearray(access.size())
    await access.read(contents, 0)
    await access.close()
    if contents != disk:
        raise Broken("imagofs reads it differently")


def judge_by_qemu(image: bytearray, folder: Path, *, leaks: bool = True) -> None:
    """The crash image as `qemu-img check` sees it."""
    path = folder / "crash.qcow2"
    path.write_bytes(image)
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", str(path)], capture_output=True, text=True
    )
    if done.returncode not in ((0, 3) if leaks else (0,)):
        raise Broken(f"qemu-img check: {done.stdout[:500]}{done.stderr[:500]}")


# --- all together ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """Counts for the report."""

    images: int = 0
    cuts: int = 0
    changes: int = 0
    by_imagofs: int = 0
    by_qemu: int = 0
    second_lives: int = 0
    leaking: int = 0
    broken: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add another one's."""
        self.images += other.images
        self.cuts += other.cuts
        self.changes += other.changes
        self.by_imagofs += other.by_imagofs
        self.by_qemu += other.by_qemu
        self.second_lives += other.second_lives
        self.leaking += other.leaking
        self.broken += other.broken

    def __str__(self) -> str:
        return (
            f"{self.images} crash images of {self.cuts} moments in {self.changes} changes and "
            f"syncs, {self.leaking} with leaks, "
            f"{self.by_imagofs} also judged by imagofs, {self.by_qemu} by qemu-img check, "
            f"{self.second_lives} written to again, "
            f"{len(self.broken)} broken"
        )


def try_shape(shape: Shape, seed: int, folder: Path, images: int | None = None) -> Tally:
    """Run one workload and judge what power cuts leave of it.

    Args:
        shape: What to run.
        seed: Of the workload and of the choice of subsets.
        folder: For files.
        images: About how many to judge, spread over all moments; None: as many as there are to try.
    """
    files = make(shape, folder)
    with shape.slices():
        trace = run_repeatably(run_workload, shape, files, seed, seed=seed)
    rnd = random.Random(seed)
    tally = Tally(changes=len(trace.log.records))
    try:
        _judge_end(shape, trace, folder)
    except Broken as error:
        tally.broken.append(f"{shape.name}, seed {seed}, after it was closed: {error}")
        return tally
    moments = list(cuts(trace))
    for number, cut in enumerate(moments):
        share = None
        if images is not None:
            share = max(4, -(-(images - tally.images) // (len(moments) - number)))
        _try_cut(shape, seed, trace, cut, rnd, share, folder, tally)
        if tally.broken:
            break
    return tally


def _judge_end(shape: Shape, trace: Trace, folder: Path) -> None:
    """Without a power cut, nothing leaks and nothing is lost."""
    changes = [record for record in trace.log.records if record.kind != "sync"]
    image, data = build(trace.files, changes)
    if judge(trace.files, image, data, trace.history.allowed(powered=True)):
        raise Broken(f"clusters leaked: {check(image).leaked[:9]}")
    judge_by_qemu(image, folder, leaks=False)
    if shape.grows and Layout(image).table_offset == Layout(trace.files.image).table_offset:
        raise AssertionError("the refcount table did not grow: the workload is too small")


def _try_cut(
    shape: Shape,
    seed: int,
    trace: Trace,
    cut: Cut,
    rnd: random.Random,
    limit: int | None,
    folder: Path,
    tally: Tally,
) -> None:
    from tests.trust.second_life import live_again

    files = trace.files
    allowed = trace.history.allowed(cut.at)
    # Applied in the order in which they began: what is durable first, unless they are mixed.
    mixed = bool(cut.durable and cut.at_risk) and cut.durable[-1].began > cut.at_risk[0].began
    base, base_data = build(files, [] if mixed else cut.durable)
    tally.cuts += 1
    for chosen in subsets(cut, rnd, limit):
        image, data = base[:], None if base_data is None else base_data[:]
        if mixed:
            records = sorted([*cut.durable, *chosen], key=lambda record: record.began)
        else:
            records = chosen
        apply_to(image, data, records)
        tally.images += 1
        try:
            tally.leaking += bool(judge(files, image, data, allowed))
            if tally.images % 50 == 1:
                disk = read_disk(image, data=data, backing=files.backing)
                trio.run(judge_by_imagofs, files, image, data, disk)
                tally.by_imagofs += 1
            if tally.images % 500 == 1:
                judge_by_qemu(image, folder)
                tally.by_qemu += 1
            if tally.images % 50 == 26:
                live_again(shape, files, image, data, seed + tally.images, folder)
                tally.second_lives += 1
        except Broken as error:
            moment = "the end" if cut.at == float("inf") else f"time {cut.at}"
            tally.broken.append(
                f"{shape.name}, seed {seed}, {moment}, {len(chosen)} of {len(cut.at_risk)} "
                f"changes there: {error}"
            )
            return


def run(
    images: int, seed: int, folder: Path, *, full: bool, report: Callable[[str], object]
) -> Tally:
    """Judge at least `images` crash images, of all shapes, with workloads of growing seeds.

    Args:
        images: How many.
        seed: Of the first workloads.
        folder: For files.
        full: Try everything that a workload gives, instead of an equal share.
        report: Called with each line of the report.
    """
    total = Tally()
    while total.images < images and not total.broken:
        for shape in SHAPES:
            began = time.perf_counter()
            share = None if full else images // len(SHAPES) + 1
            tally = try_shape(shape, seed, folder, share)
            total.add(tally)
            seconds = time.perf_counter() - began
            report(f"{shape.name}, seed {seed}: {tally}, {seconds:.1f} s")
            for line in tally.broken:
                report(f"BROKEN: {line}")
        seed += 1
    return total


def _try_others(seed: int, folder: Path, report: Callable[[str], object]) -> Tally:
    """Creation and repair, with no more images than for each moment is worth its time."""
    from tests.trust.crash_others import try_creation, try_repair

    total = Tally()
    for what, tally in (
        ("creation", try_creation(seed, 600)),
        ("repair", try_repair(seed, folder, 6)),
    ):
        report(f"{what}, seed {seed}: {tally}")
        for line in tally.broken:
            report(f"BROKEN: {line}")
        total.add(tally)
    return total


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Try what power cuts leave of qcow2 images.")
    parser.add_argument("--images", type=int, default=100_000, help="at least so many")
    parser.add_argument("--seed", type=int, default=1, help="of the first workload")
    parser.add_argument("--shape", help="only this one, with as many images as it gives")
    arguments = parser.parse_args()

    def report(line: str) -> None:
        print(line, flush=True)

    with tempfile.TemporaryDirectory(prefix="imagofs-crash-") as name:
        if arguments.shape:
            [shape] = [shape for shape in SHAPES if shape.name == arguments.shape]
            total = try_shape(shape, arguments.seed, Path(name))
            for line in total.broken:
                print(f"BROKEN: {line}")
        else:
            total = run(arguments.images, arguments.seed, Path(name), full=True, report=report)
            total.add(_try_others(arguments.seed, Path(name), report))
    print(f"{total}; first seed {arguments.seed}")
    return 1 if total.broken else 0


if __name__ == "__main__":
    sys.exit(main())
