"""SEEK_DATA and SEEK_HOLE: from the mapping of the whole chain, and never past fresh data."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import qemu
from tests.conftest import NewImage
from tests.mount.mounting import MountImage

MIB = 1 << 20
GIB = 1 << 30


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor of `path`."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def data_ranges(fd: int) -> list[tuple[int, int]]:
    """Start and end of each range that is data, as lseek(2) says."""
    ranges, offset, size = [], 0, os.fstat(fd).st_size
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO
            break
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        assert start < offset <= size
        ranges.append((start, offset))
    return ranges


def qemu_data_ranges(image: Path) -> list[tuple[int, int]]:
    """The same, as qemu-img says."""
    ranges: list[tuple[int, int]] = []
    for part in json.loads(qemu.qemu_img("map", "-U", "--output=json", image)):
        if part["zero"]:
            continue
        start, end = part["start"], part["start"] + part["length"]
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, end))
    return ranges


def test_as_qemu_maps_it(mount: MountImage, new_image: NewImage) -> None:
    source = random.Random(3)
    below = None
    for layer in range(3):
        writes = [
            f"write {kind} {source.randrange(16384) * 4096} {4096 * source.choice((1, 16, 200))}"
            for kind in ("-P 1", "-P 2", "-z", "-P 3", "-z -u")
            for _ in range(4)
        ]
        size = {"size": "128M"} if below is None else {}
        below = new_image(
            name=f"{layer}.qcow2", backing=below, writes=writes, cluster_size=4096, **size
        )
    assert below is not None
    with opened(mount(below).file) as fd:
        assert data_ranges(fd) == qemu_data_ranges(below)


def test_offsets_at_the_edges(mount: MountImage, new_image: NewImage) -> None:
    image = new_image("10M", writes=["write 1M 64k", "write 9M 1M"])
    with opened(mount(image).file) as fd:
        assert os.lseek(fd, 5, os.SEEK_HOLE) == 5
        assert os.lseek(fd, 5, os.SEEK_DATA) == MIB
        assert os.lseek(fd, MIB + 7, os.SEEK_DATA) == MIB + 7
        assert os.lseek(fd, MIB + 7, os.SEEK_HOLE) == MIB + 65536
        assert os.lseek(fd, 10 * MIB - 1, os.SEEK_HOLE) == 10 * MIB
        for offset in (10 * MIB, 11 * MIB):
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                with pytest.raises(OSError) as caught:
                    os.lseek(fd, offset, whence)
                assert caught.value.errno == errno.ENXIO


def test_without_the_channel_all_is_data(mount: MountImage, new_image: NewImage) -> None:
    with opened(mount(new_image("10M"), "channel=off").file) as fd:
        assert data_ranges(fd) == [(0, 10 * MIB)]


@pytest.mark.parametrize("options", [(), ("writeback",), ("direct_io",)], ids="".join)
def test_fresh_data_are_no_hole(
    mount: MountImage, new_image: NewImage, options: tuple[str, ...]
) -> None:
    image = new_image("1G", writes=["write -P 1 512M 64k"])
    mounted = mount(image, "rw", *options)
    with opened(mounted.file, os.O_RDWR) as fd, mmap.mmap(fd, GIB) as memory:
        assert data_ranges(fd) == [(512 * MIB, 512 * MIB + 65536)]
        memory[100 * MIB + 5] = 1  # a shared mapping, not synced
        os.pwrite(fd, b"written", 200 * MIB)
        memory[512 * MIB - 1] = 2
        memory[GIB - 1] = 3
        assert data_ranges(fd) == [
            (100 * MIB, 100 * MIB + 65536),
            (200 * MIB, 200 * MIB + 65536),
            (512 * MIB - 65536, 512 * MIB + 65536),
            (GIB - 65536, GIB),
        ]
        # Seeking to a hole alone does not call fresh data one either.
        memory[300 * MIB] = 4
        assert os.lseek(fd, 300 * MIB, os.SEEK_HOLE) == 300 * MIB + 65536
        memory[400 * MIB] = 5
        assert os.lseek(fd, 350 * MIB, os.SEEK_DATA) == 400 * MIB
    # A handle for reading alone sees it as well, while somebody else may write.
    with opened(mounted.file, os.O_RDWR) as writer, mmap.mmap(writer, GIB) as memory:
        memory[700 * MIB] = 6
        with opened(mounted.file) as fd:
            assert os.lseek(fd, 600 * MIB, os.SEEK_DATA) == 700 * MIB
    mounted.umount()
    qemu.check(image)
    qemu.qemu_io(image, *(f"read -P {n} {at} 1" for n, at in ((1, 100 * MIB + 5), (3, GIB - 1))))


@pytest.mark.parametrize("options", [(), ("writeback",)], ids="".join)
def test_sparse_copy_of_a_terabyte(
    mount: MountImage, new_image: NewImage, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Seconds, and right, under writes that were not synced."""
    places = [n * 37 * GIB + n * 4096 for n in range(1, 27)]
    image = new_image("1T", writes=[f"write -P {n} {at} 1M" for n, at in enumerate(places, 1)])
    mounted = mount(image, "rw", *options)
    copies = [tmp_path / "cp.raw", tmp_path / "convert.raw"]
    with opened(mounted.file, os.O_RDWR) as fd, mmap.mmap(fd, 1 << 40) as memory:
        memory[5 * GIB] = 200
        os.pwrite(fd, bytes([201]), 6 * GIB)
        begun = time.monotonic()
        subprocess.run(["cp", "--sparse=always", mounted.file, copies[0]], check=True)
        qemu.qemu_img("convert", "-f", "raw", "-O", "raw", mounted.file, copies[1])
        assert time.monotonic() - begun < 20
    for copy in copies:
        with opened(copy) as fd:
            assert os.fstat(fd).st_size == 1 << 40
            assert os.fstat(fd).st_blocks * 512 < 64 * MIB
            assert os.pread(fd, 1, 5 * GIB) == bytes([200])
            assert os.pread(fd, 1, 6 * GIB) == bytes([201])
            for n, at in enumerate(places, 1):
                assert os.pread(fd, MIB, at) == bytes([n]) * MIB
        copy.unlink()


def test_data_stay_cached(mount: MountImage, new_image: NewImage) -> None:
    """Asking for holes drops the pages of holes, not those of data."""
    image = new_image("64M", writes=["write -P 1 0 8M"])
    mounted = mount(image, "rw")
    with opened(mounted.file, os.O_RDWR) as fd:
        os.pread(fd, 8 * MIB, 0)
        assert data_ranges(fd) == [(0, 8 * MIB)]
        with mmap.mmap(fd, 8 * MIB) as memory:
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            resident = bytearray(8 * MIB // mmap.PAGESIZE)
            vector = (ctypes.c_char * len(resident)).from_buffer(resident)
            assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(address), 8 * MIB, vector)
    assert resident == b"\1" * len(resident)


@pytest.mark.parametrize("below", [False, True], ids=["raw", "overlay on raw"])
def test_holes_of_a_raw_file(tmp_path: Path, mount: MountImage, below: bool) -> None:
    """A sparse raw image is sparse in the mount, by itself and as a backing file."""
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
        for start in (MIB, 40 * MIB):
            file.seek(start)
            file.write(random.Random(start).randbytes(MIB))
    if below:
        image = qemu.create(tmp_path / "top.qcow2", backing=image.name, backing_fmt="raw")
    with opened(mount(image).file) as fd:
        assert data_ranges(fd) == [(MIB, 2 * MIB), (40 * MIB, 41 * MIB)]
