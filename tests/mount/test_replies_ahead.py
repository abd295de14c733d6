"""RepliesAhead: the data of large READs, in pipes before they are asked for."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from imagofs import PermissiveImplicitOpenGate, open_image
from imagofs.fuse import replies_ahead, reply_ring
from imagofs.fuse.protocol import MAX_WRITE
from imagofs.fuse.replies_ahead import RepliesAhead
from imagofs.fuse.reply_pipe import ReplyPipe
from imagofs.fuse.reply_ring import ReplyRing
from imagofs.fuse.splice_ring import SpliceRing
from tests import qemu
from tests.mount.conftest import random_bytes
from tests.mount.kernel import fail
from tests.mount.mounting import (
    Mounted,
    MountImage,
    drop_pages,
    kernel_threads,
    make_chain,
    read_direct,
    wait_until,
)

MIB = 1 << 20
KIB = 1 << 10
SIZE = MAX_WRITE
DATA = random_bytes(16 * SIZE)


class Gathering:
    """What is gathered of a file, and a reader of it."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(DATA)
        self.fd = os.open(path, os.O_RDONLY)
        self.ring = SpliceRing()
        self.ahead = RepliesAhead(self.ring, 1)
        self.asked: list[int] = []
        self.moved = b""

    def ranges(self, offset: int, size: int) -> list[tuple[int, int, int]] | None:
        """In ten pieces."""
        self.asked.append(offset)
        if offset + size > len(DATA):
            return None
        piece = size // 10
        starts = [*range(offset, offset + 9 * piece, piece), offset + 9 * piece]
        ends = [*starts[1:], offset + size]
        return [(self.fd, start, end - start) for start, end in zip(starts, ends, strict=True)]

    def fill(
        self, ranges: Callable[[int, int], Sequence[tuple[int, int, int]] | None] | None = None
    ) -> None:
        self.ahead.fill(ranges or self.ranges)
        self.settle()

    def settle(self) -> None:
        def is_done() -> bool:
            while (done := self.ring.reap()) is not None:
                assert self.ahead.filled(done) > 0
            return not self.ring.under_way

        wait_until(is_done)

    def wants(self) -> bool:
        return self.ahead.is_wanted

    def note(self, *numbers: float) -> None:
        for number in numbers:
            self.ahead.note(int(number * SIZE), SIZE)

    def take(self, number: float, size: int = SIZE) -> bool:
        return self.ahead.take(int(number * SIZE), size, self.move)

    def move(self, output: int) -> bool:
        self.moved = b""
        while len(self.moved) < SIZE:
            self.moved += os.read(output, SIZE)
        with pytest.raises(BlockingIOError):
            os.read(output, 1)
        return True

    def gives(self, number: int) -> bool:
        return self.take(number) and self.moved == DATA[number * SIZE : (number + 1) * SIZE]


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def gathering(tmp_path: Path) -> Iterator[Gathering]:
    before = open_files()
    gathering = Gathering(tmp_path / "file")
    yield gathering
    gathering.settle()
    gathering.ring.close()
    gathering.ahead.close()
    os.close(gathering.fd)
    assert open_files() == before


def test_every_second_read(gathering: Gathering) -> None:
    gathering.note(2, 4, 6, 8)
    assert not gathering.wants()
    gathering.note(10)
    assert gathering.wants()
    gathering.fill()
    assert not gathering.wants()
    assert gathering.asked == [12 * SIZE, 14 * SIZE]
    assert not gathering.take(11)
    assert not gathering.take(12, SIZE - 1)
    assert gathering.gives(12)
    assert not gathering.take(12), "once"
    gathering.note(12)
    assert gathering.wants()
    gathering.fill()
    assert gathering.asked[2:] == [16 * SIZE], "14 is there, and nothing is behind the end"
    assert gathering.gives(14)
    gathering.note(14)
    gathering.fill()
    assert not gathering.take(16)


