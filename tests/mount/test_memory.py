"""A daemon's memory: what its caches hold, and little more."""

from __future__ import annotations

import mmap
import os
import random
import re
from pathlib import Path

import pytest

from tests import qemu
from tests.mount.mounting import MountImage

MIB = 1 << 20
_SIZE = 160 * MIB


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk of 160 MiB, all of it compressed."""
    folder = tmp_path_factory.mktemp("compressed")
    order = random.Random(4)
    half_random = b"".join(order.randbytes(32) + bytes(32) for _ in range(MIB // 64))
    with open(folder / "disk.raw", "wb") as raw:
        for _ in range(_SIZE // MIB):
            start = order.randrange(MIB)
            raw.write(half_random[start:] + half_random[:start])
    image = folder / "disk.qcow2"
    options = "compression_type=zstd"
    qemu.qemu_img(
        "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, folder / "disk.raw", image
    )
    (folder / "disk.raw").unlink()
    return image


def test_large_random_reads_of_a_compressed_image(mount: MountImage, compressed: Path) -> None:
    mounted = mount(compressed)
    order = random.Random(5)
    buffer = mmap.mmap(-1, MIB)
    fd = os.open(mounted.file, os.O_RDONLY | os.O_DIRECT)
    try:
        for _ in range(3000):
            length = order.choice([MIB, 256 << 10])
            assert (
                os.preadv(fd, [memoryview(buffer)[:length]], order.randrange(156) * MIB) == length
            )
    finally:
        os.close(fd)
    status = Path(f"/proc/{mounted.pid}/status").read_text()
    highest = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert highest is not None
    assert int(highest[1]) < 125 << 10, "the caches have 64 MiB, an idle daemon takes 33"
