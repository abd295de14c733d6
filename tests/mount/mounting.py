"""Real mounts for tests: the program as a user runs it, and what a test asks about a mount."""

from __future__ import annotations

import mmap
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from imagofs.fuse import mounts, unmounting
from imagofs.fuse.control import Connection
from tests import qemu

PROGRAM = Path(sys.executable).with_name("imagofs")
TIMEOUT_SECONDS = 60.0


def imagofs(
    *words: str | Path, ok: int | None = 0, **how: object
) -> subprocess.CompletedProcess[str]:
    """Run `imagofs WORDS...` to its end.

    Args:
        words: The words after the program's name.
        ok: The exit code that it must have; None: any.
        how: Further arguments of `subprocess.run`.
    """
    command = [str(PROGRAM), *map(str, words)]
    done: subprocess.CompletedProcess[str] = subprocess.run(  # type: ignore[call-overload]
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=TIMEOUT_SECONDS,
        **how,
    )
    assert ok is None or done.returncode == ok, f"{command}: {done.returncode}: {done.stderr}"
    return done


def wait_until(condition: Callable[[], object], *, seconds: float = 20.0) -> None:
    """Wait for something that comes by itself."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def make_chain(folder: Path, *, size: int, seed: int) -> tuple[Path, bytes]:
    """Four images, 0.qcow2 the lowest, each with writes of all lengths: the top one, the disk."""
    order = random.Random(seed)
    expected = bytearray(size)
    top: Path | None = None
    for layer in range(4):
        writes = []
        for _ in range(40):
            length = order.choice([4096, 65536, 300 << 10])
            offset = order.randrange(0, size - length, 512)
            value = order.randrange(1, 256)
            writes.append(f"write -P {value} {offset} {length}")
            expected[offset : offset + length] = bytes([value]) * length
        path = folder / f"{layer}.qcow2"
        if top is None:
            top = qemu.create(path, size, writes=writes)
        else:
            top = qemu.create(path, backing=top.name, writes=writes)
    assert top is not None
    return top, bytes(expected)


def drop_pages(path: Path) -> None:
    """Let the page cache have nothing of a file that is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def kernel_threads(mounted: Mounted) -> int:
    """Threads of the kernel that work for a daemon; each ends after some idle seconds."""
    tasks = Path(f"/proc/{mounted.pid}/task")
    return sum((task / "comm").read_text().startswith("iou-wrk") for task in tasks.iterdir())


def mount_at(point: Path) -> mounts.Mount | None:
    """What is mounted at `point`."""
    return mounts.find_at(str(point))


class Mounted:
    """A mount that is up.

    Args:
        point: The mountpoint.
        file: The disk's file in it.
    """

    def __init__(self, point: Path, file: Path) -> None:
        self.path = point
        self.file = file
        mount = mount_at(point)
        assert mount is not None and mount.fstype == "fuse.imagofs", f"nothing mounted at {point}"
        with Connection(mount.device, mount.owner) as connection:
            #: The daemon's process ID.
            self.pid = connection.process
            self._process_fd = os.pidfd_open(self.pid)

    def umount(self) -> None:
        """`imagofs umount`: the daemon has ended when it returns."""
        imagofs("umount", self.path)
        assert not self.is_running()

    def signal(self, number: signal.Signals) -> None:
        """Send the daemon a signal."""
        signal.pidfd_send_signal(self._process_fd, number)

    def is_running(self) -> bool:
        """Whether the daemon runs."""
        return not select.select([self._process_fd], [], [], 0)[0]

    def wait_for_end(self, seconds: float = 20.0) -> None:
        """Wait until the daemon has ended."""
        ready, _, _ = select.select([self._process_fd], [], [], seconds)
        assert ready, f"the daemon (process {self.pid}) did not end"

    def clean_up(self) -> None:
        """Leave neither mount nor daemon behind, whatever the test did. Twice is fine."""
        if self._process_fd < 0:
            return
        while (mount := mount_at(self.path)) is not None and mount.fstype == "fuse.imagofs":
            unmounting.detach(str(self.path))
        if not select.select([self._process_fd], [], [], 10)[0]:
            signal.pidfd_send_signal(self._process_fd, signal.SIGKILL)
            self.wait_for_end()
        os.close(self._process_fd)
        self._process_fd = -1


MountImage = Callable[..., Mounted]


@contextmanager
def mounting(folder: Path) -> Iterator[MountImage]:
    """`mount(image, *options, at=...)`: mounts below `folder` that are gone at the end.

    Without `at` the mountpoint is a new directory; a regular file there becomes the disk.
    """
    up: list[Mounted] = []

    def mount(image: Path, *options: str, at: Path | None = None) -> Mounted:
        point = at
        if point is None:
            point = folder / f"mnt{len(up)}"
            point.mkdir()
        words = ["-o", ",".join(options)] if options else []
        imagofs(image, point, *words)
        file = point if point.is_file() else next(point.iterdir())
        up.append(Mounted(point, file))
        return up[-1]

    try:
        yield mount
    finally:
        for mounted in reversed(up):
            mounted.clean_up()


def read_direct(mounted: Mounted, offset: int, length: int) -> bytes:
    """Read past the kernel's cache of the mount."""
    fd = os.open(mounted.file, os.O_RDONLY | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, length)
        done = os.preadv(fd, [buffer], offset)
        return buffer[:done]
    finally:
        os.close(fd)
