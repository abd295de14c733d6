"""Ends of a mount that has a loop device with a file system on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from imagofs.fuse import mounts, unmounting
from tests import qemu
from tests.conftest import NewImage
from tests.mount.mounting import PROGRAM, MountImage, imagofs, mount_at, mounting, wait_until


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[MountImage]:
    with mounting(tmp_path) as mount_image:
        yield mount_image


def answers(point: Path) -> bool:
    """Whether a mount is at `point` whose daemon lives."""
    mount = mount_at(point)
    if mount is None:
        return False
    with suppress(OSError):
        os.statvfs(point)
        # A dead mount that was there a moment ago may be gone by now, and the folder answer.
        device = os.stat(point).st_dev
        return mount.device == f"{os.major(device)}:{os.minor(device)}"
    return False


@contextmanager
def daemon(image: Path, point: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`imagofs -f`, with a log to read; nothing of it is left at the end."""
    command = [str(PROGRAM), "-f", str(image), str(point), "-o", ",".join(options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: answers(point) or process.poll() is not None)
            yield process
        finally:
            process.kill()
            if mount_at(point) is not None:
                unmounting.detach(str(point))


@contextmanager
def ext4_on_loop(file: Path, point: Path) -> Iterator[str]:
    """A loop device on `file` with a new ext4 mounted at `point`; the test may take them away."""
    device = qemu.run("losetup", "--find", "--show", "--direct-io=on", file).strip()
    try:
        qemu.run("mkfs.ext4", "-q", device)
        qemu.run("mount", device, point)
        yield device
    finally:
        subprocess.run(["umount", "-l", point], capture_output=True)
        subprocess.run(["losetup", "-d", device], capture_output=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Files are written and numbered there meanwhile; `folder/synced` counts what was synced."""
    code = (
        "import os, sys\n"
        "number = 0\n"
        "while True:\n"
        "    path = f'{sys.argv[1]}/{number}'\n"
        "    with open(path, 'w') as file:\n"
        "        file.write(f'{number}\\n' * 5000)\n"
        "        file.flush()\n"
        "        os.fsync(file)\n"
        "    print(number, flush=True)\n"
        "    number += 1\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for _ in range(3):
                assert process.stdout.readline()
            yield
        finally:
            process.kill()


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    found = tmp_path / "point", tmp_path / "files"
    for place in found:
        place.mkdir()
    return found


def test_sigterm_under_a_file_system(new_image: NewImage, places: tuple[Path, Path]) -> None:
    """The order in which systemd stops: all three at once, each as soon as it can."""
    image = new_image("48M", "disk.qcow2")
    point, files = places
    with daemon(image, point, "rw") as process, ext4_on_loop(point / "disk.raw", files) as device:
        with writing(files):
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: mount_at(point) is None)
            before = len(list(files.iterdir()))
            # It serves on for the loop device: the writer makes progress.
            wait_until(lambda: len(list(files.iterdir())) > before + 2)
        written = {path.name: path.read_text() for path in files.iterdir() if path.is_file()}
        assert process.poll() is None
        qemu.run("umount", files)
        qemu.run("losetup", "-d", device)
        _, log = process.communicate(timeout=20)
    assert process.returncode == 0, log
    assert f"still used by {device}" in log and "everything is on the disk" in log
    assert "Traceback" not in log
    qemu.check(image)
    flat = image.with_suffix(".flat")
    qemu.qemu_img("convert", "-f", "qcow2", "-O", "raw", image, flat)
    assert "clean" in qemu.run("e2fsck", "-n", flat)
    for name in list(written)[:: max(len(written) // 5, 1)]:
        assert qemu.run("debugfs", "-R", f"cat {name}", flat) == written[name]


def test_stop_timeout(new_image: NewImage, places: tuple[Path, Path]) -> None:
    """A loop device that nobody detaches keeps the daemon only as long as `stop_timeout` says."""
    image = new_image("16M", "disk.qcow2")
    point, files = places
    with (
        daemon(image, point, "rw", "stop_timeout=1") as process,
        ext4_on_loop(point / "disk.raw", files),
    ):
        (files / "file").write_text("synced")
        qemu.run("sync", "-f", files)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
        assert 0.9 < time.monotonic() - started < 15
    assert process.returncode == 0, log
    assert "not waiting any more" in log and "or after 1 s" in log
    flat = image.with_suffix(".flat")
    qemu.qemu_img("convert", "-f", "qcow2", "-O", "raw", image, flat)
    qemu.run("e2fsck", "-fp", flat, ok=(0, 1))  # as after pulling a plug: the journal is replayed
    assert qemu.run("debugfs", "-R", "cat file", flat) == "synced"


def test_sigkill_under_a_file_system(new_image: NewImage, places: tuple[Path, Path]) -> None:
    """What was synced is there, and the next daemon mounts over what is left."""
    image = new_image("16M", "disk.qcow2")
    point, files = places
    with daemon(image, point, "rw") as process, ext4_on_loop(point / "disk.raw", files):
        (files / "file").write_text("synced")
        qemu.run("sync", "-f", files)
        process.kill()
        process.communicate()
        assert mount_at(point) is not None and mounts.is_dead(str(point))
        with suppress(OSError), (files / "other").open("w") as file:  # nobody hangs
            file.write("lost")
            os.fsync(file)
        with daemon(image, point, "rw") as again:
            assert sum(mount.point == str(point) for mount in mounts.mounts()) == 1
            again.send_signal(signal.SIGTERM)
            _, log = again.communicate(timeout=20)
            assert again.returncode == 0
            assert "cleared what a daemon that is gone had left mounted" in log
    qemu.check(image, leaks=True)
    flat = image.with_suffix(".flat")
    qemu.qemu_img("convert", "-f", "qcow2", "-O", "raw", image, flat)
    qemu.run("e2fsck", "-fp", flat, ok=(0, 1))
    assert qemu.run("debugfs", "-R", "cat file", flat) == "synced"


def test_sigusr1_logs_the_statistics(new_image: NewImage, places: tuple[Path, Path]) -> None:
    point, _ = places
    with daemon(new_image("1M", "disk.qcow2"), point, "rw") as process:
        with (point / "disk.raw").open("r+b") as file:
            file.write(bytes(4096))
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGHUP)
        (point / "disk.raw").stat()
        imagofs("umount", point)
        _, log = process.communicate(timeout=20)
    assert "1 writes of 0 MiB" in log and "latency p50" in log
    assert "nothing to reload" in log


def _is_empty(group: Path) -> bool:
    return not (group / "cgroup.procs").read_text()


@contextmanager
def memory_limit(megabytes: int) -> Iterator[Path]:
    """A cgroup whose processes get no more memory than this."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        controllers = Path(fields[4], "cgroup.controllers")
        if kind == "cgroup" and "memory" in options.split(","):
            folder, limit = Path(fields[4]), "memory.limit_in_bytes"
        elif kind == "cgroup2" and "memory" in controllers.read_text().split():
            folder, limit = Path(fields[4]), "memory.max"
            with suppress(OSError):
                (folder / "cgroup.subtree_control").write_text("+memory")
        else:
            continue
        group = folder / f"imagofs-test-memory-{os.getpid()}"
        group.mkdir()
        try:
            (group / limit).write_text(str(megabytes << 20))
            yield group
        finally:
            wait_until(partial(_is_empty, group))
            group.rmdir()
        return
    pytest.skip("no cgroup file system here has the memory controller")


def test_memory_pressure(new_image: NewImage, places: tuple[Path, Path]) -> None:
    """A writer whose little memory is all dirty waits for the daemon, which is not in its limit."""
    image = new_image("160M", "disk.qcow2")
    point, files = places
    with (
        memory_limit(32) as group,
        daemon(image, point, "rw") as process,
        ext4_on_loop(point / "disk.raw", files) as device,
    ):
        script = (
            f"echo $$ >{group}/cgroup.procs; exec dd if=/dev/zero of={files}/big bs=1M count=96"
        )
        writer = subprocess.Popen(["sh", "-c", f"{script} conv=fsync status=none"])
        try:
            assert writer.wait(timeout=60) == 0
        finally:
            if writer.poll() is None:
                unmounting.sever(str(point))  # whoever waits for the disk gets an error
                writer.wait()
        assert (files / "big").stat().st_size == 96 << 20
        qemu.run("umount", files)
        qemu.run("losetup", "-d", device)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0, log
    qemu.check(image)


def test_the_next_mount_has_the_same_number(
    new_image: NewImage, mount: MountImage, tmp_path: Path
) -> None:
    """The kernel uses a device's number again at once: the daemon that ends takes its own only."""
    first = mount(new_image("1M"))
    image = new_image("1M", writes=["write -P 65 0 512"])
    point = tmp_path / "next"
    point.mkdir()
    first.signal(signal.SIGSTOP)
    unmounting.detach(str(first.path), lazy=False)  # umount(8) would ask the daemon first
    command = [str(PROGRAM), str(image), str(point)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: mount_at(point) is not None)
        time.sleep(0.1)
        first.signal(signal.SIGCONT)
        _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (0, "")
    first.wait_for_end()
    assert (point / f"{image.stem}.raw").read_bytes()[:2] == b"AA"
    imagofs("umount", point)
    assert mount_at(point) is None
