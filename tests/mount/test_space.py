"""fallocate(2), copy_file_range(2), discards and truncation through a mount."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imagofs.access import FormatAccess
from imagofs.errors import StorageError
from imagofs.format.raw import Raw
from imagofs.fuse.disk import Disk
from imagofs.storage.memory import MemoryStorage
from tests import qemu
from tests.conftest import NewImage
from tests.mount.conftest import random_bytes
from tests.mount.mounting import Mounted, MountImage, imagofs, wait_until
from tests.support.storages import FaultyStorage

MIB = 1 << 20
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE, UNSHARE = 1, 2, 8, 16, 32, 64

_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2).

    Raises:
        OSError: It failed.
    """
    if _libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Filled:
    """A qcow2 of 16 MiB full of data, mounted writable."""

    def __init__(self, image: Path, mounted: Mounted, data: bytes) -> None:
        self.image, self.mounted = image, mounted
        self.expected = bytearray(data)
        self.fd = os.open(mounted.file, os.O_RDWR)

    def zero(self, offset: int, length: int) -> None:
        """Expect zeroes in a range."""
        self.expected[offset : offset + length] = bytes(length)

    def check(self) -> None:
        """Compare what is seen before and after the end of the mount."""
        assert os.pread(self.fd, len(self.expected), 0) == self.expected
        os.close(self.fd)
        self.mounted.umount()
        qemu.check(self.image)
        assert qemu.contents(self.image) == self.expected


@pytest.fixture
def filled(mount: MountImage, tmp_path: Path) -> Filled:
    data = random_bytes(16 * MIB)
    (tmp_path / "data").write_bytes(data)
    image = tmp_path / "disk.qcow2"
    qemu.qemu_img("convert", "-f", "raw", "-O", "qcow2", tmp_path / "data", image)
    return Filled(image, mount(image, "rw"), data)


