"""The main job on real mounts: random writes, a file system on a loop device, kill -9."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests import qemu
from tests.mount.load import Mirror, run_writers
from tests.mount.mounting import MountImage
from tests.trust.kill import kill_once, snapshot_contents, with_base_and_snapshot

MIB = 1 << 20
SEED = int(os.environ.get("IMAGOFS_SEED", "20261122"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("writes", "options"),
    [
        (14_000, {}),
        (2_000, {"cluster_size": 4096, "refcount_bits": 64}),
        (2_000, {"extended_l2": True}),
        (1_000, {"cluster_size": "2M"}),
        (1_000, {"cluster_size": 512}),
    ],
    ids=["64k", "4k", "subclusters", "2M", "512"],
)
def test_20000_random_writes(
    writes: int, options: dict[str, str | int | bool], tmp_path: Path, mount: MountImage
) -> None:
    print(f"seed {SEED}")
    size = 48 * MIB
    image, base = with_base_and_snapshot(tmp_path, size, options)
    snapshot, base_before = snapshot_contents(image), base.read_bytes()
    mounted = mount(image, "rw")
    mirror = Mirror(mounted.file.read_bytes())
    # With a sync now and then, else the mirror would keep every write.
    run_writers(mounted.file, mirror, writes=writes, seed=SEED, sync_every=600)
    assert mounted.file.read_bytes() == mirror.contents
    # close(2) has returned everywhere: the image file has it all, though the mount is up.
    qemu.check(image)
    mounted.umount()
    qemu.check(image)
    assert qemu.contents(image) == mirror.contents
    assert mount(image).file.read_bytes() == mirror.contents
    assert snapshot_contents(image) == snapshot
    assert base.read_bytes() == base_before


@pytest.mark.timeout(180)
def test_file_system_on_a_loop_device(tmp_path: Path, mount: MountImage) -> None:
    """mkfs, 5,000 files, fsck; and the same tree through qemu-img convert."""
    image = qemu.create(tmp_path / "image.qcow2", 160 * MIB)
    mounted = mount(image, "rw")
    rnd = random.Random(SEED)
    tree = {
        f"dir{number % 50}/file{number}": rnd.randbytes(rnd.randrange(1, 6000))
        for number in range(5000)
    }

    device = qemu.run("losetup", "-f", "--show", mounted.file).strip()
    try:
        qemu.run("mkfs.ext4", "-q", "-F", device)
        root = tmp_path / "root"
        root.mkdir()
        qemu.run("mount", device, root)
        try:
            for name, data in tree.items():
                path = root / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
        finally:
            qemu.run("umount", root)
        qemu.run("fsck.ext4", "-fn", device)
    finally:
        qemu.run("losetup", "-d", device)
    mounted.umount()
    qemu.check(image)

    flat = tmp_path / "flat.raw"
    qemu.qemu_img("convert", "-O", "raw", image, flat)
    qemu.run("mount", "-o", "loop,ro", flat, root)
    try:
        found = {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file()
        }
    finally:
        qemu.run("umount", root)
    assert found == tree


@pytest.mark.timeout(300)
def test_kill_at_20_moments(tmp_path: Path) -> None:
    """After kill -9, leaks at most, and what an fsync covered is there."""
    syncs = 0
    for seed in range(SEED, SEED + 20):
        folder = tmp_path / str(seed)
        folder.mkdir()
        print(f"seed {seed}")
        moment = kill_once(folder, seed)
        print(moment)
        syncs += moment.syncs
    assert syncs > 20, "the daemon was killed too early to prove anything"


def test_closed_file_is_in_the_image(tmp_path: Path, mount: MountImage) -> None:
    """close(2) alone, without fsync: another reader of the image finds everything."""
    image = qemu.create(tmp_path / "image.qcow2", 8 * MIB)
    mounted = mount(image, "rw")
    data = random.Random(SEED).randbytes(3 * MIB + 5)
    with mounted.file.open("r+b") as file:
        file.seek(777)
        file.write(data)
    qemu.check(image)
    assert qemu.contents(image)[777 : 777 + len(data)] == data


def test_shared_base_is_read_only(tmp_path: Path, mount: MountImage) -> None:
    """Two overlays of one base, both mounted for writing."""
    base = qemu.create(tmp_path / "base.qcow2", 4 * MIB, writes=["write -P 1 0 4M"])
    before = base.read_bytes()
    overlays = [
        qemu.create(tmp_path / f"top{number}.qcow2", backing=base.name) for number in range(2)
    ]
    files = [mount(overlay, "rw").file for overlay in overlays]
    for number, file in enumerate(files):
        with file.open("r+b") as disk:
            disk.write(bytes([number + 7]) * MIB)
    for number, file in enumerate(files):
        shown = file.read_bytes()
        assert shown == bytes([number + 7]) * MIB + b"\1" * (3 * MIB)
    assert base.read_bytes() == before
