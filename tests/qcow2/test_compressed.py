"""Compressed clusters: real images, what is read and inflated how often, races, damage."""

from __future__ import annotations

import itertools
import random
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import pytest
import trio
import trio.testing
import zstandard

from imagofs import FormatAccess, Qcow2, open_image
from imagofs.errors import ClosedError, CorruptImageError, OutOfRangeError, StorageError
from imagofs.format.qcow2 import compressed as module
from imagofs.format.qcow2.compressed import CompressedClusters, NotCompressed
from imagofs.format.qcow2.entries import COMPRESSED, OFFSET_MASK, from_big_endian
from imagofs.format.qcow2.header import parse_header
from imagofs.inflating import InflatedCache, inflate_deflate
from imagofs.storage.base import Storage
from imagofs.storage.memory import MemoryStorage
from tests import qemu
from tests.support.storages import FaultyStorage, SlowStorage, WrappedStorage

KIB = 1024
MIB = 1 << 20


@cache
def prose(length: int, seed: int = 1) -> bytes:
    words = random.Random(seed)
    vocabulary = [bytes(words.choices(b"etaoinshrdlu", k=words.randint(2, 9))) for _ in range(500)]
    return b" ".join(words.choices(vocabulary, k=length // 3 + 1))[:length]


@cache
def deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(1, zlib.DEFLATED, -12, 9)
    return stream.compress(data) + stream.flush()


def descriptor(host_offset: int, length: int, cluster_bits: int) -> int:
    """The L2 entry of a compressed cluster whose data is `length` bytes at `host_offset`."""
    sectors = (host_offset % 512 + length + 511) // 512 - 1
    return COMPRESSED | sectors << 62 - (cluster_bits - 8) | host_offset


class CountingStorage(WrappedStorage):
    """Notes the reads, of both ways; with `fast`, the fast path is there."""

    def __init__(self, inner: Storage, *, fast: bool = True) -> None:
        super().__init__(inner)
        self.fast = fast
        self.reads: list[tuple[int, int]] = []

    def readv_nowait(self, views: Sequence[memoryview], offset: int) -> int:
        if not self.fast:
            return 0
        self.reads.append((offset, sum(view.nbytes for view in views)))
        return self.inner.readv_nowait(views, offset)

    async def pure_readv(self, views: Sequence[memoryview], offset: int) -> None:
        self.reads.append((offset, sum(view.nbytes for view in views)))
        await super().pure_readv(views, offset)


class ManualThreads:
    """In the place of `InflateThreads`: work is done when the test says so."""

    limit = 2

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], None], Callable[[], None], bool]] = []

    def submit(
        self, work: Callable[[], None], done: Callable[[], None], awaited: Callable[[], bool]
    ) -> None:
        self.waiting.append((work, done, awaited()))

    def settle(self) -> None:
        """All that was done was told at once."""

    def run(self, count: int = 1000) -> None:
        """Do the first `count` pieces of work."""
        now, self.waiting = self.waiting[:count], self.waiting[count:]
        for work, done, _ in now:
            work()
            done()


