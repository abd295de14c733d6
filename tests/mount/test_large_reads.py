"""Large READs: their data go from the page cache to the kernel through a pipe, never through us."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagofs.fuse.reply_pipe import ReplyPipe
from imagofs.reading import FileRange
from tests import qemu
from tests.mount.conftest import random_bytes
from tests.mount.mounting import Mounted, MountImage

MIB = 1 << 20
KIB = 1 << 10


# --- the pipe -------------------------------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection, and its other end."""
    here, there = socket.socketpair()
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)
    there.settimeout(10)
    yield here, there
    here.close()
    there.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(random_bytes(200 * KIB))
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_a_reply(ends: tuple[socket.socket, socket.socket], file: int) -> None:
    here, there = ends
    pipe = ReplyPipe(here.fileno())
    data = random_bytes(200 * KIB)
    for places in ([(0, 100_000)], [(4096, 8192), (0, 4096), (5, 50_000)], [(3, 7)] * 60):
        ranges = [FileRange(file, offset, length) for offset, length in places]
        expected = b"header" + b"".join(data[offset:][:length] for offset, length in places)
        assert pipe.send(b"header", ranges)
        assert there.recv(len(expected), socket.MSG_WAITALL) == expected
    pipe.close()
    pipe.close()


def test_what_cannot_be_filled_sends_nothing(
    ends: tuple[socket.socket, socket.socket], file: int
) -> None:
    here, there = ends
    pipe = ReplyPipe(here.fileno())
    first = FileRange(file, 0, 5000)
    for bad in (
        FileRange(file, 199 * KIB, 2 * KIB),  # the file ends before
        FileRange(here.fileno(), 0, 1),  # not a file
    ):
        assert not pipe.send(b"header", [first, bad])
    # More than the pipe has room for.
    assert not pipe.send(b"header", [FileRange(file, 1, 4096)] * 1000)
    assert pipe.send(b"again", [first])
    assert there.recv(5005, socket.MSG_WAITALL) == b"again" + random_bytes(200 * KIB)[:5000]
    there.setblocking(False)
    with pytest.raises(BlockingIOError):
        there.recv(1)
    for _ in range(16):
        assert not pipe.send(b"header", [FileRange(here.fileno(), 0, 1)])
    assert not pipe.send(b"header", [first]), "it gave up"
    pipe.close()


def test_a_reply_that_is_refused(ends: tuple[socket.socket, socket.socket], file: int) -> None:
    here, there = ends
    pipe = ReplyPipe(here.fileno())
    there.close()
    for _ in range(3):
        with pytest.raises(BrokenPipeError):
            pipe.send(b"header", [FileRange(file, 0, 5000)])
    pipe.close()


@pytest.mark.parametrize("refused", ["pipe2", "fcntl"])
def test_no_pipe_or_none_of_that_size(
    refused: str,
    ends: tuple[socket.socket, socket.socket],
    file: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EPERM, "no")

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patched:
        patched.setattr(os if refused == "pipe2" else fcntl, refused, refuse)
        pipe = ReplyPipe(ends[0].fileno())
        assert not pipe.send(b"header", [FileRange(file, 0, 5000)])
    assert os.listdir("/proc/self/fd") == before
    assert pipe.send(b"header", [FileRange(file, 0, 5000)]) is (refused == "pipe2")
    pipe.close()


# --- mounts ---------------------------------------------------------------------------------------


def has_pipe(mounted: Mounted) -> bool:
    """Whether the daemon has a pipe of the size that replies need: it opens it when it does."""
    folder = Path(f"/proc/{mounted.pid}/fd")
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # closed by now
            if not os.readlink(folder / name).startswith("pipe:"):
                continue
            fd = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK)
            size = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
            os.close(fd)
            if size == MIB:
                return True
    return False


