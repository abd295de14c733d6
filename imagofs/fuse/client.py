"""What other processes ask of a mount through the mount itself: statistics, a sync, a remount.

The daemon never calls any of this: nobody would answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any, Final

__all__ = ["READ_ONLY", "disk_file", "flags_of", "remount", "statistics", "sync"]

_MS_REMOUNT = 32
#: The flag of a read-only mount.
READ_ONLY: Final = 1
_FLAGS: Final = {
    "ro": READ_ONLY,
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "sync": 16,
    "dirsync": 128,
    "noatime": 1 << 10,
    "nodiratime": 1 << 11,
    "relatime": 1 << 21,
    "strictatime": 1 << 24,
}
_OPPOSITES: Final = {
    "rw": "ro",
    "suid": "nosuid",
    "dev": "nodev",
    "exec": "noexec",
    "async": "sync",
    "atime": "noatime",
    "diratime": "nodiratime",
    "norelatime": "relatime",
    "nostrictatime": "strictatime",
    "defaults": "ro",
}


def statistics(point: str) -> dict[str, Any]:
    """The daemon's statistics; see `imagofs.fuse.statistics`.

    Raises:
        OSError: It does not answer, or is too old to know.
    """
    found: dict[str, Any] = json.loads(os.getxattr(point, "user.imagofs.stats"))
    return found


def disk_file(point: str) -> str:
    """The path of the disk's file.

    Raises:
        OSError: The daemon does not answer.
    """
    return os.path.join(point, os.listdir(point)[0]) if os.path.isdir(point) else point


def sync(point: str) -> None:
    """Bring everything that was written through the mount to the disk.

    Raises:
        OSError: That failed.
    """
    fd = os.open(disk_file(point), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def flags_of(options: Iterable[str]) -> int:
    """The flags of mount(2) that mount options stand for; the later of two counts."""
    flags = 0
    for option in options:
        if option in _FLAGS:
            flags |= _FLAGS[option]
        elif option in _OPPOSITES:
            flags &= ~_FLAGS[_OPPOSITES[option]]
    return flags


def remount(point: str, flags: int) -> None:
    """Change the flags of a mount.

    Raises:
        OSError: EBUSY if it is to be read-only and somebody has it open for writing.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    where = os.fsencode(point)
    if libc.mount(None, where, None, ctypes.c_ulong(_MS_REMOUNT | flags), None):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), point)
