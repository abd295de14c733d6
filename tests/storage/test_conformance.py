"""What every storage promises, over every driver."""

import errno
import mmap
import os
import random

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from imagofs.errors import (
    ClosedError,
    ImagofsError,
    OutOfRangeError,
    ReadOnlyError,
    StorageError,
    UnsupportedError,
)
from imagofs.storage import PreallocateMode
from imagofs.storage.base import MAX_OFFSET
from tests.storage.drivers import DEVICE_SIZE, NAMES, driver, tmpfs_has_direct
from tests.storage.files import read

SIZE = DEVICE_SIZE


def _drivers(names):
    """A fixture that is each driver of `names` in turn."""

    @pytest.fixture(params=names, scope="module")
    def fixture(request, tmp_path_factory):
        if request.param == "direct-tmpfs" and not tmpfs_has_direct():
            pytest.skip("this kernel's tmpfs does not know O_DIRECT")
        with driver(request.param, tmp_path_factory.mktemp(request.param)) as made:
            yield made

    return fixture


KEEPING = [name for name in NAMES if name != "null"]

kind = _drivers(NAMES)
keeping = _drivers(KEEPING)  # what is written can be read again
growing = _drivers([name for name in KEEPING if not name.startswith("block")])
fixed = _drivers([name for name in KEEPING if name.startswith("block")])


