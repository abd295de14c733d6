"""Fixtures that all tests share."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import qemu

# Where /tmp is a tmpfs (Debian 13's default), tests would miss what a disk's file system does:
# O_DIRECT, a page cache that can be dropped, RWF_NOWAIT, a size limit. /var/tmp is on a disk.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/var/tmp")

# A shell starts what runs in the background with SIGINT ignored, and all that it starts inherits
# that; some tests end programs with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Machines differ in speed: time limits are pytest-timeout's business, not hypothesis'.
settings.register_profile(
    "imagofs", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("imagofs")


def _mounts_below(folder: Path) -> list[str]:
    """Mountpoints below `folder`, innermost first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        point = line.split(" ")[4].encode(errors="surrogateescape").decode("unicode_escape")
        if Path(point).is_relative_to(folder):
            found.append(point)
    return found[::-1]


def _loop_devices_below(folder: Path) -> list[str]:
    """Loop devices whose backing file is below `folder`."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            name = backing.read_text(errors="surrogateescape").rstrip("\n")
        except OSError:  # detached in the meantime
            continue
        if Path(name).is_relative_to(folder):
            found.append(f"/dev/{backing.parts[3]}")
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the run if a test left a mount or a loop device, and take it away."""
    base = tmp_path_factory.getbasetemp().resolve()
    yield
    mounts = _mounts_below(base)
    for point in mounts:
        subprocess.run(["umount", "-l", point], check=False)
    loops = _loop_devices_below(base)
    for device in loops:
        subprocess.run(["losetup", "-d", device], check=False)
    assert not mounts and not loops, f"left behind: {mounts + loops}"


NewImage = Callable[..., Path]


@pytest.fixture
def new_image(tmp_path: Path) -> NewImage:
    """`new_image(size, ...)`: `qemu.create` below the test's `tmp_path`, with a name of its own."""
    numbers = itertools.count()

    def new(size: int | str | None = None, name: str | None = None, **how: object) -> Path:
        path = tmp_path / (name or f"image{next(numbers)}.{how.get('fmt', 'qcow2')}")
        return qemu.create(path, size, **how)  # type: ignore[arg-type]  # passed on as given

    return new
