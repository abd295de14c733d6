"""Mounts beside qemu: whoever comes second is refused unless both only read."""

from __future__ import annotations

import errno
import fcntl
import logging
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imagofs.errors import UnsupportedError
from imagofs.opening import open_image
from tests.mount.mounting import MountImage, imagofs, mounting


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[MountImage]:
    with mounting(tmp_path) as mount_image:
        yield mount_image


@contextmanager
def qemu_io_holds(image: Path, *options: str) -> Iterator[int]:
    """qemu-io has the image open; its process ID."""
    command = ["qemu-io", "-f", "qcow2", *options, str(image)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        assert "MiB" in process.stdout.readline()
        yield process.pid
        process.stdin.write("quit\n")


def qemu_io_is_refused(image: Path, *options: str) -> bool:
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", *options, "-c", "length", image], capture_output=True, text=True
    )
    assert (done.returncode != 0) == ("lock" in done.stderr), done
    return done.returncode != 0


def test_qemu_writes(new_image, tmp_path: Path, mount: MountImage) -> None:
    image = new_image("1M")
    with qemu_io_holds(image) as process:
        for options in ("ro", "rw", "ro,lock=on", "rw,lock=auto"):
            done = imagofs(image, tmp_path, "-o", options, ok=1)
            assert done.stderr.startswith(
                f"imagofs: {image}: is in use: qemu-io (process {process})"
            )
            assert "lock=off" in done.stderr and done.stderr.count("\n") == 1
        mount(image, "lock=off").umount()
    mount(image, "rw").umount()


def test_qemu_reads(new_image, tmp_path: Path, mount: MountImage) -> None:
    image = new_image("1M")
    with qemu_io_holds(image, "-r"):
        assert "is in use" in imagofs(image, tmp_path, "-o", "rw", ok=1).stderr
        mount(image, "ro")


@pytest.mark.parametrize("options", [("ro",), ("rw",)])
def test_we_have_it(new_image, mount: MountImage, options: tuple[str, ...]) -> None:
    image = new_image("1M")
    mounted = mount(image, *options)
    assert qemu_io_is_refused(image)
    assert qemu_io_is_refused(image, "-r") == ("rw" in options)
    mounted.umount()
    assert not qemu_io_is_refused(image)


def test_every_file_of_a_chain(new_image, tmp_path: Path, mount: MountImage) -> None:
    base = new_image("1M", "base.qcow2")
    middle = new_image(backing=base)
    top = new_image(backing=middle)
    other = new_image(backing=middle)
    for below in (base, middle):
        with qemu_io_holds(below):
            stderr = imagofs(top, tmp_path, "-o", "rw", ok=1).stderr
            assert str(below) in stderr and "qemu-io" in stderr
    # Two that write may share what is below them; nobody writes to that meanwhile.
    mount(top, "rw")
    mount(other, "rw")
    for below in (base, middle):
        assert qemu_io_is_refused(below) and not qemu_io_is_refused(below, "-r")
        assert "is in use: imagofs" in imagofs(below, tmp_path, "-o", "rw", ok=1).stderr


def test_two_daemons_on_one_image(new_image, tmp_path: Path, mount: MountImage) -> None:
    image = new_image("1M")
    first = mount(image, "rw")
    for options in ("rw", "ro"):
        stderr = imagofs(image, tmp_path, "-o", options, ok=1).stderr
        assert f"imagofs (process {first.pid})" in stderr
    first.umount()
    mount(image, "ro")
    mount(image, "ro")


async def test_a_file_system_without_locks(new_image, monkeypatch, caplog) -> None:
    image = new_image("1M")
    real = fcntl.fcntl

    def refuse(fd, command, argument=0):
        if command in (fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK):
            raise OSError(errno.ENOLCK, "No locks available")
        return real(fd, command, argument)

    monkeypatch.setattr("imagofs.storage.locks.fcntl.fcntl", refuse)
    with pytest.raises(UnsupportedError, match="No locks available"):
        await open_image(image, lock=True)
    with caplog.at_level(logging.WARNING):
        async with await open_image(image, lock="auto") as access:
            assert access.size() == 1 << 20
    assert "No locks available" in caplog.text
