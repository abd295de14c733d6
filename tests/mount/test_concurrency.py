"""Many requests at once: nobody waits for who waits, nobody is forgotten, nothing deadlocks."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imagofs.fuse import unmounting
from tests import qemu
from tests.mount.conftest import random_bytes
from tests.mount.mounting import Mounted, MountImage, mount_at, wait_until

Both = Callable[..., Mounted]
MIB = 1 << 20


class Moody:
    """A mount on a storage with moods; see `special.py`."""

    def __init__(self, folder: Path, options: str) -> None:
        self.image = folder / "disk.img"
        self.data = bytearray(random_bytes(8 * MIB))
        self.image.write_bytes(self.data)
        self.point = folder / "point"
        self.point.touch()
        command = [sys.executable, "-m", "tests.mount.special"]
        command += [str(self.image), str(self.point), options]
        repository = Path(__file__).parents[2]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=repository)
        self.fd = -1
        # Without the channel the kernel lets one write at a time pass.
        self.writes_in_parallel = "channel=on" in options
        try:
            wait_until(lambda: mount_at(self.point) or self.process.poll() is not None)
            self.fd = os.open(self.point, os.O_RDWR)
        except BaseException:
            self.process.kill()
            print(self.end())
            raise

    def mood(self, name: str) -> Path:
        """Switch a mood on; unlink what is returned to switch it off."""
        path = Path(f"{self.image}.{name}")
        path.touch()
        return path

    def end(self) -> tuple[int, str]:
        """Unmount. Returns the daemon's exit code and what it logged."""
        if self.fd >= 0:
            try:
                os.close(self.fd)
            except OSError:
                pass
            self.fd = -1
        if mount_at(self.point) is not None:
            unmounting.detach(str(self.point))
        _, logged = self.process.communicate(timeout=20)
        return self.process.returncode, logged


@pytest.fixture(params=["channel=on", "channel=off"])
def moody(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Moody]:
    """A writable mount on a storage with moods, in both modes."""
    made = Moody(tmp_path, f"rw,format=raw,direct_io,{request.param}")
    yield made
    for name in ("hold", "fail", "bug"):
        Path(f"{made.image}.{name}").unlink(missing_ok=True)
    try:
        made.end()
    finally:
        made.process.kill()
        made.process.wait()


def test_slow_requests_hold_up_nobody(moody: Moody) -> None:
    hold = moody.mood("hold")
    with ThreadPoolExecutor(40) as pool:
        slow = [pool.submit(os.pread, moody.fd, 4096, n * 4096) for n in range(30)]
        slow_writes = [
            pool.submit(os.pwrite, moody.fd, bytes([n]) * size, 512 * 1024 + n * 65536)
            for n, size in enumerate((512, 4096, 65536, 65536))
        ]
        time.sleep(0.1)
        for n in range(200):
            offset = 3 * MIB + n * 8192
            assert os.pread(moody.fd, 4096, offset + 4096) == moody.data[offset + 4096 :][:4096]
            if moody.writes_in_parallel:
                assert os.pwrite(moody.fd, b"quick", offset) == 5
        os.stat(moody.point)
        os.statvfs(moody.point)
        assert not any(each.done() for each in slow + slow_writes)
        hold.unlink()
        for n, each in enumerate(slow):
            assert each.result(20) == moody.data[n * 4096 :][:4096]
        assert [each.result(20) for each in slow_writes] == [512, 4096, 65536, 65536]
    code, logged = moody.end()
    assert (code, "Traceback" in logged) == (0, False)
    written = moody.image.read_bytes()
    for n, size in enumerate((512, 4096, 65536, 65536)):
        assert written[512 * 1024 + n * 65536 :][:size] == bytes([n]) * size


def test_more_slow_writes_than_there_are_buffers(moody: Moody) -> None:
    """64 writes of 256 KiB wait: 16 MiB and more than the channel keeps; all arrive."""
    hold = moody.mood("hold")
    length = 256 << 10
    with ThreadPoolExecutor(64) as pool:
        writes = [
            pool.submit(os.pwrite, moody.fd, bytes([n]) * length, n % 4 * length) for n in range(64)
        ]
        time.sleep(0.3)
        hold.unlink()
        assert all(each.result(30) == length for each in writes)
    assert moody.end()[0] == 0
    written = moody.image.read_bytes()
    for part in range(4):
        block = written[part * length : (part + 1) * length]
        assert len(set(block)) == 1 and block[0] % 4 == part


def test_failures_are_answered_and_logged_once(moody: Moody) -> None:
    moody.mood("fail")
    moody.mood("bug")
    for offset in (MIB, MIB + 8192, 2 * MIB, 2 * MIB + 8192):
        with pytest.raises(OSError) as caught:
            os.pread(moody.fd, 512, offset)
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError) as caught:
            os.pwrite(moody.fd, b"x" * 512, offset)
        assert caught.value.errno == errno.EIO
    with pytest.raises(OSError) as caught:
        os.fsync(moody.fd)
    assert caught.value.errno == errno.EIO
    assert os.pread(moody.fd, 512, 4 * MIB) == moody.data[4 * MIB :][:512]
    code, logged = moody.end()
    # What was written is not known to be on the disk: the daemon says so, and how it ended.
    assert code == 1
    assert "may be lost" in logged and str(moody.image) in logged
    assert logged.count("a bad sector") == 1
    assert logged.count("LookupError: a bug") == 1
    assert "Traceback" not in logged


