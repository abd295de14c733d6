"""SyncFormatAccess: from any thread, in forks, when it is dropped, when the interpreter exits."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio

from imagofs import (
    ClosedError,
    EofMapping,
    FormatAccess,
    GateDeniedError,
    ImagofsError,
    MemoryStorage,
    OutOfRangeError,
    PermissiveImplicitOpenGate,
    PreallocateMode,
    Raw,
    RawMapping,
    ReadOnlyError,
    StorageError,
    SyncFormatAccess,
    UnsupportedError,
    WrongTypeError,
    ZeroMapping,
)
from tests import qemu
from tests.support.storages import FaultyStorage

MIB = 1 << 20
OPEN = PermissiveImplicitOpenGate()


@pytest.fixture
def image(new_image):
    return new_image("4M", writes=["write -P 1 0 64k"])


def first_bytes(path, count=5):
    return qemu.contents(path)[:count]


def test_every_method(image):
    with SyncFormatAccess.open(image, writable=True, lock=True) as disk:
        assert disk.size() == 4 * MIB
        assert disk.writable
        assert disk.is_writable
        assert disk.format_name == "qcow2"
        assert disk.filename == str(image)
        assert (disk.memory_alignment, disk.request_alignment) == (1, 1)
        assert disk.layers() == list(disk.dependencies().layers) == [disk.access.driver]
        assert disk.storages() == disk.dependencies().storages
        assert disk.allocated_bytes() > 0
        disk.read_parallelism, disk.write_parallelism = 2, 3
        assert (disk.read_parallelism, disk.write_parallelism) == (2, 3)
        disk.write(b"abc", 0)
        disk.writev([b"de", b"f"], 3)
        parts = [bytearray(2), bytearray(4)]
        disk.readv(parts, 0)
        assert parts == [b"ab", b"cdef"]
        disk.write_zeroes(1, 1)
        disk.write_zeroes(MIB, MIB, allocate=True)
        disk.discard_to_any(2 * MIB, 65536)
        disk.discard_to_zero(2 * MIB, 65536)
        disk.discard_to_backing(MIB, 65536)
        mapping = disk.get_mapping(0, 512)
        assert isinstance(mapping, RawMapping)
        assert disk.get_shallow_mapping(4 * MIB, 1) == EofMapping()
        assert disk.ensure_data_mapping(0, 512).offset == mapping.offset
        assert disk.ensure_zero_mapping(65536, 65536) == (65536, 65536)
        assert disk.get_mapping(65536, 65536) == ZeroMapping(65536, explicit=False)
        disk.resize(5 * MIB, PreallocateMode.ZERO)
        disk.flush()
        disk.sync()
        disk.invalidate_cache()
        got = bytearray(6)
        disk.read(got, 0)
        assert got == b"a\0cdef"
        assert "Qcow2" in repr(disk)
    assert disk.closed
    disk.close()
    assert qemu.info(image)["virtual-size"] == 5 * MIB
    qemu.check(image)


def test_map_in_many_steps():
    # More steps than one call fetches, and leaving the loop early is no trouble.
    memory = MemoryStorage(0)

    async def make():
        from imagofs import Qcow2

        await Qcow2.create(memory, 2 * MIB, cluster_size=512)
        image = FormatAccess(await Qcow2.open(memory, writable=True))
        for number in range(0, 1000, 2):
            await image.write(b"x", number * 512)
        await image.flush()
        return image

    with SyncFormatAccess(trio.run(make)) as disk:
        steps = list(disk.map())
        assert len(steps) == 1000
        position = 0
        for guest_offset, mapping in steps:
            assert guest_offset == position
            position += mapping.length
        assert position == 2 * MIB
        assert list(disk.map(512, 1024)) == [
            (512, ZeroMapping(512, explicit=False)),
            (1024, steps[2][1]),
        ]
        for _ in disk.map():
            break
        with pytest.raises(OutOfRangeError):
            next(disk.map(3 * MIB))
        with pytest.raises(WrongTypeError):
            next(disk.map(0, "1"))  # type: ignore[arg-type]
    gc.collect()


def test_a_driver_is_taken_too():
    memory = MemoryStorage(b"hello")
    with SyncFormatAccess(Raw(memory)) as disk:
        got = bytearray(5)
        disk.read(got, 0)
        assert got == b"hello"
    assert memory.closed
    with pytest.raises(WrongTypeError):
        SyncFormatAccess(memory)  # type: ignore[arg-type]


def test_many_threads(image):
    """Each writes and reads its own part; one more flushes."""
    with SyncFormatAccess.open(image, writable=True) as disk:

        def work(number):
            data = bytes([number + 1]) * 30_000
            got = bytearray(len(data))
            for _ in range(10):
                disk.write(data, number * 30_000)
                disk.read(got, number * 30_000)
                assert got == data
            if number == 0:
                disk.sync()
            return number

        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(work, range(16))) == list(range(16))
    want = b"".join(bytes([number + 1]) * 30_000 for number in range(16))
    assert qemu.contents(image)[: len(want)] == want
    qemu.check(image)


def test_two_images_at_the_same_time(new_image):
    paths = [new_image("1M") for _ in range(2)]
    disks = [SyncFormatAccess.open(path, writable=True) for path in paths]
    for disk, value in zip(disks, b"ab", strict=True):
        disk.write(bytes([value]), 0)
    for disk in disks:
        disk.close()
    assert [first_bytes(path, 1) for path in paths] == [b"a", b"b"]


# --- errors ---------------------------------------------------------------------------------------


def test_errors_are_those_of_format_access(image, tmp_path, new_image):
    with SyncFormatAccess.open(image) as disk:
        with pytest.raises(ReadOnlyError):
            disk.write(b"x", 0)
        with pytest.raises(OutOfRangeError):
            disk.read(bytearray(1), 4 * MIB)
        with pytest.raises(WrongTypeError):
            disk.read(b"x", 0)
        with pytest.raises(OutOfRangeError):
            disk.read_parallelism = 0
    with pytest.raises(StorageError):
        SyncFormatAccess.open(tmp_path / "missing")
    with pytest.raises(GateDeniedError):
        SyncFormatAccess.open(new_image(backing=image))
    with pytest.raises(WrongTypeError):
        SyncFormatAccess.open(5)  # type: ignore[arg-type]
    with pytest.raises(WrongTypeError):
        SyncFormatAccess.open(image, gate="allow")  # type: ignore[arg-type]


def test_use_after_close(image):
    disk = SyncFormatAccess.open(image, writable=True)
    disk.close()
    for call in (
        lambda: disk.read(bytearray(1), 0),
        lambda: disk.write(b"x", 0),
        lambda: disk.write_zeroes(0, 1),
        lambda: disk.get_mapping(0, 1),
        lambda: list(disk.map()),
        lambda: disk.resize(0),
        disk.flush,
        disk.sync,
        disk.invalidate_cache,
    ):
        with pytest.raises(ClosedError):
            call()


async def test_not_in_an_async_function(image):
    with pytest.raises(UnsupportedError, match="await FormatAccess"):
        SyncFormatAccess.open(image)
    disk = await trio.to_thread.run_sync(SyncFormatAccess.open, image)
    with pytest.raises(UnsupportedError, match="await FormatAccess"):
        disk.read(bytearray(1), 0)
    # In a thread that a trio program started it is as usable as anywhere.
    got = bytearray(3)
    await trio.to_thread.run_sync(disk.read, got, 0)
    assert got == b"\1\1\1"
    await trio.to_thread.run_sync(disk.close)


# --- dropped --------------------------------------------------------------------------------------


def test_dropping_flushes(image):
    disk = SyncFormatAccess.open(image, writable=True)
    disk.write(b"drop!", 0)
    access = disk.access
    del disk
    gc.collect()
    assert access.closed
    assert first_bytes(image) == b"drop!"
    qemu.check(image)


def test_dropping_in_a_cycle(image):
    class Holder:
        pass

    holder = Holder()
    holder.disk, holder.self = SyncFormatAccess.open(image, writable=True), holder  # type: ignore[attr-defined]
    holder.disk.write(b"cycle", 0)  # type: ignore[attr-defined]
    access = holder.disk.access  # type: ignore[attr-defined]
    del holder
    # The collector may run in any thread, in the middle of anything.
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()
    assert access.closed
    assert first_bytes(image) == b"cycle"


async def test_dropping_in_a_trio_program(image):
    """Its loop does not wait, and the image is flushed all the same."""

    def write():
        disk = SyncFormatAccess.open(image, writable=True)
        disk.write(b"trio!", 0)
        return disk

    disk = await trio.to_thread.run_sync(write)
    access = disk.access
    del disk
    gc.collect()
    for _ in range(1000):
        if access.closed and access.storages()[0].closed:
            break
        await trio.sleep(0.01)
    assert await trio.to_thread.run_sync(first_bytes, image) == b"trio!"


def test_an_error_while_dropping_is_said_on_stderr(capfd):
    storage = FaultyStorage(MemoryStorage(512))
    disk = SyncFormatAccess(Raw(storage))
    disk.write(b"x", 0)
    storage.fail_next("sync")
    del disk
    gc.collect()
    assert capfd.readouterr().err == "imagofs: cannot sync: injected fault\n"


# --- processes ------------------------------------------------------------------------------------


def python(program, *arguments, code=0):
    """Run a Python program that is given as text."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == code, done.stderr
    return done


