"""A loop device on a mounted disk: attached with its partitions, with names that stay, detached.

The names are symbolic links in /run/imagofs-loop/NAME: `disk`, and `part1`, `part2` ... for what
the partition table has. Beside them is the device's sequence number, so that a device that somebody
else attached since is never detached.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Final

from .errors import StorageError
from .fuse import client, mounts

__all__ = ["FOLDER", "attach", "detach"]

FOLDER: Final = Path("/run/imagofs-loop")
_NODE_SECONDS = 5.0


def attach(
    name: str, mountpoint: str, *, sector_size: int | None = None, direct_io: bool = True
) -> str:
    """Attach a loop device to the disk that imagofs mounted.

    Args:
        name: What its folder of links is called.
        mountpoint: Where the disk is mounted.
        sector_size: Bytes of a logical sector; None: 512.
        direct_io: Bypass the page cache below the device.

    Returns:
        The device.

    Raises:
        StorageError: It cannot be attached, or `name` has a device already.
    """
    point = mounts.real_path(mountpoint)
    mount = mounts.find_at(point)
    if mount is None or mount.fstype != mounts.FSTYPE:
        raise StorageError("imagofs has mounted nothing here", error=errno.EINVAL, filename=point)
    folder = _folder(name)
    if (device := _attached(folder)) is not None:
        raise StorageError(
            f"{device} is attached already", error=errno.EEXIST, filename=str(folder)
        )
    command = ["losetup", "--find", "--show", "--partscan"]
    command.append(f"--direct-io={'on' if direct_io else 'off'}")
    if sector_size is not None:
        command.append(f"--sector-size={sector_size}")
    if not _call("ask", client.statistics, point)["writable"]:
        command.append("--read-only")
    device = _run([*command, _call("look into", client.disk_file, point)]).strip()
    try:
        _link(folder, device)
    except BaseException:
        _run(["losetup", "--detach", device])
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return device


def detach(name: str, *, seconds: float = 30.0) -> None:
    """Bring everything to the disk and detach; does nothing if it is detached already.

    Args:
        name: As given to `attach`.
        seconds: How long to wait for others that use the device.

    Raises:
        StorageError: It is still in use, or what was written is lost.
    """
    folder = _folder(name)
    device = _attached(folder)
    lost: OSError | None = None
    if device is not None:
        try:
            _sync(device)
        except OSError as error:
            lost = error
        # While it is used this only makes the kernel detach it after its last user.
        _run(["losetup", "--detach", device])
        deadline = time.monotonic() + seconds
        while _attached(folder) is not None:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"still in use{_holders(device)}; it is detached with its last user",
                    error=errno.EBUSY,
                    filename=device,
                )
            time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)
    if lost is not None:
        raise StorageError(
            f"detached, but what was written last is lost: {lost.strerror}",
            error=lost.errno or errno.EIO,
            filename=device,
        )


def _folder(name: str) -> Path:
    if not name or "/" in name or name in (".", ".."):
        raise StorageError("a name is a word without a slash", error=errno.EINVAL, filename=name)
    return FOLDER / name


def _attached(folder: Path) -> str | None:
    """The device that `folder` names, if it is still attached to what it was attached to."""
    try:
        device = os.readlink(folder / "disk")
        wanted = (folder / ".sequence").read_text()
    except OSError:
        return None
    block = _block(device)
    if not (block / "loop/backing_file").exists() or _sequence(block) != wanted:
        return None
    return device


def _block(device: str) -> Path:
    return Path("/sys/block") / os.path.basename(device)


def _sequence(block: Path) -> str:
    """Changes with each attachment (Linux 5.15 and later)."""
    try:
        return (block / "diskseq").read_text()
    except OSError:
        return ""


def _link(folder: Path, device: str) -> None:
    """Make the links, once every partition has its node."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    block = _block(device)
    (folder / ".sequence").write_text(_sequence(block))
    (folder / "disk").symlink_to(device)
    if not list(block.glob(f"{block.name}p*")) and shutil.which("partx"):
        # Not every kernel reads every kind of partition table. No table at all is no failure.
        subprocess.run(["partx", "--add", device], capture_output=True, stdin=subprocess.DEVNULL)
    for entry in sorted(block.glob(f"{block.name}p*")):
        node = Path("/dev") / entry.name
        deadline = time.monotonic() + _NODE_SECONDS
        while not node.is_block_device():
            if time.monotonic() > deadline:
                raise StorageError("has no node in /dev", error=errno.ENODEV, filename=entry.name)
            time.sleep(0.01)
        number = re.sub(r".*p", "", entry.name)
        (folder / f"part{number}").symlink_to(node)


def _sync(device: str) -> None:
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _holders(device: str) -> str:
    """Where file systems of the device are mounted, for a message."""
    block = _block(device)
    numbers = {path.read_text().strip() for path in (block / "dev", *block.glob("loop*/dev"))}
    points = [mount.point for mount in mounts.mounts() if mount.device in numbers]
    return f": mounted at {', '.join(points)}" if points else ""


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise StorageError("is not installed (package mount)", filename=command[0]) from None
    if done.returncode:
        raise StorageError(
            " ".join(done.stderr.removeprefix("losetup: ").split()), filename="losetup"
        )
    return done.stdout


def _call(action: str, function: Any, point: str) -> Any:
    try:
        return function(point)
    except OSError as error:
        raise StorageError.of(action, error, point) from error