def pattern(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


EDGES = [0, 1, 511, 512, 513, 4095, 4096, 4097, 65535, 65536, 65537]


async def test_reads_of_any_alignment(keeping):
    contents = pattern(SIZE)
    async with await keeping.open(contents, writable=False) as storage:
        assert storage.size() == SIZE
        for offset in EDGES:
            for length in (1, 511, 512, 1000, 4096, 5000, 70000):
                assert await read(storage, offset, length) == contents[offset : offset + length]


async def test_reads_past_the_end_are_zero(kind):
    contents = pattern(SIZE) if kind.keeps else bytes(SIZE)
    async with await kind.open(contents) as storage:
        assert await read(storage, SIZE - 100, 5000) == contents[-100:] + bytes(4900)
        assert await read(storage, SIZE, 512) == bytes(512)
        assert await read(storage, SIZE + 12345, 100) == bytes(100)
        assert await read(storage, 1 << 62, 100) == bytes(100)


async def test_writes_of_any_alignment_leave_their_neighbours(keeping):
    model = bytearray(pattern(SIZE))
    async with await keeping.open(bytes(model)) as storage:
        for offset in EDGES:
            for length in (1, 511, 512, 1000, 4096, 5000, 70000):
                data = pattern(length, offset + length)
                model[offset : offset + length] = data
                await storage.writev([memoryview(data)], offset)
                start, end = max(0, offset - 5000), offset + length + 5000
                assert await read(storage, start, end - start) == model[start:end]
        assert storage.size() == SIZE
        assert await read(storage, 0, SIZE) == model


async def test_unaligned_ends_grow_exactly(growing):
    async with await growing.open(b"") as storage:
        model = bytearray()
        for offset, length in [(0, 100), (90, 5000), (9000, 10), (9010, 4096), (20000, 100000)]:
            data = pattern(length, offset)
            model.extend(bytes(max(0, offset + length - len(model))))
            model[offset : offset + length] = data
            await storage.writev([memoryview(data)], offset)
            assert storage.size() == len(model)
            assert await read(storage, 0, len(model) + 100) == model + bytes(100)


async def test_vectors_of_many_pieces(keeping):
    contents = pattern(SIZE)
    async with await keeping.open(contents) as storage:
        # More than one system call takes, in odd lengths, with empty ones and read-only sources.
        lengths = [random.Random(7).randrange(0, 60) for _ in range(3000)]
        buffers = [memoryview(bytearray(length)) for length in lengths]
        await storage.readv(buffers, 333)
        assert b"".join(buffers) == contents[333 : 333 + sum(lengths)]
        sources = [memoryview(bytes(buffer)[::-1]) for buffer in buffers]
        await storage.writev(sources, 777)
        assert await read(storage, 777, sum(lengths)) == b"".join(sources)
        assert await read(storage, 0, 777) == contents[:777]


async def test_one_big_request(keeping):
    length = SIZE if keeping.fixed_size else 5 << 20
    data = pattern(length)
    async with await keeping.open(bytes(SIZE)) as storage:
        offset = 0 if keeping.fixed_size else 12345
        await storage.writev([memoryview(data)], offset)
        assert storage.size() == offset + length
        assert await read(storage, offset, length) == data


async def test_empty_requests_change_nothing(kind):
    async with await kind.open(bytes(SIZE)) as storage:
        for views in ([], [memoryview(b"")]):
            await storage.writev(views, SIZE * 4 + 5)
            await storage.writev(views, 0)
        for views in ([], [memoryview(bytearray())]):
            await storage.readv(views, 5)
        assert storage.writev_nowait([], SIZE * 4) == 0
        assert storage.readv_nowait([], 0) == 0
        for change in (storage.write_zeroes, storage.write_allocated_zeroes, storage.discard):
            await change(SIZE * 4 + 5, 0)
        assert storage.size() == SIZE


async def test_zeroes_of_any_alignment(keeping):
    model = bytearray(pattern(SIZE))
    async with await keeping.open(bytes(model)) as storage:
        for call in (storage.write_zeroes, storage.write_allocated_zeroes):
            for offset, length in [(1, 1), (511, 2), (5000, 10000), (65536, 65536), (100, 200000)]:
                data = pattern(length + 2000, offset)
                await storage.writev([memoryview(data)], max(0, offset - 1000))
                model[max(0, offset - 1000) : max(0, offset - 1000) + len(data)] = data
                await call(offset, length)
                model[offset : offset + length] = bytes(length)
                assert await read(storage, 0, SIZE) == model
        assert storage.size() == SIZE


async def test_zeroes_past_the_end_grow(growing):
    async with await growing.open(pattern(100)) as storage:
        await storage.write_zeroes(50, 10000)
        assert storage.size() == 10050
        await storage.write_allocated_zeroes(20000, 300000)
        assert storage.size() == 320000
        assert await read(storage, 0, 320000) == pattern(100)[:50] + bytes(320000 - 50)


async def test_discard_keeps_the_size_and_the_neighbours(keeping):
    contents = pattern(SIZE)
    async with await keeping.open(contents) as storage:
        await storage.discard(70001, 66000)
        assert await read(storage, 0, 70001) == contents[:70001]
        assert await read(storage, 136001, SIZE - 136001) == contents[136001:]
        await storage.discard(SIZE - 8192, 8192)
        await storage.discard(SIZE - 100, 1 << 40)
        await storage.discard(SIZE, 1 << 40)
        assert storage.size() == SIZE


async def test_fixed_size(fixed):
    async with await fixed.open(pattern(SIZE)) as storage:
        for size in (SIZE - 512, SIZE + 512, 0):
            with pytest.raises(UnsupportedError):
                await storage.resize(size)
        await storage.resize(SIZE)
        for offset in (SIZE - 100, SIZE, SIZE + 100):
            with pytest.raises(StorageError) as caught:
                await storage.writev([memoryview(bytes(512))], offset)
            assert caught.value.errno == errno.ENOSPC
        assert storage.size() == SIZE
        assert await read(storage, 0, SIZE - 512) == pattern(SIZE)[:-512]


async def test_resize(growing):
    async with await growing.open(pattern(10000)) as storage:
        await storage.resize(5001)
        assert storage.size() == 5001
        model = pattern(10000)[:5001]
        assert await read(storage, 0, 10000) == model + bytes(4999)
        for mode in PreallocateMode:
            size = storage.size() + 70001
            await storage.resize(size, mode)
            assert storage.size() == size
            assert await read(storage, 0, size) == model + bytes(size - len(model)), mode
        await storage.resize(0)
        assert storage.size() == 0
        for size in (-1, MAX_OFFSET + 1):
            with pytest.raises(OutOfRangeError):
                await storage.resize(size)


async def test_nowait_does_a_first_part_or_nothing(keeping):
    contents = bytearray(pattern(SIZE))
    async with await keeping.open(bytes(contents)) as storage:
        await read(storage, 0, SIZE)  # into the cache
        for offset, length in [(0, 4096), (4096, 8192), (SIZE - 100, 5000), (SIZE + 5, 10)]:
            buffer = bytearray(b"\xee" * length)
            done = storage.readv_nowait([memoryview(buffer)[:7], memoryview(buffer)[7:]], offset)
            assert 0 <= done <= length
            expected = (bytes(contents[offset : offset + length]) + bytes(length))[:length]
            assert buffer[:done] == expected[:done]
        data = pattern(8192, 99)
        done = storage.writev_nowait([memoryview(data)], 4096)
        assert 0 <= done <= 8192
        contents[4096 : 4096 + done] = data[:done]
        assert await read(storage, 0, SIZE) == contents
        # What is wrong is left to the slow path, which says so.
        assert storage.readv_nowait([memoryview(bytearray(8))], -5) == 0
        assert storage.writev_nowait([memoryview(b"x")], -5) == 0
        assert storage.writev_nowait([memoryview(b"x")], 1 << 80) == 0


async def test_impossible_ranges(kind):
    async with await kind.open(bytes(SIZE)) as storage:
        buffer = [memoryview(bytearray(16))]
        for offset in (-1, -(1 << 70), MAX_OFFSET, 1 << 63, 1 << 80):
            with pytest.raises(OutOfRangeError):
                await storage.readv(buffer, offset)
            with pytest.raises(OutOfRangeError):
                await storage.writev(buffer, offset)
        for call in (storage.write_zeroes, storage.write_allocated_zeroes, storage.discard):
            for offset, length in [(-1, 5), (5, -1), (0, 1 << 63), (MAX_OFFSET, 1)]:
                with pytest.raises(OutOfRangeError):
                    await call(offset, length)
        assert storage.size() == SIZE


async def test_read_only(keeping):
    contents = pattern(SIZE)
    async with await keeping.open(contents, writable=False) as storage:
        assert not storage.writable
        data = [memoryview(b"x" * 8192)]
        with pytest.raises(ReadOnlyError):
            await storage.writev(data, 0)
        for call in (storage.write_zeroes, storage.write_allocated_zeroes, storage.discard):
            with pytest.raises(ReadOnlyError):
                await call(0, 8192)
        with pytest.raises(ReadOnlyError):
            await storage.resize(SIZE * 2)
        assert storage.writev_nowait(data, 0) == 0
        await storage.flush()
        await storage.sync()
        assert await read(storage, 0, SIZE) == contents


async def test_closed(kind):
    storage = await kind.open(bytes(SIZE))
    await storage.close()
    await storage.close()
    buffer = [memoryview(bytearray(512))]
    assert storage.readv_nowait(buffer, 0) == storage.writev_nowait(buffer, 0) == 0
    calls = [
        lambda: storage.readv(buffer, 0),
        lambda: storage.writev(buffer, 0),
        lambda: storage.write_zeroes(0, 512),
        lambda: storage.write_allocated_zeroes(0, 512),
        lambda: storage.discard(0, 512),
        lambda: storage.resize(1),
        storage.flush,
        storage.sync,
        storage.invalidate_cache,
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            await call()


async def test_flush_sync_and_invalidate_keep_everything(keeping):
    async with await keeping.open(bytes(SIZE)) as storage:
        data = pattern(10000)
        await storage.writev([memoryview(data)], 1234)
        await storage.flush()
        await storage.sync()
        await storage.invalidate_cache()
        assert await read(storage, 1234, 10000) == data
        assert storage.size() == SIZE
        assert 0 <= storage.allocated_bytes() <= SIZE + (1 << 20)


@pytest.mark.parametrize("again", [False, True])
async def test_writes_between_syncs(keeping, again):
    contents = bytearray(pattern(SIZE))
    async with await keeping.open(bytes(contents)) as storage:
        writes = [(512, pattern(512, 2)), (4096, bytearray(pattern(8192, 3))), (100, b"odd")]
        await storage.sync_around(writes, again=again)
        for offset, data in writes:
            contents[offset : offset + len(data)] = data
        assert await read(storage, 0, SIZE) == contents
        await storage.sync_around([], again=again)
        await storage.sync()


async def test_writes_between_syncs_may_grow(growing):
    async with await growing.open(b"") as storage:
        await storage.sync_around([(4096, b"x" * 512)], again=True)
        assert storage.size() == 4608
        assert await read(storage, 0, 4608) == bytes(4096) + b"x" * 512


async def test_any_memory_serves(keeping):
    """Memory of an mmap, at odd addresses, and read-only bytes."""
    contents = pattern(SIZE)
    async with await keeping.open(contents) as storage:
        with mmap.mmap(-1, 65536) as memory, memoryview(memory) as view:
            for start in (0, 1, 512, 4096):
                with view[start : start + 8192] as part:
                    await storage.readv([part], 4096)
                    assert part == contents[4096:12288]
                    await storage.writev([part], 16384)
                assert await read(storage, 16384, 8192) == contents[4096:12288]
            pieces = [view[i : i + 512] for i in (512, 0, 4096)]
            await storage.readv(pieces, 512)
            assert b"".join(pieces) == contents[512:2048]
            for piece in pieces:
                piece.release()


async def test_neighbours_in_one_block_at_the_same_time(keeping):
    """64 tasks write next to each other; a read-modify-write must not undo its neighbour."""
    async with await keeping.open(bytes(SIZE)) as storage:
        rng = random.Random(3)
        cuts = sorted(rng.sample(range(1, 40000), 63))
        model = pattern(40000)

        async def write(start, end):
            await storage.writev([memoryview(model)[start:end]], start)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for start, end in zip([0, *cuts], [*cuts, 40000], strict=True):
                    nursery.start_soon(write, start, end)
        assert await read(storage, 0, 40000) == model
        if storage.request_alignment > 1 and not hasattr(storage, "tag"):
            assert not storage.write_blockers().locks.entries


@pytest.mark.parametrize("whole_block", ["write", "zero"])
async def test_whole_blocks_and_parts_of_them_at_the_same_time(keeping, whole_block):
    """A read-modify-write must not put back what an aligned request has just replaced."""
    new = pattern(65536, 5)
    for delay in range(6):
        async with await keeping.open(pattern(SIZE)) as storage:

            async def whole(storage=storage, delay=delay):
                for _ in range(delay):
                    await trio.lowlevel.checkpoint()
                if whole_block == "zero":
                    await storage.write_zeroes(0, 65536)
                    return
                with mmap.mmap(-1, 65536) as memory, memoryview(memory) as view:
                    view[:] = new
                    await storage.writev([view], 0)

            part = b"p" * 10
            async with trio.open_nursery() as nursery:
                nursery.start_soon(storage.writev, [memoryview(part)], 700)
                nursery.start_soon(whole)
            found = await read(storage, 0, 65536)
            expected = bytes(65536) if whole_block == "zero" else new
            assert found[700:710] in (part, expected[700:710])
            assert found[:700] + found[710:] == expected[:700] + expected[710:]


async def test_cancelled_writes_touch_nothing_else_and_leave_no_lock(keeping):
    """Whatever moment the cancellation comes at."""
    old = pattern(SIZE)
    new = pattern(9000, 2)
    async with await keeping.open(old) as storage:
        for round_number in range(30):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(storage.writev, [memoryview(new)], 5001)
                    nursery.start_soon(storage.writev, [memoryview(new)], 5001 + 9000)
                    for _ in range(round_number):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            found = await read(storage, 0, SIZE)
            assert found[:5001] == old[:5001]
            assert found[23001:] == old[23001:]
            for position in range(5001, 23001):
                fresh = new[(position - 5001) % 9000]
                assert found[position] in (old[position], fresh)
            with trio.fail_after(10):
                await storage.writev([memoryview(old)], 0)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 100_000), st.integers(0, 20_000)),
        st.tuples(st.just("write_nowait"), st.integers(0, 100_000), st.integers(0, 20_000)),
        st.tuples(st.just("zero"), st.integers(0, 100_000), st.integers(0, 140_000)),
        st.tuples(st.just("allocated"), st.integers(0, 100_000), st.integers(0, 140_000)),
        st.tuples(st.just("discard"), st.integers(0, 100_000), st.integers(0, 140_000)),
        st.tuples(st.just("resize"), st.integers(0, 120_000), st.sampled_from(range(5))),
        st.tuples(st.just("read"), st.integers(0, 130_000), st.integers(0, 20_000)),
        st.tuples(st.just("sync"), st.just(0), st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=25)