WRITE = """
import sys
from imagofs import SyncFormatAccess
disk = SyncFormatAccess.open(sys.argv[1], writable=True)
disk.write(b"exit!", 0)
"""

# Which comes first, the thread's call or the close at exit, is open.
LATE_FLUSH = """
import contextlib, threading, imagofs
def flush():
    with contextlib.suppress(imagofs.ClosedError):
        disk.flush()
threading.Thread(target=flush).start()
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise ValueError('x')", 1),
        (LATE_FLUSH, 0),
        ("import threading, time; threading.Thread(target=time.sleep, args=(0.3,)).start()", 0),
        ("import gc; gc.disable(); cycle = [disk]; cycle.append(cycle); del disk, cycle", 0),
        ("import builtins; builtins.kept = disk", 0),
        ("import signal, os; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
        ("disk.close()", 0),
    ],
)
def test_exit_flushes(image, end, code):
    done = python(WRITE + end, image, code=code)
    assert first_bytes(image) == b"exit!"
    qemu.check(image)
    if code == 0:
        assert done.stderr == ""


def test_an_exit_that_nobody_sees_does_not_flush(image):
    """`os._exit` and SIGKILL: what was not flushed is gone, the image is whole."""
    python(WRITE + "disk.write(b'lost!', 3 << 20); import os; os._exit(0)", image)
    qemu.check(image, leaks=True)
    assert qemu.contents(image)[3 * MIB :][:5] == bytes(5)


def test_calls_at_exit(image):
    """After the images were closed, a call says so and does not hang."""
    end = """