def read_direct(mounted: Mounted, offset: int, length: int) -> bytes:
    """Read past the kernel's cache of the mount."""
    fd = os.open(mounted.file, os.O_RDONLY | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, length)
        done = os.preadv(fd, [buffer], offset)
        return buffer[:done]
    finally:
        os.close(fd)


def drop(path: Path) -> None:
    """Drop a file from the host's page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def test_what_the_page_cache_has_goes_through_the_pipe(mount: MountImage, raw_image: Path) -> None:
    data = raw_image.read_bytes()
    mounted = mount(raw_image)
    assert read_direct(mounted, 0, 64 * KIB) == data[: 64 * KIB]
    assert not has_pipe(mounted), "small"
    drop(raw_image)
    assert read_direct(mounted, MIB, MIB) == data[MIB : 2 * MIB]
    assert not has_pipe(mounted), "it had to wait for the device"
    raw_image.read_bytes()
    for offset, length in ((0, MIB), (5 * MIB, 128 * KIB), (512, 3 * MIB), (7 * MIB, 2 * MIB)):
        assert read_direct(mounted, offset, length) == data[offset : offset + length]
    assert has_pipe(mounted)
    # A page in the middle that is not there.
    drop(raw_image)
    with open(raw_image, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.read(80 * KIB)
        file.seek(84 * KIB)
        file.read(MIB)
    assert read_direct(mounted, 0, MIB) == data[:MIB]


@pytest.mark.parametrize("cluster_size", ["512", "4k", "64k"])
def test_chains_with_holes(mount: MountImage, tmp_path: Path, cluster_size: str) -> None:
    order = random.Random(6)
    expected = bytearray(4 * MIB)
    top = None
    for layer in range(3):
        writes = []
        for _ in range(40):
            length = order.choice([512, 4096, 65536, 300 * KIB])
            offset = order.randrange(0, 4 * MIB - length, 512)
            value = order.randrange(1, 256)
            writes.append(f"write -P {value} {offset} {length}")
            expected[offset : offset + length] = bytes([value]) * length
        if layer == 2:
            writes.append(f"write -z {MIB} 200k")
            expected[MIB : MIB + 200 * KIB] = bytes(200 * KIB)
        path = tmp_path / f"layer{layer}.qcow2"
        backing = None if top is None else top.name
        size = 4 * MIB if top is None else None
        top = qemu.create(path, size, cluster_size=cluster_size, backing=backing, writes=writes)
    assert top is not None
    mounted = mount(top)
    for _ in range(60):
        length = order.choice([128 * KIB, 512 * KIB, MIB])
        offset = order.randrange(0, 4 * MIB - length, 512)
        assert read_direct(mounted, offset, length) == expected[offset : offset + length]
    assert mounted.file.read_bytes() == expected


def test_what_was_just_written(mount: MountImage, tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "disk.qcow2", 8 * MIB)
    mounted = mount(image, "rw")
    order = random.Random(7)
    expected = bytearray(8 * MIB)
    with open(mounted.file, "r+b", buffering=0) as disk:
        for _ in range(60):
            length = order.choice([512, 64 * KIB, MIB])
            offset = order.randrange(0, 8 * MIB - length, 512)
            data = order.randbytes(length)
            disk.seek(offset)
            disk.write(data)
            expected[offset : offset + length] = data
            offset = order.randrange(7) * MIB
            assert read_direct(mounted, offset, MIB) == expected[offset : offset + MIB]


def test_a_raw_file_that_others_cut_short(mount: MountImage, raw_image: Path) -> None:
    data = raw_image.read_bytes()
    mounted = mount(raw_image)
    assert read_direct(mounted, 4 * MIB, MIB) == data[4 * MIB : 5 * MIB]
    os.truncate(raw_image, 4 * MIB + 300 * KIB)
    with pytest.raises(OSError, match="Input/output error"):
        read_direct(mounted, 4 * MIB, 512 * KIB)
    assert read_direct(mounted, 3 * MIB, MIB) == data[3 * MIB : 4 * MIB]