def test_fsync_waits(moody: Moody) -> None:
    hold = moody.mood("hold")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(os.fsync, moody.fd)
        time.sleep(0.1)
        assert not waiting.done()
        hold.unlink()
        waiting.result(20)


def test_killed_readers(moody: Moody) -> None:
    """Readers that are killed while they wait leave the mount as it was."""
    hold = moody.mood("hold")
    script = f"import os; os.pread(os.open({str(moody.point)!r}, os.O_RDONLY), 65536, 4096)"
    readers = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(5)]
    time.sleep(0.3)
    for reader in readers:
        reader.send_signal(signal.SIGUSR1)  # a signal that could be survived, then one that cannot
        reader.kill()
    assert os.pread(moody.fd, 512, 5 * MIB) == moody.data[5 * MIB :][:512]
    hold.unlink()
    for reader in readers:
        reader.wait(20)
    assert os.pread(moody.fd, 512, 4096) == moody.data[4096:][:512]
    assert moody.end()[0] == 0


def test_interrupted_read_is_not_cut_short(moody: Moody) -> None:
    """A disk's read is not ended by a signal whose handler returns."""
    seen = []
    previous = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        hold = moody.mood("hold")
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        threading.Timer(0.5, hold.unlink).start()
        assert os.pread(moody.fd, 8192, 0) == moody.data[:8192]
        assert seen
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_sigterm_waits_for_slow_writes(moody: Moody) -> None:
    hold = moody.mood("hold")
    with ThreadPoolExecutor(1) as pool:
        write = pool.submit(os.pwrite, moody.fd, b"late", 100)
        time.sleep(0.1)
        moody.process.send_signal(signal.SIGTERM)
        wait_until(lambda: mount_at(moody.point) is None)
        hold.unlink()
        assert write.result(20) == 4
    assert moody.end()[0] == 0
    assert moody.image.read_bytes()[100:104] == b"late"


def test_hundreds_of_attributes_at_once(both: Both, raw_image: Path) -> None:
    mounted = both(raw_image, "rw", "format=raw")
    barrier = threading.Barrier(150)

    def ask(number: int) -> int:
        barrier.wait()
        answers = 0
        for _ in range(4):
            answers += len(os.getxattr(mounted.file, "user.imagofs.format"))
            answers += os.statvfs(mounted.path).f_bsize
            answers += len(os.listdir(mounted.path))
        return answers

    with ThreadPoolExecutor(150) as pool:
        assert set(pool.map(ask, range(150))) == {4 * (3 + 4096 + 1)}
    assert mounted.file.read_bytes() == raw_image.read_bytes()


def test_readers_and_writers(both: Both, tmp_path: Path) -> None:
    """Eight threads with a part of the disk each, mirrored in memory."""
    image = tmp_path / "disk.img"
    part = MIB
    image.write_bytes(random_bytes(8 * part))
    mounted = both(image, "rw", "format=raw")
    fd = os.open(mounted.file, os.O_RDWR)

    def work(number: int) -> bytes:
        source = random.Random(number)
        base = number * part
        mirror = bytearray(os.pread(fd, part, base))
        for _ in range(300):
            length = min(source.choice((1, 512, 1000, 4096, 65536, 300_000)), part)
            offset = source.randrange(part - length + 1)
            if source.random() < 0.5:
                data = source.randbytes(length)
                assert os.pwrite(fd, data, base + offset) == length
                mirror[offset : offset + length] = data
            else:
                assert os.pread(fd, length, base + offset) == mirror[offset : offset + length]
        return bytes(mirror)

    with ThreadPoolExecutor(8) as pool:
        expected = b"".join(pool.map(work, range(8)))
    os.close(fd)
    mounted.umount()
    assert image.read_bytes() == expected


def test_mount_is_used_while_it_ends(mount: MountImage, raw_image: Path) -> None:
    """Readers go on while the mount is detached; each gets data or a clean error."""
    data = raw_image.read_bytes()
    mounted = mount(raw_image)
    stop = threading.Event()

    def read(number: int) -> int:
        source, count = random.Random(number), 0
        while not stop.is_set():
            offset = source.randrange(len(data) - 4096)
            try:
                with mounted.file.open("rb", buffering=0) as file:
                    assert os.pread(file.fileno(), 4096, offset) == data[offset : offset + 4096]
            except FileNotFoundError:
                return count
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read, number) for number in range(4)]
        time.sleep(0.3)
        mounted.signal(signal.SIGTERM)
        mounted.wait_for_end()
        stop.set()
        assert sum(reader.result(20) for reader in readers) > 4


@pytest.mark.parametrize("depth", [2, 5, 8, 32])
def test_each_of_many_reads_gets_its_own_data(
    mount: MountImage, tmp_path: Path, depth: int
) -> None:
    """Replies that are held back together each have their own data, large ones in between."""
    image = tmp_path / "disk.img"
    job = ["fio", "--name=job", "--verify=crc32c", "--verify_fatal=1", "--size=16M", "--bs=4k"]
    job += ["--verify_state_save=0", "--ioengine=libaio", f"--iodepth={depth}"]
    qemu.run(*job, f"--filename={image}", "--rw=write", "--do_verify=0")
    mounted = mount(image)
    mounted.file.read_bytes()
    job += [f"--filename={mounted.file}", "--direct=1", "--readonly"]
    qemu.run(*job, "--rw=randread", "--time_based", "--runtime=1")
    sizes = "--bssplit=4k/60:16k/20:64k/10:256k/10"
    qemu.run(*job, "--rw=randread", "--verify_interval=4k", sizes, "--time_based", "--runtime=1")
