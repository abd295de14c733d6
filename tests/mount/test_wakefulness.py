"""Keeping idle processors awake: when it is asked for, when not, and that it always ends."""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
import trio
import trio.testing

from imagofs.errors import StorageError
from imagofs.fuse import channel, wakefulness
from imagofs.fuse.protocol import READ
from imagofs.fuse.wakefulness import DEVICE, Wakefulness, open_wakefulness
from tests.conftest import NewImage
from tests.mount.kernel import Kernel
from tests.mount.mounting import Mounted, MountImage, imagofs, wait_until

NUMBER = 32  # requests of a span
NONE, ANY = bytes(4), b"\xff" * 4
SLOW, FAST = 40_000, 20_000  # nanoseconds for a request


class Readers:
    """What the channel tells of its readers, and what is asked of the kernel for it."""

    def __init__(self, device: int, written: int) -> None:
        self.wakefulness = Wakefulness(device)
        self.device = device
        self._written = written
        self._now = 0

    def asked(self) -> list[bytes]:
        """What was written to the device since the last call."""
        os.set_blocking(self._written, False)
        try:
            data = os.read(self._written, 1 << 16)
        except BlockingIOError:
            return []
        if not data:
            return [b""]  # closed
        return [data[start : start + 4] for start in range(0, len(data), 4)]

    def is_held(self) -> bool:
        return self.wakefulness.is_held

    def read(self, spans: int, *, each: int = SLOW, alone: int = NUMBER) -> None:
        """So many spans pass, of requests that take `each` nanoseconds."""
        for _ in range(spans):
            self._now += each * NUMBER
            self.wakefulness.span(self._now, NUMBER, alone)

    def read_until_tried(self) -> int:
        """Read until it is tried out; how many spans that took."""
        spans = 0
        while not self.is_held():
            self.read(1)
            spans += 1
            assert spans < 100_000
        return spans


@pytest.fixture
def readers() -> Iterator[Readers]:
    written, device = os.pipe()
    found = Readers(device, written)
    yield found
    found.wakefulness.close()
    os.close(written)


def test_is_kept_while_it_gains_something(readers: Readers) -> None:
    assert readers.read_until_tried() == 16
    assert readers.asked() == [NONE]
    readers.read(5 * 16, each=FAST)
    assert readers.is_held() and readers.asked() == []