@pytest.mark.parametrize(
    "offsets",
    [
        [1, 2, 4, 6, 8, 9],  # not in turn
        [12, 10, 8, 6, 4, 2, 0],  # backwards
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1.5, 2, 2.5, 3, 3.5],  # one in another
    ],
)
def test_who_is_not_expected(gathering: Gathering, offsets: list[float]) -> None:
    for offset in offsets:
        gathering.note(offset)
    assert not gathering.wants()


def test_small_reads(gathering: Gathering) -> None:
    for number in range(10):
        gathering.ahead.note(2 * number * (SIZE - 4096), SIZE - 4096)
    assert not gathering.wants()


def test_what_was_not_asked_for(gathering: Gathering) -> None:
    gathering.note(0, 1, 2, 3, 4, 5)
    gathering.fill()
    gathering.note(9)
    assert not gathering.take(6)
    assert not gathering.take(7)
    gathering.note(0, 1, 2, 3, 4, 5)
    gathering.fill()
    gathering.note(6)  # which was answered in another way
    gathering.fill()
    assert not gathering.take(6)
    assert gathering.gives(7)
    assert gathering.gives(8)


def test_forgotten_while_it_is_gathered(gathering: Gathering) -> None:
    before = open_files()
    for _ in range(20):
        gathering.note(0, 1, 2, 3, 4, 5)
        gathering.ahead.fill(gathering.ranges)
        gathering.ahead.forget()
        assert not gathering.take(6)
        gathering.note(0, 1, 2, 3, 4, 5)
        gathering.ahead.fill(gathering.ranges)  # where there is room
        gathering.settle()
        gathering.ahead.forget()
        gathering.settle()
        assert not gathering.take(6)
        assert open_files() == before


def test_a_file_that_ends_before(gathering: Gathering) -> None:
    gathering.note(0, 1, 2, 3, 4, 5)
    bad = [(gathering.fd, 0, 5000), (gathering.fd, len(DATA) - 10, SIZE - 5000)]
    gathering.fill(lambda offset, size: bad)
    assert not gathering.take(6)
    assert not gathering.take(7)
    bad.reverse()
    gathering.note(6)
    gathering.fill(lambda offset, size: bad)
    assert not gathering.take(7)
    gathering.note(7)
    gathering.fill()
    assert gathering.gives(8)


def test_what_cannot_be_moved(gathering: Gathering) -> None:
    gathering.note(0, 1, 2, 3, 4, 5)
    gathering.fill()
    assert not gathering.ahead.take(6 * SIZE, SIZE, lambda output: not os.read(output, 1))
    assert not gathering.take(6)
    gathering.note(6)
    gathering.fill()
    assert gathering.gives(7)
    assert gathering.gives(8)


