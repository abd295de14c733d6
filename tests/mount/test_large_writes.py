"""Large WRITEs: the second thread does one while the next is received."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from imagofs.fuse import channel, protocol
from tests import qemu
from tests.mount.kernel import KIB, MIB, Kernel
from tests.mount.mounting import MountImage

READ, WRITE = protocol.READ, protocol.WRITE


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    monkeypatch.setattr(channel, "_LARGE_WRITE_BYTES", Kernel.LENGTH)
    path = tmp_path / "file"
    path.write_bytes(b"x")
    fd = os.open(path, os.O_RDONLY)
    with Kernel(fd, writable=True) as kernel:
        yield kernel
    os.close(fd)


def written(unique: int) -> bytes:
    return protocol.written_reply(unique, Kernel.LENGTH)


def test_a_write_that_nothing_follows(kernel: Kernel) -> None:
    kernel.send(2, WRITE)
    kernel.channel._drain()
    kernel.receive()
    assert kernel.second.times == 0
    assert kernel.seen == [b"changed", written(2)]


def test_a_write_that_another_follows(kernel: Kernel) -> None:
    kernel.send(2, WRITE)
    kernel.send(4, WRITE)
    kernel.channel._drain()
    kernel.receive()
    assert kernel.second.times == 1
    # The first one waits in vain for the second thread.
    assert kernel.seen == [b"changed", written(2), b"changed", written(4)]
    assert kernel.channel.statistics.writes == 2
    assert kernel.channel.statistics.write_bytes == 2 * Kernel.LENGTH


def test_when_a_burst_ends_all_is_written(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_BUDGET", 1)
    kernel.send(2, WRITE)
    kernel.send(4, WRITE)
    assert kernel.channel._drain() == channel._MORE
    kernel.receive()
    assert kernel.second.times == 1
    assert kernel.seen == [b"changed", written(2)]


def test_a_write_that_has_to_wait(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its buffer, and others are received into another."""
    tasks: list[Any] = []
    monkeypatch.setattr(
        kernel.channel._waiting, "_start", lambda *arguments: tasks.append(arguments)
    )
    kernel.write = lambda *_: False
    kernel.send(2, WRITE)
    kernel.send(4, WRITE)
    kernel.channel._drain()
    kernel.receive()
    assert kernel.seen == []
    assert sorted(task[0] for task in tasks) == [2, 4]
    buffers = {id(task[6]) for task in tasks if task[6] is not None}
    assert id(kernel.channel._request) not in buffers
    assert len({id(task[4].obj) for task in tasks}) == 2


def test_a_write_that_fails(kernel: Kernel) -> None:
    def write(*_: object) -> bool:
        raise OSError(errno.ENOSPC, "no room")

    kernel.write = write
    kernel.send(2, WRITE)
    kernel.send(4, WRITE)
    kernel.channel._drain()
    kernel.receive()
    expected = [protocol.error_reply(unique, errno.ENOSPC) for unique in (4, 2)]
    assert len(kernel.seen) == 2
    assert {reply[8:16] for reply in kernel.seen} == {reply[8:16] for reply in expected}
    assert all(int.from_bytes(reply[4:8], "little", signed=True) < 0 for reply in kernel.seen)


def test_reads_in_between(kernel: Kernel) -> None:
    for unique, opcode in ((2, WRITE), (4, READ), (6, WRITE), (8, READ)):
        kernel.send(unique, opcode)
    kernel.channel._drain()
    kernel.receive()
    assert kernel.seen.count(b"changed") == 2
    replies = [message for message in kernel.seen if message != b"changed"]
    assert sorted(replies) == sorted([written(2), kernel.reply(4), written(6), kernel.reply(8)])
    # What was read is sent before it is changed by what came behind it.
    assert kernel.seen.index(kernel.reply(4)) < kernel.seen.index(written(6))


# --- mounts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_what_was_written_is_there(mount: MountImage, tmp_path: Path, image_format: str) -> None:
    size = 48 * MIB
    image = tmp_path / f"disk.{image_format}"
    qemu.qemu_img("create", "-f", image_format, image, str(size))
    mounted = mount(image, f"rw,format={image_format}")
    lanes = 4
    lane_size = size // lanes
    expected = bytearray(size)

    def write(lane: int) -> None:
        """Some of it is new, some is written over."""
        order = random.Random(lane)
        fd = os.open(mounted.file, os.O_RDWR | os.O_DIRECT)
        buffer = mmap.mmap(-1, 2 * MIB)
        for number in range(60):
            length = order.choice([4 * KIB, 256 * KIB, 512 * KIB, MIB, 2 * MIB])
            offset = lane * lane_size + order.randrange(0, lane_size - length + 1, 4096)
            data = bytes([lane * 60 + number]) * length
            buffer[:length] = data
            assert os.pwritev(fd, [memoryview(buffer)[:length]], offset) == length
            expected[offset : offset + length] = data
            if number % 20 == 19:
                os.fsync(fd)
            if number % 5 == 4:
                assert os.preadv(fd, [memoryview(buffer)[:length]], offset) == length
                assert buffer[:length] == data
        os.close(fd)

    with ThreadPoolExecutor(lanes) as writers:
        list(writers.map(write, range(lanes)))
    assert mounted.file.read_bytes() == expected
    mounted.umount()
    if image_format == "qcow2":
        qemu.check(image)
    assert qemu.contents(image, image_format) == expected
