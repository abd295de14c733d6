"""How a mount looks: names, attributes, options, extended attributes."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests import qemu
from tests.conftest import NewImage
from tests.mount.conftest import random_bytes
from tests.mount.mounting import Mounted, MountImage, imagofs, mount_at, mounting

Both = Callable[..., Mounted]


def test_directory(both: Both, raw_image: Path) -> None:
    mounted = both(raw_image)
    assert os.listdir(mounted.path) == ["disk.raw"]
    assert mounted.file.read_bytes() == raw_image.read_bytes()
    assert stat.S_IMODE(mounted.path.stat().st_mode) == 0o555
    for name in ("other", "disk.raw.x", "DISK.RAW"):
        assert not (mounted.path / name).exists()
    mount = mount_at(mounted.path)
    assert mount is not None
    assert (mount.fstype, mount.source) == ("fuse.imagofs", str(raw_image))
    assert f"{raw_image} on {mounted.path} type fuse.imagofs (ro," in qemu.run("mount")
    mounted.umount()
    assert os.listdir(mounted.path) == []


def test_regular_file(both: Both, raw_image: Path, tmp_path: Path) -> None:
    point = tmp_path / "flat.img"
    point.write_bytes(b"what is hidden")
    mounted = both(raw_image, at=point)
    assert mounted.file == point
    assert point.stat().st_size == raw_image.stat().st_size
    assert point.read_bytes() == raw_image.read_bytes()
    mounted.umount()
    assert point.read_bytes() == b"what is hidden"


def test_image_over_itself(mount: MountImage, raw_image: Path) -> None:
    data = raw_image.read_bytes()
    mounted = mount(raw_image, "rw", "format=raw", at=raw_image)
    assert raw_image.read_bytes() == data
    with raw_image.open("r+b") as file:
        file.write(b"new")
        os.fsync(file)
    mounted.umount()
    assert raw_image.read_bytes() == b"new" + data[3:]


@pytest.mark.parametrize(
    "image, name",
    [
        ("disk.qcow2", "disk.raw"),
        ("disk", "disk.raw"),
        ("a.b.c", "a.b.raw"),
        (".hidden", ".hidden.raw"),
        ("mit Leerzeichen, Komma und Ümläuten.img", "mit Leerzeichen, Komma und Ümläuten.raw"),
        ("back\\slash.img", "back\\slash.raw"),
        (b"\xff\xfe.img".decode(errors="surrogateescape"), "\udcff\udcfe.raw"),
    ],
)
def test_names(mount: MountImage, tmp_path: Path, image: str, name: str) -> None:
    path = tmp_path / image
    path.write_bytes(random_bytes(4096))
    mounted = mount(path)
    assert os.listdir(mounted.path) == [name]
    found = mount_at(mounted.path)
    assert found is not None and found.source == str(path)


def test_name_option(mount: MountImage, raw_image: Path) -> None:
    mounted = mount(raw_image, "name=sda", "fsname=my disk")
    assert os.listdir(mounted.path) == ["sda"]
    found = mount_at(mounted.path)
    assert found is not None and found.source == "my disk"


def test_odd_mountpoints(mount: MountImage, raw_image: Path, tmp_path: Path) -> None:
    for name in ("with blank", "comma, and \\ backslash", "Ümläut\n", "\udcff"):
        point = tmp_path / name
        point.mkdir()
        mounted = mount(raw_image, at=point)
        assert (point / "disk.raw").stat().st_size == raw_image.stat().st_size
        mounted.umount()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "with blank")
    imagofs(raw_image, link)
    assert mount_at(tmp_path / "with blank") is not None
    imagofs("umount", link)


def test_relative_paths(raw_image: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    imagofs("disk.img", "mnt", cwd=tmp_path)
    imagofs("umount", "mnt", cwd=tmp_path)


def test_attributes(both: Both, raw_image: Path) -> None:
    raw_image.chmod(0o640)
    os.chown(raw_image, 1234, 2345)
    os.utime(raw_image, ns=(10**18, 1_234_567_890_123_456_789))
    shown = both(raw_image).file.stat()
    assert stat.S_IFMT(shown.st_mode) == stat.S_IFREG
    assert stat.S_IMODE(shown.st_mode) == 0o440
    assert (shown.st_uid, shown.st_gid) == (1234, 2345)
    assert shown.st_size == (8 << 20) + 100
    assert shown.st_mtime_ns == 1_234_567_890_123_456_789


def test_owner_and_mode_options(mount: MountImage, raw_image: Path) -> None:
    options = ("uid=4321", "gid=daemon", "mode=664")
    mounted = mount(raw_image, *options)
    shown = mounted.file.stat()
    assert (shown.st_uid, shown.st_gid, stat.S_IMODE(shown.st_mode)) == (4321, 1, 0o444)
    mounted.umount()
    shown = mount(raw_image, "rw", "format=raw", *options).file.stat()
    assert stat.S_IMODE(shown.st_mode) == 0o664


def test_allocated_blocks(both: Both, tmp_path: Path) -> None:
    image = tmp_path / "sparse.img"
    with image.open("wb") as file:
        file.truncate(1 << 30)
        file.write(b"x" * 100_000)
    shown = both(image).file
    assert shown.stat().st_size == 1 << 30
    assert shown.stat().st_blocks == image.stat().st_blocks < 1000
    (kilobytes, _) = qemu.run("du", "-k", shown).split()
    assert int(kilobytes) <= 200


def test_statfs(both: Both, raw_image: Path) -> None:
    found = os.statvfs(both(raw_image).path)
    assert (found.f_bsize, found.f_frsize) == (4096, 4096)
    assert found.f_blocks == (8 << 20) // 4096 + 1
    assert found.f_namemax == 255


def test_extended_attributes(both: Both, new_image: NewImage) -> None:
    base = new_image("1M", name="base.qcow2")
    top = new_image(name="top.qcow2", backing=base)
    shown = both(top).file
    names = ["user.imagofs.format", "user.imagofs.chain", "user.imagofs.stats"]
    assert sorted(os.listxattr(shown)) == sorted(names)
    assert os.getxattr(shown, "user.imagofs.format") == b"qcow2"
    chain = json.loads(os.getxattr(shown, "user.imagofs.chain"))
    assert [layer["filename"] for layer in chain] == [str(top), str(base)]
    assert [layer["format"] for layer in chain] == ["qcow2", "qcow2"]
    for name in ("user.other", "security.capability"):
        with pytest.raises(OSError) as caught:
            os.getxattr(shown, name)
        assert caught.value.errno == errno.ENODATA
    with pytest.raises(OSError) as caught:
        os.setxattr(shown, "user.other", b"x")
    assert caught.value.errno == errno.EROFS


def test_nothing_else_can_be_made(both: Both, raw_image: Path) -> None:
    mounted = both(raw_image, "rw", "format=raw")
    other = mounted.path / "other"
    attempts: list[Callable[[], object]] = [
        lambda: other.write_bytes(b""),
        lambda: other.mkdir(),
        lambda: other.symlink_to("x"),
        lambda: os.mkfifo(other),
        lambda: mounted.file.unlink(),
        lambda: mounted.file.rename(other),
        lambda: os.link(mounted.file, other),
        lambda: mounted.file.chmod(0o777),
        lambda: os.chown(mounted.file, 1, 1),
        lambda: os.setxattr(mounted.file, "user.x", b""),
    ]
    for attempt in attempts:
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV)
    assert os.listdir(mounted.path) == ["disk.raw"]


def test_kernel_options(mount: MountImage, raw_image: Path) -> None:
    mounted = mount(raw_image, "noexec", "noatime", "nofail", "x-systemd.automount", "defaults")
    line = next(line for line in qemu.run("mount").splitlines() if str(mounted.path) in line)
    assert "noexec" in line and "noatime" in line


def test_only_the_owner_without_allow_other(raw_image: Path) -> None:
    raw_image.chmod(0o644)
    with TemporaryDirectory() as folder, mounting(Path(folder)) as mount:
        Path(folder).chmod(0o755)  # pytest's own folders are for their owner alone
        for options, code in ((), 1), (("allow_other",), 0):
            command = ["head", "-c", "1", mount(raw_image, *options).file]
            nobody = {"user": 65534, "group": 65534, "extra_groups": ()}
            done = subprocess.run(command, capture_output=True, **nobody)  # type: ignore[call-overload]
            assert done.returncode == code, done.stderr
