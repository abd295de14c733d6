"""FileStorage: what can be opened, taken over and created, and how."""

import errno
import fcntl
import os
import resource
import socket
import stat
import subprocess

import pytest
import trio

from imagofs.errors import (
    LockedError,
    OutOfRangeError,
    ReadOnlyError,
    StorageError,
)
from imagofs.storage import (
    FileStorage,
    PreallocateMode,
    StorageCreateOptions,
    StorageOpenOptions,
)
from imagofs.storage.base import MAX_OFFSET
from tests.storage.drivers import loop_device
from tests.storage.files import WRITABLE, open_descriptors, read, views

# --- opening ----------------------------------------------------------------------------------


async def test_open_refuses_what_is_no_file_without_blocking(tmp_path):
    fifo, sock = tmp_path / "fifo", tmp_path / "socket"
    os.mkfifo(fifo)
    link = tmp_path / "link"
    link.symlink_to(fifo)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(sock))
        cases = {
            fifo: "a FIFO",
            link: "a FIFO",
            sock: "a socket",
            tmp_path: "a directory",
            "/dev/zero": "a character device",
        }
        with trio.fail_after(10):
            for path, kind in cases.items():
                for options in (StorageOpenOptions(), WRITABLE, StorageOpenOptions(direct=True)):
                    with pytest.raises(StorageError, match=kind) as caught:
                        await FileStorage.open(path, options)
                    assert caught.value.filename == str(path)
                with pytest.raises(StorageError):
                    await FileStorage.create(path, StorageCreateOptions(overwrite=True))


