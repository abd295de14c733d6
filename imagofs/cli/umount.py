"""`imagofs umount MOUNTPOINT`: unmount, and wait until everything is on the disk."""

from __future__ import annotations

import errno
import time
from typing import Final

from ..errors import StorageError
from ..fuse import mounts, unmounting
from ..fuse.control import Connection, EndedEarly
from . import Parser, report

__all__ = ["clear_stale", "main", "unmount"]

#: How long to wait for users of whom none is seen to stay: somebody may just be asking for the
#: statistics, or a loop device be on its way out.
_PASSING_SECONDS: Final = 2.0
#: How long to wait before it is said who has a copy of the mount.
_SILENT_SECONDS: Final = 2.0


def main(arguments: list[str]) -> int:
    """Unmount."""
    parser = Parser(
        prog="imagofs umount",
        description="Unmount, and return when everything is on the disk and the daemon has ended.",
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument(
        "-l",
        "--lazy",
        action="store_true",
        help="take the mount away although it is used, and do not wait: the daemon ends with its "
        "last user",
    )
    parser.add_argument(
        "--stale",
        action="store_true",
        help="only clear what a daemon that is gone has left mounted; it is no error if there is "
        "nothing",
    )
    words = parser.parse_args(arguments)
    if words.stale:
        clear_stale(words.mountpoint)
        return 0
    unmount(words.mountpoint, lazy=words.lazy)
    return 0


def unmount(mountpoint: str, *, lazy: bool = False, force: bool = False) -> None:
    """Unmount what imagofs mounted at `mountpoint`; wait for its daemon unless `lazy`.

    Users who are about to go are waited for, 2 s at most. Another mount namespace that has a copy
    of the mount is waited for as long as it has; stderr then says whose it is.

    Args:
        mountpoint: Where it is mounted.
        lazy: Take it away even while it is used, and do not wait.
        force: Sever the connection: its users get errors.

    Raises:
        StorageError: It is no mount of imagofs, it is in use, or something was lost.
    """
    point = mounts.real_path(mountpoint)
    mount = mounts.find_at(point)
    if mount is None or mount.fstype != mounts.FSTYPE:
        raise StorageError("imagofs has mounted nothing here", error=errno.EINVAL, filename=point)
    try:
        connection = Connection(mount.device, mount.owner)
    except OSError as error:
        # No daemon: a stale mount, or one that only another network namespace can reach.
        if not mounts.is_dead(point) and not lazy:
            raise StorageError(
                f"cannot reach the daemon to wait for it ({error.strerror or error}): it runs in "
                f"another namespace; 'umount -i' does not wait",
                filename=point,
            ) from error
        _detach(point, lazy=True)
        return
    elsewhere = len(mounts.find_device(mount.device)) > 1
    with connection:
        if force:
            unmounting.sever(point)  # the daemon takes away what is mounted then
        else:
            _detach(point, lazy=lazy)
            if lazy or elsewhere:
                return
            if not connection.ends_within(_SILENT_SECONDS):
                _tell_who_holds(point, mount.device)
        try:
            lost = connection.wait()
        except EndedEarly:
            lost = (
                f"its daemon (process {connection.process}) ended early: what was written and not "
                f"synced may be lost"
            )
    if lost:
        raise StorageError(lost, filename=point)


def clear_stale(mountpoint: str) -> None:
    """Take away what is mounted at `mountpoint` if its daemon is gone.

    Raises:
        StorageError: It cannot be unmounted.
    """
    point = mounts.real_path(mountpoint)
    mount = mounts.find_at(point)
    if mount is not None and mount.fstype == mounts.FSTYPE and mounts.is_dead(point):
        _detach(point, lazy=True)


def _tell_who_holds(point: str, device: str) -> None:
    holders = mounts.other_namespaces(device)
    if holders:
        report(
            f"{point}: unmounted here, but still mounted in the mount namespace of {holders}; "
            f"waiting until that is gone"
        )


def _detach(point: str, *, lazy: bool) -> None:
    deadline = time.monotonic() + _PASSING_SECONDS
    while True:
        try:
            return unmounting.detach(point, lazy=lazy)
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno == errno.EBUSY:
                users = mounts.users(point)
                if not users.lasting and time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                by = f" by {users.names}" if users.names else ""
                reason = f"in use{by}; end that, or unmount with -l"
            raise StorageError(
                f"cannot unmount: {reason}", error=error.errno or errno.EIO, filename=point
            ) from error
