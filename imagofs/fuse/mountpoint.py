"""What has to be seen to at a mountpoint before something is mounted there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from typing import Final

from ..errors import StorageError
from . import mounts
from .unmounting import detach

__all__ = ["prepare_mountpoint", "take_turn"]

log = logging.getLogger("imagofs")

_TURN_SECONDS: Final = 10.0


def prepare_mountpoint(point: str, *, make: int | None = None) -> bool:
    """See that something can be mounted at `point`; clear a mount that lost its daemon.

    Args:
        point: The mountpoint, a real path.
        make: Make it with these permission bits, and the directories above it, if it is missing;
            None: do not.

    Returns:
        True if it is a regular file, False if it is a directory.

    Raises:
        StorageError: It is missing, in use, or something else.
    """
    try:
        while (mount := mounts.find_at(point)) is not None and mount.fstype == mounts.FSTYPE:
            if not mounts.is_dead(point):
                raise StorageError(
                    f"{mount.source} is mounted here already; 'imagofs umount' it first",
                    error=errno.EBUSY,
                    filename=point,
                )
            detach(point)
            log.warning("%s: cleared what a daemon that is gone had left mounted", point)
        if make is not None and not os.path.lexists(point):
            os.makedirs(os.path.dirname(point), exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(point, make)
        kind = os.stat(point).st_mode
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.ENOENT:
            reason += "; make a directory or a file there first, or add -o X-mount.mkdir"
        elif error.errno == errno.ENOTCONN:
            reason += ": unmount what is mounted there first"
        raise StorageError(
            f"cannot mount here: {reason}", error=error.errno or errno.EIO, filename=point
        ) from error
    if not stat.S_ISDIR(kind) and not stat.S_ISREG(kind):
        raise StorageError(
            "cannot mount here: neither a directory nor a regular file",
            error=errno.ENOTDIR,
            filename=point,
        )
    return stat.S_ISREG(kind)


def take_turn(point: str) -> int | None:
    """Wait until nobody else is about to mount at `point`: the kernel would let both.

    Not for ever: whoever may read the mountpoint can lock it too, as flock(1) does.

    Args:
        point: The mountpoint, a real path.

    Returns:
        A descriptor to close once it is mounted; None where that cannot be had.
    """
    try:
        fd = os.open(point, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        log.debug("%s: cannot wait for others who mount here: %s", point, error)
        return None
    deadline = time.monotonic() + _TURN_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                log.warning("%s: it stays locked by another program: not waiting for it", point)
                break
        except OSError as error:  # a file system without locks
            log.debug("%s: cannot wait for others who mount here: %s", point, error)
            break
        time.sleep(0.02)
    os.close(fd)
    return None
