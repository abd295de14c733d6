"""Taking a mount away."""

from __future__ import annotations

import errno
import os
from typing import Final

from . import mounts, utab

__all__ = ["detach", "sever"]

_MNT_FORCE: Final = 1
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8


def detach(point: str, *, lazy: bool = True) -> None:
    """Unmount what is mounted at `point`; `lazy`: even while it is used.

    May wait until the daemon has written what the kernel still holds. An ordinary user unmounts
    with the help of fusermount3; root takes it from umount(8)'s table too.

    Raises:
        OSError: EBUSY if it is in use, EPERM if this user may not.
    """
    import ctypes  # trio brings it along anyway; `imagofs umount` is the one who pays

    mount = mounts.find_at(point)
    libc = ctypes.CDLL(None, use_errno=True)
    if not libc.umount2(os.fsencode(point), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)):
        if mount is not None:
            utab.strike(mount)
        return
    number = ctypes.get_errno()
    if number != errno.EPERM:
        raise OSError(number, os.strerror(number), point)
    _detach_as_user(point, lazy=lazy)


def sever(point: str) -> None:
    """Break the connection between the mount at `point` and its daemon, as `umount -f`.

    Raises:
        OSError: EPERM if this user may not.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(point), _UMOUNT_NOFOLLOW | _MNT_FORCE):
        number = ctypes.get_errno()
        if number != errno.EBUSY:  # the connection is severed all the same
            raise OSError(number, os.strerror(number), point)


def _detach_as_user(point: str, *, lazy: bool) -> None:
    import subprocess

    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", point]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise OSError(
            errno.EPERM, "only root may unmount without fusermount3 (package fuse3)", point
        ) from None
    if done.returncode:
        reason = " ".join(os.fsdecode(done.stderr).split()) or f"exit code {done.returncode}"
        number = errno.EBUSY if "busy" in reason.lower() else errno.EPERM
        raise OSError(number, reason.removeprefix("fusermount3: "), point)
