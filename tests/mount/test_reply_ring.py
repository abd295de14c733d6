"""ReplyRing: replies that the kernel gathers and sends by itself."""

from __future__ import annotations

import errno
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from imagofs.fuse import reply_ring, splice_ring
from imagofs.fuse.reply_ring import ReplyRing, open_reply_ring
from tests.mount.conftest import random_bytes
from tests.mount.kernel import fail
from tests.mount.mounting import (
    Mounted,
    MountImage,
    drop_pages,
    imagofs,
    kernel_threads,
    make_chain,
    read_direct,
    wait_until,
)

MIB = 1 << 20
KIB = 1 << 10
DATA = random_bytes(200 * KIB)


class Other:
    """A connection's other end, and what a ring said."""

    def __init__(self) -> None:
        self.here, self.there = socket.socketpair()
        self.here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)
        self.there.settimeout(10)
        self.failed: list[tuple[int, int, int]] = []
        self.errors: list[int | None] = []
        self.ring = ReplyRing(
            self.here.fileno(),
            failed=self.failed.append,
            not_sent=lambda error: self.errors.append(error.errno),
        )
        self.splices = self.ring._splices

    def settle(self) -> None:
        def is_done() -> bool:
            self.ring.reap()
            return not self.ring.is_busy

        wait_until(is_done)

    def completions(self) -> int:
        """What the kernel has said and nobody has looked at."""
        words = self.splices._words
        return int(words[self.splices._tail_done] - words[self.splices._head_done])

    def receives(self, expected: bytes) -> bool:
        # With a time limit MSG_WAITALL does not wait for all.
        received = bytearray()
        while len(received) < len(expected):
            received += self.there.recv(len(expected) - len(received))
        return received == expected

    def receives_nothing(self) -> bool:
        self.there.setblocking(False)
        try:
            self.there.recv(1)
        except BlockingIOError:
            return True
        finally:
            self.there.settimeout(10)
        return False


@pytest.fixture
def other() -> Iterator[Other]:
    other = Other()
    yield other
    other.ring.close()
    other.here.close()
    other.there.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_replies(other: Other, file: int) -> None:
    shapes = [[(0, 100_000)], [(4096, 8192), (0, 4096), (5, 50_000)], [(3, 7)] * 60, [(0, 1)] * 64]
    for turn in range(200):  # more than the ring has entries
        places = shapes[turn % 4]
        ranges = [(file, offset, length) for offset, length in places]
        request = (turn, 0, sum(length for _, length in places))
        assert other.ring.may_send()
        assert other.ring.send(b"header", ranges, request)
        assert other.ring.is_busy
        assert other.ring.is_sending(turn)
        assert not other.ring.is_sending(turn + 1)
        assert not other.ring.may_send()
        assert other.receives(b"header" + b"".join(DATA[o:][:n] for o, n in places))
        other.settle()
    assert not other.failed
    assert not other.errors
    assert not other.ring.reap()
    assert not other.ring.send(b"header", [(file, 0, 1)] * 65, (0, 0, 65)), "too many"
    assert not other.ring.is_busy
    assert other.receives_nothing()


def test_what_cannot_be_gathered_is_answered_in_another_way(other: Other, file: int) -> None:
    closed = os.dup(file)
    os.close(closed)
    bad_ranges = [
        (file, 199 * KIB, 2 * KIB),  # the file ends before
        (file, MIB, 1),
        (closed, 0, 1),
        (other.here.fileno(), 0, 1),  # not a file
    ]
    for number, bad in enumerate(bad_ranges):
        request = (number, 2, 10_000 + bad[2])
        ranges = [(file, 0, 5000), bad, (file, 0, 5000)]
        assert other.ring.send(b"header", ranges, request)
        other.settle()
        assert other.failed.pop() == request
        assert other.receives_nothing()
        # And the next one is whole.
        assert other.ring.send(b"again", [(file, 0, 5000)], (0, 0, 5000))
        other.settle()
        assert other.receives(b"again" + DATA[:5000])
    # More than the pipe has room for.
    request = (7, 8, 2000 * KIB)
    assert other.ring.send(b"header", [(file, 0, 200 * KIB)] * 10, request)
    other.settle()
    assert other.failed == [request]
    assert other.receives_nothing()
    assert not other.errors


