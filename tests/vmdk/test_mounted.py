"""VMDKs through real mounts."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import qemu
from tests.mount.mounting import MountImage, imagofs, mounting
from tests.vmdk.build import pack_descriptor


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[MountImage]:
    """`mount(image, *options)`: mounts an image; cleans up afterwards."""
    with mounting(tmp_path) as mount_image:
        yield mount_image


SUBFORMATS = [
    "monolithicFlat",
    "monolithicSparse",
    "streamOptimized",
    "twoGbMaxExtentFlat",
    "twoGbMaxExtentSparse",
]


@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_the_disk_is_what_qemu_reads(subformat, tmp_path, mount):
    plain = tmp_path / "plain.raw"
    rng = random.Random(subformat)
    with open(plain, "wb") as file:
        file.truncate(20 << 20)
        for _ in range(20):
            file.seek(rng.randrange(19 << 20))
            file.write(rng.randbytes(rng.randrange(1, 300_000)))
    disk = tmp_path / "disk.vmdk"
    options = f"subformat={subformat}"
    qemu.qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", options, plain, disk)
    mounted = mount(disk)
    assert mounted.file.read_bytes() == qemu.contents(disk, "vmdk")
    copy = tmp_path / "copy"
    subprocess.run(["cp", "--sparse=always", mounted.file, copy], check=True)
    assert copy.read_bytes() == plain.read_bytes()
    mounted.umount()


def test_a_flat_disk_is_written(tmp_path, mount):
    disk = qemu.create(tmp_path / "disk.vmdk", 8 << 20, fmt="vmdk", subformat="monolithicFlat")
    cid = qemu.info(disk)["format-specific"]["data"]["cid"]
    mounted = mount(disk, "rw")
    model = bytearray(8 << 20)
    rng = random.Random(4)
    fd = os.open(mounted.file, os.O_RDWR)
    for _ in range(200):
        start = rng.randrange(len(model))
        data = rng.randbytes(min(rng.randrange(1, 200_000), len(model) - start))
        assert os.pwrite(fd, data, start) == len(data)
        model[start : start + len(data)] = data
    os.fsync(fd)
    os.close(fd)
    assert qemu.contents(disk, "vmdk") == model
    assert qemu.info(disk)["format-specific"]["data"]["cid"] != cid
    mounted.umount()
    assert (tmp_path / "disk-flat.vmdk").read_bytes() == model


def test_sparse_disks_are_refused_for_writing_in_one_line(tmp_path):
    disk = qemu.create(tmp_path / "disk.vmdk", 1 << 20, fmt="vmdk")
    (tmp_path / "mnt").mkdir()
    done = imagofs(disk, tmp_path / "mnt", "-o", "rw", ok=1)
    assert done.stderr.count("\n") == 1
    assert "open it read-only" in done.stderr


def test_a_noaccess_extent_is_an_error_where_it_is(tmp_path, mount):
    (tmp_path / "data").write_bytes(b"d" * (1 << 20))
    disk = tmp_path / "disk.vmdk"
    disk.write_bytes(
        pack_descriptor(
            'RW 2048 FLAT "data" 0', "NOACCESS 2048", 'RW 2048 FLAT "data" 0', "RW 2048 ZERO"
        )
    )
    mounted = mount(disk, "direct_io")
    fd = os.open(mounted.file, os.O_RDONLY)
    try:
        for _ in range(2):
            assert os.pread(fd, 4096, (1 << 20) - 4096) == b"d" * 4096
            with pytest.raises(OSError):
                os.pread(fd, 4096, 1 << 20)
            assert os.pread(fd, 4096, 2 << 20) == b"d" * 4096
            assert os.pread(fd, 4096, 3 << 20) == bytes(4096)
    finally:
        os.close(fd)
    mounted.umount()