def test_is_given_up_if_it_gains_nothing(readers: Readers) -> None:
    readers.read_until_tried()
    readers.read(16, each=SLOW * 9 // 10)
    assert not readers.is_held() and readers.asked() == [NONE, ANY]


def test_each_vain_trial_is_followed_by_a_longer_rest(readers: Readers) -> None:
    rests = []
    for _ in range(12):
        rests.append(readers.read_until_tried())
        readers.read(16)
    assert rests[1:5] == [80, 144, 272, 528] and max(rests) == rests[-1] == 16 * 129
    readers.read_until_tried()
    readers.read(16, each=FAST)  # now it gains something
    readers.wakefulness.let_go()
    readers.read_until_tried()
    readers.read(16)
    assert readers.read_until_tried() == 80


def test_what_becomes_slower_is_tried_at_once(readers: Readers) -> None:
    for _ in range(6):
        readers.read_until_tried()
        readers.read(16)
    readers.read(32)
    assert not readers.is_held()
    readers.read(16, each=SLOW * 3 // 2)
    assert readers.is_held()
    readers.read(16, each=SLOW)
    assert readers.is_held()


def test_one_long_wait_does_not_decide(readers: Readers) -> None:
    readers.read_until_tried()
    readers.read(8, each=FAST)
    readers.read(1, each=140_000)
    readers.read(6, each=FAST)
    readers.read(1, each=140_000)
    readers.read(32, each=FAST)
    assert readers.is_held()


def test_a_pause_does_not_count(readers: Readers) -> None:
    readers.read(8)
    readers.read(1, each=10_000_000)
    assert readers.read_until_tried() == 8


def test_is_not_asked_for_where_requests_are_queuing(readers: Readers) -> None:
    readers.read(1000, alone=NUMBER // 2)
    assert readers.asked() == []


def test_is_not_asked_for_where_a_request_takes_long(readers: Readers) -> None:
    readers.read(1000, each=200_000)
    assert readers.asked() == []


@pytest.mark.parametrize(("each", "alone"), [(FAST, 3), (200_000, NUMBER)], ids=["queue", "slow"])
def test_ends_with_what_it_was_asked_for(readers: Readers, each: int, alone: int) -> None:
    readers.read_until_tried()
    readers.read(100, each=FAST)
    readers.read(1, each=each, alone=alone)
    assert not readers.is_held() and readers.asked() == [NONE, ANY]


def kept(readers: Readers) -> int:
    """How many rounds it is kept once it was tried with success."""
    readers.read(16, each=FAST)
    rounds = 0
    while readers.is_held():
        readers.read(16, each=FAST)
        rounds += 1
    return rounds - 1


def test_is_tried_anew_after_a_while(readers: Readers) -> None:
    for rounds in (4, 16, 64, 256, 1024, 1024):
        assert readers.read_until_tried() == 16
        assert kept(readers) == rounds
    assert readers.asked() == [NONE, ANY] * 6
    readers.read_until_tried()
    readers.read(16)  # in vain
    readers.read_until_tried()
    assert kept(readers) == 4


def test_a_trial_that_is_cut_short_was_in_vain(readers: Readers) -> None:
    readers.read_until_tried()
    readers.read(15, each=FAST)
    readers.wakefulness.let_go()
    readers.wakefulness.let_go()
    assert readers.read_until_tried() == 80
    readers.wakefulness.let_go()
    assert readers.read_until_tried() == 144


def test_is_asked_for_again_after_a_pause(readers: Readers) -> None:
    readers.read_until_tried()
    readers.read(16, each=FAST)
    readers.wakefulness.let_go()
    readers.wakefulness.let_go()
    assert readers.asked() == [NONE, ANY]
    assert readers.read_until_tried() == 16


def test_seconds_are_counted(readers: Readers) -> None:
    assert readers.wakefulness.seconds == 0
    readers.read_until_tried()
    time.sleep(0.02)
    assert 0.02 <= readers.wakefulness.seconds < 5
    readers.wakefulness.let_go()
    passed = readers.wakefulness.seconds
    time.sleep(0.02)
    assert readers.wakefulness.seconds == passed


def refuse(number: int) -> Callable[[int, bytes], int]:
    """An os.write that refuses what asks for the longest time `number`."""
    write = os.write

    def write_or_refuse(fd: int, data: bytes) -> int:
        if data == number.to_bytes(4, "little", signed=True):
            raise PermissionError(errno.EPERM, "no")
        return write(fd, data)

    return write_or_refuse


@pytest.mark.parametrize("number", [0, -1])
def test_a_kernel_that_refuses_is_left_alone(
    readers: Readers, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse(number))
        readers.read(16)
        assert readers.is_held() is (number == -1)
        readers.read(16)
        assert not readers.is_held()
    assert readers.asked() == ([NONE] if number else [b""])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(readers.device)  # closed: what was asked for is withdrawn
    readers.read(10_000)
    assert not readers.is_held()


def test_closing(readers: Readers) -> None:
    readers.read_until_tried()
    readers.wakefulness.close()
    assert readers.asked() == [NONE, ANY]
    assert readers.asked() == [b""], "still open"
    readers.wakefulness.close()
    readers.read(100)
    assert not readers.is_held()


# --- whether it is wanted -------------------------------------------------------------------------


def test_few_processors_or_a_clear_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakefulness, "DEVICE", os.devnull)
    for processors, wanted, expected in [
        (4, "auto", True),
        (5, "auto", False),
        (64, True, True),
        (2, False, False),
    ]:
        monkeypatch.setattr(os, "cpu_count", lambda number=processors: number)
        found = open_wakefulness(wanted)  # type: ignore[arg-type]
        assert (found is not None) is expected
        if found:
            found.close()


def test_a_machine_without_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakefulness, "DEVICE", "/dev/none")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert open_wakefulness("auto") is None
    with pytest.raises(
        StorageError, match=r"^/dev/none: cannot keep processors awake: No such file"
    ):
        open_wakefulness(True)


def test_not_without_the_channel(new_image: NewImage, tmp_path: Path) -> None:
    image = new_image("1M", "disk.qcow2")
    words = (image, tmp_path, "-o", "awake=on,channel=off")
    done = imagofs(*words, ok=2)
    assert "options 'awake=on' and 'channel=off' do not go together" in done.stderr


# --- what the channel tells of its readers --------------------------------------------------------


class Recorder:
    """In the place of `Wakefulness`: writes down what it is told."""

    is_held = True

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []
        self.let_go = Mock()

    def span(self, now: int, requests: int, alone: int) -> None:
        assert now > 0
        self.spans.append((requests, alone))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def kernel(recorder: Recorder, tmp_path: Path) -> Iterator[Kernel]:
    path = tmp_path / "file"
    path.write_bytes(b"data")
    file = os.open(path, os.O_RDONLY)
    with Kernel(file, writable=False, wakefulness=recorder) as found:
        access: Any = found.channel._disk.access
        access.read_nowait = lambda *_: True
        yield found
    os.close(file)


def serve(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, *, together: int) -> None:
    """Send 96 small READs, so many at a time, each time that the channel waits for one."""
    numbers = iter(range(1, 97))

    def sleep() -> bool:
        following = [*islice(numbers, together)]
        for number in following:
            kernel.send(2 * number, READ, 1)
        return bool(following)

    monkeypatch.setattr(kernel.channel, "_sleep", sleep)
    while kernel.channel._drain() == channel._MORE:
        kernel.receive()


@pytest.mark.parametrize("spin", [0, 40])
def test_requests_that_come_alone(
    kernel: Kernel, recorder: Recorder, spin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.channel._spin = spin
    kernel.channel._owes_sample = True  # another request is timed, too
    serve(kernel, monkeypatch, together=1)
    assert recorder.spans[1:] == [(NUMBER, NUMBER)] * 2


@pytest.mark.parametrize("together", [2, 32])
def test_requests_that_queue(
    kernel: Kernel, recorder: Recorder, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(kernel, monkeypatch, together=together)
    assert recorder.spans[1:] == [(NUMBER, NUMBER // together)] * 2


def test_requests_that_come_while_it_looks(kernel: Kernel, recorder: Recorder) -> None:
    looks = count()

    kernel.channel._spin = 1 << 30
    with pytest.MonkeyPatch.context() as patch:
        readv = os.readv

        def read(fd: int, into: list[memoryview]) -> int:
            number = next(looks)
            if number < 192 and number % 2:
                kernel.send(number + 1, READ, 1)
            elif number == 192:
                kernel.channel._spin = 0
            return readv(fd, into)

        patch.setattr(os, "readv", read)
        patch.setattr(kernel.channel, "_sleep", lambda: False)
        while kernel.channel._drain() == channel._MORE:
            kernel.receive()
    assert recorder.spans[1:] == [(NUMBER, NUMBER)] * 2


def test_a_channel_that_is_full_lets_go(
    kernel: Kernel, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter([channel._FULL, channel._GONE])
    monkeypatch.setattr(kernel.channel, "_drain", lambda: next(outcomes))
    monkeypatch.setattr(kernel.channel._waiting, "one_less", AsyncMock())
    trio.run(kernel.channel._answer)
    assert recorder.let_go.call_count == 1


@pytest.mark.parametrize("comes", [True, False], ids=["at once", "later"])
async def test_lets_go_when_nothing_comes_for_a_moment(
    kernel: Kernel, recorder: Recorder, comes: bool
) -> None:
    async with trio.open_nursery() as nursery:
        if comes:
            kernel.send(2, READ, 1)
        nursery.start_soon(kernel.channel._readable)
        await trio.sleep(0.1)
        assert recorder.let_go.called is not comes
        kernel.send(4, READ, 1)


async def test_lets_go_when_it_ends(kernel: Kernel, recorder: Recorder) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kernel.channel.serve)
        await trio.testing.wait_all_tasks_blocked()
        kernel.channel.stop()
        recorder.let_go.reset_mock()
    assert recorder.let_go.called


# --- with the kernel ------------------------------------------------------------------------------

needs_device = pytest.mark.skipif(
    not os.access(DEVICE, os.R_OK | os.W_OK), reason=f"{DEVICE} is not there, or not for this user"
)


def longest_allowed() -> int:
    """Of all that is asked for on this machine: how long waking may take (microseconds)."""
    with open(DEVICE, "rb", buffering=0) as device:
        return int.from_bytes(device.read(4), "little")


class Reader(threading.Thread):
    """Reads a file in small pieces, one at a time, until it is stopped."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self._end = False
        self._began, self._reads = time.monotonic(), 0
        self.start()

    def run(self) -> None:
        buffer = mmap.mmap(-1, 4096)
        while not self._end:
            for offset in range(0, 1 << 20, 4096):
                try:
                    self._reads += os.preadv(self._fd, [buffer], offset) > 0
                except OSError:  # the mount has ended
                    self._end = True
                    break

    def per_second(self) -> float:
        return self._reads / (time.monotonic() - self._began)

    def stop(self) -> None:
        self._end = True
        self.join()
        os.close(self._fd)


def awake_seconds(mounted: Mounted) -> float:
    """For how long a mount has kept processors awake."""
    found: float = json.loads(os.getxattr(mounted.path, "user.imagofs.stats"))["awake_seconds"]
    return found


def has_asked(mounted: Mounted) -> bool:
    return awake_seconds(mounted) > 0 and longest_allowed() == 0


def wait_until_asked(mounted: Mounted, reader: Reader) -> None:
    try:
        wait_until(lambda: has_asked(mounted), seconds=60)
    except AssertionError:
        if (number := reader.per_second()) < 8000:
            pytest.skip(f"requests take too long here for it to be tried: {number:.0f} a second")
        raise


@pytest.fixture
def mounted(new_image: NewImage, mount: MountImage) -> Mounted:
    # Tests beside these may keep them awake, too, but not all the time.
    try:
        wait_until(lambda: longest_allowed() > 0)
    except AssertionError:
        pytest.skip("somebody else keeps the processors of this machine awake")
    return mount(new_image("1M", "disk.qcow2", writes=["write -P 7 0 1M"]), "awake=on")


@needs_device
def test_the_kernel_is_asked_while_somebody_reads(mounted: Mounted) -> None:
    reader = Reader(mounted.file)
    try:
        wait_until_asked(mounted, reader)
    finally:
        reader.stop()
    time.sleep(0.2)
    seconds = awake_seconds(mounted)
    assert f"processors:  kept awake for {seconds:.1f} s" in imagofs("stat", mounted.path).stdout
    assert awake_seconds(mounted) == seconds
    wait_until(lambda: longest_allowed() > 0)


@needs_device
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ends_with_the_daemon(mounted: Mounted, number: signal.Signals) -> None:
    reader = Reader(mounted.file)
    try:
        wait_until_asked(mounted, reader)
        mounted.signal(number)
        if number == signal.SIGKILL:
            wait_until(lambda: longest_allowed() > 0)
    finally:
        reader.stop()
    wait_until(lambda: not mounted.is_running())
    wait_until(lambda: longest_allowed() > 0)


@needs_device
def test_can_be_switched_off(new_image: NewImage, mount: MountImage) -> None:
    image = new_image("1M", "disk.qcow2", writes=["write -P 7 0 1M"])
    mounted = mount(image, "awake=off")
    reader = Reader(mounted.file)
    time.sleep(0.5)
    reader.stop()
    assert awake_seconds(mounted) == 0
    assert "processors" not in imagofs("stat", mounted.path).stdout