class Disk:
    """Compressed clusters in a made-up file, and what reads them.

    Args:
        clusters: What each guest cluster holds.
        pack: Where each cluster's data goes: its number and where the one before ended.
        limit: Bytes of the cache.
        wrap: Puts a storage around the file's.
    """

    def __init__(
        self,
        clusters: Sequence[bytes],
        *,
        pack: Callable[[int, int], int] = lambda number, end: end,
        limit: int = 64 * MIB,
        wrap: Callable[[Storage], Storage] = CountingStorage,
        compress: Callable[[bytes], bytes] = deflate,
        compression_type: int = 0,
    ) -> None:
        self.contents = list(clusters)
        self.bits = len(clusters[0]).bit_length() - 1
        self.size = 1 << self.bits
        file = bytearray(512)
        end = 512
        self.entries: dict[int, int] = {}
        for number, data in enumerate(clusters):
            stream = compress(data)
            start = pack(number, end)
            end = start + len(stream)
            file.extend(bytes(max(0, end - len(file))))
            file[start:end] = stream
            self.entries[number] = descriptor(start, len(stream), self.bits)
        self.file = MemoryStorage(file)
        self.storage = wrap(self.file)
        self.cache = InflatedCache(limit)
        self.io_begun = self.io_ended = 0
        self.loads: list[int] = []
        #: Entries that are not in memory, until they are loaded.
        self.on_disk: set[int] = set()
        self.inflated: list[int] = []
        self.clusters = CompressedClusters(
            self.storage,
            self.bits,
            compression_type,
            self.cache,
            "disk.qcow2",
            descriptors_nowait=self._descriptors_nowait,
            descriptor=self._descriptor,
            begin_io=self._begin_io,
            end_io=self._end_io,
        )

    def _descriptors_nowait(self, clusters: range) -> list[int]:
        return [0 if c in self.on_disk else self.entries.get(c, 0) for c in clusters]

    async def _descriptor(self, cluster: int) -> int:
        self.loads.append(cluster)
        await trio.lowlevel.checkpoint()
        self.on_disk.discard(cluster)
        return self.entries.get(cluster, 0)

    def _begin_io(self) -> int:
        self.io_begun += 1
        return self.io_begun

    def _end_io(self, token: int) -> None:
        self.io_ended += 1

    async def read(self, guest_offset: int, length: int, *cuts: int) -> bytes:
        """Read with `readv` into buffers whose lengths are `cuts` and what is left."""
        buffers = [bytearray(cut) for cut in (*cuts, length - sum(cuts))]
        await self.clusters.readv([memoryview(buffer) for buffer in buffers], guest_offset)
        return b"".join(buffers)

    def read_nowait(self, guest_offset: int, length: int) -> bytes | None:
        buffer = bytearray(length)
        done = self.clusters.read_nowait(memoryview(buffer), guest_offset)
        return bytes(buffer) if done else None

    def expected(self, guest_offset: int, length: int) -> bytes:
        first = guest_offset // self.size
        last = (guest_offset + length - 1) // self.size
        data = b"".join(self.contents[first : last + 1])
        return data[guest_offset - first * self.size :][:length]

    def write(self, cluster: int, data: bytes) -> None:
        """Put other contents at the file's end, as if the guest had written them."""
        stream = deflate(data)
        start = self.file.size()
        assert self.file.writev_nowait([memoryview(stream)], start) == len(stream)
        self.contents[cluster] = data
        self.entries[cluster] = descriptor(start, len(stream), self.bits)
        self.clusters.forget(cluster, 1)

    def manual(self) -> ManualThreads:
        threads = ManualThreads()
        self.cache.threads = threads  # type: ignore[assignment]
        return threads

    async def settle(self) -> None:
        """Wait until nothing is being inflated any more."""
        with trio.fail_after(10):
            while self.clusters._jobs:
                await next(iter(self.clusters._jobs)).done.wait()

    def assert_idle(self) -> None:
        assert not self.clusters._jobs
        assert not self.clusters._inflight
        assert self.io_begun == self.io_ended


def disk(count: int = 40, size: int = 64 * KIB, **options: object) -> Disk:
    return Disk([prose(size, seed) for seed in range(count)], **options)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def in_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is inflated in threads, but for the tests that ask for `inline`."""
    if "inline" not in request.fixturenames:
        monkeypatch.setattr(module, "_INLINE_BYTES", 0)


@pytest.fixture
def inline() -> int:
    """The largest cluster that is inflated in line, in bytes."""
    return module._INLINE_BYTES


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Lengths of what was inflated, one for each cluster."""
    calls: list[int] = []

    def counting(data: memoryview, length: int, whole_length: int = 0) -> bytes:
        calls.append(length)
        return inflate_deflate(data, length, whole_length)

    monkeypatch.setattr(module, "inflate_deflate", counting)
    yield calls


# --- real images ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk of prose, zeroes and noise; its size is a multiple of nothing but sectors."""
    path = tmp_path_factory.mktemp("plain") / "plain.raw"
    noise = random.Random(9).randbytes(700 * KIB)
    path.write_bytes(prose(3 * MIB) + bytes(300 * KIB) + noise + prose(2 * MIB + 1536, 2))
    return path


