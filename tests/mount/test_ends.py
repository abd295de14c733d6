"""How a mount ends: nothing is lost, nothing is left behind, and the exit code says so."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from imagofs.fuse import mounts, unmounting
from imagofs.fuse.control import Connection, ControlSocket
from tests.conftest import NewImage
from tests.mount.mounting import (
    PROGRAM,
    Mounted,
    MountImage,
    imagofs,
    mount_at,
    wait_until,
)

Both = Callable[..., Mounted]


@contextmanager
def in_foreground(image: Path, point: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`imagofs -f`, mounted; killed and detached at the end if it still runs."""
    command = [str(PROGRAM), "-f", "-v", str(image), str(point)]
    command += ["-o", ",".join(options)] if options else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: mount_at(point) is not None or process.poll() is not None)
            point.stat()  # it answers
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            if mount_at(point) is not None:
                unmounting.detach(str(point))


@pytest.mark.parametrize("way", ["umount", "fusermount3 -u", "lazy"])
def test_unmounting(both: Both, raw_image: Path, way: str) -> None:
    mounted = both(raw_image, "rw", "format=raw")
    with mounted.file.open("r+b") as file:
        file.write(b"new")
    if way == "lazy":
        imagofs("umount", "-l", mounted.path)
    else:
        subprocess.run([*way.split(), mounted.path], check=True)
    mounted.wait_for_end()
    assert mount_at(mounted.path) is None
    assert raw_image.read_bytes()[:3] == b"new"


