"""open(2) with O_TRUNC leaves the disk alone, or is refused where the kernel would not."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess

import pytest

from tests import qemu
from tests.conftest import NewImage
from tests.mount.mounting import Mounted, MountImage

MIB = 1 << 20

channels = pytest.mark.parametrize("channel", ["on", "off"])
writebacks = pytest.mark.parametrize("writeback", [False, True], ids=["through", "writeback"])


def open_truncating(mounted: Mounted, *, refused: bool) -> int:
    """A descriptor for both; if O_TRUNC is refused, one that was opened without it."""
    if not refused:
        return os.open(mounted.file, os.O_RDWR | os.O_TRUNC)
    with pytest.raises(OSError) as caught:
        os.open(mounted.file, os.O_RDWR | os.O_TRUNC)
    assert caught.value.errno == errno.ETXTBSY
    return os.open(mounted.file, os.O_RDWR)


@channels
@writebacks
def test_what_is_written_next_changes_nothing_else(
    new_image: NewImage, mount: MountImage, channel: str, writeback: bool
) -> None:
    image = new_image("1M", writes=["write -P 65 0 1M"])
    mounted = mount(image, "rw", f"channel={channel}", *["writeback"] * writeback)
    expected = bytearray(b"A" * MIB)
    fd = open_truncating(mounted, refused=channel == "off" and writeback)
    assert os.pread(fd, 4, 0) == b"AAAA"
    for offset in (4196, 20_000):
        os.pwrite(fd, b"hello", offset)
        expected[offset : offset + 5] = b"hello"
    os.close(fd)
    mounted.umount()
    assert qemu.contents(image) == expected


@channels
@writebacks
def test_what_another_changed_through_a_mapping_stays(
    new_image: NewImage, mount: MountImage, channel: str, writeback: bool
) -> None:
    image = new_image("1M", writes=["write -P 65 0 1M"])
    mounted = mount(image, "rw", f"channel={channel}", *["writeback"] * writeback)
    with mounted.file.open("r+b") as file, mmap.mmap(file.fileno(), MIB) as mapping:
        mapping[:4096] = b"B" * 4096
        fd = open_truncating(mounted, refused=channel == "off")
        assert os.fstat(fd).st_size == MIB
        os.close(fd)
        mapping.flush()
    mounted.umount()
    assert qemu.contents(image)[:4097] == b"B" * 4096 + b"A"


@channels
def test_a_read_only_mount_that_the_kernel_takes_for_a_writable_one(
    new_image: NewImage, mount: MountImage, channel: str
) -> None:
    mounted = mount(new_image("1M", writes=["write -P 65 0 1M"]), f"channel={channel}")
    subprocess.run(["mount", "-i", "-o", "remount,rw", mounted.path], check=True)
    with pytest.raises(OSError) as caught:
        os.open(mounted.file, os.O_RDONLY | os.O_TRUNC)
    assert caught.value.errno == errno.EROFS
    assert mounted.file.read_bytes() == b"A" * MIB
