"""Large READs: their data go from the page cache to the kernel through a pipe, never through us."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imagofs.fuse import channel, protocol
from imagofs.fuse.large_replies import LargeReplies
from imagofs.fuse.reply_pipe import ReplyPipe
from imagofs.storage import syscalls
from tests import qemu
from tests.mount.conftest import random_bytes
from tests.mount.kernel import Kernel, Second, fail
from tests.mount.mounting import Mounted, MountImage, read_direct

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
    pipe = ReplyPipe(here.fileno(), fail)
    data = random_bytes(200 * KIB)
    for places in ([(0, 100_000)], [(4096, 8192), (0, 4096), (5, 50_000)], [(3, 7)] * 60):
        ranges = [(file, offset, length) for offset, length in places]
        expected = b"header" + b"".join(data[offset:][:length] for offset, length in places)
        assert pipe.fill(b"header", ranges)
        pipe.send()
        assert there.recv(len(expected), socket.MSG_WAITALL) == expected
    pipe.close()
    pipe.close()


def test_what_cannot_be_filled_sends_nothing(
    ends: tuple[socket.socket, socket.socket], file: int
) -> None:
    here, there = ends
    pipe = ReplyPipe(here.fileno(), fail)
    first = (file, 0, 5000)
    for bad in (
        (file, 199 * KIB, 2 * KIB),  # the file ends before
        (here.fileno(), 0, 1),  # not a file
    ):
        assert not pipe.fill(b"header", [first, bad])
    # More than the pipe has room for.
    assert not pipe.fill(b"header", [(file, 1, 4096)] * 1000)
    assert pipe.fill(b"again", [first])
    pipe.send()
    assert there.recv(5005, socket.MSG_WAITALL) == b"again" + random_bytes(200 * KIB)[:5000]
    there.setblocking(False)
    with pytest.raises(BlockingIOError):
        there.recv(1)
    for _ in range(16):
        assert not pipe.fill(b"header", [(here.fileno(), 0, 1)])
    assert not pipe.fill(b"header", [first]), "it gave up"
    pipe.close()


def test_a_reply_that_is_refused(ends: tuple[socket.socket, socket.socket], file: int) -> None:
    here, there = ends
    refused: list[tuple[int | None, bytes]] = []
    pipe = ReplyPipe(here.fileno(), lambda error, header: refused.append((error.errno, header)))
    there.close()
    for count in range(1, 4):
        assert pipe.fill(b"header", [(file, 0, 5000)])
        pipe.send()
        assert refused == [(errno.EPIPE, b"header")] * count
    pair = os.pipe()
    os.write(pair[1], b"data")
    assert pipe.fill_from(b"other", pair[0], 4)
    pipe.send()
    assert refused[3:] == [(errno.EPIPE, b"other")]
    for end in pair:
        os.close(end)
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
        pipe = ReplyPipe(ends[0].fileno(), fail)
        assert not pipe.fill(b"header", [(file, 0, 5000)])
    assert os.listdir("/proc/self/fd") == before
    assert pipe.fill(b"header", [(file, 0, 5000)]) is (refused == "pipe2")
    pipe.close()


# --- two of them ----------------------------------------------------------------------------------


@pytest.fixture
def replies(ends: tuple[socket.socket, socket.socket]) -> Iterator[tuple[LargeReplies, Second]]:
    second = Second()
    replies = LargeReplies(ends[0].fileno(), second, fail)  # type: ignore[arg-type]
    yield replies, second
    replies.close()


def received(there: socket.socket) -> bytes:
    """What has come, of which each reply is two bytes."""
    there.setblocking(False)
    try:
        return there.recv(1000)
    except BlockingIOError:
        return b""


def test_a_reply_that_nothing_follows(
    ends: tuple[socket.socket, socket.socket], file: int, replies: tuple[LargeReplies, Second]
) -> None:
    large, second = replies
    assert not large.finish()
    assert large.prepare(b"1", [(file, 0, 1)])
    assert received(ends[1]) == b""
    assert large.finish()
    assert received(ends[1]) == b"1" + random_bytes(200 * KIB)[:1]
    assert not large.finish()
    assert not second.given


def test_a_reply_that_another_follows(
    ends: tuple[socket.socket, socket.socket], file: int, replies: tuple[LargeReplies, Second]
) -> None:
    large, second = replies
    byte = random_bytes(200 * KIB)[:1]
    large.hand_over()
    assert not second.given, "there is none"
    for taken_back in (False, True):
        assert large.prepare(b"1", [(file, 0, 1)])
        large.hand_over()
        assert large.is_sending
        assert received(ends[1]) == b""
        assert large.prepare(b"2", [(file, 0, 1)])
        if not taken_back:
            assert second.work()
            assert received(ends[1]) == b"1" + byte
        assert large.finish()
        assert received(ends[1]) == b"2" + byte + (b"1" + byte if taken_back else b"")
        assert not large.is_sending


def test_more_replies_than_the_second_thread_takes(
    ends: tuple[socket.socket, socket.socket], file: int, replies: tuple[LargeReplies, Second]
) -> None:
    large, second = replies
    byte = random_bytes(200 * KIB)[:1]
    for number in (b"1", b"2", b"3"):
        assert large.prepare(number, [(file, 0, 1)])
        large.hand_over()
    assert received(ends[1]) == b"2" + byte + b"3" + byte
    large.settle()
    assert received(ends[1]) == b"1" + byte
    second.takes_any = False
    assert large.prepare(b"4", [(file, 0, 1)])
    large.hand_over()
    assert received(ends[1]) == b"4" + byte
    assert not large.prepare(b"5", [(file, MIB, 1)])
    large.hand_over()
    large.settle()
    assert received(ends[1]) == b""


def test_who_reads_alone_waits_for_nobody(
    ends: tuple[socket.socket, socket.socket], file: int, replies: tuple[LargeReplies, Second]
) -> None:
    large, second = replies
    waited: list[bool] = []
    for number in range(100):
        assert large.prepare(b"1", [(file, 0, 1)])
        waited.append(received(ends[1]) == b"")
        if waited[-1] and number > 80:
            break
        large.finish()
        received(ends[1])
    assert waited[:4] == [True] * 4
    assert waited[4:].index(True) == 16, "it looks again"
    assert sum(waited[4:]) == (len(waited) - 4) // 17
    # From then on others are expected.
    for _ in range(3):
        large.hand_over()
        assert second.work()
        assert large.prepare(b"1", [(file, 0, 1)])
        assert large.finish()
        assert large.prepare(b"1", [(file, 0, 1)])
    assert len(received(ends[1])) == 6 * 2


# --- the channel ----------------------------------------------------------------------------------


@pytest.mark.parametrize("writable", [True, False])
def test_nothing_is_changed_before_what_was_read_is_sent(file: int, writable: bool) -> None:
    with Kernel(file, writable=writable) as kernel:
        kernel.send(2, protocol.READ)
        kernel.send(4, protocol.READ)
        if writable:
            kernel.send(6, protocol.WRITE)
        kernel.channel._drain()
        kernel.receive()
        # The first one waits in vain for the second thread.
        both = kernel.reply(4) + kernel.reply(2)
        changed = b"changed" + protocol.written_reply(6, kernel.LENGTH)
        assert b"".join(kernel.seen) == both + (changed if writable else b"")


@pytest.mark.parametrize("writable", [True, False])
def test_what_is_in_a_pipe_when_a_burst_ends(
    file: int, writable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_BUDGET", 1)
    with Kernel(file, writable=writable) as kernel:
        kernel.send(2, protocol.READ)
        assert kernel.channel._drain() == channel._MORE
        kernel.receive()
        # Others, who get a turn now, may change a writable image.
        assert kernel.seen == ([kernel.reply(2)] if writable else [])
        # The second thread has not begun with what it was given.
        kernel.channel._drain()
        kernel.receive()
        assert kernel.seen == [kernel.reply(2)]


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


def test_both_processors_take_part(mount: MountImage, raw_image: Path) -> None:
    data = raw_image.read_bytes()
    mounted = mount(raw_image)
    tasks = Path(f"/proc/{mounted.pid}/task")

    def read(seed: int) -> None:
        order = random.Random(seed)
        for _ in range(40):
            length = order.choice([128 * KIB, 512 * KIB, 3 * MIB])
            offset = order.randrange(0, len(data) - length, 512)
            assert read_direct(mounted, offset, length) == data[offset : offset + length]

    before = set(os.listdir(tasks))
    with ThreadPoolExecutor(6) as readers:
        list(readers.map(read, range(6)))
    processors = len(os.sched_getaffinity(mounted.pid))
    new = set(os.listdir(tasks)) - before
    assert bool(new) == (processors > 1)
    # The kernel's own, where it may have one, and what takes replies from ours.
    names = {(tasks / task / "comm").read_text().split("-")[0].strip() for task in new}
    assert names <= {"iou", "python", "imagofs second", "imagofs"}, names


def test_reads_amid_changes(mount: MountImage, tmp_path: Path) -> None:
    """Clusters are given up and used for something else all the time."""
    size = 24 * MIB
    image = qemu.create(tmp_path / "disk.qcow2", size)
    mounted = mount(image, "rw")
    block = 64 * KIB
    ended = threading.Event()
    wrong: list[str] = []

    def content(number: int) -> bytes:
        return number.to_bytes(4, "big") * (block // 4)

    def change(seed: int) -> None:
        order = random.Random(seed)
        with open(mounted.file, "r+b", buffering=0) as disk:
            for _ in range(200):
                first = order.randrange(size // block - 16)
                hole = order.randrange(size // block - 16)
                syscalls.punch_hole(disk.fileno(), hole * block, 16 * block)
                disk.seek(first * block)
                disk.write(b"".join(content(first + n + 1) for n in range(16)))
                os.fsync(disk.fileno())  # what was freed may be used again

    def read(seed: int) -> None:
        order = random.Random(seed)
        allowed = {number: (content(number + 1), bytes(block)) for number in range(size // block)}
        while not ended.is_set():
            first = order.randrange(size // block - 32)
            data = read_direct(mounted, first * block, 32 * block)
            for number in range(32):
                part = data[number * block : (number + 1) * block]
                if part not in allowed[first + number]:
                    wrong.append(f"block {first + number} has {set(part)}")

    with ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(read, seed) for seed in range(3)]
        changers = [pool.submit(change, seed) for seed in range(2)]
        for changer in changers:
            changer.result()
        ended.set()
        for reader in readers:
            reader.result()
    assert not wrong
    mounted.umount()
    qemu.check(image)