def convert(source: Path, target: Path, compression: str, cluster_size: int) -> Path:
    options = f"compression_type={compression},cluster_size={cluster_size}"
    qemu.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, source, target)
    return target


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [4 * KIB, 64 * KIB, 2 * MIB])
async def test_images_that_qemu_made(
    tmp_path: Path, plain: Path, compression: str, cluster_size: int
) -> None:
    image = convert(plain, tmp_path / "image.qcow2", compression, cluster_size)
    expected = plain.read_bytes()
    async with await open_image(image) as access:
        whole = bytearray(len(expected))
        await access.read(whole, 0)
        assert whole == expected
    order = random.Random(cluster_size)
    async with await open_image(image, inflated_bytes=MIB) as access:
        lent = 0
        for position in range(0, len(expected) - 100_000, 50_000):
            await access.read(bytearray(1), position)  # loads the tables
            there = access.lend_nowait(position, 100_000)
            parts = await access.lend(position, 100_000)
            for lending in (there, parts, access.lend_nowait(position, 100_000)):
                if lending:
                    lent += 1
                    assert b"".join(lending) == expected[position : position + 100_000]
        assert bool(lent) == (cluster_size >= 4096), "small clusters would be too many"
        with pytest.raises(OutOfRangeError):
            await access.lend(len(expected) - 1, 2)
        position = 0
        while position < len(expected):  # sequential, of any length
            length = min(order.choice([512, 4096, 70_000, 3 * MIB]), len(expected) - position)
            part = bytearray(length)
            if not access.read_nowait(memoryview(part), position):
                await access.read(part, position)
            assert part == expected[position : position + length]
            position += length
        for _ in range(200):
            position = order.randrange(len(expected))
            length = min(order.choice([1, 512, 5000, 200_000]), len(expected) - position)
            part = bytearray(length)
            if order.random() < 0.5 or not access.read_nowait(memoryview(part), position):
                await access.read(part, position)
            assert part == expected[position : position + length]


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
async def test_descriptors_parsed_by_hand(tmp_path: Path, plain: Path, compression: str) -> None:
    image = convert(plain, tmp_path / "image.qcow2", compression, 64 * KIB)
    data = image.read_bytes()
    expected = plain.read_bytes()
    header = parse_header(data[: 64 * KIB])
    entries: dict[int, int] = {}
    l1 = from_big_endian(data[header.l1_offset :][: 8 * header.l1_entries])
    for l1_index, l1_entry in enumerate(l1):
        table = l1_entry & OFFSET_MASK
        if table:
            for index, entry in enumerate(from_big_endian(data[table : table + 64 * KIB])):
                if entry & COMPRESSED:
                    entries[l1_index * 8192 + index] = entry
    assert len(entries) > 70

    async def load(cluster: int) -> int:
        raise AssertionError("everything is in memory")

    clusters = CompressedClusters(
        MemoryStorage(data),
        header.cluster_bits,
        header.compression_type,
        InflatedCache(),
        "image.qcow2",
        descriptors_nowait=lambda clusters: [entries.get(cluster, 0) for cluster in clusters],
        descriptor=load,
        begin_io=lambda: 0,
        end_io=lambda token: None,
    )
    for cluster in entries:
        buffer = bytearray(64 * KIB)
        await clusters.readv([memoryview(buffer)], cluster * 64 * KIB)
        part = expected[cluster * 64 * KIB :][: 64 * KIB]
        assert buffer[: len(part)] == part
        assert not any(buffer[len(part) :]), "qemu fills the last cluster with zeroes"


async def test_many_readers_of_one_image(tmp_path: Path, plain: Path) -> None:
    image = convert(plain, tmp_path / "image.qcow2", "zlib", 64 * KIB)
    expected = plain.read_bytes()
    async with await open_image(image, inflated_bytes=2 * MIB) as access:

        async def reader(seed: int) -> None:
            order = random.Random(seed)
            position = order.randrange(len(expected))
            for _ in range(40):
                if order.random() < 0.3:
                    position = order.randrange(len(expected))
                length = min(order.choice([4096, 100_000]), len(expected) - position)
                part = bytearray(length)
                await access.read(part, position)
                assert part == expected[position : position + length]
                position = (position + length) % len(expected)

        async with trio.open_nursery() as nursery:
            for seed in range(24):
                nursery.start_soon(reader, seed)


# --- reading --------------------------------------------------------------------------------------


async def test_nowait_answers_once_a_cluster_is_inflated() -> None:
    with_it = disk()
    assert with_it.read_nowait(100, 4096) is None
    assert await with_it.read(0, 512) == with_it.contents[0][:512]
    for start, length in ((0, 4096), (60 * KIB, 4096), (64 * KIB - 1, 1), (0, 64 * KIB)):
        assert with_it.read_nowait(start, length) == with_it.expected(start, length)
    assert with_it.read_nowait(64 * KIB - 1, 2) is None
    await with_it.read(64 * KIB, 1)
    assert with_it.read_nowait(64 * KIB - 1, 2) == with_it.expected(64 * KIB - 1, 2)
    assert with_it.read_nowait(0, 128 * KIB) == with_it.expected(0, 128 * KIB)
    await with_it.settle()
    with_it.assert_idle()


@pytest.mark.parametrize("size", [512, 64 * KIB])
async def test_any_range_into_any_buffers(size: int) -> None:
    with_it = disk(40, size)
    order = random.Random(4)
    total = 40 * size
    for _ in range(150):
        start = order.randrange(total)
        length = order.randint(1, total - start)
        cuts: list[int] = []
        while sum(cuts) < length and order.random() < 0.8:
            cuts.append(order.randint(1, length - sum(cuts)))
        if sum(cuts) == length:
            cuts.pop()
        assert await with_it.read(start, length, *cuts) == with_it.expected(start, length)
    await with_it.settle()
    with_it.assert_idle()


async def test_zstd_clusters() -> None:
    compress = zstandard.ZstdCompressor().compress
    with_it = disk(compress=compress, compression_type=1)
    total = 40 * 64 * KIB
    assert await with_it.read(0, total) == with_it.expected(0, total)


