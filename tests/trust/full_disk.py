"""A real full disk: images on a small file system under a real mount (needs root).

While the file system is full, writes fail with ENOSPC where they cannot be done, or the fsync that
must make them durable does; reads go on. Once there is space again everything works, and the image
is clean. What an fsync covered is there, and each sector holds what was written there.
"""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from imagofs.fuse import unmounting
from tests import qemu
from tests.mount.load import Mirror
from tests.mount.mounting import Mounted, imagofs, mounting

K, M = 1 << 10, 1 << 20
_DISK = 20 * M
_ROOM = 6 * M  # that is left for the image
_ERRORS = 12  # that are seen before there is space again


@dataclass(frozen=True, slots=True)
class Kind:
    """An image and how it is mounted.

    Attributes:
        name: For the report.
        options: Of the mount.
        create: `qemu-img create` options; None: a raw image.
        snapshot: An internal snapshot shares all that is there.
        data_file: The guest data is in an external file.
    """

    name: str
    options: tuple[str, ...] = ()
    create: dict[str, str | int | bool] | None = None
    snapshot: bool = False
    data_file: bool = False

    @property
    def is_killed(self) -> bool:
        """Whether kill -9 proves anything: the kernel holds nothing back, and there are tables."""
        return self.create is not None and "writeback" not in self.options


KINDS = (
    Kind("qcow2", create={}),
    Kind("qcow2, snapshot", create={"cluster_size": 4096}, snapshot=True),
    Kind("qcow2, subclusters", create={"extended_l2": True}),
    Kind("qcow2, 512", create={"cluster_size": 512}),
    Kind("qcow2, data file", create={}, data_file=True),
    Kind("qcow2, without the channel", ("channel=off",), {}),
    Kind("qcow2, direct_io", ("direct_io",), {"cluster_size": 4096}),
    Kind("qcow2, writeback", ("writeback",), {}),
    Kind("raw", ("format=raw",)),
    Kind("raw, writeback", ("format=raw", "writeback")),
)


@dataclass(slots=True)
class Count:
    """What happened."""

    writes: int = 0
    syncs: int = 0
    failed_writes: int = 0
    failed_syncs: int = 0

    def add(self, other: Count) -> None:
        """Add another one's."""
        self.writes += other.writes
        self.syncs += other.syncs
        self.failed_writes += other.failed_writes
        self.failed_syncs += other.failed_syncs

    def __str__(self) -> str:
        return (
            f"{self.writes} writes, {self.failed_writes} of them failed, "
            f"{self.syncs} syncs, {self.failed_syncs} of them failed"
        )


@contextmanager
def small_file_system(folder: Path) -> Iterator[Path]:
    """An ext4 with room for one image, of which a file named `ballast` takes the most."""
    file, point = folder / "small.ext4", folder / "small"
    point.mkdir()
    with file.open("wb") as stream:
        stream.truncate(40 * M)
    qemu.run("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", file)
    qemu.run("mount", "-o", "loop", file, point)
    try:
        yield point
    finally:
        qemu.run("umount", point)
        file.unlink()
        point.rmdir()


def _make(kind: Kind, folder: Path) -> Path:
    image = folder / ("disk.img" if kind.create is None else "disk.qcow2")
    if kind.create is None:
        with image.open("wb") as file:
            file.truncate(_DISK)
        return image
    options = dict(kind.create)
    if kind.data_file:
        options["data_file"] = str(folder / "data")
    qemu.create(image, _DISK, writes=["write -P 3 1M 1M"], **options)  # type: ignore[arg-type]
    if kind.snapshot:
        qemu.qemu_img("snapshot", "-c", "before", image)
    return image


def _fill(folder: Path) -> Path:
    """Leave `_ROOM` free."""
    ballast = folder / "ballast"
    ballast.touch()
    room = os.statvfs(folder)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_bsize - _ROOM)
    return ballast