@pytest.mark.parametrize("user", ["loop device", "nobody that is seen"])
def test_unmounting_waits_for_users_who_are_going(
    mount: MountImage, raw_image: Path, user: str
) -> None:
    """As a loop device whose last user has not closed it yet, or who asks for the statistics."""
    mounted = mount(raw_image)
    if user == "loop device":
        device = subprocess.check_output(["losetup", "-f", "--show", "-r", mounted.file], text=True)
        end = partial(os.close, os.open(device.strip(), os.O_RDONLY))
        subprocess.run(["losetup", "-d", device.strip()], check=True)
    else:
        subprocess.run(["mount", "--bind", raw_image, mounted.file], check=True)
        end = partial(unmounting.detach, str(mounted.file))
    command = [str(PROGRAM), "umount", str(mounted.path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        waited = process.poll() is None
        end()
        _, stderr = process.communicate(timeout=30)
    assert waited and process.returncode == 0, stderr
    assert not mounted.is_running()


def test_unmounting_waits_for_copies_in_other_namespaces(
    mount: MountImage, raw_image: Path
) -> None:
    """They keep the file system, and so the daemon, alive; who waits is told why."""
    mounted = mount(raw_image)
    command = [str(PROGRAM), "umount", str(mounted.path)]
    with subprocess.Popen(["unshare", "--mount", "sleep", "60"]) as holder:
        try:
            own = os.readlink("/proc/self/ns/mnt")
            wait_until(lambda: os.readlink(f"/proc/{holder.pid}/ns/mnt") != own)
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
                assert process.stderr is not None
                said = process.stderr.readline()
                assert process.poll() is None and mounted.is_running()
                assert mount_at(mounted.path) is None
                holder.kill()
                assert process.wait(60) == 0  # other tests have namespaces too, for a while
        finally:
            holder.kill()
    assert "still mounted in the mount namespace of" in said
    assert re.search(rf"process {holder.pid}\b", said)
    assert not mounted.is_running()


def test_unmounting_is_refused_while_it_is_used(mount: MountImage, raw_image: Path) -> None:
    mounted = mount(raw_image)
    with mounted.file.open("rb"):
        done = imagofs("umount", mounted.path, ok=1)
        assert f"in use by process {os.getpid()}; end that" in done.stderr
    subprocess.run(["mount", "--bind", raw_image, mounted.file], check=True)
    try:
        done = imagofs("umount", mounted.path, ok=1)
        assert "cannot unmount: in use; end that" in done.stderr
    finally:
        subprocess.run(["umount", mounted.file], check=True)
    mounted.umount()


@pytest.mark.parametrize("channel", ["on", "off"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(tmp_path: Path, raw_image: Path, number: signal.Signals, channel: str) -> None:
    point = tmp_path / "mnt"
    point.mkdir()
    with in_foreground(raw_image, point, "rw", "format=raw", f"channel={channel}") as process:
        with (point / "disk.raw").open("r+b") as file:
            file.write(b"new")
        process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0, stderr
    assert "everything is on the disk" in stderr and "Traceback" not in stderr
    assert mount_at(point) is None
    assert raw_image.read_bytes()[:3] == b"new"


def test_sigterm_while_in_use(both: Both, raw_image: Path) -> None:
    mounted = both(raw_image, "rw", "format=raw")
    with mounted.file.open("r+b", buffering=0) as file:
        mounted.signal(signal.SIGTERM)
        wait_until(lambda: mount_at(mounted.path) is None)
        # It serves on for who has it open.
        file.write(b"new")
        os.fsync(file)
        assert file.read(5) == raw_image.read_bytes()[3:8]
        assert mounted.is_running()
    mounted.wait_for_end()
    assert raw_image.read_bytes()[:3] == b"new"


def test_second_sigterm_does_not_wait_for_users(both: Both, raw_image: Path) -> None:
    mounted = both(raw_image)
    fd = os.open(mounted.file, os.O_RDONLY)
    mounted.signal(signal.SIGTERM)
    wait_until(lambda: mount_at(mounted.path) is None)
    mounted.signal(signal.SIGTERM)
    mounted.wait_for_end()
    with pytest.raises(OSError):
        os.pread(fd, 4096, 1 << 20)
    with suppress(OSError):  # close(2) is told as well
        os.close(fd)


_SEEKER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
pages = mmap.mmap(fd, 0)
for start in range(0, len(pages), 256 << 10):
    pages[start] = 1
print("seeking", flush=True)
os.lseek(fd, 0, os.SEEK_HOLE)
"""


@pytest.mark.parametrize("options", ["rw", "rw,stop_timeout=0"])
def test_stopping_while_the_kernel_writes_back(
    mount: MountImage, new_image: NewImage, options: str
) -> None:
    """SEEK_HOLE is answered once 4,000 pages are written: the daemon reads those WRITEs to the end.

    Its thread waits for them in the kernel: not even SIGKILL would end it.
    """
    mounted = mount(new_image("1G"), options)
    command = [sys.executable, "-c", _SEEKER, str(mounted.file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as seeker:
        try:
            assert seeker.stdout is not None
            assert seeker.stdout.readline() == "seeking\n"
            time.sleep(0.03)
            mounted.signal(signal.SIGTERM)
            if "stop_timeout" not in options:
                time.sleep(0.02)
                mounted.signal(signal.SIGTERM)
            mounted.wait_for_end()
        finally:
            seeker.kill()
    assert seeker.returncode == 0


def test_killed_while_the_kernel_writes_back(
    mount: MountImage, new_image: NewImage, tmp_path: Path
) -> None:
    """The daemon's thread waits for WRITEs that nobody reads: its helper severs the connection."""
    image = new_image("1G")
    mounted = mount(image, "rw")
    command = [sys.executable, "-c", _SEEKER, str(mounted.file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as seeker:
        try:
            assert seeker.stdout is not None
            assert seeker.stdout.readline() == b"seeking\n"
            time.sleep(0.05)
            mounted.signal(signal.SIGKILL)
            mounted.wait_for_end()
            _, said = seeker.communicate(timeout=20)
        finally:
            seeker.kill()
    assert b"ConnectionAbortedError" in said
    # As after any other kill, the next mount takes the dead one's place.
    again = mount(image, "rw", at=mounted.path)
    assert again.file.stat().st_size == 1 << 30


def test_sighup_and_sigusr1_change_nothing(both: Both, raw_image: Path) -> None:
    mounted = both(raw_image)
    mounted.signal(signal.SIGHUP)
    mounted.signal(signal.SIGUSR1)
    assert mounted.file.read_bytes() == raw_image.read_bytes()
    assert mounted.is_running()


def test_busy(both: Both, raw_image: Path) -> None:
    mounted = both(raw_image)
    with mounted.file.open("rb"):
        done = imagofs("umount", mounted.path, ok=1)
        assert done.stderr.count("\n") == 1 and f"process {os.getpid()}" in done.stderr
        assert mounted.file.read_bytes() == raw_image.read_bytes()
    mounted.umount()


def test_umount_is_refused_again_and_again(mount: MountImage, raw_image: Path) -> None:
    """Who gave up takes no room from who comes later, and no descriptor of the daemon's."""
    mounted = mount(raw_image)
    descriptors = Path(f"/proc/{mounted.pid}/fd")
    before = len(list(descriptors.iterdir()))
    device = mount_at(mounted.path).device  # type: ignore[union-attr]
    with mounted.file.open("rb"):
        for _ in range(200):
            with Connection(device, os.geteuid()):
                pass
        assert "in use" in imagofs("umount", mounted.path, ok=1).stderr
    wait_until(lambda: len(list(descriptors.iterdir())) <= before + 1)
    mounted.umount()


@pytest.fixture
def other(raw_image: Path, tmp_path: Path) -> Path:
    """Another image with the same contents."""
    path = tmp_path / "other.img"
    path.write_bytes(raw_image.read_bytes())
    return path


@contextmanager
def stopped_without_its_mount(both: Both, image: Path) -> Iterator[Mounted]:
    """A daemon that does not know yet that its mount is gone; goes on, and ends, at the end.

    The kernel has its number for the next mount.
    """
    stopped = both(image)
    stopped.signal(signal.SIGSTOP)
    try:
        unmounting.detach(str(stopped.path))
        yield stopped
    finally:
        stopped.signal(signal.SIGCONT)
    stopped.wait_for_end()


def test_mount_whose_number_a_stopped_daemon_still_has(
    both: Both, raw_image: Path, other: Path
) -> None:
    with stopped_without_its_mount(both, raw_image) as stopped:
        again = both(other, "rw", "format=raw")
        assert again.pid != stopped.pid
        again.file.write_bytes(b"new")
        again.umount()
        assert stopped.is_running()
        assert other.read_bytes().startswith(b"new")
        again = both(other, "format=raw")
        stopped.signal(signal.SIGTERM)
    # What has its number now is not its to take away.
    assert mount_at(again.path) is not None
    again.umount()


def test_dead_mount_of_another_image_with_the_number_stays(
    both: Both, raw_image: Path, other: Path
) -> None:
    with stopped_without_its_mount(both, raw_image):
        dead = both(other)
        dead.signal(signal.SIGKILL)
        dead.wait_for_end()
    assert mount_at(dead.path) is not None, "it looks as if the stopped daemon had lost it"
    imagofs("umount", dead.path)
    assert mount_at(dead.path) is None


async def test_names_of_the_same_number() -> None:
    """The last one who took it is found, until none is left."""
    device = f"0:{os.getpid()}test"
    listening: list[ControlSocket] = []
    try:
        for _ in range(12):
            listening.append(ControlSocket(device))
        for last in (11, 10):
            with Connection(device, os.geteuid()) as connection:
                assert connection.process == os.getpid()
                waiting = [bool(select.select([each.fileno()], [], [], 0)[0]) for each in listening]
                assert waiting == [False] * last + [True]
            listening.pop().end("")
        # A name that became free below is not taken: above it is an older mount's daemon.
        listening.pop(0).end("")
        listening.append(ControlSocket(device))
        with Connection(device, os.geteuid()):
            assert select.select([listening[-1].fileno()], [], [], 0)[0]
    finally:
        for each in listening:
            each.end("")
    with pytest.raises(ConnectionRefusedError):
        Connection(device, os.geteuid())


def test_umount_waits_for_all_of_it(mount: MountImage, raw_image: Path) -> None:
    """A mapping that was changed and never synced is in the image when umount returns."""
    mounted = mount(raw_image, "rw", "format=raw", "writeback")
    data = bytearray(raw_image.read_bytes())
    with mounted.file.open("r+b") as file:
        for offset in range(0, 8 << 20, 65536):
            file.seek(offset)
            file.write(b"Z" * 100)
            data[offset : offset + 100] = b"Z" * 100
    mounted.umount()
    assert raw_image.read_bytes() == data


def test_a_scripts_lock_ends_with_the_script(raw_image: Path, tmp_path: Path) -> None:
    """What the daemon inherits it does not keep; the image itself may be named that way."""
    point, lock = tmp_path / "mnt", tmp_path / "lock"
    point.mkdir()
    script = 'exec 9>lock 8<"$2"; flock 9; "$1" /dev/fd/8 mnt -o format=raw,name=disk'
    subprocess.run(["bash", "-c", script, "sh", PROGRAM, raw_image], cwd=tmp_path, check=True)
    subprocess.run(["flock", "-n", lock, "true"], check=True)
    assert (point / "disk").read_bytes() == raw_image.read_bytes()
    imagofs("umount", point)


def test_umount_of_nothing(tmp_path: Path) -> None:
    for point in (tmp_path, tmp_path / "missing"):
        done = imagofs("umount", point, ok=1)
        assert done.stderr.count("\n") == 1 and str(point) in done.stderr


@pytest.mark.parametrize("shape", ["directory", "file"])
def test_killed_daemon(both: Both, raw_image: Path, tmp_path: Path, shape: str) -> None:
    point = tmp_path / "point"
    if shape == "directory":
        point.mkdir()
    else:
        point.touch()
    mounted = both(raw_image, at=point)
    mounted.signal(signal.SIGKILL)
    mounted.wait_for_end()
    assert mount_at(point) is not None and mounts.is_dead(str(point))
    # The next mount clears what is left of it.
    again = both(raw_image, at=point)
    assert sum(mount.point == str(point) for mount in mounts.mounts()) == 1
    again.signal(signal.SIGKILL)
    again.wait_for_end()
    imagofs("umount", point)
    assert mount_at(point) is None


def test_severed_connection(both: Both, raw_image: Path) -> None:
    mounted = both(raw_image)
    fd = os.open(mounted.file, os.O_RDONLY)
    subprocess.run(["umount", "-f", mounted.path], capture_output=True)
    mounted.wait_for_end()
    assert mount_at(mounted.path) is None
    with suppress(OSError):
        os.close(fd)


def test_bind_mounts_end_with_it(both: Both, raw_image: Path, tmp_path: Path) -> None:
    mounted = both(raw_image)
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["mount", "--bind", mounted.path, other], check=True)
    mounted.signal(signal.SIGTERM)
    mounted.wait_for_end()
    assert mount_at(other) is None and mount_at(mounted.path) is None


def test_loop_device_keeps_it_busy(mount: MountImage, raw_image: Path) -> None:
    mounted = mount(raw_image, "rw", "format=raw")
    device = subprocess.check_output(["losetup", "-f", "--show", mounted.file], text=True).strip()
    try:
        done = imagofs("umount", mounted.path, ok=1)
        assert device in done.stderr
        with open(device, "r+b") as disk:
            disk.write(b"through the loop device")
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
    # The device lets go of the file a moment after losetup has returned.
    wait_until(lambda: imagofs("umount", mounted.path, ok=None).returncode == 0)
    assert raw_image.read_bytes().startswith(b"through the loop device")