def test_no_pipe(gathering: Gathering, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_many() -> None:
        raise OSError(errno.EMFILE, "too many open files")

    gathering.note(0, 1, 2, 3, 4, 5)
    for refuse in (too_many, lambda: None):
        monkeypatch.setattr(replies_ahead, "open_pipe", refuse)
        gathering.fill()
        assert not gathering.asked
        assert not gathering.take(6)
        monkeypatch.undo()
    gathering.fill()
    assert gathering.gives(6)

    gathering.ahead.forget()
    monkeypatch.setattr(replies_ahead, "open_pipe", too_many)
    for _ in range(20):
        gathering.fill()
    monkeypatch.setattr(replies_ahead, "open_pipe", fail)
    gathering.fill()  # it has given up


def test_a_ring_that_is_broken(gathering: Gathering, monkeypatch: pytest.MonkeyPatch) -> None:
    gathering.note(0, 1, 2, 3, 4, 5)
    monkeypatch.setattr(gathering.ring, "_call", lambda *_: -1)
    gathering.fill()
    monkeypatch.undo()
    gathering.fill()
    assert not gathering.take(6)


def test_what_was_taken_of_a_chain_meets_no_other_pipe(
    gathering: Gathering, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = gathering.ring._call

    def enter(number: int, fd: int, count: int, *rest: object) -> object:
        return call(number, fd, count - 1, *rest)

    gathering.note(0, 1, 2, 3, 4, 5)
    before = open_files()
    monkeypatch.setattr(gathering.ring, "_call", enter)
    gathering.ahead.fill(gathering.ranges)
    gathering.ahead.forget()
    assert gathering.ring.is_broken
    assert len(open_files() - before) == 2, "the pipe whose number the kernel may yet look up"
    assert not gathering.take(6)


def test_what_lies_there_for_long(gathering: Gathering, monkeypatch: pytest.MonkeyPatch) -> None:
    gathering.note(0, 1, 2, 3, 4, 5)
    gathering.fill()
    monkeypatch.setattr(replies_ahead, "_FRESH", 0.0)
    assert not gathering.take(6)
    monkeypatch.undo()
    assert gathering.gives(7)
    assert not gathering.take(6), "it is gone"


def test_a_pipe_stays_open_while_it_is_filled(gathering: Gathering) -> None:
    gathering.note(0, 1, 2, 3, 4, 5)
    gathering.ahead.fill(gathering.ranges)
    ends = [place.ends for place in gathering.ahead._places]
    gathering.ahead.forget()
    assert [place.ends for place in gathering.ahead._places] == ends
    assert None not in ends
    gathering.settle()
    assert [place.ends for place in gathering.ahead._places] == [None, None]


def test_nothing_is_sent_behind_what_waits(
    gathering: Gathering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread of the kernel does all: a reply would wait with it."""
    ring = ReplyRing(gathering.fd, failed=print, not_sent=fail)
    try:
        for number in range(6):
            ring.ahead.note(number * SIZE, SIZE)
        # Of the second one nobody knows where it is.
        ring.ahead.fill(lambda *read: gathering.ranges(*read) if read[0] == 6 * SIZE else None)
        assert len(ring.under_way) == 1
        for limit, may in ((1000.0, True), (-1.0, False)):
            monkeypatch.setattr(replies_ahead, "_LATE", limit)
            assert ring.may_send() is may
        assert not ring.is_busy
        # Nor is more gathered behind it, and what is there does not say that all is well.
        asked = len(gathering.asked)
        ring.ahead.note(6 * SIZE, SIZE)
        ring.ahead.fill(gathering.ranges)
        assert len(gathering.asked) == asked
        monkeypatch.setattr(reply_ring, "_SLOW", -1.0)
        slow = []

        def is_done() -> bool:
            slow.append(ring.reap())
            return not ring.under_way

        wait_until(is_done)
        assert any(slow), "which is told"
        assert ring.may_send()
    finally:
        ring.close()


def test_a_reply_from_another_pipe() -> None:
    here, there = socket.socketpair()
    with here, there:
        pipe = ReplyPipe(here.fileno(), fail)
        output, into = os.pipe2(os.O_NONBLOCK)
        os.write(into, b"data")
        for size in (5, 4):  # less than was said, and then nothing
            assert not pipe.fill_from(b"header", output, size)
        os.write(into, b"other data")
        assert pipe.fill_from(b"header", output, 10)
        pipe.send()
        assert there.recv(100) == b"headerother data"
        pipe.close()
        os.close(output)
        os.close(into)


async def test_what_is_likely_to_be_in_the_page_cache(tmp_path: Path) -> None:
    top = qemu.create(tmp_path / "top.qcow2", 4 * MIB, writes=["write -P 1 0 4M"])
    over = qemu.create(tmp_path / "over.qcow2", backing=top.name, writes=["write -P 2 1M 64k"])
    os.sync()
    async with await open_image(over, gate=PermissiveImplicitOpenGate()) as access:
        await access.read(bytearray(4 * MIB), 0)
        ranges = access.file_ranges(MIB - 64 * KIB, 128 * KIB)
        assert ranges is not None and len(ranges) == 2
        assert access.likely_ranges(MIB - 64 * KIB, 128 * KIB) == ranges
        drop_pages(top)  # which has the first of the two
        assert access.cached_ranges(MIB - 64 * KIB, 128 * KIB) is None
        assert access.likely_ranges(MIB - 64 * KIB, 128 * KIB) == ranges
        assert access.likely_ranges(0, MIB) is None
        drop_pages(over)
        assert access.likely_ranges(MIB - 64 * KIB, 128 * KIB) is None
        assert access.file_ranges(MIB - 64 * KIB, 128 * KIB) == ranges


# --- mounts ---------------------------------------------------------------------------------------


def pipes(mounted: Mounted) -> int:
    """Ends of pipes that the daemon has."""
    number = 0
    for fd in Path(f"/proc/{mounted.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since
            number += os.readlink(fd).startswith("pipe:")
    return number


class Reader:
    """Reads a mounted file over and over, 1 MiB at a time, and compares."""

    def __init__(self, mounted: Mounted, expected: bytes, order: Callable[[int], int]) -> None:
        self.wrong: list[int] = []
        self.ends = False
        fd = os.open(mounted.file, os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, MIB)
        pieces = len(expected) // MIB

        def read() -> None:
            turn = 0
            while not self.ends:
                offset = order(turn) % pieces * MIB
                length = os.preadv(fd, [buffer], offset)
                if length != MIB or buffer[:] != expected[offset : offset + MIB]:
                    self.wrong.append(offset)
                turn += 1
            os.close(fd)

        self._thread = threading.Thread(target=read)
        self._thread.start()

    def stop(self) -> None:
        self.ends = True
        self._thread.join()
        assert not self.wrong


_READER = """
import mmap, os, random, sys
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, 1 << 20)
offsets = [number << 20 for number in range(64)]
while True:
    if sys.argv[2] == "anyhow":
        random.shuffle(offsets)
    for offset in offsets:
        os.preadv(fd, [buffer], offset)
"""


@contextmanager
def reader_of(mounted: Mounted, order: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", _READER, str(mounted.file), order]) as reader:
        try:
            yield reader
        finally:
            reader.kill()


def test_pipes_while_somebody_reads_in_order(mount: MountImage, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(DATA * (64 * MIB // len(DATA)))
    mounted = mount(image)
    with reader_of(mounted, "anyhow"):
        time.sleep(1)
    before = pipes(mounted)
    with reader_of(mounted, "in order") as reader:
        for _ in range(4):
            wait_until(lambda: pipes(mounted) > before)
            assert kernel_threads(mounted) <= 1
            # Nothing is kept for who may not come.
            reader.send_signal(signal.SIGSTOP)
            wait_until(lambda: pipes(mounted) <= before)
            reader.send_signal(signal.SIGCONT)
    figures = json.loads(os.getxattr(mounted.file, "user.imagofs.stats"))
    # To copy 512 KiB takes 30 us at least, and nobody waits for long.
    assert 20e-6 < figures["latency_p50"] < 2e-3
    mounted.umount()


def test_a_chain_whose_pages_are_dropped(mount: MountImage, tmp_path: Path) -> None:
    order = random.Random(9)
    top, expected = make_chain(tmp_path, size=16 * MIB, seed=9)
    # Without holes: a range of zeroes is in no file.
    flat = tmp_path / "flat.qcow2"
    qemu.qemu_img("convert", "-O", "qcow2", "-S", "0", top, flat)
    for image in (top, flat):
        mounted = mount(image)
        readers = [Reader(mounted, expected, lambda turn: turn) for _ in range(2)]
        for _ in range(60):
            time.sleep(0.03)
            for file in tmp_path.glob("*.qcow2"):
                if not order.randrange(4):
                    drop_pages(file)
        for reader in readers:
            reader.stop()
        mounted.umount()


def test_a_file_that_is_cut_short_amid_reads(mount: MountImage, raw_image: Path) -> None:
    data = raw_image.read_bytes()
    mounted = mount(raw_image)
    reader = Reader(mounted, data[: 4 * MIB], lambda turn: turn)
    time.sleep(0.2)
    os.truncate(raw_image, 4 * MIB)
    time.sleep(0.2)
    reader.stop()
    with pytest.raises(OSError, match="Input/output error"):
        read_direct(mounted, 4 * MIB, MIB)
    mounted.umount()