async def test_one_broken_zstd_cluster_among_many() -> None:
    compress = zstandard.ZstdCompressor().compress
    with_it = disk(compress=compress, compression_type=1)
    with_it.file.writev_nowait([memoryview(b"\xff" * 2000)], with_it.entries[7] & 0xFFFFFF)
    with pytest.raises(CorruptImageError):
        await with_it.read(0, 40 * 64 * KIB)
    for cluster in (*range(7), *range(8, 40)):
        start = cluster * 64 * KIB
        assert await with_it.read(start, 64 * KIB) == with_it.contents[cluster]
    with pytest.raises(CorruptImageError):
        await with_it.read(7 * 64 * KIB, 1)
    await with_it.settle()
    with_it.assert_idle()


@pytest.mark.parametrize("limit", [0, 100 * KIB, 10 * MIB])
async def test_small_caches(limit: int) -> None:
    with_it = disk(limit=limit)
    total = 40 * 64 * KIB
    assert await with_it.read(0, total) == with_it.expected(0, total)
    for position in range(0, total, 4096):
        data = with_it.read_nowait(position, 4096)
        data = data or await with_it.read(position, 4096)
        assert data == with_it.expected(position, 4096)
        assert with_it.cache.bytes_held() <= max(limit, 4 * 65 * KIB)
    for position in range(0, total - 128 * KIB, 60 * KIB):
        data = with_it.read_nowait(position, 128 * KIB)
        data = data or await with_it.read(position, 128 * KIB)
        assert data == with_it.expected(position, 128 * KIB)


# --- storage reads --------------------------------------------------------------------------------


async def test_dense_neighbours_are_read_together() -> None:
    with_it = disk()
    storage = with_it.storage
    assert isinstance(storage, CountingStorage)
    await with_it.read(0, 8 * 64 * KIB)
    assert len(storage.reads) == 1
    offset, length = storage.reads[0]
    assert offset == 512
    assert length < 8 * 64 * KIB


