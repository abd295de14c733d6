"""Writing through a mount: what close, fsync and the end promise, and what read-only refuses."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imagofs import FormatAccess, MemoryStorage, Raw, StorageError
from imagofs.fuse import client, unmounting
from imagofs.fuse.disk import Disk
from tests import qemu
from tests.conftest import NewImage
from tests.mount.conftest import random_bytes
from tests.mount.mounting import Mounted, MountImage, imagofs, mount_at, wait_until

Both = Callable[..., Mounted]
MIB = 1 << 20


@pytest.mark.parametrize("moment", ["close", "fsync", "last close of a copy"])
def test_promises(both: Both, new_image: NewImage, moment: str) -> None:
    """The image file is right and clean while the mount is still up."""
    image = new_image("64M", writes=["write -P 1 0 1M"])
    mounted = both(image, "rw")
    data = random_bytes(3 * MIB)
    fd = os.open(mounted.file, os.O_RDWR)
    assert os.pwrite(fd, data, MIB // 2 + 7) == len(data)
    if moment == "fsync":
        os.fsync(fd)
    elif moment == "last close of a copy":
        os.close(os.dup(fd))
    else:
        os.close(fd)
    qemu.check(image)
    found = qemu.contents(image)
    assert found[: MIB // 2 + 7] == b"\1" * (MIB // 2 + 7)
    assert found[MIB // 2 + 7 :][: len(data)] == data
    assert mounted.is_running()
    if moment != "close":
        os.close(fd)


def test_shared_mapping(both: Both, new_image: NewImage) -> None:
    """What a mapping changes after close(2) is in the image when the mount has ended."""
    image = new_image("16M")
    mounted = both(image, "rw")
    fd = os.open(mounted.file, os.O_RDWR)
    memory = mmap.mmap(fd, 16 * MIB)
    memory[MIB : MIB + 5] = b"early"
    memory.flush()
    os.close(fd)
    assert qemu.contents(image)[MIB : MIB + 5] == b"early"
    memory[2 * MIB : 2 * MIB + 4] = b"late"
    memory.close()
    mounted.umount()
    qemu.check(image)
    found = qemu.contents(image)
    assert (found[MIB : MIB + 5], found[2 * MIB : 2 * MIB + 4]) == (b"early", b"late")


@pytest.mark.parametrize("options", [(), ("direct_io",), ("writeback",)], ids="".join)
def test_ways_to_write(both: Both, raw_image: Path, options: tuple[str, ...]) -> None:
    """write, pwrite, writev, O_DIRECT, O_SYNC, O_APPEND, sendfile and dd."""
    expected = bytearray(raw_image.read_bytes())
    end = len(expected)
    mounted = both(raw_image, "rw", "format=raw", *options)

    def put(offset: int, data: bytes) -> None:
        expected[offset : offset + len(data)] = data

    with mounted.file.open("r+b", buffering=0) as file:
        file.write(b"first")
        put(0, b"first")
        os.pwritev(file.fileno(), [b"some ", b"parts"], 4090)
        put(4090, b"some parts")
    fd = os.open(mounted.file, os.O_RDWR | os.O_DIRECT | os.O_SYNC)
    block = mmap.mmap(-1, 2 * MIB)
    block[:] = random_bytes(2 * MIB, seed=3)
    assert os.pwrite(fd, block, MIB) == 2 * MIB
    put(MIB, block[:])
    assert os.preadv(fd, [block], MIB) == 2 * MIB
    assert block[:] == expected[MIB : 3 * MIB]
    os.close(fd)
    if "writeback" not in options:  # there the kernel finds out when it writes the page back
        fd = os.open(mounted.file, os.O_WRONLY | os.O_APPEND)
        with pytest.raises(OSError) as caught:
            os.write(fd, b"more")
        assert caught.value.errno == errno.ENOSPC
        os.close(fd)
    with raw_image.with_name("source").open("w+b") as source, mounted.file.open("r+b") as sink:
        source.write(random_bytes(MIB, seed=4))
        source.flush()
        sink.seek(5 * MIB)
        os.sendfile(sink.fileno(), source.fileno(), 0, MIB)
        put(5 * MIB, random_bytes(MIB, seed=4))
    command = ["dd", f"of={mounted.file}", "bs=1000", "seek=7000", "conv=notrunc,fsync"]
    subprocess.run(command, input=b"z" * 5500, check=True, capture_output=True)
    put(7_000_000, b"z" * 5500)
    assert mounted.file.read_bytes() == expected
    mounted.umount()
    assert raw_image.read_bytes() == expected
    assert len(expected) == end


def test_times(both: Both, raw_image: Path) -> None:
    os.utime(raw_image, ns=(10**18, 10**18))
    mounted = both(raw_image, "rw", "format=raw")
    assert mounted.file.stat().st_mtime_ns == 10**18
    with mounted.file.open("r+b") as file:
        file.write(b"new")
    assert time.time_ns() - mounted.file.stat().st_mtime_ns < 60 * 10**9
    os.utime(mounted.file, ns=(2 * 10**18, 3 * 10**18))
    assert mounted.file.stat().st_mtime_ns == 3 * 10**18
    with mounted.file.open("r+b") as file:
        file.write(b"newer")
    assert mounted.file.stat().st_mtime_ns != 3 * 10**18


def test_writeback_fsync(mount: MountImage, raw_image: Path) -> None:
    """Under writeback the kernel sets the times before it syncs."""
    mounted = mount(raw_image, "rw", "format=raw", "writeback")
    with mounted.file.open("r+b", buffering=0) as file:
        for round in range(20):
            file.write(bytes([round]) * 1000)
            os.fsync(file)
            assert raw_image.read_bytes()[round * 1000 :][:1000] == bytes([round]) * 1000


# --- read-only ----------------------------------------------------------------------------------


def test_read_only(both: Both, new_image: NewImage) -> None:
    image = new_image("1M", writes=["write -P 1 0 1M"])
    before = image.read_bytes()
    mounted = both(image)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
        with pytest.raises(OSError) as caught:
            os.open(mounted.file, flags)
        assert caught.value.errno == errno.EROFS
    attempts: list[Callable[[], object]] = [
        lambda: os.truncate(mounted.file, 0),
        lambda: os.utime(mounted.file),
        lambda: mounted.file.chmod(0o600),
    ]
    for attempt in attempts:
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EROFS
    # The image itself is open for reading only.
    ways = {
        int(Path(f"/proc/{mounted.pid}/fdinfo/{fd.name}").read_text().split()[3], 8)
        for fd in Path(f"/proc/{mounted.pid}/fd").iterdir()
        if os.readlink(fd) == str(image)
    }
    assert ways and all(way & os.O_ACCMODE == os.O_RDONLY for way in ways)
    mounted.umount()
    assert image.read_bytes() == before


def test_remount_does_not_get_past_read_only(both: Both, new_image: NewImage) -> None:
    """Remounting lifts the kernel's own refusal; the daemon's stays."""
    image = new_image("1M", writes=["write -P 1 0 1M"])
    before = image.read_bytes()
    mounted = both(image)
    client.remount(str(mounted.path), 0)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(mounted.file, os.O_RDONLY)
    attempts: list[Callable[[], object]] = [
        lambda: os.open(mounted.file, os.O_RDWR),
        lambda: os.truncate(mounted.file, 5),
        lambda: os.utime(mounted.file),
        lambda: os.setxattr(mounted.file, "user.x", b"y"),
    ]
    for attempt in attempts:
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno in (errno.EROFS, errno.EACCES)
    assert libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(4096))
    os.close(fd)
    mounted.umount()
    assert image.read_bytes() == before


# --- loads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["libaio", "mmap", "psync"])
def test_fio_verifies(both: Both, new_image: NewImage, engine: str) -> None:
    """fio writes at random, at some depth, in parts of the disk, and reads it all back."""
    image = new_image("64M", cluster_size=4096)
    mounted = both(image, "rw")
    command = [
        "fio", "--name=job", f"--filename={mounted.file}", "--rw=randwrite", "--bsrange=512-128k",
        "--bs_unaligned=0", f"--ioengine={engine}", "--iodepth=32", "--numjobs=4", "--size=16M",
        "--offset_increment=16M", "--verify=crc32c", "--verify_fatal=1", "--io_size=8M",
        "--group_reporting", "--randseed=7", "--fallocate=none", "--verify_state_save=0",
    ]  # fmt: skip
    if engine == "libaio":
        command += ["--direct=1", "--bsrange=4k-128k"]
    if engine == "mmap":  # fio maps every job's part at the file's beginning
        command += ["--bsrange=4k-128k", "--numjobs=1"]
    qemu.run(*command)
    mounted.umount()
    qemu.check(image)


def test_lost_data_are_told_to_who_unmounts(tmp_path: Path, raw_image: Path) -> None:
    """A sync fails at the end: `imagofs umount` and the daemon's exit code say so."""
    point = tmp_path / "point"
    point.touch()
    command = [sys.executable, "-m", "tests.mount.special", raw_image, point, "rw,format=raw"]
    repository = Path(__file__).parents[2]
    with subprocess.Popen(
        [str(word) for word in command], cwd=repository, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_until(lambda: mount_at(point) is not None)
            fd = os.open(point, os.O_RDWR)
            os.pwrite(fd, b"x" * 4096, 5 * MIB)
            os.close(fd)
            Path(f"{raw_image}.fail").touch()
            done = imagofs("umount", point, ok=1)
            assert "may be lost" in done.stderr and str(raw_image) in done.stderr
            assert done.stderr.count("\n") == 1
            _, logged = process.communicate(timeout=20)
            assert process.returncode == 1 and "may be lost" in logged
        finally:
            process.kill()
            if mount_at(point) is not None:
                unmounting.detach(str(point))


async def test_a_failing_flush_is_told_to_who_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    async def flush() -> None:
        raise StorageError("no room", error=errno.ENOSPC)

    async with FormatAccess(await Raw.open(MemoryStorage(4096), writable=True)) as access:
        disk = Disk(access, writable=True)
        reader, writer = disk.open(os.O_RDONLY), disk.open(os.O_RDWR)
        with monkeypatch.context() as patch:
            patch.setattr(access, "flush", flush)
            await disk.flush(reader)
            with pytest.raises(StorageError, match="no room"):
                await disk.flush(writer)