def test_punch_hole(filled: Filled) -> None:
    before = filled.image.stat().st_blocks
    assert filled.mounted.file.stat().st_blocks <= 32768
    for offset, length in ((MIB, 8 * MIB), (10 * MIB + 5, 100), (11 * MIB - 700, 66_000)):
        fallocate(filled.fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
        filled.zero(offset, length)
    fallocate(filled.fd, PUNCH_HOLE | KEEP_SIZE, 16 * MIB - 100, 5000)  # past the end: clipped
    filled.zero(16 * MIB - 100, 100)
    fallocate(filled.fd, PUNCH_HOLE | KEEP_SIZE, 20 * MIB, 5000)
    os.fsync(filled.fd)
    assert filled.image.stat().st_blocks < before - 8 * MIB // 512 + 1000
    assert os.lseek(filled.fd, 0, os.SEEK_HOLE) == MIB
    filled.check()


def test_zero_range(filled: Filled) -> None:
    for mode in (ZERO_RANGE, ZERO_RANGE | KEEP_SIZE):
        for offset, length in ((MIB + 512 * mode, 3 * MIB), (9 * MIB + mode, 1000)):
            fallocate(filled.fd, mode, offset, length)
            filled.zero(offset, length)
    fallocate(filled.fd, ZERO_RANGE | KEEP_SIZE, 16 * MIB - 100, 5000)
    filled.zero(16 * MIB - 100, 100)
    assert os.fstat(filled.fd).st_size == 16 * MIB
    filled.check()


def test_preallocate_keeps_data(filled: Filled) -> None:
    fallocate(filled.fd, PUNCH_HOLE | KEEP_SIZE, 2 * MIB, 4 * MIB)
    filled.zero(2 * MIB, 4 * MIB)
    for mode in (0, KEEP_SIZE):
        fallocate(filled.fd, mode, MIB, 3 * MIB)
    assert os.lseek(filled.fd, 0, os.SEEK_HOLE) == 4 * MIB
    filled.check()


@pytest.mark.parametrize("mode", [COLLAPSE_RANGE, INSERT_RANGE, UNSHARE, PUNCH_HOLE])
def test_other_modes(filled: Filled, mode: int) -> None:
    with pytest.raises(OSError) as caught:
        fallocate(filled.fd, mode, MIB, MIB)
    assert caught.value.errno == errno.EOPNOTSUPP
    filled.check()


def test_space_past_the_end_cannot_be_kept(filled: Filled) -> None:
    with pytest.raises(OSError) as caught:
        fallocate(filled.fd, KEEP_SIZE, 16 * MIB, MIB)
    assert caught.value.errno == errno.EOPNOTSUPP
    filled.check()


def test_copy_file_range(filled: Filled) -> None:
    fallocate(filled.fd, PUNCH_HOLE | KEEP_SIZE, 2 * MIB, MIB)
    filled.zero(2 * MIB, MIB)
    source, target, length = MIB + 100, 9 * MIB + 7, 3 * MIB
    copied = 0
    while copied < length:
        part = os.copy_file_range(
            filled.fd, filled.fd, length - copied, source + copied, target + copied
        )
        assert part > 0
        copied += part
    filled.expected[target : target + length] = filled.expected[source : source + length]
    assert os.copy_file_range(filled.fd, filled.fd, MIB, 16 * MIB, 0) == 0
    # Clipped at the end, where a disk cannot take more.
    assert os.copy_file_range(filled.fd, filled.fd, 4096, 0, 16 * MIB - 100) == 100
    filled.expected[-100:] = filled.expected[:100]
    with pytest.raises(OSError) as caught:
        os.copy_file_range(filled.fd, filled.fd, 4096, 0, 16 * MIB)
    assert caught.value.errno == errno.ENOSPC
    filled.check()


async def test_what_was_copied_before_an_error_is_told() -> None:
    storage = FaultyStorage(MemoryStorage(bytes(MIB) + b"x" * 3 * MIB))
    async with FormatAccess(Raw(storage, writable=True)) as access:
        disk = Disk(access, writable=True)
        storage.kind, storage.nth, storage.forever = "write", 2, True
        assert await disk.copy(MIB, 0, 3 * MIB) == MIB
        with pytest.raises(StorageError):
            await disk.copy(2 * MIB, MIB, 2 * MIB)


def test_copied_holes_stay_holes(mount: MountImage, new_image: NewImage) -> None:
    image = new_image("64M", writes=["write -P 1 32M 4M"])
    mounted = mount(image, "rw")
    with mounted.file.open("r+b", buffering=0) as file:
        copied = os.copy_file_range(file.fileno(), file.fileno(), 16 * MIB, 0, 32 * MIB)
        assert copied == 16 * MIB
        assert file.read() == bytes(64 * MIB)
        with pytest.raises(OSError) as caught:
            os.lseek(file.fileno(), 0, os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO


def test_truncation(filled: Filled) -> None:
    """A disk does not shrink, and O_TRUNC leaves it alone as it does a block device."""
    path = filled.mounted.file
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    assert path.stat().st_size == 16 * MIB
    os.truncate(path, 0)
    os.ftruncate(filled.fd, 16 * MIB)
    for size in (8 * MIB, 1):
        with pytest.raises(OSError) as caught:
            os.truncate(path, size)
        assert caught.value.errno == errno.EPERM
    with pytest.raises(OSError) as caught:
        os.ftruncate(filled.fd, 0)
    assert caught.value.errno == errno.EPERM
    assert path.stat().st_size == 16 * MIB
    filled.check()


@pytest.mark.parametrize(("options", "answer"), [("", 0), ("direct_io", MIB), ("writeback", 0)])
def test_o_direct_across_the_end(
    mount: MountImage, tmp_path: Path, options: str, answer: int
) -> None:
    """What fits is written. The kernel would make EIO of it, so it gets ENOSPC where it would."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(3 * MIB))
    mounted = mount(image, f"rw,format=raw,{options}".rstrip(","))
    fd = os.open(mounted.file, os.O_RDWR | os.O_DIRECT)
    data = mmap.mmap(-1, 2 * MIB)
    data[:] = random_bytes(2 * MIB)
    if answer:
        assert os.pwrite(fd, data, 2 * MIB) == answer
    else:
        with pytest.raises(OSError) as caught:
            os.pwrite(fd, data, 2 * MIB)
        assert caught.value.errno == errno.ENOSPC
    os.close(fd)
    mounted.umount()
    assert image.read_bytes() == bytes(2 * MIB) + data[:MIB]


@pytest.mark.parametrize("channel", ["on", "off"])
def test_writeback_tells_what_it_lost(mount: MountImage, tmp_path: Path, channel: str) -> None:
    """The kernel takes what lies past the end; the page that it writes back begins before it."""
    image = tmp_path / "disk.raw"
    image.write_bytes(b"d" * 300_000)
    mounted = mount(image, f"rw,format=raw,writeback,channel={channel}")
    fd = os.open(mounted.file, os.O_WRONLY | os.O_APPEND)
    assert os.write(fd, b"lost") == 4
    with pytest.raises(OSError) as caught:
        os.fsync(fd)
    assert caught.value.errno == errno.ENOSPC
    os.close(fd)
    mounted.umount()
    assert image.read_bytes() == b"d" * 300_000


def test_writes_past_the_end(filled: Filled) -> None:
    """As a block device: what fits is written, then there is no space left."""
    assert os.pwrite(filled.fd, b"x" * 1000, 16 * MIB - 10) == 10
    filled.expected[-10:] = b"x" * 10
    for offset in (16 * MIB, 17 * MIB):
        with pytest.raises(OSError) as caught:
            os.pwrite(filled.fd, b"x" * 10, offset)
        assert caught.value.errno == errno.ENOSPC
    assert os.fstat(filled.fd).st_size == 16 * MIB
    filled.check()


@contextmanager
def loop_device(file: Path, *options: str) -> Iterator[str]:
    """A loop device on `file`."""
    device = qemu.run("losetup", "-f", "--show", *options, file).strip()
    try:
        yield device
    finally:
        qemu.run("losetup", "-d", device)


def test_fstrim_returns_space(mount: MountImage, new_image: NewImage, tmp_path: Path) -> None:
    image = new_image("256M")
    mounted = mount(image, "rw")
    folder = tmp_path / "ext4"
    folder.mkdir()
    with loop_device(mounted.file) as device:
        qemu.run("mkfs.ext4", "-q", device)
        qemu.run("mount", device, folder)
        try:
            (folder / "large").write_bytes(random_bytes(64 * MIB))
            (folder / "kept").write_bytes(random_bytes(MIB, seed=2))
            os.sync()
            full = image.stat().st_blocks * 512
            (folder / "large").unlink()
            os.sync()  # ext4 gives no block back before its journal has it
            qemu.run("fstrim", folder)
            os.sync()
        finally:
            qemu.run("umount", folder)
        qemu.run("fsck.ext4", "-fn", device)
    # The device lets go of the file a moment after losetup has returned.
    wait_until(lambda: imagofs("umount", mounted.path, ok=None).returncode == 0)
    assert image.stat().st_blocks * 512 < full - 56 * MIB
    qemu.check(image)