def test_a_reply_that_is_refused(other: Other, file: int) -> None:
    other.there.close()
    for count in range(1, 4):
        assert other.ring.send(b"header", [(file, 0, 5000)], (1, 2, 5000))
        other.settle()
        assert other.errors == [errno.EPIPE] * count
        assert len(other.failed) == count, "somebody may be waiting"


def test_a_reply_that_nobody_waits_for(
    other: Other, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply_ring, "_GONE", {errno.EPIPE})
    other.there.close()
    for _ in range(20):
        assert other.ring.send(b"header", [(file, 0, 5000)], (1, 2, 5000))
        other.settle()
    assert not other.failed


def test_it_gives_up_where_nothing_can_be_gathered(other: Other, file: int) -> None:
    for bad in (15, 15, 16):
        assert other.ring.send(b"h", [(file, 0, 1)], (1, 2, 1))
        assert other.receives(b"h" + DATA[:1])
        other.settle()
        for _ in range(bad):
            assert other.ring.send(b"header", [(file, MIB, 1)], (1, 2, 1))
            other.settle()
    assert len(other.failed) == 15 + 15 + 16
    assert not other.ring.send(b"h", [(file, 0, 1)], (1, 2, 1))


def test_slow_replies_are_told(other: Other, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, slow in ((-1.0, True), (1000.0, False)):
        monkeypatch.setattr(reply_ring, "_SLOW", limit)
        assert other.ring.send(b"h", [(file, 0, 1)], (1, 2, 1))
        assert other.receives(b"h" + DATA[:1])
        wait_until(lambda: other.completions() == 1)
        assert other.ring.reap() is slow


@pytest.mark.parametrize(("opcode", "flags"), [(0, 0), (22, 0), (28, 0), (30, 1), (30, 16)])
def test_the_ring_does_nothing_but_splice(other: Other, file: int, opcode: int, flags: int) -> None:
    ring = other.splices
    assert other.ring.send(b"h", [(file, 0, 1)], (1, 2, 1))
    other.settle()
    tail = ring._words[ring._tail]
    place = (tail & ring._mask) * splice_ring._SQE_SIZE
    splice_ring._SQE.pack_into(ring._sqes, place, opcode, flags, 0, file, 0, 0, 1, 0, 5, 0, 0, 0)
    ring._words[ring._tail] = tail + 1
    ring._call(splice_ring._IO_URING_ENTER, ring.fd, 1, 0, 0, None, 0)
    assert other.completions() == 1
    place = ring._done + 4 * (ring._words[ring._head_done] & ring._mask_done)
    assert (1 << 32) - ring._words[place + 2] == errno.EACCES


def test_a_system_that_takes_nothing(
    other: Other, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other.splices, "_call", lambda *_: -1)
    assert not other.ring.send(b"header", [(file, 0, 1)], (1, 2, 1))
    monkeypatch.undo()
    assert not other.ring.send(b"header", [(file, 0, 1)], (1, 2, 1)), "not used again"
    assert not other.ring.is_busy
    assert other.receives_nothing()


def test_a_system_that_takes_a_part(
    other: Other, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = other.splices._call

    def enter(number: int, fd: int, count: int, *rest: object) -> object:
        return call(number, fd, count - 1, *rest)

    monkeypatch.setattr(other.splices, "_call", enter)
    bad = (file, MIB, 1)
    assert not other.ring.send(b"header", [(file, 0, 1), bad], (1, 2, 2))
    wait_until(lambda: other.completions() == 1)
    assert not other.ring.reap()
    assert not other.completions(), "or who waits for it would never rest"
    assert not other.ring.under_way
    assert not other.failed
    assert other.receives_nothing()


def test_no_pipe(other: Other, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_many() -> None:
        raise OSError(errno.EMFILE, "too many open files")

    def sends() -> bool:
        return other.ring.send(b"header", [(file, 0, 1)], (1, 2, 1))

    for refuse, passes in ((too_many, True), (lambda: None, False)):
        monkeypatch.setattr(reply_ring, "open_pipe", refuse)
        assert not sends()
        monkeypatch.undo()
        assert sends() is passes
        other.settle()
        other.ring._close_pipe()


def test_no_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened() -> ReplyRing | None:
        return open_reply_ring(0, failed=print, not_sent=fail)

    before = os.listdir("/proc/self/fd")
    ring = opened()
    assert ring is not None
    ring.close()
    ring.close()
    with monkeypatch.context() as patched:
        patched.setattr(os, "sched_getaffinity", lambda _: {0})
        assert opened() is None, "no processor for it"
    with monkeypatch.context() as patched:
        patched.setattr(splice_ring, "_IO_URING_REGISTER", 1 << 20)
        assert opened() is None, "it would be good for more than splices"
    with monkeypatch.context() as patched:
        patched.setattr(splice_ring, "_IO_URING_SETUP", 1 << 20)
        assert opened() is None
    assert os.listdir("/proc/self/fd") == before


# --- mounts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["ro", "rw,format=raw"])
def test_the_kernel_sends_what_nobody_writes_to(
    mount: MountImage, raw_image: Path, options: str
) -> None:
    data = raw_image.read_bytes()
    mounted = mount(raw_image, options)
    for offset in range(0, 5 * MIB, MIB // 2):
        assert read_direct(mounted, offset, MIB) == data[offset : offset + MIB]
    assert kernel_threads(mounted) == (options == "ro")


def test_many_readers_of_a_chain(mount: MountImage, tmp_path: Path) -> None:
    top, expected = make_chain(tmp_path, size=8 * MIB, seed=9)
    mounted = mount(top)
    ends = time.monotonic() + 3

    def read(seed: int) -> None:
        order = random.Random(seed)
        while time.monotonic() < ends:
            length = order.choice([4096, 128 * KIB, 512 * KIB, MIB])
            offset = order.randrange(0, 8 * MIB - length, 512)
            assert read_direct(mounted, offset, length) == expected[offset : offset + length]
            if not order.randrange(50):
                drop_pages(tmp_path / f"{order.randrange(4)}.qcow2")

    with ThreadPoolExecutor(6) as readers:
        list(readers.map(read, range(6)))
    mounted.umount()


def test_a_file_that_others_cut_short(mount: MountImage, raw_image: Path) -> None:
    data = raw_image.read_bytes()
    mounted = mount(raw_image)
    for _ in range(6):
        assert read_direct(mounted, 4 * MIB, MIB) == data[4 * MIB : 5 * MIB]
    assert kernel_threads(mounted)
    os.truncate(raw_image, 4 * MIB + 300 * KIB)
    for _ in range(6):
        with pytest.raises(OSError, match="Input/output error"):
            read_direct(mounted, 4 * MIB, 512 * KIB)
        for _ in range(6):
            assert read_direct(mounted, 3 * MIB, MIB) == data[3 * MIB : 4 * MIB]
    mounted.umount()


_READER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, 4 << 20)
print(flush=True)
while True:
    os.preadv(fd, [buffer], 0)
"""


def test_readers_that_are_killed(mount: MountImage, raw_image: Path) -> None:
    data = raw_image.read_bytes()
    mounted = mount(raw_image)
    order = random.Random(3)
    for _ in range(15):
        reader = subprocess.Popen(
            [sys.executable, "-c", _READER, str(mounted.file)], stdout=subprocess.PIPE
        )
        assert reader.stdout is not None
        with reader, reader.stdout:
            reader.stdout.readline()
            time.sleep(order.uniform(0, 0.02))
            reader.kill()
    assert read_direct(mounted, 0, 4 * MIB) == data[: 4 * MIB]


def is_over(mounted: Mounted) -> bool:
    return not mounted.is_running()


def test_the_end_amid_reads(mount: MountImage, raw_image: Path) -> None:
    """A forced end, while replies are under way: nothing hangs, nothing is left."""
    for lazily in (True, False, True, False):
        mounted = mount(raw_image)
        reader = subprocess.Popen(
            [sys.executable, "-c", _READER, str(mounted.file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert reader.stdout is not None
        with reader, reader.stdout:
            reader.stdout.readline()
            time.sleep(0.05)
            if lazily:
                imagofs("umount", "--lazy", mounted.path, ok=None)
            else:
                subprocess.run(["umount", "-f", mounted.path], check=False)
            reader.kill()
        wait_until(partial(is_over, mounted))