@pytest.mark.parametrize(
    ("pack", "reads"),
    [
        (lambda number, end: (end + 511) // 512 * 512, 1),  # a sector each
        (lambda number, end: end + 4000, 1),  # small gaps
        (lambda number, end: end + 100_000, 8),  # large ones
        (lambda number, end: 512 + (39 - number) * 70_000, 8),  # backwards
        (lambda number, end: 512 + (number ^ 1) * 70_000, 8),  # in pairs
    ],
)
async def test_other_layouts(pack: Callable[[int, int], int], reads: int) -> None:
    with_it = disk(pack=pack)
    storage = with_it.storage
    assert isinstance(storage, CountingStorage)
    assert await with_it.read(0, 8 * 64 * KIB) == with_it.expected(0, 8 * 64 * KIB)
    assert len(storage.reads) == reads


async def test_clusters_that_share_their_data() -> None:
    with_it = disk()
    for cluster in range(1, 40, 2):
        with_it.entries[cluster] = with_it.entries[5]
        with_it.contents[cluster] = with_it.contents[5]
    total = 40 * 64 * KIB
    assert await with_it.read(0, total) == with_it.expected(0, total)


async def test_a_storage_that_has_nothing_at_hand() -> None:
    with_it = disk(wrap=partial(CountingStorage, fast=False))
    total = 40 * 64 * KIB
    for position in range(0, total, 64 * KIB):
        assert await with_it.read(position, 64 * KIB) == with_it.expected(position, 64 * KIB)
    await with_it.settle()
    with_it.assert_idle()
    assert with_it.io_begun > 0


async def test_descriptors_that_must_be_loaded() -> None:
    with_it = disk()
    with_it.on_disk = set(range(40))
    total = 40 * 64 * KIB
    assert await with_it.read(0, total) == with_it.expected(0, total)
    assert with_it.loads == list(range(40))


async def test_a_cluster_that_is_not_compressed() -> None:
    with_it = disk()
    del with_it.entries[3]
    with pytest.raises(NotCompressed) as caught:
        await with_it.read(2 * 64 * KIB, 3 * 64 * KIB)
    assert caught.value.guest_offset == 3 * 64 * KIB
    await with_it.settle()
    with_it.assert_idle()


# --- how often clusters are inflated --------------------------------------------------------------


async def test_readers_of_one_cluster_inflate_it_once(counted: list[int]) -> None:
    with_it = disk()
    threads = with_it.manual()
    results: list[bytes] = []

    async def reader() -> None:
        results.append(await with_it.read(5 * 64 * KIB + 7, 100))

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        threads.run()
    assert results == [with_it.expected(5 * 64 * KIB + 7, 100)] * 10
    assert len(counted) == 1


async def test_sequential_reads_are_inflated_ahead_once(counted: list[int]) -> None:
    with_it = disk(200, limit=64 * MIB)
    waited = 0
    for position in range(0, 200 * 64 * KIB, 4096):
        if with_it.read_nowait(position, 4096) is None:
            waited += 1
            assert await with_it.read(position, 4096) == with_it.expected(position, 4096)
            await with_it.settle()
    assert waited < 40, "a window of 32 clusters is soon ahead of 200"
    assert len(counted) == 200
    with_it.assert_idle()


async def test_nothing_is_inflated_ahead_that_is_there_already(counted: list[int]) -> None:
    with_it = disk(60)
    order = random.Random(3)
    for cluster in order.sample(range(60), 30):
        await with_it.read(cluster * 64 * KIB, 10)
    await with_it.settle()
    for cluster in range(60):
        await with_it.read(cluster * 64 * KIB, 64 * KIB)
    await with_it.settle()
    assert len(counted) == 60


async def test_what_is_ahead_is_bounded() -> None:
    with_it = disk(200, limit=64 * MIB)
    for position in range(0, 100 * 64 * KIB, 64 * KIB):
        await with_it.read(position, 4096)
        await with_it.settle()
        first = with_it.clusters._namespace + position // (64 * KIB)
        assert sum(key > first for key in with_it.cache.ahead) * 64 * KIB <= 8 * MIB
        assert with_it.cache.bytes_held() <= 64 * MIB // 4 + 64 * KIB * 3
    assert with_it.cache.ahead


async def test_random_reads_inflate_what_they_need(counted: list[int]) -> None:
    with_it = disk(40)
    for number in (3, 9, 20, 5, 37, 12, 30, 1):
        await with_it.read(number * 64 * KIB + 100, 4096)
    await with_it.settle()
    assert len(counted) == 8


async def test_what_is_inflated_can_be_read_before_its_job_ends() -> None:
    with_it = disk(200)
    threads = with_it.manual()
    seen: list[bytes | None] = []

    def look_between() -> None:
        # In the place of the thread: the first two clusters of a job are there, the others not.
        work, done, _ = threads.waiting.pop(0)
        job = next(iter(with_it.clusters._jobs))
        job.results[0] = with_it.contents[0]
        seen.append(with_it.read_nowait(512, 100))
        seen.append(with_it.read_nowait(64 * KIB, 100))
        work()
        done()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(with_it.read, 0, 4 * 64 * KIB)
        await trio.testing.wait_all_tasks_blocked()
        look_between()
    assert seen == [with_it.expected(512, 100), None]


async def test_a_small_cluster_is_inflated_in_line(inline: int, counted: list[int]) -> None:
    with_it = disk(size=inline)
    for position in (0, 5 * 64 * KIB + 100, 9 * 64 * KIB - 512, 5 * 64 * KIB):
        assert with_it.read_nowait(position, 512) == with_it.expected(position, 512)
    # Of the first two no more than what is read is inflated; the third is read at its end, and the
    # last was read lately.
    assert counted == [512, 612, 64 * KIB, 64 * KIB]
    for position in (5 * 64 * KIB + 3000, 9 * 64 * KIB - 1024):
        assert with_it.read_nowait(position, 512) == with_it.expected(position, 512)
    assert len(counted) == 4, "they are kept"
    with_it.assert_idle()
    assert with_it.read_nowait(64 * KIB - 1, 2) is None, "more than one is a thread's work"
    await with_it.read(30 * 64 * KIB, 1)
    with_it.assert_idle()


async def test_how_many_beginnings_are_remembered(inline: int, counted: list[int]) -> None:
    with_it = disk(40, inline)
    with_it.clusters._most_begun = 10
    for cluster in [*range(0, 40, 2), 38, 0]:
        assert with_it.read_nowait(cluster * inline, 512) is not None
    assert counted == [512] * 20 + [inline, 512]
    assert len(with_it.clusters._begun) == 10


async def test_what_is_not_inflated_in_line(inline: int, counted: list[int]) -> None:
    assert disk(3, 2 * inline).read_nowait(0, 512) is None, "a large one"
    assert disk(wrap=partial(CountingStorage, fast=False)).read_nowait(0, 512) is None
    with_it = disk()
    with_it.on_disk.add(0)
    assert with_it.read_nowait(0, 512) is None
    del with_it.entries[1]
    assert with_it.read_nowait(64 * KIB, 512) is None
    with_it.entries[2] = descriptor(1 << 40, 512, with_it.bits)
    assert with_it.read_nowait(2 * 64 * KIB, 512) is None
    assert not counted
    with_it.file.writev_nowait([memoryview(b"\xff" * 2000)], with_it.entries[3] & 0xFFFFFF)
    assert with_it.read_nowait(3 * 64 * KIB, 512) is None
    with pytest.raises(CorruptImageError):
        await with_it.read(3 * 64 * KIB, 512)
    threads = with_it.manual()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(with_it.read, 4 * 64 * KIB, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert with_it.read_nowait(4 * 64 * KIB, 512) is None, "it is being inflated"
        threads.run()
    with_it.assert_idle()


async def test_sequential_small_reads_are_inflated_ahead(inline: int) -> None:
    with_it = disk(100, inline)
    for position in range(0, 100 * 64 * KIB, 4096):
        data = with_it.read_nowait(position, 4096)
        if data is None:
            data = await with_it.read(position, 4096)
        assert data == with_it.expected(position, 4096)
        await trio.lowlevel.checkpoint()
    assert with_it.clusters._sequence._streams[0].end > 100
    await with_it.settle()
    with_it.assert_idle()


# --- cancellation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
async def test_a_cancelled_reader_strands_nobody(fast: bool, counted: list[int]) -> None:
    with_it = disk(wrap=partial(CountingStorage, fast=fast))
    threads = with_it.manual()
    scope = trio.CancelScope()
    results: list[bytes] = []

    async def first() -> None:
        with scope:
            await with_it.read(0, 4096)

    async def second() -> None:
        results.append(await with_it.read(100, 4096))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(second)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        threads.run()
    assert scope.cancelled_caught
    assert results == [with_it.expected(100, 4096)]
    assert len(counted) == 1
    with_it.assert_idle()


async def test_cancelled_at_every_await() -> None:
    for nth in range(1, 30):
        slow = disk(12, wrap=SlowStorage)
        slow.on_disk = {0, 5}
        storage = slow.storage
        assert isinstance(storage, SlowStorage)
        with trio.CancelScope() as scope:
            storage.on_pause = lambda number, nth=nth, scope=scope: (
                scope.cancel() if number == nth else None
            )
            await slow.read(1000, 11 * 64 * KIB)
        storage.on_pause = None
        await slow.settle()
        slow.assert_idle()
        assert await slow.read(0, 12 * 64 * KIB) == slow.expected(0, 12 * 64 * KIB)
        await slow.settle()
        slow.assert_idle()
        if not scope.cancelled_caught:
            break
    else:
        raise AssertionError("it was cancelled each time")
    assert nth > 2


async def test_closing_ends_what_is_being_read() -> None:
    with_it = disk(wrap=partial(SlowStorage, delay=3600))
    async with trio.open_nursery() as nursery:
        failed = trio.Event()

        async def reader() -> None:
            with pytest.raises(ClosedError):
                await with_it.read(0, 64 * KIB)
            failed.set()

        nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(5):
            await with_it.clusters.close()
            await failed.wait()
    with_it.assert_idle()


def test_the_loop_may_end_while_something_is_being_read() -> None:
    with_it: list[Disk] = []

    async def main() -> None:
        with_it.append(disk(wrap=partial(SlowStorage, delay=3600)))
        with trio.move_on_after(0.01):
            await with_it[0].read(0, 64 * KIB)

    trio.run(main)
    with_it[0].assert_idle()


# --- mappings that change -------------------------------------------------------------------------


async def test_what_is_forgotten_while_it_is_inflated_does_not_enter_the_cache() -> None:
    with_it = disk()
    threads = with_it.manual()
    old, new = with_it.contents[1], prose(64 * KIB, 77)
    results: dict[str, bytes] = {}

    async def reader(name: str) -> None:
        results[name] = await with_it.read(64 * KIB, 64 * KIB)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader, "before")
        await trio.testing.wait_all_tasks_blocked()
        with_it.write(1, new)
        nursery.start_soon(reader, "after")
        await trio.testing.wait_all_tasks_blocked()
        threads.run(1)
        assert with_it.read_nowait(64 * KIB, 100) is None, "that would be what was there before"
        threads.run()
    assert results == {"before": old, "after": new}
    assert with_it.read_nowait(64 * KIB, 64 * KIB) == new
    with_it.assert_idle()


async def test_the_same_the_other_way_round() -> None:
    # The new one is inflated first; the old job, which ends later, must not displace it.
    with_it = disk()
    threads = with_it.manual()
    new = prose(64 * KIB, 78)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(with_it.read, 64 * KIB, 10)
        await trio.testing.wait_all_tasks_blocked()
        with_it.write(1, new)
        nursery.start_soon(with_it.read, 64 * KIB, 10)
        await trio.testing.wait_all_tasks_blocked()
        threads.waiting.reverse()
        threads.run()
    assert with_it.read_nowait(64 * KIB, 64 * KIB) == new
    with_it.assert_idle()


async def test_forgetting_what_is_cached_and_ahead() -> None:
    with_it = disk(200)
    for cluster in range(6):
        await with_it.read(cluster * 64 * KIB, 64 * KIB)
    await with_it.settle()
    assert with_it.cache.ahead
    for cluster in (3, max(with_it.cache.ahead) - with_it.clusters._namespace):
        new = prose(64 * KIB, 100 + cluster)
        with_it.write(cluster, new)
        assert with_it.read_nowait(cluster * 64 * KIB, 512) is None
        assert await with_it.read(cluster * 64 * KIB, 64 * KIB) == new
    with_it.clusters.forget(0, 1 << 40)
    assert with_it.cache.bytes_held() == 0
    await with_it.settle()


async def test_random_writes_and_reads_at_the_same_time() -> None:
    with_it = disk(30, limit=MIB)
    order = random.Random(11)
    versions = {cluster: [data] for cluster, data in enumerate(with_it.contents)}

    async def reader() -> None:
        for _ in range(60):
            first = order.randrange(28)
            since = [len(versions[first + step]) - 1 for step in range(3)]
            data = await with_it.read(first * 64 * KIB, 3 * 64 * KIB)
            for step in range(3):
                part = data[step * 64 * KIB : (step + 1) * 64 * KIB]
                assert part in versions[first + step][since[step] :], "older than the read"

    async def writer() -> None:
        for number in range(60):
            cluster = order.randrange(30)
            data = prose(64 * KIB, 1000 + number)
            versions[cluster].append(data)
            with_it.write(cluster, data)
            await trio.sleep(0.001)

    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(reader)
        nursery.start_soon(writer)
    await with_it.settle()
    with_it.assert_idle()


async def test_a_guest_that_writes_while_it_reads(
    tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Through the whole driver: a compressed cluster becomes an ordinary one during the read, which
    # is long enough to look its parts up one after the other.
    overtaken: list[int] = []

    class Noted(NotCompressed):
        def __init__(self, guest_offset: int) -> None:
            super().__init__(guest_offset)
            overtaken.append(guest_offset)

    monkeypatch.setattr(module, "NotCompressed", Noted)
    image = convert(plain, tmp_path / "image.qcow2", "zlib", 64 * KIB)
    contents = image.read_bytes()
    before = plain.read_bytes()[: 3 * MIB]
    after = before[:2_500_000] + b"#" * 500 + before[2_500_500:]
    for nth in itertools.count(1):
        storage = SlowStorage(MemoryStorage(contents))
        access = FormatAccess(await Qcow2.open(storage, writable=True))
        reached = trio.Event()
        in_time = False
        buffer = bytearray(3 * MIB)

        def on_pause(number: int, at: int = storage.pauses + nth) -> None:
            if number == at:
                reached.set()  # noqa: B023  # it is called before the loop goes on

        async def read() -> None:
            nonlocal in_time
            await access.read(buffer, 0)  # noqa: B023  # as above
            in_time = reached.is_set()  # noqa: B023
            reached.set()  # noqa: B023

        storage.on_pause = on_pause
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await reached.wait()
            storage.on_pause = None
            await access.write(b"#" * 500, 2_500_000)
        assert buffer in (before, after)
        await access.read(buffer, 0)
        assert buffer == after
        await access.close()
        if not in_time:
            break
    assert overtaken


# --- damage ---------------------------------------------------------------------------------------


async def test_a_broken_stream_says_where() -> None:
    with_it = disk()
    with_it.file.writev_nowait([memoryview(b"\xff" * 2000)], with_it.entries[2] & 0xFFFFFF)
    with pytest.raises(CorruptImageError) as caught:
        await with_it.read(0, 5 * 64 * KIB)
    host_offset = with_it.entries[2] & 0xFFFFFF
    assert str(caught.value).startswith(
        "disk.qcow2: the compressed cluster of guest offset 0x20000"
    )
    assert f"{host_offset:#x}" in str(caught.value)
    for cluster in (0, 1, 3, 4):  # the others of the same job are not affected
        got = await with_it.read(cluster * 64 * KIB, 64 * KIB)
        assert got == with_it.contents[cluster]
    with pytest.raises(CorruptImageError):
        await with_it.read(2 * 64 * KIB, 1)
    assert with_it.read_nowait(2 * 64 * KIB, 1) is None
    await with_it.settle()
    with_it.assert_idle()


async def test_a_stream_that_is_shorter_than_a_cluster() -> None:
    clusters = [prose(64 * KIB, seed) for seed in range(3)]
    with_it = Disk(clusters, compress=lambda data: deflate(data[:-1]))
    with pytest.raises(CorruptImageError, match="ends after 65535 of 65536 bytes"):
        await with_it.read(0, 10)


@pytest.mark.parametrize("beyond", [0, 1, 511, 1 << 40])
async def test_data_that_begins_past_the_end_of_the_file(beyond: int) -> None:
    with_it = disk()
    end = with_it.file.size()
    with_it.entries[1] = descriptor(end + beyond, 512, with_it.bits)
    with pytest.raises(CorruptImageError, match="past the end of the file") as caught:
        await with_it.read(64 * KIB, 512)
    assert f"{end + beyond:#x}" in str(caught.value)
    assert "0x10000" in str(caught.value)
    assert await with_it.read(0, 512) == with_it.expected(0, 512)
    await with_it.settle()
    with_it.assert_idle()


async def test_data_whose_last_sector_runs_past_the_end() -> None:
    with_it = disk(3)
    assert with_it.file.size() % 512
    assert await with_it.read(2 * 64 * KIB, 64 * KIB) == with_it.contents[2]
    storage = with_it.storage
    assert isinstance(storage, CountingStorage)
    assert max(sum(read) for read in storage.reads) == with_it.file.size()
    # A descriptor that claims many sectors more, as qemu allows.
    with_it.entries[2] |= 100 << 62 - (with_it.bits - 8)
    with_it.clusters.forget_all()
    assert await with_it.read(2 * 64 * KIB, 64 * KIB) == with_it.contents[2]


async def test_damage_ahead_is_told_to_who_reads_it() -> None:
    with_it = disk(40)
    with_it.file.writev_nowait([memoryview(b"\xff" * 2000)], with_it.entries[7] & 0xFFFFFF)
    with_it.entries[9] = descriptor(1 << 40, 512, with_it.bits)
    for cluster in range(40):
        if cluster in (7, 9):
            with pytest.raises(CorruptImageError):
                await with_it.read(cluster * 64 * KIB, 10)
        else:
            got = await with_it.read(cluster * 64 * KIB, 10)
            assert got == with_it.contents[cluster][:10]
    await with_it.settle()
    with_it.assert_idle()


async def test_a_storage_that_fails() -> None:
    with_it = disk(wrap=FaultyStorage)
    storage = with_it.storage
    assert isinstance(storage, FaultyStorage)
    storage.fail_next("read")
    with pytest.raises(StorageError):
        await with_it.read(0, 64 * KIB)
    assert await with_it.read(0, 64 * KIB) == with_it.contents[0]
    await with_it.settle()
    with_it.assert_idle()


async def test_a_storage_that_fails_in_the_thread_that_reads_ahead() -> None:
    class Refusing(CountingStorage):
        def readv_nowait(self, views: Sequence[memoryview], offset: int) -> int:
            if threading.current_thread() is not threading.main_thread():
                raise StorageError("refused")
            return super().readv_nowait(views, offset)

    with_it = disk(wrap=Refusing)
    for position in range(0, 40 * 64 * KIB, 64 * KIB):
        assert await with_it.read(position, 64 * KIB) == with_it.expected(position, 64 * KIB)
        await with_it.settle()
    assert not with_it.cache.ahead
    with_it.assert_idle()


async def test_who_joined_a_job_that_failed_tries_again() -> None:
    with_it = disk(wrap=lambda inner: SlowStorage(FaultyStorage(inner)))
    slow = with_it.storage
    assert isinstance(slow, SlowStorage)
    faulty = slow.inner
    assert isinstance(faulty, FaultyStorage)
    faulty.fail_next("read")
    outcomes: list[str] = []

    async def reader() -> None:
        try:
            assert await with_it.read(0, 10) == with_it.expected(0, 10)
            outcomes.append("read")
        except StorageError:
            outcomes.append("failed")

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(reader)
    assert sorted(outcomes) == ["failed", "read", "read", "read"]
    with_it.assert_idle()


async def test_hostile_descriptors_all_over_the_file(counted: list[int]) -> None:
    order = random.Random(13)
    with_it = disk(64, 4096)
    limit = with_it.file.size() * 2
    for cluster in range(64):
        with_it.entries[cluster] = (
            COMPRESSED | order.getrandbits(62) & ~((1 << 62 - 4) - 1) | order.randrange(limit)
        )
    good = 0
    for cluster in range(64):
        try:
            await with_it.read(cluster * 4096, 4096)
            good += 1
        except CorruptImageError:
            pass
    assert good < 64
    await with_it.settle()
    with_it.assert_idle()


async def test_a_bomb_in_an_image(tmp_path: Path, plain: Path) -> None:
    image = convert(plain, tmp_path / "image.qcow2", "zlib", 64 * KIB)
    data = bytearray(image.read_bytes())
    header = parse_header(bytes(data[: 64 * KIB]))
    table = struct.unpack_from(">Q", data, header.l1_offset)[0] & OFFSET_MASK
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = (stream.compress(bytes(64 * MIB)) + stream.flush())[: 120 * KIB]
    start = len(data)
    struct.pack_into(">Q", data, table, descriptor(start, len(bomb), 16))
    image.write_bytes(data + bomb)
    async with await open_image(image) as access:
        buffer = bytearray(128 * KIB)
        await access.read(buffer, 0)
        assert buffer == bytes(64 * KIB) + plain.read_bytes()[64 * KIB : 128 * KIB]