@given(operations=operations, size=st.sampled_from([0, 1, 511, 4096, 50_001, 98_304]))
async def test_random_operations_against_a_model(keeping, operations, size):
    model = bytearray(pattern(keeping.fixed_size or size))
    async with await keeping.open(bytes(model)) as storage:
        for number, (name, offset, length) in enumerate(operations):
            data = pattern(length, number)
            end = offset + length
            if name == "write":
                cut = length // 3
                await storage.writev([memoryview(data)[:cut], memoryview(data)[cut:]], offset)
                put(model, offset, data)
            elif name == "write_nowait":
                done = storage.writev_nowait([memoryview(data)], offset)
                assert 0 <= done <= length
                put(model, offset, data[:done])
            elif name == "zero":
                await storage.write_zeroes(offset, length)
                put(model, offset, bytes(length))
            elif name == "allocated":
                await storage.write_allocated_zeroes(offset, length)
                put(model, offset, bytes(length))
            elif name == "discard":
                await storage.discard(offset, length)
                end = min(end, len(model))
                if offset < end:  # undefined now: take what is there, and go on from it
                    model[offset:end] = await read(storage, offset, end - offset)
            elif name == "resize" and keeping.grows:
                await storage.resize(offset, list(PreallocateMode)[length])
                del model[offset:]
                model.extend(bytes(offset - len(model)))
            elif name == "read":
                expected = (bytes(model[offset:end]) + bytes(length))[:length]
                assert await read(storage, offset, length) == expected
            elif name == "sync":
                await storage.sync()
            assert storage.size() == len(model)
        assert await read(storage, 0, len(model) + 5) == model + bytes(5)


def put(model: bytearray, offset: int, data: bytes) -> None:
    if data:
        model.extend(bytes(max(0, offset + len(data) - len(model))))
        model[offset : offset + len(data)] = data


async def test_no_descriptor_stays_open(kind):
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        async with await kind.open(bytes(SIZE)) as storage:
            await read(storage, 0, 100)
    assert len(os.listdir("/proc/self/fd")) == len(before)


async def test_relative_names(kind):
    async with await kind.open(bytes(SIZE)) as storage:
        assert storage.resolve_relative_path("/a/b") == "/a/b"
        if storage.filename is None:
            with pytest.raises(ImagofsError, match="no directory"):
                storage.resolve_relative_path("b")
        else:
            folder = os.path.dirname(storage.filename)
            assert storage.resolve_relative_path("b/c") == f"{folder}/b/c"