@pytest.mark.timeout(20)
def test_a_fifo_that_comes_in_between_does_not_block(tmp_path, monkeypatch):
    """The look before the open saw a file; the open meets a FIFO."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "file").write_bytes(b"")
    seen = os.stat(tmp_path / "file")
    before = open_descriptors()
    for options in (StorageOpenOptions(), WRITABLE):
        with monkeypatch.context() as patch, pytest.raises(StorageError, match="a FIFO"):
            patch.setattr(os, "stat", lambda path: seen)
            FileStorage.open_now(fifo, options)
    assert open_descriptors() == before


async def test_open_errors_name_the_file_and_the_errno(tmp_path):
    for path, number in [
        (tmp_path / "missing", errno.ENOENT),
        (tmp_path / ("x" * 300), errno.ENAMETOOLONG),
        (tmp_path / "file" / "below", errno.ENOTDIR),
    ]:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StorageError) as caught:
            await FileStorage.open(path)
        assert caught.value.errno == number
        assert str(path) in str(caught.value)
    with pytest.raises(StorageError, match="null"):
        await FileStorage.open("a\0b")
    with pytest.raises(StorageError, match="direct=True") as caught:
        await FileStorage.open("/proc/version", StorageOpenOptions(direct=True))
    assert caught.value.errno == errno.EINVAL


async def test_read_only_file_system(tmp_path):
    folder = tmp_path / "ro"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], check=True)
    try:
        (folder / "file").write_bytes(b"abc")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(StorageError, match="open for writing") as caught:
            await FileStorage.open(folder / "file", WRITABLE)
        assert caught.value.errno == errno.EROFS
        async with await FileStorage.open(folder / "file") as storage:
            assert await read(storage, 0, 3) == b"abc"
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_read_only_device(tmp_path):
    """The kernel opens it for writing, and refuses each write."""
    (tmp_path / "backing").write_bytes(bytes(1 << 20))
    before = open_descriptors()
    with loop_device(tmp_path / "backing", "-r") as device:
        with pytest.raises(StorageError, match="the device is read-only") as caught:
            await FileStorage.open(device, WRITABLE)
        assert (caught.value.errno, caught.value.filename) == (errno.EROFS, device)
        assert open_descriptors() == before
        async with await FileStorage.open(device) as storage:
            assert await read(storage, 0, 4) == bytes(4)


async def test_names_are_absolute_and_descriptors_are_not_inherited(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(bytes(8192))
    file = os.stat("file")
    for options in (StorageOpenOptions(), WRITABLE, StorageOpenOptions(True, True)):
        async with await FileStorage.open("file", options) as storage:
            assert storage.filename == str(tmp_path / "file")
            assert storage.resolve_relative_path("../x") == str(tmp_path / "../x")
            opened = [fd for fd in open_descriptors() if os.path.samestat(os.fstat(fd), file)]
            assert len(opened) == 1 + options.direct
            for fd in opened:
                assert not os.get_inheritable(fd)
                assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK


async def test_from_fd_takes_over_what_it_accepts(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    os.set_inheritable(fd, True)
    async with FileStorage.from_fd(fd, filename=path) as storage:
        assert storage.writable
        assert storage.filename == str(path)
        assert not os.get_inheritable(fd)
        assert storage.writev_nowait(views(b"ab"), 0) == 2  # although it was open for appending
        await storage.writev(views(b"cd"), 2)
    assert path.read_bytes() == b"abcd456789"
    with pytest.raises(OSError):
        os.fstat(fd)

    fd = os.open(path, os.O_RDWR)
    async with FileStorage.from_fd(fd, StorageOpenOptions()) as storage:
        assert not storage.writable
        assert storage.writev_nowait(views(b"ab"), 0) == 0

    fd = os.open(path, os.O_RDWR)
    async with FileStorage.from_fd(fd, StorageOpenOptions(writable=True, direct=True)) as storage:
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        await storage.writev(views(b"zz"), 9)
    assert path.read_bytes() == b"abcd45678zz"


async def test_from_fd_leaves_alone_what_it_refuses(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    for flags, options, error in [
        (os.O_RDONLY, WRITABLE, ReadOnlyError),
        (os.O_WRONLY, None, StorageError),
        (os.O_PATH, None, StorageError),
    ]:
        fd = os.open(path, flags)
        with pytest.raises(error):
            FileStorage.from_fd(fd, options)
        os.close(fd)
    reader, writer = os.pipe()
    with pytest.raises(StorageError, match="FIFO"):
        FileStorage.from_fd(reader)
    os.close(reader)
    os.close(writer)
    with pytest.raises(StorageError) as caught:
        FileStorage.from_fd(reader)
    assert caught.value.errno == errno.EBADF


# --- creating ---------------------------------------------------------------------------------


async def test_create(tmp_path):
    path = tmp_path / "new"
    options = StorageCreateOptions(size=10_001, mode=0o640)
    async with await FileStorage.create(path, options) as storage:
        assert storage.size() == 10_001
        assert storage.writable
        await storage.writev(views(b"x"), 10_000)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(StorageError) as caught:
        await FileStorage.create(path, options)
    assert caught.value.errno == errno.EEXIST
    assert path.read_bytes() == bytes(10_000) + b"x"


@pytest.mark.parametrize("mode", PreallocateMode)
@pytest.mark.parametrize("direct", [False, True])
async def test_create_and_overwrite_with_each_preallocation(tmp_path, mode, direct):
    path = tmp_path / "new"
    path.write_bytes(b"old" * 50_000)
    for size in (100_000, 1_000_001):
        options = StorageCreateOptions(
            size=size,
            preallocate=mode,
            overwrite=True,
            open_options=StorageOpenOptions(writable=True, direct=direct),
        )
        async with await FileStorage.create(path, options) as storage:
            assert (storage.request_alignment > 1) == direct
            assert await read(storage, 0, size) == bytes(size)
            full = mode in (PreallocateMode.FULL_ALLOCATE, PreallocateMode.WRITE_DATA)
            await storage.sync()
            assert (storage.allocated_bytes() >= size) == full
    assert path.stat().st_size == size


async def test_create_opens_as_asked(tmp_path):
    options = StorageCreateOptions(size=5, open_options=StorageOpenOptions())
    async with await FileStorage.create(tmp_path / "new", options) as storage:
        assert not storage.writable
        with pytest.raises(ReadOnlyError):
            await storage.writev(views(b"x"), 0)


async def test_create_that_fails_leaves_no_file(tmp_path, small_tmpfs):
    path = small_tmpfs / "new"
    for mode in (PreallocateMode.FULL_ALLOCATE, PreallocateMode.WRITE_DATA):
        with pytest.raises(StorageError) as caught:
            await FileStorage.create(path, StorageCreateOptions(size=1 << 20, preallocate=mode))
        assert caught.value.errno == errno.ENOSPC
        assert not path.exists()
    for size in (-1, MAX_OFFSET):
        with pytest.raises(OutOfRangeError):
            await FileStorage.create(path, StorageCreateOptions(size=size))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        with pytest.raises(StorageError) as caught:
            await FileStorage.create(tmp_path / "new", StorageCreateOptions(size=2 << 20))
        assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "new").exists()
    with pytest.raises(StorageError) as caught:
        await FileStorage.create(tmp_path / "no" / "new")
    assert caught.value.errno == errno.ENOENT


async def test_create_that_is_cancelled_leaves_no_file(tmp_path):
    path = tmp_path / "new"
    size = 64 << 20
    with trio.move_on_after(0.005) as scope:
        await FileStorage.create(
            path, StorageCreateOptions(size=size, preallocate=PreallocateMode.WRITE_DATA)
        )
    assert scope.cancelled_caught
    assert not path.exists()
    # What existed is kept, and may be empty now: it was to be overwritten.
    path.write_bytes(b"old")
    with trio.CancelScope() as scope:
        scope.cancel()
        await FileStorage.create(path, StorageCreateOptions(size=size, overwrite=True))
    assert path.read_bytes() == b"old"


async def test_create_does_not_overwrite_an_image_in_use(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"data")
    for writable in (True, False):
        async with await FileStorage.open(path, WRITABLE) as user:
            user.lock(writable)
            with pytest.raises(LockedError):
                await FileStorage.create(path, StorageCreateOptions(size=1, overwrite=True))
            assert path.read_bytes() == b"data"
    async with await FileStorage.create(path, StorageCreateOptions(size=1, overwrite=True)):
        assert path.read_bytes() == b"\0"


async def test_create_on_a_block_device(tmp_path):
    (tmp_path / "backing").write_bytes(b"x" * (1 << 20))
    with loop_device(tmp_path / "backing") as device:
        for mode in PreallocateMode:
            options = StorageCreateOptions(size=100_000, preallocate=mode, overwrite=True)
            with open(device, "r+b") as file:
                file.write(b"x" * 200_000)
            async with await FileStorage.create(device, options) as storage:
                assert storage.size() == 1 << 20
                expected = b"x" if mode is PreallocateMode.NONE else b"\0"
                assert await read(storage, 0, 100_001) == expected * 100_000 + b"x"
        with pytest.raises(StorageError) as caught:
            await FileStorage.create(device, StorageCreateOptions(size=512))
        assert caught.value.errno == errno.EEXIST
        with pytest.raises(OutOfRangeError, match="1048576"):
            await FileStorage.create(device, StorageCreateOptions(size=2 << 20, overwrite=True))