class Writing:
    """Random writes that are mirrored; those that fail may be there or not."""

    def __init__(self, mounted: Mounted, kind: Kind, seed: int) -> None:
        self.kind = kind
        self.rnd = random.Random(seed)
        self.mirror = Mirror(mounted.file.read_bytes())
        self.count = Count()
        self.file = mounted.file
        self.fd = os.open(mounted.file, os.O_RDWR)

    def write(self, *, may_fail: bool) -> bool:
        """One write of whole sectors; whether it succeeded."""
        length = self.rnd.randrange(1, 256) * 512
        offset = self.rnd.randrange((_DISK - length) // 512) * 512
        data = self.rnd.randbytes(length)
        number = self.mirror.begin(offset, data)
        self.count.writes += 1
        try:
            done = os.pwrite(self.fd, data, offset)
        except OSError as error:
            assert may_fail and error.errno == errno.ENOSPC, error
            self.count.failed_writes += 1
            self.mirror.fail(number)
            return False
        if done != length:
            # The kernel sent it as several WRITEs, of which a later one failed.
            assert may_fail and 0 < done < length, done
            self.count.failed_writes += 1
            self.mirror.fail(number)
            return False
        self.mirror.end(number)
        return True

    def sync(self, *, may_fail: bool) -> bool:
        """One fsync; whether it succeeded."""
        self.count.syncs += 1
        try:
            self.mirror.sync(self.fd)
        except OSError as error:
            assert may_fail and error.errno == errno.ENOSPC, error
            self.count.failed_syncs += 1
            if "writeback" in self.kind.options:
                # As on every file system: pages that could not be written back are forgotten.
                self.mirror.doubt()
            return False
        return True

    def close(self) -> None:
        """Close the file; at this point nothing may be missing."""
        os.close(self.fd)


def try_kind(kind: Kind, seed: int, folder: Path) -> Count:
    """Fill the disk under an image, make room again, go on.

    Raises:
        AssertionError: Something is not as it must be.
    """
    with small_file_system(folder) as small, mounting(folder) as mount:
        image = _make(kind, small)
        point = folder / "point"
        point.mkdir()
        mounted = mount(image, "rw", *kind.options, at=point)
        writing = Writing(mounted, kind, seed)
        try:
            writing.write(may_fail=False)
            writing.sync(may_fail=False)
            ballast = _fill(small)
            _write_while_full(writing)
            ballast.unlink()
            # Under writeback an error stays with the file until somebody was told.
            writing.sync(may_fail="writeback" in kind.options)
            for number in range(60):
                writing.write(may_fail=False)
                if number % 20 == 0:
                    writing.sync(may_fail=False)
            writing.sync(may_fail=False)
            writing.mirror.check_after_crash(mounted.file.read_bytes())
        finally:
            writing.close()
        mounted.umount()
        if kind.create is None:
            found = image.read_bytes()
        else:
            qemu.check(image)
            found = qemu.contents(image)
        writing.mirror.check_after_crash(found)
        point.rmdir()
    return writing.count


def _write_while_full(writing: Writing) -> None:
    errors = 0
    for number in range(3000):
        errors += not writing.write(may_fail=True)
        if number % 10 == 9:
            errors += not writing.sync(may_fail=True)
        if errors >= _ERRORS:
            break
    assert errors >= _ERRORS, "the disk did not get full"
    if "writeback" not in writing.kind.options:
        writing.mirror.check_after_crash(writing.file.read_bytes())


def try_kill(kind: Kind, seed: int, folder: Path) -> Count:
    """kill -9 while the disk is full: what an fsync covered is there, and leaks at most."""
    with small_file_system(folder) as small, mounting(folder) as mount:
        image = _make(kind, small)
        point = folder / "point"
        point.mkdir()
        mounted = mount(image, "rw", *kind.options, at=point)
        writing = Writing(mounted, kind, seed)
        try:
            ballast = _fill(small)
            _write_while_full(writing)
            mounted.signal(signal.SIGKILL)
            mounted.wait_for_end()
        finally:
            with suppress(OSError):
                writing.close()
        unmounting.detach(str(point))
        ballast.unlink()
        qemu.check(image, leaks=True)
        writing.mirror.check_after_crash(qemu.contents(image))
        imagofs("check", "--repair", "leaks", image)
        point.rmdir()
    return writing.count