import atexit
from imagofs import ClosedError
def late():
    for call in (disk.flush, lambda: SyncFormatAccess.open(sys.argv[1])):
        try:
            call()
        except ClosedError:
            print("closed")
atexit.register(late)
"""
    assert python(WRITE + end, image).stdout == "closed\nclosed\n"


def test_a_forked_child(image):
    """The child cannot use the parent's image, can open its own, and harms nothing as it ends."""
    end = """
import os, warnings
from imagofs import ClosedError
warnings.simplefilter("ignore")
pid = os.fork()
if not pid:
    try:
        disk.read(bytearray(1), 0)
    except ClosedError:
        print("closed", flush=True)
    disk.close()
    with SyncFormatAccess.open(sys.argv[2], writable=True) as own:
        own.write(b"child", 0)
    kept = SyncFormatAccess.open(sys.argv[2], writable=True)
    kept.write(b"CHILD", 0)
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
disk.write(b"after", 65536)
"""
    other = image.with_name("other.qcow2")
    qemu.create(other, "1M")
    assert python(WRITE + end, image, other).stdout == "closed\n"
    assert first_bytes(image) == b"exit!"
    assert qemu.contents(image)[65536:65541] == b"after"
    assert first_bytes(other) == b"CHILD"
    qemu.check(image)
    qemu.check(other)


def test_a_child_that_never_touches_it(image):
    end = """
import os, warnings
warnings.simplefilter("ignore")
pid = os.fork()
if not pid:
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    python(WRITE + end, image)
    assert first_bytes(image) == b"exit!"


def test_errors_pickle():
    """What a process pool does to an error."""
    error = ImagofsError("wrong", filename="x")
    assert str(pickle.loads(pickle.dumps(error))) == "x: wrong"
    failure = StorageError("cannot read", error=5, filename="y")
    again = pickle.loads(pickle.dumps(failure))
    assert (str(again), again.errno) == ("y: cannot read", 5)
