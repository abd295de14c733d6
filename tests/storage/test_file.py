"""FileStorage: size, space, syncs that fail, pacing of the fast path, the end."""

import errno
import os
import threading
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from imagofs.errors import (
    ClosedError,
    StorageError,
    SyncLostError,
    UnsupportedError,
)
from imagofs.storage import (
    FileStorage,
    PreallocateMode,
    StorageOpenOptions,
    inline,
    syscalls,
)
from tests.storage.drivers import loop_device
from tests.storage.files import WRITABLE, read, views

# --- size -------------------------------------------------------------------------------------


async def test_a_file_cut_off_by_others_is_an_error_not_zeroes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 20_000)
    for direct in (False, True):
        async with await FileStorage.open(path, StorageOpenOptions(direct=direct)) as storage:
            os.truncate(path, 10_000)
            buffer = bytearray(5000)
            assert storage.readv_nowait(views(buffer), 8000) in (0, 2000)
            assert storage.readv_nowait(views(buffer), 18_000) == 0
            for offset in (8000, 12_000, 19_999):
                with pytest.raises(StorageError, match=r"ends early.* 10000 bytes") as caught:
                    await read(storage, offset, 5000)
                assert caught.value.errno == errno.EIO
            assert await read(storage, 4000, 5000) == b"x" * 5000
            assert await read(storage, 20_480, 5) == bytes(5)
            await storage.invalidate_cache()
            assert storage.size() == 10_000
            assert await read(storage, 8000, 5000) == b"x" * 2000 + bytes(3000)
        path.write_bytes(b"x" * 20_000)


async def test_a_file_grown_by_others_ends_where_it_ended(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    for direct in (False, True):
        async with await FileStorage.open(path, StorageOpenOptions(direct=direct)) as storage:
            with path.open("ab") as file:
                file.write(b"y" * 1000)
            buffer = bytearray(b"\xee" * 1500)
            if storage.readv_nowait(views(buffer), 0) == 1500:
                assert buffer == b"x" * 1000 + bytes(500)
            assert await read(storage, 0, 1500) == b"x" * 1000 + bytes(500)
            await storage.invalidate_cache()
            assert await read(storage, 0, 2500) == b"x" * 1000 + b"y" * 1000 + bytes(500)
        os.truncate(path, 1000)


async def test_space_is_given_back_or_kept(tmp_path):
    size = 4 << 20
    path = tmp_path / "file"
    path.write_bytes(b"x" * size)
    async with await FileStorage.open(path, WRITABLE) as storage:
        await storage.sync()
        full = storage.allocated_bytes()
        assert full >= size
        await storage.write_allocated_zeroes(0, 1 << 20)
        await storage.sync()
        assert storage.allocated_bytes() >= size
        await storage.write_zeroes(0, 1 << 20)
        await storage.sync()
        assert storage.allocated_bytes() <= full - (1 << 20)
        await storage.discard(2 << 20, 8 << 20)
        await storage.sync()
        assert storage.allocated_bytes() <= full - (3 << 20)
        assert path.stat().st_size == storage.size() == size
        assert await read(storage, 0, 1 << 20) == bytes(1 << 20)
        assert await read(storage, 1 << 20, 1 << 20) == b"x" * (1 << 20)


async def test_device_space_is_given_back(tmp_path):
    backing = tmp_path / "backing"
    backing.write_bytes(b"x" * (2 << 20))
    with loop_device(backing) as device:
        async with await FileStorage.open(device, WRITABLE) as storage:
            assert storage.size() == storage.allocated_bytes() == 2 << 20
            before = backing.stat().st_blocks * 512
            await storage.discard(0, 1 << 20)
            await storage.write_zeroes(1 << 20, 1 << 19)
            await storage.sync()
            assert backing.stat().st_blocks * 512 <= before - (3 << 19)
            assert await read(storage, 1 << 20, 1 << 20) == bytes(1 << 19) + b"x" * (1 << 19)
            with pytest.raises(StorageError) as caught:
                await storage.write_zeroes(1 << 20, 2 << 20)
            assert caught.value.errno == errno.ENOSPC


async def test_zeroes_where_no_call_makes_them(tmp_path, monkeypatch):
    """As on a file system without fallocate: zeroes are written, discards do nothing."""

    calls = []

    def unknown(*arguments):
        calls.append(arguments)
        raise OSError(errno.EOPNOTSUPP, "not known here")

    for name in ("punch_hole", "zero_range"):
        monkeypatch.setattr(f"imagofs.storage.syscalls.{name}", unknown)
    for direct in (False, True):
        path = tmp_path / f"file{direct}"
        path.write_bytes(b"x" * 100_000)
        async with await FileStorage.open(path, StorageOpenOptions(True, direct)) as storage:
            await storage.write_zeroes(10, 50_000)
            await storage.write_allocated_zeroes(99_990, 3_000_000)
            await storage.discard(60_000, 30_000)
            known = len(calls)
            await storage.write_zeroes(0, 5)  # nothing is asked for twice
            await storage.discard(60_000, 30_000)
            assert len(calls) == known
            assert storage.size() == 3_099_990
            await storage.writev(views(b"x" * 5), 0)
        expected = b"x" * 10 + bytes(50_000) + b"x" * 49_980 + bytes(3_000_000)
        assert path.read_bytes() == expected


async def test_running_out_of_space(small_tmpfs):
    path = small_tmpfs / "file"
    path.write_bytes(b"old" * 1000)
    async with await FileStorage.open(path, WRITABLE) as storage:
        data = views(b"y" * (1 << 20))
        for _ in range(2):
            done = storage.writev_nowait(data, 0)
            assert done < 1 << 20
            with pytest.raises(StorageError) as caught:
                await storage.writev(data, 0)
            assert caught.value.errno == errno.ENOSPC
            assert storage.size() == path.stat().st_size
        size = storage.size()
        for mode in (PreallocateMode.FULL_ALLOCATE, PreallocateMode.WRITE_DATA):
            with pytest.raises(StorageError) as caught:
                await storage.resize(1 << 20, mode)
            assert caught.value.errno == errno.ENOSPC
            assert storage.size() == path.stat().st_size == size
        with pytest.raises(StorageError) as caught:
            await storage.write_allocated_zeroes(size, 1 << 20)
        assert caught.value.errno == errno.ENOSPC
        assert storage.size() == path.stat().st_size
        await storage.resize(0)
        await storage.writev(views(b"new"), 0)  # once there is room again
        assert await read(storage, 0, 3) == b"new"


async def test_a_write_that_fails_half_way_has_grown_the_file(small_tmpfs):
    path = small_tmpfs / "file"
    path.write_bytes(b"")
    async with await FileStorage.open(path, WRITABLE) as storage:
        with pytest.raises(StorageError) as caught:
            await storage.writev(views(b"y" * (1 << 20)), 0)
        assert caught.value.errno == errno.ENOSPC
        assert storage.size() == path.stat().st_size > 0
        assert await read(storage, 0, 4096) == b"y" * 4096


async def test_reads_while_it_shrinks(tmp_path):
    path = tmp_path / "file"
    for _ in range(20):
        path.write_bytes(b"x" * 50_000)
        async with await FileStorage.open(path, WRITABLE) as storage:
            found: list[bytes] = []

            async def look(storage=storage, found=found):
                found.append(await read(storage, 0, 50_000))

            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(look)
                nursery.start_soon(storage.resize, 20_000)
                nursery.start_soon(look)
            for data in found:
                assert data[:20_000] == b"x" * 20_000
                assert set(data[20_000:]) <= {0, ord("x")}


async def test_a_resize_that_is_cancelled_restores_the_size(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    async with await FileStorage.open(path, WRITABLE) as storage:
        with trio.move_on_after(0.01) as scope:
            await storage.resize(1 << 30, PreallocateMode.WRITE_DATA)
        assert scope.cancelled_caught
        assert storage.size() == path.stat().st_size == 1000
        assert await read(storage, 0, 1001) == b"x" * 1000 + b"\0"


# --- syncs that fail --------------------------------------------------------------------------


async def test_after_a_failed_sync_nothing_more_is_written(small_tmpfs):
    """A real one: the device's pages do not fit the file system behind it."""
    backing = small_tmpfs / "backing"
    backing.touch()
    os.truncate(backing, 2 << 20)
    with loop_device(backing) as device:
        async with await FileStorage.open(device, WRITABLE) as storage:
            data = views(b"y" * (1 << 20))
            await storage.writev(data, 0)
            with pytest.raises(StorageError, match="sync") as caught:
                await storage.sync()
            assert caught.value.errno in (errno.EIO, errno.ENOSPC)
            for _ in range(2):
                with pytest.raises(SyncLostError):
                    await storage.sync()
            assert storage.writev_nowait(data, 0) == 0
            for call in (
                lambda: storage.writev(data, 0),
                lambda: storage.write_zeroes(0, 512),
                lambda: storage.write_allocated_zeroes(0, 512),
                lambda: storage.discard(0, 512),
                lambda: storage.resize(2 << 20),
            ):
                with pytest.raises(SyncLostError, match=device):
                    await call()
            assert await read(storage, 0, 512) in (b"y" * 512, bytes(512))
        async with await FileStorage.open(device, WRITABLE) as storage:
            await storage.sync()


async def test_waiting_syncs_share_a_later_call_and_its_failure(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    calls = []
    proceed = threading.Semaphore(0)
    first_done = trio.Event()

    def fdatasync(fd):
        calls.append(fd)
        proceed.acquire()
        if len(calls) == 3:
            raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    results = []
    async with await FileStorage.open(tmp_path / "file", WRITABLE) as storage:

        async def sync():
            try:
                await storage.sync()
                results.append("done")
                first_done.set()
            except (StorageError, SyncLostError) as error:
                results.append(type(error).__name__)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sync)
            await wait_all_tasks_blocked()
            for _ in range(5):
                nursery.start_soon(sync)
            await wait_all_tasks_blocked()
            proceed.release()
            await first_done.wait()
            await wait_all_tasks_blocked()
            # The five may not rely on a call that began before they asked.
            assert results == ["done"]
            proceed.release()
        assert results == ["done"] * 6
        assert len(calls) == 2
        results.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(sync)
            await wait_all_tasks_blocked()
            proceed.release()
        assert sorted(results) == ["StorageError"] + ["SyncLostError"] * 3
        assert len(calls) == 3


@pytest.mark.parametrize(
    ("fails", "raised", "calls"),
    [
        (None, None, ["sync", "write 0", "write 8", "sync"]),
        ("sync 1", SyncLostError, ["sync"]),
        ("write 8", StorageError, ["sync", "write 0", "write 8"]),
        ("sync 2", SyncLostError, ["sync", "write 0", "write 8", "sync"]),
    ],
)
async def test_writes_between_syncs_that_fail(tmp_path, monkeypatch, fails, raised, calls):
    (tmp_path / "file").write_bytes(b"")
    done = []
    write_full = syscalls.write_full

    def fdatasync(fd):
        done.append("sync")
        if fails == f"sync {done.count('sync')}":
            raise OSError(errno.EIO, "lost")

    def write(fd, views, offset):
        done.append(f"write {offset}")
        if fails == f"write {offset}":
            raise OSError(errno.ENOSPC, "full")
        write_full(fd, views, offset)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(syscalls, "write_full", write)
    async with await FileStorage.open(tmp_path / "file", WRITABLE) as storage:
        error = None
        for _ in range(2):
            done.clear()
            try:
                await storage.sync_around([(0, b"one"), (8, b"two")], again=True)
            except (StorageError, SyncLostError) as caught:
                error = caught
            assert type(error) is (raised or type(None))
            assert done == calls
            if raised is SyncLostError:
                calls = []  # from now on nothing is tried any more
        assert storage.size() == (tmp_path / "file").stat().st_size
        if raised is StorageError:
            assert "full" in str(error)
            await storage.sync()
            assert storage.size() == 3
        elif raised is None:
            assert (tmp_path / "file").read_bytes() == b"one" + bytes(5) + b"two"


async def test_syncs_share_those_around_writes(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    calls = []
    proceed = threading.Semaphore(0)

    def fdatasync(fd):
        calls.append(fd)
        proceed.acquire()

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    async with await FileStorage.open(tmp_path / "file", WRITABLE) as storage:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(storage.sync)
            await wait_all_tasks_blocked()
            nursery.start_soon(partial(storage.sync_around, [(0, b"one")], again=False))
            await wait_all_tasks_blocked()
            nursery.start_soon(storage.sync)
            await wait_all_tasks_blocked()
            # The last one asked before the second call began, and so needs none of its own.
            proceed.release(2)
        assert len(calls) == 2


async def test_a_read_only_storage_has_nothing_to_sync(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.delattr(os, "fdatasync")
    async with await FileStorage.open(tmp_path / "file") as storage:
        await storage.sync()


# --- the fast path ----------------------------------------------------------------------------


async def test_cached_reads_and_writes_are_done_in_line(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 65536)
    async with await FileStorage.open(tmp_path / "file", WRITABLE) as storage:
        buffer = bytearray(10_000)
        assert storage.readv_nowait(views(buffer), 4096) == 10_000
        assert buffer == b"x" * 10_000
        assert storage.writev_nowait(views(b"a", b"bc"), 70_000) == 3
        assert storage.size() == 70_003
        assert storage.readv_nowait(views(buffer), 69_998) == 10_000
        assert buffer[:8] == b"\0\0abc\0\0\0"
        many = [bytearray(1) for _ in range(1500)]
        assert storage.readv_nowait(views(*many), 0) == 1024  # what one system call takes


async def test_uncached_reads_are_left_to_a_thread(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * (8 << 20))
    async with await FileStorage.open(path, WRITABLE) as storage:
        await storage.sync()
        await storage.invalidate_cache()
        buffer = bytearray(65536)
        # Each begins to read ahead, and may find what a fast disk has brought by then.
        places = range(1 << 20, 8 << 20, 1 << 20)
        assert 0 in {storage.readv_nowait(views(buffer), place) for place in places}
        assert await read(storage, 4 << 20, 65536) == b"x" * 65536
        assert storage.readv_nowait(views(buffer), 4 << 20) == 65536


async def test_direct_storages_have_no_fast_path(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 65536)
    options = StorageOpenOptions(writable=True, direct=True)
    async with await FileStorage.open(tmp_path / "file", options) as storage:
        assert storage.readv_nowait(views(bytearray(512)), 0) == 0
        assert storage.writev_nowait(views(bytearray(512)), 0) == 0


class Clock:
    """The time that the fast path sees, and system calls that take some of it."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        self.read_takes = self.write_takes = 0.0
        self.write_flags = []
        self.knows_dontcache = True
        monkeypatch.setattr(inline, "_monotonic", lambda: self.now)
        monkeypatch.setattr(inline, "_preadv", self.preadv)
        monkeypatch.setattr(inline, "_pwritev", self.pwritev)

    def preadv(self, fd, buffers, offset, flags=0):
        if flags:
            raise OSError(errno.EOPNOTSUPP, "as on a tmpfs")
        self.now += self.read_takes
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd, buffers, offset, flags=0):
        self.now += self.write_takes
        self.write_flags.append(flags)
        if flags and not self.knows_dontcache:
            raise OSError(errno.EOPNOTSUPP, "as before Linux 6.14")
        return os.pwritev(fd, buffers, offset)


async def test_slow_writes_pause_the_in_line_ones_and_not_the_reads(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(4096))
    async with await FileStorage.open(tmp_path / "file", WRITABLE) as storage:
        clock = Clock(monkeypatch)
        data, buffer = views(b"x" * 512), views(bytearray(512))

        def write(takes):
            clock.write_takes = takes
            return storage.writev_nowait(data, 0)

        assert [write(0.008) for _ in range(5)] == [512] * 5
        for _ in range(3):  # one slow write now and then is the scheduler's
            assert write(0.02) == 512
            assert [write(0.008) for _ in range(5)] == [512] * 5
        assert [write(0.02) for _ in range(3)] == [512, 512, 0]
        assert storage.readv_nowait(buffer, 0) == 512
        clock.now += 0.19
        assert write(0.0) == 0
        clock.now += 0.02
        assert write(0.2) == 512  # still held up: one is enough now, and the pause is longer
        clock.now += 1.9
        assert write(0.0) == 0
        clock.now += 0.2
        assert [write(0.0) for _ in range(3)] == [512] * 3


@pytest.mark.parametrize("known", [True, False])
async def test_large_writes_pass_the_cache_by_while_its_memory_is_dear(
    tmp_path, monkeypatch, known
):
    (tmp_path / "file").touch()
    async with await FileStorage.open(tmp_path / "file", WRITABLE) as storage:
        clock = Clock(monkeypatch)
        clock.knows_dontcache = known
        large, small = views(os.urandom(1 << 20)), views(bytes(4096))

        def write(part):
            clock.write_flags.clear()
            assert storage.writev_nowait(part, 0) == part[0].nbytes
            return clock.write_flags == [inline._RWF_DONTCACHE]

        clock.write_takes = 0.001
        assert not any(write(large) for _ in range(8))
        clock.write_takes = 0.002
        assert not any(write(large) for _ in range(2))
        assert not write(small)
        if not known:
            assert not any(write(large) for _ in range(8))
            assert clock.write_flags == [0]
            return
        assert all(write(large) for _ in range(inline.UNCACHED_WRITES))
        assert not write(large)  # tried again, and as slow as before
        assert all(write(large) for _ in range(inline.UNCACHED_WRITES))
        clock.write_takes = 0.001
        assert not any(write(large) for _ in range(inline.UNCACHED_WRITES))
    assert (tmp_path / "file").read_bytes() == bytes(large[0])


async def test_the_last_write_past_the_cache_may_be_two(tmp_path):
    """Two threads write at a time: both find one left, and none is left then."""
    (tmp_path / "file").touch()
    async with await FileStorage.open(tmp_path / "file", WRITABLE) as storage:
        storage._uncached_writes = 1
        for _ in range(2):
            storage._judge_large_write(1 << 20, 0.001, inline._RWF_DONTCACHE)
        assert storage._uncached_writes == 0


async def test_a_file_that_is_synced_often_is_written_out_early(tmp_path, monkeypatch):
    begun = []
    start = syscalls.start_write_out

    def counted(fd):
        begun.append(fd)
        start(fd)

    monkeypatch.setattr(syscalls, "start_write_out", counted)
    (tmp_path / "file").touch()
    async with await FileStorage.open(tmp_path / "file", WRITABLE) as storage:
        part = views(os.urandom(256 << 10))

        def write(parts):
            for number in range(parts):
                assert storage.writev_nowait(part, number << 18) == part[0].nbytes
            return len(begun)

        assert write(16) == 0  # nobody has asked for a sync yet
        await storage.sync()
        assert [write(3), write(1), write(7)] == [0, 1, 2]
        await storage.sync()
        assert [write(3), write(1)] == [2, 3]
        monkeypatch.setattr(inline, "_OFTEN", (1 << 20) - 1)  # as if that had been very much
        await storage.sync()
        assert write(16) == 3
        await storage.sync()
    assert (tmp_path / "file").read_bytes() == bytes(part[0]) * 16


async def test_reads_in_line_where_nobody_can_say_whether_they_wait(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(65536))
    async with await FileStorage.open(tmp_path / "file", WRITABLE) as storage:
        clock = Clock(monkeypatch)
        buffer = views(bytearray(512))
        assert [storage.readv_nowait(buffer, 0) for _ in range(5)] == [512] * 5
        for _ in range(3):  # one slow read now and then is the scheduler's
            clock.read_takes = 0.01
            assert storage.readv_nowait(buffer, 0) == 512
            clock.read_takes = 0.0
            assert [storage.readv_nowait(buffer, 0) for _ in range(3)] == [512] * 3
        clock.read_takes = 0.01
        assert [storage.readv_nowait(buffer, 0) for _ in range(5)] == [512, 512, 0, 0, 0]
        clock.now += 0.2
        clock.read_takes = 0.0
        assert storage.readv_nowait(buffer, 0) == 512


# --- the end ----------------------------------------------------------------------------------


async def test_close_waits_for_threads_even_when_it_is_cancelled(tmp_path):
    (tmp_path / "file").write_bytes(bytes(4096))
    storage = await FileStorage.open(tmp_path / "file", WRITABLE)
    busy = threading.Event()
    closed = []

    async def close():
        with trio.CancelScope() as scope:
            scope.cancel()
            await storage.close()
        closed.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(storage._in_thread, storage._readers, lambda: busy.wait(20)))
        await wait_all_tasks_blocked()
        nursery.start_soon(close)
        await wait_all_tasks_blocked()
        assert not closed
        os.fstat(storage._fd)  # still open, since a thread may use it
        with pytest.raises(ClosedError):
            await read(storage, 0, 1)
        busy.set()
    assert closed


async def test_a_forgotten_storage_warns_and_closes(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    storage = FileStorage.open_now(tmp_path / "file")
    fd = storage._fd
    with pytest.warns(ResourceWarning, match="not closed"):
        del storage
    with pytest.raises(OSError):
        os.fstat(fd)


async def test_a_cancelled_write_has_ended_when_it_returns(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    busy = threading.Event()
    real = os.pwritev

    def slow(fd, buffers, offset):
        busy.wait(5)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", slow)
    async with await FileStorage.open(path, WRITABLE) as storage:
        scope = trio.CancelScope()

        async def write():
            with scope:
                await storage.writev(views(b"x" * 200), 0)
            assert path.read_bytes() == b"x" * 200

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await wait_all_tasks_blocked()
            scope.cancel()
            await wait_all_tasks_blocked()
            busy.set()
        assert path.read_bytes() == b"x" * 200
        assert storage.size() == 200


async def test_resize_of_a_device(tmp_path):
    (tmp_path / "backing").write_bytes(bytes(65536))
    with loop_device(tmp_path / "backing") as device:
        async with await FileStorage.open(device, WRITABLE) as storage:
            await storage.resize(65536)
            with pytest.raises(UnsupportedError):
                await storage.resize(4096)
